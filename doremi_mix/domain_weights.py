"""Domain weights: the product of a run, and what other programs want to know of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from doremi_mix.conversions import exact_shares, in_other_units
from doremi_mix.errors import BudgetError, DataError
from doremi_mix.types import DomainStatistics, check_distribution

if TYPE_CHECKING:
    import datasets

    from doremi_mix.sampler import MixtureSampler

WEIGHTS_FORMAT = "doremi-mix/domain-weights"
WEIGHTS_VERSION = 1


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
        corpus: what there is of each domain; empty when it is not known. It turns shares of tokens into other units.
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
    corpus: Mapping[str, DomainStatistics] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_distribution(self.domain_weights, "domain weights")
        check_distribution(self.reference_weights, "reference weights")
        if set(self.domain_weights) != set(self.reference_weights):
            raise ValueError("domain weights and reference weights name different domains")
        if self.corpus and set(self.corpus) != set(self.domain_weights):
            name = sorted(set(self.corpus) ^ set(self.domain_weights))[0]
            raise ValueError(f'the domain weights and "corpus" name different domains, for example {name!r}')

    def __getitem__(self, name: str) -> float:
        return self.domain_weights[name]

    def to_probabilities(self, unit: Literal["tokens", "sequences", "examples"] = "tokens") -> dict[str, float]:
        """Returns how often to draw a unit of each domain so that its share of tokens is its weight.

        Args:
            unit: what is drawn: "tokens" (or sequences of a fixed length, cut from running text), "sequences" as the
                run packed whole examples into them, or "examples".

        Returns:
            Shares of all domains, in their order; their sum is 1.0 exactly, in any order of adding.

        Raises:
            DataError: how long the units are is not known: the weights come without ``corpus`` and ``shares``.
            ValueError: there is no such unit.

        Example:
            >>> corpus = {"long": DomainStatistics(10, 300), "short": DomainStatistics(10, 100)}
            >>> weights = DomainWeights({"long": 0.5, "short": 0.5}, {"long": 0.5, "short": 0.5}, corpus=corpus)
            >>> weights.to_probabilities("examples")
            {'long': 0.25, 'short': 0.75}
        """
        if unit not in ("tokens", "sequences", "examples"):
            raise ValueError(f'unit must be "tokens", "sequences" or "examples", got {unit!r}')
        shares = exact_shares({name: float(weight) for name, weight in self.domain_weights.items()})
        if unit == "tokens":
            return shares
        counts = {name: s.num_examples if unit == "examples" else s.num_sequences for name, s in self.corpus.items()}
        known = bool(counts) and all(counts.values())
        # What the run wrote knows how full its sequences are; of weights that were changed since it says nothing.
        stored = self.shares.get(unit.removesuffix("s"), {})
        holds = self.shares.get("token") == self.domain_weights and set(stored) == set(shares)
        if holds and (unit == "sequences" or not known):
            return exact_shares({name: float(stored[name]) for name in shares})
        if known:
            return in_other_units(
                shares, {name: Fraction(s.available_tokens, counts[name]) for name, s in self.corpus.items()}
            )
        raise DataError(
            f"how many tokens the {unit} of each domain have is not known; take the domain_weights.json of a run, or "
            'unit="tokens"'
        )

    def to_counts(
        self,
        budget: int,
        *,
        unit: Literal["tokens", "examples"] = "tokens",
        max_epochs: float = 4.0,
        equal_lengths: bool = False,
    ) -> dict[str, int]:
        """Returns how many EXAMPLES of each domain fill a budget, as the exporters of counts write them.

        Args:
            budget: what to draw in all.
            unit: what the budget counts: "tokens" or "examples".
            max_epochs: the largest number of passes over a domain; what it cuts goes to the other domains.
            equal_lengths: take every example to be as long as any other, where the weights have no corpus; then the
                budget counts examples, and there is no epoch cap.

        Returns:
            Counts of all domains, in their order; 0 where the weight is 0 or the budget does not reach for an example.

        Raises:
            DataError: the lengths of the examples are not known.
            BudgetError: the epoch cap makes the budget impossible, or it is smaller than one example.
            ValueError: there is no such unit.

        Example:
            >>> corpus = {"long": DomainStatistics(10, 300), "short": DomainStatistics(10, 100)}
            >>> weights = DomainWeights({"long": 0.5, "short": 0.5}, {"long": 0.5, "short": 0.5}, corpus=corpus)
            >>> weights.to_counts(180)
            {'long': 3, 'short': 9}
        """
        from doremi_mix.exporters.plan import make_plan

        if unit not in ("tokens", "examples"):
            raise ValueError(f'unit must be "tokens" or "examples", got {unit!r}')
        if not self.corpus and (unit == "tokens" or not equal_lengths):
            raise DataError(
                "counts of examples need the lengths of examples, and the weights have no corpus; take the "
                'domain_weights.json of a run, or say unit="examples", equal_lengths=True'
            )
        plan = make_plan(self, budget=budget, budget_unit=unit, max_epochs=max_epochs, equal_lengths=equal_lengths)
        counts = dict.fromkeys(self.domain_weights, 0)
        counts.update((domain.name, domain.examples or 0) for domain in plan.domains)
        if not any(counts.values()):
            raise BudgetError(f"a budget of {budget:,} {unit} is smaller than one example; raise it")
        return counts

    def interleave(
        self,
        datasets: Mapping[str, datasets.Dataset] | Mapping[str, datasets.IterableDataset],
        *,
        budget: int | None = None,
        unit: Literal["tokens", "examples"] = "tokens",
        max_epochs: float = 4.0,
        equal_lengths: bool = False,
        seed: int = 0,
    ) -> datasets.Dataset | datasets.IterableDataset:
        """Mixes datasets of Hugging Face by these weights; see ``doremi_mix.loading.interleave``."""
        from doremi_mix.loading import interleave

        return interleave(
            datasets,
            self,
            budget=budget,
            unit=unit,
            max_epochs=max_epochs,
            equal_lengths=equal_lengths,
            seed=seed,
        )

    def sampler(
        self,
        sizes: Mapping[str, int],
        *,
        budget: int | None = None,
        unit: Literal["tokens", "examples"] = "tokens",
        max_epochs: float = 4.0,
        equal_lengths: bool = False,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> MixtureSampler:
        """Returns a sampler for a torch ``DataLoader``; see ``doremi_mix.sampler.MixtureSampler``."""
        from doremi_mix.sampler import MixtureSampler

        return MixtureSampler(
            sizes,
            self,
            budget=budget,
            unit=unit,
            max_epochs=max_epochs,
            equal_lengths=equal_lengths,
            seed=seed,
            num_replicas=num_replicas,
            rank=rank,
        )

    @classmethod
    def read(cls, path: str | Path, corpus: Mapping[str, DomainStatistics] | None = None) -> DomainWeights:
        """Reads domain weights from a file: ours, or one of another pipeline (see ``doremi_mix.weight_files``).

        How a file of another pipeline was understood is not said here; ``weight_files.read_weights`` tells it.

        Args:
            path: the file.
            corpus: what there is of each domain, for files that do not say; it replaces what ours says.

        Raises:
            DataError: the file is missing, is none of these, or its weights cannot be used; the corpus knows nothing of
                a domain; or the weights are shares of examples, which only a corpus makes shares of tokens.
        """
        from doremi_mix.weight_files import read_weights

        read = read_weights(Path(path))
        if read.unit == "examples" and corpus is None:
            raise DataError(f"{path}: holds shares of examples, not of tokens; give a corpus, which converts them")
        return read.to_domain_weights(corpus)

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
            "corpus": {name: asdict(statistics) for name, statistics in self.corpus.items()},
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
        optional = ("shares", "settings", "tokenizer", "provenance", "intervals", "uncertainty", "verdict", "corpus")
        for key in (*required, *optional):
            if not isinstance(data.get(key, {} if key in optional else None), Mapping):
                raise ValueError(f'"{key}" must be an object, got {data.get(key)!r}')
        for unit, shares in data.get("shares", {}).items():
            if not isinstance(shares, Mapping) or not all(map(_is_number, shares.values())):
                raise ValueError(f'"shares.{unit}" must be an object of numbers, got {shares!r}')
        for name, interval in data.get("intervals", {}).items():
            if not isinstance(interval, list | tuple) or len(interval) != 2 or not all(map(_is_number, interval)):
                raise ValueError(f'"intervals.{name}" must be two numbers, got {interval!r}')
        diagnoses = data.get("diagnoses", ())
        if not isinstance(diagnoses, list | tuple) or not all(isinstance(sentence, str) for sentence in diagnoses):
            raise ValueError(f'"diagnoses" must be a list of sentences, got {diagnoses!r}')
        known = {entry.name for entry in fields(DomainStatistics)}
        corpus = {}
        for name, entry in data.get("corpus", {}).items():
            if not isinstance(entry, Mapping) or not {"num_examples", "available_tokens"} <= set(entry) <= known:
                raise ValueError(f'"corpus.{name}" must have num_examples and available_tokens, got {entry!r}')
            try:
                corpus[name] = DomainStatistics(**entry)
            except ValueError as error:
                raise ValueError(f'"corpus.{name}": {error}') from None
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
            diagnoses=tuple(diagnoses),
            verdict=dict(data.get("verdict", {})),
            corpus=corpus,
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
