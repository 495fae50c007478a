"""pretrain_gpt.py told something wrong: one sentence, exit code 2, and nothing written."""

from __future__ import annotations

import json
import pydoc_data.topics
import shutil
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from megatron.pretrain.checkpoint.manifest import TRACKER_NAME

ITERATIONS = 3
RUN = (f"--train-iters {ITERATIONS} --num-layers 2 --hidden-size 32 --ffn-hidden-size 48 "
       "--num-attention-heads 2 --seq-length 32 --micro-batch-size 2 --global-batch-size 4 --lr 1e-3 "
       "--log-interval 1").split()


@pytest.fixture(scope="session")
def other_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that the dataset was not made with."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("other")
    (folder / "text").write_text("\n".join(pydoc_data.topics.topics.values())[:100_000], encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(input=str(folder / "text"), model_prefix=str(folder / "other"),
                                             vocab_size=400, model_type="bpe", minloglevel=2)
    return folder / "other.model"


@pytest.fixture(scope="session")
def pretrain(run_tool, tiny_dataset: Path, tiny_tokenizer: Path):
    """`pretrain(folder, *flags)` runs pretrain_gpt.py as one process; later flags win over its own."""

    def run(folder: Path, *flags: str | Path) -> CompletedProcess[str]:
        return run_tool("pretrain_gpt.py", *RUN, "--data-path", tiny_dataset, "--tokenizer-model",
                        tiny_tokenizer, "--save", folder / "checkpoint", *flags,
                        env={"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"})

    return run


@pytest.fixture
def refused(pretrain, tmp_path: Path):
    """`refused(*flags)` is the sentence of a run that was refused and left nothing behind."""

    def run(*flags: str | Path) -> str:
        folder = tmp_path / "run"
        said = pretrain(folder, *flags)
        assert said.returncode == 2, said.stdout + said.stderr
        assert said.stderr.startswith("error: ") and said.stderr.count("\n") == 1, said.stderr
        assert not folder.exists(), "a refused run wrote something"
        return said.stderr.removeprefix("error: ").removesuffix("\n")

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, pretrain) -> Path:
    """A folder of checkpoints that a run of three iterations left."""
    folder = tmp_path_factory.mktemp("trained")
    said = pretrain(folder)
    assert said.returncode == 0, said.stderr
    return folder / "checkpoint"


@pytest.fixture
def broken(trained: Path, tmp_path: Path) -> Path:
    """A copy of those checkpoints, to be broken."""
    return shutil.copytree(trained, tmp_path / "broken")


# --- data and tokenizer ------------------------------------------------------------------------------


def test_dataset_that_does_not_exist(refused):
    assert refused("--data-path", "no/such_text_document") == (
        "no/such_text_document.idx: No such file or directory; a token set is PREFIX.bin and PREFIX.idx")


def test_dataset_cut_short(refused, tiny_dataset: Path, tmp_path: Path):
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(f"{tiny_dataset}{suffix}", tmp_path / f"short{suffix}")
    (tmp_path / "short.bin").write_bytes(Path(f"{tiny_dataset}.bin").read_bytes()[:1000])
    assert refused("--data-path", tmp_path / "short").startswith(f"{tmp_path}/short.bin: ")


def test_dataset_made_by_another_tokenizer(refused, tiny_dataset: Path, other_tokenizer: Path):
    said = refused("--tokenizer-model", other_tokenizer)
    assert said.startswith(f"{tiny_dataset}.json: the data was made with a tokenizer whose fingerprint is ")
    assert said.endswith("preprocess the data again, or name the tokenizer it was made with")


def test_dataset_that_says_not_what_made_it_holds_ids_beyond_the_vocabulary(
        pretrain, tiny_dataset: Path, other_tokenizer: Path, tmp_path: Path):
    """Megatron-LM's own data has no manifest beside it: only its tokens can tell."""
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{tiny_dataset}{suffix}", tmp_path / f"bare{suffix}")
    said = pretrain(tmp_path / "run", "--data-path", tmp_path / "bare", "--tokenizer-model", other_tokenizer)
    assert said.returncode == 2
    last = said.stderr.splitlines()[-1]
    assert last.startswith(f"error: {tmp_path}/bare: holds token ")
    assert "Traceback" not in said.stderr
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_no_data_at_all(refused, run_tool, tiny_tokenizer: Path):
    said = run_tool("pretrain_gpt.py", *RUN, "--tokenizer-model", tiny_tokenizer)
    assert (said.returncode, said.stderr) == (
        2, "error: give either --data-path or --data-args-path: the datasets to train on\n")


def test_tokenizer_that_does_not_exist(refused):
    assert refused("--tokenizer-model", "no.model") == (
        "--tokenizer-model no.model: No such file or directory; it must name a tokenizer's file")


def test_more_iterations_than_a_mixture_of_tokens_holds(refused, tiny_dataset: Path):
    said = refused("--data-weights", "tokens", "--data-path", 100, tiny_dataset)
    assert said.startswith("--train-iters: asks for 12 samples of 32 tokens, and the weights of --data-path "
                           "allow 4 ")


