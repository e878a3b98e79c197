"""Examples to token ids: the prompt template, the loss mask, truncation and the held-out split.

Axes: E examples, R turns, N tokens.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from doremi_mix.errors import ConfigError, DataError
from doremi_mix.packing import to_offsets
from doremi_mix.tokenizer import Tokenizer
from doremi_mix.types import Example

_QUERY = "{query}"
_KEYS_AT_A_TIME = 1 << 16


@dataclass(frozen=True, slots=True)
class Template:
    r"""How an example is written down for the model.

    A conversation reads: preamble, separator, turn, response, end token, separator, turn, response, end token, ...

    Attributes:
        preamble: what stands at the very start; an example's own system prompt replaces it.  "" leaves it out, and
            the separator after it.
        turn: one user turn up to where the response starts; ``{query}`` stands for the instruction with its input.
        query_separator: between an instruction and its input; Stanford's Alpaca prompt has ``"\n\n### Input:\n"`` here.
        separator: before every turn, except where a turn is the first thing in the document.
        before_lone_input: before an input that has no instruction, where the contest's trainer writes a line break.

    Raises:
        ConfigError: ``turn`` does not hold ``{query}`` exactly once.
    """

    preamble: str
    turn: str
    query_separator: str = "\n"
    separator: str = "\n\n"
    before_lone_input: str = ""

    def __post_init__(self) -> None:
        if self.turn.count(_QUERY) != 1:
            raise ConfigError(
                f"the template's turn must hold {_QUERY} exactly once, got {self.turn!r}; put {_QUERY} where the "
                f"instruction belongs"
            )


CONTEST_TEMPLATE = Template(
    preamble=(
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    ),
    turn="### Instruction:\n{query}\n\n### Response:\n",
    before_lone_input="\n",
)


@dataclass(frozen=True, slots=True)
class EncodedExamples:
    """A batch of examples as token ids, one after the other.

    Attributes:
        token_ids: the ids of all examples, uint32, shape [N].
        loss_mask: 1 on the response and end tokens of every turn, 0 on prompts, uint8, shape [N].
        offsets: example e holds the tokens from ``offsets[e]`` to ``offsets[e + 1]``, int64, shape [E + 1].
        num_tokens: the length of each example before any truncation, int64, shape [E].
        turn_lengths: prompt and response tokens of each turn that is left, int64, shape [R, 2].
        turn_offsets: example e holds the turns from ``turn_offsets[e]`` to ``turn_offsets[e + 1]``, shape [E + 1].
    """

    token_ids: NDArray[np.uint32]
    loss_mask: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    num_tokens: NDArray[np.int64]
    turn_lengths: NDArray[np.int64]
    turn_offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.num_tokens)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The length of each example as it is now, in tokens, shape [E]."""
        return np.diff(self.offsets)


def render(example: Example, template: Template) -> list[tuple[str, str]]:
    """Writes an example down as turns of (prompt text, response text); each response is followed by an end token.

    The text of an example is inserted, never interpreted: braces in it stay as they are.  Plain text has one turn with
    an empty prompt.
    """
    if example.instruction is None:
        return [("", example.output)]
    query = template.query_separator.join(part for part in (example.instruction, example.input) if part)
    if example.input and not example.instruction:
        query = template.before_lone_input + query
    before, after = template.turn.split(_QUERY)
    preamble = example.system or template.preamble
    opening = preamble + template.separator if preamble else ""
    turns = []
    for user, assistant in (*example.history, (query, example.output)):
        turns.append((opening + before + user + after, assistant))
        opening = template.separator
    return turns


def encode_examples(examples: Sequence[Example], tokenizer: Tokenizer, template: Template) -> EncodedExamples:
    """Encodes examples, whole.

    Prompt and response are encoded apart, so no token spans the border of the loss mask.  The end token follows every
    response; nothing precedes the first prompt.

    Raises:
        DataError: an example comes out as a single token, which no position could predict.
    """
    turns_by_example = [render(example, template) for example in examples]
    texts = [text for turns in turns_by_example for turn in turns for text in turn]
    text_ids, lengths = tokenizer.encode_flat(texts)
    turn_lengths_R2 = lengths.reshape(-1, 2)
    turn_lengths_R2[:, 1] += 1  # the end token
    turn_offsets = to_offsets(np.fromiter(map(len, turns_by_example), dtype=np.int64, count=len(examples)))
    turn_ends = np.cumsum(turn_lengths_R2.sum(axis=1))

    is_text = np.ones(int(turn_ends[-1]) if len(turn_ends) else 0, dtype=bool)
    is_text[turn_ends - 1] = False
    token_ids_N = np.full(len(is_text), tokenizer.end_id, dtype=np.uint32)
    token_ids_N[is_text] = text_ids
    offsets = np.concatenate([[0], turn_ends])[turn_offsets]
    num_tokens_E = np.diff(offsets)
    if len(examples) and num_tokens_E.min() < 2:
        example = examples[int(num_tokens_E.argmin())]
        raise DataError(
            f"{example.id}: nothing to learn: expected at least one token besides the end token from tokenizer "
            f"{tokenizer.name}, got none; remove the row"
        )
    return EncodedExamples(
        token_ids_N, _loss_mask(turn_lengths_R2), offsets, num_tokens_E, turn_lengths_R2, turn_offsets
    )


