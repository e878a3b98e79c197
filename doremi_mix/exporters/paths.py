"""What exporters ask of names and paths: that the program finds what was meant, and nothing else."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Collection, Iterable

from doremi_mix.errors import ExportError
from doremi_mix.exporters.plan import DEFAULT_PATH, ExportPlan, PlannedDomain

_BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".arrow": "arrow",
}
_PACKED = (".gz", ".zst")
_HOPS = ("::", "://")


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
    default = DEFAULT_PATH.replace("{name}", domain.name)
    return domain.path not in (read_from, default) and not any(character in domain.name for character in characters)


def check_folder_names(domains: Iterable[PlannedDomain], why: str) -> None:
    """Raises when a name is not that of one folder."""
    for domain in domains:
        if domain.name in ("", ".", "..") or "/" in domain.name or "\\" in domain.name:
            raise ExportError(f"the name {domain.name!r} {why}; rename the domain")


def builder_of(domain: PlannedDomain) -> str:
    """Returns the name with which ``load_dataset`` reads a domain's file.

    Raises:
        ExportError: the library would not read this path, or would read another.
    """
    path = domain.path
    for hop in _HOPS:
        if hop in path:
            raise ExportError(
                f'domain {domain.name!r}: its path {path!r} holds "{hop}", at which the datasets library divides a '
                f"path into the parts of an address; give other paths: --paths"
            )
    if "$" in path:
        raise ExportError(
            f'domain {domain.name!r}: its path {path!r} holds "$", after which the datasets library puts in the value '
            f"of an environment variable; give other paths: --paths"
        )
    plain, suffix = posixpath.splitext(path)
    packed = suffix.lower() in _PACKED
    builder = _BUILDERS.get((posixpath.splitext(plain)[1] if packed else suffix).lower())
    if builder is None or (packed and builder != "json"):
        raise ExportError(
            f"domain {domain.name!r}: the kind of its file {path!r} is not known, expected .json, .jsonl or .ndjson, "
            f"each also with .gz or .zst, or .parquet, .csv or .arrow; give other paths: --paths"
        )
    return builder


def data_files(path: str) -> str:
    """Returns a path as ``data_files`` takes it: a pattern, in which what stands for other characters is in brackets.

    Example:
        >>> data_files("data/a[1].jsonl")
        'data/a[[]1].jsonl'
    """
    return re.sub(r"([*?[])", r"[\1]", path)


def check_paths(plan: ExportPlan, names: Iterable[str], suffixes: Collection[str]) -> None:
    """Raises unless the datasets library reads from each path the one file that is found there.

    Args:
        plan: what is to be drawn.
        names: of the domains that are written.
        suffixes: by which the program knows the kind of a file, as they must be spelled.

    Raises:
        ExportError: names the domain and its path.
    """
    check_different_paths(plan)
    for domain in map(plan.named, names):
        builder_of(domain)
        # The program asks whether the file exists, so that the pattern cannot be escaped.
        if any(character in domain.path for character in "*?["):
            raise ExportError(
                f"domain {domain.name!r}: its path {domain.path!r} holds *, ? or [, with which the datasets library "
                f"reads all files that match; give other paths: --paths"
            )
        if posixpath.splitext(domain.path)[1] not in suffixes:
            raise ExportError(
                f"domain {domain.name!r}: its path {domain.path!r} does not end in {' or '.join(suffixes)}, by which "
                f"the kind of a file is known; give other paths: --paths"
            )


def check_arguments(plan: ExportPlan, names: Iterable[str]) -> None:
    """Raises when a path would be taken for an option of a command line.

    Raises:
        ExportError: names the domain and its path.
    """
    for domain in map(plan.named, names):
        if domain.path.startswith("-"):
            raise ExportError(
                f'domain {domain.name!r}: its path {domain.path!r} starts with "-", as options do; give other paths, '
                f"with ./ in front: --paths"
            )
