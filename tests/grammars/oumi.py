"""How Oumi 0.9 reads the data: of a training config (core/configs/params/data_params.py, builders/data.py)."""

import math
import re

import yaml

FIELDS = {"dataset_name", "dataset_path", "split", "shuffle", "seed", "sample_count", "mixture_proportion"}


class Loader(yaml.SafeLoader):
    """OmegaConf's: more floats than YAML 1.1 has, and no dates."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*(\.[\d_]*)?([eE][-+]?\d+)?|\.[\d_]+([eE][-+]?\d+)?|\.inf|\.nan)$", re.IGNORECASE),
    list("-+0123456789."),
)


def read(files, sizes):
    text = files["oumi.yaml"]
    if re.search(r"(?<!\\)\$\{", text.partition("data:\n")[2]):
        raise ValueError("interpolation")
    config = yaml.load(text, Loader)
    [(key, data)] = config.items()
    [(split, train)] = data.items()
    assert (key, split, train.pop("stream"), type(train.pop("seed"))) == ("data", "train", False, int)
    strategy = train.pop("mixture_strategy", "first_exhausted")
    datasets = train.pop("datasets")
    assert strategy == "first_exhausted"
    assert not train
    drawn = {}
    for entry in datasets:
        if not set(entry) <= FIELDS:
            raise ValueError("key not in DatasetParams")
        path = entry["dataset_path"]
        if not isinstance(path, str) or path not in sizes:
            raise ValueError(f"dataset_path {path!r} does not exist")
        if not re.search(r"[^/]\.jsonl?$", path, re.IGNORECASE):
            raise ValueError("Unsupported file format")
        assert entry["dataset_name"] == "text_sft"
        drawn[path] = entry.get("sample_count", entry.get("mixture_proportion"))
    proportions = [entry.get("mixture_proportion") for entry in datasets]
    if any(share is not None for share in proportions):
        if any(not isinstance(share, float) or not 0 <= share <= 1 for share in proportions):
            raise ValueError("`mixture_proportion` must be a number from 0 to 1, of all datasets")
        if not math.isclose(sum(proportions), 1.0):
            raise ValueError("The sum of `mixture_proportion` must be 1.0.")
    elif any(not isinstance(count, int) or count < 1 for count in drawn.values()):
        raise ValueError("sample_count")
    return drawn


READERS = {"oumi": read}
