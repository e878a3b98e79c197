"""Losses of whole batches against a model that reads one text at a time, and the trees that make them fast."""

import itertools
import json
import math
import random

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st

from doremi_mix.adapters import LoraSettings
from doremi_mix.bpe import train_byte_level_bpe
from doremi_mix.errors import ConfigError, ModelError
from doremi_mix.filters.model_scores import COLUMNS, LOSS_COLUMNS, ModelScorer, derive
from doremi_mix.filters.prefix_packs import ScoredSequence, group_packs, lay_out, plan_packs, to_inputs, tree_mask
from doremi_mix.models import TokenInfo, build_model, save_model
from doremi_mix.tokens import Template

POSITIONS = 96
PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
WORDS = ["apple", "pear", "plum", "fig", "red", "green", "is", "a", "the", "of", "river", "江河", "湖海", "3", "+"]


def sentence(rng, longest):
    return " ".join(rng.choices(WORDS, k=rng.randint(1, longest)))


def row(instruction, output, input_="", history=(), system=""):
    turns = [{"user": user, "assistant": assistant} for user, assistant in history]
    return {"instruction": instruction, "input": input_, "output": output, "history": turns, "system": system}


@pytest.fixture(scope="module")
def rows():
    """Rows of every kind: short and long, with input, system prompt or earlier turns, repeated, empty, plain text."""
    rng = random.Random(0)
    made = [row(sentence(rng, 8), sentence(rng, 12)) for _ in range(8)]
    made += [row(sentence(rng, 6), sentence(rng, 4), input_=sentence(rng, 10)) for _ in range(4)]
    made += [row(made[0]["instruction"], sentence(rng, 6)) for _ in range(3)]
    made += [row(sentence(rng, 5), "plum") for _ in range(4)]
    made += [made[1], made[2], made[1]]
    made += [row(sentence(rng, 90), sentence(rng, 10)), row(sentence(rng, 5), " ".join(WORDS * 8))]
    made += [row(" ".join(WORDS * 6), " ".join(WORDS * 5)), row(" ".join(WORDS * 9), "fig")]
    made += [row("and then?", sentence(rng, 5), history=[("what is a fig?", "a fruit"), ("and plum", "red")])]
    made += [row("and then?", sentence(rng, 5), history=[(" ".join(WORDS * 7), "a fruit")], system="You know rivers.")]
    made += [row("name one", "", input_="of them"), row("", "fig"), row(None, sentence(rng, 20)), row(None, "")]
    made += [row(None, "plum"), row(None, " ".join(WORDS * 12)), row("say nothing", None)]
    return made


SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("instruction", "input", "output", "system")),
        ("history", pa.list_(pa.struct([("user", pa.string()), ("assistant", pa.string())]))),
    ]
)


