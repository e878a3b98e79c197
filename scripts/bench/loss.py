"""Time and memory of the loss against holding all logits, forward and backward.

    python scripts/bench/loss.py [--tokens 2048 8192] [--hidden 256] [--vocab 125696] [--pairs 5] [--json PATH]

"full logits" multiplies hidden states and head, takes torch's cross_entropy of the product and goes back with another
upstream gradient for each token; "blocks" is ours.  On a CPU everything is float32.  On a GPU hidden states and logits
are bfloat16 and the head float32, as in training under autocast, 16,384 tokens are the default, and every kernel that
``select_loss_kernel`` tries is shown, too, with what it has against it.

Time is a ratio to full logits: the median over pairs, with the smallest and the largest.  All run once in each round,
one after the other in the same process, and take turns in going first.

Memory is measured in a fresh process for each, after inputs and libraries are loaded: by how much the resident memory
(VmHWM, all of it anonymous; RssAnon, sampled, is shown in the JSON) rises at its peak, on a GPU by how much the
allocator's does.  It contains the two gradients that are handed back; "beyond gradients" is without them.

Full logits at 8,192 tokens by 125,696 words take 12 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from doremi_mix.loss import LossKernel, linear_cross_entropy, select_loss_kernel
from doremi_mix.loss_kernels import CUDA_KERNELS

FULL, BLOCKS = "full logits", "blocks"
CUDA_TOKENS, CPU_TOKENS = (16_384,), (2048, 8192)
SAMPLE_EVERY_SECONDS = 0.005


class Shape(NamedTuple):
    num_tokens: int
    hidden_size: int
    vocab_size: int


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_tokens() -> tuple[int, ...]:
    return CUDA_TOKENS if device().type == "cuda" else CPU_TOKENS


def full_logits(hidden_BTD: Tensor, head_VD: Tensor, labels_BT: Tensor) -> Tensor:
    logits_NV = hidden_BTD.flatten(0, 1) @ head_VD.to(hidden_BTD.dtype).T
    loss_N = F.cross_entropy(logits_NV.float(), labels_BT.flatten(), reduction="none")
    return loss_N.view(labels_BT.shape)


def with_kernel(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    kernel = LossKernel(name, CUDA_KERNELS.get(name), "")

    def loss(hidden_BTD: Tensor, head_VD: Tensor, labels_BT: Tensor) -> Tensor:
        index_N = torch.arange(labels_BT.numel(), device=labels_BT.device)
        return linear_cross_entropy(hidden_BTD, head_VD, labels_BT, label_index_N=index_N, kernel=kernel)

    return loss


class Problem:
    """Inputs of one shape, and how to take losses and gradients of them."""

    def __init__(self, shape: Shape) -> None:
        generator = torch.Generator(device()).manual_seed(0)
        options: dict[str, Any] = {"generator": generator, "device": device()}
        num_tokens, D, V = shape
        hidden_BTD = torch.randn(1, num_tokens, D, **options)
        self.hidden_BTD = hidden_BTD.bfloat16() if device().type == "cuda" else hidden_BTD
        self.head_VD = torch.randn(V, D, **options).mul_(D**-0.5)
        self.labels_BT = torch.randint(V, (1, num_tokens), **options)
        self.upstream_BT = torch.rand(1, num_tokens, **options)

    def run(self, path: str) -> tuple[Tensor, Tensor, Tensor]:
        loss = full_logits if path == FULL else with_kernel(path)
        leaves = self.hidden_BTD.detach().requires_grad_(), self.head_VD.detach().requires_grad_()
        loss_BT = loss(*leaves, self.labels_BT)
        hidden_grad_BTD, head_grad_VD = torch.autograd.grad(loss_BT, leaves, self.upstream_BT)
        return loss_BT.detach(), hidden_grad_BTD, head_grad_VD

    def seconds(self, path: str) -> float:
        _wait()
        start = time.perf_counter()
        self.run(path)
        _wait()
        return time.perf_counter() - start

    def gradient_bytes(self) -> int:
        return self.hidden_BTD.nbytes + self.head_VD.nbytes


def _wait() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize()


# --- memory, in a process of its own ---


def measure_memory(shape: Shape, path: str) -> dict[str, int]:
    """Returns by how many bytes memory rises while one path runs; meant for a fresh process."""
    Problem(Shape(32, 16, 64)).run(path)  # loads the libraries and starts their threads
    problem = Problem(shape)
    if device().type == "cuda":
        problem.run(path)  # compiles and tunes
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        problem.run(path)
        torch.cuda.synchronize()
        return {"extra_bytes": torch.cuda.max_memory_allocated() - before}
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident now
    before, anonymous_before = _resident("VmHWM"), _resident("RssAnon")
    peak_anonymous, done = anonymous_before, threading.Event()

    def sample() -> None:
        nonlocal peak_anonymous
        while not done.wait(SAMPLE_EVERY_SECONDS):
            peak_anonymous = max(peak_anonymous, _resident("RssAnon"))

    sampler = threading.Thread(target=sample)
    sampler.start()
    problem.run(path)
    done.set()
    sampler.join()
    return {"extra_bytes": _resident("VmHWM") - before, "extra_anonymous_bytes": peak_anonymous - anonymous_before}


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _memory_of(shape: Shape, path: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one-path", path, *map(str, shape)]
    # One thread fewer or more is another block size: the child must see the same number.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        return {"failure": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]}
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


# --- time ---


def measure_times(shape: Shape, paths: Sequence[str], pairs: int) -> dict[str, list[float]]:
    """Returns the seconds of each path in each round; a path that fails is left out."""
    problem = Problem(shape)
    times: dict[str, list[float]] = {}
    for path in paths:
        try:
            problem.seconds(path)  # the first time compiles, tunes and touches memory for the first time
        except Exception as error:
            if path in (FULL, BLOCKS):
                raise
            print(f"  {path}: {type(error).__name__}: {error}".splitlines()[0], file=sys.stderr)
        else:
            times[path] = []
    for turn in range(pairs):
        order = list(times)
        for path in order[turn % len(order) :] + order[: turn % len(order)]:
            times[path].append(problem.seconds(path))
    return times


def measure(
    *,
    tokens: Sequence[int] | None = None,
    hidden_size: int | None = None,
    vocab_size: int = 125_696,
    pairs: int = 5,
) -> dict[str, Any]:
    """Measures every path at every number of tokens.

    Args:
        tokens: numbers of tokens; 2,048 and 8,192 on a CPU, 16,384 on a GPU if None.
        hidden_size: D; 256 on a CPU, 768 on a GPU if None.
        vocab_size: V.
        pairs: rounds in which each path runs once.

    Returns:
        Values for JSON: ``kernel`` (what would be chosen, and why), ``rows``: one for each number of tokens and path.
    """
    is_cuda = device().type == "cuda"
    hidden_size = hidden_size or (768 if is_cuda else 256)
    chosen = select_loss_kernel(
        device(),
        torch.bfloat16 if is_cuda else torch.float32,
        num_tokens=4096,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
    )
    paths = [FULL, BLOCKS, *(CUDA_KERNELS if is_cuda else ())]
    rows = []
    for num_tokens in tokens or default_tokens():
        shape = Shape(num_tokens, hidden_size, vocab_size)
        memory = {path: _memory_of(shape, path) for path in paths}  # before this process holds any itself
        times = measure_times(shape, paths, pairs)
        for path in paths:
            rows.append(_row(shape, path, times.get(path), times[FULL], memory[path], memory[FULL]))
    return {"kernel": chosen.reason, "pairs": pairs, "rows": rows}


def _row(
    shape: Shape,
    path: str,
    seconds: list[float] | None,
    seconds_of_full: list[float],
    memory: Mapping[str, Any],
    memory_of_full: Mapping[str, Any],
) -> dict[str, Any]:
    row: dict[str, Any] = {**shape._asdict(), "path": path, **memory}
    if seconds:
        ratios = [one / full for one, full in zip(seconds, seconds_of_full, strict=True)]
        row["seconds"] = statistics.median(seconds)
        row["time_ratio"], row["lowest"], row["highest"] = statistics.median(ratios), min(ratios), max(ratios)
    if "extra_bytes" in memory:
        hidden_bytes = 2 if device().type == "cuda" else 4
        gradients = shape.hidden_size * (shape.num_tokens * hidden_bytes + shape.vocab_size * 4)
        row["beyond_gradients_bytes"] = memory["extra_bytes"] - gradients
        row["logits_bytes"] = shape.num_tokens * shape.vocab_size * 4
        if "extra_bytes" in memory_of_full:
            row["memory_ratio"] = memory["extra_bytes"] / memory_of_full["extra_bytes"]
    return row


def describe_machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device().type == "cuda" else model or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def show(result: Mapping[str, Any]) -> None:
    """Prints a table."""
    print(result["kernel"])
    heads = ("tokens", "path", "seconds", "of full logits", "extra MiB", "beyond gradients", "of full logits")
    table = "{:>7} {:18} {:>9} {:>22} {:>10} {:>17} {:>15}"
    print(table.format(*heads))
    for row in result["rows"]:
        time_ratio = memory_ratio = seconds = extra = beyond = "-"
        if "seconds" in row:
            seconds = f"{row['seconds']:.3f}"
            time_ratio = f"{row['time_ratio']:.3f} ({row['lowest']:.3f}-{row['highest']:.3f})"
        if "extra_bytes" in row:
            extra = f"{row['extra_bytes'] / 2**20:,.0f}"
            beyond = f"{row['beyond_gradients_bytes'] / 2**20:,.0f}"
        if "memory_ratio" in row:
            memory_ratio = f"1/{1 / row['memory_ratio']:.1f}"
        print(
            table.format(f"{row['num_tokens']:,}", row["path"], seconds, time_ratio, extra, beyond, memory_ratio)
            + (f"  {row['failure']}" if "failure" in row else "")
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", help="2048 and 8192 on a CPU, 16384 on a GPU")
    parser.add_argument("--hidden", type=int, help="256 on a CPU, 768 on a GPU")
    parser.add_argument("--vocab", type=int, default=125_696)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    parser.add_argument("--one-path", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one_path:
        path, *numbers = options.one_path
        print(json.dumps(measure_memory(Shape(*map(int, numbers)), path)))
        return
    if not Path("/proc/self/clear_refs").exists():
        sys.exit("loss.py reads /proc, which only Linux has")
    machine = describe_machine()
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    result = measure(tokens=options.tokens, hidden_size=options.hidden, vocab_size=options.vocab, pairs=options.pairs)
    show(result)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, **result}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
