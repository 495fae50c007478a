"""Ids equal those of the libraries that the models come from, and every model that is none is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import sentencepiece

from megatron.pretrain.config import TokenizerConfig
from megatron.pretrain.errors import UserError
from megatron.pretrain.tokenizer import build_tokenizer

TEXTS = ("", " ", "Plain words, 1234 and\ttabs\n", "汉字 and é", "nul \x00 and 🙂", "</s", "a<s>b",
         "<s></s><s>", "<EOD> at once<EOD>", "x <CLS><SEP> y <MASK><PAD>", "<<s>> < s > <EOD", "<unk> stays")


def build(kind: str, model: object, **settings):
    return build_tokenizer(TokenizerConfig(
        tokenizer_type=kind, tokenizer_model=None if model is None else str(model), **settings))


@pytest.fixture(scope="module")
def legacy(tiny_tokenizer: Path):
    return build("SentencePieceTokenizer", tiny_tokenizer, tokenizer_sentencepiece_legacy=True)


@pytest.fixture(scope="module")
def hugging_face_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE with special tokens and, as some have, a truncation to four tokens."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<begin>", "<end>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["some words to learn some pieces from"] * 9, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<begin> $A", special_tokens=[("<begin>", 0)])
    tokenizer.enable_truncation(4)
    folder = tmp_path_factory.mktemp("hugging_face")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<begin>", 
        "eos_token": {"__type": "AddedToken", "content": "<end>"}}))
    return folder


def test_sentencepiece_is_the_library_and_ends_documents_with_eos(tiny_tokenizer: Path):
    library = sentencepiece.SentencePieceProcessor(model_file=str(tiny_tokenizer))
    ours = build("SentencePieceTokenizer", tiny_tokenizer)
    assert [ours.encode(text) for text in TEXTS] == [library.encode_as_ids(text) for text in TEXTS]
    assert all(ours.decode(ours.encode(text)) == library.decode(library.encode(text)) for text in TEXTS)
    assert (ours.vocab_size, ours.bos_id, ours.eos_id, ours.eod_id) == (1000, 1, 2, 2)


@pytest.mark.parametrize("name", ["Llama2Tokenizer", "GPTSentencePieceTokenizer"])
def test_other_names_of_sentencepiece_are_the_same_tokenizer(name: str, tiny_tokenizer: Path):
    other, plain = build(name, tiny_tokenizer), build("SentencePieceTokenizer", tiny_tokenizer)
    assert other.encode("<s> words") == plain.encode("<s> words")
    assert other.fingerprint == plain.fingerprint


def test_legacy_appends_the_forks_tokens(legacy):
    text = "<CLS><SEP><EOD><MASK><PAD><s></s>"
    assert legacy.encode(text) == [1000, 1001, 1002, 1003, 1004, 1, 2]
    assert (legacy.vocab_size, legacy.eod_id, legacy.bos_id, legacy.eos_id) == (1005, 1002, 1, 2)


def test_legacy_ids_equal_the_engines_legacy_mode(legacy, tiny_tokenizer: Path):
    from megatron.core.tokenizers.text.libraries.sentencepiece_tokenizer import SentencePieceTokenizer

    engine = SentencePieceTokenizer(
        str(tiny_tokenizer), legacy=True, trim_spm_separator_after_special_token=False,
        special_tokens=["<CLS>", "<SEP>", "<EOD>", "<MASK>", "<PAD>", "<s>", "</s>"])
    assert [legacy.encode(text) for text in TEXTS] == [engine.text_to_ids(text) for text in TEXTS]
    assert legacy.vocab_size == engine.vocab_size


@pytest.mark.parametrize("text", TEXTS)
def test_legacy_decodes_what_it_encoded(text: str, legacy):
    assert legacy.decode(legacy.encode(text)) == text


def test_hugging_face_ids_equal_those_of_transformers(hugging_face_folder: Path):
    from transformers import AutoTokenizer

    library = AutoTokenizer.from_pretrained(hugging_face_folder)
    for place in (hugging_face_folder, hugging_face_folder / "tokenizer.json"):
        ours = build("HuggingFaceTokenizer", place)
        for text in (*TEXTS, "some words <end> more"):
            assert ours.encode(text) == library.encode(text, add_special_tokens=False)
        assert (ours.vocab_size, ours.bos_id, ours.eos_id, ours.eod_id) == (len(library), 0, 1, 1)
    assert ours.decode(ours.encode("some words 汉<end>")) == "some words 汉"


def test_hugging_face_reads_older_files_through_transformers(hugging_face_folder: Path, tmp_path: Path):
    model = json.loads((hugging_face_folder / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "GPT2Tokenizer", "bos_token": "<begin>", "eos_token": "<end>",
        "unk_token": "<end>"}))
    text = "some words to learn, 汉字"
    ours = build("HuggingFaceTokenizer", tmp_path)
    assert ours.encode(text) == build("HuggingFaceTokenizer", hugging_face_folder).encode(text)
    assert ours.eod_id == 1


def test_null_tokenizer_reads_numbers():
    tokenizer = build("NullTokenizer", None, vocab_size=100)
    assert tokenizer.encode("3 0 98") == [3, 0, 98]
    assert tokenizer.decode([3, 0]) == "3 0"
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (100, 99)
    with pytest.raises(UserError, match="'100'"):
        tokenizer.encode("1 100")


def test_fingerprints_differ_where_ids_do(
        tiny_tokenizer: Path, legacy, hugging_face_folder: Path, tmp_path: Path):
    copy = tmp_path / "copy.model"
    copy.write_bytes(tiny_tokenizer.read_bytes())
    plain = build("SentencePieceTokenizer", tiny_tokenizer)
    assert build("SentencePieceTokenizer", copy).fingerprint == plain.fingerprint
    others = [legacy, build("HuggingFaceTokenizer", hugging_face_folder),
              build("NullTokenizer", None, vocab_size=100), build("NullTokenizer", None, vocab_size=101)]
    assert len({plain.fingerprint, *(other.fingerprint for other in others)}) == 5


def test_tokenizers_survive_pickling(tiny_tokenizer: Path, legacy, hugging_face_folder: Path):
    for tokenizer in (build("SentencePieceTokenizer", tiny_tokenizer), legacy,
                      build("HuggingFaceTokenizer", hugging_face_folder)):
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert copy.encode("some <s> words") == tokenizer.encode("some <s> words")
        assert copy.fingerprint == tokenizer.fingerprint


def test_a_tokenizer_that_is_none_is_refused_with_a_sentence(tmp_path: Path):
    garbage = tmp_path / "garbage.model"
    garbage.write_bytes(b"no model")
    (tmp_path / "empty").mkdir()
    cases = (
        ("SentencePieceTokenizer", tmp_path / "none.model", "none.model: No such file"),
        ("SentencePieceTokenizer", tmp_path, "Is a directory"),
        ("SentencePieceTokenizer", garbage, "garbage.model: is not a SentencePiece model"),
        ("SentencePieceTokenizer", None, "needs --tokenizer-model"),
        ("HuggingFaceTokenizer", tmp_path / "none", "none: No such file"),
        ("HuggingFaceTokenizer", garbage, "garbage.model: is not a tokenizer.json"),
        ("HuggingFaceTokenizer", tmp_path / "empty", "empty: holds no tokenizer.json"),
        ("NullTokenizer", None, "needs --vocab-size"),
        ("BertTokenizer", None, "BertTokenizer: unknown"),
    )
    for kind, model, sentence in cases:
        with pytest.raises(UserError, match=sentence):
            build(kind, model)


def test_an_end_of_document_that_is_missing_is_refused(hugging_face_folder: Path, tmp_path: Path):
    (tmp_path / "tokenizer.json").write_bytes((hugging_face_folder / "tokenizer.json").read_bytes())
    with pytest.raises(UserError, match="must name an eos_token"):
        build("HuggingFaceTokenizer", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<not there>"}')
    with pytest.raises(UserError, match="must name an eos_token"):
        build("HuggingFaceTokenizer", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer_config.json: not valid JSON"):
        build("HuggingFaceTokenizer", tmp_path)


def test_legacy_belongs_to_sentencepiece_alone(tiny_tokenizer: Path):
    with pytest.raises(UserError, match="--tokenizer-sentencepiece-legacy"):
        build("Llama2Tokenizer", tiny_tokenizer, tokenizer_sentencepiece_legacy=True)
