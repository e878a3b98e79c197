"""What a step of the contest's fine-tune takes on this machine, beside what doremi_mix.costs counts.

    python scripts/bench/finetune.py [--shape 7b | tiny7b | tiny | trace] [--micro-batch 8 64] [--length 1024]

- 7b (where there is a GPU): a model of Baichuan2-7B's shape with random bf16 weights, made on the GPU, with the
  contest's adapters and gradient checkpointing: tokens per second, MFU, peak memory.  No checkpoint is needed.
- tiny7b: the same code on a small shape, for any machine; it proves the code, its speed says nothing
- tiny (elsewhere): our step against the plain one of transformers and peft (full logits and cross_entropy) on the same
  batches, vocabulary 125,696; that both have the same loss and gradients is checked first
- trace: the step of 7b over tensors without content, which needs no GPU: what is alive at its peak

MFU counts operations without those that checkpointing repeats, over 800 TFLOP/s and over what this device gives in a
large product in the same run; "busy" counts the repeated ones, too.  All sequences are full and 60 % of their tokens
are learned.  A step has 64 sequences, whatever the micro-batch.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F  # noqa: N812
from loss import describe_machine
from torch import Tensor, nn
from train import paired, print_line, synchronize

import doremi_mix.loss
import doremi_mix.loss_kernels
from doremi_mix.adapters import LoraSettings, add_adapter, num_trainable_parameters, set_adapter_dropout
from doremi_mix.costs import BAICHUAN2_7B, H100, RESERVE_BYTES, ModelShape, training_memory, training_operations
from doremi_mix.engine import EngineSettings, has_bf16, make_accelerator, prepare, to_device, with_host_facts
from doremi_mix.models import TokenLossModel, enable_gradient_checkpointing
from doremi_mix.objectives import FinetuneObjective, MicroBatch, forward

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

SHAPES = {
    "7b": BAICHUAN2_7B,
    "tiny7b": ModelShape(128, 344, 4, 4, 4, 4096),
    "tiny": ModelShape(256, 688, 4, 4, 4, BAICHUAN2_7B.vocab_size),
    "trace": BAICHUAN2_7B,
}
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
CONTEST = LoraSettings(rank=8, alpha=16, target_modules=PROJECTIONS, dropout=0.1, shared_input=PROJECTIONS)
ADAPTER = "adapter"
NUM_DOMAINS = 20
LABEL_SHARE = 0.6
BUDGET_TOKENS, EPOCHS = 10_000_000, 3
INITIAL_STD = 0.02  # of transformers' random weights


def build_base(shape: ModelShape, length: int, dtype: torch.dtype, device: torch.device) -> Any:
    """Makes a frozen Llama with random weights where it will stay."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_key_value_heads,
        max_position_embeddings=max(length, 4096),
        initializer_range=INITIAL_STD,
        tie_word_embeddings=shape.tied_embeddings,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    with device:
        base = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return base.eval().requires_grad_(False)


def build(shape: ModelShape, length: int, dtype: torch.dtype, device: torch.device) -> TokenLossModel:
    """Makes the model with the contest's adapters, dropout on."""
    base = build_base(shape, length, dtype, device)
    add_adapter(base, ADAPTER, CONTEST, seed=42)
    set_adapter_dropout(base, on=True)
    return TokenLossModel(base, "", ADAPTER)