def test_evaluation_without_a_validation_split(refused, tiny_dataset: Path):
    assert refused("--eval-iters", 1) == (
        f"{tiny_dataset}: 0 of its 79 documents are in this part of --split, with 0 tokens; a source needs "
        "at least 2")


def test_more_evaluation_than_a_mixture_of_tokens_holds(refused, tiny_dataset: Path):
    said = refused("--data-weights", "tokens", "--data-path", 2000, tiny_dataset, "--split", "90,10",
                   "--eval-iters", 100)
    assert said.startswith("--eval-iters: asks for 400 samples of 32 tokens, and ")


def test_folder_to_save_to_that_is_a_file(pretrain, tmp_path: Path):
    (tmp_path / "checkpoint").write_text("a file")
    said = pretrain(tmp_path)
    assert (said.returncode, said.stderr) == (
        2, f"error: --save {tmp_path}/checkpoint: {tmp_path}/checkpoint is not a folder that can be written "
        "to\n")


# --- checkpoints -------------------------------------------------------------------------------------


def test_load_folder_that_is_missing_or_empty(refused, tmp_path: Path):
    assert refused("--load", tmp_path / "no") == f"--load {tmp_path}/no: no such folder"
    (tmp_path / "empty").mkdir()
    assert refused("--load", tmp_path / "empty") == (
        f"--load {tmp_path}/empty: holds no checkpoint ({TRACKER_NAME} is missing)")


def test_checkpoint_file_cut_short(refused, broken: Path):
    file = next((broken / "iter_0000003").glob("*.distcp"))
    size_bytes = file.stat().st_size
    with open(file, "r+b") as opened:
        opened.truncate(size_bytes - 1)
    assert refused("--load", broken) == (
        f"{file}: truncated or changed: {size_bytes - 1} bytes, where run.json says {size_bytes}")


def test_checkpoint_without_its_manifest(refused, broken: Path):
    (broken / "iter_0000003" / "run.json").unlink()
    assert refused("--load", broken) == (
        f"{broken}/iter_0000003: not a whole checkpoint of this project (run.json is missing)")


def test_checkpoint_of_another_shape(refused, trained: Path):
    assert refused("--load", trained, "--ffn-hidden-size", 64) == (
        f"{trained}/iter_0000003: a model of another shape: --ffn-hidden-size is 48 there and 64 here")
    assert "a model of another shape" in refused("--load", trained, "--num-layers", 4, "--finetune")


def test_checkpoint_of_another_tokenizer(refused, trained: Path, other_tokenizer: Path, tiny_dataset: Path,
                                         tmp_path: Path):
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{tiny_dataset}{suffix}", tmp_path / f"bare{suffix}")
    said = refused("--load", trained, "--finetune", "--data-path", tmp_path / "bare", "--tokenizer-model",
                   other_tokenizer)
    assert said.startswith(f"{trained}/iter_0000003: made with another tokenizer (fingerprint ")


def test_other_data_is_refused_until_it_is_overridden(pretrain, refused, trained: Path, tiny_dataset: Path,
                                                      tmp_path: Path):
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(f"{tiny_dataset}{suffix}", tmp_path / f"moved_and_renamed{suffix}")
    flags = ["--load", trained, "--data-path", tmp_path / "moved_and_renamed",
             "--train-iters", ITERATIONS + 1, "--override-opt_param-scheduler"]
    said = refused(*flags)
    assert said.startswith(f"{trained}/iter_0000003: was trained on another mixture or sample order (hash ")
    assert said.endswith("go on with --override-data, or start anew from its weights with --finetune")

    went_on = pretrain(tmp_path / "went_on", *flags, "--override-data")
    assert went_on.returncode == 0, went_on.stderr
    manifest = json.loads((tmp_path / "went_on/checkpoint/iter_0000004/run.json").read_text())
    assert manifest["consumed_samples"] == 16


def test_another_schedule_is_refused(refused, trained: Path):
    said = refused("--load", trained, "--train-iters", ITERATIONS + 1)
    assert said == (f"{trained}/iter_0000003: another schedule: --train-iters is 3 there and 4 here; "
                    "--override-opt_param-scheduler takes the flags'")


# --- many processes ----------------------------------------------------------------------------------


def test_processes_of_a_machine_say_it_once(train, tmp_path: Path):
    ran = train(tmp_path, "--train-iters", 3, "--data-path", "no/such", processes=2, expect_failure=True)
    assert ran.returncode == 1
    assert [line for line in ran.output.splitlines() if line.startswith("error:")] == [
        "error: no/such.idx: No such file or directory; a token set is PREFIX.bin and PREFIX.idx"]
    assert not list(tmp_path.iterdir())


def test_layout_that_does_not_fit_the_processes(train, tmp_path: Path):
    ran = train(tmp_path, "--train-iters", 3, "--tensor-model-parallel-size", 4, processes=2,
                expect_failure=True)
    assert ran.returncode == 1
    assert "error: 2 processes cannot be shared out: TP 4 x PP 1 x CP 1 = 4 must divide them" in ran.output
    assert not list(tmp_path.iterdir())
