"""The loop: schedule the learning rate, step, count, log, evaluate, save, until the run is over."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path

from megatron.pretrain.checkpoint.store import save_checkpoint
from megatron.pretrain.data.batches import Loader
from megatron.pretrain.errors import UserError
from megatron.pretrain.health.signals import StopRequests
from megatron.pretrain.optim.optimizer import StepOutcome, apply_schedule, step
from megatron.pretrain.train.evaluate import evaluate
from megatron.pretrain.train.report import Reporter
from megatron.pretrain.train.run import Run
from megatron.pretrain.train.step import end_step, forward_backward, mean_loss, release, take

logger = logging.getLogger(__name__)


def train(run: Run, reporter: Reporter) -> None:
    """Train from where `run.state` stands until --train-iters, --exit-interval or a request to stop."""
    config, state = run.config.train, run.state
    with Loader(run.dataset, run.batches, consumed_samples=state.consumed_samples,
                stop_samples=total_samples(run), num_workers=run.config.data.num_workers) as loader, \
            StopRequests(config.exit_duration_in_mins) as stop:
        reporter.start(state)
        if state.iteration >= config.train_iters:
            logger.info("nothing is left to do: iteration %d of %d", state.iteration, config.train_iters)
        while state.iteration < config.train_iters:
            learning_rate = run.schedule(state.consumed_samples)
            loss, outcome = train_step(run, loader, learning_rate)
            count(run, loss, outcome)
            reporter.after_iteration(state, loss, outcome, learning_rate, loader.take_wait_ms())
            if run.valid_dataset is not None and state.iteration % config.eval_interval == 0:
                reporter.after_evaluation(state, evaluate(run, run.valid_dataset))
            asked = stop.agreed()
            leaving = asked or is_multiple(state.iteration, config.exit_interval)
            if leaving or is_multiple(state.iteration, run.config.checkpoint.save_interval) \
                    or state.iteration == config.train_iters:
                save(run, reporter)
            if leaving:
                reason = (stop.reason or "asked on another rank") if asked else "--exit-interval"
                logger.info("leaving at iteration %d of %d (%s)", state.iteration, config.train_iters, reason)
                break
    release(run.chunks)


def total_samples(run: Run) -> int:
    """Consumed samples at the run's end; a run resumed with another global batch ends off its multiples."""
    left = run.config.train.train_iters - run.state.iteration
    return run.state.consumed_samples + left * run.config.train.global_batch_size


def train_step(run: Run, loader: Loader, learning_rate: float) -> tuple[float, StepOutcome]:
    """One global batch: returns its loss and what became of the update."""
    apply_schedule(run.optimizer, learning_rate, run.config.optim.weight_decay)
    run.optimizer.zero_grad()
    total = forward_backward(run.chunks, take(loader, run.batches.micro_batches))
    outcome = step(run.optimizer, run.config.optim.clip_grad)
    end_step(run.chunks)
    return mean_loss(total), outcome


def count(run: Run, loss: float, outcome: StepOutcome) -> None:
    """Advance the counters. Raises UserError when updates have been skipped for too long."""
    samples = run.config.train.global_batch_size
    run.state.advance(samples, samples * run.config.data.seq_length, updated=outcome.updated,
                      loss_is_finite=math.isfinite(loss))
    if run.state.skipped_in_a_row >= run.config.train.max_skipped_iterations:
        raise UserError(
            f"iteration {run.state.iteration}: the gradient was not finite for {run.state.skipped_in_a_row} "
            "iterations in a row (--max-skipped-iterations); resume from the last checkpoint with a lower "
            "--lr, or look at the data since then")


def save(run: Run, reporter: Reporter) -> None:
    """Save a checkpoint, if --save names a folder and this iteration is not saved yet."""
    if run.config.checkpoint.save is None:
        return
    begin = time.perf_counter()
    folder = save_checkpoint(Path(run.config.checkpoint.save), run.chunks, run.optimizer, run.manifest())
    reporter.after_save(run.state, folder, time.perf_counter() - begin)


def is_multiple(iteration: int, interval: int | None) -> bool:
    """Whether something that happens every `interval` iterations happens now."""
    return interval is not None and iteration % interval == 0
