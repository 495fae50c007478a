"""The three products of a linear layer in fp8, by cuBLASLt; in fp32 on a CPU.

All dimensions are multiples of 16. The forward product accumulates fast, in the matrix unit's own precision
of about 14 bits; gradients are promoted to fp32 as they are summed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron.pretrain.model.fused import cublaslt
from megatron.pretrain.model.fused.products import delivered, replaces
from megatron.pretrain.model.fused.quantize import Quantized


def product(weight: Quantized, rows: Tensor, inverse: Tensor, out: Tensor) -> None:
    """Rows of the inputs, fp8 [tokens, in] x inverse, @ weight [out, in]^T -> out [tokens, out]."""
    fp8_product(rows, weight.data, inverse, weight.inverse, out, fast_accumulation=True)


def add_product(added: Tensor, inputs: Quantized, weight: Quantized, *, direct: bool = True) -> Tensor:
    """added [tokens, out] + inputs [tokens, in] @ weight [out, in]^T; `direct` adds in the product itself."""
    out = torch.empty_like(added)
    if not (direct and added.is_cuda):
        product(weight, inputs.data, inputs.inverse, out)
        return out.add_(added)
    cublaslt.multiply(inputs.data, weight.data.T, out, added=added, inverses=(inputs.inverse, weight.inverse),
                      fast_accumulation=True)
    return out


def input_gradient(weight: Quantized, rows: Tensor, inverse: Tensor, out: Tensor) -> None:
    """Rows of the output's gradient, fp8 [tokens, out] x inverse, @ weight [out, in] -> out [tokens, in]."""
    fp8_product(rows, weight.transposed, inverse, weight.inverse, out, fast_accumulation=False)


def weight_gradient(weight: Parameter, gradient: Quantized, inputs: Quantized) -> Tensor:
    """gradient [tokens, out]^T @ inputs [tokens, in], as `products.deliver` hands it to autograd."""
    if not hasattr(weight, "main_grad"):
        out = torch.empty_like(weight)
        fp8_product(gradient.transposed, inputs.transposed, gradient.inverse, inputs.inverse, out,
                    fast_accumulation=False)
        return out
    accumulate_weight_grad(weight.main_grad, gradient.transposed, inputs.transposed, gradient.inverse,
                           inputs.inverse, replace=replaces(weight))
    return delivered(weight)


def accumulate_weight_grad(main_grad: Tensor, gradient: Tensor, inputs: Tensor, gradient_inverse: Tensor,
                           inputs_inverse: Tensor, *, replace: bool = False, direct: bool = True) -> None:
    """main_grad fp32 [out, in] += gradient fp8 [out, tokens] @ inputs fp8 [in, tokens]^T, times the inverses.

    With `replace` it becomes that. `direct` adds in the product itself (`cublaslt`); otherwise, and on a CPU,
    the product is rounded to bf16 (2^-9, where fp8 left 2^-4) and added in a pass of its own.
    """
    if direct and main_grad.is_cuda:
        cublaslt.multiply(gradient, inputs.T, main_grad, added=None if replace else main_grad,
                          inverses=(gradient_inverse, inputs_inverse))
    else:
        if replace:
            main_grad.zero_()
        added = torch.empty_like(main_grad, dtype=torch.bfloat16)
        fp8_product(gradient, inputs, gradient_inverse, inputs_inverse, added, fast_accumulation=False)
        main_grad.add_(added)


def fp8_product(a: Tensor, b: Tensor, a_inverse: Tensor, b_inverse: Tensor, out: Tensor, *,
                fast_accumulation: bool) -> None:
    """out [m, n] = (a [m, k] @ b [n, k]^T) * a_inverse * b_inverse; a and b fp8, inverses fp32 scalars."""
    if a.is_cuda:
        cublaslt.multiply(a, b.T, out, inverses=(a_inverse, b_inverse), fast_accumulation=fast_accumulation)
    else:
        out.copy_(a.float() @ b.float().T * (a_inverse * b_inverse))
