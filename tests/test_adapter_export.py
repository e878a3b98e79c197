"""Adapters merged, and over Baichuan2's own layout, give the outputs that they give over their base."""

import contextlib
import errno
import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_adapters import QKV, baichuan_pair, fill
from test_models import packed, small_model
from tiny_baichuan import write_tiny_baichuan

from doremi_mix.adapter_export import (
    Merged,
    WPackAdapter,
    copy_adapter,
    describe_adapter,
    export_w_pack_adapter,
    merge_adapter,
)
from doremi_mix.adapter_original import check_original
from doremi_mix.adapters import LoraSettings, add_adapter, base_fingerprint, save_adapter
from doremi_mix.errors import ModelError, RunDirectoryError

IDS = packed(16)[0]
SHARED = LoraSettings(4, 6, QKV, 0.1, QKV)
ALL = ("o_proj", "gate_proj", "up_proj", "down_proj")


def write_base(folder, kind="llama", dtype=torch.float32, max_shard_size="50GB", **settings):
    small_model(kind, **settings).to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def write_adapter(folder, base, settings, model=None, fingerprint=None):
    """Saves an adapter with random matrices and returns the logits that it gives."""
    model = model or transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    add_adapter(model, "tuned", settings, seed=1)
    fill(model)
    save_adapter(model, "tuned", folder, str(base), fingerprint=fingerprint)
    return logits(model)


def logits(model, ids=IDS):
    with torch.no_grad():
        found = model(ids)
    return found if isinstance(found, torch.Tensor) else found.logits


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def merge(adapter, base, target, **options):
    return merge_adapter(adapter, base, target, say=lambda _: None, **options)


def change_config(adapter, **changes):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def message(call, *args):
    with pytest.raises(ModelError) as caught:
        call(*args)
    return str(caught.value)


