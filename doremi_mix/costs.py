"""What training and scoring a large model cost, counted from its shape: operations, seconds and memory.

Counts, not measurements.  Operations are those of the matrix products (a product of M x K by K x N is 2 M K N), which
is what takes the time of a large model.  Memory is what tensors hold at the moment when they hold the most.  Bytes a
token are those of a Llama-like block under bf16 autocast, counted in a traced pass: what autograd keeps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from doremi_mix.errors import ModelError

if TYPE_CHECKING:
    from doremi_mix.adapters import LoraSettings


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a Llama-like model without biases.

    Attributes:
        hidden_size: D.
        intermediate_size: of the gated feed-forward layer.
        num_layers: transformer blocks.
        num_heads: of the queries.
        num_key_value_heads: of keys and values.
        vocab_size: V.
        tied_embeddings: whether the head is the embedding table.
        head_size: of one head; None for D / num_heads.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    vocab_size: int
    tied_embeddings: bool = False
    head_size: int | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """Reads the ``config.json`` of a Hugging Face model.

        Args:
            config: its content.

        Raises:
            ModelError: a size is missing.
        """

        def size(name: str) -> int:
            value = config.get(name)
            if not isinstance(value, int) or value < 1:
                raise ModelError(f"config.json: {name} must be a positive number, got {value!r}; is it a Llama's?")
            return value

        num_heads = size("num_attention_heads")
        return cls(
            hidden_size=size("hidden_size"),
            intermediate_size=size("intermediate_size"),
            num_layers=size("num_hidden_layers"),
            num_heads=num_heads,
            num_key_value_heads=config.get("num_key_value_heads") or num_heads,
            vocab_size=size("vocab_size"),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            head_size=config.get("head_dim"),
        )

    @property
    def query_size(self) -> int:
        """Numbers in the queries of a token."""
        return self.num_heads * (self.head_size or self.hidden_size // self.num_heads)

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of the linear layers of a block, by name, in the order in which they are computed."""
        D, inside, queries = self.hidden_size, self.intermediate_size, self.query_size
        keys = queries * self.num_key_value_heads // self.num_heads
        return {
            "q_proj": (D, queries),
            "k_proj": (D, keys),
            "v_proj": (D, keys),
            "o_proj": (queries, D),
            "gate_proj": (D, inside),
            "up_proj": (D, inside),
            "down_proj": (inside, D),
        }

    @property
    def num_block_parameters(self) -> int:
        """Parameters in the linear layers of one block."""
        return sum(inputs * outputs for inputs, outputs in self.projections.values())

    @property
    def num_head_parameters(self) -> int:
        """Parameters in the matrix that makes the logits."""
        return self.vocab_size * self.hidden_size

    @property
    def num_matrix_parameters(self) -> int:
        """Parameters that each token is multiplied with: without the embedding table, which is looked up."""
        return self.num_layers * self.num_block_parameters + self.num_head_parameters

    @property
    def num_parameters(self) -> int:
        """All parameters, tied ones once.

        Example:
            >>> BAICHUAN2_7B.num_parameters
            7505973248
        """
        norms = (2 * self.num_layers + 1) * self.hidden_size
        table = 0 if self.tied_embeddings else self.num_head_parameters
        return self.num_matrix_parameters + table + norms

    def num_lora_parameters(
        self, rank: int, target_modules: tuple[str, ...] | None = None, shared_input: tuple[str, ...] = ()
    ) -> int:
        """Counts the parameters of adapters, as ``adapters.LoraSettings`` describes them.

        Args:
            rank: of the matrices.
            target_modules: layers of a block that get an adapter; None for all.
            shared_input: those of them that share their first matrix.

        Raises:
            ModelError: a target is no layer of the block.

        Example:
            >>> BAICHUAN2_7B.num_lora_parameters(8, ("q_proj", "k_proj", "v_proj"))
            6291456
        """
        targets = self._targets(target_modules)
        outputs = sum(self.projections[name][1] for name in targets)
        return self.num_layers * rank * (outputs + sum(self._adapter_inputs(targets, shared_input).values()))

    def _targets(self, target_modules: tuple[str, ...] | None) -> tuple[str, ...]:
        targets = tuple(self.projections) if target_modules is None else target_modules
        for target in targets:
            if target not in self.projections:
                raise ModelError(
                    f"lora_target_modules: {target} is no layer of a block; choose from {', '.join(self.projections)}"
                )
        return targets

    def _adapter_inputs(self, targets: tuple[str, ...], shared_input: tuple[str, ...]) -> dict[str, int]:
        """Returns the inputs of each first matrix of an adapter, by the first layer that reads its product."""
        sharing = [name for name in targets if name in shared_input]
        return {name: self.projections[name][0] for name in targets if name not in sharing[1:]}


