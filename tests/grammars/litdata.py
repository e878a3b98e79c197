"""How LitData 0.2.76 draws: dataset_utilities.py (subsample_streaming_dataset), combined.py, resolver.py."""

import math
import re
from collections import Counter
from types import SimpleNamespace

from grammars.streaming import make_module, run

UNKNOWN = 1000  # rows of a folder whose size is not known


def read(files, sizes):
    def open_dataset(path, *, subsample=1.0, shuffle=False, seed=42):
        assert type(path) is str
        assert path
        if path.endswith(".parquet") or path.startswith("local:") or re.search("{%.*}", path):
            raise ValueError(f"{path} is not read as it is")
        assert isinstance(subsample, float)
        assert subsample > 0
        assert 0 <= seed < 2**32
        size = sizes.get(path) or UNKNOWN
        # Two chunks, of which a part takes the first items.
        region = [(0, size // 2), (0, size - size // 2)]
        drawn = 0
        if math.isclose(subsample, 1.0):
            drawn = size
        else:
            while subsample >= 1.0:
                drawn += size
                subsample -= 1.0
            if subsample > 0:
                drawn += int(size * subsample)
        return SimpleNamespace(path=path, region_of_interest=region, drawn=drawn, shuffle=shuffle)

    def combine(datasets, seed=42, weights=None, iterate_over_all=True):
        if iterate_over_all and weights:
            raise ValueError("the weights argument shouldn't be provided")
        assert iterate_over_all, "it would end with the first domain that runs out"
        assert all(dataset.shuffle for dataset in datasets)
        total = Counter()
        for dataset in datasets:
            total[dataset.path] += dataset.drawn
        return dict(total)

    module = make_module("litdata", StreamingDataset=open_dataset, CombinedStreamingDataset=combine)
    return run(files["litdata_mixture.py"], litdata=module)["build_dataset"]()


READERS = {"litdata": read}
