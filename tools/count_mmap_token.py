"""Print how many tokens token sets hold, read off their .idx files."""

from __future__ import annotations

import sys
from collections.abc import Sequence

try:
    from megatron.pretrain.data.flags import FlagParser
    from megatron.pretrain.data.indexed import count_tokens, dataset_prefix
    from megatron.pretrain.errors import entry
except ModuleNotFoundError as missing:
    print(f"error: {missing}: run `pip install -e .` in the repository's folder", file=sys.stderr)
    sys.exit(2)


def main(argv: Sequence[str]) -> None:
    parser = FlagParser(
        prog="count_mmap_token.py",
        description="Print how many tokens token sets hold. Only PREFIX.idx is read.",
        epilog="example:\n  python tools/count_mmap_token.py --mmap_path my-corpus_text_document")
    parser.add_argument("--mmap-path", nargs="+", action="extend", required=True, metavar="PREFIX",
                        help="token sets; .bin or .idx at the end may stay")
    prefixes = [dataset_prefix(path) for path in parser.parse(argv).mmap_path]
    tokens = [count_tokens(prefix) for prefix in prefixes]
    if len(prefixes) > 1:
        _print_table(prefixes, tokens)
    # Two spaces, as the original prints: scripts cut the line there.
    print(f"Total number of tokens:  {sum(tokens)}")


def _print_table(prefixes: Sequence[str], tokens: Sequence[int]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    table.add_column("dataset", overflow="fold")
    table.add_column("tokens", justify="right", no_wrap=True)
    for prefix, count in zip(prefixes, tokens):
        table.add_row(prefix, f"{count:,}")
    Console().print(table)


if __name__ == "__main__":
    entry(main)
