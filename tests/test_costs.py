"""Counts held against the models that they are about: parameters, operations, and bytes that are alive."""

import functools
import re
import runpy
from pathlib import Path

import pytest
import torch
import transformers
from live_bytes import LiveBytes
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import doremi_mix
from doremi_mix import costs, plan
from doremi_mix.adapters import LoraSettings, add_adapter, num_trainable_parameters, set_adapter_dropout
from doremi_mix.costs import (
    BAICHUAN2_7B,
    H100,
    ModelShape,
    activation_bytes,
    generation_seconds,
    inference_operations,
    scoring_memory,
    seconds,
    training_memory,
    training_operations,
    weight_bytes,
)
from doremi_mix.errors import ModelError
from doremi_mix.loss import LossKernel
from doremi_mix.loss_kernels import _block_shape, blocked_cross_entropy
from doremi_mix.models import TokenLossModel, enable_gradient_checkpointing
from doremi_mix.presets import PRESETS

QKV = ("q_proj", "k_proj", "v_proj")
CONTEST = LoraSettings(8, 16, QKV, 0.0, QKV)
FORMS = {
    "contest": CONTEST,
    "unshared": LoraSettings(8, 16, QKV),
    "feed-forward": LoraSettings(4, 8, (*QKV, "up_proj")),
    "all": LoraSettings(8, 16, None),
}
TINY = ModelShape(64, 176, 3, 4, 4, 500)
GROUPED = ModelShape(64, 176, 3, 4, 2, 500, tied_embeddings=True)
WIDE = ModelShape(64, 176, 3, 4, 1, 500, head_size=32)
SHAPES = {"tiny": TINY, "grouped": GROUPED, "wide": WIDE}


def config_of(shape):
    return transformers.LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_size,
        tie_word_embeddings=shape.tied_embeddings,
    )


def build(shape, lora=None, dtype=torch.float32, device="cpu"):
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config_of(shape), dtype=dtype).eval()
    if lora is not None:
        model.requires_grad_(False)
        add_adapter(model, "adapter", lora, 0)
        set_adapter_dropout(model, on=lora.dropout > 0)
    wrapped = TokenLossModel(model, "", None if lora is None else "adapter")
    # So small a head would have its logits kept.
    wrapped.loss_kernel = LossKernel("blocks", functools.partial(blocked_cross_entropy, max_kept_logits=0), "")
    return wrapped


def batch(shape, B, T, label_share=1.0):
    ids_BT = torch.randint(shape.vocab_size, (B, T), generator=torch.Generator().manual_seed(0))
    labels_BT = ids_BT.clone()
    labels_BT[:, round(T * label_share) :] = -100
    return ids_BT, labels_BT, torch.arange(T).expand(B, T), torch.zeros_like(ids_BT)


# --- parameters ---


def test_baichuan2_7b():
    assert BAICHUAN2_7B.num_parameters == 7_505_973_248
    assert BAICHUAN2_7B.num_parameters - BAICHUAN2_7B.num_matrix_parameters == 125_696 * 4096 + 65 * 4096
    assert BAICHUAN2_7B.num_lora_parameters(8, QKV, QKV) == 4_194_304
    assert BAICHUAN2_7B.num_lora_parameters(8, QKV) == 6_291_456


@pytest.mark.parametrize("shape", [*SHAPES.values(), BAICHUAN2_7B], ids=[*SHAPES, "baichuan2"])
def test_parameters_are_those_of_the_model(shape):
    model = build(shape, device="meta").model
    assert shape.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert ModelShape.from_config(model.config.to_dict()).projections == shape.projections


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_of_a_preset(preset):
    sizes = PRESETS[preset]
    shape = ModelShape(
        sizes.hidden_size,
        sizes.intermediate_size,
        sizes.num_layers,
        sizes.num_heads,
        sizes.num_heads,
        sizes.vocab_size,
        tied_embeddings=True,
    )
    assert shape.num_parameters == sizes.num_parameters()


@pytest.mark.parametrize("lora", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_parameters_of_adapters(shape, lora):
    expected = num_trainable_parameters(build(shape, lora))
    assert shape.num_lora_parameters(lora.rank, lora.target_modules, lora.shared_input) == expected


def test_from_config_fills_what_older_files_leave_out():
    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4}
    assert ModelShape.from_config({**sizes, "vocab_size": 500}) == TINY


