"""The quickstart's own Python: its corpus, its yardstick, and what it asks of a converted model."""

from __future__ import annotations

import ast
import importlib
import json
import math
import os
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

PARTS = Path(__file__).resolve().parents[2] / "neo" / "quickstart"
QUICKSTART = Path(__file__).resolve().parents[2] / "neo" / "scripts" / "quickstart.sh"


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch):
    """`part("bigram")` imports a module of the quickstart, which is a folder of scripts and no package."""
    monkeypatch.syspath_prepend(str(PARTS))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


# --- corpus -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, run_tool) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    outcome = run_tool(PARTS / "corpus.py", "--output", folder, "--megabytes", "0.4")
    assert outcome.returncode == 0, outcome.stderr
    return folder


def documents(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def module_of(source: str) -> str:
    return source.removeprefix("docstrings of ").split("/")[0].removesuffix(".py")


def test_the_corpus_is_the_same_again(corpus: Path, tmp_path: Path, run_tool):
    assert run_tool(PARTS / "corpus.py", "--output", tmp_path, "--megabytes", "0.4").returncode == 0
    for name in ("stdlib_code.jsonl", "stdlib_docs.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (corpus / name).read_bytes()


def test_the_corpus_is_as_large_as_asked_and_true_to_its_sources(corpus: Path):
    code = documents(corpus / "stdlib_code.jsonl")
    assert 0.4e6 <= sum(len(document["text"].encode()) for document in code) < 1e6
    library = Path(sysconfig.get_path("stdlib"))
    for document in code[:5]:
        assert document["text"] == (library / document["source"]).read_text(encoding="utf-8")


def test_a_module_trains_or_is_held_out_never_both(corpus: Path):
    training = {module_of(one["source"]) for name in ("stdlib_code.jsonl", "stdlib_docs.jsonl")
                for one in documents(corpus / name) if not one["source"].startswith("topic ")}
    held_out = {module_of(one["source"]) for one in documents(corpus / "heldout.jsonl")}
    assert held_out and training and not held_out & training
    assert not any(one["source"].startswith("topic ") for one in documents(corpus / "heldout.jsonl"))


def test_docstrings_stand_below_what_they_describe(part):
    source = ('class A:\n    """A thing."""\n    def f(self, x: int = 1):\n        """Do it.\n\n'
              '        Twice.\n        """\n    def g(self): pass\n')
    assert list(part("corpus").described(ast.parse(source))) == [
        "A\n    A thing.\n", "    f(self, x: int=1)\n        Do it.\n\n        Twice.\n"]


# --- bigram -------------------------------------------------------------------------------------------


def test_counts_of_a_hand_worked_example(part):
    bigram = part("bigram")
    counts = bigram.count([bigram.Stream(np.array([0, 1, 0, 1, 1]), 1.0)], vocab_size=4)
    previous, following = np.array([0, 1, 1, 1, 3]), np.array([1, 0, 1, 2, 1])
    # pairs: 01 twice, 10 once, 11 once; tokens: 0 twice, 1 three times; 3 is never first in a pair
    np.testing.assert_allclose(counts.components(previous, following), [
        [1, 1 / 2, 1 / 2, 0, 3 / 5], [3 / 5, 2 / 5, 3 / 5, 0, 3 / 5], [1 / 4] * 5])


def test_every_component_is_a_distribution_and_rounds_are_repetitions(part):
    bigram = part("bigram")
    vocab_size, random = 7, np.random.default_rng(0)
    one, two = random.integers(0, 5, 60), random.integers(1, 6, 40)
    counts = bigram.count([bigram.Stream(one, 1.0), bigram.Stream(two, 2.0)], vocab_size)
    repeated = bigram.count([bigram.Stream(tokens, 1.0) for tokens in (one, two, two)], vocab_size)
    for previous in range(vocab_size):
        pairs = np.full(vocab_size, previous), np.arange(vocab_size)
        np.testing.assert_allclose(counts.components(*pairs).sum(axis=1), 1)
        np.testing.assert_allclose(counts.components(*pairs), repeated.components(*pairs))


def test_the_weights_are_the_best_there_are(part):
    random = np.random.default_rng(1)
    components, importance = random.random((3, 400)) ** 3, random.integers(1, 3, 400)
    weights = part("bigram").best_weights(components, importance)

    def likelihood(candidate: np.ndarray) -> float:
        return float(np.log(candidate @ components) @ importance)

    steps = np.arange(0, 1.001, 0.02)
    grid = [np.array([a, b, 1 - a - b]) for a in steps for b in steps if a + b <= 1]
    assert weights.sum() == pytest.approx(1)
    assert likelihood(weights) > max(map(likelihood, grid)) - 0.05


def test_the_bigram_finds_the_entropy_of_a_bigram_source(part):
    bigram = part("bigram")
    vocab_size, random = 8, np.random.default_rng(2)
    transitions = random.dirichlet(np.full(vocab_size, 0.3), size=vocab_size)
    tokens = [0]
    for _ in range(60_000):
        tokens.append(int(random.choice(vocab_size, p=transitions[tokens[-1]])))
    training, unseen = np.array(tokens[:40_000]), np.array(tokens[40_000:])
    entropy = -np.log(transitions[unseen[:-1], unseen[1:]]).mean()
    fitted = bigram.fit([bigram.Stream(training, 1.0)], vocab_size)
    assert fitted.loss(unseen[:-1], unseen[1:]) == pytest.approx(entropy, abs=0.01)


# --- held-out loss and continuation -------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """A Hugging Face folder with a model of random weights and our tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron.pretrain.export.sentencepiece_json import tokenizer_json
    from megatron.pretrain.export.tokenizer_files import TokenizerSource, write_tokenizer

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=1000, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128, tie_word_embeddings=False)).save_pretrained(folder)
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    source = TokenizerSource(tiny_tokenizer, tokenizer_json(tiny_tokenizer, {}), roles, finds_special_strings=False)
    write_tokenizer(source, folder, 128)
    return folder


