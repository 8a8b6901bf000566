"""A path on the command line -> a model in memory, with its adapters. Shared by the commands after training."""

import itertools
import json
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lora_cli import model as models
from lora_cli.adapter import files, peft_format, rules
from lora_cli.adapter.files import Saved
from lora_cli.adapter.inject import Adapter, depends_on_input, inject
from lora_cli.adapter.plan import Plan, to_quantise
from lora_cli.errors import ExitCode, UserError
from lora_cli.model import LanguageModel
from lora_cli.parts import Part
from lora_cli.presets import Method
from lora_cli.recipe.load import load
from lora_cli.recipe.schema import ModelRecipe, Recipe

RECIPE, TEMPLATE = "recipe.yaml", "chat_template.jinja"
"""In an adapter folder: what it was trained with, and the chat template where the recipe names a file."""
ORIGINAL = "merge it onto the original weights (lora merge --onto original)"


@dataclass(frozen=True)
class Opened:
    """A base and the adapters on it; the first is active."""

    language: LanguageModel
    adapters: dict[str, Adapter]
    saved: dict[str, Saved]
    recipe: Recipe | None
    """The recipe that the first adapter was trained with, when it is known."""

    def use(self, name: str | None) -> None:
        """Let the model compute with this adapter alone, or with None as the base."""
        for adapter in self.adapters.values():
            adapter.deactivate()
        if name is not None:
            self.adapters[name].activate()


def open_model(
    paths: Sequence[Path],
    *,
    base: str | None = None,
    dtype: str | None = None,
    device: torch.device | None = None,
    quantize: str | None = None,
    bits: float | None = None,
    original: bool = False,
) -> Opened:
    """Load the base once and put every adapter of `paths` on it.

    Args:
        paths: adapter folders, run folders, or one model folder (or Hub id) without an adapter.
        base: use this model instead of the one the adapter names.
        dtype: how the base is kept, as in a recipe; default: as it was trained, or `auto`.
        device: where; default: the CPU.
        quantize: what the linear layers of a plain model are kept in; an adapter says itself what its base is.
        bits: that a weight of these takes on average, where each layer gets its own.
        original: put the adapters on the base as it is on disk, even where they were trained on a quantised one.

    Raises:
        UserError: a path is none of these, or the adapters have different bases.
    """
    folders = [adapter_folder(path) for path in paths]
    adapters = [folder for folder in folders if folder is not None]
    if len(adapters) < len(paths):
        _only_one(paths)
        named = {"name": base or str(paths[0]), "dtype": dtype or "auto", "quantize": quantize, "bits": bits}
        with named_by("--base" if base else str(paths[0])):
            return Opened(_plain(ModelRecipe.model_validate(named), device), {}, {}, None)
    saved = {name: files.read(folder) for name, folder in _named(adapters).items()}
    trained = trained_with(adapters[0])
    _check_together(saved)
    wanted = base_of(saved, trained, base, dtype, original)
    with named_by("--base" if base else str(adapters[0] / files.CONFIG)):
        language = models.load(_attending(wanted, device), device)
    opened = Opened(language, {}, saved, trained)
    for name, each in saved.items():
        opened.adapters[name] = _put_on(language, each, device, original)
        opened.use(None)  # the next one has to find the base's own parameters
    opened.use(next(iter(saved)))
    return opened


@contextmanager
def named_by(where: str) -> Generator[None]:
    """Inside the block an error about the model that a recipe names is one about what names it here."""
    try:
        yield
    except UserError as error:
        fixes = {
            "model.name": error.fix,
            "model.quantize": "give the plain model: it is quantised when it is loaded",
        }
        if error.where not in fixes:
            raise
        raise UserError(error.what, where=where, fix=fixes[error.where], code=error.code) from error


def best_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def adapter_folder(path: Path) -> Path | None:
    """The adapter in `path`: the folder itself, or `adapter/` of a run folder; None for a plain model."""
    for folder in (path, path / "adapter"):
        if (folder / files.CONFIG).is_file():
            return folder
    if (path / "recipe.yaml").is_file():
        fix = "train it to its end first: lora train ... --resume"
        raise UserError("this run has no adapter yet", where=str(path), fix=fix, code=ExitCode.MODEL)
    return None


def adapter_in(path: Path) -> Path:
    """The adapter folder that a command needs.

    Raises:
        UserError: there is none, as in a plain or merged model.
    """
    folder = adapter_folder(path)
    if folder is None:
        what = "holds no adapter" if path.exists() else "there is no such folder"
        fix = "give the folder of an adapter or of a run; a merged model has nothing left to merge or export"
        raise UserError(what, where=str(path), fix=fix, code=ExitCode.MODEL)
    return folder


def refuse_routed(folder: Path) -> None:
    """Refuse an adapter that no weight and no other format can stand for, before its base is loaded.

    Raises:
        UserError: it adds something else for every input.
    """
    method = files.method_of(files.read(folder))
    if not rules.is_mergeable(method):
        raise depends_on_input(method.name, str(folder))


def other_codes(saved: Saved, packed: bool) -> UserError:
    """The error that a base is quantised in another way than when an adapter was trained; `packed`: in its files."""
    if packed:
        what = "its files hold other codes than when it was trained"
        fix = "name the model that it was trained on with --base"
    else:
        what = "its base is quantised to other codes than when it was trained"
        fix = f"{ORIGINAL}, or use the files that it was trained with, and, for nf4, that bitsandbytes"
    what = f"does not fit this model: {what}"
    return UserError(what, where=str(saved.folder), fix=fix, code=ExitCode.MODEL)