def truncate(encoded: EncodedExamples, limit: int, *, answers_first: bool = False) -> EncodedExamples:
    """Cuts the examples that are longer than ``limit`` tokens; the others stay as they are.

    Whole turns are kept from the start for as long as they fit.  When already the first turn does not fit, its p prompt
    tokens and its r response tokens (the end token among them) are cut in proportion, each keeping its start::

        response = max(1, floor(limit * r / (p + r)))
        prompt   = limit - response

    So an example that is cut has ``limit`` tokens, and at least one of a prompt stays.  For a single turn this is the
    contest's rule.

    Args:
        encoded: the examples.
        limit: tokens of an example at most.
        answers_first: in such a first turn, keep all of the response that fits into half of the limit or into what the
            prompt leaves, and cut the prompt to the rest.  In proportion, a short context leaves one token of the
            answer to a question of 2,000: nothing to learn from, and nothing to measure.

    Raises:
        ValueError: ``limit`` is below 2, which has no room for a token and its predecessor.
    """
    if limit < 2:
        raise ValueError(f"limit must be at least 2 tokens, got {limit}")
    if not len(encoded) or encoded.lengths.max() <= limit:
        return encoded
    lengths_R2 = encoded.turn_lengths
    totals_R = lengths_R2.sum(axis=1)
    starts_R = np.cumsum(totals_R) - totals_R
    turns_per_example = np.diff(encoded.turn_offsets)
    ends_in_example_R = starts_R + totals_R - np.repeat(encoded.offsets[:-1], turns_per_example)
    kept_R2 = np.where((ends_in_example_R <= limit)[:, None], lengths_R2, 0)

    first = encoded.turn_offsets[:-1]
    cut = first[totals_R[first] > limit]
    prompts, responses = lengths_R2[cut].T
    if answers_first:
        kept_responses = np.minimum(responses, np.maximum(limit // 2, limit - prompts))
        kept_R2[cut, 0], kept_R2[cut, 1] = np.minimum(prompts, limit - kept_responses), kept_responses
        return _keep(encoded, kept_R2)
    kept_responses = np.maximum(limit * responses // totals_R[cut], 1)
    kept_R2[cut, 0], kept_R2[cut, 1] = limit - kept_responses, kept_responses
    return _keep(encoded, kept_R2)


def count_tokens(
    examples: Sequence[Example], tokenizer: Tokenizer, template: Template, limit: int | None
) -> NDArray[np.int64]:
    """Returns what each example costs of a token budget: all its tokens, prompt and end tokens included.

    Args:
        examples: any number of them.
        tokenizer: of the model that will be trained on the mixture.
        template: of that training.
        limit: where the training will cut an example, as ``truncate`` does; ``None`` counts it whole.

    Returns:
        Tokens of each example, shape [E].
    """
    encoded = encode_examples(examples, tokenizer, template)
    return (encoded if limit is None else truncate(encoded, limit)).lengths


def prompt_key(example: Example) -> int:
    """Returns a stable 64-bit hash of the prompt, equal for prompts that differ in case, spacing or punctuation.

    The prompt is the system prompt, the earlier user turns, the instruction and its input.  Plain text, and an example
    without any prompt, is hashed by its own text.
    """
    if example.instruction is None:
        text = example.output
    else:
        users = [user for user, _ in example.history]
        text = "".join((example.system, *users, example.instruction, example.input)) or example.output
    normal = unicodedata.normalize("NFKC", text).casefold()
    letters = (
        re.sub(r"[\W_]+", "", normal) or normal.strip()
    )  # a prompt of signs alone is told from others by its signs
    digest = hashlib.blake2b(letters.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def held_out_split(
    keys_by_domain: Sequence[NDArray[np.uint64]], fraction: float, max_examples: int, seed: int
) -> list[NDArray[np.bool_]]:
    """Chooses the held-out examples of each domain, all examples of a prompt on one side in every domain.

    Each domain takes its prompts in the order of a hash of (seed, key) until it has ``round(fraction * n)`` of its n
    examples, but at least 1 and at most ``max_examples``.  Prompts that alone exceed this number are passed over,
    unless there are no others: then the one with the fewest examples is taken.

    A prompt that one domain holds out is held out in all, with two exceptions that keep every domain trainable: a
    prompt that makes up more than half of some domain is never held out, and a domain whose prompts were all taken gets
    back those that only others had chosen.  So a domain with a single prompt has no held-out examples.  The order of
    the rows does not matter.

    Args:
        keys_by_domain: ``prompt_key`` of each example, uint64, one array per domain; they may be mapped files, as the
            domains are looked at one after the other.
        fraction: the share of a domain's examples to hold out, from 0 (none) to below 1.
        max_examples: the largest number to choose from one domain.
        seed: another seed gives another choice.

    Returns:
        For each domain, whether each of its examples is held out.

    Raises:
        ValueError: ``fraction`` or ``max_examples`` is out of range.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction must be at least 0 and below 1, got {fraction}")
    if max_examples < 1:
        raise ValueError(f"max_examples must be at least 1, got {max_examples}")
    if fraction == 0:
        return [np.zeros(len(keys), dtype=bool) for keys in keys_by_domain]
    none = np.zeros(0, dtype=np.uint64)
    dominant = np.concatenate([none, *map(_dominant_key, keys_by_domain)])
    chosen = [
        _choose_keys(keys, dominant, fraction=fraction, max_examples=max_examples, seed=seed) for keys in keys_by_domain
    ]
    held_out = np.unique(np.concatenate([none, *chosen]))
    given_back = [
        np.setdiff1d(keys, own)
        for keys, own in zip(keys_by_domain, chosen, strict=True)
        if len(keys) and _are_among(keys, held_out).all()
    ]
    held_out = np.setdiff1d(held_out, np.concatenate([none, *given_back]))
    return [_are_among(keys, held_out) for keys in keys_by_domain]


def _dominant_key(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Returns the key that more than half of the examples share, if there is one."""
    if not len(keys):
        return np.zeros(0, dtype=np.uint64)
    # In sorted order, such a key stands in the middle.
    middle = np.partition(keys, len(keys) // 2)[len(keys) // 2]
    is_dominant = 2 * np.count_nonzero(keys == middle) > len(keys)
    return np.array([middle] if is_dominant else [], dtype=np.uint64)


def _are_among(keys: NDArray[np.uint64], wanted: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Says of each key whether it is wanted; in pieces, as ``numpy.isin`` takes several times the keys' memory."""
    flags = np.zeros(len(keys), dtype=bool)
    for start in range(0, len(keys), _KEYS_AT_A_TIME):
        piece = slice(start, start + _KEYS_AT_A_TIME)
        flags[piece] = np.isin(keys[piece], wanted)
    return flags


def _choose_keys(
    keys: NDArray[np.uint64],
    excluded: NDArray[np.uint64],
    *,
    fraction: float,
    max_examples: int,
    seed: int,
) -> NDArray[np.uint64]:
    """Returns the distinct keys that one domain holds out; always fewer than it has."""
    target = min(max(round(fraction * len(keys)), 1), max_examples)
    keys, counts = np.unique(keys, return_counts=True)
    order = np.argsort(_mix(keys, seed), kind="stable")
    order = order[~np.isin(keys[order], excluded)]
    light = order[counts[order] <= target]
    if not len(light):
        return keys[order[np.argsort(counts[order], kind="stable")[:1]]]
    totals = np.cumsum(counts[light])
    num_keys = int(np.searchsorted(totals, target)) + 1
    if num_keys > 1 and totals[min(num_keys, len(totals)) - 1] > max_examples:
        num_keys -= 1
    return keys[light[: min(num_keys, len(keys) - 1)]]


def _mix(keys: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """Scrambles keys with a seed: the finalizer of splitmix64, a bijection, so that no two keys tie."""
    salt = int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=8).digest(), "little")
    mixed = keys ^ np.uint64(salt)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def _keep(encoded: EncodedExamples, kept_R2: NDArray[np.int64]) -> EncodedExamples:
    """Keeps the first ``kept_R2`` tokens of each prompt and response, and forgets the turns without any."""
    lengths = encoded.turn_lengths.ravel()
    starts = np.cumsum(lengths) - lengths
    position_N = np.arange(len(encoded.token_ids)) - np.repeat(starts, lengths)
    keep_N = position_N < np.repeat(kept_R2.ravel(), lengths)
    left_R = kept_R2.any(axis=1)
    lengths_E = np.add.reduceat(kept_R2.sum(axis=1), encoded.turn_offsets[:-1])
    turns_E = np.add.reduceat(left_R.astype(np.int64), encoded.turn_offsets[:-1])
    return EncodedExamples(
        token_ids=encoded.token_ids[keep_N],
        loss_mask=encoded.loss_mask[keep_N],
        offsets=to_offsets(lengths_E),
        num_tokens=encoded.num_tokens,
        turn_lengths=kept_R2[left_R],
        turn_offsets=to_offsets(turns_E),
    )


def _loss_mask(turn_lengths_R2: NDArray[np.int64]) -> NDArray[np.uint8]:
    return np.repeat(np.tile(np.array([0, 1], dtype=np.uint8), len(turn_lengths_R2)), turn_lengths_R2.ravel())
