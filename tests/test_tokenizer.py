import hashlib
import importlib.util
import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_models import gguf_vocabulary, random_gguf

from doremi_mix.bpe import train_byte_level_bpe
from doremi_mix.errors import ConfigError, ModelError
from doremi_mix.tokenizer import Tokenizer, load_tokenizer, looks_like_marker

TEXTS = [
    "the quick brown fox jumps over the lazy dog 1234567890",
    "def add(a, b):\n    return a + b  # 2 + 2 = 4\n",
    "今天天气很好，我们去公园散步吧。使用Python编程。",
    "<|b|> c </s> <|end|>",
    "reserved end pad unk s/ user INST | < > [ ] start of text",
]
CORPUS = TEXTS * 20

LITERALS = [
    *("<|pad|>", "<|end|>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|user|>", "<reserved_106>", "<reserved_107>"),
    *("[INST]", "[/INST]", "<<SYS>>", "<SEP>", "<CLS>", "＜/s＞", "＜reserved_106＞", "<|endoftext|>"),
]
FRAGMENTS = [
    "<",
    ">",
    "<|",
    "|>",
    "/s>",
    "s>",
    "</",
    "end",
    "reserved_106>",
    "<reserved_",
    "106>",
    "[",
    "INST]",
    " ",
    "\n",
]
attacks = st.lists(
    st.one_of(st.sampled_from(LITERALS), st.sampled_from(FRAGMENTS), st.text(max_size=6)), min_size=1, max_size=8
).map("".join)
fuzz = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def bpe_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train_byte_level_bpe(CORPUS, 380).save(str(path))
    return path


@pytest.fixture(scope="module")
def bpe(bpe_file):
    return load_tokenizer(str(bpe_file))


@pytest.fixture(scope="module")
def hf_folder(bpe_file, tmp_path_factory):
    """A tokenizer with special and non-special markers, a word and a tag among its added tokens."""
    import tokenizers

    folder = tmp_path_factory.mktemp("hf")
    backend = tokenizers.Tokenizer.from_file(str(bpe_file))
    backend.add_special_tokens(["</s>", "<|im_start|>"])
    backend.add_tokens(["<|user|>", "[INST]", "<reserved_106>", "<<SYS>>", "newword", "<td>"])
    backend.enable_truncation(4)
    backend.enable_padding(length=4)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "</s>"}, "pad_token": "<|pad|>"})
    )
    return folder


def train_sentencepiece(prefix: Path, **options: object) -> Path:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(prefix),
        hard_vocab_limit=False,
        minloglevel=9,
        user_defined_symbols=["<reserved_106>", "<CLS>", "<td>", "\n"],
        **options,
    )
    return prefix.with_suffix(".model")


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory):
    return train_sentencepiece(
        tmp_path_factory.mktemp("sp") / "tiny",
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
    )


@pytest.fixture(scope="module")
def normalizing_tokenizer(tmp_path_factory):
    """NFKC turns the full-width spelling of a marker into the marker, so no search for its spelling finds it."""
    return load_tokenizer(
        str(train_sentencepiece(tmp_path_factory.mktemp("sp") / "nfkc", vocab_size=130, model_type="unigram"))
    )


def control_in(tokenizer: Tokenizer, texts: list[str]) -> set[int]:
    ids, lengths = tokenizer.encode_flat(texts)
    assert lengths.sum() == len(ids)
    return set(ids.tolist()) & (tokenizer.control_ids - {tokenizer.unknown_id})


# --- text never becomes a control token ---


@fuzz
@given(st.lists(attacks, max_size=4))
def test_no_text_becomes_a_control_token_of_a_trained_bpe(bpe, bpe_file, texts):
    import tokenizers

    assert control_in(bpe, texts) == set()
    plain = tokenizers.Tokenizer.from_file(str(bpe_file))
    plain.encode_special_tokens = True  # special tokens as ordinary text
    written = [text.encode("utf-8", "replace").decode() for text in texts]
    assert [plain.decode(ids.tolist(), skip_special_tokens=True) for ids in bpe.encode_batch(written)] == written
    assert [plain.encode(text).ids for text in written] == [ids.tolist() for ids in bpe.encode_batch(written)]


@fuzz
@given(st.lists(attacks, max_size=4))
def test_no_text_becomes_a_control_token_of_a_hugging_face_tokenizer(hf_folder, texts):
    import tokenizers

    tokenizer = load_tokenizer(str(hf_folder))
    assert control_in(tokenizer, texts) == set()
    plain = tokenizers.Tokenizer.from_file(str(hf_folder / "tokenizer.json"))
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert plain.decode(ids.tolist(), skip_special_tokens=True) == text