def test_a_config_without_a_size_is_refused():
    with pytest.raises(ModelError) as raised:
        ModelShape.from_config({"num_attention_heads": 4, "n_embd": 64})
    assert str(raised.value) == ("config.json: hidden_size must be a positive number, got None; is it a Llama's?")


def test_an_adapter_on_no_layer_is_refused():
    with pytest.raises(ModelError) as raised:
        TINY.num_lora_parameters(8, ("W_pack",))
    assert str(raised.value) == (
        "lora_target_modules: W_pack is no layer of a block; choose from q_proj, k_proj, v_proj, o_proj, gate_proj, "
        "up_proj, down_proj"
    )


# --- operations ---


def counted_operations(run):
    # The plain kernel computes every score, those under the mask too, and only it is known to torch's counter on a CPU.
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [None, *FORMS.values()], ids=["everything", *FORMS])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_training_operations_are_those_that_torch_counts(shape, lora, checkpointing):
    B, T = 2, 48
    model = build(shape, lora)
    if checkpointing:
        enable_gradient_checkpointing(model)
    expected = counted_operations(lambda: model(*batch(shape, B, T, 0.75)).sum().backward())
    found = training_operations(shape, B * T, T, lora=lora, gradient_checkpointing=checkpointing, label_share=0.75)
    assert found == expected


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_inference_operations_are_those_that_torch_counts(shape):
    model = build(shape).model
    with torch.no_grad():
        expected = counted_operations(lambda: model(batch(shape, 2, 48)[0]))
    assert inference_operations(shape, 96, 48) == expected


def test_operations_of_a_large_model_are_near_the_rule_of_thumb():
    # 6 N D with everything trained, 4 N D over frozen weights, 2 N D without gradient; attention comes on top.
    N = BAICHUAN2_7B.num_matrix_parameters
    assert training_operations(BAICHUAN2_7B, 1e6, 1) == pytest.approx(6 * N * 1e6, rel=0.05)
    assert training_operations(BAICHUAN2_7B, 1e6, 1, lora=CONTEST) == pytest.approx(4 * N * 1e6, rel=0.05)
    assert inference_operations(BAICHUAN2_7B, 1e6, 1) == pytest.approx(2 * N * 1e6, rel=1e-3)
    attention = inference_operations(BAICHUAN2_7B, 1e6, 1001) - inference_operations(BAICHUAN2_7B, 1e6, 1)
    assert attention == 4 * 32 * 4096 * 1000 * 1e6


def test_seconds():
    assert seconds(1.6e15, H100, 0.5) == 4
    assert generation_seconds(BAICHUAN2_7B, 300, H100) == pytest.approx(300 * 6_990_856_192 * 2 / 3e12)


# --- memory ---


def measured(shape, lora, *, checkpointing, B, T):
    """Returns the bytes that are alive after a forward pass in bf16, and at the peak of the backward pass."""
    model = build(shape, lora, torch.float32 if lora is None else torch.bfloat16)
    if checkpointing:
        enable_gradient_checkpointing(model)
    live = LiveBytes()
    live.leave_out([*model.parameters(), *model.buffers()])
    inputs = batch(shape, B, T)
    with live:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(*inputs).sum()
        kept, live.peak = live.now, live.now
        loss.backward()
    return kept, live.peak


MEMORY_FORMS = {
    "everything": None,
    "contest": CONTEST,
    "dropout": LoraSettings(8, 16, QKV, 0.1, QKV),
    "all": FORMS["all"],
    "all with dropout": LoraSettings(8, 16, None, 0.1),
    "grouped": CONTEST,
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MEMORY_FORMS)
def test_memory_is_what_is_alive(name, checkpointing, monkeypatch):
    # The loss of so few tokens needs no block of that size.
    monkeypatch.setattr(costs, "LOGIT_BLOCK", 0)
    lora = MEMORY_FORMS[name]
    B, T = 8, 32
    kept, peak, parts = {}, {}, {}
    for num_layers in (1, 4):
        # A CPU does not repeat keys where there is one head of them.
        shape = ModelShape(128, 344, num_layers, 4, 1 if name == "grouped" else 4, 500)
        kept[num_layers], peak[num_layers] = measured(shape, lora, checkpointing=checkpointing, B=B, T=T)
        of_shape = training_memory(shape, tokens_per_pass=B * T, lora=lora, gradient_checkpointing=checkpointing)
        if lora is not None and lora.dropout:
            # A CPU keeps which inputs were dropped in four bytes each, a GPU in one.
            inputs = sum(shape._adapter_inputs(shape._targets(lora.target_modules), lora.shared_input).values())
            more = 3 * inputs * B * T
            of_shape["working" if checkpointing else "kept"] += more * (1 if checkpointing else num_layers)
        parts[num_layers] = of_shape
    # What the blocks keep, without what goes before and after them.  A mask for every block is a CPU's, too.
    assert parts[4]["kept"] - parts[1]["kept"] == pytest.approx(kept[4] - kept[1], rel=0.05)
    expected = parts[4]["kept"] + parts[4]["working"]
    if lora is None:
        # Gradients of weights come one after the other; ``trained`` has all of them.
        assert expected < peak[4] < expected + 4 * shape.num_parameters
    else:
        assert expected == pytest.approx(peak[4], rel=0.15)


