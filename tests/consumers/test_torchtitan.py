"""torchtitan's released data loader reads and draws what we export for it; see checking.py."""

import gzip
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from .checking import assert_composition, write_problem

CONSUMER = "torchtitan"
pytestmark = pytest.mark.consumers


@pytest.mark.proves("torchtitan", how="drawn")
def test_torchtitan_draws_the_exported_shares_of_sequences(consumer, problem):
    export, (file,) = consumer.export("torchtitan", problem.weights)
    numbers = {name: number for number, name in enumerate(problem.weights.domain_weights, start=1)}
    drawn = consumer.ask("draw", file=file, numbers=numbers, number=2000, length=64)
    sequences = {name: drawn["sequences"][str(number)] for name, number in numbers.items()}
    assert_composition(sequences, export.expected)
    # Packed sequences are full but for a row, and the last one of a pass.
    tokens = {name: drawn["tokens"][str(number)] for name, number in numbers.items()}
    for name in numbers:
        assert tokens[name] / sequences[name] > 0.7 * 64


@pytest.mark.proves("torchtitan", how="drawn")
def test_hostile_names_and_files_are_read_as_they_are(consumer, tmp_path):
    names = ["two words", "a:b", "中文", "it's", 'say "x"', "{x}", "100%", "#no", "a,b", "back\\slash", "new\nline"]
    shares = {name: (number + 1) / 66 for number, name in enumerate(names)}
    problem = write_problem(
        tmp_path / "hostile",
        {name: share / sum(shares.values()) for name, share in shares.items()},
        dict.fromkeys(names, 5),
        dict.fromkeys(names, 6),
    )
    export, (file,) = consumer.export("torchtitan", problem.weights)
    numbers = {name: number for number, name in enumerate(names, start=1)}
    drawn = consumer.ask("draw", file=file, numbers=numbers, number=1500, length=64)
    assert_composition({name: drawn["sequences"][str(number)] for name, number in numbers.items()}, export.expected)


@pytest.mark.proves("torchtitan", how="drawn")
def test_files_of_each_kind_are_read_with_the_reader_of_that_kind(consumer, problem, tmp_path):
    packed, table = tmp_path / "alpha.jsonl.gz", tmp_path / "beta.PARQUET"
    packed.write_bytes(gzip.compress(Path(problem.paths["alpha"]).read_bytes()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(problem.rows["beta"]), table)
    paths = problem.paths | {"alpha": str(packed), "beta": str(table)}
    export, (file,) = consumer.export("torchtitan", problem.weights, paths=paths)
    numbers = {name: number for number, name in enumerate(problem.weights.domain_weights, start=1)}
    drawn = consumer.ask("draw", file=file, numbers=numbers, number=1000, length=64)
    assert_composition({name: drawn["sequences"][str(number)] for name, number in numbers.items()}, export.expected)
