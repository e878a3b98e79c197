"""Held-out losses and their errors."""

import math

import numpy as np
import pytest
import torch

from doremi_mix.evaluation import score_sequences, summarize_losses


def test_the_standard_error_is_that_of_the_ratio_over_many_draws():
    rng = np.random.default_rng(0)
    ratios, errors = [], []
    for _ in range(2000):
        tokens = rng.integers(5, 50, size=40).astype(float)
        losses = tokens * rng.normal(3.0, 0.5, size=40)
        summary = summarize_losses(losses, tokens)
        ratios.append(summary.loss)
        errors.append(summary.standard_error)
    assert np.mean(ratios) == pytest.approx(3.0, abs=0.01)
    assert np.mean(errors) == pytest.approx(np.std(ratios), rel=0.05)


def test_few_sequences_have_no_error():
    assert math.isnan(summarize_losses(np.array([2.0]), np.array([1.0])).standard_error)
    assert math.isnan(summarize_losses(np.zeros(0), np.zeros(0)).loss)


def test_processes_share_the_sequences():
    ids = np.arange(100, 111)

    def score(batch):
        return torch.from_numpy(np.stack([batch, np.ones_like(batch)], axis=1))

    alone = score_sequences(ids, score, 3)
    assert alone[:, 0].tolist() == ids.tolist()
    shares = [score_sequences(ids, score, 3, index, 2) for index in range(2)]
    assert (shares[0] * shares[1] == 0).all()
    assert ((shares[0] + shares[1]) == alone).all()
