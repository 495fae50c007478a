"""The table at the end of the quickstart: what each step did, how long it took, where its result is."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron.pretrain.errors import entry


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("home", type=Path, help="the quickstart's folder; its steps/ holds a file a step: "
                        "name, seconds, what, where, separated by tabs")
    home = parser.parse_args(arguments).home
    steps = [path.read_text().rstrip("\n").split("\t") for path in sorted((home / "steps").iterdir())]
    minutes = sum(float(seconds) for _, seconds, _, _ in steps) / 60
    table = Table(caption=f"{minutes:.1f} minutes in all; the results are in {home}")
    table.add_column("step", no_wrap=True)
    table.add_column("what it did", overflow="fold")
    table.add_column("seconds", justify="right", no_wrap=True)
    table.add_column("result", overflow="fold")
    for name, seconds, what, where in steps:
        table.add_row(name, what, seconds, where)
    Console(highlight=False, markup=False).print(table)


if __name__ == "__main__":
    entry(main)
