import hashlib
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from doremi_mix import tokens
from doremi_mix.errors import ConfigError, DataError
from doremi_mix.tokenizer import Tokenizer, load_tokenizer
from doremi_mix.tokens import (
    CONTEST_TEMPLATE,
    EncodedExamples,
    Template,
    count_tokens,
    encode_examples,
    held_out_split,
    prompt_key,
    render,
    truncate,
)
from doremi_mix.types import Example

END = 0x110000
PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."

# One token a character, so that expected ids can be read.
CHARACTERS = Tokenizer(
    name="characters",
    sha256="",
    vocab_size=END + 1,
    end_id=END,
    pad_id=0,
    control_ids=frozenset({END}),
    unknown_id=None,
    encode_raw=lambda texts: [[ord(char) for char in text] for text in texts],
    control_literals=(),
)
BARE = Template(preamble="", turn="{query}>", separator="|")


def example(instruction: str | None = "q", output: str = "a", input_: str = "", **fields: object) -> Example:
    return Example("d:1", "d", instruction, input_, output, **fields)


def written(encoded: EncodedExamples) -> list[tuple[str, str]]:
    """Each example as text with "$" for the end token, and its loss mask."""
    return [
        (
            "".join("$" if token == END else chr(token) for token in encoded.token_ids[start:end]),
            "".join(map(str, encoded.loss_mask[start:end])),
        )
        for start, end in itertools.pairwise(encoded.offsets)
    ]


# --- the template ---


def test_the_contest_template_to_the_byte():
    assert render(example("Add.", "3", "1 + 2"), CONTEST_TEMPLATE) == [
        (PREAMBLE + "\n\n### Instruction:\nAdd.\n1 + 2\n\n### Response:\n", "3")
    ]
    assert render(example("Hi", "Hello"), CONTEST_TEMPLATE) == [
        (PREAMBLE + "\n\n### Instruction:\nHi\n\n### Response:\n", "Hello")
    ]


def test_earlier_turns_come_first_and_a_system_prompt_replaces_the_preamble():
    conversation = example("q2", "a2", "m", history=(("q0", "a0"), ("q1", "a1")), system="Be kind.")
    assert render(conversation, CONTEST_TEMPLATE) == [
        ("Be kind.\n\n### Instruction:\nq0\n\n### Response:\n", "a0"),
        ("\n\n### Instruction:\nq1\n\n### Response:\n", "a1"),
        ("\n\n### Instruction:\nq2\nm\n\n### Response:\n", "a2"),
    ]
    assert render(example("q", "a", history=(("p", "b"),)), BARE) == [("p>", "b"), ("|q>", "a")]


def test_plain_text_has_no_prompt():
    assert render(example(None, "once"), CONTEST_TEMPLATE) == [("", "once")]


def test_an_input_without_an_instruction_stands_alone():
    assert render(example("", "a", "m"), BARE) == [("m>", "a")]
    assert render(example("", "a", "m"), CONTEST_TEMPLATE)[0][0].endswith("### Instruction:\n\nm\n\n### Response:\n")


@given(st.text(alphabet="{}query0a%s\n"), st.text(alphabet="{}query0a%s\n"))
def test_braces_in_texts_are_inserted_as_they_are(instruction, output):
    ((prompt, response),) = render(example("x" + instruction, output), CONTEST_TEMPLATE)
    assert prompt == f"{PREAMBLE}\n\n### Instruction:\nx" + instruction + "\n\n### Response:\n"
    assert response == output


@pytest.mark.parametrize("turn", ["no place", "{query} and {query}", "{ query }"])
def test_a_turn_without_exactly_one_query_is_refused(turn):
    with pytest.raises(ConfigError) as caught:
        Template(preamble="", turn=turn)
    assert str(caught.value) == (
        f"the template's turn must hold {{query}} exactly once, got {turn!r}; "
        "put {query} where the instruction belongs"
    )


# --- encoding ---


def test_the_loss_is_on_responses_and_end_tokens_of_every_turn():
    encoded = encode_examples(
        [example("qq", "aa", history=(("p", "bbb"),)), example(None, "text"), example("q", "")], CHARACTERS, BARE
    )
    assert written(encoded) == [("p>bbb$|qq>aa$", "0011110000111"), ("text$", "11111"), ("q>$", "001")]
    assert encoded.num_tokens.tolist() == [13, 5, 3]
    assert encoded.turn_lengths.tolist() == [[2, 4], [4, 3], [0, 5], [2, 1]]
    assert encoded.turn_offsets.tolist() == [0, 2, 3, 4]
    assert len(encode_examples([], CHARACTERS, BARE)) == 0


