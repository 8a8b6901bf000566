"""Layers that train tensors together (tied, lotr, vb_lora), and tensors that are drawn, not saved (nola)."""

import random
from collections import Counter
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from lora_cli import model as models
from lora_cli.adapter import counted, files, inject, plan
from lora_cli.adapter.peft_format import PREFIX, SHARED
from lora_cli.adapter.portable import as_lora
from lora_cli.adapter.seed import number_of
from lora_cli.adapter.sharing import named
from lora_cli.errors import UserError
from lora_cli.methods.delta import nola
from lora_cli.recipe.schema import AdapterRecipe
from lora_cli.train import checkpoint, loop
from tests import tiny
from tests.adapters import ids, put_on
from tests.training import distance, gradients, loss_of, plain, training

R = 4
BANK = {"vb_lora": {"vectors": 11, "length": 8}}
METHODS: dict[str, dict[str, Any]] = {
    "tied_lora": {"method": "tied_lora"},
    "tied_lora, all": {"method": "tied_lora", "delta": {"tied": {"share": "all"}}},
    "tied_lora, ranks": {"method": "tied_lora", "rank_pattern": {"0.self_attn.q_proj|0.attn.c_attn": 2}},
    "lotr": {"method": "lotr"},
    "lotr, type": {"method": "lotr", "delta": {"lotr": {"share": "type"}}},
    "vb_lora": {"method": "vb_lora", "delta": BANK},
}
KINDS = ("llama", "gpt2")
EVERY = [(method, kind) for method in METHODS for kind in KINDS]


@pytest.fixture(autouse=True)
def _other_numbers_in_every_session():
    torch.manual_seed(random.getrandbits(48))


def begun(method: str, kind: str = "llama", **train: Any) -> loop.Training:
    asked = METHODS.get(method, {"method": method})
    return training(asked, {"learning_rate": 2e-2, "max_steps": 3, **train}, kind=kind)


def moved(adapter: inject.Adapter, size: float = 0.3) -> None:
    with torch.no_grad():
        for parameter in adapter.trainable().values():
            parameter.add_(torch.randn_like(parameter) * size)


