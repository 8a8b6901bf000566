"""VeRA trains two vectors a layer around one frozen pair, which is drawn once, saved once, and the same everywhere."""

import random
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_cli import model as models
from lora_cli import parts
from lora_cli.adapter import files, inject, plan
from lora_cli.adapter.delta import Place, Shared
from lora_cli.recipe.schema import AdapterRecipe
from lora_cli.run.check import trained_parameters
from lora_cli.train.loop import train_steps
from tests import tiny
from tests.adapters import ids, put_on
from tests.training import distance, training

R = 16


@pytest.fixture(autouse=True)
def _other_numbers_in_every_session():
    torch.manual_seed(random.getrandbits(48))


def vera(kind: str = "llama", seed: int = 0, **adapter: Any) -> tuple[PreTrainedModel, inject.Adapter]:
    """A tiny model at the start of VeRA; `seed` is the adapter's."""
    model = tiny.model(kind)
    made = plan.make(AdapterRecipe(**{"method": "vera", "r": R, **adapter}), model, models.ends_of(model))
    return model, inject.inject(model, made, seed)


def moved(adapter: inject.Adapter) -> None:
    with torch.no_grad():
        for parameter in adapter.trainable().values():
            parameter.copy_(torch.randn_like(parameter))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_starts_at_the_base(kind):
    model, adapter = vera(kind)
    x = ids()
    assert torch.equal(model(x).logits, tiny.model(kind)(x).logits)
    assert all((delta.get_parameter("d") == 0.1).all() for delta in adapter.deltas.values())
    moved(adapter)
    assert distance(model(x).logits, tiny.model(kind)(x).logits) > 1e-2


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_trains_out_plus_r_numbers_a_layer_as_planned(kind):
    _, adapter = vera(kind)
    specs = adapter.plan.layers
    expected = sum(spec.out_features + R for spec in specs)
    assert sum(p.numel() for p in adapter.trainable().values()) == expected
    assert {name.rpartition(".")[2] for name in adapter.trainable()} == {"b", "d"}
    assert sum(spec.num_trainable for spec in specs) == expected
    with torch.device("meta"):
        skeleton = tiny.model(kind)
    planned = plan.make(AdapterRecipe(method="vera", r=R), skeleton, models.ends_of(skeleton))
    assert trained_parameters(planned, SimpleNamespace(model=skeleton)) == expected, "what `lora check` says"
    assert planned == adapter.plan


def test_a_layer_uses_its_rows_and_columns_of_the_common_pair():
    _, adapter = vera(target_modules=("embed_tokens", "q_proj", "k_proj", "down_proj"))
    moved(adapter)
    A, B = adapter.shared["A"].double(), adapter.shared["B"].double()
    specs = adapter.plan.layers
    assert A.shape == (R, max(spec.in_features for spec in specs))
    assert B.shape == (max(spec.out_features for spec in specs), R)
    assert len({(spec.in_features, spec.out_features) for spec in specs}) == 4
    for spec in specs:
        delta = adapter.deltas[spec.name]
        assert delta.A is adapter.shared["A"]
        assert delta.B is adapter.shared["B"]
        b, d = delta.get_parameter("b").double(), delta.get_parameter("d").double()
        expected = torch.diag(b) @ B[: spec.out_features] @ torch.diag(d) @ A[:, : spec.in_features]
        assert distance(delta.weight(), expected) < 1e-6


def test_the_pair_follows_from_the_seed_and_is_uniform_with_gain_root_two():
    first, again, other = (vera(seed=seed)[1].shared for seed in (3, 3, 4))
    assert torch.equal(first["A"], again["A"])
    assert torch.equal(first["B"], again["B"])
    assert not torch.equal(first["A"], other["A"])
    assert not torch.equal(first["B"], other["B"])
    _, large = vera(r=300)
    for key, fan in (("A", large.shared["A"].shape[1]), ("B", 300)):
        drawn = large.shared[key]
        assert drawn.abs().max() <= (6 / fan) ** 0.5
        assert drawn.std().item() == pytest.approx((2 / fan) ** 0.5, rel=0.02)
    a, b = (large.shared[key].flatten()[:4000] for key in "AB")
    assert (a @ b).abs() < 0.1 * a.norm() * b.norm(), "not the same numbers twice"


