"""Every key of a recipe does what it says: changing it changes what its description names, or it is refused.

The table has a case for each key of the schema and for each setting of a part; one that has none fails. A resolved
recipe shows every key, so it is no effect; what a clock measures is none either.
"""

import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from lora_cli import model as models
from lora_cli import parts
from lora_cli.errors import UserError
from lora_cli.evaluate import generation
from lora_cli.recipe import load
from lora_cli.recipe.schema import ModelRecipe, Recipe
from lora_cli.recipe.words import keys_of
from lora_cli.run import compare, save
from lora_cli.run.evaluate import evaluate
from lora_cli.run.train import train
from lora_cli.screen import Screen
from lora_cli.train import gradient
from tests import tiny
from tests.conftest import ROWS
from tests.recipe_values import as_yaml

CLOCK = {"seconds", "tokens_per_second", "memory_bytes"}


@dataclass(frozen=True)
class Case:
    """A key, the value that it is changed to, and where that has to show."""

    shows: str
    """A field of `Shown`."""
    value: Any
    given: dict[str, Any] = field(default_factory=dict[str, Any])
    """Other keys, dotted, without which this one says nothing; `${...}` in a value is a file of the fixture."""
    told: str = ""
    """Words of the refusal, where one of both is refused."""


@dataclass
class Shown:
    """What a command leaves and shows."""

    adapter: str = ""
    """Digest of its tensors."""
    log: str = ""
    """log.jsonl without what a clock measured."""
    files: str = ""
    """Their names, below the run folder."""
    folder: str = ""
    screen: str = ""
    """Its lines, every number replaced by #."""
    computed: str = ""
    """Rows × tokens of each micro-batch, prompts answered at once, and how often a block was computed."""
    measured: str = ""
    """The report and the predictions of `lora eval`."""
    refused: str = ""


ANSWERED = {"data.format": {"prompt": "{question}", "completion": " {answer}"}, "data.chat_template": "none"}
BASE: dict[str, Any] = {
    "model.name": "${plain}",
    "data.train": "${rows}",
    "data.eval_fraction": 0.2,
    **ANSWERED,
    "adapter.r": 4,
    "adapter.target_modules": ["q_proj", "v_proj"],
    "train.max_steps": 2,
    "train.batch_size": 4,
    "train.learning_rate": 1e-2,
}
LONGER = {"train.max_steps": 4}
EVALS = {"train.max_steps": 3, "train.eval_steps": 1}
ADALORA = {"adapter.method": "adalora", "train.max_steps": 10}
DYNAMIC = {"adapter.method": "dora_dynamic", "train.max_steps": 10}
ALORA = {"adapter.method": "alora", "adapter.rank": {"alora": {"rounds": 1, "rows": 4}}, "train.max_steps": 5}
AUTOLORA = {"adapter.method": "autolora", "train.max_steps": 8}
PRILORA = {"adapter.method": "prilora", "train.max_steps": 5}
EVERY_LAYER = {"adapter.rank": {"prilora": {"every": 1}}, "adapter.target_modules": "all-linear"}
AFLORA = {"adapter.method": "aflora", "train.max_steps": 10}
SPARSE = {"adapter.lifecycle": {"sparse_adapter": {"after": 1}}, "train.max_steps": 4}
DROPS = {"adapter.lifecycle": {"lora_drop": {"after": 0.4, "threshold": 0.0}}, "train.max_steps": 5}
ROSE = {"adapter.lifecycle": "roselora", "train.max_steps": 6}
BILEVEL = {"adapter.method": "bilora", **LONGER}
PRUNES = {"adapter.method": "loraprune", "adapter.target_modules": None, "train.max_steps": 6}
EACH = {"every": 1, "begin": 0.0, "share": 0.5}
MALORA = {"adapter.method": "malora"}
MLPS = {"adapter.method": "mixlora_moe", "adapter.target_modules": None}
KEYS = {"adapter.attention": "key_drop"}
SHORT_PIECES = {"adapter.lifecycle": {"restart": {"every": 2}}, "train.max_steps": 6}
BANK = {"adapter.method": "vb_lora", "adapter.delta": {"vb_lora": {"length": 8}}}
DEEP = {"adapter.method": "deep_lora"}
BIASED = {"model.name": "${biased}", "adapter.target_modules": ["q_proj"]}
CHAT = {"data.chat_template": "auto"}