BAICHUAN2_7B = ModelShape(
    hidden_size=4096,
    intermediate_size=11_008,
    num_layers=32,
    num_heads=32,
    num_key_value_heads=32,
    vocab_size=125_696,
)


@dataclass(frozen=True, slots=True)
class Device:
    """An accelerator.

    Attributes:
        name: for tables.
        memory_bytes: that it has.
        flops: operations per second in dense bf16 matrix products, as measured, not as advertised.
        copy_bytes_per_second: of its memory.
    """

    name: str
    memory_bytes: float
    flops: float
    copy_bytes_per_second: float


H100 = Device("H100 80 GB", 80e9, 800e12, 3.0e12)
"""Large bf16 products of random data reach 800 TFLOP/s on an H100 SXM (of 989 advertised), copies 3.0 TB/s."""

TRAINING_UTILIZATION = 0.48
"""Measured: the share of ``Device.flops`` that adapters over a 7B reach on an H100 without torch.compile, recomputed
operations counted (scripts/bench/finetune.py).  A tuned trainer of a 1.1 B model published 0.56, of an A100."""
SCORING_UTILIZATION = 0.40
"""Assumed, of forward passes over prompts of about a thousand tokens, several at once."""
SMALL_MODEL_UTILIZATION = 0.35
"""Measured, of models of about 100 M parameters on an H100 with torch.compile (scripts/bench/train.py); the official
DoReMi code reached 0.24 on A100s, by its published throughput."""

TRAINED_BYTES = 4 + 4 + 8
"""Of a trained parameter: float32 weight, gradient, and the two moments of AdamW."""
RESERVE_BYTES = 2e9
"""Assumed, for what is counted nowhere: the CUDA context and its libraries, and fragmentation of the allocator."""
LOGIT_BLOCK = 2**25
"""Logits that the loss holds at once on a GPU, in float32 and, as a gradient, in bf16."""


def training_operations(
    shape: ModelShape,
    num_tokens: float,
    mean_context: float,
    *,
    lora: LoraSettings | None = None,
    gradient_checkpointing: bool = False,
    label_share: float = 1.0,
) -> float:
    """Counts the operations of a forward and backward pass.

    Per token, with P parameters in the linear layers of all blocks, H in the head, A in the adapters, L blocks, D
    inputs of a block, Q numbers in the queries, and C tokens in ``mean_context``::

        forward             2 P + 2 A + 4 L Q C
        backward            2 P + 4 A + 8 L Q C       frozen weights get no gradient of their own ...
                          - 2 (q, k, v of one block)  ... nor does what the first block reads
                            4 P     + 8 L Q C         without adapters, for all weights are trained
        checkpointing       2 P + 2 A + 4 L Q C - 2 (the last product of each block, which no gradient needs)
        head                6 H of each token that counts (the logits are made twice), 8 H when it is trained

    For MFU count without checkpointing: recomputed operations are no progress.  With adapters neither on q, k nor v,
    the first block's attention needs no gradient either; that is not taken off.

    Args:
        shape: of the model.
        num_tokens: that go through it.
        mean_context: tokens that a token attends to, itself included, on average: (T + 1) / 2 in a document of T, or
            T where a kernel computes what the mask throws away.
        lora: the adapters that are trained over frozen weights; None to train all weights.
        gradient_checkpointing: blocks are computed again for the backward pass.
        label_share: share of the tokens whose loss counts.
    """
    blocks = float(shape.num_layers * shape.num_block_parameters)
    attention = 4.0 * shape.num_layers * shape.query_size * mean_context
    head = 6.0 * shape.num_head_parameters
    if lora is None:
        adapters = 0
        backward = 4 * blocks + 2 * attention
        head += 2.0 * shape.num_head_parameters
    else:
        adapters = shape.num_lora_parameters(lora.rank, lora.target_modules, lora.shared_input)
        backward = 2 * blocks + 4 * adapters + 2 * attention - _unread_gradient(shape, lora)
    total = 2 * blocks + 2 * adapters + attention + backward + label_share * head
    if gradient_checkpointing:
        total += 2 * blocks + 2 * adapters + attention - shape.num_layers * _last_product(shape, lora)
    return num_tokens * total


