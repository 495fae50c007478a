"""What vLLM's Llama loader takes from a folder, held without vLLM; neo/README.md lists it, a line a test."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from megatron.pretrain.export.convert import Options, plan_conversion, run_conversion

PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
TAKEN_AS_THEY_ARE = ("o_proj", "down_proj", "input_layernorm", "post_attention_layernorm")


@pytest.fixture(scope="module")
def folder(written, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vllm") / "hf"
    run_conversion(plan_conversion(written, Options(max_shard_bytes=200_000)), folder)
    return folder


@pytest.fixture(scope="module")
def shapes(folder) -> dict[str, list[int]]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as shard:
            found |= {name: shard.get_slice(name).get_shape() for name in shard.keys()}
    return found


def test_the_readme_lists_what_is_held_here(repository):
    listed = re.findall(r"\(`(test_\w+)`\)", (repository / "neo/README.md").read_text(encoding="utf-8"))
    held = [name for name in globals() if name.startswith("test_")]
    assert listed == held[1:]


def test_the_keys_of_the_shape(folder):
    config = AutoConfig.from_pretrained(folder)
    assert config.architectures == ["LlamaForCausalLM"] and config.model_type == "llama"
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (64, 160, 2)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 16)
    assert (config.vocab_size, config.max_position_embeddings, config.hidden_act) == (1000, 128, "silu")
    assert config.rms_norm_eps == 1e-5 and config.tie_word_embeddings is False
    assert config.attention_bias is False and config.mlp_bias is False
    assert config.rope_parameters["rope_theta"] == 10000.0
    assert config.rope_parameters["rope_type"] == "default"
    # Older releases look for the base at the top, and for no scaling.
    raw = json.loads((folder / "config.json").read_text())
    assert raw["rope_theta"] == 10000.0 and raw.get("rope_scaling") is None
    assert raw["torch_dtype"] == raw["dtype"] == "float32"


def test_each_weight_has_a_place_and_the_size_that_its_place_wants(folder, shapes):
    config = AutoConfig.from_pretrained(folder)
    rows = {"q_proj": config.num_attention_heads * config.head_dim,
            "k_proj": config.num_key_value_heads * config.head_dim,
            "v_proj": config.num_key_value_heads * config.head_dim,
            "gate_proj": config.intermediate_size, "up_proj": config.intermediate_size,
            "o_proj": config.hidden_size, "down_proj": config.hidden_size}
    placed = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for layer in range(config.num_hidden_layers):
        for kind in (*PACKED["qkv_proj"], *PACKED["gate_up_proj"], *TAKEN_AS_THEY_ARE):
            room = "self_attn." if kind in (*PACKED["qkv_proj"], "o_proj") else "mlp." if kind in rows else ""
            name = f"model.layers.{layer}.{room}{kind}.weight"
            placed.add(name)
            assert shapes[name][0] == rows.get(kind, config.hidden_size)
    assert shapes.keys() == placed
    assert shapes["lm_head.weight"] == shapes["model.embed_tokens.weight"] == [1000, 64]


def test_the_index_names_every_file_and_nothing_else_is_taken_for_weights(folder, shapes):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == shapes.keys()
    assert set(index["weight_map"].values()) == {path.name for path in folder.glob("*.safetensors")}
    assert not [path for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)]


def test_the_tokenizer_and_where_generation_ends(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.is_fast and len(tokenizer) <= AutoConfig.from_pretrained(folder).vocab_size
    assert tokenizer.eos_token_id == GenerationConfig.from_pretrained(folder).eos_token_id == 2
    assert tokenizer.model_max_length == 128
