"""Split a token budget over domains under an epoch cap, and draw the examples that fill it.

Everything here is a pure function of its arguments: no file, no clock, no global random state.

Axes: K domains, N examples of one domain, M examples drawn over all domains.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from doremi_mix.conversions import whole_counts
from doremi_mix.errors import BudgetError, DataError
from doremi_mix.types import Allocation, check_distribution

IntArray = npt.NDArray[np.int64]


def natural_weights(available_tokens: Mapping[str, int]) -> dict[str, float]:
    """Returns each domain's share of the available tokens.

    Args:
        available_tokens: tokens that one pass over each domain gives, by domain.

    Returns:
        Shares by domain, in the same order; they sum to 1.

    Raises:
        DataError: a count is negative, or no domain has any tokens.

    Example:
        >>> natural_weights({"dolly": 300, "gsm8k": 100})
        {'dolly': 0.75, 'gsm8k': 0.25}
    """
    counts = _check_available(available_tokens)
    total = sum(counts.values())
    if total == 0:
        raise DataError(
            f"no domain has any tokens; {len(counts)} domains were given; at least one must have some: "
            "check the sources and the filters"
        )
    return {name: count / total for name, count in counts.items()}


def uniform_weights(names: Iterable[str]) -> dict[str, float]:
    """Returns the same share for every domain.

    Example:
        >>> uniform_weights(["dolly", "gsm8k"])
        {'dolly': 0.5, 'gsm8k': 0.5}
    """
    names = tuple(names)
    return dict.fromkeys(names, 1 / len(names))


def temperature_weights(available_tokens: Mapping[str, int], temperature: float) -> dict[str, float]:
    """Returns natural weights raised to a power and normalized: 1 is natural, toward 0 it becomes uniform.

    Args:
        available_tokens: tokens that one pass over each domain gives, by domain.
        temperature: the power, in (0, 1]; a domain without tokens has weight 0.

    Returns:
        Shares by domain, in the same order; they sum to 1.

    Raises:
        DataError: as ``natural_weights``.

    Example:
        >>> temperature_weights({"dolly": 900, "gsm8k": 100}, 0.5)
        {'dolly': 0.75, 'gsm8k': 0.25}
    """
    raised = {name: share**temperature for name, share in natural_weights(available_tokens).items()}
    total = math.fsum(raised.values())
    return {name: share / total for name, share in raised.items()}


def allocate(
    weights: Mapping[str, float],
    available_tokens: Mapping[str, int],
    budget: int,
    max_epochs: float = 4.0,
    *,
    unit: str = "token",
    setting: str = "mixture.max_epochs",
) -> Allocation:
    """Splits a token budget over domains by weight, with no domain repeated more than ``max_epochs`` times.

    Water-filling: the one scale ``s`` is found at which the budget is spent exactly::

        tokens[i] = min(s * weights[i], floor(max_epochs * available_tokens[i])),   sum(tokens) = budget

    What a capped domain cannot take goes to the others in proportion to their weights, which makes the result the
    feasible mixture that is closest to ``weights`` in Kullback-Leibler divergence.  Fractions are rounded by largest
    remainder, never above a cap; equal remainders go to the earlier domain.  The arithmetic is exact.

    Args:
        weights: the share of tokens of each domain; sums to 1.  A domain of weight 0 gets no tokens.
        available_tokens: tokens that one pass over each domain gives; the same domains as ``weights``, in any order.
        budget: tokens to hand out, at least 1.
        max_epochs: the largest number of passes over a domain; may be a fraction.
        unit: what is counted, for messages: the arithmetic is the same for examples.
        setting: what the caller calls ``max_epochs``, for messages.

    Returns:
        The allocation, in the order of ``weights``.  Its tokens sum to ``budget`` exactly.

    Raises:
        BudgetError: the budget or ``max_epochs`` is not positive, or the caps make the budget impossible.
        DataError: the weights are not a distribution, the two mappings do not name the same domains, or a count is
            negative.

    Example:
        >>> allocate({"gsm8k": 0.8, "dolly": 0.2}, {"gsm8k": 100, "dolly": 900}, budget=1_000, max_epochs=4).tokens
        {'gsm8k': 400, 'dolly': 600}
    """
    _check_budget(budget, max_epochs, unit, setting)
    if not weights:
        raise DataError("weights name no domain; expected at least one; give the weights of the domains to mix")
    _check_same_domains(weights, available_tokens)
    try:
        check_distribution(weights, "weights")
    except ValueError as error:
        raise DataError(f"{error}; divide every weight by the sum of all") from None
    counts = _check_available({name: available_tokens[name] for name in weights})
    names = tuple(weights)
    exact_weights = [_as_typed(weights[name]) for name in names]
    caps = [epoch_cap(max_epochs, counts[name]) for name in names]
    feasible = sum(cap for cap, weight in zip(caps, exact_weights, strict=True) if weight)
    if budget > feasible:
        raise BudgetError(_impossible_budget(budget, feasible, max_epochs, weights, counts, unit, setting))
    shares, capped = _water_fill(exact_weights, caps, budget)
    # A fractional share lies below its whole-number cap, so no share is rounded up over it.
    tokens = whole_counts(dict(zip(names, shares, strict=True)))
    return Allocation(
        budget=int(budget),
        max_epochs=max_epochs,
        tokens=tokens,
        available_tokens=counts,
        capped=tuple(names[i] for i in sorted(capped)),
    )


def draw_examples(example_tokens: npt.ArrayLike, token_quota: int, seed: int, domain: str) -> IntArray:
    """Draws examples of one domain until the next one would exceed the quota.

    Each epoch is a fresh permutation of all examples, so none is repeated before every other was drawn as often.  The
    draw stops at the first example that no longer fits; hence ``0 <= token_quota - drawn tokens < tokens of that
    example``, and a larger quota only appends to the draw of a smaller one.  The result depends on the arguments alone:
    adding, removing or reordering other domains changes nothing.

    Args:
        example_tokens: tokens of each example, at least 1 each, shape [N].
        token_quota: the most tokens to draw, at least 0.
        seed: of the permutations, at least 0.
        domain: the domain's name; domains with different names draw independently under one seed.

    Returns:
        Indices into ``example_tokens`` in the order drawn, int64.

    Raises:
        DataError: an example has no tokens, or there are no examples for a positive quota.
        ValueError: ``example_tokens`` is not a one-dimensional array of integers, or the quota or the seed is negative.

    Example:
        >>> [int(index) for index in draw_examples([5, 5], token_quota=24, seed=0, domain="dolly")]
        [1, 0, 1, 0]
    """
    tokens_N = np.asarray(example_tokens)
    if tokens_N.ndim != 1 or not (tokens_N.size == 0 or np.issubdtype(tokens_N.dtype, np.integer)):
        raise ValueError(
            f"example_tokens of {domain!r} must be a one-dimensional array of integers, "
            f"got shape {tokens_N.shape} of {tokens_N.dtype}"
        )
    if token_quota < 0:
        raise ValueError(f"the token quota of {domain!r} must be at least 0, got {token_quota}")
    tokens_N = tokens_N.astype(np.int64, copy=False)
    if token_quota == 0:
        return np.empty(0, dtype=np.int64)
    if tokens_N.size == 0:
        raise DataError(f"domain {domain!r} has no examples; {token_quota:,} tokens were to be drawn; give it weight 0")
    if tokens_N.min() < 1:
        raise DataError(
            f"domain {domain!r}: example {int(tokens_N.argmin())} has {int(tokens_N.min())} tokens; expected at least "
            "1; drop empty examples before drawing"
        )
    rng = _generator(seed, "draw_examples", domain)
    drawn: list[IntArray] = []
    left = token_quota
    while True:
        permutation_N = rng.permutation(tokens_N.size)
        drawn_tokens_N = tokens_N[permutation_N]
        np.cumsum(drawn_tokens_N, out=drawn_tokens_N)
        num_fitting = int(np.searchsorted(drawn_tokens_N, left, side="right"))
        drawn.append(permutation_N[:num_fitting])
        if num_fitting < tokens_N.size:
            return np.concatenate(drawn)
        left -= int(drawn_tokens_N[-1])


def mixture_order(num_drawn_per_domain: Sequence[int], seed: int) -> IntArray:
    """Shuffles the draws of all domains into one order.

    Args:
        num_drawn_per_domain: examples drawn from each domain, in domain order, shape [K].
        seed: of the shuffle, at least 0.

    Returns:
        The position in the mixture of each draw, where draws are counted domain after domain in the order drawn: a
        permutation of 0..M-1, int64, shape [M].

    Raises:
        ValueError: a count or the seed is negative.

    Example:
        >>> sorted(int(position) for position in mixture_order([2, 1], seed=0))
        [0, 1, 2]
    """
    if any(num_drawn < 0 for num_drawn in num_drawn_per_domain):
        raise ValueError(f"numbers of drawn examples must be at least 0, got {list(num_drawn_per_domain)}")
    return _generator(seed, "mixture_order", "").permutation(sum(num_drawn_per_domain))


def _water_fill(weights: list[Fraction], caps: list[int], budget: int) -> tuple[list[Fraction], set[int]]:
    """Returns the exact share of each domain and the ids of those that reached their cap with tokens to spare."""
    # Domains reach their caps in the order of cap / weight as the scale rises; stop where the scale meets the budget.
    active = [i for i, weight in enumerate(weights) if weight]
    active.sort(key=lambda i: (caps[i] / weights[i], i))
    weight_left = sum((weights[i] for i in active), Fraction(0))
    budget_left = budget
    shares = [Fraction(0)] * len(weights)
    capped: set[int] = set()
    for position, i in enumerate(active):
        scale = budget_left / weight_left
        if scale * weights[i] <= caps[i]:
            for j in active[position:]:
                shares[j] = scale * weights[j]
            break
        shares[i] = Fraction(caps[i])
        capped.add(i)
        budget_left -= caps[i]
        weight_left -= weights[i]
    return shares, capped


def epoch_cap(max_epochs: float, count: int) -> int:
    """Returns the most that a domain may give, in whole tokens or examples.

    Args:
        max_epochs: the largest number of passes over it, finite.
        count: what one pass gives.

    Example:
        >>> epoch_cap(0.7, 10)
        7
    """
    return math.floor(_as_typed(max_epochs) * count)


def _as_typed(number: float) -> Fraction:
    """Returns the decimal fraction that a float stands for, exactly."""
    # Fractions, because a budget of 1e12 beside a weight of 1e-12 must be met to the token.  Through the decimal text,
    # because the float 0.7 lies below 7/10, yet 0.7 epochs of 10 tokens are 7 tokens, and .3 to .1 is 3 to 1.
    return Fraction(str(float(number)))


def _generator(seed: int, purpose: str, domain: str) -> np.random.Generator:
    """Returns a generator that depends on the seed, the purpose and the domain's name, and on nothing else."""
    if seed < 0:
        raise ValueError(f"the seed must be at least 0, got {seed}")
    # hash() of a string differs between processes; a digest does not.
    digest = hashlib.sha256(f"{purpose}\0{domain}".encode()).digest()
    key = np.frombuffer(digest, dtype="<u4").tolist()
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, *key])))


