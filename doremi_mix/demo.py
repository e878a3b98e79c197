"""The embedded demo corpus: 20 small domains in two scripts, whose learned order is planted.

Every answer is a walk over invented words, so that a word soon is one token and what there is to learn is known.  A
walk goes from a word to that word's one successor, or, by chance, to any word of the domain's lexicon.  Words,
successors and titles differ between domains; the noise domains draw from all words of their script.

================ ============================================== ======================================================
role             walk                                           what group DRO does with it
================ ============================================== ======================================================
learnable        96 words; 60 % successor, 40 % any word        leads, at 2 to 4 times uniform: the proxy trails the
                                                                reference for long
easy             8 words; 98 % successor, 2 % any word          first to rise and first to fall: learned at once
noise            every word of the script, equally likely       sinks to a few hundredths: nothing can be learned
duplicated       noise over 64 words, but 48 distinct rows      stays low: only its words can be learned; a reference
                                                                that trains for longer learns the rows by heart, which
                                                                passes for something to learn and lifts the domain
tiny             learnable, but 24 rows                         sinks: the reference hardly saw them, so it sets no
                                                                target; the weight says nothing about their worth
mixed_quality    one learnable row, then two of noise           mostly low: the noise dilutes the excess loss, but a run
                                                                of learnable rows can lift it for a while
================ ============================================== ======================================================

The table is what DoReMi does in this short run, not what one should wish for: that a tiny domain of good rows sinks is
a weakness of the method that the demo shows rather than hides.  That learnable leads, easy follows and noise sinks
holds for other seeds; the order of the learnable domains among themselves, which are alike, is luck.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from rich.table import Table

IntArray = npt.NDArray[np.int64]


class DemoRow(TypedDict):
    """One row, in the columns of Alpaca files."""

    instruction: str
    input: str
    output: str


@dataclass(frozen=True, slots=True)
class DemoDomain:
    """One domain of the demo and what is planted in it.

    Attributes:
        name: the name of the domain, and of its file.
        role: what is planted; see the table at the top of the module.
        script: ``latin`` or ``hanzi``.
        num_rows: rows of the domain.
        num_distinct_rows: distinct rows among them.
        num_words: size of its lexicon; 0 for all words of the script.
        successor_share: how often a word is followed by its one successor, for each kind of row, taken in turn.
        expectation: what group DRO should do with it, in a few words.
    """

    name: str
    role: str
    script: str
    num_rows: int
    num_distinct_rows: int
    num_words: int
    successor_share: tuple[float, ...]
    expectation: str


def _domains_of(script: str) -> tuple[DemoDomain, ...]:
    learnable, noise = 0.6, 0.0
    table: tuple[tuple[str, str, int, int, int, tuple[float, ...], str], ...] = (
        # name, role, rows, distinct rows, words, successor share, expectation
        ("learnable_1", "learnable", 360, 360, 96, (learnable,), "much weight"),
        ("learnable_2", "learnable", 360, 360, 96, (learnable,), "much weight"),
        ("learnable_3", "learnable", 360, 360, 96, (learnable,), "much weight"),
        ("easy_1", "easy", 480, 480, 8, (0.98,), "little: learned at once"),
        ("easy_2", "easy", 480, 480, 8, (0.98,), "little: learned at once"),
        ("noise_1", "noise", 520, 520, 0, (noise,), "least: nothing to learn"),
        ("noise_2", "noise", 520, 520, 0, (noise,), "least: nothing to learn"),
        ("duplicated", "duplicated", 400, 48, 64, (noise,), "little: noise over few words"),
        ("tiny", "tiny", 24, 24, 96, (learnable,), "least: too few rows"),
        ("mixed_quality", "mixed_quality", 400, 400, 96, (learnable, noise, noise), "little: two thirds are noise"),
    )
    return tuple(
        DemoDomain(f"{script}_{name}", role, script, rows, distinct, words, share, expectation)
        for name, role, rows, distinct, words, share, expectation in table
    )


DEMO_DOMAINS: tuple[DemoDomain, ...] = (*_domains_of("latin"), *_domains_of("hanzi"))

DEMO_SETTINGS: dict[str, dict[str, object]] = {
    "tokenize": {"vocab_size": 2048, "context_length": 128},
    # The planted order is that of group DRO, which looks at who learns first: with fast embeddings, noise would trail
    # the reference for a while, too.
    "reference": {
        "model": "tiny",
        "steps": 200,
        "batch_size": 20,
        "weight_decay": 0.1,
        "seed": 1,
        "embedding_learning_rate": 3e-3,
    },
    # Clearly shorter than the reference: a proxy that overtakes it finds no excess loss but that of noise.  Excess
    # losses of 2 to 5 nats on one sequence per domain would, at step size 1, toss the weights from domain to domain.
    "proxy": {"method": "doremi", "steps": 100, "step_size": 0.4, "weight_decay": 0.1},
    "mixture": {"token_budget": 200_000},
}
"""Settings under which the planted order shows in about a minute on two cores."""

# Words are pairs of these: syllables, or characters that every reader of Chinese knows.
_LATIN_SYLLABLES = tuple(consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou")
_HANZI_CHARACTERS = tuple(
    "山水风云花鸟鱼虫日月星辰春夏秋冬东南西北金木火土天地人和江河湖海松竹梅兰琴棋书画诗酒茶米红黄蓝白青紫雨雪霜露石玉龙马牛羊田园"
)
# Long enough that answers, not prompts, take most of the context of 128 tokens; short enough that none is cut.
_SHORTEST_ANSWER, _LONGEST_ANSWER = 55, 75
_NUM_NAMES = 24


def demo_rows(seed: int = 0) -> dict[str, list[DemoRow]]:
    """Returns the rows of every domain, in the order of ``DEMO_DOMAINS``.

    Args:
        seed: of everything drawn, at least 0; the same seed gives the same rows on every machine.

    Returns:
        Rows by domain name.

    Raises:
        ValueError: the seed is negative.

    Example:
        >>> rows = demo_rows(seed=0)
        >>> len(rows), len(rows["hanzi_tiny"]), len(rows["hanzi_tiny"][0]["output"].split()) >= 55
        (20, 24, True)
    """
    if seed < 0:
        raise ValueError(f"the seed must be at least 0, got {seed}")
    rows: dict[str, list[DemoRow]] = {}
    for script in ("latin", "hanzi"):
        domains = [domain for domain in DEMO_DOMAINS if domain.script == script]
        num_lexicon_words = sum(domain.num_words for domain in domains)
        words = _words(script, _NUM_NAMES + len(domains) + num_lexicon_words, _generator(seed, script))
        names, titles, lexicon_words = np.split(words, [_NUM_NAMES, _NUM_NAMES + len(domains)])
        used = 0
        for domain, title in zip(domains, titles.tolist(), strict=True):
            lexicon = lexicon_words[used : used + domain.num_words] if domain.num_words else lexicon_words
            used += domain.num_words
            rows[domain.name] = _rows_of(domain, title, names, lexicon, _generator(seed, domain.name))
    return rows


def write_demo_corpus(folder: Path, seed: int = 0) -> list[Path]:
    """Writes one JSON Lines file per domain.

    Args:
        folder: where to write; it is made when it does not exist, and files of the same name are replaced.
        seed: as for ``demo_rows``.

    Returns:
        The files, in the order of ``DEMO_DOMAINS``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, rows in demo_rows(seed).items():
        path, unfinished = folder / f"{name}.jsonl", folder / f".{name}.jsonl.part"
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        unfinished.write_bytes(text.encode())
        # Renamed when complete, so that an interrupted call leaves no half corpus that looks whole.
        unfinished.replace(path)
        paths.append(path)
    return paths


