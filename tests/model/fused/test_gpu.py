"""On a GPU: each fused kernel, values and gradients, against float64 (`pytest -m gpu`).

The bound is what a bf16 product with fp32 accumulation leaves: each operand and result is rounded to 8 bits
(2^-9 relative, about 0.2 %), and a handful of such roundings meet in a result.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron.pretrain.model.fused import products
from megatron.pretrain.model.fused.attention import _RotaryAttention, torch_rotary_attention
from megatron.pretrain.model.fused.gate import QuackGate, TorchGate
from megatron.pretrain.model.fused.kernels import kernels_for, missing_packages
from megatron.pretrain.model.fused.norm import _RMSNorm
from megatron.pretrain.optim.adamw import FusedAdamW

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
              pytest.mark.skipif(bool(missing_packages()), reason=f"not installed: {missing_packages()}")]

BF16 = torch.bfloat16
BOUND = 6e-3


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(BF16)


def empty(*shape: int) -> Tensor:
    return torch.full(shape, float("nan"), dtype=BF16, device="cuda")


def parameter(*shape: int) -> torch.nn.Parameter:
    weight = torch.nn.Parameter(random(*shape, scale=shape[-1] ** -0.5))
    weight.main_grad = torch.randn(*shape, device="cuda")
    weight.grad_added_to_main_grad = False
    return weight


def error(result: Tensor, exact: Tensor) -> float:
    """Relative to the exact tensor's norm; NaN where the result holds one, which no bound admits."""
    return float((result.double() - exact.double()).norm() / exact.double().norm())


@pytest.fixture(autouse=True)
def poisoned() -> None:
    """Freed memory full of NaN, which the next tensors are allocated from: an element not written shows."""
    torch.manual_seed(1)
    for size in (1 << 28, 1 << 24, 1 << 20, 1 << 16):
        torch.full((size,), float("nan"), dtype=BF16, device="cuda")


@pytest.mark.parametrize("tokens, inner, outer", [(1, 8, 8), (96, 40, 24), (8192, 3072, 9216), (8192, 2048, 2560)])
def test_products_have_torchs_bits(tokens: int, inner: int, outer: int) -> None:
    x, weight, gradient = random(tokens, inner), random(outer, inner, scale=inner ** -0.5), random(tokens, outer)
    for left, right in ((x, weight.T), (gradient, weight), (gradient.T, x)):
        out = empty(left.size(0), right.size(1))
        total = torch.full_like(out, torch.nan, dtype=torch.float32)
        expected = torch.mm(left, right)
        in_fp32 = torch.empty_like(total)
        torch.ops.aten.mm.dtype_out(left, right, torch.float32, out=in_fp32)
        for _ in range(2):    # the second finds its algorithm chosen
            products.multiply(left, right, out)
            products.accumulate(total, left, right, replace=True)
            assert torch.equal(out, expected) and torch.equal(total, in_fp32)
        products.accumulate(total, left, right)
        assert error(total, 2 * (left.double() @ right.double())) < BOUND


@pytest.mark.parametrize("tokens, hidden", [(1, 256), (130, 2048), (1024, 3072)])
def test_norm(tokens: int, hidden: int) -> None:
    x, upstream, residual = random(tokens, hidden), random(tokens, hidden), random(tokens, hidden)
    weight = torch.nn.Parameter((torch.rand(hidden, device="cuda") + 0.5).to(BF16))
    x.requires_grad_()
    normed, passed = _RMSNorm.apply(x, weight, 1e-5, "quack")
    d_x, d_weight = torch.autograd.grad([normed, passed], [x, weight], [upstream, residual])

    exact_x, exact_weight = (value.detach().double().requires_grad_() for value in (x, weight))
    exact = exact_x * torch.rsqrt(exact_x.square().mean(-1, keepdim=True) + 1e-5) * exact_weight
    exact_d_x, exact_d_weight = torch.autograd.grad(
        [exact, exact_x.clone()], [exact_x, exact_weight], [upstream.double(), residual.double()])
    assert torch.equal(passed, x)
    assert error(normed, exact) < BOUND
    assert error(d_x, exact_d_x) < BOUND
    assert error(d_weight, exact_d_weight) < BOUND