def _check_budget(budget: int, max_epochs: float, unit: str, setting: str) -> None:
    if isinstance(budget, bool) or not isinstance(budget, int | np.integer) or budget <= 0:
        raise BudgetError(
            f"the {unit} budget must be a whole number of at least 1, got {budget!r}; change the {unit} budget"
        )
    check_max_epochs(max_epochs, setting)


def check_max_epochs(max_epochs: float, setting: str) -> None:
    """Raises BudgetError, which names the setting, unless it is finite and above 0."""
    if not (math.isfinite(max_epochs) and max_epochs > 0):
        raise BudgetError(f"{setting} must be finite and above 0, got {max_epochs}; change {setting}")


def _check_same_domains(weights: Mapping[str, float], available_tokens: Mapping[str, int]) -> None:
    missing = [name for name in weights if name not in available_tokens]
    if missing:
        raise DataError(
            f"domain {missing[0]!r} has a weight but no token count; token counts are known for "
            f"{_list_names(available_tokens)}; load that domain too, or take weights that were learned on these domains"
        )
    unknown = [name for name in available_tokens if name not in weights]
    if unknown:
        raise DataError(
            f"domain {unknown[0]!r} has tokens but no weight; weights are known for {_list_names(weights)}; "
            "give it a weight (0 leaves it out), or leave that domain out"
        )


