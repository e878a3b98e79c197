"""What a training step minimizes: the plain loss, or the proxy's, whose excess losses move the domain weights.

Axes: B sequences (of a micro-batch), T tokens, K domains.  An effective batch is split over processes and
micro-batches; the gradient does not depend on how (up to the order of sums).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from doremi_mix.dro import DomainSums, domain_sums, weighted_loss
from doremi_mix.types import Domains

MicroBatch = dict[str, Tensor]
"""Tensors of one forward pass: input_ids_BT, labels_BT, position_ids_BT, document_ids_BT, domain_ids_B (of a fine-tune,
whose sequences mix domains: domain_ids_BT), optionally what the host knows and the device would have to ask for
(label_index_N, document_starts_C), and, for the proxy, reference_loss_BT."""


class StepRecord(NamedTuple):
    """What one step has to say.

    Attributes:
        loss: that was minimized, nats per token.
        num_tokens: unmasked tokens of the effective batch.
        by_domain: numbers of each domain, one line of the objective's own log; None for plain training.
    """

    loss: float
    num_tokens: int
    by_domain: dict[str, Any] | None = None


class Objective(Protocol):
    """What a training step minimizes.

    Attributes:
        domain_log: the file that its numbers by domain go to; None where it has none.
    """

    domain_log: str | None

    def backward(self, model: Any, batches: Sequence[MicroBatch], accelerator: Any) -> Tensor:
        """Adds the gradient of one step; returns what to log, still on the device."""
        ...

    def record(self, step: int, logged: Tensor) -> StepRecord:
        """Turns what was logged into plain numbers."""
        ...

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint must keep."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Takes back what ``state`` returned."""
        ...


class PlainObjective:
    """The mean loss over the unmasked tokens of the effective batch."""

    domain_log: str | None = None

    def backward(self, model: Any, batches: Sequence[MicroBatch], accelerator: Any) -> Tensor:
        """Adds the gradient of one step; logs the sum of losses and the number of tokens."""
        num_tokens = torch.stack([counted(batch).sum() for batch in batches]).sum()
        num_tokens = accelerator.reduce(num_tokens, "sum")
        total = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        for batch, sync in _with_sync(model, batches, accelerator):
            with sync:
                loss = forward(model, batch).sum() / num_tokens
                # Processes average their gradients; the objective is a sum over them.
                accelerator.backward(loss * accelerator.num_processes)
            total += loss.detach().double()
        return torch.stack([accelerator.reduce(total, "sum"), num_tokens.double()])

    def record(self, step: int, logged: Tensor) -> StepRecord:  # noqa: ARG002 (the protocol's)
        """Returns loss and tokens."""
        return StepRecord(float(logged[0]), int(logged[1]))

    def state(self) -> dict[str, Any]:
        """There is nothing to keep."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """There is nothing to take back."""


class FinetuneObjective:
    """The mean loss over the unmasked tokens of the effective batch, with dropout, and the loss of each domain.

    What is random in a step depends on (seed, step, process, micro-batch) alone, so that a resumed run goes on as if it
    had never stopped.
    """

    domain_log: str | None = "domain_losses.jsonl"

    def __init__(self, domains: Sequence[str], seed: int) -> None:
        self.domains = domains
        self.seed = seed
        self.step = 0

    def backward(self, model: Any, batches: Sequence[MicroBatch], accelerator: Any) -> Tensor:
        """Adds the gradient of one step; logs the sum of losses and the number of tokens of each domain, [2, K]."""
        num_tokens = accelerator.reduce(torch.stack([counted(batch).sum() for batch in batches]).sum(), "sum")
        sums_2K = torch.zeros(2, len(self.domains), dtype=torch.float64, device=accelerator.device)
        for number, (batch, sync) in enumerate(_with_sync(model, batches, accelerator)):
            torch.manual_seed(_mixed_seed(self.seed, self.step, accelerator.process_index, number))
            with sync:
                loss_BT = forward(model, batch)
                # A batch may be of padding and prompts alone, and of several processes one may have nothing to learn.
                loss = loss_BT.sum() / num_tokens.clamp(min=1)
                accelerator.backward(loss * accelerator.num_processes)
            counted_BT = counted(batch)
            domain_ids = batch["domain_ids_BT"][counted_BT]
            sums_2K[0].index_add_(0, domain_ids, loss_BT.detach()[counted_BT].double())
            sums_2K[1] += torch.bincount(domain_ids, minlength=len(self.domains))
        self.step += 1
        logged: Tensor = accelerator.reduce(sums_2K, "sum")
        return logged

    def record(self, step: int, logged: Tensor) -> StepRecord:
        """Returns loss, tokens, and the loss of the domains that were in the step."""
        sums, counts = logged.tolist()
        present = [i for i, count in enumerate(counts) if count]
        by_domain = {
            "step": step,
            "loss": {self.domains[i]: sums[i] / counts[i] for i in present},
            "num_tokens": {self.domains[i]: int(counts[i]) for i in present},
        }
        return StepRecord(sum(sums) / max(1.0, sum(counts)), int(sum(counts)), by_domain)

    def state(self) -> dict[str, Any]:
        """Returns which step comes next."""
        return {"step": self.step}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes back what ``state`` returned."""
        self.step = int(state["step"])


