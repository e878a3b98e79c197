"""What makes a training step fast on this device: kernels, checkpointing, compilation, sharding.

Nothing here changes what is computed.  Whatever is faster than the plain path is taken only after it gave the same
numbers on this device, and left again with one line that says why.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from doremi_mix.adapters import has_adapter_dropout, set_adapter_dropout
from doremi_mix.attention import choose_attention
from doremi_mix.errors import short_reason
from doremi_mix.loss import select_loss_kernel
from doremi_mix.models import TokenLossModel, blocks, compile_blocks, enable_gradient_checkpointing, undo_compile
from doremi_mix.objectives import MicroBatch, forward

COMPILE_SECONDS = 6.0
"""About what compiling a preset's block takes (5 s beside an H100, with 16 cores); a training that is shorter than a
few times that cannot win it back."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How to run a step, as far as it can be chosen.

    Attributes:
        gradient_checkpointing: keep only the inputs of each block and compute the rest again.
        shard: split weights, gradients and optimizer state over the processes (FSDP); None as the launcher's flag says.
        compile: torch.compile; None where it is measured to pay.
    """

    gradient_checkpointing: bool = False
    shard: bool | None = None
    compile: bool | None = None


def make_accelerator() -> Any:
    """Returns the Accelerator of this process: bf16 autocast on CUDA, float32 on the CPU.

    Other devices (MPS) are passed over: they have no float64, in which the domain weights live.
    """
    from accelerate import Accelerator

    # Sharding is ours, one path for every device (accelerate's is for GPUs only); its launcher's flag asks for it.
    if os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true":
        os.environ[SHARD] = "1"
    return Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="bf16" if has_bf16() else "no")


SHARD = "DOREMI_MIX_SHARD"


def has_bf16() -> bool:
    """Says whether this process computes in bf16: on CUDA devices that do so in hardware."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def is_sharded(settings: EngineSettings, num_processes: int) -> bool:
    """Says whether the model is split; one process has nobody to share with."""
    wanted = os.environ.get(SHARD) == "1" if settings.shard is None else settings.shard
    return num_processes > 1 and wanted


def prepare(
    model: TokenLossModel,
    settings: EngineSettings,
    accelerator: Any,
    example: MicroBatch,
    num_passes: int,
    say: Callable[[str], None],
) -> Any:
    """Brings a model to the device in the form in which it trains fastest.

    Args:
        model: on the CPU; changed in place.
        settings: what was chosen.
        accelerator: of this process.
        example: a micro-batch on the CPU, for checks and measurements.
        num_passes: forward and backward passes that are to come.
        say: prints one line.

    Returns:
        What to call in the model's place; its parameters are the model's.
    """
    sharded = is_sharded(settings, accelerator.num_processes)
    if settings.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    if not sharded:
        model.to(accelerator.device)
    _choose_kernels(model, accelerator, say)
    if sharded:
        if settings.compile:
            compile_blocks(model)
        return _shard(model, accelerator)
    example = to_device(with_host_facts(example, model), accelerator.device)
    drops = has_adapter_dropout(model)
    # Compiled code draws masks of its own, which would hide whether the rest is the same.
    set_adapter_dropout(model, on=False)
    _choose_compile(model, settings.compile, accelerator, example, num_passes, say)
    set_adapter_dropout(model, on=drops)
    return accelerator.prepare(model)


def prepare_to_score(
    model: TokenLossModel, settings: EngineSettings, accelerator: Any, *, alone: bool = False
) -> TokenLossModel:
    """Brings a model to the device for forward passes only, split over the processes where training would be.

    Args:
        model: on the CPU; changed in place.
        settings: of the training.
        accelerator: of this process.
        alone: do not split it: this process works without the others.
    """
    if not alone and is_sharded(settings, accelerator.num_processes):
        return _shard(model, accelerator)
    model.to(accelerator.device)
    _choose_kernels(model, accelerator, lambda _line: None)
    return model


def with_host_facts(batch: MicroBatch, model: TokenLossModel) -> MicroBatch:
    """Adds what the host knows for nothing and a device would have to stop for."""
    from doremi_mix.attention import document_starts

    batch = {**batch, "label_index_N": (batch["labels_BT"] != -100).flatten().nonzero().squeeze(1)}
    if model.attention == "varlen":
        batch["document_starts_C"] = document_starts(batch["document_ids_BT"])
    return batch


