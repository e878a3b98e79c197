"""How Levanter reads its data section and mixes: levanter/config.py, data/text and data/mixture.py, in both packages.

https://github.com/stanford-crfm/levanter (``configs``) and https://github.com/marin-community/marin (``components``).
"""

import glob
import posixpath
import re

import yaml
from fsspec.utils import glob_translate

SHARED = {"train_weights", "stop_strategy", "mixture_block_size"}


class UniqueKeys(yaml.SafeLoader):
    """PyYAML takes the last of two equal keys without a word; that would be a misread."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"a key is there twice: {keys}"
        return super().construct_mapping(node, deep)


def read(text, key, url_of, packs):
    (section,) = yaml.load(text, UniqueKeys).items()
    name, data = section
    assert name == "data"
    assert set(data) == {key, *SHARED}, sorted(data)
    assert data["stop_strategy"] == "restart"
    sources, weights, block = data[key], data["train_weights"], data["mixture_block_size"]
    assert all(isinstance(name, str) for name in sources)
    assert set(weights) <= set(sources), "Weight keys must be subset of component keys."
    assert all(packs(source) for source in sources.values())
    assert len({folder(name) for name in sources}) == len(sources)
    drawn = mix(weights, block)
    urls = [url_of(source) for source in sources.values()]
    assert len(set(urls)) == len(urls)
    return {url_of(sources[name]): count / block for name, count in drawn.items()}


def folder(name):
    """Where the cache of a component lies; each must have one below the cache's folder."""
    path = posixpath.normpath(posixpath.join("cache", name))
    assert path.startswith("cache/")
    return path


def mix(weights, block):
    """Returns the sequences of each dataset in a block; as numpy's int32 does, a float is cut."""
    assert block < 2**16
    total = sum(weights.values())
    assert total > 0
    assert min(weights.values()) >= 0
    normalized = {name: weight / total for name, weight in weights.items() if weight > 0}
    counts = {name: int(weight * block) for name, weight in normalized.items()}
    largest = max(counts, key=counts.__getitem__)
    counts[largest] += block - sum(counts.values())
    assert all(counts.values()), "a dataset has 0 samples in the block; Levanter only warns"
    return counts


def open_url(url, sizes):
    """Returns the one file that a URL opens: first braces are expanded, then patterns; see utils/fsspec_utils.py."""
    opened = []
    for candidate in expand_braces(url):
        if "::" in candidate:
            raise ValueError(f"{candidate} is a chain of file systems")
        if glob.has_magic(candidate):
            pattern = re.compile(glob_translate(candidate))
            opened += [path for path in sizes if pattern.match(path)]
        else:
            opened.append(candidate)
    (path,) = opened
    assert path in sizes, f"{path} is none of the files"
    stem, suffix = posixpath.splitext(path)
    assert {suffix, posixpath.splitext(stem)[1]} & {".jsonl", ".txt", ".json", ".parquet"}, f"Unknown format for {path}"
    return path


def expand_braces(text):
    """As braceexpand: lists and ranges in braces, and a backslash before what is to stand as it is."""
    inner = re.search(r"(?<!\\)\{([^{}]*)\}", text)
    if not inner:
        if re.search(r"(?<!\\)[{}]", text):
            raise ValueError(f"unbalanced braces in {text!r}")
        return [re.sub(r"\\(.)", r"\1", text)]
    choices, numbers = inner[1].split(","), re.fullmatch(r"(\d+)\.\.(\d+)", inner[1])
    letters = re.fullmatch(r"([A-Za-z])\.\.([A-Za-z])", inner[1])
    if letters:
        choices = [chr(code) for code in range(ord(letters[1]), ord(letters[2]) + 1)]
    elif numbers:
        choices = [str(number).zfill(len(numbers[1])) for number in range(int(numbers[1]), int(numbers[2]) + 1)]
    elif len(choices) == 1:
        # Braces around one word are kept.
        choices = [f"\\{{{inner[1]}\\}}"]
    before, after = text[: inner.start()], text[inner.end() :]
    return list(dict.fromkeys(path for choice in choices for path in expand_braces(f"{before}{choice}{after}")))


def read_levanter(files, sizes):
    def url_of(source):
        assert set(source) == {"train_urls", "format"}
        (url,) = source["train_urls"]
        return open_url(url, sizes)

    (text,) = files.values()
    return read(text, "configs", url_of, lambda source: source["format"].get("pack", True))


def read_marin(files, sizes):
    def url_of(source):
        assert set(source) == {"source", "format", "pack"}
        assert set(source["source"]) == {"type", "train_urls"}
        (url,) = source["source"]["train_urls"]
        return open_url(url, sizes)

    (text,) = files.values()
    return read(text, "components", url_of, lambda source: source["pack"] is True)


READERS = {"levanter": read_levanter, "marin": read_marin}
