"""The pictures: right marks in the right place, the same bytes again, every name drawn without a warning."""

import math
import sys

import numpy as np
import pytest

from doremi_mix.comparison import Comparison, Interval, MixtureResult, PairedResult, Verdict
from doremi_mix.report import comparison_plot, drawing, plots
from doremi_mix.report.comparison_plot import plot_comparison
from doremi_mix.report.plots import plot_trajectory, plot_weights

NATURAL, LEARNED = [0.5, 0.3, 0.2], [0.1, 0.6, 0.3]
NAMES = ["dolly", "gsm8k", "alpaca"]
STEPS = np.arange(1, 41)


def paths(num_domains, num_steps=40, seed=0):
    walk = np.random.default_rng(seed).normal(size=(num_steps, num_domains)).cumsum(axis=0) * 0.3
    weights_TK = np.exp(walk)
    return weights_TK / weights_TK.sum(axis=1, keepdims=True)


@pytest.fixture
def figures(monkeypatch):
    """Collects the figures that are drawn, to look at their marks."""
    drawn = []
    original = drawing.new_figure

    def remember(*arguments):
        drawn.append(original(*arguments))
        return drawn[-1]

    monkeypatch.setattr(drawing, "new_figure", remember)
    return drawn


def texts(axes):
    return [text.get_text() for text in axes.texts]


def names_of(axes):
    return [label.get_text() for label in axes.get_yticklabels()]


def legends(figure):
    return [[text.get_text() for text in legend.get_texts()] for legend in figure.legends]


def assert_inside(figure):
    width, height = figure.canvas.get_width_height()
    for legend in figure.legends:
        box = legend.get_window_extent()
        assert box.x0 >= 0, legend
        assert box.x1 <= width, legend
    for axes in figure.axes:
        for text in [*axes.texts, *axes.get_yticklabels(), *figure.texts]:
            box = text.get_window_extent()
            assert box.x0 >= 0, text
            assert box.x1 <= width, text
            assert box.y0 >= 0, text
            assert box.y1 <= height, text


def interval(estimate, half=math.nan):
    return Interval(estimate, estimate - half, estimate + half, half / 4)


def pair(baseline, average, worst, domains, *, mixture="learned", over="seeds and examples"):
    counts = {"num_better": 1, "num_better_interval": (0, 2), "num_clearly_better": 1, "num_clearly_worse": 0}
    rest = {"interval_over": over, "num_domains": len(domains), "seed_deviation": 0.01}
    return PairedResult(mixture, baseline, average=average, worst=worst, domains=domains, **counts, **rest)


def comparison(*pairs, num_seeds=3, p_values=None, sentence="learned is better.", lone=()):
    """What the picture reads of a comparison; the losses themselves are not drawn."""
    names = dict.fromkeys(name for pair in pairs for name in (pair.mixture, pair.baseline))
    mixtures = {name: MixtureResult(name, 2.0, (2.0,) * num_seeds, 3.0, "a", {}) for name in names}
    return Comparison(mixtures, pairs, Verdict("better", sentence, "learned", p_values or {}), num_seeds, (), lone)


def many_domains(num_domains, seed=0):
    rng = np.random.default_rng(seed)
    names = [f"a_domain_with_a_rather_long_name_that_must_be_cut_{i}" for i in range(num_domains)]
    return {name: interval(*rng.normal(-0.02, 0.05, 1), rng.uniform(0.01, 0.08)) for name in names}


LEARNED_PAIRS = (
    pair(
        "natural",
        interval(-0.03, 0.01),
        interval(-0.05, 0.08),
        {"dolly": interval(0.04, 0.01), "gsm8k": interval(-0.02, 0.01), "alpaca": interval(0.01, 0.02)},
    ),
    pair("uniform", interval(-0.04, 0.03), interval(0.06, 0.02), {"dolly": interval(0.0, 0.1)}),
    pair("natural", interval(0.01, 0.01), interval(0.0, 0.1), {"dolly": interval(0.0, 0.1)}, mixture="uniform"),
)


