"""Exports on disk: what they need beside the weights, the files themselves, and what they are expected to do."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import doremi_mix
from doremi_mix.atomic import write_atomic
from doremi_mix.domain_weights import DomainWeights
from doremi_mix.errors import ConfigError, ExportError, RunDirectoryError, short_reason
from doremi_mix.exporters import FORMATS, Export, ExportPlan, Format, export_plan
from doremi_mix.exporters.export import json_text
from doremi_mix.exporters.plan import make_plan
from doremi_mix.mixture import check_max_epochs, epoch_cap

ENTRY_POINTS = "doremi_mix.exporters"
PROOFS = Path(__file__).parent / "exporters" / "verified.json"


def all_formats() -> dict[str, Format]:
    """Returns our formats and those of installed packages that name some in the entry-point group.

    Such an entry point is a ``Format`` or a sequence of them.

    Raises:
        ConfigError: an entry point cannot be loaded, is something else, or takes a name that is taken.
    """
    formats = dict(FORMATS)
    for point in entry_points(group=ENTRY_POINTS):
        try:
            loaded = point.load()
        except Exception as error:  # whatever the other package does wrong
            raise ConfigError(
                f"the exporter {point.value} of another package cannot be loaded ({short_reason(error)}); mend or "
                "uninstall that package"
            ) from error
        rows = [loaded] if isinstance(loaded, Format) else loaded
        if not isinstance(rows, Sequence) or not all(isinstance(row, Format) for row in rows):
            raise ConfigError(f"the exporter {point.value} is no doremi_mix.exporters.Format, nor a list of them")
        for row in rows:
            if row.name in formats:
                raise ConfigError(f"the exporter {point.value} takes the name {row.name!r}, which is taken already")
            formats[row.name] = row
    return formats


def format_named(name: str) -> Format:
    """Returns a format; other packages are asked only for what we have not.

    Raises:
        ConfigError: there is none of that name.
    """
    import difflib

    if name in FORMATS:
        return FORMATS[name]
    formats = all_formats()
    if name not in formats:
        near = difflib.get_close_matches(name, formats, n=1)
        hint = f"did you mean {near[0]}?" if near else "see: doremi-mix export --list"
        raise ConfigError(f"unknown format {name!r}; {hint}")
    return formats[name]


def list_formats() -> list[dict[str, Any]]:
    """Returns the table of formats: what each means, and what its consumer's own code has proven."""
    proofs = read_proofs()
    rows = []
    for row in all_formats().values():
        entry = {key: value for key, value in asdict(row).items() if key not in ("write", "name")}
        proof = proofs.get(row.name, {})
        by = f"{proof['consumer']} {proof['version']}" if proof else None
        rows.append(
            {"format": row.name, **entry}
            | {"proof": proof.get("proof", "golden"), "proven_by": by, "date": proof.get("date")}
        )
    return rows


