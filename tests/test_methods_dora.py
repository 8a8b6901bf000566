"""DoRA is its definition in float64, its gradient autograd's with the length held fixed, and PEFT's `use_dora`."""

import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_cli import model as models
from lora_cli import parts
from lora_cli.adapter import files, inject, peft_format, plan, rules
from lora_cli.adapter.delta import Place, Shared
from lora_cli.adapter.plan import view_of
from lora_cli.adapter.seed import generator_of
from lora_cli.adapter.start import Start
from lora_cli.errors import UserError
from lora_cli.methods.combine.dora import DoRA
from lora_cli.parts import Part
from lora_cli.recipe.schema import AdapterRecipe
from tests import tiny
from tests.adapters import SHIFTS, ids, put_on
from tests.test_core_conformance import LAYER, settings_of, shared_shapes
from tests.training import distance, kept_in_the_shape_of_w

IN, OUT, R = 12, 20, 4
KINDS = ("linear", "linear without bias", "conv1d")
DELTAS = [
    name
    for name in parts.names("delta")
    if name not in ("whole", "none")
    and rules.MERGEABLE in rules.of_part("delta", name)
    and "combine.dora" not in rules.stated("forbids", "delta", Part(name))
]


@pytest.fixture(autouse=True)
def _other_numbers_in_every_session():
    torch.manual_seed(random.getrandbits(48))


def module_of(kind: str) -> nn.Module:
    if kind == "conv1d":
        conv = Conv1D(OUT, IN)
        nn.init.normal_(conv.weight)
        nn.init.normal_(conv.bias)
        return conv.requires_grad_(False)
    return nn.Linear(IN, OUT, bias=kind == "linear").requires_grad_(False)


def layer_of(kind: str = "linear", delta: str = "lowrank", p: float = 0.0) -> DoRA:
    """A layer whose tensors are all random, the lengths too."""
    base = view_of(module_of(kind))[1]
    dropout = parts.load("dropout", "standard").make(p=p)
    place = Place(base, R, 0.7, dropout, shared=Shared(shared_shapes(delta)), name=LAYER)
    part = parts.load("delta", delta).make(place, **settings_of(delta))
    with torch.no_grad():
        part.start(torch.Generator().manual_seed(0))
        made = DoRA(base, part)
        for parameter in made.own_tensors().values():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        made.magnitude.copy_(torch.rand(OUT) + 0.5)
    return made


def shifted(init: str) -> DoRA:
    """A layer that started with a part of W0 in its factors, and has moved since."""
    base = view_of(module_of("linear"))[1]
    delta = parts.load("delta", "lowrank").make(Place(base, R, 0.7))
    rows = torch.randn(50, IN)
    statistic = {"inputs": rows.t() @ rows / 50, "gradients": torch.randn(OUT, IN)}
    part = parts.load("init", init)
    with torch.no_grad():
        start = Start(base, generator_of(3, "layer"), statistic.get(getattr(part, "measures", "")))
        part.init(delta, start, **parts.settings("init", Part(init)))
        layer = DoRA(base, delta)
        for parameter in (delta.A, delta.B):
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return layer


def definition(layer: DoRA, x: Tensor, m: Tensor | None = None, A: Tensor | None = None) -> Tensor:
    """B + m ⊙ (W0 + ΔW) / ‖W0 + ΔW‖ · x in float64; the length is a constant to autograd."""
    change = layer.delta.weight().double() if A is None else 0.7 * layer.delta.B.detach().double() @ A
    W = layer.base.weight().double() + change
    m = layer.magnitude.detach().double() if m is None else m
    y = F.linear(x.double(), (m / W.detach().square().sum(1).sqrt())[:, None] * W)
    return y if layer.base.bias is None else y + layer.base.bias.double()