# Of the larger tiles all products take one but the weight gradient: 256 x 192, then transposed.
@pytest.mark.parametrize("tokens, hidden, inner", [(64, 128, 256), (264, 512, 1536), (8192, 3072, 4608),
                                                   (3072, 2048, 5120)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_gate(dynamic: bool, tokens: int, hidden: int, inner: int) -> None:
    up, down, x, upstream, added = (parameter(2 * inner, hidden), parameter(hidden, inner), random(tokens, hidden),
                                    random(tokens, hidden), random(tokens, hidden))
    before = up.main_grad.clone()
    gate = QuackGate(dynamic=dynamic)
    halves, d_halves = empty(tokens, 2 * inner), empty(tokens, 2 * inner)
    activated, again, d_x = empty(tokens, inner), empty(tokens, inner), empty(tokens, hidden)
    gate.forward(x, up, halves, activated)
    gate.backward(upstream, down, halves, d_halves, again)
    gate.input_gradient(d_halves, up, d_x)
    for _ in range(2):
        gate.weight_gradient(up, d_halves, x)
    out = torch.empty_like(added)
    gate.add_product(activated, down, added, out)

    exact_up, exact_down, exact_x = (value.detach().double().requires_grad_() for value in (up, down, x))
    part, linear = (exact_x @ exact_up.T).chunk(2, -1)
    exact_activated = torch.nn.functional.silu(part) * linear
    exact_out = exact_activated @ exact_down.T
    exact_d_x, exact_d_up = torch.autograd.grad(exact_out, [exact_x, exact_up], upstream.double())
    assert error(activated, exact_activated) < BOUND
    assert error(again, exact_activated) < BOUND
    assert error(out, exact_out + added) < BOUND
    assert error(d_x, exact_d_x) < BOUND
    assert error(up.main_grad - before, 2 * exact_d_up) < BOUND
    assert up.grad_added_to_main_grad


@pytest.mark.parametrize("tokens, inner, outer", [(64, 128, 256), (1024, 3072, 4096)])
def test_a_first_gradient_replaces_what_is_there(tokens: int, inner: int, outer: int) -> None:
    """Whatever stood in the accumulator, NaN too; the second adds. By every product that writes there."""
    from megatron.pretrain.model.fused import fp8_products
    from megatron.pretrain.model.fused.products import weight_gradient
    from megatron.pretrain.model.fused.quantize import E4M3, E5M2, Source
    from megatron.pretrain.model.fused.scaling import CurrentScaling

    inputs, gradient = random(tokens, inner), random(tokens, outer)
    exact = gradient.double().T @ inputs.double()
    alternating = torch.stack(gradient.chunk(2, -1), -1).flatten(-2)
    casts = CurrentScaling(E5M2).quantize(Source(gradient)), CurrentScaling(E4M3).quantize(Source(inputs))
    for name, bound, deliver in (
            ("cuBLAS", BOUND, lambda weight: weight_gradient(weight, gradient, inputs)),
            ("quack", BOUND, lambda weight: QuackGate().weight_gradient(weight, alternating, inputs)),
            ("fp8", 0.07, lambda weight: fp8_products.weight_gradient(weight, *casts))):
        weight = parameter(outer, inner)
        weight.main_grad.fill_(float("nan"))
        weight.main_grad_is_not_zeroed = True
        for times in (1, 2):
            deliver(weight)
            assert error(weight.main_grad, times * exact) < bound, (name, times)


def test_gate_orders_its_halves_as_torch_does() -> None:
    """Weights trained by one implementation mean the same to the other."""
    up, x = parameter(512, 128), random(64, 128)
    ours, torchs = empty(64, 256), empty(64, 256)
    QuackGate().forward(x, up, empty(64, 512), ours)
    with torch.no_grad():
        TorchGate().forward(x, up, empty(64, 512), torchs)
    assert error(ours, torchs) < BOUND


HEADS = {"multi-head 192": (4, 1, 192), "multi-query 256": (1, 8, 256), "grouped 128": (2, 4, 128),
         "multi-head 64": (4, 1, 64)}


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("length, batch", [(1, 1), (257, 2), (2048, 1)])
@pytest.mark.parametrize("groups, queries, width", HEADS.values(), ids=HEADS.keys())
def test_attention(groups: int, queries: int, width: int, length: int, batch: int, deterministic: bool) -> None:
    backward = "cuDNN" if width == 256 and not deterministic else "flash-attn-4"
    mixed, upstream, run = attention_of(groups, queries, width, length, batch, deterministic, backward)
    errors = attention_errors(mixed, upstream, *run())
    assert errors.pop("context") < BOUND
    assert max(errors.values()) < 2 * BOUND, errors
    if deterministic:
        assert all(torch.equal(first, second) for first, second in zip(run(), run(), strict=True))


# Tiles of 64 queries and 64 or 96 keys and their edges, ends within a tile, and more tiles than a GPU takes at once.
@pytest.mark.parametrize("length, batch", [(1, 1), (63, 1), (64, 2), (65, 1), (97, 1), (257, 3), (2048, 1), (4100, 1)])
@pytest.mark.parametrize("groups, queries, width", [(4, 1, 192), (2, 2, 192), (1, 8, 256), (2, 4, 256), (3, 1, 256)])
def test_backward_of_heads(groups: int, queries: int, width: int, length: int, batch: int) -> None:
    """The project's kernel."""
    mixed, upstream, run = attention_of(groups, queries, width, length, batch, False, "project")
    errors = attention_errors(mixed, upstream, *run())
    assert errors.pop("context") < BOUND
    assert max(errors.values()) < 2 * BOUND, errors


@pytest.mark.parametrize("groups, width", [(4, 192), (3, 256)])
def test_backward_of_heads_twenty_times(groups: int, width: int) -> None:
    """Keys and values of heads of their own are summed in one order: a race would show in their bits."""
    _, _, run = attention_of(groups, 1, width, 4100, 1, False, "project")
    _, first = run()
    for _ in range(20):
        assert torch.equal(run()[1][..., -2:, :], first[..., -2:, :])


def test_backward_of_heads_in_fp16() -> None:
    mixed, upstream, run = attention_of(2, 1, 192, 300, 1, False, "project", torch.float16)
    assert max(attention_errors(mixed, upstream, *run()).values()) < BOUND / 4


def attention_of(groups: int, queries: int, width: int, length: int, batch: int, deterministic: bool,
                 backward: str, dtype: torch.dtype = BF16,
                 ) -> tuple[Tensor, Tensor, Callable[[], tuple[Tensor, Tensor]]]:
    """Packed heads, a gradient of their context, and what computes from them context and the heads' gradient."""
    mixed = random(length, batch, groups, queries + 2, width).to(dtype)
    upstream = random(length, batch, groups * queries * width).to(dtype)

    def run() -> tuple[Tensor, Tensor]:
        leaf = mixed.clone().requires_grad_()
        context = _RotaryAttention.apply(leaf.clone(), angles_of(mixed).float(), deterministic, backward)
        return context.detach(), torch.autograd.grad(context, leaf, upstream)[0]

    return mixed, upstream, run


def attention_errors(mixed: Tensor, upstream: Tensor, context: Tensor, gradient: Tensor) -> dict[str, float]:
    """Of the context, and of the gradients of queries, keys and values, against fp64."""
    exact_mixed = mixed.double().requires_grad_()
    exact = torch_rotary_attention(exact_mixed, angles_of(mixed))
    (exact_gradient,) = torch.autograd.grad(exact, exact_mixed, upstream.double())
    parts = {"query": slice(0, -2), "key": slice(-2, -1), "value": slice(-1, None)}
    if mixed.size(0) == 1:    # attends to itself alone: there is nothing to learn for its query and key
        parts = {"value": parts["value"]}
    return {"context": error(context, exact)} | {
        name: error(gradient[..., part, :], exact_gradient[..., part, :]) for name, part in parts.items()}


def angles_of(mixed: Tensor) -> Tensor:
    """[s, 1, 1, d] in fp64."""
    width = mixed.size(-1)
    frequencies = 10000 ** (-torch.arange(0, width, 2, device=mixed.device) / width)
    angles = torch.outer(torch.arange(mixed.size(0), device=mixed.device), frequencies).repeat(1, 2)
    return angles[:, None, None].double()


@pytest.mark.parametrize("tokens, width, first", [(1, 16, 0), (33, 1000, 0), (513, 32128, 32128)])
def test_loss(tokens: int, width: int, first: int) -> None:
    from megatron.pretrain.model.fused import triton_loss

    logits, labels = random(tokens, width, scale=4.0), torch.randint(0, 2 * width, (tokens,), device="cuda")
    scale = torch.rand(tokens, device="cuda")
    maximum, total, target = triton_loss.statistics(logits, labels, first)
    exact = logits.double()
    mine = (labels >= first) & (labels < first + width)
    column = torch.where(mine, labels - first, 0)
    assert error(maximum + total.log(), exact.logsumexp(-1)) < 1e-6
    assert error(target, exact.gather(1, column[:, None])[:, 0] * mine) < 1e-6 or not mine.any()
    gradient = exact.softmax(-1) - torch.nn.functional.one_hot(column, width) * mine[:, None]
    written = logits.clone()
    triton_loss.gradient_(written, labels, first, maximum + total.log(), scale)
    assert error(written, gradient * scale[:, None]) < BOUND


def test_adamw() -> None:
    """The same ten updates in float64 on the CPU."""
    ours = [torch.nn.Parameter(torch.randn(*shape, device="cuda")) for shape in ((3,), (1000, 33), (4096, 4096))]
    exact = [torch.nn.Parameter(weight.detach().double().cpu()) for weight in ours]
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    first, second = FusedAdamW(ours, **options), torch.optim.AdamW(exact, **options)
    first.gradient_divisor = 2.0
    first.model_weights = {weight: torch.full(weight.shape, torch.nan, dtype=BF16, device="cuda")
                           for weight in ours[1:]}
    for _ in range(10):
        for mine, theirs in zip(ours, exact, strict=True):
            mine.grad = torch.randn_like(mine)
            theirs.grad = mine.grad.double().cpu() / 2
        first.step()
        second.step()
    assert all(torch.equal(rounded, mine.detach().to(BF16)) for mine, rounded in first.model_weights.items())
    for mine, theirs in zip(ours, exact, strict=True):
        assert error(mine.cpu(), theirs) < 1e-6
        assert error(first.state[mine]["exp_avg_sq"].cpu(), second.state[theirs]["exp_avg_sq"]) < 1e-6


def test_every_kernel_is_chosen_here() -> None:
    from megatron.pretrain.model.fused.attention_backward_kernel import TILINGS

    assert "torch" not in str(kernels_for(torch.device("cuda"), BF16)).split()
    assert set(str(kernels_for(torch.device("cuda"), torch.float32)).replace(",", "").split()[1::2]) == {"torch"}
    chosen = {width: kernels_for(torch.device("cuda"), BF16, width).attention_backward for width in (64, 128, 192, 256)}
    assert {width for width, kernel in chosen.items() if kernel == "project"} == set(TILINGS)
    assert kernels_for(torch.device("cuda"), BF16, 256, deterministic=True).attention_backward == "flash-attn-4"
