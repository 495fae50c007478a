"""Text to token ids and back, with the ids Megatron-LM would give."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron.pretrain.errors import UserError

if TYPE_CHECKING:
    from megatron.pretrain.tokenizer_config import TokenizerConfig

SENTENCEPIECE_TYPES = ("SentencePieceTokenizer", "Llama2Tokenizer", "GPTSentencePieceTokenizer")
"""Megatron-LM's names of one thing: megatron-core 0.16 reads the three alike."""

TOKENIZER_TYPES = (*SENTENCEPIECE_TYPES, "HuggingFaceTokenizer", "NullTokenizer")


class Tokenizer(Protocol):
    """What the rest of the house knows of a tokenizer. Implementations can be pickled."""

    vocab_size: int
    """Ids that carry meaning, before the model pads its embedding."""
    eod_id: int
    """The id that ends a document."""
    bos_id: int | None
    eos_id: int | None
    fingerprint: str
    """SHA-256 (hex) over the model's bytes and the settings that change ids."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with nothing added before or after."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`."""


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that `config` names.

    Raises UserError where its type is unknown or its model is missing, unreadable or of another kind.
    """
    kind, model = config.tokenizer_type, config.tokenizer_model
    if kind not in TOKENIZER_TYPES:
        raise UserError(f"--tokenizer-type {kind}: unknown; known are {', '.join(TOKENIZER_TYPES)}")
    if config.tokenizer_sentencepiece_legacy and kind != "SentencePieceTokenizer":
        raise UserError(f"--tokenizer-sentencepiece-legacy: only the SentencePieceTokenizer of the NEO fork "
                        f"had tokens appended, not {kind}; leave the flag out")
    if kind == "NullTokenizer":
        if not config.vocab_size or config.vocab_size < 1:
            raise UserError("--tokenizer-type NullTokenizer: needs --vocab-size, 1 or more")
        return NullTokenizer(config.vocab_size)
    if not model:
        raise UserError(f"--tokenizer-type {kind}: needs --tokenizer-model, the tokenizer's file or folder")
    if kind == "HuggingFaceTokenizer":
        return HuggingFaceTokenizer(Path(model))
    if config.tokenizer_sentencepiece_legacy:
        return LegacySentencePieceTokenizer(Path(model))
    return SentencePieceTokenizer(Path(model))


class SentencePieceTokenizer:
    """A SentencePiece model as it is; a document ends with the model's end-of-sentence id."""

    def __init__(self, path: Path) -> None:
        self._pieces, model_bytes = _load_sentencepiece(path)
        self.vocab_size: int = self._pieces.vocab_size()
        self.bos_id = _id_or_none(self._pieces.bos_id())
        self.eos_id = _id_or_none(self._pieces.eos_id())
        if self.eos_id is None:
            raise UserError(f"--tokenizer-model {path}: has no end-of-sentence piece, which is what ends a "
                            "document; train it with one (eos_id=2)")
        self.eod_id: int = self.eos_id
        self.fingerprint = _fingerprint("sentencepiece", model_bytes)

    @property
    def model_bytes(self) -> bytes:
        """The model's file, as the library holds it."""
        return self._pieces.serialized_model_proto()

    def encode(self, text: str) -> list[int]:
        return self._pieces.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._pieces.decode([int(i) for i in ids])