# ---- the definition ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("kind", KINDS)
def test_y_is_the_definition_and_the_bias_is_not_scaled(kind, delta):
    layer, x = layer_of(kind, delta), torch.randn(3, 5, IN)
    assert distance(layer(x), definition(layer, x)) < 2e-6
    if layer.base.bias is not None:
        assert torch.equal(layer(torch.zeros(1, IN))[0], layer.base.bias)


def test_w0_and_delta_see_the_same_dropped_x():
    layer, x = layer_of(p=0.4).train(), torch.randn(64, IN)
    torch.manual_seed(5)
    found = layer(x)
    torch.manual_seed(5)
    dropped = F.dropout(x, 0.4)
    assert (dropped == 0).any()
    assert distance(found, definition(layer, dropped)) < 2e-6
    assert distance(layer.eval()(x), definition(layer, x)) < 2e-6


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_definition_with_the_length_held_fixed(kind):
    layer, x, g = layer_of(kind), torch.randn(9, IN), torch.randn(9, OUT)
    layer(x).backward(g)
    m = layer.magnitude.detach().double().requires_grad_()
    A = layer.delta.A.detach().double().requires_grad_()
    definition(layer, x, m, A).backward(g.double())
    assert distance(layer.magnitude.grad, m.grad) < 5e-6
    assert distance(layer.delta.A.grad, A.grad) < 5e-6
    W = layer.base.weight().double() + layer.delta.weight().double()
    G = (layer.magnitude.detach() / W.norm(dim=1))[:, None] * (g.double().t() @ x.double())
    assert distance(layer.delta.B.grad, 0.7 * G @ layer.delta.A.detach().double().t()) < 5e-6

    through = layer.delta.A.detach().double().requires_grad_()
    W = layer.base.weight().double() + 0.7 * layer.delta.B.detach().double() @ through
    scaled = (layer.magnitude.detach() / W.norm(dim=1))[:, None] * W
    F.linear(x.double(), scaled).backward(g.double())
    assert distance(layer.delta.A.grad, through.grad) > 1e-3, "with a term through the length it would differ"


# ---- the length ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("kind", KINDS)
def test_length_from_the_factors_is_that_of_the_rows(kind, delta):
    layer = layer_of(kind, delta)
    rows = layer.base.weight().double() + layer.delta.weight().double()
    assert distance(layer.norm(), rows.norm(dim=1)) < 1e-6


@pytest.mark.parametrize("init", SHIFTS)
def test_length_is_that_of_the_rows_where_a_start_is_subtracted(init):
    layer = shifted(init)
    rows = layer.base.weight().double() + layer.delta.weight().double()
    assert distance(layer.norm(), rows.norm(dim=1)) < 2e-6
    assert distance(layer.base.weight(), rows) > 1e-3


@pytest.mark.parametrize("init", ["kaiming", *SHIFTS])
def test_lengths_start_as_those_of_the_original_rows(init):
    base = view_of(module_of("linear"))[1]
    lengths = base.weight().double().norm(dim=1)
    delta = parts.load("delta", "lowrank").make(Place(base, R, 0.7))
    part = parts.load("init", init)
    statistic = {"inputs": torch.eye(IN), "gradients": torch.randn(OUT, IN)}
    start = Start(base, generator_of(0, "layer"), statistic.get(getattr(part, "measures", "")))
    with torch.no_grad():
        part.init(delta, start, **parts.settings("init", Part(init)))
    assert distance(DoRA(base, delta).magnitude.detach(), lengths) < 1e-6


def test_length_is_as_exact_where_the_model_computes_in_bfloat16():
    """Under autocast the parts of a sum that cancel must not be rounded to 8 bits first."""
    for init in SHIFTS:
        layer = shifted(init)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = layer.norm()
        assert distance(found, layer.norm()) < 1e-6


