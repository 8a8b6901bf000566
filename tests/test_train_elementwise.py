"""Norms and gated MLPs that keep less, and what the backward pass makes a second time: the same numbers, to the bit."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaMLP

from lora_cli.adapter.again import again, origin
from lora_cli.adapter.fused import narrow, product
from lora_cli.train import elementwise
from lora_cli.train.elementwise import GatedMLP, Norm, keep_less, names_of
from tests import tiny, training
from tests.training import Rows, batch_of, fresh, loss_of

KINDS = ["llama", "qwen3", "gemma2", "mistral", "olmo2"]


def ran(monkeypatch, adapter, *, less, train=None, kind="llama", rows):
    """Loss, gradients and bytes kept of a first step; without the exchange of MLPs unless `less`."""
    with monkeypatch.context() as patch:
        if not less:
            patch.setattr(training, "keep_less", lambda model: None)
        run = training.training(adapter, train, kind=kind, rows=rows)
    assert any(isinstance(module, GatedMLP) for module in run.model.modules()) is less
    with torch.no_grad():  # B = 0 would hide most gradients
        for number, p in enumerate(run.adapter.trainable().values()):
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
    weights = {t.untyped_storage().data_ptr() for t in (*run.model.parameters(), *run.model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(7)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(run, run.model, 0)
    loss.backward()
    gradients = {name: p.grad for name, p in run.adapter.trainable().items()}
    return loss, gradients, sum(kept.values()), batch_of(run, 0).input_ids.numel()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "adapter",
    [
        {"method": "lora"},
        {"method": "lora", "dropout": 0.3},
        {"method": "lora", "target_modules": ("gate_proj", "q_proj")},
        {"method": "dora"},
        {"method": "lora_fa"},
        {"method": "pissa"},
        {"method": "full"},
        {"method": "ln_tuning"},
    ],
    ids=lambda adapter: "-".join(str(value) for value in adapter.values()),
)
@pytest.mark.parametrize("norms", [False, True], ids=["mlps", "norms-too"])
def test_the_same_loss_and_gradients(monkeypatch, kind, adapter, norms):
    rows = Rows()
    if not norms:
        monkeypatch.setattr(elementwise, "_is_frozen_norm", lambda module: False)
    (loss, gradients, *_), (other, others, *_) = (
        ran(monkeypatch, adapter, less=less, kind=kind, rows=rows) for less in (True, False)
    )
    assert torch.equal(loss, other)
    assert gradients.keys() == others.keys()
    # A norm sums what comes back from its parts before the residual does: in another order, so to rounding only.
    limits = {"rtol": 1e-4, "atol": 1e-6} if norms else {"rtol": 0, "atol": 0}
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], **limits)


@pytest.mark.parametrize("kind", KINDS)
def test_neither_activations_nor_products_nor_what_norms_give_is_kept(monkeypatch, kind):
    rows, found = Rows(), {}
    for less in (True, False):
        *_, found[less], tokens = ran(monkeypatch, {"method": "lora"}, less=less, kind=kind, rows=rows)
    sizes = tiny.SIZES
    layers = sizes["num_hidden_layers"]
    # Olmo 2 has no norm before what it adapts; what the first norm of any reads has no gradient.
    norms = 0 if kind == "olmo2" else 2 * layers - 1
    less = 2 * layers * sizes["intermediate_size"] + norms * sizes["hidden_size"]
    assert found[False] - found[True] >= 4 * tokens * less


def test_what_is_recomputed_by_blocks_keeps_no_more_than_before(monkeypatch):
    rows, found = Rows(), {}
    for less in (True, False):
        found[less] = ran(
            monkeypatch, {"method": "lora"}, less=less, train={"gradient_checkpointing": True}, rows=rows
        )
    assert torch.equal(found[True][0], found[False][0])
    for name, gradient in found[True][1].items():
        torch.testing.assert_close(gradient, found[False][1][name], rtol=1e-4, atol=1e-6)
    assert found[True][2] == found[False][2]


def test_names_and_training_mode_stay():
    model = tiny.model("llama").train().requires_grad_(False)
    before = [name for name, _ in model.named_parameters()]
    keep_less(model)
    assert [name for name, _ in model.named_parameters()] == before
    assert all(module.training for module in model.modules())
    assert sum(isinstance(module, Norm) for module in model.modules()) == 2 * tiny.SIZES["num_hidden_layers"]
    model.to(torch.bfloat16)
    assert model(torch.tensor([[5, 6, 7]])).logits.dtype == torch.bfloat16


class Gated(nn.Module):
    """The usual one; its variants below are none, and each computes something else."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(4, 4) for _ in range(3))
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.act(self.one(x)) * self.two(x))


class Scaled(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.act(self.one(x)) * self.two(x) * 2)


class Clamped(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.act(self.one(x).clamp(max=1)) * self.two(x))


