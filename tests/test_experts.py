"""Experts whose weights are one tensor are adapted one by one, as PEFT's `target_parameters` adapts them together."""

import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lora_cli import experts
from lora_cli import model as models
from lora_cli.adapter import files, inject, plan
from lora_cli.errors import UserError
from lora_cli.methods.base.expert import ExpertLinear
from lora_cli.recipe.schema import AdapterRecipe, Recipe
from lora_cli.run.evaluate import evaluate
from lora_cli.run.merge import merge
from lora_cli.run.open import open_model
from lora_cli.run.train import train
from lora_cli.screen import Screen
from tests import tiny
from tests.adapters import ids
from tests.training import distance, kept_in_the_shape_of_w

KINDS = ("mixtral", "qwen3_moe", "gpt_oss")
R, EXPERTS = 3, 4


@pytest.fixture(autouse=True)
def _other_numbers_in_every_session():
    torch.manual_seed(random.getrandbits(48))


def mixture(kind: str, **config: Any) -> PreTrainedModel:
    """The same every time, with biases that are not zero."""
    model = tiny.model(kind, **config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            nn.init.normal_(parameter, std=0.2, generator=generator)
    return model


def apart(kind: str, **adapter: Any) -> tuple[PreTrainedModel, inject.Adapter]:
    """Experts alone adapted, unless something else is asked for; every tensor random."""
    model = mixture(kind)
    experts.split(model)
    recipe = AdapterRecipe.model_validate(
        {"r": R, "target_modules": ("gate_up_proj", "down_proj"), **adapter}
    )
    made = inject.inject(model, plan.make(recipe, model, models.ends_of(model)))
    with torch.no_grad():
        for parameter in made.trainable().values():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model, made


@pytest.mark.parametrize("kind", KINDS)
def test_apart_a_mixture_computes_what_it_did_from_the_same_memory(kind):
    model, x = mixture(kind), ids()
    names = {name: p.detach().clone() for name, p in model.named_parameters()}
    where = {p.data_ptr() for name, p in model.named_parameters() if name.endswith("down_proj")}
    expected = model(x).logits
    assert experts.split(model) == 2
    layers = [module for module in model.modules() if isinstance(module, ExpertLinear)]
    assert len(layers) == 2 * 2 * EXPERTS
    assert where <= {layer.weight.data_ptr() for layer in layers}, "slices, no copies"
    assert distance(model(x).logits, expected) < 1e-6
    experts.join(model)
    after = dict(model.named_parameters())
    assert list(after) == list(names)
    assert all(torch.equal(after[name], names[name]) for name in names)
    assert torch.equal(model(x).logits, expected)


@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "oft"])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_and_put_together_again_computes_what_the_live_one_does(kind, method):
    model, adapter = apart(kind, method=method, r=4)
    x = ids()
    live = model(x).logits
    assert distance(live, mixture(kind)(x).logits) > 1e-3
    inject.merge(model, adapter)
    experts.join(model)
    assert [name for name, _ in model.named_parameters()] == [n for n, _ in mixture(kind).named_parameters()]
    assert distance(model(x).logits, live) < 2e-6