def test_drawing_the_pair_leaves_the_random_numbers_of_everybody_else_alone():
    base = plan.view_of(nn.Linear(12, 20))[1]
    state = torch.get_rng_state()
    parts.load("delta", "vera").make(
        Place(base, R, 1.0, shared=Shared({"A": (R, 12), "B": (20, R)}, seed=1)), d=0.1
    )
    assert torch.equal(torch.get_rng_state(), state)


def test_after_training_the_pair_is_what_it_was_and_every_b_and_d_has_moved():
    run = training({"method": "vera", "r": R}, {"max_steps": 4, "learning_rate": 0.05})
    before = {name: tensor.clone() for name, tensor in inject.tensors_of(run.adapter).items()}
    list(train_steps(run))
    after = inject.tensors_of(run.adapter)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(run.adapter.trainable())
    assert len(run.adapter.shared) == 2
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert not held & {id(p) for p in run.adapter.shared.values()}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_folder_holds_the_pair_once_and_comes_back_to_the_bit(kind, tmp_path):
    model, adapter = vera(kind, seed=5)
    moved(adapter)
    files.save(tmp_path, adapter, "the/base", None)
    stored = files.read(tmp_path).tensors
    pair = [key for key, tensor in stored.items() if tensor.ndim == 2]
    assert len(pair) == 2
    assert len(stored) == 2 + 2 * len(adapter.layers)
    again = tiny.model(kind)
    loaded = put_on(again, tmp_path)
    before, after = inject.tensors_of(adapter), inject.tensors_of(loaded)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(delta.A is loaded.shared["A"] for delta in loaded.deltas.values())
    x = ids()
    assert torch.equal(again(x).logits, model(x).logits)


def test_a_merged_model_computes_what_the_live_one_does():
    for kind in ("llama", "gpt2"):
        model, adapter = vera(kind)
        moved(adapter)
        x = ids()
        live = model(x).logits
        inject.merge(model, adapter)
        assert distance(model(x).logits, live) < 2e-6


# ---- PEFT ------------------------------------------------------------------------------------------------------------

peft = pytest.importorskip("peft")


def pair_with_peft(kind: str) -> tuple[PreTrainedModel, dict[str, Tensor], nn.Module, dict[str, Tensor]]:
    """Both with PEFT's A and B: ours, its trained tensors, PEFT's, and its own by the same names."""
    targets = {"llama": "all-linear", "gpt2": ["c_attn", "c_proj", "c_fc"]}[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT about what it was asked for
        config = peft.VeraConfig(
            r=R, target_modules=targets, fan_in_fan_out=kind == "gpt2", projection_prng_key=11
        )
        theirs = peft.get_peft_model(tiny.model(kind), config).eval()
    model, adapter = vera(kind)
    with torch.no_grad():
        for key in ("A", "B"):
            buffer = getattr(theirs.base_model, f"vera_{key}")["default"]
            assert adapter.shared[key].shape == buffer.shape
            adapter.shared[key].copy_(buffer)
    found = {
        f"{name}.{key}": getattr(module, f"vera_lambda_{key}")["default"]
        for name, module in theirs.base_model.model.named_modules()
        if hasattr(module, "vera_lambda_b")
        for key in ("b", "d")
    }
    assert found.keys() == adapter.trainable().keys()
    return model, adapter.trainable(), theirs, found


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_forward_is_pefts_given_its_buffers(kind):
    model, mine, theirs, found = pair_with_peft(kind)
    x = ids()
    assert torch.equal(model(x).logits, theirs(x).logits), "both start at the base"
    assert all(torch.equal(mine[name], found[name]) for name in mine), "and alike"
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(torch.randn_like(parameter))
            found[name].copy_(parameter)
    assert distance(model(x).logits, theirs(x).logits) < 2e-6
    assert distance(model(x).logits, tiny.model(kind)(x).logits) > 1e-2


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_20_steps_of_adamw_track_peft(kind):
    model, mine, theirs, found = pair_with_peft(kind)
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.add_(torch.randn_like(parameter) * 0.1)
            found[name].copy_(parameter)
    batches = [torch.randint(5, tiny.VOCABULARY, (4, 17)) for _ in range(20)]
    for each, parameters in ((model, mine), (theirs, found)):
        optimizer = torch.optim.AdamW([parameters[name] for name in mine], lr=1e-2)
        for x in batches:
            each(input_ids=x, labels=x).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    distances = {name: distance(p.detach(), found[name].detach()) for name, p in mine.items()}
    assert max(distances.values()) < 1e-4, max(distances.values())
