"""What was trained on a quantised base is merged onto what its codes say, and both errors are told."""

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lora_cli import model as models
from lora_cli import parts
from lora_cli.adapter import files, inject, plan
from lora_cli.errors import ExitCode, UserError
from lora_cli.model import DTYPES
from lora_cli.recipe.schema import AdapterRecipe, ModelRecipe
from lora_cli.run import onto, probe
from lora_cli.run.merge import merge
from lora_cli.run.open import open_model
from lora_cli.screen import Screen
from tests import tiny
from tests.adapters import ids
from tests.test_merge import refused
from tests.test_merge_streamed import save_adapter
from tests.test_methods_quantised import packed

SCREEN = Screen()
FORMS = ("nf4", "nf4, plain", "fp4", "int8")
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
"""Rows that end with a block of 64, as bitsandbytes needs them on a CPU."""
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(autouse=True)
def _other_numbers_in_every_session():
    torch.manual_seed(random.getrandbits(48))


def save_plain(folder: Path, dtype: str, kind: str = "llama", **more: Any) -> None:
    sizes = WIDE if kind == "llama" else {"n_embd": 64}
    tiny.model(kind, **sizes, **more).to(DTYPES[dtype]).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)


def stored_quantised(
    folder: Path, form: str, dtype: str = "float32", kind: str = "llama", **adapter: Any
) -> Any:
    """A base as bitsandbytes stored it and an adapter of it, in folders of these names; the live pair."""
    save_plain(folder / "plain", dtype, kind)
    packed(folder / "plain", folder / "base", form, DTYPES[dtype])
    language = models.load(ModelRecipe(name=str(folder / "base")))
    recipe = AdapterRecipe(**{"r": 4, "target_modules": ("q_proj", "up_proj"), **adapter})
    made = inject.inject(language.model, plan.make(recipe, language.model, language.ends))
    save_adapter(folder, made)
    return language.model, made


def quantised_here(folder: Path, dtype: str = "float32", **adapter: Any) -> None:
    """A base that is quantised when it is loaded, and an adapter of it."""
    save_plain(folder / "base", dtype)
    language = models.load(ModelRecipe(name=str(folder / "base"), dtype=dtype, quantize="nf4"))
    recipe = AdapterRecipe(**{"r": 4, "target_modules": ("q_proj", "up_proj"), "method": "qlora", **adapter})
    save_adapter(
        folder,
        inject.inject(language.model, plan.make(recipe, language.model, language.ends, quantize="nf4")),
    )


def learned(folder: Path) -> dict[str, Tensor]:
    """Layer -> s·B·A in float64, as PEFT defines it, from the files."""
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    layers = {key.split("base_model.model.")[1].split(".lora_")[0] for key in tensors}
    A, B = (
        {layer: tensors[f"base_model.model.{layer}.lora_{side}.weight"].double() for layer in layers}
        for side in "AB"
    )
    return {layer: config["lora_alpha"] / config["r"] * B[layer] @ A[layer] for layer in layers}


# ---- stored quantised -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_merged_is_what_transformers_dequantises_and_what_was_learned(tmp_path, form, dtype):
    stored_quantised(tmp_path, form, dtype)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=DTYPES[dtype]).dequantize()
    report = merge(tmp_path / "adapter", tmp_path / "merged", None, SCREEN)
    assert report["dtype"] == dtype
    found = load_file(tmp_path / "merged" / "model.safetensors")
    expected, delta = theirs.state_dict(), learned(tmp_path)
    assert found.keys() == expected.keys(), "nothing of the codes is left"
    # Theirs is rounded before ΔW is added, ours only afterwards.
    bound = 2 * torch.finfo(DTYPES[dtype]).eps
    for name, W in expected.items():
        assert found[name].dtype == DTYPES[dtype], name
        layer = name.removesuffix(".weight")
        if layer in delta:
            W = W.double() + delta[layer]
            assert torch.linalg.norm(found[name].double() - W) <= bound * torch.linalg.norm(W), name
        elif form == "int8":  # whose rows they multiply by a rounded 1/127
            torch.testing.assert_close(found[name], W, rtol=bound, atol=0)
        else:
            assert torch.equal(found[name], W), name
    assert delta.keys() == report["layer_losses"].keys()
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == dtype