TRAINED: dict[str, Case | tuple[Case, ...]] = {
    "model.name": Case("adapter", "${other}"),
    "model.revision": Case("refused", "main", told="a folder has no revisions"),
    "model.dtype": Case("adapter", "bfloat16"),
    "model.quantize": (
        Case("adapter", "nf4"),
        Case("adapter", "nf"),
        Case("refused", "none", {"adapter.method": "qlora"}, "would be lora"),
        Case("refused", "int8", {"adapter.lifecycle": "restart", "train.max_steps": 6}, "quantise"),
    ),
    "model.bits": (
        Case("adapter", 3, {"model.quantize": "nf"}),
        Case("refused", 3, told="shared out by 'model.quantize' nf only"),
    ),
    "model.attention": (Case("screen", "eager"), Case("adapter", "eager", {"data.packing": False})),
    "model.add_tokens": Case("adapter", ["<|think|>"]),
    "model.untie": (
        Case("refused", True, {"model.name": "${tied}", "adapter.train_also": ["head"]}, "shares its weight"),
        Case("refused", True, told="has a weight of its own already"),
    ),
    "model.split_experts": Case("refused", True, told="no experts whose weights are one tensor"),
    "data.train": Case("adapter", "${others}"),
    "data.train.path": Case("adapter", {"path": "${others}"}, {"data.train": {"path": "${rows}"}}),
    "data.train.weight": Case(
        "adapter",
        [{"path": "${rows}", "weight": 3}, "${others}"],
        {"data.train": ["${rows}", "${others}"]},
    ),
    "data.train.split": Case("refused", {"path": "${rows}", "split": "test"}, told="for ids on the Hub"),
    "data.eval": (
        Case("log", "${others}", {"data.eval_fraction": 0.0}),
        Case("refused", {"path": "${others}", "weight": 2}, {"data.eval_fraction": 0.0}, "no effect here"),
    ),
    "data.eval_fraction": Case("log", 0.4),
    "data.format": Case("adapter", {"prompt": "Q: {question}", "completion": " {answer}"}),
    "data.format.prompt": Case("adapter", {"prompt": "Q: {question}", "completion": " {answer}"}),
    "data.format.completion": Case("adapter", {"prompt": "{question}", "completion": " = {answer}"}),
    "data.chat_template": (Case("adapter", "auto"), Case("adapter", "${template}", CHAT)),
    "data.system": (
        Case("adapter", "Be kind.", CHAT),
        Case("refused", "Be kind.", told="needs a chat template"),
    ),
    "data.max_length": (
        Case("refused", 20, told="tokens"),
        Case("adapter", 20, {"data.overflow": "truncate"}),
    ),
    "data.overflow": Case("adapter", "truncate", {"data.max_length": 21, "data.overflow": "drop"}),
    "data.train_on": (Case("adapter", "all"), Case("refused", "assistant", told="is for chats")),
    "data.packing": Case("computed", False),
    "adapter.method": Case("adapter", "dora"),
    "adapter.r": Case("adapter", 2),
    "adapter.alpha": Case("adapter", 8),
    "adapter.dropout": Case("adapter", 0.5),
    "adapter.target_modules": Case("adapter", ["q_proj"]),
    "adapter.exclude_modules": Case("adapter", ["v_proj"]),
    "adapter.layers": Case("adapter", [1]),
    "adapter.rank_pattern": Case("adapter", {"q_proj": 2}),
    "adapter.alpha_pattern": Case("adapter", {"q_proj": 4}),
    "adapter.lora_bias": (Case("adapter", True, BIASED), Case("refused", True, told="has no bias")),
    "adapter.train_also": Case("adapter", ["norms"]),
    "adapter.init": Case("adapter", "gaussian"),
    "adapter.scale": Case("adapter", "rslora"),
    "adapter.delta": (
        Case("adapter", "two_sided", {"adapter.init": "random_projection"}),
        Case("refused", "gated", told="needs init.small"),
    ),
    "adapter.combine": Case("adapter", "dora"),
    "adapter.attention": (
        Case("adapter", "shifted"),
        Case("refused", "shifted", {"model.attention": "eager"}, "stands in for sdpa"),
    ),
    "adapter.attention.key_drop.key": Case("adapter", {"key_drop": {"key": 0.5}}, KEYS),
    "adapter.attention.key_drop.hidden": Case("adapter", {"key_drop": {"hidden": 0.5}}, KEYS),
    "adapter.attention.shifted.groups": Case("adapter", {"shifted": {"groups": 2}}, {"adapter.attention": "shifted"}),
    "adapter.trainable": Case("adapter", "lora_fa"),
    "adapter.rank": (
        Case("adapter", "fixed", ADALORA),
        Case("refused", "adalora", told="needs delta.gated"),
    ),
    "adapter.lifecycle": Case("adapter", {"restart": {"every": 2}}, LONGER),
    "train.epochs": Case("log", 0.5, {"train.max_steps": None, "train.epochs": 0.2}),
    "train.max_steps": Case("log", 3),
    "train.batch_size": Case("log", 5),
    "train.micro_batch_size": Case("computed", 1),
    "train.learning_rate": Case("adapter", 1e-3),
    "train.lr_scheduler": Case("log", "cosine", LONGER),
    "train.warmup_ratio": Case("log", 0.5, LONGER),
    "train.warmup_steps": Case("log", 3),
    "train.min_learning_rate": Case("log", 5e-3),
    "train.weight_decay": Case("adapter", 0.5),
    "train.optimizer": Case("adapter", "lora_plus"),
    "train.betas": (
        Case("adapter", [0.5, 0.9], LONGER),
        Case("refused", [0.5, 0.9], {"train.optimizer": "sgd"}, "remembers nothing"),
    ),
    "train.max_grad_norm": Case("adapter", 1e-3, {"train.optimizer": "sgd"}),
    "train.precision": Case("adapter", "bfloat16"),
    "train.gradient_checkpointing": (
        Case("computed", True),
        Case("computed", 1),
        Case("refused", 3, told="the model has 2"),
    ),
    "train.parallel": Case("screen", "fsdp"),
    "train.seed": Case("adapter", 1),
    "train.log_steps": Case("screen", 2),
    "train.eval_steps": Case("log", 1),
    "train.save_steps": Case("files", 1, LONGER),
    "train.keep_checkpoints": Case("files", 3, {**LONGER, "train.save_steps": 1}),
    "train.early_stopping_patience": Case("log", 1, {**EVALS, "train.learning_rate": 0.0}),
    "train.trackers": Case("files", ["tensorboard"]),
    "eval.max_rows": Case("log", 2),
    "eval.samples": Case("screen", 2, {"eval.max_new_tokens": 4}),
    "output.dir": Case("folder", "${elsewhere}"),
    "adapter.delta.vera.d": Case("adapter", {"vera": {"d": 0.5}}, {"adapter.method": "vera"}),
    "adapter.delta.hydra.count": Case("adapter", {"hydra": {"count": 2}}, {"adapter.method": "hydra_lora"}),
    "adapter.delta.experts.count": Case("adapter", {"experts": {"count": 3}}, {"adapter.method": "molora"}),
    "adapter.delta.ffn_experts.count": Case("adapter", {"ffn_experts": {"count": 3}}, MLPS),
    "adapter.delta.ffn_experts.top": (
        Case("adapter", {"ffn_experts": {"top": 3}}, MLPS),
        Case("refused", {"ffn_experts": {"top": 8}}, MLPS, "nothing to choose"),
    ),
    "adapter.delta.factors.pool": Case("adapter", {"factors": {"pool": 2}}, {"adapter.method": "mixlora"}),
    "adapter.delta.malora.count": Case("adapter", {"malora": {"count": 3}}, MALORA),
    "adapter.delta.malora.top": (
        Case("adapter", {"malora": {"top": 3}}, MALORA),
        Case("refused", {"malora": {"top": 8}}, MALORA, "nothing to choose"),
    ),
    "adapter.delta.malora.width": Case("adapter", {"malora": {"width": 1}}, MALORA),
    "adapter.lifecycle.load_balance.weight": Case(
        "adapter", {"load_balance": {"weight": 0.5}}, {**MALORA, **LONGER}
    ),
    "adapter.lifecycle.r_drop.weight": Case("adapter", {"r_drop": {"weight": 5.0}}, {"adapter.dropout": 0.1}),
    "adapter.delta.fourierft.seed": Case(
        "adapter", {"fourierft": {"seed": 3}}, {"adapter.method": "fourierft", "adapter.r": 50}
    ),
    "adapter.delta.oft.factors": Case(
        "adapter", {"oft": {"factors": 2}}, {"adapter.method": "oft", "adapter.r": 4}
    ),
    "adapter.delta.lokr.factor": Case("adapter", {"lokr": {"factor": 2}}, {"adapter.method": "lokr"}),
    "adapter.delta.loretta.bond": Case("adapter", {"loretta": {"bond": 2}}, {"adapter.method": "loretta"}),
    "adapter.delta.lotr.share": Case("adapter", {"lotr": {"share": "all"}}, {"adapter.method": "lotr"}),
    "adapter.delta.melora.n": Case("adapter", {"melora": {"n": 2}}, {"adapter.method": "melora"}),
    "adapter.delta.nola.bases": Case("adapter", {"nola": {"bases": 8}}, {"adapter.method": "nola"}),
    "adapter.delta.nola.seed": Case("adapter", {"nola": {"seed": 1}}, {"adapter.method": "nola"}),
    "adapter.delta.tied.share": Case("adapter", {"tied": {"share": "all"}}, {"adapter.method": "tied_lora"}),
    "adapter.delta.vb_lora.vectors": Case("adapter", {"vb_lora": {"length": 8, "vectors": 9}}, BANK),
    "adapter.delta.vb_lora.length": Case("adapter", {"vb_lora": {"length": 4}}, BANK),
    "adapter.delta.vb_lora.k": Case("adapter", {"vb_lora": {"length": 8, "k": 3}}, BANK),
    "adapter.init.gradient_frame.size": Case("adapter", {"gradient_frame": {"size": 0.1}}, DEEP),
    "adapter.init.gradient_frame.rows": Case("adapter", {"gradient_frame": {"rows": 8}}, DEEP),
    "adapter.init.svd_of_w.std": Case("adapter", {"svd_of_w": {"std": 0.1}}, {"adapter.method": "lora_xs"}),
    "adapter.delta.gated.start": Case(
        "adapter", {"gated": {"start": 0.5}}, {**LONGER, "adapter.method": "sora"}
    ),
    "adapter.delta.scaled.d": Case("adapter", {"scaled": {"d": 0.5}}, {"adapter.method": "aflora"}),
    "adapter.init.corda.mode": Case("adapter", {"corda": {"mode": "kpm"}}, {"adapter.method": "corda"}),
    "adapter.init.corda.rows": Case("adapter", {"corda": {"rows": 8}}, {"adapter.method": "corda"}),
    "adapter.init.eva.rows": Case("adapter", {"eva": {"rows": 8}}, {"adapter.init": "eva"}),
    "adapter.init.eva.rho": Case(
        "adapter", {"eva": {"rho": 2.0}}, {"adapter.init": "eva", "adapter.target_modules": "all-linear"}
    ),
    "adapter.init.lora_ga.rows": Case("adapter", {"lora_ga": {"rows": 8}}, {"adapter.init": "lora_ga"}),
    "adapter.init.lora_ga.gamma": Case("adapter", {"lora_ga": {"gamma": 4.0}}, {"adapter.init": "lora_ga"}),
    "adapter.init.loftq.iterations": Case("adapter", {"loftq": {"iterations": 3}}, {"adapter.method": "loftq"}),
    "adapter.init.lq_fisher.iterations": Case(
        "adapter", {"lq_fisher": {"iterations": 1}}, {"adapter.method": "lq_lora_fisher"}
    ),
    "adapter.init.lq_fisher.rows": Case(
        "adapter", {"lq_fisher": {"rows": 4}}, {"adapter.method": "lq_lora_fisher"}
    ),
    "adapter.init.lq.iterations": Case("adapter", {"lq": {"iterations": 1}}, {"adapter.method": "lq_lora"}),
    "adapter.init.lqer.rows": Case("adapter", {"lqer": {"rows": 4}}, {"adapter.method": "lqer"}),
    "adapter.init.pissa.niter": Case("adapter", {"pissa": {"niter": 1}}, {"adapter.init": "pissa"}),
    "adapter.init.small.std": Case("adapter", {"small": {"std": 0.1}}, ADALORA),
    "adapter.init.symmetric.size": Case(
        "adapter", {"symmetric": {"size": 0.2}}, {"adapter.init": "symmetric"}
    ),
    "adapter.scale.constant.value": Case("adapter", {"constant": {"value": 0.5}}, {"adapter.scale": "constant"}),
    "adapter.rank.adalora.initial": Case("adapter", {"adalora": {"initial": 2.0}}, ADALORA),
    "adapter.rank.adalora.warmup": Case(
        "adapter", {"adalora": {"warmup": 0.6, "every": 1}}, {**ADALORA, "adapter.rank": {"adalora": {"every": 1}}}
    ),
    "adapter.rank.adalora.final": Case(
        "adapter", {"adalora": {"final": 0.8, "every": 1}}, {**ADALORA, "adapter.rank": {"adalora": {"every": 1}}}
    ),
    "adapter.rank.adalora.every": Case("adapter", {"adalora": {"every": 2}}, ADALORA),
    "adapter.rank.adalora.beta": Case(
        "adapter",
        {"adalora": {"beta": 0.0, "every": 1}},
        {**ADALORA, "adapter.rank": {"adalora": {"every": 1}}, "adapter.target_modules": "all-linear"},
    ),
    "adapter.rank.adalora.orthogonality": Case("adapter", {"adalora": {"orthogonality": 1.0}}, ADALORA),
    "adapter.rank.sora.threshold": Case(
        "adapter", {"sora": {"threshold": 0.1}}, {**LONGER, "adapter.method": "sora"}
    ),
    "adapter.rank.dora_dynamic.initial": Case("adapter", {"dora_dynamic": {"initial": 2.0}}, DYNAMIC),
    "adapter.rank.dora_dynamic.begin": Case(
        "adapter",
        {"dora_dynamic": {"every": 1, "begin": 0.4}},
        {**DYNAMIC, "adapter.rank": {"dora_dynamic": {"every": 1}}},
    ),
    "adapter.rank.dora_dynamic.end": Case("adapter", {"dora_dynamic": {"end": 0.9}}, DYNAMIC),
    "adapter.rank.dora_dynamic.every": Case("adapter", {"dora_dynamic": {"every": 1}}, DYNAMIC),
    "adapter.rank.dora_dynamic.beta": Case(
        "adapter",
        {"dora_dynamic": {"every": 1, "beta": 0.0}},
        {**DYNAMIC, "adapter.rank": {"dora_dynamic": {"every": 1}}, "adapter.target_modules": "all-linear"},
    ),
    "adapter.rank.dora_dynamic.dispersion": Case("adapter", {"dora_dynamic": {"dispersion": 9.0}}, DYNAMIC),
    "adapter.rank.dylora.frozen": Case(
        "adapter", {"dylora": {"frozen": True}}, {**LONGER, "adapter.method": "dylora"}
    ),
    "adapter.rank.alora.begin": Case("adapter", {"alora": {"rounds": 1, "rows": 4, "begin": 0.6}}, ALORA),
    "adapter.rank.alora.rounds": Case("adapter", {"alora": {"rounds": 2, "rows": 4}}, ALORA),
    "adapter.rank.alora.rows": Case("adapter", {"alora": {"rounds": 1, "rows": 3}}, ALORA),
    "adapter.rank.autolora.search": Case("adapter", {"autolora": {"search": 0.6}}, AUTOLORA),
    "adapter.rank.autolora.held_out": Case(
        "adapter",
        {"autolora": {"search": 0.8, "held_out": 0.6}},
        {
            **AUTOLORA,
            "adapter.rank": {"autolora": {"search": 0.8}},
            "adapter.target_modules": "all-linear",
        },
    ),
    "adapter.rank.prilora.spread": Case("adapter", {"prilora": {"spread": 0.2}}, PRILORA),
    "adapter.rank.prilora.every": Case("adapter", {"prilora": {"every": 2}}, PRILORA),
    "adapter.rank.prilora.share": Case(
        "adapter", {"prilora": {"every": 2, "share": 0.2}}, {**PRILORA, "adapter.rank": {"prilora": {"every": 2}}}
    ),
    "adapter.rank.prilora.beta": Case(
        "adapter", {"prilora": {"every": 1, "beta": 0.0}}, {**PRILORA, **EVERY_LAYER}
    ),
    "adapter.lifecycle.aflora.begin": Case(
        "adapter",
        {"aflora": {"every": 1, "end": 0.9, "begin": 0.5}},
        {**AFLORA, "adapter.lifecycle": {"aflora": {"every": 1, "end": 0.9}}},
    ),
    "adapter.lifecycle.aflora.end": Case("adapter", {"aflora": {"end": 0.9}}, AFLORA),
    "adapter.lifecycle.aflora.every": Case(
        "adapter",
        {"aflora": {"every": 1, "end": 0.9}},
        {**AFLORA, "adapter.lifecycle": {"aflora": {"every": 4, "end": 0.9}}},
    ),
    "adapter.lifecycle.dropbp.rate": Case(
        "adapter", {"dropbp": {"rate": 0.9}}, {**LONGER, "adapter.lifecycle": "dropbp"}
    ),
    "adapter.lifecycle.sparse_adapter.sparsity": Case(
        "adapter", {"sparse_adapter": {"after": 1, "sparsity": 0.5}}, SPARSE
    ),
    "adapter.lifecycle.sparse_adapter.after": Case("adapter", {"sparse_adapter": {"after": 2}}, SPARSE),
    "adapter.lifecycle.sparse_adapter.score": Case(
        "adapter", {"sparse_adapter": {"after": 1, "score": "random"}}, SPARSE
    ),
    "adapter.lifecycle.lora_drop.after": Case("adapter", {"lora_drop": {"after": 0.6, "threshold": 0.0}}, DROPS),
    "adapter.lifecycle.lora_drop.threshold": Case("adapter", {"lora_drop": {"after": 0.4}}, DROPS),
    "adapter.lifecycle.bilora.share": Case("adapter", {"bilora": {"share": 0.2}}, BILEVEL),
    "adapter.lifecycle.bilora.orthogonality": Case("adapter", {"bilora": {"orthogonality": 0.0}}, BILEVEL),
    **{
        f"adapter.lifecycle.loraprune.{key}": Case(
            "adapter", {"loraprune": {**EACH, key: value}}, {**PRUNES, "adapter.lifecycle": {"loraprune": EACH}}
        )
        for key, value in {"share": 0.2, "begin": 0.5, "end": 0.4, "every": 2, "beta": 0.0}.items()
    },
    "adapter.lifecycle.roselora.density": Case("adapter", {"roselora": {"density": 0.5}}, ROSE),
    "adapter.lifecycle.roselora.begin": Case("adapter", {"roselora": {"begin": 0.5}}, ROSE),
    "adapter.lifecycle.roselora.end": Case("adapter", {"roselora": {"end": 1.0}}, ROSE),
    "adapter.lifecycle.roselora.beta": Case("adapter", {"roselora": {"beta": 0.0}}, ROSE),
    "adapter.lifecycle.delta_lora.ratio": Case(
        "adapter",
        {"delta_lora": {"after": 1, "ratio": 9.0}},
        {**LONGER, "adapter.lifecycle": {"delta_lora": {"after": 1}}},
    ),
    "adapter.lifecycle.delta_lora.after": Case(
        "adapter", {"delta_lora": {"after": 1}}, {**LONGER, "adapter.lifecycle": "delta_lora"}
    ),
    "adapter.lifecycle.restart.every": Case("adapter", {"restart": {"every": 3}}, SHORT_PIECES),
    "adapter.lifecycle.restart.moments": Case(
        "adapter", {"restart": {"every": 2, "moments": 1.0}}, SHORT_PIECES
    ),
    "adapter.lifecycle.restart.warmup": Case("log", {"restart": {"every": 2, "warmup": 2}}, SHORT_PIECES),
    "adapter.lifecycle.restart.layers": Case(
        "adapter", {"restart": {"every": 2, "layers": 1}}, SHORT_PIECES
    ),
    "adapter.dropout.standard.p": Case("adapter", {"standard": {"p": 0.3}}, {"adapter.dropout": "standard"}),
    "train.optimizer.lora_plus.ratio": Case(
        "adapter", {"lora_plus": {"ratio": 4.0}}, {"train.optimizer": "lora_plus"}
    ),
}  # fmt: skip

