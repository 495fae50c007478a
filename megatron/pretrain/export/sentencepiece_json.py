"""A SentencePiece model as a tokenizer.json of the `tokenizers` library that gives the same ids."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from megatron.pretrain.errors import UserError

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""What SentencePiece writes for a space."""

_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
_UNIGRAM, _BPE = 1, 2
_FLOAT = struct.Struct("<f")


@dataclass(frozen=True, slots=True)
class Piece:
    """One entry of the vocabulary; `kind` is a number of ModelProto.SentencePiece.Type."""

    text: str
    score: float
    kind: int

    @property
    def is_unknown(self) -> bool:
        """True for the piece that stands for what the model does not know."""
        return self.kind == _UNKNOWN


@dataclass(frozen=True, eq=False)
class SentencePieceModel:
    """The parts of SentencePiece's ModelProto that decide about ids."""

    pieces: tuple[Piece, ...]
    algorithm: int
    byte_fallback: bool
    space_as_suffix: bool
    character_map: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read the model's file. Raises UserError for another kind of file."""
    try:
        return _parsed(path.read_bytes())
    except (IndexError, ValueError, TypeError, struct.error):
        raise UserError(f"{path} is not a SentencePiece model") from None


@lru_cache(maxsize=1)
def _parsed(content: bytes) -> SentencePieceModel:
    """Fields are numbered in SentencePiece's sentencepiece_model.proto."""
    model = list(_fields(content))
    trainer = dict(_fields(_last(model, 2, b"")))
    normalizer = dict(_fields(_last(model, 3, b"")))
    pieces = tuple(_piece(value) for number, value in model if number == 1)
    return SentencePieceModel(
        pieces=pieces,
        algorithm=trainer.get(3, _UNIGRAM),
        byte_fallback=bool(trainer.get(35, 0)),
        space_as_suffix=bool(trainer.get(24, 0)),
        character_map=normalizer.get(2, b""),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        escape_whitespaces=bool(normalizer.get(5, 1)))


def tokenizer_json(path: Path, special_ids: Mapping[str, int]) -> Tokenizer:
    """The `tokenizers.Tokenizer` of a SentencePiece model.

    `special_ids` are the strings to be found literally in a text, with their ids; those that the model
    does not have must follow its pieces. Otherwise `<s>` in a text is three characters, as it is for
    SentencePiece. Raises UserError for a model that this format cannot express.
    """
    model = read_sentencepiece(path)
    _check_expressible(path, model)
    tokenizer = Tokenizer(_bpe(model))
    tokenizer.normalizer = _normalizer(model)
    tokenizer.decoder = _decoder(model)
    tokenizer.add_special_tokens([
        AddedToken(text, special=True, normalized=False)
        for text, _ in sorted(special_ids.items(), key=lambda item: item[1])])
    return tokenizer


def _check_expressible(path: Path, model: SentencePieceModel) -> None:
    kinds = {piece.kind for piece in model.pieces}
    problem = None
    if model.algorithm != _BPE:
        problem = "is not of the BPE kind"
    elif not model.byte_fallback:
        problem = "has no byte fallback"
    elif kinds - {_NORMAL, _UNKNOWN, _CONTROL, _BYTE}:
        problem = "has user-defined or unused pieces"
    elif model.character_map or model.remove_extra_whitespaces:
        problem = "changes the text (its normalizer is not 'identity' or it removes extra spaces)"
    elif model.space_as_suffix or not model.escape_whitespaces:
        problem = "does not put the sign for a space before a word"
    if problem:
        raise UserError(f"{path} {problem}: tokenizer.json is made for models with NEO's settings, as "
                        "tools/train_tokenizer.py trains them; for another, make tokenizer.json with "
                        "transformers and give its folder")


@lru_cache(maxsize=1)
def _bpe(model: SentencePieceModel) -> models.BPE:
    """Merges in the order of the pieces' scores: SentencePiece joins the pair that makes the best piece.

    A piece that can be made of several pairs has a merge for each; only normal pieces are ever joined.
    """
    ids = {piece.text: number for number, piece in enumerate(model.pieces)}
    normal = {piece.text: piece.score for piece in model.pieces if piece.kind == _NORMAL}
    merges = [
        (left, right)
        for text in sorted(normal, key=lambda text: -normal[text])
        for cut in range(1, len(text))
        if (left := text[:cut]) in normal and (right := text[cut:]) in normal]
    unknown = next(piece.text for piece in model.pieces if piece.is_unknown)
    return models.BPE(
        vocab=ids, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)


def _normalizer(model: SentencePieceModel) -> normalizers.Sequence:
    steps = [normalizers.Replace(" ", SPACE)]
    if model.add_dummy_prefix:
        steps.insert(0, normalizers.Prepend(SPACE))
    return normalizers.Sequence(steps)


def _decoder(model: SentencePieceModel) -> decoders.Sequence:
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.add_dummy_prefix:
        steps.append(decoders.Strip(" ", left=1, right=0))
    return decoders.Sequence(steps)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Field numbers and values of a protobuf message: int, float, or bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, at = _varint(message, at)
        elif wire_type == 2:
            length, at = _varint(message, at)
            if at + length > len(message):
                raise ValueError("truncated")
            value, at = message[at:at + length], at + length
        elif wire_type == 5:
            (value,), at = struct.unpack_from("<f", message, at), at + 4
        elif wire_type == 1:
            (value,), at = struct.unpack_from("<d", message, at), at + 8
        else:
            raise ValueError(f"wire type {wire_type}")
        yield number, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _last(fields: list[tuple[int, Any]], number: int, default: Any) -> Any:
    return next((value for key, value in reversed(fields) if key == number), default)


def _piece(message: bytes) -> Piece:
    # There are tens of thousands, nearly all of one form: a text of one byte's length, a score, and no more.
    if message[0] == 0x0A and len(message) == message[1] + 7 and message[-5] == 0x15:
        return Piece(message[2:-5].decode(), _FLOAT.unpack(message[-4:])[0], _NORMAL)
    fields = dict(_fields(message))
    return Piece(fields[1].decode(), fields.get(2, 0.0), fields.get(3, _NORMAL))
