"""What the pictures share: ink, fonts, margins, title and legend.

matplotlib is imported inside the functions, and only its object interface is used: no global figure, backend or style
is touched.  The bytes of a picture depend on its arguments and the installed fonts alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#22272e"
FAINT_INK = "#6e7781"
GRID = "#e6e8eb"
LEARNED = "#2b7bba"
# No software version among the metadata, so that the same data give the same bytes.
PNG: dict[str, Any] = {"format": "png", "metadata": {"Software": None}}
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


def choose_labels(
    names: Sequence[str], position: str = "n-th domain", beside: Iterable[str] = ()
) -> tuple[list[str], str, str]:
    """Returns what to call each name, the font that can draw all of it, and a footnote if names were replaced.

    Args:
        names: what is to be drawn.
        position: what the footnote says that a number stands for.
        beside: further text of the same picture, which the font should have too.
    """
    from matplotlib import font_manager

    default = "DejaVu Sans"
    installed = {entry.name: entry.fname for entry in font_manager.fontManager.ttflist}
    drawn = {ord(character) for name in (*names, *beside) for character in name}
    for font in (default, *CJK_FONTS):
        if font in installed and drawn <= read_glyphs(installed[font]):
            return [shorten(name) for name in names], font, ""
    known = read_glyphs(installed[default]) if default in installed else set(range(32, 127))
    readable = [all(ord(character) in known for character in name) for name in names]
    labels = [shorten(name) if ok else f"#{i + 1}" for i, (name, ok) in enumerate(zip(names, readable, strict=True))]
    footnote = f"#n: the {position}; no installed font has the characters of its name"
    return labels, default, "" if all(readable) else footnote


def read_glyphs(font_path: str) -> set[int]:
    """Returns the code points that a font can draw."""
    from matplotlib.ft2font import FT2Font

    return set(FT2Font(font_path).get_charmap())


def shorten(name: str, most: int = 34) -> str:
    """Cuts the middle out of a long name, and keeps it from being read as a formula."""
    shown = name if len(name) <= most else f"{name[: most - 12]}...{name[-9:]}"
    return escape_dollars(shown)


def escape_dollars(text: str) -> str:
    """Keeps matplotlib from taking a dollar sign for the start of a formula."""
    return text.replace("$", r"\$")


def own_style(font: str) -> AbstractContextManager[None]:
    """Returns a context in which the user's own matplotlib settings do not show."""
    from matplotlib import style

    own: dict[str, Any] = {"font.family": [font], "axes.unicode_minus": False, "svg.hashsalt": "doremi_mix"}
    return cast(AbstractContextManager[None], style.context(["default", own]))


def new_figure(width_inches: float, height_inches: float) -> Figure:
    """Returns a white figure that no global state knows of."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width_inches, height_inches), dpi=160, facecolor="white")
    FigureCanvasAgg(fig)
    return fig


def add_axes(fig: Figure, left: float, right: float, top: float, bottom: float) -> Axes:
    """Returns axes with fixed margins in inches, because a layout engine would make titles wander with the data."""
    width, height = fig.get_size_inches()
    axes = fig.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height))
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT_INK, labelsize=8.5, length=0)
    return axes


def add_title(fig: Figure, title: str, subtitle: str, footnote: str) -> None:
    """Writes one line of title, one below it, and one at the foot of the picture."""
    width, height = fig.get_size_inches()
    fig.text(0.2 / width, 1 - 0.37 / height, title, fontsize=14, fontweight="bold", color=INK)
    fig.text(0.2 / width, 1 - 0.62 / height, subtitle, fontsize=9, color=FAINT_INK)
    fig.text(0.2 / width, 0.12 / height, footnote, fontsize=7.5, color=FAINT_INK)


def add_legend(fig: Figure, axes: Axes) -> None:
    """Explains the marks of the axes in one line, or in two when there are more than three."""
    by_label = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    # Words before numbers: the interval comes after what it is about.
    labels = sorted(by_label, key=lambda label: (label[0].isdigit(), label))
    width, height = fig.get_size_inches()
    fig.legend(
        [by_label[label] for label in labels],
        labels,
        loc="upper left",
        bbox_to_anchor=(0.14 / width, 1 - 0.7 / height),
        ncols=3 if len(labels) <= 3 else 2,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        columnspacing=2.0,
        handlelength=1.6,
    )


def label_inches(labels: Sequence[str], font_size: float) -> float:
    """Returns the width that the longest label takes, with a margin on its left."""
    from matplotlib.textpath import TextPath

    return 0.3 + max(TextPath((0, 0), label, size=font_size).get_extents().width for label in labels) / 72