def _mixed_seed(*numbers: int) -> int:
    """Returns one seed for several numbers, of which no two lists give the same."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


class Learner(Protocol):
    """How domain weights follow from losses: ``dro.GroupDRO`` or ``headroom.Headroom``.

    A state is a NamedTuple with ``weights_K`` and ``num_updates``.
    """

    def start(self, num_domains: int) -> Any:
        """Returns the state before the first step."""
        ...

    def step(self, state: Any, sums: DomainSums) -> tuple[Any, Tensor]:
        """Returns the state after a step, and the weight of each domain in the loss of this batch, shape [K]."""
        ...

    def result(self, state: Any) -> Tensor:
        """Returns what was learned, shape [K]."""
        ...

    def restore(self, state: dict[str, Any]) -> Any:
        """Returns a state from its fields."""
        ...


class ProxyObjective:
    """The proxy's objective: update the domain weights from the batch, then weight the batch's domains.

    With one micro-batch per process, one forward pass serves both.  With several, a first pass without gradient finds
    the excess losses of the whole effective batch (a third more operations; memory stays that of one micro-batch).
    """

    domain_log: str | None = "trajectory.jsonl"
    """One ``types.TrajectoryPoint`` a step."""

    def __init__(self, domains: Domains, learner: Learner) -> None:
        self.domains = domains
        self.learner = learner
        self.learned = learner.start(len(domains))

    def backward(self, model: Any, batches: Sequence[MicroBatch], accelerator: Any) -> Tensor:
        """Updates the domain weights and adds the gradient; logs weights and sums, shape [6, K]."""
        losses = []
        parts = []
        for batch in batches:
            with nullcontext() if len(batches) == 1 else torch.no_grad():
                losses.append(forward(model, batch))
            parts.append(
                domain_sums(
                    losses[-1].detach(),
                    batch["reference_loss_BT"],
                    counted(batch),
                    batch["domain_ids_B"],
                    len(self.domains),
                )
            )
        local = torch.stack([torch.stack(part) for part in parts]).sum(0)
        sums = DomainSums(*accelerator.reduce(local, "sum").unbind(0))
        self.learned, loss_weights_K = self.learner.step(self.learned, sums)
        for (batch, sync), known_loss in zip(_with_sync(model, batches, accelerator), losses, strict=True):
            with sync:
                loss_BT = known_loss if len(batches) == 1 else forward(model, batch)
                loss = weighted_loss(loss_BT, counted(batch), batch["domain_ids_B"], loss_weights_K, sums.num_tokens_K)
                accelerator.backward(loss * accelerator.num_processes)
        return torch.stack([self.learned.weights_K, *sums])

    def result(self) -> Tensor:
        """Returns the domain weights that were learned, shape [K]."""
        return self.learner.result(self.learned)

    def record(self, step: int, logged: Tensor) -> StepRecord:
        """Returns the weighted loss, tokens, and one line of ``trajectory.jsonl``."""
        weights_K, sums = logged[0], DomainSums(*logged[1:].unbind(0))
        columns = {
            "domain_weights": weights_K,
            "excess_loss": sums.mean(sums.excess_K),
            "unclipped_excess_loss": sums.mean(sums.unclipped_excess_K),
            "proxy_loss": sums.mean(sums.proxy_loss_K),
            "reference_loss": sums.mean(sums.reference_loss_K),
        }
        values = {key: dict(zip(self.domains, column.tolist(), strict=True)) for key, column in columns.items()}
        loss = float((weights_K * columns["proxy_loss"]).sum())
        return StepRecord(loss, int(sums.num_tokens_K.sum()), {"step": step, **values})

    def state(self) -> dict[str, Any]:
        """Returns the weights, their sum and the number of updates."""
        return {**self.learned._asdict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes back what ``state`` returned."""
        self.learned = self.learner.restore(state)


def forward(model: Any, batch: MicroBatch) -> Tensor:
    """Returns the loss on each token, shape [B, T]."""
    loss_BT: Tensor = model(
        batch["input_ids_BT"],
        batch["labels_BT"],
        batch["position_ids_BT"],
        batch["document_ids_BT"],
        batch.get("label_index_N"),
        batch.get("document_starts_C"),
    )
    return loss_BT


def counted(batch: MicroBatch) -> Tensor:
    """Returns the loss mask, shape [B, T]: true where a token counts."""
    return batch["labels_BT"] != -100


def _with_sync(model: Any, batches: Sequence[MicroBatch], accelerator: Any) -> Iterator[tuple[MicroBatch, Any]]:
    """Pairs each micro-batch with a context in which only the last one exchanges gradients between processes."""
    for i, batch in enumerate(batches):
        yield batch, nullcontext() if i == len(batches) - 1 else accelerator.no_sync(model)