def test_bytes_of_a_block_are_those_that_micro_batches_are_planned_with(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    memory = type("Properties", (), {"total_memory": 80e9})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: memory)
    sizes = PRESETS["280m"]
    heads = sizes.num_heads
    shape = ModelShape(sizes.hidden_size, sizes.intermediate_size, sizes.num_layers, heads, heads, sizes.vocab_size)
    fitting = plan.tokens_that_fit("280m", adapters=False, gradient_checkpointing=False, trust_remote_code=False)
    assert fitting == int(0.6 * 80e9 / (sizes.num_layers * activation_bytes(shape)))
    with_adapters = plan.tokens_that_fit("280m", adapters=True, gradient_checkpointing=False, trust_remote_code=False)
    assert with_adapters <= int(0.6 * 80e9 / (sizes.num_layers * activation_bytes(shape, FORMS["all"])))


def test_the_loss_on_a_gpu_holds_as_many_logits_as_are_counted():
    num_tokens, num_words = _block_shape(65_536, torch.device("cuda"))
    assert num_tokens * num_words == costs.LOGIT_BLOCK


def test_quantized_weights_leave_embeddings_and_head_in_bf16():
    others = 2 * 125_696 * 4096 + 65 * 4096
    assert weight_bytes(BAICHUAN2_7B) == 2 * BAICHUAN2_7B.num_parameters
    assert weight_bytes(BAICHUAN2_7B, 4) == (BAICHUAN2_7B.num_parameters - others) / 2 + 2 * others


def test_the_contest_fits_an_h100_with_micro_batches_of_8_and_of_64():
    for sequences, least, most in ((8, 18e9, 23e9), (64, 44e9, 52e9)):
        parts = training_memory(
            BAICHUAN2_7B, tokens_per_pass=sequences * 1024, lora=CONTEST, gradient_checkpointing=True
        )
        assert least < sum(parts.values()) < most < H100.memory_bytes


def test_logits_of_whole_prompts_are_most_of_what_scoring_takes_beside_the_weights():
    parts = scoring_memory(BAICHUAN2_7B, tokens_per_pass=8 * 1024)
    assert parts == {
        "weights": 2.0 * 7_505_973_248,
        "working": 6.0 * 8192 * 125_696,
        "reserve": costs.RESERVE_BYTES,
    }


# --- the table of the whole story ---


def test_the_table_says_of_every_row_where_it_comes_from(capsys, monkeypatch):
    script = Path(doremi_mix.__file__).parents[1] / "scripts" / "bettermixture_costs.py"
    monkeypatch.setattr("sys.argv", [str(script)])
    runpy.run_path(str(script), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    header, *steps, total = rows
    assert header[3:] == ["hours", "GB", "source"]
    names = [row[0] for row in steps]
    for name in ("convert", "load", "filter", "tokenize", "reference", "proxy", "mixture"):
        assert name in names
    assert all(re.match(r"computed$|measured on .+", row[5]) for row in steps)
    hours = {row[0]: float(row[3]) for row in steps}
    # 30 M tokens through 6.99 G parameters at 5.5 operations each, at .48 of 800 TFLOP/s.
    assert hours["finetune, micro-batch 8"] == pytest.approx(30e6 * 6.99e9 * 5.5 / 3.84e14 / 3600, rel=0.05)
    assert float(total[3]) == pytest.approx(sum(hours.values()) - hours["finetune, micro-batch 64"], abs=0.01)
