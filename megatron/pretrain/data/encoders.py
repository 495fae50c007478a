"""What turns a chunk of JSON lines into tokens, and the choice of it."""

from __future__ import annotations

from typing import Protocol

from megatron.pretrain.data.documents import Chunk
from megatron.pretrain.data.encoded import EncodedTexts
from megatron.pretrain.tokenizer import SentencePieceTokenizer, Tokenizer


class Encoder(Protocol):
    """Turns a chunk of a file into tokens, for each key; runs inside the workers, so it can be pickled."""

    def __call__(self, chunk: Chunk) -> list[EncodedTexts]:
        """Raises BadDocument for the chunk's first line that is no document."""


def choose_encoder(tokenizer: Tokenizer, keys: tuple[str, ...], append_eod: bool, *,
                   native: bool = True) -> tuple[Encoder, str]:
    """The fastest encoder that gives `tokenizer`'s ids, and a line that says which it is and why.

    native: whether the one in C++ may be chosen.
    """
    try:
        if native:
            return _native_encoder(tokenizer, keys, append_eod), "encoder: native, a sample checked"
        why = "as --encoder library asks"
    except _NotNative as reason:
        why = f"not the native one: {reason}"
    from megatron.pretrain.data.library_encoder import LibraryEncoder  # with numpy, which is slow to import

    said = f"encoder: {type(tokenizer).__name__}'s library, {why}"
    return LibraryEncoder(tokenizer, keys, append_eod), said


class _NotNative(Exception):
    """Why the native encoder is not used."""


def _native_encoder(tokenizer: Tokenizer, keys: tuple[str, ...], append_eod: bool) -> Encoder:
    if not isinstance(tokenizer, SentencePieceTokenizer):
        raise _NotNative("it encodes as the SentencePieceTokenizer alone does")
    try:
        from megatron.pretrain.data.native_encoder import Declined, NativeEncoder
    except ImportError:
        raise _NotNative("it was not built; `pip install -e .` builds it, given a C++ compiler") from None
    try:
        return NativeEncoder(tokenizer, keys, append_eod)
    except Declined as reason:
        raise _NotNative(f"{reason}, which it does not cover") from None