# --- merged ---


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # peft asks transformers in an old way
@pytest.mark.parametrize(
    ("kind", "dtype", "settings", "shard"),
    [
        ("llama", torch.float32, SHARED, "8KB"),
        ("llama", torch.bfloat16, LoraSettings(4, 6), "50GB"),
        ("qwen2", torch.float32, LoraSettings(4, 6), "8KB"),
        ("gpt2", torch.float32, LoraSettings(4, 6), "50GB"),
    ],
)
def test_a_merged_checkpoint_is_that_of_peft(tmp_path, kind, dtype, settings, shard):
    import peft

    base = write_base(tmp_path / "base", kind, dtype, shard)
    expected = write_adapter(tmp_path / "adapter", base, settings)
    said, advanced = [], []
    made = merge_adapter(tmp_path / "adapter", base, tmp_path / "merged", say=said.append, advance=advanced.append)
    names = sorted(path.name for path in (tmp_path / "merged").iterdir())
    assert names == sorted(path.name for path in base.iterdir())
    assert (len(names) > 3) == (shard == "8KB")
    with_peft = peft.PeftModel.from_pretrained(load(base), tmp_path / "adapter").merge_and_unload()
    found = load(tmp_path / "merged")
    assert all(
        torch.equal(tensor, found.state_dict()[key]) and tensor.dtype == dtype
        for key, tensor in with_peft.state_dict().items()
    )
    assert torch.allclose(logits(found), expected, atol=1e-6 if dtype == torch.float32 else 0.05)
    assert not torch.allclose(expected, logits(load(base)), atol=0.05)

    tensors = {}
    for path in (tmp_path / "merged").glob("*.safetensors"):
        tensors |= load_file(path)
    num_merged = sum("lora_B" in key for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert made == Merged(len(tensors), num_merged, sum(tensor.nbytes for tensor in tensors.values()))
    assert sum(advanced) == made.num_bytes
    assert said == [
        f"  {num_merged:,} of {len(tensors):,} tensors merged; configuration and tokenizer are those of {base}"
    ]
    merge(tmp_path / "adapter", base, tmp_path / "again")
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()


def test_everything_but_weights_and_sums_comes_along(tmp_path):
    base = write_base(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    torch.save(tensors, base / "pytorch_model.bin")
    for name in ("tokenizer.model", "conversion.json", ".hidden", "training_args.pt"):
        (base / name).write_text(name)
    (base / "folder").mkdir()
    expected = write_adapter(tmp_path / "adapter", base, SHARED)
    merge(tmp_path / "adapter", base, tmp_path / "merged")
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == [
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.model")
    ]
    assert (tmp_path / "merged" / "tokenizer.model").read_text() == "tokenizer.model"
    assert torch.allclose(logits(load(tmp_path / "merged")), expected, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_pefts_own_forms_are_scaled_as_peft_does(tmp_path):
    import peft

    base = write_base(tmp_path / "base")
    config = peft.LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, target_modules=r".*\.(q|v)_proj", rank_pattern={"layers.1.*": 2},
        alpha_pattern={"v_proj": 3, r"layers\.1\..*": 5}, task_type="CAUSAL_LM",
    )  # fmt: skip
    fill(peft.get_peft_model(load(base), config)).save_pretrained(tmp_path / "adapter")
    # Patterns are tried in the order of the file.
    expected = logits(peft.PeftModel.from_pretrained(load(base), tmp_path / "adapter").eval())
    merge(tmp_path / "adapter", base, tmp_path / "merged")
    assert torch.allclose(logits(load(tmp_path / "merged")), expected, atol=1e-6)


def test_merging_refuses_what_does_not_belong_together(tmp_path):
    base = write_base(tmp_path / "base")
    adapter, target = tmp_path / "adapter", tmp_path / "merged"
    write_adapter(adapter, base, SHARED, fingerprint=base_fingerprint(str(base)))
    own = base_fingerprint(str(base))[:12]

    other = write_base(tmp_path / "other", initializer_range=0.5)
    mark = base_fingerprint(str(other))[:12]
    assert message(merge, adapter, other, target) == (
        f"model {adapter}: its adapter is for another base ({own}, not {mark}); "
        f"give the one that it was trained on, {base}"
    )
    (adapter / "doremi_mix_adapter.json").unlink()
    wide = write_base(tmp_path / "wide", hidden_size=32)
    assert message(merge, adapter, wide, target) == (
        f"adapter {adapter}: its model.layers.0.self_attn.k_proj is for a weight of 16 x 16, and {wide} has 32 x 32; "
        "give the base that it was trained on"
    )
    shallow = write_base(tmp_path / "shallow", num_hidden_layers=1)
    assert message(merge, adapter, shallow, target) == (
        f"adapter {adapter}: adapts model.layers.1.self_attn.k_proj, which {shallow} does not have; "
        "give the base that it was trained on"
    )
    assert message(merge, adapter, tmp_path / "none", target) == (
        f"adapter {adapter}: merging needs its base, and {tmp_path / 'none'} is no model's folder; give the folder"
    )
    config = json.loads((base / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "quantization_config": {"load_in_4bit": True}}))
    assert message(merge, adapter, other, target) == (
        f"base {other}: its weights are quantized, and sums would be lost; give it in full precision"
    )
    target.mkdir()
    assert message(merge, adapter, base, target) == (f"{target}: exists already; choose another folder, or remove it")
    target.rmdir()
    tensors = load_file(adapter / "adapter_model.safetensors")
    key = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    save_file({**tensors, key: tensors[key] * float("inf")}, adapter / "adapter_model.safetensors")
    assert message(merge, adapter, base, target) == (
        f"adapter {adapter}: model.layers.1.self_attn.v_proj.weight would not be finite with it; train it again"
    )
    assert not list(tmp_path.glob(".merged*"))
    assert not target.exists()
    (base / "config.json").write_text("{")
    assert message(merge, adapter, base, target).startswith(f"model {base}: its config.json cannot be read (")


def test_a_head_that_is_tied_to_the_embeddings_is_not_merged(tmp_path):
    base = write_base(tmp_path / "base", tie_word_embeddings=True)
    write_adapter(tmp_path / "adapter", base, SHARED)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    head = {f"base_model.model.lm_head.lora_{end}.weight": torch.ones(4, 16) for end in "A"}
    head["base_model.model.lm_head.lora_B.weight"] = torch.ones(50, 4)
    save_file({**load_file(path), **head}, path)
    assert message(merge, tmp_path / "adapter", base, tmp_path / "merged") == (
        f"adapter {tmp_path / 'adapter'}: adapts lm_head, and {base} ties it to the embeddings, which would change, "
        "too; train without lm_head"
    )


@pytest.mark.parametrize("export", [merge, export_w_pack_adapter, copy_adapter])
def test_adapters_that_cannot_be_read_are_named(tmp_path, export):
    base, adapter = write_base(tmp_path / "base"), tmp_path / "adapter"
    write_adapter(adapter, base, SHARED)
    arguments = (adapter, base, tmp_path / "out") if export is merge else (adapter, tmp_path / "out", str(base))

    def refused():
        assert not (tmp_path / "out").exists()
        return message(export, *arguments)

    change_config(adapter, use_dora=True)
    assert refused() == f"adapter {adapter}: use_dora is set, which cannot be written in another form; train without"
    change_config(adapter, use_dora=False, peft_type="IA3")
    assert refused() == f"adapter {adapter}: is IA3, expected LORA; give a LoRA adapter"
    change_config(adapter, peft_type="LORA")
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({**tensors, "base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 50)}, path)
    assert refused() == (
        f"adapter {adapter}: base_model.model.model.embed_tokens.lora_embedding_A is no matrix of a linear layer's "
        "LoRA; train without it"
    )
    save_file({**tensors, key: torch.ones(3, 16)}, path)
    assert refused() == (
        f"adapter {adapter}: the matrices of model.layers.0.self_attn.q_proj do not fit each other; "
        "fetch or train it again"
    )
    path.write_bytes(b"garbage")
    assert refused().startswith(f"adapter {adapter}: its adapter_model.safetensors cannot be read (")
    path.unlink()
    gone = "its adapter_model.safetensors cannot be read (No such file or directory: {}); {}"
    assert refused() == f"adapter {adapter}: {gone.format(path, 'fetch or train it again')}"
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "finetune").mkdir()
    adapter = adapter.rename(tmp_path / "finetune" / "adapter")
    arguments = (adapter, *arguments[1:])
    again = f"delete {tmp_path}/finetune and run again: doremi-mix finetune --run-dir {tmp_path}"
    assert refused() == f"adapter {adapter}: {gone.format(adapter / path.name, again)}"


@pytest.mark.parametrize("export", [merge, export_w_pack_adapter, copy_adapter])
def test_what_cannot_be_written_is_named_and_leaves_nothing(tmp_path, monkeypatch, export):
    base, adapter = write_base(tmp_path / "base"), tmp_path / "adapter"
    write_adapter(adapter, base, SHARED)

    def refused(out):
        with pytest.raises(RunDirectoryError) as caught:
            export(*((adapter, base, out) if export is merge else (adapter, out, str(base))))
        assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "file"}
        return str(caught.value)

    file = tmp_path / "file"
    file.touch()
    for out in (file / "out", file / "more" / "out"):
        assert refused(out) == f"{out}: cannot be written (Not a directory); choose another folder"
    with file_size_limit(400):
        assert (
            refused(tmp_path / "out")
            == f"{tmp_path / 'out'}: cannot be written (File too large); choose another folder"
        )

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    assert refused(tmp_path / "out") == (
        f"{tmp_path / 'out'}: cannot be written (No space left on device); free some space or choose another folder"
    )


@contextlib.contextmanager
def file_size_limit(num_bytes):
    """Lets the system refuse longer files, as a full disk does; Python ignores the signal that comes along."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_file_of_the_base_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    base, adapter = write_base(tmp_path / "base"), tmp_path / "adapter"
    write_adapter(adapter, base, SHARED)
    path = base / "generation_config.json"
    really = Path.open

    def locked(self, *args, **options):
        if self == path:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return really(self, *args, **options)

    monkeypatch.setattr(Path, "open", locked)
    assert message(merge, adapter, base, tmp_path / "out") == (
        f"{path}: cannot be read (Permission denied); change its permissions"
    )
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


# --- over W_pack ---


def with_peft(model, adapter):
    """Loads an adapter with peft's own code."""
    import peft

    config = peft.LoraConfig.from_pretrained(str(adapter))
    peft.inject_adapter_in_model(config, model, "default")
    result = peft.set_peft_model_state_dict(model, load_file(adapter / "adapter_model.safetensors"))
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora" in key]
    return model.eval()


def w_pack_of(tmp_path, settings, dtype="float32"):
    """Exports an adapter of the converted model; returns what was made, and the logits of both models with peft."""
    _, llama = baichuan_pair(dtype)
    write_adapter(tmp_path / "adapter", "converted", settings, model=llama)
    made = export_w_pack_adapter(tmp_path / "adapter", tmp_path / "packed", "vendor/Baichuan2")
    reference, llama = baichuan_pair(dtype)
    plain = logits(reference)
    found = logits(with_peft(reference, tmp_path / "packed"))
    expected = logits(with_peft(llama, tmp_path / "adapter"))
    assert not torch.allclose(found, plain, atol=0.01)
    return made, expected, found


@pytest.mark.parametrize(
    ("settings", "made"),
    [
        # Two layers; 32 inputs, 96 outputs of W_pack, 88 inner units.
        (LoraSettings(4, 6, QKV, 0.1, QKV), WPackAdapter(4, 1, 2 * 4 * (32 + 96))),
        (LoraSettings(4, 6, QKV), WPackAdapter(12, 3, 2 * 12 * (32 + 96))),
        (LoraSettings(4, 6, ("v_proj", "q_proj")), WPackAdapter(8, 2, 2 * 8 * (32 + 96))),
        (LoraSettings(4, 6, ("k_proj",)), WPackAdapter(4, 1, 2 * 4 * (32 + 96))),
        (LoraSettings(4, 6, ("self_attn.q_proj", "v_proj"), 0.0, ("q_proj", "v_proj")), WPackAdapter(4, 1, 1024)),
        (LoraSettings(4, 6, QKV, 0.0, ("q_proj", "v_proj")), WPackAdapter(8, 2, 2 * 8 * (32 + 96))),
        (
            LoraSettings(4, 6, (*QKV, *ALL), 0.1, QKV),
            WPackAdapter(4, 1, 2 * 4 * (32 + 96 + 32 + 32 + 3 * (32 + 88))),
        ),
        (LoraSettings(4, 6), WPackAdapter(12, 3, 2 * (12 * (32 + 96) + 4 * (32 + 32 + 3 * (32 + 88))))),
        (LoraSettings(4, 6, ALL), WPackAdapter(None, 0, 2 * 4 * (32 + 32 + 3 * (32 + 88)))),
    ],
)
def test_an_adapter_over_w_pack_gives_the_same_outputs(tmp_path, settings, made):
    found_made, expected, found = w_pack_of(tmp_path, settings)
    assert found_made == made
    assert torch.allclose(found, expected, atol=5e-6)
    config = json.loads((tmp_path / "packed" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "vendor/Baichuan2"
    assert config["lora_dropout"] == settings.dropout
    assert sorted(path.name for path in (tmp_path / "packed").iterdir()) == [
        *("adapter_config.json", "adapter_model.safetensors")
    ]


def test_a_shared_matrix_is_exported_as_it_is(tmp_path):
    w_pack_of(tmp_path, SHARED)
    config = json.loads((tmp_path / "packed" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 6, ["W_pack"])
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    mine, packed_tensors = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "packed"))
    part = "base_model.model.model.layers.1.self_attn."
    assert torch.equal(packed_tensors[f"{part}W_pack.lora_A.weight"], mine[f"{part}k_proj.lora_A.weight"])
    assert torch.equal(
        packed_tensors[f"{part}W_pack.lora_B.weight"],
        torch.cat([mine[f"{part}{end}.lora_B.weight"] for end in QKV]),
    )
    export_w_pack_adapter(tmp_path / "adapter", tmp_path / "again", "vendor/Baichuan2")
    for path in (tmp_path / "packed").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_of_peft_over_some_layers_is_exported(tmp_path, rslora):
    import peft

    _, llama = baichuan_pair()
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=r".*layers\.1\.(self_attn\.[qk]_proj|mlp\.up_proj)", use_rslora=rslora,
        alpha_pattern={"up_proj": 3},
    )  # fmt: skip
    peft.inject_adapter_in_model(config, llama, "default")
    fill(llama)
    expected = logits(llama)
    (tmp_path / "adapter").mkdir()
    saved = peft.get_peft_model_state_dict(llama)
    save_file(
        {f"base_model.model.{key}": tensor.contiguous() for key, tensor in saved.items()},
        tmp_path / "adapter" / "adapter_model.safetensors",
    )
    config.save_pretrained(str(tmp_path / "adapter"))
    export_w_pack_adapter(tmp_path / "adapter", tmp_path / "packed", "vendor")
    reference, _ = baichuan_pair()
    assert torch.allclose(logits(with_peft(reference, tmp_path / "packed")), expected, atol=1e-6)


def test_what_has_no_counterpart_in_baichuan2_is_refused(tmp_path):
    adapter, target = tmp_path / "adapter", tmp_path / "packed"
    _, llama = baichuan_pair()
    write_adapter(adapter, "converted", SHARED, model=llama)
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)

    def refused(**more):
        pair = {f"base_model.model.{name}.lora_A.weight": torch.ones(4, shape[1]) for name, shape in more.items()}
        pair |= {f"base_model.model.{name}.lora_B.weight": torch.ones(shape[0], 4) for name, shape in more.items()}
        save_file({**tensors, **pair}, path)
        assert not target.exists()
        return message(export_w_pack_adapter, adapter, target, "vendor")

    assert refused(lm_head=(50, 32)) == (
        f"adapter {adapter}: adapts lm_head, and Baichuan2 divides the rows of its head by their lengths at each call, "
        "so that no adapter of it gives the same outputs; train without lm_head"
    )
    assert refused(**{"model.layers.0.mlp.c_fc": (32, 32)}) == (
        f"adapter {adapter}: adapts model.layers.0.mlp.c_fc, which Baichuan2 does not have; give one of Baichuan2"
    )
    assert refused(**{"model.layers.0.self_attn.k_proj": (16, 32)}) == (
        f"adapter {adapter}: model.layers.0.self_attn.k_proj has 16 outputs for 32 inputs, and the thirds of W_pack "
        "are square (no grouped queries); give an adapter of Baichuan2"
    )
    save_file(tensors, path)
    change_config(adapter, alpha_pattern={"q_proj": 3})
    assert refused() == (
        f"adapter {adapter}: q_proj, k_proj and v_proj have different ranks or alphas; train with the same ones"
    )
    change_config(adapter, alpha_pattern={}, fan_in_fan_out=True)
    assert refused() == (f"adapter {adapter}: its weights are transposed (fan_in_fan_out); give one of Baichuan2")
    change_config(adapter, fan_in_fan_out=False)
    target.mkdir()
    assert message(export_w_pack_adapter, adapter, target, "vendor") == (
        f"{target}: exists already; choose another folder, or remove it"
    )


