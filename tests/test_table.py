"""The tables for a terminal, to the letter: 80 columns with names of 20 characters."""

import io

from rich.console import Console

from doremi_mix.report.table import make_rows, render_comparison, render_table

LONG = "gpteacher_toolformer"


def printed(table):
    stream = io.StringIO()
    Console(file=stream, width=80).print(table)
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    return [line.rstrip() for line in lines]


def rows(**given):
    allocation = {
        "domains": {
            name: {"allocated_tokens": 1_000_000, "drawn_tokens": 999_000, "drawn_rows": 12, "epochs": 0.25}
            for name in (LONG, "dolly")
        }
    }
    return make_rows(
        {LONG: 0.06, "dolly": 0.94},
        {LONG: 0.75, "dolly": 0.25},
        {LONG: 1.418, "dolly": 0.0},
        {LONG: 12_774_902, "dolly": 4_000_000},
        given.pop("allocation", allocation),
        **given,
    )


def interval(estimate, half):
    if half is None:
        return {"estimate": estimate, "low": None, "high": None, "standard_error": None}
    return {"estimate": estimate, "low": estimate - half, "high": estimate + half, "standard_error": half / 4}


def pair(mixture, baseline, average, worst):
    return {
        "mixture": mixture,
        "baseline": baseline,
        "average": interval(*average),
        "worst": interval(*worst),
        "num_better": 14,
        "num_clearly_better": 8,
        "num_clearly_worse": 3,
        "num_domains": 20,
    }


def results(seeds):
    losses = {"learned": (5.3106, 8.25, LONG), "natural": (5.5, 10.125, "dolly"), LONG: (5.2846, 8.0, "[b]x")}
    return {
        "seeds": seeds,
        "mixtures": {
            name: {"average_loss": average, "worst_loss": worst, "worst_domain": domain}
            for name, (average, worst, domain) in losses.items()
        },
        "pairs": [
            pair("learned", "natural", (-0.0260, 0.0071), (-1.875, 0.024)),
            pair("learned", LONG, (0.0260, 0.0171), (0.25, None)),
            pair(LONG, "natural", (-0.1, 0.0001), (-0.1, 0.0001)),
        ],
    }


def test_rows_have_the_interval_and_the_deviation_of_several_seeds():
    first = rows(intervals={LONG: (0.7, 0.8), "dolly": (0.2, 0.3)}, standard_deviation={LONG: 0.03, "dolly": 0.04})[0]
    assert first == {
        "domain": LONG,
        "natural_weight": 0.06,
        "domain_weight": 0.75,
        "ratio": 12.5,
        "excess_loss": 1.418,
        "available_tokens": 12_774_902,
        "interval": [0.7, 0.8],
        "standard_deviation": 0.03,
        "allocated_tokens": 1_000_000,
        "drawn_tokens": 999_000,
        "drawn_rows": 12,
        "epochs": 0.25,
    }
    for nothing in (None, {}):
        assert not {"interval", "standard_deviation"} & set(rows(intervals=nothing, standard_deviation=nothing)[0])


def test_the_interval_is_a_narrow_column():
    given = {
        "intervals": {LONG: (0.031, 0.9999), "dolly": (0.2, 0.3)},
        "standard_deviation": {LONG: 0.03, "dolly": 0.04},
    }
    assert printed(render_table(rows(**given), "Domain weights")) == [
        "Domain weights",
        "",
        "                      natural learned                  excess allocated",
        " domain                 share  weight       95 % ratio   loss    tokens epochs",
        " ─────────────────────────────────────────────────────────────────────────────",
        " gpteacher_toolformer   0.060   0.750 .031-1.000 12.50  1.418 1,000,000   0.25",
        " dolly                  0.940   0.250  .200-.300  0.27  0.000 1,000,000   0.25",
        "",
    ]
    # Without a mixture there is room for the available tokens.
    assert printed(render_table(rows(allocation=None, **given), "Domain weights"))[2:6] == [
        "                      natural learned                  excess  available",
        " domain                 share  weight       95 % ratio   loss     tokens",
        " ───────────────────────────────────────────────────────────────────────",
        " gpteacher_toolformer   0.060   0.750 .031-1.000 12.50  1.418 12,774,902",
    ]


def test_a_comparison_shows_losses_and_the_candidates_differences():
    assert printed(render_comparison(results([0, 1, 2]))) == [
        "Held-out loss, nats per token (mean over 3 seeds)",
        "",
        "                      average   worst worst",
        " mixture                 loss    loss domain",
        " ─────────────────────────────────────────────────────────",
        " gpteacher_toolformer  5.2846  8.0000 [b]x",
        " learned               5.3106  8.2500 gpteacher_toolformer",
        " natural               5.5000 10.1250 dolly",
        "",
        "learned minus the others (lower is better)",
        "",
        "                               average            worst better clearly clearly",
        " mixture                          loss             loss  of 20  better   worse",
        " ─────────────────────────────────────────────────────────────────────────────",
        " gpteacher_toolformer +0.0260 ± 0.0171          +0.2500     14       8       3",
        " natural              -0.0260 ± 0.0071 -1.8750 ± 0.0240     14       8       3",
        "",
        "±: 95 % interval over seeds and held-out examples",
        "better: domains with a lower loss; clearly: their interval leaves zero out",
    ]


def test_a_comparison_of_one_seed_claims_nothing():
    assert printed(render_comparison(results([0]))) == [
        "Held-out loss, nats per token (one seed)",
        "",
        "                      average   worst worst",
        " mixture                 loss    loss domain",
        " ─────────────────────────────────────────────────────────",
        " gpteacher_toolformer  5.2846  8.0000 [b]x",
        " learned               5.3106  8.2500 gpteacher_toolformer",
        " natural               5.5000 10.1250 dolly",
        "",
        "learned minus the others (lower is better)",
        "",
        "                      average   worst better",
        " mixture                 loss    loss  of 20",
        " ───────────────────────────────────────────",
        " gpteacher_toolformer +0.0260 +0.2500     14",
        " natural              -0.0260 -1.8750     14",
        "",
        "better: domains with a lower loss",
    ]
