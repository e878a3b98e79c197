"""One picture of a comparison: whether the candidate beats the other mixtures, and on which domains.

Differences are the candidate's held-out loss minus the other's: below zero, the candidate is better.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from doremi_mix.comparison import SIGNIFICANCE, Comparison, Interval, PairedResult
from doremi_mix.report import drawing
from doremi_mix.report.drawing import FAINT_INK, GRID, INK, LEARNED, PNG

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE_SIZE, TITLE_INCHES, NOTE_INCHES = 11.5, 0.235, 0.16
# Beside an axis: the numbers on its right.
NUMBERS_INCHES = 0.8
# The side of zero on which the candidate is better.
BETTER_SIDE = "#eff5fa"


class Mark(NamedTuple):
    """How a difference is drawn: kinds differ in shape and in lightness, so that gray suffices."""

    marker: str
    size: float
    fill: str
    edge: str
    line_width: float


class Row(NamedTuple):
    """One difference, at its height in the panel."""

    height: float
    interval: Interval
    mark: Mark


class Panel(NamedTuple):
    """What one half of the picture shows: labels are those of the heights 0, 1, 2 and so on."""

    heading: str
    legend: dict[str, Mark]
    labels: list[str]
    rows: list[Row]
    row_inches: float
    font_size: float
    least_inches: float

    def axis_inches(self) -> float:
        """Returns the width of the axis alone, which long names must not take away."""
        return max(3.0, self.least_inches - self.label_inches() - NUMBERS_INCHES)

    def label_inches(self) -> float:
        """Returns the width of the names on its left."""
        return drawing.label_inches(self.labels, self.font_size)

    def width_inches(self) -> float:
        """Returns the width of all of it."""
        return self.label_inches() + self.axis_inches() + NUMBERS_INCHES


def _average(fill: str, edge: str) -> Mark:
    return Mark("o", 8, fill, edge, 2.4)


def _worst(fill: str, edge: str) -> Mark:
    return Mark("s", 6, fill, edge, 1.3)


BETTER, UNCLEAR, WORSE = (LEARNED, LEARNED), ("white", FAINT_INK), (INK, INK)
DOMAIN_MARKS = {
    "clearly better": Mark("o", 6.5, *BETTER, 1.3),
    "unclear": Mark("o", 6, *UNCLEAR, 1.3),
    "clearly worse": Mark("X", 7.5, *WORSE, 1.3),
    "no interval": Mark("d", 6, *UNCLEAR, 1.3),
}


def plot_comparison(path: Path | str, compared: Comparison) -> None:
    """Draws how much the candidate differs from each other mixture, and from the natural one on each domain.

    The verdict is the title.  The left panel has the average over domains and the worst domain, one row per mixture;
    the right one has the domains, the candidate's largest gain on top.  Lines are 95 % intervals; with one seed there
    are none, because an interval over examples alone is no ground for a claim.  Where the natural mixture was not
    compared, the right panel is about the first one that was.

    Args:
        path: the PNG file to write; its folder must exist.
        compared: what ``compare_mixtures`` found.
    """
    candidate = compared.pairs[0].mixture
    pairs = [pair for pair in compared.pairs if pair.mixture == candidate]
    pair = next((pair for pair in pairs if pair.baseline == "natural"), pairs[0])
    mixtures, domains = list(compared.mixtures), list(pair.domains)
    labels, font, mixture_note = drawing.choose_labels(mixtures, "n-th mixture of results.json", beside=domains)
    names = dict(zip(mixtures, labels, strict=True))
    labels, _, domain_note = drawing.choose_labels(domains, "n-th domain of results.json", beside=mixtures)
    verdict = drawing.escape_dollars(compared.verdict.sentence)
    if mixture_note:
        # What cannot be drawn as a label cannot be drawn in the title.
        for name in mixtures:
            verdict = verdict.replace(drawing.escape_dollars(name), names[name])
    with drawing.own_style(font):
        panels = [
            _mixtures_panel(pairs, compared, names),
            _domains_panel(pair, names, dict(zip(domains, labels, strict=True))),
        ]
        notes = [*_notes(compared, panels, names[candidate]), mixture_note, domain_note]
        fig = _draw(panels, verdict, compared.num_seeds, names[candidate], [note for note in notes if note])
        fig.savefig(path, **PNG)


def _mixtures_panel(pairs: Sequence[PairedResult], compared: Comparison, names: dict[str, str]) -> Panel:
    rows = []
    p_values = compared.verdict.adjusted_p_values
    ordered = sorted(pairs, key=lambda pair: pair.average.estimate)
    for place, pair in enumerate(ordered):
        average, worst = _without_claim(pair.average, pair), _without_claim(pair.worst, pair)
        # The picture must not call clear what the verdict above it calls luck.
        is_reliable = p_values.get(pair.baseline, 0.0) <= SIGNIFICANCE
        rows.append(Row(place - 0.17, average, _average(*(_colors(average) if is_reliable else UNCLEAR))))
        rows.append(Row(place + 0.17, worst, _worst(*_colors(worst))))
    legend = {"average over domains": _average(*UNCLEAR), "worst domain": _worst(*UNCLEAR)}
    heading = f"{names[pairs[0].mixture]} minus each other mixture"
    return Panel(heading, legend, [names[pair.baseline] for pair in ordered], rows, 0.62, 10, least_inches=4.9)


def _domains_panel(pair: PairedResult, names: dict[str, str], domain_names: dict[str, str]) -> Panel:
    order = sorted(pair.domains, key=lambda name: pair.domains[name].estimate)
    intervals = [_without_claim(pair.domains[name], pair) for name in order]
    kinds = [_kind(interval) for interval in intervals]
    rows = [
        Row(place, interval, DOMAIN_MARKS[kind])
        for place, (interval, kind) in enumerate(zip(intervals, kinds, strict=True))
    ]
    legend = {f"{kind} ({kinds.count(kind)})": mark for kind, mark in DOMAIN_MARKS.items() if kind in kinds}
    heading = f"{names[pair.mixture]} minus {names[pair.baseline]}, by domain"
    row_inches, font_size = (0.29, 9.5) if len(rows) <= 30 else (0.2, 7.5)
    return Panel(heading, legend, [domain_names[name] for name in order], rows, row_inches, font_size, least_inches=6.6)


def _without_claim(interval: Interval, pair: PairedResult) -> Interval:
    """Returns the interval, or the estimate alone if it covers examples alone."""
    if pair.interval_over == "examples":
        return Interval(interval.estimate, math.nan, math.nan, math.nan)
    return interval


def _kind(interval: Interval) -> str:
    if math.isnan(interval.low):
        return "no interval"
    return "clearly better" if interval.high < 0 else "clearly worse" if interval.low > 0 else "unclear"


def _colors(interval: Interval) -> tuple[str, str]:
    return {"clearly better": BETTER, "clearly worse": WORSE}.get(_kind(interval), UNCLEAR)


def _notes(compared: Comparison, panels: Sequence[Panel], candidate: str) -> list[str]:
    """Returns what a reader could take too far or not know, for the foot of the picture."""
    notes = [
        f"Worst domain: the highest loss under {candidate} minus the highest under the other mixture; "
        "these may be two domains."
    ]
    if compared.num_seeds == 1:
        return ["With one seed, every difference here may be luck.", *notes]
    notes.insert(
        0,
        "Filled is clear: the interval leaves zero out.  About one in twenty does so by luck alone; the averages of "
        "the verdict are held to its stricter test.",
    )
    if any(_is_cut(row.interval, panel) for panel in panels for row in panel.rows):
        notes.append("An arrow: the interval goes on outside of the panel.")
    if compared.domains_with_one_sequence:
        notes.append("No interval: one held-out sequence has no spread.")
    return notes


def _draw(panels: Sequence[Panel], verdict: str, num_seeds: int, candidate: str, notes: Sequence[str]) -> Figure:
    width = sum(panel.width_inches() for panel in panels) + 0.2
    title = _wrap(verdict, width - 0.4)
    top = 1.4 + TITLE_INCHES * len(title)
    height = top + max(panel.row_inches * len(panel.labels) for panel in panels) + 0.75 + NOTE_INCHES * len(notes)
    fig = drawing.new_figure(width, height)
    left = 0.0
    for panel in panels:
        _draw_panel(fig, panel, left, top, candidate)
        left += panel.width_inches()
    intervals = "; lines: 95 % intervals over seeds and held-out examples" if num_seeds > 1 else ", so no intervals"
    seeds = f"{num_seeds} seeds" if num_seeds > 1 else "one seed"
    subtitle = f"difference in held-out loss, nats per token: lower is better; {seeds}{intervals}"
    at = 0.37
    for line in title:
        fig.text(0.2 / width, 1 - at / height, line, fontsize=TITLE_SIZE, fontweight="bold", color=INK)
        at += TITLE_INCHES
    fig.text(0.2 / width, 1 - (at + 0.02) / height, subtitle, fontsize=9, color=FAINT_INK)
    for number, note in enumerate(reversed(notes)):
        fig.text(0.2 / width, (0.12 + NOTE_INCHES * number) / height, note, fontsize=7.5, color=FAINT_INK)
    return fig


def _draw_panel(fig: Figure, panel: Panel, left: float, top: float, candidate: str) -> None:
    width, height = fig.get_size_inches()
    axes = drawing.add_axes(
        fig,
        left=left + panel.label_inches(),
        right=width - left - panel.label_inches() - panel.axis_inches(),
        top=top,
        bottom=height - top - panel.row_inches * len(panel.labels),
    )
    low, high = _limits(panel)
    axes.set_xlim(low, high)
    axes.set_ylim(len(panel.labels) - 0.4, -0.6)
    axes.axvspan(low, 0, color=BETTER_SIDE, zorder=0)
    axes.axvline(0, color=INK, linewidth=1.1, zorder=2)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.locator_params(axis="x", nbins=5)
    axes.set_yticks(range(len(panel.labels)), panel.labels, fontsize=panel.font_size, color=INK)
    for row in panel.rows:
        _draw_row(axes, row, panel)
    for text, offset, side in (
        (f"\N{LEFTWARDS ARROW} {candidate} better", -6, "right"),
        (f"{candidate} worse \N{RIGHTWARDS ARROW}", 6, "left"),
    ):
        at: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        axes.annotate(text, (0, 0), xytext=(offset, -27), ha=side, va="center_baseline", fontsize=9, color=INK, **at)
    _head_panel(fig, panel, left + 0.2, top)


def _draw_row(axes: Axes, row: Row, panel: Panel) -> None:
    height, interval, mark = row
    low, high = _limits(panel)
    if not math.isnan(interval.low):
        ends = max(interval.low, low), min(interval.high, high)
        axes.plot(ends, (height, height), color=mark.edge, linewidth=mark.line_width, solid_capstyle="butt", zorder=3)
        # Carets whose tip is at the edge.
        for end, is_cut, caret in ((low, interval.low < low, 4), (high, interval.high > high, 5)):
            if is_cut:
                axes.plot(end, height, marker=caret, markersize=6, color=mark.edge, clip_on=False, zorder=4)
    axes.plot(interval.estimate, height, **_style(mark), zorder=5)
    axes.annotate(
        f"{interval.estimate:+.4f}",
        (1, height),
        xycoords=("axes fraction", "data"),
        xytext=((NUMBERS_INCHES - 0.1) * 72, 0),
        textcoords="offset points",
        ha="right",
        va="center_baseline",
        fontsize=panel.font_size - 0.5,
        color=FAINT_INK if mark.fill == "white" else INK,
    )


def _head_panel(fig: Figure, panel: Panel, left: float, top: float) -> None:
    """Writes a panel's heading and legend above it."""
    from matplotlib.lines import Line2D

    width, height = fig.get_size_inches()
    fig.text(left / width, 1 - (top - 0.56) / height, panel.heading, fontsize=10.5, fontweight="bold", color=INK)
    fig.legend(
        [Line2D([], [], **_style(mark)) for mark in panel.legend.values()],
        list(panel.legend),
        loc="upper left",
        bbox_to_anchor=((left - 0.06) / width, 1 - (top - 0.5) / height),
        ncols=len(panel.legend),
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        columnspacing=1.6,
        handlelength=1.0,
    )


