"""How the datasets library (5.2) takes data_files, probabilities and selections.

Sources: data_files.py (patterns, hops), utils/file_utils.py (environment variables), arrow_dataset.py (interleaving).
"""

import json
import os
import re
from pathlib import PurePosixPath

import numpy

from .streaming import make_module, run

BUILDERS = {
    "json": (".json", ".jsonl", ".ndjson"),
    "parquet": (".parquet",),
    "csv": (".csv",),
    "arrow": (".arrow",),
}
ONE_CHARACTER = re.compile(r"\[([^\]!]|\])\]")


def load(sizes, path, data_files, split="train"):
    """What ``load_dataset(path, data_files=..., split="train")`` reads: the file, and its rows."""
    if isinstance(data_files, str):
        data_files = [data_files]
    [pattern] = data_files
    if "::" in pattern or "://" in pattern:
        raise ValueError(f"{pattern} is an address")
    # fsspec's glob: what stays magic once brackets of one character are gone would match other files.
    rest = ONE_CHARACTER.sub("", pattern)
    if re.search(r"[*?\[]", rest):
        raise ValueError(f"{pattern} matches several files")
    file = ONE_CHARACTER.sub(r"\1", pattern)
    if "$" in file and os.path.expandvars(re.sub(r"\$\{?\w+\}?", "$HOME", file)) != file:
        raise ValueError(f"{file} depends on the environment")
    if file not in sizes:
        raise FileNotFoundError(file)
    kind = PurePosixPath(file)
    if kind.suffix.lower() in {".gz", ".zst"}:
        kind = kind.with_suffix("")
    if kind.suffix.lower() not in BUILDERS[path]:
        raise ValueError(f"{file} is not of the kind {path}")
    if split == "train":
        return file, sizes[file]
    number = re.fullmatch(r"train\[:(\d+)\]", split)
    # A slice beyond the end gives all there is, without a word.
    return file, min(int(number[1]), sizes[file])


def interleave(probabilities):
    """The checks of ``interleave_datasets``, which are those of numpy's choice."""
    if any(not 0 <= share <= 1 for share in probabilities):
        raise ValueError("Probabilities are not non-negative")
    if abs(sum(probabilities) - 1) > 2**-26:
        raise ValueError("Probabilities do not sum to 1")
    if 0 in probabilities:
        raise ValueError("cannot exhaust a dataset that is never sampled")


class Rows:
    """A ``Dataset``: of each file, the numbers of its rows; nothing is read."""

    def __init__(self, parts):
        self.parts = parts

    def __len__(self):
        return sum(len(numbers) for _, numbers in self.parts)

    def select(self, indices):
        [(file, numbers)] = self.parts
        if min(indices) < 0:
            raise IndexError("select")
        return Rows([(file, numbers[indices])])

    def select_columns(self, columns):
        assert columns
        return self

    def shuffle(self, *, seed):
        numpy.random.default_rng(seed)
        return self


def concatenate(datasets):
    return Rows([part for dataset in datasets for part in dataset.parts])


def interleaved(datasets, probabilities=None, seed=None, stopping_strategy="first_exhausted"):
    """Returns the share of each file."""
    assert len(probabilities) == len(datasets)
    interleave(probabilities)
    if stopping_strategy != "first_exhausted":
        raise TimeoutError("rows are repeated until all domains have come once")
    numpy.random.default_rng(seed)
    return {dataset.parts[0][0]: share for dataset, share in zip(datasets, probabilities, strict=True)}


def read_python(files, sizes):
    def load_dataset(path, *, data_files, split):
        file, size = load(sizes, path, data_files, split)
        return Rows([(file, numpy.arange(size))])

    module = make_module(
        "datasets",
        Dataset=Rows,
        load_dataset=load_dataset,
        concatenate_datasets=concatenate,
        interleave_datasets=interleaved,
    )
    rows = run(files["mixture.py"], datasets=module)["build"]()
    if not isinstance(rows, Rows):
        return rows
    drawn = {}
    for file, numbers in rows.parts:
        assert file not in drawn
        times = numpy.bincount(numbers, minlength=sizes[file])
        assert max(times) - min(times) <= 1, "a row came again before all of its domain had come"
        drawn[file] = len(numbers)
    return drawn


def read_json(files, sizes):
    """As the line of usage combines it."""
    mixture = json.loads(files["mixture.json"])
    domains = mixture["domains"]
    if "interleave_datasets" in mixture:
        how = mixture["interleave_datasets"]
        assert how["stopping_strategy"] == "first_exhausted"
        interleave(how["probabilities"])
        assert how["probabilities"] == [domain["probability"] for domain in domains]
        return {
            load(sizes, **domain["load_dataset"])[0]: share
            for domain, share in zip(domains, how["probabilities"], strict=True)
        }
    drawn = {}
    for domain in domains:
        file, size = load(sizes, **domain["load_dataset"])
        if not 0 < domain["num_examples"] <= domain["num_passes"] * size:
            raise IndexError("select")
        drawn[file] = domain["num_examples"]
    return drawn


READERS = {"datasets": read_python, "datasets-json": read_json}
