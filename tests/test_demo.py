"""The demo corpus: what is planted is really there, and nothing else is."""

import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest

from doremi_mix.demo import DEMO_DOMAINS, demo_rows, planted_table, write_demo_corpus

ROWS = demo_rows(seed=0)
BY_ROLE = {
    role: [domain for domain in DEMO_DOMAINS if domain.role == role]
    for role in ("learnable", "easy", "noise", "duplicated", "tiny", "mixed_quality")
}


def answers(name):
    return [row["output"].split() for row in ROWS[name]]


def successor_share(walks):
    """How often a word is followed by its most frequent follower, and the number of words seen."""
    followers = {}
    for walk in walks:
        for word, follower in itertools.pairwise(walk):
            followers.setdefault(word, Counter())[follower] += 1
    most = sum(counts.most_common(1)[0][1] for counts in followers.values())
    return most / sum(sum(counts.values()) for counts in followers.values()), len(followers)


def test_twenty_domains_in_two_scripts():
    assert len(DEMO_DOMAINS) == len({domain.name for domain in DEMO_DOMAINS}) == 20
    assert list(ROWS) == [domain.name for domain in DEMO_DOMAINS]
    assert Counter(domain.script for domain in DEMO_DOMAINS) == {"latin": 10, "hanzi": 10}
    for domain in DEMO_DOMAINS:
        text = "".join(row["output"] for row in ROWS[domain.name]).replace(" ", "")
        in_script = all(("一" <= character <= "鿿") == (domain.script == "hanzi") for character in text)
        assert in_script, domain.name


def test_learnable_domains_have_one_successor_in_sixty_percent():
    for domain in BY_ROLE["learnable"]:
        share, num_words = successor_share(answers(domain.name))
        # .6 by the successor and .4 / 96 of the jumps; 23,000 transitions give a standard error of .003.
        assert share == pytest.approx(0.6 + 0.4 / 96, abs=0.013), domain.name
        assert num_words == 96


def test_easy_domains_are_a_cycle_of_eight_words():
    for domain in BY_ROLE["easy"]:
        share, num_words = successor_share(answers(domain.name))
        assert share == pytest.approx(0.98 + 0.02 / 8, abs=0.005), domain.name
        assert num_words == 8


def test_noise_is_uniform_over_all_words_of_the_script():
    for domain in BY_ROLE["noise"]:
        counts = Counter(itertools.chain.from_iterable(answers(domain.name)))
        num_words = sum(other.num_words for other in DEMO_DOMAINS if other.script == domain.script)
        total = sum(counts.values())
        assert len(counts) == num_words
        entropy = -sum(count / total * math.log(count / total) for count in counts.values())
        # An estimated entropy is low by (words - 1) / (2 draws).
        assert entropy + (num_words - 1) / (2 * total) == pytest.approx(math.log(num_words), abs=0.003)
        # Nor does a word say anything of the next: the counts of pairs scatter as those of independent draws.
        pairs = Counter(itertools.chain.from_iterable(itertools.pairwise(walk) for walk in answers(domain.name)))
        expected = sum(pairs.values()) / num_words**2
        chi_squared = sum((pairs[pair] - expected) ** 2 / expected for pair in pairs)
        chi_squared += expected * (num_words**2 - len(pairs))
        assert chi_squared / num_words**2 == pytest.approx(1, abs=6 * math.sqrt(2) / num_words + 0.01)


def test_duplicated_domains_repeat_few_rows():
    for domain in BY_ROLE["duplicated"]:
        counts = Counter((row["instruction"], row["output"]) for row in ROWS[domain.name])
        assert len(counts) == domain.num_distinct_rows == 48
        assert set(counts.values()) == {8, 9}


def test_tiny_domains_have_two_dozen_learnable_rows():
    for domain in BY_ROLE["tiny"]:
        assert len(ROWS[domain.name]) == 24
        # .6 of some 1,500 transitions, a little more because the most frequent follower of few is a jump at times.
        assert successor_share(answers(domain.name))[0] == pytest.approx(0.61, abs=0.05)