WRITES = {"eval.metrics": ["exact_match"], "eval.max_new_tokens": 4}
CHOOSES = {"eval.metrics": ["choice_accuracy"]}
MEASURED: dict[str, Case] = {
    "eval.metrics": Case("measured", ["loss", "perplexity"]),
    "eval.choices": Case("measured", [f" {number}" for number in range(30)], CHOOSES),
    "eval.references": Case("measured", "right", CHOOSES | {"eval.choices": [f" {n}" for n in range(30)]}),
    "eval.forgetting": Case("measured", "${text}"),
    "eval.max_rows": Case("measured", 2),
    "eval.batch_size": Case("computed", 3, WRITES),
    "eval.max_new_tokens": Case("measured", 9, WRITES),
}
ELSEWHERE = ("compare", "train.on_no_fit", "train.deterministic", "train.compile")
"""Keys with a test of their own, below, and in test_train_compiled.py."""


def all_keys() -> list[str]:
    """Every key of the schema, inner ones too, and every setting of every part."""
    keys = [f"{section}.{key}" for section in keys_of(Recipe) for key in keys_of(Recipe, (section,))]
    inner = [f"data.{key}.{each}" for key in ("train", "format") for each in keys_of(Recipe, ("data", key))]
    settings = [
        f"{key}.{part}.{setting}"
        for key, axis in load.axes().items()
        for part in parts.names(axis)
        for setting, _, _ in parts.declared(axis, part)
    ]
    return [*keys, *inner, *settings, "compare"]


