"""Values for every key of a recipe, right ones and wrong ones, and recipes made of them."""

import json
from typing import Any

from hypothesis import strategies as st

WORD = st.text(st.characters(exclude_categories=("C", "Z"), exclude_characters="$"), min_size=1, max_size=12)
LINES = st.text(
    st.characters(exclude_categories=("Cs", "Co", "Cn"), exclude_characters="\0"), min_size=1, max_size=30
)
SOURCE = st.one_of(
    WORD, st.fixed_dictionaries({"path": WORD}, optional={"weight": st.sampled_from([2, 0.5])})
)
SOURCES = st.one_of(SOURCE, st.lists(SOURCE, min_size=1, max_size=3))
UNWEIGHTED = st.one_of(
    WORD, st.lists(st.one_of(WORD, st.fixed_dictionaries({"path": WORD})), min_size=1, max_size=3)
)
COUNT = st.integers(1, 10**6)
POSITIVE = st.one_of(COUNT, st.floats(1e-12, 1e12))
SHARE = st.floats(0, 0.5)
DTYPE = st.sampled_from(["auto", "float32"])
FLAG = st.booleans()


def or_null(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.none(), values)


RIGHT: dict[str, st.SearchStrategy[Any]] = {
    "model.name": WORD,
    "model.revision": or_null(WORD),
    "model.dtype": DTYPE,
    "model.quantize": or_null(st.sampled_from(["none", "nf4", "nf", "int4", "int8"])),
    "model.bits": or_null(st.floats(2.127, 9)),
    "model.attention": st.sampled_from(["auto", "eager", "sdpa", "flash_attention_2"]),
    "model.add_tokens": st.lists(WORD, max_size=2),
    "model.untie": FLAG,
    "model.split_experts": FLAG,
    "data.train": SOURCES,
    "data.eval": or_null(UNWEIGHTED),
    "data.eval_fraction": SHARE,
    "data.format": st.one_of(
        st.sampled_from(["auto", "messages", "alpaca", "sharegpt", "text"]),
        st.fixed_dictionaries({"prompt": LINES, "completion": LINES}),
    ),
    "data.chat_template": WORD,
    "data.system": or_null(LINES),
    "data.max_length": COUNT,
    "data.overflow": st.sampled_from(["error", "drop", "truncate"]),
    "data.train_on": st.sampled_from(["completion", "assistant", "all"]),
    "data.packing": st.one_of(st.just("auto"), FLAG),
    "adapter.method": st.sampled_from(["lora", "rslora"]),
    "adapter.r": or_null(COUNT),
    "adapter.alpha": or_null(POSITIVE),
    "adapter.dropout": st.one_of(
        st.floats(0, 0.99), st.just(0), st.just("standard"), st.just({"standard": {"p": 0.5}})
    ),
    "adapter.target_modules": st.one_of(st.sampled_from(["all-linear", "q.*", r"a\.b"]), st.just(["q_proj"])),
    "adapter.exclude_modules": st.lists(WORD, max_size=2),
    "adapter.layers": or_null(st.lists(st.integers(-5, 5), min_size=1, max_size=3)),
    "adapter.rank_pattern": st.dictionaries(
        st.sampled_from(["q_proj", "1", "null", r"a\.b$"]), COUNT, max_size=3
    ),
    "adapter.alpha_pattern": st.dictionaries(
        st.sampled_from(["q_proj", "~", "mlp: x"]), POSITIVE, max_size=3
    ),
    "adapter.lora_bias": FLAG,
    "adapter.train_also": st.lists(WORD, max_size=2),
    "adapter.init": or_null(st.sampled_from(["kaiming", "gaussian", {"zero_a": {}}, {"kaiming": None}])),
    "adapter.scale": or_null(st.sampled_from(["rslora", "alpha_over_r"])),
    "adapter.delta": or_null(st.just("lowrank")),
    "adapter.combine": or_null(st.just("add")),
    "adapter.trainable": or_null(st.sampled_from(["all", "lora_fa"])),
    "adapter.attention": or_null(st.just("full")),
    "adapter.rank": or_null(st.just("fixed")),
    "adapter.lifecycle": or_null(
        st.sampled_from(
            [[], "restart", ["delta_lora"], {"restart": {"every": 5}}, [{"restart": {}}, "delta_lora"]]
        )
    ),
    "train.epochs": or_null(POSITIVE),
    "train.max_steps": or_null(COUNT),
    "train.batch_size": COUNT,
    "train.micro_batch_size": st.one_of(st.just("auto"), COUNT),
    "train.learning_rate": st.floats(1e-6, 1),
    "train.lr_scheduler": st.sampled_from(["constant", "linear", "cosine", "inverse_sqrt"]),
    "train.warmup_ratio": or_null(st.floats(0, 1)),
    "train.warmup_steps": or_null(st.integers(0, 100)),
    "train.min_learning_rate": st.floats(0, 1e-6),
    "train.weight_decay": st.floats(0, 10),
    "train.optimizer": or_null(st.sampled_from(["adamw", {"lora_plus": {"ratio": 8.0}}])),
    "train.betas": st.lists(st.floats(0, 0.999), min_size=2, max_size=2),
    "train.max_grad_norm": or_null(POSITIVE),
    "train.precision": DTYPE,
    "train.gradient_checkpointing": st.one_of(FLAG, COUNT),
    "train.compile": FLAG,
    "train.on_no_fit": st.sampled_from(["adapt", "warn", "error"]),
    "train.seed": st.integers(0, 2**31 - 1),
    "train.deterministic": FLAG,
    "train.parallel": st.sampled_from(["ddp", "fsdp"]),
    "train.log_steps": COUNT,
    "train.eval_steps": or_null(COUNT),
    "train.save_steps": or_null(COUNT),
    "train.keep_checkpoints": st.integers(2, 100),
    "train.early_stopping_patience": or_null(COUNT),
    "train.trackers": st.lists(st.sampled_from(["tensorboard", "wandb"]), max_size=2),
    "eval.metrics": st.lists(st.sampled_from(["loss", "bleu"]), min_size=1, max_size=2),
    "eval.choices": or_null(st.lists(LINES, min_size=2, max_size=3)),
    "eval.references": or_null(WORD),
    "eval.forgetting": or_null(WORD),
    "eval.max_rows": or_null(COUNT),
    "eval.batch_size": COUNT,
    "eval.max_new_tokens": COUNT,
    "eval.samples": st.integers(0, 5),
    "output.dir": or_null(WORD),
}

