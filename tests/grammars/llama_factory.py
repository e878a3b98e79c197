"""How LLaMA-Factory 0.9.5 reads its training YAML, dataset_info.json, and the datasets of its v1 stack.

Sources: hparams/data_args.py, data/parser.py, data/loader.py, data/data_utils.py; v1/core/data_engine.py.
"""

import json
import posixpath
import re

import yaml

from .huggingface import interleave, load

KINDS = {"arrow": "arrow", "csv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet", "txt": "text"}


class OmegaConfLoader(yaml.SafeLoader):
    """YAML as OmegaConf types it: more floats than YAML 1.1 has (``1e5``), and no dates."""


OmegaConfLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
OmegaConfLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9_]+([eE][-+][0-9]+)?)$"
    ),
    list("-+0123456789."),
)


def omegaconf(text):
    """The value of a YAML; raises for values that it would replace."""
    value = yaml.load(text, OmegaConfLoader)
    pending = [value]
    while pending:
        entry = pending.pop()
        if isinstance(entry, dict):
            pending += [*entry.keys(), *entry.values()]
        elif isinstance(entry, list):
            pending += entry
        elif isinstance(entry, str) and "${" in entry:
            raise ValueError(f"{entry!r} is an interpolation")
    return value


def split(argument):
    return [part.strip() for part in argument.split(",")] if isinstance(argument, str) else argument


def read(files, sizes):
    arguments = omegaconf(files["llama_factory.yaml"])
    information = json.loads(files["dataset_info.json"].encode("ascii"))
    assert set(arguments) <= {"dataset_dir", "dataset", "mix_strategy", "interleave_probs", "streaming"}
    names, shares = split(arguments["dataset"]), arguments.get("interleave_probs")
    strategy = arguments.get("mix_strategy", "concat")
    if shares is not None:
        if strategy == "concat":
            raise ValueError("interleave_probs is only valid for interleaved mixing")
        shares = [float(share) for share in split(shares)]
        if len(shares) != len(names):
            raise ValueError("The length of dataset and interleave probs should be identical")
    # A name that comes twice counts once.
    by_name = {}
    for name in names:
        entry = information[name]
        assert entry["formatting"] in {"alpaca", "sharegpt", "openai"}
        path = entry["file_name"] if arguments["dataset_dir"] == "." else ""
        kind = KINDS[posixpath.splitext(path)[1][1:]]
        file, size = load(sizes, kind, [path])
        amount = entry.get("num_samples")
        assert amount is None or (type(amount) is int and amount >= 0)
        by_name[name] = file, size if amount is None or arguments["streaming"] else amount
    if strategy == "concat":
        return added(by_name.values())
    assert strategy == "interleave_under"
    files = [file for file, _ in by_name.values()]
    assert len(set(files)) == len(shares)
    if len(files) > 1:
        interleave(shares)
    return dict(zip(files, shares, strict=True))


def added(parts):
    """The rows of each file: it may come several times."""
    drawn = {}
    for file, rows in parts:
        drawn[file] = drawn.get(file, 0) + rows
    return drawn


def read_v1(files, sizes):
    parts = []
    for name, entry in omegaconf(files["llama_factory_v1.yaml"]).items():
        assert isinstance(name, str)
        assert entry["source"] == "local"
        assert set(entry) <= {"path", "source", "converter", "size", "weight"}
        kind = KINDS[posixpath.splitext(entry["path"])[1][1:]]
        file, size = load(sizes, kind, entry["path"])
        # Both are ignored where they are 0.
        if entry.get("size") or entry.get("weight"):
            amount = size if entry.get("size") is None else entry["size"]
            size = amount if entry.get("weight") is None else int(amount * entry["weight"])
        parts.append((file, size))
    return added(parts)


READERS = {"llama-factory": read, "llama-factory-probabilities": read, "llama-factory-v1": read_v1}