@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "oft"])
@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_the_merged_model_computes_what_the_codes_and_the_adapter_compute(tmp_path, form, method):
    live, _ = stored_quantised(tmp_path, form, method=method)
    report = merge(tmp_path / "adapter", tmp_path / "merged", None, SCREEN)
    assert report["from_trained"].keys() == {"trained"}, "there are no other weights"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    x = ids()
    with torch.no_grad():
        assert probe.distance(merged(x).logits, live(x).logits) < 1e-5


def test_a_conv1d_that_was_stored_quantised_is_one_again(tmp_path):
    live, _ = stored_quantised(tmp_path, "nf4", kind="gpt2", target_modules=("c_attn", "c_fc"))
    merge(tmp_path / "adapter", tmp_path / "merged", None, SCREEN)
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    assert {k: t.shape for k, t in load_file(tmp_path / "merged" / "model.safetensors").items()} == {
        k: t.shape for k, t in plain.items()
    }
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    x = ids()
    with torch.no_grad():
        assert probe.distance(merged(x).logits, live(x).logits) < 1e-5


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:Merge lora module")
@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_an_adapter_of_peft_on_such_a_base_is_merged_as_peft_merges_it(tmp_path, form):
    from peft import LoraConfig, PeftModel, get_peft_model

    save_plain(tmp_path / "plain", "float32")
    packed(tmp_path / "plain", tmp_path / "base", form)
    theirs = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    theirs.save_pretrained(tmp_path / "adapter")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).dequantize()
    expected = PeftModel.from_pretrained(dense, tmp_path / "adapter").merge_and_unload().state_dict()
    opened = open_model([tmp_path / "adapter"])
    merge(tmp_path / "adapter", tmp_path / "merged", None, SCREEN)
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, W in expected.items():
        torch.testing.assert_close(found[name], W, rtol=1e-5, atol=1e-6)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    x = ids()
    with torch.no_grad():
        assert probe.distance(merged(x).logits, opened.language.model(x).logits) < 1e-5


def test_another_type_is_rounded_to_once(tmp_path):
    stored_quantised(tmp_path, "nf4", "bfloat16")
    for dtype in ("float32", "bfloat16"):
        merge(tmp_path / "adapter", tmp_path / dtype, dtype, SCREEN)
    wide, narrow = (load_file(tmp_path / dtype / "model.safetensors") for dtype in ("float32", "bfloat16"))
    assert {W.dtype for W in wide.values()} == {torch.float32}
    assert all(torch.equal(wide[name].bfloat16(), W) for name, W in narrow.items())


def test_codes_that_lie_in_another_type_are_the_same_codes(tmp_path):
    """`bnb_4bit_quant_storage`, which FSDP wants to be that of the other weights."""
    stored_quantised(tmp_path, "nf4")
    merge(tmp_path / "adapter", tmp_path / "bytes", None, SCREEN)
    shutil.rmtree(tmp_path / "base")
    packed(tmp_path / "plain", tmp_path / "base", "nf4 in bfloat16")
    assert load_file(tmp_path / "base" / "model.safetensors")[f"{UP}.weight"].dtype == torch.bfloat16
    assert open_model([tmp_path / "adapter"]).adapters
    merge(tmp_path / "adapter", tmp_path / "storage", None, SCREEN)
    weights = "model.safetensors"
    assert (tmp_path / "bytes" / weights).read_bytes() == (tmp_path / "storage" / weights).read_bytes()