def test_length_is_as_exact_beside_a_large_bias():
    """Some models have biases hundreds of times as large as what W0 makes of x; in 16 bits they drown it."""
    linear = nn.Linear(IN, OUT).to(torch.bfloat16).requires_grad_(False)
    linear.bias.fill_(400)
    layer = DoRA(view_of(linear)[1], layer_of().delta)
    rows = layer.base.weight().double() + layer.delta.weight().double()
    assert distance(layer.norm(), rows.norm(dim=1)) < 2e-3


def test_a_row_of_zeros_stays_zero_and_can_learn():
    """As of tokens that a vocabulary is filled up with."""
    linear = nn.Linear(IN, OUT).requires_grad_(False)
    linear.weight[3] = 0
    base = view_of(linear)[1]
    layer = DoRA(base, parts.load("delta", "lowrank").make(Place(base, R, 0.7)))
    nn.init.normal_(layer.delta.A)
    x = torch.randn(5, IN)
    torch.testing.assert_close(layer(x), linear(x))
    torch.testing.assert_close(layer.merged_weight(), linear.weight)
    layer(x).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in (layer.magnitude, layer.delta.A, layer.delta.B))


# ---- in a model -------------------------------------------------------------------------------------------------


def dora(kind: str = "llama", seed: int = 0, **adapter: Any) -> tuple[PreTrainedModel, inject.Adapter]:
    """A tiny model at the start of DoRA."""
    model = tiny.model(kind, seed)
    alpha = {} if adapter.get("scale") == "constant" else {"alpha": 8.0}
    recipe = AdapterRecipe(**{"method": "dora", "r": R, **alpha, **adapter})
    return model, inject.inject(model, plan.make(recipe, model, models.ends_of(model)), seed)


def moved(adapter: inject.Adapter, size: float = 0.1) -> None:
    """Every trained tensor somewhere else, the lengths still positive."""
    with torch.no_grad():
        for name, parameter in adapter.trainable().items():
            if name.endswith("magnitude"):
                parameter.mul_(1 + size * torch.rand_like(parameter))
            else:
                parameter.add_(torch.randn_like(parameter) * size)


