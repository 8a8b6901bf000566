"""Keys that are nearly right, in the wrong place, or another tool's, get the right advice."""

import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from lora_cli.errors import UserError
from lora_cli.recipe import load, peers
from lora_cli.recipe.schema import Recipe
from lora_cli.recipe.words import keys_of

SECTIONS = keys_of(Recipe)
CLOSED = [section for section in SECTIONS if keys_of(Recipe, (section,))]
"""In the others every key is a name that somebody chose."""
HOME = {f"{section}.{key}": key for section in SECTIONS for key in keys_of(Recipe, (section,))}
INNER = {("data", "train"): keys_of(Recipe, ("data", "train")), ("data", "format"): ["prompt", "completion"]}
BASE = {"model": {"name": "m"}, "data": {"train": "a"}}

HABITS = """
lora_alpha lora_r lora_dropout lora_target_modules per_device_train_batch_size gradient_accumulation_steps
num_train_epochs num_epochs base_model model_name_or_path sequence_len cutoff_len max_seq_length optim
lr_scheduler_type output_dir bf16 fp16 load_in_4bit use_dora use_rslora datasets dataset sample_packing
val_set_size train_on_inputs gradient_checkpointing logging_steps eval_steps warmup_steps save_total_limit
modules_to_save report_to resume_from_checkpoint micro_batch_size torch_dtype trust_remote_code push_to_hub
deepspeed fsdp lora_rank finetuning_type lora_target template evaluation_strategy eval_strategy lr
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes")


def advice(folder: Path, text: str) -> str:
    path = folder / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load.load(path)
    return str(caught.value)


def with_keys(section: str, *keys: str) -> str:
    """A right recipe with more keys, at the top or in a section."""
    head = "model:\n  name: m\ndata:\n  train: a\n"
    inside = "".join(f"{'  ' if section else ''}{key}: 1\n" for key in keys)
    inside = f"{section}:\n{inside}" if section else inside
    return head.replace(f"{section}:\n", inside) if section in ("model", "data") else head + inside


def advice_on(folder: Path, section: str, keys: Iterable[str]) -> dict[str, str]:
    """What is told about each of many unknown keys in one place."""
    keys, told = list(keys), dict[str, str]()
    for first in range(0, len(keys), load.MOST):
        message = advice(folder, with_keys(section, *keys[first : first + load.MOST]))
        told.update(re.findall(r"unknown key '(\S+)'\n  → (.*)", message))
    return {key.removeprefix(f"{section}."): fix for key, fix in told.items()}


def typos(word: str) -> set[str]:
    """Every word that comes of dropping, swapping or doubling one letter."""
    dropped = {word[:i] + word[i + 1 :] for i in range(len(word))}
    swapped = {word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(len(word) - 1)}
    doubled = {word[: i + 1] + word[i:] for i in range(len(word))}
    return (dropped | swapped | doubled) - {word, ""}


def test_at_least_95_of_100_typos_get_the_key_that_was_meant(folder: Path) -> None:
    right: list[str] = []
    wrong: list[tuple[str, str, str]] = []
    for section, known in {
        "": SECTIONS,
        **{section: keys_of(Recipe, (section,)) for section in SECTIONS},
    }.items():
        meant = {typo: key for key in known for typo in typos(key) if typo not in known}
        told = advice_on(folder, section, meant)
        assert told.keys() == meant.keys()
        right += [typo for typo, key in meant.items() if told[typo] == f"did you mean '{key}'?"]
        wrong += [
            (section, typo, told[typo])
            for typo, key in meant.items()
            if told[typo] != f"did you mean '{key}'?"
        ]
    assert len(right) > 1000
    assert len(wrong) <= 0.05 * len(right + wrong), wrong
    assert {typo for _, typo, _ in wrong} <= {*peers.RENAMED, *peers.EXPLAINED}, (
        "such a typo is a right word elsewhere"
    )


@pytest.mark.parametrize(("keys", "known"), INNER.items())
def test_typos_inside_a_source_or_a_template_are_understood(
    folder: Path, keys: tuple[str, str], known: list[str]
) -> None:
    for key in known:
        for typo in typos(key) - set(known):
            told = advice(folder, f"model: {{name: m}}\ndata:\n  {keys[1]}:\n    {typo}: a\n")
            assert f"did you mean '{key}'?" in told


def test_a_key_of_another_section_is_sent_home(folder: Path) -> None:
    for section in ("", *CLOSED):
        strangers = {*HOME.values()} - {*(keys_of(Recipe, (section,)) if section else SECTIONS)}
        told = advice_on(folder, section, strangers)
        for key in strangers:
            homes = [dotted.split(".")[0] for dotted in HOME if HOME[dotted] == key]
            assert told[key] == f"'{key}' belongs under {' or '.join(map(repr, homes))}"


def test_a_section_that_slipped_to_the_right_is_sent_back(folder: Path) -> None:
    told = advice(folder, "model:\n  name: m\n  data: {train: a}\n  adapter: {r: 1}\n")
    assert "unknown key 'model.adapter'\n  → 'adapter' is a section: it belongs at the left margin" in told
    assert "missing" not in told


def test_every_habit_of_other_tools_is_answered_wherever_it_stands(folder: Path) -> None:
    habits = {*peers.RENAMED, *peers.EXPLAINED}
    assert not habits & {*HOME.values(), *SECTIONS}, "a key of ours is no habit of others"
    assert not peers.RENAMED.keys() & peers.EXPLAINED.keys()
    for section in ("", *CLOSED):
        assert advice_on(folder, section, habits) == {key: peers.advice(key) for key in habits}
    assert peers.advice("lora_alpha") == "in lora this is 'adapter.alpha'"


@pytest.mark.parametrize("key", HABITS.split())
def test_the_common_habits_are_known(folder: Path, key: str) -> None:
    told = advice(folder, with_keys("", key))
    assert "in lora this is" in told or "belongs under" in told or peers.EXPLAINED[key] in told


def test_other_tools_keys_are_recognised_with_a_typo(folder: Path) -> None:
    assert "'adapter.alpha'" in advice(folder, with_keys("adapter", "lora_alpa"))
    assert "train.micro_batch_size" in advice(folder, with_keys("", "per_device_train_batchsize"))
    assert "'adapter.r'" in advice(folder, with_keys("", "LORA_R"))


def test_translations_name_keys_that_exist() -> None:
    assert set(peers.RENAMED.values()) <= {*HOME, *SECTIONS}
    for text in peers.EXPLAINED.values():
        for named in re.findall(r"\b(?:model|data|adapter|train|eval|output)\.\w+", text):
            assert named in HOME, text


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("train: {precision: bf16}", "did you mean 'bfloat16'?"),
        ("train: {lr_scheduler: cosin}", "did you mean 'cosine'?"),
        ("train: {trackers: wandb}", "write [wandb]"),
        ("eval: {metrics: los}", "write [loss]"),
        ("adapter: {lora_bias: 'Yes'}", "write true"),
        ("adapter: {lora_bias: off}", "write false"),
        ("adapter: {r: 1_6}", "write 16, without quotes"),
        ("adapter: {alpha: '1e-4'}", "write 0.0001, without quotes"),
        ("adapter: {layers: 3}", "write [3]"),
        ("train: {batch_size: null}", "leave the key out"),
        ("eval: {references: {text}}", "put quotes around it"),
        ("output: {dir: ''}", "write something between the quotes"),
        ("adapter: {target_modules: 'q('}", "not a regular expression"),
        ("adapter: {target_modules: '[[a]'}", "not a regular expression"),
        ("adapter: {dropout: 1.5}", "expected a number ≥ 0 and < 1, or the name of a part"),
        ("train: {betas: [0.9]}", "expected a list of 2, each a number ≥ 0 and < 1, got a list of 1"),
        ("train: {micro_batch_size: 0}", "expected a whole number ≥ 1, or auto, got 0"),
        ("train: {seed: 9999999999}", "expected a whole number ≥ 0 and < 2147483648, got 9999999999"),
        ("train: {epochs: .inf}", "expected a number > 0, or null, got '.inf'"),
        ("eval: {choices: [a]}", "expected a list of at least 2, each text, or null, got a list of 1"),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_kind_is_answered_with_what_to_write(folder: Path, line: str, told: str) -> None:
    assert told in advice(folder, f"model: {{name: m}}\ndata: {{train: a}}\n{line}\n")
