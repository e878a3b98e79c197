"""Two pictures of a run: the weights that were learned, and the path by which they were.

Axes: K domains, T updates.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from doremi_mix.report import drawing
from doremi_mix.report.drawing import FAINT_INK, GRID, INK, LEARNED, PNG

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FloatArray = npt.NDArray[np.float64]

# Told from the bar by shape, and by lightness in gray.
NATURAL_MARKER: dict[str, Any] = {
    "marker": "D",
    "markersize": 5.5,
    "markerfacecolor": "#f5b02e",
    "markeredgecolor": INK,
    "markeredgewidth": 0.8,
    "linestyle": "none",
}
# Told apart under the common color vision deficiencies; every second line is dashed besides.
LINE_COLORS = ("#0072b2", "#d55e00", "#007a5a", "#a6357a", "#111827", "#3a9bd9", "#8c6d1f", "#7a7fd1")
LINE_STYLES = ("-", (0, (5, 1.5)))


def plot_weights(
    path: Path | str,
    domains: Sequence[str],
    natural: npt.ArrayLike,
    learned: npt.ArrayLike,
    uniform: float | None = None,
    intervals: Sequence[tuple[float, float]] | None = None,
) -> None:
    """Draws the learned weight of each domain beside its natural and its uniform share.

    One row per domain, the largest learned weight on top.  The bar is the learned weight, the diamond the natural
    share, the dashed line the uniform share: told apart by shape, so that no color is needed.  Intervals are thin bars
    with caps at the foot of the learned bar, where no diamond can be taken for their middle.

    Args:
        path: the PNG file to write; its folder must exist.
        domains: names of the domains, length K.
        natural: share of the available tokens of each domain, shape [K].
        learned: learned share of tokens of each domain, shape [K].
        uniform: the uniform share; 1/K when not given.
        intervals: 95 % interval of the mean over seeds of each learned share (low, high), length K; None for one seed.

    Raises:
        ValueError: the lengths disagree, there is no domain, a share is not a finite number of at least 0, or the low
            end of an interval lies above its high end.
    """
    natural_K, learned_K = (
        _shares("natural shares", natural, len(domains)),
        _shares("learned shares", learned, len(domains)),
    )
    bounds_2K = None if intervals is None else _bounds(intervals, len(domains))
    uniform = 1 / len(domains) if uniform is None else uniform
    labels, font, footnote = drawing.choose_labels(domains)
    with drawing.own_style(font):
        _draw_weights(labels, natural_K, learned_K, uniform, bounds_2K, footnote).savefig(path, **PNG)


def _draw_weights(
    labels: Sequence[str],
    natural_K: FloatArray,
    learned_K: FloatArray,
    uniform: float,
    bounds_2K: FloatArray | None,
    footnote: str,
) -> Figure:
    order = sorted(range(len(labels)), key=lambda i: (-learned_K[i], i))
    row_inches, font_size = (0.29, 9.5) if len(labels) <= 30 else (0.2, 7.5)
    # The interval makes the legend two lines high.
    top = 1.4 if bounds_2K is None else 1.55
    fig = drawing.new_figure(9.0, 0.6 + top + row_inches * len(labels))
    axes = drawing.add_axes(fig, left=drawing.label_inches(labels, font_size), right=1.6, top=top, bottom=0.6)
    rows = np.arange(len(labels))
    axes.barh(rows, learned_K[order], height=0.64, color=LEARNED, label="learned", zorder=2)
    axes.plot(natural_K[order], rows, **NATURAL_MARKER, label="natural (share of the available tokens)", zorder=5)
    axes.axvline(uniform, color=INK, linewidth=1, linestyle=(0, (4, 3)), label=f"uniform ({uniform:.1%})", zorder=3)
    axes.set_yticks(rows, [labels[i] for i in order], fontsize=font_size, color=INK)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    largest = max(float(learned_K.max()), float(natural_K.max()), uniform)
    if bounds_2K is not None:
        _draw_intervals(axes, bounds_2K[:, order])
        largest = max(largest, float(bounds_2K.max()))
    axes.set_xlim(0, largest * 1.03)
    axes.xaxis.set_major_formatter(_percent_axis)
    axes.set_xlabel("share of tokens", color=FAINT_INK)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    # The numbers stand in two columns beside the bars, where they cannot be taken for one another.
    for column_inches, heading, shares_K, color in (
        (0.7, "learned", learned_K, INK),
        (1.4, "natural", natural_K, FAINT_INK),
    ):
        at: dict[str, Any] = {
            "xytext": (column_inches * 72, 0),
            "textcoords": "offset points",
            "ha": "right",
            "va": "center_baseline",
            "color": color,
        }
        axes.annotate(heading, (1, -0.95), xycoords=("axes fraction", "data"), fontsize=8.5, **at)
        for row, i in enumerate(order):
            axes.annotate(
                _percent(shares_K[i]), (1, row), xycoords=("axes fraction", "data"), fontsize=font_size - 0.5, **at
            )
    drawing.add_title(fig, "Domain weights", f"how much of each of the {len(labels)} domains to train on", footnote)
    drawing.add_legend(fig, axes)
    return fig


def _draw_intervals(axes: Axes, bounds_2K: FloatArray) -> None:
    """Draws an interval at the foot of each bar."""
    low_K, high_K = bounds_2K
    # By its own middle, as the learned weight need not lie there.
    axes.errorbar(
        (low_K + high_K) / 2,
        np.arange(len(low_K)) + 0.2,
        xerr=(high_K - low_K) / 2,
        fmt="none",
        ecolor=INK,
        elinewidth=1.1,
        capsize=2.2,
        capthick=1.1,
        label="95 % interval of the mean over seeds",
        zorder=4,
    )


def plot_trajectory(
    path: Path | str,
    names: Sequence[str],
    steps: npt.ArrayLike,
    weights_TK: npt.ArrayLike,
    average_K: npt.ArrayLike,
) -> None:
    """Draws the path of the domain weights, update by update.

    The eight domains of the largest average weight are drawn in color and named at the end of their line, with that
    average; the others are thin gray lines.  The dotted line is the uniform weight from which all start.

    Args:
        path: the PNG file to write; its folder must exist.
        names: names of the domains, length K.
        steps: the updates, increasing, shape [T].
        weights_TK: the domain weights after each update, shape [T, K].
        average_K: the average weights, which are the result, shape [K].

    Raises:
        ValueError: the shapes disagree, there is no domain or no update, or a weight is not finite and at least 0.
    """
    average_K = _shares("average weights", average_K, len(names))
    steps_T, weights_TK = np.asarray(steps, dtype=np.float64), np.asarray(weights_TK, dtype=np.float64)
    if steps_T.ndim != 1 or not steps_T.size or weights_TK.shape != (steps_T.size, len(names)):
        raise ValueError(
            f"weights must have one row per step and one column per domain, got shape {weights_TK.shape} "
            f"for {steps_T.size} steps and {len(names)} domains"
        )
    for weights_K in weights_TK:
        _shares("domain weights", weights_K, len(names))
    labels, font, footnote = drawing.choose_labels(names)
    with drawing.own_style(font):
        _draw_trajectory(labels, steps_T, weights_TK, average_K, footnote).savefig(path, **PNG)


def _draw_trajectory(
    labels: Sequence[str], steps_T: FloatArray, weights_TK: FloatArray, average_K: FloatArray, footnote: str
) -> Figure:
    from matplotlib.ticker import MaxNLocator

    order = sorted(range(len(labels)), key=lambda i: (-average_K[i], i))
    named, rest = order[: len(LINE_COLORS)], order[len(LINE_COLORS) :]
    line_labels = [f"{labels[i]}  {_percent(average_K[i])}" for i in named]
    fig = drawing.new_figure(9.0, 4.9)
    axes = drawing.add_axes(fig, left=0.75, right=drawing.label_inches(line_labels, 9) + 0.15, top=0.85, bottom=0.65)
    axes.plot(steps_T, weights_TK[:, rest], color="#b6bdc6", linewidth=0.8, zorder=2)
    for rank, i in reversed(list(enumerate(named))):
        color, style = LINE_COLORS[rank], LINE_STYLES[rank % len(LINE_STYLES)]
        axes.plot(steps_T, weights_TK[:, i], color=color, linewidth=1.8, linestyle=style, zorder=3)
    uniform = 1 / len(labels)
    axes.axhline(uniform, color=INK, linewidth=1, linestyle=(0, (1, 2)), zorder=4)
    axes.set_ylim(0, max(float(weights_TK.max()), uniform) * 1.04)
    # One update alone still needs an axis of some width.
    axes.set_xlim(float(steps_T[0]), max(float(steps_T[-1]), float(steps_T[0]) + 1))
    _name_lines(axes, line_labels, weights_TK[-1, named])
    axes.yaxis.set_major_formatter(_percent_axis)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("proxy step", color=FAINT_INK)
    axes.set_ylabel("domain weight", color=FAINT_INK)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    others = f"; gray: the {len(rest)} other domains" if rest else ""
    drawing.add_title(
        fig,
        "Path of the domain weights",
        f"number: average over the path, the result; dotted: uniform{others}",
        footnote,
    )
    return fig


def _name_lines(axes: Axes, line_labels: Sequence[str], end_weights: FloatArray) -> None:
    """Writes each line's label at its right end, moved apart so that no two overlap, with a thin leader."""
    low, high = axes.get_ylim()
    ends = (end_weights - low) / (high - low)
    height = axes.get_window_extent().height / axes.figure.dpi
    heights = _spread(ends, gap=0.19 / height)
    for rank, (label, end, at) in enumerate(zip(line_labels, ends, heights, strict=True)):
        axes.annotate(
            label,
            xy=(1.0, end),
            xycoords="axes fraction",
            xytext=(1.045, at),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            color=LINE_COLORS[rank],
            arrowprops={
                "arrowstyle": "-",
                "color": LINE_COLORS[rank],
                "linewidth": 0.7,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 0,
            },
            annotation_clip=False,
        )


