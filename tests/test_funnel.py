"""Every row has one fate: kept, or taken by the first step that it failed."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from doremi_mix.filters.funnel import KEPT, Funnel, Step


def step(name):
    return Step(name, lambda _domain, positions: np.zeros(len(positions)), lambda _domain, positions: [name])


def test_a_row_stays_with_the_first_step_that_takes_it():
    funnel = Funnel([3, 2])
    funnel.apply(step("short"), [np.array([True, False, False]), np.array([False, False])])
    funnel.apply(step("long"), [np.array([True, True, False]), np.array([False, True])])
    assert [fates.tolist() for fates in funnel.fates] == [[0, 1, KEPT], [KEPT, 1]]
    assert [mask.tolist() for mask in funnel.kept()] == [[False, False, True], [True, False]]
    assert funnel.num_kept == 2
    assert funnel.rejected_of(0) == {"short": 1, "long": 1}
    assert funnel.rejected_of(1) == {"long": 1}
    assert funnel.describe_steps() == [
        {"rule": "short", "applies": "all", "rows_before": 5, "rejected": 1},
        {"rule": "long", "applies": "all", "rows_before": 4, "rejected": 2},
    ]


def test_two_steps_of_one_rule_are_added_up():
    funnel = Funnel([4])
    funnel.apply(step("text_length"), [np.array([True, False, False, False])])
    funnel.apply(step("text_length"), [np.array([False, True, False, False])])
    assert funnel.rejected_of(0) == {"text_length": 2}


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), max_size=5))
def test_rows_in_are_rows_kept_plus_rows_rejected(masks):
    funnel = Funnel([2, 4])
    for number, mask in enumerate(masks):
        funnel.apply(step(str(number)), [np.array(mask[:2]), np.array(mask[2:])])
    rejected = sum(sum(funnel.rejected_of(i).values()) for i in range(2))
    assert funnel.num_kept + rejected == 6
    assert funnel.num_kept == 6 - sum(any(mask[i] for mask in masks) for i in range(6))
