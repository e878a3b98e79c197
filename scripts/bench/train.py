"""What a training step costs, as ratios to a baseline that runs in turns with it in the same process.

    python scripts/bench/train.py [--only NAME ...] [--pairs 5] [--json PATH]

- dro: a proxy step (group DRO, cached reference losses) against a plain step of the same model on the same batches
- in_loop: a proxy step with the reference model in the loop against one with cached reference losses
- trainer: transformers' Trainer against our loop, same model, same sequences
- accumulation: a proxy step in two micro-batches (a first pass without gradient) against one batch
- compile: a plain step with torch.compile against one without, and what compiling takes
- loss: full logits against ours at a vocabulary of 125,696, time and memory (scripts/bench/loss.py)
- gpu (only where there is one): tokens per second, MFU, peak memory and a profile of the 120m and 280m presets

A ratio is the median over pairs, with the smallest and the largest.  Both members of a pair run one after the other and
take turns in going first, so that what else the machine does hits both.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loss
import numpy as np
import torch
from torch import Tensor

import doremi_mix.train
from doremi_mix.batches import Schedule
from doremi_mix.dro import GroupDRO
from doremi_mix.engine import EngineSettings, make_accelerator, prepare, to_device, with_host_facts
from doremi_mix.models import TokenInfo, TokenLossModel, build_model, num_parameters
from doremi_mix.objectives import MicroBatch, Objective, PlainObjective, ProxyObjective, forward
from doremi_mix.presets import PRESETS
from doremi_mix.progress import Narrator
from doremi_mix.train import TrainingPlan, train
from doremi_mix.types import Domains

NUM_DOMAINS = 20
GPU_VOCABULARY = 125_696  # Baichuan2's


class Data:
    """Packed sequences of random tokens: documents of 30 to 250 tokens, of which the last 60 % are learned."""

    def __init__(self, num_sequences: int, length: int, vocab_size: int) -> None:
        rng = np.random.default_rng(0)
        shape = (num_sequences, length)
        self.arrays = {
            "input_ids_BT": rng.integers(2, vocab_size, shape),
            "labels_BT": np.full(shape, -100),
            "position_ids_BT": np.zeros(shape, dtype=np.int64),
            "document_ids_BT": np.full(shape, -1, dtype=np.int32),
            "reference_loss_BT": rng.uniform(0, 10, shape).astype(np.float32),
            "domain_ids_B": np.arange(num_sequences) % NUM_DOMAINS,
        }
        for row in range(num_sequences):
            start = number = 0
            while start < length:
                end = min(length, start + int(rng.integers(30, 250)))
                answer = start + int(0.4 * (end - start))
                self.arrays["labels_BT"][row, answer : end - 1] = self.arrays["input_ids_BT"][row, answer + 1 : end]
                self.arrays["position_ids_BT"][row, start:end] = np.arange(end - start)
                self.arrays["document_ids_BT"][row, start:end] = number
                start, number = end, number + 1

    def read(self, ids: np.ndarray) -> MicroBatch:
        return {name: torch.from_numpy(array[ids]) for name, array in self.arrays.items()}


def paired(baseline: Callable[[], float], other: Callable[[], float], pairs: int) -> dict[str, float]:
    """Runs both in turns; each returns its seconds.  The ratio is other / baseline."""
    baseline()
    other()
    ratios, seconds = [], []
    for pair in range(pairs):
        if pair % 2:
            b = other()
            a = baseline()
        else:
            a = baseline()
            b = other()
        ratios.append(b / a)
        seconds.append((a, b))
    return {
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "baseline_seconds": statistics.median(a for a, _ in seconds),
        "seconds": statistics.median(b for _, b in seconds),
        "pairs": pairs,
    }


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Stepper:
    """One model with its optimizer and objective, stepping over batches that are on the device already."""

    def __init__(
        self,
        preset: str,
        vocab_size: int,
        length: int,
        objective: Objective,
        batches: list[MicroBatch],
        engine: EngineSettings,
    ) -> None:
        self.accelerator = make_accelerator()
        self.model = build_model(preset, TokenInfo(vocab_size, 1, 0), length, seed=0)
        self.prepared = prepare(self.model, engine, self.accelerator, batches[0], 10_000, print_line)
        self.batches = [to_device(with_host_facts(batch, self.model), self.accelerator.device) for batch in batches]
        self.objective = objective
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.reference: Any = None

    def step(self, batches: list[MicroBatch]) -> Tensor:
        if self.reference is not None:
            with torch.no_grad():
                batches = [{**batch, "reference_loss_BT": forward(self.reference, batch)} for batch in batches]
        logged = self.objective.backward(self.prepared, batches, self.accelerator)
        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return logged

    def run(self, num_steps: int, parts: int = 1) -> float:
        """Returns seconds per step."""
        synchronize()
        start = time.perf_counter()
        for number in range(num_steps):
            batch = self.batches[number % len(self.batches)]
            logged = self.step([batch] if parts == 1 else split(batch, parts))
        logged.sum().item()
        return (time.perf_counter() - start) / num_steps


def split(batch: MicroBatch, parts: int) -> list[MicroBatch]:
    """Splits a batch; what the host knows of the whole one does not hold for its parts."""
    whole = {name: tensor for name, tensor in batch.items() if name.endswith(("_BT", "_B"))}
    pieces = {name: tensor.chunk(parts) for name, tensor in whole.items()}
    return [{name: piece[i] for name, piece in pieces.items()} for i in range(parts)]


def print_line(text: str) -> None:
    print(text, file=sys.stderr)


def dro_objective() -> ProxyObjective:
    return ProxyObjective(Domains(tuple(map(str, range(NUM_DOMAINS)))), GroupDRO())


def shape_of(preset: str) -> tuple[int, int, int]:
    """Returns vocabulary, length and sequences of a batch: the preset's own on a CPU, a large one's on a GPU."""
    if torch.cuda.is_available():
        return GPU_VOCABULARY, 1024, 40
    return PRESETS[preset].vocab_size, PRESETS[preset].context_length, 40


def stepper(preset: str, objective: Objective, engine: EngineSettings | None = None) -> Stepper:
    vocab_size, length, batch_size = shape_of(preset)
    data = Data(4 * batch_size, length, vocab_size)
    batches = [data.read(np.arange(i * batch_size, (i + 1) * batch_size)) for i in range(4)]
    return Stepper(preset, vocab_size, length, objective, batches, engine or EngineSettings())


def bench_dro(preset: str, pairs: int, steps: int) -> dict[str, float]:
    plain, dro = stepper(preset, PlainObjective()), stepper(preset, dro_objective())
    return paired(lambda: plain.run(steps), lambda: dro.run(steps), pairs)


def bench_in_loop(preset: str, pairs: int, steps: int) -> dict[str, float]:
    cached, in_loop = stepper(preset, dro_objective()), stepper(preset, dro_objective())
    in_loop.reference = stepper(preset, PlainObjective()).prepared
    return paired(lambda: cached.run(steps), lambda: in_loop.run(steps), pairs)


def bench_accumulation(preset: str, pairs: int, steps: int) -> dict[str, float]:
    one, two = stepper(preset, dro_objective()), stepper(preset, dro_objective())
    return paired(lambda: one.run(steps), lambda: two.run(steps, parts=2), pairs)


def bench_compile(preset: str, pairs: int, steps: int) -> dict[str, float]:
    plain = stepper(preset, PlainObjective(), EngineSettings(compile=False))
    start = time.perf_counter()
    compiled = stepper(preset, PlainObjective(), EngineSettings(compile=True))
    seconds = time.perf_counter() - start
    return {**paired(lambda: plain.run(steps), lambda: compiled.run(steps), pairs), "compile_seconds": seconds}


def bench_trainer(preset: str, pairs: int, steps: int) -> dict[str, float]:
    """Both train from the same start on the same sequences; seconds per step without start-up."""
    vocab_size, length, batch_size = shape_of(preset)
    if torch.cuda.is_available():
        batch_size = 8  # the Trainer's full logits of more would fill the memory
    data = Data(steps * batch_size, length, vocab_size)
    # The Trainer's clock waits for the device after each step; so does ours, then.
    doremi_mix.train.FLUSH_EVERY = 1
    return paired(
        lambda: run_ours(data, preset, vocab_size, length, batch_size, steps),
        lambda: run_trainer(data, preset, vocab_size, length, batch_size, steps),
        pairs,
    )


def run_ours(data: Data, preset: str, vocab_size: int, length: int, batch_size: int, steps: int) -> float:
    model = build_model(preset, TokenInfo(vocab_size, 1, 0), length, seed=0)
    ids = [np.arange(steps * batch_size)]
    schedule = Schedule(ids, np.ones(1), batch_size, steps, seed=0)
    engine = EngineSettings(compile=torch.cuda.is_available())
    plan = TrainingPlan("reference", steps, 1e-4, 0.05, 0.01, 1.0, 1, steps, engine)
    with tempfile.TemporaryDirectory() as folder:
        with Narrator(quiet=True).track("bench", None, "tokens") as tracker:
            train(model, PlainObjective(), schedule, data.read, plan, Path(folder), tracker)
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    # The first steps warm up.
    return statistics.fmean(json.loads(line)["seconds"] for line in lines[2:])


def run_trainer(data: Data, preset: str, vocab_size: int, length: int, batch_size: int, steps: int) -> float:
    import transformers

    model = build_model(preset, TokenInfo(vocab_size, 1, 0), length, seed=0).model
    # Its own shift: labels stand under the token that they name.
    labels = np.full_like(data.arrays["labels_BT"], -100)
    labels[:, 1:] = data.arrays["labels_BT"][:, :-1]
    rows = [
        {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(wanted)}
        for ids, wanted in zip(data.arrays["input_ids_BT"], labels, strict=True)
    ]
    times: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_args: Any, **_settings: Any) -> None:
            synchronize()
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=batch_size,
            max_steps=steps,
            learning_rate=1e-4,
            optim="adamw_torch_fused",
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Clock()])
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return (times[-1] - times[1]) / (len(times) - 2)


def bench_loss(_preset: str, pairs: int, _steps: int) -> dict[str, Any]:
    return loss.measure(pairs=pairs)


def bench_gpu(_preset: str, _pairs: int, _steps: int) -> dict[str, Any]:
    """Tokens per second, MFU and peak memory of a plain step and a proxy step, and what the GPU's time goes to."""
    peak = matmul_rate()
    result: dict[str, Any] = {"matmul_tflops": peak / 1e12}
    for preset in ("120m", "280m"):
        for name, objective in (("plain", PlainObjective()), ("dro", dro_objective())):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            bench = stepper(preset, objective)
            bench.run(4)
            seconds = statistics.median(bench.run(5) for _ in range(5))
            length, batch_size = bench.batches[0]["input_ids_BT"].shape[1], len(bench.batches[0]["input_ids_BT"])
            tokens = length * batch_size
            labels = float(np.mean([float((batch["labels_BT"] != -100).sum()) for batch in bench.batches]))
            operations = step_operations(bench.model, tokens, labels)
            result[f"{preset} {name}"] = {
                "tokens_per_second": tokens / seconds,
                "mfu": operations / seconds / peak,
                "mfu_6nd": 6 * num_parameters(bench.model) * tokens / seconds / peak,
                "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
                "profile": profile(bench) if name == "dro" else None,
            }
            del bench
    return result