def test_bars_are_the_learned_weights_and_diamonds_the_natural_ones(tmp_path, figures):
    plot_weights(tmp_path / "weights.png", NAMES, NATURAL, LEARNED)
    axes = figures[0].axes[0]
    assert [bar.get_width() for bar in axes.patches] == [0.6, 0.3, 0.1]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["gsm8k", "alpaca", "dolly"]
    diamonds, uniform = axes.lines
    assert list(diamonds.get_xdata()) == [0.3, 0.2, 0.5]
    assert list(uniform.get_xdata()) == [1 / 3, 1 / 3]
    assert texts(axes) == ["learned", "60.0%", "30.0%", "10.0%", "natural", "30.0%", "20.0%", "50.0%"]
    assert axes.get_xlabel() == "share of tokens"
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == [
        "learned",
        "natural (share of the available tokens)",
        "uniform (33.3%)",
    ]


def test_intervals_are_error_bars_on_the_learned_bars(tmp_path, figures):
    intervals = [(0.05, 0.2), (0.4, 0.75), (0.3, 0.3)]
    plot_weights(tmp_path / "weights.png", NAMES, NATURAL, LEARNED, intervals=intervals)
    axes = figures[0].axes[0]
    (bars,) = axes.collections
    # Not at the height of the diamonds, which could else be taken for the middle of the interval.
    assert [segment.round(9).tolist() for segment in bars.get_segments()] == [
        [[0.4, 0.2], [0.75, 0.2]],
        [[0.3, 1.2], [0.3, 1.2]],
        [[0.05, 2.2], [0.2, 2.2]],
    ]
    assert axes.get_xlim() == (0, 0.75 * 1.03)
    assert legends(figures[0]) == [
        [
            "learned",
            "natural (share of the available tokens)",
            "uniform (33.3%)",
            "95 % interval of the mean over seeds",
        ]
    ]
    assert_inside(figures[0])


@pytest.mark.parametrize(
    ("intervals", "message"),
    [
        (
            [(0.1, 0.2)],
            "low ends of intervals must have one number per domain, got shape (1,) for 3 domains",
        ),
        (
            [(0.0, 1.0), (0.0, 1.0), (0.0, float("nan"))],
            "high ends of intervals must be finite and at least 0, got [1.0, 1.0, nan]",
        ),
        (
            [(0.0, 1.0), (0.2, 0.1), (0.0, 1.0)],
            "the low end of an interval must not lie above its high end, got [[0.0, 1.0], [0.2, 0.1], [0.0, 1.0]]",
        ),
    ],
)
def test_wrong_intervals_are_refused(tmp_path, intervals, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the whole message is compared below)
        plot_weights(tmp_path / "weights.png", NAMES, NATURAL, LEARNED, intervals=intervals)
    assert str(caught.value) == message
    assert not list(tmp_path.iterdir())


def test_lines_are_the_paths_and_the_largest_averages_are_named(tmp_path, figures):
    weights_TK = paths(12)
    average_K = weights_TK.mean(axis=0)
    names = [f"domain_{i}" for i in range(12)]
    plot_trajectory(tmp_path / "trajectory.png", names, STEPS, weights_TK, average_K)
    axes = figures[0].axes[0]
    largest = np.argsort(-average_K)[:8]
    assert texts(axes) == [f"domain_{i}  {average_K[i]:.1%}" for i in largest]
    lines = {tuple(line.get_ydata()): line for line in axes.lines}
    for rank, i in enumerate(largest):
        assert lines[tuple(weights_TK[:, i])].get_color() == plots.LINE_COLORS[rank]
    gray = [i for i in range(12) if lines[tuple(weights_TK[:, i])].get_linewidth() < 1]
    assert sorted(gray) == sorted(set(range(12)) - set(largest.tolist()))
    assert lines[1 / 12, 1 / 12].get_linestyle() != "-"


def test_names_at_the_line_ends_do_not_overlap():
    positions = np.array([0.0, 0.01, 0.011, 0.5, 0.98, 0.99, 1.0])
    spread = plots._spread(positions, gap=0.1)
    assert np.diff(spread).min() >= 0.1 - 1e-12
    assert spread.min() >= 0
    assert spread.max() <= 1 + 1e-12
    assert spread[3] == 0.5
    assert plots._spread(np.array([0.7, 0.2]), gap=0.1).tolist() == [0.7, 0.2]
    # Two that collide each give way by half.
    assert plots._spread(np.array([0.52, 0.5]), gap=0.1) == pytest.approx([0.56, 0.46])


