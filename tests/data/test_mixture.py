"""Mixtures: worked by hand, read off real .idx files, and every mistake answered by a sentence."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron.pretrain.data.blend import Blended, parse_blend
from megatron.pretrain.data.indexed import IndexedWriter
from megatron.pretrain.data.mixture import load_mixture
from megatron.pretrain.data.mixture_env import read_mixture_env, write_mixture_env
from megatron.pretrain.errors import UserError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory: paths of a mixture are relative to it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_datasets(**tokens: int) -> None:
    for prefix, count in tokens.items():
        with IndexedWriter(prefix, np.uint16) as writer:
            writer.add_document(np.zeros(count, np.uint16), [count])


def mixture_of(yaml_text: str, **kwargs):
    Path("mixture.yml").write_text(yaml_text, encoding="utf-8")
    return load_mixture("mixture.yml", **kwargs)


# --- worked by hand ----------------------------------------------------------------------------------


def test_one_source_once(here: Path):
    write_datasets(a=1_000_000)
    mixture = mixture_of("GLOBAL_BATCH_SIZE: 8\nSEQ_LEN: 1024\n1.0_ROUND:\n  - a.bin\n")
    assert mixture.mixture_string == "1000000 a"
    assert mixture.train_iters == 122      # 122 x 8192 = 999,424; 123 x 8192 = 1,007,616


def test_rounds_are_exact_where_floats_are_not(here: Path):
    assert int(100 * 0.29) == 28
    write_datasets(a=100)
    mixture = mixture_of("GLOBAL_BATCH_SIZE: 1\nSEQ_LEN: 29\n0.29_ROUND: [a.bin]\n")
    assert mixture.mixture_string == "29 a"
    assert mixture.train_iters == 1


def test_rounds_keep_the_order_of_the_file_and_paths_are_sorted_within_one(here: Path):
    write_datasets(a=40, b=30, c=20)
    mixture = mixture_of("GLOBAL_BATCH_SIZE: 2\nSEQ_LEN: 5\n2_ROUND: [c.bin, b.bin]\n0.5_ROUND: [a.bin]\n")
    assert mixture.mixture_string == "60 b 40 c 20 a"
    assert mixture.train_iters == 12       # 120 / 10


def test_a_path_twice_counts_twice(here: Path):
    write_datasets(a=10)
    mixture = mixture_of("GLOBAL_BATCH_SIZE: 1\nSEQ_LEN: 4\n1_ROUND: [a.bin, a.bin]\n1.5_ROUND: [./a.bin]\n")
    assert mixture.mixture_string == "10 a 10 a 15 ./a"
    assert mixture.total_tokens == 35
    assert mixture.train_iters == 8


def test_counts_of_files_that_are_elsewhere(here: Path):
    mixture = mixture_of("GLOBAL_BATCH_SIZE: 1024\nSEQ_LEN: 8192\n2.5_ROUND: [/far/x.bin]\n"
                         ".5_ROUND: [y.bin]\nTOKEN_COUNTS:\n  /far/x.bin: 1.5B\n  y.bin: 300_000_000\n")
    assert mixture.mixture_string == "3750000000 /far/x 150000000 y"
    assert mixture.train_iters == 464      # 464 x 8,388,608 = 3,892,314,112 of 3,900,000,000


def test_the_total_is_summed_before_it_is_cut(here: Path):
    write_datasets(a=3, b=3, c=4)
    mixture = mixture_of("GLOBAL_BATCH_SIZE: 1\nSEQ_LEN: 5\n0.5_ROUND: [a.bin, b.bin, c.bin]\n")
    assert mixture.mixture_string == "1 a 1 b 2 c"
    assert mixture.total_tokens == 5       # 1.5 + 1.5 + 2
    assert mixture.train_iters == 1


def test_epochs_count_every_entry_of_a_source_and_only_what_is_trained(here: Path):
    write_datasets(a=10, b=20)
    mixture = mixture_of("GLOBAL_BATCH_SIZE: 1\nSEQ_LEN: 16\n1_ROUND: [a.bin, b.bin]\n2_ROUND: [a.bin]\n")
    # 50 tokens suffice for 3 iterations of 16; a gives 30 of 50, b 20 of 50.
    assert mixture.epochs() == pytest.approx({"a": 3 * 48 / 50, "b": 48 / 50})


# --- where token counts come from --------------------------------------------------------------------


def test_typed_in_counts_win_and_the_difference_is_told(here: Path):
    write_datasets(a=10)
    yaml_text = "GLOBAL_BATCH_SIZE: 1\nSEQ_LEN: 1\n1_ROUND: [a.bin]\n"
    assert mixture_of(yaml_text, token_counts={"a.bin": "2K"}).total_tokens == 2000
    mixture = mixture_of(yaml_text + "TOKEN_COUNTS: {a.bin: 7, gone.bin: 8}\n", token_counts={"a.bin": "2K"})
    assert mixture.total_tokens == 7
    assert mixture.notes == (
        "mixture.yml, line 3: a.bin is taken to have 7 tokens as typed in, its .idx says 10",
        "mixture.yml, line 4: TOKEN_COUNTS names gone, which no _ROUND list does")


# --- the command -------------------------------------------------------------------------------------

GOOD = "GLOBAL_BATCH_SIZE: 2\nSEQ_LEN: 8\n1.0_ROUND:\n  - a.bin\n"


def run_parse_mixture(repository: Path, run_tool, yaml_bytes: bytes) -> subprocess.CompletedProcess[str]:
    Path("mixture.yml").write_bytes(yaml_bytes)
    return run_tool(repository / "neo/scripts/parse_mixture.py", "-c", "mixture.yml", cwd=Path.cwd(),
                    env={"PYTHONPATH": str(repository), "MIXTURE_ENV": ""})


def test_the_command_prints_as_the_original_and_writes_for_the_launchers(here, repository, run_tool):
    write_datasets(a=40)
    ran = run_parse_mixture(repository, run_tool, GOOD.encode())
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert lines[:4] == ["[INFO] Loaded cfg from mixture.yml", "[INFO] Mixture string: 40 a ",
                         "[INFO] Total token count: 0.000B", "[INFO] Remember to change TRAIN_ITERS to: 2"]
    row = next(line for line in lines if " a " in line and "│" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == ["a", "40", "1", "100.00%", "0.800"]
    assert read_mixture_env("mixture.env") == {
        "DATA_PATH": "40 a", "TRAIN_ITERS": "2", "GLOBAL_BATCH_SIZE": "2", "SEQ_LEN": "8",
        "MIXTURE_CONFIG": str(here / "mixture.yml"),
        "MIXTURE_HASH": hashlib.sha256(GOOD.encode()).hexdigest()}
    assert Path("mixture.blend").read_text() == "40 a\n"


def test_gen_mixture_str_takes_another_file_and_another_place(here, repository):
    write_datasets(a=40)
    Path("mine.yml").write_text(GOOD)
    Path("run").mkdir()
    ran = subprocess.run(["bash", repository / "neo/scripts/gen_mixture_str.sh", "-c", "mine.yml",
                          "--env-file", "run/m.env"], text=True, capture_output=True,
                         env={**os.environ, "PYTHON": sys.executable})
    assert ran.returncode == 0, ran.stderr
    assert "[INFO] Loaded cfg from mine.yml" in ran.stdout
    assert sorted(path.name for path in Path("run").iterdir()) == ["m.blend", "m.env"]


HEAD = b"GLOBAL_BATCH_SIZE: 2\nSEQ_LEN: 8\n"
BAD = {
    "empty file": (b"", "mixture.yml: must be 'KEY: value' lines"),
    "bad YAML": (b"GLOBAL_BATCH_SIZE: 2\nSEQ_LEN: [8\n", "mixture.yml, line 3: not valid YAML"),
    "not UTF-8": (b"SEQ_LEN: \xff\n", "mixture.yml: not valid YAML"),
    "no rounds": (HEAD, "mixture.yml: no rounds; list .bin paths"),
    "empty list": (HEAD + b"1_ROUND:\n",
                   "mixture.yml, line 3: 1_ROUND must be a list of one .bin path or more"),
    "empty path": (HEAD + b"1_ROUND:\n  -\n",
                   "mixture.yml, line 4: a path of 1_ROUND must be one plain value"),
    "batch missing": (b"SEQ_LEN: 8\n1_ROUND: [a.bin]\n", "mixture.yml: GLOBAL_BATCH_SIZE is missing"),
    "length missing": (b"GLOBAL_BATCH_SIZE: 2\n1_ROUND: [a.bin]\n", "mixture.yml: SEQ_LEN is missing"),
    "length not whole": (b"GLOBAL_BATCH_SIZE: 2\nSEQ_LEN: 8.5\n1_ROUND: [a.bin]\n",
                         "mixture.yml, line 2: SEQ_LEN is '8.5', it must be a whole number above 0"),
    "batch zero": (b"GLOBAL_BATCH_SIZE: 0\nSEQ_LEN: 8\n1_ROUND: [a.bin]\n",
                   "mixture.yml, line 1: GLOBAL_BATCH_SIZE is '0'"),
    "negative round": (HEAD + b"-1_ROUND: [a.bin]\n",
                       "mixture.yml, line 3: -1_ROUND: rounds must be above 0"),
    "round of no number": (HEAD + b"two_ROUND: [a.bin]\n",
                           "mixture.yml, line 3: two_ROUND: 'two' is not a number of rounds"),
    "infinite round": (HEAD + b"inf_ROUND: [a.bin]\n",
                       "mixture.yml, line 3: inf_ROUND: 'inf' is not a number"),
    "unknown key": (b"GLOBAL_BATCH_SIZE: 2\nSEQ_LENGTH: 8\n1_ROUND: [a.bin]\n",
                    "mixture.yml, line 2: unknown key SEQ_LENGTH; the nearest known one is SEQ_LEN"),
    "misspelt round": (HEAD + b"1.0_round: [a.bin]\n",
                       "mixture.yml, line 3: unknown key 1.0_round; the nearest known one is 1.0_ROUND"),
    "key twice": (HEAD + b"1_ROUND: [a.bin]\n1_ROUND: [b.bin]\n",
                  "mixture.yml, line 4: 1_ROUND stands twice, first at mixture.yml, line 3"),
    "unknown path": (HEAD + b"1_ROUND:\n  - a.bin\n  - typo.bin\n",
                     "mixture.yml, line 5: typo.idx does not exist"),
    "path without .bin": (HEAD + b"1_ROUND: [a]\n",
                          "mixture.yml, line 3: 'a' must be a path that ends in .bin"),
    "path with a space": (HEAD + b"1_ROUND: [my a.bin]\n",
                          "mixture.yml, line 3: 'my a.bin' has a space in it"),
    "too few tokens": (b"GLOBAL_BATCH_SIZE: 6\nSEQ_LEN: 8\n1_ROUND: [a.bin]\n",
                       "mixture.yml: 40 tokens are less than one iteration of GLOBAL_BATCH_SIZE 6 x SEQ_LEN "
                       "8 = 48; lower GLOBAL_BATCH_SIZE to 5 or less, or add data"),
    "less than a token": (HEAD + b"0.01_ROUND: [a.bin]\n",
                          "0.01 rounds of 40 tokens are less than one token"),
    "count of no number": (HEAD + b"1_ROUND: [x.bin]\nTOKEN_COUNTS:\n  x.bin: many\n",
                           "mixture.yml, line 5: 'many' is not a number of tokens"),
    "count of half a token": (HEAD + b"1_ROUND: [x.bin]\nTOKEN_COUNTS: {x.bin: 1.5}\n",
                              "mixture.yml, line 4: '1.5' is not a number of tokens"),
    "truncated index": (HEAD + b"1_ROUND: [cut.bin]\n", "cut.idx"),
}


@pytest.mark.parametrize("yaml_bytes, sentence", BAD.values(), ids=BAD.keys())
def test_a_mistake_gets_a_sentence_and_nothing_is_written(here, repository, run_tool, yaml_bytes, sentence):
    write_datasets(a=40)
    Path("cut.idx").write_bytes(Path("a.idx").read_bytes()[:40])
    ran = run_parse_mixture(repository, run_tool, yaml_bytes)
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: ") and ran.stderr.count("\n") == 1
    assert sentence in ran.stderr
    assert not list(here.glob("mixture.env*")) and not list(here.glob("mixture.blend*"))


def test_a_missing_file_gets_a_sentence(here, repository, run_tool):
    ran = run_tool(repository / "neo/scripts/parse_mixture.py", "-c", "gone.yml", cwd=here)
    assert (ran.returncode, ran.stderr) == (2, "error: gone.yml: No such file or directory; "
                                               "it must be a mixture's YAML file\n")


def test_a_place_that_cannot_be_written_to_leaves_nothing(here: Path):
    write_datasets(a=40)
    mixture = mixture_of(GOOD)
    with pytest.raises(UserError, match="gone/m.blend.*nothing was written"):
        write_mixture_env(mixture, "gone/m.env")
    with pytest.raises(UserError, match="m.blend: this is the blend file's name"):
        write_mixture_env(mixture, "m.blend")
    with pytest.raises(UserError, match="this is a folder"):
        write_mixture_env(mixture, here)
    assert sorted(path.name for path in here.iterdir()) == ["a.bin", "a.idx", "mixture.yml"]


# --- mixture.env -------------------------------------------------------------------------------------


@pytest.fixture
def written(here: Path) -> Path:
    write_datasets(a=40)
    write_mixture_env(mixture_of(GOOD), "mixture.env")
    return here / "mixture.env"


def test_a_changed_yaml_makes_it_stale(written: Path):
    Path("mixture.yml").write_text(GOOD + "# another thought\n")
    with pytest.raises(UserError, match="mixture.env: stale: .*mixture.yml has changed since"):
        read_mixture_env(written)
    Path("mixture.yml").unlink()
    with pytest.raises(UserError, match="mixture.env: stale: .*mixture.yml cannot be read"):
        read_mixture_env(written)


@pytest.mark.parametrize("old, new, sentence", [
    ("SEQ_LEN=8", "SEQ_LEN=eight", "line 5: SEQ_LEN=eight: must be a whole number above 0"),
    ("SEQ_LEN=8", "SEQ_LEN=$(date)", "line 5: SEQ_LEN="),
    ("SEQ_LEN=8", "SEQ_LEN=8\nPATH=/tmp", "line 6: 'PATH=/tmp' is not one of the lines"),
    ("SEQ_LEN=8", "SEQ_LEN=8\nSEQ_LEN=9", "line 6: 'SEQ_LEN=9' is not one of the lines .* each once"),
    ("SEQ_LEN=8\n", "", "SEQ_LEN missing"),
])
def test_other_lines_than_ours_are_refused(written: Path, old: str, new: str, sentence: str):
    written.write_text(written.read_text().replace(old, new))
    with pytest.raises(UserError, match=f"mixture.env.*{sentence}".replace("$(", r"\$\(")):
        read_mixture_env(written)


# --- --data-path -------------------------------------------------------------------------------------


def test_blends_in_every_form():
    assert parse_blend(["a"]) == [Blended("a", None)]
    assert parse_blend(["a", "b"]) == [Blended("a", None), Blended("b", None)]
    assert parse_blend(["3", "a", "0.5", "b"]) == [Blended("a", 3.0), Blended("b", 0.5)]
    assert parse_blend(["3 a 0.5 b"]) == parse_blend(["3", "a", "0.5", "b"])


@pytest.mark.parametrize("words, sentence", [
    ([], "--data-path: empty"),
    (["1", "a", "2"], "3 words are not pairs of weight and prefix"),
    (["1", "a", "b", "c"], "'b' stands where a weight above 0 was expected"),
    (["-1", "a"], "'-1' stands where a weight above 0"),
    (["nan", "a"], "'nan' stands where a weight above 0"),
    (["a", "2", "b"], "'2' is a weight, but 'a' has none"),
])
def test_blends_that_make_no_sense(words: list[str], sentence: str):
    with pytest.raises(UserError, match=sentence):
        parse_blend(words)


def test_base64_counts_only_if_it_alone_names_a_dataset(here: Path):
    encoded = base64.b64encode(b"3 a 1 b ").decode()
    assert parse_blend([encoded]) == [Blended(encoded, None)]
    write_datasets(a=10)
    assert parse_blend([encoded]) == [Blended("a", 3.0), Blended("b", 1.0)]
    wrapped = [encoded[:5], encoded[5:]]
    assert parse_blend(wrapped) == parse_blend([encoded])
    # "aaaa" is base64 too; where a dataset has that name, the name counts.
    write_datasets(aaaa=10)
    assert parse_blend(["aaaa"]) == [Blended("aaaa", None)]
