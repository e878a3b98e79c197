"""How OpenRLHF 0.11.2 reads its options (datasets/utils.py: blending_datasets), as a shell hands them over."""

import os
import shlex

from grammars import Drawn
from grammars.huggingface import interleave, load


def read(files, sizes):
    values = dict(word.split("=", 1) for word in shlex.split(files["openrlhf.sh"], comments=True))
    paths = values["DATASET"].split(",")
    probabilities = list(map(float, values["DATASET_PROBS"].split(",")))
    assert len(probabilities) == len(paths)
    limit = int(values["MAX_SAMPLES"]) if "MAX_SAMPLES" in values else None
    drawn, least = {}, 0
    for entry, probability in zip(paths, probabilities, strict=True):
        path = entry.strip()
        if "@" in path:
            raise ValueError("a data_dir")
        extension = os.path.splitext(path)[-1]  # noqa: PTH122, as it does
        if extension not in {".json", ".jsonl", ".csv", ".parquet", ".arrow"}:
            raise ValueError(f"{path} is taken for a name on the Hub")
        file, size = load(sizes, {".jsonl": "json"}.get(extension, extension[1:]), path)
        # It goes on until each domain was drawn as often as it has rows, of which it takes the first.
        size = min(size, limit or 10**8)
        if size > 1.01e8 * probability:
            raise TimeoutError(file)
        assert file not in drawn
        drawn[file] = probability
        least += size
    interleave(probabilities)
    # Of what it draws it keeps the first; it draws all rows at least once.
    total = limit if limit is not None and least >= limit else None
    return Drawn(drawn, limit=limit, total=total)


READERS = {"openrlhf": read}
