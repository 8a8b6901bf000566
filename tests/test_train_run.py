"""A whole run: exact, resumable to the bit, and never a success when nothing was learned."""

import hashlib
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_cli import model as models
from lora_cli.errors import ExitCode, UserError
from lora_cli.recipe.schema import ModelRecipe, Recipe
from lora_cli.run.evaluate import evaluate
from lora_cli.run.open import open_model, trained_with
from lora_cli.run.train import Story, train
from lora_cli.screen import Screen
from lora_cli.train import checkpoint, loop
from lora_cli.train.loss import Loss
from tests import tiny

STATED = {"epochs": 3, "batch_size": 8, "learning_rate": 1e-2, "micro_batch_size": 3, "save_steps": 2}


@pytest.fixture
def recipe(tiny_folder: Path, rows_file: Path, tmp_path: Path):
    """Make a recipe on the tiny model; `section={key: value}` adds to what is stated."""

    def make(output: str = "run", **sections: dict[str, Any]) -> Recipe:
        base: dict[str, dict[str, Any]] = {
            "model": {"name": str(tiny_folder), "dtype": "float32"},
            "data": {
                "train": str(rows_file),
                "eval_fraction": 0.2,
                "format": {"prompt": "{question}", "completion": "{answer}"},
            },
            "adapter": {"r": 4, "dropout": 0.1},
            "train": dict(STATED),
            "output": {"dir": str(tmp_path / output)},
        }
        for name, section in sections.items():
            base.setdefault(name, {}).update(section)
        return Recipe.model_validate(base)

    return make


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def log_of(recipe: Recipe) -> list[dict[str, Any]]:
    return [
        json.loads(line) for line in (Path(str(recipe.output.dir)) / "log.jsonl").read_text().splitlines()
    ]