TEXT_WRONG = (5, True, ["a"], {"a": 1}, "")
COUNT_WRONG = (0, -1, 1.5, "eight", "8", True, None, [1], {"a": 1}, "no")
FLAG_WRONG = ("yes", "no", "off", 1, 0, None, [True], "maybe")
NUMBER_WRONG = (-1, "x", "1e-4", True, [1.0], {"a": 1}, "inf")
LIST_WRONG = ("a", 5, [5], [None], {"a": 1}, None, True)
CHOICE_WRONG = ("bf61", 16, None, True, ["auto"], {"auto": 1})
PART_WRONG = ("no_such", 5, True, ["kaiming"], {"kaiming": 5}, {"a": {}, "b": {}}, {})
SOURCES_WRONG = (
    5,
    True,
    [],
    [5],
    {"pth": "a"},
    {"path": "a", "weight": 0},
    {"path": "a", "spilt": "b"},
    [["a"]],
    "",
)

WRONG: dict[str, tuple[Any, ...]] = {
    "model.name": (*TEXT_WRONG, None),
    "model.revision": TEXT_WRONG,
    "model.dtype": CHOICE_WRONG,
    "model.quantize": ("nf5", 4, True, ["nf4"], {"nf4": 1}),
    "model.bits": (2, 9.5, *NUMBER_WRONG),
    "model.attention": CHOICE_WRONG,
    "model.add_tokens": LIST_WRONG,
    "model.untie": FLAG_WRONG,
    "model.split_experts": FLAG_WRONG,
    "data.train": (*SOURCES_WRONG, None),
    "data.eval": (*SOURCES_WRONG, {"path": "a", "weight": 2}),
    "data.eval_fraction": (0.6, *NUMBER_WRONG),
    "data.format": (
        *CHOICE_WRONG[:3],
        {"prompt": "a"},
        {"promt": "a", "completion": "b"},
        {"prompt": 1, "completion": "b"},
    ),
    "data.chat_template": TEXT_WRONG,
    "data.system": TEXT_WRONG[:-1],
    "data.max_length": COUNT_WRONG,
    "data.overflow": CHOICE_WRONG,
    "data.train_on": CHOICE_WRONG,
    "data.packing": FLAG_WRONG,
    "adapter.method": ("lroa", *TEXT_WRONG),
    "adapter.r": (*COUNT_WRONG[:6], *COUNT_WRONG[7:]),
    "adapter.alpha": (0, *NUMBER_WRONG),
    "adapter.dropout": (1, 1.5, -0.1, "no_such", True, None, [0.1], {"standard": 5}),
    "adapter.target_modules": (5, True, [], [5], "a(", "", None),
    "adapter.exclude_modules": LIST_WRONG,
    "adapter.layers": ("a", 5, [], [1.5], [True], {"a": 1}),
    "adapter.rank_pattern": ({"q": 0}, {"q": "a"}, {"q(": 1}, ["q"], 5, None),
    "adapter.alpha_pattern": ({"q": 0}, {"q": "a"}, {"q(": 1}, ["q"], 5, None),
    "adapter.lora_bias": FLAG_WRONG,
    "adapter.train_also": LIST_WRONG,
    "adapter.init": PART_WRONG,
    "adapter.scale": PART_WRONG,
    "adapter.delta": PART_WRONG,
    "adapter.combine": PART_WRONG,
    "adapter.trainable": PART_WRONG,
    "adapter.attention": PART_WRONG,
    "adapter.rank": PART_WRONG,
    "adapter.lifecycle": (
        "no_such",
        5,
        True,
        [5],
        ["no_such"],
        {"restart": 5},
        [{"restart": {}, "serial": {}}],
    ),
    "train.epochs": (0, *NUMBER_WRONG),
    "train.max_steps": (*COUNT_WRONG[:6], *COUNT_WRONG[7:]),
    "train.batch_size": COUNT_WRONG,
    "train.micro_batch_size": COUNT_WRONG,
    "train.learning_rate": (*NUMBER_WRONG, None),
    "train.lr_scheduler": CHOICE_WRONG[:1],
    "train.warmup_ratio": (1.5, *NUMBER_WRONG),
    "train.warmup_steps": COUNT_WRONG[1:6],
    "train.min_learning_rate": (*NUMBER_WRONG, None),
    "train.weight_decay": (*NUMBER_WRONG, None),
    "train.optimizer": PART_WRONG,
    "train.betas": ([0.9], [0.9, 1], [0.9, 0.9, 0.9], ["a", 0.9], 0.9, None, [True, 0.5]),
    "train.max_grad_norm": (0, *NUMBER_WRONG),
    "train.precision": CHOICE_WRONG,
    "train.gradient_checkpointing": (*FLAG_WRONG[:3], *FLAG_WRONG[4:], -1, 1.5),
    "train.compile": FLAG_WRONG,
    "train.on_no_fit": CHOICE_WRONG,
    "train.seed": (2**31, *COUNT_WRONG[1:]),
    "train.deterministic": FLAG_WRONG,
    "train.parallel": CHOICE_WRONG,
    "train.log_steps": COUNT_WRONG,
    "train.eval_steps": COUNT_WRONG[:6],
    "train.save_steps": COUNT_WRONG[:6],
    "train.keep_checkpoints": (1, *COUNT_WRONG),
    "train.early_stopping_patience": COUNT_WRONG[:6],
    "train.trackers": ("wandb", ["wandbb"], 5, None, [1]),
    "eval.metrics": ("loss", ["lss"], [], 5, None),
    "eval.choices": ("a", ["a"], [1, 2], 5),
    "eval.references": TEXT_WRONG,
    "eval.forgetting": TEXT_WRONG,
    "eval.max_rows": COUNT_WRONG[:6],
    "eval.batch_size": COUNT_WRONG,
    "eval.max_new_tokens": COUNT_WRONG,
    "eval.samples": COUNT_WRONG[1:],
    "output.dir": TEXT_WRONG,
}

