"""Every setting of every stage on one page, and the YAML loader.

A setting sits in the section of the stage that it changes, so that the stage's fingerprint sees it.  ``null`` means:
chosen by ``plan.choose`` for the hardware and the data; the run directory keeps what was chosen.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from doremi_mix.errors import ConfigError
from doremi_mix.presets import PRESETS

PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]

# Marks a setting that does not change a result, such as one of speed or memory: changing it remakes nothing.
_NO_RESULT: Any = {"changes_result": False}


class Section(BaseModel):
    """Base of the sections: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, protected_namespaces=(), allow_inf_nan=False
    )

    def result_settings(self) -> dict[str, Any]:
        """Returns the settings that change the result of the stage, as plain JSON values."""
        fields = type(self).model_fields
        excluded = {name for name, field in fields.items() if field.json_schema_extra == _NO_RESULT}
        return self.model_dump(mode="json", exclude=excluded, by_alias=True)


class SourceConfig(Section):
    """One file; it makes one domain."""

    path: str = Field(description="the file: .json, .jsonl or .parquet, also .gz or .zst; relative to data_root")
    name: str | None = Field(default=None, description="the domain's name; null: the file's stem")
    format: Literal["json", "jsonl", "parquet"] | None = Field(default=None, description="null: detected")
    schema_: Literal["alpaca", "chat", "text"] | None = Field(
        default=None, alias="schema", description="how to read a row; null: detected from the columns"
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="which column plays which part, for example {instruction: prompt}"
    )


class LoadConfig(Section):
    """Stage load: read every source into one schema."""

    max_rejected_share: Share = Field(
        default=0.5,
        json_schema_extra=_NO_RESULT,
        description="stop when a larger share of one source's rows is rejected (empty answers count)",
    )


class TokenizeConfig(Section):
    """Stage tokenize: text to packed sequences, and the held-out split."""

    tokenizer: str | None = Field(
        default=None,
        description="folder, tokenizer.json, SentencePiece .model or hub name (best: the main model's own); "
        "null: a byte-level BPE trained on the data",
    )
    trust_remote_code: bool = Field(
        default=False, json_schema_extra=_NO_RESULT, description="let a hub tokenizer run its own code"
    )
    vocab_size: PositiveInt | None = Field(default=None, description="of the trained BPE; null: by the model preset")
    bpe_sample_megabytes: PositiveInt = Field(
        default=32, description="how much text the BPE is trained on, evenly over domains"
    )
    context_length: Annotated[int, Field(ge=8)] | None = Field(
        default=None, description="tokens in a packed sequence of the reference and proxy model; null: by the hardware"
    )
    max_example_tokens: Annotated[int, Field(ge=2)] | None = Field(
        default=None,
        description="where the main model's trainer will cut an example: tokens beyond it are not counted as available "
        "or drawn (the BetterMixture contest: 1024); null: examples are counted whole",
    )
    preamble: str | None = Field(
        default=None, description="the prompt template's first sentence; null: the contest's (Alpaca)"
    )
    turn: str | None = Field(
        default=None, description="the template of one turn, with {query}; the answer follows it; null: the contest's"
    )
    held_out_fraction: Annotated[float, Field(gt=0, lt=0.5)] = Field(
        default=0.05, description="share of each domain's examples that is never trained on, to measure loss"
    )
    held_out_max_examples: PositiveInt = Field(default=500, description="at most so many held-out examples in a domain")
    seed: Seed = Field(default=0, description="of the held-out split")


