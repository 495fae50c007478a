"""Megatron-LM's former checkpoints, made here by cutting a known model apart, against that model."""

from __future__ import annotations

import argparse
import enum
import json
import os
import shutil
import signal
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron.pretrain.errors import UserError
from megatron.pretrain.export.checkpoints import open_checkpoint
from megatron.pretrain.export.convert import Options, plan_conversion, run_conversion

LAYERS, HIDDEN, FFN, HEADS, GROUPS, HEAD_DIM, ROWS = 4, 64, 160, 4, 2, 24, 1024
LAYER = {
    "input_layernorm.weight": (HIDDEN,),
    "self_attention.linear_qkv.weight": ((HEADS + 2 * GROUPS) * HEAD_DIM, HIDDEN),
    "self_attention.linear_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
    "pre_mlp_layernorm.weight": (HIDDEN,),
    "mlp.linear_fc1.weight": (2 * FFN, HIDDEN),
    "mlp.linear_fc2.weight": (HIDDEN, FFN),
}
FORMER_NAMES = {
    "input_layernorm": "input_norm", "pre_mlp_layernorm": "post_attention_norm",
    "self_attention.linear_qkv": "self_attention.query_key_value",
    "self_attention.linear_proj": "self_attention.dense",
    "mlp.linear_fc1": "mlp.dense_h_to_4h", "mlp.linear_fc2": "mlp.dense_4h_to_h"}


class ModelType(enum.Enum):
    """Pickled as a class of Megatron-LM's, which is not installed here."""

    ENCODER_OR_DECODER = 1