def demo_sources(folder: Path) -> list[dict[str, str]]:
    """Returns the files that ``write_demo_corpus`` writes, as a configuration names them."""
    return [{"path": str(folder / f"{domain.name}.jsonl")} for domain in DEMO_DOMAINS]


def planted_table(domain_weights: Mapping[str, float]) -> Table:
    """Draws what was planted beside what was learned, by role."""
    from rich import box
    from rich.table import Table

    table = Table(
        title="Planted role against learned weight", box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False
    )
    for heading in ("role", "domains", "times uniform", "expected"):
        table.add_column(heading, justify="right" if heading in ("domains", "times uniform") else "left")
    by_role: dict[str, list[DemoDomain]] = {}
    for domain in DEMO_DOMAINS:
        by_role.setdefault(domain.role, []).append(domain)
    for role, domains in by_role.items():
        ratios = sorted(domain_weights[domain.name] * len(DEMO_DOMAINS) for domain in domains)
        table.add_row(role, str(len(domains)), f"{ratios[0]:.2f} to {ratios[-1]:.2f}", domains[0].expectation)
    return table


def _rows_of(
    domain: DemoDomain, title: str, names: npt.NDArray[np.str_], lexicon: npt.NDArray[np.str_], rng: np.random.Generator
) -> list[DemoRow]:
    num_rows, num_kinds = domain.num_distinct_rows, len(domain.successor_share)
    # Three names tell the prompts of a domain apart, so that they can be split into training and held-out prompts.
    chosen_names = _distinct_triples(num_rows, len(names), rng)
    lengths = rng.integers(_SHORTEST_ANSWER, _LONGEST_ANSWER + 1, size=num_rows)
    successor_share = np.array(domain.successor_share)[np.arange(num_rows) % num_kinds]
    walks = _walks(lengths, successor_share, len(lexicon), rng)
    distinct = [
        DemoRow(
            instruction=_instruction(domain.script, title, names[chosen].tolist()),
            input="",
            output=" ".join(lexicon[walk].tolist()),
        )
        for chosen, walk in zip(chosen_names, walks, strict=True)
    ]
    return [distinct[i % num_rows] for i in range(domain.num_rows)]