def test_an_example_without_anything_to_predict_is_named():
    with pytest.raises(DataError) as caught:
        encode_examples([example(), Example("books:7", "books", None, "", "")], CHARACTERS, BARE)
    assert str(caught.value) == (
        "books:7: nothing to learn: expected at least one token besides the end token from tokenizer characters, got "
        "none; remove the row"
    )


# --- truncation ---


def contest_rule(prompt: list[int], response: list[int], limit: int) -> tuple[list[int], list[int]]:
    """The contest's own truncation of one turn; the response ends with the end token."""
    total = len(prompt) + len(response)
    max_response = max(1, int(limit * (len(response) / total)))
    return prompt[: limit - max_response], response[:max_response]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), min_size=1, max_size=8),
    st.sampled_from([16, 64, 128, 256, 1024]),
)
def test_single_turns_are_cut_as_in_the_contest(sizes, limit):
    examples = [example("x" * prompt + "y", "z" * response) for prompt, response in sizes]
    encoded = encode_examples(examples, CHARACTERS, BARE)
    cut = truncate(encoded, limit)
    for (prompt, response), (text, mask) in zip(sizes, written(cut), strict=True):
        whole = ["x" * prompt + "y>", "z" * response + "$"]
        expected_prompt, expected_response = contest_rule(list(whole[0]), list(whole[1]), limit)
        assert text == "".join(expected_prompt + expected_response)
        assert mask == "0" * len(expected_prompt) + "1" * len(expected_response)
    assert cut.num_tokens.tolist() == encoded.num_tokens.tolist()


turns = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=4)


@settings(deadline=None)
@given(st.lists(turns, min_size=1, max_size=5), st.integers(2, 40))
def test_cut_examples_keep_the_start_of_every_part_and_a_token_to_learn(conversations, limit):
    examples = []
    for conversation in conversations:
        *history, (prompt, response) = [("p" * prompt, "r" * response) for prompt, response in conversation]
        examples.append(example(prompt, response, history=tuple(history)))
    encoded = encode_examples(examples, CHARACTERS, BARE)
    cut = truncate(encoded, limit)
    for conversation, whole, (text, mask) in zip(conversations, written(encoded), written(cut), strict=True):
        assert len(text) <= limit
        assert "1" in mask[1:]
        assert mask[0] == "0"
        if len(whole[0]) <= limit:
            assert (text, mask) == whole
            continue
        sizes = [prompt + response + 2 + (i > 0) for i, (prompt, response) in enumerate(conversation)]
        ends = itertools.accumulate(sizes)
        fitting = [end for end in ends if end <= limit]
        if fitting:
            assert (text, mask) == (whole[0][: fitting[-1]], whole[1][: fitting[-1]])
        else:
            prompt = mask.count("0")
            assert mask == "0" * prompt + "1" * (len(mask) - prompt)
            assert whole[0].startswith(text[:prompt])
            assert whole[0][conversation[0][0] + 1 :].startswith(text[prompt:])


def test_known_cuts():
    cases = [
        (example("q" * 5, "a" * 5), 6, "qqqaaa"),  # 6 and 6 of 12, halved
        (example("q" * 99, "a"), 4, "qqqa"),  # 100 and 2: floor(4 * 2 / 102) is 0, but one token to learn must stay
        (example("", "a" * 99), 4, ">aaa"),  # 1 and 100: floor(4 * 1 / 101) is 0, but a prompt token must stay
        (example(None, "text" * 9), 5, "textt"),
        (example("q3", "a3", history=(("q", "a"), ("q2", "a2"))), 12, "q>a$|q2>a2$"),  # whole turns from the start
        (example("q2", "a2", history=(("q" * 7, "a" * 7),)), 8, "qqqqaaaa"),
    ]
    for case, limit, expected in cases:
        assert written(truncate(encode_examples([case], CHARACTERS, BARE), limit))[0][0] == expected
    assert [count_tokens([case], CHARACTERS, BARE, limit).item() for case, limit, _ in cases] == [6, 4, 4, 5, 11, 8]
    assert [count_tokens([case], CHARACTERS, BARE, None).item() for case, _, _ in cases] == [12, 102, 101, 37, 18, 23]


