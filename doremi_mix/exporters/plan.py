"""What every exporter is given: the domains that are drawn, and how much of each, in every unit that is known.

A plan is made once from domain weights, the corpus and a budget; exporters only choose the unit that their program
means, and write it down.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from doremi_mix.conversions import exact_shares, in_other_units, whole_counts
from doremi_mix.domain_weights import DomainWeights
from doremi_mix.errors import DataError, ExportError
from doremi_mix.mixture import allocate, check_max_epochs, epoch_cap
from doremi_mix.types import DomainStatistics

DEFAULT_PATH = "data/{name}.jsonl"
"""What a program reads where nobody said what."""


@dataclass(frozen=True, slots=True)
class PlannedDomain:
    """One domain of which something is drawn.

    Attributes:
        name: of the domain.
        path: what the program reads: a file, a folder, a prefix.
        weight: its domain weight, as learned.
        token_share: its share of the tokens to draw, after the epoch cap.
        example_share: its share of the examples to draw; None when the lengths of examples are not known.
        tokens: to draw under the budget; None without one.
        examples: to draw under the budget; 0 where the budget does not reach for one; None when not known.
        statistics: what there is of it; None when not known.
        file_examples: rows of ``path``: what the program takes for the domain's size; None when not known.
    """

    name: str
    path: str
    weight: float
    token_share: float
    example_share: float | None
    tokens: int | None
    examples: int | None
    statistics: DomainStatistics | None
    file_examples: int | None


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """The whole of what is to be drawn.

    Attributes:
        learned: the weights that the plan was made from.
        domains: those with a share above 0, in the order of the weights: no program needs to be told of zeros, and
            some hang on them.
        left_out: names of the domains of which nothing is drawn.
        budget: what to draw in all, in units of ``budget_unit``; None when only shares were asked for.
        budget_unit: "tokens" or "examples".
        token_budget: tokens to draw; None without a budget, or with one that counts examples of unknown length.
        max_epochs: no domain is repeated more often than this, where a budget is given.
        capped: the domains that the epoch cap cut.
        seed: for programs that ask for one.
        verdict: what the comparison with plain mixtures found, one sentence; "" when there was none.
        notes: what holds of any format, one sentence each.
    """

    learned: DomainWeights
    domains: tuple[PlannedDomain, ...]
    left_out: tuple[str, ...]
    budget: int | None
    budget_unit: str
    token_budget: int | None
    max_epochs: float
    capped: tuple[str, ...] = ()
    seed: int = 0
    verdict: str = ""
    notes: tuple[str, ...] = ()

    def token_shares(self) -> dict[str, float]:
        """Returns the share of tokens of each domain; their sum is 1.0 exactly, in any order of adding."""
        return {domain.name: domain.token_share for domain in self.domains}

    def example_shares(self) -> dict[str, float]:
        """Returns the share of examples of each domain; their sum is 1.0 exactly, in any order of adding.

        Raises:
            ExportError: the lengths of the examples are not known.
        """
        shares = {domain.name: domain.example_share for domain in self.domains}
        known = {name: share for name, share in shares.items() if share is not None}
        if len(known) < len(shares):
            raise ExportError(
                "it draws whole examples, so that shares of tokens must become shares of examples, for which the "
                "lengths of examples are not known; give --corpus RUN_DIR (or a file of num_examples and "
                "available_tokens by domain), or say --equal-lengths"
            )
        return known

    def counts(self) -> dict[str, int]:
        """Returns the examples to draw of each domain; domains of which the budget draws none are absent.

        Raises:
            ExportError: there is no budget, or the lengths of the examples are not known, or no domain gets an example.
        """
        self.example_shares()
        counts = {domain.name: domain.examples for domain in self.domains}
        known = {name: count for name, count in counts.items() if count is not None}
        if len(known) < len(counts):
            if self.budget is None:
                raise ExportError("it takes numbers of examples, which need a budget; give --budget")
            raise ExportError(
                "it takes numbers of examples, which a budget of tokens does not give where the lengths of examples "
                "are not known; say --budget-unit examples, or give --corpus RUN_DIR"
            )
        drawn = {name: count for name, count in known.items() if count}
        if not drawn:
            raise ExportError("the budget is smaller than one example; raise --budget")
        return drawn

    def multipliers(self) -> dict[str, Fraction]:
        """Returns what part of its own file is drawn of each domain, exactly: 2 is every row twice.

        Raises:
            ExportError: as ``counts``, or the sizes of the files are not known.
        """
        sizes = {domain.name: domain.file_examples for domain in self.domains}
        counts = self.counts()
        if not all(sizes[name] for name in counts):
            raise ExportError(
                "it takes multipliers of each domain's own size, which are not known; give --corpus RUN_DIR (or a file "
                "of num_examples and available_tokens by domain)"
            )
        return {name: Fraction(count, sizes[name] or 1) for name, count in counts.items()}

    def named(self, name: str) -> PlannedDomain:
        """Returns a domain of the plan."""
        return next(domain for domain in self.domains if domain.name == name)


def make_plan(
    weights: DomainWeights,
    *,
    budget: int | None = None,
    budget_unit: str = "tokens",
    max_epochs: float = 4.0,
    paths: Mapping[str, str] | None = None,
    equal_lengths: bool = False,
    seed: int = 0,
) -> ExportPlan:
    """Says how much of each domain is to be drawn.

    With a budget, a domain that it would repeat more than ``max_epochs`` times gets less and the others more, as the
    mixture of the run does it.  Without one, shares are the weights as they are.

    Args:
        weights: the domain weights; with ``corpus``, units can be converted and the epoch cap applied.
        budget: what to draw in all; None for shares alone.
        budget_unit: what the budget counts: "tokens" or "examples".
        max_epochs: the largest number of passes over a domain.
        paths: what the program reads of each domain; without it, the files that the domains were read from.
        equal_lengths: take every example to be as long as any other, where the corpus is not known.
        seed: for programs that ask for one.

    Returns:
        The plan.

    Raises:
        ExportError: a name or path cannot be written to any file, or the budget has a unit that cannot be converted.
        BudgetError: the budget cannot be met under the epoch cap.
        DataError: the paths are not those of the domains.
    """
    check_max_epochs(max_epochs, "max_epochs")
    names = [name for name, weight in weights.domain_weights.items() if weight]
    _check_paths(names, paths)
    corpus = {name: weights.corpus[name] for name in names} if weights.corpus else {}
    shares = exact_shares({name: float(weights[name]) for name in names})
    lengths = _lengths(names, corpus, equal_lengths=equal_lengths)
    if budget is None:
        drawn = _Drawn(shares, in_other_units(shares, lengths) if lengths else None)
    elif budget_unit == "tokens":
        drawn = _draw_tokens(shares, corpus, lengths, budget, max_epochs)
    else:
        drawn = _draw_examples(shares, corpus, lengths, budget, max_epochs)
    domains = tuple(
        PlannedDomain(
            name=name,
            path=_path(name, paths, corpus.get(name)),
            weight=weights[name],
            token_share=drawn.token_shares[name],
            example_share=drawn.example_shares[name] if drawn.example_shares else None,
            tokens=drawn.tokens[name] if drawn.tokens else None,
            examples=drawn.examples[name] if drawn.examples else None,
            statistics=corpus.get(name),
            file_examples=_file_examples(paths[name] if paths else None, corpus.get(name)),
        )
        for name in names
        if drawn.token_shares[name]
    )
    planned = {domain.name for domain in domains}
    return ExportPlan(
        learned=weights,
        domains=domains,
        left_out=tuple(name for name in weights.domain_weights if name not in planned),
        budget=budget,
        budget_unit=budget_unit,
        token_budget=sum(drawn.tokens.values()) if drawn.tokens else None,
        max_epochs=max_epochs,
        capped=drawn.capped,
        seed=seed,
        verdict=str(weights.verdict.get("sentence") or ""),
        notes=_notes(domains, budget, corpus),
    )


def _notes(
    domains: Iterable[PlannedDomain], budget: int | None, corpus: Mapping[str, DomainStatistics]
) -> tuple[str, ...]:
    """Returns what holds of any format."""
    if not corpus:
        return ("The sizes of the domains are not known, so no epoch cap was applied.",) if budget is not None else ()
    others = [(d.file_examples or 0) - d.statistics.num_examples for d in domains if d.statistics]
    if not any(others):
        return ()
    return (
        f"The files have {sum(others):,} rows that the run rejected, filtered or holds out; they can be drawn, too. "
        "Stage export with export.data=true writes files without them.",
    )


@dataclass(frozen=True, slots=True)
class _Drawn:
    """What is drawn, in each unit that is known."""

    token_shares: Mapping[str, float]
    example_shares: Mapping[str, float] | None = None
    tokens: Mapping[str, int] | None = None
    examples: Mapping[str, int] | None = None
    capped: tuple[str, ...] = ()


def _draw_tokens(
    shares: Mapping[str, float],
    corpus: Mapping[str, DomainStatistics],
    lengths: Mapping[str, Fraction] | None,
    budget: int,
    max_epochs: float,
) -> _Drawn:
    """Splits a budget of tokens; examples follow from their mean lengths, where these are known."""
    available = {name: statistics.available_tokens for name, statistics in corpus.items()}
    tokens, capped = _split(shares, available, budget, max_epochs, "token")
    token_shares = exact_shares({name: Fraction(count) for name, count in tokens.items()})
    if lengths is None:
        return _Drawn(token_shares, None, tokens, None, capped)
    if not corpus:
        # Lengths are equal and unknown: shares of examples, but no number of them.
        return _Drawn(token_shares, token_shares, tokens, None, capped)
    amounts = {name: count / lengths[name] for name, count in tokens.items()}
    caps = {name: epoch_cap(max_epochs, corpus[name].num_examples) for name in tokens}
    return _Drawn(token_shares, exact_shares(amounts), tokens, whole_counts(amounts, caps), capped)


def _draw_examples(
    shares: Mapping[str, float],
    corpus: Mapping[str, DomainStatistics],
    lengths: Mapping[str, Fraction] | None,
    budget: int,
    max_epochs: float,
) -> _Drawn:
    """Splits a budget of examples; tokens follow from their mean lengths."""
    if lengths is None:
        raise ExportError(
            "a budget in examples needs the lengths of examples, which are not known; give --corpus RUN_DIR, or say "
            "--equal-lengths"
        )
    available = {name: statistics.num_examples for name, statistics in corpus.items()}
    examples, capped = _split(in_other_units(shares, lengths), available, budget, max_epochs, "example")
    amounts = {name: count * lengths[name] for name, count in examples.items()}
    return _Drawn(
        token_shares=exact_shares(amounts),
        example_shares=exact_shares({name: Fraction(count) for name, count in examples.items()}),
        tokens=whole_counts(amounts) if corpus else None,
        examples=examples,
        capped=capped,
    )


def _split(
    shares: Mapping[str, float], available: Mapping[str, int], budget: int, max_epochs: float, unit: str
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Returns the budget by domain, and the domains that the epoch cap cut; nothing is cut where sizes are unknown."""
    if available:
        allocation = allocate(shares, available, budget, max_epochs, unit=unit, setting="max_epochs")
        return dict(allocation.tokens), allocation.capped
    unlimited = dict.fromkeys(shares, budget)
    return dict(allocate(shares, unlimited, budget, 1.0, unit=unit, setting="max_epochs").tokens), ()


