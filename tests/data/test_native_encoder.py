"""The native encoder gives SentencePiece's ids for every text, reads lines as Python does, or says no."""

from __future__ import annotations

import importlib.util
import json
import pickle
import pydoc_data.topics
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from megatron.pretrain.config import TokenizerConfig
from megatron.pretrain.data import _native
from megatron.pretrain.data.documents import BadDocument, Chunk
from megatron.pretrain.data.encoded import count
from megatron.pretrain.data.encoders import choose_encoder
from megatron.pretrain.data.library_encoder import LibraryEncoder
from megatron.pretrain.data.native_encoder import Declined, NativeEncoder
from megatron.pretrain.data.preprocess import PreprocessConfig, preprocess
from megatron.pretrain.errors import UserError
from megatron.pretrain.tokenizer import SentencePieceTokenizer, Tokenizer, build_tokenizer

fuzz_file = importlib.util.spec_from_file_location(
    "fuzz_texts", Path(__file__).parent / "native/fuzz_texts.py")
fuzz_texts = importlib.util.module_from_spec(fuzz_file)
fuzz_file.loader.exec_module(fuzz_texts)
Texts, encode = fuzz_texts.Texts, fuzz_texts.encode

NEO = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
       "split_digits": True}
COVERED = {
    "neo": NEO,
    # Pieces that reach over spaces, scripts and digits, and text that gets no space before it.
    "no borders": {**NEO, "split_by_whitespace": False, "split_by_unicode_script": False,
                   "split_by_number": False, "split_digits": False, "add_dummy_prefix": False},
    # The rarer characters of the corpus are unknown.
    "few characters": {**NEO, "character_coverage": 0.98, "vocab_size": 340}}
DECLINED = {
    "user-defined symbols": {**NEO, "user_defined_symbols": ["<|im_start|>", "the quick"]},
    "no byte fallback": {**NEO, "byte_fallback": False},
    "nmt_nfkc": {**NEO, "normalization_rule_name": "nmt_nfkc"},
    "removes extra spaces": {**NEO, "remove_extra_whitespaces": True},
    "suffixes": {**NEO, "treat_whitespace_as_suffix": True},
    "no BPE": {**NEO, "model_type": "unigram"},
    "reserved piece of one character": {**NEO, "control_symbols": ["~"]}}


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict], Path]:
    folder = tmp_path_factory.mktemp("models")
    corpus = folder / "topics.txt"
    corpus.write_text("\n".join(pydoc_data.topics.topics.values()) + "\né中文字漢字, 中文 éé\n" * 50)

    def run(settings: dict) -> Path:
        prefix = folder / f"model{len(list(folder.iterdir()))}"
        sentencepiece.SentencePieceTrainer.train(
            input=str(corpus), model_prefix=str(prefix), minloglevel=2,
            **{"vocab_size": 900, "model_type": "bpe", "character_coverage": 0.9999, **settings})
        return prefix.with_suffix(".model")
    return run


def tokenizer_of(path: Path, **settings) -> Tokenizer:
    return build_tokenizer(TokenizerConfig(tokenizer_type="SentencePieceTokenizer",
                                           tokenizer_model=str(path), **settings))


def chunk_of(lines: bytes) -> Chunk:
    return Chunk("corpus.jsonl", 0, len(lines), True, lines)


@pytest.mark.parametrize("settings", COVERED.values(), ids=COVERED)
def test_ids_are_those_of_sentencepiece(settings: dict, train):
    model = train(settings)
    texts = Texts(model, seed=1)
    encoder = NativeEncoder(tokenizer_of(model), ("text",), append_eod=False)
    library = sentencepiece.SentencePieceProcessor(model_file=str(model))
    drawn = [texts.draw() for _ in range(4000)]
    for again in range(2):  # the second time from the caches
        for text, ours, theirs in zip(drawn, encode(encoder, drawn), library.encode(drawn), strict=True):
            assert ours == theirs, repr(text)


def test_scores_that_do_not_follow_the_ids_and_equal_ones(train, tmp_path: Path):
    model = tmp_path / "scrambled.model"
    model.write_bytes(with_scores(train(NEO).read_bytes(), lambda number: -float(number * 7919 % 101)))
    texts = Texts(model, seed=3)
    encoder = NativeEncoder(tokenizer_of(model), ("text",), append_eod=False)
    library = sentencepiece.SentencePieceProcessor(model_file=str(model))
    drawn = [texts.draw() for _ in range(4000)]
    assert encode(encoder, drawn) == library.encode(drawn)


