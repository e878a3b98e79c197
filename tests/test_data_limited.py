"""A domain of few rows that asks for much weight: what repeating it does, and that budget and epoch cap prevent it."""

import json
import random
import shutil

import numpy as np
import pytest
from conftest import WORDS, read_log

from doremi_mix import learn
from doremi_mix.batches import Schedule
from doremi_mix.distributed import Processes
from doremi_mix.objectives import PlainObjective
from doremi_mix.pipeline import resolve
from doremi_mix.progress import Narrator
from doremi_mix.run import RunDirectory, read_json
from doremi_mix.stages import StageContext, compare, training

NAMES = ("large", "middle", "tiny")
BUDGET = 32_000
WEIGHTS = {"large": 0.1, "middle": 0.1, "tiny": 0.8}


def rows_of(name, words, num_rows, *, noise):
    """Answers of twelve words: in a cycle, which generalizes, or drawn at random, which can only be memorized."""
    rng = random.Random(name)
    rows = []
    for number in range(num_rows):
        start = rng.randrange(len(words))
        answer = rng.choices(words, k=12) if noise else [words[(start + i) % len(words)] for i in range(12)]
        rows.append({"instruction": f"{name} {number}", "output": " ".join(answer)})
    return rows


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Two domains of plenty, and one of few rows of noise."""
    folder = tmp_path_factory.mktemp("planted")
    for name, words, num_rows in (("large", "fruit", 400), ("middle", "水", 400), ("tiny", "metal", 28)):
        rows = rows_of(name, WORDS[words], num_rows, noise=name == "tiny")
        (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def settings(model_config, tmp_path_factory):
    """A model that is large enough to learn a few rows by heart, and a reference that has done so."""
    config = json.loads(model_config.read_text())
    config |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    path = tmp_path_factory.mktemp("larger") / "config.json"
    path.write_text(json.dumps(config))
    return {
        "tokenize": {
            "vocab_size": 420,
            "context_length": 64,
            "held_out_fraction": 0.45,
            "preamble": "",
            "turn": "{query}:",
        },
        "reference": {
            "model": str(path),
            "steps": 60,
            "batch_size": 8,
            "learning_rate": 0.01,
            "weights": WEIGHTS,
            "folds": 1,
        },
        "proxy": {"method": "doremi", "steps": 20, "batch_size": 6},
    }


@pytest.fixture(scope="module")
def unbounded(planted, settings, tmp_path_factory):
    """Weights learned for no budget; read only."""
    run_dir = tmp_path_factory.mktemp("unbounded") / "run"
    learn(planted, run_dir, quiet=True, **settings)
    return run_dir


def held_out_loss(run_dir, folder, max_epochs, seed):
    """Trains a small model on ``WEIGHTS`` as stage compare does; returns its loss on tiny, and the epochs over it."""
    run = RunDirectory(run_dir)
    given = {**run.describe()["given"], "mixture": {"token_budget": BUDGET, "max_epochs": max_epochs}}
    config, _ = resolve(given, run)
    store = training.open_store(run)
    ids, available = compare._available(config, store, BUDGET, seed)
    planned = compare.plan_training_set(config, store, "planted", WEIGHTS, available, ids, BUDGET)
    schedule = Schedule.of_totals(ids, planned.num_sequences_K, planned.num_steps, seed)
    section = config.compare.model_copy(update={"seed": seed, "steps": planned.num_steps, "checkpoint_every": 10**6})
    context = StageContext(config, run, folder, Narrator(quiet=True), Processes())
    model, accelerator = training.train_model(context, section, PlainObjective(), schedule)
    losses = training.summarize_held_out(store, training.score_held_out(store, model, accelerator))
    return losses["tiny"].loss, schedule.epochs()[2]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_repeating_few_rows_makes_their_domain_worse(unbounded, tmp_path, seed):
    capped, few = held_out_loss(unbounded, tmp_path / "capped", 4, seed)
    repeated, many = held_out_loss(unbounded, tmp_path / "repeated", 10**6, seed)
    assert few == pytest.approx(4, abs=0.3)
    assert many > 60
    # More of the same budget went to the domain, and it has less of it.
    assert repeated > capped + 1, (seed, capped, repeated)


def cap_of(run_dir, max_epochs=4):
    """The largest share of the budget that so many passes over tiny can fill."""
    return max_epochs * training.open_store(RunDirectory(run_dir)).available_tokens[2] / BUDGET


def weights_of_tiny(run_dir):
    return np.array([p["domain_weights"]["tiny"] for p in read_log(run_dir / "proxy" / "trajectory.jsonl")])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_proxy_that_learns_for_a_budget_never_gives_a_domain_more_than_it_can_fill(
    unbounded, planted, settings, tmp_path, seed
):
    """Not in the average alone: in no update."""
    run_dir = tmp_path / "run"
    shutil.copytree(unbounded, run_dir)
    proxy = {**settings["proxy"], "seed": seed}
    learn(planted, run_dir, quiet=True, **{**settings, "proxy": proxy})
    cap = cap_of(run_dir)
    assert 0.02 < cap < 0.05
    free = weights_of_tiny(run_dir)
    assert free.max() > 1.5 * cap, free
    assert free.mean() > cap
    weights = learn(planted, run_dir, token_budget=BUDGET, quiet=True, **{**settings, "proxy": proxy})
    bounded = weights_of_tiny(run_dir)
    assert len(bounded) == 20
    assert bounded.max() <= cap * (1 + 1e-12)
    # It asks for as much as it may have: the cap is felt in the learning, and not cut off afterwards.
    assert (bounded > 0.999 * cap).mean() > 0.5
    assert weights["tiny"] <= cap * (1 + 1e-12)
    for point in read_log(run_dir / "proxy" / "trajectory.jsonl"):
        assert sum(point["domain_weights"].values()) == pytest.approx(1, abs=1e-12)
    allocation = read_json(run_dir / "mixture" / "allocation.json")
    assert allocation["domains"]["tiny"]["epochs"] <= 4
    # The weights are what is drawn: nothing is left for the mixture's own cap to take away.
    allocated = {name: domain["allocated_tokens"] / BUDGET for name, domain in allocation["domains"].items()}
    assert allocated == pytest.approx(dict(weights.domain_weights), abs=1e-4)


@pytest.mark.parametrize(
    "weights", [{"num_seeds": 2, "shrink": "evidence"}, {"shrink": 0.5, "shrink_toward": "uniform"}]
)
def test_what_is_shrunk_stays_under_the_cap(unbounded, planted, settings, tmp_path, weights):
    """Uniform weights lie above the cap."""
    run_dir = tmp_path / "run"
    shutil.copytree(unbounded, run_dir)
    learned = learn(planted, run_dir, token_budget=BUDGET, quiet=True, **settings, weights=weights)
    assert learned["tiny"] <= cap_of(run_dir) * (1 + 1e-12)
    assert sum(learned.domain_weights.values()) == pytest.approx(1, abs=1e-9)