def test_answers_are_kept_before_prompts():
    cases = [
        (example("q" * 12, "aaa"), 8, "qqqqaaa$"),  # the whole answer, and what is left for the prompt
        (example("q" * 12, "a" * 12), 8, "qqqqaaaa"),  # both too long: half each
        (example("q", "a" * 12), 8, "q>aaaaaa"),  # a short prompt leaves its room
        (example("q3", "a3", history=(("q", "a"), ("q2", "a2"))), 12, "q>a$|q2>a2$"),
        (example(None, "text" * 9), 5, "textt"),
        (example("q", "a"), 2, ">a"),
    ]
    for case, limit, expected in cases:
        cut = truncate(encode_examples([case], CHARACTERS, BARE), limit, answers_first=True)
        if expected != ">a":
            assert written(cut)[0][0] == expected
        assert cut.lengths.max() <= limit
        assert cut.loss_mask.sum() >= 1


def test_cutting_twice_and_keeping_turns_consistent():
    examples = [example("q3", "a3", history=(("q", "a"), ("q2", "a2"))), example("q" * 9, "a" * 9)]
    once = truncate(encode_examples(examples, CHARACTERS, BARE), 12)
    assert once.turn_lengths.tolist() == [[2, 2], [4, 3], [6, 6]]
    assert written(truncate(once, 8)) == [("q>a$", "0011"), ("qqqqaaaa", "00001111")]


def test_a_limit_without_room_to_predict_is_refused():
    with pytest.raises(ValueError, match=r"^limit must be at least 2 tokens, got 1$"):
        truncate(encode_examples([example()], CHARACTERS, BARE), 1)


# --- prompt keys ---


def test_near_identical_prompts_share_a_key():
    key = prompt_key(example("What is 2+2?"))
    for other in ("what is 2 + 2", "WHAT IS: 2-2!", "What  is\n22", "Ｗｈａｔ ｉｓ ２２", "what_is_22"):
        assert prompt_key(example(other, "another answer")) == key
    assert prompt_key(example("What is", "a", "2+2?")) == key
    assert key == 3194664633786645068  # blake2b of "whatis22", 8 bytes, little-endian


def test_other_prompts_have_other_keys():
    cases = [
        *(example(text) for text in ("What is 2+3?", "什么", "什麼", "???", "!!!", "😀")),
        example("q", system="s"),
        example("q", history=(("p", "b"),)),
        example(None, "q1"),
        example("", "an answer without a prompt"),
    ]
    assert len({prompt_key(case) for case in cases}) == len(cases)
    assert prompt_key(example("q", history=(("p", "b"),))) == prompt_key(example("q", history=(("P!", "other"),)))
    assert prompt_key(example(None, "Q 1")) == prompt_key(example("q1", "a"))


# --- the held-out split ---


def keys(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint64)


domains_of_keys = st.lists(st.lists(st.integers(0, 12), max_size=25).map(lambda k: keys(*k)), min_size=1, max_size=5)


@settings(max_examples=400, deadline=None)
@given(domains_of_keys, st.sampled_from([0.05, 0.2, 0.49, 0.95]), st.integers(1, 6), st.integers(0, 3), st.randoms())
def test_a_prompt_is_on_one_side_and_every_domain_keeps_training_examples(domains, fraction, most, seed, rng):
    split = held_out_split(domains, fraction, most, seed)
    held = {key for part, flags in zip(domains, split, strict=True) for key in part[flags].tolist()}
    train = {key for part, flags in zip(domains, split, strict=True) for key in part[~flags].tolist()}
    assert not held & train
    assert all(not flags.all() for part, flags in zip(domains, split, strict=True) if len(part))
    for part, flags in zip(domains, split, strict=True):
        if len(set(part.tolist())) == 1:
            assert not flags.any()
    # Neither the order of the rows nor that of the domains matters.
    orders = [rng.sample(range(len(part)), len(part)) for part in domains]
    shuffled = held_out_split(
        [part[order] for part, order in zip(domains, orders, strict=True)][::-1], fraction, most, seed
    )
    for flags, order, other in zip(split, orders, shuffled[::-1], strict=True):
        assert other.tolist() == flags[order].tolist()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=2, max_size=80), st.floats(0.01, 0.5), st.integers(1, 20))
def test_the_number_held_out_of_one_domain(values, fraction, most):
    (flags,) = held_out_split([keys(*values)], fraction, most, 0)
    counts = sorted(values.count(value) for value in set(values))
    target = min(max(round(fraction * len(values)), 1), most)
    if len(counts) == 1:
        assert not flags.any()
    elif counts[0] > target:  # no prompt is that rare: the rarest is taken, unless it is most of the domain
        assert flags.sum() == counts[0]
    else:
        assert 1 <= flags.sum() <= min(most, 2 * target)
        if counts[-1] == 1:
            assert flags.sum() == target


def splitmix64_order(values: list[int], seed: int) -> list[int]:
    salt = int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=8).digest(), "little")

    def mixed(value: int) -> int:
        value ^= salt
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
        return value ^ (value >> 31)

    return sorted(values, key=mixed)


