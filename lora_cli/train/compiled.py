"""Blocks compiled by torch.compile, piece by piece: attention, MLP and norms, each for itself.

Not whole blocks: one that is computed again in the backward pass would not be compiled at all. Attention over packed
documents stays as it is, so that a block is broken there once and other lengths compile nothing anew. The modules are
compiled in place: no parameter has another name. Evaluation and generation run without.
"""

import importlib.util
import os
import shutil
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lora_cli.adapter.quantised import Quantised
from lora_cli.blocks import blocks
from lora_cli.errors import ExitCode, UserError
from lora_cli.presets import Method
from lora_cli.recipe.schema import Recipe

KEY = "train.compile"
HELD = {
    "delta": {"lowrank"},
    "combine": {"add", "dora"},
    "rank": {"fixed"},
    "attention": {"full"},
    "lifecycle": set[str](),
}
"""Of the axes that decide what a layer computes, and when it changes: the parts that tests hold to come out right."""


def check(recipe: Recipe, method: Method) -> None:
    """Refuse what is not known to come out of the compiler right, and a machine that has none.

    Raises:
        UserError: a layer computes otherwise than LoRA or DoRA, or changes between steps; the base is quantised, taken
            apart or shared out; or PyTorch has nothing to compile with here.
    """
    chosen = method.chosen()
    other = [
        f"adapter.{axis}: {part.name}"
        for axis, held in HELD.items()
        for part in chosen[axis]
        if part.name not in held
    ]
    if method.base is not None:
        other.append(f"model.quantize: {method.base.name}")
    if recipe.model.split_experts:
        other.append("model.split_experts: true")
    if recipe.train.parallel == "fsdp":
        other.append("train.parallel: fsdp")
    if other:
        raise UserError(f"{other[0]} is not compiled", where=KEY, fix="leave it out")
    _require(torch.cuda.is_available())


def _require(gpu: bool) -> None:
    """Refuse where PyTorch has nothing to compile with: it looks for these, too.

    Raises:
        UserError: there is no C++ compiler, or for a GPU no Triton.
    """
    named = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(named) is None:
        fix = "install g++, or name a compiler in CXX; or leave it out"
        raise UserError(f"there is no C++ compiler {named}", where=KEY, fix=fix)
    if gpu and importlib.util.find_spec("triton") is None:
        raise UserError("there is no Triton", where=KEY, fix="pip install triton; or leave it out")


def compile_blocks(model: PreTrainedModel, backend: Any = "inductor") -> None:
    """Let the pieces of all blocks be compiled when they are first used.

    Raises:
        UserError: the model has no blocks that are known as such, or is stored in few bits.
    """
    if any(isinstance(module, Quantised) for module in model.modules()):
        what = "a base in few bits is not compiled"
        raise UserError(what, where=KEY, fix="leave it out", code=ExitCode.MODEL)
    pieces = [piece for block in blocks(model) for piece in block.children()]
    if not pieces:
        what, fix = f"{model.config.model_type} has no blocks that could be compiled", "leave it out"
        raise UserError(what, where=KEY, fix=fix, code=ExitCode.MODEL)
    name = str(model.config._attn_implementation)
    if name.startswith("lora_"):  # asks for numbers, or for as many pieces as there are documents
        AttentionInterface.register(name, torch.compiler.disable(ALL_ATTENTION_FUNCTIONS[name]))
    _settle()
    for piece in pieces:
        piece.compile(backend=backend, dynamic=True)


def _settle() -> None:
    """How this process compiles."""
    from torch._dynamo import config as dynamo  # here, because it takes a second
    from torch._inductor import config as inductor

    # Scales are numbers, not inputs of a graph: PyTorch 2.13 does not take DoRA otherwise.
    dynamo.specialize_float = True
    # A graph for each r there is, not for the first 8.
    dynamo.recompile_limit = dynamo.accumulated_recompile_limit
    # The same is dropped as without.
    inductor.fallback_random = True


@contextmanager
def as_written(compiled: bool) -> Generator[None]:
    """Inside the block nothing is compiled, nor what is compiled used."""
    if not compiled:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def explained(compiled: bool) -> Generator[None]:
    """Say in one line what PyTorch's compiler says in many.

    Raises:
        UserError: it has failed.
    """
    if not compiled:
        yield
        return
    from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        inside = error.inner_exception if isinstance(error, BackendCompilerFailed) else error
        first = str(inside).strip().split("\n")[0]
        what = f"PyTorch's compiler has failed: {first}"
        raise UserError(what, where=KEY, fix="leave it out", code=ExitCode.MODEL) from error
