"""Mixture configuration in; DATA_PATH, TRAIN_ITERS, a table and the launchers' mixture.env out."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

try:
    from rich.console import Console
    from rich.table import Table

    from megatron.pretrain.data.mixture import Mixture, load_mixture
    from megatron.pretrain.data.mixture_env import blend_file, write_mixture_env
    from megatron.pretrain.errors import entry
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing.name} is not installed; run `pip install -e .` in the repository's root")

# Tokens of datasets that are not on this machine, by .bin path: a number, or text such as "1.5B".
# A dataset that is here needs no entry: its .idx is read. TOKEN_COUNTS: of the YAML goes before this.
DB2TOKCNT: dict[str, int | str] = {}


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Read a mixture's YAML file, print its mixture string and TRAIN_ITERS, and write them "
        "for the launchers. Relative paths in it are relative to the current directory.",
        epilog="example: python neo/scripts/parse_mixture.py -c neo/scripts/mixture_cfg.yml")
    parser.add_argument("-c", "--cfg", required=True, metavar="FILE.yml",
                        help="GLOBAL_BATCH_SIZE, SEQ_LEN, and lists of .bin paths under <number>_ROUND: keys")
    parser.add_argument("--env-file", default=os.environ.get("MIXTURE_ENV") or "mixture.env", metavar="FILE",
                        help="where the launchers' settings go; the blend goes beside it, with the suffix "
                        ".blend (default: $MIXTURE_ENV, or mixture.env here)")
    return parser.parse_args(argv)


def print_table(mixture: Mixture) -> None:
    """One row a source: what it has, how often it is read, its share of the run."""
    total = sum(source.weight_tokens for source in mixture.sources)
    trained = mixture.train_iters * mixture.tokens_an_iteration
    table = Table(caption=f"{trained:,} of {mixture.total_tokens:,} tokens are trained: "
                  f"{mixture.train_iters:,} iterations of {mixture.global_batch_size} x {mixture.seq_len}")
    table.add_column("source", overflow="fold")
    for name in ("tokens", "rounds", "share", "epochs"):
        table.add_column(name, justify="right", no_wrap=True)
    epochs = mixture.epochs()
    for source in mixture.sources:
        table.add_row(source.prefix, f"{source.tokens:,}", f"{float(source.rounds):g}",
                      f"{source.weight_tokens / total:.2%}", f"{epochs[source.prefix]:.3f}")
    Console(highlight=False, markup=False).print(table)


def main(argv: Sequence[str]) -> None:
    arguments = parse_arguments(argv)
    mixture = load_mixture(arguments.cfg, DB2TOKCNT)
    write_mixture_env(mixture, arguments.env_file)
    print(f"[INFO] Loaded cfg from {arguments.cfg}")
    for note in mixture.notes:
        print(f"[WARN] {note}")
    print(f"[INFO] Mixture string: {mixture.mixture_string} ")
    print(f"[INFO] Total token count: {mixture.total_tokens / 1e9:.3f}B")
    print(f"[INFO] Remember to change TRAIN_ITERS to: {mixture.train_iters}")
    print_table(mixture)
    print(f"[INFO] The launchers read {Path(arguments.env_file)} where DATA_PATH is not set; "
          f"{blend_file(arguments.env_file)} is for --data-args-path")


if __name__ == "__main__":
    entry(main)