def _check_available(available_tokens: Mapping[str, int]) -> dict[str, int]:
    for name, count in available_tokens.items():
        if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 0:
            raise DataError(
                f"available tokens of domain {name!r} must be a whole number of at least 0, got {count!r}; "
                "count the tokens again"
            )
    return {name: int(count) for name, count in available_tokens.items()}


def _impossible_budget(
    budget: int,
    feasible: int,
    max_epochs: float,
    weights: Mapping[str, float],
    counts: Mapping[str, int],
    unit: str,
    setting: str,
) -> str:
    weighted = [count for name, count in counts.items() if weights[name] > 0]
    what = f"{unit} budget {budget:,} is impossible"
    if not sum(weighted):
        return f"{what}: no domain with a weight above 0 has any {unit}s; add data"
    # Caps are whole tokens, so the plain quotient can fall short by up to one token a domain.
    enough = (math.ceil(tokens / sum(weighted) * 100) / 100 for tokens in (budget, budget + len(weighted)))
    needed = next(epochs for epochs in enough if sum(epoch_cap(epochs, count) for count in weighted) >= budget)
    lower = f"lower the {unit} budget to {feasible:,} or " if feasible else ""
    return (
        f"{what}: {sum(weighted):,} {unit}s in domains with a weight above 0, each drawn at most {max_epochs:g} times, "
        f"give at most {feasible:,}; {lower}raise {setting} to {needed:.2f}"
    )


def _list_names(names: Mapping[str, object], most: int = 5) -> str:
    listed = ", ".join(list(names)[:most]) or "no domain"
    return listed if len(names) <= most else f"{listed} and {len(names) - most} more"