def step_operations(model: TokenLossModel, num_tokens: int, num_labels: float) -> float:
    """Counts what is really multiplied: blocks on all tokens, the head on the learned ones; attention is left out."""
    head = model.model.get_output_embeddings().weight.numel()
    tied = model.model.get_input_embeddings().weight is model.model.get_output_embeddings().weight
    blocks = num_parameters(model) - head * (1 if tied else 2)
    return 6.0 * (blocks * num_tokens + head * num_labels)


def matmul_rate() -> float:
    """Returns operations per second of a large bf16 product, the most that this GPU gave in this run."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(5):
            a @ b
        torch.cuda.synchronize()
        best = max(best, 5 * 2 * 8192**3 / (time.perf_counter() - start))
    return best


# The loss is its passes over blocks of logits; their products are among the matrix products.
KINDS = {
    "loss": r"arange|amax|log_softmax",
    "attention": r"flash|fmha|attention",
    "matrix products": r"gemm|nvjet|cutlass|splitK|cublas",
    "optimizer and clipping": r"multi_tensor|foreach|adam|lpnorm",
    "copies": r"memcpy|memset",
}


def profile(bench: Stepper) -> dict[str, Any]:
    """Returns what the GPU's time goes to in five steps, by kind and by kernel, and how long it has nothing to do."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        bench.run(5)
    kernels = [
        event
        for event in recorded.key_averages()
        if event.device_type == DeviceType.CUDA and event.key != "Command Buffer Full"
    ]
    total = sum(event.self_device_time_total for event in kernels)
    kinds = dict.fromkeys([*KINDS, "everything else"], 0.0)
    for event in kernels:
        found = (kind for kind, names in KINDS.items() if re.search(names, event.key, re.IGNORECASE))
        kinds[next(found, "everything else")] += event.self_device_time_total / total
    kernels.sort(key=lambda event: -event.self_device_time_total)
    return {
        "milliseconds_a_step": total / 5e3,
        "kinds": {kind: round(share, 3) for kind, share in kinds.items()},
        "kernels": {event.key[:90]: round(event.self_device_time_total / total, 3) for event in kernels[:20]},
    }