def to_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """Moves a micro-batch to the device, asynchronously from pinned memory on CUDA."""
    if device.type == "cpu":
        return batch
    moved = {name: pinned(tensor).to(device, non_blocking=True) for name, tensor in batch.items()}
    if "document_starts_C" in moved:
        # The number of documents changes from batch to batch; compiled blocks must not be compiled again for it.
        torch._dynamo.maybe_mark_dynamic(moved["document_starts_C"], 0)
    return moved


def pinned(tensor: Tensor) -> Tensor:
    """Returns the tensor in memory from which a CUDA device can copy by itself."""
    return tensor if tensor.is_pinned() else tensor.pin_memory()


def _choose_kernels(model: TokenLossModel, accelerator: Any, say: Callable[[str], None]) -> None:
    if accelerator.device.type == "cpu":
        return
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    model.attention, attention_reason = choose_attention(model, accelerator.device, dtype)
    vocab_size, hidden_size = model.model.get_output_embeddings().weight.shape
    model.loss_kernel = select_loss_kernel(accelerator.device, dtype, hidden_size=hidden_size, vocab_size=vocab_size)
    for reason in (attention_reason, model.loss_kernel.reason):
        if reason:
            say(f"  {reason}")


def _shard(model: TokenLossModel, accelerator: Any) -> TokenLossModel:
    """Splits a model over all processes with FSDP, block by block."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if accelerator.mixed_precision == "bf16"
        else MixedPrecisionPolicy()
    )
    # FSDP hooks into the gradient of what the model returns, which must not be a view of something else.
    model.register_forward_hook(lambda _module, _inputs, loss_BT: loss_BT.clone())
    for module in (*blocks(model), model):
        fully_shard(module, mp_policy=policy)
    return model


def _choose_compile(
    model: TokenLossModel,
    wanted: bool | None,
    accelerator: Any,
    example: MicroBatch,
    num_passes: int,
    say: Callable[[str], None],
) -> None:
    """Compiles the blocks when that was asked for, or is measured to pay; off again when it fails or differs."""
    # On a CPU a compiled step is 5 to 10 % faster: default runs are too short to win that back, and a resumed run would
    # have to choose the same to end with the same bytes (scripts/bench/train.py --only compile).
    if wanted is False or (wanted is None and accelerator.device.type == "cpu"):
        return
    try:
        eager_seconds, eager = _measure(model, example, accelerator)
    except torch.OutOfMemoryError:
        # Compiled blocks keep less; there is nothing to compare them with, and no other way.
        torch.cuda.empty_cache()
        compile_blocks(model)
        say("  torch.compile is on: without it, a pass does not fit the GPU's memory")
        return
    if wanted is None and eager_seconds * num_passes < 4 * COMPILE_SECONDS:
        return
    compile_blocks(model)
    try:
        start = time.perf_counter()
        compiled_seconds, compiled = _measure(model, example, accelerator)
        spent = time.perf_counter() - start
    except Exception as error:  # compilers fail in many ways, and none of them may stop a training
        undo_compile(model)
        say(f"  torch.compile is off: it failed ({short_reason(error)})")
        return
    tolerance = 0.05 if accelerator.mixed_precision == "bf16" else 1e-3
    # Gradients that are nothing beside the largest are noise.
    if not torch.allclose(compiled, eager, rtol=tolerance, atol=1e-3 * tolerance * float(eager.max())):
        undo_compile(model)
        say("  torch.compile is off: its numbers differ from the plain model's")
        return
    speed = eager_seconds / compiled_seconds
    if wanted is None and speed < 1.02:
        undo_compile(model)
        say(f"  torch.compile is off: a pass took {1 / speed:.2f} x the plain one's time")
        return
    say(f"  torch.compile is on: {speed:.2f} x as fast, {spent:.0f} s to compile")


def _measure(model: TokenLossModel, example: MicroBatch, accelerator: Any) -> tuple[float, Tensor]:
    """Returns seconds of a forward and backward pass, and numbers that tell its result: losses and gradient norms."""
    seconds = []
    for _ in range(4):
        model.zero_grad(set_to_none=True)
        start = time.perf_counter()
        with accelerator.autocast():
            loss_BT = forward(model, example)
        loss_BT.sum().backward()  # type: ignore[no-untyped-call]
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    norms = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
    result = torch.cat([loss_BT.detach().sum(1).float(), torch.stack(norms).float()])
    model.zero_grad(set_to_none=True)
    return min(seconds[1:]), result
