"""Converted to Llama layout, Baichuan2 computes the very same logits; whatever is wrong with a checkpoint is said."""

import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from baichuan_reference import ReferenceBaichuan2
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_baichuan import (
    random_weights,
    train_tiny_tokenizer,
    vendor_config,
    write_json,
    write_tiny_baichuan,
    write_weights,
)
from torch.nn import functional
from typer.testing import CliRunner

from doremi_mix.baichuan import convert as convert_module
from doremi_mix.baichuan import writer
from doremi_mix.baichuan.convert import Conversion, convert, source_bytes
from doremi_mix.baichuan.layout import llama_tensors, read_layout, vendor_shapes
from doremi_mix.baichuan.record import sha256_of, verify_conversion
from doremi_mix.baichuan.shards import checked_sha256
from doremi_mix.cli import app
from doremi_mix.errors import ModelError
from doremi_mix.models import TokenInfo, build_model
from doremi_mix.tokenizer import load_tokenizer

VOCAB_SIZE = 400
PUBLISHED_7B = vendor_config(125_696, 4096, 11008, 32, 32)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    return train_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), VOCAB_SIZE)


@pytest.fixture
def write(tmp_path, tokenizer_folder):
    """Writes a checkpoint into tmp_path/source."""
    return lambda **settings: write_tiny_baichuan(
        tmp_path / "source", **{"vocab_size": VOCAB_SIZE, "tokenizer": tokenizer_folder, **settings}
    )


def originals(source, **changes):
    """The vendor's tensors by name, read by torch and safetensors."""
    tensors = {}
    for path in source.iterdir():
        if path.suffix == ".bin":
            tensors |= torch.load(path, weights_only=True)
        elif path.suffix == ".safetensors":
            tensors |= load_file(path)
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("inv_freq")} | changes


def reference_of(source):
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    model = ReferenceBaichuan2(config)
    model.load_state_dict(originals(source))
    return model.eval()


def results(target):
    tensors = {}
    for path in target.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def llama(target):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(target, attn_implementation="sdpa", dtype=torch.float32).eval()


def change_config(source, **changes):
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    write_json(source / "config.json", config | changes)


def flip(path, position):
    """Flips the lowest bit of a byte."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def flip_weight(path, name):
    """Flips the lowest bit of a tensor's first number, which stays finite."""
    tensors = torch.load(path, weights_only=True) if path.suffix == ".bin" else load_file(path)
    flip(path, path.read_bytes().index(tensors[name].numpy().tobytes()))