@pytest.mark.parametrize("key", all_keys())
def test_every_key_has_a_case(key: str) -> None:
    assert key in {*TRAINED, *MEASURED, *ELSEWHERE}


def test_every_case_is_of_a_key() -> None:
    assert {*TRAINED, *MEASURED, *ELSEWHERE} == {*all_keys()}


# ---- what is run ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Name -> file or folder that values name as `${name}`."""
    folder = tmp_path_factory.mktemp("liveness")
    for name, kind, config in (
        ("other", "llama", {"seed": 1}),
        ("tied", "llama", {"tie_word_embeddings": True}),
        ("biased", "qwen2", {}),
    ):
        tiny.model(kind, bos_token_id=1, **config).save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    (folder / "rows.jsonl").write_text(_lines(ROWS))
    (folder / "others.jsonl").write_text(_lines([{**row, "question": row["question"] + "!"} for row in ROWS]))
    (folder / "template.jinja").write_text(tiny.CHATML.replace("<|im_start|>", "<|im_start|>the "))
    (folder / "text.txt").write_text("Once upon a time.\n\nThere was a model.\n")
    files = {"rows": "rows.jsonl", "others": "others.jsonl", "template": "template.jinja", "text": "text.txt"}
    return {
        "plain": str(tiny_folder),
        "elsewhere": str(folder / "elsewhere"),
        **{name: str(folder / name) for name in ("other", "tied", "biased")},
        **{name: str(folder / file) for name, file in files.items()},
    }


