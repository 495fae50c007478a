"""Gradient accumulators that a step's first micro-batch writes, so that they need not be zeroed before it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor
from torch.nn import Parameter


def replace_instead_of_zeroing(chunk: DistributedDataParallel, weights: Iterable[Parameter]) -> None:
    """At the start of a step the engine zeroes every gradient but those of `weights`.

    Their products replace what is there in the step's first micro-batch (`products.replaces`) and add in those
    that follow: neither zeros nor a first sum move their 4 bytes a weight. Each must have its gradient in every
    micro-batch, from our products alone.
    """
    for weight in weights:
        weight.main_grad_is_not_zeroed = True
    for buffer in chunk.buffers:
        zeroed = [weight.main_grad for weight in buffer.params
                  if not getattr(weight, "main_grad_is_not_zeroed", False)]
        buffer.reset = partial(_zero, buffer, zeroed)


def _zero(buffer: Any, gradients: Sequence[Tensor]) -> None:
    """Stands in for the buffer's `reset`. The gaps between weights are zero from the start and stay so."""
    # megatron-core 0.19 can keep accumulators outside the buffer.
    everything = [*gradients, *getattr(buffer, "extra_main_grads", ())]
    if everything:
        torch._foreach_zero_(everything)
