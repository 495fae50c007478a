"""Learn a SentencePiece model with NEO's settings, and measure what one makes of a text."""

from __future__ import annotations

import io
import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron.pretrain.errors import UserError

SAMPLE_SEED = 42


@dataclass(frozen=True)
class TrainingSettings:
    """What may differ from one tokenizer to the next; all else is NEO's (see `train`)."""

    vocab_size: int
    character_coverage: float = 0.9999
    max_sentence_bytes: int = 64000
    sample_sentences: int = 0
    """Learn from this many sentences drawn from all; 0 takes every one."""


def train(sentences: Iterable[str], settings: TrainingSettings) -> bytes:
    """The serialised SentencePiece model learnt from `sentences`.

    BPE with byte fallback, digits apart, no normalisation, every space kept; 0 is the unknown, 1 begins,
    2 ends; all else SentencePiece's defaults, as in the trainer_spec of NEO's published model.
    The same sentences in the same order give the same model. Raises UserError where there is
    nothing to learn from, or not as many pieces as asked for.
    """
    from sentencepiece import SentencePieceTrainer, set_random_generator_seed

    set_random_generator_seed(SAMPLE_SEED)
    model = io.BytesIO()
    # The whole text is read, and refused where it is bad, before the trainer begins: it would
    # take an exception from an iterator for the end of the text.
    with tempfile.TemporaryFile("w+", encoding="utf-8", newline="\n") as spool:
        for sentence in sentences:
            spool.write(sentence + "\n")
        if not spool.tell():
            raise UserError("--input: holds no text; a tokenizer is learnt from at least one line of it")
        spool.seek(0)
        # The model records the number of threads: one gives the same bytes, and so the same fingerprint, on
        # every machine, and more would hardly be faster.
        try:
            SentencePieceTrainer.train(
                sentence_iterator=(line[:-1] for line in spool), model_writer=model, model_type="bpe",
                vocab_size=settings.vocab_size, character_coverage=settings.character_coverage,
                max_sentence_length=settings.max_sentence_bytes, byte_fallback=True, split_digits=True,
                normalization_rule_name="identity", remove_extra_whitespaces=False,
                unk_id=0, bos_id=1, eos_id=2, pad_id=-1, input_sentence_size=settings.sample_sentences,
                shuffle_input_sentence=True, num_threads=1, minloglevel=2)
        except RuntimeError as error:
            raise _refusal(str(error), settings.vocab_size) from None
    return model.getvalue()


def _refusal(said: str, vocab_size: int) -> UserError:
    """The trainer's words as a sentence that names the flag."""
    if most := re.search(r"Vocabulary size too high.*?<= (\d+)", said):
        return UserError(f"--vocab-size {vocab_size}: the text holds fewer pieces; "
                         f"ask for {most[1]} or fewer, or give more text")
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", said):
        return UserError(f"--vocab-size {vocab_size}: too few for the characters of the text; "
                         f"ask for more than {least[1]}, or lower --character-coverage")
    return UserError(f"--vocab-size {vocab_size}: SentencePiece could not learn from the text: "
                     f"{' '.join(said.split())}")


def read_model(path: str) -> bytes:
    """The serialised model in a file. Raises UserError where it is missing or no SentencePiece model."""
    from sentencepiece import SentencePieceProcessor

    try:
        model = Path(path).read_bytes()
        SentencePieceProcessor(model_proto=model)
    except OSError as error:
        raise UserError(f"--compare {path}: {error.strerror}") from None
    except RuntimeError:
        raise UserError(f"--compare {path}: is no SentencePiece model") from None
    return model


def write_model(model: bytes, path: Path) -> None:
    """Write the model's file whole or not at all. Raises UserError where there is no writing."""
    unfinished = path.with_name(path.name + ".tmp")
    try:
        unfinished.write_bytes(model)
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise UserError(f"--output-prefix: cannot write {path}: {error.strerror}") from None


def bytes_per_token(model: bytes, texts: Iterable[str]) -> float:
    """Bytes of UTF-8 that a token of the model stands for, over all texts together."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_proto=model)
    n_bytes = n_tokens = 0
    for text in texts:
        n_bytes += len(text.encode("utf-8"))
        n_tokens += len(processor.encode(text))
    return n_bytes / max(1, n_tokens)