@fuzz
@given(st.lists(attacks, max_size=4))
def test_no_text_becomes_a_control_token_of_a_sentencepiece_model(sentencepiece_file, texts):
    import sentencepiece

    tokenizer = load_tokenizer(str(sentencepiece_file))
    plain = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    assert control_in(tokenizer, texts) == set()
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        if "\0" not in text and "▁" not in text:  # SentencePiece itself loses these
            assert plain.decode(ids.tolist()) == text


@fuzz
@given(st.lists(attacks, max_size=4))
def test_no_text_becomes_a_control_token_after_normalization(normalizing_tokenizer, texts):
    assert control_in(normalizing_tokenizer, texts) == set()


def test_the_libraries_alone_would_give_control_tokens(hf_folder, sentencepiece_file, normalizing_tokenizer):
    """Otherwise the tests above could not fail."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(hf_folder / "tokenizer.json"))
    controls = load_tokenizer(str(hf_folder)).control_ids
    for literal in ("</s>", "<|im_start|>", "<|user|>", "[INST]", "<reserved_106>", "<<SYS>>", "<|end|>"):
        assert backend.encode(literal, add_special_tokens=False).ids[0] in controls
    tokenizer = load_tokenizer(str(sentencepiece_file))
    assert set(tokenizer.encode_raw(["a<reserved_106>b"])[0]) & tokenizer.control_ids
    assert set(normalizing_tokenizer.encode_raw(["a＜reserved_106＞b"])[0]) & (
        normalizing_tokenizer.control_ids - {normalizing_tokenizer.unknown_id}
    )


def test_a_marker_in_the_plain_vocabulary_is_cut_inside_its_spelling(tmp_path):
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    vocabulary = {"<unk>": 0, "</s>": 1, "a": 2, "<": 3, "/s>": 4}
    backend = Backend(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert [ids.tolist() for ids in tokenizer.encode_batch(["a </s> a", "a", "", "b <unk>"])] == [
        [2, 3, 4, 2],
        [2],
        [],
        [0, 0],
    ]


def test_words_tags_and_spaces_among_added_tokens_stay_tokens(hf_folder):
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(hf_folder / "tokenizer.json"))
    ids = load_tokenizer(str(hf_folder)).encode_batch(["newword<td>"])[0]
    assert ids.tolist() == [backend.token_to_id("newword"), backend.token_to_id("<td>")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(
            (text, True)
            for text in ("<|a|>", "<reserved_1>", "</s>", "<CLS>", "[/INST]", "<<SYS>>", "<unused9>", "<think>")
        ),
        *((text, True) for text in ("<｜begin▁of▁sentence｜>", "<extra_id_0>", "[PAD]")),
        *(
            (text, False)
            for text in ("<td>", "</H2>", "<br/>", "<0x0A>", "<!--", "<!DOCTYPE>", "-->", "[1]", "...", "  ")
        ),
        *((text, False) for text in ("word", "<", "<>", "[]", "a<b>", "＜", "")),
    ],
)
def test_markers_are_told_from_text(text, expected):
    assert looks_like_marker(text) is expected


def test_a_lone_surrogate_is_read_as_the_replacement_character(bpe, sentencepiece_file):
    for tokenizer in (bpe, load_tokenizer(str(sentencepiece_file))):
        broken, replaced, pair, emoji = tokenizer.encode_batch(["a\ud800b", "a\ufffdb", "\ud83d\ude00", "\U0001f600"])
        assert broken.tolist() == replaced.tolist()
        assert pair.tolist() == emoji.tolist()


def test_the_split_into_batches_changes_nothing(bpe):
    texts = [*TEXTS, "", "a</s><|end|>", "今" * 50]
    ids, lengths = bpe.encode_flat(texts)
    assert ids.dtype == np.uint32
    assert lengths.tolist() == [len(bpe.encode_batch([text])[0]) for text in texts]
    assert np.concatenate(bpe.encode_batch(texts)).tolist() == ids.tolist()
    assert bpe.encode_batch([]) == []


# --- training ---


def test_training_gives_the_same_bytes_again_and_a_known_vocabulary():
    first, second = (train_byte_level_bpe(iter(CORPUS), 380).to_str() for _ in range(2))
    assert first == second
    vocabulary = json.loads(first)["model"]["vocab"]
    assert len(vocabulary) == 380
    assert [vocabulary["<|pad|>"], vocabulary["<|end|>"]] == [0, 1]


def test_numbers_lines_and_scripts_are_not_merged_across(bpe_file):
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(bpe_file))
    pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("I'm 25,使用Python\n\n  if x==1: é")]
    to_text = {byte: char for char, byte in zip(*_byte_alphabet(), strict=True)}
    written = [bytes(_byte(char, to_text) for char in piece).decode() for piece in pieces]
    assert written == [
        "I",
        "'",
        "m",
        " ",
        "2",
        "5",
        ",",
        "使用",
        "Python",
        "\n\n",
        " ",
        " if",
        " x",
        "==",
        "1",
        ":",
        " é",
    ]


def test_a_space_joins_the_han_word_that_follows(bpe_file):
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(bpe_file))
    # A space of its own would double the tokens of spaced Chinese, and make every second one trivial to predict.
    for text, pieces in {
        "山水 风云": ["山水", " 风云"],
        "用 Python 写": ["用", " Python", " 写"],
        "山  水": ["山", " ", " 水"],
    }.items():
        spans = [span for _, span in backend.pre_tokenizer.pre_tokenize_str(text)]
        assert [text[start:end] for start, end in spans] == pieces


def _byte_alphabet() -> tuple[list[str], list[int]]:
    """The byte that each character of a byte-level vocabulary stands for, as GPT-2 published it."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))], printable + others


