"""Settings that nobody gave: chosen for the hardware and the data, and what the run will cost.

``choose`` is a pure function of the configuration, the number of domains and the kind of hardware, so that a run
resumed on another machine of the same kind makes the same choices (the run directory keeps the kind).  ``estimate``
measures.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from doremi_mix.config import Config, TrainingConfig
from doremi_mix.finetune_plan import choose_finetune
from doremi_mix.presets import PRESETS, Preset, is_config_only

if TYPE_CHECKING:
    import torch

    from doremi_mix.adapters import LoraSettings
    from doremi_mix.models import TokenInfo, TokenLossModel

CPU_STEPS = 400
CUDA_STEPS = 2_000
CUDA_BATCH_SIZE = 64
CPU_BATCH_SIZE = 24
CUDA_COMPARE_BATCH_SIZE = 32
CPU_COMPARE_BATCH_SIZE = 8
HEADROOM_SHRINK = 0.5
"""What scripts/study found: half of the way from uniform to the headroom is better than all of it."""
NUM_MIXTURES = 4
"""Learned, natural, uniform and temperature: what compare always trains on."""
LEAST_STEPS = 100
USUAL_FILL = 0.9
"""Share of a packed sequence that is not padding."""
CHECKPOINT_LEARNING_RATE = 2e-5
LORA_LEARNING_RATE = 2e-4
EMBEDDING_FACTOR = 10
"""Fresh embeddings must grow far from their small start before a model can learn more than how common each token is; at
the rate of the other matrices that takes most of a short training."""
GPU_DEVICES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/kfd")
"""Where Linux shows GPUs: NVIDIA's, those of Windows under WSL, AMD's."""
MICRO_BATCH_TOKENS = 65_536
"""Tokens in one forward pass at most."""
UNKNOWN_MODEL_TOKENS = 16_384
"""Tokens in one forward pass on a GPU of a model whose size is not known before it is loaded."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What training will take.

    Attributes:
        seconds: by stage; empty when the model is too large to be tried out.
        num_parameters: of the proxy model.
        tokens: by stage, the tokens that go through the model.
    """

    seconds: dict[str, float]
    num_parameters: int
    tokens: dict[str, int]


def detect_hardware() -> str:
    """Returns ``cuda`` or ``cpu``."""
    if sys.platform == "linux" and not any(map(os.path.exists, GPU_DEVICES)):
        return "cpu"  # told without torch, which takes a second to load
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def choose(config: Config, num_domains: int, hardware: str) -> Config:
    """Fills every setting that is null.

    Args:
        config: as given.
        num_domains: K; a batch has at least two sequences of every domain unless it is given.
        hardware: ``cuda`` or ``cpu``.

    Returns:
        A configuration without choices left.
    """
    on_gpu = hardware == "cuda"
    reference = config.reference
    model = reference.model or config.proxy.model or ("120m" if on_gpu else "tiny")
    # What a checkpoint does not tell us is taken from the size that the hardware would get.
    preset = PRESETS.get(model, PRESETS["120m" if on_gpu else "tiny"])
    tokenize = config.tokenize.model_copy(
        update={
            "vocab_size": config.tokenize.vocab_size or preset.vocab_size,
            "context_length": config.tokenize.context_length or preset.context_length,
            # A checkpoint's embeddings mean something under its own tokenizer only.
            "tokenizer": config.tokenize.tokenizer or (None if model in PRESETS or is_config_only(model) else model),
        }
    )
    assert tokenize.context_length is not None
    by_headroom = config.proxy.method == "headroom"
    least = CUDA_BATCH_SIZE if on_gpu else CPU_BATCH_SIZE
    full_batch = max(least, 2 * num_domains)
    full_steps = CUDA_STEPS if on_gpu else CPU_STEPS
    most_tokens = full_steps * full_batch * tokenize.context_length
    if by_headroom:
        # Only an average over many batches counts, and small batches make more of few tokens.
        full_batch = max(CUDA_COMPARE_BATCH_SIZE if on_gpu else CPU_COMPARE_BATCH_SIZE, num_domains)
    batch_size = reference.batch_size or config.proxy.batch_size or full_batch
    if by_headroom:
        # Slopes differ along a learning curve: those at the end of the main training count.
        budget = min(config.proxy.token_budget or most_tokens, most_tokens)
        full_steps = max(LEAST_STEPS, round(budget / (USUAL_FILL * batch_size * tokenize.context_length)))
    steps = reference.steps or (2 * (config.proxy.steps or 0) if by_headroom else config.proxy.steps) or full_steps

    def rate(name: str, lora_rank: int | None) -> float:
        if lora_rank is not None:
            return LORA_LEARNING_RATE
        if name in PRESETS:
            return PRESETS[name].learning_rate
        # Fresh weights of some size are trained like those that the hardware would get.
        return preset.learning_rate if is_config_only(name) else CHECKPOINT_LEARNING_RATE

    def filled(section: TrainingConfig, like: TrainingConfig, lora_like: TrainingConfig) -> dict[str, object]:
        own_model = section.model or like.model or model
        same_model = own_model == like.model
        adapters = lora_like if section.lora_rank is None and own_model == lora_like.model else section
        own_rank = adapters.lora_rank
        same_rate = like.learning_rate if same_model and own_rank == like.lora_rank else None
        own_batch = section.batch_size or like.batch_size or batch_size
        own_steps = section.steps or like.steps or steps
        own_rate = section.learning_rate or same_rate or rate(own_model, own_rank)
        return {
            "model": own_model,
            "learning_rate": own_rate,
            "embedding_learning_rate": section.embedding_learning_rate
            or (like.embedding_learning_rate if same_rate == own_rate else None)
            or _embedding_factor(own_model) * own_rate,
            "lora_rank": own_rank,
            "lora_alpha": section.lora_alpha or adapters.lora_alpha,
            "lora_target_modules": section.lora_target_modules or adapters.lora_target_modules,
            "trust_remote_code": section.trust_remote_code or (same_model and like.trust_remote_code),
            "gradient_accumulation_steps": section.gradient_accumulation_steps or like.gradient_accumulation_steps,
            "gradient_checkpointing": _first(section.gradient_checkpointing, like.gradient_checkpointing, False),
            "shard": _first(section.shard, like.shard),
            "compile": _first(section.compile, like.compile),
            "batch_size": own_batch,
            "steps": own_steps,
            "checkpoint_every": section.checkpoint_every or max(1, math.ceil(own_steps / 20)),
        }

    # A model that the reference has from the proxy comes with its adapters.
    donor = config.proxy if reference.model is None and config.proxy.model is not None else reference
    own_weights: dict[str, object] = {"weights": reference.weights or ("uniform" if by_headroom else "natural")}
    if by_headroom and reference.folds is None:
        # Where the reference repeats a domain, headroom is measured on held-out text.
        own_weights["folds"] = 1
    new_reference = reference.model_copy(update=filled(reference, reference, donor) | own_weights)
    proxy = config.proxy
    if by_headroom and proxy.steps is None:
        # Headroom is what the other half of the reference's training brought.
        assert new_reference.steps is not None
        proxy = proxy.model_copy(update={"steps": max(1, new_reference.steps // 2)})
    new_proxy = proxy.model_copy(update=filled(proxy, new_reference, new_reference))
    compare = config.compare
    # Plain training needs no batch that holds every domain, and small batches make more of few tokens.
    own_batch = {
        "batch_size": compare.batch_size or (CUDA_COMPARE_BATCH_SIZE if on_gpu else CPU_COMPARE_BATCH_SIZE),
        # Micro-batches of another batch say nothing about this one's.
        "gradient_accumulation_steps": compare.gradient_accumulation_steps,
        # They follow from the data.
        "steps": None,
    }
    wanted = config.mixture.token_budget or config.proxy.token_budget or most_tokens
    own_budget = {"token_budget": compare.token_budget or min(wanted, most_tokens)}
    shrink = config.weights.shrink
    if shrink is None:
        shrink = HEADROOM_SHRINK if by_headroom else 0.0
    return config.model_copy(
        update={
            "tokenize": tokenize,
            "reference": new_reference,
            "proxy": new_proxy,
            "weights": config.weights.model_copy(update={"shrink": shrink}),
            "compare": compare.model_copy(update=filled(compare, new_proxy, new_proxy) | own_batch | own_budget),
            "finetune": choose_finetune(config, hardware),
        }
    )


def _embedding_factor(model: str) -> float:
    """Returns how much faster the embeddings learn than the other matrices; trained ones need no haste."""
    if model in PRESETS:
        return PRESETS[model].embedding_factor
    return EMBEDDING_FACTOR if is_config_only(model) else 1.0


def _first(*values: bool | None) -> bool | None:
    """Returns the first value that was given."""
    return next((value for value in values if value is not None), None)


def lora_settings(section: TrainingConfig) -> LoraSettings | None:
    """Returns what adapters a section asks for, if any."""
    from doremi_mix.adapters import LoraSettings

    if section.lora_rank is None:
        return None
    return LoraSettings(
        rank=section.lora_rank,
        alpha=section.lora_alpha or 2.0 * section.lora_rank,
        target_modules=section.lora_target_modules,
    )


def new_model(section: TrainingConfig, tokens: TokenInfo, context_length: int, adapter: str) -> TokenLossModel:
    """Builds or loads the model that a section names, ready to be trained.

    Args:
        section: of a stage, without choices left.
        tokens: of the run's tokenizer.
        context_length: tokens in a packed sequence.
        adapter: what to call the LoRA adapter, where there is one.
    """
    from doremi_mix.models import build_model

    assert section.model is not None
    return build_model(
        section.model,
        tokens,
        context_length,
        section.seed,
        trust_remote_code=section.trust_remote_code,
        lora=lora_settings(section),
        adapter=adapter,
        base_dtype=base_dtype(section),
    )


def base_dtype(section: TrainingConfig) -> torch.dtype | None:
    """Returns the number format of a base model under adapters; None where the weights are trained, in float32."""
    import torch

    from doremi_mix.engine import has_bf16

    # A frozen base gets no updates that bf16 could lose, and takes half the memory.
    return torch.bfloat16 if section.lora_rank is not None and has_bf16() else None


def accumulation(section: TrainingConfig, context_length: int, num_processes: int) -> int:
    """Returns the micro-batches per step and process: as given, else so that each fits the memory."""
    if section.gradient_accumulation_steps is not None:
        return section.gradient_accumulation_steps
    assert section.batch_size is not None
    fitting = tokens_that_fit(
        str(section.model),
        adapters=section.lora_rank is not None,
        gradient_checkpointing=bool(section.gradient_checkpointing),
        trust_remote_code=section.trust_remote_code,
    )
    wanted = math.ceil(section.batch_size * context_length / (fitting * num_processes))
    return max(1, min(wanted, section.batch_size // num_processes))


def tokens_that_fit(model: str, *, adapters: bool, gradient_checkpointing: bool, trust_remote_code: bool) -> int:
    """Returns how many tokens one forward and backward pass may have, at most ``MICRO_BATCH_TOKENS``.

    Args:
        model: a preset, or what loads it.
        adapters: whether adapters are what is trained.
        gradient_checkpointing: whether blocks are computed again for the backward pass.
        trust_remote_code: let a hub model run its own code.
    """
    import torch

    if not torch.cuda.is_available() or gradient_checkpointing:
        return MICRO_BATCH_TOKENS
    sizes = _sizes(model, trust_remote_code=trust_remote_code)
    if sizes is None:
        return UNKNOWN_MODEL_TOKENS
    num_layers, hidden_size, intermediate_size = sizes
    # What a Llama-like block keeps of a token for its gradient, in bytes, counted in a traced pass in bf16; adapters
    # keep their inputs, too.
    per_token = num_layers * ((48 if adapters else 34) * hidden_size + 8 * intermediate_size)
    memory = torch.cuda.get_device_properties(0).total_memory
    return max(512, min(MICRO_BATCH_TOKENS, int(0.6 * memory / per_token)))


def _sizes(model: str, *, trust_remote_code: bool) -> tuple[int, int, int] | None:
    """Returns layers, hidden and intermediate size of a model, where its configuration has them."""
    preset = PRESETS.get(model)
    if preset is not None:
        return preset.num_layers, preset.hidden_size, preset.intermediate_size
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError):
        return None
    names = ("num_hidden_layers", "hidden_size", "intermediate_size")
    num_layers, hidden_size, intermediate_size = (getattr(config, name, 0) for name in names)
    return (num_layers, hidden_size, intermediate_size) if num_layers and hidden_size and intermediate_size else None


def estimate(config: Config, tokens: TokenInfo, *, max_parameters: int = 1_000_000_000) -> Estimate:
    """Measures a training step of the chosen models on random tokens and multiplies.

    Args:
        config: without choices left.
        tokens: of the tokenizer that will be used.
        max_parameters: models larger than this are not built to be tried out.

    Returns:
        Seconds and tokens for reference, reference_losses and proxy, over all seeds and rounds, and for compare where
        it is part of the run.  A process's random state is left as it was.
    """
    reference, proxy = config.reference, config.proxy
    context_length = config.tokenize.context_length
    assert context_length and reference.steps and reference.batch_size and proxy.steps and proxy.batch_size
    # Rounds may end earlier.  Whether folds are needed where their number is not given, the tokenized data will tell.
    num_proxies = config.weights.num_seeds * config.weights.max_rounds
    num_references = (reference.folds or 1) * (
        num_proxies if config.weights.vary_reference else config.weights.max_rounds
    )
    amounts = {
        "reference": num_references * reference.steps * reference.batch_size * context_length,
        "reference_losses": num_proxies * proxy.steps * proxy.batch_size * context_length,
        "proxy": num_proxies * proxy.steps * proxy.batch_size * context_length,
    }
    if config.compare.in_run:
        assert config.compare.token_budget is not None
        num_models = (NUM_MIXTURES + len(config.compare.also)) * config.compare.num_seeds
        amounts["compare"] = round(num_models * config.compare.token_budget / USUAL_FILL)
    sizes = [_num_parameters(str(section.model), tokens) for section in (reference, proxy)]
    if any(size is None or size > max_parameters for size in sizes):
        return Estimate({}, sizes[1] or 0, amounts)
    steps = _measure_steps(config, tokens)
    if steps is None:
        return Estimate({}, sizes[1] or 0, amounts)
    of_reference, of_proxy = steps
    reference_batch = reference.batch_size * context_length
    proxy_batch = proxy.batch_size * context_length
    # With micro-batches, a first pass without gradient finds the weights.
    proxy_step = of_proxy.train_seconds + (of_proxy.score_seconds if of_proxy.parts > 1 else 0)
    per_token = {
        "reference": of_reference.train_seconds / reference_batch,
        "reference_losses": of_reference.score_seconds / reference_batch,
        "proxy": proxy_step / proxy_batch,
        "compare": of_proxy.train_seconds / proxy_batch,
    }
    seconds = {name: per_token[name] * amount for name, amount in amounts.items()}
    return Estimate(seconds, of_proxy.num_parameters, amounts)


class _Step(NamedTuple):
    train_seconds: float
    score_seconds: float
    parts: int
    num_parameters: int


def _measure_steps(config: Config, tokens: TokenInfo) -> tuple[_Step, _Step] | None:
    """Measures a step of the reference and of the proxy; None where it does not fit the GPU's memory.

    Training says what to do about that; an estimate is no reason to stop.
    """
    import torch

    reference, proxy = config.reference, config.proxy
    result = None
    with contextlib.suppress(torch.OutOfMemoryError):
        of_reference = _measure_step(config, reference, tokens)
        same = _step_of(proxy) == _step_of(reference)
        result = of_reference, of_reference if same else _measure_step(config, proxy, tokens)
    # The models sit in reference cycles, and after an error in its frames.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return result


def _num_parameters(model: str, tokens: TokenInfo) -> int | None:
    """Returns the size of a preset or of a local checkpoint (from its files), or None."""
    from pathlib import Path

    preset: Preset | None = PRESETS.get(model)
    if preset is not None:
        return preset.num_parameters(tokens.vocab_size)
    if model.endswith(".gguf") and Path(model).exists():
        return Path(model).stat().st_size * 2  # about four bits each
    files = [*Path(model).glob("*.safetensors"), *Path(model).glob("*.bin")] if Path(model).is_dir() else []
    # Two bytes a parameter is the smallest usual storage, so this never calls a large model small.
    return sum(file.stat().st_size for file in files) // 2 if files or Path(model).exists() else None


def _step_of(section: TrainingConfig) -> tuple[object, ...]:
    """What the time of a step depends on."""
    keys = {"model", "batch_size", "lora_rank", "lora_target_modules", "gradient_checkpointing"}
    return tuple(section.model_dump(include={*keys, "gradient_accumulation_steps"}).values())


def _measure_step(config: Config, section: TrainingConfig, tokens: TokenInfo) -> _Step:
    """Measures seconds for a training step and for scoring the same batch."""
    import torch

    from doremi_mix.adapters import remove_adapter
    from doremi_mix.engine import EngineSettings, make_accelerator, prepare_to_score
    from doremi_mix.models import enable_gradient_checkpointing, num_parameters

    assert section.batch_size and config.tokenize.context_length
    T = config.tokenize.context_length
    with torch.random.fork_rng():
        model = new_model(section, tokens, T, "estimate")
        accelerator = make_accelerator()
        if section.gradient_checkpointing:
            enable_gradient_checkpointing(model)
        # Not split, and unwrapped on purpose: an estimate needs no exchange between processes.
        model = prepare_to_score(model, EngineSettings(), accelerator, alone=True)
        parts = accumulation(section, T, accelerator.num_processes)
        B = max(1, section.batch_size // (parts * accelerator.num_processes))
        ids_BT = torch.randint(tokens.vocab_size, (B, T), device=accelerator.device)
        labels_BT = ids_BT.masked_fill(torch.rand(B, T, device=accelerator.device) < 0.5, -100)
        positions_BT = torch.arange(T, device=accelerator.device).expand(B, T)
        documents_BT = torch.zeros_like(ids_BT)

        def run(*, train: bool) -> float:
            start = time.perf_counter()
            with torch.set_grad_enabled(train), accelerator.autocast():
                loss = model(ids_BT, labels_BT, positions_BT, documents_BT).sum()
            if train:
                loss.backward()
                model.zero_grad(set_to_none=True)
            loss.item()
            return time.perf_counter() - start

        try:
            run(train=True)
            train_seconds = min(run(train=True) for _ in range(2))
            score_seconds = min(run(train=False) for _ in range(2))
            size = num_parameters(model)
        finally:
            if model.adapter is not None:
                # The base stays in memory for the stages to come.
                remove_adapter(model.model, model.adapter)
    return _Step(train_seconds * parts, score_seconds * parts, parts, size)