def change_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def copy_of(original, target):
    shutil.copytree(original, target)
    return target


def test_the_original_of_a_base_is_told_from_others(main_model, tmp_path):
    adapter, original = tmp_path / "adapter", main_model.with_name("original")
    write_adapter(adapter, main_model, SHARED)
    said = []

    def check(folder):
        return check_original(adapter, folder, say=said.append)

    def other(thing):
        return (
            f"adapter {adapter}: its adapter is for another base: {folder} has another {thing} than the checkpoint "
            f"that {main_model} was converted from; give that one"
        )

    check(original)
    check(copy_of(original, tmp_path / "moved"))
    assert not said
    assert message(check, main_model) == (
        f"{main_model}: is the converted model; give the folder with Baichuan2 in its original layout"
    )
    assert message(check, tmp_path / "gone") == (
        f"{tmp_path / 'gone'}: no such folder; give the folder of Baichuan2-7B as it was downloaded"
    )
    folder = copy_of(original, tmp_path / "vocabulary")
    change_json(folder / "config.json", vocab_size=401)
    assert message(check, folder) == other("config.json")
    folder = copy_of(original, tmp_path / "file")
    with (folder / "pytorch_model-00002-of-00002.bin").open("ab") as file:
        file.write(b"1")
    assert message(check, folder) == other("pytorch_model-00002-of-00002.bin")
    folder = tmp_path / "weights"
    write_tiny_baichuan(folder, seed=1, tokenizer=original)
    assert message(check, folder) == other("model.embed_tokens.weight")
    folder = copy_of(original, tmp_path / "values")
    path = folder / "pytorch_model-00001-of-00002.bin"
    tensors = torch.load(path, weights_only=True)
    tensors["model.layers.1.self_attn.W_pack.weight"][64:] += 1  # v alone
    torch.save(tensors, path)
    assert message(check, folder) == other("model.layers.1.self_attn.W_pack.weight")
    folder = copy_of(original, tmp_path / "shape")
    change_json(folder / "config.json", hidden_size=36)
    assert message(check, folder) == (
        f"adapter {adapter}: its model.layers.0.self_attn.k_proj is for a weight of 32 x 32, and {folder} has 36 x 36; "
        "give the one that it was trained on"
    )
    change_json(folder / "config.json", hidden_size=32, num_hidden_layers=1)
    assert message(check, folder) == (
        f"adapter {adapter}: adapts model.layers.1.self_attn.k_proj, which {folder} does not have; "
        "give the one that it was trained on"
    )
    assert not said
    change_config(adapter, base_model_name_or_path="some/model")
    check(original)
    assert said == [f"  some/model has no conversion.json: whether it was converted from {original} is not known"]
    base = copy_of(main_model, tmp_path / "base")
    change_json(base / "conversion.json", source={})
    change_config(adapter, base_model_name_or_path=str(base))
    assert message(check, original) == (
        f"model {base}: its conversion.json does not say what it was converted from; convert it again"
    )


