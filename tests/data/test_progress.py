"""Where no terminal looks on, a long pass says now and then how far it is, and a short one nothing."""

from __future__ import annotations

import pytest

from megatron.pretrain.data import progress


def run(label: str) -> None:
    with progress.ByteProgress(label, 4_000_000) as bar:
        for _ in range(4):
            bar.advance(1_000_000)


def test_a_short_pass_is_silent(capsys: pytest.CaptureFixture):
    run("reading")
    assert capsys.readouterr().err == ""


def test_a_long_pass_says_where_it_is(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    run("reading")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" MB,")[0] for line in lines] == [
        f"reading: {part}% of 4" for part in (25, 50, 75, 100)]
    assert lines[-1].endswith(" 0 s left")