def _lines(rows: list[dict[str, str]]) -> str:
    """With a second right answer beside the first."""
    rows = [{**row, "answer": row["answer"], "right": [" 1", f" {row['answer']}"]} for row in rows]
    return "".join(json.dumps(row) + "\n" for row in rows)


class Runs:
    """Runs of recipes, each done once."""

    def __init__(self, folder: Path, places: dict[str, str]) -> None:
        """In numbered folders below this one."""
        self.folder, self.places = folder, places
        self.done: dict[tuple[str, Path], Shown] = {}

    def recipe(self, values: dict[str, Any]) -> Path:
        """The recipe file of BASE with these values on top; null takes a key away."""
        whole = {key: value for key, value in {**BASE, **values}.items() if value is not None}
        text = as_yaml(dict(sorted(whole.items())))[0].replace("$${", "${")
        text = re.sub(r"\$\{(\w+)\}", lambda found: self.places[found[1]], text)
        path = self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:12]}.yaml"
        path.write_text(text)
        return path

    def trained(self, values: dict[str, Any]) -> Shown:
        """What training shows."""
        return self.once("train", self.recipe(values), self._train)

    def measured(self, values: dict[str, Any]) -> Shown:
        """What `lora eval` shows, always of the same adapter."""
        self.trained({})
        return self.once("eval", self.recipe(values), self._measure)

    def once(self, command: str, path: Path, act: Callable[[Path], Shown]) -> Shown:
        """What a command shows of a recipe, run where that is not known."""
        if (command, path) not in self.done:
            with recorded() as computed:
                try:
                    shown = act(path)
                except UserError as error:
                    shown = Shown(refused=str(error))
            shown.computed = json.dumps(computed)
            self.done[command, path] = shown
        return self.done[command, path]

    def _train(self, path: Path) -> Shown:
        own = load.load(path).origin("output.dir")
        loaded = load.load(path, output=None if own else path.with_suffix(""))
        load.check_parts(loaded)
        screen = quiet()
        root = train(loaded.recipe, screen).parent
        log = [json.loads(line) for line in (root / "log.jsonl").read_text().splitlines()]
        names = sorted(str(each.relative_to(root)) for each in root.rglob("*") if "cache" not in each.parts)
        text = screen.console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
        return Shown(
            adapter=hashlib.sha256((root / "adapter/adapter_model.safetensors").read_bytes()).hexdigest(),
            log=json.dumps([{k: v for k, v in line.items() if k not in CLOCK} for line in log]),
            files=json.dumps([re.sub(r"tfevents.*", "tfevents", name) for name in names]),
            folder=str(root) if own else "runs/<name>",
            screen=re.sub(r"[\d.]+", "#", text.replace(str(root), "")),
        )

    def _measure(self, path: Path) -> Shown:
        predictions = path.with_suffix(".jsonl")
        run = self.recipe({}).with_suffix("")
        report = evaluate(run, path, [], quiet(), output=predictions)
        del report["predictions"]
        return Shown(measured=json.dumps(report) + predictions.read_text())


