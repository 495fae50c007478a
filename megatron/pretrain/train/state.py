"""Where a run stands: the only record that changes while it trains."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class TrainState:
    """Counters of a run, saved in each checkpoint. The position in the data is `consumed_samples`."""

    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    updates: int = 0
    """Steps the optimizer made; its moments are as old as this."""
    skipped_iterations: int = 0
    """Iterations whose update was skipped because a gradient was not finite."""
    nan_iterations: int = 0
    """Iterations whose loss was not finite."""
    skipped_in_a_row: int = 0

    def advance(self, samples: int, tokens: int, *, updated: bool, loss_is_finite: bool) -> None:
        """Count one iteration."""
        self.iteration += 1
        self.consumed_samples += samples
        self.consumed_tokens += tokens
        self.updates += updated
        self.skipped_iterations += not updated
        self.nan_iterations += not loss_is_finite
        self.skipped_in_a_row = 0 if updated else self.skipped_in_a_row + 1

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)
