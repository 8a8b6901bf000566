"""The adapter folder: it comes back to the bit, and whatever does not fit is refused with the reason."""

import json
import random
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from lora_cli import parts
from lora_cli.adapter import files, inject, peft_format
from lora_cli.adapter.delta import Delta
from lora_cli.adapter.portable import saved_form
from lora_cli.errors import ExitCode, UserError
from lora_cli.run.export import export
from lora_cli.run.merge import merge
from lora_cli.screen import Screen
from tests import tiny
from tests.adapters import CASES, adapted, base, ids, put_on

WEIGHTS = "adapter_model.safetensors"


def saved(folder: Path, kind: str = "llama", **settings: object):
    """A random adapter and the folder it was written to."""
    folder.mkdir(parents=True)
    model, adapter = adapted(kind, **settings)
    files.save(folder, adapter, "the/base", None)
    return model, adapter


def refusal(folder: Path, model: nn.Module | None = None) -> UserError:
    """The error that reading the folder, or putting it on the model, gives."""
    with pytest.raises(UserError) as error:
        put_on(tiny.model("llama") if model is None else model, folder)
    assert error.value.code == ExitCode.MODEL
    return error.value


def change_config(folder: Path, **values: object) -> None:
    path = folder / files.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(("kind", "settings"), CASES.values(), ids=CASES)
def test_a_saved_adapter_comes_back_to_the_bit_on_the_base_as_it_is_on_disk(tmp_path, kind, settings):
    model, adapter = saved(tmp_path / "a", kind, **settings)
    x = ids()
    again = base(kind, settings)
    plain = again(x).logits
    loaded = put_on(again, tmp_path / "a")
    assert torch.equal(again(x).logits, model(x).logits)
    assert not torch.allclose(again(x).logits, plain)
    theirs, ours = saved_form(loaded).tensors, saved_form(adapter).tensors
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in ours)
    for key in ("layers", "also", "new_rows", "lora_bias", "method"):
        ignored = {"num_trainable": 0} if key == "layers" else {}
        assert plain_data(getattr(loaded.plan, key), ignored) == plain_data(
            getattr(adapter.plan, key), ignored
        )


def plain_data(value: object, ignored: dict[str, int]) -> object:
    """Layers compared without their count of trained numbers, which a file does not tell for a frozen factor."""
    if not ignored:
        return set(value) if isinstance(value, tuple) else value
    return [{**vars(each), **ignored} for each in value]


