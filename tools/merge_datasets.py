"""Join token sets, such as the shards of a preprocessing, into one."""

from __future__ import annotations

import sys
from collections.abc import Sequence

try:
    from megatron.pretrain.data.flags import FlagParser
    from megatron.pretrain.data.merge import Merged, merge_sets, merge_shards
    from megatron.pretrain.errors import entry
except ModuleNotFoundError as missing:
    print(f"error: {missing}: run `pip install -e .` in the repository's folder", file=sys.stderr)
    sys.exit(2)

DESCRIPTION = """\
Join token sets into one, in the order given. Nothing is tokenized again: tokens are copied by the
kernel where the file systems let it, and the index is written anew.

With --output-prefix alone, the shards that tools/preprocess_data.py --shard I/N wrote under that
prefix are joined, for every key, to the very files that one run over the whole input writes. A
shard that is missing, or was made in another way than the others, is named and nothing is written."""

EXAMPLES = """\
examples:
  python tools/merge_datasets.py --output-prefix corpus
  joins corpus_00001-of-00016_text_document ... into corpus_text_document, and corpus_..._rejects.jsonl

  python tools/merge_datasets.py --input wiki_text_document books_text_document --output-prefix both
  writes both.bin, both.idx and both.json"""


def main(argv: Sequence[str]) -> None:
    parser = FlagParser(prog="merge_datasets.py", description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("--input", nargs="+", action="extend", metavar="PREFIX",
                        help="token sets in this order; .bin or .idx at the end may stay")
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX",
                        help="with --input the whole prefix of the set to write, else that of the shards")
    flags = parser.parse(argv)
    if flags.input:
        _print_table([merge_sets(flags.input, flags.output_prefix)])
    else:
        _print_table(merge_shards(flags.output_prefix))


def _print_table(merged: Sequence[Merged]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    table.add_column("dataset", overflow="fold")
    for name in ("parts", "documents", "tokens", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in merged:
        table.add_row(each.prefix, f"{each.parts}", f"{each.documents:,}", f"{each.tokens:,}",
                      f"{each.seconds:.1f}")
    Console().print(table)


if __name__ == "__main__":
    entry(main)