class TrainingConfig(Section):
    """What reference and proxy training share."""

    model: str | None = Field(
        default=None,
        description="a preset (tiny, small, 120m, 280m), a Hugging Face config.json, or a checkpoint "
        "(folder or hub name); null: by the hardware",
    )
    trust_remote_code: bool = Field(
        default=False, json_schema_extra=_NO_RESULT, description="let a hub model run its own code"
    )
    steps: PositiveInt | None = Field(default=None, description="optimizer steps; null: by the hardware")
    batch_size: PositiveInt | None = Field(
        default=None, description="sequences in a step, over all processes; null: two per domain or more"
    )
    learning_rate: PositiveFloat | None = Field(default=None, description="peak, AdamW; null: by the model")
    warmup_share: Share = Field(
        default=0.05, description="share of the steps in which the learning rate rises; then cosine to 10 %"
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=0.01, description="AdamW's, on matrices")
    max_grad_norm: PositiveFloat = Field(default=1.0, description="gradients are clipped to this norm")
    seed: Seed = Field(default=0, description="of the initialization and of the order of the data")
    gradient_accumulation_steps: PositiveInt | None = Field(
        default=None,
        json_schema_extra=_NO_RESULT,
        description="micro-batches in a step and process; null: by the memory",
    )
    checkpoint_every: PositiveInt | None = Field(
        default=None,
        json_schema_extra=_NO_RESULT,
        description="steps between checkpoints; null: twenty checkpoints in all",
    )


class ReferenceConfig(TrainingConfig):
    """Stage reference: a plain language model on the reference weights."""

    weights: Literal["natural", "uniform"] | dict[str, float] = Field(
        default="natural",
        description="natural (each domain's share of the available tokens), uniform, or {domain: weight}",
    )

    @field_validator("weights", mode="before")
    @classmethod
    def _known_word_or_mapping(cls, value: object) -> object:
        if value not in ("natural", "uniform") and not isinstance(value, dict):
            raise ValueError("must be natural, uniform or a mapping of domain to weight")
        return value


class ProxyConfig(TrainingConfig):
    """Stage proxy: group DRO.  Settings that are null are those of the reference model."""

    method: Literal["doremi"] = Field(default="doremi", description="doremi: Algorithm 1 of the DoReMi paper")
    step_size: PositiveFloat = Field(default=1.0, description="eta, the learning rate of the domain weights")
    smoothing: Share = Field(
        default=1e-3, description="c, the share of the weights given back to uniform at each update"
    )


class MixtureConfig(Section):
    """Stage mixture: draw the training set."""

    token_budget: PositiveInt | None = Field(
        default=None, description="tokens to draw, after the template; null: no mixture is drawn"
    )
    max_epochs: PositiveFloat = Field(default=4.0, description="no domain is repeated more often than this")
    seed: Seed = Field(default=0, description="of the draw and of the order")


class Config(Section):
    """The whole configuration; sections are in the order of the stages."""

    sources: tuple[SourceConfig, ...] = Field(default=(), description="the files, each of which makes one domain")
    catalog: str | None = Field(
        default=None, description="instead of sources: a known collection under data_root (bettermixture)"
    )
    data_root: str | None = Field(default=None, description="where relative paths start; null: the folder of this file")
    load: LoadConfig = LoadConfig()
    tokenize: TokenizeConfig = TokenizeConfig()
    reference: ReferenceConfig = ReferenceConfig()
    proxy: ProxyConfig = ProxyConfig()
    mixture: MixtureConfig = MixtureConfig()


def parse_config(data: Mapping[str, Any], *, where: str = "config") -> Config:
    """Validates a plain mapping.

    Args:
        data: as read from YAML.
        where: what to name in an error, usually the file.

    Raises:
        ConfigError: a key is unknown (with the nearest known one), or a value is of the wrong kind.
    """
    # A section whose settings were all deleted is an empty one.
    data = {key: {} if value is None and _is_section(key) else value for key, value in data.items()}
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_describe(error)}") from None
    if bool(config.sources) == (config.catalog is not None):
        got = "both" if config.sources else "neither"
        raise ConfigError(f"{where}: expected either sources (a list of files) or catalog (bettermixture), got {got}")
    return config