def type_in(*arguments):
    """Exit code, stdout and stderr of the command, as a person types it."""
    result = CliRunner().invoke(app, ["baichuan", "convert", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def refusal(source, target):
    """The message of a conversion that must fail, with the folders' paths left out."""
    with pytest.raises(ModelError) as caught:
        convert(source, target)
    text = str(caught.value)
    assert "\n" not in text
    return text.replace(str(source), "SRC").replace(str(target), "DST")


# --- the answer ---


@pytest.mark.parametrize("form", ["bin", "safetensors"])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_the_logits_are_those_of_the_original(write, tmp_path, form, num_shards):
    source = write(format=form, num_shards=num_shards, num_layers=3, seed=num_shards)
    convert(source, tmp_path / "target", max_shard_bytes=2**40 if num_shards == 1 else 60_000)
    ids_BT = torch.randint(VOCAB_SIZE, (3, 65), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected_BTV = reference_of(source)(ids_BT)
        logits_BTV = llama(tmp_path / "target")(ids_BT).logits
    assert expected_BTV.std() > 0.1
    assert (logits_BTV - expected_BTV).abs().max().item() == 0.0


def test_the_reference_sees_positions_order_and_lengths(write):
    """The oracle itself: it is causal, knows the order of tokens, and does not know the lengths of the head's rows."""
    source = write()
    model = reference_of(source)
    ids_BT = torch.tensor([[5, 9, 9, 7, 11]])
    with torch.no_grad():
        logits_BTV = model(ids_BT)
        assert torch.allclose(model(ids_BT[:, :3]), logits_BTV[:, :3], atol=1e-5)
        assert not torch.allclose(model(ids_BT[:, [1, 0, 2, 3, 4]])[:, -1], logits_BTV[:, -1], atol=1e-3)
        model.lm_head.weight *= 4.0
        assert torch.equal(model(ids_BT), logits_BTV)
        hidden_BTD = model.model(ids_BT)
    assert logits_BTV.abs().max() <= hidden_BTD.norm(dim=-1).max() * (1 + 1e-5)  # a cosine times a length


def test_generation_with_a_cache_equals_the_original_without(write, tmp_path):
    source = write()
    convert(source, tmp_path / "target")
    ids_BT = torch.tensor([[1, 17, 301, 5]])
    expected_BT = reference_of(source).generate_greedily(ids_BT, 24)
    model = llama(tmp_path / "target")
    model.generation_config.eos_token_id = None  # so that both go on to the end
    mask_BT = torch.ones_like(ids_BT)
    for use_cache in (True, False):
        generated_BT = model.generate(
            ids_BT, attention_mask=mask_BT, do_sample=False, max_new_tokens=24, use_cache=use_cache
        )
        assert torch.equal(generated_BT, expected_BT)
    assert len(set(expected_BT[0, 4:].tolist())) > 5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_tensor_is_the_original_bit_by_bit(write, tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(writer, "BLOCK_BYTES", 1000)  # several blocks a tensor, the last one shorter
    source = write(dtype=dtype, num_shards=2)
    conversion = convert(source, tmp_path / "target", max_shard_bytes=40_000)
    expected = originals(source)
    for layer in range(2):
        fused = expected.pop(f"model.layers.{layer}.self_attn.W_pack.weight")
        for part, rows in zip("qkv", fused.split(32), strict=True):
            expected[f"model.layers.{layer}.self_attn.{part}_proj.weight"] = rows
    expected["lm_head.weight"] = functional.normalize(expected["lm_head.weight"])
    found = results(tmp_path / "target")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype == getattr(torch, dtype)
        assert torch.equal(found[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name
    num_parameters = sum(tensor.numel() for tensor in expected.values())
    assert conversion == Conversion(
        target=tmp_path / "target",
        num_tensors=2 * 9 + 3,
        num_parameters=num_parameters,
        num_shards=len(list((tmp_path / "target").glob("*.safetensors"))),
        num_bytes=sum(path.stat().st_size for path in (tmp_path / "target").glob("*.safetensors")),
        dtype=dtype,
        num_zero_head_rows=0,
        num_kept_shards=0,
        was_up_to_date=False,
        repaired=(),
        seconds=conversion.seconds,
    )


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_of_the_head_are_divided_alike_however_many_there_are(num_threads, dtype):
    """At the real width, and with several threads, which may split sums in other ways."""
    rows = torch.randn(257, 4096, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(num_threads)
        expected = functional.normalize(rows)
        for size in (1, 2, 100, 257):
            assert torch.equal(torch.cat([writer._unit_rows(block) for block in rows.split(size)]), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_row_of_zeros_in_the_head_stays_and_is_counted(write, tmp_path, dtype):
    source = write(num_shards=1, dtype=dtype)
    tensors = originals(source)
    tensors["lm_head.weight"][[7, 300]] = 0
    write_weights(source, tensors, 1)
    conversion = convert(source, tmp_path / "target")
    head_VD = results(tmp_path / "target")["lm_head.weight"].float()
    assert conversion.num_zero_head_rows == 2
    assert (head_VD.norm(dim=1) == 0).nonzero().flatten().tolist() == [7, 300]
    assert convert(source, tmp_path / "target").num_zero_head_rows == 2


def test_the_published_sizes_give_the_published_number_of_parameters(tmp_path):
    write_json(tmp_path / "config.json", PUBLISHED_7B)
    layout = read_layout(tmp_path)
    tensors = llama_tensors(layout)
    assert sum(tensor.num_elements for tensor in tensors) == 7_505_973_248
    assert len(tensors) == 32 * 9 + 3
    shapes = vendor_shapes(layout)
    assert len(shapes) == 32 * 7 + 3
    assert shapes["model.layers.31.self_attn.W_pack.weight"] == (12_288, 4096)
    assert {name: tuple(tensor.shape) for name, tensor in random_weights(vendor_config(400, 32, 88, 2, 2))} == {
        **vendor_shapes(read_layout(write_small_config(tmp_path / "small"))),
        **{f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": (8,) for layer in range(2)},
    }


def write_small_config(folder):
    folder.mkdir()
    write_json(folder / "config.json", vendor_config(400, 32, 88, 2, 2))
    return folder


# --- what lies beside the weights ---


SAME_IN_BOTH = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps"),
    *("hidden_act", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range"),
)


def test_the_config_is_that_of_a_llama(write, tmp_path):
    from transformers import AutoConfig, GenerationConfig

    source = write(max_position_embeddings=512)
    convert(source, tmp_path / "target")
    config = AutoConfig.from_pretrained(tmp_path / "target")
    same = {key: json.loads((source / "config.json").read_text(encoding="utf-8"))[key] for key in SAME_IN_BOTH}
    expected = same | {
        "model_type": "llama",
        "max_position_embeddings": 512,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": torch.float32,
        "rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"},
    }
    assert {key: getattr(config, key) for key in expected} == expected
    written = json.loads((tmp_path / "target" / "config.json").read_text(encoding="utf-8"))
    assert written["rope_theta"] == 10_000.0  # what transformers 4 reads
    assert written["torch_dtype"] == "float32"
    assert "auto_map" not in written
    generation = GenerationConfig.from_pretrained(tmp_path / "target")
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 0)


@pytest.mark.parametrize("do_sample", [True, False, None])
def test_generation_settings_are_carried_over_as_far_as_transformers_saves_them(write, tmp_path, do_sample):
    from transformers import GenerationConfig

    source = write()
    sampling = {"temperature": 0.3, "top_k": 5, "top_p": 0.85}
    given = {"user_token_id": 195, "max_new_tokens": 2048, "repetition_penalty": 1.05, **sampling}
    if do_sample is not None:
        given["do_sample"] = do_sample
    write_json(source / "generation_config.json", {"eos_token_id": 2, "transformers_version": "4.29.2", **given})
    convert(source, tmp_path / "target")
    generation = GenerationConfig.from_pretrained(tmp_path / "target")
    assert generation.user_token_id == 195
    assert generation.max_new_tokens == 2048
    assert generation.repetition_penalty == 1.05
    assert (generation.temperature == 0.3) is (do_sample is True)
    generation.validate(strict=True)
    llama(tmp_path / "target").save_pretrained(tmp_path / "again")


def test_without_generation_settings_the_special_tokens_are_written(write, tmp_path):
    source = write()
    (source / "generation_config.json").unlink()
    convert(source, tmp_path / "target")
    written = json.loads((tmp_path / "target" / "generation_config.json").read_text(encoding="utf-8"))
    assert written == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def test_the_pipeline_loads_model_and_tokenizer(write, tmp_path):
    source = write()
    target = tmp_path / "target"
    convert(source, target, max_shard_bytes=60_000)
    tokenizer = load_tokenizer(str(target))
    assert (tokenizer.vocab_size, tokenizer.end_id) == (VOCAB_SIZE, 2)
    assert tokenizer.encode_batch(["The fox\n</s>"])[0].tolist() == (
        load_tokenizer(str(source)).encode_batch(["The fox\n</s>"])[0].tolist()
    )
    model = build_model(str(target), TokenInfo(VOCAB_SIZE, tokenizer.end_id, tokenizer.pad_id), 64, 0)
    expected = functional.normalize(originals(source)["lm_head.weight"])
    assert torch.equal(model.model.get_output_embeddings().weight, expected)


def test_the_record_names_each_file_by_its_sha256(write, tmp_path):
    source, target = write(), tmp_path / "target"
    convert(source, target, max_shard_bytes=60_000)
    record = json.loads((target / "conversion.json").read_text(encoding="utf-8"))
    sums = {}
    for folder in (source, target):
        names = sorted(path.name for path in folder.iterdir())
        done = subprocess.run(["sha256sum", *names], cwd=folder, capture_output=True, text=True, check=True)
        sums[folder] = {line[66:]: line[:64] for line in done.stdout.splitlines()}
    del sums[target]["conversion.json"], sums[target][".conversion.stamps.json"]
    assert (record["format"], record["version"]) == ("doremi-mix/baichuan-conversion", 1)
    assert {name: file["sha256"] for name, file in record["files"].items()} == sums[target]
    assert all(file["bytes"] == (target / name).stat().st_size for name, file in record["files"].items())
    assert record["source_sha256"] | record["source"]["sha256"] == sums[source]
    assert record["versions"]["torch"] == torch.__version__
    assert record["num_parameters"] == 400 * 32 * 2 + 2 * (4 * 32 * 32 + 3 * 32 * 88 + 2 * 32) + 32
    assert [path.name for path in target.glob(".*")] == [".conversion.stamps.json"]


def test_no_file_is_larger_than_the_limit_unless_a_tensor_is(write, tmp_path):
    convert(write(), tmp_path / "target", max_shard_bytes=30_000)
    for path in (tmp_path / "target").glob("*.safetensors"):
        tensors = load_file(path)
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= 30_000 or len(tensors) == 1
    index = json.loads((tmp_path / "target" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in results(tmp_path / "target").values())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "target" / file, "pt") as shard:
            assert name in shard.keys()  # noqa: SIM118 (not a dict)


def test_progress_adds_up_to_the_size_of_the_weight_files(write, tmp_path):
    source = write()
    sizes = [path.stat().st_size for path in source.glob("*.bin")]
    assert source_bytes(source) == sum(sizes)
    for lines in (
        [
            "model-00001-of-00002.safetensors: 0.1 MB written and checked (1 of 2)",
            "model-00002-of-00002.safetensors: 0.1 MB written and checked (2 of 2)",
        ],
        [f"{tmp_path / 'target'}: is up to date"],
    ):
        steps, said = [], []
        convert(source, tmp_path / "target", max_shard_bytes=110_000, say=said.append, advance=steps.append)
        assert sum(steps) == sum(sizes)
        assert said == lines


# --- again, and after a kill ---


def test_a_second_run_changes_nothing(write, tmp_path):
    source, target = write(), tmp_path / "target"
    first = convert(source, target, max_shard_bytes=60_000)
    before = {path: path.stat().st_mtime_ns for path in target.iterdir()}
    second = convert(source, target, max_shard_bytes=60_000)
    assert {path: path.stat().st_mtime_ns for path in target.iterdir()} == before
    assert (first.was_up_to_date, second.was_up_to_date) == (False, True)
    assert second.num_kept_shards == second.num_shards == 4


@pytest.mark.parametrize("num_blocks", [1, 9, 21])
def test_a_run_after_an_interruption_goes_on(write, tmp_path, num_blocks):
    source, target = write(), tmp_path / "target"
    convert(source, tmp_path / "straight", max_shard_bytes=60_000)
    left = num_blocks

    def interrupt(num_bytes):
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, target, max_shard_bytes=60_000, advance=interrupt)
    assert not list(target.glob(".model*"))
    assert not (target / "config.json").exists()
    num_done = len(list(target.glob("*.safetensors")))
    steps = []
    conversion = convert(source, target, max_shard_bytes=60_000, advance=steps.append)
    assert conversion.num_kept_shards == num_done == {1: 0, 9: 1, 21: 3}[num_blocks]
    assert sum(steps) == source_bytes(source)
    assert contents(target) == contents(tmp_path / "straight")


KILLED = """
import os, signal, sys
from pathlib import Path
from doremi_mix.baichuan.convert import convert
left = 12
def advance(num_bytes):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
convert(Path(sys.argv[1]), Path(sys.argv[2]), max_shard_bytes=60_000, advance=advance)
"""


def test_a_run_after_a_kill_goes_on(write, tmp_path):
    source, target = write(), tmp_path / "target"
    done = subprocess.run([sys.executable, "-c", KILLED, source, target], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (target / ".model-00002-of-00004.safetensors.tmp").exists()
    assert [path.name for path in target.glob("model*")] == ["model-00001-of-00004.safetensors"]
    assert convert(source, target, max_shard_bytes=60_000).num_kept_shards == 1
    convert(source, tmp_path / "straight", max_shard_bytes=60_000)
    assert contents(target) == contents(tmp_path / "straight")


def test_missing_and_damaged_files_of_the_result_are_written_again(write, tmp_path):
    source, target = write(), tmp_path / "target"
    convert(source, target, max_shard_bytes=60_000)
    straight = contents(target)
    first, second, third = sorted(target.glob("*.safetensors"))[:3]
    first.unlink()
    flipped = bytearray(second.read_bytes())
    flipped[-1] ^= 1
    second.write_bytes(flipped)
    third.write_bytes(b"\xff" * third.stat().st_size)
    (target / "config.json").unlink()
    (target / "adapter").mkdir()  # what somebody else keeps there is left alone
    conversion = convert(source, target, max_shard_bytes=60_000)
    assert conversion.num_kept_shards == 1
    assert not conversion.was_up_to_date
    assert conversion.repaired == ("config.json", first.name, second.name, third.name)
    (target / "adapter").rmdir()
    assert contents(target) == straight


def test_a_file_that_does_not_read_back_as_written_is_an_error(write, tmp_path, monkeypatch):
    source, target = write(num_shards=1), tmp_path / "target"
    write_shard = convert_module.write_shard

    def write_wrongly(path, *args):
        write_shard(path, *args)
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last[0] ^ 1]))

    monkeypatch.setattr(convert_module, "write_shard", write_wrongly)
    assert refusal(source, target) == (
        "DST/.model.safetensors.tmp: lm_head.weight cannot be read back as written; the disk or the memory is faulty, "
        "convert again elsewhere"
    )
    assert not list(target.glob("*model.safetensors*"))


@pytest.mark.parametrize("spoil", [lambda path: path.unlink(), lambda path: flip(path, 9)])
def test_small_files_that_are_repaired_are_named(write, tmp_path, spoil):
    source, target = write(), tmp_path / "target"
    convert(source, target)
    straight = contents(target)
    for name in ("tokenizer.model", "config.json"):
        spoil(target / name)
    assert type_in(source, target)[:2] == (0, f"{target}: repaired config.json, tokenizer.model\n")
    assert contents(target) == straight
    assert type_in(source, target)[:2] == (0, f"{target}: up to date\n")


def test_verify_reads_every_file_of_the_result(write, tmp_path):
    source, target = write(), tmp_path / "target"
    assert type_in(source, target, "--verify")[0] == 0
    shard = target / "model.safetensors"
    flip(shard, -1)
    assert type_in(source, target)[:2] == (0, f"{target}: up to date\n")
    message = f"{shard}: differs from what conversion.json says; delete it and convert again, which writes it anew"
    code, _, stderr = type_in(source, target, "--verify")
    assert (code, stderr.splitlines()[-1]) == (1, f"error: {message}")
    shard.unlink()
    with pytest.raises(ModelError) as caught:
        verify_conversion(target)
    assert str(caught.value) == message
    assert type_in(source, target, "--verify")[1] == f"{target}: repaired model.safetensors, every file verified\n"
    assert type_in(source, target, "--verify")[1] == f"{target}: up to date, every file verified\n"
    steps = []
    verify_conversion(target, advance=steps.append)
    assert sum(steps) == sum(len(content) for name, content in contents(target).items() if "conversion" not in name)
    with pytest.raises(ModelError, match=r"holds no finished conversion \(conversion\.json\); convert first"):
        verify_conversion(source)


# --- the original changes ---


def test_an_original_that_was_only_touched_is_read_once_more(write, tmp_path, monkeypatch):
    source, target = write(), tmp_path / "target"
    convert(source, target)
    before = contents(target)
    os.utime(source / "pytorch_model-00002-of-00002.bin", ns=(1, 1))
    said = []
    assert convert(source, target, say=said.append).was_up_to_date
    assert said == [
        f"{source}: pytorch_model-00002-of-00002.bin may have changed since the conversion; comparing the sha256",
        f"{target}: is up to date",
    ]
    after = contents(target)
    assert [name for name in before if after[name] != before[name]] == [".conversion.stamps.json"]
    monkeypatch.setattr(convert_module, "checked_sha256", None)
    assert convert(source, target).was_up_to_date
    (target / ".conversion.stamps.json").unlink()  # as older versions left it
    monkeypatch.undo()
    assert convert(source, target).was_up_to_date
    assert contents(target) == after


def test_a_repaired_original_is_converted_anew_and_never_mixed_with_the_old_result(write, tmp_path):
    """A file of safetensors has no checksum, so that damage may go unseen until the file is fetched again."""
    source, target = write(format="safetensors"), tmp_path / "target"
    convert(source, tmp_path / "straight", max_shard_bytes=60_000)
    damaged = source / "model-00001-of-00002.safetensors"
    intact = damaged.read_bytes()
    flip_weight(damaged, "model.embed_tokens.weight")
    convert(source, target, max_shard_bytes=60_000)
    old = contents(target)
    damaged.write_bytes(intact)
    steps = []

    def interrupt(num_bytes):
        steps.append(num_bytes)
        if len(steps) == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, target, max_shard_bytes=60_000, advance=interrupt)
    straight = contents(tmp_path / "straight")
    (first,) = target.glob("*.safetensors")
    assert old[first.name] != first.read_bytes() == straight[first.name]
    assert not (target / "config.json").exists()  # without it, it is no model to any library
    assert not list(target.glob("model*.json"))
    convert(source, target, max_shard_bytes=60_000)
    stamps = ".conversion.stamps.json"  # the times differ
    assert contents(target) | {stamps: b""} == straight | {stamps: b""}


def test_an_original_that_changes_meanwhile_is_an_error(write, tmp_path):
    source, target = write(num_shards=1), tmp_path / "target"
    with pytest.raises(ModelError) as caught:
        convert(source, target, advance=lambda _: os.utime(source / "pytorch_model.bin", ns=(1, 1)))
    assert str(caught.value) == f"{source}: changed while it was converted; run the same command again"
    assert not (target / "config.json").exists()
    assert convert(source, target).num_kept_shards == 1


def test_a_flipped_bit_is_found_by_the_checksum_and_nothing_of_it_is_kept(write, tmp_path):
    source, target = write(), tmp_path / "target"
    convert(source, tmp_path / "straight", max_shard_bytes=60_000)
    path = source / "pytorch_model-00002-of-00002.bin"
    intact, stat = path.read_bytes(), path.stat()
    flip_weight(path, "model.norm.weight")
    with zipfile.ZipFile(path) as archive:
        entry = archive.testzip()
    with pytest.raises(ModelError) as caught:
        convert(source, target, max_shard_bytes=60_000)
    message = f"{path}: is damaged (the checksum of {entry} in it differs); fetch the file again"
    assert str(caught.value) == message
    first = load_file(next(target.glob("*.safetensors")))
    assert len(list(target.glob("*.safetensors"))) == 1
    assert first.keys().isdisjoint(torch.load(path, weights_only=True))
    assert not list(target.glob(".model*"))
    for file in (tmp_path / "straight").glob("*.safetensors"):  # right, but the damaged file cannot prove it
        shutil.copyfile(file, target / file.name)
    with pytest.raises(ModelError, match="is damaged"):
        convert(source, target, max_shard_bytes=60_000)
    path.write_bytes(intact)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    convert(source, target, max_shard_bytes=60_000)
    assert contents(target) == contents(tmp_path / "straight")


def test_what_was_made_of_a_damaged_file_before_is_not_kept(write, tmp_path, monkeypatch):
    source, target = write(num_shards=1), tmp_path / "target"
    flip_weight(source / "pytorch_model.bin", "model.norm.weight")
    monkeypatch.setattr(convert_module, "checked_sha256", sha256_of)  # as if there were no checksums
    convert(source, target)
    monkeypatch.undo()
    (target / ".conversion.stamps.json").unlink()
    with pytest.raises(ModelError, match="is damaged"):
        convert(source, target)
    (target / "conversion.json").rename(target / ".conversion.partial.json")
    with pytest.raises(ModelError, match="is damaged"):
        convert(source, target)
    assert not list(target.glob("*model.safetensors*"))


def test_a_file_without_checksums_is_converted(write, tmp_path):
    source = write(num_shards=1)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(originals(source), source / "pytorch_model.bin")
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(source / "pytorch_model.bin") as archive:
        assert {info.CRC for info in archive.infolist()} == {0}
    assert convert(source, tmp_path / "target").num_tensors == 21


def test_the_checksums_are_those_that_zipfile_computes(tmp_path):
    path = tmp_path / "large.bin"
    torch.save({"a": torch.randn(400_000), "b": torch.randn(7), "c": torch.randn(700_000)}, path)
    done = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True)
    assert checked_sha256(path) == done.stdout[:64]
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        entries = [info for info in archive.infolist() if info.file_size > 20]
        places = {info.filename: content.index(archive.read(info)) for info in entries}
    assert len(places) >= 4
    for info in entries:
        for position in (places[info.filename], places[info.filename] + info.file_size - 1):
            flip(path, position)
            with zipfile.ZipFile(path) as archive:
                assert archive.testzip() == info.filename
            with pytest.raises(ModelError, match=f"is damaged .the checksum of {info.filename} in it differs"):
                checked_sha256(path)
            path.write_bytes(content)


# --- refusals: the model ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "llama"},
            "SRC: is in Llama layout already; there is nothing to convert, use it as it is",
        ),
        (
            {"model_type": "qwen2"},
            "SRC: expected a Baichuan2-7B checkpoint (model_type baichuan), got model_type qwen2; give the folder of "
            "Baichuan2-7B as it was downloaded",
        ),
        *(
            (
                changes,
                "SRC: is a model of the 13B form, which tells positions by ALiBi instead of rotary embeddings; ALiBi "
                "has no Llama form; give Baichuan2-7B",
            )
            for changes in (
                {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40},
                {"num_hidden_layers": 40, "num_attention_heads": 40},
                {"position_embedding": "ALIBI"},
            )
        ),
        (
            {"vocab_size": 64_000},
            "SRC: is Baichuan 1 (64,000 tokens), whose head does not normalize its rows, so that it would be converted "
            "wrongly; give Baichuan2-7B (125,696 tokens)",
        ),
        (
            {"quantization_config": {"load_in_4bit": True}},
            "SRC: holds quantized weights; give the checkpoint in full precision",
        ),
        (
            {"hidden_act": "gelu"},
            'SRC/config.json: hidden_act is "gelu", Baichuan2-7B has "silu"; this is another model, give Baichuan2-7B',
        ),
        (
            {"hidden_size": "32"},
            'SRC/config.json: expected hidden_size to be a positive integer, got "32"; fetch the file again',
        ),
        (
            {"model_max_length": None, "max_position_embeddings": 0},
            "SRC/config.json: expected max_position_embeddings to be a positive integer, got 0; fetch the file again",
        ),
        (
            {"num_attention_heads": 3},
            "SRC/config.json: hidden_size 32 cannot be split into 3 heads of even size; fetch the file again",
        ),
        (
            {"rms_norm_eps": -1},
            "SRC/config.json: expected rms_norm_eps to be a positive number, got -1; fetch the file again",
        ),
        (
            {"eos_token_id": 400},
            "SRC/config.json: expected eos_token_id to be a token id below vocab_size 400, got 400; "
            "fetch the file again",
        ),
    ],
)
def test_another_model_is_refused_with_the_reason(write, tmp_path, changes, message):
    source = write()
    change_config(source, **changes)
    assert refusal(source, tmp_path / "target") == message
    assert not (tmp_path / "target").exists()


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    assert refusal(tmp_path / "nowhere", tmp_path / "target") == (
        "SRC: no such folder; give the folder of Baichuan2-7B as it was downloaded"
    )
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "empty", tmp_path / "target") == (
        "SRC: holds no config.json; give the folder of Baichuan2-7B as it was downloaded"
    )
    (tmp_path / "file").touch()
    advice = "give the folder of Baichuan2-7B as it was downloaded"
    for name, what in (("nope", "no such folder"), ("file", "is a file, expected a folder")):
        line = f"{tmp_path / name}: {what}; {advice}"
        assert type_in(tmp_path / name, tmp_path / "target") == (1, "", f"error: {line}\n")
        assert refusal(tmp_path / name, tmp_path / "target") == line.replace(str(tmp_path / name), "SRC")


