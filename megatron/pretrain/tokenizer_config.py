"""Which tokenizer a run has: the part of its configuration that the data tools need, quick to import."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.pretrain.setting import setting


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Which tokenizer the data was made with."""

    tokenizer_type: str = setting(
        "SentencePieceTokenizer", "SentencePieceTokenizer, HuggingFaceTokenizer, or NullTokenizer (a bare "
        "vocabulary of --vocab-size ids). Llama2Tokenizer and GPTSentencePieceTokenizer are other names "
        "of the first.",
        choices=("SentencePieceTokenizer", "Llama2Tokenizer", "GPTSentencePieceTokenizer",
                 "HuggingFaceTokenizer", "NullTokenizer"))
    tokenizer_model: str | None = setting(None, "The tokenizer's file or folder.")
    tokenizer_sentencepiece_legacy: bool = setting(
        False, "The NEO fork's vocabulary: <CLS> <SEP> <EOD> <MASK> <PAD> after the model's pieces.")
    vocab_size: int | None = setting(None, "Ids of a NullTokenizer.")
