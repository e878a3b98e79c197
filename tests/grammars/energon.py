"""How Megatron-Energon reads a MetadatasetV2: scalars as its YAML reader casts them, and the weights of a blend."""

import yaml


def cast(node):
    """A scalar in quotes is a string; of the others it makes what it can."""
    text = node.value
    if node.style in ("'", '"'):
        return text
    if text.lower() in ("null", "~"):
        return None
    if text.lower() in ("true", "yes", "false", "no"):
        return text.lower() in ("true", "yes")
    try:
        return float(text) if "." in text or "e" in text.lower() else int(text)
    except ValueError:
        return text


def to_value(node):
    """Returns mappings, lists and cast scalars."""
    if isinstance(node, yaml.MappingNode):
        return {key.value: to_value(value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [to_value(item) for item in node.value]
    return cast(node)


def read(files, sizes):
    """Returns the probability of a sample of each path."""
    ((name, text),) = files.items()
    if not name.endswith(".yaml"):
        raise FileNotFoundError(f"{name} is no metadataset")
    config = to_value(yaml.compose(text))
    assert (config["__module__"], config["__class__"]) == ("megatron.energon", "MetadatasetV2")
    if list(config["splits"]) != ["train"]:
        raise ValueError(config["splits"])
    probabilities = {}
    blend = config["splits"]["train"]["blend"]
    for reference in blend:
        weight, path = reference["weight"], reference["path"]
        if set(reference) != {"weight", "path"} or not isinstance(path, str) or not isinstance(weight, float | int):
            raise TypeError(reference)
        if not weight > 0:
            raise AssertionError("All blending weights must be > 0")
        if path in probabilities or not path:
            raise ValueError(f"{path!r} is empty or there twice")
        address = path.partition("://")
        if address[1] and (address[0] not in ("msc", "dss", "rclone") or address[2][:1] in ("", "/")):
            raise ValueError(f"{path!r} is taken for a local folder")
        probabilities[path] = weight
    total = sum(probabilities.values())
    return {path: weight / total for path, weight in probabilities.items()}


READERS = {"energon": read}
