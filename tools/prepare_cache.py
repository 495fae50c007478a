"""Verify a mixture ahead of training, on a machine without GPUs; there is no cache to build."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    from megatron.pretrain.config import TokenizerConfig
    from megatron.pretrain.data.flags import FlagParser
    from megatron.pretrain.data.indexed import dataset_prefix
    from megatron.pretrain.data.blend import parse_blend
    from megatron.pretrain.data.mixture_env import read_mixture_env
    from megatron.pretrain.data.progress import ByteProgress
    from megatron.pretrain.data.verify import Verified, verify
    from megatron.pretrain.errors import UserError, entry
    from megatron.pretrain.tokenizer import TOKENIZER_TYPES, build_tokenizer
except ModuleNotFoundError as missing:
    print(f"error: {missing}: run `pip install -e .` in the repository's folder", file=sys.stderr)
    sys.exit(2)

DESCRIPTION = """\
Verify every token set of a mixture from end to end, ahead of training and on a machine without GPUs.

Megatron-LM builds index caches here. This repository has none: which tokens sample i is follows from
the seed and the blend (megatron/pretrain/data/order.py), so there is nothing to build, to share or to
go stale. Training checks headers, sizes and manifests when it starts; what it takes on trust is read
here: each entry of each index, each token against the vocabulary, and the manifests' counts. What was
read is then in the page cache of the machine, or of its file server."""

EXAMPLES = """\
examples:
  python tools/prepare_cache.py --tokenizer-model neo/tokenizer.model
  verifies what mixture.env of the folder names

  python tools/prepare_cache.py --data-path 1 wiki_text_document 2 books_text_document"""


def main(argv: Sequence[str]) -> None:
    flags = _parse(argv)
    tokenizer = None
    if flags.tokenizer_model:
        tokenizer = build_tokenizer(TokenizerConfig(
            tokenizer_type=flags.tokenizer_type, tokenizer_model=flags.tokenizer_model,
            tokenizer_sentencepiece_legacy=flags.tokenizer_sentencepiece_legacy))
    prefixes = list(dict.fromkeys(dataset_prefix(each.prefix) for each in parse_blend(_words(flags))))
    started = time.monotonic()
    verified = _verify_all(prefixes, tokenizer)
    _print_table(verified, time.monotonic() - started)


def _parse(argv: Sequence[str]) -> Any:
    parser = FlagParser(prog="prepare_cache.py", description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("--data-path", nargs="+", metavar="WORD",
                        help="as for training: prefixes, or pairs of weight and prefix; plain or base64")
    parser.add_argument("--mixture-env", metavar="FILE", default="mixture.env",
                        help="what gen_mixture_str.sh wrote; read where --data-path is not given "
                        "(default: %(default)s)")
    parser.add_argument("--tokenizer-model", metavar="PATH",
                        help="the run's tokenizer; without it tokens are not read")
    parser.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES, default="SentencePieceTokenizer",
                        metavar="TYPE", help=f"{', '.join(TOKENIZER_TYPES)} (default: the first)")
    parser.add_argument("--tokenizer-sentencepiece-legacy", action="store_true",
                        help="as the run has it")
    return parser.parse(argv)


def _words(flags: Any) -> list[str]:
    return flags.data_path or read_mixture_env(flags.mixture_env)["DATA_PATH"].split()


def _verify_all(prefixes: Sequence[str], tokenizer: Any) -> list[Verified]:
    sizes_bytes = [_size_bytes(f"{prefix}.bin") for prefix in prefixes]
    verified = []
    with ByteProgress("verifying", sum(sizes_bytes)) as progress:
        for prefix, size_bytes in zip(prefixes, sizes_bytes):
            verified.append(verify(prefix, tokenizer))
            progress.advance(size_bytes)
    return verified


def _size_bytes(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; a token set is PREFIX.bin and PREFIX.idx") from None


def _print_table(verified: Sequence[Verified], seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{len(verified)} sets are whole ({seconds:.1f} s)")
    table.add_column("dataset", overflow="fold")
    for name in ("documents", "tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in verified:
        table.add_row(each.prefix, f"{each.documents:,}", f"{each.tokens:,}")
    Console().print(table)


if __name__ == "__main__":
    entry(main)