def make_batches(shape: ModelShape, num_batches: int, micro_batch: int, length: int) -> list[MicroBatch]:
    """Makes micro-batches of full sequences of random tokens; each is one document."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(num_batches):
        ids_BT = torch.randint(2, shape.vocab_size, (micro_batch, length), generator=generator)
        labels_BT = ids_BT.roll(-1, dims=1)
        labels_BT[:, : round((1 - LABEL_SHARE) * length)] = -100
        domain_ids_B = torch.randint(NUM_DOMAINS, (micro_batch,), generator=generator)
        batches.append(
            {
                "input_ids_BT": ids_BT,
                "labels_BT": labels_BT,
                "position_ids_BT": torch.arange(length).repeat(micro_batch, 1),
                "document_ids_BT": torch.zeros(micro_batch, length, dtype=torch.int32),
                "domain_ids_BT": domain_ids_B[:, None].repeat(1, length),
            }
        )
    return batches


class OurStep:
    """A step of stage finetune: objective, clipping and optimizer over batches that are on the device already."""

    def __init__(
        self,
        shape: ModelShape,
        batches: list[MicroBatch],
        length: int,
        *,
        gradient_checkpointing: bool,
        compiled: bool | None = None,
    ) -> None:
        self.accelerator = make_accelerator()
        dtype = torch.bfloat16 if has_bf16() else torch.float32
        self.model = build(shape, length, dtype, self.accelerator.device)
        engine = EngineSettings(gradient_checkpointing=gradient_checkpointing, compile=compiled)
        self.prepared = prepare(self.model, engine, self.accelerator, batches[0], 10_000, print_line)
        self.batches = [to_device(with_host_facts(batch, self.model), self.accelerator.device) for batch in batches]
        self.objective = FinetuneObjective([f"domain_{i}" for i in range(NUM_DOMAINS)], seed=42)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0, fused=True)

    def step(self) -> float:
        """Takes a step and returns its loss."""
        logged = self.objective.backward(self.prepared, self.batches, self.accelerator)
        self.accelerator.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        sums, counts = logged.tolist()
        return sum(sums) / sum(counts)

    def seconds(self, num_steps: int = 1) -> float:
        """Returns seconds per step."""
        synchronize()
        start = time.perf_counter()
        for _ in range(num_steps):
            self.step()
        synchronize()
        return (time.perf_counter() - start) / num_steps


class PlainStep:
    """What one writes without us: peft around the model, full logits, cross_entropy."""

    def __init__(self, shape: ModelShape, batches: list[MicroBatch], length: int) -> None:
        import peft

        base = build_base(shape, length, torch.float32, torch.device("cpu"))
        settings = peft.LoraConfig(
            r=CONTEST.rank, lora_alpha=16, lora_dropout=CONTEST.dropout, target_modules=list(PROJECTIONS)
        )
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # between its version and transformers'
            self.model = peft.get_peft_model(base, settings)
        self.model.train()
        self.batches = batches
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0, fused=True)

    def losses(self, batch: MicroBatch) -> Tensor:
        """Returns the mean loss of a batch."""
        logits_BTV = self.model(input_ids=batch["input_ids_BT"], use_cache=False).logits
        return F.cross_entropy(logits_BTV.float().flatten(0, 1), batch["labels_BT"].flatten(), ignore_index=-100)

    def seconds(self, num_steps: int = 1) -> float:
        """Returns seconds per step."""
        start = time.perf_counter()
        for _ in range(num_steps):
            for batch in self.batches:
                (self.losses(batch) / len(self.batches)).backward()
            nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return (time.perf_counter() - start) / num_steps


# --- 7b and tiny7b ---


def measure(
    name: str, micro_batch: int, length: int, sequences: int, repeats: int, compiled: bool | None
) -> dict[str, Any]:
    """Measures steps of one micro-batch size and checks that they are steps of the right model."""
    shape = SHAPES[name]
    num_batches = max(1, sequences // micro_batch)
    batches = make_batches(shape, num_batches, micro_batch, length)
    ours = OurStep(shape, batches, length, gradient_checkpointing=True, compiled=compiled)
    device = ours.accelerator.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    frozen = next(layer for layer in ours.model.modules() if isinstance(layer, nn.Embedding)).weight
    before = frozen[:64].clone()
    first = ours.step()
    check(shape, ours, first)
    ours.step()
    seconds = statistics.median(ours.seconds() for _ in range(repeats))
    if not torch.equal(frozen[:64], before):
        raise SystemExit("a frozen weight has changed")
    tokens = num_batches * micro_batch * length
    operations = {
        repeated: training_operations(
            shape,
            tokens,
            (length + 1) / 2,
            lora=CONTEST,
            gradient_checkpointing=repeated,
            label_share=LABEL_SHARE,
        )
        for repeated in (False, True)
    }
    rate = matmul_rate(device)
    parts = training_memory(
        shape,
        tokens_per_pass=micro_batch * length,
        lora=CONTEST,
        gradient_checkpointing=True,
        base_bits=16 if has_bf16() else 32,
        label_share=LABEL_SHARE,
    )
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "micro_batch": micro_batch,
        "tokens_per_second": tokens / seconds,
        "hours": EPOCHS * BUDGET_TOKENS * seconds / tokens / 3600,
        "mfu": operations[False] / seconds / H100.flops,
        "mfu_of_measured": operations[False] / seconds / rate,
        "busy_of_measured": operations[True] / seconds / rate,
        "matmul_tflops": rate / 1e12,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else math.nan,
        "reserved_gb": torch.cuda.max_memory_reserved() / 1e9 if on_gpu else math.nan,
        "counted_gb": (sum(parts.values()) - RESERVE_BYTES) / 1e9,
        "first_loss": first,
    }


def check(shape: ModelShape, ours: OurStep, first: float) -> None:
    """Holds the first step against what a random model must do."""
    expected = shape.num_lora_parameters(CONTEST.rank, PROJECTIONS, PROJECTIONS)
    found = num_trainable_parameters(ours.model)
    if found != expected:
        raise SystemExit(f"{found:,} parameters are trained, expected {expected:,}")
    # Hidden states are normalized, so logits are normal numbers of this variance.
    random_loss = math.log(shape.vocab_size) + shape.hidden_size * INITIAL_STD**2 / 2
    if abs(first - random_loss) > 0.1:
        raise SystemExit(f"the first loss is {first:.3f}, expected about {random_loss:.3f}")
    still = [name for name, parameter in ours.model.named_parameters() if "lora_B" in name and not parameter.any()]
    if still:
        raise SystemExit(f"a step left {len(still)} matrices of the adapters at zero, such as {still[0]}")


def matmul_rate(device: torch.device) -> float:
    """Returns operations per second of a large product, the most that this device gave."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(20):
        synchronize()
        start = time.perf_counter()
        for _ in range(5):
            a @ b
        synchronize()
        best = max(best, 5 * 2 * size**3 / (time.perf_counter() - start))
    return best