def to_batch(some_rows):
    return pa.RecordBatch.from_pylist(some_rows, schema=SCHEMA)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, rows):
    """A model without a begin token, and its tokenizer.

    Its weights are large, so that a token more or less, or a position off by one, changes every loss.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("scoring") / "model"
    texts = [
        f"{r['instruction']} {r['input']} {r['output']} {PREAMBLE}\n\n### Instruction: ### Response:" for r in rows
    ]
    trained = train_byte_level_bpe(texts * 3, 400)
    config = LlamaConfig(
        vocab_size=420,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        initializer_range=0.4,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    trained.save(str(path / "tokenizer.json"))
    return path


def with_config(folder, path, **changes):
    """A copy of the model with another configuration."""
    path.mkdir()
    for file in folder.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    config = json.loads((path / "config.json").read_text(encoding="utf-8")) | changes
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def begin_folder(folder, tmp_path_factory):
    """The same with a begin token, id 0."""
    return with_config(folder, tmp_path_factory.mktemp("scoring") / "begin", bos_token_id=0)


@pytest.fixture(scope="module")
def scorer(folder):
    return ModelScorer(str(folder), device="cpu")


# --- the oracle: one text at a time, as the definition says ----------------------------------------------------------


@torch.no_grad()
def loss_after(model, context, ids):
    if not ids:
        return math.nan
    whole = torch.tensor([context + ids])
    logits = model(whole).logits[0, len(context) - 1 : -1]
    return float(F.cross_entropy(logits.double(), whole[0, len(context) :]))


def scores_by_hand(model, encode, some_rows, max_tokens, begin=None):
    """What ``score`` must return, for the contest's template, end token 1 and a begin token or none."""
    start = 1 if begin is None else begin
    found = {name: [] for name in COLUMNS}
    for r in some_rows:
        output = r["output"] or ""
        earlier = "".join(f"{turn['user']} {turn['assistant']} " for turn in r["history"])
        text = output if r["instruction"] is None else f"{earlier}{r['instruction']} {r['input']} {output}"
        text_ids = encode(text)[:max_tokens]
        found["text_loss"].append(loss_after(model, [start], text_ids))
        found["num_text_tokens"].append(len(text_ids))
        prompt, answer = [], []
        if r["instruction"] is not None and output:
            opening = (r["system"] or PREAMBLE) + "\n\n"
            for turn in r["history"]:
                prompt += encode(f"{opening}### Instruction:\n{turn['user']}\n\n### Response:\n")
                prompt += [*encode(turn["assistant"]), 1]
                opening = "\n\n"
            query = r["instruction"]
            if r["input"]:
                query = f"{query}\n{r['input']}" if query else r["input"]
            prompt += encode(f"{opening}### Instruction:\n{query}\n\n### Response:\n")
            answer = encode(output)
            p, a = len(prompt), len(answer) + 1  # the end token takes part in the cut, but is not scored
            if p + a > max_tokens:
                num_answer = max(1, max_tokens * a // (p + a))
                prompt, answer = prompt[: max_tokens - num_answer], answer[:num_answer]
        context = prompt if begin is None else [begin, *prompt]
        found["answer_loss"].append(loss_after(model, context, answer))
        found["answer_alone_loss"].append(loss_after(model, [start], answer))
        found["num_answer_tokens"].append(len(answer))
    return found


def encoder(scorer):
    return lambda text: scorer.tokenizer.encode_batch([text])[0].tolist()


def assert_same(found, expected, atol=2e-5):
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert found[name].dtype == (np.float32 if name in LOSS_COLUMNS else np.int32)
        np.testing.assert_allclose(found[name], values, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("tokens_per_batch", [1, 40, 300, None])
@pytest.mark.parametrize("begin", [None, 0])
def test_scores_are_those_of_one_text_at_a_time(folder, begin_folder, rows, begin, tokens_per_batch):
    scorer = ModelScorer(
        str(folder if begin is None else begin_folder), device="cpu", tokens_per_batch=tokens_per_batch
    )
    assert (scorer.begins, scorer.start_id) == ((False, 1) if begin is None else (True, 0))
    expected = scores_by_hand(scorer.model.model, encoder(scorer), rows, POSITIONS, begin)
    assert_same(scorer.score(to_batch(rows)), expected)
    # The comparison would be hollow if nothing was cut, or losses were alike.
    assert sum(count == POSITIONS for count in expected["num_text_tokens"]) >= 3
    assert np.nanstd(expected["answer_loss"]) > 0.5


def test_long_texts_are_cut_in_proportion(folder, rows):
    scorer = ModelScorer(str(folder), device="cpu", max_tokens=40)
    expected = scores_by_hand(scorer.model.model, encoder(scorer), rows, 40)
    assert_same(scorer.score(to_batch(rows)), expected)
    # A prompt that is far longer than its answer leaves one token of it.
    assert 1 in [n for r, n in zip(rows, expected["num_answer_tokens"], strict=True) if r["output"] == "fig"]


def test_neighbors_and_order_change_nothing(scorer, rows):
    whole = scorer.score(to_batch(rows))
    order = random.Random(1).sample(range(len(rows)), len(rows))
    shuffled = scorer.score(to_batch([rows[i] for i in order]))
    for name in COLUMNS:
        np.testing.assert_allclose(shuffled[name], whole[name][order], rtol=0, atol=2e-5)
    for start in range(0, len(rows), 7):
        part = scorer.score(to_batch(rows).slice(start, 7))
        for name in COLUMNS:
            np.testing.assert_allclose(part[name], whole[name][start : start + 7], rtol=0, atol=2e-5)


def test_the_same_batch_gives_the_same_bytes(scorer, rows):
    first, second = scorer.score(to_batch(rows)), scorer.score(to_batch(rows))
    assert all(first[name].tobytes() == second[name].tobytes() for name in COLUMNS)


def test_plain_text_and_empty_answers(scorer):
    found = scorer.score(to_batch([row(None, "a plum"), row("say", ""), row("say", None), row(None, "")]))
    assert np.isnan(found["answer_loss"]).all()
    assert np.isnan(found["answer_alone_loss"]).all()
    assert np.isnan(found["text_loss"]).tolist() == [False, False, False, True]
    assert found["num_answer_tokens"].tolist() == [0, 0, 0, 0]
    assert found["num_text_tokens"][3] == 0


def test_no_rows_are_no_work(scorer):
    found = scorer.score(to_batch([]))
    assert {name: (len(values), values.dtype) for name, values in found.items()} == {
        name: (0, np.float32 if name in LOSS_COLUMNS else np.int32) for name in COLUMNS
    }


def test_columns_that_a_table_lacks_are_empty(scorer):
    few = pa.RecordBatch.from_pylist([{"instruction": "what is a fig", "input": "", "output": "a plum"}])
    full = to_batch([row("what is a fig", "a plum")])
    assert scorer.score(few)["answer_loss"] == pytest.approx(scorer.score(full)["answer_loss"])


def num_tokens(scorer, some_rows, columns=COLUMNS):
    """How many tokens the model reads."""
    calls = []
    found = scorer.score(to_batch(some_rows), columns, lambda done, total: calls.append((done, total)))
    assert set(found) == set(columns)
    totals = {total for _, total in calls}
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert len(totals) == 1
    assert calls[-1] == (max(totals), max(totals))
    return max(totals)


def test_what_occurs_again_is_read_once(scorer, rows):
    once = num_tokens(scorer, rows[:4])
    assert num_tokens(scorer, rows[:4] * 25) == once
    long = [rows[-2]]
    assert num_tokens(scorer, long * 5) == num_tokens(scorer, long)


def test_a_template_is_read_once_a_pack(scorer):
    # 2 + 2 ids: instruction and answer differ in one token each.
    ask = [row(word, "fig") for word in ("plum", "pear")]
    prompts = [encoder(scorer)(f"{PREAMBLE}\n\n### Instruction:\n{r['instruction']}\n\n### Response:\n") for r in ask]
    prefixes = {tuple(ids[:n]) for ids in prompts for n in range(1, len(ids) + 1)}
    assert len(prefixes) < len(prompts[0]) + 12
    num_answer = len(encoder(scorer)("fig"))
    assert num_tokens(scorer, ask, ("answer_loss",)) == len(prefixes) + 2 * (num_answer - 1)


def test_only_the_passes_that_are_asked_for_are_made(scorer, rows):
    some = rows[:6]
    whole = scorer.score(to_batch(some))
    tokens = {name: num_tokens(scorer, some, (name,)) for name in LOSS_COLUMNS}
    assert tokens["answer_alone_loss"] < tokens["text_loss"] < tokens["answer_loss"]
    for name in COLUMNS:
        np.testing.assert_allclose(scorer.score(to_batch(some), [name])[name], whole[name], rtol=0, atol=2e-5)
    calls = []
    scorer.score(to_batch(some), ("num_answer_tokens",), lambda *call: calls.append(call))
    assert calls == []
    with pytest.raises(
        ValueError, match=r"^unknown column 'ifd'; expected text_loss, answer_loss, answer_alone_loss, "
    ):
        scorer.score(to_batch(some), ["ifd"])


def test_another_template_is_another_prompt(folder, scorer):
    bare = ModelScorer(str(folder), scorer.tokenizer, device="cpu", template=Template("", "{query}"))
    encode, model = encoder(scorer), bare.model.model
    batch = to_batch([row("what is a fig", "a plum"), row("", "a plum")])
    expected = [loss_after(model, encode("what is a fig"), encode("a plum")), loss_after(model, [1], encode("a plum"))]
    np.testing.assert_allclose(bare.score(batch)["answer_loss"], expected, rtol=0, atol=2e-5)


def test_a_begin_token_must_be_the_tokenizers(folder, tmp_path):
    # Of another tokenizer's configuration: here, 7 is a letter.
    scorer = ModelScorer(str(with_config(folder, tmp_path / "other", bos_token_id=7)), device="cpu")
    assert (scorer.begins, scorer.start_id) == (False, 1)


def test_bfloat16_is_near(folder, scorer, rows):
    rough = ModelScorer(str(folder), device="cpu", dtype="bfloat16")
    found, exact = rough.score(to_batch(rows)), scorer.score(to_batch(rows))
    for name in LOSS_COLUMNS:
        assert found[name].dtype == np.float32
        error = np.abs(found[name] - exact[name])
        assert np.nanmax(error) > 1e-4
        assert np.nanmean(error) < 0.1


def test_an_adapter_is_a_model(folder, scorer, rows, tmp_path):
    tuned = build_model(str(folder), TokenInfo(400, 1, 0), 64, 0, lora=LoraSettings(rank=2, alpha=4))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    save_model(tuned, tmp_path / "adapter")
    some = rows[:5]
    found = ModelScorer(str(tmp_path / "adapter"), str(folder), device="cpu").score(to_batch(some))
    assert_same(found, scores_by_hand(tuned.model, encoder(scorer), some, POSITIONS))
    assert np.abs(found["text_loss"] - scorer.score(to_batch(some))["text_loss"]).min() > 1e-2


# --- what thresholds are set on --------------------------------------------------------------------------------------


def test_both_readings_by_hand():
    columns = {
        "text_loss": np.array([math.log(50), 100.0, math.nan], np.float32),
        "answer_loss": np.array([1.0, 0.5, 1.0], np.float32),
        "answer_alone_loss": np.array([2.0, 0.25, math.nan], np.float32),
        "num_text_tokens": np.array([1, 2, 0], np.int32),
    }
    by_loss, by_perplexity = derive(columns, "loss_ratio"), derive(columns, "perplexity_ratio")
    np.testing.assert_allclose(by_loss["ifd"], [0.5, 2.0, math.nan])
    np.testing.assert_allclose(by_perplexity["ifd"], [math.e**1 / math.e**2, math.exp(0.25), math.nan])
    for derived in (by_loss, by_perplexity):
        np.testing.assert_allclose(derived["perplexity"], [50, math.inf, math.nan], rtol=1e-6)
        np.testing.assert_allclose(derived["answer_perplexity"], [math.e, math.sqrt(math.e), math.e])
        assert all(values.dtype == np.float32 for values in derived.values())
        assert set(derived) == {"perplexity", "answer_perplexity", "ifd"}


def test_only_what_has_its_losses_is_derived():
    loss = np.ones(2, np.float32)
    assert set(derive({"text_loss": loss}, "loss_ratio")) == {"perplexity"}
    assert set(derive({"answer_loss": loss}, "loss_ratio")) == {"answer_perplexity"}
    assert set(derive({"answer_alone_loss": loss}, "loss_ratio")) == set()
    with pytest.raises(ValueError, match=r"^reading must be loss_ratio or perplexity_ratio, got 'ratio'$"):
        derive({"text_loss": loss}, "ratio")


# --- packs -----------------------------------------------------------------------------------------------------------

IDS = st.lists(st.integers(0, 2), min_size=1, max_size=9).map(lambda ids: np.array([7, *ids], dtype=np.uint32))


@given(st.lists(IDS, max_size=12), st.integers(1, 20))
@settings(max_examples=300, deadline=None)
def test_packs_hold_every_sequence_once_and_know_what_it_shares(sequences, capacity):
    packs = list(plan_packs(sequences, capacity))
    assert sorted(i for pack in packs for i, _ in pack) == list(range(len(sequences)))
    for pack in packs:
        previous, size = [], 0
        for i, shared in pack:
            ids = sequences[i].tolist()
            assert ids[:shared] == previous[:shared]
            assert ids[shared : shared + 1] != previous[shared : shared + 1] or shared == len(ids) == len(previous)
            size += len(ids) - shared
            assert size <= max(capacity, 2 * len(ids) if shared else len(ids))
            previous = ids
    # All that are equal are in one pack.
    places = {}
    for number, pack in enumerate(packs):
        for i, _ in pack:
            places.setdefault(sequences[i].tobytes(), set()).add(number)
    assert all(len(where) == 1 for where in places.values())


@given(st.lists(st.tuples(IDS, st.integers(1, 9)), min_size=1, max_size=8))
@settings(max_examples=300, deadline=None)
def test_a_pack_is_the_tree_of_its_sequences(drawn):
    sequences = [ScoredSequence(row, ids, min(first, len(ids) - 1)) for row, (ids, first) in enumerate(drawn)]
    (plan,) = plan_packs([sequence.ids for sequence in sequences], 1000)
    pack = lay_out(sequences, plan)
    whole = [tuple(sequence.ids.tolist()) for sequence in sequences]
    inner = {ids[:n] for ids in whole for n in range(1, len(ids))}
    mask = tree_mask(torch.from_numpy(pack.ends_T)[None])[0, 0].numpy()
    # What a token sees, in order, is what stands before it in its sequence.
    seen = [tuple(pack.input_ids_T[row].tolist()) for row in mask]
    assert len(seen) == len(inner)
    assert set(seen) == inner
    assert pack.positions_T.tolist() == [len(ids) - 1 for ids in seen]
    # Each wanted token is predicted once, from what stands before it.
    predicted = [(*seen[t], label) for t, label in zip(pack.from_N.tolist(), pack.labels_N.tolist(), strict=True)]
    assert len(set(predicted)) == len(predicted)
    wanted = {i: [whole[i][: n + 1] for n in range(s.first, len(whole[i]))] for i, s in enumerate(sequences)}
    assert set(predicted) == {prefix for prefixes in wanted.values() for prefix in prefixes}
    assert {i: [predicted[n] for n in where.tolist()] for i, where in pack.scored} == wanted


def test_packs_side_by_side():
    def pack_of(*sequences):
        scored = [ScoredSequence(0, np.array(ids, dtype=np.uint32), 1) for ids in sequences]
        (plan,) = plan_packs([sequence.ids for sequence in scored], 100)
        return lay_out(scored, plan)

    chain, tree = pack_of([5, 6, 7, 8, 9]), pack_of([5, 6, 7], [5, 8, 7])
    inputs = to_inputs([chain, tree])
    assert inputs.input_ids_BT.tolist() == [[5, 6, 7, 8], [5, 6, 8, 0]]
    assert inputs.positions_BT.tolist() == [[0, 1, 2, 3], [0, 1, 1, 3]]
    assert inputs.ends_BT.tolist() == [[4, 4, 4, 4], [3, 2, 3, 4]]
    assert inputs.from_N.tolist() == [0, 1, 2, 3, 4, 5, 4, 6]
    assert inputs.labels_N.tolist() == [6, 7, 8, 9, 6, 7, 8, 7]
    # Without a branch, causal attention will do.
    assert to_inputs([chain, pack_of([1, 2, 3])]).ends_BT is None
    sizes = [[len(pack.input_ids_T) for pack in group] for group in group_packs([tree, chain, tree, chain, tree], 8)]
    assert sizes == [[4, 4], [3, 3], [3]]


# --- refusals --------------------------------------------------------------------------------------------------------


def refusal(error, *arguments, **settings):
    with pytest.raises(error) as raised:
        ModelScorer(*arguments, **settings)
    return str(raised.value)


def test_a_model_that_was_never_trained_is_refused(folder, model_config):
    for name in ("tiny", str(model_config)):
        assert refusal(ModelError, name, str(folder)) == (
            f"model {name}: starts from random weights, whose losses say nothing about a text; give a trained model: a "
            "folder, a .gguf file or a name on the hub"
        )


def test_a_model_that_cannot_be_loaded_is_refused(folder, tmp_path):
    broken = with_config(folder, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"nothing")
    message = refusal(ModelError, str(broken))
    assert message.startswith(f"model {broken}: cannot be loaded (")
    assert "\n" not in message


def test_a_model_without_its_own_tokenizer_is_refused(folder, tmp_path):
    alone = with_config(folder, tmp_path / "alone")
    (alone / "tokenizer.json").unlink()
    message = refusal(ModelError, str(alone))
    assert message.startswith(f"model {alone}: gives no tokenizer of its own; name one beside it (tokenizer {alone}: ")
    assert ModelScorer(str(alone), str(folder), device="cpu").start_id == 1


def test_a_tokenizer_of_another_model_is_refused(folder, tmp_path):
    words = ["".join(pair) * 2 for pair in itertools.product("abcdefghijklmnopqrstuvwxyz", repeat=2)]
    train_byte_level_bpe([" ".join(words * 2)], 600).save(str(tmp_path / "tokenizer.json"))
    assert refusal(ModelError, str(folder), str(tmp_path)) == (
        f"model {folder}: has 420 embeddings, but tokenizer {tmp_path.name} makes ids up to 599; give the model's own "
        "tokenizer"
    )


def test_texts_longer_than_the_model_takes_are_refused(folder):
    assert refusal(ModelError, str(folder), max_tokens=1024) == (
        f"model {folder}: takes 96 positions, max_tokens is 1,024; set 96 or less"
    )


def test_arguments_out_of_range_are_refused(folder):
    assert refusal(ConfigError, str(folder), max_tokens=1) == "max_tokens must be at least 2, got 1"
    assert refusal(ConfigError, str(folder), tokens_per_batch=0) == "tokens_per_batch must be at least 1, got 0"
    assert refusal(ConfigError, str(folder), dtype="float16") == "dtype must be float32 or bfloat16, got 'float16'"