def _byte(char: str, to_char: dict[int, str]) -> int:
    return next(byte for byte, other in to_char.items() if other == char)


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    message = (
        "vocab_size is too small: expected at least 258 (256 bytes and 2 special tokens), got 257; "
        "4096 suits small runs"
    )
    with pytest.raises(ConfigError) as caught:
        train_byte_level_bpe(TEXTS, 257)
    assert str(caught.value) == message


# --- loading ---


def test_what_is_known_of_a_loaded_tokenizer(bpe, bpe_file, hf_folder, sentencepiece_file):
    assert (bpe.name, bpe.vocab_size, bpe.pad_id, bpe.end_id) == ("tokenizer.json", 380, 0, 1)
    assert bpe.sha256 == hashlib.sha256(bpe_file.read_bytes()).hexdigest()
    hf = load_tokenizer(str(hf_folder))
    assert (hf.name, hf.vocab_size, hf.pad_id, hf.end_id) == (hf_folder.name, 388, 0, 380)
    listing = "".join(
        sorted(
            f"{hashlib.sha256((hf_folder / name).read_bytes()).hexdigest()}  {name}\n"
            for name in ("tokenizer.json", "tokenizer_config.json")
        )
    )
    assert hf.sha256 == hashlib.sha256(listing.encode()).hexdigest()
    from_file = load_tokenizer(str(hf_folder / "tokenizer.json"))
    assert (from_file.name, from_file.sha256, from_file.end_id) == ("tokenizer.json", hf.sha256, 380)
    sp = load_tokenizer(str(sentencepiece_file))
    assert (sp.name, sp.end_id, sp.pad_id, sp.unknown_id) == ("tiny.model", 2, 0, 0)
    assert sorted(sp.control_literals) == ["</s>", "<CLS>", "<reserved_106>", "<s>", "<unk>"]


def test_a_sentencepiece_folder_takes_its_end_token_from_the_settings(sentencepiece_file, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file.read_bytes())
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "</s>", "pad_token": "<s>"}')
    (tmp_path / "tokenizer_config.json").write_text(
        '{"eos_token": "<CLS>", "auto_map": {"AutoTokenizer": ["a.B", null]}}'
    )
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.control_literals[[*sorted(tokenizer.control_ids)].index(tokenizer.end_id)] == "<CLS>"
    assert tokenizer.pad_id == 1


def test_folders_in_other_forms_go_through_transformers(bpe_file, tmp_path):
    model = json.loads(bpe_file.read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps({**model["vocab"], "<|endoftext|>": 380}))
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(merge) for merge in model["merges"]))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.end_id, tokenizer.vocab_size) == (380, 381)
    assert control_in(tokenizer, ["a<|endoftext|>b"]) == set()


def test_tokenizers_written_in_python_are_covered_too(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.pad_id, tokenizer.end_id) == (0, 1)
    assert tokenizer.encode_batch(["a</s>", "<extra_id_0>b"])[0].tolist() == [byte + 3 for byte in b"a</s>"]
    assert control_in(tokenizer, ["a</s><pad><extra_id_0>b"]) == set()


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    random_gguf(path)
    return path


