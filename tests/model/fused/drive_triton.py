"""Run by test_interpreted.py: compares one Triton kernel with its torch form, without a GPU.

    python drive_triton.py adamw|rotary|sums|rows|loss
"""

from __future__ import annotations

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import torch  # noqa: E402

from megatron.pretrain.model.fused import triton_loss, triton_rotary, triton_rows  # noqa: E402
from megatron.pretrain.model.fused.attention import _rotated  # noqa: E402
from megatron.pretrain.model.fused.loss import _Torch  # noqa: E402
from megatron.pretrain.optim.adamw import FusedAdamW  # noqa: E402


def rotary() -> None:
    for length, batch, groups, queries, width in ((1, 1, 1, 1, 8), (5, 2, 2, 3, 24), (3, 1, 4, 1, 64)):
        mixed = torch.randn(length, batch, groups, queries + 2, width)
        angles = torch.randn(length, 1, 1, width // 2).repeat(1, 1, 1, 2)
        turned = mixed.clone()
        triton_rotary.rotate_(turned, angles)
        torch.testing.assert_close(turned[..., :-1, :], _rotated(mixed[..., :-1, :], angles))
        assert torch.equal(turned[..., -1, :], mixed[..., -1, :]), "values stay"
        packed = torch.full_like(mixed, torch.nan)
        triton_rotary.pack_rotated_back(*heads_of(turned), packed, angles)
        triton_rotary.rotate_(turned, angles, inverse=True)
        torch.testing.assert_close(turned, mixed)
        assert torch.equal(packed, turned)
        triton_rotary.rotate_(packed, angles, keys_only=True)
        expected = turned.clone()
        expected[..., -2:-1, :] = _rotated(turned[..., -2:-1, :], angles)
        torch.testing.assert_close(packed, expected)
        assert torch.equal(packed[..., :-2, :], turned[..., :-2, :]), "queries stay"


def sums() -> None:
    """Every head's place by the accumulator's definition: row and column of each thread's values."""
    for length, batch, groups, queries, width in ((1, 1, 1, 1, 16), (70, 2, 2, 3, 48), (128, 1, 3, 1, 64)):
        mixed = torch.randn(length, batch, groups, queries + 2, width)
        angles = torch.randn(length, 1, 1, width // 2).repeat(1, 1, 1, 2)
        packed = torch.full_like(mixed, torch.nan)
        parts = mixed[..., :-2, :].flatten(2, 3), mixed[..., -2, :], mixed[..., -1, :]
        for part, slot, turn in zip(parts, (0, queries, queries + 1), (angles, angles, None), strict=True):
            triton_rotary.pack_sums(scattered(part), packed, slot, 0.5, turn)
        exact = mixed * 0.5
        exact[..., :-1, :] = _rotated(exact[..., :-1, :], -angles)
        torch.testing.assert_close(packed, exact)


def scattered(heads: torch.Tensor) -> torch.Tensor:
    """[s, b, heads, d] -> [b, heads, tiles * 64 * d], as 128 threads have it that keep four values side by side.

    Of 8 columns a thread has columns 2 (lane mod 4) and the next, in rows lane div 4 of its warp's 16 and 8 below.
    """
    length, batch, count, width = heads.shape
    tiles = -(-length // 64)
    rows = torch.nn.functional.pad(heads.permute(1, 2, 0, 3), (0, 0, 0, tiles * 64 - length), value=torch.nan)
    out = torch.empty(batch, count, tiles, width // 8, 128, 4)
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        for value in range(4):
            row, column = warp * 16 + lane // 4 + value // 2 * 8, lane % 4 * 2 + value % 2
            out[..., thread, value] = rows[:, :, row::64, column::8]
    return out.flatten(2)


def heads_of(mixed: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Packed heads as cuDNN orders gradients: [b, s, heads, d] views of tensors [b, heads, s, d]."""
    parts = mixed[..., :-2, :].flatten(2, 3), mixed[..., -2, :], mixed[..., -1, :]
    return tuple(part.permute(1, 2, 0, 3).contiguous().transpose(1, 2) for part in parts)


def rows() -> None:
    for count, width in ((1, 1), (132, 100), (65, 32)):
        parts, start = torch.randn(count, width), torch.randn(width)
        total = start.clone()
        triton_rows.add_all(total, parts)
        torch.testing.assert_close(total, start + parts.sum(0))
    for count, vocabulary, width in ((1, 1, 1), (40, 3, 16), (33, 100, 520), (50, 1, 5)):
        # Of a part of the vocabulary: some tokens lie before it and some behind.
        tokens = torch.randint(-2, vocabulary + 2, (count,))
        values, start = torch.randn(count, width).bfloat16(), torch.randn(vocabulary, width)
        total = start.clone()
        triton_rows.add_by_token(total, tokens, values)
        own = (tokens >= 0) & (tokens < vocabulary)
        exact = start.double().index_add(0, tokens[own], values[own].double())
        torch.testing.assert_close(total.double(), exact, rtol=1e-5, atol=1e-4)


def loss() -> None:
    for tokens, width, first in ((1, 16, 0), (7, 100, 0), (9, 100, 100), (3, 8200, 0)):
        logits, labels = torch.randn(tokens, width) * 4, torch.randint(0, 2 * width, (tokens,))
        ours, torchs = (part.statistics(logits, labels, first) for part in (triton_loss, _Torch))
        torch.testing.assert_close(ours, torchs)
        scale, log_total = torch.rand(tokens), ours[0] + ours[1].log()
        written, expected = logits.clone(), logits.clone()
        triton_loss.gradient_(written, labels, first, log_total, scale)
        _Torch.gradient_(expected, labels, first, log_total, scale)
        torch.testing.assert_close(written, expected)


def adamw() -> None:
    """Ten updates of two groups are torch's own, with the gradient's divisor as torch divides beforehand."""
    for divisor in (1.0, 3.5):
        starts = [torch.randn(5), torch.randn(3, 1400)]
        ours, torchs = ([torch.nn.Parameter(start.clone()) for start in starts] for _ in range(2))
        options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}
        first, second = (kind([{"params": weights[:1], "weight_decay": 0.0},
                               {"params": weights[1:], "weight_decay": 0.1}], **options)
                         for kind, weights in ((FusedAdamW, ours), (torch.optim.AdamW, torchs)))
        first.gradient_divisor = divisor
        first.model_weights = {ours[1]: torch.full(starts[1].shape, torch.nan, dtype=torch.bfloat16)}
        for _ in range(10):
            for mine, theirs in zip(ours, torchs, strict=True):
                mine.grad = torch.randn_like(mine)
                theirs.grad = mine.grad / divisor
            first.step()
            second.step()
        # The interpreter cuts 16 bits off where a GPU rounds to the nearest.
        torch.testing.assert_close(first.model_weights[ours[1]].float(), ours[1].detach(), rtol=2**-7, atol=0)
        for mine, theirs in zip(ours, torchs, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
            for name, value in second.state[theirs].items():
                torch.testing.assert_close(first.state[mine][name], value, rtol=1e-5, atol=1e-7)


torch.manual_seed(0)
{"adamw": adamw, "rotary": rotary, "sums": sums, "rows": rows, "loss": loss}[sys.argv[1]]()
print(f"{sys.argv[1]}: equal")