def read_proofs() -> dict[str, dict[str, str]]:
    """Returns what scripts/check_consumers.sh found, by format: version of the consumer, proof, date."""
    proofs: dict[str, dict[str, str]] = json.loads(PROOFS.read_text(encoding="utf-8"))
    return proofs


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What an export needs beside the weights.

    Attributes:
        budget: what to draw in all; None: what the weights were learned for, or one pass over what is drawn, for
            formats that need one.
        budget_unit: "tokens" or "examples".
        max_epochs: no domain is repeated more often.
        paths: a template with ``{name}``, or by domain; None: the files that were loaded, or the format's template.
        equal_lengths: take all examples to be equally long, where the corpus is not known.
        seed: for programs that ask for one.
    """

    budget: int | None = None
    budget_unit: str = "tokens"
    max_epochs: float = 4.0
    paths: str | Mapping[str, str] | None = None
    equal_lengths: bool = False
    seed: int = 0


def plan_for(row: Format, weights: DomainWeights, options: ExportOptions) -> ExportPlan:
    """Plans an export; formats that need a budget get one.

    Raises:
        DoremiMixError: as ``make_plan``.
    """
    budget, unit = options.budget, options.budget_unit
    notes = []
    if budget is None and row.needs_budget:
        budget, unit = default_budget(weights, options.max_epochs), "tokens"
        if budget is not None:
            notes.append(f"No budget was given; {budget:,} tokens are {_reason(weights, budget)}.")
    if options.paths is None and row.path and "/" in row.path:
        notes.append(
            f"Paths such as {row.path} are placeholders for data in the program's own form: give yours, --paths."
        )
    try:
        plan = make_plan(
            weights,
            budget=budget,
            budget_unit=unit,
            max_epochs=options.max_epochs,
            paths=_paths(row, weights, options.paths),
            equal_lengths=options.equal_lengths,
            seed=options.seed,
        )
    except ExportError as error:
        raise ExportError(f"{row.name}: {error}") from None
    return replace(plan, notes=(*notes, *plan.notes))


def _reason(weights: DomainWeights, budget: int) -> str:
    """Returns where a budget comes from that nobody gave."""
    learned_for = _learned_for(weights)
    one_pass = sum(s.available_tokens for name, s in weights.corpus.items() if weights[name])
    if budget == learned_for:
        return "what the weights were learned for"
    return (
        "one pass over the domains" if budget == one_pass and not learned_for else "the most that --max-epochs allows"
    )


def _learned_for(weights: DomainWeights) -> int | None:
    """Returns the budget in tokens that the weights were learned for; None when they do not say."""
    proxy = weights.settings.get("proxy")
    budget = proxy.get("token_budget") if isinstance(proxy, Mapping) else None
    return budget if isinstance(budget, int) and budget > 0 else None


def default_budget(weights: DomainWeights, max_epochs: float) -> int | None:
    """Returns a budget in tokens for who gives none.

    Args:
        weights: the domain weights.
        max_epochs: the largest number of passes over a domain.

    Returns:
        What the weights were learned for, else one pass over the domains that are drawn; not more than the epoch cap
        allows.  None where nothing is known of the domains.
    """
    check_max_epochs(max_epochs, "max_epochs")
    available = [s.available_tokens for name, s in weights.corpus.items() if weights[name]]
    if not available:
        return None
    wanted = _learned_for(weights) or sum(available)
    return max(1, min(wanted, sum(epoch_cap(max_epochs, tokens) for tokens in available)))


def _paths(row: Format, weights: DomainWeights, given: str | Mapping[str, str] | None) -> Mapping[str, str] | None:
    template = given if given is not None else row.path or None
    if not isinstance(template, str):
        return template
    if "{name}" not in template:
        raise ConfigError(f"paths {template!r}: expected a template with {{name}}, or a path by domain")
    return {name: template.replace("{name}", name) for name in weights.domain_weights}


def expectation(row: Format, plan: ExportPlan, export: Export) -> dict[str, Any]:
    """Returns what the program is expected to do with an export, as plain JSON values."""
    domains = {}
    for domain in plan.domains:
        statistics = domain.statistics
        epochs = None if domain.tokens is None or statistics is None else domain.tokens / statistics.available_tokens
        domains[domain.name] = {
            "weight": domain.weight,
            "expected_share": export.expected.get(domain.name, 0.0),
            "token_share": domain.token_share,
            "example_share": domain.example_share,
            "tokens": domain.tokens,
            "examples": domain.examples,
            "epochs": epochs,
            "path": domain.path,
        }
        if export.second is not None:
            # How much is drawn is the program's own setting, and domains are sampled as the corpus has them.
            domains[domain.name] |= {
                "objective_share": export.second[domain.name],
                "token_share": export.expected[domain.name],
                **dict.fromkeys(("example_share", "tokens", "examples", "epochs")),
            }
    applies = plan.budget is not None and export.second is None
    return {
        "doremi_mix": doremi_mix.__version__,
        "format": row.name,
        "written_for": row.title,
        "unit": row.unit,
        "meaning": export.meaning or row.meaning,
        "oversamples": row.oversamples,
        "budget": plan.budget,
        "budget_unit": plan.budget_unit if plan.budget is not None else None,
        "max_epochs": plan.max_epochs if applies else None,
        "capped_domains": list(plan.capped) if applies else [],
        "left_out": list(plan.left_out),
        "num_drawn": export.num_drawn,
        "verdict": plan.verdict or None,
        "usage": export.usage,
        "notes": [*plan.notes, *export.notes],
        "domains": domains,
    }


def _with_name(usage: str, name: str, out: Path) -> str:
    """Returns how an export is used, with the name that its one file got in place of its usual one."""
    usual, given = Path(name), Path(out)
    # In Python the name stands in quotes, on a command line it does not.
    text = usage.replace(f'"{name}"', json.dumps(str(out), ensure_ascii=False))
    text = text.replace(name, shlex.quote(str(out))) if text == usage else text
    return text.replace(f"from {usual.stem} import", f"from {given.stem} import")


def write_export(
    row: Format, plan: ExportPlan, out: Path, *, overwrite: bool = False, folder: bool = False
) -> tuple[Export, list[Path]]:
    """Writes the files of an export, and beside them what the program is expected to do.

    Args:
        row: the format.
        plan: what to draw.
        out: the file, or for formats of several files the folder.
        overwrite: whether files that are there may be replaced.
        folder: whether ``out`` is a folder also for a single file.

    Returns:
        The export and the paths of its files, the expectation last.

    Raises:
        ExportError: the program cannot be told of this plan.
        RunDirectoryError: a file is there already, or the folder is missing or cannot be written.
    """
    export = export_plan(row, plan)
    if not folder and len(export.files) == 1 and not out.is_dir():
        export = replace(export, usage=_with_name(export.usage, export.files[0].name, out))
    if len(export.files) > 1 and not folder and out.suffix and not out.is_dir():
        names = ", ".join(file.name for file in export.files)
        raise ConfigError(f"{row.name} has several files ({names}); give a folder: --out {out.with_suffix('')}/")
    if folder or len(export.files) > 1 or out.is_dir():
        targets = [out / file.name for file in export.files]
        sidecar = out / f"{row.name}.expected.json"
    else:
        targets, sidecar = [out], out.with_name(f"{out.name}.expected.json")
    existing = [path for path in (*targets, sidecar) if path.exists()]
    if existing and not overwrite:
        raise RunDirectoryError(f"{existing[0]}: exists already; choose another --out, or say --overwrite")
    try:
        for path, file in zip(targets, export.files, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, file.text)
        write_atomic(sidecar, json_text(expectation(row, plan, export)))
    except OSError as error:
        raise RunDirectoryError(f"{out}: cannot be written ({error.strerror}); choose another --out") from None
    return export, [*targets, sidecar]
