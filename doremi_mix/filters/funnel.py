"""Which rows are still kept, and which step took each of the others: every row has one fate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

KEPT = -1


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a filter, after it was applied.

    Attributes:
        name: of the rule, or ``exact_duplicate``, ``near_duplicate``, ``diversity``, or a Data-Juicer operator.
        values: of rows (domain id, positions): what was measured, float64; NaN where that is no number.
        details: of rows: one sentence for a person on each, with the value and what was expected.
        applies: to which rows, where it is not for all: ``zh`` or ``other``.
    """

    name: str
    values: Callable[[int, NDArray[np.int64]], NDArray[np.float64]]
    details: Callable[[int, NDArray[np.int64]], Sequence[str]]
    applies: str = "all"


class Funnel:
    """The fate of every row.

    Attributes:
        steps: those applied so far, in order.
        fates: by domain, for each row the number of the step that rejected it, or ``KEPT``.
    """

    def __init__(self, num_rows: Sequence[int]) -> None:
        self.steps: list[Step] = []
        self.fates: list[NDArray[np.int16]] = [np.full(count, KEPT, dtype=np.int16) for count in num_rows]

    def kept(self) -> list[NDArray[np.bool_]]:
        """Returns by domain which rows are still kept."""
        return [fates == KEPT for fates in self.fates]

    @property
    def num_kept(self) -> int:
        """How many rows are still kept."""
        return sum(int(np.count_nonzero(fates == KEPT)) for fates in self.fates)

    def apply(self, step: Step, failed: Sequence[NDArray[np.bool_]]) -> None:
        """Rejects rows that are still kept.

        Args:
            step: who rejects them.
            failed: by domain, the rows that do not pass; those that an earlier step took stay with it.
        """
        for fates, mask in zip(self.fates, failed, strict=True):
            fates[mask & (fates == KEPT)] = len(self.steps)
        self.steps.append(step)

    def rejected_of(self, domain_id: int) -> dict[str, int]:
        """Returns how many rows of a domain each step took; steps that took none are left out."""
        counts = np.bincount(self.fates[domain_id] + 1, minlength=len(self.steps) + 1)[1:]
        result: dict[str, int] = {}
        for step, count in zip(self.steps, counts.tolist(), strict=True):
            if count:
                result[step.name] = result.get(step.name, 0) + count
        return result

    def describe_steps(self) -> list[dict[str, int | str]]:
        """Returns of every step its name, the rows that came to it and the rows that it took."""
        before = sum(len(fates) for fates in self.fates)
        result: list[dict[str, int | str]] = []
        for number, step in enumerate(self.steps):
            taken = sum(int(np.count_nonzero(fates == number)) for fates in self.fates)
            result.append({"rule": step.name, "applies": step.applies, "rows_before": before, "rejected": taken})
            before -= taken
        return result