@pytest.mark.parametrize(("kind", "settings"), CASES.values(), ids=CASES)
def test_every_tensor_has_a_name_of_its_own_in_memory_and_on_disk(kind, settings):
    model, adapter = adapted(kind, **settings)
    parts_of_it = [*adapter.deltas.values(), *adapter.rows.values()]
    distinct = {id(p) for part in parts_of_it for p in part.parameters()} | {
        id(p) for p in adapter.also.values()
    }
    assert {id(p) for p in adapter.named_tensors().values()} == distinct
    assert {id(p) for p in peft_format.parameters(adapter).values()} == distinct
    assert distinct >= {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize(("kind", "settings"), CASES.values(), ids=CASES)
def test_saving_what_was_read_gives_the_same_files(tmp_path, kind, settings):
    saved(tmp_path / "a", kind, **settings)
    loaded = put_on(base(kind, settings), tmp_path / "a")
    (tmp_path / "b").mkdir()
    files.save(tmp_path / "b", loaded, "the/base", None)
    for name in (WEIGHTS, files.CONFIG, "lora.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_several_adapters_on_one_model_each_compute_their_own(tmp_path):
    cases = [CASES[name] for name in ("linear", "both ends in full, tied", "norms", "embedding")]
    cases = [settings for kind, settings in cases if kind == "llama"]
    settings = {"config": {"tie_word_embeddings": True}, "untie": True}
    x, expected = ids(), []
    for number, each in enumerate(cases):
        model, _ = saved(tmp_path / str(number), **{**each, **settings})
        expected.append(model(x).logits)
    model = base("llama", settings)
    plain, adapters = model(x).logits, []
    for number in range(len(cases)):
        adapters.append(put_on(model, tmp_path / str(number)))
        adapters[-1].deactivate()
    for adapter, logits in zip(adapters, expected, strict=True):
        adapter.activate()
        assert torch.equal(model(x).logits, logits)
        adapter.deactivate()
    assert torch.equal(model(x).logits, plain)


def test_the_config_is_short_where_layers_agree(tmp_path):
    saved(tmp_path / "a", rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.mlp.up_proj": 3.0})
    config = json.loads((tmp_path / "a" / files.CONFIG).read_text())
    assert config["target_modules"] == [
        "down_proj",
        "gate_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    ]
    assert config["rank_pattern"] == {"q_proj": 2}
    assert config["alpha_pattern"] == {"model.layers.1.mlp.up_proj": 3}


# What does not fit


def test_the_base_is_told_from_another_but_not_from_its_own_rounding(tmp_path):
    saved(tmp_path / "a")
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        put_on(tiny.model("llama").to(dtype), tmp_path / "a")
    assert "other weights" in str(refusal(tmp_path / "a", tiny.model("llama", seed=1)))
    one_off = tiny.model("llama")
    with torch.no_grad():
        one_off.model.layers[1].mlp.up_proj.weight[5, 7] *= -1
    assert "other weights" in str(refusal(tmp_path / "a", one_off))


def drop(ending: str):
    """Take the tensors whose name has this in it away."""
    return lambda tensors: {key: t for key, t in tensors.items() if not re.search(ending, key)}


def add(key: str, *shape: int):
    """Put a tensor in."""
    return lambda tensors: tensors | {key: torch.ones(shape)}


def cut(ending: str, dim: int):
    """Make tensors one smaller in one dimension."""
    return lambda tensors: {
        key: t.narrow(dim, 0, t.shape[dim] - 1).clone() if re.search(ending, key) else t
        for key, t in tensors.items()
    }


def second_block_twice(tensors):
    """As for a deeper model."""
    return tensors | {key.replace("layers.1.", "layers.2."): t.clone() for key, t in tensors.items()}


P = "base_model.model."


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            drop("layers.0.*up_proj.lora_A"),
            r"missing tensors: 1, such as .*layers.0.mlp.up_proj.lora_A.weight",
        ),
        (drop("lora_B"), r"missing tensors: 14, such as .*lora_B.weight"),
        (
            drop("layers.0.self_attn.q_proj"),
            r"no tensors for 1 layers, such as model.layers.0.self_attn.q_proj",
        ),
        (add(f"{P}lm_head.lora_C", 1), rf"fit nowhere: 1, such as {P}lm_head.lora_C"),
        (add("lm_head.weight", 261, 32), r"fit nowhere: 1, such as lm_head.weight"),
        (
            cut("q_proj.lora_A", 1),
            r"another shape: 2, such as .*q_proj.lora_A.weight, \(4, 31\) instead of \(4, 32\)",
        ),
        (
            cut("v_proj.lora_A", 0),
            r"another shape: 2, such as .*v_proj.lora_A.weight, \(3, 32\) instead of \(4, 32\)",
        ),
        (second_block_twice, r"7 of 21 adapted layers are not in it, such as model.layers.2"),
        (
            add(f"{P}model.norm.lora_A.weight", 4, 32),
            r"1 of 15 adapted layers are not in it, such as model.norm",
        ),
        (
            add(f"{P}model.norm.weight", 31),
            r"another shape: 1, such as .*norm.weight, \(31,\) instead of \(32,\)",
        ),
        (add(f"{P}model.embed_tokens.weight", 263, 32), r"\(263, 32\) instead of \(261, 32\)"),
    ],
)
def test_tensors_that_do_not_fit_are_counted_and_one_is_named(tmp_path, change, expected):
    saved(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    save_file(change(tensors), tmp_path / "a" / WEIGHTS)
    model = tiny.model("llama")
    error = refusal(tmp_path / "a", model)
    assert re.search(expected, str(error)), error
    assert "the/base" in error.fix
    assert not inject.adapted_layers(model), "the model is left as it was"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not known"),
        ({"use_qalora": True}, "uses use_qalora"),
        ({"use_qalora": True, "layer_replication": [[0, 2]]}, "uses layer_replication, use_qalora"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "uses target_parameters"),
        ({"arrow_config": {"top_k": 2}}, "uses arrow_config"),
        ({"alora_invocation_tokens": [1]}, "uses alora_invocation_tokens"),
        ({"a_key_of_the_future": 1}, "uses a_key_of_the_future"),
        *(
            ({"init_lora_weights": name}, f"'{name}', which changes the base")
            for name in ("pissa", "olora", "loftq")
        ),
        ({"r": "4"}, "r: Input should be a valid integer"),
        ({"r": 0}, "r: "),
        ({"r": 8}, "instead of"),
        ({"lora_alpha": "NaN"}, "lora_alpha: "),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern: q_proj: "),
        ({"rank_pattern": {"q_proj": 5}}, "instead of"),
        ({"alpha_pattern": {"(": 2}}, "not a regular expression"),
        ({"alpha_pattern": [1]}, "alpha_pattern: "),
        ({"trainable_token_indices": [1, 2]}, "no tensors for trainable_token_indices"),
    ],
)
def test_a_config_that_asks_for_something_else_is_refused(tmp_path, values, expected):
    saved(tmp_path / "a")
    change_config(tmp_path / "a", **values)
    assert expected in str(refusal(tmp_path / "a"))


