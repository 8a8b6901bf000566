"""Methods on the spectrum of W0, or on its rows, are their definitions in float64, and fit the original base again."""

import random
import warnings
from math import pi
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_cli import model as models
from lora_cli import parts
from lora_cli.adapter import files, inject, plan
from lora_cli.adapter.delta import Delta, Place
from lora_cli.adapter.layer import Adapted
from lora_cli.adapter.plan import view_of
from lora_cli.errors import UserError
from lora_cli.parts import Part
from lora_cli.recipe.schema import AdapterRecipe
from tests import tiny
from tests.adapters import ids, put_on
from tests.training import distance, kept_in_the_shape_of_w, rank_of

IN, OUT, R = 12, 20, 4
KINDS = ("linear", "conv1d")
MODELS = ("llama", "gpt2")
OWN_FORMAT = ("fourierft", "svdiff", "sam_parser", "ia3", "oft", "boft")
"""No factors of low rank: their own tensors are in the folder."""
AS_LORA = {"spectral": 2, "spectral_rotate": 1, "hra": 1}
"""Saved as LoRA of so many times r."""


@pytest.fixture(autouse=True)
def _other_numbers_in_every_session():
    torch.manual_seed(random.getrandbits(48))


def layer(delta: str, kind: str = "linear", scale: float = 1.0, r: int = R, size: float = 0.3) -> Adapted:
    """A layer whose trained tensors are somewhere near their start."""
    module = nn.Linear(IN, OUT) if kind == "linear" else Conv1D(OUT, IN)
    for tensor in module.parameters():
        nn.init.normal_(tensor)
    base = view_of(module.requires_grad_(False))[1]
    made: Delta = parts.load("delta", delta).make(
        Place(base, r, scale), **parts.settings("delta", Part(delta))
    )
    made.start(torch.Generator())
    moved(made, size)
    return Adapted(base, made)


@torch.no_grad()
def moved(delta: nn.Module, size: float = 0.3) -> None:
    for parameter in delta.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * size)


def own(delta: Delta) -> dict[str, Tensor]:
    return {key: tensor.detach().double() for key, tensor in delta.named_parameters()}


def adapted(method: str, kind: str = "llama", **adapter: Any) -> tuple[PreTrainedModel, inject.Adapter]:
    """A tiny model with a method that has been trained somewhere."""
    model = tiny.model(kind)
    recipe = AdapterRecipe(**{"method": method, "r": R, **adapter})
    made = inject.inject(model, plan.make(recipe, model, models.ends_of(model)), seed=5)
    for delta in made.deltas.values():
        moved(delta, 0.1)
    return model, made


# ---- definitions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_fourierft_is_the_sum_of_its_waves(kind):
    made = layer("fourierft", kind, scale=30.0, r=9).delta
    a, b = torch.arange(OUT)[:, None].double(), torch.arange(IN)[None].double()
    waves = [
        c * torch.cos(2 * pi * (j * a / OUT + k * b / IN))
        for c, j, k in zip(own(made)["c"], made.rows, made.columns, strict=True)
    ]
    assert distance(made.weight(), 30.0 / (OUT * IN) * sum(waves)) < 1e-6
    assert len({(int(j), int(k)) for j, k in zip(made.rows, made.columns, strict=True)}) == 9


def test_fourierft_can_be_any_change_of_w():
    made = layer("fourierft", scale=1.0, r=IN * OUT).delta
    W = torch.randn(OUT, IN)
    with torch.no_grad():
        C = torch.fft.fft2(W)
        # A real spectrum has the cosines only; what it can be is what equals itself under a ↦ −a, b ↦ −b.
        made.c.copy_(C.real[made.rows, made.columns])
    mirrored = W.roll((-1, -1), (0, 1)).flip(0, 1)
    assert distance(made.weight(), (W + mirrored) / 2) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_svdiff_and_sam_parser_move_the_singular_values_only(kind):
    for name, reach in (("svdiff", torch.relu), ("sam_parser", lambda values: values)):
        made = layer(name, kind)
        with torch.no_grad():
            made.delta.get_parameter("d")[-1] = -30.0
        W0, d = made.base.weight().double(), own(made.delta)["d"]
        U, S, Vt = torch.linalg.svd(W0, full_matrices=False)
        assert S[-1] + d[-1] < 0, "one would become negative"
        assert distance(made.merged_weight(), U @ torch.diag(reach(S + d)) @ Vt) < 1e-5


def test_directions_of_singular_value_zero_stay():
    """Which vectors these are is up to rounding, so nothing may depend on them."""
    linear = nn.Linear(IN, OUT).requires_grad_(False)
    linear.weight.copy_(torch.randn(OUT, 5) @ torch.randn(5, IN))
    base = view_of(linear)[1]
    for name in ("svdiff", "sam_parser"):
        made = parts.load("delta", name).make(Place(base, R, 1.0))
        made.start(torch.Generator())
        moved(made, 1.0)
        assert rank_of(base.weight() + made.weight()) <= 5


