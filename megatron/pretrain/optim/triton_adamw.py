"""The AdamW update of one tensor as a Triton kernel."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
WARPS = 8


def update_(parameter: Tensor, gradient: Tensor, first: Tensor, second: Tensor, rounded: Tensor | None, *,
            rate: float, beta1: float, beta2: float, epsilon: float, decay: float, second_scale: float,
            divisor: float) -> None:
    """Update parameter and its moments in place; all four contiguous and of one size, computed in fp32.

    m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2;
    p = decay p - rate m / (second_scale sqrt(v) + epsilon), with g = gradient / divisor.
    `rounded`, contiguous and of the same size, becomes the new parameter in its own dtype.
    """
    size = parameter.numel()
    adam_update[(triton.cdiv(size, BLOCK),)](
        parameter, gradient, first, second, rounded, size, rate, beta1, 1 - beta1, beta2, 1 - beta2, epsilon, decay,
        second_scale, 1 / divisor, BLOCK=BLOCK, num_warps=WARPS)


@triton.jit
def adam_update(parameter_at, gradient_at, first_at, second_at, rounded_at, size, rate, beta1, rest1, beta2, rest2,
                epsilon, decay, second_scale, gradient_scale, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    gradient = tl.load(gradient_at + place, mask=mask).to(tl.float32) * gradient_scale
    first = beta1 * tl.load(first_at + place, mask=mask) + rest1 * gradient
    second = beta2 * tl.load(second_at + place, mask=mask) + rest2 * gradient * gradient
    parameter = tl.load(parameter_at + place, mask=mask)
    parameter = decay * parameter - rate * first / (tl.sqrt(second) * second_scale + epsilon)
    tl.store(first_at + place, first, mask=mask)
    tl.store(second_at + place, second, mask=mask)
    tl.store(parameter_at + place, parameter, mask=mask)
    if rounded_at is not None:
        tl.store(rounded_at + place, parameter.to(rounded_at.dtype.element_ty), mask=mask)
