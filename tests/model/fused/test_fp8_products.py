"""Linear layers and the gated MLP in fp8, values and gradients, against float64.

The bound: e4m3 has steps of 2^-3 between powers of two, so that rounding leaves 2^-3 / sqrt(12) / 1.53 = 2.4 %
in norm, and e5m2 twice that. The terms of a product err independently: 3.3 % is left of e4m3 x e4m3, 5.3 % of
e5m2 x e4m3, and 8 % where two of those follow the forward pass. Small matrices stray around that.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter, functional

from megatron.pretrain.model.fused import cublaslt, fp8_products
from megatron.pretrain.model.fused.fp8_linear import Casts, _Column, _NormedColumn, _Row
from megatron.pretrain.model.fused.fp8_mlp import _Fp8GatedMLP
from megatron.pretrain.model.fused.kernels import kernels_for
from megatron.pretrain.model.fused.quantize import E4M3, E5M2, Source
from megatron.pretrain.model.fused.scaling import AmaxHistory, CurrentScaling, DelayedScaling, Scaling
from megatron.pretrain.model.fused.weights import ready_weight

DEVICES = ["cpu", pytest.param("cuda", marks=[
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")])]
FORWARD, BACKWARD, CHAIN = 0.05, 0.07, 0.11
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def random(*shape: int, device: str, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=device) * scale).to(BF16)


def parameter(*shape: int, device: str) -> Parameter:
    weight = Parameter(random(*shape, device=device, scale=shape[-1] ** -0.5))
    weight.main_grad = torch.randn(*shape, device=device)
    return weight


def scalings(recipe: str, device: str) -> list[Scaling]:
    if recipe == "tensorwise":
        return [CurrentScaling(dtype) for dtype in (E4M3, E4M3, E5M2)]
    history = AmaxHistory([E4M3, E4M3, E5M2], torch.device(device))
    if recipe == "delayed, a step later":
        for live in history.live:
            live.fill_(8.0)
        history.update()
    return [DelayedScaling(history, number, dtype) for number, dtype in enumerate((E4M3, E4M3, E5M2))]


def casts(weight: Parameter, recipe: str = "tensorwise") -> Casts:
    first, second, third = scalings(recipe, weight.device.type)
    return Casts(weight, weight_scaling=first, inputs=second, gradient=third)


def norm_of(hidden_size: int, device: str) -> SimpleNamespace:
    """What a norm's module is asked for."""
    weight = Parameter(random(hidden_size, device=device, scale=0.2) + 1)
    weight.main_grad = torch.randn(hidden_size, device=device)
    return SimpleNamespace(weight=weight, eps=1e-5, kernel=kernels_for(weight.device, BF16).norm)


def error(result: Tensor, exact: Tensor) -> float:
    return float((result.detach().double() - exact.detach()).norm() / exact.detach().norm())


def stray(values: Tensor) -> float:
    """The norm of n independent errors strays by a share of 1 / sqrt(2 n): five times that, and a little."""
    return 1 + 4 / values.numel() ** 0.5


def exact_copies(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


SIZES = [(1, 16, 16, 32), (34, 8, 64, 48)]
LARGE = [*SIZES, (8192, 1, 3072, 9216)]


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "delayed, a step later"])
@pytest.mark.parametrize("device", DEVICES)
def test_linear_layers(device: str, recipe: str) -> None:
    for length, batch, inner, outer in SIZES if device == "cpu" else LARGE:
        inputs, weight = random(length, batch, inner, device=device), parameter(outer, inner, device=device)
        upstream, residual = (random(length, batch, outer, device=device) for _ in range(2))
        exact_inputs, exact_weight = exact_copies(inputs, weight)
        exact = exact_inputs @ exact_weight.T
        exact_d_inputs, exact_d_weight = torch.autograd.grad(exact, [exact_inputs, exact_weight],
                                                             upstream.double())
        for row in (False, True):
            before = weight.main_grad.clone()
            leaf, added = inputs.clone().requires_grad_(), residual.clone().requires_grad_()
            cast = casts(weight, recipe)
            out = _Row.apply(leaf, added, weight, cast, None, False) if row \
                else _Column.apply(leaf, weight, cast, None, False)
            out.backward(upstream)
            assert error(out, exact + residual.double() * row) < FORWARD
            assert error(leaf.grad, exact_d_inputs) < BACKWARD
            assert error(weight.main_grad - before, exact_d_weight) < BACKWARD
            assert weight.grad_added_to_main_grad
            assert not row or torch.equal(added.grad, upstream)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_gated_mlp(device: str, recompute: bool) -> None:
    for length, batch, hidden, inner in SIZES if device == "cpu" else [*SIZES, (8192, 1, 3072, 8192)]:
        inputs, upstream = (random(length, batch, hidden, device=device) for _ in range(2))
        up, down = parameter(2 * inner, hidden, device=device), parameter(hidden, inner, device=device)
        norm = norm_of(hidden, device)
        exact_inputs, exact_gain, exact_up, exact_down = exact_copies(inputs, norm.weight, up, down)
        normed = functional.rms_norm(exact_inputs, (hidden,), exact_gain, norm.eps)
        gate, linear = (normed @ exact_up.T).chunk(2, -1)
        exact = (functional.silu(gate) * linear) @ exact_down.T
        gradients = torch.autograd.grad(exact, [exact_inputs, exact_gain, exact_up, exact_down], upstream.double())
        before = [weight.main_grad.clone() for weight in (norm.weight, up, down)]
        leaf = inputs.clone().requires_grad_()
        out = _Fp8GatedMLP.apply(leaf, norm.weight, up, down, norm, casts(up), casts(down), None, False, recompute)
        out.backward(upstream)
        assert error(out.double() - inputs.double(), exact) < CHAIN
        grown = (weight.main_grad - was for weight, was in zip((norm.weight, up, down), before, strict=True))
        ours = (leaf.grad.double() - upstream.double(), *grown)
        for mine, right in zip(ours, gradients, strict=True):
            assert error(mine, right) < CHAIN * stray(right)


