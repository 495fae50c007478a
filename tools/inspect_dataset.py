"""Show what a token set holds: its facts, how long its documents are, and their texts."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

try:
    from megatron.pretrain.config import TokenizerConfig
    from megatron.pretrain.data.flags import FlagParser
    from megatron.pretrain.data.indexed import IndexedTokens, read_manifest
    from megatron.pretrain.data.inspect import document_lengths, document_tokens, histogram
    from megatron.pretrain.errors import UserError, entry
    from megatron.pretrain.tokenizer import TOKENIZER_TYPES, Tokenizer, build_tokenizer
except ModuleNotFoundError as missing:
    print(f"error: {missing}: run `pip install -e .` in the repository's folder", file=sys.stderr)
    sys.exit(2)

DESCRIPTION = """\
Show what a token set holds: its facts, how long its documents are and, with --doc, their texts.
The tokenizer is needed for texts alone; one that did not make the set is refused."""

EXAMPLES = """\
examples:
  python tools/inspect_dataset.py my-corpus_text_document
  python tools/inspect_dataset.py my-corpus_text_document --doc 0 -1 --tokenizer-model neo/tokenizer.model"""

BAR_CELLS = 40


def main(argv: Sequence[str]) -> None:
    flags = _parse(argv)
    source = IndexedTokens(flags.prefix)
    manifest = read_manifest(source.prefix)
    if not flags.doc:
        _print_facts(source, manifest)
        _print_histogram(source)
        return
    tokenizer = _tokenizer(flags, source, manifest)
    try:
        for number in flags.doc:
            _print_document(source, number, tokenizer)
    except BrokenPipeError:  # `| head` has seen enough; what is left in the buffer has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parse(argv: Sequence[str]) -> Any:
    parser = FlagParser(prog="inspect_dataset.py", description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("prefix", metavar="PREFIX", help="the token set; .bin or .idx at the end may stay")
    parser.add_argument("--doc", nargs="+", type=int, metavar="N",
                        help="print these documents: from 0, or from the end with -1, -2, ...")
    parser.add_argument("--tokenizer-model", metavar="PATH", default="neo/tokenizer.model",
                        help="what the set was made with (default: %(default)s)")
    parser.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES, metavar="TYPE",
                        help="of --tokenizer-model (default: as the set's .json says)")
    parser.add_argument("--tokenizer-sentencepiece-legacy", action="store_true",
                        help="the ids of the NEO fork, as tools/preprocess_data.py takes it")
    return parser.parse(argv)


def _tokenizer(flags: Any, source: IndexedTokens, manifest: dict[str, Any] | None) -> Tokenizer:
    made_with = (manifest or {}).get("tokenizer", {})
    kind = flags.tokenizer_type or made_with.get("type", "SentencePieceTokenizer")
    tokenizer = build_tokenizer(TokenizerConfig(
        tokenizer_type=kind, tokenizer_model=flags.tokenizer_model, vocab_size=made_with.get("vocab_size"),
        tokenizer_sentencepiece_legacy=flags.tokenizer_sentencepiece_legacy))
    if made_with.get("fingerprint", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise UserError(f"--tokenizer-model {flags.tokenizer_model}: is not what {source.prefix} was made "
                        "with; name that one")
    return tokenizer


def _print_facts(source: IndexedTokens, manifest: dict[str, Any] | None) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=source.prefix, show_header=False)
    table.add_row("documents", f"{source.n_documents:,}")
    table.add_row("tokens", f"{source.n_tokens:,} of {source.dtype}")
    for name, value in (manifest or {"manifest": "none; not made by tools/preprocess_data.py"}).items():
        if name == "sources":
            files = f"{len(value)} file{'s' * (len(value) != 1)}"
            value = f"{files}, {sum(each['size_bytes'] for each in value):,} bytes"
        if isinstance(value, dict):
            value = "\n".join(f"{key}: {part}" for key, part in value.items()) or "none"
        if name not in ("documents", "tokens", "format"):
            table.add_row(name, f"{value:,}" if type(value) is int else str(value))
    Console().print(table)


def _print_histogram(source: IndexedTokens) -> None:
    from rich.bar import Bar
    from rich.console import Console
    from rich.table import Table

    lengths = document_lengths(source)
    bins = histogram(lengths)
    most = max((each.documents for each in bins), default=0)
    title = "documents by their tokens"
    if len(lengths):
        title += f": mean {lengths.mean():,.1f}, longest {lengths.max():,} (document {lengths.argmax():,})"
    table = Table(title=title)
    for name in ("tokens each", "documents", "tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for each in bins:
        span = f"{each.low:,}" if each.low == each.high or not each.high else f"{each.low:,} - {each.high:,}"
        table.add_row(span, f"{each.documents:,}", f"{each.tokens:,}",
                      Bar(most, 0, each.documents, width=BAR_CELLS))
    Console().print(table)


def _print_document(source: IndexedTokens, number: int, tokenizer: Tokenizer) -> None:
    ids = document_tokens(source, number).tolist()
    if ids and max(ids) >= tokenizer.vocab_size:
        raise UserError(f"--doc {number}: holds token {max(ids)}, and the tokenizer has "
                        f"{tokenizer.vocab_size} ids; name the one that the set was made with")
    ends = " and the end of the document" if ids[-1:] == [tokenizer.eod_id] else ""
    body = ids[:-1] if ends else ids
    print(f"--- document {number}: {len(body):,} tokens{ends}", flush=True)
    print(tokenizer.decode(body), flush=True)


if __name__ == "__main__":
    entry(main)
