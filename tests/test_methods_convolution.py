"""ΔW of a convolution is a convolution: as its definition, as merged, and as PEFT has it on disk and in memory."""

import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTModel

from lora_cli.adapter import files, inject, plan
from lora_cli.adapter.plan import Ends
from lora_cli.errors import UserError
from lora_cli.recipe.schema import AdapterRecipe
from tests.training import distance

NO_ENDS = Ends("", "", tied=False)
R = 3


@pytest.fixture(autouse=True)
def _other_numbers_in_every_session():
    torch.manual_seed(random.getrandbits(48))


class Flat(nn.Module):
    """Pictures to four numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, (3, 2), stride=(2, 1), padding=(1, 0))
        self.second = nn.Conv2d(8, 6, 3, padding="same", bias=False)
        self.grouped = nn.Conv2d(6, 6, 3, groups=3)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Of [rows, 3, height, width], or of one alone."""
        return self.head(F.silu(self.grouped(F.silu(self.second(F.silu(self.first(x)))))).mean((-2, -1)))


class Deep(nn.Module):
    """Films to four numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(3, 8, (2, 3, 2), stride=(1, 2, 1), padding=(1, 0, 1))
        self.second = nn.Conv3d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Of [rows, 3, times, height, width]."""
        return self.second(F.silu(self.first(x))).mean((-3, -2, -1))