def _lengths(
    names: list[str], corpus: Mapping[str, DomainStatistics], *, equal_lengths: bool
) -> dict[str, Fraction] | None:
    """Returns mean tokens of an example by domain, exactly; None when they are not known."""
    if corpus:
        return {name: Fraction(s.available_tokens, s.num_examples) for name, s in corpus.items()}
    return dict.fromkeys(names, Fraction(1)) if equal_lengths else None


def _path(name: str, paths: Mapping[str, str] | None, statistics: DomainStatistics | None) -> str:
    if paths is not None:
        return paths[name]
    return statistics.path if statistics and statistics.path else DEFAULT_PATH.replace("{name}", name)


def _file_examples(path: str | None, statistics: DomainStatistics | None) -> int | None:
    """Returns the rows of what the program reads: another file than the source is taken to hold the kept rows alone."""
    if statistics is None:
        return None
    is_source = statistics.path and (path is None or posixpath.normpath(path) == posixpath.normpath(statistics.path))
    return statistics.num_rows if is_source and statistics.num_rows else statistics.num_examples


def _check_paths(names: list[str], paths: Mapping[str, str] | None) -> None:
    """Raises for names and paths that no file can hold, or that are not those of the domains."""
    if paths is not None:
        missing = [name for name in names if name not in paths]
        if missing:
            raise DataError(f"no path is given for domain {missing[0]!r}; give one for each domain in --paths")
    for name in names:
        for what, text in (("its name", name), ("its path", paths[name] if paths else "")):
            if any("\ud800" <= character <= "\udfff" for character in text) or "\0" in text:
                raise ExportError(f"domain {name!r}: {what} has a character that no file can hold; rename it")
