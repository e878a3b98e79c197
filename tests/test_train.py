"""The training step: micro-batches and processes change nothing but the order of sums."""

import copy

import numpy as np
import pytest
import torch
import transformers

from doremi_mix.dro import GroupDRO
from doremi_mix.engine import make_accelerator
from doremi_mix.models import TokenInfo, build_model
from doremi_mix.objectives import PlainObjective, ProxyObjective
from doremi_mix.train import TrainingPlan
from doremi_mix.types import Domains


def batch_of(num_sequences, T=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 50, (num_sequences, T), generator=generator)
    labels = ids.roll(-1, 1).masked_fill(torch.rand(num_sequences, T, generator=generator) < 0.3, -100)
    labels[:, -1] = -100
    return {
        "input_ids_BT": ids,
        "labels_BT": labels,
        "position_ids_BT": torch.arange(T).expand(num_sequences, T),
        "document_ids_BT": torch.zeros(num_sequences, T, dtype=torch.int32),
        "domain_ids_B": torch.arange(num_sequences) % 3,
        "reference_loss_BT": torch.rand(num_sequences, T, generator=generator) * 4,
    }


def halves(batch):
    return [{name: tensor[part] for name, tensor in batch.items()} for part in (slice(0, 4), slice(4, None))]


def gradients(objective, model, batches):
    model = copy.deepcopy(model)
    logged = objective.backward(model, batches, make_accelerator())
    return logged, [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    "make",
    [PlainObjective, lambda: ProxyObjective(Domains(("a", "b", "c")), GroupDRO(step_size=1.0, smoothing=1e-3))],
)
def test_two_micro_batches_equal_one(make, model_config):
    model = build_model(str(model_config), TokenInfo(50, 1, 0), 12, seed=0)
    batch = batch_of(9)
    one, two = make(), make()
    logged_one, gradients_one = gradients(one, model, [batch])
    logged_two, gradients_two = gradients(two, model, halves(batch))
    assert torch.allclose(logged_one, logged_two, atol=1e-6)
    assert gradients_one
    for left, right in zip(gradients_one, gradients_two, strict=True):
        assert torch.allclose(left, right, atol=1e-6)


def test_alpha_is_from_this_batch_and_weights_its_gradient(model_config):
    """alpha_t is computed from batch t before the gradient of batch t uses it."""
    model = build_model(str(model_config), TokenInfo(50, 1, 0), 12, seed=0)
    batch = batch_of(9)
    objective = ProxyObjective(Domains(("a", "b", "c")), GroupDRO(step_size=1.0, smoothing=1e-3))
    logged, got = gradients(objective, model, [batch])
    weights_K = logged[0]
    assert not torch.allclose(weights_K, torch.full((3,), 1 / 3, dtype=torch.float64))
    mask = batch["labels_BT"] != -100
    loss = model(*(batch[name] for name in ("input_ids_BT", "labels_BT", "position_ids_BT", "document_ids_BT")))
    expected = sum(
        weights_K[i].float() * loss[batch["domain_ids_B"] == i].sum() / mask[batch["domain_ids_B"] == i].sum()
        for i in range(3)
    )
    wanted = torch.autograd.grad(expected, [p for p in model.parameters() if p.requires_grad])
    for left, right in zip(got, wanted, strict=True):
        assert torch.allclose(left, right, atol=1e-6)


def test_the_objectives_state_survives_a_checkpoint(model_config):
    model = build_model(str(model_config), TokenInfo(50, 1, 0), 12, seed=0)
    objective = ProxyObjective(Domains(("a", "b", "c")), GroupDRO(step_size=1.0, smoothing=1e-3))
    gradients(objective, model, [batch_of(9)])
    other = ProxyObjective(Domains(("a", "b", "c")), GroupDRO(step_size=1.0, smoothing=1e-3))
    other.restore(objective.state())
    assert other.learned.num_updates == 1
    assert torch.equal(other.learned.weights_K, objective.learned.weights_K)
    assert torch.equal(other.learned.weight_sum_K, objective.learned.weight_sum_K)


def test_learning_rate_rises_then_falls_to_a_tenth():
    plan = TrainingPlan("proxy", 100, 1.0, 0.1, 0.0, 1.0, 1, 5)
    rates = np.array([plan.learning_rate_at(step) for step in range(100)])
    assert rates[:10].tolist() == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert (np.diff(rates[10:]) < 0).all()
    assert rates[-1] == pytest.approx(0.1, abs=0.001)


@pytest.mark.parametrize(("num_steps", "share", "warmup"), [(110, 0.03, 4), (90, 0.03, 3), (7, 0.03, 1), (100, 0, 0)])
def test_learning_rate_as_the_trainer_of_transformers_has_it(num_steps, share, warmup):
    """From zero, the share of the steps rounded up, a cosine to zero."""
    plan = TrainingPlan("finetune", num_steps, 2.0, share, 0.0, 1.0, 1, 5, final_share=0.0, warmup_from_zero=True)
    schedule = transformers.get_cosine_schedule_with_warmup(
        torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0), warmup, num_steps
    )
    for step in range(num_steps):
        assert plan.learning_rate_at(step) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        schedule.optimizer.step()
        schedule.step()


def test_a_training_of_one_step_is_one():
    plan = TrainingPlan("finetune", 1, 2.0, 0.03, 0.0, 1.0, 1, 1, final_share=0.0, warmup_from_zero=True)
    assert plan.learning_rate_at(0) == 2.0