def logits(model: PreTrainedModel, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(x).logits


def groups(run: loop.Training) -> dict[str, list[str]]:
    """Shared tensor -> the layers that have it."""
    found: dict[str, list[str]] = {key: [] for key in run.adapter.shared}
    for name, layer in run.adapter.layers.items():
        own = {id(p) for p in layer.own_tensors().values()}
        for key, tensor in run.adapter.shared.items():
            found[key] += [name] if id(tensor) in own else []
    return found


# ---- one tensor --------------------------------------------------------------------------------------------------


def test_groups_are_layers_of_one_ending_of_one_shape_or_all():
    assert named("A", "type", "blocks.3.q_proj", 32, 16) == "q_proj.A"
    assert named("A", "shape", "blocks.3.q_proj", 32, 16) == "16x32.A"
    assert named("A", "all", "blocks.3.q_proj", 32, 16) == "A"
    tied = groups(begun("tied_lora"))
    assert {key.partition(".")[0] for key in tied} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert all(len(layers) == 2 for layers in tied.values())
    shapes = groups(begun("lotr"))
    assert len(shapes["32x32.L"]) == 4
    assert len(shapes["16x32.R"]) == 4
    assert groups(begun("tied_lora, all")).keys() == {"A", "B"}
    (bank,) = groups(begun("vb_lora")).values()
    assert len(bank) == 14


@pytest.mark.parametrize(("method", "kind"), EVERY)
def test_a_shared_tensor_is_counted_once_and_is_once_in_the_optimizer(method, kind):
    run = begun(method, kind)
    shared = run.adapter.shared
    assert {key: tuple(p.shape) for key, p in shared.items()} == run.adapter.plan.shared
    trained = run.adapter.trainable()
    assert run.adapter.plan.num_trainable == sum(p.numel() for p in trained.values())
    held = Counter(id(p) for group in run.optimizer.param_groups for p in group["params"])
    assert set(held.values()) == {1}
    assert set(held) == {id(p) for p in trained.values()} >= {id(p) for p in shared.values()}
    with torch.device("meta"):
        skeleton = tiny.model(kind)
    asked = AdapterRecipe.model_validate({"r": R, **METHODS[method]})
    assert plan.make(asked, skeleton, models.ends_of(skeleton)) == run.adapter.plan


def test_tied_lora_trains_one_pair_a_kind_of_layer_and_two_vectors_a_layer():
    run = begun("tied_lora")
    layers = run.adapter.plan.layers
    sides = {spec.name.rpartition(".")[2]: spec.in_features + spec.out_features for spec in layers}
    vectors = sum(R + spec.out_features for spec in layers)
    assert run.adapter.plan.num_trainable == R * sum(sides.values()) + vectors


@pytest.mark.parametrize(("method", "kind"), EVERY)
def test_the_gradient_of_a_shared_tensor_is_the_sum_over_its_layers(method, kind):
    run = begun(method, kind)
    run.model.double()  # norms and loss stay in float32
    moved(run.adapter, 0.01 if method.startswith("lotr") else 0.3)  # beside L and R of size 1
    model = plain(run)
    for name, layer in run.adapter.layers.items():
        model.get_parameter(f"{name}.weight").data.copy_(layer.base.oriented(layer.merged_weight()))
    G = gradients(run, model, 0)
    loss_of(run, run.model, 0).backward()
    expected = {key: torch.zeros(p.shape, dtype=torch.float64) for key, p in run.adapter.shared.items()}
    for name, delta in run.adapter.deltas.items():
        found = {key: p.detach().double().requires_grad_() for key, p in delta.named_parameters()}
        W = delta.scale * definition(delta, found)
        assert distance(delta.weight(), W.detach()) < 1e-5
        (W * G[name]).sum().backward()
        for key, p in delta.named_parameters():
            shared = [each for each, tensor in run.adapter.shared.items() if tensor is p]
            if shared:
                expected[shared[0]] += found[key].grad
            else:
                assert distance(p.grad, found[key].grad) < 2e-2, (name, key)  # float32, of two numbers
    for key, tensor in run.adapter.shared.items():
        assert distance(tensor.grad, expected[key]) < 2e-2, key


def definition(delta: torch.nn.Module, found: dict[str, Tensor]) -> Tensor:
    """ΔW/s of a layer, by loops and explicit diagonals."""
    if "G" in found:
        r = len(found["G"])
        return found["L"][: delta.out_features, :r] @ found["G"] @ found["R"][:r, : delta.in_features]
    if "u" in found:
        r = len(found["u"])
        B, A = found["B"][: delta.out_features, :r], found["A"][:r, : delta.in_features]
        return torch.diag(found["v"]) @ B @ torch.diag(found["u"]) @ A
    return cut(found["scores_B"], found["bank"], True) @ cut(found["scores_A"], found["bank"], False)


def cut(scores: Tensor, bank: Tensor, columns: bool) -> Tensor:
    """A [r, in], or B [out, r], one short vector after the other."""
    rows = []
    for line in scores:
        vectors = []
        for each in line:
            chosen = sorted(range(len(each)), key=lambda i: -each[i].item())[:2]
            parts = each[chosen].exp() / each[chosen].exp().sum()
            vectors.append(sum(share * bank[i] for share, i in zip(parts, chosen, strict=True)))
        rows.append(torch.stack(vectors, 1) if columns else torch.cat(vectors))
    return torch.cat(rows) if columns else torch.stack(rows)


@pytest.mark.parametrize(("method", "kind"), [each for each in EVERY if each[0] != "vb_lora"])
def test_layers_that_share_start_at_the_base(method, kind):
    run, x = begun(method, kind), ids()
    assert distance(logits(run.model, x), logits(tiny.model(kind), x)) < 1e-6


def test_what_is_shared_follows_from_the_seed_and_its_group():
    first, again, other = (training({"method": "lotr"}, {"seed": seed}).adapter.shared for seed in (3, 3, 4))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first)
    assert not torch.equal(first["32x32.L"], first["32x32.R"].t())
    L = torch.cat([p.flatten() for p in first.values()])
    assert L.std().item() == pytest.approx(1, rel=0.1)


