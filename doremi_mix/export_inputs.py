"""What an export is told beside the weights: counts, paths and the corpus, as a person gives them."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from doremi_mix.domain_weights import WEIGHTS_FORMAT
from doremi_mix.errors import ConfigError, DataError, short_reason
from doremi_mix.one_reading import load_yaml, parse_json_or_yaml, yaml_problem
from doremi_mix.types import DomainStatistics

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}


def read_count(text: str) -> int:
    """Reads a count as people write it: ``1000000``, ``1,000,000``, ``1e6``, ``1M``.

    Raises:
        ConfigError: it is no whole number of at least 1.
    """
    from fractions import Fraction

    match = re.fullmatch(r"(\d[\d_,]*(?:\.\d+)?(?:[eE]\+?\d{1,2})?)\s*([kmbgtKMBGT]?)", text.strip())
    if match:
        count = Fraction(match[1].replace(",", "").replace("_", "")) * _UNITS[match[2].lower()]
        if count.denominator == 1 and count >= 1:
            return int(count)
    raise ConfigError(f"{text!r} is no count; give a whole number of at least 1, such as 1000000, 1e6 or 1M")


def read_paths(text: str) -> str | dict[str, str]:
    """Reads ``--paths``: a template with ``{name}`` stays as it is, anything else is a YAML or JSON file.

    Raises:
        DataError: the file is missing or holds something else than one path for each domain.
    """
    if "{name}" in text:
        return text
    if not Path(text).is_file():
        raise DataError(f"paths {text!r}: neither a template with {{name}}, such as data/{{name}}.jsonl, nor a file")
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
        folder, path = path, path / "weights" / "domain_weights.json"
        if not path.exists():
            raise DataError(f"{folder}: is no run directory with weights; give one, or a file of statistics by domain")
    value = _read_mapping(path, "--corpus", "statistics")
    if value.get("format") == WEIGHTS_FORMAT:
        value = value.get("corpus") or corpus_beside(path)
    if not value or not isinstance(value, dict):
        raise DataError(f"{path}: knows nothing of the corpus; run again what wrote it, or give another --corpus")
    corpus = {}
    for name, entry in value.items():
        known = {field.name for field in fields(DomainStatistics)}
        if not isinstance(entry, dict) or not {"num_examples", "available_tokens"} <= set(entry) <= known:
            raise DataError(
                f"{path}: {name!r}: expected num_examples and available_tokens, perhaps with num_sequences, path and "
                f"num_rows, got {str(entry)[:80]}"
            )
        try:
            corpus[name] = DomainStatistics(**entry)
        except ValueError as error:
            raise DataError(f"{path}: {name!r}: {error}; mend it") from None
    return corpus


def corpus_beside(weights: Path) -> dict[str, Any]:
    """Returns what a run counted of its domains, for weights that were written before they said it themselves.

    Args:
        weights: ``weights/domain_weights.json`` of a run.

    Returns:
        By domain, what ``DomainStatistics`` takes; empty where the file lies in no run.
    """
    run = weights.absolute().parent.parent
    counted, read = run / "tokenize" / "domains.json", run / "load" / "summary.json"
    if weights.absolute().parent.name != "weights" or not counted.exists() or not read.exists():
        return {}
    sources = {source["domain"]: source for source in json.loads(read.read_text(encoding="utf-8"))["domains"]}
    return {
        domain["name"]: {
            "num_examples": domain["train"]["documents"],
            "available_tokens": domain["available_tokens"],
            "num_sequences": domain["train"]["sequences"],
            "path": sources[domain["name"]]["path"],
            "num_rows": sources[domain["name"]]["num_rows"],
        }
        for domain in json.loads(counted.read_text(encoding="utf-8"))["domains"]
    }


def _read_mapping(path: Path, option: str, what: str) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        value = parse_json_or_yaml(text)[0] if text.lstrip().startswith(("{", "[")) else load_yaml(text)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give another {option}") from None
    except yaml.YAMLError as error:
        raise DataError(f"{path}: is neither YAML nor JSON ({yaml_problem(error)}); give another {option}") from None
    except ValueError as error:
        raise DataError(f"{path}: {short_reason(error)}; mend it, or give another {option}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a mapping of domain and {what}; give another {option}")
    return value
