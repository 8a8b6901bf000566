"""Parts that do not go together are refused with the reason, before anything is loaded."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lora_cli import model as models
from lora_cli import parts, presets
from lora_cli.adapter import plan, rules
from lora_cli.cli import app
from lora_cli.errors import ExitCode, UserError
from lora_cli.parts import Part
from lora_cli.presets import PRESETS
from lora_cli.recipe.dump import to_yaml
from lora_cli.recipe.load import Loaded, load
from lora_cli.recipe.schema import AdapterRecipe, Recipe
from lora_cli.run.check import _with_preset, check
from lora_cli.run.prepare import check_method, resolved
from lora_cli.run.train import train
from lora_cli.screen import Screen
from tests import tiny
from tests.adapters import SHIFTS
from tests.test_core_conformance import settings_of

NO_RANK = ("ia3", "ln_tuning", "bitfit", "svdiff", "sam_parser", "full")
MOVES_W = ("optimizer_view", "serial", "relora", "cola", "xgblora", "flora", "galore", "random_projection")

REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "W moves by what was computed with": (
        {"method": "delta_lora", "dropout": 0.1},
        {},
        "lifecycle: delta_lora.*dropout",
    ),
    "no input of A": ({"method": "optimizer_view", "dropout": 0.1}, {}, "combine: optimizer_view.*dropout"),
    **{
        f"{init} of shared factors": (
            {"method": "vera", "init": init},
            {},
            r"\(delta: vera\): needs init.own",
        )
        for init in SHIFTS
    },
    **{
        f"{init} of closed gates": (
            {"method": "adalora", "init": init},
            {},
            r"\(delta: gated\): needs init.small",
        )
        for init in SHIFTS
    },
    "two that decide over ranks": (
        {"method": "adalora", "init": "eva"},
        {},
        "rank: adalora.*init: eva.*one of both",
    ),
    "a rank controller over restarts": (
        {"method": "serial", "delta": "gated", "init": "small", "rank": "adalora"},
        {},
        "rank: adalora",
    ),
    "gates without a rank controller's start": ({"delta": "gated"}, {}, "delta: gated: needs init.small"),
    "a rank controller without gates": ({"rank": "adalora"}, {}, "rank: adalora: needs delta.gated"),
    "lengths of a W0 that changes": (
        {"method": "serial", "combine": "dora"},
        {},
        "lifecycle: restart.*combine: dora",
    ),
    "a bias inside the length": ({"method": "dora", "lora_bias": True}, {}, "combine: dora.*lora_bias"),
    "two rates, A frozen": (
        {"method": "lora_fa"},
        {"optimizer": "lora_plus"},
        "train.optimizer: lora_plus.*one rate",
    ),
    "two rates, B frozen": (
        {"method": "galore"},
        {"optimizer": "lora_plus"},
        "train.optimizer: lora_plus.*one rate",
    ),
    "two rates, no A": ({"method": "miss"}, {"optimizer": "lora_plus"}, "train.optimizer: lora_plus.*no A"),
    "two rates, both frozen": (
        {"method": "vera"},
        {"optimizer": "lora_plus"},
        "train.optimizer: lora_plus.*are frozen",
    ),
    "two rates, neither": (
        {"method": "full"},
        {"optimizer": "lora_plus"},
        "train.optimizer: lora_plus.*neither",
    ),
    "correction for an A that trains": (
        {},
        {"optimizer": "lora_fa"},
        "train.optimizer: lora_fa: needs trainable.lora_fa",
    ),
    "A frozen at zero": ({"method": "lora_fa", "init": "zero_a"}, {}, "trainable: lora_fa.*zero for ever"),
    "B frozen at zero": ({"trainable": "only_a"}, {}, "trainable: only_a.*zero for ever"),
    "both factors zero": ({"init": "own"}, {}, "init: own.*A and B"),
    "a start of its own": (
        {"method": "additive", "init": "pissa"},
        {},
        r"\(delta: additive\): needs init.own",
    ),
    "an alpha without effect": (
        {"method": "additive", "alpha": 4.0},
        {},
        "scale: constant.*alpha.*no effect",
    ),
    "two passes that cannot differ": ({"lifecycle": "r_drop"}, {}, "r_drop: needs something that drops"),
    "two passes that cannot differ, rates of zero": (
        {"method": "hiddenkey", "attention": {"key_drop": {"key": 0.0, "hidden": 0.0}}},
        {},
        r"\(lifecycle: r_drop\): needs something that drops.*two passes predict the same",
    ),
    "a second pass over a ledger": (
        {"method": "malora", "dropout": 0.1, "lifecycle": ["load_balance", "r_drop"]},
        {},
        r"lifecycle: r_drop.*lifecycle: load_balance",
    ),
    **{
        f"an r without effect, {method}": (
            {"method": method, "r": 4},
            {},
            rf"method: {method}.*adapter\.r: it has no rank",
        )
        for method in NO_RANK
    },
    "ranks of one pair": ({"method": "vera", "rank_pattern": {"q_proj": 2}}, {}, "delta: vera.*rank_pattern"),
}


def recipe(adapter: dict[str, Any], train: dict[str, Any], output: Path) -> Recipe:
    """For a model and for rows that are not there."""
    return Recipe.model_validate(
        {
            "model": {"name": "/nowhere/model"},
            "data": {"train": "/nowhere/rows.jsonl"},
            "adapter": adapter,
            "train": train,
            "output": {"dir": str(output)},
        }
    )


@pytest.mark.parametrize(("adapter", "optimizer", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_go_together_is_refused_before_anything_is_loaded(adapter, optimizer, reason, tmp_path):
    asked = recipe(adapter, optimizer, tmp_path / "run")
    for command in (train, lambda asked, screen: check(Loaded(asked, {}, "recipe"), screen, 0)):
        with pytest.raises(UserError, match=rf"(?s){reason}") as caught:
            command(asked, Screen())
        assert caught.value.code is ExitCode.RECIPE
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", PRESETS)
def test_what_a_method_is_made_of_is_not_refused(method, tmp_path):
    with pytest.raises(UserError, match="/nowhere/model"):
        train(recipe({"method": method}, {}, tmp_path / "run"), Screen())


@pytest.mark.parametrize("method", NO_RANK)
def test_a_key_without_effect_is_taken_back_by_null(method, tmp_path):
    with pytest.raises(UserError, match="/nowhere/model"):
        train(recipe({"method": method, "r": None, "alpha": None}, {}, tmp_path / "run"), Screen())


@pytest.mark.parametrize("delta", parts.names("delta"))
def test_r_is_refused_where_nothing_depends_on_it_and_nowhere_else(delta):
    part, settings = parts.load("delta", delta), settings_of(delta)
    none = {"layer": "q_proj", "in_features": 16, "out_features": 24}
    shared = getattr(part, "shared_shapes", lambda *_, **__: {})
    sizes = [(part.shapes(16, 24, r, **settings), shared(**none, r=r, **settings)) for r in (2, 4)]
    depends = sizes[0] != sizes[1] or delta == "nola"  # its random matrices are of rank r
    assert ("r" in rules.stated("forbids", "delta", Part(delta))) != depends


@pytest.mark.parametrize("method", PRESETS)
def test_a_resolved_recipe_asks_for_what_the_recipe_does(method, tmp_path):
    """It is what stands in the run's folder: read again, it is not refused, and plans the same."""
    asked = recipe({"method": method}, {}, tmp_path / "run")
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(resolved(asked)))
    again = load(path).recipe
    check_method(again)
    assert again == resolved(again)
    with torch.device("meta"):
        skeleton = tiny.model("llama", attention_bias=True, mlp_bias=True)
    assert planned(again, skeleton) == planned(asked, skeleton)