def test_folders_are_taken_as_they_are_typed(write, tmp_path, monkeypatch):
    write(num_shards=1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for pair, what in ((("", "x"), "SRC"), (("source", ""), "DST"), (("source", " "), "DST")):
        assert type_in(*pair) == (1, "", f"error: {what}: expected a folder, got an empty path; give one\n")
    assert type_in("~nobody-of-this-name/x", "x")[2] == (
        "error: ~nobody-of-this-name/x: no such home folder; give the whole path\n"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    code, stdout, _ = type_in("~/source", "~/x")
    assert (code, stdout.split(":")[0]) == (0, str(tmp_path / "x"))
    assert " parameters in 1 shard, 0.00 GB, verified (" in stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "x"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"),
        ("[]", "expected a JSON object, got a list"),
    ],
)
def test_damaged_json_is_named(write, tmp_path, content, message):
    source = write()
    (source / "config.json").write_text(content, encoding="utf-8")
    assert refusal(source, tmp_path / "target") == f"SRC/config.json: {message}; fetch the file again"


def test_a_tokenizer_of_another_size_is_refused_before_anything_is_written(write, tmp_path):
    source = write()
    train_tiny_tokenizer(source, VOCAB_SIZE + 1)
    with pytest.raises(ModelError, match=r"tokenizer\.model: has 401 pieces, but config.json says vocab_size 400"):
        convert(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()


# --- refusals: the weights ---


def test_missing_weights_are_named(write, tmp_path):
    source = write()
    second = source / "pytorch_model-00002-of-00002.bin"
    second.unlink()
    assert refusal(source, tmp_path / "target") == (
        "SRC/pytorch_model-00002-of-00002.bin: is missing, and pytorch_model.bin.index.json names it; fetch the file"
    )
    (source / "pytorch_model.bin.index.json").unlink()
    assert refusal(source, tmp_path / "target") == (
        "SRC: holds no weights; expected pytorch_model.bin or model.safetensors, or shards with their index; fetch them"
    )
    with pytest.raises(ModelError, match="holds no weights"):
        source_bytes(source)


@pytest.mark.parametrize(
    ("form", "share", "reason"),
    [
        ("bin", 0.5, "is truncated"),
        ("bin", 0.999, "is truncated"),
        (
            "safetensors",
            0.5,
            "is truncated or damaged (Error while deserializing header: incomplete metadata, file not fully covered)",
        ),
        ("safetensors", 0.001, "is truncated or damaged (Error while deserializing header: invalid header length)"),
    ],
)
def test_a_truncated_file_is_named(write, tmp_path, form, share, reason):
    source = write(format=form, num_shards=2)
    (path,) = source.glob("*-00002-of-00002.*")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert refusal(source, tmp_path / "target") == f"SRC/{path.name}: {reason}; fetch the file again"
    assert not (tmp_path / "target").exists()


def legacy(path):
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)