# ---- on disk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "kind"), EVERY)
def test_a_shared_tensor_is_saved_once_and_shared_again_when_loaded(method, kind, tmp_path):
    run, x = begun(method, kind), ids()
    list(loop.train_steps(run))
    files.save(tmp_path, run.adapter, "the/base", None)
    saved = files.read(tmp_path).tensors
    assert {key.removeprefix(SHARED) for key in saved if key.startswith(SHARED)} == {*run.adapter.shared}
    again = tiny.model(kind)
    loaded = put_on(again, tmp_path)
    assert all(torch.equal(p, run.adapter.shared[key]) for key, p in loaded.shared.items())
    assert groups(run) == groups(type("Run", (), {"adapter": loaded})())
    live = logits(run.model, x)
    assert distance(logits(again, x), live) < 1e-6
    assert distance(live, logits(tiny.model(kind), x)) > 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_has_a_shared_tensor_and_its_moments_once(method, tmp_path):
    run = begun(method)
    list(loop.train_steps(run))
    folder = checkpoint.save(tmp_path, run, {})
    stored = sum(t.numel() for t in load_file(folder / "adapter.safetensors").values())
    assert stored == run.adapter.plan.num_trainable
    moments = [
        t for key, t in load_file(folder / "optimizer.safetensors").items() if key.endswith("|exp_avg")
    ]
    assert sum(t.numel() for t in moments) == run.adapter.plan.num_trainable


@pytest.mark.parametrize(("method", "kind"), [*EVERY, ("nola", "llama"), ("nola", "gpt2")])
def test_export_as_plain_lora_and_merging_compute_the_same(method, kind, tmp_path):
    run, x = begun(method, kind), ids()
    moved(run.adapter, 0.1)
    live = logits(run.model, x)
    exact = as_lora(run.adapter)
    assert exact is not None
    assert {spec.r for spec in exact.plan.layers} <= {R, 2}
    with inject.without_adapters(run.adapter):
        files.write(tmp_path, exact, run.model, "the/base", None, (), None)
    original = tiny.model(kind)
    put_on(original, tmp_path)
    assert distance(logits(original, x), live) < 1e-5
    inject.merge(run.model, run.adapter)
    assert distance(logits(run.model, x), live) < 1e-5


# ---- vb_lora -----------------------------------------------------------------------------------------------------