def with_scores(model: bytes, score_of: Callable[[int], float]) -> bytes:
    """The model with another score for each piece that may be merged to; the pieces are what it begins with.

    A piece is a message: tag and size; of its text tag, size and bytes; tag and score; of other kinds more.
    """
    changed, at, number = bytearray(model), 0, 0
    while model[at] == 0x0A:
        assert model[at + 1] < 0x80 and model[at + 2] == 0x0A
        score, end = at + 4 + model[at + 3], at + 2 + model[at + 1]
        assert model[score] == 0x15
        if score + 5 == end:
            changed[score + 1:end] = struct.pack("<f", score_of(number))
        at, number = end, number + 1
    assert number == sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size()
    return bytes(changed)


def test_the_tokenizer_that_ships_is_covered_and_exact(repository: Path):
    model = repository / "neo/tokenizer.model"
    texts = Texts(model, seed=2)
    drawn = [*pydoc_data.topics.topics.values(), *(texts.draw() for _ in range(2000))]
    encoder, said = choose_encoder(tokenizer_of(model), ("text",), False)
    assert isinstance(encoder, NativeEncoder) and said == "encoder: native, a sample checked"
    library = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert encode(encoder, drawn) == library.encode(drawn)


def test_units_of_any_length_and_more_of_them_than_the_caches_hold(train):
    model = train(NEO)
    texts = ["a" * size for size in (1, 2, 14, 15, 16, 47, 48, 49, 63, 64, 65, 1000, 100_000)]
    texts += ["the" * 30_000, "中文" * 40, "\0" * 100, "x" + "\0" * 14, "x" + "\0" * 13]
    encoder = NativeEncoder(tokenizer_of(model), ("text",), append_eod=False)
    library = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert encode(encoder, texts) == library.encode(texts)


@pytest.mark.parametrize("settings", COVERED.values(), ids=COVERED)
def test_the_ids_of_whole_units_begin_those_of_any_text_that_goes_on(settings: dict, train):
    model = train(settings)
    texts, draw = Texts(model, seed=4), random.Random(4)
    drawn = [text for text in (texts.draw() for _ in range(3000)) if text]
    native = _native.Encoder16(model.read_bytes(), ["text"], None)
    begun = [native.whole_units(text[:draw.randint(1, len(text))]) for text in drawn]
    assert sum(map(bool, begun)) > len(drawn) / 3
    library = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for text, start, whole, part in zip(drawn, begun, library.encode(drawn), library.encode(begun)):
        assert text.startswith(start) and whole[:len(part)] == part, (text, start)


def test_wide_registers_find_what_narrow_ones_find(train, tmp_path: Path, repository: Path):
    compiler = shutil.which("c++")
    if not compiler:
        pytest.skip("no C++ compiler")
    sources = repository / "megatron/pretrain/data/native"
    files = [Path(__file__).parent / "native/joins.cpp", sources / "model.cpp", sources / "vocabulary.cpp"]
    subprocess.run([compiler, "-std=c++17", "-O2", f"-I{sources}", *map(str, files),
                    "-o", str(tmp_path / "joins")], check=True)
    code = subprocess.run([str(tmp_path / "joins"), str(train(NEO))]).returncode
    if code == 3:
        pytest.skip("this processor has no wide registers")
    assert code == 0


@pytest.mark.parametrize("settings", DECLINED.values(), ids=DECLINED)
def test_models_that_are_not_covered_go_to_the_library(settings: dict, train):
    tokenizer = tokenizer_of(train(settings))
    with pytest.raises(Declined):
        NativeEncoder(tokenizer, ("text",), False)
    encoder, said = choose_encoder(tokenizer, ("text",), False)
    assert isinstance(encoder, LibraryEncoder)
    assert said.startswith("encoder: SentencePieceTokenizer's library, not the native one: it"), said


def test_other_tokenizers_and_the_wish_for_the_library_are_said(tiny_tokenizer: Path):
    legacy, said = choose_encoder(tokenizer_of(tiny_tokenizer, tokenizer_sentencepiece_legacy=True),
                                  ("text",), True)
    assert isinstance(legacy, LibraryEncoder) and "as the SentencePieceTokenizer alone does" in said
    library, said = choose_encoder(tokenizer_of(tiny_tokenizer), ("text",), True, native=False)
    assert isinstance(library, LibraryEncoder) and said.endswith("as --encoder library asks")


