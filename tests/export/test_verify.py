"""Verification: what it lets through, and every way in which a folder can be wrong without looking so."""

from __future__ import annotations

import dataclasses
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from megatron.pretrain.errors import UserError
from megatron.pretrain.export import convert, verify
from megatron.pretrain.export.checkpoints import describe, open_checkpoint
from megatron.pretrain.export.convert import Options, plan_conversion, run_conversion
from megatron.pretrain.export.elements import BF16, FP16, FP32
from megatron.pretrain.export.forward import megatron_logits
from megatron.pretrain.export.hf import TensorSpec
from megatron.pretrain.export.shape import model_shape


@pytest.mark.parametrize("name", ["mha", "gqa", "mqa", "head_dim", "tied"])
def test_the_formulas_give_the_trained_models_logits(name: str, trained_models, repository):
    prompt = runpy.run_path(str(repository / "tests/export/save_models.py"))["PROMPT"]
    checkpoint = open_checkpoint(trained_models / name / "iter_0000100")
    manifest = describe(checkpoint, None)
    shape = model_shape(manifest, manifest.tokenizer["vocab_size"])
    expected = torch.load(trained_models / name / "expected.pt")["logits"]
    logits = megatron_logits(checkpoint.read, checkpoint.names(), shape, prompt[0])
    assert (logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [None, BF16, FP16])
def test_a_sound_conversion_passes(dtype, written, tmp_path):
    plan = plan_conversion(written, Options(dtype=dtype))
    verified = run_conversion(plan, tmp_path / "hf", verify=True)
    assert verified.tensors == len(plan.specs) == 21
    assert verified.logits_off is not None and not verified.why_no_logits
    assert (tmp_path / "hf/config.json").is_file()


def test_too_little_memory_is_said_and_the_bytes_are_compared_all_the_same(written, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "_free_bytes", lambda: 1_000_000)
    verified = run_conversion(plan_conversion(written, Options()), tmp_path / "hf", verify=True)
    assert str(verified) == "21 tensors verified, logits not compared: 0 GB needed, 0 GB free"


def spoil(folder: Path, monkeypatch: pytest.MonkeyPatch, change) -> None:
    """Let `change` happen to the folder after it was written and before it is verified."""
    describe_all = convert._write_descriptions

    def write_and_change(plan, partial, name):
        describe_all(plan, partial, name)
        change(partial)

    monkeypatch.setattr(convert, "_write_descriptions", write_and_change)


def flip_last_bit(partial: Path) -> None:
    with (partial / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte ^ 1]))


def cut_off(partial: Path) -> None:
    os.truncate(partial / "model.safetensors", (partial / "model.safetensors").stat().st_size - 1)


def replace(text: str, by: str):
    def change(partial: Path) -> None:
        path = partial / "config.json"
        assert text in path.read_text()
        path.write_text(path.read_text().replace(text, by))
    return change


@pytest.mark.parametrize(("change", "sentence"), [
    (flip_last_bit, r"failed: lm_head\.weight, read back from the disk, is not what was written"),
    (cut_off, r"model\.safetensors is truncated"),
    (replace('"rope_theta": 10000.0', '"rope_theta": 9000.0'), "verification failed: .* logits differ"),
    (replace('"rms_norm_eps": 0.00001', '"rms_norm_eps": 0.1'), "verification failed: .* logits differ"),
    (replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'), "tensors missing or unknown"),
])
def test_what_is_wrong_is_found_and_nothing_stays(change, sentence: str, written, tmp_path, monkeypatch):
    spoil(tmp_path, monkeypatch, change)
    plan = plan_conversion(written, Options())
    with pytest.raises(UserError, match=sentence):
        run_conversion(plan, tmp_path / "out/hf", verify=True)
    assert not list((tmp_path / "out").iterdir())


def test_a_rule_that_mixes_up_two_matrices_is_found_by_the_logits(written, tmp_path):
    """Gate and up are of one shape: the files are sound, and the model is another."""
    plan = plan_conversion(written, Options())
    swapped = tuple((name, dataclasses.replace(rule, hf=rule.hf[::-1]))
                    if rule.hf[0].endswith("gate_proj.weight") else (name, rule) for name, rule in plan.rules)
    plan = dataclasses.replace(plan, rules=swapped)
    with pytest.raises(UserError, match="logits differ"):
        run_conversion(plan, tmp_path / "out/hf", verify=True)


def flip_in_checkpoint(folder: Path, key: str) -> None:
    """Change one bit amid a tensor's elements, where no structure is damaged."""
    places = dcp.FileSystemReader(folder).read_metadata().storage_data
    info, = (info for index, info in places.items() if index.fqn == key)
    with (folder / info.relative_path).open("r+b") as file:
        at = info.offset + info.length // 2
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def test_a_bit_that_flipped_in_the_checkpoint_is_found(damaged, tmp_path):
    flip_in_checkpoint(damaged, "embedding.word_embeddings.weight")
    plan = plan_conversion(damaged, Options())
    with pytest.raises(UserError, match=r"word_embeddings\.weight .* is not what was saved there \(its CRC"):
        run_conversion(plan, tmp_path / "out/hf", verify=True)
    assert not list((tmp_path / "out").iterdir())
    run_conversion(plan, tmp_path / "out/hf")    # without --verify it is not looked for


def test_the_bits_are_compared_and_not_the_numbers():
    numbers = torch.tensor([0.0, torch.nan, 1.0])
    assert verify.same_bits(numbers, numbers.clone())
    assert verify.same_bits(numbers, torch.tensor([0.0, -torch.nan, 1.0]))
    for other in (torch.tensor([-0.0, torch.nan, 1.0]), torch.tensor([0.0, torch.nan]), numbers.bfloat16()):
        assert not verify.same_bits(numbers, other)


def test_a_tensor_that_was_not_announced_is_named(tmp_path):
    tensors = {"a": torch.ones(2), "b": torch.ones(2)}
    specs = [TensorSpec(name, (2,), FP32) for name in tensors]
    save_file(tensors, tmp_path / "model.safetensors")
    verify.check_written(tmp_path, specs, tensors.items())
    with pytest.raises(UserError, match="b is missing or left over"):
        verify.check_written(tmp_path, specs[:1], tensors.items())
    with pytest.raises(UserError, match="a, read back from the disk"):
        verify.check_written(tmp_path, specs, {**tensors, "a": torch.zeros(2)}.items())


def test_without_transformers_a_verification_says_what_to_install(written, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="--verify compares logits.*pip install 'transformers"):
        run_conversion(plan_conversion(written, Options()), tmp_path / "out/hf", verify=True)
    assert not (tmp_path / "out").exists()