def _unread_gradient(shape: ModelShape, lora: LoraSettings) -> float:
    """Operations per token of the gradient of the frozen embeddings, which nobody computes."""
    readers = ("q_proj", "k_proj", "v_proj")
    targets = tuple(name for name in shape._targets(lora.target_modules) if name in readers)
    of_base = sum(inputs * outputs for inputs, outputs in (shape.projections[name] for name in readers))
    return 2.0 * (of_base + lora.rank * sum(shape._adapter_inputs(targets, lora.shared_input).values()))


def _last_product(shape: ModelShape, lora: LoraSettings | None) -> float:
    """Operations per token of what a block computes after all that its gradient needs."""
    inputs, outputs = shape.projections["down_proj"]
    if lora is not None and "down_proj" in shape._targets(lora.target_modules):
        return 2.0 * lora.rank * outputs
    return 2.0 * inputs * outputs


def inference_operations(
    shape: ModelShape, num_tokens: float, mean_context: float, *, label_share: float = 1.0
) -> float:
    """Counts the operations of a forward pass: 2 of each parameter and 4 L Q C a token, as in ``training_operations``.

    Args:
        shape: of the model.
        num_tokens: that go through it.
        mean_context: tokens that a token attends to, itself included, on average.
        label_share: share of the tokens for which logits are made.
    """
    blocks = shape.num_layers * (2.0 * shape.num_block_parameters + 4.0 * shape.query_size * mean_context)
    return num_tokens * (blocks + label_share * 2.0 * shape.num_head_parameters)


def seconds(operations: float, device: Device, utilization: float) -> float:
    """Returns how long operations take.

    Args:
        operations: of a pass.
        device: that computes them.
        utilization: share of its rate that is reached.

    Example:
        >>> seconds(3.2e14, H100, 0.40)
        1.0
    """
    return operations / (device.flops * utilization)


def generation_seconds(shape: ModelShape, num_steps: float, device: Device, *, base_bits: float = 16) -> float:
    """Returns the least time that writing tokens takes: each step reads all weights, whatever the batch.

    Args:
        shape: of the model.
        num_steps: tokens that are written, one after the other.
        device: that computes.
        base_bits: of a weight.
    """
    return num_steps * shape.num_matrix_parameters * base_bits / 8 / device.copy_bytes_per_second


def activation_bytes(shape: ModelShape, lora: LoraSettings | None = None) -> float:
    """Counts what one block keeps of a token for its gradient, under bf16 autocast with fused attention.

    With all weights trained it is 34 D + 8 I, for D the hidden and I the intermediate size.  A frozen layer does not
    keep its input, so over bf16 weights that are frozen it is less, for Q numbers in the queries and K in the keys::

        norms 8 D, attention 4 Q + 4 K, feed-forward 6 I, and of each input of an adapter 2, with dropout 3

    Args:
        shape: of the model; where keys have fewer heads, trained weights keep somewhat less than this.
        lora: the adapters; None where all weights are trained.
    """
    D, inside = shape.hidden_size, shape.intermediate_size
    if lora is None:
        return 34.0 * D + 8.0 * inside
    targets = shape._targets(lora.target_modules)
    adapted = sum(shape._adapter_inputs(targets, lora.shared_input).values())
    attention = 4.0 * shape.query_size + 4.0 * shape.projections["k_proj"][1]
    return 8.0 * D + attention + 6.0 * inside + (3.0 if lora.dropout else 2.0) * adapted


def _gradient_bytes(shape: ModelShape, lora: LoraSettings | None) -> float:
    """Counts the gradients of a token in the middle of a feed-forward layer, where a block has the most at once."""
    # Those of its product and of both factors.
    result = 6.0 * shape.intermediate_size
    if lora is not None and "down_proj" in shape._targets(lora.target_modules):
        # Those that come through the adapter are float32, before and after the dropout.
        result += (8.0 if lora.dropout else 4.0) * shape.intermediate_size
    return result


