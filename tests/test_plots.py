"""The pictures: right marks in the right place, the same bytes again, every name drawn without a warning."""

import sys

import numpy as np
import pytest

from doremi_mix.report import plots
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
    original = plots._figure

    def remember(*arguments):
        drawn.append(original(*arguments))
        return drawn[-1]

    monkeypatch.setattr(plots, "_figure", remember)
    return drawn


def texts(axes):
    return [text.get_text() for text in axes.texts]


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
        # A user's own style must not show in the second round.
        mpl.rcParams["axes.facecolor"] = "black"
        mpl.rcParams["font.size"] = 30
    mpl.rcParams.update({key: settings[key] for key in ("axes.facecolor", "font.size")})
    assert mpl.rcParams.copy() == settings
    for picture in ("1", "2"):
        first = (tmp_path / f"a{picture}.png").read_bytes()
        assert first == (tmp_path / f"b{picture}.png").read_bytes()
        assert first.startswith(b"\x89PNG")
        assert b"matplotlib" not in first.lower()
    assert ("matplotlib.pyplot" in sys.modules) == had_pyplot


def test_names_that_no_font_can_draw_become_positions(tmp_path, figures, monkeypatch):
    monkeypatch.setattr(plots, "CJK_FONTS", ())
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
    monkeypatch.setattr(plots, "CJK_FONTS", ("Absent Font", second.name))
    monkeypatch.setattr(plots, "_glyphs", lambda path: set(range(128)) - (set() if "Serif" in path else {ord("d")}))
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
        width, height = figure.canvas.get_width_height()
        for axes in figure.axes:
            for text in [*axes.texts, *axes.get_yticklabels(), *figure.texts]:
                box = text.get_window_extent()
                assert box.x0 >= 0, text
                assert box.x1 <= width, text
                assert box.y0 >= 0, text
                assert box.y1 <= height, text


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
