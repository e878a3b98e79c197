"""Domain weights from files of other programs: whatever the form, shares that sum to 1, and what was made of the file.

The form is told from the content, never from the file's suffix.  Numbers keep the meaning that they have in the file; a
notice says which unit that is, as far as the form says it, because domain weights here are shares of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

from doremi_mix.conversions import to_token_shares
from doremi_mix.domain_weights import DomainWeights
from doremi_mix.errors import DataError
from doremi_mix.one_reading import load_yaml, parse_json_or_yaml, yaml_problem
from doremi_mix.types import DomainStatistics
from doremi_mix.weight_forms import Found, blend, from_data, is_blend, named_table, unnamed_table
from doremi_mix.weight_numbers import Unit, is_number, is_percentage, to_number

MAX_BYTES = 16 << 20
"""A longer file is data, not weights."""

GIVE = "give a domain_weights.json, or {domain: weight}"


@dataclass(frozen=True, slots=True)
class ReadWeights:
    """What a file of weights says.

    Attributes:
        weights: shares by domain, in the file's order; they sum to 1 within 1e-9.
        kind: what the file was read as, for example "official DoReMi".
        notices: what a user must know of the reading, one sentence each; none for a file of ours.
        domain_weights: all that the file says, when it is one of ours; otherwise None.
        unit: what the weights are shares of: "tokens", or "examples" where the form says so.
    """

    weights: Mapping[str, float]
    kind: str
    notices: tuple[str, ...] = ()
    domain_weights: DomainWeights | None = None
    unit: Unit = "tokens"

    def to_domain_weights(self, corpus: Mapping[str, DomainStatistics] | None = None) -> DomainWeights:
        """Returns the weights as ours, with what is known of the corpus.

        Args:
            corpus: what there is of each of the domains, and perhaps of others.  Shares of examples become shares of
                tokens by it; without it, they are taken as they are.

        Raises:
            DataError: the corpus knows nothing of a domain.
        """
        uniform = dict.fromkeys(self.weights, 1 / len(self.weights))
        weights = self.domain_weights or DomainWeights(self.weights, uniform, method=self.kind)
        if corpus is None:
            return weights
        for name in self.weights:
            if name not in corpus:
                raise DataError(f"the corpus knows nothing of domain {name!r}; give the corpus of these domains")
        known = {name: corpus[name] for name in self.weights}
        if self.unit == "examples":
            lengths = {name: Fraction(s.available_tokens, s.num_examples) for name, s in known.items()}
            return replace(weights, domain_weights=to_token_shares(self.weights, lengths), corpus=known)
        return replace(weights, corpus=known)


def read_weights(path: Path) -> ReadWeights:
    """Reads domain weights from a file: ours, or one of another program.

    Read are our own JSON, the official DoReMi's JSON, plain ``{domain: weight}`` in JSON or YAML, tables (CSV or
    tab-separated; JSON records), the contest's ``ratio.json``, olmix mixes, ``train_weights`` of Levanter and Marin,
    blends of Megatron and NeMo, source mixtures of OLMo-core and the sources of lingua.

    Args:
        path: the file.

    Returns:
        Shares that sum to 1, with notices of how the file was read and whether the shares had to be normalized.

    Raises:
        DataError: the file is missing, is none of these, or its weights cannot be used; one line that names the file.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a domain_weights.json") from None
    if len(content) > MAX_BYTES:
        raise DataError(f"{path}: is longer than the {MAX_BYTES >> 20} MB of a file of weights; {GIVE}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not JSON ({error}); {GIVE}") from None
    return parse_weights(text, str(path))


def parse_weights(text: str, where: str = "weights") -> ReadWeights:
    """Reads domain weights from the text of a file; see ``read_weights``.

    Args:
        text: what the file holds.
        where: what to name in an error.

    Raises:
        DataError: no weights can be read from it.

    Example:
        >>> read = parse_weights("0.3 /data/code_text_document 0.9 /data/web_text_document")
        >>> dict(read.weights), read.kind
        ({'code': 0.25, 'web': 0.75}, 'Megatron blend')
    """
    try:
        found = _find(text)
        if isinstance(found, DomainWeights):
            return ReadWeights(dict(found.domain_weights), "doremi-mix domain weights", (), found)
        return _normalize(found)
    except RecursionError:
        raise DataError(f"{where}: is nested too deeply; {GIVE}") from None
    except ValueError as error:
        raise DataError(f"{where}: {error}; {GIVE}") from None