@pytest.mark.parametrize(
    ("indices", "expected"),
    [
        ([7, 261], r"trains token 261, the vocabulary has 261 rows"),
        ([7], r"\(2, 32\) instead of \(1, 32\)"),
        ({"embed_tokens": [7, 200], "lm_head": [7, 201]}, "other tokens in the embeddings"),
    ],
)
def test_rows_of_tokens_have_to_fit_the_vocabulary(tmp_path, indices, expected):
    saved(tmp_path / "a", new_rows=(7, 200))
    change_config(tmp_path / "a", trainable_token_indices=indices)
    assert re.search(expected, str(refusal(tmp_path / "a")))


def test_a_pickle_is_never_opened(tmp_path):
    saved(tmp_path / "a")
    (tmp_path / "a" / WEIGHTS).rename(tmp_path / "a" / "adapter_model.bin")
    assert "pickles are never opened" in str(refusal(tmp_path / "a"))


def test_a_folder_without_an_adapter_says_what_belongs_there(tmp_path):
    assert "adapter_config.json" in str(refusal(tmp_path))


def test_damaged_weights_are_an_error_and_not_a_crash(tmp_path):
    saved(tmp_path / "a")
    path = tmp_path / "a" / WEIGHTS
    whole = path.read_bytes()
    for cut in (0, 1, 7, 8, 9, *random.sample(range(len(whole)), 10), len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert "is damaged" in str(refusal(tmp_path / "a"))
    for content in (b"\xff" * 64, (2**62).to_bytes(8, "little") + whole[8:], whole + b"x"):
        path.write_bytes(content)
        assert "is damaged" in str(refusal(tmp_path / "a"))


def test_whatever_stands_in_the_json_files_is_read_right_or_refused(tmp_path):
    model, _ = saved(tmp_path / "a", new_rows=(7, 200))
    x = ids()
    foreign = [None, True, -1, 0.5, 10**400, "", "x", [], ["x"], [[]], {}, {"x": 1}, {"x": {"name": "lora"}}]
    for name in (files.CONFIG, "lora.json"):
        path = tmp_path / "a" / name
        whole = path.read_text()
        for key in json.loads(whole):
            for value in random.sample(foreign, 5):
                path.write_text(json.dumps(json.loads(whole) | {key: value}))
                _read_right_or_refused(tmp_path / "a", model, x, f"{name} {key} {value}")
        for text in ("", "[]", "nul", "[" * 10_000, '{"a": 1', whole[: len(whole) // 2]):
            path.write_text(text)
            refusal(tmp_path / "a")
        path.write_text(whole)


def _read_right_or_refused(folder: Path, expected: nn.Module, x: torch.Tensor, what: str) -> None:
    model = tiny.model("llama")
    try:
        put_on(model, folder)
    except UserError:
        return
    # A scale may be written differently and still be a scale; everything else has to give the same numbers.
    free = ("lora_alpha", "use_rslora", "alpha_pattern", " parts ")
    if not any(key in what for key in free):
        assert torch.equal(model(x).logits, expected(x).logits), what


# A method that PEFT does not have


class Signed(Delta):
    """ΔW = U·diag(g)·V: of low rank, but not by PEFT's names."""

    def __init__(self, place):
        super().__init__()
        base, r = place.base, place.r
        self.U, self.V = (
            nn.Parameter(torch.zeros(base.out_features, r)),
            nn.Parameter(torch.zeros(r, base.in_features)),
        )
        self.g = nn.Parameter(torch.ones(r))

    def add_dropped(self, y, x):
        return y + F.linear(F.linear(x, self.V) * self.g, self.U)

    def weight(self):
        return (self.U * self.g @ self.V).detach()

    def factors(self):
        return (self.U * self.g).detach(), self.V.detach()

    @staticmethod
    def shapes(in_features, out_features, r):
        return {"U": (out_features, r), "V": (r, in_features), "g": (r,)}


class Dense(Signed):
    """The same, unknown to be of low rank."""

    def factors(self):
        return None


FOREIGN = {
    "delta": {
        "signed": {"make": Signed, "shapes": Signed.shapes},
        "dense": {"make": Dense, "shapes": Dense.shapes},
    },
    "scale": {"cube_root": {"scale": lambda alpha, r: alpha / r ** (1 / 3)}},
}


@pytest.fixture
def foreign_part(monkeypatch):
    """Registers parts that no file of the package is."""
    names = parts.names
    for axis, found in FOREIGN.items():
        for name, exported in found.items():
            module = ModuleType(name)
            vars(module).update(exported)
            monkeypatch.setitem(sys.modules, f"lora_cli.methods.{axis}.{name}", module)
    monkeypatch.setattr(parts, "names", lambda axis: (*names(axis), *FOREIGN.get(axis, ())))
    monkeypatch.setattr(parts.load("init", "kaiming"), "init", lambda delta, start: None)


@pytest.mark.usefixtures("foreign_part")
def test_a_method_that_peft_does_not_have_writes_its_own_type_and_comes_back(tmp_path):
    model, _ = saved(tmp_path / "a", delta="dense", train_also=("norms",), rank_pattern={"q_proj": 2})
    assert json.loads((tmp_path / "a" / files.CONFIG).read_text())["peft_type"] == "LORA_CLI"
    again, x = tiny.model("llama"), ids()
    put_on(again, tmp_path / "a")
    assert torch.equal(again(x).logits, model(x).logits)
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    tensors.pop("base_model.model.model.layers.0.self_attn.q_proj.g")
    save_file(tensors, tmp_path / "a" / WEIGHTS)
    assert "missing tensors: 1" in str(refusal(tmp_path / "a"))


@pytest.mark.usefixtures("foreign_part")
def test_a_rule_for_the_scale_that_peft_does_not_have_is_written_as_an_alpha(tmp_path):
    model, adapter = saved(tmp_path / "a", scale="cube_root", rank_pattern={"q_proj": 2})
    config = json.loads((tmp_path / "a" / files.CONFIG).read_text())
    assert {spec.scale for spec in adapter.plan.layers} == {8 / 4 ** (1 / 3), 8 / 2 ** (1 / 3)}
    assert config["lora_alpha"] / config["r"] == pytest.approx(8 / 4 ** (1 / 3))
    again, x = tiny.model("llama"), ids()
    put_on(again, tmp_path / "a")
    torch.testing.assert_close(again(x).logits, model(x).logits)


@pytest.mark.usefixtures("foreign_part")
def test_what_is_of_low_rank_is_saved_for_peft_exactly(tmp_path):
    settings = {"train_also": ("norms",), "rank_pattern": {"q_proj": 2}, "scale": "rslora"}
    model, _ = saved(tmp_path / "a", delta="signed", **settings)
    config = json.loads((tmp_path / "a" / files.CONFIG).read_text())
    assert (config["peft_type"], config["lora_alpha"], config["r"]) == ("LORA", 4, 4)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({"q_proj": 2}, {"q_proj": 2})
    again, x = tiny.model("llama"), ids()
    put_on(again, tmp_path / "a")
    torch.testing.assert_close(again(x).logits, model(x).logits, rtol=1e-5, atol=1e-6)
    base("llama", {}).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    report = export(tmp_path / "a", "peft", tmp_path / "out", Screen(), base=str(tmp_path / "base"))
    assert report["logit_error"] <= 1e-6


@pytest.mark.usefixtures("foreign_part")
def test_what_is_not_of_low_rank_is_merged_but_not_exported(tmp_path):
    model, _ = saved(tmp_path / "a", delta="dense")
    base("llama", {}).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="no low-rank matrix") as error:
        export(tmp_path / "a", "peft", tmp_path / "out", Screen(), base=str(tmp_path / "base"))
    assert "q_proj" in error.value.where
    assert "lora merge" in error.value.fix
    assert not (tmp_path / "out").exists()
    merge(tmp_path / "a", tmp_path / "out", None, Screen(), base=str(tmp_path / "base"))
    merged, x = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), ids()
    torch.testing.assert_close(merged(x).logits, model(x).logits, rtol=1e-5, atol=1e-6)