RIVALS = ("train.max_steps", "train.warmup_steps", "data.eval_fraction")
NEEDS_HELD_OUT = ("train.eval_steps", "train.early_stopping_patience", "eval.samples")


@st.composite
def recipes(draw: st.DrawFn, share: float = 0.3) -> dict[str, Any]:
    """Dotted key -> value of a recipe that is right: both required keys, and others free of contradictions."""
    optional = [key for key in RIGHT if key not in ("model.name", "data.train", *RIVALS, *NEEDS_HELD_OUT)]
    chosen = {"model.name", "data.train", *(key for key in optional if draw(st.floats(0, 1)) < share)}
    values = {key: draw(RIGHT[key]) for key in RIGHT if key in chosen}
    if values.get("data.eval") is not None:
        values |= {key: draw(RIGHT[key]) for key in NEEDS_HELD_OUT}
    if values.get("model.bits") is not None:
        values["model.quantize"] = "nf"
    return {key: values[key] for key in RIGHT if key in values}


def as_yaml(values: dict[str, Any]) -> tuple[str, dict[str, int]]:
    """YAML with one key a line, values as JSON, and the line of each key and section."""
    lines: list[str] = []
    at: dict[str, int] = {}
    for section in dict.fromkeys(key.partition(".")[0] for key in values):
        lines.append(f"{section}:")
        at[section] = len(lines)
        for key, value in values.items():
            if key.startswith(f"{section}."):
                lines.append(f"  {key.partition('.')[2]}: {as_json(value)}")
                at[key] = len(lines)
    return "\n".join(lines) + "\n", at


def as_json(value: Any) -> str:
    """JSON that is YAML too: what YAML cannot hold is escaped, and so is what a recipe reads as a variable."""
    text = json.dumps(value, ensure_ascii=False).replace("${", "$${")
    return "".join(char if char.isprintable() or char == " " else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    return f"\\u{ord(char):04x}" if ord(char) < 2**16 else f"\\U{ord(char):08x}"


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys as sections."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        tree.setdefault(section, {})[name] = value
    return tree
