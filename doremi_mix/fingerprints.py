"""What of the configuration changes a stage's result: the settings that its fingerprint is made of, and the files.

Functions are named for the stage whose settings, further reads or outputs they return; ``stages.STAGES`` lists them.
"""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from doremi_mix.config import MIXTURE_WORDS, Config
from doremi_mix.presets import PRESETS
from doremi_mix.run import read_json
from doremi_mix.sources.files import sha256_of


def load_settings(config: Config) -> Any:
    """Settings of load."""
    from doremi_mix.stages.load import describe_sources

    return {"sources": describe_sources(config), "load": config.load.result_settings()}


def tokenize_settings(config: Config) -> Any:
    """Settings of tokenize."""
    settings = config.tokenize.result_settings()
    if config.tokenize.tokenizer is not None:
        settings["tokenizer"] = tokenizer_contents(config.tokenize.tokenizer)
        settings.pop("vocab_size")
    return settings


def model_settings(config: Config, section: str) -> Any:
    """Settings of a stage that trains a model."""
    settings = getattr(config, section).result_settings()
    # A preset is a preset, also where a folder of its name lies about.
    return settings if settings["model"] in PRESETS else {**settings, "model": contents_of(settings["model"])}


def analyze_settings(config: Config) -> Any:
    """Settings of analyze."""
    from doremi_mix.filtering import filter_plan

    tokenizer = config.tokenize.tokenizer
    return {
        "analyze": config.analyze.result_settings(),
        "compared_by": filter_plan(config.filter).exact_duplicates or "spaces",
        "tokenizer": None if tokenizer is None else tokenizer_contents(tokenizer),
    }


def filter_settings(config: Config) -> Any:
    """The plan as it was settled, and what of the settings decides scores."""
    from doremi_mix.filtering import filter_plan, score_settings

    plan = asdict(filter_plan(config.filter))
    del plan["notes"]
    for rule in plan["rules"]:
        del rule["source"]
    return {"plan": plan, "priority": list(config.filter.priority), "scores": score_settings(config)}


def filters(config: Config) -> bool:
    """Says whether the configuration filters anything; if not, the stages after it read what was loaded."""
    from doremi_mix.filtering import filter_plan

    return not filter_plan(config.filter).is_empty


def rows_stage(config: Config) -> str:
    """Returns the stage whose rows are trained on: filter, or load where nothing is filtered."""
    return "filter" if filters(config) else "load"


def rows_reads(config: Config) -> tuple[str, ...]:
    """The stage whose rows are read."""
    return (rows_stage(config),)


def reference_outputs(folder: Path) -> tuple[str, ...]:
    """Returns the files of the stage, with the model and the log of each fold."""
    from doremi_mix.folds import fold_names

    path = folder / "folds.json"
    parts = fold_names(read_json(path)["num_folds"]) if path.exists() else ()
    of_folds = [str(Path(part, name)) for part in parts for name in ("model", "metrics.jsonl")]
    return (path.name, "weights.json", "metrics.json", *of_folds)


def draw_settings(config: Config) -> Any:
    """What decides which sequences the proxy draws, and so whose reference losses are needed."""
    return config.proxy.model_dump(include={"method", "seed", "steps", "batch_size"})


def proxy_settings(config: Config) -> Any:
    """Settings of proxy."""
    settings = model_settings(config, "proxy")
    if config.proxy.method == "headroom":
        # A budget decides how long such a proxy trains, and caps only the exported weights.
        del settings["token_budget"]
        return settings
    return {**settings, **cap_settings(config)}


def weights_settings(config: Config) -> Any:
    """Settings of weights."""
    return {**config.weights.result_settings(), **cap_settings(config)}


def cap_settings(config: Config) -> dict[str, Any]:
    """The cap on epochs changes weights only under a budget."""
    budget = config.proxy.token_budget
    return {} if budget is None else {"token_budget": budget, "max_epochs": config.mixture.max_epochs}


def compare_settings(config: Config) -> Any:
    """Settings of compare."""
    settings = model_settings(config, "compare")
    also = {name: contents_of(path) for name, path in config.compare.also.items()}
    return {**settings, "also": also, "mixture": budget_settings(config)}


