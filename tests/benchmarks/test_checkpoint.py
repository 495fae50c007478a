"""benchmarks/checkpoint.py as a user runs it, on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest


def test_every_arm_saves_and_what_can_be_loaded_is(run_tool, tmp_path: Path) -> None:
    said = run_tool("benchmarks/checkpoint.py", "--model", "tiny", "--processes", 2, "--rounds", 1, "--scratch",
                    tmp_path)
    assert said.returncode == 0, said.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]]
            for line in said.stdout.splitlines() if line.startswith("| ")]
    figures = {name: cells for name, *cells in rows[1:]}
    assert list(figures) == ["project", "fully_reshardable", "dp_reshardable"]
    assert all(float(cells[0].split()[0]) > 0 for cells in figures.values())
    assert [cells[1] == "-" for cells in figures.values()] == [False, False, True]
    assert figures["project"][-1] == "1.00 (1.00 - 1.00)"
    assert not list(tmp_path.iterdir()), "what was saved is removed"


@pytest.mark.parametrize("flags, sentence", [
    (["--scratch", "nowhere"], "--scratch nowhere: there is no such folder"),
    (["--scratch", ".", "--model", "huge"], "invalid choice: 'huge'")])
def test_mistakes_are_told(flags: list[str], sentence: str, run_tool) -> None:
    said = run_tool("benchmarks/checkpoint.py", *flags)
    assert said.returncode == 2 and sentence in said.stderr and "Traceback" not in said.stderr