@pytest.fixture(autouse=True)
def fork(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("megatron.fork")
    module.ModelType = ModelType
    monkeypatch.setattr(ModelType, "__module__", "megatron.fork")
    monkeypatch.setitem(sys.modules, "megatron.fork", module)


def model(seed: int = 0, tied: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embedding.word_embeddings.weight": (ROWS, HIDDEN), "decoder.final_layernorm.weight": (HIDDEN,)}
    shapes |= {f"decoder.layers.{layer}.{name}": shape
               for layer in range(LAYERS) for name, shape in LAYER.items()}
    if not tied:
        shapes["output_layer.weight"] = (ROWS, HIDDEN)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def cut(name: str, tensor: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """What one tensor-parallel rank holds: rows or columns counted out one by one."""
    rows = list(range(tensor.shape[0]))
    if name.endswith("linear_qkv.weight"):    # every group: its query heads, its key, its value
        a_group = (HEADS // GROUPS + 2) * HEAD_DIM
        rows = [row for row in rows if (row // a_group) * ranks // GROUPS == rank]
    elif name.endswith("linear_fc1.weight"):    # a part of the gate, then the same part of the up projection
        rows = [row for row in rows if (row % FFN) * ranks // FFN == rank]
    elif name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        rows = [row for row in rows if row * ranks // ROWS == rank]
    elif name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        columns = [column for column in range(tensor.shape[1]) if column * ranks // tensor.shape[1] == rank]
        return tensor[:, columns].clone()
    return tensor[rows].clone()


def stages(pipeline: int, chunks: int) -> Iterator[tuple[int, int, list[int]]]:
    """Stage, chunk and the layers it holds, counted as the interleaved schedule runs them."""
    a_chunk = LAYERS // (pipeline * chunks)
    for layer in range(0, LAYERS, a_chunk):
        turn = layer // a_chunk
        yield turn % pipeline, turn // pipeline, list(range(layer, layer + a_chunk))


def former(content: Mapping[str, torch.Tensor]) -> dict[str, object]:
    """The nested dict of Megatron-LM's GPT model of 2023."""
    encoder: dict[str, object] = OrderedDict()
    nested: dict[str, object] = {"encoder": encoder}
    for name, tensor in content.items():
        if name.startswith("decoder."):
            inner = name.removeprefix("decoder.").replace("final_layernorm", "final_norm")
            for today, then in FORMER_NAMES.items():
                inner = inner.replace(today, then)
            encoder[inner] = tensor
        elif name == "output_layer.weight":
            nested["output_layer"] = {"weight": tensor}
        else:
            nested["embedding"] = {"word_embeddings": {"weight": tensor}}
    return {"language_model": nested}


def arguments(tensor: int, pipeline: int, tokenizer: Path, **changed: object) -> argparse.Namespace:
    return argparse.Namespace(**{
        "num_layers": LAYERS, "hidden_size": HIDDEN, "ffn_hidden_size": FFN, "num_attention_heads": HEADS,
        "group_query_attention": True, "num_query_groups": GROUPS, "kv_channels": HEAD_DIM,
        "max_position_embeddings": 128, "seq_length": 128, "norm_epsilon": 1e-5, "normalization": "RMSNorm",
        "swiglu": True, "add_bias_linear": False, "position_embedding_type": "rope", "rotary_percent": 1.0,
        "untie_embeddings_and_output_weights": True, "padded_vocab_size": ROWS,
        "tokenizer_type": "Llama2Tokenizer", "tokenizer_model": str(tokenizer), "consumed_train_samples": 800,
        "tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline,
        "params_dtype": torch.float32, "model_type": ModelType.ENCODER_OR_DECODER,
        "exit_signal": signal.SIGTERM, **changed})


def save(folder: Path, whole: Mapping[str, torch.Tensor], args: argparse.Namespace, *, chunks: int = 1,
         names_of_2023: bool = False, iteration: int = 100) -> Path:
    """Cut the model apart as tensor- and pipeline-parallel ranks hold it, each with a file of its own."""
    tensor, pipeline = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    for rank in range(tensor):
        files: dict[int, dict[str, object]] = {stage: {} for stage in range(pipeline)}
        for stage, chunk, layers in stages(pipeline, chunks):
            part: dict[str, torch.Tensor] = OrderedDict()
            if layers[0] == 0:
                part["embedding.word_embeddings.weight"] = whole["embedding.word_embeddings.weight"]
            for number, layer in enumerate(layers):    # each stage counts its layers from 0
                part |= {f"decoder.layers.{number}.{name}": whole[f"decoder.layers.{layer}.{name}"]
                         for name in LAYER}
            if layers[-1] == LAYERS - 1:
                part["decoder.final_layernorm.weight"] = whole["decoder.final_layernorm.weight"]
                part["output_layer.weight"] = whole.get(
                    "output_layer.weight", whole["embedding.word_embeddings.weight"])
            part = {name: cut(name, value, rank, tensor) for name, value in part.items()}
            key = "model" if chunks == 1 else f"model{chunk}"
            files[stage][key] = former(part) if names_of_2023 else {
                **part, "decoder.final_layernorm._extra_state": None}
        for stage, content in files.items():
            place = folder / (f"mp_rank_{rank:02d}_{stage:03d}" if pipeline > 1 else f"mp_rank_{rank:02d}")
            place.mkdir(parents=True)
            torch.save({
                "args": args, "checkpoint_version": 3.0, "iteration": iteration, **content,
                "optimizer": {"state": {0: {"exp_avg": torch.zeros(7), "step": 3}}},
                "rng_state": [{"np_rng_state": np.random.get_state(),
                               "torch_rng_state": torch.get_rng_state()}],
            }, place / "model_optim_rng.pt")
    return folder


@pytest.mark.parametrize("names_of_2023", [False, True], ids=["today", "2023"])
@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 1, 1), (2, 2, 1), (2, 2, 2), (1, 4, 1)])
def test_every_tensor_is_what_was_cut_apart(layout, names_of_2023: bool, tiny_tokenizer, tmp_path):
    tensor, pipeline, chunks = layout
    whole = model()
    save(tmp_path / "iter_0000100", whole, arguments(tensor, pipeline, tiny_tokenizer), chunks=chunks,
         names_of_2023=names_of_2023)
    checkpoint = open_checkpoint(tmp_path / "iter_0000100")
    checkpoint.check_files()
    assert sorted(checkpoint.names()) == sorted(whole)
    for name, expected in whole.items():
        assert checkpoint.shape(name) == expected.shape
        assert torch.equal(checkpoint.read(name), expected), name
    checkpoint.check()


def test_the_converted_folder_is_that_of_the_whole_model(tiny_tokenizer, tmp_path):
    save(tmp_path / "cut", model(), arguments(2, 2, tiny_tokenizer))
    plan = plan_conversion(tmp_path / "cut", Options())
    run_conversion(plan, tmp_path / "hf")
    found, whole = load_file(tmp_path / "hf/model.safetensors"), model()
    assert torch.equal(found["model.embed_tokens.weight"], whole["embedding.word_embeddings.weight"][:1000])
    first = whole["decoder.layers.3.self_attention.linear_qkv.weight"]
    assert torch.equal(found["model.layers.3.self_attn.k_proj.weight"],
                       torch.cat([first[48:72], first[96 + 48:96 + 72]]))
    assert torch.equal(found["model.layers.2.mlp.up_proj.weight"],
                       whole["decoder.layers.2.mlp.linear_fc1.weight"][FFN:])
    assert torch.equal(found["lm_head.weight"], whole["output_layer.weight"][:1000])
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config["head_dim"], config["num_key_value_heads"]) == (HEAD_DIM, GROUPS)
    assert (plan.manifest.iteration, plan.manifest.consumed_tokens) == (100, 800 * 128)


def test_a_tied_models_copy_of_the_embedding_is_left_out(tiny_tokenizer, tmp_path):
    args = arguments(2, 2, tiny_tokenizer, untie_embeddings_and_output_weights=False)
    save(tmp_path / "cut", model(tied=True), args)
    run_conversion(plan_conversion(tmp_path / "cut", Options()), tmp_path / "hf")
    assert "lm_head.weight" not in load_file(tmp_path / "hf/model.safetensors")
    assert json.loads((tmp_path / "hf/config.json").read_text())["tie_word_embeddings"] is True


def test_the_forks_tokenizer_appends_its_tokens(tiny_tokenizer, tmp_path):
    args = arguments(1, 1, tiny_tokenizer, tokenizer_type="SentencePieceTokenizer")
    save(tmp_path / "cut", model(), args)
    assert plan_conversion(tmp_path / "cut", Options()).shape.vocab_size == 1005
    args.legacy_tokenizer = False    # Megatron-LM of today
    save(tmp_path / "today", model(), args)
    assert plan_conversion(tmp_path / "today", Options()).shape.vocab_size == 1000


class Hostile:
    """Unpickled, it makes a folder: what stands for anything worse."""

    def __init__(self, evidence: Path) -> None:
        self.evidence = evidence

    def __reduce__(self):
        return os.mkdir, (str(self.evidence),)


def rewrite(path: Path, **changed: object) -> None:
    content = torch.load(path, weights_only=False)
    torch.save({**content, **changed}, path)


FIRST, LAST = "mp_rank_00_000/model_optim_rng.pt", "mp_rank_01_001/model_optim_rng.pt"


@pytest.mark.parametrize(("damage", "sentence"), [
    (lambda folder: shutil.rmtree(folder / "mp_rank_01_001"),
     r"mp_rank_01_001 is missing, but the args say tensor-parallel 2 x pipeline-parallel 2"),
    (lambda folder: (folder / LAST).unlink(), r"mp_rank_01_001/model_optim_rng\.pt is missing"),
    (lambda folder: os.truncate(folder / LAST, 5000), r"mp_rank_01_001/model_optim_rng\.pt is truncated"),
    (lambda folder: rewrite(folder / LAST, iteration=200),
     "mixes two iterations: mp_rank_00_000 is of 100, mp_rank_01_001 of 200"),
    (lambda folder: rewrite(folder / LAST, model={"decoder.layers.1.mlp.linear_fc2.weight": torch.zeros(3)}),
     r"mp_rank_01_001/model_optim_rng\.pt has no decoder"),
    (lambda folder: rewrite(folder / FIRST, checkpoint_version=1.0), "checkpoint_version 1.0"),
    (lambda folder: rewrite(folder / FIRST, args=None), "has no args that say how"),
    (lambda folder: (folder / "mp_rank_00_000_001").mkdir(), "expert-parallel"),
    (lambda folder: (folder / FIRST).write_bytes(b"anything"), "is truncated, or was not written"),
])
def test_damage_is_named(damage, sentence: str, tiny_tokenizer, tmp_path):
    save(tmp_path / "cut", model(), arguments(2, 2, tiny_tokenizer))
    damage(tmp_path / "cut")
    with pytest.raises(UserError, match=sentence):
        plan_conversion(tmp_path / "cut", Options())


def test_an_unknown_layer_is_named(tiny_tokenizer, tmp_path):
    whole = model() | {"decoder.layers.1.mlp.gate.weight": torch.zeros(3)}
    save(tmp_path / "cut", model(), arguments(1, 1, tiny_tokenizer))
    rewrite(tmp_path / "cut/mp_rank_00/model_optim_rng.pt", model=whole)
    with pytest.raises(UserError, match=r"has decoder\.layers\.1\.mlp\.gate\.weight, for which a Llama"):
        plan_conversion(tmp_path / "cut", Options())


def test_a_pickle_that_would_run_code_is_refused(tiny_tokenizer, tmp_path):
    save(tmp_path / "cut", model(), arguments(1, 1, tiny_tokenizer))
    path = tmp_path / "cut/mp_rank_00/model_optim_rng.pt"
    rewrite(path, opt_param_scheduler=Hostile(tmp_path / "ran"))
    with pytest.raises(UserError, match=r"model_optim_rng\.pt is refused: it names posix\.mkdir"):
        plan_conversion(tmp_path / "cut", Options())
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("changed", "sentence"), [
    ({"normalization": "LayerNorm"}, "trained with normalization = LayerNorm"),
    ({"add_qkv_bias": True}, "trained with add_qkv_bias = True"),
    ({"position_embedding_type": "learned_absolute"}, "position_embedding_type = learned_absolute"),
    ({"num_experts": 8}, "num_experts = 8"),
    ({"use_rope_scaling": True}, "use_rope_scaling = True"),
    ({"num_layers": 5}, r"has no decoder\.layers\.4"),
    ({"padded_vocab_size": 999}, "has 1,000 ids, the model has 999 rows"),
    ({"hidden_size": None}, "args do not describe a GPT model"),
    ({"tokenizer_model": "/nowhere/tokenizer.model"}, "is not given, and /nowhere/tokenizer.model"),
])
def test_a_model_that_has_no_table_is_refused(changed, sentence: str, tiny_tokenizer, tmp_path):
    save(tmp_path / "cut", model(), arguments(1, 1, tiny_tokenizer, **changed))
    with pytest.raises(UserError, match=sentence):
        plan_conversion(tmp_path / "cut", Options())