def refuse_inside(output: Path, *sources: Path) -> None:
    """Refuse to write into what is read.

    Raises:
        UserError: `output` is one of these folders or lies in one.
    """
    for source in sources:
        if output.resolve().is_relative_to(source.resolve()):
            what, fix = f"lies in {source}, which is never written to", "name another folder with --output"
            raise UserError(what, where=str(output), fix=fix, code=ExitCode.DISK)


def _plain(recipe: ModelRecipe, device: torch.device | None) -> LanguageModel:
    """A model without an adapter, quantised where that is asked for."""
    language = models.load(recipe, device)
    if recipe.quantize is not None:
        method = Method(name="lora", base=Part(name=recipe.quantize))
        quantised = to_quantise(method, language.model, language.ends, ())
        inject(language.model, Plan(method, (), ends=language.ends, quantised=quantised, budget=recipe.bits))
        language.model.to(device)  # pyright: ignore[reportArgumentType]
    return language


def _put_on(language: LanguageModel, saved: Saved, device: torch.device | None, original: bool) -> Adapter:
    """Inject a saved adapter into a model that is in memory, and make the base what it was trained on.

    Raises:
        UserError: the adapter does not fit, or the base is quantised to other codes than then.
    """
    plan = files.plan_of(saved, language.model, language.ends)
    if original:
        plan = replace(plan, method=replace(plan.method, base=None), quantised={})
    adapter = inject(language.model, plan, taken=files.taken_of(saved, language.model))
    if not original and not saved.fits_codes(adapter.codes):
        raise other_codes(saved, packed=plan.method.base is None)
    language.model.to(device or torch.device("cpu"))  # pyright: ignore[reportArgumentType]
    files.fill(adapter, saved)
    return adapter


def _check_together(saved: dict[str, Saved]) -> None:
    """Refuse adapters that cannot be on one base in memory.

    Raises:
        UserError: their bases are quantised differently, or one of them had a part of it taken off before.
    """
    kept = {str((each.ours.parts.get("base"), each.ours.formats)) for each in saved.values()}
    taken = any(peft_format.taken_of(each.tensors) for each in saved.values())
    if len(saved) > 1 and (taken or len(kept) > 1):
        what = "the adapters are for bases that are quantised in different ways"
        raise UserError(what, fix="open them one at a time")


def _named(folders: Sequence[Path]) -> dict[str, Path]:
    """Adapters are called what their folder is called, or the run folder around `adapter`; numbered when alike."""
    named: dict[str, Path] = {}
    for folder in folders:
        here = folder.resolve()
        first = (here.parent.name if here.name == "adapter" else here.name).replace(".", "-")
        names = itertools.chain([first], (f"{first}-{number}" for number in itertools.count(2)))
        named[next(name for name in names if name not in named)] = folder
    return named


def trained_with(folder: Path, overrides: Sequence[str] = ()) -> Recipe | None:
    """The recipe in an adapter folder, with the chat template that was kept beside it; PEFT writes none."""
    recipe, template = folder / RECIPE, folder / TEMPLATE
    if not recipe.is_file():
        return None
    kept = [f"data.chat_template={json.dumps(str(template))}"] if template.is_file() else []
    return load(recipe, [*kept, *overrides]).recipe


def base_of(
    saved: dict[str, Saved],
    trained: Recipe | None,
    base: str | None,
    dtype: str | None,
    original: bool = False,
) -> ModelRecipe:
    """The model that adapters are on.

    Raises:
        UserError: they are on different ones, or name none.
    """
    names = {each.base for each in saved.values()}
    if base is None and len(names) > 1:
        raise UserError(f"the adapters have different bases: {', '.join(sorted(map(str, names)))}")
    first = next(iter(saved.values()))
    name = base or first.base
    if name is None:
        raise UserError(
            "the adapter does not name its base", where=str(first.folder), fix="give it with --base"
        )
    known = trained.model if trained and base is None else ModelRecipe.model_validate({"name": name})
    revision = known.revision or (first.config.revision if base in (None, first.base) else None)
    added = {each.ours.add_tokens for each in saved.values()}
    if len(added) > 1:
        raise UserError("the adapters add different tokens to the model", fix="open them one at a time")
    (tokens,) = added
    apart = any(each.splits_experts for each in saved.values())
    quantised = first.ours.parts.get("base")
    quantize = quantised[0].name if quantised and not original else None
    same = first.ours.codes_of if quantize is not None else None
    kept = {
        "dtype": dtype or same or known.dtype,
        "add_tokens": tokens,
        "quantize": quantize,
        "split_experts": apart,
    }
    return known.model_copy(update={"name": name, "revision": revision, **kept})


def _attending(recipe: ModelRecipe, device: torch.device | None) -> ModelRecipe:
    """Trained with flash attention on a GPU, used on a CPU: another implementation computes the same."""
    on_gpu = device is not None and device.type == "cuda"
    flash = recipe.attention == "flash_attention_2"
    return recipe.model_copy(update={"attention": "auto"}) if flash and not on_gpu else recipe


def _only_one(paths: Sequence[Path]) -> None:
    if len(paths) != 1:
        raise UserError("give one model, or adapters of one model", where=", ".join(map(str, paths)))
