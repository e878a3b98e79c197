"""Two pictures of a run: the weights that were learned, and the path by which they were.

matplotlib is imported inside the functions, and only its object interface is used: no global figure, backend or style
is touched.  The bytes of a picture depend on its arguments and the installed fonts alone.

Axes: K domains, T updates.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FloatArray = npt.NDArray[np.float64]

INK = "#22272e"
FAINT_INK = "#6e7781"
GRID = "#e6e8eb"
LEARNED = "#2b7bba"
# Told from the bar by shape, and by lightness in gray.
NATURAL_MARKER: dict[str, Any] = {
    "marker": "D",
    "markersize": 5.5,
    "markerfacecolor": "#f5b02e",
    "markeredgecolor": INK,
    "markeredgewidth": 0.8,
    "linestyle": "none",
}
# No software version among the metadata, so that the same data give the same bytes.
PNG: dict[str, Any] = {"format": "png", "metadata": {"Software": None}}
# Told apart under the common color vision deficiencies; every second line is dashed besides.
LINE_COLORS = ("#0072b2", "#d55e00", "#007a5a", "#a6357a", "#111827", "#3a9bd9", "#8c6d1f", "#7a7fd1")
LINE_STYLES = ("-", (0, (5, 1.5)))
# Tried in this order for names that the default font cannot draw.
CJK_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Source Han Sans SC",
    "Source Han Sans CN",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "PingFang SC",
    "Hiragino Sans GB",
    "Microsoft YaHei",
    "SimHei",
    "Arial Unicode MS",
    "Droid Sans Fallback",
)


def plot_weights(
    path: Path | str,
    domains: Sequence[str],
    natural: npt.ArrayLike,
    learned: npt.ArrayLike,
    uniform: float | None = None,
) -> None:
    """Draws the learned weight of each domain beside its natural and its uniform share.

    One row per domain, the largest learned weight on top.  The bar is the learned weight, the diamond the natural
    share, the dashed line the uniform share: told apart by shape, so that no color is needed.

    Args:
        path: the PNG file to write; its folder must exist.
        domains: names of the domains, length K.
        natural: share of the available tokens of each domain, shape [K].
        learned: learned share of tokens of each domain, shape [K].
        uniform: the uniform share; 1/K when not given.

    Raises:
        ValueError: the lengths disagree, there is no domain, or a share is not a finite number of at least 0.
    """
    natural_K, learned_K = (
        _shares("natural shares", natural, len(domains)),
        _shares("learned shares", learned, len(domains)),
    )
    num_domains = len(domains)
    uniform = 1 / num_domains if uniform is None else uniform
    labels, font, footnote = _labels(domains)
    with _style(font):
        _draw_weights(labels, natural_K, learned_K, uniform, footnote).savefig(path, **PNG)


def _draw_weights(
    labels: Sequence[str], natural_K: FloatArray, learned_K: FloatArray, uniform: float, footnote: str
) -> Figure:
    order = sorted(range(len(labels)), key=lambda i: (-learned_K[i], i))
    row_inches, font_size = (0.29, 9.5) if len(labels) <= 30 else (0.2, 7.5)
    fig = _figure(9.0, 2.0 + row_inches * len(labels))
    axes = _axes_in_inches(fig, left=_label_inches(labels, font_size), right=1.6, top=1.4, bottom=0.6)
    rows = np.arange(len(labels))
    axes.barh(rows, learned_K[order], height=0.64, color=LEARNED, label="learned", zorder=2)
    axes.plot(natural_K[order], rows, **NATURAL_MARKER, label="natural (share of the available tokens)", zorder=5)
    axes.axvline(uniform, color=INK, linewidth=1, linestyle=(0, (4, 3)), label=f"uniform ({uniform:.1%})", zorder=3)
    axes.set_yticks(rows, [labels[i] for i in order], fontsize=font_size, color=INK)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlim(0, max(float(learned_K.max()), float(natural_K.max()), uniform) * 1.03)
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
    _title(fig, "Domain weights", f"how much of each of the {len(labels)} domains to train on", footnote)
    _legend(fig, axes)
    return fig


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
    labels, font, footnote = _labels(names)
    with _style(font):
        _draw_trajectory(labels, steps_T, weights_TK, average_K, footnote).savefig(path, **PNG)


def _draw_trajectory(
    labels: Sequence[str], steps_T: FloatArray, weights_TK: FloatArray, average_K: FloatArray, footnote: str
) -> Figure:
    from matplotlib.ticker import MaxNLocator

    order = sorted(range(len(labels)), key=lambda i: (-average_K[i], i))
    named, rest = order[: len(LINE_COLORS)], order[len(LINE_COLORS) :]
    line_labels = [f"{labels[i]}  {_percent(average_K[i])}" for i in named]
    fig = _figure(9.0, 4.9)
    axes = _axes_in_inches(fig, left=0.75, right=_label_inches(line_labels, 9) + 0.15, top=0.85, bottom=0.65)
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
    _title(
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


def _labels(names: Sequence[str]) -> tuple[list[str], str, str]:
    """Returns what to call each domain, the font that can draw all of it, and a footnote if names were replaced."""
    from matplotlib import font_manager

    default = "DejaVu Sans"
    installed = {entry.name: entry.fname for entry in font_manager.fontManager.ttflist}
    drawn = {ord(character) for name in names for character in name}
    for font in (default, *CJK_FONTS):
        if font in installed and drawn <= _glyphs(installed[font]):
            return [_shorten(name) for name in names], font, ""
    known = _glyphs(installed[default]) if default in installed else set(range(32, 127))
    readable = [all(ord(character) in known for character in name) for name in names]
    labels = [_shorten(name) if ok else f"#{i + 1}" for i, (name, ok) in enumerate(zip(names, readable, strict=True))]
    return labels, default, "#n: the n-th domain; no installed font has the characters of its name"


def _glyphs(font_path: str) -> set[int]:
    from matplotlib.ft2font import FT2Font

    return set(FT2Font(font_path).get_charmap())


def _shorten(name: str, most: int = 34) -> str:
    # A dollar sign would start a formula.
    shown = name if len(name) <= most else f"{name[: most - 12]}...{name[-9:]}"
    return shown.replace("$", r"\$")


def _style(font: str) -> AbstractContextManager[None]:
    """Returns a context in which the user's own matplotlib settings do not show."""
    from matplotlib import style

    own: dict[str, Any] = {"font.family": [font], "axes.unicode_minus": False, "svg.hashsalt": "doremi_mix"}
    return cast(AbstractContextManager[None], style.context(["default", own]))