def quiet() -> Screen:
    """A screen that is only written down."""
    screen = Screen()
    screen.console = Console(file=io.StringIO(), width=110, highlight=False, soft_wrap=True)
    return screen


@contextmanager
def recorded() -> Iterator[list[str]]:
    """The micro-batches, the prompts answered at once, and the calls of an MLP while gradients are kept."""
    found: list[str] = []
    backward, generate = gradient._backward, generation._generate

    def noted_backward(run: Any, batch: Any, *rest: Any) -> Any:
        found.append(f"batch {tuple(batch.input_ids.shape)}")
        return backward(run, batch, *rest)

    def noted_generate(model: Any, tokenizer: Any, prompts: Any, *rest: Any) -> Any:
        found.append(f"prompts {len(prompts)}")
        return generate(model, tokenizer, prompts, *rest)

    def noted_call(module: Any, inputs: Any) -> None:
        if type(module).__name__.endswith("MLP") and torch.is_grad_enabled():
            found.append("block")

    hook = torch.nn.modules.module.register_module_forward_pre_hook(noted_call)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradient, "_backward", noted_backward)
        patch.setattr(generation, "_generate", noted_generate)
        patch.setattr(save, "plot", lambda folder: None)  # slow, and the log has all of it
        try:
            yield found
        finally:
            hook.remove()