@pytest.mark.parametrize("kind", KINDS)
def test_spectral_adds_to_the_leading_vectors(kind):
    made = layer("spectral", kind)
    t = own(made.delta)
    U, S, Vt = torch.linalg.svd(made.base.weight().double(), full_matrices=False)
    known = U[:, :R] @ torch.diag(S[:R]) @ Vt[:R]
    assert distance(t["U"] @ torch.diag(t["S"]) @ t["V"], known) < 1e-5
    expected = (t["U"] + t["B"]) @ torch.diag(t["S"]) @ (t["V"] + t["A"]) - known
    assert distance(made.delta.weight(), expected) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_rotated_vectors_keep_all_singular_values(kind):
    made = layer("spectral_rotate", kind, size=1.0)
    W0, W = made.base.weight().double(), made.merged_weight().double()
    assert distance(torch.linalg.svdvals(W), torch.linalg.svdvals(W0)) < 1e-6
    assert distance(W, W0) > 0.1
    U, _, Vt = torch.linalg.svd(W0, full_matrices=False)
    change = W - W0
    inside = U[:, :R] @ U[:, :R].t() @ change @ Vt[:R].t() @ Vt[:R]
    assert distance(inside, change) < 1e-5, "and turn among themselves"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_ia3_scales_outputs_and_their_bias(kind, scale):
    made = layer("ia3", kind, scale)
    factor = 1 + scale * (own(made.delta)["l"] - 1)
    x = torch.randn(7, IN)
    plain = x.double() @ made.base.weight().double().t() + made.base.bias.double()
    assert distance(made(x), factor * plain) < 1e-6
    assert distance(made.merged_bias(), factor * made.base.bias.double()) < 1e-6


def test_in_bfloat16_the_output_is_rounded_and_the_factor_is_not():
    linear = nn.Linear(IN, 400, bias=False).to(torch.bfloat16).requires_grad_(False)
    base = view_of(linear)[1]
    delta = parts.load("delta", "ia3").make(Place(base, R, 1.0))
    nn.init.uniform_(delta.l, 1, 1.01)
    x = torch.randn(3, IN, dtype=torch.bfloat16)
    assert torch.equal(Adapted(base, delta)(x), (linear(x).float() * delta.l).bfloat16())


# ---- in a model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", [*OWN_FORMAT, *AS_LORA])
def test_starts_at_the_base_and_is_merged_exactly(method, kind):
    model, x = tiny.model(kind), ids()
    plain = model(x).logits
    adapter = inject.inject(model, plan.make(AdapterRecipe(method=method, r=R), model, models.ends_of(model)))
    assert distance(model(x).logits, plain) < 1e-6
    for delta in adapter.deltas.values():
        moved(delta, 0.1)
    live = model(x).logits
    assert distance(live, plain) > 1e-3
    inject.merge(model, adapter)
    assert distance(model(x).logits, live) < 2e-6


NUMBERS = {
    "fourierft": lambda i, o: R,
    "ia3": lambda i, o: o,
    "svdiff": lambda i, o: min(i, o),
    "sam_parser": lambda i, o: min(i, o),
    "spectral": lambda i, o: R * (i + o),
    "spectral_rotate": lambda i, o: R * (R - 1),
    "hra": lambda i, o: R * i,
    "oft": lambda i, o: i * (R - 1) // 2,
    "boft": lambda i, o: 2 * i * (R - 1) // 2,
}


@pytest.mark.parametrize("method", NUMBERS)
def test_trains_as_many_numbers_as_it_says(method):
    _, adapter = adapted(method)
    for spec in adapter.plan.layers:
        expected = NUMBERS[method](spec.in_features, spec.out_features)
        trained = [p for p in adapter.deltas[spec.name].parameters() if p.requires_grad]
        assert spec.num_trainable == expected == sum(p.numel() for p in trained)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", [*OWN_FORMAT, *AS_LORA])
def test_a_folder_gives_back_the_function_on_the_original_base(method, kind, tmp_path):
    model, adapter = adapted(method, kind)
    x = ids()
    expected = model(x).logits
    files.save(tmp_path, adapter, "the/base", None)
    stored = files.read(tmp_path).tensors
    if method in OWN_FORMAT:
        planned = sum(spec.num_trainable for spec in adapter.plan.layers)
        assert sum(tensor.numel() for tensor in stored.values()) == planned, "and holds what was trained only"
    else:
        ranks = {tensor.shape[0] for key, tensor in stored.items() if "lora_A" in key}
        assert ranks == {AS_LORA[method] * R}
    again = tiny.model(kind)
    put_on(again, tmp_path)
    assert distance(again(x).logits, expected) < (0 if method in OWN_FORMAT else 2e-6) + 1e-12