def _style(mark: Mark) -> dict[str, Any]:
    return {
        "marker": mark.marker,
        "markersize": mark.size,
        "markerfacecolor": mark.fill,
        "markeredgecolor": mark.edge,
        "markeredgewidth": 1.2,
        "linestyle": "none",
    }


def _limits(panel: Panel) -> tuple[float, float]:
    """Returns the ends of the axis: zero and all estimates lie inside, and so do all intervals but overlong ones."""
    estimates = [row.interval.estimate for row in panel.rows]
    bounds = [end for row in panel.rows for end in (row.interval.low, row.interval.high) if not math.isnan(end)]
    # One uncertain domain must not flatten all others.
    typical = sorted(map(abs, bounds))[len(bounds) // 2] if bounds else 0.0
    reach = max(1.2 * max(map(abs, estimates)), 3 * typical)
    low, high = max(min([*estimates, *bounds, 0.0]), -reach), min(max([*estimates, *bounds, 0.0]), reach)
    # Zero stays clear of the edge, so that both sides can be seen and named.
    span = (high - low) or 1.0
    return min(low - 0.06 * span, -0.2 * span), max(high + 0.06 * span, 0.2 * span)


def _is_cut(interval: Interval, panel: Panel) -> bool:
    low, high = _limits(panel)
    return interval.low < low or interval.high > high


def _wrap(sentence: str, width_inches: float) -> list[str]:
    """Breaks a title into as few lines as fit, of about the same length."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    bold = FontProperties(weight="bold")
    # A percent sign stays with its number.
    sentence = sentence.replace(" %", "\N{NO-BREAK SPACE}%")
    fitting: list[str] = []
    for num_characters in range(200, 20, -4):
        lines = textwrap.wrap(sentence, num_characters, break_on_hyphens=False)
        if fitting and len(lines) > len(fitting):
            break
        widths = [TextPath((0, 0), line, TITLE_SIZE, prop=bold).get_extents().width / 72 for line in lines]
        if max(widths) <= width_inches:
            fitting = lines
    return fitting or lines
