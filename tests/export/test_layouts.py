"""Whatever layout, format or trainer a checkpoint is from: the converted model is what was trained."""

from __future__ import annotations

import argparse
import json
import os
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron.pretrain.errors import UserError
from megatron.pretrain.export.convert import Options, plan_conversion, run_conversion
from megatron.pretrain.export.to_megatron import ImportOptions, plan_import, run_import

ORIGINS = {"tp2_pp2": "head_dim", "tp4": "mha", "interleaved": "deep"}


def convert(source: Path, target: Path, **options: object) -> dict[str, torch.Tensor]:
    run_conversion(plan_conversion(source, Options(**options)), target)
    return load_file(target / "model.safetensors")


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@torch.no_grad()
def assert_computes(folder: Path, expected: dict[str, torch.Tensor], prompt: torch.Tensor) -> None:
    """Logits within 1e-4, and the same 64 tokens greedily."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert expected["logits"].std() > 0.5    # or the comparison would say little
    assert (model(prompt).logits[0] - expected["logits"]).abs().max() < 1e-4
    written = model.generate(prompt, max_new_tokens=64, do_sample=False, eos_token_id=None)
    assert torch.equal(written[0, prompt.shape[1]:], expected["greedy"])


@pytest.fixture(scope="module")
def prompt(repository) -> torch.Tensor:
    return runpy.run_path(str(repository / "tests/export/save_models.py"))["PROMPT"]


@pytest.mark.parametrize("layout", ORIGINS)
def test_a_layout_leaves_no_trace(layout: str, trained_layouts, prompt, tmp_path):
    whole = convert(trained_layouts / ORIGINS[layout] / "iter_0000100", tmp_path / "whole")
    assert_same(whole, convert(trained_layouts / layout / "iter_0000100", tmp_path / "cut"))
    expected = torch.load(trained_layouts / ORIGINS[layout] / "expected.pt")
    assert_computes(tmp_path / "cut", expected, prompt)


@pytest.mark.parametrize("layout", ORIGINS)
def test_the_former_format_of_the_engines_own_ranks(layout: str, trained_layouts, tmp_path):
    whole = convert(trained_layouts / ORIGINS[layout] / "iter_0000100", tmp_path / "whole")
    assert_same(whole, convert(trained_layouts / layout / "former", tmp_path / "former"))


def test_a_megatron_lm_checkpoint_needs_no_run_json(of_megatron_lm, prompt, tmp_path):
    convert(of_megatron_lm / "plain/iter_0000100", tmp_path / "hf")
    assert_computes(tmp_path / "hf", torch.load(of_megatron_lm / "plain/expected.pt"), prompt)
    said = json.loads((tmp_path / "hf/export.json").read_text())
    assert (said["iteration"], said["consumed_tokens"]) == (100, 800 * 128)


def test_norms_of_query_and_key_make_a_qwen3(of_megatron_lm, prompt, tmp_path):
    source = of_megatron_lm / "qk_norm/iter_0000100"
    before = convert(source, tmp_path / "hf")
    assert json.loads((tmp_path / "hf/config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
    assert_computes(tmp_path / "hf", torch.load(of_megatron_lm / "qk_norm/expected.pt"), prompt)
    plan = plan_import(tmp_path / "hf", ImportOptions(for_megatron_lm=True))
    assert_same(before, convert(run_import(plan, tmp_path / "again"), tmp_path / "back"))


def test_a_llama_may_be_called_a_mistral(of_megatron_lm, prompt, tmp_path):
    convert(of_megatron_lm / "plain/iter_0000100", tmp_path / "hf", architecture="MistralForCausalLM")
    assert json.loads((tmp_path / "hf/config.json").read_text())["model_type"] == "mistral"
    assert_computes(tmp_path / "hf", torch.load(of_megatron_lm / "plain/expected.pt"), prompt)
    with pytest.raises(UserError, match="GPT2LMHeadModel is not known here; known are Llama"):
        plan_conversion(of_megatron_lm / "plain/iter_0000100", Options(architecture="GPT2LMHeadModel"))


def test_the_forks_vocabulary_comes_back(trained_models, tmp_path):
    convert(trained_models / "legacy/iter_0000100", tmp_path / "hf")
    plan = plan_import(tmp_path / "hf", ImportOptions())
    assert (plan.tokenizer.vocab_size, plan.tokenizer_config.tokenizer_sentencepiece_legacy) == (1005, True)


class Hostile:
    """Unpickled, it makes a folder: what stands for anything worse."""

    def __init__(self, evidence: Path) -> None:
        self.evidence = evidence

    def __reduce__(self):
        return os.mkdir, (str(self.evidence),)


def test_arguments_that_would_run_code_are_refused(of_megatron_lm, tmp_path):
    folder = shutil.copytree(of_megatron_lm / "plain/iter_0000100", tmp_path / "iter_0000100")
    torch.save({"args": argparse.Namespace(num_layers=Hostile(tmp_path / "ran"))}, folder / "common.pt")
    with pytest.raises(UserError, match=r"common\.pt is refused: it names posix\.mkdir"):
        plan_conversion(folder, Options())
    assert not (tmp_path / "ran").exists()


def test_neither_run_json_nor_args(of_megatron_lm, tmp_path):
    folder = shutil.copytree(of_megatron_lm / "plain/iter_0000100", tmp_path / "iter_0000100")
    torch.save({"iteration": 100}, folder / "common.pt")
    with pytest.raises(UserError, match=r"run\.json is missing.*common\.pt has no args"):
        plan_conversion(folder, Options())
