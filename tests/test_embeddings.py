"""Hashed n-grams against their definition in plain Python, and the states of tiny models against one text at a time."""

import json
import math
import unicodedata
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import tokenizers
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from doremi_mix.errors import ConfigError, ModelError
from doremi_mix.filters import embeddings
from doremi_mix.filters.embeddings import ModelEmbedder, ngram_embeddings

# --- n-grams --------------------------------------------------------------------------------------------------------

M64 = (1 << 64) - 1


def fold(character):
    folded = character.casefold()
    return folded if len(folded) == 1 else character


def plain_embedding(text, dimensions, sizes, seed):
    """The definition, with Python's integers."""
    mixer, slot_mixer, *multipliers = (
        int(word) | 1 for word in np.random.SeedSequence(seed).generate_state(max(sizes) + 2, np.uint64)
    )
    words = "".join(map(fold, unicodedata.normalize("NFKC", text or ""))).split()
    vector = [0.0] * dimensions
    if not words:
        return vector
    text = f" {' '.join(words)} "
    num_slots = 1
    while num_slots < 4 * len(text):
        num_slots *= 2
    for size in set(sizes):
        hashes = []
        for start in range(len(text) - size + 1):
            total = sum(ord(text[start + place]) * multipliers[place] for place in range(size)) & M64
            hashes.append((total ^ total >> 32) * mixer & M64)
        slots = [(value * slot_mixer & M64) * num_slots >> 64 for value in hashes]
        counts = Counter(slots)
        for value, slot in zip(hashes, slots, strict=True):
            place = (value >> 32) * 2 * dimensions >> 32
            sign = -1 if place % 2 else 1
            vector[place // 2] += sign * (1 + math.log(counts[slot])) / counts[slot]
    length = math.sqrt(sum(value**2 for value in vector))
    return [value / (length or 1) for value in vector]


TEXTS = [
    "Spring rain falls on the river; the river rises.",
    "",
    "春江潮水连海平，海上明月共潮生。",
    None,
    " \t\n\u3000 ",
    "a",
    "水",
    "ab " * 200,
    "ＦＵＬＬ　ｗｉｄｔｈ ﬁne ΟΔΟΣ Straße İ",
    "👩‍👩‍👧 emoji \U0001f600\U0001f600",
    "x" * 3000,
    "line\r\n\r\nbreaks\u2028and\u00a0spaces",
]


@pytest.mark.parametrize(
    ("dimensions", "sizes", "seed"), [(256, (1, 2, 3), 0), (7, (2, 4), 5), (1, (1,), 1), (64, (3, 5, 3), 2)]
)
def test_vectors_are_those_of_the_definition(dimensions, sizes, seed):
    vectors = ngram_embeddings(pa.array(TEXTS), dimensions=dimensions, ngram_sizes=sizes, seed=seed)
    expected = [plain_embedding(text, dimensions, sizes, seed) for text in TEXTS]
    assert (vectors.dtype, vectors.shape) == (np.float32, (len(TEXTS), dimensions))
    np.testing.assert_allclose(vectors, expected, rtol=0, atol=1e-6)


@given(st.lists(st.none() | st.text(st.sampled_from("ab AB\n水，,ﬁß\u0301e\U0001f600"), max_size=30), max_size=12))
@settings(deadline=None, max_examples=60)
def test_any_texts(texts):
    vectors = ngram_embeddings(pa.array(texts, pa.string()), dimensions=16)
    expected = np.array([plain_embedding(text, 16, (1, 2, 3), 0) for text in texts]).reshape(-1, 16)
    np.testing.assert_allclose(vectors, expected, rtol=0, atol=1e-6)
    lengths = np.linalg.norm(vectors, axis=1)
    assert ((np.abs(lengths - 1) < 1e-5) | (lengths == 0)).all()


def test_a_vector_is_the_same_to_the_bit_in_whatever_batch(monkeypatch):
    texts = pa.array(TEXTS * 3, pa.large_string())
    together = ngram_embeddings(texts)
    assert together.any(1).tolist() == [bool(text and text.split()) for text in TEXTS] * 3
    for start, stop in ((0, 1), (3, 20), (5, 5), (20, 36)):
        assert (ngram_embeddings(texts[start:stop]) == together[start:stop]).all()
    for size, number in ((1, 1024), (100, 3), (10**9, 7)):
        monkeypatch.setattr(embeddings, "_CHUNK_BYTES", size)
        monkeypatch.setattr(embeddings, "_CHUNK_TEXTS", number)
        assert (ngram_embeddings(texts) == together).all()
        assert (ngram_embeddings(texts.cast(pa.string())) == together).all()


def test_case_width_and_white_space_do_not_count():
    vectors = ngram_embeddings(pa.array(["Spring rain", "  SPRING \n\t rain ", "Ｓｐｒｉｎｇ　ｒａｉｎ"]))
    assert (vectors == vectors[0]).all()


ALIKE = [
    ("How do I bake bread? Mix flour, yeast and water, let the dough rise, then bake it.", 0),
    ("Baking bread: flour, water and yeast make a dough that must rise before you bake it.", 0),
    ("Stock markets fell on Friday as investors worried about higher interest rates.", 1),
    ("Investors' worries about rising interest rates made stock markets fall again.", 1),
    ("如何烤面包？把面粉、酵母和水混合，让面团发酵，然后烘烤。", 2),
    ("烤面包需要面粉、酵母和水，面团发酵以后再烘烤。", 2),
    ("由于投资者担心利率上升，周五股票市场下跌。", 3),
    ("股票市场又下跌了，投资者担心利率继续上升。", 3),
]


@pytest.mark.parametrize("seed", range(5))
def test_texts_that_share_content_are_nearest_in_english_and_chinese(seed):
    texts, topics = zip(*ALIKE, strict=True)
    vectors = ngram_embeddings(pa.array(texts), seed=seed)
    cosines = vectors @ vectors.T - 2 * np.eye(len(texts))
    assert [topics[other] for other in cosines.argmax(1)] == list(topics)


def test_cosines_are_those_of_all_ngrams_up_to_noise_that_falls_with_the_dimensions():
    def counts_of(text):
        text = f" {text} "
        return Counter(text[start : start + size] for size in (1, 2, 3) for start in range(len(text) - size + 1))

    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdefgh "), 60)) for _ in range(30)]
    texts = [" ".join(text.split()) for text in texts]
    counts = [counts_of(text) for text in texts]
    names = sorted(set().union(*counts))
    table = np.array([[1 + math.log(c[name]) if name in c else 0.0 for name in names] for c in counts])
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    exact = table @ table.T
    errors = []
    for dimensions in (64, 1024):
        vectors = ngram_embeddings(pa.array(texts), dimensions=dimensions)
        errors.append(np.sqrt(np.mean((vectors @ vectors.T - exact) ** 2)))
    assert errors[0] < 1.2 / math.sqrt(64)
    assert errors[1] < 1.2 / math.sqrt(1024)


def test_the_seed_changes_the_hash():
    vectors = [ngram_embeddings(pa.array(["Spring rain"]), seed=seed)[0] for seed in (0, 0, 1)]
    assert (vectors[0] == vectors[1]).all()
    assert abs(vectors[0] @ vectors[2]) < 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dimensions": 0}, "dimensions must be at least 1, got 0"),
        ({"ngram_sizes": ()}, "ngram_sizes must be sizes of at least 1, got []"),
        ({"ngram_sizes": (2, 0)}, "ngram_sizes must be sizes of at least 1, got [2, 0]"),
    ],
)
def test_settings_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 (the whole message is compared)
        ngram_embeddings(pa.array(["a"]), **arguments)
    assert str(refusal.value) == message


