"""key_drop: hides some keys from all queries of a head, drops some numbers inside the MLP. arXiv:2403.00812

HiddenKey without its second pass, which is `lifecycle: r_drop`. Column by column before the softmax, so that the
weights of what is left add up to 1; a token that would see nothing sees everything. Inside the MLP single numbers are
dropped and the rest scaled, as by dropout. Both rest in evaluation.
"""

from collections.abc import Callable, Iterator
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from lora_cli import parts
from lora_cli.adapter.layer import Adapted
from lora_cli.errors import ExitCode, UserError
from lora_cli.recipe.schema import Section


class Settings(Section):
    """Settings in a recipe: `{key_drop: {key: 0.1, hidden: 0.1}}`."""

    key: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.1, description="Probability that a head hides a key."
    )
    hidden: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.1, description="Probability that a number inside the MLP is dropped."
    )


def make(model: Any, key: float, hidden: float) -> Callable[..., Tensor] | None:
    """Attention that hides keys; what is read by the last layer of each MLP is dropped by a hook.

    Raises:
        UserError: the model has no such layers.
    """
    if hidden:
        found = list(narrowing(model))
        if not found:
            what, fix = f"{model.config.model_type} has no plain MLPs", "set hidden: 0"
            raise UserError(what, where="adapter.attention: key_drop", fix=fix, code=ExitCode.MODEL)
        for module in found:
            module.register_forward_pre_hook(
                lambda module, inputs: (dropped(inputs[0], hidden, module.training),)
            )
    return None if key == 0 else lambda *asked: attend(key, *asked)


def drops(key: float, hidden: float) -> bool:
    """Whether anything is."""
    return key > 0 or hidden > 0


def attend(
    p: float,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    settings: dict[str, Any],
) -> Tensor:
    """Attention [batch, tokens, heads, width] with hidden keys."""
    rows, heads, tokens, _ = query.shape
    visible = (
        torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril() if mask is None else mask
    )
    seen = hide(visible, torch.rand(rows, heads, 1, tokens, device=query.device) < p)
    how = {"scale": settings.get("scaling"), "dropout_p": settings.get("dropout", 0.0)}
    return F.scaled_dot_product_attention(query, key, value, seen, **how).transpose(1, 2)


def hide(visible: Tensor, keys: Tensor) -> Tensor:
    """What is seen without these keys [rows, heads, 1, tokens]; where that would be nothing, what is visible."""
    left = visible & ~keys
    return torch.where(left.any(-1, keepdim=True), left, visible)


def dropped(x: Tensor, p: float, training: bool) -> Tensor:
    """Dropout of single numbers."""
    return F.dropout(x, p, training)


def narrowing(model: Any) -> Iterator[nn.Module]:
    """The layers that read what is inside an MLP."""
    config = model.config.get_text_config()
    width = (
        getattr(config, "intermediate_size", None)
        or getattr(config, "n_inner", None)
        or 4 * config.hidden_size
    )
    inside = {id(module.base_layer) for module in model.modules() if isinstance(module, Adapted)}
    views = [parts.load("base", name) for name in parts.names("base")]
    for module in model.modules():
        plain = module.base_layer if isinstance(module, Adapted) else module
        view = next((view.View(plain) for view in views if isinstance(plain, view.wraps)), None)
        if view is None or view.reads_ids or id(module) in inside:
            continue
        if (view.in_features, view.out_features) == (width, config.hidden_size):
            yield module
