"""Pull noisy domain weights toward a target, and keep them under the caps that the data allow.

Axes: K domains, R seeds.  Results are float64 without a gradient.

All functions but ``cap_weights`` may run inside a training step on a GPU: they read no value back to the host, and use
only operations that are deterministic there.  Hence they check shapes and Python numbers, not what tensors hold.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

# The smallest normal number: a weight below it counts as 0, so that 1 / weight is finite.
_TINY = torch.finfo(torch.float64).tiny


@torch.no_grad()
def shrink_weights(
    weights_K: Tensor, target_K: Tensor, strength: float | Tensor, *, kind: Literal["linear", "kl"] = "linear"
) -> Tensor:
    """Moves weights toward a target: 0 keeps them, 1 gives the target.

    Each kind is the distribution q closest to both ends, in squared distance or in Kullback-Leibler divergence::

        linear:  q[i] = (1 - s) * w[i] + s * t[i]         = argmin (1 - s) * |q - w|^2 + s * |q - t|^2
        kl:      q[i] = w[i]^(1 - s) * t[i]^s / sum(...)  = argmin (1 - s) * KL(q || w) + s * KL(q || t)

    Under kl with 0 < s < 1, a domain that has weight 0 on either side gets 0, because any other value has infinite
    divergence; at s = 0 and s = 1 only that one end counts.

    Args:
        weights_K: w, on the simplex.
        target_K: t, on the simplex, for example the natural weights.
        strength: s in [0, 1]; a tensor without axes is taken unchecked.
        kind: which of the two.

    Returns:
        The shrunk weights, shape [K], on the simplex.  NaN under kl if w and t share no domain: no q is near both.

    Raises:
        ValueError: the shapes disagree, a strength given as a number is outside [0, 1], or the kind is unknown.

    Example:
        >>> weights_K, uniform_K = torch.tensor([0.8, 0.2]), torch.tensor([0.5, 0.5])
        >>> [round(weight, 6) for weight in shrink_weights(weights_K, uniform_K, 0.5).tolist()]
        [0.65, 0.35]
        >>> [round(weight, 6) for weight in shrink_weights(weights_K, uniform_K, 0.5, kind="kl").tolist()]
        [0.666667, 0.333333]
    """
    _check_shapes(weights_K, target_K, "weights and target")
    if not isinstance(strength, Tensor) and not 0 <= strength <= 1:
        raise ValueError(f"strength must be in [0, 1], got {strength}")
    if kind == "linear":
        return (1 - strength) * weights_K.double() + strength * target_K.double()
    if kind != "kl":
        raise ValueError(f'kind must be "linear" or "kl", got {kind!r}')
    # A fill, not torch.tensor: a copy from the host waits for the device.
    strength = strength if isinstance(strength, Tensor) else weights_K.double().new_full((), strength)
    # 0 * log 0 is NaN where its limit, 0, is meant.
    from_weights_K = ((1 - strength) * weights_K.double().log()).masked_fill(strength == 1, 0.0)
    from_target_K = (strength * target_K.double().log()).masked_fill(strength == 0, 0.0)
    return torch.softmax(from_weights_K + from_target_K, dim=0)


@torch.no_grad()
def max_weights(available_tokens_K: Tensor, budget: int, max_epochs: float) -> Tensor:
    """Returns the caps ``min(1, max_epochs * available_tokens / budget)``: the most that each domain can carry.

    Args:
        available_tokens_K: tokens that one pass over each domain gives.
        budget: tokens that will be drawn in all, above 0.
        max_epochs: the largest number of passes over a domain, above 0.

    Returns:
        The caps, shape [K]: with these weights, no domain is read more than ``max_epochs`` times.

    Raises:
        ValueError: the budget or ``max_epochs`` is not above 0.

    Example:
        >>> max_weights(torch.tensor([100, 900]), budget=1_000, max_epochs=4).tolist()
        [0.4, 1.0]
    """
    if not (budget > 0 and max_epochs > 0):
        raise ValueError(f"budget and max_epochs must be above 0, got {budget} and {max_epochs}")
    return (max_epochs * available_tokens_K.double() / budget).clamp(max=1.0)


@torch.no_grad()
def project_onto_caps(weights_K: Tensor, max_weights_K: Tensor) -> Tensor:
    """Returns the distribution under the caps that is closest to the weights in Kullback-Leibler divergence.

    Water-filling: what a capped domain cannot take goes to the others in proportion to their weights::

        argmin KL(q || w)  over  q[i] <= cap[i], sum(q) = 1   is   q[i] = min(s * w[i], cap[i])

    Domains fill up in the order of cap / w.  Each prefix of it bounds s from below by ``(1 - sum of the caps inside) /
    (sum of the weights outside)``, and the prefix of those that are full attains it, so s is the largest bound.

    Args:
        weights_K: w, at least 0; need not sum to 1.  A domain of weight 0 takes nothing.
        max_weights_K: the caps, at least 0.

    Returns:
        The weights, shape [K].  If the caps make a sum of 1 impossible, each domain with a weight is at its cap.

    Example:
        >>> q_K = project_onto_caps(torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.25, 1.0, 1.0]))
        >>> [round(weight, 6) for weight in q_K.tolist()]
        [0.25, 0.5625, 0.1875]
    """
    _check_shapes(weights_K, max_weights_K, "weights and caps")
    empty_K = weights_K.double() < _TINY
    weights_K = weights_K.double().masked_fill(empty_K, 0.0)
    caps_K = max_weights_K.double().clamp(max=1.0).masked_fill(empty_K, 0.0)
    ratio_K = (caps_K / weights_K).masked_fill(empty_K, float("inf"))
    # Row j is the prefix of the domains that fill up before domain j.  All pairs are compared instead of sorted and
    # summed up: domains are few, and use_deterministic_algorithms refuses a floating-point cumsum on CUDA.
    full_KK = ratio_K < ratio_K[:, None]
    room_K = 1 - caps_K.expand_as(full_KK).masked_fill(~full_KK, 0.0).sum(1)
    weight_left_K = weights_K.expand_as(full_KK).masked_fill(full_KK, 0.0).sum(1)
    # No room is no bound, whatever it is divided by; some room over no weight is infinite, and all go to their caps.
    scale = (room_K / weight_left_K).masked_fill(room_K <= 0, 0.0).max()
    return torch.minimum((scale * weights_K).masked_fill(empty_K, 0.0), caps_K)


def cap_weights(weights_K: Tensor, max_weights_K: Tensor) -> Tensor:
    """Does what ``project_onto_caps`` does, and first checks the values (on a GPU, this waits for the device).

    Raises:
        ValueError: the shapes disagree, a weight is negative or not finite, all weights are 0, a cap is negative, or
            the caps make a sum of 1 impossible.

    Example:
        >>> cap_weights(torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.25, 0.5, 1.0]))
        Traceback (most recent call last):
        ...
        ValueError: caps of the domains with a weight sum to 0.75, expected at least 1; raise the caps
    """
    _check_shapes(weights_K, max_weights_K, "weights and caps")
    weights_K, caps_K = weights_K.double(), max_weights_K.double()
    active_K = weights_K >= _TINY
    if not bool((weights_K.isfinite() & (weights_K >= 0)).all() & active_K.any()):
        raise ValueError(f"weights must be finite, at least 0 and not all 0, got {weights_K.tolist()}")
    if not bool((caps_K >= 0).all()):
        raise ValueError(f"caps must be at least 0, got {caps_K.tolist()}")
    total = float(caps_K[active_K].sum())
    if total < 1 - 1e-12:  # ten caps of 0.1 sum to a little less than 1
        raise ValueError(f"caps of the domains with a weight sum to {total:.6g}, expected at least 1; raise the caps")
    return project_onto_caps(weights_K, caps_K)


@torch.no_grad()
def shrink_by_evidence(weights_RK: Tensor, target_K: Tensor) -> tuple[Tensor, Tensor]:
    """Shrinks the mean over seeds toward a target by as much as the seeds disagree.

    The linear shrinkage of least expected squared error, with noise and signal estimated from the seeds (a
    positive-part James-Stein, or empirical Bayes, rule)::

        noise    = mean over i of (variance over seeds of w[., i]) / R
        signal   = max(0, mean over i of (mean_w[i] - t[i])^2 - noise)
        strength = noise / (noise + signal), in [0, 1]; 0 where both vanish

    Noise is taken off because the mean of noisy seeds lies away from the target even where the truth does not.
    In simulation with 3 seeds, the squared error over that of the mean is at most 1.25 with 3 domains, 1.01 with 6 and
    0.99 with 20; it is 0.33, 0.16 and 0.06 where the truth is the target.

    Args:
        weights_RK: w, the weights that each independent seed learned, on the simplex; R is at least 2.
        target_K: t, on the simplex.

    Returns:
        The shrunk weights, shape [K], and the strength, no axes.

    Raises:
        ValueError: there are fewer than two seeds, or the shapes disagree.

    Example:
        >>> q_K, strength = shrink_by_evidence(torch.tensor([[0.6, 0.4], [0.8, 0.2]]), torch.tensor([0.5, 0.5]))
        >>> round(strength.item(), 6), [round(weight, 6) for weight in q_K.tolist()]
        (0.25, [0.65, 0.35])
    """
    if weights_RK.ndim != 2 or weights_RK.shape[0] < 2:
        raise ValueError(f"weights must have shape [R, K] with at least two seeds, got {list(weights_RK.shape)}")
    _check_shapes(weights_RK[0], target_K, "the weights of a seed and the target")
    mean_K = weights_RK.double().mean(0)
    noise = weights_RK.double().var(0).mean() / weights_RK.shape[0]
    distance = (mean_K - target_K.double()).square().mean()
    # The maximum is noise + signal; the clamp turns 0 / 0 into 0.
    strength = noise / torch.maximum(noise, distance).clamp(min=_TINY)
    return shrink_weights(mean_K, target_K, strength), strength


def _check_shapes(first_K: Tensor, second_K: Tensor, what: str) -> None:
    if first_K.ndim != 1 or first_K.shape != second_K.shape:
        raise ValueError(f"{what} must have one shape [K], got {list(first_K.shape)} and {list(second_K.shape)}")
