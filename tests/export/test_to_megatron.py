"""From a Hugging Face folder to a checkpoint and back: the same bits; and what is refused on the way."""

from __future__ import annotations

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen3Config,
    Qwen3ForCausalLM)

from megatron.pretrain.checkpoint.manifest import find_checkpoint, read_manifest
from megatron.pretrain.errors import UserError
from megatron.pretrain.export.convert import Options, plan_conversion, run_conversion
from megatron.pretrain.export.elements import BF16
from megatron.pretrain.export.hf_config import read_config
from megatron.pretrain.export.names import ARCHITECTURES
from megatron.pretrain.export.reader import TorchDistCheckpoint
from megatron.pretrain.export.to_megatron import ImportOptions, plan_import, run_import

SIZES = {"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 24, "vocab_size": 1000, "max_position_embeddings": 128,
         "tie_word_embeddings": False, "rms_norm_eps": 1e-4, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mha": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 4, "head_dim": 16}),
    "mqa": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 1, "vocab_size": 1010}),
    "tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
}


def make(folder: Path, tokenizer: Path, name: str = "llama", dtype: torch.dtype = torch.float32,
         max_shard_size: str = "200KB", **changed: object) -> Path:
    """A folder as transformers saves it, with random weights."""
    config, model, sizes = MODELS[name]
    torch.manual_seed(0)
    built = model(config(**{**SIZES, **sizes, **changed}))
    with torch.no_grad():
        for key, weight in built.named_parameters():
            if "norm" in key:
                weight.add_(0.1 * torch.randn_like(weight))
    built.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    shutil.copy(tokenizer, folder / "tokenizer.model")
    return folder


