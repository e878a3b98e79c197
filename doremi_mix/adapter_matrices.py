"""Saved LoRA adapters as matrices: read from peft's layout, whoever wrote it, and written in it.

Axes: R rank, D inputs of a layer, N outputs.
"""

from __future__ import annotations

import errno
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from doremi_mix.adapters import CONFIG, PREFIX, WEIGHTS, how_to_get_again, read_adapter_config, write_json
from doremi_mix.errors import DoremiMixError, ModelError, RunDirectoryError, short_reason

_OTHER_FORMS = (
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias", "modules_to_save"),
    *("monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora"),
    "velora_config",
)
"""Settings of peft with which an adapter is more than two matrices a layer."""


@dataclass(frozen=True, slots=True)
class Pair:
    """The matrices of one layer.

    Attributes:
        a_RD: A.
        b_NR: B.
        scaling: that of their product.
    """

    a_RD: Tensor
    b_NR: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a_RD.shape[0]

    def delta(self) -> Tensor:
        """Returns what is added to the weight, in float32, shape [N, D]."""
        return (self.b_NR.float() @ self.a_RD.float()) * self.scaling


def read_adapter(adapter: Path) -> tuple[dict[str, Any], dict[str, Pair]]:
    """Returns peft's configuration, and the matrices by the name of their layer.

    Raises:
        ModelError: it is no LoRA adapter, or a form of LoRA that is not supported.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = read_adapter_config(adapter)
    if config.get("peft_type") != "LORA":
        raise ModelError(f"adapter {adapter}: is {config.get('peft_type')}, expected LORA; give a LoRA adapter")
    for key in _OTHER_FORMS:
        if config.get(key):
            raise ModelError(f"adapter {adapter}: {key} is set, which cannot be written in another form; train without")
    try:
        tensors = load_file(adapter / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"adapter {adapter}: its {WEIGHTS} cannot be read ({short_reason(error)}); {how_to_get_again(adapter)}"
        ) from None
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in sorted(tensors.items()):
        found = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", key)
        if found is None or tensor.ndim != 2:
            raise ModelError(f"adapter {adapter}: {key} is no matrix of a linear layer's LoRA; train without it")
        layers.setdefault(found[1], {})[found[2]] = tensor
    for name, both in layers.items():
        if both.keys() != {"A", "B"} or both["A"].shape[0] != both["B"].shape[1]:
            raise ModelError(
                f"adapter {adapter}: the matrices of {name} do not fit each other; {how_to_get_again(adapter)}"
            )
    return config, {
        name: Pair(both["A"], both["B"], _scaling(config, name, both["A"].shape[0])) for name, both in layers.items()
    }


def _scaling(config: Mapping[str, Any], name: str, rank: int) -> float:
    """What peft multiplies the product of a layer's matrices by."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next((patterns[key] for key in patterns if re.match(rf"(.*\.)?({key})$", name)), config["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def write_adapter(folder: Path, config: Mapping[str, Any], pairs: Mapping[str, Pair]) -> int:
    """Writes an adapter in peft's layout, and returns the number of its parameters."""
    from safetensors.torch import save

    tensors = {}
    for name, pair in sorted(pairs.items()):
        tensors[f"{PREFIX}{name}.lora_A.weight"] = pair.a_RD.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = pair.b_NR.contiguous()
    # safetensors' own function hides the system's errors in one of its own.
    (folder / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
    write_json(folder / CONFIG, config)
    return sum(tensor.numel() for tensor in tensors.values())


def end_of(name: str) -> str:
    """Returns the end of a layer's name: what peft calls a target module."""
    return name.rpartition(".")[2]


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Gives a hidden folder, which becomes the target when the context ends without an error.

    Raises:
        ModelError: the target exists.
        RunDirectoryError: the system lets nothing be written; any of its errors while the context lasts counts as that.
    """
    if target.exists():
        raise ModelError(f"{target}: exists already; choose another folder, or remove it")
    hidden = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(hidden, ignore_errors=True)
    try:
        hidden.mkdir(parents=True)
        yield hidden
        hidden.rename(target)
    except BaseException as error:
        shutil.rmtree(hidden, ignore_errors=True)
        if not isinstance(error, OSError) or isinstance(error, DoremiMixError):
            raise
        more = "free some space or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise RunDirectoryError(
            f"{target}: cannot be written ({short_reason(error)}); {more}choose another folder"
        ) from None


def copy_file(path: Path, target: Path) -> None:
    """Copies a file's content; what fails to be read is told from what fails to be written.

    Raises:
        ModelError: the file cannot be read.
        OSError: the target cannot be written.
    """
    try:
        source = path.open("rb")
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({short_reason(error)}); change its permissions") from None
    with source, target.open("wb") as copy:
        shutil.copyfileobj(source, copy)