def weight_bytes(shape: ModelShape, base_bits: float = 16) -> float:
    """Counts the bytes of frozen weights.

    Args:
        shape: of the model.
        base_bits: of a weight in the blocks' linear layers; 4.13 for NF4 with quantized constants.  Embeddings, head
            and norms have 16 at least.
    """
    blocks = shape.num_layers * shape.num_block_parameters
    return blocks * base_bits / 8 + (shape.num_parameters - blocks) * max(base_bits, 16) / 8


def training_memory(
    shape: ModelShape,
    *,
    tokens_per_pass: int,
    lora: LoraSettings | None = None,
    gradient_checkpointing: bool = False,
    base_bits: float = 16,
    label_share: float = 1.0,
) -> dict[str, float]:
    """Counts the memory of training at its peak, in bytes by part; the parts add up to it.

    Not in it: what lies before the first block and after the last, batches, and masks of attention that is not fused.

    - ``weights``: those that are frozen; all are where there are adapters, none where not.
    - ``trained``: what is trained, in float32 with gradient and AdamW's moments; all weights, or the adapters.
    - ``kept``: what the blocks keep from the forward pass: everything, or with checkpointing the input of each.
    - ``working``: what is there for a moment only, on top of all that: the gradients in one block, and with
      checkpointing its activations, or the loss if that is more.
    - ``reserve``: ``RESERVE_BYTES``, as assumed.

    Args:
        shape: of the model.
        tokens_per_pass: tokens of a micro-batch, padding included.
        lora: the adapters that are trained over frozen weights; None to train all weights.
        gradient_checkpointing: blocks are computed again for the backward pass.
        base_bits: of a frozen weight.
        label_share: share of the tokens whose loss counts.
    """
    D = shape.hidden_size
    if lora is None:
        weights, num_trained = 0.0, shape.num_parameters
        # Autocast keeps the weights that it rounded until the forward pass ends, or until they got their gradient.
        rounded, hidden_bytes = 2.0 * shape.num_matrix_parameters, 4.0
    else:
        weights = weight_bytes(shape, base_bits)
        num_trained = shape.num_lora_parameters(lora.rank, lora.target_modules, lora.shared_input)
        rounded, hidden_bytes = 2.0 * num_trained, 2.0
    own = activation_bytes(shape, lora)
    gradients = _gradient_bytes(shape, lora) + hidden_bytes * D
    block = tokens_per_pass * gradients
    kept = rounded + shape.num_layers * tokens_per_pass * own
    if gradient_checkpointing:
        block += tokens_per_pass * own + rounded / shape.num_layers
        kept = shape.num_layers * tokens_per_pass * hidden_bytes * D
    # Hidden states of the labels, their gradient and its float32 sum; and the gradient of the last block's output.
    loss = LOGIT_BLOCK * 6.0 + tokens_per_pass * D * (label_share * 8.0 + hidden_bytes)
    if gradient_checkpointing:
        loss += rounded
    return {
        "weights": weights,
        "trained": float(TRAINED_BYTES * num_trained),
        "kept": kept,
        "working": max(block, loss),
        "reserve": RESERVE_BYTES,
    }


def scoring_memory(
    shape: ModelShape, *, tokens_per_pass: int, num_logits: float | None = None, base_bits: float = 16
) -> dict[str, float]:
    """Counts the memory of forward passes without gradient, in bytes by part; the parts add up to the peak.

    Args:
        shape: of the model.
        tokens_per_pass: tokens of a batch, padding included.
        num_logits: numbers in the logits that exist at once, in bf16 and as float32 log-probabilities; None for those
            of all tokens, as lm-eval makes them.
        base_bits: of a weight.
    """
    logits = tokens_per_pass * shape.vocab_size if num_logits is None else num_logits
    # The gate, its activation, the other half and their product; hidden state, its norm, queries, keys and values.
    block = tokens_per_pass * (8.0 * shape.intermediate_size + 2.0 * 6 * shape.hidden_size)
    return {
        "weights": weight_bytes(shape, base_bits),
        "working": max(block, 6.0 * logits),
        "reserve": RESERVE_BYTES,
    }