def test_the_same_data_give_the_same_bytes_and_leave_no_trace(tmp_path):
    import matplotlib as mpl

    # copy(), because reading the backend by its key would import pyplot.
    settings, had_pyplot = mpl.rcParams.copy(), "matplotlib.pyplot" in sys.modules
    weights_TK = paths(3)
    for name in ("a", "b"):
        plot_weights(tmp_path / f"{name}1.png", NAMES, NATURAL, LEARNED)
        plot_trajectory(tmp_path / f"{name}2.png", NAMES, STEPS, weights_TK, weights_TK.mean(axis=0))
        plot_weights(tmp_path / f"{name}3.png", NAMES, NATURAL, LEARNED, intervals=[(0.0, 0.7)] * 3)
        plot_comparison(tmp_path / f"{name}4.png", comparison(*LEARNED_PAIRS))
        # A user's own style must not show in the second round.
        mpl.rcParams["axes.facecolor"] = "black"
        mpl.rcParams["font.size"] = 30
    mpl.rcParams.update({key: settings[key] for key in ("axes.facecolor", "font.size")})
    assert mpl.rcParams.copy() == settings
    for picture in ("1", "2", "3", "4"):
        first = (tmp_path / f"a{picture}.png").read_bytes()
        assert first == (tmp_path / f"b{picture}.png").read_bytes()
        assert first.startswith(b"\x89PNG")
        assert b"matplotlib" not in first.lower()
    assert ("matplotlib.pyplot" in sys.modules) == had_pyplot


def test_names_that_no_font_can_draw_become_positions(tmp_path, figures, monkeypatch):
    monkeypatch.setattr(drawing, "CJK_FONTS", ())
    names = ["中文", "cost $5 and $6", "alpaca"]
    plot_weights(tmp_path / "weights.png", names, NATURAL, LEARNED)
    plot_trajectory(tmp_path / "trajectory.png", names, STEPS, paths(3), paths(3).mean(axis=0))
    labels = [label.get_text() for label in figures[0].axes[0].get_yticklabels()]
    assert labels == [r"cost \$5 and \$6", "alpaca", "#1"]
    footnote = "#n: the n-th domain; no installed font has the characters of its name"
    for figure in figures:
        assert footnote in [text.get_text() for text in figure.texts]


def test_an_installed_font_with_the_characters_is_used(tmp_path, figures, monkeypatch):
    from matplotlib import font_manager

    # Any second font stands for a Chinese one: the default is said to lack the letter "d", this one to have all.
    second = next(entry for entry in font_manager.fontManager.ttflist if entry.name == "DejaVu Serif")
    monkeypatch.setattr(drawing, "CJK_FONTS", ("Absent Font", second.name))
    monkeypatch.setattr(
        drawing, "read_glyphs", lambda path: set(range(128)) - (set() if "Serif" in path else {ord("d")})
    )
    plot_weights(tmp_path / "weights.png", NAMES, NATURAL, LEARNED)
    label = figures[0].axes[0].get_yticklabels()[0]
    assert label.get_text() == "gsm8k"
    assert label.get_fontname() == "DejaVu Serif"


@pytest.mark.parametrize("num_domains", [1, 2, 60])
def test_few_and_many_domains_stay_inside_the_picture(tmp_path, figures, num_domains):
    names = [f"a_domain_with_a_rather_long_name_that_must_be_cut_{i}" for i in range(num_domains)]
    weights_TK = paths(num_domains, num_steps=1 if num_domains == 1 else 40)
    average_K = weights_TK.mean(axis=0)
    plot_weights(tmp_path / "weights.png", names, np.full(num_domains, 1 / num_domains), average_K)
    plot_trajectory(tmp_path / "trajectory.png", names, np.arange(1, len(weights_TK) + 1), weights_TK, average_K)
    for figure in figures:
        assert_inside(figure)


def test_weights_that_round_to_nothing_say_so():
    assert [plots._percent(share) for share in (0.0, 5e-5, 0.0006, 1.0)] == ["0.0%", "<0.1%", "0.1%", "100.0%"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [], []), "there must be at least one domain to draw"),
        ((["a"], [0.5, 0.5], [1.0]), "natural shares must have one number per domain, got shape (2,) for 1 domains"),
        ((["a"], [1.0], [float("nan")]), "learned shares must be finite and at least 0, got [nan]"),
    ],
)
def test_wrong_shares_are_refused_before_a_file_is_made(tmp_path, arguments, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the whole message is compared below)
        plot_weights(tmp_path / "weights.png", *arguments)
    assert str(caught.value) == message
    assert not list(tmp_path.iterdir())


