"""A base that is shared out among processes: nothing that is learned changes, and each keeps its share."""

import json
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_cli.analyze import devices
from lora_cli.analyze.memory import Case, memory, sharded
from lora_cli.analyze.rehearse import Rows, rehearsal
from lora_cli.blocks import blocks
from lora_cli.errors import ExitCode, UserError
from lora_cli.recipe.schema import Recipe
from lora_cli.run import fit, prepare
from lora_cli.run.train import train
from lora_cli.screen import Screen
from tests import liger, tiny
from tests.bench import Bench, result, root_of
from tests.forking import Forker, forker
from tests.test_methods_quantised import packed
from tests.test_processes import adapter_of, log_of, together

EXACT = {"deterministic": True}
SHARED = {"parallel": "fsdp"}
BLOCKS = 3
BYTES: dict[str, Callable[[int, int], int]] = {
    "nf4": lambda out, inputs: 33 * -(-out * inputs // 64) + 4 * -(-out * inputs // (64 * 256)) + 4 * 256,
    "int8": lambda out, inputs: out * inputs + 4 * out,
}
"""Of a quantised matrix: codes, largest values, their largest values, and a table."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Nine rows, four a step: the last step of an epoch has one row, so that some processes have none."""
    bench = Bench(tmp_path_factory.mktemp("fsdp"))
    for name, (kind, settings) in MODELS.items():
        model = tiny.model(kind, random.getrandbits(16), **settings)
        model = model.bfloat16() if name == "bf16" else model
        model.save_pretrained(bench.folder / name)
        tiny.tokenizer().save_pretrained(bench.folder / name)
    for form in BYTES:
        packed(bench.folder / "llama", bench.folder / f"packed {form}", form)
    return bench


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_hidden_layers": BLOCKS}),
    "tied": ("llama", {"num_hidden_layers": BLOCKS, "tie_word_embeddings": True}),
    "bf16": ("llama", {"num_hidden_layers": BLOCKS}),
    "gpt2": ("gpt2", {}),
    "gemma2": ("gemma2", {}),
}


@pytest.fixture(scope="module")
def processes() -> Iterator[Forker]:
    with forker() as started:
        yield started


def of(bench: Bench, name: str, **sections: dict[str, Any]) -> Recipe:
    """A recipe for one of the models."""
    model = {"name": str(bench.folder / name), **sections.pop("model", {})}
    model |= {"dtype": "bfloat16"} if name == "bf16" else {}
    return bench.recipe(model=model, **sections)


def like(bench: Bench, recipe: Recipe, **train: Any) -> Recipe:
    """The same in another folder, but for some keys of `train`."""
    changed = {"output": bench.recipe().output, "train": recipe.train.model_copy(update=train)}
    return recipe.model_copy(update=changed)


def close(ours: Recipe, theirs: Recipe, tolerance: float) -> None:
    """Adapters and losses."""
    found, expected = adapter_of(ours), adapter_of(theirs)
    for name in expected:
        away = (found[name] - expected[name]).norm()
        assert away <= tolerance * expected[name].norm().clamp_min(1e-3), name
    for mine, other in zip(log_of(ours), log_of(theirs), strict=True):
        key = "loss" if "loss" in mine else "eval_loss"
        assert mine[key] == pytest.approx(other[key], rel=tolerance)


