"""Settings as a person gives them: YAML files, ``--set`` on the command line, and the commented file of ``init``."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from doremi_mix.config import MIXTURE_WORDS, Config, Section, section_of
from doremi_mix.errors import ConfigError
from doremi_mix.presets import PRESETS

# Settings that may be a path.
_PATHS = (
    ("tokenize", "tokenizer"),
    ("reference", "model"),
    ("proxy", "model"),
    ("compare", "model"),
    ("mixture", "weights"),
    ("finetune", "model"),
    ("finetune", "tokenizer"),
    ("finetune", "data"),
    ("evaluate", "task_folder"),
    ("evaluate", "semi_final_task_folder"),
    ("filter", "embedding"),
    ("filter", "flagged_words"),
    ("filter", "stopwords"),
)


def load_config_file(path: Path) -> dict[str, Any]:
    """Reads a YAML file into a mapping and points its relative paths to the file's folder.

    Raises:
        ConfigError: the file is missing, is not YAML or is not a mapping.
    """
    data = load_yaml(path, missing=f"write one with: doremi-mix init FILES --out {path}")
    root = data.get("data_root")
    if not isinstance(root, str | None):
        raise ConfigError(f"{path}: data_root must be a folder's path, got {root!r}")
    folder = path.absolute().parent
    if {"sources", "catalog", "data_root"} & data.keys():
        data["data_root"] = str(folder / Path(root or ".").expanduser())
    return anchor_paths(data, folder)


def load_yaml(path: Path, missing: str = "check the path") -> dict[str, Any]:
    """Reads a YAML file into a mapping.

    Args:
        path: the file.
        missing: what to do when it is not there.

    Raises:
        ConfigError: the file is missing, is not YAML or is not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file; {missing}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a config file ({error})") from None
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise ConfigError(f"{path}: is not YAML: {problem}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: must hold a mapping of sections, got {type(data).__name__}")
    return data


def anchor_paths(data: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Makes the paths of local models, tokenizers and weights absolute, so that they mean the same from any folder.

    Args:
        data: settings as a person gave them.
        folder: where relative paths start: the config file's folder, or the current one for the command line.
    """
    result = _copy(data)
    if isinstance(result.get("data_root"), str):
        result["data_root"] = str(folder / Path(result["data_root"]).expanduser())
    for section, key in _PATHS:
        settings = result.get(section)
        value = settings.get(key) if isinstance(settings, dict) else None
        if isinstance(settings, dict) and isinstance(value, os.PathLike):
            value = settings[key] = os.fspath(value)
        # A word is a word, also where a file of its name lies about.
        words = {"weights": MIXTURE_WORDS, "embedding": ("ngrams",)}.get(key, PRESETS)
        if isinstance(settings, dict) and isinstance(value, str) and value not in words:
            path = folder / Path(value).expanduser()
            settings[key] = str(path) if path.exists() else value
    recipe = result["filter"].get("recipe") if isinstance(result.get("filter"), dict) else None
    if isinstance(recipe, str | os.PathLike) and (folder / Path(recipe).expanduser()).exists():
        # The run keeps what the recipe says, not where it lay.
        result["filter"]["recipe"] = load_yaml(folder / Path(recipe).expanduser())
    scoring = result["filter"].get("models") if isinstance(result.get("filter"), dict) else None
    scoring = [scoring] if isinstance(scoring, str | os.PathLike) else scoring
    if isinstance(scoring, list | tuple):
        result["filter"]["models"] = [_anchored(model, folder) for model in scoring]
    entered = result["compare"].get("also") if isinstance(result.get("compare"), dict) else None
    if isinstance(entered, dict):
        for name, path in entered.items():
            entered[name] = str(folder / Path(path).expanduser()) if isinstance(path, str | os.PathLike) else path
    return result


def _anchored(name: Any, folder: Path) -> Any:
    """Returns the absolute path of what exists, and everything else as it is."""
    if not isinstance(name, str | os.PathLike):
        return name
    path = folder / Path(name).expanduser()
    return str(path) if path.exists() else os.fspath(name)


def apply_overrides(data: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Applies ``section.key=value`` settings, as given to ``--set``; values are YAML.

    Raises:
        ConfigError: a setting has no ``=``, its value is not YAML, or it reaches into something that is not a section.
    """
    result = _copy(data)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {override}: expected key=value, for example --set proxy.steps=200")
        try:
            value = yaml.safe_load(text)
            if _is_text(key.strip()) and value is not None and not isinstance(value, str):
                value = text  # braces, brackets and digits are text where nothing else is possible
        except yaml.YAMLError:
            raise ConfigError(
                f"--set {override}: the value is not YAML; quote it, for example --set 'key=\"a: b\"'"
            ) from None
        # YAML 1.1 reads 1e-3 as text; everybody means the number.
        if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
            value = float(value)
        *sections, last = key.strip().split(".")
        inner = result
        for section in sections:
            child = inner.setdefault(section, {})
            if child is None:
                child = inner[section] = {}
            if not isinstance(child, dict):
                raise ConfigError(f"--set {override}: {section} is not a section")
            inner = child
        inner[last] = value
    return result


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ``base`` with the settings of ``over`` on top, section by section."""
    result = _copy(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = merge(result[key], value)
        else:
            result[key] = value
    return result


def dump_yaml(data: Mapping[str, Any]) -> str:
    """Writes plain values as YAML in the given order."""
    return yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True, width=120)


def write_commented(sources: list[dict[str, Any]], notes: Mapping[str, str], data_root: str | None = None) -> str:
    """Writes a config with every setting, its default and what it means, for ``doremi-mix init``.

    Args:
        sources: one mapping per file, as in ``Config.sources``.
        notes: by path, a remark to write beside the source, for example the schema that was detected.
        data_root: where relative paths start.

    Returns:
        YAML text that ``parse_config`` accepts.
    """
    lines = [
        "# doremi-mix configuration.  Every setting stands here with its default; delete what you do not change.",
        "# null means: chosen for the hardware and the data.  Run it: doremi-mix run THIS_FILE --run-dir runs/NAME",
        "",
    ]
    if data_root is not None:
        lines += [f"data_root: {_scalar(data_root)}  # where relative paths start", ""]
    lines.append("sources:  # one file makes one domain")
    for source in sources:
        entry = ", ".join(f"{key}: {_scalar(value)}" for key, value in source.items())
        lines.append(f"  - {{{entry}}}  # {notes.get(source['path'], '')}".rstrip(" #"))
    for name, field in Config.model_fields.items():
        section = field.annotation
        if not (isinstance(section, type) and issubclass(section, Section)):
            continue
        lines += ["", f"{name}:  # {(section.__doc__ or '').splitlines()[0]}"]
        for key, setting in section.model_fields.items():
            default = setting.get_default(call_default_factory=True)
            lines.append(f"  {setting.alias or key}: {_scalar(default)}  # {setting.description}")
    return "\n".join(lines) + "\n"


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # YAML reads JSON strings, inside flow mappings too
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000).strip()
    return text.removesuffix("...").strip()


def _copy(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in data.items()}


def _is_text(key: str) -> bool:
    """Says whether a dotted key is a setting that can only be text (or null)."""
    *sections, last = key.split(".")
    field = section_of(tuple(sections)).model_fields.get(last)
    return field is not None and field.annotation in (str, str | None)