def test_a_trajectory_of_another_shape_is_refused(tmp_path):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the whole message is compared below)
        plot_trajectory(tmp_path / "t.png", NAMES, STEPS[:5], paths(3), LEARNED)
    assert str(caught.value) == (
        "weights must have one row per step and one column per domain, got shape (40, 3) for 5 steps and 3 domains"
    )


def marks(axes):
    """The points of a panel: place, shape and fill, from top to bottom."""
    points = [line for line in axes.lines if len(line.get_xdata()) == 1 and line.get_marker() in {"o", "s", "X", "d"}]
    points.sort(key=lambda line: line.get_ydata()[0])
    return [(line.get_xdata()[0], line.get_marker(), line.get_markerfacecolor()) for line in points]


def spans(axes):
    """The interval lines of a panel, from top to bottom."""
    lines = [line for line in axes.lines if len(line.get_xdata()) == 2 and len(set(line.get_ydata())) == 1]
    lines.sort(key=lambda line: line.get_ydata()[0])
    return [tuple(np.round(line.get_xdata(), 9).tolist()) for line in lines]


def test_a_comparison_shows_the_mixtures_and_the_domains(tmp_path, figures):
    compared = comparison(*LEARNED_PAIRS, p_values={"natural": 0.01, "uniform": 0.06})
    plot_comparison(tmp_path / "comparison.png", compared)
    left, right = figures[0].axes
    # The largest gain on top; the pair that is not about the candidate is not there.
    assert names_of(left) == ["uniform", "natural"]
    hollow, blue, ink = "white", drawing.LEARNED, drawing.INK
    # The average against uniform leaves zero out, but the verdict does not call it reliable: it is hollow.
    assert marks(left) == [(-0.04, "o", hollow), (0.06, "s", ink), (-0.03, "o", blue), (-0.05, "s", hollow)]
    assert spans(left) == [(-0.07, -0.01), (0.04, 0.08), (-0.04, -0.02), (-0.13, 0.03)]
    assert names_of(right) == ["gsm8k", "alpaca", "dolly"]
    assert marks(right) == [(-0.02, "o", blue), (0.01, "o", hollow), (0.04, "X", ink)]
    assert spans(right) == [(-0.03, -0.01), (-0.01, 0.03), (0.03, 0.05)]
    sides = ["\N{LEFTWARDS ARROW} learned better", "learned worse \N{RIGHTWARDS ARROW}"]
    assert texts(left) == ["-0.0400", "+0.0600", "-0.0300", "-0.0500", *sides]
    assert texts(right) == ["-0.0200", "+0.0100", "+0.0400", *sides]
    assert legends(figures[0]) == [
        ["average over domains", "worst domain"],
        ["clearly better (1)", "unclear (1)", "clearly worse (1)"],
    ]
    for axes in (left, right):
        assert [line for line in axes.lines if list(line.get_xdata()) == [0, 0]], "the zero line"
    assert [text.get_text() for text in figures[0].texts] == [
        "learned minus each other mixture",
        "learned minus natural, by domain",
        "learned is better.",
        "difference in held-out loss, nats per token: lower is better; 3 seeds; "
        "lines: 95 % intervals over seeds and held-out examples",
        "Worst domain: the highest loss under learned minus the highest under the other mixture; "
        "these may be two domains.",
        "Filled is clear: the interval leaves zero out.  About one in twenty does so by luck alone; "
        "the averages of the verdict are held to its stricter test.",
    ]