def with_code(path):
    torch.save(torch.load(path, weights_only=True) | {"extra": Path("x")}, path)


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (lambda path: path.write_bytes(b""), "is empty; fetch the file again"),
        (
            lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 15012\n"),
            "is a Git LFS pointer instead of the weights; run in its folder: git lfs pull",
        ),
        (
            legacy,
            "is not in the format of torch 1.6 and newer, the only one that can be read tensor by tensor; fetch the "
            "file again, or load it with torch.load and save it with torch.save",
        ),
        (
            with_code,
            "holds more than tensors, and reading the rest could run code; fetch the published file again",
        ),
        (
            lambda path: torch.save([torch.zeros(2)], path),
            "expected tensors by name, got something else; fetch the file again",
        ),
        (
            lambda path: torch.save({"lm_head.weight": 1}, path),
            "expected tensors by name, got something else; fetch the file again",
        ),
    ],
)
def test_a_weight_file_of_another_kind_is_refused(write, tmp_path, plant, message):
    source = write(num_shards=1)
    plant(source / "pytorch_model.bin")
    assert refusal(source, tmp_path / "target") == f"SRC/pytorch_model.bin: {message}"


def test_a_zip_file_that_torch_did_not_write_is_refused(write, tmp_path):
    source = write(num_shards=1)
    (source / "pytorch_model.bin").unlink()
    with zipfile.ZipFile(source / "pytorch_model.bin", "w") as archive:
        archive.write(source / "config.json")
    message = refusal(source, tmp_path / "target")
    assert message.startswith("SRC/pytorch_model.bin: is truncated or damaged (")
    assert message.endswith("); fetch the file again")


