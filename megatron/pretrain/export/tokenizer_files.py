"""The tokenizer beside the weights, such that `AutoTokenizer` gives the ids the model was trained on."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.pretrain.checkpoint.manifest import Manifest
from megatron.pretrain.config import TokenizerConfig
from megatron.pretrain.errors import UserError
from megatron.pretrain.export.hf import write_json
from megatron.pretrain.export.sentencepiece_json import Piece, read_sentencepiece, tokenizer_json
from megatron.pretrain.tokenizer import SENTENCEPIECE_TYPES, Tokenizer, build_tokenizer

SENTENCEPIECE_FILE = "tokenizer.model"

_SETTING = "TOKENIZER_DIR (--tokenizer-dir)"

_HF_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
             "vocab.json", "merges.txt", "chat_template.jinja", SENTENCEPIECE_FILE)

# Found in a text by the NEO fork, as well as the model's own beginning and end of a sentence.
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
    """The tokenizer a model was trained with, ready to be written.

    `fast` is its tokenizer.json where it is a SentencePiece model, None where it is Hugging Face's already;
    `roles` are the texts of its bos, eos and unk tokens.
    """

    path: Path
    fast: Any | None
    roles: Mapping[str, str]
    finds_special_strings: bool


def find_tokenizer(manifest: Manifest, given: Path | None) -> TokenizerSource | None:
    """The tokenizer at `given`, or else where the run found it; None if the run had none (NullTokenizer).

    Raises UserError where there is none, it is not the one that the model was trained with, or it cannot be
    written so that the ids stay the same.
    """
    trained, settings = manifest.tokenizer, manifest.config["tokenizer"]
    kind, legacy = trained["type"], settings["tokenizer_sentencepiece_legacy"]
    if kind == "NullTokenizer":
        return None
    if given is None and not Path(settings["tokenizer_model"]).exists():
        raise UserError(f"{_SETTING} is not given, and {settings['tokenizer_model']}, with which the model "
                        "was trained, is not here: give it")
    path = _tokenizer_path(given or Path(settings["tokenizer_model"]), kind)
    tokenizer = build_tokenizer(TokenizerConfig(
        tokenizer_type=kind, tokenizer_model=str(path), tokenizer_sentencepiece_legacy=legacy))
    _check_same(path, tokenizer, trained)
    if kind not in SENTENCEPIECE_TYPES:
        return TokenizerSource(path, None, {}, finds_special_strings=True)
    pieces = read_sentencepiece(path).pieces
    fast = tokenizer_json(path, _special_ids(tokenizer, pieces) if legacy else {})
    _check_ids(path, fast, tokenizer)
    return TokenizerSource(path, fast, _roles(tokenizer, pieces, legacy), finds_special_strings=legacy)


def write_tokenizer(source: TokenizerSource, folder: Path, max_length: int) -> None:
    """Write the tokenizer's files into `folder`; `max_length` is the longest text in tokens."""
    if source.fast is None:
        _copy_hf_files(source.path, folder)
        return
    # The model three times over: as it is; as tokenizer.json, which needs neither the sentencepiece nor the
    # protobuf package to be read; and the settings around it.
    shutil.copyfile(source.path, folder / SENTENCEPIECE_FILE)
    source.fast.save(str(folder / "tokenizer.json"))
    write_json(folder / "special_tokens_map.json", source.roles)
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **source.roles,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        # A literal "</s>" in a text was three characters in training, except for the fork's tokenizer.
        "split_special_tokens": not source.finds_special_strings,
    })


def _tokenizer_path(path: Path, kind: str) -> Path:
    """The SentencePiece model that `path` is or holds; a Hugging Face tokenizer is a path as it is."""
    if not path.exists():
        raise UserError(f"{_SETTING} {path} does not exist: give a {SENTENCEPIECE_FILE} or its folder")
    if kind not in SENTENCEPIECE_TYPES or path.is_file():
        return path
    models = sorted(path.glob("*.model"))
    if path / SENTENCEPIECE_FILE in models:
        return path / SENTENCEPIECE_FILE
    if len(models) != 1:
        raise UserError(f"{_SETTING} {path} holds no {SENTENCEPIECE_FILE}: give the SentencePiece model that "
                        "the model was trained with, or the folder it lies in")
    return models[0]


def _check_same(path: Path, tokenizer: Tokenizer, trained: Mapping[str, Any]) -> None:
    """Refuse a tokenizer whose ids are not those that the model learnt."""
    if tokenizer.vocab_size != trained["vocab_size"]:
        raise UserError(f"{_SETTING} {path} has {tokenizer.vocab_size:,} ids, the model was trained with "
                        f"{trained['vocab_size']:,}: give the tokenizer that it was trained with")
    if tokenizer.fingerprint != trained["fingerprint"]:
        raise UserError(
            f"{_SETTING} {path} is not the tokenizer that the model was trained with: its fingerprint is "
            f"{tokenizer.fingerprint[:12]}, run.json says {trained['fingerprint'][:12]}")


def _check_ids(path: Path, fast: Any, tokenizer: Tokenizer) -> None:
    for text in _PROBES:
        expected, got = tokenizer.encode(text), fast.encode(text, add_special_tokens=False).ids
        if expected != got:
            raise UserError(f"{path}: tokenizer.json would give {got} for {text!r}, the model was trained on "
                            f"{expected}: this tokenizer cannot be expressed in it")


def _special_ids(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> dict[str, int]:
    """Strings that the NEO fork finds in a text, and their ids."""
    sentence = [pieces[number].text for number in (tokenizer.bos_id, tokenizer.eos_id)]
    return {text: tokenizer.encode(text)[0] for text in (*sentence, *_LEGACY_STRINGS)}


def _roles(tokenizer: Tokenizer, pieces: Sequence[Piece], legacy: bool) -> dict[str, str]:
    """Which token has which role. The fork's `<unk>` stays unnamed: transformers would find it in texts."""
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    if not legacy:
        ids["unk_token"] = next((n for n, piece in enumerate(pieces) if piece.is_unknown), None)
    return {role: pieces[number].text for role, number in ids.items() if number is not None}


def _copy_hf_files(path: Path, folder: Path) -> None:
    for name in _HF_FILES:
        file = (path if path.is_dir() else path.parent) / name
        if file.is_file():
            shutil.copyfile(file, folder / name)
    if path.is_file():
        shutil.copyfile(path, folder / "tokenizer.json")