def test_two_of_three_rows_of_mixed_quality_are_noise():
    for domain in BY_ROLE["mixed_quality"]:
        walks = answers(domain.name)
        assert successor_share(walks[0::3])[0] == pytest.approx(0.604, abs=0.02)
        # The most frequent of 96 equally likely followers, seen some 90 times a word, leads by chance alone.
        for noise in (walks[1::3], walks[2::3]):
            assert successor_share(noise)[0] < 0.06


def test_lexicons_do_not_overlap():
    lexicons = {
        domain.name: set(itertools.chain.from_iterable(answers(domain.name)))
        for domain in DEMO_DOMAINS
        if domain.role != "noise"
    }
    for one, other in itertools.combinations(lexicons, 2):
        assert not lexicons[one] & lexicons[other], (one, other)


def test_prompts_tell_the_rows_of_a_domain_apart_and_name_it():
    titles = {}
    for domain in DEMO_DOMAINS:
        prompts = {row["instruction"] for row in ROWS[domain.name]}
        assert len(prompts) == domain.num_distinct_rows, domain.name
        separator = " for " if domain.script == "latin" else "，"
        titles[domain.name] = {prompt.split(separator)[0] for prompt in prompts}
        assert len(titles[domain.name]) == 1
    assert len(set.union(*titles.values())) == 20


def test_the_seed_decides_everything():
    assert demo_rows(seed=0) == ROWS
    other = demo_rows(seed=1)
    assert [len(rows) for rows in other.values()] == [len(rows) for rows in ROWS.values()]
    for name, rows in other.items():
        assert not {row["output"] for row in rows} & {row["output"] for row in ROWS[name]}, name
    # Golden: a change here changes the numbers of the demo in the README.
    assert ROWS["latin_easy_1"][0]["output"].startswith("siri bufi dafi fima taga komo rebu tagi siri ")
    assert ROWS["hanzi_tiny"][0]["instruction"] == "唱酒辰之歌，献给云米、湖霜、棋天。"
    with pytest.raises(ValueError, match="the seed must be at least 0, got -1"):
        demo_rows(seed=-1)


def test_the_files_hold_the_rows(tmp_path):
    paths = write_demo_corpus(tmp_path / "new" / "demo", seed=0)
    assert [path.name for path in paths] == [f"{domain.name}.jsonl" for domain in DEMO_DOMAINS]
    assert sorted(path.name for path in (tmp_path / "new" / "demo").iterdir()) == sorted(path.name for path in paths)
    for path in paths:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == ROWS[path.stem]
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in write_demo_corpus(tmp_path / "new" / "demo", seed=0)] == before


def test_answers_fill_but_never_overflow_a_context_of_128_tokens():
    lengths = np.array([len(answer) for domain in DEMO_DOMAINS for answer in answers(domain.name)])
    # The contest's prompt takes some 40 tokens of a vocabulary trained on the corpus.
    assert lengths.min() >= 55
    assert lengths.max() <= 75


def test_the_table_gives_each_role_one_line_of_a_narrow_terminal(capsys):
    from rich.console import Console

    weights = {domain.name: 0.01 for domain in DEMO_DOMAINS}
    weights |= {"latin_learnable_1": 0.75, "hanzi_easy_2": 0.06}
    Console(width=80).print(planted_table(weights))
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "Planted role against learned weight"
    assert [line.split() for line in lines[4:] if line] == [
        ["learnable", "6", "0.20", "to", "15.00", "much", "weight"],
        ["easy", "4", "0.20", "to", "1.20", "little:", "learned", "at", "once"],
        ["noise", "4", "0.20", "to", "0.20", "least:", "nothing", "to", "learn"],
        ["duplicated", "2", "0.20", "to", "0.20", "little:", "noise", "over", "few", "words"],
        ["tiny", "2", "0.20", "to", "0.20", "least:", "too", "few", "rows"],
        ["mixed_quality", "2", "0.20", "to", "0.20", "little:", "two", "thirds", "are", "noise"],
    ]
