"""JSON and YAML by people and other programs, read so that every reader would have read the same, or not at all.

Keys are text as it is written (YAML's ``NO`` and ``1e5``), each is given once, and numbers have one meaning.
"""

from __future__ import annotations

import json
from collections.abc import Hashable
from typing import Any

import yaml

from doremi_mix.weight_numbers import NUMBER, given_twice

MAX_YAML_CHARACTERS = 1 << 20  # about 20 seconds of parsing


def parse_json_or_yaml(text: str) -> tuple[Any, str]:
    """Parses text that begins like JSON; YAML's flow style begins so too."""
    try:
        return json.loads(text, object_pairs_hook=_once), "JSON"
    except json.JSONDecodeError as error:
        problem = ValueError(f"is not JSON ({error})")
    try:
        return load_yaml(text), "YAML"
    except (yaml.YAMLError, _TooLongError):
        raise problem from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns an object whose keys are given once."""
    data: dict[str, Any] = {}
    for name, value in pairs:
        if name in data:
            raise ValueError(given_twice(name))
        data[name] = value
    return data


class _TooLongError(ValueError):
    """Text that YAML would take minutes for."""


class _Loader(yaml.SafeLoader):
    """YAML whose keys are text as written (``NO``, ``1e5``), given once, and whose numbers have one meaning."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        names = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be text", key.start_mark)
            if key.value in names:
                raise ValueError(given_twice(key.value))
            names.add(key.value)
        self.flatten_mapping(node)  # "<<"
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}

    def construct_plain(self, node: Any) -> Any:
        """Returns a number where every reader takes the text for the same number, and otherwise the text."""
        text: str = node.value
        if node.style is None and NUMBER.fullmatch(text):
            return int(text) if text.lstrip("+-").isdigit() and len(text) < 100 else float(text)
        if node.tag.endswith(":float") and text.lower().endswith((".inf", ".nan")):
            return float(text.replace(".", ""))
        return text


for _tag in ("int", "float", "str", "timestamp"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_plain)


def load_yaml(text: str) -> Any:
    """Returns the one document of a YAML text.

    Raises:
        ValueError: a key is given twice, or the text is too long.
        yaml.YAMLError: it is no YAML.
    """
    if len(text) > MAX_YAML_CHARACTERS:
        raise _TooLongError(f"is no JSON, and longer than the {MAX_YAML_CHARACTERS >> 20} MB that are read as YAML")
    return yaml.load(text, Loader=_Loader)


def yaml_problem(error: yaml.YAMLError) -> str:
    """Returns what YAML found, and where, in one line."""
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    mark = getattr(error, "problem_mark", None)
    return f"{problem}: line {mark.line + 1}" if mark else str(problem)