def test_windows_share_their_border_tokens(part):
    windows = part("heldout").windows_of(np.arange(11), 3)
    assert windows.tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]


def test_losses_are_those_that_transformers_computes(part, model: Path):
    import torch
    from transformers import AutoModelForCausalLM

    windows = np.random.default_rng(0).integers(3, 1000, (11, 17))
    losses = np.concatenate(list(part("heldout").model_losses(model, windows)))
    ids = torch.from_numpy(windows)
    with torch.no_grad():
        # Given the whole row, transformers shifts it itself: 16 predictions a row.
        reference = AutoModelForCausalLM.from_pretrained(model)(input_ids=ids, labels=ids).loss.item()
    assert losses.shape == (11, 16)
    assert losses.mean() == pytest.approx(reference, abs=1e-5)


def test_what_follows_the_end_of_a_document_is_not_counted(part, model: Path):
    heldout, bigram = part("heldout"), part("bigram")
    windows = np.random.default_rng(0).integers(3, 1000, (4, 17))
    windows[1, 5] = windows[3, 16] = 2      # the second is only ever predicted
    streams = [bigram.Stream(np.arange(1000), 1.0)]
    figures = heldout.compare(model, windows, 2, streams, 1000)
    losses = np.concatenate(list(heldout.model_losses(model, windows)))
    assert figures["tokens"] == 4 * 16 - 1
    assert figures["model"] == pytest.approx((losses.sum() - losses[1, 5]) / 63, rel=1e-6)


def preprocessed(folder: Path, texts: list[str], tokenizer: Path, run_tool) -> Path:
    """The path of a mixture of one source with these texts."""
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    outcome = run_tool("tools/preprocess_data.py", "--input", folder / "train.jsonl", "--output-prefix",
                       folder / "train", "--tokenizer-model", tokenizer, "--append-eod", "--workers", "1")
    assert outcome.returncode == 0, outcome.stderr
    mixture = folder / "mixture.yml"
    mixture.write_text("GLOBAL_BATCH_SIZE: 1\nSEQ_LEN: 8\n1.0_ROUND:\n"
                       f"  - {folder}/train_text_document.bin\n")
    return mixture


