"""How torchtitan takes its mixtures: hf_datasets/interleaved.py of 0.3.0, components/data of what follows it.

https://github.com/pytorch/torchtitan
"""

import ast
import glob


def constants(text):
    """Returns what a Python file assigns literally, after compiling the whole of it."""
    tree = ast.parse(text)
    compile(tree, "file", "exec")
    return {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }


def read_released(files, sizes):
    (text,) = files.values()
    drawn = {}
    for name, reader, path, weight in constants(text)["DOMAINS"]:
        assert isinstance(name, str)
        assert reader == ("parquet" if path.endswith(".parquet") else "json")
        # What resolves data_files: patterns, variables, chains of file systems.
        assert not set(path) & set("[]$")
        assert "::" not in path
        assert path not in drawn
        assert weight >= 0, "All weights must be non-negative."
        drawn[path] = weight
    total = sum(drawn.values())
    assert total > 0, "Sum of weights must be positive."
    return {path: weight / total for path, weight in drawn.items()}


def read_grain(files, sizes):
    (text,) = files.values()
    drawn = {}
    for name, pattern, weight in constants(text)["DOMAINS"]:
        assert isinstance(name, str)
        (path,) = [path for path in sizes if glob.escape(path) == pattern]
        assert not path.endswith((".parquet", ".json"))
        assert weight > 0, "DatasetMixConfig requires positive-weight datasets"
        drawn[path] = weight
    return {path: weight / sum(drawn.values()) for path, weight in drawn.items()}


READERS = {"torchtitan": read_released, "torchtitan-grain": read_grain}
