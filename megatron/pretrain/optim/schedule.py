"""The learning rate as a pure function of consumed samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron.pretrain.config import RunConfig
from megatron.pretrain.errors import UserError

STYLES = ("cosine", "linear", "constant", "wsd")


@dataclass(frozen=True, kw_only=True)
class LrSchedule:
    """Linear warm-up, then a decay of one of four styles; called with consumed samples.

    Warm-up, cosine, linear and constant are those of megatron-core's `OptimizerParamScheduler.get_lr`,
    position for position. wsd is the NEO fork's: after the warm-up the highest rate while
    n <= stable, then max(min_lr, max_lr * 0.5 ** ((n - stable) / half_life)) until decay_samples, then
    min_lr.

    Raises:
        UserError: settings that define no schedule; the sentence names the flag.
    """

    style: str
    """"cosine", "linear", "constant" or "wsd"."""
    max_lr: float
    min_lr: float
    warmup_samples: int
    """Samples over which the rate rises linearly from `warmup_init_lr` to `max_lr`."""
    decay_samples: int
    """Samples at which the decay ends; after them the rate is `min_lr` (constant: `max_lr` still)."""
    wsd_decay_ratio: float = 0.1
    """wsd: length of the decay in proportion to the stable part, where `stable_samples` is -1."""
    wsd_half_life_samples: float = -1
    """wsd: samples in which the rate halves; -1 for 0.5 * (decay_samples - stable) + 1."""
    stable_samples: int = -1
    """wsd: samples at the highest rate; -1 for int(decay_samples / (1 + wsd_decay_ratio)), -2 for all."""
    warmup_init_lr: float = 0.0

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise UserError(f"--lr-decay-style {self.style}: must be one of {', '.join(STYLES)}")
        if not 0 <= self.min_lr <= self.max_lr < math.inf:
            raise UserError(f"--min-lr {self.min_lr} must lie between 0 and --lr {self.max_lr}")
        if not 0 <= self.warmup_init_lr <= self.max_lr:
            raise UserError(
                f"--lr-warmup-init {self.warmup_init_lr} must lie between 0 and --lr {self.max_lr}")
        if not 0 <= self.warmup_samples < self.decay_samples:
            raise UserError(
                f"--lr-warmup-iters: {self.warmup_samples} samples of warm-up must be 0 or more, and below "
                f"the {self.decay_samples} samples of the schedule (--lr-decay-iters, or --train-iters)")
        if self.style == "wsd":
            self._check_wsd()

    def _check_wsd(self) -> None:
        if not 0 < self.wsd_decay_ratio <= 1:
            raise UserError(f"--wsd_decay_ratio {self.wsd_decay_ratio}: must be above 0 and at most 1")
        if self.stable_samples < -2 or self.wsd_stable_samples > self.decay_samples:
            raise UserError(
                f"--lr_stable_steps {self.stable_samples}: must be from 0 to the {self.decay_samples} "
                "samples of the schedule, or -1 (from --wsd_decay_ratio), or -2 (no decay)")
        decaying = self.decay_samples - self.wsd_stable_samples
        if self.half_life_samples <= 0 or 0 < decaying <= self.half_life_samples:
            raise UserError(
                f"--wsd_half_life {self.wsd_half_life_samples}: a half-life of {self.half_life_samples:g} "
                f"samples must be above 0 and below the {decaying} samples of the decay; -1 takes half")

    @property
    def wsd_stable_samples(self) -> int:
        """wsd: samples at the highest rate, with -1 and -2 resolved."""
        if self.stable_samples == -2:
            return self.decay_samples
        if self.stable_samples == -1:
            return int(self.decay_samples / (1 + self.wsd_decay_ratio))
        return self.stable_samples

    @property
    def half_life_samples(self) -> float:
        """wsd: samples in which the rate halves, with -1 resolved."""
        if self.wsd_half_life_samples == -1:
            return 0.5 * (self.decay_samples - self.wsd_stable_samples) + 1
        return self.wsd_half_life_samples

    def __call__(self, consumed_samples: int) -> float:
        """Learning rate of the step that starts at `consumed_samples`."""
        if self.warmup_samples > 0 and consumed_samples <= self.warmup_samples:
            rise = self.max_lr - self.warmup_init_lr
            return self.warmup_init_lr + rise * consumed_samples / self.warmup_samples
        if self.style == "constant":
            return self.max_lr
        if consumed_samples > self.decay_samples:
            return self.min_lr
        if self.style == "wsd":
            return self._wsd(consumed_samples)
        done = (consumed_samples - self.warmup_samples) / (self.decay_samples - self.warmup_samples)
        left = 1.0 - done if self.style == "linear" else 0.5 * (math.cos(math.pi * done) + 1.0)
        return self.min_lr + left * (self.max_lr - self.min_lr)

    def _wsd(self, consumed_samples: int) -> float:
        past_stable = consumed_samples - self.wsd_stable_samples
        if past_stable <= 0:
            return self.max_lr
        return max(self.min_lr, self.max_lr * 0.5 ** (past_stable / self.half_life_samples))


def schedule_of(config: RunConfig) -> LrSchedule:
    """The schedule that a run's settings define. Raises UserError where they define none."""
    optim, samples = config.optim, config.train.global_batch_size
    return LrSchedule(
        style=optim.lr_decay_style, max_lr=optim.lr, min_lr=optim.min_lr, warmup_init_lr=optim.lr_warmup_init,
        warmup_samples=optim.lr_warmup_iters * samples,
        decay_samples=(optim.lr_decay_iters or config.train.train_iters) * samples,
        wsd_decay_ratio=optim.wsd_decay_ratio, wsd_half_life_samples=optim.wsd_half_life,
        stable_samples=optim.lr_stable_steps)
