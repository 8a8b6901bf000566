"""Every method trains, goes on from a checkpoint to the bit, and saves what it trained, for the original base."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from lora_cli.errors import UserError
from lora_cli.presets import PRESETS
from lora_cli.recipe.schema import Recipe
from lora_cli.run.evaluate import evaluate
from lora_cli.run.train import train
from lora_cli.screen import Screen
from tests import tiny
from tests.test_train_run import stopped_after

RESTARTS: dict[str, dict[str, Any]] = {
    "serial": {"every": 3},
    "cola": {"every": 3},
    "relora": {"every": 4, "moments": 0.1, "warmup": 1},
    "xgblora": {"every": 2, "layers": 3},
    "flora": {"every": 3, "moments": "carry"},
    "galore": {"every": 3, "moments": 1.0},
}
"""Short pieces, so that a short run has several."""
ADAPTER: dict[str, dict[str, Any]] = {
    **{name: {"lifecycle": {"restart": settings}} for name, settings in RESTARTS.items()},
    "delta_lora": {"lifecycle": {"delta_lora": {"after": 2}}},
    "adalora": {"rank": {"adalora": {"every": 2, "final": 0.4}}},
    "sora": {"rank": {"sora": {"threshold": 0.03}}},
    "dora_dynamic": {"rank": {"dora_dynamic": {"every": 2}}},
    "prilora": {"rank": {"prilora": {"every": 4}}},
    "alora": {"rank": {"alora": {"rounds": 3, "rows": 4}}, "target_modules": ("q_proj", "v_proj")},
    "aflora": {"lifecycle": {"aflora": {"every": 2, "end": 0.7}}},
    "sparse_adapter": {"lifecycle": {"sparse_adapter": {"after": 3}}},
    "loraprune": {"lifecycle": {"loraprune": {"every": 2}}},
    "lora_drop": {"lifecycle": {"lora_drop": {"after": 0.3, "threshold": 0.0}}},
    "roselora": {"lifecycle": {"roselora": {"density": 0.3}}},
    "eva": {"init": {"eva": {"rho": 2.0, "rows": 8}}},
    "corda": {"init": {"corda": {"rows": 8}}},
    "longlora": {"attention": {"shifted": {"groups": 2}}},
    "lq_lora_fisher": {"init": {"lq_fisher": {"rows": 8}}},
    "lora_ga": {"init": {"lora_ga": {"rows": 8}}, "r": 2},
    "fourierft": {"r": 64},
    "deep_lora": {"init": {"gradient_frame": {"rows": 8}}},
    "vb_lora": {"delta": {"vb_lora": {"vectors": 16, "length": 8}}},
}
ADAPTER |= {name: {"r": None} for name in ("ia3", "svdiff", "sam_parser", "ln_tuning", "bitfit", "full")}
RATE = {
    "random_projection": 0.3,
    "vera": 0.1,
    "deep_lora": 3e-2,
    "full": 3e-3,
    "mov": 0.1,
    "longlora": 3e-3,
    "xgblora": 3e-2,
    "relora": 5e-3,
}
RATE |= {
    "spectral_rotate": 0.1,
    "ia3": 0.1,
    "svdiff": 0.1,
    "sam_parser": 0.1,
    "ln_tuning": 0.1,
    "fourierft": 0.1,
}
BIASES = ("bitfit",)
"""Methods that need a model with biases."""


@pytest.fixture(scope="session")
def folder_with_biases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama whose linear layers have biases."""
    folder = tmp_path_factory.mktemp("biases") / "model"
    tiny.model("llama", bos_token_id=1, attention_bias=True, mlp_bias=True).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tiny_folder: Path, folder_with_biases: Path, rows_file: Path, tmp_path: Path):
    """Make a recipe for a method on the tiny model."""

    def make(method: str, output: str, **adapter: Any) -> Recipe:
        return Recipe.model_validate(
            {
                "model": {
                    "name": str(folder_with_biases if method in BIASES else tiny_folder),
                    "dtype": "float32",
                },
                "data": {
                    "train": str(rows_file),
                    "eval_fraction": 0.2,
                    "format": {"prompt": "{question}", "completion": "{answer}"},
                },
                "adapter": {"method": method, "r": 4, **ADAPTER.get(method, {}), **adapter},
                "train": {
                    "max_steps": 12,
                    "batch_size": 8,
                    "micro_batch_size": 3,
                    "learning_rate": RATE.get(method, 1e-2),
                    "save_steps": 2,
                },
                "eval": {"metrics": ("loss",)},
                "output": {"dir": str(tmp_path / output)},
            }
        )

    return make


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def losses(folder: Path, key: str) -> list[float]:
    lines = (folder.parent / "log.jsonl").read_text().splitlines()
    return [line[key] for line in map(json.loads, lines) if key in line]


@pytest.mark.parametrize("method", PRESETS)
def test_a_method_learns_and_its_adapter_is_what_was_trained_on_the_original_base(recipe, method):
    folder = train(recipe(method, "run"), Screen())
    report = evaluate(folder, None, [], Screen())
    assert report["adapter"]["loss"] == pytest.approx(losses(folder, "eval_loss")[-1], rel=1e-5)
    assert report["adapter"]["loss"] < report["base"]["loss"] - 0.05


@pytest.mark.parametrize("method", PRESETS)
def test_a_method_goes_on_from_a_checkpoint_to_the_bit(recipe, method, monkeypatch):
    whole = train(recipe(method, "whole"), Screen())
    with monkeypatch.context() as patched:
        stopped_after(patched, 5)
        with pytest.raises(UserError, match="stopped after step 5"):
            train(recipe(method, "parts"), Screen())
    parts = train(recipe(method, "parts"), Screen(), resume=True)
    assert digest(whole) == digest(parts)
    assert losses(whole, "loss") == losses(parts, "loss")


def test_alora_says_what_takes_so_long_in_its_rounds(recipe, capsys):
    train(recipe("alora", "run"), Screen())
    said = [line for line in capsys.readouterr().err.splitlines() if "alora weighs" in line]
    assert len(said) == 3
    assert said[0].startswith("step 4 ")
    assert " 16 components" in said[0]
