"""A recipe loads exactly when it is right; every mistake is told once, with its line, all of them together."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from lora_cli import parts
from lora_cli.errors import UserError
from lora_cli.recipe import load
from lora_cli.recipe.schema import EXCLUSIVE, Part, Recipe, Section, axes
from lora_cli.recipe.words import keys_of
from tests.recipe_values import RIGHT, WRONG, as_yaml, recipes

QUICK = settings(deadline=None, database=None)
BASE = "model: {name: m}\ndata:\n  train: a.jsonl\n"
KEYS = [f"{section}.{key}" for section in keys_of(Recipe) for key in keys_of(Recipe, (section,))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes")


def loaded(folder: Path, text: str, *overrides: str, output: Path | None = None) -> load.Loaded:
    path = folder / "r.yaml"
    path.write_text(text, encoding="utf-8")
    return load.load(path, overrides, output)


def refusal(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        loaded(folder, text, *overrides)
    return str(caught.value).replace(f"{folder}/", "")


def lines_of(message: str) -> list[int]:
    return [int(line) for line in re.findall(r"^r\.yaml:(\d+): ", message, re.MULTILINE)]


def test_the_values_of_these_tests_cover_every_key() -> None:
    assert list(RIGHT) == KEYS
    assert WRONG.keys() == set(KEYS)


@given(values=recipes())
@QUICK
def test_a_right_recipe_loads_as_written(folder: Path, values: dict[str, Any]) -> None:
    recipe = loaded(folder, as_yaml(values)[0]).recipe
    for key in ("model.name", "adapter.r", "train.seed", "train.learning_rate", "data.system"):
        if key in values:
            section, name = key.split(".")
            assert getattr(getattr(recipe, section), name) == values[key]


@pytest.mark.parametrize("key", KEYS)
def test_each_wrong_value_is_one_error_that_says_where_and_what(folder: Path, key: str) -> None:
    for value in WRONG[key]:
        text, at = as_yaml({"model.name": "m", "data.train": "a", key: value})
        message = refusal(folder, text)
        assert set(lines_of(message)) == {at[key]}, message
        assert key in message
        assert not re.search(r"pydantic|Input should|NoneType|\btuple\b|\bdict\b|valid (int|str)", message)


@given(values=recipes(share=0.5), chance=st.randoms(use_true_random=False))
@settings(QUICK, max_examples=200)
def test_all_mistakes_are_told_and_nothing_else(folder: Path, values: dict[str, Any], chance: Any) -> None:
    broken = {key: chance.choice(WRONG[key]) for key in values if chance.random() < 0.3}
    unknown = {f"{key}x_": 1 for key in values if chance.random() < 0.1}
    text, at = as_yaml({**values, **broken, **unknown})
    if broken or unknown:
        assert set(lines_of(refusal(folder, text))) == {at[key] for key in (*broken, *unknown)}
    else:
        loaded(folder, text)


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_numbers_are_finite_however_a_recipe_was_made(number: float) -> None:
    for key in ("alpha", "dropout"):
        with pytest.raises(ValueError, match=key):
            Recipe.model_validate({"model": {"name": "m"}, "data": {"train": "a"}, "adapter": {key: number}})


def test_errors_stand_in_the_order_of_the_file(folder: Path) -> None:
    message = refusal(folder, "train: {epochs: 0}\nmodel:\n  name: 5\nadapter:\n  r: 0\ndata: {train: 5}\n")
    assert lines_of(message) == [1, 3, 5, 6]


def test_the_wording_is_for_people(folder: Path) -> None:
    text = BASE + "adapter:\n  r: eight\n  alpha: '8'\n  lora_bias: yes\nmodle: 1\n"
    assert refusal(folder, text) == (
        "r.yaml:5: adapter.r: expected a whole number ≥ 1, or null, got 'eight'\n"
        "r.yaml:6: adapter.alpha: expected a number > 0, or null, got '8'\n  → write 8, without quotes\n"
        "r.yaml:7: adapter.lora_bias: expected true or false, got 'yes'\n  → write true\n"
        "r.yaml:8: unknown key 'modle'\n  → did you mean 'model'?"
    )


def test_a_missing_key_is_told_unless_an_unknown_one_stands_for_it(folder: Path) -> None:
    assert "missing key 'model.name'" in refusal(folder, "model: {dtype: auto}\ndata: {train: a}\n")
    assert "missing key 'data'" in refusal(folder, "model: {name: a}\n")
    for stands_for in ("base_model: a", "modle: {name: a}", "model: {nam: a}"):
        assert "missing" not in refusal(folder, f"{stands_for}\ndata: {{train: a}}\n")
    assert "empty" in refusal(folder, "# nothing\n")
    assert "mapping" in refusal(folder, "[a, b]\n")


def test_a_missing_key_is_told_of_the_file_not_of_the_override_beside_it(folder: Path) -> None:
    message = refusal(folder, "data: {train: a}\nmodel: {revision: b}\n", "model.dtype=float32")
    assert lines_of(message) == [2]


def test_a_duplicate_section_in_the_base_is_told_though_the_child_has_it_too(folder: Path) -> None:
    (folder / "base.yaml").write_text(BASE + "adapter: {r: 1}\nadapter: {r: 2}\n")
    assert "base.yaml:5: adapter: duplicate key" in refusal(folder, "extends: base.yaml\nadapter: {r: 3}\n")


def test_a_duplicate_key_names_both_lines(folder: Path) -> None:
    message = refusal(folder, BASE + "  train: b.jsonl\nadapter: {r: 0}\n")
    assert "r.yaml:4: data.train: duplicate key, first at r.yaml:3" in message
    assert "adapter.r" in message


@pytest.mark.parametrize(
    ("text", "line", "named"),
    [
        ("train:\n  epochs: 1\n  max_steps: 5\n", 5, "'epochs' and 'max_steps'"),
        ("train:\n  warmup_ratio: 0.1\n  warmup_steps: 5\n", 5, "'warmup_ratio' and 'warmup_steps'"),
        ("  eval: b\n  eval_fraction: 0.1\n", 4, "'eval' and 'eval_fraction'"),
        ("train:\n  seed: 1\n  min_learning_rate: 1\n", 6, "'min_learning_rate' is above"),
        ("train:\n  seed: 1\n  eval_steps: 1\n", 6, "'train.eval_steps' needs held-out"),
        (
            "train:\n  seed: 1\n  early_stopping_patience: 1\n",
            6,
            "'train.early_stopping_patience' needs held-out",
        ),
        ("eval:\n  batch_size: 1\n  samples: 1\n", 6, "'eval.samples' needs held-out"),
    ],
)
def test_a_contradiction_points_at_a_line_that_takes_part(
    folder: Path, text: str, line: int, named: str
) -> None:
    message = refusal(folder, BASE + text)
    assert named in message
    assert lines_of(message) == [line]


def test_contradictions_are_told_together_and_beside_other_mistakes(folder: Path) -> None:
    text = (
        "train: {epochs: 1, max_steps: 2, warmup_ratio: 0, warmup_steps: 1, eval_steps: 3}\nadapter: {r: 0}\n"
    )
    message = refusal(folder, BASE + text + "eval: {samples: 2}\n")
    assert message.count("exclude each other") == 2
    assert message.count("held-out") == 2
    assert "adapter.r" in message


def test_a_mistake_does_not_make_up_a_contradiction(folder: Path) -> None:
    message = refusal(folder, BASE + "train: {learning_rate: fast, min_learning_rate: 0.1}\n")
    assert "above" not in message
    message = refusal(folder, BASE + "  eval: 5\ntrain: {eval_steps: 10}\n")
    assert "held-out" not in message


# ---------------------------------------------------------------- origins, overrides, --output


def test_origins_name_the_line_of_every_written_value(folder: Path) -> None:
    text = BASE + "adapter:\n  init:\n    kaiming: {}\n  r: 4\n  rank_pattern:\n    q: 3\n"
    found = loaded(folder, text, "train.seed=3", output=Path("o"))
    path = folder / "r.yaml"
    assert found.origins == {
        "model.name": f"{path}:1", "data.train": f"{path}:3", "adapter.init.kaiming": f"{path}:6",
        "adapter.r": f"{path}:7", "adapter.rank_pattern.q": f"{path}:9",
        "train.seed": "--set", "output.dir": "--output",
    }  # fmt: skip
    assert found.origin("adapter.init") == f"{path}:6"
    assert found.origin("data.train.0.path") == f"{path}:3"
    assert found.origin("train.epochs") == ""


@given(values=recipes())
@QUICK
def test_a_key_has_an_origin_exactly_when_it_was_written(folder: Path, values: dict[str, Any]) -> None:
    text, at = as_yaml(values)
    found = loaded(folder, text)
    for key in KEYS:
        line = found.origin(key).rpartition(":")[2]
        assert line == (str(at[key]) if key in values else ""), key


def test_list_items_have_origins(folder: Path) -> None:
    text = "model: {name: m}\ndata:\n  train:\n    - path: a\n    - b\n"
    origins = loaded(folder, text).origins
    assert origins["data.train.0.path"].endswith(":4")
    assert origins["data.train.1"].endswith(":5")


def test_the_output_folder_is_named_after_the_recipe_unless_told(folder: Path) -> None:
    assert loaded(folder, BASE).recipe.output.dir == "runs/r"
    assert loaded(folder, BASE + "output: {dir: x}\n").recipe.output.dir == "x"
    assert loaded(folder, BASE + "output: {dir: null}\n").recipe.output.dir == "runs/r"
    assert loaded(folder, BASE + "output: {dir: x}\n", output=Path("y")).recipe.output.dir == "y"
    assert loaded(folder, BASE).name == "r"


@given(values=recipes())
@QUICK
def test_an_override_is_the_same_as_a_line_in_the_file(folder: Path, values: dict[str, Any]) -> None:
    text, _ = as_yaml(values)
    flags = [f"{key}={line.partition(': ')[2]}" for key, line in zip(values, settings_of(text), strict=True)]
    assert loaded(folder, BASE, *flags).recipe == loaded(folder, text).recipe


def settings_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("  ")]


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("adapter.r=8", "adapter.r", 8),
        ("train.learning_rate=1e-4", "train.learning_rate", 1e-4),
        ("data.system=yes", "data.system", "yes"),
        ("data.system=Be kind: {always} # really", "data.system", "Be kind: {always} # really"),
        ("data.system='8'", "data.system", "8"),
        ("data.system=a=b", "data.system", "a=b"),
        ("data.system=", "data.system", None),
        ("train.max_grad_norm=null", "train.max_grad_norm", None),
        ("adapter.layers=[0, -1]", "adapter.layers", (0, -1)),
        ("adapter.target_modules=[q, v]", "adapter.target_modules", ("q", "v")),
        ("adapter.init=gaussian", "adapter.init", Part(name="gaussian")),
        ("adapter.dropout=0.5", "adapter.dropout", Part(name="standard", settings={"p": 0.5})),
        ("adapter.dropout.standard.p=0.5", "adapter.dropout", Part(name="standard", settings={"p": 0.5})),
        ("adapter.rank_pattern.q=3", "adapter.rank_pattern", {"q": 3}),
    ],
)
def test_overrides_are_read_like_the_shell_shows_them(
    folder: Path, override: str, key: str, value: Any
) -> None:
    recipe = loaded(folder, BASE + "adapter: {init: {kaiming: {}}, r: 2}\n", override).recipe
    section, name = key.split(".")
    assert getattr(getattr(recipe, section), name) == value


def test_a_list_of_files_can_be_set(folder: Path) -> None:
    recipe = loaded(folder, BASE, "data.train=[a.jsonl, {path: b.jsonl, weight: 2}]").recipe
    assert [(source.path, source.weight) for source in recipe.data.train] == [("a.jsonl", 1), ("b.jsonl", 2)]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("adapter.rr=8", "did you mean 'r'?"),
        ("adapter.r=eight", "expected a whole number ≥ 1"),
        ("r=8", "'r' belongs under 'adapter'"),
        ("adapter.init=kaimin", "did you mean 'kaiming'?"),
        ("adapter.lora_alpha=3", "'adapter.alpha'"),
        ("train=5", "expected a mapping of settings"),
        ("data.train=[a", "not valid YAML"),
        ("data.train={a: 1}: 2", "expected a key"),
        ("nothing", "expected key=value"),
        ("=3", "expected key=value"),
        ("adapter..r=3", "expected key=value"),
        (".".join(["a"] * 5000) + "=3", "expected key=value"),
        ("extends=other.yaml", "unknown key 'extends'"),
        ("model.name=a\0b", "U+0000"),
        ("model.name=\udc80", "U+DC80"),
        ("model.name=${NOT_SET_ANYWHERE}", "NOT_SET_ANYWHERE is not set"),
    ],
)
def test_a_wrong_override_is_told_as_it_was_typed(folder: Path, override: str, told: str) -> None:
    message = refusal(folder, BASE, override)
    assert f"--set {override}: " in message
    assert told in message


# ---------------------------------------------------------------- extends


def test_a_child_wins_key_by_key_and_each_value_keeps_its_file(folder: Path) -> None:
    (folder / "base.yaml").write_text(BASE + "  max_length: 5\nadapter:\n  r: 2\n  layers: [1, 2]\n")
    found = loaded(folder, "extends: base.yaml\nadapter:\n  r: 3\n  layers: [7]\n")
    assert (found.recipe.adapter.r, found.recipe.adapter.layers, found.recipe.data.max_length) == (3, (7,), 5)
    assert found.origins["adapter.r"] == f"{folder}/r.yaml:3"
    assert found.origins["data.max_length"] == f"{folder}/base.yaml:4"
    message = refusal(folder, "extends: base.yaml\nadapter: {rr: 3}\ndata: {max_length: 0}\n")
    assert lines_of(message) == [2, 3]


def test_a_mistake_in_the_base_is_told_with_its_own_file(folder: Path) -> None:
    (folder / "base.yaml").write_text(BASE + "adapter: {rr: 2}\n")
    assert "base.yaml:4: unknown key 'adapter.rr'" in refusal(
        folder, "extends: base.yaml\ntrain: {seed: 1}\n"
    )
    for nothing in ("", "[a]", "5"):
        (folder / "base.yaml").write_text(nothing)
        assert refusal(folder, "extends: base.yaml\n" + BASE).startswith("base.yaml:1: ")
    (folder / "base.yaml").write_text("model: [\n")
    assert re.match(r"base\.yaml:2: not valid YAML", refusal(folder, "extends: base.yaml\n"))


@given(below=recipes(), above=recipes())
@QUICK
def test_extending_is_laying_one_recipe_over_the_other(
    folder: Path, below: dict[str, Any], above: dict[str, Any]
) -> None:
    """The oracle: one flat table, where mappings that are not parts are joined."""
    if above.get("data.eval", "") is None:
        del above["data.eval"]  # what needs held-out rows below would rightly complain
    if below.get("model.bits") is not None and above.get("model.quantize", "nf") != "nf":
        del above["model.quantize"]  # and so would bits that nothing shares out
    flat = {**below, **above}
    for key in below.keys() & above.keys() - axes().keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            flat[key] = {**below[key], **above[key]}
    (folder / "base.yaml").write_text(as_yaml(below)[0], encoding="utf-8")
    child = loaded(folder, "extends: base.yaml\n" + as_yaml(above)[0]).recipe
    assert child == loaded(folder, as_yaml(flat)[0]).recipe


@pytest.mark.parametrize(
    ("kept", "rival", "one", "other"),
    [
        ("train.epochs", "train.max_steps", 2, 5),
        ("train.warmup_ratio", "train.warmup_steps", 0.1, 0),
        ("data.eval", "data.eval_fraction", "e.jsonl", 0.1),
    ],
)
def test_setting_one_of_two_rivals_takes_the_other_back(
    folder: Path, kept: str, rival: str, one: Any, other: Any
) -> None:
    assert (kept, rival) in EXCLUSIVE
    for (first, a), (second, b) in [((kept, one), (rival, other)), ((rival, other), (kept, one))]:
        values = {"model.name": "m", "data.train": "a"}
        (folder / "base.yaml").write_text(as_yaml({**values, first: a})[0])
        only = loaded(folder, as_yaml({**values, second: b})[0]).recipe
        assert loaded(folder, "extends: base.yaml\n" + as_yaml({second: b})[0]).recipe == only
        assert loaded(folder, as_yaml({**values, first: a})[0], f"{second}={b}").recipe == only
        assert "exclude each other" in refusal(folder, as_yaml({**values, first: a, second: b})[0])


def test_the_patterns_of_a_child_come_first(folder: Path) -> None:
    (folder / "base.yaml").write_text(BASE + "adapter: {rank_pattern: {a: 1, b: 2}}\n")
    child = loaded(folder, "extends: base.yaml\nadapter: {rank_pattern: {c: 3, b: 4}}\n").recipe
    assert list(child.adapter.rank_pattern.items()) == [("c", 3), ("b", 4), ("a", 1)]


def test_another_part_comes_without_the_settings_of_the_first(folder: Path) -> None:
    (folder / "base.yaml").write_text(BASE + "adapter: {init: {kaiming: {a: 1, b: 2}}}\n")
    child = loaded(folder, "extends: base.yaml\nadapter: {init: {gaussian: {c: 3}}}\n").recipe
    assert child.adapter.init == Part(name="gaussian", settings={"c": 3})
    child = loaded(folder, "extends: base.yaml\nadapter: {init: {kaiming: {a: 3}}}\n").recipe
    assert child.adapter.init == Part(name="kaiming", settings={"a": 3, "b": 2})


def test_extends_is_relative_to_its_own_file(folder: Path) -> None:
    (folder / "sub").mkdir(exist_ok=True)
    (folder / "sub" / "a.yaml").write_text("extends: b.yaml\n")
    (folder / "sub" / "b.yaml").write_text(BASE)
    assert loaded(folder, "extends: sub/a.yaml\n").recipe.model.name == "m"


def test_extends_refuses_circles_depth_and_nonsense(folder: Path) -> None:
    (folder / "base.yaml").write_text("extends: ./r.yaml\n")
    assert "base.yaml:1: extends goes round" in refusal(folder, "extends: base.yaml\n")
    assert "r.yaml:1: extends goes round" in refusal(folder, "extends: r.yaml\n")
    assert "r.yaml:2: extends: nowhere.yaml: no such file" in refusal(folder, "\nextends: nowhere.yaml\n")
    for nonsense in ("5", "[a, b]", "''", "null", "{a: b}", '"a\\0b"', "."):
        assert "r.yaml:1: " in refusal(folder, f"extends: {nonsense}\n")
    for i in range(10):
        (folder / f"c{i}.yaml").write_text(f"extends: c{i + 1}.yaml\n")
    assert "deeper than 8" in refusal(folder, "extends: c0.yaml\n")


# ---------------------------------------------------------------- variables


def test_variables_are_filled_in_as_text_or_as_what_stands_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_RANK", "8")
    monkeypatch.setenv("DATA_DIR", "/data: x")
    text = 'model: {name: "m${LORA_RANK}"}\ndata:\n  train: ${DATA_DIR}/a.jsonl\n  system: "${LORA_RANK}"\n'
    found = loaded(folder, text + "adapter:\n  r: ${LORA_RANK}\n")
    assert found.recipe.adapter.r == 8
    assert found.recipe.data.system == "8"
    assert found.recipe.model.name == "m8"
    assert found.recipe.data.train[0].path == "/data: x/a.jsonl"
    assert found.origins["adapter.r"] == f"${{LORA_RANK}} at {folder}/r.yaml:6"


def test_two_dollars_are_one(folder: Path) -> None:
    recipe = loaded(folder, BASE + "  system: a $${X} $$${X} $X $ {X}\n").recipe
    assert recipe.data.system == "a ${X} $${X} $X $ {X}"


@pytest.mark.parametrize("value", ["${NOT_SET_ANYWHERE}", "${}", "${a b}", "${A:-b}", "x${", "${HOME"])
def test_a_variable_that_cannot_be_filled_is_told(folder: Path, value: str) -> None:
    message = refusal(folder, BASE + f"  system: {value}\nadapter: {{r: 0}}\n")
    assert lines_of(message) == [4, 5]
    assert "data.system" in message


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "WANDB_API_KEY",
        "AWS_SECRET_ACCESS",
        "DB_PASSWORD",
        "MY_CREDENTIALS",
        "token",
        "APIKEY",
        "KEY",
    ],
)
def test_secrets_are_refused_and_never_shown(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "canary-5e1f")
    message = refusal(folder, BASE + f"  system: ${{{name}}}\n")
    assert "looks like a secret" in message
    assert "canary" not in message


def test_harmless_names_are_not_taken_for_secrets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TOKENIZER_DIR", "MAX_TOKENS", "KEYBOARD", "DATA", "AUTHOR"):
        monkeypatch.setenv(name, "x")
        assert loaded(folder, BASE + f"  system: ${{{name}}}\n").recipe.data.system == "x"


# ---------------------------------------------------------------- parts


class PartSettings(Section):
    """Settings of a made-up part."""

    niter: Annotated[int, Field(ge=0)] = 4
    factors: tuple[float, ...] = ()


class DropSettings(Section):
    """What the default dropout needs."""

    p: float


@pytest.fixture
def made_up_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """An init part `kaiming` with settings; every other part takes none."""

    def load_part(axis: str, name: str) -> Any:
        settings = {"kaiming": PartSettings, "standard": DropSettings}.get(name)
        return SimpleNamespace(Settings=settings) if settings else SimpleNamespace()

    monkeypatch.setattr(parts, "load", load_part)


@pytest.mark.usefixtures("made_up_part")
def test_settings_of_parts_are_checked_together_with_their_lines(folder: Path) -> None:
    text = (
        "adapter:\n  init:\n    kaiming:\n      niter: -1\n      factrs: [1]\n  scale:\n    rslora: {x: 1}\n"
    )
    found = loaded(folder, BASE + text)
    with pytest.raises(UserError) as caught:
        load.check_parts(found)
    message = str(caught.value).replace(f"{folder}/", "")
    assert "r.yaml:7: adapter.init.kaiming.niter: expected a whole number ≥ 0, got -1" in message
    assert "r.yaml:8: unknown key 'adapter.init.kaiming.factrs'\n  → did you mean 'factors'?" in message
    assert "r.yaml:10: unknown key 'adapter.scale.rslora.x'\n  → nothing can be set here" in message
    load.check_parts(loaded(folder, BASE + "adapter: {init: {kaiming: {niter: 2, factors: [1, 0.5]}}}\n"))


@pytest.mark.usefixtures("made_up_part")
def test_settings_set_on_the_command_line_are_checked_too(folder: Path) -> None:
    with pytest.raises(UserError, match=r"^--set: adapter\.init\.kaiming\.niter: expected") as caught:
        load.check_parts(loaded(folder, BASE, "adapter.init.kaiming.niter=x"))
    assert "--set" in caught.value.where


# ---------------------------------------------------------------- what a recipe can never do


def test_no_key_names_code_an_import_or_a_variable() -> None:
    schema_keys = [*KEYS, *(f"data.train.{key}" for key in keys_of(Recipe, ("data", "train")))]
    for key in schema_keys:
        assert not re.search(
            r"code|trust|import|class|plugin|hook|script|exec|eval_str|env|command|callable", key
        )


@pytest.mark.parametrize(
    "name", ["os.system", "../init/kaiming", "lora_cli.parts", "__init__", "kaiming.py", "/etc/x"]
)
def test_parts_come_out_of_the_registry_only(folder: Path, name: str) -> None:
    for key in axes():
        section, _, inner = key.partition(".")
        assert "unknown" in refusal(folder, BASE + f"{section}: {{{inner}: '{name}'}}\n")


def test_remote_code_is_refused_with_the_reason(folder: Path) -> None:
    for text in ("trust_remote_code: true\n", "adapter: {trust_remote_code: true}\n"):
        assert "cannot run code" in refusal(folder, BASE + text)


def test_loading_imports_nothing_heavy(folder: Path) -> None:
    path = folder / "light.yaml"
    path.write_text(BASE)
    code = (
        "import sys, pathlib; from lora_cli.recipe import load, dump, init;"
        f"dump.to_yaml(load.load(pathlib.Path({str(path)!r})).recipe); dump.reference();"
        "print({'torch', 'transformers', 'numpy', 'datasets', 'safetensors'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