def test_without_the_extension_the_library_encodes(tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "megatron.pretrain.data.native_encoder", None)  # import fails
    encoder, said = choose_encoder(tokenizer_of(tiny_tokenizer), ("text",), True)
    assert isinstance(encoder, LibraryEncoder) and "it was not built" in said


GOOD_LINES = [
    b'{"text": "plain"}', b' \t{ "text" : "spaces" } \t\r', b'{"text":""}',
    b'{"text":"\\"\\\\\\/\\b\\f\\n\\r\\t"}',
    b'{"text":"\\u0041\\u00e9\\u4e2d\\ud83d\\ude00\\u0000\\u2581"}', "{\"text\":\"é中😀\"}".encode(),
    b'{"text":1,"text":"the last counts"}', b'{"te\\u0078t":"escaped key"}', b'{"text":"a","te\\u0078t":"b"}',
    b'{"a":{"text":1,"b":[]},"c":[1,-0.5e+3,{"d":null}],"e":true,"f":false,"g":{},"text":"after"}',
    b'{"text":"nan","n":NaN,"m":-Infinity}', b'{"text":"long","n":' + b"1" * 400 + b'}',
    b'{"text":"deep","d":' + b"[" * 100 + b"]" * 100 + b"}", b'{"text":"other","x":"\\ud800"}',
    "{\"text\":\"x\",\"é\":\"中\"}".encode(), b'{"text":"1e999","n":1e999}',
    b'{"\xc3\xa9":0,"text":"\x7f"}']
BAD_LINES = [
    b"", b"[]", b"5", b"{}", b'{"text":5}', b'{"text":null}', b'{"text":["a"]}', b'{"other":"a"}',
    b'{"text":"a","text":5}', b'{"text":"a"', b'{"text":"a"}}', b'{"text":"a"} x', b'{"text":"a",}', b'{,}',
    b'{"text" "a"}', b'{"text":"\\x"}', b'{"text":"\\u12g4"}', b'{"text":"\\ud800"}',
    b'{"text":"\\ud800\\u0041"}',
    b'{"text":"\\udc00"}', b'{"text":"raw\ttab"}', b'{"text":"\xff"}', b'{"text":"\xed\xa0\x80"}',
    b'{"text":"\xc0\x80"}', b'{"text":"\xf4\x90\x80\x80"}', b'{"text":"\xe4\xb8"}',
    b'{"text":"a","x":"\xff"}',
    b'\xef\xbb\xbf{"text":"a"}', b'{"text":"a","n":01}', b'{"text":"a","n":.5}', b'{"text":"a","n":1.}',
    b'{"text":"a","n":tru}', b'{"text":"a","n":[1,]}', b'{"text":"a","n":{"a"}}', b'{"text":"a","n":"\\x"}',
    b'{"text":"a","n":' + b"1" * 5000 + b'}', b'{"text":"a","d":' + b"[" * 5000 + b"]" * 5000 + b"}",
    b'{"text":"a\0b"}', b"{'text':'a'}", b'{"text":"a"}\x0b', b'\x0c{"text":"a"}', b'{"text":"a", //\n"b":1}']


def outcome(encoder, lines: bytes) -> object:
    """What the encoder makes of the lines, or what it says of the first that is none."""
    try:
        return [(count(each), each.longest, [each.ids_of(number, 99) for number in range(each.documents)],
                 [bytes(part) for part in each.entries(tokens=2**33, sequences=2**32)])
                for each in encoder(chunk_of(lines))]
    except BadDocument as bad:
        return bad.args


@pytest.mark.parametrize("append_eod", [True, False])
def test_every_line_is_read_as_python_reads_it(append_eod: bool, tiny_tokenizer: Path):
    native = NativeEncoder(tokenizer_of(tiny_tokenizer), ("text",), append_eod)
    python = LibraryEncoder(tokenizer_of(tiny_tokenizer), ("text",), append_eod)
    for line in [*GOOD_LINES, *BAD_LINES]:
        for lines in (line, line + b"\n", line + b"\r\n", line + b"\n\n", line + b"\n \n",
                      b'{"text":"first"}\n' + line + b'\n{"text":"last"}\n'):
            assert outcome(native, lines) == outcome(python, lines), lines
    for line in GOOD_LINES:
        assert isinstance(outcome(native, line), list), line
    for line in BAD_LINES:
        assert isinstance(outcome(native, line + b"\n" + GOOD_LINES[0]), tuple), line


