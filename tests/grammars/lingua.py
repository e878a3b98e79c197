"""How Lingua reads its data section (OmegaConf, merged into dataclasses) and draws: lingua/data.py.

https://github.com/facebookresearch/lingua
"""

import posixpath
import re

import yaml


class OmegaLoader(yaml.SafeLoader):
    """OmegaConf's YAML: floats as in YAML 1.2 (so that 1e5 is one), no dates, no key twice."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"a key is there twice: {keys}"
        return super().construct_mapping(node, deep)


FLOAT = re.compile(
    r"^(?:[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?(?:[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)"
    r"|\.[0-9_]+(?:[eE][-+][0-9]+)?|[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+\.[0-9_]*|[-+]?\.(?:inf|Inf|INF)"
    r"|\.(?:nan|NaN|NAN))$"
)
OmegaLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
OmegaLoader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))


def read(files, sizes):
    (text,) = files.values()
    config = yaml.load(text, OmegaLoader)
    assert set(config) == {"data"}
    data = config["data"]
    assert set(data) == {"root_dir", "sources", "seed"}
    assert data["root_dir"] == "."
    sources = data["sources"]
    assert all(isinstance(path, str) for path in sources), sources
    assert all(isinstance(weight, float) and weight >= 0 for weight in sources.values())
    folders = {posixpath.normpath(posixpath.join(data["root_dir"], path)) for path in sources}
    assert len(folders) == len(sources)
    total = sum(sources.values())
    # A source is chosen for each document; sequences are packed from those.
    return {path: weight / total for path, weight in sources.items()}


READERS = {"lingua": read}
