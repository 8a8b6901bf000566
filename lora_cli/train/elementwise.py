"""Norms and gated MLPs that keep less for the backward pass: what is elementwise is computed there once more.

As transformers writes it, down(act(gate(x)) · up(x)) keeps act(gate(x)) and the product besides gate(x) and up(x), and
a norm its input and its output, the former in float32: four tenths of all that a Llama keeps. arXiv:2002.05202
"""

import operator
import re
from dataclasses import astuple, dataclass
from typing import Any

from torch import Tensor, fx, nn

from lora_cli.adapter.again import again
from lora_cli.blocks import blocks

GATED = re.compile(r"(?P<down>\w+)\((?P<act>\w+)\((?P<gate>\w+)\(x\)\) \* (?P<up>\w+)\(x\)\)")
"""What a module computes, as `expression` writes it."""


@dataclass(frozen=True)
class Names:
    """Of the modules in a gated MLP."""

    gate: str
    act: str
    up: str
    down: str


class GatedMLP(nn.Module):
    """Computes, to the bit, what the MLP did whose modules it takes over, under the same names."""

    def __init__(self, mlp: nn.Module, names: Names) -> None:
        """Nothing is copied."""
        super().__init__()
        self.names = names
        for name, module in mlp.named_children():
            self.add_module(name, module)
        self.train(mlp.training)

    def forward(self, x: Tensor) -> Tensor:
        """down(act(gate(x)) · up(x))."""
        modules: Any = self._modules
        gate, act, up, down = (modules[name] for name in astuple(self.names))
        return down(again(lambda g, u: act(g) * u, gate(x), up(x)))


class Norm(nn.Module):
    """Computes what a norm does, whose parameters it has under the same names."""

    def __init__(self, norm: nn.Module) -> None:
        """Nothing is copied."""
        super().__init__()
        self._parameters, self._buffers = norm._parameters, norm._buffers
        self.training = norm.training
        vars(self)["norm"] = norm  # not as a child: that would have names of its own

    def forward(self, x: Tensor) -> Tensor:
        """As the norm does."""
        return again(vars(self)["norm"], x)


def keep_less(model: nn.Module) -> None:
    """Exchange the gated MLPs and the frozen norms in the blocks of a model; every other module stays what it is."""
    others: set[type[nn.Module]] = set()
    for block in blocks(model):
        for name, module in [*block.named_modules()]:
            names = None if type(module) in others else names_of(module)
            if names is None:
                others.add(type(module))
            elif not any(p.requires_grad for p in module.get_submodule(names.act).parameters()):
                block.set_submodule(name, GatedMLP(module, names))
            if _is_frozen_norm(module):
                block.set_submodule(name, Norm(module))


def _is_frozen_norm(module: nn.Module) -> bool:
    """Whether it is one, and computes nothing but its output."""
    plain = (
        not module._modules and not module._buffers and not any(p.requires_grad for p in module.parameters())
    )
    return plain and type(module).__name__.endswith("Norm")


def names_of(module: nn.Module) -> Names | None:
    """The names by which a module computes down(act(gate(x)) · up(x)); None where it does anything else."""
    if len(module._modules) != 4:
        return None
    try:
        nodes = [*_Tracer().trace(module).nodes]
    except Exception:  # foreign code fails in its own way: what asks for values cannot be traced
        return None
    if sum(node.op == "placeholder" for node in nodes) != 1:
        return None
    found = GATED.fullmatch(expression(nodes[-1]))
    return Names(**found.groupdict()) if found else None


class _Tracer(fx.Tracer):
    """Looks at a module, not into those that it is made of."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Always."""
        return True


def expression(node: Any) -> str:
    """What a node of the graph of a module with one input x computes; "?" stands for what is of no interest here."""
    arguments = [expression(each) for each in node.args if isinstance(each, fx.Node)]
    if node.op == "placeholder":
        return "x"
    if node.kwargs or len(arguments) != len(node.args):
        return "?"
    if node.op == "output":
        return arguments[0]
    if node.op == "call_module":
        return f"{node.target}({', '.join(arguments)})"
    return " * ".join(arguments) if node.target is operator.mul else "?"