class Seeing(nn.Module):
    """A tiny vision transformer, whose patches are read by a convolution."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        self.vit = ViTModel(ViTConfig(image_size=8, patch_size=4, **sizes), add_pooling_layer=False).eval()

    def forward(self, x: Tensor) -> Tensor:
        """Of [rows, 3, 8, 8]."""
        return self.vit(x).last_hidden_state


NETS: dict[str, tuple[type[nn.Module], tuple[int, ...], list[str]]] = {
    "2d": (Flat, (2, 3, 8, 8), ["first", "second", "head"]),
    "3d": (Deep, (2, 3, 4, 6, 5), ["first", "second"]),
    "vit": (Seeing, (2, 3, 8, 8), ["projection", "q_proj"]),
}


def net(kind: str) -> tuple[nn.Module, Tensor]:
    """The same weights every time, and inputs that are not."""
    made, shape, _ = NETS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return made().requires_grad_(False), torch.randn(shape)


def adapted(kind: str, **adapter: Any) -> tuple[nn.Module, inject.Adapter, Tensor]:
    """Every tensor of the adapter is random."""
    model, x = net(kind)
    targets = tuple(NETS[kind][2])
    recipe = AdapterRecipe.model_validate({"r": R, "target_modules": targets, **adapter})
    made = inject.inject(model, plan.make(recipe, model, NO_ENDS))
    with torch.no_grad():
        for name, parameter in made.trainable().items():
            if name.endswith("magnitude"):
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model, made, x


METHODS = ("lora", "dora", "pissa", "adalora", "symmetric", "svdiff", "spectral", "ia3", "optimizer_view")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", NETS)
def test_merged_computes_what_the_live_one_does(kind, method):
    model, adapter, x = adapted(kind, method=method)
    live, plain = model(x), net(kind)[0](x)
    assert distance(live, plain) > 1e-3
    inject.merge(model, adapter)
    assert not inject.adapted_layers(model)
    assert distance(model(x), live) < 2e-6


def test_y_and_its_gradients_are_those_of_the_definition():
    _, adapter, x = adapted("2d", target_modules=("first",), alpha=2.0)
    layer = adapter.layers["first"]
    factors = [p.detach().double().requires_grad_() for p in (layer.delta.A, layer.delta.B)]
    conv = layer.base_layer
    W = conv.weight.double() + 2.0 / R * (factors[1] @ factors[0]).view(conv.weight.shape)
    expected = F.conv2d(x.double(), W, conv.bias.double(), conv.stride, conv.padding)
    y = layer(x)
    assert distance(y, expected) < 1e-6
    g = torch.randn_like(y)
    y.backward(g)
    expected.backward(g.double())
    for mine, other in zip((layer.delta.A, layer.delta.B), factors, strict=True):
        assert distance(mine.grad, other.grad) < 1e-5


def test_one_picture_without_a_row_of_its_own_is_taken_too():
    model, _, x = adapted("2d")
    assert distance(model(x[0]), model(x)[0]) < 1e-6


@pytest.mark.parametrize("padding", ["zeros", "circular", "reflect"])
def test_a_sees_x_as_w0_does_padding_and_dilation_included(padding):
    model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=2, dilation=2, padding_mode=padding))
    adapter = inject.inject(model, plan.make(AdapterRecipe(r=R, target_modules=("0",)), model, NO_ENDS))
    nn.init.normal_(adapter.deltas["0"].get_parameter("B"))
    x = torch.randn(2, 3, 7, 7)
    live = model(x)
    inject.merge(model, adapter)
    assert distance(model(x), live) < 2e-6


def test_all_linear_are_the_linear_ones():
    model = net("2d")[0]
    assert [spec.name for spec in plan.make(AdapterRecipe(r=R), model, NO_ENDS).layers] == ["head"]


@pytest.mark.parametrize(
    ("adapter", "reason"),
    [
        ({"target_modules": ("grouped",)}, "'grouped' matches no module"),
        ({"method": "oft", "target_modules": ("first",)}, "turn every patch"),
        ({"init": "eva", "target_modules": ("first",)}, "is not measured"),
    ],
)
def test_what_cannot_work_is_refused(adapter, reason):
    with torch.device("meta"):
        model = Flat()
    with pytest.raises(UserError, match=reason):
        plan.make(AdapterRecipe.model_validate({"r": R, **adapter}), model, NO_ENDS)


def test_a_step_learns():
    model, adapter, x = adapted("2d")
    target = torch.randn(2, 4)
    optimizer = torch.optim.AdamW(adapter.trainable().values(), lr=1e-2)
    losses: list[float] = []
    for _ in range(30):
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


# ---- PEFT -------------------------------------------------------------------------------------------------------

peft = pytest.importorskip("peft")


def put_on(kind: str, folder: Path) -> nn.Module:
    model = net(kind)[0]
    saved = files.read(folder)
    files.fill(inject.inject(model, files.plan_of(saved, model, NO_ENDS)), saved)
    return model


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore:.*groups > 1.*", "ignore:Could not find a config file in")
@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "pissa"])
@pytest.mark.parametrize("kind", NETS)
def test_peft_computes_what_we_compute_from_our_files(kind, method, tmp_path):
    model, adapter, x = adapted(kind, method=method, rank_pattern={"first": 2} if kind != "vit" else {})
    files.save(tmp_path, adapter, "the/base", None)
    stored = {key: tensor.ndim for key, tensor in files.read(tmp_path).tensors.items()}
    assert set(stored.values()) <= {1, 2}, "here they are matrices"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that its forward is not that of a language model
        config = peft.PeftConfig.from_pretrained(tmp_path)
        config.task_type = None  # here, no language model
        theirs = peft.PeftModel.from_pretrained(net(kind)[0], tmp_path, config=config).eval()
    assert distance(theirs.base_model.model(x), model(x)) < 2e-6
    assert distance(put_on(kind, tmp_path)(x), model(x)) < 1e-6


@pytest.mark.oracle
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", NETS)
def test_we_compute_what_peft_computes_from_its_files(kind, dora, tmp_path):
    model, x = net(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=R, lora_alpha=5, target_modules=NETS[kind][2], use_dora=dora)
        theirs = peft.get_peft_model(model, config).eval()
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.rand_like(parameter) * (0.1 if "magnitude" in name else 0.3))
        theirs.save_pretrained(tmp_path)
    expected = theirs.base_model.model(x)
    assert distance(net(kind)[0](x), expected) > 1e-3
    assert distance(put_on(kind, tmp_path)(x), expected) < 2e-6