@pytest.mark.parametrize("seed", range(8))
def test_prompts_are_taken_in_the_order_of_a_seeded_hash_and_held_out_everywhere(seed):
    split = held_out_split([keys(*range(20)), keys(*range(10, 15)), keys(3, 3, 3)], 0.2, 100, seed)
    of_first = [key for key in splitmix64_order([*range(20)], seed) if key != 3][:4]  # 3 is all of the third domain
    held = {*of_first, splitmix64_order([*range(10, 15)], seed)[0]}
    expected = [[key in held for key in part] for part in (range(20), range(10, 15), (3, 3, 3))]
    assert [flags.tolist() for flags in split] == expected


def test_nothing_is_held_out_of_nothing_or_at_fraction_zero():
    assert [flags.tolist() for flags in held_out_split([keys(1, 2, 3), keys()], 0, 5, 0)] == [[False] * 3, []]
    empty, pair = held_out_split([keys(), keys(1, 2)], 0.5, 5, 0)
    assert empty.tolist() == []
    assert pair.sum() == 1


def test_the_split_does_not_depend_on_how_many_keys_are_looked_at_a_time(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    domains = [rng.integers(0, 300, size, dtype=np.uint64) for size in (500, 300, 7)]
    whole = held_out_split(domains, 0.2, 40, seed=0)
    np.save(tmp_path / "keys.npy", np.concatenate(domains))
    mapped = np.split(np.load(tmp_path / "keys.npy", mmap_mode="r"), [500, 800])
    monkeypatch.setattr(tokens, "_KEYS_AT_A_TIME", 3)
    assert [flags.tolist() for flags in held_out_split(mapped, 0.2, 40, seed=0)] == [part.tolist() for part in whole]
    assert sum(flags.sum() for flags in whole) > 40


def test_a_prompt_that_is_most_of_a_small_domain_stays_in_training_everywhere():
    first = splitmix64_order([*range(1_000)], 0)[0]  # what the large domain would take first
    large, small = keys(*range(1_000)), keys(first, first, 5_000)
    held = held_out_split([large, small], 0.2, 1_000, seed=0)
    assert not held[0][first]
    assert held[0].sum() == 200
    assert held[1].tolist() == [False, False, True]


def test_a_domain_whose_prompts_were_all_taken_gets_back_what_only_others_had_chosen():
    order = splitmix64_order([*range(1_000)], 0)
    # The small domain would take order[0] itself; the large one takes both.
    large, small = held_out_split([keys(*range(1_000)), keys(*order[:2])], 0.1, 1_000, seed=0)
    assert small.tolist() == [True, False]
    assert sorted(order[:1] + order[2:100]) == np.flatnonzero(large).tolist()


def test_another_seed_gives_another_choice():
    first, second = (held_out_split([keys(*range(1_000))], 0.1, 1_000, seed)[0] for seed in (0, 1))
    assert first.sum() == second.sum() == 100
    assert 2 <= (first & second).sum() <= 25  # 10 would be expected of independent choices


@pytest.mark.parametrize(
    ("fraction", "most", "message"),
    [
        (1.0, 5, "fraction must be at least 0 and below 1, got 1.0"),
        (-0.1, 5, "fraction must be at least 0 and below 1, got -0.1"),
        (0.1, 0, "max_examples must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(fraction, most, message):
    with pytest.raises(ValueError, match=rf"^{message}$"):
        held_out_split([keys(1, 2)], fraction, most, 0)


# --- real data ---


def test_real_rows_under_the_contest_settings(shared_data):
    path = shared_data / "pool20" / "p3_wiki_hop.json"
    rows = json.loads(path.read_text(encoding="utf-8"))[:100]
    examples = [Example(f"d:{i}", "d", row["instruction"], row["input"], row["output"]) for i, row in enumerate(rows)]
    tokenizer = load_tokenizer(str(shared_data / "contest" / "baichuan2_tokenizer"))
    counts = count_tokens(examples, tokenizer, CONTEST_TEMPLATE, 1024)
    for row, count in zip(rows, counts, strict=True):
        query = row["instruction"] + ("\n" + row["input"] if row["input"] else "")
        prompt, response = tokenizer.encode_batch(
            [f"{PREAMBLE}\n\n### Instruction:\n{query}\n\n### Response:\n", row["output"]]
        )
        kept = contest_rule(prompt.tolist(), [*response.tolist(), 2], 1024)
        assert count == len(kept[0]) + len(kept[1])
    assert counts.max() == 1024
