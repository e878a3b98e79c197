"""Domain weights for other programs: FORMATS maps a name to one pure function.

Each module of this package knows one program, or one family of programs, and lists its rows at its end.
"""

from __future__ import annotations

import importlib
from dataclasses import replace

from doremi_mix.errors import ExportError
from doremi_mix.exporters.export import Export, ExportedFile, Format, json_text, one_line
from doremi_mix.exporters.plan import ExportPlan

_MODULES = (
    "huggingface",
    "trl",
    "llama_factory",
    "swift",
    "axolotl",
    "open_instruct",
    "openrlhf",
    "oumi",
    "xtuner",
    "megatron",
    "nemo",
    "energon",
    "streaming",
    "litdata",
    "ray_data",
    "levanter",
    "olmo",
    "nanotron",
    "torchtitan",
    "lingua",
    "data_juicer",
    "doremi",
    "tables",
)

FORMATS: dict[str, Format] = {
    row.name: row for module in _MODULES for row in importlib.import_module(f"doremi_mix.exporters.{module}").FORMATS
}


def export_plan(row: Format, plan: ExportPlan) -> Export:
    """Writes a plan for one program, with a header in every file that can hold comments.

    Args:
        row: of FORMATS, or of another package.
        plan: what is to be drawn.

    Returns:
        The files, and what the program will draw.

    Raises:
        ExportError: the program cannot be told of this; the message names the format, the domain and the reason.
    """
    try:
        export = row.write(plan)
    except ExportError as error:
        raise ExportError(f"{row.name}: {error}") from None
    header = header_lines(row, plan, export)
    files = tuple(
        file
        if file.comment is None
        else replace(file, text="".join(f"{file.comment} {one_line(line)}\n" for line in header) + file.text)
        for file in export.files
    )
    return replace(export, files=files)


def header_lines(row: Format, plan: ExportPlan, export: Export) -> list[str]:
    """Returns what a reader of the file must know: unit, meaning, budget, what will be drawn, the verdict."""
    lines = [
        f"Domain weights for {row.title}, written by doremi_mix.",
        f"Each number is {_MEANINGS[export.meaning or row.meaning]}.",
        f"Verdict of the comparison: {plan.verdict or 'these weights were not compared with plain mixtures'}",
        *facts(plan, export),
    ]
    drawn = "" if export.num_drawn is None else f"{export.num_drawn:,} "
    second, also = export.second, "the objective"
    if second is None and row.unit != "tokens":
        second, also = {name: plan.named(name).token_share for name in export.expected}, "the tokens"
    both = "" if second is None else f", and of {also}"
    lines.append(f"Expected shares of the {drawn}{row.unit} drawn{both}:")
    width = max(len(one_line(name)) for name in export.expected)
    for name, share in export.expected.items():
        beside = "" if second is None else f"  {second[name]:.6f}"
        lines.append(f"  {one_line(name):<{width}}  {share:.6f}{beside}")
    return lines


def facts(plan: ExportPlan, export: Export) -> list[str]:
    """Returns what a user must know of an export, one sentence each: what the budget did to it, and its notes."""
    lines = []
    if plan.budget is None:
        lines.append("No budget was given: shares are the weights as they are, and no epoch cap was applied.")
    elif export.second is not None:
        lines.append(
            f"Neither the budget of {plan.budget:,} {plan.budget_unit} nor the epoch cap changes these numbers."
        )
    else:
        cap = f"planned for at most {plan.max_epochs:g} passes over a domain"
        lines.append(f"Budget: {plan.budget:,} {plan.budget_unit}, {cap}.")
        if plan.capped:
            lines.append(f"Cut by the epoch cap: {', '.join(plan.capped)}.")
    if plan.left_out:
        lines.append(f"Left out, because nothing of them is to be drawn: {', '.join(plan.left_out)}.")
    return [*lines, *plan.notes, *export.notes]


_MEANINGS = {
    "share": "a share of what is drawn",
    "count": "a number of examples to draw",
    "multiplier": "a multiplier of the domain's own size: 1 is every row once",
    "objective": "a weight of the domain in the objective, beside how often it is sampled",
    "table": "said in its column",
}

__all__ = [
    "FORMATS",
    "Export",
    "ExportPlan",
    "ExportedFile",
    "Format",
    "export_plan",
    "facts",
    "header_lines",
    "json_text",
]
