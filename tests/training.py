"""Training in memory, a tiny model on random rows, in steps that a test can look between."""

import copy
import random
from functools import cache
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from lora_cli import model as models
from lora_cli import parts
from lora_cli.adapter import inject, peft_format
from lora_cli.adapter import plan as plans
from lora_cli.data.example import Batch, Example
from lora_cli.data.pack import epoch_order, micro_batches
from lora_cli.recipe.schema import AdapterRecipe, TrainRecipe
from lora_cli.train import loop, optim
from lora_cli.train.elementwise import keep_less
from lora_cli.train.loss import loss_sum
from lora_cli.train.measure import measure
from lora_cli.train.recompute import recompute
from tests import tiny

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
"""Of GPT-2, which has some of its own."""


def fresh() -> torch.Generator:
    """Other numbers in every session of tests; pytest-randomly prints the seed that they follow from."""
    return torch.Generator().manual_seed(random.getrandbits(48))


class Rows(list[Example]):
    """Examples in memory, with what the loop asks of those on disk."""

    def __init__(self, count: int = 24) -> None:
        """Rows of 5 to 9 random tokens, all but the first trained."""
        generator = fresh()
        for number in range(count):
            length = int(torch.randint(5, 10, (), generator=generator))
            tokens = torch.randint(5, tiny.VOCABULARY, (length,), generator=generator).tolist()
            self.append(Example(tuple(tokens), (False, *[True] * (length - 1)), f"memory:{number}"))
        self.lengths = np.array([len(example.input_ids) for example in self])
        self.trained_counts = self.lengths - 1


@cache
def accelerator() -> Accelerator:
    """One for all tests; it only says where to compute."""
    return Accelerator(cpu=True)


def training(
    adapter: dict[str, Any],
    train: dict[str, Any] | None = None,
    *,
    kind: str = "llama",
    seed: int = 0,
    rows: Rows | None = None,
    **config: Any,
) -> loop.Training:
    """A run about to take its first step. `seed` is that of the model; `config` changes its sizes."""
    model = tiny.model(kind, seed, **({**NO_DROPOUT, **config} if kind == "gpt2" else config))
    recipe = TrainRecipe(**{"batch_size": 4, "max_steps": 12, "max_grad_norm": None, **(train or {})})
    settings = AdapterRecipe(**{"r": 4, **adapter})
    plan = plans.make(settings, model, models.ends_of(model), optimizer=recipe.optimizer)
    examples = rows or Rows()
    init = parts.load("init", plan.method.init.name)
    statistics = {}
    if hasattr(init, "measures"):
        bases = {spec.name: peft_format.base_of(model, spec.name) for spec in plan.layers}
        first = epoch_order(examples, recipe.seed, 0)[: recipe.batch_size]
        statistics = measure(init.measures, model, bases, examples, first, precision=torch.float32, pad_id=0)
    made = inject.inject(model, plan, recipe.seed, statistics)
    keep_less(model)
    if asked := recipe.gradient_checkpointing:
        recompute(model, None if asked is True else asked)
    model.train()
    return loop.Training(
        model=model,
        adapter=made,
        examples=examples,
        optimizer=optim.make(made, recipe),
        train=recipe,
        accelerator=accelerator(),
        precision=torch.float32,
        packing=False,
        pad_id=0,
    )


def batch_of(run: loop.Training, step: int) -> Batch:
    """All rows of step 0, 1, ... at once."""
    rows = run.rows(step)
    return micro_batches(run.examples, rows, max_tokens=None, max_rows=None, packing=False, pad_id=0)[0]


def plain(run: loop.Training) -> PreTrainedModel:
    """A copy of the model without its adapter, every parameter trainable."""
    with inject.without_adapters(run.adapter):
        return copy.deepcopy(run.model).requires_grad_(True)


def gradients(run: loop.Training, model: PreTrainedModel, step: int) -> dict[str, Tensor]:
    """Layer -> ∂L/∂W in float64 [out, in] of a plain model on the rows of a step, by autograd."""
    wide = copy.deepcopy(model).double()
    loss_of(run, wide, step).backward()
    return {
        name: layer.base.oriented(wide.get_parameter(f"{name}.weight").grad)
        for name, layer in run.adapter.layers.items()
    }


def write(run: loop.Training, model: PreTrainedModel, W: dict[str, Tensor]) -> None:
    """Put W [out, in] in the layers of a plain model."""
    for name, layer in run.adapter.layers.items():
        model.get_parameter(f"{name}.weight").data.copy_(layer.base.oriented(W[name]))


def loss_of(run: loop.Training, model: torch.nn.Module, step: int) -> Tensor:
    """The mean loss of a model on the rows of a step."""
    tokens = int(run.examples.trained_counts[run.rows(step)].sum())
    return loss_sum(model, batch_of(run, step), torch.device("cpu")) / tokens


def weights(run: loop.Training) -> dict[str, Tensor]:
    """Layer -> W0 + ΔW in float64 [out, in], wherever W has moved to."""
    return {name: layer.merged_weight().double() for name, layer in run.adapter.layers.items()}


def originals(run: loop.Training) -> dict[str, Tensor]:
    """Layer -> the base's own W0 in float64 [out, in]."""
    return {name: run.adapter.original_weight(name).double() for name in run.adapter.layers}


def kept_in_the_shape_of_w(model: PreTrainedModel, adapter: inject.Adapter, ids: Tensor) -> list[Tensor]:
    """What a forward pass keeps for the backward pass that is as large as an adapted W0, either way round."""
    shapes = {(spec.out_features, spec.in_features) for spec in adapter.plan.layers}
    shapes |= {shape[::-1] for shape in shapes}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model(ids).logits.sum().backward()
    return [tensor for tensor in kept if tuple(tensor.shape) in shapes]


def distance(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖ (Frobenius)."""
    return (torch.linalg.norm(a.double() - b.double()) / torch.linalg.norm(b.double())).item()


def rank_of(W: Tensor, smallest: float = 1e-5) -> int:
    """Singular values above `smallest` times the largest; 0 for a matrix of zeros."""
    values = torch.linalg.svdvals(W.double())
    return int((values > smallest * values[0]).sum()) if values[0] else 0