def load_config_file(path: Path) -> dict[str, Any]:
    """Reads a YAML file into a mapping and points its relative paths to the file's folder.

    Raises:
        ConfigError: the file is missing, is not YAML or is not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file; write one with: doremi-mix init FILES --out {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a config file ({error})") from None
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise ConfigError(f"{path}: is not YAML: {problem}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: must hold a mapping of sections, got {type(data).__name__}")
    root = data.get("data_root")
    if not isinstance(root, str | None):
        raise ConfigError(f"{path}: data_root must be a folder's path, got {root!r}")
    folder = path.absolute().parent
    if {"sources", "catalog", "data_root"} & data.keys():
        data["data_root"] = str(folder / Path(root or ".").expanduser())
    return anchor_paths(data, folder)


def anchor_paths(data: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Makes the paths of existing local models and tokenizers absolute, so that they mean the same from any folder.

    Args:
        data: settings as a person gave them.
        folder: where relative paths start: the config file's folder, or the current one for the command line.
    """
    result = _copy(data)
    if isinstance(result.get("data_root"), str):
        result["data_root"] = str(folder / Path(result["data_root"]).expanduser())
    for section, key in (("tokenize", "tokenizer"), ("reference", "model"), ("proxy", "model")):
        settings = result.get(section)
        value = settings.get(key) if isinstance(settings, dict) else None
        if isinstance(settings, dict) and isinstance(value, os.PathLike):
            value = settings[key] = os.fspath(value)
        if isinstance(settings, dict) and isinstance(value, str) and value not in PRESETS:
            path = folder / Path(value).expanduser()
            settings[key] = str(path) if path.exists() else value
    return result


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


# What a person calls the kinds of values that pydantic's messages name in its own terms.
_KINDS = {
    "int_": "a whole number",
    "float_": "a number",
    "bool_": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a section of settings",
}


def _describe(error: ValidationError) -> str:
    """Returns the first problem as one line: which key, expected, got, and the nearest key for an unknown one."""
    problems = error.errors(include_url=False)
    # An unknown key explains more than what follows from it.
    deepest = max(problems, key=lambda p: len(p["loc"]))
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), deepest)
    key = _dotted(problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _known_keys(problem["loc"][:-1])
        nearest = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
        prefix = _dotted(problem["loc"][:-1])
        hint = (
            f"did you mean {prefix + '.' if prefix else ''}{nearest[0]}?" if nearest else f"known: {', '.join(known)}"
        )
        return f"unknown key {key}; {hint}"
    if problem["type"] == "missing":
        return f"{key} is missing; {_description(problem['loc'])}"
    if problem["type"] == "invalid_key":
        return f"key {problem['loc'][-2]!r} must be text; quote it"
    got = problem["input"]
    got_text = repr(got) if isinstance(got, str | int | float | bool | None.__class__) else f"a {type(got).__name__}"
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    message = next((words for kind, words in _KINDS.items() if problem["type"].startswith(kind)), message)
    return f"{key} must be {message.removeprefix('must be ')}, got {got_text}"


def _dotted(location: tuple[int | str, ...]) -> str:
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.isidentifier() or not text:
            # Union branches show up as type names such as tuple[SourceConfig, ...]; they are no keys.
            text += f".{part}" if text else part
    return text


def _section_of(location: tuple[int | str, ...]) -> type[Section]:
    section: type[Section] = Config
    for part in location:
        if part == "sources":
            section = SourceConfig
        elif isinstance(part, str) and part in section.model_fields:
            annotation = section.model_fields[part].annotation
            if isinstance(annotation, type) and issubclass(annotation, Section):
                section = annotation
    return section


def _is_section(key: str) -> bool:
    field = Config.model_fields.get(key)
    return field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, Section)


def _is_text(key: str) -> bool:
    """Says whether a dotted key is a setting that can only be text (or null)."""
    *sections, last = key.split(".")
    field = _section_of(tuple(sections)).model_fields.get(last)
    return field is not None and field.annotation in (str, str | None)


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    return [field.alias or name for name, field in _section_of(location).model_fields.items()]


def _description(location: tuple[int | str, ...]) -> str:
    field = _section_of(location[:-1]).model_fields.get(str(location[-1]))
    return f"expected {field.description}" if field is not None else "see doremi-mix init"
