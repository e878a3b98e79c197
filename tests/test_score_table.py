"""The tables of evaluate, to the letter: 80 columns with names of 20 characters."""

import io

from rich.console import Console

from doremi_mix.report.score_table import render_held_out, render_scores


def printed(table):
    stream = io.StringIO()
    Console(file=stream, width=80).print(table)
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    return [line.rstrip() for line in lines]


def row(task, base, tuned, ratio, paired=True, num_items=100):
    sides = {
        side: {"score": value, "standard_error": error, "num_items": num_items}
        for side, (value, error) in (("base", base), ("tuned", tuned))
    }
    return {
        "task": task,
        "metric": "acc,none",
        **sides,
        "ratio": ratio[0],
        "ratio_standard_error": ratio[1],
        "paired": paired,
    }


def test_scores_and_the_contest_s_mean():
    summary = {
        "unit": "percent",
        "tasks": [
            row("arc_challenge", (40.0, 4.9237), (41.0, 4.9431), (1.025, 0.0512)),
            row("mmlu", (54.4098, 0.6), (54.5, 0.6), (1.0017, 0.0091), num_items=5700),
            row("scrolls_summscreenfd", (2.7047, None), (9.75, 0.5), (3.6048, None)),
        ],
        "contest": {"mean_ratio": 1.554562, "standard_error": 0.12345},
        "why_no_contest": None,
    }
    assert printed(render_scores(summary)) == [
        "Benchmark scores, %",
        "",
        " task                 items       base      tuned         ratio",
        " " + 62 * "─",
        " arc_challenge          100 40.0 ± 4.9 41.0 ± 4.9 1.025 ± 0.051",
        " mmlu                 5,700 54.4 ± 0.6 54.5 ± 0.6 1.002 ± 0.009",
        " scrolls_summscreenfd   100        2.7  9.8 ± 0.5         3.605",
        "",
        " mean ratio                                       1.555 ± 0.123",
        "",
        "±: standard error over items",
    ]


def test_what_cannot_be_had_is_said():
    summary = {
        "unit": "percent",
        "tasks": [row("gsm8k", (0.0, 0.0), (2.0, 1.4), (None, None), paired=False)],
        "contest": None,
        "why_no_contest": "gsm8k: the base model scores 0 [so]",
    }
    lines = printed(render_scores(summary))
    assert lines[4] == " gsm8k   100  0.0 2.0 ± 1.4     -"
    assert " ".join(lines[6:]) == (
        "±: standard error over items; that of a ratio takes the two models' errors as independent; "
        "-: the base score is 0 no contest score: gsm8k: the base model scores 0 [so]"
    )


def test_held_out_losses_the_largest_gain_first():
    losses = {
        "average": {"base": 2.5, "tuned": 2.25, "difference": -0.25, "standard_error": 0.0123},
        "gpteacher_toolformer": {"base": 2.0, "tuned": 2.1, "difference": 0.1, "standard_error": None},
        "[b]dolly": {"base": 3.0, "tuned": 2.4, "difference": -0.6, "standard_error": 0.02},
        "水": {"base": None, "tuned": None, "difference": None, "standard_error": None},
    }
    assert printed(render_held_out(losses)) == [
        "Held-out loss, nats per token",
        "",
        " domain                 base  tuned     tuned - base",
        " " + 51 * "─",
        " [b]dolly             3.0000 2.4000 -0.6000 ± 0.0200",
        " gpteacher_toolformer 2.0000 2.1000          +0.1000",
        " 水                        -      -                -",
        "",
        " average              2.5000 2.2500 -0.2500 ± 0.0123",
        "",
        "±: standard error over held-out examples",
    ]
