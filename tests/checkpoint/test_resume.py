"""40 steps straight equal 20, a resume, and 20: every tensor, counter and random state, bit for bit."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata


def content(folder: Path) -> dict[str, object]:
    """Everything that a torch_dist checkpoint holds, by name, read with torch alone."""
    metadata = dcp.FileSystemReader(folder).read_metadata()
    found: dict[str, object] = {
        name: io.BytesIO() if isinstance(entry, BytesStorageMetadata)
        else torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()}
    dcp.load(found, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    return found


def plain(value: object) -> object:
    """Random states hold tensors and arrays, in bytes; as text of their values they can be compared."""
    if isinstance(value, io.BytesIO):
        value = torch.load(io.BytesIO(value.getvalue()), weights_only=False)
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return value


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["plain", "distributed"])
def test_resumed_run_is_the_straight_one(precision: str, optimizer: str, tmp_path: Path, train) -> None:
    flags = ["--train-iters", 40, "--save-interval", 20, "--hidden-dropout", 0.1]
    flags += ["--bf16"] if precision == "bf16" else []
    flags += ["--use-distributed-optimizer"] if optimizer == "distributed" else []
    straight = train(tmp_path / "straight", *flags, processes=2)
    resumed = train(tmp_path / "resumed", *flags, "--load", straight.checkpoints / "iter_0000020", processes=2)

    assert resumed.losses() == straight.losses()[20:]
    ends = [run.checkpoints / "iter_0000040" for run in (straight, resumed)]
    states = [json.loads((end / "run.json").read_text())["train_state"] for end in ends]
    assert states[0] == states[1]
    assert states[0]["consumed_samples"] == 320
    one, other = (content(end) for end in ends)
    assert one.keys() == other.keys()
    moments = [name for name in one if name.startswith("optimizer.state.exp_avg_sq.")]
    masters = [name for name in one if name.startswith("optimizer.state.fp32_param.")]
    assert moments and bool(masters) == (precision == "bf16")
    for name in one:
        if isinstance(one[name], torch.Tensor):
            assert torch.equal(one[name], other[name]), name
        else:
            assert plain(one[name]) == plain(other[name]), name
