"""What a run says of itself while it trains: figures of each log interval, and events, to every sink."""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch

from megatron.pretrain.config import LogConfig, RunConfig
from megatron.pretrain.log.metrics import IntervalRecord
from megatron.pretrain.log.sinks import METRICS_FILE, Console, JsonLines, Sink, TensorBoard, WandB
from megatron.pretrain.model.flops import flops_per_token, peak_tflops
from megatron.pretrain.optim.optimizer import StepOutcome
from megatron.pretrain.train.run import Run
from megatron.pretrain.train.state import TrainState


class Reporter:
    """Gathers figures over --log-interval iterations; on ranks other than 0 it has nowhere to send them."""

    def __init__(self, run: Run) -> None:
        self._config = run.config
        self._world_size = run.place.world_size
        self._flops_per_token = flops_per_token(
            run.config.model, run.config.data.seq_length, run.padded_vocab_size)
        self._device = run.place.device
        self._sinks = open_sinks(run.config) if run.place.is_main else []
        self._interval = _Interval()

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        for sink in self._sinks:
            sink.close()

    def start(self, state: TrainState) -> None:
        """Start the clock, before the first iteration."""
        self._interval = _Interval()
        self._event("start", state, consumed_samples=state.consumed_samples)

    def after_iteration(self, state: TrainState, loss: float, outcome: StepOutcome, learning_rate: float,
                        data_wait_ms: float) -> None:
        """Take one iteration's figures; at the end of an interval, send them on."""
        self._interval.add(loss, outcome, data_wait_ms)
        if state.iteration % self._config.log.log_interval == 0 or state.iteration == self._config.train.train_iters:
            record = self._record(state, outcome, learning_rate)
            self._interval = _Interval()
            for sink in self._sinks:
                sink.log(record)

    def after_evaluation(self, state: TrainState, loss: float) -> None:
        """Take the loss on the validation split. The time it took does not count as training."""
        self._event("validation", state, lm_loss=loss, perplexity=math.exp(min(loss, 20.0)))
        self._interval.restart_clock()

    def after_save(self, state: TrainState, folder: Path, seconds: float) -> None:
        """Take note of a checkpoint. The time it took does not count as training."""
        self._event("saved", state, folder=str(folder), seconds=round(seconds, 3))
        self._interval.restart_clock()

    def _event(self, name: str, state: TrainState, **values: object) -> None:
        for sink in self._sinks:
            sink.event(name, {"iteration": state.iteration, **values})

    def _record(self, state: TrainState, outcome: StepOutcome, learning_rate: float) -> IntervalRecord:
        config, interval = self._config, self._interval
        seconds = interval.seconds_per_iteration()
        tokens_per_second = config.train.global_batch_size * config.data.seq_length / seconds
        tflops = peak = None
        if self._device.type == "cuda":
            tflops = tokens_per_second * self._flops_per_token / self._world_size / 1e12
            precision = "fp8" if config.train.fp8_format else "bf16"
            peak = peak_tflops(torch.cuda.get_device_name(self._device), precision)
        return IntervalRecord(
            iteration=state.iteration, train_iters=config.train.train_iters,
            consumed_samples=state.consumed_samples, consumed_tokens=state.consumed_tokens,
            elapsed_ms_per_iteration=1000 * seconds, tokens_per_second=tokens_per_second,
            tflops_per_gpu=tflops, mfu=tflops / peak if peak else None, learning_rate=learning_rate,
            global_batch_size=config.train.global_batch_size, lm_loss=interval.mean_loss(),
            grad_norm=outcome.grad_norm, skipped_iterations=interval.skipped, nan_iterations=interval.nan,
            data_wait_ms=interval.data_wait_ms / interval.iterations,
            memory_bytes=torch.cuda.max_memory_allocated() if self._device.type == "cuda" else None)


class _Interval:
    """Sums over the iterations since the last log line."""

    def __init__(self) -> None:
        self.iterations = self.skipped = self.nan = 0
        self.data_wait_ms = self._loss_sum = self._seconds = 0.0
        self.restart_clock()

    def restart_clock(self) -> None:
        self._since_s = time.perf_counter()

    def add(self, loss: float, outcome: StepOutcome, data_wait_ms: float) -> None:
        now_s = time.perf_counter()
        self._seconds += now_s - self._since_s
        self._since_s = now_s
        self.iterations += 1
        self.skipped += not outcome.updated
        self.data_wait_ms += data_wait_ms
        if math.isfinite(loss):
            self._loss_sum += loss
        else:
            self.nan += 1

    def seconds_per_iteration(self) -> float:
        return self._seconds / self.iterations

    def mean_loss(self) -> float | None:
        finite = self.iterations - self.nan
        return self._loss_sum / finite if finite else None


def open_sinks(config: RunConfig) -> list[Sink]:
    """The console, and what the configuration asks for beside it."""
    log, folder = config.log, _run_folder(config.log, config.checkpoint.save)
    sinks: list[Sink] = []
    # First those that may not be installed, so that a refusal leaves no file behind.
    if log.tensorboard_dir is not None:
        sinks.append(TensorBoard(log.tensorboard_dir))
    if log.wandb_project is not None:
        sinks.append(WandB(log.wandb_project, log.wandb_exp_name, log.wandb_save_dir, config.as_dict()))
    if folder is not None:
        sinks.append(JsonLines(folder / METRICS_FILE))
    sinks.append(Console())
    return sinks


def _run_folder(log: LogConfig, save: str | None) -> Path | None:
    if log.log_dir is not None:
        return Path(log.log_dir)
    return None if save is None else Path(save).parent
