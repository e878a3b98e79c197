"""Asks the schema of axolotl 0.19, which knows no weight."""

from pathlib import Path

import yaml
from asked import main
from axolotl.utils.schemas.datasets import SFTDataset


def parse(request):
    """Returns what is left of each dataset of a config."""
    entries = yaml.safe_load(Path(request["file"]).read_text("utf-8"))["datasets"]
    return [SFTDataset(**entry).model_dump(exclude_none=True) for entry in entries]


main({"parse": parse})