BENCHES = {
    "dro": bench_dro,
    "in_loop": bench_in_loop,
    "accumulation": bench_accumulation,
    "compile": bench_compile,
    "trainer": bench_trainer,
    "loss": bench_loss,
    "gpu": bench_gpu,
}
MEANING = {
    "dro": "proxy step / plain step",
    "in_loop": "reference in the loop / cached",
    "accumulation": "two micro-batches / one",
    "compile": "compiled step / plain step",
    "trainer": "transformers' Trainer / our loop",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    available = [name for name in BENCHES if name != "gpu" or torch.cuda.is_available()]
    parser.add_argument("--only", nargs="+", choices=BENCHES, default=available)
    parser.add_argument("--preset", default="120m" if torch.cuda.is_available() else "tiny", choices=PRESETS)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=12, help="steps of each member of a pair")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    if "gpu" in options.only and not torch.cuda.is_available():
        sys.exit("--only gpu needs a GPU")
    settings = {**loss.describe_machine(), "preset": options.preset}
    print(", ".join(f"{name} {value}" for name, value in settings.items()), flush=True)
    results = {}
    for name in options.only:
        results[name] = BENCHES[name](options.preset, options.pairs, options.steps)
        print_result(name, results[name])
    if options.json:
        options.json.write_text(json.dumps({**settings, "results": results}, indent=2) + "\n")


def print_result(name: str, result: dict[str, Any]) -> None:
    if "ratio" in result:
        print(
            f"{MEANING[name]:34} {result['ratio']:6.3f} x  ({result['lowest']:.3f} to {result['highest']:.3f}, "
            f"{result['pairs']} pairs; {1000 * result['baseline_seconds']:.0f} ms a step)"
        )
    elif name == "loss":
        loss.show(result)
    else:
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