@pytest.mark.parametrize("init", ["kaiming", "pissa", "olora", "symmetric"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_starts_at_the_base(kind, init):
    plain, x = tiny.model(kind), ids()
    model, adapter = dora(kind, init=init)
    assert distance(model(x).logits, plain(x).logits) < 1e-6
    moved(adapter)
    assert distance(model(x).logits, plain(x).logits) > 1e-2


def test_trains_as_many_numbers_as_planned():
    for kind in ("llama", "gpt2"):
        _, adapter = dora(kind)
        specs = adapter.plan.layers
        expected = sum(R * (spec.in_features + spec.out_features) + spec.out_features for spec in specs)
        assert sum(p.numel() for p in adapter.trainable().values()) == expected
        assert sum(spec.num_trainable for spec in specs) == expected


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_merged_model_computes_what_the_live_one_does(kind, init):
    model, adapter = dora(kind, init=init)
    moved(adapter)
    x = ids()
    live = model(x).logits
    inject.merge(model, adapter)
    assert not inject.adapted_layers(model)
    assert distance(model(x).logits, live) < 2e-6


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_no_matrix_of_the_shape_of_w_but_w_itself_is_kept_for_backward(kind, init):
    model, adapter = dora(kind, init=init)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    kept = kept_in_the_shape_of_w(model, adapter, ids(3, 7))
    assert kept, "W0 itself is kept"
    assert not [t.shape for t in kept if t.data_ptr() not in own]


def test_a_bias_of_b_is_refused_with_the_reason():
    """It would be scaled by m / n, and n changes with every step: no bias of a plain layer is the same."""
    with pytest.raises(UserError, match=r"combine: dora.*lora_bias"):
        dora("gpt2", lora_bias=True)


# ---- PEFT ----------------------------------------------------------------------------------------------------------

peft = pytest.importorskip("peft")

TARGETS = {"llama": "all-linear", "gpt2": ["c_attn", "c_proj", "c_fc"], "gemma3_text": "all-linear"}


def by_peft(kind: str, seed: int = 0, **config: Any):
    """PEFT's DoRA on the same base."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT about what it was asked for
        asked = {"target_modules": TARGETS[kind], "fan_in_fan_out": kind == "gpt2", "r": R, "lora_alpha": 8}
        settings = peft.LoraConfig(task_type="CAUSAL_LM", use_dora=True, **{**asked, **config})
        return peft.get_peft_model(tiny.model(kind, seed), settings).eval()


def named_as_on_disk(model: nn.Module) -> dict[str, nn.Parameter]:
    """PEFT's trained parameters."""
    found = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    return {name.replace("magnitude_vector.weight", "magnitude_vector"): p for name, p in found.items()}


def steps(model: nn.Module, parameters: list[Tensor], batches: list[Tensor]) -> list[float]:
    """Losses of AdamW on the batches, one step each."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    losses: list[float] = []
    for x in batches:
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_20_steps_of_adamw_track_peft(kind):
    """From a start with both factors random, so that Adam never divides rounding errors by themselves."""
    model, adapter = dora(kind)
    moved(adapter, 0.05)
    mine, wrapped = peft_format.parameters(adapter), by_peft(kind)
    other = named_as_on_disk(wrapped)
    assert other.keys() == mine.keys()
    with torch.no_grad():
        for name, parameter in mine.items():
            other[name].copy_(parameter)
    batches = [torch.randint(5, tiny.VOCABULARY, (4, 17)) for _ in range(20)]
    found = steps(model, list(mine.values()), batches)
    expected = steps(wrapped, [other[name] for name in mine], batches)
    assert found == pytest.approx(expected, rel=1e-6)
    distances = {name: distance(p.detach(), other[name].detach()) for name, p in mine.items()}
    assert max(distances.values()) <= 1e-5, distances


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to", "ignore:`is_gradient_checkpointing` is")
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("gpt2", {}),
        ("llama", {"scale": "rslora", "rank_pattern": {"q_proj": 2}}),
        ("llama", {"init": "pissa"}),
        ("gpt2", {"init": "olora"}),
        ("llama", {"delta": "gated", "init": "small"}),
        ("llama", {"delta": "additive", "init": "own", "scale": "constant"}),
    ],
)
def test_peft_computes_what_we_compute_from_our_files(tmp_path, kind, settings):
    model, adapter = dora(kind, **settings)
    moved(adapter)
    files.save(tmp_path, adapter, "the/base", None)
    wrapped = peft.PeftModel.from_pretrained(tiny.model(kind), tmp_path)
    x = ids()
    assert distance(wrapped(x).logits, model(x).logits) < 1e-5
    assert distance(tiny.model(kind)(x).logits, model(x).logits) > 1e-2
    again = tiny.model(kind)
    put_on(again, tmp_path)
    assert distance(again(x).logits, model(x).logits) < 1e-6


def saved_by_peft(folder: Path, kind: str, **config: Any) -> nn.Module:
    made = by_peft(kind, **config)
    with torch.no_grad():
        for parameter in named_as_on_disk(made).values():
            parameter.add_(torch.rand_like(parameter) * 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.save_pretrained(folder)
    return made


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("llama", {}),
        ("gpt2", {}),
        ("llama", {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
        ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
        ("gemma3_text", {"target_modules": ["embed_tokens", "q_proj"]}),
    ],
)
def test_we_compute_what_peft_computes_from_its_files(tmp_path, kind, config):
    made = saved_by_peft(tmp_path, kind, **config)
    model, x = tiny.model(kind), ids()
    plain = model(x).logits
    adapter = put_on(model, tmp_path)
    expected = made(x).logits
    assert distance(model(x).logits, expected) < 1e-5
    assert distance(plain, expected) > 1e-3
    inject.merge(model, adapter)
    assert distance(model(x).logits, expected) < 1e-5
