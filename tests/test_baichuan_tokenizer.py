import hashlib
import itertools
import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_baichuan import train_tiny_tokenizer

from doremi_mix import learn
from doremi_mix.baichuan.tokenizer import copy_tokenizer, load_hf_tokenizer
from doremi_mix.bpe import train_byte_level_bpe
from doremi_mix.errors import ModelError
from doremi_mix.tokenizer import Tokenizer, load_tokenizer
from doremi_mix.tokens import CONTEST_TEMPLATE, encode_examples
from doremi_mix.types import Example

TINY_SIZE = 700
PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
MARKER = re.compile(r"<(reserved_\d+|SEP|CLS)>")

PARTS = [
    *("The quick brown fox", " jumps", "Marshall", " Sylvia", "superficial", "It's", " don't", "e.g.", "a", " b"),
    *(
        "今天天气很好",
        "数据混合权重",
        "，",
        "。。。。",
        "《红楼梦》",
        "的我们",
        "是了",
        "１２",
        "日本語テキスト",
        "한국어",
    ),
    *(
        "def f(x):\n    return x ** 2\n",
        "if (a <= b && c != d) {",
        "```python\n",
        "x += 1;",
        "\\n",
        "--",
        "=====",
        "...",
    ),
    *("\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "\u2764\ufe0f", "\u200d"),
    *("<td>", "</td>", '<a href="x">', "<br/>", "<!--", "-->", "&nbsp;", "<h2", "</", "<", ">", "/>"),
    *(" ", "  ", "\t", "\n", "\n\n", "\r\n", "\u3000", "\u00a0", "\u2003", " " * 17, "\n" * 5, "\ufeff", "\x00"),
    *("0", "7", "1234567890", "3.14", "1,000", "\u0663"),
    *(
        "<s>",
        "</s>",
        "<unk>",
        "<pad>",
        "<reserved_106>",
        "<reserved_107>",
        "<0x0A>",
        "▁",
        "<SEP>",
        "<reserved_",
        "106>",
    ),
    *("reserved_106>", "<<reserved_106>>", "<reserved_106", "s>", "<s"),
    *("\ud800", "\udc00", "\ud83d", "\ude00"),
]
texts_of_parts = st.lists(st.one_of(st.sampled_from(PARTS), st.text(max_size=5)), max_size=12).map("".join)
fuzz = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", params=["tiny", "real"])
def vendor(request, tmp_path_factory):
    """A folder with tokenizer files as they are published."""
    if request.param == "tiny":
        return train_tiny_tokenizer(tmp_path_factory.mktemp("vendor"), TINY_SIZE)
    return request.getfixturevalue("shared_data") / "contest" / "baichuan2_tokenizer"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return train_tiny_tokenizer(tmp_path_factory.mktemp("tiny"), TINY_SIZE)


@pytest.fixture(scope="module")
def plain(vendor):
    """SentencePiece itself."""
    return sentencepiece.SentencePieceProcessor(model_file=str(vendor / "tokenizer.model"))


@pytest.fixture(scope="module")
def converted(vendor, plain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    copy_tokenizer(vendor, folder, plain.vocab_size())
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": plain.vocab_size()})
    )
    return folder


@pytest.fixture(scope="module")
def hf(converted):
    return load_hf_tokenizer(converted)


@pytest.fixture(scope="module")
def own(vendor):
    return load_tokenizer(str(vendor / "tokenizer.model"))


@pytest.fixture(scope="module")
def ours(vendor, converted, own):
    return {
        "file": own,
        "vendor's folder": load_tokenizer(str(vendor)),
        "converted folder": load_tokenizer(str(converted)),
    }


@pytest.fixture(scope="module")
def encoders(converted, ours, hf):
    """Everything that encodes, by name: functions from texts to lists of ids."""
    from transformers import AutoTokenizer

    bare = AutoTokenizer.from_pretrained(str(converted))
    return {
        **{
            name: lambda texts, one=one: [ids.tolist() for ids in one.encode_batch(texts)] for name, one in ours.items()
        },
        "evaluation": lambda texts: hf(texts, add_special_tokens=False)["input_ids"],
        "evaluation, one by one": lambda texts: [hf.encode(text) for text in texts],
        "AutoTokenizer": lambda texts: bare([readable(text) for text in texts])["input_ids"],
    }


def readable(text: str) -> str:
    """Halves of characters joined, and those without a partner replaced."""
    joined = re.sub("[\ud800-\udbff][\udc00-\udfff]", lambda pair: _join(*map(ord, pair[0])), text)
    return re.sub("[\ud800-\udfff]", "\ufffd", joined)


def _join(high: int, low: int) -> str:
    return chr(0x10000 + ((high - 0xD800) << 10) + low - 0xDC00)


@pytest.fixture(scope="module")
def control(plain):
    return control_ids(plain)


def control_ids(plain) -> set[int]:
    """The ids that no text may get: unk, bos, eos and what looks like a marker."""
    return {0, 1, 2, *(id_ for id_ in range(plain.vocab_size()) if MARKER.fullmatch(plain.id_to_piece(id_)))}


# --- ids ---


@fuzz
@given(st.lists(texts_of_parts, min_size=1, max_size=6))
def test_every_reader_gives_the_ids_of_sentencepiece_and_never_a_control_token(plain, control, encoders, texts):
    expected = plain.encode([readable(text) for text in texts])
    for name, encode in encoders.items():
        for text, ids, wanted in zip(texts, encode(texts), expected, strict=True):
            if control.isdisjoint(wanted):
                assert ids == wanted, (name, text)
            else:  # SentencePiece makes a marker of its spelling
                assert control.isdisjoint(ids), (name, text)
                assert plain.decode(ids) == readable(text).replace("▁", " "), (name, text)


def test_spelled_control_tokens_are_text_for_every_reader(plain, control, encoders):
    literals = ["<s>", "</s>", "<unk>", "<reserved_106>", "<reserved_107>"]
    texts = [text for word in literals for text in (word, f"a{word}b", word * 3, f"\n{word}</td>", f" {word} ")]
    assert not control.isdisjoint(itertools.chain.from_iterable(plain.encode(texts)))
    for name, encode in encoders.items():
        for text, ids in zip(texts, encode(texts), strict=True):
            assert control.isdisjoint(ids), (name, text)
            assert plain.decode(ids) == text, name


def test_every_piece_as_a_text_of_its_own(plain, encoders):
    """Also those that SentencePiece itself does not reach, because it merges their parts in another order."""
    texts = [plain.id_to_piece(id_).replace("▁", " ") for id_ in range(plain.vocab_size())]
    texts = [text for text in texts if not MARKER.fullmatch(text)]
    assert encoders["converted folder"](texts) == plain.encode(texts)


def test_random_pieces_in_a_row(plain, encoders):
    rng = random.Random(0)
    pieces = [plain.id_to_piece(id_).replace("▁", " ") for id_ in range(plain.vocab_size()) if not plain.is_byte(id_)]
    pieces = [piece for piece in pieces if not MARKER.fullmatch(piece)]
    texts = ["".join(rng.choices(pieces, k=rng.randint(2, 8))) for _ in range(4000)]
    texts += [char * length for char in " -=.\n\t#哈。a" for length in range(1, 120)]
    expected = plain.encode(texts)
    for name in ("file", "converted folder", "evaluation"):
        assert encoders[name](texts) == expected


def by_scores_reversed(source: Path, folder: Path) -> Path:
    """A vendor's folder whose learned pieces rank in an order that is not that of their ids, as in Baichuan2."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((source / "tokenizer.model").read_bytes())
    learned = [piece for piece in proto.pieces if piece.type == piece.NORMAL]
    for piece, score in zip(learned, [piece.score for piece in learned][::-1], strict=True):
        piece.score = score
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    return folder


def test_merges_go_by_the_scores_and_not_by_the_ids(tiny, tmp_path):
    source = by_scores_reversed(tiny, tmp_path / "source")
    copy_tokenizer(source, tmp_path / "converted", TINY_SIZE)
    plain = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    rng = random.Random(0)
    texts = ["".join(rng.choices("bdfghklmnprstvwaeiou  ", k=30)) for _ in range(500)]
    tokenizer = load_tokenizer(str(tmp_path / "converted"))
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == plain.encode(texts)
    assert load_hf_tokenizer(source)(texts)["input_ids"] == plain.encode(texts)
    # The class that the model's own type asks for builds the merges in the order of the ids.
    from transformers import LlamaTokenizer

    bare = LlamaTokenizer.from_pretrained(str(source), add_prefix_space=False, add_bos_token=False)
    assert bare(texts)["input_ids"] != plain.encode(texts)


def test_what_is_known_of_our_tokenizers_does_not_depend_on_the_form(plain, control, ours):
    for tokenizer in ours.values():
        assert tokenizer.control_ids == control
        assert (tokenizer.end_id, tokenizer.pad_id, tokenizer.unknown_id) == (2, 0, 0)
        assert tokenizer.vocab_size == plain.vocab_size()


# --- decoding ---


def id_lists(size):
    return st.lists(st.one_of(st.integers(3, size - 1), st.integers(3, min(size, 1400) - 1)), max_size=12)


@fuzz
@given(st.data())
def test_generated_ids_decode_as_sentencepiece_decodes_them(plain, hf, data):
    ids = data.draw(id_lists(plain.vocab_size()))
    assert hf.decode(ids, skip_special_tokens=True) == plain.decode(ids)
    assert hf.decode(ids) == plain.decode(ids)
    assert hf.batch_decode([ids, ids], skip_special_tokens=True) == [plain.decode(ids)] * 2


@fuzz
@given(texts_of_parts)
def test_a_text_comes_back(hf, text):
    assert hf.decode(hf.encode(text), skip_special_tokens=True) == readable(text).replace("▁", " ")


def test_a_character_before_a_broken_one_is_kept(plain, hf):
    pieces = {plain.id_to_piece(id_): id_ for id_ in range(plain.vocab_size())}
    ids = [pieces[f"<0x{byte:02X}>"] for byte in "\U0001f9ff\U0001f9ff".encode()[:-1]]
    assert hf.decode(ids).startswith("\U0001f9ff")
    assert not hf.backend_tokenizer.decode(ids).startswith("\U0001f9ff")  # transformers' own loses it


def test_control_tokens_show_only_where_they_are_asked_for(plain, hf):
    (newline,) = plain.encode("\n")
    ids = [1, *plain.encode("ab"), newline, 2, 0]
    assert hf.decode(ids, skip_special_tokens=True) == "ab\n"
    assert hf.decode(ids, skip_special_tokens=False) == "<s>ab\n</s><unk>"
    assert hf.decode(2) == "</s>"
    assert hf.decode(np.array(plain.encode("a b"))) == "a b"
    assert plain.decode(ids) == "ab\n ⁇ "


# --- the transformers tokenizer as an evaluation uses it ---


def test_the_evaluation_can_pad_cut_and_ask_for_the_special_ids(plain, hf):
    from transformers import PreTrainedTokenizerBase

    assert isinstance(hf, PreTrainedTokenizerBase)
    assert (hf.eos_token_id, hf.bos_token_id, hf.pad_token_id, hf.unk_token_id) == (2, 1, 0, 0)
    assert (len(hf), hf.model_max_length, hf.chat_template) == (plain.vocab_size(), 4096, None)
    long, short = plain.encode(["a b c d", "a"])
    batch = hf(["a b c d", "a"], padding="longest", return_tensors="np")
    padding = [0] * (len(long) - len(short))
    assert batch["input_ids"].tolist() == [long, [*padding, *short]]
    assert batch["attention_mask"].tolist() == [[1] * len(long), [*padding, *[1] * len(short)]]
    cut = hf(["a b c d"], truncation=True, max_length=2)["input_ids"]
    assert cut == [long[:2]]
    assert hf.encode("a", add_special_tokens=True) == short


def test_it_can_be_saved_and_loaded_again(hf, converted, tmp_path):
    hf.save_pretrained(tmp_path)
    shutil.copyfile(converted / "config.json", tmp_path / "config.json")
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(str(tmp_path))
    for text in ("Marshall </s> 数据\n\n  <reserved_106>", "<s>"):
        assert again.encode(text) == hf.encode(text)


@pytest.fixture(scope="module")
def marked_backend():
    """A byte-level BPE with markers, one of which is not declared special, a word and a tag."""
    backend = train_byte_level_bpe(["the quick brown fox <td> </s> 12"] * 20, 380)
    backend.add_special_tokens(["</s>"])
    backend.add_tokens(["<|user|>", "newword", "<td>"])
    backend.enable_truncation(4)
    backend.enable_padding(length=4)
    return backend


def test_any_other_model_keeps_its_ids_and_its_markers_stay_text(marked_backend, tmp_path):
    marked_backend.save(str(tmp_path / "tokenizer.json"))
    # LlamaTokenizer, which this config names, would put SentencePiece's rules around the vocabulary.
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>", "chat_template": "<|user|>{{ messages }}"}')
    hf, own = load_hf_tokenizer(str(tmp_path)), load_tokenizer(str(tmp_path))
    texts = ["<|end|> a longer text that is not cut \ud800", "the quick </s> newword<td>"]
    assert hf(texts)["input_ids"] == [ids.tolist() for ids in own.encode_batch(texts)]
    ids = hf.encode("a<|user|></s> newword")
    assert own.control_ids.isdisjoint(ids)
    assert marked_backend.token_to_id("<|user|>") in own.control_ids
    assert marked_backend.token_to_id("newword") in ids
    assert hf.decode(ids) == "a<|user|></s> newword"
    assert (hf.eos_token_id, hf.pad_token, hf.chat_template) == (own.end_id, "<|pad|>", None)


def test_a_tokenizer_written_in_python_is_taken_too(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    hf = load_hf_tokenizer(tmp_path)
    assert hf("a</s>\ud800", add_special_tokens=False)["input_ids"] == [byte + 3 for byte in "a</s>\ufffd".encode()]
    assert (hf.eos_token_id, hf.pad_token_id) == (1, 0)


def test_a_tokenizer_that_cannot_be_made_safe_is_refused(tmp_path):
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    backend = Backend(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelError) as caught:
        load_hf_tokenizer(tmp_path)
    assert str(caught.value) == (
        f"tokenizer {tmp_path}: transformers makes a control token of the text '</s>'; declare it a special token in "
        "tokenizer.json, or evaluate another model"
    )


def test_the_files_alone_are_enough(tiny, tmp_path):
    texts = ["Marshall </s> 数据\n\n  <reserved_106>", "<s>", "a\ud800</td>", "  1 "]
    copy_tokenizer(tiny, tmp_path, TINY_SIZE)
    expected = load_hf_tokenizer(tmp_path)(texts)["input_ids"]
    for path in (tiny / "tokenizer.model", str(tiny), tmp_path / "tokenizer.json"):
        alone = load_hf_tokenizer(path)
        assert alone(texts)["input_ids"] == expected
        assert alone.decode(alone.encode(texts[0])) == texts[0]
        assert (alone.eos_token_id, alone.pad_token_id) == (2, 0)


def test_a_tokenizer_that_transformers_reads_otherwise_is_refused(tmp_path):
    folder = train(tmp_path / "prefix", add_dummy_prefix=True)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "add_prefix_space": false}')
    with pytest.raises(ModelError) as caught:
        load_hf_tokenizer(folder)
    assert str(caught.value) == (
        f"tokenizer {folder}: transformers gives other ids than training does for the text "
        "\"Marshall said that Sylvia's livelihoods depend on superficial things, doesn't it?\"; add a tokenizer.json "
        "that agrees with tokenizer.model, or evaluate another model"
    )


def test_a_tokenizer_that_needs_its_own_code_is_refused(tiny, tmp_path):
    folder = train(tmp_path / "prefix", add_dummy_prefix=True)
    shutil.copyfile(tiny / "tokenizer_config.json", folder / "tokenizer_config.json")
    with pytest.raises(ModelError) as caught:
        load_hf_tokenizer(folder)
    message = str(caught.value)
    assert message.startswith(f"tokenizer {folder}: transformers cannot load it (")
    assert message.endswith("); convert the model to a form that needs no code of its own")
    assert "\n" not in message


# --- the converted folder ---


def test_the_folder_holds_the_same_model_and_settings_without_code(vendor, converted):
    assert (converted / "tokenizer.model").read_bytes() == (vendor / "tokenizer.model").read_bytes()
    assert json.loads((converted / "tokenizer_config.json").read_text()) == {
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "model_max_length": 4096,
        "pad_token": "<unk>",
        "padding_side": "left",
        "split_special_tokens": True,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
    }


def test_a_second_copy_is_the_same_to_the_byte(tiny, tmp_path):
    names = ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
    for folder in (tmp_path / "new" / "first", tmp_path / "second"):
        copy_tokenizer(tiny, folder, TINY_SIZE)
        assert sorted(path.name for path in folder.iterdir()) == names
    for name in names:
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "new" / "first" / name).read_bytes()


def train(folder: Path, **options: object) -> Path:
    """A vendor's folder with a tokenizer of another form."""
    folder.mkdir()
    defaults = {"model_type": "bpe", "byte_fallback": True, "add_dummy_prefix": False}
    defaults |= {"remove_extra_whitespaces": False, "normalization_rule_name": "identity"}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog"] * 20),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=300,
        hard_vocab_limit=False,
        minloglevel=2,
        **{**defaults, **options},
    )
    return folder


