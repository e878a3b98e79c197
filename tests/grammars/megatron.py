"""How Megatron-LM reads blends: get_blend_from_list of Megatron-Core, and its two files of arguments."""

import json


def read_blend(blend):
    """Returns prefixes and weights; weights are None where the words are not weight, prefix, weight, prefix."""
    if len(blend) % 2 == 1:
        return [prefix.strip() for prefix in blend], None
    weights = []
    for word in blend[::2]:
        try:
            weights.append(float(word))
        except ValueError:
            return [prefix.strip() for prefix in blend], None
    return [prefix.strip() for prefix in blend[1::2]], weights


def drawn(prefixes, weights):
    """Returns the share of samples of each prefix."""
    if weights is None:
        raise ValueError("no weights: prefixes are drawn by their lengths")
    if not all(weight > 0 for weight in weights):
        raise AssertionError("a weight is not above 0")
    if len(set(prefixes)) < len(prefixes):
        raise ValueError("a prefix is there twice")
    if any(prefix.endswith((".bin", ".idx")) or not prefix for prefix in prefixes):
        raise FileNotFoundError("a prefix with a suffix")
    total = sum(weights)
    return {prefix: weight / total for prefix, weight in zip(prefixes, weights, strict=True)}


def read_arguments_file(files, sizes):
    """Reads --data-args-path."""
    (text,) = files.values()
    return drawn(*read_blend(text.split()))


def read_per_split_file(files, sizes):
    """Reads --per-split-data-args-path."""
    (text,) = files.values()
    splits = json.loads(text)
    blends = []
    for key in ("train", "valid", "test"):
        words = splits[key].split() if isinstance(splits[key], str) else splits[key]
        blends.append(None if words is None else read_blend(words))
    if blends[1:] != [None, None]:
        raise ValueError("training data would be validated on")
    return drawn(*blends[0])


READERS = {"megatron": read_arguments_file, "megatron-per-split": read_per_split_file}