def test_a_compressed_archive_is_refused(write, tmp_path):
    source = write(num_shards=1)
    path = source / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    assert refusal(source, tmp_path / "target") == (
        "SRC/pytorch_model.bin: is compressed, as torch writes no file; fetch the published file, or load it with "
        "torch.load and save it with torch.save"
    )


EXTRA = "model.layers.0.self_attn.W_pack.bias"
HEAD = "lm_head.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {EXTRA: torch.zeros(96)},
            f"SRC/pytorch_model.bin: holds {EXTRA}, which is no tensor of Baichuan2-7B; give the published checkpoint",
        ),
        (
            {HEAD: torch.zeros(401, 32)},
            "SRC/pytorch_model.bin: lm_head.weight has shape (401, 32), config.json asks for (400, 32); "
            "fetch both files again",
        ),
        (
            {HEAD: torch.zeros(400, 32, dtype=torch.int8)},
            "SRC/pytorch_model.bin: lm_head.weight is int8, expected bfloat16, float16 or float32; give the checkpoint "
            "in full precision",
        ),
        (
            {HEAD: torch.zeros(400, 32, dtype=torch.float16)},
            "SRC/pytorch_model.bin: lm_head.weight is float16, the tensors before it are float32; "
            "fetch the weight files again",
        ),
        ({HEAD: None}, "SRC: its weight files lack lm_head.weight; fetch them again"),
        (
            {HEAD: None, "model.norm.weight": None},
            "SRC: its weight files lack model.norm.weight and 1 more; fetch them again",
        ),
    ],
)
def test_a_wrong_tensor_is_named(write, tmp_path, changes, message):
    source = write(num_shards=1)
    tensors = {name: tensor for name, tensor in originals(source, **changes).items() if tensor is not None}
    write_weights(source, tensors, 1)
    assert refusal(source, tmp_path / "target") == message
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_weight_that_is_not_finite_is_found(write, tmp_path, value, dtype):
    source = write(num_shards=1, dtype=dtype)
    tensors = originals(source)
    tensors["model.layers.1.mlp.up_proj.weight"][13, 7] = value
    write_weights(source, tensors, 1)
    assert refusal(source, tmp_path / "target") == (
        "SRC/pytorch_model.bin: model.layers.1.mlp.up_proj.weight holds values that are not finite; "
        "fetch the file again"
    )


