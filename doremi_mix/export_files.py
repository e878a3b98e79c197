"""Exports on disk: what they need beside the weights, the files themselves, and what they are expected to do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import yaml

import doremi_mix
from doremi_mix.atomic import write_atomic
from doremi_mix.domain_weights import DomainWeights
from doremi_mix.errors import ConfigError, DataError, ExportError, RunDirectoryError, short_reason
from doremi_mix.exporters import FORMATS, Export, ExportPlan, Format, export_plan
from doremi_mix.exporters.export import json_text
from doremi_mix.exporters.plan import make_plan
from doremi_mix.types import DomainStatistics

ENTRY_POINTS = "doremi_mix.exporters"
EXPECTED = "expected.json"
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
    """Returns a format.

    Raises:
        ConfigError: there is none of that name.
    """
    import difflib

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
        rows.append(
            {"format": row.name, **entry}
            | {"proof": proof.get("proof", "golden"), "version": proof.get("version"), "date": proof.get("date")}
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
    if budget is None and row.needs_budget:
        budget, unit = default_budget(weights), "tokens"
    try:
        return make_plan(
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


def default_budget(weights: DomainWeights) -> int | None:
    """Returns the budget in tokens that the weights were learned for, else one pass over the domains that are drawn."""
    learned_for = weights.settings.get("proxy", {}).get("token_budget")
    if isinstance(learned_for, int) and learned_for > 0:
        return learned_for
    return sum(s.available_tokens for name, s in weights.corpus.items() if weights[name]) or None


def _paths(row: Format, weights: DomainWeights, given: str | Mapping[str, str] | None) -> Mapping[str, str] | None:
    template = given if given is not None else row.path or None
    if not isinstance(template, str):
        return template
    if "{name}" not in template:
        raise ConfigError(f"--paths {template!r}: expected a template with {{name}}, or a file of path by domain")
    return {name: template.replace("{name}", name) for name in weights.domain_weights}


def read_paths(text: str) -> str | dict[str, str]:
    """Reads ``--paths``: a template with ``{name}`` stays as it is, anything else is a YAML or JSON file.

    Raises:
        DataError: the file is missing or holds something else than one path for each domain.
    """
    if "{name}" in text:
        return text
    value = _read_mapping(Path(text), "--paths", "path")
    for name, path in value.items():
        if not isinstance(path, str):
            raise DataError(f"{text}: the path of {name!r} must be text, got {path!r}")
    return value


def read_corpus(path: Path) -> dict[str, DomainStatistics]:
    """Reads what there is of each domain.

    Args:
        path: a run directory whose weights are there, a ``domain_weights.json`` with a corpus, or a YAML or JSON file
            with ``num_examples`` and ``available_tokens`` by domain.

    Raises:
        DataError: it is missing, or holds something else.
    """
    if path.is_dir():
        path = path / "weights" / "domain_weights.json"
    value = _read_mapping(path, "--corpus", "statistics")
    if "format" in value:
        value = value.get("corpus", {})
    if not value:
        raise DataError(f"{path}: knows nothing of the corpus; run again what wrote it, or give another --corpus")
    corpus = {}
    for name, entry in value.items():
        try:
            corpus[name] = DomainStatistics(**entry)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{path}: {name!r}: expected num_examples and available_tokens ({short_reason(error)})"
            ) from None
    return corpus


def _read_mapping(path: Path, option: str, what: str) -> dict[str, Any]:
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give another {option}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise DataError(f"{path}: is neither YAML nor JSON ({short_reason(error)}); give another {option}") from None
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise DataError(f"{path}: expected a mapping of domain and {what}; give another {option}")
    return value


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
    return {
        "doremi_mix": doremi_mix.__version__,
        "format": row.name,
        "written_for": row.title,
        "unit": row.unit,
        "meaning": row.meaning,
        "oversamples": row.oversamples,
        "budget": plan.budget,
        "budget_unit": plan.budget_unit if plan.budget is not None else None,
        "max_epochs": plan.max_epochs if plan.budget is not None else None,
        "capped_domains": list(plan.capped),
        "left_out": list(plan.left_out),
        "num_drawn": export.num_drawn,
        "verdict": plan.verdict or None,
        "usage": export.usage,
        "notes": [*plan.notes, *export.notes],
        "domains": domains,
    }


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
    if folder or len(export.files) > 1 or out.is_dir():
        targets = [out / file.name for file in export.files]
        sidecar = out / EXPECTED
    else:
        targets, sidecar = [out], out.with_name(f"{out.name}.{EXPECTED}")
    existing = [path for path in (*targets, sidecar) if path.exists()]
    if existing and not overwrite:
        raise RunDirectoryError(f"{existing[0]}: exists already; choose another --out, or say --overwrite")
    if not out.parent.is_dir():
        raise RunDirectoryError(f"{out.parent}: no such folder; make it first or choose another --out")
    try:
        for path, file in zip(targets, export.files, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, file.text)
        write_atomic(sidecar, json_text(expectation(row, plan, export)))
    except OSError as error:
        raise RunDirectoryError(f"{out}: cannot be written ({error.strerror}); choose another --out") from None
    return export, [*targets, sidecar]