@pytest.fixture(scope="module")
def runs(places: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Shared, so that what cases have in common is trained once."""
    return Runs(tmp_path_factory.mktemp("runs"), places)


# ---- the law -------------------------------------------------------------------------------------------------------


def cases() -> list[Any]:
    """Every case of every key."""
    found = [(key, case) for key, several in TRAINED.items() for case in _several(several)]
    return [pytest.param(key, case, id=f"{key}-{case.shows}") for key, case in found]


def _several(cases: Case | tuple[Case, ...]) -> tuple[Case, ...]:
    return cases if isinstance(cases, tuple) else (cases,)


def written(key: str) -> str:
    """The key under which an inner key or a setting is written."""
    return ".".join(key.split(".")[:2])


@pytest.mark.parametrize(("key", "case"), cases())
def test_changing_a_key_changes_what_its_description_names(runs: Runs, key: str, case: Case) -> None:
    before, after = runs.trained(case.given), runs.trained({**case.given, written(key): case.value})
    check_difference(case, before, after)


@pytest.mark.parametrize("key", MEASURED)
def test_changing_a_key_of_eval_changes_what_is_measured(runs: Runs, key: str) -> None:
    case = MEASURED[key]
    before, after = runs.measured(case.given), runs.measured({**case.given, key: case.value})
    check_difference(case, before, after)


def check_difference(case: Case, before: Shown, after: Shown) -> None:
    if case.shows == "refused":
        assert "" in (before.refused, after.refused), "one of both has to be right"
        assert re.search(case.told, before.refused + after.refused), (before.refused, after.refused)
    else:
        assert (before.refused, after.refused) == ("", "")
        assert getattr(before, case.shows) != getattr(after, case.shows), getattr(after, case.shows)


def test_the_same_recipe_shows_the_same_twice(runs: Runs, places: dict[str, str], tmp_path: Path) -> None:
    again = Runs(tmp_path, places)
    assert again.trained({}) == runs.trained({})


def test_a_key_of_eval_leaves_the_other_numbers_alone(runs: Runs) -> None:
    assert runs.measured({"eval.batch_size": 3}).measured == runs.measured({}).measured
    assert runs.measured({"eval.samples": 1}).measured == runs.measured({}).measured


def test_compare_plans_what_each_variant_says(runs: Runs) -> None:
    def planned(r: int) -> list[tuple[str, int]]:
        variants = {"compare.one": {"adapter.r": r}, "compare.two": {}}
        found = compare.plan([runs.recipe(variants)])
        return [(run.variant.name, run.recipe.adapter.r) for run in found.runs]

    assert planned(2) == [("one", 2), ("two", 4)]
    assert planned(3) == [("one", 3), ("two", 4)]
    with pytest.raises(UserError, match="nothing to compare"):
        compare.plan([runs.recipe({})])


@pytest.mark.parametrize("wanted", [True, False])
def test_only_deterministic_kernels_are_taken_when_that_is_wanted(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, wanted: bool
) -> None:
    """What it says of several processes is shown in test_processes.py."""
    seen, real = set[bool](), gradient._backward

    def noted(*arguments: Any) -> Any:
        seen.add(torch.are_deterministic_algorithms_enabled())
        return real(*arguments)

    monkeypatch.setattr(gradient, "_backward", noted)
    runs.trained({"train.deterministic": wanted, "train.seed": 5})
    assert seen == {wanted}
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_revision_of_a_hub_id_is_the_one_that_is_loaded(
    places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = tmp_path / "models--somebody--tiny"
    (hub / "refs").mkdir(parents=True)
    for revision, model in (("main", places["plain"]), ("older", places["other"])):
        commit = hashlib.sha1(revision.encode()).hexdigest()
        shutil.copytree(model, hub / "snapshots" / commit)
        (hub / "refs" / revision).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for revision, model in ((None, places["plain"]), ("older", places["other"])):
        loaded = models.load(ModelRecipe(name="somebody/tiny", revision=revision)).model
        assert torch.equal(loaded.lm_head.weight, models.load(ModelRecipe(name=model)).model.lm_head.weight)


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="here it works")
def test_flash_attention_is_refused_where_it_cannot_work(runs: Runs) -> None:
    assert "flash" in runs.trained({"model.attention": "flash_attention_2"}).refused.lower()
