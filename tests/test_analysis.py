"""What is said of a domain's rows, against counts by hand."""

import numpy as np

from doremi_mix.filters.analysis import MOST_LANGUAGES, PROBABILITIES, describe_domain

IDS = ["d:1", "d:2", "d:3", "d:5"]


def test_numbers_flags_and_languages():
    columns = {
        "text_len": np.array([10, 40, 30, 40], dtype=np.int32),
        "alnum_ratio": np.array([0.5, 0.25, np.nan, 1.0], dtype=np.float32),
        "placeholder_answer": np.array([True, False, True, False]),
        "lang": np.array(["en", "zh", "en", ""], dtype=object),
    }
    every = describe_domain(columns, np.ones(4, dtype=bool), IDS, 3)
    assert every["num_rows"] == 4
    assert every["totals"] == {"text_len": 120}
    assert every["flags"] == {"placeholder_answer": 2}
    assert every["languages"] == {"en": 0.5, "unknown": 0.25, "zh": 0.25}
    assert every["quantiles"]["text_len"][PROBABILITIES.index(0.5)] == 35
    assert every["quantiles"]["alnum_ratio"][PROBABILITIES.index(0.5)] == 0.5  # of the three that are numbers
    # Of two of one length, the earlier one first.
    assert every["longest"] == [
        {"id": "d:2", "characters": 40},
        {"id": "d:5", "characters": 40},
        {"id": "d:3", "characters": 30},
    ]


def test_only_kept_rows_are_described():
    columns = {"text_len": np.array([10, 40, 30, 40], dtype=np.int32)}
    kept = describe_domain(columns, np.array([True, False, False, False]), IDS, 3)
    assert kept["num_rows"] == 1
    assert kept["totals"] == {"text_len": 10}
    assert kept["longest"] == [{"id": "d:1", "characters": 10}]


def test_a_score_that_nobody_has_has_no_quantiles():
    columns = {"perplexity": np.full(3, np.nan, dtype=np.float32)}
    assert describe_domain(columns, np.ones(3, dtype=bool), (), 0)["quantiles"] == {"perplexity": None}


def test_rare_languages_are_put_together():
    names = [f"l{i:02d}" for i in range(MOST_LANGUAGES + 2)]
    columns = {"lang": np.array(names * 2 + ["l00"], dtype=object)}
    shares = describe_domain(columns, np.ones(len(names) * 2 + 1, dtype=bool), (), 0)["languages"]
    assert next(iter(shares)) == "l00"
    assert len(shares) == MOST_LANGUAGES + 1
    assert shares["other"] == 4 / (len(names) * 2 + 1)
    assert abs(sum(shares.values()) - 1) < 1e-12
