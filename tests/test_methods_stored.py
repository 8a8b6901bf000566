"""Models that other programs have stored in GPTQ, AWQ and fp8 train as frozen bases: what is read, and what is not."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lora_cli import model as models
from lora_cli import parts
from lora_cli.adapter.plan import view_of
from lora_cli.adapter.quantised import Quantised, View
from lora_cli.errors import ExitCode, UserError
from lora_cli.packed import Form, read
from lora_cli.recipe.load import Loaded
from lora_cli.recipe.schema import ModelRecipe, Recipe
from lora_cli.run import probe
from lora_cli.run.check import check
from lora_cli.run.evaluate import evaluate
from lora_cli.run.merge import merge
from lora_cli.run.open import open_model
from lora_cli.run.train import train
from lora_cli.screen import Screen
from tests import packers, tiny
from tests.adapters import ids
from tests.packers import CONFIGS, PACKERS
from tests.test_merge import refused
from tests.test_train_run import stopped_after

SCREEN = Screen()
FORMS = tuple(CONFIGS)
WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(autouse=True)
def _other_numbers_in_every_session():
    torch.manual_seed(random.getrandbits(48))


def save_plain(folder: Path, kind: str = "llama", **more: Any) -> Path:
    model = tiny.model(kind, random.getrandbits(16), **(WIDE if kind == "llama" else {}), **more)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # they start as zeros
            nn.init.normal_(parameter)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def stored_as(tmp_path: Path, form: str, **how: Any) -> dict[str, Tensor]:
    """A model in `tmp_path / "base"`; its weights in float64."""
    return packers.store(
        save_plain(tmp_path / "plain"), tmp_path / "base", CONFIGS[form], PACKERS[form], **how
    )


def layer_of(part: str, stored: dict[str, Any], W: Tensor, tensors: dict[str, Tensor]) -> Quantised:
    plain = nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
    kind = parts.load("base", part).Layer
    names = [kind.named, *(name for name in tensors if name != kind.named)]
    return read(Form(part, stored), plain, names, lambda name: tensors[name].contiguous())


@torch.no_grad()
def distance(first: nn.Module, second: nn.Module) -> float:
    x = ids()
    return probe.distance(first(x).logits, second(x).logits)


# ---- a layer --------------------------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[str, dict[str, Any], tuple[int, int], Callable[[Tensor], packers.Packed]]] = {
    **{
        f"gptq, {bits} bits, {form}{', act-order' * order}{', even' * even}, groups of {size}": (
            "gptq",
            {"bits": bits, "group_size": size, "checkpoint_format": form},
            (96, 64),
            lambda W, how=(bits, size, order, form, even): packers.gptq(W, *how),
        )
        for bits in (2, 3, 4, 8)
        for form in ("gptq", "gptq_v2")
        for order, even, size in ((False, False, 16), (True, False, 16), (False, True, -1))
    },
    "gptq, a group cut short": (
        "gptq",
        {"bits": 4, "group_size": 32},
        (40, 72),
        lambda W: packers.gptq(W, 4, 32),
    ),
    "gptq, words cut short": (
        "gptq",
        {"bits": 4, "group_size": 4},
        (12, 20),
        lambda W: packers.gptq(W, 4, 4),
    ),
    "gptq, bytes cut short": (
        "gptq",
        {"bits": 3, "group_size": -1},
        (12, 20),
        lambda W: packers.gptq(W, 3, -1),
    ),
    "awq": ("awq", {"group_size": 32}, (40, 64), packers.awq),
    "awq, one group": ("awq", {"group_size": -1}, (24, 40), lambda W: packers.awq(W, -1)),
    "fp8, blocks": ("fp8", {"weight_block_size": [16, 16]}, (48, 64), lambda W: packers.fp8(W, (16, 16))),
    "fp8, blocks cut short": ("fp8", {"weight_block_size": [16, 24]}, (40, 64), packers.fp8),
    "fp8, blocks larger than the layer": (
        "fp8",
        {"weight_block_size": [128, 128]},
        (40, 64),
        lambda W: packers.fp8(W, (128, 128)),
    ),
    "fp8, one scale": ("fp8", {"weight_block_size": None}, (40, 64), lambda W: packers.fp8(W, None)),
    "fp8, a power of two": (
        "fp8",
        {"weight_block_size": [16, 16]},
        (48, 64),
        lambda W: packers.fp8(W, (16, 16), kind=torch.float8_e8m0fnu),
    ),
    "fp8, a scale a row": (
        "fp8",
        CONFIGS["compressed-tensors"],
        (40, 64),
        PACKERS["compressed-tensors"],
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", LAYERS)
def test_a_weight_is_what_the_format_defines_to_the_bit(case, dtype):
    part, stored, shape, pack = LAYERS[case]
    W = torch.randn(shape)
    W[:8] = W[:8].abs()  # whose zero points are the least
    tensors, expected = pack(W)
    layer = layer_of(part, stored, W, tensors)
    assert torch.equal(layer.dequantised(dtype), expected.float().to(dtype))
    x, dY = torch.randn(3, shape[1], dtype=dtype, requires_grad=True), torch.randn(3, shape[0], dtype=dtype)
    y = layer(x)
    y.backward(dY)
    W = expected.float().to(dtype)
    assert torch.equal(y, nn.functional.linear(x, W))
    assert torch.equal(x.grad, dY @ W)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_take_their_bits(bits):
    W = torch.randn(96, 64)
    layer = layer_of("gptq", {"bits": bits, "group_size": 32}, W, packers.gptq(W, bits)[0])
    kept = layer.kept()
    assert 8 * kept["codes"].nbytes == bits * W.numel()
    assert sum(each.nbytes for each in kept.values()) == bits * W.numel() // 8 + (1 + 2) * 96 * 2


@pytest.mark.parametrize("base", ["gptq", "awq", "fp8"])
def test_codes_that_are_parameters_are_the_same_codes(base):
    """As they are where processes share them out."""
    W = torch.randn(96, 64)
    layer = layer_of(base, CONFIGS[base], W, PACKERS[base](W)[0])
    before = layer.dequantised(torch.float32)
    layer.codes_as_parameters()
    assert all(parameter.is_floating_point() for parameter in layer.parameters())
    assert torch.equal(layer.dequantised(torch.float32), before)


# ---- a model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_a_model_computes_what_a_plain_one_with_its_weights_computes(tmp_path, form):
    weights = stored_as(tmp_path, form, shards=3)
    language = models.load(ModelRecipe(name=str(tmp_path / "base"), dtype="float32"))
    quantised = {name for name, module in language.model.named_modules() if isinstance(module, Quantised)}
    assert len(quantised) == 14
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    plain.load_state_dict({name: W.float() for name, W in weights.items()}, strict=False)
    assert distance(language.model, plain) == 0
    assert not hasattr(language.model.config, "quantization_config")


def test_transformers_reads_the_same_weights_from_fp8(tmp_path):
    stored_as(tmp_path, "fp8")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16).state_dict()
    ours = models.load(ModelRecipe(name=str(tmp_path / "base"), dtype="bfloat16")).model
    layers = {name: module for name, module in ours.named_modules() if isinstance(module, Quantised)}
    for name, layer in layers.items():
        assert torch.equal(layer.dequantised(torch.bfloat16), theirs[f"{name}.weight"]), name
    assert layers


def test_layers_that_the_files_hold_plain_are_plain_and_biases_are_kept(tmp_path):
    """Some programs write a bias of zeros for every layer; where a model has biases, they are its own."""
    plain = save_plain(tmp_path / "plain", attention_bias=True, tie_word_embeddings=False)
    config = CONFIGS["awq"] | {"modules_to_not_convert": ["down_proj", "layers.0.mlp.gate_proj"]}

    def wanted(name: str) -> bool:
        return (
            ".layers." in name and "norm" not in name and "down_proj" not in name and "0.mlp.gate" not in name
        )

    weights = packers.store(plain, tmp_path / "base", config, packers.awq, wanted)
    path = tmp_path / "base" / "model.safetensors"
    extra = {f"model.layers.{i}.mlp.up_proj.bias": torch.zeros(96) for i in (0, 1)}
    save_file(load_file(path) | extra, path, metadata={"format": "pt"})
    language = models.load(ModelRecipe(name=str(tmp_path / "base"), dtype="float32"))
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    model.load_state_dict({name: W.float() for name, W in weights.items()})
    assert distance(language.model, model) == 0
    kinds = {name: view_of(module) for name, module in language.model.named_modules() if "layers." in name}
    expected = {name: view and view[0] for name, view in kinds.items()}
    skeleton = models.skeleton(ModelRecipe(name=str(tmp_path / "base")))
    pretended = {name: view_of(module) for name, module in skeleton.named_modules() if "layers." in name}
    assert {name: view and view[0] for name, view in pretended.items()} == expected
    assert list(expected.values()).count("awq") == 11
    save_file(load_file(path) | {f"{UP}.bias": torch.ones(96)}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{UP}.*a bias that the model has no place for"):
        models.load(ModelRecipe(name=str(tmp_path / "base")))


def test_a_head_in_codes_is_one_of_its_own(tmp_path):
    plain = save_plain(tmp_path / "plain", tie_word_embeddings=False, vocab_size=264)
    config = CONFIGS["gptq"] | {"lm_head": True}
    weights = packers.store(
        plain, tmp_path / "base", config, packers.gptq, lambda name: "proj" in name or "lm_head" in name
    )
    language = models.load(ModelRecipe(name=str(tmp_path / "base"), dtype="float32"))
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    model.load_state_dict({name: W.float() for name, W in weights.items()})
    assert distance(language.model, model) == 0
    assert not language.ends.tied
    assert isinstance(models.skeleton(ModelRecipe(name=str(tmp_path / "base"))).lm_head, Quantised)
    with pytest.raises(UserError, match="stored in codes, which have no room") as caught:
        models.load(ModelRecipe(name=str(tmp_path / "base"), add_tokens=("<new>",)))
    assert caught.value.where == "model.add_tokens"
    about = json.loads((tmp_path / "base" / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "base" / "config.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"lm_head.*the weight of another layer, too"):
        models.load(ModelRecipe(name=str(tmp_path / "base")))


# ---- runs -----------------------------------------------------------------------------------------------------------


def recipe(folder: Path, rows: Path, output: Path, **adapter: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"name": str(folder), "dtype": "float32", "quantize": "none"},
            "data": {
                "train": str(rows),
                "eval_fraction": 0.2,
                "format": {"prompt": "{question}", "completion": "{answer}"},
            },
            "adapter": {"r": 4, **adapter},
            "train": {"max_steps": 4, "batch_size": 8, "learning_rate": 1e-2, "save_steps": 2},
            "output": {"dir": str(output)},
        }
    )


@pytest.mark.parametrize(("form", "method"), [*((form, "lora") for form in FORMS), ("gptq", "qdora")])
def test_such_a_model_trains_goes_on_and_is_merged_onto_what_its_codes_say(
    tmp_path, rows_file, monkeypatch, capsys, form, method
):
    weights = stored_as(tmp_path, form, shards=2)
    asked = recipe(tmp_path / "base", rows_file, tmp_path / "run", method=method)
    check(Loaded(asked, {}, "recipe"), SCREEN, 0)
    folder = train(asked, SCREEN)
    report = evaluate(folder, None, [], SCREEN)
    assert report["adapter"]["loss"] != report["base"]["loss"]
    parted = recipe(tmp_path / "base", rows_file, tmp_path / "parts", method=method)
    with monkeypatch.context() as patched:
        stopped_after(patched, 3)
        with pytest.raises(UserError, match="stopped after step 3"):
            train(parted, SCREEN)
    again, name = train(parted, SCREEN, resume=True), "adapter_model.safetensors"
    assert (folder / name).read_bytes() == (again / name).read_bytes()
    live = open_model([folder]).language.model
    found = merge(folder, tmp_path / "merged", None, SCREEN)
    assert found["from_trained"].keys() == {"trained"}
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert distance(merged, live) < 1e-5
    assert not hasattr(merged.config, "quantization_config")
    written = merged.state_dict()
    base = dict(live.named_modules())
    assert written.keys() == weights.keys() | {"lm_head.weight"}
    for layer in (f"{UP}.base_layer", UP):
        if layer in base and isinstance(base[layer], Quantised):
            assert torch.equal(View(base[layer]).weight(), weights[f"{UP}.weight"].float())


def test_a_code_that_has_changed_is_noticed(tmp_path, rows_file):
    stored_as(tmp_path, "gptq")
    folder = train(recipe(tmp_path / "base", rows_file, tmp_path / "run", target_modules=("q_proj",)), SCREEN)
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    tensors[f"{UP}.qweight"][3, 5] ^= 1 << 9
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="its files hold other codes"):
        open_model([folder])
    assert "its files hold other codes" in str(refused(folder, tmp_path / "merged", ExitCode.MODEL))


def test_an_adapter_that_quantises_its_base_is_opened_on_a_plain_one_only(tmp_path, rows_file):
    stored_as(tmp_path, "gptq")
    asked = recipe(tmp_path / "plain", rows_file, tmp_path / "run")
    quantising = asked.model.model_copy(update={"quantize": "nf"})
    folder = train(asked.model_copy(update={"model": quantising}), SCREEN)
    with pytest.raises(UserError, match="stored in gptq already") as caught:
        open_model([folder], base=str(tmp_path / "base"))
    assert (caught.value.where, "plain" in caught.value.fix) == ("--base", True)


# ---- what is refused ------------------------------------------------------------------------------------------------


def cut(name: str, axis: int = 0, by: int = 1) -> Callable[[dict[str, Tensor]], Any]:
    """A tensor of a layer with fewer numbers."""
    key = f"{UP}.{name}"
    return lambda t: t.update({key: t[key].narrow(axis, 0, t[key].shape[axis] - by)})


def other(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], Any]:
    key = f"{UP}.{name}"
    return lambda t: t.update({key: make(t[key])})


DAMAGE: dict[str, tuple[str, Callable[[dict[str, Tensor]], Any], str]] = {
    "gptq, fewer words": ("gptq", cut("qweight"), "another shape"),
    "gptq, fewer outputs": ("gptq", cut("qweight", 1), "another shape"),
    "gptq, fewer zero points": ("gptq", cut("qzeros", 1), "another shape"),
    "gptq, fewer groups": ("gptq", cut("scales"), "another shape"),
    "gptq, no zero points": ("gptq", lambda t: t.pop(f"{UP}.qzeros"), "there is no qzeros"),
    "gptq, fewer inputs": ("gptq", cut("g_idx"), "another shape"),
    "gptq, a group that is not there": ("gptq", other("g_idx", lambda t: t + 1), "other groups"),
    "gptq, groups of another size, and no word of which input is in which": (
        "gptq",
        lambda t: (
            t.update({key: t[key].repeat(2, 1) for key in (f"{UP}.scales", f"{UP}.qzeros")})
            or t.pop(f"{UP}.g_idx")
        ),
        "other groups",
    ),
    "gptq, no codes": ("gptq", lambda t: t.pop(f"{UP}.qweight"), "no codes that it belongs to"),
    "gptq, longer words": ("gptq", other("qweight", lambda t: t.long()), "another type"),
    "awq, fewer words": ("awq", cut("qweight", 1), "another shape"),
    "awq, fewer inputs": ("awq", cut("qweight"), "another shape"),
    "awq, fewer groups": ("awq", cut("qzeros"), "another shape"),
    "awq, no scales": ("awq", lambda t: t.pop(f"{UP}.scales"), "there is no scales"),
    "fp8, fewer rows": ("fp8", cut("weight"), "another shape"),
    "fp8, fewer blocks": ("fp8", cut("weight_scale_inv"), "scales of another shape"),
    "fp8, other numbers": ("fp8", other("weight", lambda t: t.to(torch.float8_e5m2)), "not of E4M3"),
    "fp8, no scales": ("fp8", lambda t: t.pop(f"{UP}.weight_scale_inv"), "what they mean is not"),
    "fp8, scales in whole numbers": (
        "fp8",
        other("weight_scale_inv", lambda t: t.to(torch.uint8)),
        "no floating-point numbers",
    ),
}


@pytest.fixture(scope="module")
def stored_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folders: dict[str, Path] = {}

    def find(form: str) -> Path:
        if form not in folders:
            folders[form] = tmp_path_factory.mktemp(form)
            stored_as(folders[form], form)
        return folders[form] / "base"

    return find


@pytest.mark.parametrize("damage", DAMAGE)
def test_codes_that_say_no_weight_are_refused_and_named(stored_once, tmp_path, damage):
    form, breaks, reason = DAMAGE[damage]
    shutil.copytree(stored_once(form), tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    breaks(tensors)
    packers.save(path, tensors)
    with pytest.raises(UserError, match=rf"base: {UP}.*{reason}|base: there is {UP}.*{reason}") as caught:
        models.load(ModelRecipe(name=str(tmp_path / "base")))
    assert caught.value.code is ExitCode.MODEL


NOT_READ: dict[str, tuple[dict[str, Any], str]] = {
    "gptq for another kernel": (
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
        "gptq, marlin",
    ),
    "gptq in 5 bits": ({"quant_method": "gptq", "bits": 5}, "gptq"),
    "awq for another kernel": ({"quant_method": "awq", "bits": 4, "version": "GEMV"}, "awq, GEMV"),
    "awq of its authors": ({"quant_method": "awq", "bits": 4, "backend": "llm-awq"}, "awq"),
    "whole numbers": (
        CONFIGS["compressed-tensors"] | {"format": "pack-quantized"},
        "compressed-tensors, pack-quantized",
    ),
    "experts in 4 bits": ({"quant_method": "fp8", "expert_dtype": "fp4"}, "fp8"),
    **{name: ({"quant_method": name}, name) for name in ("hqq", "aqlm", "mxfp4", "torchao", "quanto")},
}


@pytest.mark.parametrize("case", NOT_READ)
def test_what_is_not_read_is_refused_by_name(tmp_path, case):
    stored, said = NOT_READ[case]
    tiny.model().config.save_pretrained(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": stored}
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=rf"stored quantised \({said}\).*: awq, fp8, gptq, int8, nf4"):
        models.skeleton(ModelRecipe(name=str(tmp_path)))


def test_codes_that_are_not_there_are_missed(tmp_path):
    stored_as(tmp_path, "gptq", wanted=lambda name: False)
    with pytest.raises(UserError, match="there are no codes"):
        models.load(ModelRecipe(name=str(tmp_path / "base")))


def with_config(folder: Path, **changed: Any) -> ModelRecipe:
    """The same files, of which config.json says something else; None takes a key away."""
    about = json.loads((folder / "config.json").read_text())
    stored = about.pop("quantization_config") | changed
    kept = {key: value for key, value in stored.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(about | ({"quantization_config": kept} if kept else {})))
    return ModelRecipe(name=str(folder))


def test_numbers_of_8_bits_are_refused_where_nobody_says_what_they_mean(stored_once, tmp_path):
    shutil.copytree(stored_once("fp8"), tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())["quantization_config"]
    with pytest.raises(UserError, match="has 8 bits, and"):
        models.load(with_config(tmp_path / "base", **dict.fromkeys(config)))


@pytest.mark.parametrize(
    ("form", "changed"),
    [
        ("awq", {"group_size": None}),
        ("awq", {"group_size": 0}),
        ("gptq", {"group_size": "128"}),
        ("fp8", {"weight_block_size": 128}),
    ],
)
def test_a_config_that_makes_no_sense_is_no_traceback(stored_once, tmp_path, form, changed):
    shutil.copytree(stored_once(form), tmp_path / "base")
    with pytest.raises(UserError, match="base"):
        models.load(with_config(tmp_path / "base", **changed))


def test_codes_of_inputs_that_would_have_to_be_turned_are_not_read():
    fp8, stored = parts.load("base", "fp8"), CONFIGS["compressed-tensors"]
    assert fp8.reads(stored)
    assert not fp8.reads(stored | {"transform_config": {"config_groups": {"u": {}}}})
    assert not fp8.reads(stored | {"config_groups": ["weights"]})


def test_codes_of_experts_are_refused(tmp_path):
    plain = save_plain(tmp_path / "plain", kind="qwen3_moe")
    packers.store(plain, tmp_path / "base", CONFIGS["fp8"], PACKERS["fp8"], lambda name: ".experts." in name)
    with pytest.raises(UserError, match="codes of what is no linear layer"):
        models.load(ModelRecipe(name=str(tmp_path / "base")))


@pytest.mark.parametrize("base", ["gptq", "awq", "fp8"])
def test_others_formats_are_read_and_never_made(base):
    assert not parts.defines("base", base, "quantise")
    with pytest.raises(ValueError, match="quantize"):
        ModelRecipe.model_validate({"name": "model", "quantize": base})
