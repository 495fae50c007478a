"""Which iteration a target gets, and the names of the folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron.pretrain.errors import UserError
from megatron.pretrain.export.choose import SavedIteration, billions, closest, find_saved, folder_names


def saved(*tokens: int) -> list[SavedIteration]:
    return [SavedIteration(Path(f"iter_{number:07d}"), number, count) for number, count in enumerate(tokens)]


def test_the_closest_is_taken_and_of_two_the_earlier():
    iterations = saved(10, 20, 30)
    assert [closest(wanted, iterations).saved.tokens for wanted in (1, 14, 15, 16, 29, 1000)] == [
        10, 10, 10, 20, 30, 30]
    assert closest(1000, iterations).off_by_tokens == 970


NONE_THERE = {}.get


@pytest.mark.parametrize(("tokens", "names"), [
    ((10_485_760_000, 50_331_648_000), ["10.49B", "50.33B"]),
    ((10_485_760_000, 10_490_000_000), ["10.486B", "10.490B"]),
    ((102_400, 204_800), ["0.0001B", "0.0002B"]),
    ((1, 2), ["0.000000001B", "0.000000002B"]),
    ((0, 10**9), ["0.00B", "1.00B"]),
])
def test_names_have_the_decimals_that_keep_them_apart(tokens, names):
    assert list(folder_names(saved(*tokens), True, NONE_THERE).values()) == names


def test_a_name_that_another_iteration_has_is_not_taken():
    one, = saved(10_485_760_000)
    there = {"10.49B": 7}.get
    assert folder_names([one], True, there)[one] == "10.486B"
    there = {"10.49B": one.iteration}.get
    assert folder_names([one], True, there)[one] == "10.49B"


def test_without_renaming_the_iterations_name_stays():
    assert list(folder_names(saved(5, 6), False, NONE_THERE).values()) == ["iter_0000000", "iter_0000001"]


def test_names_that_cannot_be_kept_apart_are_refused():
    with pytest.raises(UserError, match="the same number of tokens"):
        folder_names(saved(5, 5), True, NONE_THERE)


@pytest.mark.parametrize(("tokens", "text"), [
    (10_485_760_000, "10.49B"), (485_760_000, "0.49B"), (0, "0.00B"), (51_200, "0.0000512B"),
    (1, "0.000000001B"), (99_999_999_999, "100.00B")])
def test_tokens_in_billions(tokens: int, text: str):
    assert billions(tokens) == text


def make(root: Path, iteration: int, run: object = None, *, whole: bool = True) -> None:
    folder = root / f"iter_{iteration:07d}"
    folder.mkdir(parents=True)
    if whole:
        (folder / ".metadata").touch()
    if run is not None:
        (folder / "run.json").write_text(json.dumps(run))


def found(root: Path, *settings: int | None) -> tuple[list[tuple[int, int]], list[str]]:
    notes: list[str] = []
    iterations = find_saved(root, *(settings or (None, None)), notes.append)
    return [(one.iteration, one.tokens) for one in iterations], notes


def test_run_json_counts_before_the_settings_do(tmp_path):
    make(tmp_path, 200, {"consumed_tokens": 500})
    make(tmp_path, 100)
    iterations, notes = found(tmp_path, 2, 1)
    assert iterations == [(100, 200), (200, 500)]
    assert len(notes) == 1 and "500 tokens by its run.json" in notes[0] and "is 400" in notes[0]
    make(tmp_path, 300, {"consumed_tokens": 700})
    assert "(and so for 1 more)" in found(tmp_path, 2, 1)[1][0]


def test_agreement_is_not_remarked_on(tmp_path):
    make(tmp_path, 200, {"consumed_tokens": 400})
    assert found(tmp_path, 2, 1) == ([(200, 400)], [])
    assert found(tmp_path) == ([(200, 400)], [])


def test_what_is_not_whole_is_left_out(tmp_path):
    make(tmp_path, 100, whole=False)
    make(tmp_path, 200, {"consumed_tokens": 400})
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("200")
    iterations, notes = found(tmp_path)
    assert iterations == [(200, 400)]
    assert "iter_0000100 is left out" in notes[0]


def test_a_former_checkpoint_is_whole_without_an_index(tmp_path):
    make(tmp_path, 100, whole=False)
    (tmp_path / "iter_0000100/mp_rank_00").mkdir()
    assert found(tmp_path, 2, 1) == ([(100, 200)], [])


def test_tokens_that_nobody_knows_are_asked_for(tmp_path):
    make(tmp_path, 100)
    with pytest.raises(UserError, match="give SEQ_LEN and GB"):
        found(tmp_path, 2048, None)


@pytest.mark.parametrize("run", ["text", {"consumed_tokens": "many"}, {}])
def test_a_damaged_run_json_is_named(run, tmp_path):
    make(tmp_path, 100, run)
    with pytest.raises(UserError, match=r"iter_0000100/run\.json is damaged"):
        found(tmp_path)


def test_folders_without_checkpoints_are_named(tmp_path):
    with pytest.raises(UserError, match="MEGATRON_CHECKPOINT_PATH .*absent is not a folder"):
        found(tmp_path / "absent")
    with pytest.raises(UserError, match=r"holds no iter_\* folder$"):
        found(tmp_path)
    make(tmp_path, 100, whole=False)
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        found(tmp_path)
    with pytest.raises(UserError, match="give the folder around it"):
        found(tmp_path / "iter_0000100")
