"""Group DRO over domains: Algorithm 1 of DoReMi and nothing else.

Axes: B sequences, T tokens in a sequence, K domains.  Weights live in float64.  A step of training is::

    sums = domain_sums(proxy_loss_BT, reference_loss_BT, mask_BT, domain_ids_B, num_domains)   # per process
    ...                                                    # add the sums of all micro-batches and processes
    state, excess_K = step_domain_weights(state, sums)     # alpha_t, from batch t
    loss = weighted_loss(proxy_loss_BT, mask_BT, domain_ids_B, state.weights_K, sums.num_tokens_K)
    loss.backward()                                        # the gradient of batch t uses alpha_t

``update_domain_weights`` is the first two lines for a batch that is whole in one process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from doremi_mix.shrinkage import project_onto_caps


class GroupDROState(NamedTuple):
    """What is carried from step to step; goes in and comes out, nothing is hidden elsewhere.

    Attributes:
        weights_K: the domain weights alpha_t, float64, on the simplex.
        weight_sum_K: the sum of alpha_1 .. alpha_t, float64 (alpha_0 is not in it).
        num_updates: t.
    """

    weights_K: Tensor
    weight_sum_K: Tensor
    num_updates: int


class DomainSums(NamedTuple):
    """Sums over the unmasked tokens of each domain, float64, shape [K]; adding two of them joins two batches.

    Attributes:
        excess_K: of max(proxy - reference, 0).
        unclipped_excess_K: of proxy - reference.
        proxy_loss_K: of the proxy model's loss.
        reference_loss_K: of the reference model's loss.
        num_tokens_K: of 1.
    """

    excess_K: Tensor
    unclipped_excess_K: Tensor
    proxy_loss_K: Tensor
    reference_loss_K: Tensor
    num_tokens_K: Tensor

    def mean(self, sum_K: Tensor) -> Tensor:
        """Returns a sum per token, 0 for a domain that has no token in the batch."""
        return sum_K / self.num_tokens_K.clamp(min=1)


def init_group_dro(
    num_domains: int, *, initial_weights_K: Tensor | None = None, device: torch.device | str = "cpu"
) -> GroupDROState:
    """Starts from uniform domain weights, or from the given ones.

    Args:
        num_domains: K, at least 1.
        initial_weights_K: weights to start from; positive, they are normalized.
        device: where the state lives.

    Returns:
        The state after no update.

    Raises:
        ValueError: there is no domain, or the initial weights have the wrong shape or are not positive and finite.

    Example:
        >>> init_group_dro(4).weights_K.tolist()
        [0.25, 0.25, 0.25, 0.25]
    """
    if num_domains < 1:
        raise ValueError(f"num_domains must be at least 1, got {num_domains}")
    if initial_weights_K is None:
        weights_K = torch.full((num_domains,), 1.0 / num_domains, dtype=torch.float64, device=device)
    else:
        weights_K = initial_weights_K.to(device=device, dtype=torch.float64)
        if weights_K.shape != (num_domains,):
            raise ValueError(f"initial weights must have shape [{num_domains}], got {list(weights_K.shape)}")
        if not bool(torch.isfinite(weights_K).all()) or bool((weights_K <= 0).any()):
            raise ValueError("initial weights must be positive and finite")
        weights_K = weights_K / weights_K.sum()
    return GroupDROState(weights_K, torch.zeros_like(weights_K), 0)


@torch.no_grad()
def domain_sums(
    proxy_loss_BT: Tensor, reference_loss_BT: Tensor, mask_BT: Tensor, domain_ids_B: Tensor, num_domains: int
) -> DomainSums:
    """Adds up losses and excess losses per domain over the unmasked tokens of a (micro-)batch.

    Args:
        proxy_loss_BT: the proxy model's loss on each token, in nats.  Not differentiated.
        reference_loss_BT: the reference model's loss on the same tokens, in nats.
        mask_BT: true where a token counts.  Values under the mask are never read, not even a NaN.
        domain_ids_B: the domain id of each sequence, in [0, K).
        num_domains: K.

    Returns:
        Sums of shape [K] in float64.  No value is read back to the host.

    Raises:
        ValueError: the shapes disagree.
    """
    if not proxy_loss_BT.shape == reference_loss_BT.shape == mask_BT.shape or proxy_loss_BT.ndim != 2:
        raise ValueError(
            f"proxy loss, reference loss and mask must have one shape [B, T], got {list(proxy_loss_BT.shape)}, "
            f"{list(reference_loss_BT.shape)} and {list(mask_BT.shape)}"
        )
    if domain_ids_B.shape != proxy_loss_BT.shape[:1]:
        raise ValueError(
            f"domain ids must have shape [{proxy_loss_BT.shape[0]}], one per sequence, got {list(domain_ids_B.shape)}"
        )
    mask_BT = mask_BT.bool()
    # masked_fill, not multiplication: 0 * NaN is NaN.
    proxy_BT = proxy_loss_BT.double().masked_fill(~mask_BT, 0.0)
    reference_BT = reference_loss_BT.double().masked_fill(~mask_BT, 0.0)
    difference_BT = proxy_BT - reference_BT
    # A sequence has one domain, so the tokens are reduced first and only [B, 5] numbers are scattered.
    values_B5 = torch.stack(
        [
            difference_BT.clamp(min=0).sum(1),
            difference_BT.sum(1),
            proxy_BT.sum(1),
            reference_BT.sum(1),
            mask_BT.sum(1).double(),
        ],
        dim=1,
    )
    # A product with the membership matrix adds in a fixed order on every device; index_add does not on CUDA.
    member_KB = (torch.arange(num_domains, device=domain_ids_B.device)[:, None] == domain_ids_B).double()
    return DomainSums(*(member_KB @ values_B5).unbind(1))


@torch.no_grad()
def step_domain_weights(
    state: GroupDROState,
    sums: DomainSums,
    *,
    step_size: float = 1.0,
    smoothing: float = 1e-3,
    max_weights_K: Tensor | None = None,
) -> tuple[GroupDROState, Tensor]:
    """Takes one exponentiated-gradient step from the sums of a whole effective batch.

    Args:
        state: the state after step t-1; it is not modified.
        sums: per-domain sums over **all** micro-batches and processes of step t.
        step_size: eta.
        smoothing: c, the share of the weights given back to uniform.
        max_weights_K: caps that the weights are projected under after each step (see ``shrinkage``); they sum to 1 or
            more.  The paper has none.

    Returns:
        The state after step t and the excess loss lambda_t, shape [K], in nats per token.  A domain without a token in
        the batch has excess loss 0.
    """
    excess_K = sums.mean(sums.excess_K)
    num_domains = state.weights_K.numel()
    # Log space: exp(1000) overflows, log_softmax does not.  A weight is 0 only when smoothing is 0, and then stays 0.
    log_weights_K = torch.log_softmax(state.weights_K.log() + step_size * excess_K, dim=0)
    weights_K = (1 - smoothing) * log_weights_K.exp() + smoothing / num_domains
    if max_weights_K is not None:
        weights_K = project_onto_caps(weights_K, max_weights_K)
    return GroupDROState(weights_K, state.weight_sum_K + weights_K, state.num_updates + 1), excess_K


@torch.no_grad()
def update_domain_weights(
    state: GroupDROState,
    proxy_loss_BT: Tensor,
    reference_loss_BT: Tensor,
    mask_BT: Tensor,
    domain_ids_B: Tensor,
    *,
    step_size: float = 1.0,
    smoothing: float = 1e-3,
) -> tuple[GroupDROState, Tensor]:
    """Takes one exponentiated-gradient step on the domain weights.

    Domains on which the proxy model still trails the reference model gain weight::

        lambda_t[i] = mean over unmasked tokens of domain i of max(proxy - reference, 0)
        alpha'_t    = alpha_{t-1} * exp(step_size * lambda_t)
        alpha_t     = (1 - smoothing) * alpha'_t / sum(alpha'_t) + smoothing / K

    Clipped tokens still count in the denominator.  Computed in float64 log space, so a large loss cannot overflow.

    Args:
        state: the state after step t-1; it is not modified.
        proxy_loss_BT: the proxy model's loss on each token, in nats.  Not differentiated.
        reference_loss_BT: the reference model's loss on the same tokens, in nats.
        mask_BT: true where a token counts.
        domain_ids_B: the domain id of each sequence, in [0, K).
        step_size: eta, the learning rate of the weights.
        smoothing: c, the share of the weights given back to uniform, in [0, 1].

    Returns:
        The state after step t, whose weights multiply this same batch's loss, and lambda_t, shape [K].

    Raises:
        ValueError: the shapes disagree, a domain id is out of range, smoothing is outside [0, 1], step_size is not
            positive, or an unmasked loss is not finite.

    Example:
        Two domains of one token each; the proxy model trails the reference model on the first by ln 2:

        >>> import math
        >>> state, excess_K = update_domain_weights(
        ...     init_group_dro(2),
        ...     proxy_loss_BT=torch.tensor([[math.log(8)], [1.0]], dtype=torch.float64),
        ...     reference_loss_BT=torch.tensor([[math.log(4)], [3.0]], dtype=torch.float64),
        ...     mask_BT=torch.ones(2, 1),
        ...     domain_ids_B=torch.tensor([0, 1]),
        ...     smoothing=0.0,
        ... )
        >>> [round(weight, 6) for weight in state.weights_K.tolist()]
        [0.666667, 0.333333]
        >>> [round(excess, 6) for excess in excess_K.tolist()]
        [0.693147, 0.0]

    Reference:
        Algorithm 1 of https://arxiv.org/abs/2305.10429.
    """
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing must be in [0, 1], got {smoothing}")
    if not step_size > 0:
        raise ValueError(f"step_size must be positive, got {step_size}")
    num_domains = state.weights_K.numel()
    if domain_ids_B.numel() and not (int(domain_ids_B.min()) >= 0 and int(domain_ids_B.max()) < num_domains):
        raise ValueError(f"domain ids must be in [0, {num_domains}), got {sorted(set(domain_ids_B.tolist()))}")
    sums = domain_sums(proxy_loss_BT, reference_loss_BT, mask_BT, domain_ids_B, num_domains)
    if not all(bool(torch.isfinite(sum_K).all()) for sum_K in sums):
        raise ValueError("an unmasked loss is not finite")
    return step_domain_weights(state, sums, step_size=step_size, smoothing=smoothing)


def weighted_loss(
    loss_BT: Tensor, mask_BT: Tensor, domain_ids_B: Tensor, weights_K: Tensor, num_tokens_K: Tensor | None = None
) -> Tensor:
    """The proxy model's objective: sum over domains of alpha_i times the mean unclipped loss of domain i.

    Each domain is normalized by its own number of tokens, so a domain's pull on the model is its weight and not its
    length.  The weights are constants: no gradient flows into them.

    Args:
        loss_BT: the proxy model's loss on each token, in nats, with its graph.
        mask_BT: true where a token counts.
        domain_ids_B: the domain id of each sequence, in [0, K).
        weights_K: alpha_t.
        num_tokens_K: unmasked tokens of each domain in the whole effective batch; by default those of this batch.  With
            several micro-batches, the sum of their weighted losses is then the objective.

    Returns:
        A scalar in the dtype of the loss.

    Example:
        >>> weighted_loss(
        ...     torch.tensor([[1.0, 3.0], [5.0, 0.0]]), torch.tensor([[1, 1], [1, 0]]), torch.tensor([0, 1]),
        ...     torch.tensor([0.5, 0.5])).item()
        3.5
    """
    mask_BT = mask_BT.bool()
    if num_tokens_K is None:
        num_tokens_K = torch.zeros_like(weights_K, dtype=torch.float64)
        num_tokens_K.index_add_(0, domain_ids_B, mask_BT.sum(1).double())
    scale_K = weights_K.detach().double() / num_tokens_K.clamp(min=1)
    loss_B = loss_BT.masked_fill(~mask_BT, 0.0).sum(1)
    return (loss_B * scale_K[domain_ids_B].to(loss_B.dtype)).sum()


def average_weights(state: GroupDROState) -> Tensor:
    """Returns the result: the mean of alpha_1 .. alpha_T, shape [K], float64; alpha_0 is not part of it.

    Raises:
        ValueError: no update was made.
    """
    if state.num_updates < 1:
        raise ValueError("there is no average before the first update")
    average_K = state.weight_sum_K / state.num_updates
    return average_K / average_K.sum()


@dataclass(frozen=True)
class GroupDRO:
    """Algorithm 1 as an objective's learner; see ``update_domain_weights`` for the settings."""

    step_size: float = 1.0
    smoothing: float = 1e-3
    max_weights_K: Tensor | None = None

    def start(self, num_domains: int) -> GroupDROState:
        """Returns the state before the first step."""
        return init_group_dro(num_domains)

    def step(self, state: GroupDROState, sums: DomainSums) -> tuple[GroupDROState, Tensor]:
        """Returns the state after a step, and the weights of the domains in this batch's loss: alpha_t."""
        device = sums.excess_K.device
        state = GroupDROState(state.weights_K.to(device), state.weight_sum_K.to(device), state.num_updates)
        caps_K = None if self.max_weights_K is None else self.max_weights_K.to(device)
        after, _ = step_domain_weights(
            state, sums, step_size=self.step_size, smoothing=self.smoothing, max_weights_K=caps_K
        )
        return after, after.weights_K

    def result(self, state: GroupDROState) -> Tensor:
        """Returns the average weights."""
        return average_weights(state)

    def restore(self, state: dict[str, object]) -> GroupDROState:
        """Returns a state from its fields."""
        return GroupDROState(**state)  # type: ignore[arg-type]
