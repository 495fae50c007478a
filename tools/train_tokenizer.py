"""Learn a SentencePiece tokenizer with NEO's settings, from your text or from a recipe of packages."""

from __future__ import annotations

import os
import sys
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

try:
    from megatron.pretrain.data.flags import FlagParser, positive_number
    from megatron.pretrain.data.vocabulary.corpus import Tally, documents, gather, sentences
    from megatron.pretrain.data.vocabulary.recipe import fetch, load_recipe
    from megatron.pretrain.data.vocabulary.train import (
        TrainingSettings, bytes_per_token, read_model, train, write_model)
    from megatron.pretrain.errors import UserError, entry
except ModuleNotFoundError as missing:
    print(f"error: {missing}: run `pip install -e .` in the repository's folder", file=sys.stderr)
    sys.exit(2)

DESCRIPTION = """\
Learn a SentencePiece tokenizer with NEO's settings and write it to PREFIX.model.

BPE with byte fallback, every digit a token, no normalisation, spaces kept; 0 is the unknown,
1 begins and 2 ends. The same text gives the same model. Give either --input, or --recipe,
which fetches the packages it names, keeps 1 % of their text aside and measures on it."""

EXAMPLES = """\
examples:
  python tools/train_tokenizer.py --input corpus.jsonl more.txt --vocab-size 8000 --output-prefix my-tokenizer
  writes my-tokenizer.model

  python tools/train_tokenizer.py --input train.jsonl --held-out test.jsonl --vocab-size 8000 \\
      --compare neo/tokenizer.model --output-prefix my-tokenizer
  also prints the bytes a token stands for in test.jsonl, beside those of another model

  python tools/train_tokenizer.py --recipe neo/tokenizer_recipe.yml --work-dir work --output-prefix tokenizer
  makes neo/tokenizer.model again, on Debian 12"""

HELD_OUT_PERCENT = 1.0


def main(argv: Sequence[str]) -> None:
    started = time.monotonic()
    options = _parse(argv)
    model_path = Path(f"{options.output_prefix}.model")
    if not model_path.parent.is_dir():
        raise UserError(f"--output-prefix {options.output_prefix}: there is no folder {model_path.parent}")
    compared = {path: read_model(path) for path in options.compare}
    for path in options.held_out:
        next(documents(path, options.json_key), None)  # a missing file is refused now, not after training
    inputs, held_out = _from_recipe(options) if options.recipe else (options.input, options.held_out)

    size_mb = sum(os.path.getsize(path) for path in inputs if os.path.exists(path)) / 1e6
    print(f"learning {options.vocab_size:,} pieces from {size_mb:,.1f} MB", file=sys.stderr, flush=True)
    texts = chain.from_iterable(documents(path, options.json_key) for path in inputs)
    settings = TrainingSettings(
        vocab_size=options.vocab_size, character_coverage=options.character_coverage,
        max_sentence_bytes=options.max_sentence_bytes, sample_sentences=options.sample_sentences)
    model = train(sentences(texts, options.max_sentence_bytes), settings)
    write_model(model, model_path)
    _print_measures({str(model_path): model, **compared}, held_out, options.json_key)
    print(f"{model_path}: {options.vocab_size:,} pieces, {len(model) / 1e6:.2f} MB, "
          f"{time.monotonic() - started:,.0f} s")