# --- models ---------------------------------------------------------------------------------------------------------

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "</s>", *"abcdefghij", "水", "火"]


def save_tokenizer(folder, *, frame):
    """A tokenizer of words; with a frame it puts [CLS] and [SEP] around a text, as BERT's does."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "</s>"])
    if frame:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "eos_token": "</s>"}
    if frame:
        names |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
        initializer_range=0.5,
    )
    transformers.BertModel(config).save_pretrained(folder)
    save_tokenizer(folder, frame=True)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A causal language model in a folder without a tokenizer, as our own runs save it, and its tokenizer's folder."""
    folder, words = tmp_path_factory.mktemp("llama"), tmp_path_factory.mktemp("words")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=4,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(words, frame=False)
    return folder, words


def word_texts(rng, number, longest):
    return [" ".join(rng.choice(WORDS[5:], rng.integers(1, longest))) for _ in range(number)]


def mean_of(hidden):
    mean = hidden.mean(0)
    return (mean / mean.norm()).numpy()


@torch.no_grad()
def test_an_encoders_vector_is_the_mean_of_the_states_of_the_texts_own_tokens(bert):
    texts = ["a b c", "水 火 a", "j", "a [SEP] b"]
    vectors = ModelEmbedder(str(bert)).embed(pa.array(texts))
    model = transformers.AutoModel.from_pretrained(bert)
    for text, vector in zip(texts, vectors, strict=True):
        # A spelled-out control token is ordinary text, here three unknown words.
        ids = [WORDS.index(word) for word in text.replace("[SEP]", "[UNK] [UNK] [UNK]").split()]
        hidden = model(torch.tensor([[2, *ids, 3]])).last_hidden_state[0, 1:-1]
        np.testing.assert_allclose(vector, mean_of(hidden), rtol=0, atol=1e-6)