def to_megatron(source: Path, target: Path, *, verify: bool = True, **options: object) -> Path:
    return run_import(plan_import(source, ImportOptions(**options)), target, verify=verify)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_there_and_back_are_the_same_bits(name: str, dtype: torch.dtype, tiny_tokenizer, tmp_path):
    source = make(tmp_path / "hf", tiny_tokenizer, name, dtype)
    architecture, shape = read_config(source)
    folder = to_megatron(source, tmp_path / "megatron", for_megatron_lm=not architecture.trainable)
    assert find_checkpoint(str(tmp_path / "megatron")) == folder
    plan = plan_conversion(folder, Options(vocab_size=shape.vocab_size, architecture=architecture.name))
    run_conversion(plan, tmp_path / "back")
    before, after = weights(source), weights(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    again, same_shape = read_config(tmp_path / "back")
    assert (again, same_shape) == (architecture, shape)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(report.values()), report
    assert isinstance(model, MODELS[name][1])


def test_every_architecture_is_tried():
    assert {model.__name__ for _, model, _ in MODELS.values()} == set(ARCHITECTURES)


def test_padding_adds_little_to_any_loss(tiny_tokenizer, tmp_path):
    source = make(tmp_path / "hf", tiny_tokenizer, vocab_size=1030)
    checkpoint = TorchDistCheckpoint(to_megatron(source, tmp_path / "megatron"))
    padded, rows = checkpoint.read("output_layer.weight"), weights(source)["lm_head.weight"]
    assert padded.shape == (2048, 64)
    assert torch.equal(padded[:1030], rows)
    hidden = 3 * torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
    added = (hidden @ padded.T).logsumexp(1) - (hidden @ rows.T).logsumexp(1)
    assert 0 < added.max() <= torch.tensor(2048 / 1030).log() + 1e-5


def test_run_json_describes_the_model(tiny_tokenizer, tmp_path):
    rope = {"rope_type": "default", "rope_theta": 5e5}
    source = make(tmp_path / "hf", tiny_tokenizer, rope_parameters=rope)
    manifest = read_manifest(to_megatron(source, tmp_path / "megatron"))
    model = manifest.run_config.model
    assert (model.num_layers, model.kv_channels, model.num_query_groups) == (3, 24, 2)
    assert (model.rotary_base, model.norm_epsilon) == (5e5, 1e-4)
    assert model.untie_embeddings_and_output_weights and model.group_query_attention
    assert (manifest.tokenizer["vocab_size"], manifest.tokenizer["eod_id"]) == (1000, 2)


def test_the_type_may_be_another(tiny_tokenizer, tmp_path):
    source = make(tmp_path / "hf", tiny_tokenizer)
    checkpoint = TorchDistCheckpoint(to_megatron(source, tmp_path / "megatron", dtype=BF16))
    assert {checkpoint.dtype(name) for name in checkpoint.names()} == {BF16}
    norm = weights(source)["model.norm.weight"]
    assert torch.equal(checkpoint.read("decoder.final_layernorm.weight"), norm.bfloat16())


def test_the_tool_says_what_it_did_and_what_comes_next(tiny_tokenizer, tmp_path, run_tool):
    source = make(tmp_path / "hf", tiny_tokenizer, max_shard_size="1GB")
    command = "tools/convert_hf_to_megatron.py", "--hf-dir", source, "--save", tmp_path / "new"
    outcome = run_tool(*command, "--verify")
    assert outcome.returncode == 0, outcome.stderr
    assert f"start from it with --load {tmp_path / 'new'} --finetune" in outcome.stdout
    assert (tmp_path / "new/iter_0000001/run.json").is_file()
    outcome = run_tool(*command)
    assert (outcome.returncode, outcome.stderr) == (
        2, f"error: --save {tmp_path / 'new'} exists: remove it, or name another folder\n")


def test_layers_that_are_not_trained_here_are_only_for_megatron_lm(tiny_tokenizer, tmp_path):
    source = make(tmp_path / "hf", tiny_tokenizer, "qwen3")
    with pytest.raises(UserError, match="Qwen3ForCausalLM, whose layers this project does not train"):
        plan_import(source, ImportOptions())
    folder = to_megatron(source, tmp_path / "megatron", for_megatron_lm=True)
    with pytest.raises(UserError, match=r"run\.json is missing"):    # it would leave the norms out
        read_manifest(folder)
    with pytest.raises(UserError, match="the model has norms of query and key"):
        plan_conversion(folder, Options(architecture="LlamaForCausalLM"))


def test_a_disk_that_fills_up_leaves_nothing(tiny_tokenizer, tmp_path):
    plan = plan_import(make(tmp_path / "hf", tiny_tokenizer), ImportOptions())
    _, hard_bytes = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard_bytes))
    try:
        with pytest.raises(UserError, match="out could not be written: File too large"):
            run_import(plan, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_a_checkpoint_of_two_iterations_is_refused(tiny_tokenizer, tmp_path):
    source = make(tmp_path / "hf", tiny_tokenizer)
    folder = to_megatron(source, tmp_path / "one")
    moved = {name: tensor + 1 for name, tensor in weights(source).items()}
    shutil.rmtree(source)
    make(source, tiny_tokenizer, max_shard_size="1GB")
    save_file(moved, source / "model.safetensors", metadata={"format": "pt"})
    other = to_megatron(source, tmp_path / "other")
    shutil.copy(other / "__0_1.distcp", folder / "__0_1.distcp")
    with pytest.raises(UserError, match="two iterations are mixed here"):
        plan_conversion(folder, Options())


def configure(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def shard(folder: Path) -> Path:
    return next(folder.glob("model-00002-of-*"))


def without_a_tensor(folder: Path) -> None:
    """Take one out of a shard, which then no longer has what the index says."""
    path = shard(folder)
    content = load_file(path)
    content.pop(sorted(content)[0])
    save_file(content, path, metadata={"format": "pt"})


@pytest.mark.parametrize(("damage", "sentence"), [
    (lambda folder: shard(folder).unlink(), r"model-00002-of-.* is missing: .*index\.json says"),
    (lambda folder: os.truncate(shard(folder), 9000), r"is truncated or no \.safetensors file"),
    (lambda folder: shard(folder).write_bytes(b"{}"), r"is truncated or no \.safetensors file"),
    (without_a_tensor, "the files are not of one model"),
    (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), r"index\.json is damaged"),
    (lambda folder: (folder / "config.json").unlink(), r"config\.json is missing"),
    (lambda folder: (folder / "config.json").write_text("{"), "is not valid JSON"),
    (lambda folder: (folder / "tokenizer.model").unlink(), "holds no tokenizer: give --tokenizer-model"),
    (lambda folder: configure(folder, architectures=["GPT2LMHeadModel"]),
     "describes a GPT2LMHeadModel; those that can be converted are LlamaForCausalLM, Mistral"),
    (lambda folder: configure(folder, attention_bias=True), "attention_bias is True, but only false"),
    (lambda folder: configure(folder, hidden_act="gelu"), "hidden_act is gelu"),
    (lambda folder: configure(folder, rope_parameters={"rope_type": "llama3", "rope_theta": 1e4}), "llama3"),
    (lambda folder: configure(folder, num_hidden_layers=2), r"has model\.layers\.2\..*no place"),
    (lambda folder: configure(folder, num_hidden_layers=4), r"has no model\.layers\.3\."),
    (lambda folder: configure(folder, intermediate_size=161), r"gate_proj\.weight has shape \[160, 64\]"),
    (lambda folder: configure(folder, hidden_size=None), "is no configuration of a LlamaForCausalLM"),
    (lambda folder: configure(folder, num_key_value_heads=3), "must be a multiple of"),
    (lambda folder: configure(folder, vocab_size=999), r"embed_tokens\.weight has shape|has 1,000 ids"),
])
def test_damage_is_named(damage, sentence: str, tiny_tokenizer, tmp_path):
    source = make(tmp_path / "hf", tiny_tokenizer)
    damage(source)
    with pytest.raises(UserError, match=sentence):
        plan_import(source, ImportOptions())


def test_a_window_must_be_said_to_be_none(tiny_tokenizer, tmp_path):
    source = make(tmp_path / "hf", tiny_tokenizer, "mistral")
    config = json.loads((source / "config.json").read_text())
    for said in ({"sliding_window": 4096}, {}):
        config.pop("sliding_window", None)
        (source / "config.json").write_text(json.dumps({**config, **said}))
        with pytest.raises(UserError, match="sliding_window is"):
            plan_import(source, ImportOptions())


def test_pickles_are_refused(tiny_tokenizer, tmp_path):
    source = make(tmp_path / "hf", tiny_tokenizer)
    for path in source.glob("*.safetensors*"):
        path.unlink()
    (source / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(UserError, match=r"holds \.bin files, which are pickles and may run code"):
        plan_import(source, ImportOptions())
