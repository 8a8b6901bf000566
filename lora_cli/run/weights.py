"""W0: what a layer is merged onto. The one place that says so."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lora_cli import model as models
from lora_cli.adapter import inject
from lora_cli.adapter.base import Base
from lora_cli.adapter.plan import view_of
from lora_cli.adapter.quantised import Quantised, View, layer_digest
from lora_cli.model import DTYPES, LanguageModel
from lora_cli.parts import Part
from lora_cli.recipe.schema import ModelRecipe
from lora_cli.stored import Stored, open_stored

Onto = Literal["trained", "original"]
"""Which weights ΔW is added to, where it was trained on a quantised base."""


@dataclass(frozen=True)
class Weights(Mapping[str, Tensor]):
    """Parameter -> W0, read when it is asked for, in the type that the files have it in."""

    stored: Stored
    language: LanguageModel
    """On the meta device, with the tokens that the adapter's recipe adds."""
    old_rows: int
    """Of the embeddings in the files."""
    held_as: dict[str, str]
    """An end of the model that is not in the files -> the end that was tied to it, which is."""
    formats: Mapping[str, Part] = field(default_factory=dict[str, Part])
    """Layer -> what its W0 was quantised to when ΔW was trained; none where it was not, or the files hold the codes."""
    quantised: frozenset[str] = frozenset()
    """The parameters that were codes then."""
    taken: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict[str, tuple[Tensor, Tensor]])
    """Layer -> (B, A) of what was added to them before."""
    codes: dict[str, str] = field(default_factory=dict[str, str])
    """Layer -> hash of its codes, of those that were asked for."""
    recoded: dict[str, bool] = field(default_factory=dict[str, bool])
    """Layer -> whether what was written in its place, quantised again, has the codes that W0' has."""

    def trained(self, name: str) -> Tensor:
        """W0 that ΔW was trained on, float32: the base as it is stored, exactly, or what its codes say."""
        if name not in self.quantised:
            return self.original(name)
        layer = self._coded(name)
        self.codes[name.rpartition(".")[0]] = layer_digest(layer)
        return layer.plain.oriented(View(layer).weight()).contiguous()

    def original(self, name: str) -> Tensor:
        """W0 as it is stored, float32."""
        return self[name].float()

    def compare_codes(self, name: str, written: Tensor) -> None:
        """Note whether what is written in the place of a quantised weight still has its codes."""
        layer = name.rpartition(".")[0]
        if name not in self.quantised or layer not in self.formats:
            return
        base = self._view(layer)
        before, after = (
            self._coded(name),
            inject.quantised(base, base.oriented(written.float()), self.formats[layer], None),
        )
        self.recoded[layer] = torch.equal(before.get_buffer("codes"), after.get_buffer("codes"))

    def _coded(self, name: str) -> Quantised:
        """The layer that was there in training."""
        layer = name.rpartition(".")[0]
        if layer not in self.formats:
            return self.stored.layer(name)
        base, W0, loaded = self._view(layer), self.original(name), self.stored.recipe.dtype
        if loaded in DTYPES:  # training quantised what it had loaded
            W0 = W0.to(DTYPES[loaded]).float()
        return inject.quantised(base, base.oriented(W0), self.formats[layer], self.taken.get(layer))

    def _view(self, layer: str) -> Base:
        view = view_of(self.language.model.get_submodule(layer))
        assert view is not None, "only layers that can be adapted are quantised"
        return view[1]

    def __getitem__(self, name: str) -> Tensor:
        """As it is stored, with rows for new tokens as they were when training began."""
        W, ids = self.stored.parameter(self.held_as.get(name, name)), self.language.new_rows
        rows = self.language.model.get_parameter(name).shape[0] if self._grows(name) else 0
        if rows > W.shape[0]:
            W = torch.cat([W, torch.zeros(rows - W.shape[0], *W.shape[1:], dtype=W.dtype)])
        if ids and name in self._ends():
            models.start_rows(W, self.old_rows, ids)
        return W

    def as_stored(self, name: str) -> bool:
        """Whether the files hold it just so."""
        changed = name in self.quantised or (self.language.new_rows and self._grows(name))
        return name in self.stored.of and not changed

    def dtype(self, name: str) -> torch.dtype:
        """The type that it is stored in."""
        return self.stored.dtype(self.held_as.get(name, name))

    def __iter__(self) -> Iterator[str]:
        """Every parameter, by all its names."""
        return (name for name, _ in self.language.model.named_parameters(remove_duplicate=False))

    def __contains__(self, name: object) -> bool:
        """Whether it is a parameter, and not a buffer; nothing is read to say so."""
        try:
            self.language.model.get_parameter(str(name))
        except AttributeError:
            return False
        return True

    def __len__(self) -> int:
        """Number of them."""
        return sum(1 for _ in self)

    def _grows(self, name: str) -> bool:
        ends = self.language.ends
        return name.rpartition(".")[0] in (ends.embeddings, ends.head)

    def _ends(self) -> tuple[str, str]:
        return f"{self.language.ends.embeddings}.weight", f"{self.language.ends.head}.weight"


def open_weights(recipe: ModelRecipe) -> Weights:
    """Look at a base as an adapter's recipe has it; nothing but headers and the tokenizer is read.

    Raises:
        UserError: the model is missing, damaged, not complete, or not what the recipe says.
    """
    tokenizer = models.load_tokenizer(recipe)
    stored = open_stored(recipe)
    ends = models.ends_of(stored.skeleton)
    names = [f"{end}.weight" for end in (ends.embeddings, ends.head)]
    held = [name for name in names if name in stored.of]
    old_rows = models.end_modules(stored.skeleton)[0].weight.shape[0]
    language = models.with_tokens(stored.skeleton, tokenizer, recipe)
    if recipe.split_experts:
        stored.take_apart()
    held_as = {name: held[0] for name in names if name not in held}
    return Weights(stored, language, old_rows, held_as, quantised=stored.codes)