DAMAGE: dict[str, tuple[str, Any]] = {
    "fewer codes": ("nf4", lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"][:-100].clone()})),
    "fewer largest values": (
        "nf4",
        lambda t: t.update({f"{UP}.weight.absmax": t[f"{UP}.weight.absmax"][:-1].clone()}),
    ),
    "fewer of theirs": ("nf4", lambda t: t.update({f"{UP}.weight.nested_absmax": torch.zeros(0)})),
    "no largest values": ("nf4, plain", lambda t: t.pop(f"{UP}.weight.absmax")),
    "no state": ("fp4", lambda t: t.pop(f"{UP}.weight.quant_state.bitsandbytes__fp4")),
    "another shape": (
        "nf4",
        lambda t: t.update(
            {k: t[k.replace("up_proj", "down_proj")] for k in t if f"{UP}.weight.quant_state" in k}
        ),
    ),
    "no state at all": ("nf4", lambda t: [t.pop(k) for k in list(t) if k.startswith(f"{UP}.weight.")]),
    "int8 alone": ("int8", lambda t: [t.pop(f"{UP}.{k}") for k in ("SCB", "weight_format")]),
    "another order": (
        "int8",
        lambda t: t.update({f"{UP}.weight_format": torch.tensor(1, dtype=torch.uint8)}),
    ),
    "a row less": ("int8", lambda t: t.update({f"{UP}.SCB": t[f"{UP}.SCB"][:-1].clone()})),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_codes_that_say_no_weight_are_refused_and_named(tmp_path, damage):
    form, breaks = DAMAGE[damage]
    stored_quantised(tmp_path, form)
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    breaks(tensors)
    save_file({k: t.clone() for k, t in tensors.items()}, path, metadata={"format": "pt"})
    error = refused(tmp_path / "adapter", tmp_path / "merged", ExitCode.MODEL)
    assert UP in str(error)
    assert str(tmp_path / "base") in str(error)


def test_other_weights_than_the_codes_are_refused(tmp_path):
    stored_quantised(tmp_path, "nf4")
    with pytest.raises(UserError, match="no other weights"):
        merge(tmp_path / "adapter", tmp_path / "merged", None, SCREEN, onto="original")
    assert not (tmp_path / "merged").exists()


# ---- the codes of the training --------------------------------------------------------------------------------------


def test_a_stored_code_that_has_changed_is_noticed(tmp_path):
    """One of all, of a layer that is not adapted; the signs of the adapted ones are what they were."""
    stored_quantised(tmp_path, "nf4", target_modules=("q_proj",))
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    tensors[f"{UP}.weight"][random.randrange(4096)] ^= 1
    save_file(tensors, path, metadata={"format": "pt"})
    error = refused(tmp_path / "adapter", tmp_path / "merged", ExitCode.MODEL)
    assert "its files hold other codes" in str(error)
    assert "--base" in error.fix
    with pytest.raises(UserError, match="its files hold other codes"):
        open_model([tmp_path / "adapter"])


def other_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bitsandbytes that rounds some codes another way."""
    part = parts.load("base", "nf4")
    quantise = part.quantise

    def another(plain: Any, W: Tensor) -> Any:
        made = quantise(plain, W)
        made.codes[0] ^= 1
        return made

    monkeypatch.setattr(part, "quantise", another)


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_codes_of_another_version_are_refused_and_nothing_is_left(tmp_path, monkeypatch, capsys, init):
    quantised_here(tmp_path, init=init)
    merge(tmp_path / "adapter", tmp_path / "same", None, SCREEN)
    other_version(monkeypatch)
    error = refused(tmp_path / "adapter", tmp_path / "merged", ExitCode.MODEL)
    assert "quantised to other codes" in str(error)
    assert "--onto original" in error.fix
    assert "bitsandbytes" in error.fix
    capsys.readouterr()
    merge(tmp_path / "adapter", tmp_path / "merged", None, SCREEN, onto="original")
    assert "not those of the training" in capsys.readouterr().err.replace("\n", " ")


def test_the_hash_does_not_depend_on_the_order_in_which_layers_are_met(tmp_path):
    """It is the same of a model in memory and of layers one by one."""
    from lora_cli.adapter.quantised import Quantised, digest, digest_of, layer_digest

    quantised_here(tmp_path)
    model = open_model([tmp_path / "adapter"]).language.model
    layers = {n: layer_digest(m) for n, m in model.named_modules() if isinstance(m, Quantised)}
    names = [name.replace(".base_layer", "") for name in layers]
    shuffled = random.sample(list(zip(names, layers.values(), strict=True)), len(layers))
    saved = files.read(tmp_path / "adapter")
    assert digest_of(dict(shuffled)) == saved.ours.codes
    assert (
        digest(model)
        == digest_of(layers)
        != digest_of(dict(zip(names, reversed(layers.values()), strict=True)))
    )


# ---- how far from what was trained ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["qlora", "qdora"])
def test_both_merges_tell_how_far_both_are_from_what_was_trained(tmp_path, capsys, method, dtype):
    quantised_here(tmp_path, dtype, method=method, train_also=("norms",))
    opened = open_model([tmp_path / "adapter"], dtype="float32")
    (adapter,) = opened.adapters.values()
    inject.merge(opened.language.model, adapter)
    trained = {key: W.double() for key, W in opened.language.model.state_dict().items()}
    layers = [name for name in trained if "_proj" in name]
    reports, far = {}, {}
    for way in ("trained", "original"):
        capsys.readouterr()
        reports[way] = merge(tmp_path / "adapter", tmp_path / way, None, SCREEN, onto=way)
        lines = [line for line in capsys.readouterr().err.splitlines() if "away from the training" in line]
        assert len(lines) == 2
        assert len([line for line in lines if "(this merge)" in line and onto.NAMES[way] in line]) == 1
        merged = load_file(tmp_path / way / "model.safetensors")
        far[way] = {
            name.removesuffix(".weight"): (
                (merged[name].double() - trained[name]).norm() / trained[name].norm()
            ).item()
            for name in layers
        }
    assert reports["trained"]["from_trained"] == reports["original"]["from_trained"], "whichever is written"
    for way, expected in far.items():
        told = reports[way]["from_trained"][way]
        sizes = sorted(expected.values())
        assert told["median"] == pytest.approx((sizes[6] + sizes[7]) / 2, rel=1e-3, abs=1e-7)
        assert told["worst"] == pytest.approx(sizes[-1], rel=1e-3, abs=1e-7)
        assert told["worst"] == pytest.approx(expected[told["worst_layer"]], rel=1e-3, abs=1e-7)
    assert far["original"][UP] > 20 * far["trained"][UP]


def test_the_distance_is_how_much_a_layer_computes_otherwise(tmp_path):
    """Of inputs without a direction of their own, bias included."""
    W, b, off = torch.randn(48, 32), torch.randn(48), torch.randn(48, 32) * 0.1
    x = torch.randn(200_000, 32)
    y, z = x @ W.t() + b, x @ (W + off).t() + 1.1 * b
    found = inject.distance({"w": W + off, "b": 1.1 * b}, {"w": W, "b": b})
    assert found == pytest.approx(((z - y).norm() / y.norm()).item(), rel=0.01)


def test_without_bitsandbytes_the_original_weights_are_merged_onto_all_the_same(
    tmp_path, monkeypatch, capsys
):
    quantised_here(tmp_path)
    expected = merge(tmp_path / "adapter", tmp_path / "with", None, SCREEN, onto="original")
    part = parts.load("base", "nf4")
    monkeypatch.setattr(part, "find_spec", lambda name: None)
    monkeypatch.delattr(part, "quantise")
    capsys.readouterr()
    report = merge(tmp_path / "adapter", tmp_path / "without", None, SCREEN, onto="original")
    told = capsys.readouterr().err.replace("\n", " ")
    assert re.search("how far .* is not known: .*bitsandbytes", told)
    assert "from_trained" in expected
    assert "from_trained" not in report
    weights = "model.safetensors"
    assert (tmp_path / "with" / weights).read_bytes() == (tmp_path / "without" / weights).read_bytes()
    error = refused(tmp_path / "adapter", tmp_path / "merged", ExitCode.MODEL)
    assert "bitsandbytes, which is not installed" in str(error)


@pytest.mark.parametrize("quantize", ["nf4", "nf", "int4"])
@pytest.mark.parametrize(("files_in", "loaded"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_codes_are_those_of_what_was_loaded_whatever_the_files_hold(tmp_path, quantize, files_in, loaded):
    """As a model in float16 is on a GPU, where `auto` is bfloat16; opened where `auto` is something else."""
    save_plain(tmp_path / "base", files_in)
    language = models.load(ModelRecipe(name=str(tmp_path / "base"), dtype=loaded, quantize=quantize))
    asked = AdapterRecipe(r=4, target_modules=("q_proj", "up_proj"))
    made = plan.make(asked, language.model, language.ends, quantize=quantize)
    save_adapter(tmp_path, inject.inject(language.model, made))
    assert files.read(tmp_path / "adapter").ours.codes_of == loaded
    opened = open_model([tmp_path / "adapter"])
    assert models.stored_as(opened.language.model) is DTYPES[loaded]
    merge(tmp_path / "adapter", tmp_path / "merged", "float32", SCREEN)
