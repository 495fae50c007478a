"""The converted model against the one that was trained, and what a conversion refuses."""

from __future__ import annotations

import json
import os
import resource
import runpy
import struct
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron.pretrain.errors import UserError
from megatron.pretrain.export.chunks import find_chunk
from megatron.pretrain.export.convert import Options, Plan, plan_conversion, run_conversion
from megatron.pretrain.export.elements import FP16, FP32

GREEDY = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def prompt(repository) -> torch.Tensor:
    return runpy.run_path(str(repository / "tests/export/save_models.py"))["PROMPT"]


def convert(source: Path, target: Path, **options: object) -> Plan:
    plan = plan_conversion(source, Options(**options))
    run_conversion(plan, target)
    return plan


def load(folder: Path) -> torch.nn.Module:
    """The model in float32; no tensor may be missing or left over."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("name", ["mha", "gqa", "mqa", "head_dim", "tied"])
@torch.no_grad()
def test_the_converted_model_computes_what_was_trained(name: str, trained_models, prompt, tmp_path):
    convert(trained_models / name / "iter_0000100", tmp_path / "hf")
    expected = torch.load(trained_models / name / "expected.pt")
    model = load(tmp_path / "hf")
    logits = model(prompt).logits[0]
    assert expected["logits"].std() > 0.5    # or the comparison would say little
    assert (logits - expected["logits"]).abs().max() < 1e-4
    assert torch.equal(model.generate(prompt, **GREEDY)[0, prompt.shape[1]:], expected["greedy"])
    assert len(set(expected["greedy"].tolist())) > 10
    assert ("lm_head.weight" in weights(tmp_path / "hf")) == (name != "tied")


def test_layout_leaves_no_trace(trained_models, trained_tp2_pp2, tmp_path):
    convert(trained_models / "head_dim/iter_0000100", tmp_path / "one")
    convert(trained_tp2_pp2, tmp_path / "four")
    one, four = weights(tmp_path / "one"), weights(tmp_path / "four")
    assert one.keys() == four.keys()
    assert all(torch.equal(one[name], four[name]) for name in one)


def test_the_saved_type_is_kept_unless_another_is_asked_for(trained_models, tmp_path):
    source = trained_models / "bf16/iter_0000100"
    convert(source, tmp_path / "kept")
    convert(source, tmp_path / "fp32", dtype=FP32)
    kept, fp32 = weights(tmp_path / "kept"), weights(tmp_path / "fp32")
    assert {tensor.dtype for tensor in kept.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in fp32.values()} == {torch.float32}
    assert all(torch.equal(kept[name].float(), fp32[name]) for name in kept)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "kept").dtype == torch.bfloat16


def test_the_padding_goes_and_every_trained_row_stays(written, tmp_path):
    assert plan_conversion(written, Options()).checkpoint.shape("output_layer.weight") == (1024, 64)
    convert(written, tmp_path / "trained")
    convert(written, tmp_path / "some_padding", vocab_size=1010)
    trained, wider = weights(tmp_path / "trained"), weights(tmp_path / "some_padding")
    assert trained["lm_head.weight"].shape == trained["model.embed_tokens.weight"].shape == (1000, 64)
    assert wider["lm_head.weight"].shape == (1010, 64)
    assert torch.equal(wider["lm_head.weight"][:1000], trained["lm_head.weight"])
    assert json.loads((tmp_path / "some_padding/config.json").read_text())["vocab_size"] == 1010
    for rows, sentence in ((999, "no trained row is dropped"), (1025, "has only 1024 rows")):
        with pytest.raises(UserError, match=sentence):
            plan_conversion(written, Options(vocab_size=rows))


def test_shards_are_of_the_size_asked_for_and_their_index_is_right(written, tmp_path):
    plan = convert(written, tmp_path / "hf", max_shard_bytes=300_000)
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    paths = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert [path.name for path in paths] == [f"model-0000{n}-of-0000{len(paths)}.safetensors"
                                             for n in range(1, len(paths) + 1)]
    for path in paths:
        assert path.stat().st_size < 300_000 + 4096
        with safe_open(path, "pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            assert list(shard.keys()) == sorted(
                name for name, file in index["weight_map"].items() if file == path.name)
    assert index["metadata"]["total_size"] == plan.size_bytes == sum(
        tensor.nbytes for tensor in weights(tmp_path / "hf").values())
    convert(written, tmp_path / "one_file")
    assert all(torch.equal(tensor, load_file(tmp_path / "one_file/model.safetensors")[name])
               for name, tensor in weights(tmp_path / "hf").items())


def test_the_folder_says_everything(trained_models, tmp_path):
    convert(trained_models / "head_dim/iter_0000100", tmp_path / "hf")
    read = {path.name: json.loads(path.read_text()) for path in (tmp_path / "hf").glob("*.json")}
    assert set(read) == {"config.json", "generation_config.json", "export.json", "tokenizer.json",
                         "tokenizer_config.json", "special_tokens_map.json"}
    config = read["config.json"]
    assert {key: config[key] for key in (
        "architectures", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "max_position_embeddings",
        "vocab_size", "tie_word_embeddings", "bos_token_id", "eos_token_id", "torch_dtype")} == {
            "architectures": ["LlamaForCausalLM"], "hidden_size": 128, "intermediate_size": 352,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 48,
            "rms_norm_eps": 1e-4, "rope_theta": 5000.0, "max_position_embeddings": 128, "vocab_size": 1000,
            "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32"}
    assert read["generation_config.json"] == {"bos_token_id": 1, "eos_token_id": 2}
    assert (read["export.json"]["iteration"], read["export.json"]["consumed_tokens"]) == (100, 102400)
    assert load(tmp_path / "hf").config.rope_parameters["rope_theta"] == 5000.0
    assert len(AutoTokenizer.from_pretrained(tmp_path / "hf")) == 1000


def test_the_forks_vocabulary_ends_documents_with_its_own_token(trained_models, tmp_path):
    convert(trained_models / "legacy/iter_0000100", tmp_path / "hf")
    assert json.loads((tmp_path / "hf/generation_config.json").read_text())["eos_token_id"] == [2, 1002]
    assert load(tmp_path / "hf").config.vocab_size == 1005


def test_an_existing_folder_is_left_alone(written, tmp_path):
    (tmp_path / "hf").mkdir()
    with pytest.raises(UserError, match="exists"):
        convert(written, tmp_path / "hf")
    assert not list((tmp_path / "hf").iterdir())


def test_a_conversion_that_fails_leaves_nothing(damaged, tmp_path):
    places = dcp.FileSystemReader(damaged).read_metadata().storage_data
    last, = (info for index, info in places.items() if index.fqn == "output_layer.weight")
    path = damaged / last.relative_path
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(UserError, match=r"output_layer\.weight at byte 0 cannot be read"):
        convert(damaged, tmp_path / "out/hf")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_leaves_nothing(written, tmp_path):
    plan = plan_conversion(written, Options())
    _, hard_bytes = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard_bytes))
    try:
        with pytest.raises(UserError, match="out/hf could not be written: File too large"):
            run_conversion(plan, tmp_path / "out/hf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "out").iterdir())


def test_a_place_that_takes_no_folder_is_named(written, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/hf could not be written: Not a directory"):
        convert(written, tmp_path / "file/hf")


def change_run(folder: Path, section: str, **values: object) -> None:
    content = json.loads((folder / "run.json").read_text())
    (content["config"][section] if section in content["config"] else content[section]).update(values)
    (folder / "run.json").write_text(json.dumps(content))


@pytest.mark.parametrize(("values", "sentence"), [
    ({"num_layers": 3}, r"has no decoder\.layers\.2\.input_layernorm\.weight"),
    ({"num_layers": 1}, r"has decoder\.layers\.1\..*no place"),
    ({"ffn_hidden_size": 161}, r"layers\.0\.mlp\.linear_fc1\.weight has shape \[320, 64\].*\[322, 64\]"),
    ({"num_query_groups": 4}, r"linear_qkv\.weight has shape"),
    ({"untie_embeddings_and_output_weights": False}, r"has output_layer\.weight.*no place"),
])
def test_a_checkpoint_that_run_json_does_not_describe_is_refused(values, sentence: str, damaged, tmp_path):
    change_run(damaged, "model", **values)
    with pytest.raises(UserError, match=sentence):
        plan_conversion(damaged, Options())


def test_a_checkpoint_without_run_json_is_refused(damaged):
    (damaged / "run.json").unlink()
    with pytest.raises(UserError, match=r"run\.json is missing"):
        plan_conversion(damaged, Options())


def elements_of(folder: Path, key: str) -> tuple[Path, int]:
    """The file and the byte at which the only chunk of a tensor begins."""
    places = dcp.FileSystemReader(folder).read_metadata().storage_data
    info, = (info for index, info in places.items() if index.fqn == key)
    _, record = find_chunk(folder / info.relative_path, info.offset, info.length)
    return record.path, record.offset_bytes


def test_fp16_is_refused_where_a_weight_is_beyond_it(damaged, tmp_path):
    path, at = elements_of(damaged, "embedding.word_embeddings.weight")
    with path.open("r+b") as file:
        file.seek(at + 64)
        file.write(struct.pack("<f", -7e4))
    plan = plan_conversion(damaged, Options(dtype=FP16))
    with pytest.raises(UserError, match=r"embed_tokens\.weight holds 70000, .*fp16 ends at 65504: take bf16"):
        run_conversion(plan, tmp_path / "out/hf")
    assert not list((tmp_path / "out").iterdir())


def test_a_folder_of_another_iteration_is_refused(damaged):
    renamed = damaged.with_name("iter_0000200")
    damaged.rename(renamed)
    with pytest.raises(UserError, match="iter_0000200 says of itself that it is iteration 100"):
        plan_conversion(renamed, Options())