def test_lines_with_bytes_changed_at_random(tiny_tokenizer: Path):
    native = NativeEncoder(tokenizer_of(tiny_tokenizer), ("text", "title"), True)
    python = LibraryEncoder(tokenizer_of(tiny_tokenizer), ("text", "title"), True)
    draw = random.Random(3)
    line = '{"id": [1, {"a": -2.5e3}], "title": "Ünï\\u00e9", "text": "a \\"b\\" \\\\ 中文 \\n c"}'.encode()
    for _ in range(5000):
        changed = bytearray(line)
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(changed))
            changed[at:at + draw.randint(0, 2)] = [draw.choice(b'{}[]",:\\u0e1-\n\r \xc3\xa9\xe4\x80t')]
        assert outcome(native, bytes(changed)) == outcome(python, bytes(changed)), bytes(changed)


def test_a_large_vocabulary_has_wide_ids_and_several_keys(train, monkeypatch: pytest.MonkeyPatch):
    tokenizer = tokenizer_of(train(NEO))
    narrow = NativeEncoder(tokenizer, ("text", "title"), True)
    tokenizer.vocab_size = 70_000  # what decides on the type of the ids
    wide = NativeEncoder(tokenizer, ("text", "title"), True)
    lines = b"".join(json.dumps({"title": text[:50], "text": text}).encode() + b"\n"
                     for text in pydoc_data.topics.topics.values())
    for one, other in zip(narrow(chunk_of(lines)), wide(chunk_of(lines)), strict=True):
        (narrow_ids, *_), (wide_ids, *_) = one.entries(0, 0), other.entries(0, 0)
        assert np.frombuffer(narrow_ids, np.uint16).tolist() == np.frombuffer(wide_ids, np.int32).tolist()
        assert count(one) == count(other) and one.tokens == len(narrow_ids)


def test_the_encoder_survives_pickling(tiny_tokenizer: Path):
    encoder = NativeEncoder(tokenizer_of(tiny_tokenizer), ("text",), True)
    assert outcome(pickle.loads(pickle.dumps(encoder)), GOOD_LINES[0]) == outcome(encoder, GOOD_LINES[0])


class AnotherTokenizer(SentencePieceTokenizer):
    """Differs from the model it names where a text holds `wrong`: the check of a sample is to find that."""

    wrong = "\0"

    def encode(self, text: str) -> list[int]:
        ids = super().encode(text)
        return ids[1:] if self.wrong in text else ids


@pytest.mark.parametrize("append_eod", [True, False])
@pytest.mark.parametrize("begins", ["first of all", "the longest", "a title"])
def test_the_check_of_a_sample_stops_the_run_and_names_the_text(
        begins: str, append_eod: bool, tiny_tokenizer: Path):
    documents = [{"text": "first of all", "title": ""}, *[{"text": "b", "title": "c"}] * 50,
                 {"text": "the longest by far " * 5000, "title": "a title"}]
    lines = b"".join(json.dumps(document).encode() + b"\n" for document in documents)
    tokenizer = AnotherTokenizer(tiny_tokenizer)
    NativeEncoder(tokenizer, ("text", "title"), append_eod)(chunk_of(lines))
    tokenizer.wrong = begins
    with pytest.raises(UserError, match="native encoder") as stop:
        NativeEncoder(tokenizer, ("text", "title"), append_eod)(chunk_of(lines))
    assert f"begins '{begins}" in str(stop.value)


def test_a_run_that_fails_its_check_writes_nothing(tmp_path: Path, tiny_tokenizer: Path,
                                                   monkeypatch: pytest.MonkeyPatch):
    from megatron.pretrain import tokenizer as module

    monkeypatch.setattr(module.SentencePieceTokenizer, "encode", lambda self, text: [0])
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "one document"}\n')
    with pytest.raises(UserError, match="one document"):
        preprocess(PreprocessConfig(
            inputs=(str(corpus),), output_prefix=str(tmp_path / "out"),
            tokenizer=TokenizerConfig(tokenizer_type="SentencePieceTokenizer",
                                      tokenizer_model=str(tiny_tokenizer))))
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]
