"""Several models score the same rows; whether a row is kept is put to the vote.

Axes: M models, N rows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def vote(
    values_MN: NDArray[np.floating], low: float | None, high: float | None, *, min_votes: int | None = None
) -> tuple[NDArray[np.bool_], NDArray[np.floating]]:
    """Decides which rows are kept, by the median of the models or by how many of them agree.

    A row is kept where its median lies in [low, high], or, with ``min_votes``, where so many of the M values do.  NaN
    is no vote: the median is that of the others, and a count is not made up for it.  A row that no model could score is
    kept, as nothing speaks against it.

    Args:
        values_MN: what each model says of each row; NaN where it says nothing.
        low: the smallest value that is good; None for no bound.
        high: the largest value that is good; None for no bound.
        min_votes: how many of the models must find the row good, from 1 to M; None for the median.

    Returns:
        Whether each row is kept, and the median of its values (of an even number of them, the mean of the middle two;
        NaN where there are none), both shape [N].

    Raises:
        ValueError: there is no model, or ``min_votes`` is out of range.

    Example:
        >>> values_MN = np.array([[0.5, 0.1, np.nan], [0.7, 0.5, np.nan], [2.0, 2.0, np.nan]])
        >>> [column.tolist() for column in vote(values_MN, 0.2, 0.9)]
        [[True, True, True], [0.7, 0.5, nan]]
        >>> vote(values_MN, 0.2, 0.9, min_votes=2)[0].tolist()
        [True, False, True]
    """
    num_models = len(values_MN)
    if num_models == 0:
        raise ValueError("a vote needs at least one model, got none")
    if min_votes is not None and not 1 <= min_votes <= num_models:
        raise ValueError(
            f"min_votes must be from 1 to the number of models, which is {num_models}, got {min_votes}; "
            "ask for fewer votes or name more models"
        )
    said_MN = ~np.isnan(values_MN)
    is_scored_N = said_MN.any(axis=0)
    value_N = np.full(values_MN.shape[1], np.nan, dtype=values_MN.dtype)
    value_N[is_scored_N] = np.nanmedian(values_MN[:, is_scored_N], axis=0)
    if min_votes is None:
        keep_N = _inside(value_N, low, high)
    else:
        keep_N = (_inside(values_MN, low, high) & said_MN).sum(axis=0) >= min_votes
    return keep_N | ~is_scored_N, value_N


def _inside(values: NDArray[np.floating], low: float | None, high: float | None) -> NDArray[np.bool_]:
    inside = np.ones(values.shape, dtype=bool)
    if low is not None:
        inside &= values >= low
    if high is not None:
        inside &= values <= high
    return inside