def test_all_linear_are_the_experts_too():
    model = mixture("mixtral")
    plain = plan.make(AdapterRecipe(), model, models.ends_of(model))
    experts.split(model)
    specs = plan.make(AdapterRecipe(), model, models.ends_of(model)).layers
    assert len(specs) == len(plain.layers) + 2 * 2 * EXPERTS
    assert {spec.base for spec in specs} == {"linear", "expert"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_expert_has_a_gradient_and_no_matrix_as_large_as_w_is_kept(kind):
    model, adapter = apart(kind)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    kept = kept_in_the_shape_of_w(model, adapter, ids(1, 3))
    assert not [t.shape for t in kept if t.data_ptr() not in own]
    assert all(p.grad is not None for p in adapter.trainable().values()), "also of those that no token chose"


def test_a_model_without_a_mixture_is_refused(tiny_folder):
    recipe = Recipe.model_validate(
        {"model": {"name": str(tiny_folder), "split_experts": True}, "data": {"train": "x"}}
    )
    with pytest.raises(UserError, match="no experts whose weights are one tensor"):
        models.load(recipe.model)


def test_a_recipe_trains_what_is_saved_and_the_merged_model_is_one_of_transformers(tmp_path, rows_file):
    base = tmp_path / "base"
    mixture("mixtral").save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    recipe = Recipe.model_validate(
        {
            "model": {"name": str(base), "dtype": "float32", "split_experts": True},
            "data": {
                "train": str(rows_file),
                "eval_fraction": 0.2,
                "format": {"prompt": "{question}", "completion": "{answer}"},
            },
            "adapter": {"r": R},
            "train": {"max_steps": 10, "batch_size": 8, "learning_rate": 1e-2},
            "eval": {"metrics": ("loss",)},
            "output": {"dir": str(tmp_path / "run")},
        }
    )
    folder = train(recipe, Screen())
    lines = map(json.loads, (folder.parent / "log.jsonl").read_text().splitlines())
    logged = [line["eval_loss"] for line in lines if "eval_loss" in line]
    report = evaluate(folder, None, [], Screen())
    assert report["adapter"]["loss"] == pytest.approx(logged[-1], rel=1e-5)
    assert report["adapter"]["loss"] < report["base"]["loss"] - 0.05
    merge(folder, tmp_path / "merged", None, Screen())
    opened, x = open_model([folder]), ids()
    live = opened.language.model(x).logits
    merged, plain = (AutoModelForCausalLM.from_pretrained(each) for each in (tmp_path / "merged", base))
    assert [name for name, _ in merged.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert distance(merged(x).logits, live) < 1e-5
    assert distance(merged(x).logits, plain(x).logits) > 1e-3


# ---- files ------------------------------------------------------------------------------------------------------


def put_on(kind: str, folder: Path) -> PreTrainedModel:
    """An adapter folder on the model that it is for."""
    model, saved = mixture(kind), files.read(folder)
    assert saved.splits_experts
    experts.split(model)
    files.fill(inject.inject(model, files.plan_of(saved, model, models.ends_of(model))), saved)
    return model


ONLY_OURS: dict[str, dict[str, Any]] = {
    "dora": {"method": "dora"},
    "oft": {"method": "oft", "r": 4},
    "some experts": {"target_modules": r".*experts\.[02]\.down_proj"},
    "other ranks": {"rank_pattern": {"1.down_proj": 2}},
}


@pytest.mark.parametrize("case", ONLY_OURS)
def test_what_peft_has_no_place_for_is_saved_expert_by_expert(case, tmp_path):
    model, adapter = apart("mixtral", **ONLY_OURS[case])
    files.save(tmp_path, adapter, "the/base", None)
    assert files.read(tmp_path).config.peft_type == "LORA_CLI"
    x = ids()
    assert distance(put_on("mixtral", tmp_path)(x).logits, model(x).logits) < 1e-6


def test_what_is_not_made_of_experts_is_refused(tmp_path):
    _, adapter = apart("mixtral")
    files.save(tmp_path, adapter, "the/base", None)
    config = json.loads((tmp_path / files.CONFIG).read_text())
    for key, value in (("target_parameters", ["mlp.gate.weight"]), ("r", 5)):
        (tmp_path / files.CONFIG).write_text(json.dumps(config | {key: value}))
        with pytest.raises(UserError, match=r"not computed here|not made of experts of rank 5"):
            files.read(tmp_path)


peft = pytest.importorskip("peft")
TARGETS = (("gate_up_proj", "down_proj"), ("gate_up_proj",), ("down_proj", "q_proj"))


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_peft_computes_what_we_compute_from_our_files(kind, targets, tmp_path):
    model, adapter = apart(kind, target_modules=targets, alpha=5.0)
    files.save(tmp_path, adapter, "the/base", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(mixture(kind), tmp_path).eval()
    x = ids()
    assert distance(theirs(x).logits, model(x).logits) < 2e-6
    assert distance(put_on(kind, tmp_path)(x).logits, model(x).logits) < 1e-6


@pytest.mark.oracle
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_we_compute_what_peft_computes_from_its_files(kind, targets, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(
            r=R,
            lora_alpha=5,
            target_modules=[name for name in targets if name == "q_proj"],
            target_parameters=[f"experts.{name}" for name in targets if name != "q_proj"],
        )
        theirs = peft.get_peft_model(mixture(kind), config).eval()
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    nn.init.normal_(parameter, std=0.2)
        theirs.save_pretrained(tmp_path)
    x = ids()
    expected = theirs(x).logits
    assert distance(mixture(kind)(x).logits, expected) > 1e-3
    assert distance(put_on(kind, tmp_path)(x).logits, expected) < 2e-6