def planned(recipe: Recipe, skeleton: Any) -> Any:
    """The plan, or why there is none; a dropout of 0 may be written out or not."""
    try:
        made = plan.make(recipe.adapter, skeleton, models.ends_of(skeleton), untied=True)
        return replace(made, method=replace(made.method, dropout=Part("standard")))
    except UserError as error:
        return str(error)


def test_what_the_method_sets_is_shown_as_the_methods(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {name: m}\ndata: {train: rows.jsonl}\nadapter: {method: vera}\n")
    shown = {key: (value, origin) for key, value, origin in _with_preset(load(path))}
    assert shown["adapter.r"] == ("256", "method vera")
    assert shown["adapter.method"] == ("vera", f"{path}:3")
    assert shown["adapter.layers"] == ("null", "default")


@pytest.mark.parametrize("name", MOVES_W)
def test_a_quantised_base_is_refused_where_w_is_written_to(name):
    method = presets.resolve(AdapterRecipe(method=name))
    rules.check(method, rules.facts_of(method))
    with pytest.raises(UserError, match=r"base\.quantized"):
        rules.check(method, {*rules.facts_of(method), "base.quantized"})


OF_LAYERS: dict[str, tuple[dict[str, Any], str]] = {
    "additive, r": ({"method": "additive", "r": 5}, "r = 5 has to divide both sides"),
    "additive, r of a layer": (
        {"method": "additive", "r": 4, "rank_pattern": {"up_proj": 5}},
        r"up_proj \(48×32\): r = 5 has to divide both sides",
    ),
    "miss, r": ({"method": "miss", "r": 5}, "r = 5 has to divide the inputs"),
    **{
        f"{method}, embedding": (
            {"method": method, "target_modules": ("embed_tokens", "q_proj")},
            "cannot be combined with base.embedding",
        )
        for method in ("dora", "eva", "corda", "additive", "miss", "optimizer_view")
    },
}


@pytest.mark.parametrize(("adapter", "reason"), OF_LAYERS.values(), ids=OF_LAYERS)
def test_what_does_not_go_with_a_layer_is_refused_before_it_has_weights(adapter, reason):
    with torch.device("meta"):
        skeleton = tiny.model("llama")
    with pytest.raises(UserError, match=reason):
        plan.make(AdapterRecipe(**{"r": 4, **adapter}), skeleton, models.ends_of(skeleton))


@pytest.mark.parametrize(
    ("adapter", "where"),
    [
        ({"method": "vb_lora"}, "adapter.delta.vb_lora.length"),
        (
            {"method": "vb_lora", "delta": {"vb_lora": {"length": 8, "vectors": 2, "k": 3}}},
            "adapter.delta.vb_lora.k",
        ),
        ({"method": "melora", "delta": {"melora": {"n": 3}}}, "adapter.delta.melora.n"),
        ({"method": "miss", "r": 5}, "adapter.r"),
    ],
)
def test_the_key_that_is_at_fault_is_named(adapter, where):
    with torch.device("meta"):
        skeleton = tiny.model("llama")
    with pytest.raises(UserError) as refused:
        plan.make(AdapterRecipe(**{"r": 4, **adapter}), skeleton, models.ends_of(skeleton))
    assert refused.value.where == where


# ---- where it is told to be ----------------------------------------------------------------------------------------

TOLD: dict[str, tuple[str, list[str], str]] = {
    "two keys": (
        "  combine: dora\n  lora_bias: true\n",
        [],
        "FILE:4: adapter.combine: dora: cannot be combined with adapter.lora_bias (FILE:5): "
        "it would be scaled with its row, and no bias of a plain layer is\n  → leave one of the two out",
    ),
    "a part of the method and a key": (
        "  init: pissa\n  method: vera\n",
        [],
        "FILE:5: adapter.method: vera (delta: vera): needs init.own, not adapter.init: pissa (FILE:4): "
        "its A and B are common to all layers\n  → leave adapter.init out, or choose another method",
    ),
    "a key and a part of the method": (
        "  method: adalora\n  trainable: only_core\n",
        [],
        "FILE:5: adapter.trainable: only_core: cannot be combined with adapter.method: adalora (rank: adalora) "
        "(FILE:4): it weighs the gradients of A and B, which have none\n"
        "  → leave adapter.trainable out, or choose another method",
    ),
    "a key and a default": (
        "  trainable: only_a\n",
        [],
        "FILE:4: adapter.trainable: only_a: cannot be combined with adapter.init: kaiming: B would stay zero for ever, "
        "and with it ΔW: choose an init that fills B\n  → set adapter.init to something else",
    ),
    "what is missing": (
        "  rank: adalora\n",
        [],
        "FILE:4: adapter.rank: adalora: needs delta.gated, not adapter.delta: lowrank: "
        "components are closed by their gates\n  → set adapter.delta: gated",
    ),
    "what is said of a part": (
        "  method: molora\n  lifecycle: restart\n",
        [],
        "FILE:5: adapter.lifecycle: restart: needs a mergeable delta, not adapter.method: molora (delta: experts) "
        "(FILE:4): every restart adds ΔW to W\n  → leave adapter.lifecycle out, or choose another method",
    ),
    "keys without effect": (
        "  method: ia3\n  r: 8\n  alpha: 16\n",
        [],
        "FILE:4: adapter.method: ia3 (delta: ia3): cannot be combined with adapter.r (FILE:5): it has no rank\n"
        "  → leave adapter.r out, or set it to null, or choose another method\n"
        "FILE:4: adapter.method: ia3 (scale: constant): cannot be combined with adapter.alpha (FILE:6): "
        "the method has a scale of its own, on which it would have no effect\n"
        "  → leave adapter.alpha out, or set it to null, or choose another method",
    ),
    "the command line": (
        "  method: vera\n",
        ["--set", "adapter.lora_bias=true"],
        "FILE:4: adapter.method: vera (delta: vera): cannot be combined with adapter.lora_bias (--set): "
        "VeRA has none\n  → leave adapter.lora_bias out, or choose another method",
    ),
    "two mistakes": (
        "  method: vera\n  init: pissa\n  lora_bias: true\n",
        [],
        "FILE:4: adapter.method: vera (delta: vera): cannot be combined with adapter.lora_bias (FILE:6): "
        "VeRA has none\n  → leave adapter.lora_bias out, or choose another method\n"
        "FILE:4: adapter.method: vera (delta: vera): needs init.own, not adapter.init: pissa (FILE:5): "
        "its A and B are common to all layers\n  → leave adapter.init out, or choose another method",
    ),
    "another section": (
        "  init: loftq\n",
        [],
        "FILE:4: adapter.init: loftq: needs base.quantized: it starts as what quantising takes\n"
        "  → set model.quantize: nf4",
    ),
    "no clash at all": (
        "  method: qlora\n",
        ["--set", "model.split_experts=true"],
        "--set: model.split_experts: experts that are taken apart stay as they are stored, and would not be quantised"
        "\n  → leave one of the two out",
    ),
}


@pytest.mark.parametrize("command", ["train", "check", "estimate"])
@pytest.mark.parametrize(("adapter", "options", "told"), TOLD.values(), ids=TOLD)
def test_both_keys_are_told_with_their_lines_and_what_to_do(command, adapter, options, told, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: {{name: /nowhere/model}}\ndata: {{train: rows.jsonl}}\nadapter:\n{adapter}")
    error = CliRunner().invoke(app, [command, str(path), *options]).exception
    assert isinstance(error, UserError)
    assert str(error) == told.replace("FILE", str(path))


def test_kinds_of_layers_are_told_with_the_key_that_leaves_them_out():
    with torch.device("meta"):
        skeleton = tiny.model("llama")
    adapter = AdapterRecipe(method="dora", target_modules=("embed_tokens", "q_proj"))
    with pytest.raises(UserError) as caught:
        plan.make(adapter, skeleton, models.ends_of(skeleton))
    assert caught.value.beside == "adapter.target_modules"
    assert caught.value.fix == "leave such layers out, by adapter.exclude_modules"
