"""The 20 real instruction sets, where they lie beside the checkout; run with: python -m pytest -m slow."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from doremi_mix import learn
from doremi_mix.run import RunDirectory, read_json
from doremi_mix.stages.load import read_summary
from doremi_mix.stages.training import open_store

pytestmark = pytest.mark.slow

SHORT = {"reference": {"steps": 5}, "tokenize": {"context_length": 128}}


@pytest.fixture(scope="module")
def pool_run(shared_data, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("pool") / "run"
    learn(shared_data / "pool20", run_dir, token_budget=1_000_000, **SHORT)
    return run_dir


def test_every_row_is_accounted_for(pool_run):
    domains = read_summary(pool_run / "load")
    assert len(domains) == 20
    assert sum(domain["num_rows"] for domain in domains) == 84_259
    assert sum(domain["num_kept"] for domain in domains) == 83_875
    assert pq.read_metadata(pool_run / "load" / "rejections.parquet").num_rows == 384


def test_the_mixture_is_within_one_example_per_domain_of_the_budget(pool_run):
    allocation = read_json(pool_run / "mixture" / "allocation.json")
    store = open_store(RunDirectory(pool_run))
    longest = {
        name: int(np.max(store.example_tokens[slice(store.document_ids(i).start, store.document_ids(i).stop)]))
        for i, name in enumerate(store.domains)
    }
    for name, domain in allocation["domains"].items():
        assert domain["allocated_tokens"] - longest[name] < domain["drawn_tokens"] <= domain["allocated_tokens"]
    assert allocation["drawn_tokens"] <= 1_000_000


def test_three_files_as_gzip_and_one_as_parquet_give_the_same_weights(pool_run, shared_data, tmp_path):
    folder = tmp_path / "pool20"
    folder.mkdir()
    for path in (shared_data / "pool20").glob("*.json"):
        if path.stem in ("alpaca_data", "civics_zh", "gsm8k"):
            with gzip.open(folder / f"{path.stem}.jsonl.gz", "wt", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in json.loads(path.read_text(encoding="utf-8")))
        elif path.stem == "medical_zh":
            rows = json.loads(path.read_text(encoding="utf-8"))
            pq.write_table(pa.Table.from_pylist(rows), folder / "medical_zh.parquet")
        else:
            (folder / path.name).symlink_to(path)
    weights = learn(folder, tmp_path / "run", token_budget=1_000_000, **SHORT)
    assert weights.domain_weights == read_json(pool_run / "weights" / "domain_weights.json")["domain_weights"]
    name = "mixture/mixture.jsonl"
    assert (tmp_path / "run" / name).read_bytes() == (pool_run / name).read_bytes()
