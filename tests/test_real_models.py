"""Proxies that are real models: adapters over one checkpoint, through the whole pipeline."""

import json

import pytest
import torch
import transformers
from conftest import read_log

from doremi_mix import learn, models
from doremi_mix.errors import ConfigError

TARGETS = {"reference": ["q_proj"], "proxy": ["v_proj"]}


@pytest.fixture(scope="module")
def checkpoint(finished_run, tmp_path_factory):
    """A folder with a small Llama under the tokenizer of another run."""
    folder = tmp_path_factory.mktemp("checkpoint") / "base"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=400,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes((finished_run / "tokenize" / "bpe" / "tokenizer.json").read_bytes())
    return folder


def settings(checkpoint, rank, **more):
    return {
        "tokenize": {"tokenizer": str(checkpoint / "tokenizer.json"), "context_length": 64},
        "reference": {
            "model": str(checkpoint),
            "lora_rank": rank,
            "steps": 12,
            "batch_size": 6,
            "learning_rate": 0.01,
            **more,
        },
    }


def test_adapters_learn_and_the_base_does_not(corpus, checkpoint, tmp_path):
    before = (checkpoint / "model.safetensors").read_bytes()
    weights = learn(
        corpus,
        tmp_path / "run",
        quiet=True,
        tracking={"trackers": ["tensorboard"]},
        **settings(checkpoint, 4, gradient_checkpointing=True),
    )
    assert sum(weights.domain_weights.values()) == pytest.approx(1)
    for stage, num_steps in (("reference", 12), ("proxy", 6)):
        losses = [line["loss"] for line in read_log(tmp_path / "run" / stage / "metrics.jsonl")]
        assert len(losses) == num_steps
        assert sum(losses[-3:]) < sum(losses[:3])
        assert sorted(path.name for path in (tmp_path / "run" / stage / "model").iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
            "doremi_mix_adapter.json",
        ]
        assert list((tmp_path / "run" / "tracking" / "tensorboard" / stage).iterdir())
        metrics = json.loads((tmp_path / "run" / stage / "metrics.json").read_text())
        assert 0 < metrics["num_trained_parameters"] < metrics["num_parameters"]
    assert (checkpoint / "model.safetensors").read_bytes() == before
    assert not models._base  # freed with the last stage that needs it


def test_adapters_on_other_layers_and_a_second_run_in_one_process(corpus, checkpoint, tmp_path):
    first = settings(checkpoint, 4, lora_target_modules=TARGETS["reference"])
    learn(
        corpus, tmp_path / "one", quiet=True, **first, proxy={"lora_rank": 2, "lora_target_modules": TARGETS["proxy"]}
    )
    for stage, targets in TARGETS.items():
        config = json.loads((tmp_path / "one" / stage / "model" / "adapter_config.json").read_text())
        assert {name.rpartition(".")[2] for name in config["target_modules"]} == set(targets)
    # What an earlier run left in memory does not show.
    learn(corpus, tmp_path / "two", quiet=True, **settings(checkpoint, 4))
    models.forget_base()
    learn(corpus, tmp_path / "three", quiet=True, **settings(checkpoint, 4))
    names = ("weights/domain_weights.json", "proxy/trajectory.jsonl")
    for name in names:
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()


def test_adapters_need_weights_to_adapt(corpus, checkpoint, tmp_path):
    with pytest.raises(ConfigError) as caught:
        learn(corpus, tmp_path / "run", quiet=True, reference={"model": "tiny", "lora_rank": 4})
    assert str(caught.value) == (
        "reference.lora_rank is 4, but reference.model tiny starts from fresh weights, which adapters cannot make up "
        "for; give a checkpoint, or no lora_rank"
    )
    with pytest.raises(ConfigError) as caught:
        learn(corpus, tmp_path / "run", quiet=True, reference={"model": str(checkpoint), "lora_alpha": 4})
    assert str(caught.value) == "reference.lora_alpha is given without reference.lora_rank; give both, or neither"
    assert not (tmp_path / "run").exists()
