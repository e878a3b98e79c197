"""The commands around the main model, as a person types them."""

import errno
import json
import shutil

import pytest
import torch
from tiny_baichuan import write_tiny_baichuan
from typer.testing import CliRunner

from doremi_mix.cli import app


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_tiny_baichuan(tmp_path_factory.mktemp("vendor") / "Baichuan2")


def test_convert_says_what_it_wrote_and_that_it_is_done(original, tmp_path):
    result = invoke("baichuan", "convert", original, tmp_path / "llama")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(f"{tmp_path / 'llama'}: 21 tensors, ")
    assert " parameters in 1 shard, 0.00 GB, verified (" in result.stdout
    again = invoke("baichuan", "convert", original, tmp_path / "llama")
    assert (again.exit_code, again.stdout) == (0, f"{tmp_path / 'llama'}: up to date\n")


def break_shard(folder):
    path = folder / "pytorch_model-00002-of-00002.bin"
    path.write_bytes(path.read_bytes()[:-1000])


def remove_shard(folder):
    (folder / "pytorch_model-00002-of-00002.bin").unlink()


def make_13b(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 5120, "num_attention_heads": 40}))


def other_vocabulary(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 401}))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (make_13b, ["13B", "ALiBi"]),
        (remove_shard, ["pytorch_model-00002-of-00002.bin"]),
        (break_shard, ["pytorch_model-00002-of-00002.bin"]),
        (other_vocabulary, ["400", "401"]),
    ],
)
def test_what_cannot_be_converted_is_one_line(original, tmp_path, spoil, words):
    """The whole messages are in test_baichuan_convert."""
    shutil.copytree(original, tmp_path / "source")
    spoil(tmp_path / "source")
    result = invoke("baichuan", "convert", tmp_path / "source", tmp_path / "llama")
    assert result.exit_code == 1
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    assert not (tmp_path / "llama" / "conversion.json").exists()


def test_an_original_folder_is_no_main_model(original, finetune_settings, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**finetune_settings, "finetune": {"model": str(original)}}))
    result = invoke("run", config, "--run-dir", tmp_path / "run")
    assert result.exit_code == 1
    assert result.stderr == (
        f"error: finetune.model: {original} is Baichuan2 in its original layout, which current libraries cannot run; "
        f"convert it first: doremi-mix baichuan convert {original} DST\n"
    )
    assert not (tmp_path / "run").exists()


def logits(model, ids):
    with torch.no_grad():
        return model(ids)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_adapter_of_a_run_in_three_forms(tuned, main_model, tmp_path):
    """Plain peft on the converted model, the merged model, and peft on the original layout say the same."""
    from baichuan_reference import ReferenceBaichuan2
    from peft import LoraConfig, PeftModel, inject_adapter_in_model, set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    run = tuned.parent
    for form in ("peft", "merged", "w-pack"):
        more = ["--base", main_model.with_name("original")] if form == "w-pack" else []
        result = invoke("adapter", run, tmp_path / form, "--form", form, *more)
        assert result.exit_code == 0, result.stderr
        assert result.stdout.startswith(f"{tmp_path / form}: {form}, 2,048 parameters of adapters over ")
    ids = torch.tensor([[5, 300, 20, 7, 111, 64]])
    base = AutoModelForCausalLM.from_pretrained(main_model)
    before = logits(base, ids).logits
    expected = logits(PeftModel.from_pretrained(base, str(tmp_path / "peft")).eval(), ids).logits
    assert (expected - before).abs().max() > 0.01
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), ids).logits
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)
    source = main_model.with_name("original")
    reference = ReferenceBaichuan2(json.loads((source / "config.json").read_text()))
    weights = {}
    for path in sorted(source.glob("*.bin")):
        weights |= torch.load(path, weights_only=True)
    reference.load_state_dict({name: tensor for name, tensor in weights.items() if "inv_freq" not in name})
    inject_adapter_in_model(LoraConfig.from_pretrained(str(tmp_path / "w-pack")), reference.eval())
    set_peft_model_state_dict(reference, load_file(tmp_path / "w-pack" / "adapter_model.safetensors"))
    torch.testing.assert_close(logits(reference.eval(), ids), expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_for_another_base(tuned, tmp_path):
    from doremi_mix.baichuan.convert import convert

    convert(write_tiny_baichuan(tmp_path / "other", seed=1), tmp_path / "other-llama")
    result = invoke(
        "adapter", tuned.parent, tmp_path / "merged", "--form", "merged", "--base", tmp_path / "other-llama"
    )
    assert result.exit_code == 1
    (line,) = result.stderr.strip().splitlines()
    assert "its adapter is for another base" in line
    assert not (tmp_path / "merged").exists()


def test_the_original_layout_needs_the_original_base(tuned, tmp_path):
    result = invoke("adapter", tuned.parent, tmp_path / "out", "--form", "w-pack")
    assert (result.exit_code, result.stderr) == (
        1,
        "error: --form w-pack is for Baichuan2's original layout; say where that lies: --base FOLDER\n",
    )


def test_a_run_that_was_not_tuned_has_no_adapter(drawn, tmp_path):
    result = invoke("adapter", drawn, tmp_path / "out", "--form", "peft")
    assert result.exit_code == 1
    assert result.stderr == (
        f"error: finetune has not finished in {drawn}; run: doremi-mix finetune --run-dir {drawn}\n"
    )


@pytest.mark.parametrize("form", ["peft", "merged", "w-pack"])
def test_what_the_system_refuses_is_one_line(tuned, main_model, tmp_path, monkeypatch, form):
    (tmp_path / "file").touch()
    arguments = ("adapter", tuned.parent, tmp_path / "file" / "out", "--form", form)
    more = ["--base", main_model.with_name("original")] if form == "w-pack" else []
    result = invoke(*arguments, *more)
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (
        1,
        f"error: {tmp_path / 'file' / 'out'}: cannot be written (Not a directory); choose another folder",
    )

    def locked(_):
        raise PermissionError(errno.EACCES, "Permission denied", str(tuned))

    monkeypatch.setattr("doremi_mix.adapters.is_adapter_folder", locked)
    result = invoke(*arguments, *more)
    assert (result.exit_code, result.stderr) == (
        1,
        f"error: {tuned}: cannot be read (Permission denied); change its permissions, or give another\n",
    )


def test_the_original_base_must_be_that_of_the_adapter(tuned, main_model, tmp_path):
    other = write_tiny_baichuan(tmp_path / "other", seed=1, tokenizer=main_model.with_name("original"))
    for base, words in ((main_model, "is the converted model"), (other, "its adapter is for another base: ")):
        result = invoke("adapter", tuned.parent, tmp_path / "out", "--form", "w-pack", "--base", base)
        assert result.exit_code == 1
        (line,) = result.stderr.strip().splitlines()
        assert words in line
        assert not (tmp_path / "out").exists()
