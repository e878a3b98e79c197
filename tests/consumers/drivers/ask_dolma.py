"""Asks Dolma's resharding: what it parses, and what it writes."""

import gzip
import importlib.util
import json
import sys
import types
from pathlib import Path

import nltk
import numpy as np
from asked import main

# It would fetch a model for sentences otherwise, which resharding does not use.
nltk.data.find = str
# dolma/__init__.py imports its taggers, which need fasttext and a dozen more; resharding needs none of them.
package = types.ModuleType("dolma")
package.__path__ = list(importlib.util.find_spec("dolma").submodule_search_locations)
sys.modules["dolma"] = package

from dolma.tokenizer.reshard import ReshardingConfig, reshard  # noqa: E402


def write_tokens(request):
    """Writes, for each file, an array whose tokens are the number of its domain, and the table of its documents."""
    for path, (token, size) in request["arrays"].items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        np.full(size, token, dtype=np.uint16).tofile(path)
        with gzip.open(path.removesuffix(".npy") + ".csv.gz", "wt") as table:
            table.write(f"0,{size},id,source,0\n")


def read(request):
    """Returns the rates by prefix."""
    config = ReshardingConfig.from_file(request["file"])
    return {str(source.prefix): source.sample_rate for source in config.source_prefixes}


def draw(request):
    """Runs the whole program, and returns how many tokens of each domain it wrote."""
    # It looks for the tokenizer on disk before it asks the network; the type of the tokens is all that it takes of it.
    tokenizer = Path("allenai/dolma2-tokenizer")
    tokenizer.parent.mkdir(exist_ok=True)
    model = {"type": "WordLevel", "vocab": {"a": 0, "<|endoftext|>": 1, "<|padding|>": 2}, "unk_token": "a"}
    tokenizer.write_text(json.dumps({"version": "1.0", "model": model}), encoding="utf-8")
    config = ReshardingConfig.from_file(request["file"])
    reshard(config)
    drawn = {}
    for path in sorted(Path(config.destination_prefix).glob("*.npy")):
        tokens = np.fromfile(path, np.uint16)
        for token in set(tokens.tolist()):
            drawn[str(token)] = drawn.get(str(token), 0) + int((tokens == token).sum())
    return drawn


if __name__ == "__main__":
    main({"write_tokens": write_tokens, "read": read, "draw": draw})
