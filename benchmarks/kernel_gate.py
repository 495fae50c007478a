"""The gated MLP's products as candidates: an epilogue may hold the activation.

quack's order of the two halves alternates gate and up.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from kernel_parts import CHECKED_ROWS, Part, Setting, first_rows, moved, no_grad, poisoned
from kernel_products import TILES, flops, quack_product, tile_config, tiles
from torch import Tensor
from torch.nn import Parameter, functional

BF16 = 2  # bytes


def gate_forward(setting: Setting) -> Part:
    from megatron.pretrain.model.fused.gate import QuackGate, TorchGate

    shape = setting.shape
    x, up = setting.random(setting.tokens, shape.hidden_size), _up(setting)
    left_out: list[str] = []

    def tiled(tile: str) -> tuple[Tensor, Tensor]:
        from quack.gemm_interface import gemm_gated

        return gemm_gated(x, up.detach().T, activation="swiglu", concat_layout=("B",), tuned=False,
                          config=tile_config(tile))

    def reference() -> Tensor:
        gate, linear = (x[:CHECKED_ROWS].double() @ up.detach().double().T).chunk(2, -1)
        return functional.silu(gate) * linear

    def project(gate: Any) -> tuple[Tensor, Tensor]:
        halves = x.new_empty(setting.tokens, 2 * shape.ffn_hidden_size)
        activated = x.new_empty(setting.tokens, shape.ffn_hidden_size)
        gate.forward(x, up, halves, activated)
        return halves, activated

    quack = {"project: quack": lambda: project(QuackGate()),
             **{f"quack {tile}": partial(tiled, tile) for tile in tiles(setting) if not TILES[tile].transposed}}
    halves = moved(x, up) + 3 * setting.tokens * shape.ffn_hidden_size * BF16
    return Part("fc1 + gate forward", shape.num_layers, flops(x, up.T), halves, reference,
                picked=lambda outputs: outputs[1][:CHECKED_ROWS],
                candidates={"project: torch": no_grad(lambda: project(TorchGate())),
                            **setting.having("quack", quack, left_out)}, left_out=left_out)


def gate_backward(setting: Setting) -> Part:
    from megatron.pretrain.model.fused.gate import QuackGate, TorchGate

    shape, tokens = setting.shape, setting.tokens
    gradient = setting.random(tokens, shape.hidden_size)
    down = Parameter(setting.random(shape.hidden_size, shape.ffn_hidden_size, scale=0.02))
    halves = setting.random(tokens, 2 * shape.ffn_hidden_size)
    mixed = alternating(halves)
    left_out: list[str] = []

    def reference() -> Tensor:
        rows = halves[:CHECKED_ROWS].double().requires_grad_()
        gate, linear = rows.chunk(2, -1)
        (functional.silu(gate) * linear).backward(gradient[:CHECKED_ROWS].double() @ down.detach().double())
        return rows.grad

    def tiled(tile: str) -> tuple[Tensor, Tensor]:
        from quack.gemm_interface import gemm_dgated

        return gemm_dgated(gradient, down.detach(), mixed, activation="swiglu", dynamic_scheduler=True,
                           tuned=False, config=tile_config(tile))

    def in_order(outputs: tuple[Tensor, Tensor, str]) -> Tensor:
        rows = outputs[0][:CHECKED_ROWS]
        return rows if outputs[2] == "torch" else torch.cat([rows[:, ::2], rows[:, 1::2]], -1)

    def project(gate: Any, ordered: Tensor) -> tuple[Tensor, Tensor]:
        d_halves, activated = torch.empty_like(ordered), ordered.new_empty(tokens, shape.ffn_hidden_size)
        gate.backward(gradient, down, ordered, d_halves, activated)
        return d_halves, activated

    quack = {"project: quack": lambda: (*project(QuackGate(), mixed), "quack"),
             **{f"quack {tile}": lambda tile=tile: (*tiled(tile), "quack") for tile in tiles(setting)[:1]}}
    written = tokens * shape.ffn_hidden_size * BF16
    return Part("fc2 + gate backward", shape.num_layers, flops(gradient, down),
                moved(gradient, down, halves, halves) + written, reference, in_order,
                candidates={"project: torch": no_grad(
                                lambda: (*project(TorchGate(), halves), "torch")),
                            **setting.having("quack", quack, left_out)}, left_out=left_out)


def fc1_input_gradient(setting: Setting) -> Part:
    from megatron.pretrain.model.fused.gate import QuackGate, TorchGate

    d_halves, up = setting.random(setting.tokens, 2 * setting.shape.ffn_hidden_size), _up(setting)
    mixed = alternating(d_halves)
    out = poisoned(d_halves, setting.tokens, setting.shape.hidden_size)
    left_out: list[str] = []
    quack = {"project: quack": lambda: (QuackGate().input_gradient(mixed, up, out), out)[1],
             **{f"quack {tile}": partial(quack_product, mixed, up.detach(), out, tile=tile,
                                         concat_layout=("B",)) for tile in tiles(setting)}}
    return Part("fc1 input gradient", setting.shape.num_layers, flops(d_halves, up), moved(d_halves, up, out),
                reference=lambda: d_halves[:CHECKED_ROWS].double() @ up.detach().double(), picked=first_rows,
                candidates={"project: torch": no_grad(lambda: (TorchGate().input_gradient(d_halves, up, out), out)[1]),
                            **setting.having("quack", quack, left_out)},
                fresh=lambda: out.fill_(float("nan")), left_out=left_out)


def fc1_weight_gradient(setting: Setting) -> Part:
    from megatron.pretrain.model.fused.gate import QuackGate, TorchGate

    x = setting.random(setting.tokens, setting.shape.hidden_size)
    d_halves, up = setting.random(setting.tokens, 2 * setting.shape.ffn_hidden_size), _up(setting)
    mixed = alternating(d_halves)
    up.main_grad = torch.zeros(up.shape, device=setting.device)
    left_out: list[str] = []
    quack = {"project: quack": lambda: (QuackGate().weight_gradient(up, mixed, x), up.main_grad)[1],
             **{f"quack {tile}": partial(quack_product, mixed.T, x, up.main_grad, tile=tile,
                                         add_to_output=True, concat_layout=("C", "out"))
                for tile in tiles(setting)}}
    return Part("fc1 weight gradient", setting.shape.num_layers, flops(d_halves.T, x),
                moved(d_halves, x, up.main_grad, up.main_grad),
                reference=lambda: d_halves[:, :CHECKED_ROWS].double().T @ x.double(), picked=first_rows,
                candidates={"project: torch": no_grad(
                                lambda: (TorchGate().weight_gradient(up, d_halves, x), up.main_grad)[1]),
                            **setting.having("quack", quack, left_out)},
                fresh=up.main_grad.zero_, left_out=left_out)


def _up(setting: Setting) -> Parameter:
    return Parameter(setting.random(2 * setting.shape.ffn_hidden_size, setting.shape.hidden_size, scale=0.02))


def alternating(halves: Tensor) -> Tensor:
    return torch.stack(halves.chunk(2, -1), -1).flatten(-2)
