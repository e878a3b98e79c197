"""What the exporters for pretraining programs share: checks of names and paths, YAML that every reader types alike."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable

from doremi_mix.errors import ExportError
from doremi_mix.exporters.export import yaml_text as quoted_yaml
from doremi_mix.exporters.plan import ExportPlan, PlannedDomain


def check_different_paths(plan: ExportPlan) -> None:
    """Raises when two domains are read from one place, or one from nowhere."""
    seen: dict[str, str] = {}
    for domain in plan.domains:
        if not domain.path.strip():
            raise ExportError(f"the path of domain {domain.name!r} is empty; give other paths: --paths")
        # A scheme's "//" is no empty folder.
        scheme, separator, rest = domain.path.rpartition("://")
        place = scheme + separator + posixpath.normpath(rest)
        if place in seen:
            raise ExportError(
                f"domains {seen[place]!r} and {domain.name!r} have the same path {domain.path!r}, so that both would "
                "draw the same data; give other paths: --paths"
            )
        seen[place] = domain.name


def check_characters(domains: Iterable[PlannedDomain], characters: str, why: str, *, patterns: bool = False) -> None:
    """Raises when a path has a character that the program does not take as it stands.

    Args:
        domains: whose paths are checked.
        characters: the ones that mean something to the program.
        why: what they mean, for the message: "NAME reads as ...".
        patterns: let them through where they are meant as a pattern: in paths that were given (not those that the
            domains were read from), unless they come from the domain's name.
    """
    for domain in domains:
        found = next((character for character in domain.path if character in characters), None)
        if found is None or (patterns and _is_pattern(domain, characters)):
            continue
        raise path_error(domain, f"has {found!r}, which {why}")


def path_error(domain: PlannedDomain, what: str) -> ExportError:
    """Returns the error of a path that a program would misread."""
    return ExportError(f"the path of domain {domain.name!r}, {domain.path!r}, {what}; give another path: --paths")


def _is_pattern(domain: PlannedDomain, characters: str) -> bool:
    read_from = domain.statistics.path if domain.statistics else ""
    default = f"data/{domain.name}.jsonl"
    return domain.path not in (read_from, default) and not any(character in domain.name for character in characters)


def check_folder_names(domains: Iterable[PlannedDomain], why: str) -> None:
    """Raises when a name is not that of one folder."""
    for domain in domains:
        if domain.name in ("", ".", "..") or "/" in domain.name or "\\" in domain.name:
            raise ExportError(f"the name {domain.name!r} {why}; rename the domain")


__all__ = ["check_characters", "check_different_paths", "check_folder_names", "path_error", "quoted_yaml"]