def test_a_row_that_cannot_be_normalized_is_found(write, tmp_path):
    source = write(num_shards=1)
    tensors = originals(source)
    tensors["lm_head.weight"][13] = 1e-14
    write_weights(source, tensors, 1)
    assert refusal(source, tmp_path / "target") == (
        "lm_head.weight: row 13 has length 0.05657 after it was divided by its length: its values are too small or too "
        "large for their format; fetch the weight files again"
    )


def test_an_index_that_does_not_fit_its_files_is_named(write, tmp_path):
    source = write(format="safetensors")
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    first, second = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    index["weight_map"]["model.norm.weight"] = first
    write_json(path, index)
    assert refusal(source, tmp_path / "target") == (
        f"SRC/{first}: lacks model.norm.weight, which model.safetensors.index.json places there; fetch both again"
    )
    tensors = load_file(source / first)
    save_file(tensors | {"model.norm.weight": torch.ones(32)}, source / first)
    assert refusal(source, tmp_path / "target") == (
        f"SRC/{second}: holds model.norm.weight, which {first} holds too; fetch both again"
    )
    index["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    write_json(path, index)
    assert refusal(source, tmp_path / "target") == (
        "SRC/model.safetensors.index.json: expected weight_map to give a file of this folder for each tensor; "
        "fetch the file again"
    )


# --- refusals: the target ---


def test_a_target_with_other_things_in_it_is_refused(write, tmp_path):
    source, target = write(), tmp_path / "target"
    assert refusal(source, source) == "SRC: is the folder of the checkpoint itself; give a new folder"
    target.write_text("x")
    assert refusal(source, target) == "DST: is a file; give a new folder"
    target.unlink()
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    assert refusal(source, target) == "DST: holds other files (notes.txt); give a new or empty folder"
    assert contents(target) == {"notes.txt": b"mine"}


def test_a_target_that_cannot_be_made_is_refused(write, tmp_path, monkeypatch):
    source = write()
    before = contents(source)
    place = tmp_path / "place"
    place.symlink_to(tmp_path / "gone")
    assert refusal(source, place) == "DST: is a link that leads nowhere; give a new folder"
    assert refusal(source, place / "x") == f"{place}: is a link that leads nowhere; give a new folder"
    place.unlink()
    place.touch()
    assert refusal(source, place / "x" / "y") == f"{place}: is a file, and DST cannot lie in it; give a new folder"
    (tmp_path / "link").symlink_to(source)
    for target in (source / "llama", source / "a" / "b", tmp_path / "link" / "llama"):
        with pytest.raises(ModelError) as caught:
            convert(source, target)
        assert str(caught.value) == (
            f"{target}: lies in the folder of the checkpoint; give a new folder outside of {source}"
        )
    assert contents(source) == before
    target = tmp_path / ("x" * 300)
    assert refusal(source, target) == "DST: File name too long; settle that and run the same command again"


@pytest.mark.parametrize("finished", [True, False])
def test_a_target_of_another_conversion_is_refused(write, tmp_path, finished):
    source, target = write(), tmp_path / "target"
    convert(source, target)
    if not finished:
        (target / "conversion.json").rename(target / ".conversion.partial.json")
    with pytest.raises(ModelError) as caught:
        convert(source, target, max_shard_bytes=60_000)
    assert str(caught.value) == (
        f"{target}: holds a conversion into files of at most 5,368,709,120 bytes, not 60,000; "
        "give the same limit or a new folder"
    )
    change_config(source, rms_norm_eps=1e-5)
    before = contents(target)
    assert refusal(source, target) == (
        "DST: holds the conversion of another checkpoint; give a new folder, or delete this one"
    )
    assert contents(target) == before


def test_a_damaged_record_is_named(write, tmp_path):
    source, target = write(), tmp_path / "target"
    convert(source, target)
    (target / "conversion.json").write_text("{")
    assert refusal(source, target) == "DST/conversion.json: is damaged; delete DST and convert again"


def test_a_second_process_is_kept_out(write, tmp_path):
    source, target = write(), tmp_path / "target"
    messages = []

    def convert_too(num_bytes):
        if not messages:
            messages.append(refusal(source, target))

    convert(source, target, advance=convert_too)
    assert messages == ["DST: another process is converting into it; wait for it"]


def test_a_disk_that_is_too_small_is_found_before_anything_is_written(write, tmp_path, monkeypatch):
    source, target = write(), tmp_path / "target"
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=123_456))
    assert refusal(source, target) == (
        "DST: 0.2 MB are to be written, and the disk has 0.1 MB free; free some, or choose another target"
    )
    monkeypatch.undo()
    convert(source, target)


