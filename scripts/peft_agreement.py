"""Measure how far the methods that PEFT has too are from PEFT's, and write the table into README.md.

`python -m scripts.peft_agreement`, with the extra `oracle`; seconds. Both sides get the same tiny random model and the
same tensors, in float32 on the CPU. Methods are compared where PEFT is a fair witness; where it is known to do
something else the table says what.
"""

import datetime
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import peft
import torch
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from peft.optimizers import lorafa as peft_lorafa
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lora_cli import model as models
from lora_cli.adapter import inject, plan
from lora_cli.adapter.inject import Adapter
from lora_cli.recipe.schema import AdapterRecipe, TrainRecipe
from lora_cli.train import optim
from scripts import readme
from tests import tiny

KINDS = ("llama", "gpt2")
R, ALPHA, STEPS, RATE = 8, 12, 20, 3e-3
TRAIN = TrainRecipe(learning_rate=RATE, weight_decay=0.0)
TARGETS = {"llama": "all-linear", "gpt2": ["c_attn", "c_proj", "c_fc"]}
NAMES = {
    "A": "lora_A",
    "B": "lora_B",
    "E": "lora_E",
    "magnitude": "lora_magnitude_vector",
    "b": "vera_lambda_b",
    "d": "vera_lambda_d",
    "c": "fourierft_spectrum",
    "l": "ia3_l",
    "U": "hra_u",
    "Q": "oft_R",
    "W1": "lokr_w1",
    "W2": "lokr_w2",
    "scores_A": "vblora_logits_A",
    "scores_B": "vblora_logits_B",
}
"""Our tensors by PEFT's names; MiSS has a B that PEFT calls otherwise, and BOFT keeps whole matrices."""
PAIRS = {
    "loha": {"B1": "hada_w1_a", "A1": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b"},
    "lokr": {"B2": "lokr_w2_a", "A2": "lokr_w2_b"},
}
"""Those that two methods call the same."""
SHARED = {"A": "vera_A", "B": "vera_B", "bank": "vblora_vector_bank"}
"""Those that several layers have in common."""
Config = Callable[..., Any]


def lora(**config: Any) -> Config:
    """PEFT's LoRA with alpha and more."""

    def made(kind: str) -> Any:
        common = {"r": R, "lora_alpha": ALPHA, "fan_in_fan_out": kind == "gpt2"}
        return peft.LoraConfig(target_modules=TARGETS[kind], **common, **config)

    return made


def adalora(kind: str) -> Any:
    """Twelve components to begin with."""
    return peft.AdaLoraConfig(
        target_modules=TARGETS[kind],
        init_r=12,
        target_r=R,
        lora_alpha=ALPHA,
        total_step=100,
        fan_in_fan_out=kind == "gpt2",
    )


def vera(kind: str) -> Any:
    """Any key: the common pair is copied."""
    return peft.VeraConfig(r=R, target_modules=TARGETS[kind], fan_in_fan_out=kind == "gpt2")


def miss(kind: str) -> Any:
    """It has no alpha."""
    return peft.MissConfig(r=R, target_modules=TARGETS[kind])


def fourierft(kind: str) -> Any:
    """PEFT's entries are at the same places."""
    return peft.FourierFTConfig(
        n_frequency=R * 8, init_weights=True, target_modules=TARGETS[kind], fan_in_fan_out=kind == "gpt2"
    )


def ia3(kind: str) -> Any:
    """Factors on outputs only."""
    return peft.IA3Config(target_modules=TARGETS[kind], feedforward_modules=[], fan_in_fan_out=kind == "gpt2")


def hra(kind: str) -> Any:
    """Without orthogonalisation."""
    return peft.HRAConfig(r=R, target_modules=TARGETS[kind])


def oft(kind: str) -> Any:
    """The exact Cayley transform."""
    return peft.OFTConfig(
        r=0,
        oft_block_size=R,
        use_cayley_neumann=False,
        target_modules=TARGETS[kind],
        fan_in_fan_out=kind == "gpt2",
    )


def boft(kind: str) -> Any:
    """On a CPU it has one factor."""
    return peft.BOFTConfig(
        boft_block_size=R, boft_block_num=0, target_modules=TARGETS[kind], fan_in_fan_out=kind == "gpt2"
    )


def without_lengths(model: Any) -> Optimizer:
    """The rotations alone."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("boft_R" in name)
    return plain_adamw(model)


def loha(kind: str) -> Any:
    """Alpha, by another name."""
    return peft.LoHaConfig(r=R, alpha=ALPHA, target_modules=TARGETS[kind])


def lokr(r: int) -> Config:
    """With a W2 of two factors, or in full where r is large."""
    return lambda kind: peft.LoKrConfig(r=r, alpha=ALPHA, target_modules=TARGETS[kind])


def vb_lora(kind: str) -> Any:
    """Vectors that divide the layers of a tiny model."""
    common = {"num_vectors": 16, "vector_length": 8, "fan_in_fan_out": kind == "gpt2"}
    return peft.VBLoRAConfig(r=R, target_modules=TARGETS[kind], **common)


def plain_adamw(model: nn.Module) -> Optimizer:
    """Over what trains."""
    return AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)


def loraplus(model: Any) -> Optimizer:
    """B 16 times as fast."""
    return create_loraplus_optimizer(model, AdamW, lr=RATE, loraplus_lr_ratio=16)


def lorafa(model: Any) -> Optimizer:
    """It freezes A."""
    return create_lorafa_optimizer(model, r=R, lora_alpha=ALPHA, lr=RATE)


def lorafa_unrounded(model: Any) -> Optimizer:
    """In float32 throughout."""
    optimizer = lorafa(model)
    narrow = mock.patch.object(peft_lorafa, "is_bf16_available", return_value=False)
    optimizer.step = narrow(optimizer.step)
    return optimizer


@dataclass(frozen=True)
class Case:
    """One preset as PEFT has it."""

    method: str
    config: Config
    differs: str = ""
    """What PEFT does otherwise."""
    optimizer: Callable[[Any], Optimizer] = plain_adamw
    ours: dict[str, Any] = field(default_factory=lambda: {"alpha": float(ALPHA)})
    cannot: tuple[str, ...] = ()
    """The models that PEFT fails on."""
    faster: float = 1.0
    """Times the usual rate, on both sides."""
    eps: float | None = None
    """Of Adam, on both sides; default: each its own."""


SHIFTED = "writes the rest of W0 over the base; here W0 stays, and the file fits it as rank 2r"
CASES = (
    Case("lora", lora()),
    Case("rslora", lora(use_rslora=True)),
    Case(
        "lora_plus",
        lora(),
        "decays by 0 whatever weight decay is asked for, and gives vectors B's rate; here both are the recipe's",
        loraplus,
    ),
    Case(
        "lora_fa",
        lora(),
        "rounds the corrected gradient to bfloat16 and adds 1e-6 to Adam's √v; here float32, and torch's 1e-8",
        lorafa,
    ),
    Case(
        "lora_fa",
        lora(),
        "(the same without that rounding, 1e-12 on both sides)",
        lorafa_unrounded,
        eps=1e-12,
    ),
    Case("dora", lora(use_dora=True)),
    Case("pissa", lora(init_lora_weights="pissa"), SHIFTED),
    Case(
        "olora",
        lora(init_lora_weights="olora"),
        f"{SHIFTED}. Of a Conv1D it decomposes the transpose, and fails",
        cannot=("gpt2",),
    ),
    Case(
        "adalora",
        adalora,
        "divides by r + 0.00001, and closes too many components where importances are equal (compared without closing)",
    ),
    Case("vera", vera, "draws A and B from a seed of its own (they were copied)", ours={}),
    Case("miss", miss, "refuses Conv1D", ours={}, cannot=("gpt2",)),
    Case("fourierft", fourierft, ours={"r": R * 8}),
    Case("ia3", ia3, ours={}, faster=10.0),
    Case("hra", hra, "refuses Conv1D", ours={}, cannot=("gpt2",)),
    Case(
        "oft",
        oft,
        "by default sums the first terms of a series, of which the result is not quite orthogonal; takes another block "
        "size where the one asked for does not divide; refuses Conv1D",
        ours={},
        cannot=("gpt2",),
    ),
    Case(
        "oft",
        boft,
        "(PEFT's BOFT, which has one factor where it cannot compile its kernel, and trains lengths too; "
        "these were held; refuses Conv1D)",
        without_lengths,
        ours={},
        cannot=("gpt2",),
    ),
    Case("loha", loha, "refuses Conv1D", cannot=("gpt2",)),
    Case("lokr", lokr(R), "refuses Conv1D", cannot=("gpt2",)),
    Case(
        "lokr", lokr(2), "(the same with a thin W2)", ours={"alpha": float(ALPHA), "r": 2}, cannot=("gpt2",)
    ),
    Case("vb_lora", vb_lora, ours={"delta": {"vb_lora": {"vectors": 16, "length": 8}}}),
)


def pair(case: Case, kind: str) -> tuple[nn.Module, Adapter, Any]:
    """Our model, its adapter, and PEFT's model, all at the start, with our tensors."""
    model = tiny.model(kind)
    recipe = AdapterRecipe.model_validate({"method": case.method, "r": R, **case.ours})
    adapter = inject.inject(model, plan.make(recipe, model, models.ends_of(model)))
    theirs = by_peft(case, kind)
    with torch.no_grad():
        for key, tensor in adapter.shared.items():
            tensor.copy_(shared(theirs, key))
        give(adapter, theirs)
    return model, adapter, theirs


def by_peft(case: Case, kind: str) -> Any:
    """PEFT's model at PEFT's start."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT about what it was asked for
        return peft.get_peft_model(tiny.model(kind), case.config(kind)).eval()


@torch.no_grad()
def give(adapter: Adapter, theirs: Any) -> None:
    """Copy our tensors into PEFT's."""
    common = {id(tensor) for tensor in adapter.shared.values()}
    for key, tensor in adapter.shared.items():
        shared(theirs, key).copy_(tensor)
    names = NAMES | PAIRS.get(adapter.plan.method.delta.name, {})
    for name, layer in adapter.layers.items():
        module = theirs.base_model.model.get_submodule(name)
        for key, tensor in layer.own_tensors().items():
            if id(tensor) not in common and key in names:
                place(module, names[key], tensor)


def shared(theirs: Any, key: str) -> Tensor:
    """PEFT's tensor of several layers."""
    return getattr(theirs.base_model, SHARED[key])["default"]


def place(module: Any, name: str, tensor: Tensor) -> None:
    """Into the one of a layer."""
    if hasattr(module, "miss_block"):
        module.miss_block["default"].copy_(tensor.t())
        return
    if hasattr(module, "boft_R"):
        matrices = module.boft_R["default"]
        rows, columns = torch.triu_indices(R, R, 1)
        matrices.zero_()
        matrices[..., rows, columns], matrices[..., columns, rows] = tensor, -tensor
        return
    found = getattr(module, name)["default"]
    target: Any = found.weight if isinstance(found, nn.Module) else found
    target.copy_(tensor.t() if name == "hra_u" else tensor.view_as(target))


def largest(found: Tensor, expected: Tensor, size: Tensor | None = None) -> float:
    """Largest difference over the largest number."""
    return ((found - expected).abs().max() / (expected if size is None else size).abs().max()).item()


def forward_and_merge(case: Case, kind: str) -> tuple[float, float]:
    """Of the logits, and of W where both have merged, as a share of what was learned; every tensor is random."""
    model, adapter, theirs = pair(case, kind)
    with torch.no_grad():
        for parameter in adapter.trainable().values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        give(adapter, theirs)
        x = torch.randint(5, tiny.VOCABULARY, (4, 17))
        forward = largest(model(x).logits, theirs(x).logits)
    originals = {name: adapter.original_weight(name) for name in adapter.layers}
    inject.merge(model, adapter)
    merged = theirs.merge_and_unload()
    weights = [(weight_of(model, name), weight_of(merged, name), W0) for name, W0 in originals.items()]
    return forward, max(largest(mine, other, mine - W0) for mine, other, W0 in weights)


def weight_of(model: nn.Module, name: str) -> Tensor:
    """[out, in]."""
    view = plan.view_of(model.get_submodule(name))
    assert view is not None
    return view[1].weight()


def losses(model: nn.Module, optimizer: Optimizer) -> Tensor:
    """Of 20 steps on the same random tokens, over and over."""
    x = torch.randint(5, tiny.VOCABULARY, (4, 17), generator=torch.Generator().manual_seed(3))
    found: list[float] = []
    for _ in range(STEPS):
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return torch.tensor(found, dtype=torch.float64)


def trained(case: Case, kind: str) -> float:
    """The largest difference between both losses on the way, in nats."""
    model, adapter, theirs = pair(case, kind)
    optimizer, other = optim.make(adapter, TRAIN), case.optimizer(theirs)
    optim.set_learning_rate(optimizer, RATE)
    for group in (*optimizer.param_groups, *other.param_groups):
        group["lr"] *= case.faster
        group["eps"] = case.eps or group["eps"]
    found = losses(model, optimizer)
    assert found[0] - found[-1] > 0.01, "something is learned"
    # Not through PEFT's wrapper: with AdaLoRA it adds a penalty to the loss.
    return (found - losses(theirs.base_model.model, other)).abs().max().item()


def fails(case: Case, kind: str) -> bool:
    """Whether PEFT still cannot compute it."""
    try:
        by_peft(case, kind)(torch.arange(5, 9)[None])
    except (RuntimeError, TypeError):
        return True
    return False


def measured(case: Case, kind: str) -> tuple[float, float, float] | None:
    """Forward, merged weights, losses; None where PEFT cannot."""
    if kind in case.cannot:
        assert fails(case, kind), f"{case.method} on {kind}: PEFT can do it now, compare it"
        return None
    torch.manual_seed(0)
    return *forward_and_merge(case, kind), trained(case, kind)


def row(case: Case) -> str:
    """One method; Llama / GPT-2 in every cell."""
    found = [measured(case, kind) for kind in KINDS]
    cells = [" / ".join("—" if each is None else number(each[i]) for each in found) for i in range(3)]
    return f"| `{case.method}` | {' | '.join(cells)} | {case.differs} |"


def number(value: float) -> str:
    """Two digits."""
    return f"{value:.1e}".replace("e-0", "e-") if value else "0"


def main() -> int:
    """Measure and write."""
    date = datetime.date.today().strftime("%-d %B %Y")
    head = "| `adapter.method` | logits | merged W | losses, nats | what PEFT does otherwise |"
    rows = "\n".join([head, "|---|---|---|---|---|", *(row(case) for case in CASES)])
    versions = f"PEFT {peft.__version__}, torch {torch.__version__.partition('+')[0]}, {date}"
    readme.write("peft", "scripts/peft_agreement.py", f"{rows}\n\n{versions}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