def test_one_seed_gives_points_and_no_claim(tmp_path, figures):
    domains = {"dolly": interval(0.04, 0.01), "gsm8k": interval(-0.02, 0.01)}
    one = pair("uniform", interval(-0.03, 0.01), interval(-0.05, 0.01), domains, over="examples")
    plot_comparison(tmp_path / "c.png", comparison(one, num_seeds=1, p_values={"uniform": math.nan}))
    left, right = figures[0].axes
    assert spans(left) == spans(right) == []
    assert marks(left) == [(-0.03, "o", "white"), (-0.05, "s", "white")]
    assert marks(right) == [(-0.02, "d", "white"), (0.04, "d", "white")]
    shown = [text.get_text() for text in figures[0].texts]
    # Without the natural mixture, the first one stands in.
    assert "learned minus uniform, by domain" in shown
    assert "With one seed, every difference here may be luck." in shown
    assert "difference in held-out loss, nats per token: lower is better; one seed, so no intervals" in shown
    assert legends(figures[0])[1] == ["no interval (2)"]


def test_an_overlong_interval_is_cut_and_an_unknown_one_is_a_point(tmp_path, figures):
    domains = {f"d{i}": interval(-0.01 * i, 0.005) for i in range(1, 8)}
    domains |= {"few": interval(-0.02, 9.0), "lone": interval(-0.05)}
    one = pair("natural", interval(-0.03, 0.01), interval(-0.05, 0.01), domains)
    plot_comparison(tmp_path / "c.png", comparison(one, lone=("lone",)))
    right = figures[0].axes[1]
    low, high = right.get_xlim()
    assert -0.2 < low < 0 < high < 0.2
    assert len(spans(right)) == 8
    assert (round(low, 9), round(high, 9)) in spans(right)
    # Carets whose tips lie on the edges.
    carets = {line.get_marker(): line.get_xdata()[0] for line in right.lines if line.get_marker() in {4, 5}}
    assert carets == {4: low, 5: high}
    assert legends(figures[0])[1] == ["clearly better (7)", "unclear (1)", "no interval (1)"]
    shown = [text.get_text() for text in figures[0].texts]
    assert "An arrow: the interval goes on outside of the panel." in shown
    assert "No interval: one held-out sequence has no spread." in shown


@pytest.mark.parametrize("num_domains", [1, 20, 60])
@pytest.mark.parametrize("baseline", ["b", "a_mixture_with_a_rather_long_name_that_must_be_cut"])
def test_comparisons_of_few_and_many_stay_inside_the_picture(tmp_path, figures, num_domains, baseline):
    sentence = "Over 3 seeds, learned is better than natural by 0.0494 (0.0371 to 0.0616)" + ", and more" * 20
    one = pair(baseline, interval(-0.03, 0.01), interval(-0.05, 0.01), many_domains(num_domains))
    plot_comparison(tmp_path / "c.png", comparison(one, sentence=sentence))
    assert_inside(figures[0])
    left, right = figures[0].axes
    assert min(axes.get_window_extent().width for axes in (left, right)) >= 3.0 * 160 - 1
    # The names of the right panel do not run into the numbers of the left one.
    assert max(text.get_window_extent().x1 for text in left.texts[:2]) < min(
        label.get_window_extent().x0 for label in right.get_yticklabels()
    )


def test_names_of_a_comparison_that_no_font_can_draw_become_positions(tmp_path, figures, monkeypatch):
    monkeypatch.setattr(drawing, "CJK_FONTS", ())
    one = pair(
        "我的 $1", interval(-0.03, 0.01), interval(-0.05, 0.01), {"a $5": interval(0.0, 0.1), "数学": interval(1.0)}
    )
    plot_comparison(tmp_path / "c.png", comparison(one, sentence="learned is better than 我的 $1, worth $2."))
    left, right = figures[0].axes
    assert names_of(left) == ["#2"]
    assert names_of(right) == [r"a \$5", "#2"]
    shown = [text.get_text() for text in figures[0].texts]
    assert r"learned is better than #2, worth \$2." in shown
    for what in ("mixture", "domain"):
        assert f"#n: the n-th {what} of results.json; no installed font has the characters of its name" in shown


def test_a_title_is_broken_into_lines_of_about_one_length_that_fit():
    sentence = "Over 3 seeds, learned is better than natural by 0.0494 and uniform by 0.0335 with 95 % intervals."
    assert comparison_plot._wrap(sentence, 20.0) == [sentence.replace(" %", "\N{NO-BREAK SPACE}%")]
    assert comparison_plot._wrap(sentence, 3.6) == [
        "Over 3 seeds, learned is better than",
        "natural by 0.0494 and uniform by",
        "0.0335 with 95\N{NO-BREAK SPACE}% intervals.",
    ]