def test_a_disk_that_fills_up_is_one_line_and_the_work_is_kept(write, tmp_path, monkeypatch):
    source, target = write(), tmp_path / "target"
    calls = []

    def fail(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return writer.write_shard(*args)

    monkeypatch.setattr(convert_module, "write_shard", fail)
    with pytest.raises(ModelError) as caught:
        convert(source, target, max_shard_bytes=60_000)
    assert str(caught.value) == (
        f"{target}: No space left on device; settle that and run the same command again, it goes on where it stopped"
    )
    monkeypatch.undo()
    assert convert(source, target, max_shard_bytes=60_000).num_kept_shards == 1


# --- memory ---

MEASURED = """
import json, sys
from pathlib import Path
import torch
from doremi_mix.baichuan.convert import convert

def anonymous_bytes():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024

import doremi_mix.baichuan.tokenizer, safetensors.torch
torch.nn.functional.normalize(torch.zeros(8, 8))
start, peak = anonymous_bytes(), 0
def advance(num_bytes):
    global peak
    peak = max(peak, anonymous_bytes())
convert(Path(sys.argv[1]), Path(sys.argv[2]), advance=advance)
print(json.dumps(peak - start))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell anonymous memory apart")
@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_memory_stays_below_that_of_one_file(tmp_path, form):
    """The aim is twice the largest file; even with a result of one file of 180 MB, less than one of four is used."""
    sizes = {"vocab_size": 8000, "hidden_size": 1024, "intermediate_size": 8192, "num_layers": 1}
    source = write_tiny_baichuan(tmp_path / "source", num_shards=4, format=form, **sizes)
    largest = max(path.stat().st_size for path in source.glob(f"*.{form}"))
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, source, tmp_path / "target"], capture_output=True, text=True, check=True
    )
    written = (tmp_path / "target" / "model.safetensors").stat().st_size
    shutil.rmtree(tmp_path)  # pytest would keep it
    assert 1e6 < json.loads(done.stdout) < largest
    assert written > 2.5 * largest