def _parse(argv: Sequence[str]) -> Namespace:
    parser = FlagParser(prog="train_tokenizer.py", description=DESCRIPTION, epilog=EXAMPLES)
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--input", nargs="+", action="extend", metavar="FILE",
                      help="text to learn from: .json and .jsonl hold an object a line, others plain text")
    text.add_argument("--recipe", type=Path, metavar="YML", help="learn from the packages this file names")
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX", help="write PREFIX.model")
    parser.add_argument("--vocab-size", type=positive_number, default=64000, metavar="N",
                        help="pieces, with the 256 bytes and the 3 control pieces (default: %(default)s)")
    parser.add_argument("--json-key", "--json-keys", default="text", metavar="KEY",
                        help="field of the text in a line of JSON (default: %(default)s)")
    parser.add_argument("--character-coverage", type=_share, default=0.9999, metavar="SHARE",
                        help="share of the text whose characters get a piece; rarer ones become bytes "
                             "(default: %(default)s)")
    parser.add_argument("--max-sentence-bytes", type=positive_number, default=64000, metavar="N",
                        help="a longer line is learnt from in parts (default: %(default)s)")
    parser.add_argument("--sample-sentences", type=positive_number, default=0, metavar="N",
                        help="learn from N lines drawn from all (default: every line)")
    parser.add_argument("--held-out", nargs="+", action="extend", default=[], metavar="FILE",
                        help="texts to measure on: bytes of UTF-8 a token stands for")
    parser.add_argument("--compare", nargs="+", action="extend", default=[], metavar="MODEL",
                        help="other SentencePiece models to measure on the held-out texts")
    parser.add_argument("--work-dir", type=Path, metavar="FOLDER",
                        help="with --recipe: where packages and their text go (GB); what is there is kept")
    parser.add_argument("--any-version", action="store_true",
                        help="with --recipe: take the packages' versions of today, not the recipe's")
    options = parser.parse(argv)
    if options.recipe and not options.work_dir:
        raise UserError("--recipe: needs --work-dir, a folder for the packages and their text")
    if options.compare and not (options.held_out or options.recipe):
        raise UserError("--compare: needs --held-out, the texts to compare on")
    return options


def _share(text: str) -> float:
    """An argparse type: a number above 0, at most 1."""
    try:
        if 0 < float(text) <= 1:
            return float(text)
    except ValueError:
        pass
    raise ArgumentTypeError(f"{text!r} is not a number above 0 and at most 1")


def _from_recipe(options: Namespace) -> tuple[list[str], list[str]]:
    """Fetch and gather what the recipe names: the files to learn from, and those held out."""
    packages = []
    recipe = load_recipe(options.recipe)
    for number, package in enumerate(recipe, 1):
        print(f"package {number} of {len(recipe)}: {package.name}", file=sys.stderr, flush=True)
        packages.append((package, fetch(package, options.work_dir / "packages", options.any_version)))
    corpus = options.work_dir / "corpus"
    tallies = gather(packages, corpus, HELD_OUT_PERCENT)
    _print_tallies(tallies)
    groups = sorted({tally.group for tally in tallies})
    held_out = [str(corpus / f"{group}.held_out.jsonl") for group in groups]
    return [str(corpus / f"{group}.jsonl") for group in groups], held_out + options.held_out


def _print_tallies(tallies: Sequence[Tally]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("package", "group")
    for header in ("files", "not readable", "to learn from, MB", "held out, MB"):
        table.add_column(header, justify="right")

    def add_row(name: str, group: str, rows: Sequence[Tally]) -> None:
        table.add_row(name, group, f"{sum(row.files for row in rows):,}",
                      f"{sum(row.unreadable_files for row in rows):,}",
                      f"{sum(row.training_bytes for row in rows) / 1e6:.2f}",
                      f"{sum(row.held_out_bytes for row in rows) / 1e6:.2f}")

    for tally in tallies:
        add_row(tally.package, tally.group, [tally])
    table.add_section()
    for group in sorted({tally.group for tally in tallies}):
        add_row("all", group, [tally for tally in tallies if tally.group == group])
    Console().print(table)


def _print_measures(models: dict[str, bytes], held_out: Sequence[str], json_key: str) -> None:
    """A row a text, a column a model: bytes per token."""
    from rich.console import Console
    from rich.table import Table

    if not held_out:
        return
    table = Table(title="bytes of UTF-8 per token")
    table.add_column("held-out text", overflow="fold")
    table.add_column("MB", justify="right")
    for name in models:
        table.add_column(name, justify="right", overflow="fold")
    for path in held_out:
        texts = list(documents(path, json_key))
        size_mb = sum(len(text.encode("utf-8")) for text in texts) / 1e6
        measures = (f"{bytes_per_token(model, texts):.3f}" for model in models.values())
        table.add_row(path, f"{size_mb:.2f}", *measures)
    Console().print(table)


if __name__ == "__main__":
    entry(main)
