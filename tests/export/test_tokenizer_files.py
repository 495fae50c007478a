"""The exported tokenizer against SentencePiece itself, and tokenizers that do not belong to the model."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from megatron.pretrain.checkpoint.manifest import Manifest
from megatron.pretrain.config import TokenizerConfig
from megatron.pretrain.errors import UserError
from megatron.pretrain.export.sentencepiece_json import tokenizer_json
from megatron.pretrain.export.tokenizer_files import find_tokenizer, write_tokenizer
from megatron.pretrain.tokenizer import build_tokenizer

TEXTS = (
    "", " ", "word", " leading", "  two leading", "trailing  ", "a  b   c", "\n", "\n\nx\n",
    "\tdef f(x):\r\n", "0123456789", "3.14 1,000", "中文和 English 混排。", "🙂👩‍👩‍👧 naïve ½", "<s>",
    "</s> text", "x<s>y", "<unk>", "<0x0A>", "<EOD>", "a\u2581b", "\u3000\xa0", "\x00\x7f\ud7ff\U0010ffff",
    "aaaaaaaaaaaaaaaaa", "abababababab", "-" * 50,
)


def some_texts(pieces: list[str], count: int) -> list[str]:
    """Texts of pieces, of parts of pieces and of repeated parts: where ties between merges can arise."""
    dice = random.Random(0)
    texts = []
    for number in range(count):
        parts = [dice.choice(pieces).replace("\u2581", " ") for _ in range(dice.randint(1, 12))]
        if number % 3 == 1:
            parts = [part[:dice.randint(1, 3)] for part in parts]
        elif number % 3 == 2:
            parts = parts[:2] * dice.randint(2, 12)
        texts.append("".join(parts))
    return texts


def manifest_of(model: Path, *, kind: str = "SentencePieceTokenizer", legacy: bool = False) -> Manifest:
    settings = TokenizerConfig(tokenizer_type=kind, tokenizer_model=str(model), vocab_size=100,
                               tokenizer_sentencepiece_legacy=legacy)
    trained = build_tokenizer(settings)
    return Manifest(
        iteration=1, consumed_samples=1, consumed_tokens=1, mixture_hash="", train_state={}, versions={},
        config={"tokenizer": vars(settings)},
        tokenizer={"type": kind, "fingerprint": trained.fingerprint, "vocab_size": trained.vocab_size,
                   "eod_id": trained.eod_id, "bos_id": trained.bos_id, "eos_id": trained.eos_id})


def exported(model: Path, folder: Path, *, legacy: bool = False):
    """The tokenizer as a user of the exported folder loads it."""
    folder.mkdir()
    write_tokenizer(find_tokenizer(manifest_of(model, legacy=legacy), None), folder, max_length=128)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(params=["tiny", "neo"])
def model(request: pytest.FixtureRequest, tiny_tokenizer, repository) -> Path:
    """A small SentencePiece model, and the one this repository ships."""
    return tiny_tokenizer if request.param == "tiny" else repository / "neo/tokenizer.model"


def test_ids_are_those_of_sentencepiece(model, tmp_path):
    expected = sentencepiece.SentencePieceProcessor(model_file=str(model))
    got = exported(model, tmp_path / "hf")
    pieces = [expected.id_to_piece(number) for number in range(259, expected.vocab_size())]
    for text in (*TEXTS, *some_texts(pieces, 3000)):
        ids = expected.encode(text)
        assert got.encode(text) == ids, text
        assert got.decode(ids) == expected.decode(ids), text


def test_roles_are_known(tiny_tokenizer, tmp_path):
    tokenizer = exported(tiny_tokenizer, tmp_path / "hf")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert tokenizer.decode([1, *tokenizer.encode("text"), 2], skip_special_tokens=True) == "text"
    assert (tmp_path / "hf/tokenizer.model").read_bytes() == tiny_tokenizer.read_bytes()


def test_the_forks_special_strings_are_found(tiny_tokenizer, tmp_path):
    got = exported(tiny_tokenizer, tmp_path / "hf", legacy=True)
    expected = build_tokenizer(TokenizerConfig(tokenizer_model=str(tiny_tokenizer),
                                               tokenizer_sentencepiece_legacy=True))
    assert len(got) == 1005
    for text in (*TEXTS, "<s>a</s> b<EOD><EOD>c <PAD> <MASK>", "<CLS><SEP>"):
        assert got.encode(text) == expected.encode(text), text


def test_a_folder_with_the_model_will_do(tiny_tokenizer, tmp_path):
    manifest = manifest_of(tiny_tokenizer)
    shutil.copy(tiny_tokenizer, tmp_path / "tokenizer.model")
    assert find_tokenizer(manifest, tmp_path).path == tmp_path / "tokenizer.model"
    assert find_tokenizer(manifest, tiny_tokenizer.parent).path == tiny_tokenizer    # its only *.model


def test_a_run_without_a_tokenizer_exports_none(tiny_tokenizer):
    assert find_tokenizer(manifest_of(tiny_tokenizer, kind="NullTokenizer"), None) is None


def test_a_hugging_face_tokenizer_goes_along_as_it_is(tiny_tokenizer, tmp_path):
    exported(tiny_tokenizer, tmp_path / "trained_with").save_pretrained(tmp_path / "trained_with")
    source = find_tokenizer(manifest_of(tmp_path / "trained_with", kind="HuggingFaceTokenizer"), None)
    (tmp_path / "hf").mkdir()
    write_tokenizer(source, tmp_path / "hf", max_length=128)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "trained_with" / name).read_bytes()


def train(folder: Path, **settings: object) -> Path:
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    sentencepiece.SentencePieceTrainer.train(**{
        "input": str(text), "model_prefix": str(folder / "other"), "vocab_size": 320, "model_type": "bpe",
        "byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
        "hard_vocab_limit": False, "minloglevel": 2, **settings})
    return folder / "other.model"


def test_another_tokenizer_is_refused(tiny_tokenizer, tmp_path):
    manifest = manifest_of(tiny_tokenizer)
    with pytest.raises(UserError, match="ids, the model was trained with 1,000"):
        find_tokenizer(manifest, train(tmp_path))
    manifest = manifest_of(train(tmp_path))
    with pytest.raises(UserError, match="is not the tokenizer that the model was trained with"):
        find_tokenizer(manifest, train(tmp_path, split_digits=True))


@pytest.mark.parametrize(("name", "sentence"), [
    ("absent", "does not exist"), ("empty", "holds no tokenizer.model"),
    ("text.txt", "not a SentencePiece model")])
def test_a_wrong_path_is_named(name: str, sentence: str, tiny_tokenizer, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("no model")
    with pytest.raises(UserError, match=sentence):
        find_tokenizer(manifest_of(tiny_tokenizer), tmp_path / name)


def test_a_tokenizer_that_moved_away_is_asked_for(tiny_tokenizer, tmp_path):
    copy = shutil.copy(tiny_tokenizer, tmp_path / "gone.model")
    manifest = manifest_of(Path(copy))
    Path(copy).unlink()
    with pytest.raises(UserError, match="TOKENIZER_DIR .* is not given, and .*gone.model"):
        find_tokenizer(manifest, None)


@pytest.mark.parametrize(("settings", "reason"), [
    ({"model_type": "unigram", "vocab_size": 300}, "not of the BPE kind"),
    ({"byte_fallback": False, "vocab_size": 60}, "no byte fallback"),
    ({"user_defined_symbols": ["<tool>"]}, "user-defined"),
    ({"normalization_rule_name": "nmt_nfkc"}, "normalizer"),
    ({"remove_extra_whitespaces": True}, "normalizer"),
    ({"treat_whitespace_as_suffix": True}, "before a word"),
])
def test_a_model_that_tokenizer_json_cannot_express_is_refused(settings, reason: str, tmp_path):
    with pytest.raises(UserError, match=reason):
        tokenizer_json(train(tmp_path, **settings), {})


def test_tokenizer_json_alone_gives_the_ids_too(tiny_tokenizer, tmp_path):
    exported(tiny_tokenizer, tmp_path / "hf")
    import tokenizers

    alone = tokenizers.Tokenizer.from_file(str(tmp_path / "hf/tokenizer.json"))
    expected = sentencepiece.SentencePieceProcessor(model_file=str(tiny_tokenizer))
    assert all(alone.encode(text).ids == expected.encode(text) for text in TEXTS)
    assert json.loads((tmp_path / "hf/tokenizer.json").read_text())["model"]["byte_fallback"]