# --- as it is ---


def test_an_adapter_is_described(tmp_path):
    base = write_base(tmp_path / "base")
    write_adapter(tmp_path / "shared", base, SHARED)
    expected = {
        "rank": 4, "alpha": 6, "dropout": 0.1, "target_modules": sorted(QKV), "shared_input": sorted(QKV),
        "num_parameters": 2 * (4 * 16 + 3 * 4 * 16), "base": str(base),
    }  # fmt: skip
    assert describe_adapter(tmp_path / "shared") == expected
    write_adapter(tmp_path / "apart", base, LoraSettings(4, 6, QKV))
    assert describe_adapter(tmp_path / "apart") == {
        **expected, "dropout": 0.0, "shared_input": [], "num_parameters": 2 * 3 * 2 * 4 * 16,
    }  # fmt: skip
    change_config(tmp_path / "apart", base_model_name_or_path=None)
    assert message(describe_adapter, tmp_path / "apart") == (
        f"model {tmp_path / 'apart'}: its adapter_config.json names no base model; fetch or train it again"
    )


def test_a_copy_names_its_base_anew(tmp_path):
    base = write_base(tmp_path / "base")
    write_adapter(tmp_path / "adapter", base, SHARED, fingerprint=base_fingerprint(str(base)))
    copy_adapter(tmp_path / "adapter", tmp_path / "copy", "elsewhere")
    for name in ("adapter_model.safetensors", "doremi_mix_adapter.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()
    facts = describe_adapter(tmp_path / "adapter")
    assert describe_adapter(tmp_path / "copy") == {**facts, "base": "elsewhere"}
    shutil.rmtree(tmp_path / "copy")
    (tmp_path / "adapter" / "doremi_mix_adapter.json").unlink()
    copy_adapter(tmp_path / "adapter", tmp_path / "copy", "elsewhere")
    assert len(list((tmp_path / "copy").iterdir())) == 2


def test_a_copy_over_another_base_is_refused(tmp_path):
    base, other = write_base(tmp_path / "base"), write_base(tmp_path / "other", initializer_range=0.5)
    write_adapter(tmp_path / "adapter", base, SHARED, fingerprint=base_fingerprint(str(base)))
    own, mark = base_fingerprint(str(base))[:12], base_fingerprint(str(other))[:12]
    assert message(copy_adapter, tmp_path / "adapter", tmp_path / "copy", str(other)) == (
        f"model {tmp_path / 'adapter'}: its adapter is for another base ({own}, not {mark}); "
        f"give the one that it was trained on, {base}"
    )
    assert not (tmp_path / "copy").exists()
    copy_adapter(tmp_path / "adapter", tmp_path / "copy")
    for path in (tmp_path / "adapter").iterdir():
        assert (tmp_path / "copy" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("export", [export_w_pack_adapter, copy_adapter])
def test_a_base_that_is_here_is_named_for_every_working_directory(tmp_path, monkeypatch, export):
    base = write_base(tmp_path / "base")
    write_adapter(tmp_path / "adapter", base, SHARED)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export(tmp_path / "adapter", tmp_path / "out", "../base")
    assert describe_adapter(tmp_path / "out")["base"] == str(base)
    export(tmp_path / "adapter", tmp_path / "hub", "vendor/base")
    assert describe_adapter(tmp_path / "hub")["base"] == "vendor/base"
