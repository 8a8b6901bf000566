"""What is written loads back; the reference and the editors' schema say what the loader does."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli import parts
from lora_cli.errors import UserError
from lora_cli.recipe import dump, layers, load, read
from lora_cli.recipe.schema import Part, Recipe, Section, axes
from lora_cli.recipe.words import keys_of
from tests.recipe_values import RIGHT, WRONG, as_yaml, nested, recipes

QUICK = settings(deadline=None, database=None)
ROOT = Path(__file__).parent.parent
TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=40)
TRICKY = st.sampled_from(
    ["1e-4", "no", "null", "~", "", " a ", "a: b", "# a", "${HOME}", "$${", "$$${A}", "0x1F", "1_0", "-", "---",
     "...", "<<", "=", "a\nb\n", "\u2028\x85\ufeff\x7f\t", "😀", "'", '"', "\\", "{a}", "[", "&a", "*a", "!a",
     "@", "%", "1" * 400]
)  # fmt: skip
ANY_TEXT = TEXT | TRICKY
NUMBER = st.integers(-(10**99), 10**99) | st.floats(allow_nan=False, allow_infinity=False)
SCALAR = st.none() | st.booleans() | NUMBER | ANY_TEXT
KEY = (TEXT | TRICKY).filter(bool)
SETTING = st.recursive(
    SCALAR,
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.dictionaries(KEY, inner, max_size=3),
    max_leaves=6,
)
PATH = ANY_TEXT.filter(bool)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes")


def loaded(folder: Path, text: str, *overrides: str) -> load.Loaded:
    (folder / "r.yaml").write_text(text, encoding="utf-8")
    return load.load(folder / "r.yaml", overrides)


@st.composite
def made_recipes(draw: st.DrawFn) -> Recipe:
    """A recipe with any text and any settings of parts, made without the loader."""
    tree: Any = as_tuples(nested(draw(recipes(share=0.5))))
    tree["model"]["name"] = draw(PATH)
    tree["data"]["train"] = tuple(
        draw(st.lists(PATH | st.builds(source, PATH, SCALES, PATH), min_size=1, max_size=3))
    )
    tree["data"]["system"] = draw(st.none() | ANY_TEXT)
    tree["data"]["format"] = {"prompt": draw(ANY_TEXT), "completion": draw(ANY_TEXT)}
    tree.setdefault("output", {})["dir"] = draw(PATH)
    adapter = tree.setdefault("adapter", {})
    for axis in ("init", "dropout"):
        name = draw(st.sampled_from(parts.names(axis)))
        adapter[axis] = Part(
            name=name, settings=draw(st.dictionaries(KEY | st.just("p"), SETTING, max_size=2))
        )
    return Recipe.model_validate(tree)


SCALES = st.sampled_from([0.5, 1.0, 3.0])


def source(path: str, weight: float, split: str) -> dict[str, Any]:
    return {"path": path, "weight": weight, "split": split}


def as_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: as_tuples(inner) for key, inner in value.items()}
    return tuple(as_tuples(inner) for inner in value) if isinstance(value, list) else value


def same(one: Any, other: Any) -> bool:
    """Equal, and of the same types all the way down: 1 is not True."""
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


@given(recipe=made_recipes())
@settings(QUICK, max_examples=100)
def test_a_dumped_recipe_loads_back_into_an_equal_one(folder: Path, recipe: Recipe) -> None:
    again = loaded(folder, dump.to_yaml(recipe)).recipe
    assert again == recipe
    if recipe.adapter.dropout.settings.keys() != {"p"}:
        assert same(again.model_dump(), recipe.model_dump())


@given(value=SETTING)
@settings(QUICK, max_examples=500)
def test_a_value_on_one_line_reads_back_as_itself(value: Any) -> None:
    line = f"key: {dump.text(value)}"
    assert "\n" not in line
    assert same(layers.plain(read.read_text(line, str))["key"], value)


@given(values=recipes(share=0.5))
@QUICK
def test_a_dump_has_every_key_in_the_order_of_the_schema(folder: Path, values: dict[str, Any]) -> None:
    tree = layers.plain(read.read_text(dump.to_yaml(loaded(folder, as_yaml(values)[0]).recipe), str))
    assert [f"{section}.{key}" for section in tree for key in tree[section]] == list(RIGHT)


@given(values=recipes(share=0.5))
@QUICK
def test_every_value_is_explained_with_its_line(folder: Path, values: dict[str, Any]) -> None:
    text, at = as_yaml(values)
    told = dump.explained(loaded(folder, text))
    home = {key: ".".join(key.split(".")[:2]) for key, _, _ in told}
    assert len(home) == len(told)
    assert list(dict.fromkeys(home.values())) == list(RIGHT)
    for key, _, origin in told:
        assert origin == (f"{folder}/r.yaml:{at[home[key]]}" if home[key] in values else "default"), key


def test_settings_of_a_part_are_explained_under_its_name(folder: Path) -> None:
    text = "model: {name: m}\ndata: {train: [a, {path: b, weight: 2}]}\nadapter:\n  init: {kaiming: {x: 1}}\n"
    found = loaded(folder, text, "train.seed=3")
    told = {key: (value, origin.rpartition("/")[2]) for key, value, origin in dump.explained(found)}
    assert told["adapter.init.kaiming.x"] == ("1", "r.yaml:4")
    assert told["data.train.0"] == ("a", "r.yaml:2")
    assert told["data.train.1.weight"] == ("2.0", "r.yaml:2")
    assert told["train.seed"] == ("3", "--set")
    assert told["train.epochs"] == ("null", "default")
    assert told["output.dir"] == ("runs/r", "default")


# ---------------------------------------------------------------- recipes/lora.yaml


def test_the_reference_recipe_is_what_the_schema_says() -> None:
    assert (ROOT / "recipes/lora.yaml").read_bytes() == dump.reference().encode()


def test_the_reference_has_every_key_at_its_default_and_its_meaning() -> None:
    found = load.load(ROOT / "recipes/lora.yaml")
    assert [key for key in RIGHT if not found.origin(key)] == []
    required = {
        "model": {"name": found.recipe.model.name},
        "data": {"train": found.recipe.data.train[0].path},
    }
    assert found.recipe.model_copy(update={"output": Recipe(**required).output}) == Recipe.model_validate(
        required
    )
    text = " ".join(dump.reference().replace("#", " ").split())
    for section in keys_of(Recipe):
        inner: Any = Recipe.model_fields[section].annotation
        for key, field in inner.model_fields.items():
            assert field.description, f"{section}.{key} has no meaning"
            assert " ".join(field.description.split()) in text


def test_every_example_in_the_schema_is_a_right_value(folder: Path) -> None:
    for section in keys_of(Recipe):
        inner: Any = Recipe.model_fields[section].annotation
        for key, field in inner.model_fields.items():
            for example in field.examples or ():
                loaded(
                    folder, as_yaml({"model.name": "m", "data.train": "a", f"{section}.{key}": example})[0]
                )


# ---------------------------------------------------------------- JSON schema


@pytest.fixture(scope="module")
def checker() -> jsonschema.Draft202012Validator:
    schema = json.loads(json.dumps(dump.json_schema()))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@given(values=recipes(share=0.5))
@QUICK
def test_right_recipes_pass_the_editors_schema(
    checker: jsonschema.Draft202012Validator, values: dict[str, Any]
) -> None:
    checker.validate(nested(values))


@pytest.mark.parametrize("key", RIGHT)
def test_wrong_values_fail_the_editors_schema(checker: jsonschema.Draft202012Validator, key: str) -> None:
    # Regular expressions, names of methods, and what has no effect here.
    only_the_loader_knows = ("a(", {"q(": 1}, "lroa", {"path": "a", "weight": 2})
    for value in WRONG[key]:
        if value not in only_the_loader_knows:
            assert not checker.is_valid(nested({"model.name": "m", "data.train": "a", key: value})), value


def test_unknown_and_missing_keys_fail_the_editors_schema(checker: jsonschema.Draft202012Validator) -> None:
    right = nested({"model.name": "m", "data.train": {"path": "a"}})
    assert checker.is_valid(right)
    for mapping in (right, right["model"], right["data"], right["data"]["train"]):
        mapping["unknown"] = 1
        assert not checker.is_valid(right)
        del mapping["unknown"]
    for section in ("model", "data"):
        assert not checker.is_valid({**right, section: {}})
        assert not checker.is_valid({name: value for name, value in right.items() if name != section})
        assert checker.is_valid({**right, section: {}, "extends": "base.yaml"}), "the base may have it"
    assert not checker.is_valid({**right, "extends": 5})


def test_every_mapping_in_the_editors_schema_is_closed(checker: jsonschema.Draft202012Validator) -> None:
    def closed(schema: Any) -> None:
        if isinstance(schema, dict):
            if schema.get("type") == "object":
                assert schema.get("additionalProperties", True) is not True, schema
            for inner in schema.values():
                closed(inner)
        elif isinstance(schema, list):
            for inner in schema:
                closed(inner)

    closed(checker.schema)


def test_every_key_in_the_editors_schema_has_its_meaning(checker: jsonschema.Draft202012Validator) -> None:
    schema: Any = checker.schema
    for name in keys_of(Recipe):
        section = schema["$defs"][schema["properties"][name]["$ref"].rpartition("/")[2]]
        for key, field in section["properties"].items():
            assert field["description"]
            assert "default" in field or key in section["required" if "required" in section else "properties"]


def test_the_settings_of_a_part_are_in_the_editors_schema(
    checker: jsonschema.Draft202012Validator, folder: Path
) -> None:
    """Whatever a part declares: its defaults pass, a key it does not have fails, in the loader as in the editor."""
    base = {"model.name": "m", "data.train": "a"}
    for key, axis in axes().items():
        for name in parts.names(axis):
            settings_type = load.settings_of(axis, name)
            assert issubclass(settings_type, Section)
            assert not checker.is_valid(nested({**base, key: {name: {"no_such": 1}}}))
            found = loaded(folder, as_yaml({**base, key: {name: {"no_such": 1}}})[0])
            with pytest.raises(UserError, match="no_such"):
                load.check_parts(found)
            assert checker.is_valid(nested({**base, key: name}))