# ---- what is learned -----------------------------------------------------------------------------------------------

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {"train": {"micro_batch_size": 3}}),
    "recomputed": ("llama", {"train": {"gradient_checkpointing": True}}),
    "tied ends": ("tied", {}),
    "new tokens": ("tied", {"model": {"add_tokens": ("<a>", "<b>")}}),
    "trained in full": ("tied", {"adapter": {"train_also": ("norms", "embeddings", "head")}}),
    "adapted ends": ("llama", {"adapter": {"target_modules": ("q_proj", "embed_tokens", "lm_head")}}),
    "dora, transposed": ("gpt2", {"adapter": {"method": "dora", "train_also": ("biases",)}}),
    "logits bent": ("gemma2", {}),
    "two passes": ("llama", {"adapter": {"lifecycle": "r_drop", "dropout": 0.1}}),
    "measured start": ("llama", {"adapter": {"method": "lora_ga"}}),
    "saved as a product with W0": ("llama", {"adapter": {"method": "hra", "dropout": 0.0, "r": 4}}),
    "bf16": ("bf16", {"adapter": {"train_also": ("norms",)}, "train": {"gradient_checkpointing": True}}),
    "nf4": ("llama", {"adapter": {"method": "qdora"}, "train": {"gradient_checkpointing": True}}),
    "nf4, bf16, measured start": ("bf16", {"adapter": {"method": "lqer", "train_also": ("norms",)}}),
    "nf4, part of W0 taken off": ("llama", {"adapter": {"method": "qlora", "init": "pissa"}}),
    "int4": ("bf16", {"model": {"quantize": "int4"}}),
    "nf, bits by layer": (
        "bf16",
        {"adapter": {"method": "lq_lora"}, "model": {"quantize": "nf", "bits": 3.5}},
    ),
    "int8, transposed": ("gpt2", {"model": {"quantize": "int8"}}),
    "int8, bf16": ("bf16", {"model": {"quantize": "int8"}, "train": {"gradient_checkpointing": True}}),
    "int8, saved as a product with W0": (
        "llama",
        {"model": {"quantize": "int8"}, "adapter": {"method": "hra", "dropout": 0.0, "r": 4}},
    ),
    "stored in nf4": ("packed nf4", {}),
    "stored in int8": ("packed int8", {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_that_is_shared_out_learns_the_bytes_of_one_process(bench, processes, kind):
    """With dropout, accumulation, evaluations, and processes without a row; the base is known by the same print."""
    name, sections = KINDS[kind]
    sections = {**sections, "train": {"micro_batch_size": 1, **EXACT, **sections.get("train", {})}}
    alone = of(bench, name, **sections)
    train(alone, Screen.silent())
    shared = like(bench, alone, **SHARED)
    ended = together(processes, bench, shared, random.choice([2, 3]))
    assert not any(ended["codes"]), ended["said"]
    assert "is shared out" in ended["said"]
    assert result(shared) == result(alone)
    ours, theirs = ((root_of(each) / "adapter" / "lora.json").read_bytes() for each in (shared, alone))
    assert ours == theirs


@pytest.mark.parametrize("recomputed", [True, False])
def test_with_kernels_for_norms_and_gates_too(bench, processes, recomputed, monkeypatch):
    sections = {"adapter": {"train_also": ("norms",)}, "train": {"micro_batch_size": 1, **EXACT}}
    alone = of(bench, "gemma2", **sections)
    liger.stand_in(monkeypatch)
    train(alone, Screen.silent())
    shared = like(bench, alone, **SHARED, gradient_checkpointing=recomputed)
    ended = together(processes, bench, shared, 2, within=["with_kernels"])
    assert ended["codes"] == [0, 0], ended["said"]
    assert "is shared out" in ended["said"]
    assert result(shared) == result(alone)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize(("name", "tolerance"), [("llama", 1e-6), ("bf16", 2e-2)])
def test_whatever_the_order_of_sums_it_learns_the_same_as_one_process(
    bench, processes, parallel, name, tolerance
):
    """In bfloat16 the gradient of a micro-batch has 8 bits, and other micro-batches round otherwise."""
    how = {"optimizer": "sgd", "gradient_checkpointing": random.choice([True, False])}
    alone = of(bench, name, adapter={"dropout": 0.0}, train={**how, "micro_batch_size": "auto"})
    train(alone, Screen.silent())
    shared = like(bench, alone, parallel=parallel)
    ended = together(processes, bench, shared, 2)
    assert ended["codes"] == [0, 0], ended["said"]
    close(shared, alone, tolerance)


def test_samples_are_written_by_all_processes_together(bench, processes):
    alone = of(bench, "llama", train=EXACT, eval={"samples": 2, "max_new_tokens": 6})
    train(alone, Screen.silent())
    shared = like(bench, alone, **SHARED)
    ended = together(processes, bench, shared, 2)
    assert ended["codes"] == [0, 0], ended["said"]
    assert result(shared) == result(alone)
    assert ended["said"].count("generated") == 2  # at the end of each of two epochs


# ---- stopping and going on -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["none", "nf4", "int8"])
def test_a_run_goes_on_with_its_base_shared_out_or_not_in_any_number_of_processes(bench, processes, base):
    """One process, then two that share the base out, then two that do not, then one."""
    model, name = {"quantize": base}, random.choice(["llama", "bf16"])
    recipe = of(bench, name, model=model, train={**EXACT, "epochs": 2, "save_steps": 1})
    alone = like(bench, recipe)
    train(alone, Screen.silent())
    stages = ((1, "fsdp", 2), (2, "fsdp", 3), (2, "ddp", 5), (1, "ddp", None))
    for count, parallel, until in stages:
        stage = recipe.model_copy(update={"train": recipe.train.model_copy(update={"parallel": parallel})})
        stop = [] if until is None else ["stops_after", str(until)]
        ended = together(processes, bench, stage, count, within=stop)
        expected = 0 if until is None else ExitCode.INTERRUPTED
        assert ended["codes"] == [expected] * count, ended["said"]
    assert result(recipe) == result(alone)


@pytest.mark.parametrize(("which", "base"), [(0, "none"), (1, "none"), (1, "nf4")])
def test_a_killed_process_ends_the_others_with_one_message_and_the_run_goes_on(bench, processes, which, base):
    recipe = of(bench, "llama", model={"quantize": base}, train={**EXACT, **SHARED, "save_steps": 1})
    within = ["killed_in_a_block", str(which), str(random.randrange(25, 60))]
    ended = together(processes, bench, recipe, 2, within=within)
    assert ended["codes"][which] == -signal.SIGKILL, ended["said"]
    assert ended["codes"][1 - which] == ExitCode.INTERRUPTED
    assert ended["said"].count("error: ") == 1
    assert "another process of this run has ended" in ended["said"]
    alone = like(bench, recipe)
    train(alone, Screen.silent())
    assert together(processes, bench, recipe, 2)["codes"] == [0, 0]
    assert result(recipe) == result(alone)


def test_one_process_that_is_asked_stops_an_evaluation_in_all_of_them(bench, processes):
    recipe = of(bench, "llama", train={**EXACT, **SHARED, "epochs": 2, "eval_steps": 1})
    within = ["asked_while_evaluating", str(random.choice([0, 1]))]
    ended = together(processes, bench, recipe, 2, within=within)
    assert ended["codes"] == [ExitCode.INTERRUPTED] * 2, ended["said"]
    assert "everything is saved" in ended["said"]
    assert not any("eval_loss" in line for line in log_of(recipe))
    alone = like(bench, recipe)
    train(alone, Screen.silent())
    assert together(processes, bench, recipe, 2)["codes"] == [0, 0]
    assert result(recipe) == result(alone)


def test_memory_that_is_short_ends_the_run_and_says_what_to_set(bench, processes):
    recipe = of(bench, "llama", train={**SHARED, "micro_batch_size": 2})
    ended = together(processes, bench, recipe, 2, within=["short_of_memory", "1"], launched=True)
    assert ended["codes"][1] == ExitCode.OUT_OF_MEMORY, ended["said"]
    assert "a smaller train.micro_batch_size" in ended["said"]


# ---- what is kept, and what travels --------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["none", "nf4", "int8"])
def test_each_process_keeps_its_share_and_no_more_than_a_few_blocks_are_gathered_at_once(
    bench, processes, base, tmp_path
):
    count = 9
    model = tiny.model("llama", num_hidden_layers=count, hidden_size=256, intermediate_size=320)
    model.save_pretrained(bench.folder / "deep")
    tiny.tokenizer().save_pretrained(bench.folder / "deep")
    train = {**SHARED, "gradient_checkpointing": random.choice([True, False])}
    recipe = of(bench, "deep", model={"quantize": base}, train=train)
    ended = together(processes, bench, recipe, 2, within=["watched", str(tmp_path)])
    assert ended["codes"] == [0, 0], ended["said"]
    of_blocks = sum(stored(p, base) for block in blocks(model) for p in block.parameters())
    of_ends = sum(p.nbytes for p in model.parameters()) - sum(
        p.nbytes for b in blocks(model) for p in b.parameters()
    )
    of_model = of_ends + of_blocks
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for each in found:
        assert each["whole"] == of_model
        assert each["plain"] == 0, "every parameter of the base is shared out"
        assert each["left"] <= 4 * 7 * count, "the mean of the largest values, which is one number a matrix"
        assert each["codes"] == each["made"], (
            "what is gathered is what was shared out, bytes that are no numbers too"
        )
        # 32 and 48 rows are divided evenly; of 261 rows of embeddings and head one process has one more.
        assert each["held"] == pytest.approx(of_model / 2, rel=1e-2)
        # The ends, the block that computes, and the one that is gathered ahead of its turn.
        assert of_model - of_blocks < each["gathered"] <= of_model - of_blocks + 3 * of_blocks / count
    assert sum(each["held"] for each in found) >= of_model
    weights, whole = foretold(recipe)
    for each in found:
        assert each["held"] == pytest.approx(weights, rel=0.1)
        # A block comes together behind the one at hand, before it is a parameter, where the watch does not see it.
        assert 0.9 * (whole - of_blocks / count) <= each["gathered"] <= 1.1 * whole


def foretold(recipe: Recipe) -> tuple[float, float]:
    """Bytes of the base that each of two processes is said to keep, and to have whole while a step computes."""
    rows = Case(Rows((16,), 8, True), several=False, recomputed=0)
    with rehearsal(
        recipe, lambda made: prepare.plan_for(recipe, made), stored=torch.float32, precision=torch.float32
    ) as found:
        alone = memory(found, rows, devices.this_cpu())
        shared = sharded(alone, found, 2)
    return shared.weights, shared.passing - alone.passing


def test_only_the_gradient_of_the_adapter_is_added_up_and_the_base_is_gathered_twice_a_pass(bench, processes):
    """Blocks for the forward and for the backward pass, ends and the last norm once."""
    recipe = of(bench, "llama", data={"eval_fraction": 0.0, "packing": False}, train=SHARED)
    ended = together(processes, bench, recipe, 2)
    trained = sum(tensor.numel() for tensor in adapter_of(recipe).values())
    sent, received = (
        ended["said"].split("each process sent ")[1].split(" of the base")[0].split(" and was sent ")
    )
    assert 4 * trained <= number(sent.removesuffix("B a step")) <= 4 * trained + 300
    model = tiny.model("llama", num_hidden_layers=BLOCKS)
    of_model = sum(p.nbytes for p in model.parameters())
    of_blocks = sum(p.nbytes for block in blocks(model) for p in block.parameters())
    a_pass = (of_model + of_blocks) / 2  # half of everything is here already
    extra = (
        of_blocks / 2 / 6
    )  # before six steps logits are tried out; the ends stay together until the first has ended
    assert number(received.removesuffix("B")) == pytest.approx(a_pass + extra, rel=0.02)


def stored(parameter: torch.Tensor, base: str) -> int:
    """Bytes of it in the base."""
    return BYTES[base](*parameter.shape) if base in BYTES and parameter.ndim == 2 else parameter.nbytes


def number(shown: str) -> float:
    return float(shown.replace("K", "e3").replace("M", "e6"))


# ---- what is refused -----------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    **{
        name: ({"adapter": {"method": name}}, "train.parallel: each process would keep a whole W")
        for name in ("optimizer_view", "relora", "galore", "random_projection")
    },
    "full": ({"adapter": {"method": "full"}}, "train.parallel: W trains"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_methods_that_need_all_of_w_are_refused_before_anything_is_loaded(bench, name):
    sections, reason = REFUSED[name]
    recipe = of(bench, "nowhere", train=SHARED, **sections)
    with pytest.raises(UserError, match=reason):
        train(recipe, Screen.silent())
    assert not root_of(recipe).exists()


def test_a_base_of_which_nothing_is_frozen_is_refused(bench):
    with pytest.raises(ValueError, match="leaves nothing"):
        of(bench, "llama", train=SHARED, adapter={"train_also": ("everything",)})


class Two:
    """As much of an accelerator as is asked."""

    num_processes, device = 2, torch.device("cpu")


def test_a_base_whose_casts_would_be_kept_whole_is_refused(bench):
    recipe = of(bench, "llama", train={**SHARED, "precision": "bfloat16"})
    with pytest.raises(UserError, match=r"set model\.dtype: bfloat16"):
        prepare.load_model(recipe, Two())
    alone = of(bench, "llama", train={"precision": "bfloat16"})
    assert prepare.load_model(alone, Two()).model.dtype is torch.float32


@pytest.mark.parametrize("name", ["llama", "bf16"])
def test_a_base_that_is_to_be_shared_out_is_mapped_not_read(bench, name):
    """Else each process would have all of it in memory before it has a share."""
    recipe = of(bench, name, train=SHARED)
    files = {str(path) for path in (bench.folder / name).glob("*.safetensors")}
    model = prepare.load_model(recipe, Two()).model
    mapped = mappings(files)
    for parameter in model.parameters():
        start = parameter.data_ptr()
        assert any(low <= start < high for low, high in mapped)
    del model


def mappings(files: set[str]) -> list[tuple[int, int]]:
    """Where these files are mapped in this process' memory."""
    found: list[tuple[int, int]] = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if any(line.endswith(file) for file in files):
            low, high = line.split()[0].split("-")
            found.append((int(low, 16), int(high, 16)))
    return found


def test_a_base_that_is_shared_out_is_asked_for_its_share_of_the_memory(bench, tmp_path, monkeypatch):
    """What fits in two devices together is not refused because it does not fit in one."""
    tiny.model("llama", num_hidden_layers=9).save_pretrained(bench.folder / "nine")
    tiny.tokenizer().save_pretrained(bench.folder / "nine")
    recipe = of(bench, "nine", train={**SHARED, "on_no_fit": "error"})
    language = prepare.load_model(recipe, Two())
    datasets = prepare.load_data(recipe, language.tokenizer, tmp_path)
    peaks: dict[int, float] = {}
    whole = of(bench, "nine", train={**SHARED, "parallel": "ddp", "on_no_fit": "error"})
    real = fit.sharded

    def noted(whole: Any, *rest: Any) -> Any:
        found = real(whole, *rest)
        peaks.update({1: whole.peak, 2: found.peak})
        return found

    monkeypatch.setattr(fit, "sharded", noted)
    monkeypatch.setattr(fit, "_taken", lambda device: 0)
    monkeypatch.setattr(fit.devices, "free_memory", lambda device: 0)
    with pytest.raises(UserError):
        fit.fitted(recipe, language, datasets, Two(), Screen.silent())
    assert peaks[2] < peaks[1]
    between = (peaks[1] + peaks[2]) / 2 / fit.MARGIN
    monkeypatch.setattr(fit.devices, "free_memory", lambda device: between)
    assert fit.fitted(recipe, language, datasets, Two(), Screen.silent()).recipe == recipe
    with pytest.raises(UserError, match="the run needs about"):
        fit.fitted(whole, language, datasets, Two(), Screen.silent())


def test_one_process_alone_says_that_nothing_is_shared_out(bench, capsys):
    recipe = of(bench, "llama", train={**SHARED, "max_steps": 1, "epochs": None})
    train(recipe, Screen())
    assert "one process alone keeps the whole base" in capsys.readouterr().err
