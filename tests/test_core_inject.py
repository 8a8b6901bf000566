"""The adapter on a whole model: what it computes, what it leaves alone, what merging gives."""

import pytest
import torch
from transformers.models.falcon.modeling_falcon import FalconLinear

from lora_cli import model as models
from lora_cli.adapter import inject, plan
from lora_cli.errors import UserError
from lora_cli.recipe.schema import AdapterRecipe
from tests import tiny


def adapted_model(kind: str = "llama", new_rows: tuple[int, ...] = (), **adapter: object):
    """A tiny model with an adapter whose every tensor is random, so that nothing is hidden by a zero."""
    model = tiny.model(kind)
    made = plan.make(
        AdapterRecipe(**{"r": 4, **adapter}), model, models.ends_of(model), new_rows, untied=True
    )
    adapter_ = inject.inject(model, made)
    with torch.no_grad():
        for parameter in adapter_.named_tensors().values():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model, adapter_


IDS = torch.randint(5, tiny.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
CASES = [
    ("llama", {}),
    ("gpt2", {}),
    ("gpt2", {"lora_bias": True}),
    ("gemma3_text", {"target_modules": ("embed_tokens", "q_proj")}),
    ("llama", {"target_modules": ("embed_tokens", "lm_head")}),
    ("llama", {"train_also": ("norms", "biases")[:1]}),
    ("gpt2", {"train_also": ("norms", "biases", "embeddings")}),
    ("llama", {"new_rows": (7, 200)}),
    ("gpt2", {"new_rows": (7, 200)}),
    ("llama", {"scale": "rslora", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3.0}}),
]


@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_without_adapters_the_base_is_back_to_the_bit(kind, settings):
    before = tiny.model(kind)(IDS).logits
    model, adapter = adapted_model(kind, **settings)
    changed = model(IDS).logits
    with inject.without_adapters(adapter):
        assert torch.equal(model(IDS).logits, before)
    assert not torch.allclose(changed, before)
    assert torch.equal(model(IDS).logits, changed)


@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_merged_model_equals_the_adapted_one(kind, settings):
    model, adapter = adapted_model(kind, **settings)
    live = model(IDS).logits
    inject.merge(model, adapter)
    assert not inject.adapted_layers(model)
    torch.testing.assert_close(model(IDS).logits, live, rtol=1e-4, atol=2e-5)


def test_training_never_changes_a_tensor_of_the_base():
    model, adapter = adapted_model("gpt2", train_also=("norms", "biases"))
    base = tiny.model("gpt2").state_dict()
    optimizer = torch.optim.AdamW(adapter.trainable().values(), lr=0.1)
    for _ in range(3):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    adapter.deactivate()
    inject.merge(model, inject.Adapter(model, adapter.plan, {}))
    assert all(torch.equal(value, base[name]) for name, value in model.state_dict().items())


def test_every_init_starts_at_the_base():
    for init in ("kaiming", "gaussian", "zero_a", "orthogonal"):
        model = tiny.model()
        before = model(IDS).logits
        inject.inject(model, plan.make(AdapterRecipe(r=4, init=init), model, models.ends_of(model)))
        assert torch.equal(model(IDS).logits, before), init


def test_factors_depend_on_seed_and_name_only():
    factors = []
    for layers, seed in ((None, 3), ((1,), 3), (None, 4)):
        model = tiny.model()
        made = plan.make(AdapterRecipe(r=4, layers=layers), model, models.ends_of(model))
        factors.append(inject.inject(model, made, seed).deltas["model.layers.1.self_attn.q_proj"].A)
    assert torch.equal(factors[0], factors[1])
    assert not torch.equal(factors[0], factors[2])


def test_half_of_a_norm_in_16_bits_is_refused_on_a_cpu_and_all_of_it_trains():
    model = tiny.model("gpt2").to(torch.bfloat16)
    with pytest.raises(UserError, match=r"ln_1\.bias would train in float32 beside .*ln_1\.weight") as caught:
        plan.make(AdapterRecipe(train_also=("biases",)), model, models.ends_of(model))
    assert "add norms" in str(caught.value)
    made = inject.inject(
        model, plan.make(AdapterRecipe(train_also=("biases", "norms")), model, models.ends_of(model))
    )
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.ones(1, 4, dtype=torch.int64)).logits.float().sum().backward()
    assert made.also["transformer.h.0.ln_1.bias"].grad is not None


@pytest.mark.parametrize(
    ("key", "value"), [("target_modules", ("q_proj",)), ("exclude_modules", ("q_proj",)), ("layers", (0,))]
)
def test_a_choice_of_modules_is_refused_where_everything_trains_anyway(key, value):
    model = tiny.model("llama", seed=1)
    ends = models.ends_of(model)
    with pytest.raises(UserError, match=f"adapter.{key}: has no effect where everything is trained"):
        plan.make(AdapterRecipe(method="full", **{key: value}), model, ends)
    alone = plan.make(AdapterRecipe(method="full", train_also=(), **{key: value}), model, ends)
    assert 0 < len(alone.also) < len(plan.make(AdapterRecipe(method="full"), model, ends).also)


def test_a_router_that_is_a_linear_layer_and_returns_more_is_left_alone():
    model, adapter = adapted_model("phimoe")
    assert not [name for name in adapter.layers if name.endswith("router")]
    model(IDS, labels=IDS).loss.backward()
    with pytest.raises(UserError, match="'router' matches no module"):
        adapted_model("phimoe", target_modules=("router",))


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_of_another_class_is_known_by_what_it_gives(bias):
    plain = FalconLinear(6, 4, bias=bias)
    kind, view = plan.view_of(plain)
    x = torch.randn(3, 6)
    assert kind == "linear"
    torch.testing.assert_close(view(x), torch.nn.functional.linear(x, plain.weight, plain.bias))