def budget_settings(config: Config) -> Any:
    """What says how much a mixture draws."""
    return config.mixture.model_dump(include={"token_budget", "max_epochs"})


def mixture_settings(config: Config) -> Any:
    """Settings of mixture."""
    settings = config.mixture.result_settings()
    if settings["weights"] not in MIXTURE_WORDS:
        settings["weights"] = contents_of(config.compare.also.get(settings["weights"], settings["weights"]))
    if settings["weights"] == "temperature":
        settings["temperature"] = config.compare.temperature
    return settings


def mixture_reads(config: Config) -> tuple[str, ...]:
    """What the mixture reads: weights only where it is drawn by them."""
    wanted = {"learned": ("weights",), "best": ("weights", "compare")}.get(config.mixture.weights, ())
    return (*rows_reads(config), *wanted)


def export_settings(config: Config) -> Any:
    """Settings of export, and what says which weights, and how much of each domain."""
    settings = config.export.result_settings()
    if settings["paths"] is not None and "{name}" not in settings["paths"]:
        settings["paths"] = contents_of(settings["paths"])
    return {"export": settings, "mixture": mixture_settings(config)}


def export_reads(config: Config) -> tuple[str, ...]:
    """What the export reads: the weights as the mixture does, and the rows where it writes them."""
    return tuple(name for name in mixture_reads(config) if config.export.data or name not in rows_reads(config))


def export_outputs(folder: Path) -> tuple[str, ...]:
    """Returns the list of the exports, and the rows that they name by where they were written."""
    path = folder / "exports.json"
    place = read_json(path)["place"] if path.exists() else None
    return (path.name,) if place is None else (path.name, str(Path(place) / "data"))


def finetune_settings(config: Config) -> Any:
    """Settings of finetune, the base model and the template among them."""
    from doremi_mix.stages.tokenize import make_template

    section = config.finetune
    settings = section.result_settings()
    if section.model is not None:
        from doremi_mix.adapters import base_fingerprint

        # Reading all of a large model each time somebody asks for the status would take minutes.
        settings["model"] = base_fingerprint(section.model) or section.model
    if section.tokenizer is not None:
        settings["tokenizer"] = tokenizer_contents(section.tokenizer)
    if section.data is not None:
        settings["data"] = contents_of(section.data)
    return {**settings, "template": asdict(make_template(config.tokenize))}


def finetune_reads(config: Config) -> tuple[str, ...]:
    """What the fine-tune reads: nothing of the run where it has data of its own."""
    return ("mixture", *rows_reads(config)) if config.finetune.data is None else ()


def evaluate_settings(config: Config) -> Any:
    """Settings of evaluate, and what its tasks are defined by."""
    section = config.evaluate
    settings = section.result_settings()
    for name in ("task_folder", "semi_final_task_folder"):
        if settings[name] is not None:
            settings[name] = contents_of(settings[name])
    return {**settings, "lm_eval": lm_eval_version() if section.tasks else None}


def lm_eval_version() -> str | None:
    """Returns the version of lm-eval, whose tasks change with it; None where it is not installed."""
    try:
        return version("lm_eval")
    except PackageNotFoundError:
        return None


def tokenizer_contents(name_or_path: str) -> Any:
    """Returns the sha256 of a local tokenizer's files, without the model's that may lie beside; the name on the hub."""
    from doremi_mix.tokenizer import tokenizer_files

    path = Path(name_or_path).expanduser()
    if not path.is_dir():
        return contents_of(name_or_path)
    return {file.name: sha256_of(file) for file in tokenizer_files(path)}


def contents_of(name_or_path: str) -> Any:
    """Returns the sha256 of each file of a local model or tokenizer; the name itself for one on the hub."""
    path = Path(name_or_path).expanduser()
    if not path.exists():
        return name_or_path
    if path.is_file():
        return {path.name: sha256_of(path)}
    # Encoders keep their pooling in a subfolder; hidden files are those of downloads.
    files = sorted(file for file in path.rglob("*") if file.is_file())
    names = [file.relative_to(path) for file in files]
    shown = [
        (name, file)
        for name, file in zip(names, files, strict=True)
        # Python leaves its own files beside the code of a task.
        if not name.parts[0].startswith(".") and "__pycache__" not in name.parts
    ]
    return {str(name): sha256_of(file) for name, file in shown}
