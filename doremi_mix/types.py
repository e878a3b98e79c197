"""The frozen values that flow between stages.

They are validated on construction, so nothing downstream normalises "just in case".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

WEIGHTS_FORMAT = "doremi-mix/domain-weights"
WEIGHTS_VERSION = 1


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
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"{what}: the weight of {name!r} must be finite and at least 0, got {weight}")
    total = math.fsum(weights.values())
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
class DomainWeights:
    """The product: how much of each domain to train on, as shares of tokens.

    Attributes:
        domain_weights: the learned share of tokens of each domain; sums to 1.
        reference_weights: what the reference model was trained with; sums to 1.
        shares: the same mixture in other units: ``token``, ``sequence``, ``example``, each by domain.
        method: how the weights were learned.
        settings: the settings that the result depends on, by stage.
        tokenizer: ``name`` and ``sha256`` of the tokenizer that counted the tokens.
        provenance: versions and the sha256 of each input file.
        intervals: by domain, the 95 % interval of the mean over seeds; empty for a single seed.
        uncertainty: ``num_seeds``, ``standard_deviation`` over seeds by domain, ``rank_stability`` (mean Kendall tau
            between seeds), ``rounds`` (the largest change of a weight in each).
        diagnoses: what the run's diagnostics found, one sentence each.
        verdict: what ``doremi-mix compare`` found: ``kind``, ``sentence``, ``best``; empty when it was not run.
    """

    domain_weights: Mapping[str, float]
    reference_weights: Mapping[str, float]
    shares: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    method: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    uncertainty: Mapping[str, Any] = field(default_factory=dict)
    diagnoses: tuple[str, ...] = ()
    verdict: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_distribution(self.domain_weights, "domain weights")
        check_distribution(self.reference_weights, "reference weights")
        if set(self.domain_weights) != set(self.reference_weights):
            raise ValueError("domain weights and reference weights name different domains")

    def __getitem__(self, name: str) -> float:
        return self.domain_weights[name]

    def to_dict(self) -> dict[str, Any]:
        """Returns the stable JSON form that ``weights/domain_weights.json`` holds."""
        return {
            "format": WEIGHTS_FORMAT,
            "version": WEIGHTS_VERSION,
            "unit": "tokens",
            "domain_weights": dict(self.domain_weights),
            "reference_weights": dict(self.reference_weights),
            "shares": {unit: dict(shares) for unit, shares in self.shares.items()},
            "intervals": {name: list(interval) for name, interval in self.intervals.items()},
            "method": self.method,
            "settings": dict(self.settings),
            "tokenizer": dict(self.tokenizer),
            "provenance": dict(self.provenance),
            "uncertainty": dict(self.uncertainty),
            "diagnoses": list(self.diagnoses),
            "verdict": dict(self.verdict),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DomainWeights:
        """Reads what ``to_dict`` wrote.

        Raises:
            ValueError: the data are of another format or version, a key is missing, or the weights do not sum to 1.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"domain weights must be an object, got a {type(data).__name__}")
        if data.get("format") != WEIGHTS_FORMAT:
            raise ValueError(f'"format" must be "{WEIGHTS_FORMAT}", got {data.get("format")!r}')
        if data.get("version") != WEIGHTS_VERSION:
            raise ValueError(f'"version" must be {WEIGHTS_VERSION}, got {data.get("version")!r}')
        required = ("domain_weights", "reference_weights")
        optional = ("shares", "settings", "tokenizer", "provenance", "intervals", "uncertainty", "verdict")
        for key in (*required, *optional):
            if not isinstance(data.get(key, {} if key in optional else None), Mapping):
                raise ValueError(f'"{key}" must be an object, got {data.get(key)!r}')
        for unit, shares in data.get("shares", {}).items():
            if not isinstance(shares, Mapping):
                raise ValueError(f'"shares.{unit}" must be an object of numbers, got {shares!r}')
        return cls(
            domain_weights=dict(data["domain_weights"]),
            reference_weights=dict(data["reference_weights"]),
            shares=dict(data.get("shares", {})),
            method=str(data.get("method", "")),
            settings=dict(data.get("settings", {})),
            tokenizer=dict(data.get("tokenizer", {})),
            provenance=dict(data.get("provenance", {})),
            intervals={name: (low, high) for name, (low, high) in data.get("intervals", {}).items()},
            uncertainty=dict(data.get("uncertainty", {})),
            diagnoses=tuple(data.get("diagnoses", ())),
            verdict=dict(data.get("verdict", {})),
        )
