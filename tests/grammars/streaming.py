"""How MosaicML Streaming 0.13 and LLM Foundry 0.22 read what we write.

The Python file is run against stand-ins of Streaming's classes (stream.py: Stream, apply_weights; prefix.py:
_check_self); the YAML is read as OmegaConf 2.3 does, and each stream is ``Stream(**values)`` (llmfoundry text_data.py:
build_streams).
"""

import posixpath
import re
import sys
from types import ModuleType, SimpleNamespace

import yaml

SCHEMES = {"s3", "sftp", "gs", "oci", "hf", "azure", "azure-dl", "dbfs", "dbfs-uc", "alipan", "", "file"}


class Loader(yaml.SafeLoader):
    """YAML 1.1 with the floats of YAML 1.2 (1e5), as OmegaConf and jsonargparse have it; no repeated keys."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if len(set(keys)) < len(keys):
            raise ValueError(f"a key twice among {keys}")
        return super().construct_mapping(node, deep=deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)?|\.[0-9_]+(?:[eE][-+]?[0-9]+)?)$"),
    list("-+0123456789."),
)


def load_yaml(text):
    return yaml.load(text, Loader)


def run(text, **modules):
    """Runs a Python file with other modules in place of a consumer's, and returns its names."""
    before = {name: sys.modules.get(name) for name in modules}
    try:
        for name, module in modules.items():
            sys.modules[name] = module
        names = {"__name__": "exported"}
        exec(compile(text, "exported", "exec"), names)
        return names
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def make_module(name, **names):
    module = ModuleType(name)
    vars(module).update(names)
    return module


def make_stream(*, remote=None, local=None, split=None, proportion=None, repeat=None, choose=None):
    assert sum(value is not None for value in (proportion, repeat, choose)) <= 1
    for value in (proportion, repeat, choose):
        assert value is None or (type(value) in {int, float} and value >= 0)
    for place in (remote, local):
        assert place is None or (type(place) is str and place)
    assert remote or local
    if remote is not None and (re.match("([A-Za-z0-9+.-]*):", remote) or [None, ""])[1] not in SCHEMES:
        raise ValueError(f"Unsupported remote path: {remote}")
    if local is None:
        raise FileExistsError("the second run finds the temporary folder of the first")
    return SimpleNamespace(path=remote or local, local=local, choose=choose, proportion=proportion, repeat=repeat)


def make_dataset(*, streams, batch_size=None, epoch_size=None, shuffle=False, shuffle_seed=9176):
    """Returns the samples of an epoch by place; without shuffling they would come one domain after another."""
    assert shuffle
    assert type(shuffle_seed) is int
    assert shuffle_seed >= 0
    kinds = {stream.proportion is not None for stream in streams}
    assert kinds == {False}, "we write no proportions"
    if epoch_size:
        raise ValueError("Only provide `choose` when weighting streams relatively")
    folders = [posixpath.normpath(posixpath.join("/here", stream.local)) for stream in streams]
    if len(set(folders)) < len(folders):
        raise ValueError("Reused local directory")
    return {stream.path: stream.choose for stream in streams}


def read_python(files, sizes):
    module = make_module("streaming", Stream=make_stream, StreamingDataset=make_dataset)
    return run(files["streaming_mixture.py"], streaming=module)["build_dataset"](batch_size=8)


def read_foundry(files, sizes):
    config = load_yaml(files["train_loader.yaml"])
    assert set(config) == {"train_loader"}
    assert set(config["train_loader"]) == {"name", "dataset"}
    dataset = config["train_loader"]["dataset"]
    texts = [text for stream in dataset["streams"].values() for text in stream.values() if isinstance(text, str)]
    for text in [*dataset["streams"], *texts]:
        assert isinstance(text, str)
        if "${" in text or text == "???":
            raise ValueError(f"{text} is filled in by OmegaConf")
    streams = [make_stream(**stream) for stream in dataset.pop("streams").values()]
    return make_dataset(streams=streams, **dataset)


READERS = {"streaming": read_python, "llm-foundry": read_foundry}
