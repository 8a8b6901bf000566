"""dropbp: in every step some residual branches (attention, MLP) have no backward pass. arXiv:2402.17812

The forward pass is the same to the bit; a dropped branch keeps no activations and costs no backward, which is most of
the time that LoRA can save. Its tensors wait for another step, and what lies below learns through the residual
stream. Branches are drawn by lot, each with the same chance; one with trained tensors is always left. (The authors
can also give each branch a chance of its own, by how much the gradient changes without it.) The loss is that of the
whole model. Works with any method.
"""

from collections.abc import Iterator
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from lora_cli.adapter.lifecycle import Lifecycle, Run
from lora_cli.adapter.seed import generator_of
from lora_cli.blocks import blocks
from lora_cli.errors import ExitCode, UserError
from lora_cli.recipe.schema import Section

forbids = {
    "lifecycle.restart": "a start that is measured anew would see no gradient in what is dropped",
    "train.parallel": "a base that is shared out is gathered for the backward pass, which is another one in every step",
}


class Settings(Section):
    """Settings in a recipe: `{dropbp: {rate: 0.5}}`."""

    rate: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.5, description="Chance of a branch to be dropped from the backward pass of a step."
    )


class DropBP(Lifecycle):
    """Draws the branches of a step between steps, from (seed, step)."""

    rehearsable = False

    def __init__(self, rate: float) -> None:
        """As in a recipe."""
        self.chance = rate
        self.branches: list[nn.Module] = []
        self.dropped = torch.zeros(0, dtype=torch.bool)
        """Of each branch, in the next step; on the CPU."""
        self.outside: list[bool] = []
        """Whether gradients were wanted around the branches that are being computed."""

    def setup(self, run: Run) -> None:
        """Find the branches, watch them, and draw those of the first step."""
        found = blocks(run.adapter.model)
        self.branches = [branch for block in found for branch in branches_of(block)]
        self.learning = torch.tensor([_learns(branch) for branch in self.branches], dtype=torch.bool)
        if not self.learning.any():
            raise _unfit("no residual branch with trained tensors was found")
        for branch in self.branches:
            branch.register_forward_pre_hook(self._enter)
            branch.register_forward_hook(self._leave, always_call=True)
        self.dropped = torch.ones(len(self.branches), dtype=torch.bool)
        if not _flows_past(run.adapter.model, found[0]):
            raise _unfit(
                "its blocks add the residual inside of a branch, so that no gradient would flow past one"
            )
        self._draw(run)

    def _enter(self, branch: nn.Module, inputs: Any) -> None:
        self.outside.append(torch.is_grad_enabled())
        if branch.training and self._is_dropped(branch):
            torch.set_grad_enabled(False)

    def _leave(self, branch: nn.Module, inputs: Any, output: Any) -> None:
        torch.set_grad_enabled(self.outside.pop())

    def _is_dropped(self, branch: nn.Module) -> bool:
        return any(branch is each for each in self._chosen())

    def _chosen(self) -> Iterator[nn.Module]:
        return (branch for branch, gone in zip(self.branches, self.dropped.tolist(), strict=True) if gone)

    def gradients(self, run: Run) -> None:
        """What was dropped has no gradient, which is another thing than one of zero: it does not move at all."""
        for branch in self._chosen():
            for parameter in branch.parameters():
                parameter.grad = None

    def stepped(self, run: Run) -> None:
        """The branches of the next step."""
        self._draw(run)

    def _draw(self, run: Run) -> None:
        self.dropped = self._drawn(run, run.step, self.learning)

    def _drawn(self, run: Run, step: int, learning: Tensor) -> Tensor:
        lots = torch.rand(len(learning), generator=generator_of(run.train.seed, f"dropbp@{step}"))
        return drawn(lots, self.chance, learning)

    def backward(self, run: Run) -> tuple[float, float]:
        """In the first steps of the run, which are as the others."""
        found = [branch for block in blocks(run.adapter.model) for branch in branches_of(block)]
        learning = torch.tensor([_learns(branch) for branch in found], dtype=torch.bool)
        left = [
            1 - self._drawn(run, step, learning).float().mean() for step in range(min(run.total_steps, 500))
        ]
        return float(sum(left) / len(left)), float(max(left))

    def state(self) -> dict[str, Tensor]:
        """The branches of the next step."""
        return {"dropped": self.dropped}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Put them back."""
        self.dropped = state["dropped"]


make = DropBP


def drawn(lots: Tensor, rate: float, learning: Tensor) -> Tensor:
    """The branches whose lot is below `rate`, but never all of those that have something to learn.

    Args:
        lots: of each branch, uniform in [0, 1).
        rate: chance of a branch to be dropped.
        learning: whether it has trained tensors.
    """
    dropped = lots < rate
    if dropped[learning].all():
        dropped[lots.masked_fill(~learning, -1).argmax()] = False
    return dropped


def branches_of(block: nn.Module) -> list[nn.Module]:
    """What a block adds to the residual stream: the modules in it that consist of others."""
    return [child for child in block.children() if any(True for _ in child.children())]


def _learns(branch: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in branch.parameters())


def _flows_past(model: nn.Module, first: nn.Module) -> bool:
    """Whether the output still depends on the input of the first block when every branch is dropped."""
    seen: list[Tensor] = []

    def leaf(block: nn.Module, inputs: Any) -> Any:
        seen.append(inputs[0].detach().requires_grad_())
        return (seen[0], *inputs[1:])

    was_training = model.training
    handle = first.register_forward_pre_hook(leaf)
    try:
        with torch.enable_grad():
            logits = model.train()(input_ids=_two_tokens(model), use_cache=False).logits
            if not logits.requires_grad:
                return False
            return torch.autograd.grad(logits.sum(), seen, allow_unused=True)[0] is not None
    finally:
        handle.remove()
        model.train(was_training)


def _two_tokens(model: nn.Module) -> Tensor:
    return torch.tensor([[1, 2]], device=next(model.parameters()).device)


def _unfit(what: str) -> UserError:
    fix = "leave it out: this model is built in another way"
    return UserError(what, where="adapter.lifecycle: dropbp", fix=fix, code=ExitCode.MODEL)