class OnItself(Gated):
    def forward(self, x: Tensor) -> Tensor:
        gate = self.act(self.one(x))
        return self.three(gate * self.two(gate))


class Added(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.act(self.one(x)) + self.two(x))


class Residual(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.three(self.act(self.one(x)) * self.two(x))


class TwoInputs(Gated):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.three(self.act(self.one(x)) * self.two(y))


class ByValue(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


class Five(Gated):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(super().forward(x))


def test_only_what_computes_a_gated_mlp_is_taken_for_one():
    names = names_of(Gated())
    assert names is not None
    assert (names.gate, names.act, names.up, names.down) == ("one", "act", "two", "three")
    for other in (Scaled, Clamped, OnItself, Added, Residual, TwoInputs, ByValue, Five):
        assert names_of(other()) is None, other
    mlp, x = Gated(), torch.randn(3, 4, generator=fresh())
    assert torch.equal(GatedMLP(mlp, names)(x), mlp(x))


def test_a_reader_and_the_tensor_itself_make_it_once_together_and_let_go_of_it():
    calls, made = [], []

    def compute(x):
        calls.append(x.shape)
        made.append(weakref.ref(y := x.sin() * x))
        return y

    x = torch.randn(5, 3, dtype=torch.float64, generator=fresh(), requires_grad=True)
    W = torch.randn(2, 3, dtype=torch.float64, generator=fresh())
    A, B = (
        torch.randn(shape, dtype=torch.float64, generator=fresh(), requires_grad=True)
        for shape in ((1, 3), (2, 1))
    )
    h = again(compute, 1 * x)
    assert origin(h) is not None
    y = product(h, h, W, None, A, B, 0.5)
    del h
    gc.collect()
    assert made.pop()() is None  # nobody kept it
    found = torch.autograd.grad(y.square().sum(), [x, A, B])
    assert len(calls) == 2
    gc.collect()
    assert made.pop()() is None
    h = x.sin() * x
    y = F.linear(h, W) + 0.5 * F.linear(F.linear(h, A), B)
    torch.testing.assert_close(found, torch.autograd.grad(y.square().sum(), [x, A, B]))


def test_its_gradient_is_that_of_the_function_as_often_as_one_asks():
    x, y = (torch.randn(4, dtype=torch.float64, generator=fresh(), requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: again(lambda c, d: c.tanh() * d, a, b), (x, y))
    total = again(torch.mul, x, y).sum()
    for _ in range(2):
        assert torch.equal(torch.autograd.grad(total, x, retain_graph=True)[0], y)


def test_it_is_made_again_as_it_was_made_under_autocast():
    W = torch.randn(6, 6, generator=fresh())
    types = []

    def compute(x):
        types.append((y := F.linear(x, W)).dtype)
        return y

    x = torch.randn(2, 6, generator=fresh(), requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = again(compute, x)
    y.sum().backward()
    assert types == [torch.bfloat16, torch.bfloat16]


def test_without_gradients_nothing_is_noted():
    x = torch.randn(3, requires_grad=True)
    with torch.no_grad():
        assert origin(again(torch.sin, x)) is None
    assert origin(again(torch.sin, x.detach())) is None


def test_an_activation_that_trains_keeps_its_gradient():
    model = tiny.model(hidden_act="prelu")
    keep_less(model)
    assert not any(isinstance(module, GatedMLP) for module in model.modules())
    model.requires_grad_(False)
    keep_less(model)
    assert sum(isinstance(module, GatedMLP) for module in model.modules()) == 2


def test_what_branches_on_its_own_settings_is_looked_at_one_by_one():
    """As Gemma 3n, whose MLPs are of one class and do not compute the same."""

    class Sometimes(LlamaMLP):
        sparse = False

        def forward(self, x):
            gate = self.act_fn(self.gate_proj(x))
            return self.down_proj((gate.relu() if self.sparse else gate) * self.up_proj(x))

    model = tiny.model().requires_grad_(False)
    for layer in model.model.layers:
        layer.mlp.__class__ = Sometimes
    model.model.layers[1].mlp.sparse = True
    keep_less(model)
    assert [type(layer.mlp) for layer in model.model.layers] == [GatedMLP, Sometimes]


@pytest.mark.parametrize("autocast", [False, True])
def test_beside_any_base_no_more_is_kept_than_what_a_norm_reads(autocast):
    x, A = (torch.randn(shape, generator=fresh(), requires_grad=True) for shape in ((2, 5, 8), (3, 8)))
    kept: list[int] = []
    found = []
    for read in (narrow, F.linear):
        with (
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
            saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t),
        ):
            h = again(lambda z: z.sin() * z, x)
            kept.clear()
            z = read(h, A)
        if read is narrow:
            assert h.data_ptr() not in kept
            assert x.data_ptr() in kept
        found.append((z, *torch.autograd.grad(z.float().square().sum(), [x, A])))
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain)