def stable(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What of the log does not depend on the clock or the machine."""
    clock = {"seconds", "tokens_per_second", "memory_bytes"}
    return [{key: value for key, value in line.items() if key not in clock} for line in lines]


def stopped_after(monkeypatch: pytest.MonkeyPatch, steps: int):
    """Make a run stop by itself with SIGTERM while step `steps` is under way."""
    real = loop._update

    def update(run: loop.Training, grad_norm: float) -> None:
        real(run, grad_norm)
        if run.step + 1 == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop, "_update", update)


def test_a_run_learns_and_leaves_everything_it_promises(recipe):
    asked = recipe()
    folder = train(asked, Screen())
    root = folder.parent
    lines = log_of(asked)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert {
        "epoch",
        "learning_rate",
        "grad_norm",
        "tokens",
        "trained_tokens",
        "seconds",
        "tokens_per_second",
    } <= steps[0].keys()
    assert [line["step"] for line in lines if "eval_loss" in line] == [4, 8, 12]
    assert {path.name for path in root.iterdir()} >= {
        "adapter",
        "checkpoints",
        "recipe.yaml",
        "log.jsonl",
        "loss.png",
    }
    assert {path.name for path in folder.iterdir()} >= {
        "adapter_model.safetensors",
        "adapter_config.json",
        "README.md",
    }
    assert not list(root.rglob(".tmp-*"))
    assert (root / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("stop", [3, 5, 9])
def test_stopping_and_going_on_gives_the_same_bytes(recipe, monkeypatch, stop):
    whole = recipe("whole")
    train(whole, Screen())
    parts = recipe("parts")
    with monkeypatch.context() as patched:
        stopped_after(patched, stop)
        with pytest.raises(UserError) as caught:
            train(parts, Screen())
    assert caught.value.code is ExitCode.INTERRUPTED
    train(parts, Screen(), resume=True)
    assert digest(Path(str(whole.output.dir)) / "adapter") == digest(Path(str(parts.output.dir)) / "adapter")
    assert stable(log_of(whole)) == stable(log_of(parts))


class Killed(BaseException):
    """What nobody catches."""


def test_a_killed_run_goes_on_from_its_last_checkpoint_with_the_same_bytes(recipe, monkeypatch):
    whole, parts = recipe("whole"), recipe("parts")
    train(whole, Screen())
    real = Story.evaluate

    def killed(story: Story, *arguments: Any) -> bool:
        if story.run.step == 8:  # step 8 is logged, its checkpoint is not written
            raise Killed
        return real(story, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Story, "evaluate", killed)
        with pytest.raises(Killed):
            train(parts, Screen())
    train(parts, Screen(), resume=True)
    assert digest(Path(str(whole.output.dir)) / "adapter") == digest(Path(str(parts.output.dir)) / "adapter")
    assert stable(log_of(whole)) == stable(log_of(parts))


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(recipe, monkeypatch, capsys):
    whole, parts = recipe("whole"), recipe("parts")
    train(whole, Screen())
    with monkeypatch.context() as patched:
        stopped_after(patched, 7)
        with pytest.raises(UserError):
            train(parts, Screen())
    newest, _ = checkpoint.newest(Path(str(parts.output.dir)) / "checkpoints")
    assert newest is not None
    bytes_ = bytearray((newest / "optimizer.safetensors").read_bytes())
    bytes_[-5] ^= 1
    (newest / "optimizer.safetensors").write_bytes(bytes_)
    train(parts, Screen(), resume=True)
    assert "skipped a damaged checkpoint" in capsys.readouterr().err
    assert digest(Path(str(whole.output.dir)) / "adapter") == digest(Path(str(parts.output.dir)) / "adapter")


def test_resume_starts_what_has_no_checkpoint_and_refuses_what_is_another_run(recipe):
    asked = recipe()
    train(asked, Screen(), resume=True)
    with pytest.raises(UserError, match="holds a run already"):
        train(asked, Screen())
    with pytest.raises(UserError, match="another recipe"):
        train(recipe(train={"learning_rate": 1e-3}), Screen(), resume=True)
    assert train(asked, Screen(), resume=True) == Path(str(asked.output.dir)) / "adapter"


def test_micro_batches_and_packing_do_not_change_a_step(recipe):
    losses, tensors = {}, {}
    for name, settings in {
        "8": {"micro_batch_size": 8},
        "4": {"micro_batch_size": 4},
        "2": {"micro_batch_size": 2},
        "1": {"micro_batch_size": 1},
        "auto": {"micro_batch_size": "auto"},
        "packed": {"micro_batch_size": "auto"},
    }.items():
        data = {"packing": name == "packed"}
        asked = recipe(
            name, adapter={"dropout": 0.0}, train={**settings, "max_steps": 3, "epochs": None}, data=data
        )
        folder = train(asked, Screen())
        losses[name] = [line["loss"] for line in log_of(asked) if "loss" in line]
        tensors[name] = load_file(folder / "adapter_model.safetensors")
    for name in losses:
        assert losses[name] == pytest.approx(losses["8"], rel=1e-6), name
        for key, value in tensors[name].items():
            assert (value - tensors["8"][key]).norm() <= 1e-4 * value.norm(), (name, key)


def test_evaluation_never_disturbs_training(recipe):
    with_, without = recipe("with", train={"eval_steps": 1}), recipe("without", train={"eval_steps": 12})
    assert digest(train(with_, Screen())) == digest(train(without, Screen()))


def test_gradient_checkpointing_does_not_change_the_result(recipe):
    plain, saving = recipe("plain"), recipe("saving", train={"gradient_checkpointing": True})
    assert digest(train(plain, Screen())) == digest(train(saving, Screen()))


def test_early_stopping_keeps_the_best_adapter(recipe):
    asked = recipe(train={"learning_rate": 0.3, "epochs": 12, "eval_steps": 1, "early_stopping_patience": 2})
    folder = train(asked, Screen())
    held_out = {line["step"]: line["eval_loss"] for line in log_of(asked) if "eval_loss" in line}
    best = min(held_out, key=lambda step: held_out[step])
    assert max(held_out) == best + 2
    kept = load_file(folder.parent / "checkpoints" / f"step-{best:06d}" / "adapter.safetensors")
    saved = load_file(folder / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    assert torch.equal(saved[f"base_model.model.{name}.lora_B.weight"], kept[f"{name}.B"])


def test_checkpoints_rotate_but_the_best_stays(recipe):
    asked = recipe(train={"learning_rate": 0.3, "epochs": 6, "save_steps": 1, "eval_steps": 1})
    root = train(asked, Screen()).parent
    held_out = {line["step"]: line["eval_loss"] for line in log_of(asked) if "eval_loss" in line}
    best = min(held_out, key=lambda step: held_out[step])
    kept = {int(path.name.removeprefix("step-")) for path in (root / "checkpoints").iterdir()}
    assert kept == {23, 24, best}


# ---- runs that learn nothing ------------------------------------------------------------------------------------


def test_a_tensor_without_a_gradient_in_twenty_steps_is_an_error(recipe, monkeypatch):
    asked = recipe(train={"epochs": None, "max_steps": 25})
    real_prepare = loop.Training.__post_init__

    def disconnected(run: loop.Training) -> None:
        real_prepare(run)
        run.model.model.layers[1].mlp.down_proj.delta.beside = lambda base, x, dropped: base.module(x)

    monkeypatch.setattr(loop.Training, "__post_init__", disconnected)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.down_proj.*received a gradient") as caught:
        train(asked, Screen())
    assert caught.value.code is ExitCode.LEARNED_NOTHING
    assert not (Path(str(asked.output.dir)) / "adapter").exists()


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_number_that_is_not_finite_stops_before_the_update_and_names_the_rows(recipe, monkeypatch, where):
    asked = recipe(train={"save_steps": 1})
    real = Loss.__call__
    seen: dict[str, torch.Tensor] = {}

    def broken(own, batch, device):
        loss = real(own, batch, device)
        if current["run"].step == 3:
            seen.update({n: p.detach().clone() for n, p in current["run"].adapter.named_tensors().items()})
            loss = loss * math.nan if where == "loss" else Broken.apply(loss)
        return loss

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * math.inf

    current: dict[str, loop.Training] = {}
    real_init = loop.Training.__post_init__
    monkeypatch.setattr(
        loop.Training, "__post_init__", lambda run: (real_init(run), current.update(run=run))[0]
    )
    monkeypatch.setattr(Loss, "__call__", broken)
    with pytest.raises(UserError, match=f"the {where} is not a finite number in step 4") as caught:
        train(asked, Screen())
    assert caught.value.code is ExitCode.NON_FINITE
    assert "rows.jsonl:" in str(caught.value)
    assert all(torch.equal(seen[name], p) for name, p in current["run"].adapter.named_tensors().items())


def test_a_trained_tensor_that_the_optimizer_does_not_hold_is_a_bug_that_stops_the_run(recipe, monkeypatch):
    from lora_cli.train import optim

    real = optim.make

    def without_one(adapter, train):
        optimizer = real(adapter, train)
        optimizer.param_groups[0]["params"].pop()
        return optimizer

    monkeypatch.setattr(optim, "make", without_one)
    with pytest.raises(AssertionError, match="not in the optimizer"):
        train(recipe(), Screen())


def test_two_runs_cannot_write_in_one_folder(recipe):
    from lora_cli.run.folder import RunFolder

    asked = recipe()
    with (
        RunFolder(Path(str(asked.output.dir))).held(),
        pytest.raises(UserError, match="another run") as caught,
    ):
        train(asked, Screen())
    assert caught.value.code is ExitCode.LOCKED


# ---- precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "computed"),
    [("float32", "bfloat16"), ("bfloat16", "auto"), ("float32", "float16"), ("float16", "auto")],
)
def test_sixteen_bits_learn_what_thirty_two_do(recipe, stored, computed):
    full = recipe("full", adapter={"dropout": 0.0})
    train(full, Screen())
    half = recipe("half", adapter={"dropout": 0.0}, model={"dtype": stored}, train={"precision": computed})
    folder = train(half, Screen())
    for one, other in zip(log_of(full), log_of(half), strict=True):
        key = "loss" if "loss" in one else "eval_loss"
        assert other[key] == pytest.approx(one[key], rel=0.02)
    assert all(
        value.dtype is torch.float32 for value in load_file(folder / "adapter_model.safetensors").values()
    )


def test_an_overflow_in_float16_is_a_counted_skip_and_the_scaler_goes_on_after_a_resume(recipe, monkeypatch):
    whole = recipe("whole", train={"precision": "float16"})
    parts = recipe("parts", train={"precision": "float16"})
    real_init = loop.Training.__post_init__
    runs: list[loop.Training] = []

    def large_scale(run: loop.Training) -> None:
        real_init(run)
        run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=3)
        runs.append(run)

    monkeypatch.setattr(loop.Training, "__post_init__", large_scale)
    train(whole, Screen())
    assert 0 < runs[0].skipped < 12
    with monkeypatch.context() as patched:
        stopped_after(patched, 7)
        with pytest.raises(UserError):
            train(parts, Screen())
    train(parts, Screen(), resume=True)
    assert runs[-1].skipped == runs[0].skipped
    assert digest(Path(str(whole.output.dir)) / "adapter") == digest(Path(str(parts.output.dir)) / "adapter")


def test_a_float16_run_in_which_every_step_overflows_is_no_success(recipe, monkeypatch):
    real_init = loop.Training.__post_init__

    def huge_scale(run: loop.Training) -> None:
        real_init(run)
        run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)

    monkeypatch.setattr(loop.Training, "__post_init__", huge_scale)
    with pytest.raises(UserError, match="every step overflowed"):
        train(recipe(train={"precision": "float16"}), Screen())


def test_trackers_get_the_losses(recipe):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    asked = recipe(train={"trackers": ("tensorboard",)})
    root = train(asked, Screen()).parent
    events = EventAccumulator(str(next((root / "trackers").rglob("events*")).parent))
    events.Reload()
    losses = [event.value for event in events.Scalars("loss")]
    assert losses == pytest.approx([line["loss"] for line in log_of(asked) if "loss" in line], rel=1e-6)


def test_the_chat_template_of_a_file_is_kept_beside_the_adapter(recipe, tmp_path):
    template = tmp_path / "mine.jinja"
    template.write_text("{# mine #}" + tiny.CHATML)
    folder = train(recipe(data={"chat_template": str(template)}, train={**STATED, "epochs": 1}), Screen())
    learned = template.read_text()
    template.unlink()
    kept = trained_with(folder)
    assert kept is not None
    assert Path(kept.data.chat_template).read_text() == learned
    assert trained_with(folder, ["data.chat_template=none"]).data.chat_template == "none"


def test_an_adapter_trained_with_flash_attention_opens_on_a_cpu(recipe):
    folder = train(recipe(train={**STATED, "epochs": 1}), Screen())
    written = (folder / "recipe.yaml").read_text()
    assert "attention: auto" in written
    (folder / "recipe.yaml").write_text(written.replace("attention: auto", "attention: flash_attention_2"))
    assert open_model([folder]).recipe.model.attention == "flash_attention_2"


@pytest.mark.parametrize("also", [("norms",), ("head",), ("embeddings", "head")])
def test_what_trains_in_full_beside_a_16_bit_base_trains_and_is_measured(recipe, also):
    asked = recipe(model={"dtype": "bfloat16"}, adapter={"train_also": also}, train={**STATED, "epochs": 2})
    asked = asked.model_copy(update={"eval": asked.eval.model_copy(update={"metrics": ("loss",)})})
    folder = train(asked, Screen())
    logged = [line["eval_loss"] for line in log_of(asked) if "eval_loss" in line]
    assert logged[-1] < logged[0]
    report = evaluate(folder, None, [], Screen())
    assert report["adapter"]["loss"] == pytest.approx(logged[-1], rel=1e-3)
    assert report["adapter"]["loss"] < report["base"]["loss"]


@pytest.mark.parametrize("rows", ["auto", 8])
def test_out_of_memory_splits_the_micro_batch_and_repeats_the_same_step(recipe, monkeypatch, rows):
    common = {"batch_size": 8, "micro_batch_size": rows}
    roomy = recipe("roomy", adapter={"dropout": 0.0}, train={**common, "save_steps": 2})
    expected = load_file(train(roomy, Screen()) / "adapter_model.safetensors")
    real, most = Loss.__call__, 3
    refused: list[int] = []

    def tight(own, batch, device):
        if len(batch.rows) > most:
            refused.append(len(batch.rows))
            raise torch.OutOfMemoryError
        return real(own, batch, device)

    monkeypatch.setattr(Loss, "__call__", tight)
    asked = recipe("tight", adapter={"dropout": 0.0}, train={**common, "save_steps": 2})
    found = load_file(train(asked, Screen()) / "adapter_model.safetensors")
    assert refused
    lines = [line for line in log_of(asked) if "out_of_memory" in line]
    assert [line["out_of_memory"] for line in lines] == [True] + [False] * (len(lines) - 1)
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= 1e-4 * tensor.norm(), name


def test_a_run_that_was_short_of_memory_resumes_to_the_same_bytes(recipe, monkeypatch):
    real = Loss.__call__

    def tight(own, batch, device):
        if len(batch.rows) > 2:
            raise torch.OutOfMemoryError
        return real(own, batch, device)

    monkeypatch.setattr(Loss, "__call__", tight)
    train_settings = {"batch_size": 8, "micro_batch_size": "auto", "save_steps": 2}
    whole = digest(train(recipe("whole", train=train_settings), Screen()))
    monkeypatch.setattr(Loss, "__call__", stopping_at(tight, 30))
    asked = recipe("stopped", train=train_settings)
    with pytest.raises(Stopped):
        train(asked, Screen())
    monkeypatch.setattr(Loss, "__call__", real)
    assert digest(train(asked, Screen(), resume=True)) == whole


class Stopped(BaseException):
    """In the middle of a step."""


def stopping_at(real, call):
    """The loss, until it has been asked for so many times."""
    calls = []

    def loss(own, batch, device):
        calls.append(batch)
        if len(calls) > call:
            raise Stopped
        return real(own, batch, device)

    return loss


def test_one_row_that_does_not_fit_is_an_error_that_names_it(recipe, monkeypatch):
    def never(own, batch, device):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Loss, "__call__", never)
    with pytest.raises(UserError, match=r"one row of \d+ tokens needs more memory") as caught:
        train(recipe(), Screen())
    assert caught.value.code is ExitCode.OUT_OF_MEMORY
    assert "rows.jsonl:" in str(caught.value)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has", [True, False])
def test_a_cpu_that_multiplies_bfloat16_is_used_where_the_files_lose_nothing(
    tmp_path, monkeypatch, stored, has
):
    tiny.model().to(stored).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr(models, "multiplies_bfloat16", lambda device: has)
    loaded = models.load(ModelRecipe(name=str(tmp_path))).model
    assert loaded.dtype == (torch.bfloat16 if has and stored is torch.bfloat16 else torch.float32)


@pytest.mark.parametrize(("parameters", "told"), [(90_000_000, False), (134_515_008, True)])
def test_bfloat16_is_recommended_where_it_was_measured_to_be_faster(
    recipe, monkeypatch, capsys, parameters, told
):
    monkeypatch.setattr(models, "multiplies_bfloat16", lambda device: True)
    monkeypatch.setattr(models, "size_of", lambda model: parameters)
    train(recipe(), Screen())
    assert ("model.dtype=bfloat16" in " ".join(capsys.readouterr().err.split())) == told
