"""Domain weights in proportion to headroom: what a model that trains for longer still gains on each domain.

Axes: K domains.  Weights live in float64.  DoReMi asks on which domain the proxy trails the reference most, and gives
that domain nearly all weight.  In the few hundred updates of a fine-tuning set this finds whoever learns first.  Here
the same excess losses are read as slopes of learning curves, and every domain gets weight by its slope.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from doremi_mix.dro import DomainSums

LATENESS = 8
"""Update t counts by about t to this power: half of the average comes from the last 8 % of the updates."""


class HeadroomState(NamedTuple):
    """What is carried from step to step; goes in and comes out, nothing is hidden elsewhere.

    Attributes:
        weights_K: the domain weights after this step, float64, on the simplex.
        excess_K: the late average of a batch's sum of unclipped excess losses, in nats.
        num_tokens_K: the late average of a batch's unmasked tokens.
        num_updates: t.
    """

    weights_K: Tensor
    excess_K: Tensor
    num_tokens_K: Tensor
    num_updates: int


def init_headroom(num_domains: int) -> HeadroomState:
    """Starts from uniform weights and no losses.

    Example:
        >>> init_headroom(4).weights_K.tolist()
        [0.25, 0.25, 0.25, 0.25]
    """
    zeros_K = torch.zeros(num_domains, dtype=torch.float64)
    return HeadroomState(torch.full_like(zeros_K, 1 / num_domains), zeros_K, zeros_K.clone(), 0)


@torch.no_grad()
def weights_of(headroom_K: Tensor, *, power: float = 1.0, smoothing: float = 1e-3) -> Tensor:
    """Returns weights in proportion to headroom: the last two lines of ``step_headroom``.

    Args:
        headroom_K: in nats per token; below 0 counts as none.
        power: of the headroom.
        smoothing: the share of the weights given to uniform.

    Example:
        >>> weights_of(torch.tensor([0.75, 0.25, -0.5]), smoothing=0.0).tolist()
        [0.75, 0.25, 0.0]
    """
    raised_K = headroom_K.double().clamp(min=0) ** power
    total = raised_K.sum()
    # Nothing to gain anywhere: one for all makes them equal.
    raised_K = raised_K + (total <= 0)
    return (1 - smoothing) * raised_K / raised_K.sum() + smoothing / raised_K.numel()


@torch.no_grad()
def step_headroom(
    state: HeadroomState,
    sums: DomainSums,
    *,
    power: float = 1.0,
    smoothing: float = 1e-3,
) -> HeadroomState:
    """Takes one batch's losses into the headroom of each domain, and sets the weights to it.

    The proxy model trains plainly, like the reference model but for a shorter time.  With x_t and n_t a domain's sums
    of proxy minus reference losses and of tokens in batch t, both averaged late (polynomial-decay averaging)::

        g_t = (LATENESS + 1) / (LATENESS + t)
        X_t = (1 - g_t) X_{t-1} + g_t x_t,   N_t likewise
        h_t = max(X_t / N_t, 0)                                      headroom, nats per token
        alpha_t = (1 - smoothing) * h_t^power / sum(h_t^power) + smoothing / K

    Where a domain's loss falls with the logarithm of its tokens, loss = a - s ln(w n), the weights with the least
    average loss are in proportion to the slopes s, and a proxy that saw a share r of the reference's tokens trails it
    by s ln(1 / r): its excess loss is the slope, up to a factor that is the same for all.  A domain that repeats what
    it has taught, or that has nothing to teach, has a flat curve and no headroom.

    It differs from Algorithm 1 of DoReMi: the excess is not clipped per token (the clip's bias is noise read as
    headroom), it is averaged and not added up, its size decides and not its rank after many steps, only the end of the
    training counts, and the weights do not feed back into the proxy (so a budget's caps wait for the exported weights).

    Args:
        state: the state after step t-1; it is not modified.
        sums: per-domain sums over all micro-batches and processes of step t.
        power: 1 is the rule above; above 1, differences count for more, as where domains gain from each other's tokens.
        smoothing: the share of the weights given to uniform.

    Returns:
        The state after step t.  Without any headroom, the weights are uniform.

    Example:
        Two domains of ten tokens each; the proxy trails the reference by .3 and .1 nats per token:

        >>> ten_K, zero_K = torch.full((2,), 10.0, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        >>> excess_K = torch.tensor([3.0, 1.0], dtype=torch.float64)
        >>> sums = DomainSums(excess_K, excess_K, ten_K, ten_K, ten_K)
        >>> state = step_headroom(init_headroom(2), sums, smoothing=0.0)
        >>> [round(weight, 6) for weight in state.weights_K.tolist()]
        [0.75, 0.25]

    Reference:
        Polynomial-decay averaging: https://arxiv.org/abs/1212.1824.
    """
    num_updates = state.num_updates + 1
    share = (LATENESS + 1) / (LATENESS + num_updates)
    excess_K = (1 - share) * state.excess_K.to(sums.excess_K.device) + share * sums.unclipped_excess_K
    num_tokens_K = (1 - share) * state.num_tokens_K.to(sums.excess_K.device) + share * sums.num_tokens_K
    weights_K = weights_of(excess_K / num_tokens_K.clamp(min=1e-9), power=power, smoothing=smoothing)
    return HeadroomState(weights_K, excess_K, num_tokens_K, num_updates)


@dataclass(frozen=True)
class Headroom:
    """The rule as an objective's learner; see ``step_headroom`` for the settings."""

    power: float = 1.0
    smoothing: float = 1e-3

    def start(self, num_domains: int) -> HeadroomState:
        """Returns the state before the first step."""
        return init_headroom(num_domains)

    def step(self, state: HeadroomState, sums: DomainSums) -> tuple[HeadroomState, Tensor]:
        """Returns the state after a step, and what the batch's domains count in the loss: their tokens, as ever."""
        after = step_headroom(state, sums, power=self.power, smoothing=self.smoothing)
        return after, sums.num_tokens_K / sums.num_tokens_K.sum()

    def result(self, state: HeadroomState) -> Tensor:
        """Returns the weights: those after the last step."""
        if state.num_updates < 1:
            raise ValueError("there are no weights before the first update")
        return state.weights_K / state.weights_K.sum()

    def corrected(self, state: HeadroomState, held_out: dict[int, float]) -> Tensor:
        """Returns the weights with the headroom of some domains taken from held-out text.

        Args:
            state: after the last step.
            held_out: by domain id, proxy minus reference loss on text that neither was trained on, in nats per token.
                For domains that the reference repeats: it knows their batches by heart, which is no headroom.
        """
        headroom_K = (state.excess_K / state.num_tokens_K.clamp(min=1e-9)).cpu()
        for domain_id, loss in held_out.items():
            headroom_K[domain_id] = loss
        return weights_of(headroom_K, power=self.power, smoothing=self.smoothing)

    def restore(self, state: dict[str, object]) -> HeadroomState:
        """Returns a state from its fields."""
        return HeadroomState(**state)  # type: ignore[arg-type]