@pytest.mark.parametrize(("training", "code"), [("like the held-out text", 1), ("unlike it", 0)])
def test_the_exit_code_says_which_of_the_two_is_lower(training: str, code: int, tmp_path: Path, model: Path,
                                                      tiny_tokenizer: Path, part, run_tool, capsys):
    import keyword

    held_out = " ".join(keyword.kwlist)
    texts = [held_out] * 200 if training == "like the held-out text" else ["7 7 7 7 7 7 7 7"] * 2000
    mixture = preprocessed(tmp_path, texts, tiny_tokenizer, run_tool)
    (tmp_path / "heldout.jsonl").write_text(json.dumps({"text": held_out}) + "\n")
    assert code == part("heldout").main([
        "--model", str(model), "--documents", str(tmp_path / "heldout.jsonl"), "--mixture", str(mixture),
        "--tokenizer-model", str(tiny_tokenizer), "--seq-length", "16",
        "--output", str(tmp_path / "figures.json")])
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["uniform"] == pytest.approx(math.log(1000))
    assert figures["model"] == pytest.approx(math.log(1000), abs=0.3)     # it has learnt nothing yet
    assert (figures["bigram"] < figures["model"]) == bool(code)
    shown = capsys.readouterr().out
    assert f"{figures['model']:.4f}" in shown and f"{figures['bigram']:.4f}" in shown


def greedy(model: Path, prompt_ids: list[int], count: int) -> list[int]:
    """One full forward pass for each token: no cache, no generate()."""
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids = list(prompt_ids)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(network(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt_ids):]


def test_speaking_is_greedy_and_held_against_what_is_expected(tmp_path: Path, model: Path,
                                                              tiny_tokenizer: Path, part, capsys):
    import sentencepiece

    prompt_ids = sentencepiece.SentencePieceProcessor(model_file=str(tiny_tokenizer)).encode("def f(x):")
    expected = {"prompt_ids": prompt_ids, "new_ids": greedy(model, prompt_ids, 20)}
    (tmp_path / "right.json").write_text(json.dumps(expected))
    (tmp_path / "wrong.json").write_text(json.dumps({**expected, "new_ids": expected["new_ids"][:-1] + [0]}))
    arguments = ["--model", str(model), "--prompt", "def f(x):", "--max-new-tokens", "20"]
    assert part("speak").main([*arguments, "--expect", str(tmp_path / "right.json")]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("def f(x):")
    assert "20 greedy fp32 tokens equal the training model's own" in shown
    assert part("speak").main([*arguments, "--expect", str(tmp_path / "wrong.json")]) == 1


# --- the script ---------------------------------------------------------------------------------------


def quickstart(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", str(QUICKSTART), *arguments], env={**os.environ, **environment}, text=True,
                          capture_output=True)


def test_quickstart_takes_no_other_argument():
    outcome = quickstart("--kepe")
    assert outcome.returncode == 2
    assert outcome.stderr == "error: unknown argument '--kepe': quickstart.sh takes --keep or --help\n"


def test_quickstart_empties_no_folder_that_is_not_its_own(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("years of work")
    outcome = quickstart(QUICKSTART_HOME=str(tmp_path))
    assert outcome.returncode == 2
    assert "is not empty and holds no earlier quickstart" in outcome.stderr
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_the_report_has_a_row_for_each_step(tmp_path: Path, run_tool):
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps" / "01").write_text("corpus\t3\twrote documents\tout/corpus/\n")
    (tmp_path / "steps" / "02").write_text("tokenizer\t57\tlearnt pieces\tout/t.model\n")
    outcome = run_tool(PARTS / "report.py", tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.index("corpus") < outcome.stdout.index("tokenizer")
    assert "1.0 minutes in all" in outcome.stdout