def test_of_vb_lora_only_which_vectors_and_how_much_of_each_is_saved(tmp_path):
    run = begun("vb_lora")
    list(loop.train_steps(run))
    files.save(tmp_path, run.adapter, "the/base", None)
    saved = files.read(tmp_path).tensors
    names = {key.rpartition(".")[2] for key in saved}
    assert names == {"bank", "which_A", "which_B", "share_A", "share_B"}
    vectors = sum(R * (spec.in_features + spec.out_features) // 8 for spec in run.adapter.plan.layers)
    assert sum(t.numel() for key, t in saved.items() if ".which_" in key) == 2 * vectors
    assert sum(t.numel() for key, t in saved.items() if ".share_" in key) == vectors
    assert {t.dtype for key, t in saved.items() if ".which_" in key} == {torch.uint8}
    bytes_saved = sum(t.numel() * t.element_size() for t in saved.values())
    assert bytes_saved == 11 * 8 * 4 + vectors * (2 + 4)
    for delta in put_on(tiny.model("llama"), tmp_path).deltas.values():
        assert all((scores.isfinite().sum(-1) == 2).all() for scores in (delta.scores_A, delta.scores_B))


def test_a_bank_of_more_than_256_vectors_is_numbered_in_two_bytes():
    settings = {"vb_lora": {"vectors": 300, "length": 8, "k": 3}}
    run = training({"method": "vb_lora", "delta": settings, "target_modules": ("q_proj",)})
    for delta in run.adapter.deltas.values():
        before, packed = delta.weight(), delta.packed()
        assert packed["which_A"].dtype is torch.int16
        assert packed["which_A"].max() > 255
        with torch.no_grad():
            delta.unpack(packed)
        assert distance(delta.weight(), before) < 1e-6


def test_vb_lora_starts_near_the_base():
    run, x = begun("vb_lora"), ids()
    assert 0 < distance(logits(run.model, x), logits(tiny.model("llama"), x)) < 1e-2
    assert run.adapter.shared["bank"].abs().max() <= 0.02
    scores = torch.cat([p.flatten() for name, p in run.adapter.trainable().items() if ".scores_" in name])
    assert scores.std().item() == pytest.approx(0.1, rel=0.05)


# ---- nola --------------------------------------------------------------------------------------------------------


def splitmix(seed: int, count: int) -> float:
    """The same number by Python's own integers."""
    mask = 2**64 - 1
    z = ((count + 1) * 0x9E3779B97F4A7C15 + seed) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return ((z ^ (z >> 31)) >> 40) / 2**23 - 1


def test_counted_numbers_are_those_of_splitmix():
    # The first number of SplitMix64 from 0, as published.
    assert splitmix(0, 0) == (0xE220A8397B1DCDAF >> 40) / 2**23 - 1
    for seed in (0, 1, number_of(7, "layer"), 2**56 - 1):
        found = counted.uniform(seed, 1000, 1064, torch.device("cpu"))
        assert found.tolist() == [splitmix(seed, count) for count in range(1000, 1064)]


def test_counted_numbers_are_uniform_and_follow_from_their_count_alone():
    found = counted.uniform(random.getrandbits(56), 0, 400_000, torch.device("cpu"))
    assert found.min() >= -1
    assert found.max() < 1
    shares = torch.histc(found, 20, -1, 1) / len(found)
    assert (shares - 0.05).abs().max() < 0.003
    assert abs((found[1:] * found[:-1]).mean().item()) < 0.005
    seed = random.getrandbits(56)
    pieces = [counted.uniform(seed, begin, begin + 7, torch.device("cpu")) for begin in range(0, 70, 7)]
    assert torch.equal(torch.cat(pieces), counted.uniform(seed, 0, 70, torch.device("cpu")))


def bases_of(name: str, factor: str, count: int, shape: tuple[int, int], seed: int) -> Tensor:
    """The random matrices of a layer, [count, *shape], by Python's own integers."""
    size, key = shape[0] * shape[1], number_of(seed, f"{name}.{factor}")
    numbers = [splitmix(key, index) for index in range(count * size)]
    return torch.tensor(numbers, dtype=torch.float64).view(count, *shape)


def nola_run(kind: str = "llama", **settings: Any) -> loop.Training:
    chosen = ("q_proj", "v_proj") if kind == "llama" else ("c_attn",)
    asked = {"method": "nola", "delta": {"nola": {"bases": 5, **settings}}, "target_modules": chosen}
    return training(asked, {"learning_rate": 0.1, "max_steps": 3}, kind=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_w_of_nola_is_the_definition_and_the_gradient_of_a_weight_is_a_product_with_its_matrix(
    kind, monkeypatch
):
    monkeypatch.setattr(nola, "AT_ONCE", 300)  # several turns
    run = nola_run(kind, seed=3)
    for delta in run.adapter.deltas.values():
        assert not torch.count_nonzero(delta.weight())
    moved(run.adapter)
    model = plain(run)
    for name, layer in run.adapter.layers.items():
        model.get_parameter(f"{name}.weight").data.copy_(layer.base.oriented(layer.merged_weight()))
    G = gradients(run, model, 0)
    loss_of(run, run.model, 0).backward()
    for spec in run.adapter.plan.layers:
        delta = run.adapter.deltas[spec.name]
        drawn = bases_of(spec.name, "A", 6, (R, spec.in_features), 3)
        A0, A_k = drawn[5] / spec.in_features**0.5, drawn[:5] / 5**0.5
        B_k = bases_of(spec.name, "B", 5, (spec.out_features, R), 3) / 5**0.5
        A = A0 + torch.einsum("k,kri->ri", delta.alpha.detach().double(), A_k)
        B = torch.einsum("k,kor->or", delta.beta.detach().double(), B_k)
        assert distance(delta.weight(), spec.scale * B @ A) < 1e-5
        of_A, of_B = spec.scale * B.t() @ G[spec.name], spec.scale * G[spec.name] @ A.t()
        assert distance(delta.alpha.grad, (A_k * of_A).sum((1, 2))) < 1e-4
        assert distance(delta.beta.grad, (B_k * of_B).sum((1, 2))) < 1e-4


def test_nola_saves_its_weights_alone_and_they_are_enough(tmp_path):
    run, x = nola_run(seed=9), ids()
    list(loop.train_steps(run))
    files.save(tmp_path, run.adapter, "the/base", None)
    saved = files.read(tmp_path).tensors
    layers = [spec.name for spec in run.adapter.plan.layers]
    assert {*saved} == {f"{PREFIX}{name}.{key}" for name in layers for key in ("alpha", "beta")}
    assert sum(t.numel() for t in saved.values()) == 10 * len(layers) == run.adapter.plan.num_trainable
    again = tiny.model("llama")
    put_on(again, tmp_path)
    live = logits(run.model, x)
    assert torch.equal(logits(again, x), live)
    assert distance(live, logits(tiny.model("llama"), x)) > 1e-4


def test_the_matrices_of_nola_differ_between_layers_factors_and_seeds():
    runs = [nola_run(seed=seed) for seed in (0, 0, 1)]
    starts = [[delta.down().detach() for delta in run.adapter.deltas.values()] for run in runs]
    assert all(torch.equal(a, b) for a, b in zip(starts[0], starts[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(starts[0], starts[2], strict=True))
    assert len({tuple(A.flatten().tolist()) for A in starts[0]}) == len(starts[0])
    assert starts[0][0].abs().max() <= 32**-0.5


def test_no_random_matrix_of_nola_is_kept_for_the_backward_pass():
    run = nola_run(bases=64)
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        run.model(torch.randint(5, tiny.VOCABULARY, (1, 5)))
    largest = max(p.numel() for p in run.model.parameters())
    assert max(tensor.numel() for tensor in kept) <= largest
    assert not [tensor for tensor in kept if tensor.ndim == 3 and tensor.shape[0] >= 60]


# ---- what does not fit -------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "length": (
        {"method": "vb_lora"},
        r"q_proj \(32×32\): length = 256 has to divide both sides.*have 32 in common",
    ),
    "k": (
        {"method": "vb_lora", "delta": {"vb_lora": {"vectors": 2, "length": 8, "k": 3}}},
        "k = 3 is more than the 2 vectors",
    ),
    "a bank with alpha": ({"method": "vb_lora", "alpha": 4.0, "delta": BANK}, "scale: constant.*alpha"),
    "restarts": ({"method": "tied_lora", "lifecycle": "restart"}, "cannot start anew for one"),
    "a bank that starts anew": ({"method": "vb_lora", "delta": BANK, "lifecycle": "restart"}, "one bank"),
    "B at zero": ({"method": "tied_lora", "trainable": "only_a"}, "would stay there"),
    "no A": ({"method": "nola", "trainable": "lora_fa"}, "no A to freeze"),
    "a vocabulary": ({"method": "nola", "target_modules": ("embed_tokens",)}, "base.embedding"),
}


@pytest.mark.parametrize(("adapter", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_is_refused_before_there_are_weights(adapter, reason):
    with torch.device("meta"):
        skeleton = tiny.model("llama")
    recipe = AdapterRecipe.model_validate({"r": R, **adapter})
    with pytest.raises(UserError, match=reason):
        plan.make(recipe, skeleton, models.ends_of(skeleton))
