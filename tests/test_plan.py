"""What is chosen when nothing is given."""

import pytest

from doremi_mix.config import parse_config
from doremi_mix.plan import MICRO_BATCH_TOKENS, accumulation, choose
from doremi_mix.presets import PRESETS

SOURCES = {"sources": [{"path": "a.json"}, {"path": "b.json"}]}


def chosen(num_domains=20, hardware="cpu", **sections):
    return choose(parse_config({**SOURCES, **sections}), num_domains, hardware)


def test_nothing_is_left_open():
    for hardware, model, context in (("cpu", "tiny", 256), ("cuda", "120m", 1024)):
        config = chosen(hardware=hardware)
        assert config.reference.model == config.proxy.model == model
        assert config.tokenize.context_length == context
        for section in (config.reference, config.proxy):
            assert None not in (section.steps, section.batch_size, section.learning_rate, section.checkpoint_every)


def test_every_domain_is_in_every_batch_twice():
    doremi = {"method": "doremi"}
    assert chosen(num_domains=20, proxy=doremi).proxy.batch_size == 40
    assert chosen(num_domains=200, hardware="cuda", proxy=doremi).proxy.batch_size == 400


def test_headroom_is_learned_at_the_length_of_the_main_training():
    config = chosen(num_domains=20, proxy={"token_budget": 1_000_000})
    assert config.reference.batch_size == config.proxy.batch_size == 20
    tokens = config.reference.steps * 20 * 256 * 0.9
    assert tokens == pytest.approx(1_000_000, rel=0.01)
    assert config.proxy.steps == config.reference.steps // 2
    # Never longer than the hardware gives, nor so short that nothing is averaged.
    without = chosen(num_domains=20).reference.steps
    assert without == chosen(num_domains=20, proxy={"token_budget": 10**12}).reference.steps
    assert chosen(num_domains=20, proxy={"token_budget": 10}).reference.steps == 100
    assert chosen(proxy={"steps": 30}).reference.steps == 60


def test_each_method_has_its_reference_weights():
    assert chosen().reference.weights == "uniform"
    assert chosen(proxy={"method": "doremi"}).reference.weights == "natural"
    assert chosen(reference={"weights": "natural"}).reference.weights == "natural"


def test_fresh_embeddings_learn_faster():
    assert chosen().reference.embedding_learning_rate == pytest.approx(20 * PRESETS["tiny"].learning_rate)
    assert chosen(reference={"learning_rate": 1e-3}).proxy.embedding_learning_rate == pytest.approx(2e-2)
    assert chosen(reference={"embedding_learning_rate": 0.5}).compare.embedding_learning_rate == 0.5
    config = chosen(reference={"model": "somebody/checkpoint"})
    assert config.reference.embedding_learning_rate == config.reference.learning_rate


def test_the_proxy_is_like_the_reference_unless_told():
    reference = {"model": "small", "steps": 7, "batch_size": 50, "learning_rate": 0.5}
    config = chosen(reference=reference, proxy={"method": "doremi"})
    assert config.proxy.model_dump(include={"model", "steps", "batch_size", "learning_rate"}) == {
        "model": "small",
        "steps": 7,
        "batch_size": 50,
        "learning_rate": 0.5,
    }


def test_a_learning_rate_belongs_to_its_model():
    config = chosen(reference={"model": "tiny"}, proxy={"model": "280m"})
    assert config.reference.learning_rate == PRESETS["tiny"].learning_rate
    assert config.proxy.learning_rate == PRESETS["280m"].learning_rate
    pretrained = chosen(reference={"model": "tiny"}, proxy={"model": "some/checkpoint"})
    assert pretrained.proxy.learning_rate == 2e-5


def test_a_checkpoint_brings_its_tokenizer(model_config):
    assert chosen(reference={"model": "some/checkpoint"}).tokenize.tokenizer == "some/checkpoint"
    assert chosen(reference={"model": "tiny"}).tokenize.tokenizer is None
    assert chosen(reference={"model": str(model_config)}).tokenize.tokenizer is None
    given = chosen(reference={"model": "some/checkpoint"}, tokenize={"tokenizer": "mine"})
    assert given.tokenize.tokenizer == "mine"


def lora_of(section):
    return section.lora_rank, section.lora_alpha, section.lora_target_modules


def test_adapters_go_with_the_model():
    """What one section says of them holds for the other, if it has the same model."""
    lora = {"model": "some/base", "lora_rank": 8, "lora_alpha": 4, "lora_target_modules": ["q_proj"]}
    for sections in ({"reference": lora}, {"proxy": lora}):
        config = chosen(**sections)
        assert lora_of(config.reference) == lora_of(config.proxy) == (8, 4, ("q_proj",))
        assert config.reference.learning_rate == config.proxy.learning_rate == 2e-4
    own_rank = chosen(reference=lora, proxy={"lora_rank": 64})
    assert lora_of(own_rank.proxy) == (64, None, None)
    assert lora_of(chosen(reference=lora, proxy={"model": "tiny"}).proxy) == (None, None, None)


def test_how_a_step_is_run_goes_from_the_reference_to_the_proxy():
    given = {"shard": True, "gradient_checkpointing": True, "compile": False, "gradient_accumulation_steps": 4}
    assert chosen(reference=given).proxy.model_dump(include=set(given)) == given
    own = {"shard": False, "gradient_checkpointing": False, "compile": True, "gradient_accumulation_steps": 2}
    assert chosen(reference=given, proxy=own).proxy.model_dump(include=set(own)) == own


def test_micro_batches_fit_and_never_outnumber_sequences():
    proxy = chosen(proxy={"batch_size": 64}).proxy
    assert accumulation(proxy, MICRO_BATCH_TOKENS // 64, 1) == 1
    assert accumulation(proxy, MICRO_BATCH_TOKENS // 16, 1) == 4
    assert accumulation(proxy, MICRO_BATCH_TOKENS // 16, 2) == 2
    assert accumulation(proxy, MICRO_BATCH_TOKENS * 10, 1) == 64
    given = chosen(proxy={"gradient_accumulation_steps": 3}).proxy
    assert accumulation(given, 8, 1) == 3


@pytest.mark.parametrize("hardware", ["cpu", "cuda"])
def test_choosing_twice_changes_nothing(hardware):
    config = chosen(hardware=hardware)
    assert choose(config, 20, hardware) == config