def _spread(positions: FloatArray, gap: float) -> FloatArray:
    """Returns the positions nearest to those given, in 0..1, that lie at least ``gap`` apart in the same order."""
    # Least squares under an order is isotonic regression: take off the ramp of gaps, pool what is out of order, add it
    # back.
    order = np.argsort(positions, kind="stable")
    ramp = np.arange(len(positions)) * gap
    pools: list[tuple[float, int]] = []
    for target in positions[order] - ramp:
        mean, count = float(target), 1
        while pools and pools[-1][0] > mean:
            previous_mean, previous_count = pools.pop()
            mean = (mean * count + previous_mean * previous_count) / (count + previous_count)
            count += previous_count
        pools.append((mean, count))
    highest = max(1.0 - float(ramp[-1]), 0.0) if len(ramp) else 1.0
    fitted = np.clip(np.repeat([mean for mean, _ in pools], [count for _, count in pools]), 0.0, highest) + ramp
    spread: FloatArray = np.empty(len(fitted))
    spread[order] = fitted
    return spread


def _shares(what: str, values: npt.ArrayLike, num_domains: int) -> FloatArray:
    shares_K = np.asarray(values, dtype=np.float64)
    if not num_domains:
        raise ValueError("there must be at least one domain to draw")
    if shares_K.shape != (num_domains,):
        raise ValueError(
            f"{what} must have one number per domain, got shape {shares_K.shape} for {num_domains} domains"
        )
    if not np.isfinite(shares_K).all() or shares_K.min() < 0:
        raise ValueError(f"{what} must be finite and at least 0, got {shares_K.tolist()}")
    return shares_K


def _bounds(intervals: Sequence[tuple[float, float]], num_domains: int) -> FloatArray:
    """Returns the low and the high ends, shape [2, K]."""
    bounds_2K = np.asarray(intervals, dtype=np.float64).reshape(-1, 2).T
    for what, bounds_K in zip(("low ends of intervals", "high ends of intervals"), bounds_2K, strict=True):
        _shares(what, bounds_K, num_domains)
    if (bounds_2K[0] > bounds_2K[1]).any():
        raise ValueError(f"the low end of an interval must not lie above its high end, got {bounds_2K.T.tolist()}")
    return bounds_2K


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.0005 or share == 0 else "<0.1%"


def _percent_axis(share: float, _position: float) -> str:
    return f"{round(share * 100, 6):g}%"