def size_of(folder: Path) -> int:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).vocab_size()


def test_a_tokenizer_that_does_not_belong_is_refused_and_nothing_is_written(tiny, tmp_path):
    path = tiny / "tokenizer.model"
    cut = tmp_path / "cut"
    for name, content in {"cut": path.read_bytes()[:-100], "empty": b"", "text": b"<html>not found"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.model").write_bytes(content)
    (tmp_path / "none").mkdir()
    target = tmp_path / "target"
    cases = [
        (
            tmp_path / "none",
            700,
            "no such file: expected the SentencePiece model that is published with the weights; fetch it",
        ),
        (
            cut,
            700,
            f"not a SentencePiece model, or only a part of one ({path.stat().st_size - 100:,} bytes); fetch it again",
        ),
        (tmp_path / "empty", 700, "not a SentencePiece model, or only a part of one (0 bytes); fetch it again"),
        (tmp_path / "text", 700, "not a SentencePiece model, or only a part of one (15 bytes); fetch it again"),
        (
            tiny,
            125_696,
            "has 700 pieces, but config.json says vocab_size 125,696; take both files from the same model",
        ),
    ]
    others = {
        "ids": (
            {"bos_id": 2, "eos_id": 1},
            "expected the ids unk 0, bos 1, eos 2, got unk 0, bos 2, eos 1; this is no Baichuan2 tokenizer",
        ),
        "no_eos": (
            {"eos_id": -1},
            "expected the ids unk 0, bos 1, eos 2, got unk 0, bos 1, eos -1; this is no Baichuan2 tokenizer",
        ),
    }
    form = (
        "expected a BPE without normalization, added spaces or stripped ones, as Baichuan2's is, got other ids for the "
        "text {!r}; this is no Baichuan2 tokenizer"
    )
    first = "Marshall said that Sylvia's livelihoods depend on superficial things, doesn't it?"
    others["prefix"] = ({"add_dummy_prefix": True}, form.format(first))
    others["strip"] = (
        {"remove_extra_whitespaces": True},
        form.format("The quick brown fox jumps over the lazy dog. "),
    )
    others["nfkc"] = (
        {"normalization_rule_name": "nfkc"},
        form.format("今天天气很好，我们去公园散步吧。使用Python编程，共2024年１２月！"),
    )
    others["unigram"] = ({"model_type": "unigram"}, form.format("The quick brown fox jumps over the lazy dog. "))
    for name, (options, message) in others.items():
        folder = train(tmp_path / name, **options)
        cases.append((folder, size_of(folder), message))
    for source, vocab_size, message in cases:
        with pytest.raises(ModelError) as caught:
            copy_tokenizer(source, target, vocab_size)
        assert str(caught.value) == f"{source / 'tokenizer.model'}: {message}"
        assert not target.exists()


# --- the contest's tokenization ---


def contest_ids(plain, instruction: str, input_: str, output: str) -> tuple[list[int], list[int]]:
    """Each piece of the template by itself, and the ids put together: prompt and response."""
    query = instruction + "\n" + input_ if input_ else instruction
    pieces = [PREAMBLE, "\n\n", f"### Instruction:\n{query}\n\n### Response:\n"]
    return [id_ for piece in pieces for id_ in plain.encode(piece)], [*plain.encode(output), plain.eos_id()]


def assert_encoded_as_in_the_contest(plain, tokenizer: Tokenizer, rows) -> None:
    examples = [Example("d:1", "d", row["instruction"], row["input"], row["output"]) for row in rows]
    encoded = encode_examples(examples, tokenizer, CONTEST_TEMPLATE)
    expected = [contest_ids(plain, row["instruction"], row["input"], row["output"]) for row in rows]
    assert encoded.turn_lengths.tolist() == [[len(prompt), len(response)] for prompt, response in expected]
    assert encoded.token_ids.tolist() == [id_ for pair in expected for ids in pair for id_ in ids]


@fuzz
@given(st.lists(st.tuples(texts_of_parts, texts_of_parts, texts_of_parts), min_size=1, max_size=4))
def test_one_text_gives_the_ids_of_the_templates_pieces(plain, control, own, rows):
    """A line break is a piece by itself, so no token reaches over the borders."""
    rows = [[readable(text) for text in row] for row in rows if row[0]]
    rows = [row for row in rows if control.isdisjoint(plain.encode("\n".join(row)))]
    keys = ("instruction", "input", "output")
    assert_encoded_as_in_the_contest(plain, own, [dict(zip(keys, row, strict=True)) for row in rows])


@pytest.mark.parametrize("name", ["gpt4all_rows.jsonl", "mixture_rows.jsonl"])
def test_real_contest_rows_are_encoded_as_in_the_contest(shared_data, name):
    folder = shared_data / "contest"
    with (folder / name).open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    path = folder / "baichuan2_tokenizer" / "tokenizer.model"
    plain = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert_encoded_as_in_the_contest(plain, load_tokenizer(str(path)), rows)


# --- the whole pipeline with the SentencePiece file alone ---


def test_weights_are_learned_and_a_mixture_is_drawn_with_the_sentencepiece_file_alone(tiny, tmp_path):
    spelled = ["</s>", "<s>", "<reserved_106>", "<unk>", "<reserved_107> </s>", "</td>"]
    words = {"fruit": "apple pear plum fig lemon", "metal": "iron gold zinc lead tin", "数据": "数 据 混 合 权 重"}
    rng = random.Random(0)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name, choice in words.items():
        rows = [
            {
                "instruction": f"List {rng.choice(spelled)} {number}",
                "input": rng.choice(["", f"a {rng.choice(spelled)}"]),
                "output": " ".join(rng.choices(choice.split(), k=4)) + rng.choice(spelled),
            }
            for number in range(40)
        ]
        (corpus / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    model = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 16, "intermediate_size": 32}
    model |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 300}
    (tmp_path / "model.json").write_text(json.dumps({**model, "max_position_embeddings": 256}))
    path = tiny / "tokenizer.model"
    weights = learn(
        corpus,
        tmp_path / "run",
        token_budget=6000,
        quiet=True,
        tokenize={"tokenizer": str(path), "context_length": 256},
        reference={"model": str(tmp_path / "model.json"), "steps": 6, "batch_size": 6, "learning_rate": 0.01},
        proxy={"method": "doremi"},
    )
    assert sum(weights.domain_weights.values()) == pytest.approx(1, abs=1e-9)
    assert set(weights.domain_weights) == set(words)

    folder = tmp_path / "run" / "tokenize"
    known = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert (known["name"], known["vocab_size"], known["end_id"], known["pad_id"]) == (
        "tokenizer.model",
        TINY_SIZE,
        2,
        0,
    )
    assert known["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    store = json.loads((folder / "domains.json").read_text(encoding="utf-8"))
    assert [domain["truncated_examples"] for domain in store["domains"]] == [0, 0, 0]
    token_ids = np.fromfile(folder / "tokens.bin", store["token_type"])
    offsets = np.load(folder / "document_offsets.npy")
    plain = sentencepiece.SentencePieceProcessor(model_file=str(path))
    control = control_ids(plain)
    is_control = np.isin(token_ids, sorted(control))
    assert np.flatnonzero(is_control).tolist() == (offsets[1:] - 1).tolist()
    assert set(token_ids[is_control].tolist()) == {2}
    documents = [token_ids[start:end].tolist() for start, end in itertools.pairwise(offsets)]
    assert any("</s>" in plain.decode(ids) for ids in documents)
    assert any("<reserved_106>" in plain.decode(ids) for ids in documents)

    def pieces_of(text: str) -> list[int]:
        if control.isdisjoint(plain.encode(text)):
            return plain.encode(text)
        parts = re.split(r"(?<=<)(?=(?:/?s|unk|reserved_\d+)>)", text)  # cut behind the bracket of each spelling
        return [id_ for part in parts for id_ in plain.encode(part)]

    total = 0
    with (tmp_path / "run" / "mixture" / "mixture.jsonl").open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            query = row["instruction"] + ("\n" + row["input"] if row["input"] else "")
            prompt = f"{PREAMBLE}\n\n### Instruction:\n{query}\n\n### Response:\n"
            ids = [*pieces_of(prompt), *pieces_of(row["output"]), 2]
            assert ids in documents
            total += len(ids)
    allocation = json.loads((tmp_path / "run" / "mixture" / "allocation.json").read_text(encoding="utf-8"))
    assert 5000 < total == allocation["drawn_tokens"] <= 6000
