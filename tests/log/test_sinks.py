"""Where figures go: lines that survive a kill and a resume, and libraries that may be absent."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
import types

import pytest

from megatron.pretrain.errors import UserError
from megatron.pretrain.log.metrics import IntervalRecord, megatron_line
from megatron.pretrain.log.sinks import Console, JsonLines, TensorBoard, WandB, read_metrics

RECORD = IntervalRecord(
    iteration=10, train_iters=100, consumed_samples=40, consumed_tokens=2560, elapsed_ms_per_iteration=12.0,
    tokens_per_second=21_333.3, tflops_per_gpu=0.01, mfu=None, learning_rate=1e-4, global_batch_size=4,
    lm_loss=5.5, grad_norm=1.25, skipped_iterations=0, nan_iterations=0, data_wait_ms=0.1, memory_bytes=None)


def _at(iteration: int, lm_loss: float = 5.5) -> IntervalRecord:
    return dataclasses.replace(RECORD, iteration=iteration, lm_loss=lm_loss)


def test_the_console_prints_a_line_each():
    stream = io.StringIO()
    console = Console(stream)
    console.log(RECORD)
    console.event("validation", {"iteration": 10, "lm_loss": 2.5, "note": "first"})
    first, second = stream.getvalue().splitlines()
    assert first == megatron_line(RECORD)
    assert second.endswith("] validation | iteration: 10 | lm loss: 2.500000E+00 | note: first |")


def test_json_lines_hold_every_field_and_are_there_before_closing(tmp_path):
    sink = JsonLines(tmp_path / "run" / "metrics.jsonl")
    sink.log(RECORD)
    sink.event("saved", {"iteration": 10, "seconds": 1.5})
    record, event = map(json.loads, sink.path.read_text().splitlines())
    sink.close()
    assert record == RECORD.as_dict()
    assert (event["event"], event["iteration"], event["seconds"]) == ("saved", 10, 1.5)


def test_a_figure_that_is_not_finite_is_null(tmp_path):
    sink = JsonLines(tmp_path / "metrics.jsonl")
    sink.log(_at(10, float("nan")))
    sink.close()
    assert read_metrics(sink.path)[0]["lm_loss"] is None


def test_a_resumed_run_goes_on_in_the_file_and_replaces_the_attempt_given_up(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = JsonLines(path)
    for iteration in (10, 20, 30, 40):
        first.log(_at(iteration, 5.0))
    first.event("validation", {"iteration": 40, "lm_loss": 4.0})
    first.close()
    second = JsonLines(path)
    for iteration in (25, 30):
        second.log(_at(iteration, 3.0))
    second.close()
    assert len(path.read_text().splitlines()) == 7
    assert [(record["iteration"], record["lm_loss"]) for record in read_metrics(path)] == [
        (10, 5.0), (20, 5.0), (25, 3.0), (30, 3.0)]


@pytest.mark.parametrize("torn", ['{"iteration": 20, "lm_lo', "x"])
def test_a_line_that_a_kill_tore_is_dropped(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    first = JsonLines(path)
    first.log(_at(10))
    first.close()
    with open(path, "a") as file:
        file.write(torn)
    second = JsonLines(path)
    second.log(_at(20))
    second.close()
    assert [record["iteration"] for record in read_metrics(path)] == [10, 20]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"--log-dir: cannot write {tmp_path}/file/metrics.jsonl: "):
        JsonLines(tmp_path / "file" / "metrics.jsonl")


@pytest.mark.parametrize(("module", "make", "sentence"), [
    ("torch.utils.tensorboard", lambda: TensorBoard("runs"),
     "--tensorboard-dir runs: tensorboard is not installed"),
    ("wandb", lambda: WandB("neo"), "--wandb-project neo: wandb is not installed"),
])
def test_a_library_that_is_not_installed_is_named_with_its_remedy(monkeypatch, module, make, sentence):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=sentence + r'; pip install "neo-pretrain\[log\]"'):
        make()


class Recorder:
    """Stands in for a library that may not be installed, and remembers what it was told."""

    def __init__(self, *arguments, **settings) -> None:
        self.told: list[tuple] = [("init", arguments, settings)]

    def __getattr__(self, name):
        return lambda *arguments, **settings: self.told.append((name, arguments, settings))


def test_tensorboard_is_told_figures_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Recorder))
    sink = TensorBoard("runs")
    sink.log(RECORD)
    sink.event("validation", {"iteration": 10, "lm_loss": 2.5, "note": "text"})
    sink.close()
    told = sink._writer.told
    scalars = {arguments[0]: arguments[1:] for name, arguments, _ in told if name == "add_scalar"}
    assert scalars["train/lm_loss"] == (5.5, 10)
    assert scalars["validation/lm_loss"] == (2.5, 10)
    assert not {"train/mfu", "train/iteration", "validation/note"} & set(scalars)
    assert told[0] == ("init", ("runs",), {}) and told[-1][0] == "close"


def test_wandb_is_told_figures_over_iterations(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=Recorder))
    sink = WandB("neo", "first", "out", {"seed": 42})
    sink.log(RECORD)
    sink.event("validation", {"iteration": 10, "lm_loss": 2.5})
    sink.close()
    init, train, validation, finish = sink._run.told
    assert init[2] == {"project": "neo", "name": "first", "dir": "out", "config": {"seed": 42}}
    assert train[1][0]["train/lm_loss"] == 5.5 and train[2] == {"step": 10}
    assert validation == ("log", ({"validation/lm_loss": 2.5},), {"step": 10})
    assert finish[0] == "finish"