@pytest.mark.parametrize("device", DEVICES)
def test_casts_that_are_cheap_to_make_again_are_not_kept(device: str) -> None:
    """Two micro-batches forward before their backward passes; each weight's gradient is of both."""
    batches = [random(32, 2, 64, device=device) for _ in range(2)]
    norm, weight = norm_of(64, device), parameter(64, 64, device=device)
    up, down = parameter(2 * 48, 64, device=device), parameter(64, 48, device=device)
    for layer in (
            lambda x, recipe: _Row.apply(x, x, weight, recipe(weight), None, False),
            lambda x, recipe: _NormedColumn.apply(x, norm.weight, weight, norm, recipe(weight), None, False)[0],
            lambda x, recipe: _Fp8GatedMLP.apply(x, norm.weight, up, down, norm, recipe(up), recipe(down), None, False,
                                                 False)):
        made: dict[Parameter, Casts] = {}

        def shared(of: Parameter, made: dict[Parameter, Casts] = made) -> Casts:
            return made.setdefault(of, casts(of, "delayed, a step later"))

        before = {each: each.main_grad.clone() for each in (weight, up, down)}
        results = [layer(batch.clone().requires_grad_(), shared) for batch in batches]
        assert {saved.dtype for saved in results[0].grad_fn.saved_tensors} <= {BF16, torch.float32}
        for result in reversed(results):
            result.backward(torch.ones_like(result))
        together = {each: each.main_grad - was for each, was in before.items()}
        for each, was in before.items():
            each.main_grad.copy_(was)
        for batch in batches:
            result = layer(batch.clone().requires_grad_(), shared)
            result.backward(torch.ones_like(result))
        for each, was in before.items():
            torch.testing.assert_close(together[each], each.main_grad - was, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "delayed, a step later"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_linear_layer_of_a_norm(device: str, recipe: str) -> None:
    for length, batch, inner, outer in SIZES if device == "cpu" else LARGE:
        hidden, d_residual = (random(length, batch, inner, device=device) for _ in range(2))
        norm, weight = norm_of(inner, device), parameter(outer, inner, device=device)
        upstream = random(length, batch, outer, device=device)
        exact_hidden, exact_gain, exact_weight = exact_copies(hidden, norm.weight, weight)
        exact = functional.rms_norm(exact_hidden, (inner,), exact_gain, norm.eps) @ exact_weight.T
        gradients = torch.autograd.grad(exact, [exact_hidden, exact_gain, exact_weight], upstream.double())
        before = [each.main_grad.clone() for each in (norm.weight, weight)]
        leaf = hidden.clone().requires_grad_()
        out, residual = _NormedColumn.apply(leaf, norm.weight, weight, norm, casts(weight, recipe), None, False)
        torch.autograd.backward([out, residual], [upstream, d_residual])
        assert torch.equal(residual, hidden)
        assert error(out, exact) < FORWARD
        grown = (each.main_grad - was for each, was in zip((norm.weight, weight), before, strict=True))
        ours = (leaf.grad.double() - d_residual.double(), *grown)
        for mine, right in zip(ours, gradients, strict=True):
            assert error(mine, right) < BACKWARD * stray(right)


def test_a_weight_is_cast_once_a_step() -> None:
    weight = parameter(32, 16, device="cpu")
    cast = casts(weight)
    first = cast.weight()
    assert cast.weight() is first
    with torch.no_grad():
        weight.mul_(2)
    assert cast.weight() is first
    cast.forget()
    assert cast.weight().inverse == 2 * first.inverse


def test_a_weight_without_an_accumulator_gets_its_gradient() -> None:
    weight = Parameter(random(32, 16, device="cpu"))
    leaf = random(16, 1, 16, device="cpu").requires_grad_()
    upstream = random(16, 1, 32, device="cpu")
    _Column.apply(leaf, weight, casts(weight), None, False).backward(upstream)
    assert error(weight.grad, upstream[:, 0].double().T @ leaf.detach()[:, 0].double()) < BACKWARD


def test_a_weight_is_waited_for_where_its_module_is_not_called() -> None:
    seen = []
    module = torch.nn.Linear(2, 2)
    module.register_forward_pre_hook(lambda called, inputs: seen.append(called))
    assert ready_weight(module) is module.weight and seen == [module]


def test_a_bad_number_reaches_every_gradient_that_it_touches() -> None:
    weight, inputs = parameter(32, 16, device="cpu"), random(16, 1, 16, device="cpu")
    inputs[3, 0, 5] = torch.nan
    out = _Column.apply(inputs.requires_grad_(), weight, casts(weight), None, False)
    out.backward(torch.ones_like(out))
    assert out.isnan().any() and weight.main_grad.isnan().any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("outer, inner, tokens", [
    (16, 32, 48), (3072, 3072, 8192), (9216, 3072, 8192), (49152, 3072, 8192), (3072, 24576, 8192),
    (2560, 2048, 16384)])
def test_cublaslt_adds_what_the_plain_path_adds(outer: int, inner: int, tokens: int) -> None:
    gradient = CurrentScaling(E5M2).quantize(Source(random(tokens, outer, device="cuda", scale=1e-3)))
    inputs = CurrentScaling(E4M3).quantize(Source(random(tokens, inner, device="cuda")))
    start = torch.randn(outer, inner, device="cuda")
    sums = {direct: start.clone() for direct in (True, False)}
    for _ in range(2):
        for direct, total in sums.items():
            fp8_products.accumulate_weight_grad(total, gradient.transposed, inputs.transposed, gradient.inverse,
                                                inputs.inverse, direct=direct)
    exact = 2 * torch._scaled_mm(gradient.transposed, inputs.transposed.T, gradient.inverse, inputs.inverse,
                                 out_dtype=torch.float32, use_fast_accum=False).double()
    for direct, total in sums.items():
        assert error(total.double() - start.double(), exact) < (1e-4 if direct else 4e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("tokens, inner, outer", [(48, 32, 16), (8192, 3072, 3072), (8192, 24576, 3072)])
def test_cublaslt_adds_a_residual(tokens: int, inner: int, outer: int) -> None:
    inputs = CurrentScaling(E4M3).quantize(Source(random(tokens, inner, device="cuda")))
    weight = CurrentScaling(E4M3).quantize(Source(random(outer, inner, device="cuda", scale=inner ** -0.5)))
    residual = random(tokens, outer, device="cuda")
    ours, plain = (fp8_products.add_product(residual, inputs, weight, direct=direct) for direct in (True, False))
    assert error(ours, plain.double()) < 6e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rows, columns, depth, fast", [
    (48, 32, 16, True), (8192, 9216, 3072, True), (8192, 3072, 3072, True), (2048, 2560, 8192, False)])
