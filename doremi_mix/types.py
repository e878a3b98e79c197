"""The frozen values that flow between stages.

They are validated on construction, so nothing downstream normalises "just in case".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Example:
    """One instruction and its answer, or one conversation, or one plain text.

    Attributes:
        id: ``"<domain>:<row>"``; rows count from 1 within the domain's source file.
        domain: the name of the domain.
        instruction: the last user turn; ``None`` marks plain text, on all of which the loss is taken.
        input: optional material for the instruction ("" when absent).
        output: the answer to the last user turn, or the plain text.
        history: earlier (user, assistant) turns; the loss is taken on every assistant turn.
        system: a system prompt that replaces the template's own preamble ("" when absent).
        row: the input row as it was read, as one line of JSON.
    """

    id: str
    domain: str
    instruction: str | None
    input: str
    output: str
    history: tuple[tuple[str, str], ...] = ()
    system: str = ""
    row: str = ""


@dataclass(frozen=True, slots=True)
class Rejection:
    """A row that was not kept, and why.

    Attributes:
        id: ``"<domain>:<row>"``, as for examples.
        domain: the name of the domain.
        path: the file that the row was read from.
        row_number: the row's number in that file, from 1.
        rule: a short stable name, for example ``empty_output``.
        detail: one sentence for a person: what was found and what was expected.
        row: the row as it was read (text that is not JSON is kept as it is, cut to 2,000 characters).
    """

    id: str
    domain: str
    path: str
    row_number: int
    rule: str
    detail: str
    row: str = ""


@dataclass(frozen=True, slots=True)
class Domains:
    """The one order of the domains: a domain's id is its position here."""

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("there must be at least one domain")
        if len(set(self.names)) != len(self.names):
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise ValueError(f"domain names must be unique, got {twice!r} twice")

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def index(self, name: str) -> int:
        """Returns the id of a domain."""
        return self.names.index(name)


@dataclass(frozen=True, slots=True)
class Allocation:
    """How many tokens to draw from each domain.

    Attributes:
        budget: the tokens asked for; equals the sum of ``tokens``.
        max_epochs: the largest number of passes over a domain that was allowed.
        tokens: tokens to draw, by domain.
        available_tokens: tokens that one pass over the domain gives.
        capped: the domains whose share was cut by the epoch cap, in domain order.
    """

    budget: int
    max_epochs: float
    tokens: Mapping[str, int]
    available_tokens: Mapping[str, int]
    capped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if sum(self.tokens.values()) != self.budget:
            raise ValueError(f"allocated tokens sum to {sum(self.tokens.values())}, not to the budget {self.budget}")

    def epochs(self, name: str) -> float:
        """Returns drawn over available tokens of a domain."""
        available = self.available_tokens[name]
        return self.tokens[name] / available if available else 0.0


def check_distribution(weights: Mapping[str, float], what: str) -> None:
    """Raises ValueError unless the weights are finite, at least 0 and sum to 1 within 1e-9."""
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise ValueError(f"{what}: the weight of {name!r} must be a number, got {weight!r}")
        try:
            usable = math.isfinite(weight) and weight >= 0
        except OverflowError:  # a whole number beyond float64
            usable = False
        if not usable:
            raise ValueError(f"{what}: the weight of {name!r} must be finite and at least 0, got {weight!s:.60}")
    try:
        total = math.fsum(weights.values())
    except OverflowError:
        total = math.inf
    if abs(total - 1.0) > 1e-9:
        raise ValueError(f"{what} must sum to 1, got {total!r}")


@dataclass(frozen=True, slots=True)
class TrajectoryPoint:
    """One update of the domain weights; every mapping is keyed by domain name."""

    step: int
    domain_weights: Mapping[str, float]
    excess_loss: Mapping[str, float]
    unclipped_excess_loss: Mapping[str, float]
    proxy_loss: Mapping[str, float]
    reference_loss: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class DomainLoss:
    """The held-out loss of one domain, in nats per token.

    Attributes:
        loss: mean over the unmasked tokens of the held-out examples.
        standard_error: of that mean, over sequences; NaN with fewer than two sequences.
        num_tokens: unmasked tokens that were scored.
        num_sequences: packed sequences that were scored.
    """

    loss: float
    standard_error: float
    num_tokens: int
    num_sequences: int


@dataclass(frozen=True, slots=True)
class DomainStatistics:
    """What there is of one domain to train on.

    Attributes:
        num_examples: examples of one pass: those that were kept and are not held out; at least 1.
        available_tokens: tokens of those examples, after the prompt template and with the end token; at least 1.
        num_sequences: packed sequences of those examples; 0 when they were not packed.
        path: the file that the domain was read from; "" when it is not known.
        num_rows: rows of that file, rejected and held-out ones included, so at least ``num_examples``; 0 when they
            were not counted.
    """

    num_examples: int
    available_tokens: int
    num_sequences: int = 0
    path: str = ""
    num_rows: int = 0

    def __post_init__(self) -> None:
        for what, least in (("num_examples", 1), ("available_tokens", 1), ("num_sequences", 0), ("num_rows", 0)):
            count = getattr(self, what)
            if isinstance(count, bool) or not isinstance(count, int) or count < least:
                raise ValueError(f"{what} must be a whole number of at least {least}, got {count!r}")
        if 0 < self.num_rows < self.num_examples:
            raise ValueError(
                f"num_rows must be at least num_examples, {self.num_examples}, or 0 for unknown, got {self.num_rows}"
            )
        if not isinstance(self.path, str):
            raise ValueError(f"path must be a string, got {self.path!r}")

    @property
    def mean_tokens(self) -> float:
        """Mean tokens of an example."""
        return self.available_tokens / self.num_examples