def test_the_tokenizer_of_a_gguf_file_has_its_tokens_and_no_others(gguf_file):
    tokenizer = load_tokenizer(str(gguf_file))
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.end_id, tokenizer.pad_id) == ("tiny.gguf", 259, 258, 258)
    assert tokenizer.sha256 == hashlib.sha256(gguf_file.read_bytes()).hexdigest()
    assert tokenizer.control_ids == {258}
    vocabulary = gguf_vocabulary()
    (ids,) = tokenizer.encode_batch(["abcab a<|end|><|endoftext|>"])
    pieces = [vocabulary[index] for index in ids]
    assert pieces == ["abc", "ab", "Ġ", "a", *"<|end|><|endoftext|>"]


def test_gguf_files_that_cannot_be_read_are_named(gguf_file, tmp_path, monkeypatch):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF and no more")
    with pytest.raises(ModelError) as caught:
        load_tokenizer(str(tmp_path / "broken.gguf"))
    message = str(caught.value)
    assert message.startswith(f"tokenizer {tmp_path}/broken.gguf: transformers cannot read it (")
    assert message.endswith("); choose another tokenizer")
    assert "\n" not in message
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find_spec(name))
    with pytest.raises(ModelError) as caught:
        load_tokenizer(str(gguf_file))
    assert str(caught.value) == (
        f"tokenizer {gguf_file}: reading it needs the package gguf, which is not installed; "
        "run: pip install 'doremi-mix[gguf]'"
    )


def test_loading_errors_say_what_to_do(tmp_path, monkeypatch):
    import huggingface_hub

    def offline(*args: object, **options: object) -> str:
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "broken.model").write_text("{")
    (tmp_path / "vocab.bin").write_text("{")
    no_end = tmp_path / "no_end"
    no_end.mkdir()
    words = {"type": "WordLevel", "vocab": {"[UNK]": 0}, "unk_token": "[UNK]"}
    (no_end / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": words}))
    messages = {
        "org/name": "tokenizer org/name: no such file or folder, and the Hugging Face hub did not give it "
        "(ConnectionError); check the name and the connection, or give a local path",
        "./none": "tokenizer ./none: no such file or folder; give an existing path or a Hugging Face hub name",
        f"{tmp_path}/empty": f"tokenizer {tmp_path}/empty: the folder holds no tokenizer; expected tokenizer.json, "
        "tokenizer.model or vocab.json; give a folder with one of these, or leave the tokenizer out to train one on "
        "the data",
        f"{tmp_path}/broken.json": f"tokenizer {tmp_path}/broken.json: not a tokenizer.json of the tokenizers library "
        "(EOF while parsing an object at line 1 column 1); choose another tokenizer",
        f"{tmp_path}/broken.model": f"tokenizer {tmp_path}/broken.model: not a SentencePiece model; choose another "
        "tokenizer",
        f"{tmp_path}/vocab.bin": f"tokenizer {tmp_path}/vocab.bin: expected a folder, a tokenizer.json, a "
        'SentencePiece .model or a .gguf file, got a file ending in ".bin"; give the path of one of these',
        str(
            no_end
        ): "tokenizer no_end: no end token: expected one to end each response with, got none (none is named); "
        "set eos_token in its tokenizer_config.json to one of its special tokens, or choose another tokenizer",
    }
    for name, message in messages.items():
        with pytest.raises(ModelError) as caught:
            load_tokenizer(name)
        assert str(caught.value) == message


# --- the real tokenizer of Baichuan2 ---


@pytest.fixture(scope="module")
def baichuan(shared_data):
    return load_tokenizer(str(shared_data / "contest" / "baichuan2_tokenizer"))


def test_baichuan_gives_the_ids_of_sentencepiece(baichuan, shared_data):
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(
        model_file=str(shared_data / "contest" / "baichuan2_tokenizer" / "tokenizer.model")
    )
    rng = random.Random(0)
    words = [
        "hello",
        " world",
        "今天",
        "天气",
        "\n",
        "\t",
        "  ",
        "12345",
        "３",
        "<td>",
        "</p>",
        "```",
        "---",
        "é",
        "😀",
        "[",
    ]
    texts = ["".join(rng.choices(words, k=rng.randint(0, 12))) for _ in range(300)]
    texts += [model.id_to_piece(rng.randrange(1089, 125_696)).replace("▁", " ") for _ in range(300)]
    assert [ids.tolist() for ids in baichuan.encode_batch(texts)] == model.encode(texts)
    assert (baichuan.vocab_size, baichuan.end_id, baichuan.pad_id) == (125_696, 2, 0)
    assert {1, 2, 3, 4, 195, 196} <= baichuan.control_ids
    assert not {5, 6, 7, 13, 40, 62, 84} & baichuan.control_ids


@fuzz
@given(st.lists(attacks, max_size=4))
def test_no_text_becomes_a_control_token_of_baichuan(baichuan, texts):
    assert control_in(baichuan, texts) == set()