def match_domains(weights: Mapping[str, float], names: Sequence[str], path: Path) -> dict[str, float]:
    """Returns the weights in the order of the domains of a run.

    Args:
        weights: by domain, as ``read_weights`` gives them.
        names: the domains of the run.
        path: the file, to name in an error.

    Raises:
        DataError: a domain has no weight, or a weight belongs to no domain.
    """
    if names and all(name.endswith(".jsonl") for name in names) and not set(weights) & set(names):
        weights = {f"{name}.jsonl": weight for name, weight in weights.items()}  # they were no names of files after all
    for name in sorted(set(weights) ^ set(names)):
        problem = "has no weight" if name in names else "is no domain of this run"
        raise DataError(f"{path}: {name!r} {problem}; give one weight to each of {list(names)}")
    return {name: weights[name] for name in names}


def _find(text: str) -> Found | DomainWeights:
    """Tells the form of a text, and takes the weights from it.

    Raises:
        ValueError: it has none of the known forms.
    """
    if not text.strip():
        raise ValueError("is empty")
    table = named_table(text)
    if table is not None:
        return table
    if text.lstrip().startswith(("{", "[")):
        return _from_parsed(*parse_json_or_yaml(text))
    tokens = text.split()
    if is_blend(tokens):
        if all(is_number(token) for token in tokens[1::2]):
            raise ValueError('numbers stand where names should; name the columns in a first line "name,weight"')
        return blend(tokens)
    problem = ""
    try:
        data = load_yaml(text)
        if isinstance(data, dict | list):
            return _from_parsed(data, "YAML")
        if isinstance(data, str) and is_blend(data.split()):
            return blend(data.split())
    except yaml.YAMLError as error:
        problem = f" ({yaml_problem(error)})"
    table = unnamed_table(text)
    if table is not None:
        return table
    raise ValueError(f"is no JSON, YAML, table of domains and weights, or Megatron blend{problem}")


def _from_parsed(data: Any, language: str) -> Found | DomainWeights:
    """Takes the weights from parsed JSON or YAML."""
    # Of other programs, "format" is a domain, with a number.
    named = data.get("format") if isinstance(data, dict) else None
    ours = isinstance(named, str) and not is_number(named) and not is_percentage(named)
    return DomainWeights.from_dict(data) if ours else from_data(data, language)


def _normalize(found: Found) -> ReadWeights:
    """Makes shares of numbers in any unit, and says so.

    Raises:
        ValueError: a name or a number cannot be used, or all are 0.
    """
    numbers: dict[str, Fraction] = {}
    signs = set()
    for name, value in found.weights.items():
        _check_name(name)
        numbers[name], percent = to_number(name, value)
        signs.add(percent)
    if len(signs) > 1:
        raise ValueError("some weights have a % sign, and some have none; give all in the same unit")
    total = sum(numbers.values(), Fraction(0))
    if total == 0:
        raise ValueError("no weight is above 0")
    notices = [f"read as {found.kind}: {found.meaning}", *found.notices]
    if abs(total - 1) > Fraction(1, 10**9):
        unit = " (percent)" if True in signs or abs(total - 100) < Fraction(1, 10**6) else ""
        shown = f"{float(total):.12g}" if total < 10**300 else "more than 1e300"
        notices.append(f"the weights sum to {shown}{unit}, not to 1, and were divided by that")
    else:
        total = Fraction(1)  # as they stand, to the last bit
    shares = {name: float(number / total) for name, number in numbers.items()}
    return ReadWeights(shares, found.kind, tuple(notices), unit=found.unit)


def _check_name(name: str) -> None:
    if not name:
        raise ValueError("a domain has an empty name")
    if any("\ud800" <= character <= "\udfff" for character in name):
        raise ValueError(f"the name {name!r} has a character that no file can hold")