class LegacySentencePieceTokenizer:
    """The NEO fork's SentencePiece: special tokens after the pieces, found as literal strings in the text.

    The text between two special tokens is encoded as if it stood alone, as Megatron-LM's former
    `_SentencePieceTokenizer.tokenize` did. Documents end with `<EOD>`, not with `</s>`.
    """

    def __init__(self, path: Path) -> None:
        self._pieces, model_bytes = _load_sentencepiece(path)
        self._special_ids = _legacy_special_ids(self._pieces)
        self._special_names = {number: name for name, number in self._special_ids.items()}
        # At one position the first alternative wins, and the fork, too, preferred the token added first.
        self._special = re.compile("|".join(re.escape(name) for name in self._special_ids))
        self.vocab_size: int = max(self._pieces.vocab_size(), *(number + 1 for number in self._special_names))
        self.eod_id: int = self._special_ids["<EOD>"]
        *_, self.bos_id, self.eos_id = (self._special_ids[name] for name in _legacy_names(self._pieces))
        self.fingerprint = _fingerprint("sentencepiece-legacy", model_bytes)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        start = 0
        for match in self._special.finditer(text):
            ids += self._pieces.encode(text[start:match.start()])
            ids.append(self._special_ids[match.group()])
            start = match.end()
        return ids + self._pieces.encode(text[start:])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special tokens become the strings that `encode` reads them from."""
        parts: list[str] = []
        start = 0
        ids = [int(i) for i in ids]
        for place, number in enumerate(ids):
            if number in self._special_names:
                parts += self._pieces.decode(ids[start:place]), self._special_names[number]
                start = place + 1
        return "".join(parts) + self._pieces.decode(ids[start:])


class HuggingFaceTokenizer:
    """A `tokenizer.json`; its end-of-sequence token, which the files beside it name, ends a document."""

    def __init__(self, path: Path) -> None:
        folder = path if path.is_dir() else path.parent
        self._tokenizer, self.fingerprint = _load_hugging_face(path)
        # A file may carry the truncation and padding of the task its model was trained on.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        names = _special_names_beside(folder)
        self.bos_id = self._id_of(names.get("bos_token"))
        self.eos_id = self._id_of(names.get("eos_token"))
        if self.eos_id is None:
            raise UserError(f"--tokenizer-model {path}: tokenizer_config.json in {folder} must name an "
                            "eos_token of the vocabulary: it is what ends a document")
        self.eod_id: int = self.eos_id

    def _id_of(self, name: str | None) -> int | None:
        return None if name is None else self._tokenizer.token_to_id(name)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


class NullTokenizer:
    """Numbers between spaces are the ids themselves; the last of the `size` ids ends a document."""

    def __init__(self, size: int) -> None:
        self.vocab_size = size
        self.eod_id = size - 1
        self.bos_id: int | None = None
        self.eos_id: int | None = self.eod_id
        self.fingerprint = _fingerprint("null", str(size).encode())

    def encode(self, text: str) -> list[int]:
        for word in text.split():
            if not (word.isdecimal() and int(word) < self.vocab_size):
                raise UserError(f"NullTokenizer reads ids from 0 to {self.eod_id}, not {word!r}")
        return [int(word) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(str(int(i)) for i in ids)


def _fingerprint(kind: str, model_bytes: bytes) -> str:
    return hashlib.sha256(kind.encode() + b"\0" + model_bytes).hexdigest()


def _id_or_none(number: int) -> int | None:
    return None if number < 0 else number


def _read_model(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"--tokenizer-model {path}: {error.strerror}; it must name a tokenizer's file") from None


def _load_sentencepiece(path: Path) -> tuple[Any, bytes]:
    """The processor and the bytes it was made of."""
    import sentencepiece

    model_bytes = _read_model(path)
    pieces = sentencepiece.SentencePieceProcessor()
    try:
        pieces.LoadFromSerializedProto(model_bytes)
    except RuntimeError:
        raise UserError(f"--tokenizer-model {path}: is not a SentencePiece model; "
                        "tools/train_tokenizer.py makes one") from None
    return pieces, model_bytes


def _legacy_names(pieces: Any) -> tuple[str, ...]:
    """The fork's special tokens in its order; the last two are the beginning and the end of a sentence."""
    def piece_or(number: int, name: str) -> str:
        return name if number < 0 else pieces.id_to_piece(number)

    return ("<CLS>", "<SEP>", "<EOD>", "<MASK>", piece_or(pieces.pad_id(), "<PAD>"),
            piece_or(pieces.bos_id(), "<BOS>"), piece_or(pieces.eos_id(), "<EOS>"))


def _legacy_special_ids(pieces: Any) -> dict[str, int]:
    """A piece's own id where the model has the token, else the next id after the pieces."""
    ids: dict[str, int] = {}
    next_id = pieces.vocab_size()
    for name in _legacy_names(pieces):
        number = pieces.piece_to_id(name)
        if name not in ids and pieces.id_to_piece(number) != name:
            number, next_id = next_id, next_id + 1
        ids.setdefault(name, number)
    return ids


def _load_hugging_face(path: Path) -> tuple[Any, str]:
    """The `tokenizers.Tokenizer` and its fingerprint."""
    try:
        import tokenizers
    except ModuleNotFoundError:
        raise UserError("--tokenizer-type HuggingFaceTokenizer: needs `pip install tokenizers`") from None
    file = path / "tokenizer.json" if path.is_dir() else path
    if path.is_dir() and not file.exists():
        tokenizer = _convert_with_transformers(path)
        return tokenizer, _fingerprint("huggingface", tokenizer.to_str().encode())
    model_bytes = _read_model(file)
    try:
        return tokenizers.Tokenizer.from_buffer(model_bytes), _fingerprint("huggingface", model_bytes)
    except ValueError as error:
        raise UserError(f"--tokenizer-model {file}: is not a tokenizer.json ({error})") from None


def _convert_with_transformers(folder: Path) -> Any:
    """The `tokenizers.Tokenizer` that transformers makes of the older files in `folder`."""
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError:
        raise UserError(f"--tokenizer-model {folder}: holds no tokenizer.json; "
                        "to read other files, `pip install transformers`") from None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer
    except (OSError, ValueError, AttributeError, ImportError, KeyError, TypeError):
        raise UserError(f"--tokenizer-model {folder}: holds no tokenizer.json, and transformers finds no "
                        "tokenizer in it that it could turn into one") from None


def _special_names_beside(folder: Path) -> dict[str, str]:
    """`eos_token` and its like by name, from the files in which Hugging Face keeps them."""
    names: dict[str, str] = {}
    for file in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        if not file.exists():
            continue
        try:
            entries = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{file}: not valid JSON ({error})") from None
        if not isinstance(entries, dict):
            raise UserError(f"{file}: must hold a JSON object")
        for key in ("bos_token", "eos_token"):
            token = entries.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            if token is not None:
                names[key] = token
    return names
