"""The tokenizer beside the weights, such that `AutoTokenizer` gives the ids the model was trained on."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.pretrain.checkpoint.manifest import Manifest
from megatron.pretrain.config import TokenizerConfig
from megatron.pretrain.errors import UserError
from megatron.pretrain.export.hf import write_json
from megatron.pretrain.export.sentencepiece_json import read_sentencepiece, tokenizer_json
from megatron.pretrain.tokenizer import Tokenizer, build_tokenizer

SENTENCEPIECE_FILE = "tokenizer.model"

_SETTING = "TOKENIZER_DIR (--tokenizer-dir)"

_HF_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
             "vocab.json", "merges.txt", "chat_template.jinja", SENTENCEPIECE_FILE)

# Strings the NEO fork finds in a text; the model's own beginning and end of a sentence come to them.
_LEGACY_STRINGS = ("<CLS>", "<SEP>", "<EOD>", "<MASK>", "<PAD>")

# tokenizer.json is held against the trained tokenizer on these before it is shipped.
_PROBES = (
    "", " ", "The quick brown fox.", "  two leading,   three inside, one trailing ",
    "\n\n\tdef f(x):\n\t    return x\n", "0123456789 3.14159 1,000,000", "中文分词,然后是 English。",
    "🙂👩‍👩‍👧 naïve café ½ ①", "<s>a</s><unk> <0x0A> b<EOD> <PAD>c", "aaaaaaaaaaaaaaa ababababab ----------",
    "a\u2581b \u3000 \xa0", "\x00\x01\x7f\ud7ff\U0010ffff",
)


@dataclass(frozen=True)
class TokenizerSource:
    """The tokenizer a model was trained with, and the file or folder it was found in."""

    path: Path
    tokenizer: Tokenizer
    legacy: bool

    @property
    def is_sentencepiece(self) -> bool:
        """True for a SentencePiece model, False for a folder of Hugging Face files."""
        return self.path.suffix == ".model"


def find_tokenizer(manifest: Manifest, given: Path | None) -> TokenizerSource | None:
    """The tokenizer at `given`, or else where the run found it; None if the run had none (NullTokenizer).

    Raises UserError where there is none, or it is not the one that the model was trained with.
    """
    trained, settings = manifest.tokenizer, manifest.config["tokenizer"]
    kind, legacy = trained["type"], settings["tokenizer_sentencepiece_legacy"]
    if kind == "NullTokenizer":
        return None
    if given is None and not Path(settings["tokenizer_model"]).exists():
        raise UserError(f"{_SETTING} is not given, and {settings['tokenizer_model']}, with which the model was "
                        "trained, is not here: give it")
    path = _tokenizer_path(given or Path(settings["tokenizer_model"]), kind)
    tokenizer = build_tokenizer(TokenizerConfig(
        tokenizer_type=kind, tokenizer_model=str(path), tokenizer_sentencepiece_legacy=legacy))
    if tokenizer.vocab_size != trained["vocab_size"]:
        raise UserError(f"{_SETTING} {path} has {tokenizer.vocab_size:,} ids, the model was trained with "
                        f"{trained['vocab_size']:,}: give the tokenizer that it was trained with")
    if tokenizer.fingerprint != trained["fingerprint"]:
        raise UserError(f"{_SETTING} {path} is not the tokenizer that the model was trained with: its "
                        f"fingerprint is {tokenizer.fingerprint[:12]}, run.json says {trained['fingerprint'][:12]}")
    return TokenizerSource(path, tokenizer, legacy)


def write_tokenizer(source: TokenizerSource, folder: Path, max_length: int) -> None:
    """Write the tokenizer's files into `folder`; `max_length` is the longest text in tokens."""
    if source.is_sentencepiece:
        _write_sentencepiece(source, folder, max_length)
        return
    origin = source.path if source.path.is_dir() else source.path.parent
    for name in _HF_FILES:
        if (origin / name).is_file():
            shutil.copyfile(origin / name, folder / name)


def _tokenizer_path(path: Path, kind: str) -> Path:
    """The SentencePiece model that `path` is or holds; a Hugging Face tokenizer is a path as it is."""
    if not path.exists():
        raise UserError(f"{_SETTING} {path} does not exist: "
                        f"give a {SENTENCEPIECE_FILE} or the folder it lies in")
    if kind == "HuggingFaceTokenizer" or path.is_file():
        return path
    models = sorted(path.glob("*.model"))
    if path / SENTENCEPIECE_FILE in models:
        return path / SENTENCEPIECE_FILE
    if len(models) != 1:
        raise UserError(f"{_SETTING} {path} holds no {SENTENCEPIECE_FILE}: give the "
                        "SentencePiece model that the model was trained with, or the folder it lies in")
    return models[0]


def _write_sentencepiece(source: TokenizerSource, folder: Path, max_length: int) -> None:
    """The model three times over: as it is, as tokenizer.json (which needs neither the sentencepiece nor
    the protobuf package to be read), and the settings around it."""
    pieces = read_sentencepiece(source.path).pieces
    special_ids = _literal_ids(source, pieces)
    fast = tokenizer_json(source.path, special_ids)
    for text in _PROBES:
        expected, got = source.tokenizer.encode(text), fast.encode(text, add_special_tokens=False).ids
        if expected != got:
            raise UserError(f"{source.path}: tokenizer.json would give {got} for {text!r} where the model was "
                            f"trained on {expected}; this tokenizer cannot be expressed in it")
    shutil.copyfile(source.path, folder / SENTENCEPIECE_FILE)
    fast.save(str(folder / "tokenizer.json"))
    roles = _roles(source, pieces)
    write_json(folder / "special_tokens_map.json", roles)
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **roles,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        # A literal "</s>" in a text was three characters in training, except for the fork's tokenizer.
        "split_special_tokens": not source.legacy,
    })


def _literal_ids(source: TokenizerSource, pieces: tuple[Any, ...]) -> dict[str, int]:
    if not source.legacy:
        return {}
    tokenizer = source.tokenizer
    sentence = [pieces[number].text for number in (tokenizer.bos_id, tokenizer.eos_id)]
    return {text: tokenizer.encode(text)[0] for text in (*sentence, *_LEGACY_STRINGS)}


def _roles(source: TokenizerSource, pieces: tuple[Any, ...]) -> dict[str, str]:
    """Which token has which role. The fork's `<unk>` stays unnamed: transformers would find it in texts."""
    ids = {"bos_token": source.tokenizer.bos_id, "eos_token": source.tokenizer.eos_id}
    if not source.legacy:
        ids["unk_token"] = next((n for n, piece in enumerate(pieces) if piece.is_unknown), None)
    return {role: pieces[number].text for role, number in ids.items() if number is not None}