def test_the_algorithm_that_is_chosen_changes_no_bit(monkeypatch: pytest.MonkeyPatch, rows: int, columns: int,
                                                     depth: int, fast: bool) -> None:
    a = CurrentScaling(E4M3).quantize(Source(random(rows, depth, device="cuda")))
    b = CurrentScaling(E4M3).quantize(Source(random(columns, depth, device="cuda")))
    results = []
    for proposals in (1, 8):
        monkeypatch.setattr(cublaslt, "PROPOSALS", proposals)
        cublaslt._plan.cache_clear()
        for _ in range(2):    # the second finds its algorithm chosen
            results.append(torch.full((rows, columns), torch.nan, dtype=BF16, device="cuda"))
            fp8_products.fp8_product(a.data, b.data, a.inverse, b.inverse, results[-1], fast_accumulation=fast)
    assert all(torch.equal(result, results[0]) for result in results[1:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpus_product_is_the_reference_of_the_cpu() -> None:
    a = CurrentScaling(E5M2).quantize(Source(random(256, 512, device="cuda")))
    b = CurrentScaling(E4M3).quantize(Source(random(128, 512, device="cuda")))
    for fast in (False, True):
        ours, exact = torch.empty(256, 128, dtype=BF16, device="cuda"), torch.empty(256, 128)
        operands = (a.data, b.data, a.inverse, b.inverse)
        fp8_products.fp8_product(*operands, ours, fast_accumulation=fast)
        fp8_products.fp8_product(*(part.cpu() for part in operands), exact, fast_accumulation=fast)
        assert error(ours.cpu(), exact.double()) < 4e-3
