"""Asks OLMo-core: what it parses, how many tokens it selects, and of which domain the sequences are that it reads."""

import importlib.util
import tempfile
from pathlib import Path

import numpy as np
from asked import main
from olmo_core.data import NumpyFSLDatasetConfig, TokenizerConfig
from olmo_core.data.source_mixture import SourceMixtureDatasetConfig, SourceMixtureList
from olmo_core.data.types import NumpyDatasetDType

TOKENIZER = TokenizerConfig(vocab_size=1000, eos_token_id=0, pad_token_id=0)


def write_tokens(request):
    """Writes arrays of documents of 50 tokens, each the number of its domain, but for the end token."""
    for path, (token, size) in request["arrays"].items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        array = np.full(size, token, dtype=np.uint16)
        array[49::50] = TOKENIZER.eos_token_id
        array.tofile(path)


def read(request):
    """Returns the sources as parsed, with the files that each finds."""
    listed = SourceMixtureList.from_yaml(request["file"])
    listed.validate()
    for source in listed.sources:
        source.validate()
    found = {
        source.source_name: source.resolved_paths if request["resolve"] else source.paths for source in listed.sources
    }
    return {
        "ratios": {source.source_name: source.target_ratio for source in listed.sources},
        "repetitions": {source.source_name: source.max_repetition_ratio for source in listed.sources},
        "paths": found,
    }


def draw(request):
    """Returns how many tokens of each domain are in the dataset, read sequence by sequence."""
    mixture = SourceMixtureDatasetConfig(
        source_list=SourceMixtureList.from_yaml(request["file"]),
        requested_tokens=request["tokens"],
        global_batch_size=request["batch"],
        quiet=True,
        render_tables=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        dataset = NumpyFSLDatasetConfig(
            source_mixture_config=mixture,
            tokenizer=TOKENIZER,
            dtype=NumpyDatasetDType.uint16,
            sequence_length=request["length"],
            work_dir=folder,
        ).build()
        dataset.prepare()
        return count(dataset)


def draw_composable(request):
    """The same of the composable source."""
    spec = importlib.util.spec_from_file_location("olmo_core_mixture", request["file"])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with tempfile.TemporaryDirectory() as folder:
        config = module.mixture(TOKENIZER, request["length"], dtype=NumpyDatasetDType.uint16)
        return count(config.build(folder))


def count(dataset):
    """Counts the tokens of the sequences of each domain, the end tokens among them."""
    drawn = {}
    for number in range(len(dataset)):
        tokens = [int(token) for token in dataset[number]["input_ids"]]
        (domain,) = set(tokens) - {TOKENIZER.eos_token_id}
        drawn[str(domain)] = drawn.get(str(domain), 0) + len(tokens)
    return drawn


if __name__ == "__main__":
    main({"write_tokens": write_tokens, "read": read, "draw": draw, "draw_composable": draw_composable})