HEADER = (
    "what",
    "tokens/s",
    "MFU of 800 TFLOP/s",
    "MFU of a product's rate",
    "busy",
    "peak (reserved), counted GB",
    "hours for 3 x 10 M tokens",
    "command",
)


def show_measured(name: str, result: dict[str, Any], command: str) -> None:
    peak = "-" if math.isnan(result["peak_gb"]) else f"{result['peak_gb']:.1f} ({result['reserved_gb']:.1f})"
    cells = (
        f"{name}, micro-batch {result['micro_batch']}, {result['device']}",
        f"{result['tokens_per_second']:,.0f}",
        f"{result['mfu']:.3f}",
        f"{result['mfu_of_measured']:.3f} of {result['matmul_tflops']:.3g} TFLOP/s",
        f"{result['busy_of_measured']:.3f}",
        f"{peak}, {result['counted_gb']:.1f}",
        f"{result['hours']:.2f}",
        f"`{command}`",
    )
    print(f"| {' | '.join(cells)} |", flush=True)


# --- tiny ---


def compare(length: int, micro_batch: int, pairs: int) -> dict[str, float]:
    """Measures our step against the plain one on the same batches."""
    shape = SHAPES["tiny"]
    batches = make_batches(shape, 2, micro_batch, length)
    ours = OurStep(shape, batches, length, gradient_checkpointing=False)
    plain = PlainStep(shape, batches, length)
    check_equal(ours, plain)
    result = paired(plain.seconds, ours.seconds, pairs)
    tokens = len(batches) * micro_batch * length
    return {
        **result,
        "tokens_per_second": tokens / result["seconds"],
        "peak_bytes": peak_bytes(ours),
        "baseline_peak_bytes": peak_bytes(plain),
    }


