"""How open-instruct reads ``--dataset_mixer_list``: pairs of a path and an amount, after the shell.

Source: open_instruct/dataset_transformation.py of the repository at 00440da (it is in no package index).
"""

import shlex

from .huggingface import load


def amount_of(text, size):
    """Rows to draw: a text with a point is a part of the dataset, others must be whole numbers."""
    return int(float(text) * size) if "." in text else int(text)


def read(files, sizes):
    words = shlex.split(files["open_instruct.sh"], comments=True)
    assert words[0] == "MIXTURE=("
    assert words[-1] == ")"
    options, option = {}, None
    for word in words[1:-1]:
        if word.startswith("-"):
            option = options.setdefault(word, [])
        else:
            option.append(word)
    assert set(options) == {"--dataset_mixer_list", "--dataset_mixer_list_splits"}
    assert options["--dataset_mixer_list_splits"] == ["train"]
    mixer = options["--dataset_mixer_list"]
    if len(mixer) % 2:
        raise ValueError("Data mixer list length is not even")
    drawn = {}
    for path, amount in zip(mixer[::2], mixer[1::2], strict=True):
        kind = next((kind for end, kind in ((".jsonl", "json"), (".parquet", "parquet")) if path.endswith(end)), None)
        if kind is None:
            raise FileNotFoundError(f"{path} would be downloaded")
        file, size = load(sizes, kind, path)
        assert file not in drawn
        drawn[file] = amount_of(amount, size)
    return drawn


READERS = {"open-instruct": read}
