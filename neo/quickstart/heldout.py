"""Cross entropy of a converted model on held-out documents, beside that of a bigram model.

Both predict the same tokens: the documents, each closed by the end-of-document token, cut into windows of
--seq-length; the token after an end of document is nobody's to guess and is left out, as in training. The
bigram model is fitted on the mixture's training tokens. Ends with code 1 unless the model is below it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import orjson
from bigram import Stream, fit
from rich.console import Console
from rich.table import Table

from megatron.pretrain.config import TokenizerConfig
from megatron.pretrain.data.indexed import IndexedTokens
from megatron.pretrain.data.mixture import load_mixture
from megatron.pretrain.errors import UserError, entry
from megatron.pretrain.tokenizer import Tokenizer, build_tokenizer

WINDOWS_A_BATCH = 8


def read_tokens(documents: Path, tokenizer: Tokenizer, most_tokens: int) -> np.ndarray:
    """The first tokens of a JSON-lines file, int64, each document closed by the end-of-document token."""
    ids: list[int] = []
    with documents.open("rb") as lines:
        for line in lines:
            ids += tokenizer.encode(orjson.loads(line)["text"])
            ids.append(tokenizer.eod_id)
            if len(ids) >= most_tokens:
                break
    return np.array(ids[:most_tokens], np.int64)


def windows_of(tokens: np.ndarray, seq_length: int) -> np.ndarray:
    """(windows, seq_length + 1): each row's last token is the next row's first; a rest is dropped."""
    rows = (len(tokens) - 1) // seq_length
    if rows == 0:
        raise UserError(f"{len(tokens)} held-out tokens fill no window of --seq-length {seq_length}")
    starts = np.arange(rows)[:, None] * seq_length
    return tokens[starts + np.arange(seq_length + 1)]


def model_losses(model_folder: Path, windows: np.ndarray) -> Iterator[np.ndarray]:
    """Cross entropy in nats of every predicted token: (batch, seq_length), a batch of windows at a time."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        for start in range(0, len(windows), WINDOWS_A_BATCH):
            batch = torch.from_numpy(windows[start:start + WINDOWS_A_BATCH])
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
            yield torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), batch[:, 1:], reduction="none").numpy()


def compare(model_folder: Path, windows: np.ndarray, eod_id: int, streams: Sequence[Stream],
            vocab_size: int) -> dict[str, float]:
    """Mean cross entropy in nats of the model, the bigram model and a guess, and over how many tokens."""
    previous, following = windows[:, :-1], windows[:, 1:]
    counted = previous != eod_id
    losses = np.concatenate(list(model_losses(model_folder, windows)))
    return {"tokens": int(counted.sum()),
            "model": float(losses[counted].mean(dtype=np.float64)),
            "bigram": fit(streams, vocab_size).loss(previous[counted], following[counted]),
            "uniform": float(np.log(vocab_size))}


def print_table(figures: dict[str, float]) -> None:
    table = Table(title=f"held-out loss over {figures['tokens']:,} tokens")
    table.add_column("predicts the next token")
    table.add_column("nats a token", justify="right")
    table.add_row("a guess among all tokens", f"{figures['uniform']:.4f}")
    table.add_row("interpolated bigram, fitted on the same training tokens", f"{figures['bigram']:.4f}")
    table.add_row("the converted model", f"{figures['model']:.4f}")
    Console().print(table)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="converted model")
    parser.add_argument("--documents", type=Path, required=True, metavar="FILE", help="held-out JSON lines")
    parser.add_argument("--mixture", type=Path, required=True, metavar="YML", help="what the run trained on")
    parser.add_argument("--tokenizer-model", required=True, metavar="FILE", help="SentencePiece model")
    parser.add_argument("--seq-length", type=int, required=True, metavar="N", help="tokens a window")
    parser.add_argument("--max-tokens", type=int, default=65536, metavar="N",
                        help="held-out tokens to use (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, metavar="JSON", help="write the figures here")
    options = parser.parse_args(arguments)
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_model=options.tokenizer_model))
    windows = windows_of(read_tokens(options.documents, tokenizer, options.max_tokens), options.seq_length)
    streams = [Stream(IndexedTokens(source.prefix).tokens, float(source.rounds))
               for source in load_mixture(options.mixture).sources]
    figures = compare(options.model, windows, tokenizer.eod_id, streams, tokenizer.vocab_size)
    options.output.write_text(json.dumps(figures, indent=2) + "\n")
    print_table(figures)
    return 0 if figures["model"] < figures["bigram"] else 1


if __name__ == "__main__":
    entry(main)