def peak_bytes(step: OurStep | PlainStep) -> int:
    """Returns the most bytes that the tensors of a step take beside the model."""
    from live_bytes import LiveBytes

    live = LiveBytes()
    live.leave_out([*step.model.parameters(), *step.model.buffers()])
    with live:
        step.seconds()
    return live.peak


def check_equal(ours: OurStep, plain: PlainStep) -> None:
    """Checks that both have one loss and one gradient, with the same adapters and without dropout."""
    set_adapter_dropout(ours.model.model, on=False)
    plain.model.eval()
    mine = {_key(name): parameter for name, parameter in ours.model.named_parameters(remove_duplicate=False)}
    theirs = {_key(name): parameter for name, parameter in plain.model.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(mine[name])
    batch = ours.batches[0]
    loss_BT = forward(ours.model, batch)
    mean = loss_BT.sum() / (batch["labels_BT"] != -100).sum()
    mean.backward()
    expected = plain.losses(batch)
    expected.backward()
    off = abs(float((mean - expected).detach()))
    if off > 1e-4:
        raise SystemExit(f"our loss and the plain one differ by {off:.2g}")
    for name, parameter in theirs.items():
        # The first matrices have no gradient while the second are zero.
        if "lora_B" in name:
            got, wanted = mine[name].grad, parameter.grad
            assert got is not None
            assert wanted is not None
            off = float((got - wanted).norm() / wanted.norm())
            if off > 1e-3:
                raise SystemExit(f"our gradient of {name} and the plain one differ by {off:.2g} of it")
    for model in (ours.model, plain.model):
        model.zero_grad(set_to_none=True)
    set_adapter_dropout(ours.model.model, on=True)
    plain.model.train()


def _key(name: str) -> str:
    """Names a parameter of an adapter by its layer and matrix."""
    parts = name.split(".")
    return (
        ".".join(part for part in parts[parts.index("layers") :] if part not in (ADAPTER, "default"))
        if ("layers" in parts)
        else name
    )


# --- trace ---


def trace(micro_batch: int, length: int) -> dict[str, float]:
    """Runs a forward and backward pass over tensors without content and returns what is alive at its peak, in bytes."""
    from live_bytes import LiveBytes
    from torch._subclasses.fake_tensor import FakeTensorMode

    shape = SHAPES["trace"]
    model = build(shape, length, torch.bfloat16, torch.device("meta"))
    enable_gradient_checkpointing(model)
    mode = FakeTensorMode()
    _empty_tensors(model, mode)
    live = LiveBytes()
    live.leave_out([*model.parameters(), *model.buffers()])
    with _as_on_a_gpu(), mode:
        ids_BT = torch.zeros(micro_batch, length, dtype=torch.long)
        index_N = torch.zeros(round(LABEL_SHARE * ids_BT.numel()), dtype=torch.long)
        with live:
            with torch.autocast("cpu", torch.bfloat16):
                loss_BT = model(ids_BT, ids_BT, ids_BT, ids_BT, index_N)
            after_forward = live.now
            loss_BT.sum().backward()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    counted = training_memory(
        shape,
        tokens_per_pass=micro_batch * length,
        lora=CONTEST,
        gradient_checkpointing=True,
        label_share=LABEL_SHARE,
    )
    return {
        "weights": weights,
        "after_forward": weights + after_forward,
        "peak": weights + live.peak,
        "counted": sum(counted.values()) - RESERVE_BYTES,
    }


def show_traced(micro_batch: int, length: int, traced: dict[str, float]) -> None:
    weights, after_forward, peak, counted = (value / 1e9 for value in traced.values())
    print(
        f"7b, micro-batch {micro_batch} x {length:,}: weights {weights:.2f} GB, after the forward pass "
        f"{after_forward:.2f} GB, peak {peak:.2f} GB; counted {counted:.2f} GB",
        flush=True,
    )


def _empty_tensors(model: nn.Module, mode: Any) -> None:
    """Puts tensors in the place of a model's that have size and type, but no content."""
    from torch._subclasses.fake_tensor import FakeTensor

    def empty(tensor: Tensor) -> Tensor:
        content = torch.empty_like(tensor, device="meta")
        with mode:
            return FakeTensor(mode, content, torch.device("cpu"))

    known: dict[int, nn.Parameter] = {}
    for parameter in model.parameters():
        known[id(parameter)] = nn.Parameter(empty(parameter.detach()), requires_grad=parameter.requires_grad)
    for module in list(model.modules()):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = known[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = empty(buffer)


@contextlib.contextmanager
def _as_on_a_gpu() -> Any:
    """Leaves out what looks at numbers, and lets the loss work in blocks of a GPU's size."""
    kernels = doremi_mix.loss_kernels
    block_shape = kernels._block_shape
    with (
        mock.patch.object(doremi_mix.loss, "_check_labels"),
        mock.patch.object(kernels, "multiplies_into_float32", return_value=False),
        mock.patch.object(kernels, "_block_shape", lambda num, _device: block_shape(num, torch.device("cuda"))),
    ):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--micro-batch", type=int, nargs="+", help="sequences in a forward pass (8 and 64; tiny: 4)")
    parser.add_argument("--length", type=int, help="tokens in a sequence (1024; tiny: 256)")
    parser.add_argument("--sequences", type=int, default=64, help="in a step of 7b")
    parser.add_argument("--repeats", type=int, default=3, help="steps of 7b that are timed")
    parser.add_argument("--pairs", type=int, default=5, help="of tiny")
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto", help="torch.compile, of 7b")
    options = parser.parse_args()
    if options.shape == "7b" and not torch.cuda.is_available():
        raise SystemExit("--shape 7b needs a GPU; --shape trace shows its memory without, --shape tiny runs on a CPU")
    print(", ".join(f"{name} {value}" for name, value in describe_machine().items()), flush=True)
    command = " ".join(["python", "scripts/bench/finetune.py", *sys.argv[1:]])
    if options.shape == "tiny":
        micro_batch = (options.micro_batch or [4])[0]
        result = compare(options.length or 256, micro_batch, options.pairs)
        print(
            f"our step / transformers and peft  {result['ratio']:.3f} x  ({result['lowest']:.3f} to "
            f"{result['highest']:.3f}, {result['pairs']} pairs; {result['tokens_per_second']:,.0f} against "
            f"{result['tokens_per_second'] * result['seconds'] / result['baseline_seconds']:,.0f} tokens/s); "
            f"{result['peak_bytes'] / 1e6:,.0f} against {result['baseline_peak_bytes'] / 1e6:,.0f} MB beside the model"
        )
        return
    length = options.length or 1024
    if options.shape != "trace":
        print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}", flush=True)
    for micro_batch in options.micro_batch or [8, 64]:
        if options.shape == "trace":
            show_traced(micro_batch, length, trace(micro_batch, length))
            continue
        try:
            compiled = {"auto": None, "on": True, "off": False}[options.compile]
            result = measure(options.shape, micro_batch, length, options.sequences, options.repeats, compiled)
        except torch.OutOfMemoryError:
            print(f"| {options.shape}, micro-batch {micro_batch}: does not fit {'| ' * (len(HEADER) - 1)}|", flush=True)
        else:
            show_measured(options.shape, result, command)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
