"""Scales of the past: what the history keeps, forgets, and hands to the next step."""

from __future__ import annotations

import pytest
import torch

from megatron.pretrain.model.fused.quantize import E4M3, E5M2, Quantized, Source
from megatron.pretrain.model.fused.scaling import HISTORY, AmaxHistory, CurrentScaling, DelayedScaling

CPU = torch.device("cpu")


def restored(cast: Quantized) -> torch.Tensor:
    return cast.data.float() * cast.inverse


def tensor(largest: float) -> Source:
    values = torch.rand(16, 32) * largest
    values[3, 5] = -largest
    return Source(values)


def test_current_scaling_uses_the_whole_range() -> None:
    for largest in (1e-20, 3.0, 1e20):
        source = tensor(largest)
        cast = CurrentScaling(E4M3).quantize(source)
        assert cast.data.float().abs().max() == 448
        torch.testing.assert_close(restored(cast), source.values, rtol=2**-4, atol=largest * 2**-17)
        assert torch.equal(cast.transposed.float(), cast.data.float().T)


def test_zeros_stay_zeros() -> None:
    cast = CurrentScaling(E4M3).quantize(Source(torch.zeros(16, 16)))
    assert not cast.data.float().any() and cast.inverse == 1


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(bad: float) -> None:
    values = torch.ones(16, 16)
    values[0, 0] = bad
    assert restored(CurrentScaling(E4M3).quantize(Source(values))).isnan().any()
    history = AmaxHistory([E4M3], CPU)
    history.live[0].fill_(1.0)
    history.update()
    assert restored(DelayedScaling(history, 0, E4M3).quantize(Source(values)))[0, 0].isnan()


def test_the_first_step_scales_by_what_it_sees() -> None:
    history = AmaxHistory([E4M3, E5M2], CPU)
    for number, dtype in enumerate((E4M3, E5M2)):
        source = tensor(1e-9)
        delayed, current = (scaling.quantize(source) for scaling in (
            DelayedScaling(history, number, dtype), CurrentScaling(dtype)))
        assert torch.equal(delayed.data.view(torch.uint8), current.data.view(torch.uint8))
    torch.testing.assert_close(torch.stack(history.live), torch.tensor([1e-9, 1e-9]))


def test_later_steps_scale_by_the_largest_of_the_history() -> None:
    history = AmaxHistory([E4M3, E5M2], CPU)
    scaling = DelayedScaling(history, 0, E4M3)
    for largest in (1.0, 4.0, 2.0):
        scaling.quantize(tensor(largest))
        history.update()
    assert scaling.quantize(tensor(8.0)).inverse == 4 / 448
    assert scaling.quantize(tensor(8.0)).data.float().abs().max() == 448, "what is past the range is held"
    scaling.quantize(tensor(3.0))
    assert history.live[0] == 8, "the largest of a step's micro-batches"
    history.update()
    assert scaling.quantize(tensor(1.0)).inverse == 8 / 448
    assert (history.scales[1], history.inverses[1]) == (1, 1), "a tensor that was not seen"


def test_the_history_forgets_after_its_length_and_what_is_not_finite() -> None:
    history = AmaxHistory([E4M3], CPU)
    history.live[0].fill_(7.0)
    history.update()
    history.live[0].fill_(torch.inf)
    history.update()
    assert history.scales[0] == 64
    for _ in range(HISTORY - 3):
        history.live[0].fill_(1.0)
        history.update()
    assert history.scales[0] == 64
    history.update()
    assert history.scales[0] == 448


def test_scales_follow_from_the_history_alone() -> None:
    history, again = AmaxHistory([E4M3, E5M2], CPU), AmaxHistory([E4M3, E5M2], CPU)
    for largest in (3.0, 5.0):
        for live in history.live:
            live.fill_(largest)
        history.update()
    again.values.copy_(history.values)
    again.resume()
    assert again.begun and again.scales == history.scales and again.inverses == history.inverses
