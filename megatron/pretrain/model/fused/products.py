"""Matrix products of a linear layer, and the way of a weight's gradient into its fp32 accumulator.

A weight is [out, in]; activations are [tokens, features]. Plain products go to cuBLAS, which is as fast as any
kernel measured at these shapes (benchmarks/kernels.py), by the fastest of its algorithms that give torch's bits where
nothing is added.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron.pretrain.model.fused import cublaslt
from megatron.pretrain.model.fused.kernels import installed


def multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out [m, n] = left [m, k] @ right [k, n]."""
    plain = partial(torch.mm, left, right, out=out)
    if _is_cublas(left):
        cublaslt.multiply(left, right, out, plain=plain)
    else:
        plain()


def accumulate(total: Tensor, left: Tensor, right: Tensor, *, replace: bool = False) -> None:
    """total [m, n] += left [m, k] @ right [k, n], or with `replace` = it; summed in fp32 whatever they are.

    On a GPU by torch until a product of these shapes has replaced, and by the algorithm chosen then from there on.
    """
    if total.dtype != left.dtype and _is_cublas(left):
        plain = partial(torch.ops.aten.mm.dtype_out, left, right, torch.float32, out=total) if replace else \
            partial(torch.ops.aten.addmm.dtype_out, total, left, right, torch.float32, out=total)
        cublaslt.multiply(left, right, total, added=None if replace else total, plain=plain)
    else:
        # With beta 0 what stood there is not read, not even a NaN.
        total.addmm_(left.to(total.dtype), right.to(total.dtype), beta=0 if replace else 1)


def _is_cublas(operand: Tensor) -> bool:
    """Whether cuBLASLt can multiply this operand, of 16-bit numbers, as torch would."""
    return operand.is_cuda and operand.dtype in (torch.bfloat16, torch.float16) and cublaslt.is_there()


def weight_gradient(weight: Parameter, output_gradient: Tensor, inputs: Tensor) -> Tensor:
    """output_gradient [tokens, out]^T @ inputs [tokens, in], as `deliver` hands it to autograd."""
    if not hasattr(weight, "main_grad"):
        return output_gradient.T @ inputs
    accumulate(weight.main_grad, output_gradient.T, inputs, replace=replaces(weight))
    return delivered(weight)


def replaces(weight: Parameter) -> bool:
    """Whether `main_grad` holds no gradient of this step yet, and nothing has zeroed it (`accumulators`)."""
    return getattr(weight, "main_grad_is_not_zeroed", False) and not weight.grad_added_to_main_grad


def deliver_sum(weight: Parameter, parts: Tensor) -> Tensor:
    """Give a vector's gradient, the sum of parts fp32 [n, h], to autograd: through the accumulator if there is one."""
    if not hasattr(weight, "main_grad"):
        return parts.sum(0).to(weight.dtype)
    if parts.is_cuda and installed("triton"):
        from megatron.pretrain.model.fused.triton_rows import add_all

        add_all(weight.main_grad, parts)
    else:
        weight.main_grad.add_(parts.sum(0))
    return delivered(weight)


def delivered(weight: Parameter) -> Tensor:
    """What a backward function returns for a weight whose gradient is already in `main_grad`.

    The engine reduces gradients from a hook on the weight, and a hook runs on autograd's own thread only if it
    is given some tensor. Its numbers are not read, unless the weight has a second use on this rank (tied
    embeddings: the engine then sets `zero_out_wgrad`), where they are added and must be zero.
    """
    weight.grad_added_to_main_grad = True
    unread = _scratch(weight.dtype, weight.device, weight.numel()).view(weight.shape)
    # A tensor of its own over the shared storage, or autograd would copy it.
    return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else unread.detach()


_buffers: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def _scratch(dtype: torch.dtype, device: torch.device, size: int) -> Tensor:
    """At least `size` numbers that nobody reads: one buffer for all weights."""
    if _buffers.get((dtype, device), torch.empty(0)).numel() < size:
        _buffers[dtype, device] = torch.empty(size, dtype=dtype, device=device)
    return _buffers[dtype, device][:size]