def _figure(width_inches: float, height_inches: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width_inches, height_inches), dpi=160, facecolor="white")
    FigureCanvasAgg(fig)
    return fig


def _axes_in_inches(fig: Figure, left: float, right: float, top: float, bottom: float) -> Axes:
    """Returns axes with fixed margins, because a layout engine would make titles wander with the data."""
    width, height = fig.get_size_inches()
    axes = fig.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height))
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT_INK, labelsize=8.5, length=0)
    return axes


def _title(fig: Figure, title: str, subtitle: str, footnote: str) -> None:
    width, height = fig.get_size_inches()
    fig.text(0.2 / width, 1 - 0.37 / height, title, fontsize=14, fontweight="bold", color=INK)
    fig.text(0.2 / width, 1 - 0.62 / height, subtitle, fontsize=9, color=FAINT_INK)
    fig.text(0.2 / width, 0.12 / height, footnote, fontsize=7.5, color=FAINT_INK)


def _legend(fig: Figure, axes: Axes) -> None:
    by_label = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    labels = sorted(by_label)
    width, height = fig.get_size_inches()
    fig.legend(
        [by_label[label] for label in labels],
        labels,
        loc="upper left",
        bbox_to_anchor=(0.14 / width, 1 - 0.7 / height),
        ncols=3,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        columnspacing=2.0,
        handlelength=1.6,
    )


def _label_inches(labels: Sequence[str], font_size: float) -> float:
    """Returns the width that the longest label takes, with a margin on its left."""
    from matplotlib.textpath import TextPath

    return 0.3 + max(TextPath((0, 0), label, size=font_size).get_extents().width for label in labels) / 72


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.0005 or share == 0 else "<0.1%"


def _percent_axis(share: float, _position: float) -> str:
    return f"{round(share * 100, 6):g}%"