@pytest.mark.parametrize("method", ["fourierft", "ia3", "spectral", "spectral_rotate", "hra", "oft", "boft"])
def test_no_matrix_of_the_shape_of_w_but_w_itself_is_kept_for_backward(method):
    model, adapter = adapted(method)
    own_data = {parameter.data_ptr() for parameter in model.parameters()}
    kept = kept_in_the_shape_of_w(model, adapter, ids(3, 7))
    assert kept, "W0 itself is kept"
    assert not [t.shape for t in kept if t.data_ptr() not in own_data]


def test_the_places_of_the_frequencies_go_with_the_adapter(tmp_path):
    """They follow from a setting, not from the seed of a run, which is not known where an adapter is loaded."""
    first = adapted("fourierft", delta={"fourierft": {"seed": 3}})[1]
    other = adapted("fourierft")[1]
    name = next(iter(first.layers))
    assert not torch.equal(first.deltas[name].rows, other.deltas[name].rows)
    files.save(tmp_path, first, "the/base", None)
    loaded = put_on(tiny.model("llama"), tmp_path)
    assert torch.equal(first.deltas[name].rows, loaded.deltas[name].rows)


# ---- the model's own parameters ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "kind", "wanted"), [("bitfit", "gpt2", "bias"), ("ln_tuning", "llama", "norm")]
)
def test_nothing_but_the_named_parameters_trains(method, kind, wanted, tmp_path):
    model = tiny.model(kind)
    adapter = inject.inject(model, plan.make(AdapterRecipe(method=method), model, models.ends_of(model)))
    expected = {name for name, _ in model.named_parameters() if wanted in name}
    assert {name.removeprefix("also.") for name in adapter.trainable()} == expected
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected
    assert not adapter.layers
    x = ids()
    for parameter in adapter.also.values():
        nn.init.normal_(parameter)
    trained = model(x).logits
    files.save(tmp_path, adapter, "the/base", None)
    assert len(files.read(tmp_path).tensors) == len(expected)
    again = tiny.model(kind)
    put_on(again, tmp_path)
    assert torch.equal(again(x).logits, trained)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a choice that would be passed over": (
        {"method": "bitfit", "target_modules": ("c_fc",)},
        "no module gets a ΔW",
    ),
    "nothing": ({"method": "bitfit", "train_also": ()}, "nothing would train"),
    "an odd number of reflections": ({"method": "hra", "r": 3}, "start in pairs"),
    "blocks that do not fit": ({"method": "oft", "r": 5}, "have to divide"),
    "factors that do not fit": (
        {"method": "boft", "delta": {"oft": {"factors": 6}}, "r": 4},
        "have to divide",
    ),
    "blocks without halves": ({"method": "boft", "r": 3}, "has to be even"),
    "blocks of one": ({"method": "oft", "r": 1}, "2 at least"),
    "more vectors than there are": ({"method": "spectral_rotate", "r": 64}, "more than its 32"),
    "more frequencies than entries": ({"method": "fourierft", "r": 99999}, "more than the"),
    "two that scale rows": ({"method": "ia3", "combine": "dora"}, "gives every row a length"),
    "a spectrum that would go stale": (
        {"method": "svdiff", "lifecycle": "restart"},
        "would change under them",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_before_there_are_weights(case):
    asked, reason = REFUSED[case]
    with torch.device("meta"):
        skeleton = tiny.model("gpt2")
    with pytest.raises(UserError, match=reason):
        plan.make(AdapterRecipe.model_validate({"r": R, **asked}), skeleton, models.ends_of(skeleton))


def test_a_model_without_biases_is_told_so():
    model = tiny.model("llama")
    with pytest.raises(UserError, match="'biases' matches no"):
        plan.make(AdapterRecipe(method="bitfit"), model, models.ends_of(model))


# ---- PEFT -------------------------------------------------------------------------------------------------------


@pytest.mark.oracle
def test_a_factor_on_what_the_gate_meets_is_pefts_on_the_inputs_of_the_next_layer():
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT about what it was asked for
        config = peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        )
        theirs = peft.get_peft_model(tiny.model("llama"), config).eval()
    model, adapter = adapted("ia3", target_modules=("k_proj", "v_proj", "up_proj"))
    with torch.no_grad():
        for name, delta in adapter.deltas.items():
            place = theirs.base_model.model.get_submodule(name.replace("up_proj", "down_proj"))
            place.ia3_l["default"].copy_(delta.l.view_as(place.ia3_l["default"]))
    x = ids()
    assert distance(model(x).logits, theirs(x).logits) < 2e-6