def _instruction(script: str, title: str, names: Sequence[str]) -> str:
    first, second, third = names
    if script == "hanzi":
        return f"唱{title}之歌，献给{first}、{second}、{third}。"
    return f"Sing the song of {title} for {first}, {second} and {third}."


def _walks(
    lengths: IntArray, successor_share: npt.NDArray[np.float64], num_words: int, rng: np.random.Generator
) -> list[IntArray]:
    """Returns one walk per row over word ids; the successor of word i is word i + 1, round the whole lexicon."""
    num_steps = int(lengths.max())
    follows = rng.random((len(lengths), num_steps)) < successor_share[:, None]
    follows[:, 0] = False
    anywhere = rng.integers(num_words, size=follows.shape)
    # Where a walk jumps, it starts again at a random word; in between it counts up from its last jump.
    steps = np.arange(num_steps)
    last_jump = np.maximum.accumulate(np.where(follows, 0, steps), axis=1)
    word_ids = (np.take_along_axis(anywhere, last_jump, axis=1) + steps - last_jump) % num_words
    return [walk[:length] for walk, length in zip(word_ids, lengths, strict=True)]


def _distinct_triples(num_triples: int, base: int, rng: np.random.Generator) -> IntArray:
    codes = rng.choice(base**3, size=num_triples, replace=False)
    return np.stack([codes // base**2, codes // base % base, codes % base], axis=1)


def _words(script: str, num_words: int, rng: np.random.Generator) -> npt.NDArray[np.str_]:
    """Returns distinct words of two parts in random order."""
    parts = _HANZI_CHARACTERS if script == "hanzi" else _LATIN_SYLLABLES
    pairs = np.array([first + second for first in parts for second in parts if first != second])
    return rng.permutation(pairs)[:num_words]


def _generator(seed: int, purpose: str) -> np.random.Generator:
    digest = hashlib.sha256(purpose.encode()).digest()
    key = np.frombuffer(digest, dtype="<u4").tolist()
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, *key])))
