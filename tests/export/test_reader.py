"""The reader against torch's own, and against folders that are damaged or hostile."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron.pretrain.errors import UserError
from megatron.pretrain.export.reader import TorchDistCheckpoint


def read_with_torch(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint but the optimizer's, whole, as torch's own reader loads it."""
    entries = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    content = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in entries.items()
               if hasattr(entry, "size") and not key.startswith("optimizer.")}
    dcp.load(content, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    return content


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("name", ["trained_tp2_pp2", "written"])
def test_every_tensor_is_what_torch_reads(name: str, request: pytest.FixtureRequest):
    folder = request.getfixturevalue(name)
    checkpoint = TorchDistCheckpoint(folder)
    expected = {}
    for key, tensor in read_with_torch(folder).items():
        if key.startswith("decoder.layers."):
            inner = key.removeprefix("decoder.layers.")
            expected |= {f"decoder.layers.{layer}.{inner}": row for layer, row in enumerate(tensor)}
        else:
            expected[key] = tensor
    assert sorted(checkpoint.names()) == sorted(expected)
    for key, tensor in expected.items():
        read = checkpoint.read(key)
        assert torch.equal(read, tensor)
        assert (tuple(read.shape), read.dtype) == (checkpoint.shape(key), checkpoint.dtype(key).of_torch)


def test_layers_with_names_of_their_own_read_the_same(
        written, tmp_path, tiny_tokenizer, run_tool, repository):
    outcome = run_tool(
        repository / "tests/export/write_checkpoint.py", "--numbered", tmp_path, tiny_tokenizer, 100)
    assert outcome.returncode == 0, outcome.stderr
    stacked, numbered = TorchDistCheckpoint(written), TorchDistCheckpoint(tmp_path / "iter_0000100")
    assert sorted(stacked.names()) == sorted(numbered.names())
    assert all(torch.equal(stacked.read(name), numbered.read(name)) for name in stacked.names())


class Hostile:
    """Unpickled, it makes a folder: what stands for anything worse."""

    def __init__(self, evidence: Path) -> None:
        self.evidence = evidence

    def __reduce__(self):
        return os.mkdir, (str(self.evidence),)


def test_a_pickle_that_would_run_code_is_refused(damaged, tmp_path):
    (damaged / ".metadata").write_bytes(pickle.dumps(Hostile(tmp_path / "ran")))
    with pytest.raises(UserError, match=r"\.metadata is refused.*mkdir"):
        TorchDistCheckpoint(damaged)
    assert not (tmp_path / "ran").exists()


def test_a_chunk_that_would_run_code_is_refused(damaged, tmp_path):
    path = damaged / "__0_0.distcp"
    torch.save({"hostile": Hostile(tmp_path / "ran")}, tmp_path / "hostile.pt")
    path.write_bytes((tmp_path / "hostile.pt").read_bytes().ljust(path.stat().st_size, b"\0"))
    checkpoint = TorchDistCheckpoint(damaged)
    with pytest.raises(UserError, match="cannot be read"):
        for name in checkpoint.names():
            checkpoint.read(name)
    assert not (tmp_path / "ran").exists()


def write(folder: Path, name: str, content: bytes = b"") -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)


@pytest.mark.parametrize(("make", "sentence"), [
    (lambda folder: None, "is not a folder"),
    (lambda folder: folder.mkdir(), "it is empty"),
    (lambda folder: write(folder, "mp_rank_00"), "Megatron-LM's older format"),
    (lambda folder: write(folder, "iter_0000001"), r"name one of them, such as .*iter_0000001"),
    (lambda folder: write(folder, "weights.bin"), r"it holds no \.metadata"),
    (lambda folder: write(folder, ".metadata"), "is refused"),
    (lambda folder: write(folder, ".metadata", b"not a pickle"), "is refused"),
    (lambda folder: write(folder, ".metadata", pickle.dumps({"a": 1})), "is refused"),
])
def test_what_is_no_checkpoint_is_named(make, sentence: str, tmp_path):
    make(tmp_path / "folder")
    with pytest.raises(UserError, match=sentence):
        TorchDistCheckpoint(tmp_path / "folder")


def test_a_truncated_index_is_refused(damaged):
    path = damaged / ".metadata"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="is refused"):
        TorchDistCheckpoint(damaged)


@pytest.mark.parametrize("field", ["size", "chunks", "properties"])
def test_an_index_that_lacks_a_field_is_refused(field: str, damaged):
    metadata = dcp.FileSystemReader(damaged).read_metadata()
    delattr(metadata.state_dict_metadata["output_layer.weight"], field)
    (damaged / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match=rf"\.metadata is refused.*'{field}'"):
        TorchDistCheckpoint(damaged)


def test_a_missing_shard_is_named(damaged):
    (damaged / "__0_0.distcp").unlink()
    with pytest.raises(UserError, match=r"__0_0\.distcp is missing"):
        TorchDistCheckpoint(damaged).check_files()


def test_a_truncated_shard_is_named_with_its_size(damaged):
    path = damaged / "__0_0.distcp"
    whole_bytes = path.stat().st_size
    os.truncate(path, whole_bytes - 1)
    with pytest.raises(UserError, match=re.escape(f"it has {whole_bytes - 1:,} bytes")):
        TorchDistCheckpoint(damaged).check_files()


def test_overwritten_bytes_are_found(damaged):
    path = damaged / "__0_0.distcp"
    path.write_bytes(b"\xff" * path.stat().st_size)
    checkpoint = TorchDistCheckpoint(damaged)
    with pytest.raises(UserError, match="the checkpoint is damaged"):
        for name in checkpoint.names():
            checkpoint.read(name)