@torch.no_grad()
def test_our_own_runs_model_is_read_with_the_tokenizer_of_its_run(llama):
    folder, words = llama
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    expected = [
        mean_of(model.model(torch.tensor([[WORDS.index(word) for word in text.split()]])).last_hidden_state[0])
        for text in ("a b c", "水 火 a")
    ]
    for tokenizer in (words, words / "tokenizer.json"):
        vectors = ModelEmbedder(str(folder), str(tokenizer)).embed(pa.array(["a b c", "水 火 a"]))
        np.testing.assert_allclose(vectors, expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_begin_token_is_seen_but_not_averaged(llama, tmp_path):
    folder, words = llama
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.config.bos_token_id = 4
    model.save_pretrained(tmp_path)
    hidden = model.model(torch.tensor([[4, 5, 6]])).last_hidden_state[0, 1:]
    vectors = ModelEmbedder(str(tmp_path), str(words)).embed(pa.array(["a b", "a b c d e f"]))
    np.testing.assert_allclose(vectors[0], mean_of(hidden), rtol=0, atol=1e-6)
    # Cut to three tokens, of which the first is the begin token.
    cut = ModelEmbedder(str(tmp_path), str(words), max_tokens=3).embed(pa.array(["a b c d e f"]))
    np.testing.assert_allclose(cut[0], mean_of(hidden), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_vector_does_not_depend_on_the_texts_beside_it(kind, bert, llama):
    rng = np.random.default_rng(0)
    texts = [*word_texts(rng, 60, 30), "", None, *word_texts(rng, 5, 5)]
    place = [str(bert)] if kind == "bert" else [str(folder) for folder in llama]
    alone = np.concatenate([ModelEmbedder(*place).embed(pa.array([text], pa.string())) for text in texts[::8]])
    for tokens in (1, 50, 100_000):
        vectors = ModelEmbedder(*place, tokens_per_batch=tokens).embed(pa.array(texts))
        assert (vectors.dtype, vectors.shape) == (np.float32, (len(texts), 16))
        np.testing.assert_allclose(vectors[::8], alone, rtol=0, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [bool(text) for text in texts], atol=1e-5)


def test_batches_hold_texts_of_one_length_and_no_more_tokens_than_asked_for(bert):
    embedder = ModelEmbedder(str(bert), tokens_per_batch=64)
    shapes, forward = [], embedder.model.forward

    def spy(input_ids, attention_mask):
        shapes.append((tuple(input_ids.shape), int(attention_mask.sum())))
        return forward(input_ids=input_ids, attention_mask=attention_mask)

    embedder.model.forward = spy
    rng = np.random.default_rng(0)
    embedder.embed(pa.array(word_texts(rng, 200, 30)))
    assert all(rows * width <= 64 for (rows, width), _ in shapes)
    assert sum(tokens for _, tokens in shapes) > 0.95 * sum(rows * width for (rows, width), _ in shapes)


@torch.no_grad()
def test_long_texts_are_cut_at_max_tokens_or_where_the_model_ends(bert):
    rng = np.random.default_rng(0)
    long = " ".join(rng.choice(WORDS[5:], 300))
    model = transformers.AutoModel.from_pretrained(bert)
    for max_tokens, kept in ((None, 38), (10, 8)):
        embedder = ModelEmbedder(str(bert), max_tokens=max_tokens)
        assert embedder.max_tokens == kept + 2
        ids = [2, *(WORDS.index(word) for word in long.split()[:kept]), 3]
        hidden = model(torch.tensor([ids])).last_hidden_state[0, 1:-1]
        np.testing.assert_allclose(embedder.embed(pa.array([long]))[0], mean_of(hidden), rtol=0, atol=1e-6)


def test_no_texts(bert):
    embedder = ModelEmbedder(str(bert))
    assert embedder.embed(pa.array([], pa.string())).shape == (0, 16)
    assert not embedder.embed(pa.array(["", None])).any()


def test_a_model_with_an_adapter_is_read(llama, tmp_path):
    from doremi_mix.adapters import LoraSettings
    from doremi_mix.models import TokenInfo, build_model, forget_base, save_model

    folder, words = llama
    try:
        adapted = build_model(str(folder), TokenInfo(len(WORDS), 4, 0), 16, 0, lora=LoraSettings(rank=2))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        save_model(adapted, tmp_path)
        with torch.no_grad():
            expected = mean_of(adapted.model.base_model(torch.tensor([[5, 6]])).last_hidden_state[0])
        vectors = ModelEmbedder(str(tmp_path), str(words)).embed(pa.array(["a b"]))
        np.testing.assert_allclose(vectors[0], expected, rtol=0, atol=1e-6)
        assert np.abs(vectors - ModelEmbedder(str(folder), str(words)).embed(pa.array(["a b"]))).max() > 0.01
    finally:
        forget_base()


def refusal_of(*arguments, **settings):
    with pytest.raises((ModelError, ConfigError)) as refusal:
        ModelEmbedder(*map(str, arguments), **settings)
    assert "\n" not in str(refusal.value)
    return type(refusal.value), str(refusal.value)


def test_what_cannot_be_loaded_is_one_line(bert, llama, tmp_path):
    folder, _ = llama
    kind, message = refusal_of(tmp_path)
    assert kind is ModelError
    assert message.startswith(f"model {tmp_path}: cannot be loaded (")
    assert message.endswith("); give the folder of an encoder or of a causal language model")
    kind, message = refusal_of(folder)
    assert kind is ModelError
    assert message.startswith(f"model {folder}: gives no tokenizer of its own (")
    assert message.endswith("); name one beside it")
    kind, message = refusal_of(folder, tmp_path / "none")
    assert (kind, message) == (
        ModelError,
        f"tokenizer {tmp_path / 'none'}: no such file or folder; give an existing path or a Hugging Face hub name",
    )
    assert refusal_of(bert, max_tokens=41) == (
        ModelError,
        f"model {bert}: takes 40 positions, max_tokens is 41; set 40 or less",
    )
    assert refusal_of(bert, max_tokens=0) == (ConfigError, "max_tokens must be at least 1, got 0")
    assert refusal_of(bert, tokens_per_batch=0) == (ConfigError, "tokens_per_batch must be at least 1, got 0")


def test_a_tokenizer_of_another_model_is_found_out(llama, tmp_path):
    folder, words = llama
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 10}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    model.save_pretrained(tmp_path)
    embedder = ModelEmbedder(str(tmp_path), str(words))
    assert embedder.embed(pa.array(["a b"])).any()
    with pytest.raises(ModelError) as refusal:
        embedder.embed(pa.array(["a b", "水"]))
    assert str(refusal.value) == (
        f"model {tmp_path}: has 10 embeddings, but its tokenizer makes id 15; give the model's own tokenizer"
    )
