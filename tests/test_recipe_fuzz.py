"""Ten thousand recipes that a person or a bad disk got wrong: each is told with its place and its key.

Other ones in every session, a hundred thousand with LORA_LONG=1. A failure shows the recipe, and the seed that makes
the same ones again.
"""

import os
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from lora_cli import cli, parts
from lora_cli.errors import ExitCode, UserError
from lora_cli.recipe import load, peers, read
from lora_cli.recipe.schema import Recipe, axes
from lora_cli.recipe.words import keys_of
from tests.recipe_values import NEEDS_HELD_OUT, WRONG, as_json, recipes

COUNT = 100_000 if os.environ.get("LORA_LONG") else 10_000
BATCHES = 10
SECTIONS = {section: keys_of(Recipe, (section,)) for section in keys_of(Recipe) if section != "compare"}
REQUIRED = ("model.name", "data.train")
UNTOLD = re.compile(r"pydantic|Input should|Traceback|NoneType")
PLACED = re.compile(r"(\$\{\w+\} at )?\S*/(r|base)\.yaml(:\d+)?: .")

Chance = random.Random


@dataclass
class Entry:
    """One key of a recipe and what must be said about it."""

    key: str
    """Dotted."""
    value: Any
    told: str = ""
    """Words of the message about it; empty where it is right."""
    meant: str = ""
    """The key that its misspelt name stands for."""
    free: bool = False
    """Whether it is right, nobody knows."""
    needed: bool = False
    """Whether there is no recipe without it."""
    again: bool = False
    """Whether it is a second time there."""


@dataclass
class Written:
    """A recipe on disk."""

    files: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    """Name -> lines."""
    places: list[tuple[Entry, str, str]] = field(default_factory=list[tuple[Entry, str, str]])
    """Entry, its `file:line`, and its name in messages."""

    def show(self) -> str:
        return "\n".join(f"--- {name}\n" + "\n".join(lines) for name, lines in self.files.items())


@cache
def right_recipes(seed: int) -> list[dict[str, Any]]:
    """Recipes in which every key is set, and rightly."""
    found: list[dict[str, Any]] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=25, database=None, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(recipes(share=1.0))
    def keep(values: dict[str, Any]) -> None:
        found.append(values)

    keep()
    return found


def drawn(chance: Chance, seed: int) -> list[Entry]:
    """A few keys of a right recipe, those that it needs among them."""
    values = chance.choice(right_recipes(seed))
    chosen = {*REQUIRED, *chance.sample(list(values), chance.randrange(2, 7))}
    if values.get("data.eval") is None or "data.eval" not in chosen:
        chosen -= {*NEEDS_HELD_OUT}
    if values.get("model.quantize") != "nf" or "model.quantize" not in chosen:
        chosen -= {"model.bits"}
    return [Entry(key, value, needed=key in REQUIRED) for key, value in values.items() if key in chosen]


# ---- what goes wrong, one mistake each ---------------------------------------------------------------------------


def misspell(chance: Chance, entry: Entry) -> None:
    """A letter dropped, doubled, changed, added, or two swapped; or one from another alphabet."""
    section, _, name = entry.key.partition(".")
    at, other = chance.randrange(len(name)), chance.choice("abcdefghijklmnopqrstuvwxyzеаорсé")
    typo = chance.choice(
        [
            name[:at] + name[at + 1 :],
            name[: at + 1] + name[at:],
            name[:at] + other + name[at + 1 :],
            name[:at] + other + name[at:],
            name[:at] + name[at + 1 : at + 2] + name[at : at + 1] + name[at + 2 :],
        ]
    )
    if typo and typo not in SECTIONS[section]:
        entry.key, entry.meant = f"{section}.{typo}", name
        entry.told = "unknown key '{}'"


def move(chance: Chance, entry: Entry) -> None:
    """Into another section."""
    name = entry.key.partition(".")[2]
    others = [section for section, keys in SECTIONS.items() if name not in keys]
    entry.key = f"{chance.choice(others)}.{name}"
    entry.told = "unknown key '{}'\n  → '" + name + "' belongs under "


def spoil(chance: Chance, entry: Entry) -> None:
    """A value of the wrong type, or out of bounds."""
    entry.value, entry.told = chance.choice(WRONG[entry.key]), "{}"


def bury(chance: Chance, entry: Entry) -> None:
    """Deeper than a recipe ever is."""
    for _ in range(chance.randrange(read.MAX_DEPTH, 200)):
        entry.value = chance.choice([[entry.value], {"a": entry.value}])
    entry.again, entry.told = False, "nested deeper than 32 levels"


def repeat(chance: Chance, entry: Entry) -> None:
    """The same key twice."""
    entry.again, entry.told = True, "{}: duplicate key, first at "


def enlist(chance: Chance, entry: Entry) -> None:
    """A list, or a mapping, where it stood alone."""
    entry.value, entry.free = chance.choice([[entry.value], [entry.value] * 3, {"a": entry.value}]), True


def replace(chance: Chance, entry: Entry) -> None:
    """Something else altogether."""
    entry.value, entry.free = chance.choice(JUNK), True


JUNK = (
    None, True, 0, -1, 1, 2**31, 2**64, 10**400, -0.0, 1e-320, 1e308,
    "", " ", "null", "1e999", ".nan", "0x10", "1_0", "yes", "~", "a\nb: c", "\n\n", "\x1b[31mred", "\u202eback",
    "\u200b", "ß" * 300, "𝕬𝖉𝖆𝖕𝖙𝖊𝖗", "日本語", "a" * 5000, "(", "[[a]", "a{99999999999}", "(" * 500, "*", "${", "${}",
    "${NOBODY_SET_THIS}", "${LORA_A_TOKEN}",
    [], [[]], [[], [[]]], {}, {"a": {"b": {"c": [1, {"d": None}]}}}, [None], [0, "a", {}],
    {"a\nb": 1}, {"standard": {"p": 1}}, {"path": "a"}, {"path": "a", "weight": 1e-9},
    [{"path": "a", "weight": 10**9}], {"prompt": "{", "completion": "}"},
)  # fmt: skip
MISTAKES = (misspell, misspell, move, spoil, spoil, repeat, enlist, replace)


def make_mistakes(chance: Chance, entries: list[Entry]) -> None:
    for entry in chance.sample(entries, min(chance.randrange(1, 4), len(entries))):
        chance.choice(MISTAKES)(chance, entry)
    if chance.random() < 0.05:
        bury(chance, chance.choice(entries))


# ---- how it is written -------------------------------------------------------------------------------------------


def in_one_file(folder: Path, chance: Chance, entries: list[Entry]) -> Written:
    written = Written({"r.yaml": []})
    _sections(folder, written, "r.yaml", entries)
    return written


def in_two_files(folder: Path, chance: Chance, entries: list[Entry]) -> Written:
    """Some keys in the file that is extended."""
    written = Written({"r.yaml": ["extends: base.yaml"], "base.yaml": []})
    below = [entry for entry in entries if chance.random() < 0.5]
    _sections(folder, written, "base.yaml", below or entries[:1])
    _sections(folder, written, "r.yaml", [each for each in entries if each not in (below or entries[:1])])
    return written


def in_a_variant(folder: Path, chance: Chance, entries: list[Entry]) -> Written:
    """All but what a recipe needs in a variant, the keys dotted; they are looked at where the rest can be read."""
    written = Written({"r.yaml": []})
    needed = [each for each in entries if each.needed]
    if any(each.again or (each.needed and (each.told or each.free)) for each in entries):
        return in_one_file(folder, chance, entries)
    _sections(folder, written, "r.yaml", needed)
    lines = written.files["r.yaml"]
    lines += ["compare:", "  v+1:", "    adapter.method: lora"]
    taken = {*load.COMPARISONS, "output.dir", "adapter.method"}
    for entry in entries:
        if entry not in needed and entry.key not in taken:
            for _ in range(1 + entry.again):
                lines.append(f"    {as_json(entry.key)}: {as_json(entry.value)}")
            written.places.append((entry, f"{folder}/r.yaml:{len(lines)}", f"compare.v+1.{entry.key}"))
    return written


def _sections(folder: Path, written: Written, name: str, entries: list[Entry]) -> None:
    lines = written.files[name]
    for section in dict.fromkeys(entry.key.partition(".")[0] for entry in entries):
        lines.append(f"{section}:")
        for entry in entries:
            if entry.key.startswith(f"{section}."):
                for _ in range(1 + entry.again):
                    lines.append(f"  {as_json(entry.key.partition('.')[2])}: {as_json(entry.value)}")
                written.places.append((entry, f"{folder}/{name}:{len(lines)}", entry.key))


# ---- what is said ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes")


@pytest.fixture(scope="module")
def seed() -> int:
    """Another one in every session."""
    return int(os.environ.get("LORA_SEED") or random.getrandbits(48))


def cases(seed: int, batch: int) -> Iterator[tuple[Chance, str]]:
    """A source of chance for each case of a batch, and how to get the same one again."""
    for number in range(COUNT // BATCHES // 2):
        yield random.Random(f"{seed} {batch} {number}"), f"LORA_SEED={seed}, batch {batch}, {number}"


def refusal(path: Path, check: Callable[[load.Loaded], object] = lambda loaded: None) -> str:
    """What is said about a recipe; nothing where it is right. Any other error comes out as it is."""
    try:
        check(load.load(path))
    except UserError as error:
        return str(error)
    return ""


def in_pieces(message: str) -> list[str]:
    """One mistake each, with what to do about it."""
    return re.split(r"\n(?!  → )", message)


def check_wording(message: str) -> None:
    """Every line names its file or says what to do, and a terminal shows it as it is."""
    assert all(PLACED.match(piece) for piece in in_pieces(message)), message
    assert all(piece.count("\n") == piece.count("\n  → ") <= 1 for piece in in_pieces(message)), message
    assert not read.INVISIBLE.search(message), ascii(message)
    assert not UNTOLD.search(message), message


def check_told(written: Written, message: str) -> None:
    """Each mistake at its line and by its key, and nothing else."""
    mistaken = [place for place in written.places if place[0].told or place[0].free]
    buried = [place for place in mistaken if "nested" in place[0].told]
    pieces = in_pieces(message) if message else []
    for entry, where, name in buried or mistaken:
        told = entry.told.replace("{}", name)
        found = [piece for piece in pieces if piece.startswith(f"{where}: ") and told in piece]
        assert found or entry.free, f"nothing says {where}: {told}\n{message}"
    places = {where for _, where, _ in mistaken}
    for piece in pieces:
        where = piece.partition(": ")[0].rpartition("} at ")[2]
        follows = "held-out" in piece or "'model.bits' are shared out" in piece
        assert where in places or follows or any(each[0].free for each in mistaken), piece


@pytest.mark.parametrize("batch", range(BATCHES))
def test_every_mistake_is_told_at_its_line_by_its_key(batch: int, folder: Path, seed: int) -> None:
    meant: Counter[bool] = Counter()
    for chance, again in cases(seed, batch):
        entries = drawn(chance, seed)
        make_mistakes(chance, entries)
        arrange = chance.choice([in_one_file, in_one_file, in_two_files, in_a_variant])
        written = arrange(folder, chance, entries)
        for name, lines in written.files.items():
            (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        try:
            message = refusal(folder / "r.yaml")
            check_wording(message) if message else None
            check_told(written, message)
        except Exception as error:
            raise AssertionError(f"{again}: {error!r}\n{written.show()}") from error
        meant.update(understood(written, message))
    assert meant[False] <= 0.05 * meant.total(), meant
    assert meant.total() > COUNT / BATCHES / 20, meant


def understood(written: Written, message: str) -> Iterator[bool]:
    """For each misspelt key whether it is said which one is meant; words of another tool are no misspellings."""
    for entry, _, name in written.places:
        typo = name.rpartition(".")[2]
        if len(entry.meant) > 3 and f"'{name}'" in message and not peers.advice(typo):
            yield f"unknown key '{name}'\n  → did you mean '{entry.meant}'?" in message


@pytest.mark.parametrize("batch", range(BATCHES))
def test_whatever_happens_to_the_bytes_there_is_a_recipe_or_a_message_with_a_place(
    batch: int, folder: Path, seed: int
) -> None:
    path = folder / "r.yaml"
    for chance, again in cases(seed, batch):
        lines = in_one_file(folder, chance, drawn(chance, seed)).files["r.yaml"]
        content = bytearray("\n".join(lines).encode() + b"\n")
        for _ in range(chance.randrange(1, 5)):
            mutate(content, chance)
        path.write_bytes(content)
        try:
            message = refusal(path)
            check_wording(message) if message else None
        except Exception as error:
            raise AssertionError(f"{again}: {error!r}\n{bytes(content)!r}") from error


def mutate(content: bytearray, chance: Chance) -> None:
    """Change, add, drop or repeat something, as an editor or a bad disk would."""
    lines = bytes(content).split(b"\n")
    i, j = chance.randrange(len(lines)), chance.randrange(len(content) or 1)
    match chance.randrange(7):
        case 0:
            content[j : j + 1] = bytes([chance.randrange(256)])
        case 1:
            content[j:j] = chance.choice(
                [
                    b": ",
                    b"- ",
                    b"{",
                    b"[",
                    b'"',
                    b"&a ",
                    b"*a",
                    b"!!int ",
                    b"#",
                    b"\n",
                    b"${",
                    b"? ",
                    b"| ",
                    b"%",
                ]
            )
        case 2:
            del content[j : j + chance.randrange(1, 10)]
        case 3:
            content[:] = b"\n".join([*lines[:i], lines[i], *lines[i:]])
        case 4:
            content[:] = b"\n".join([*lines[:i], *lines[i + 1 :]])
        case 5:
            content[j] ^= 1 << chance.randrange(8)
        case _:
            content[:] = b"\n".join([*lines[:i], b"  " + lines[i], *lines[i + 1 :]])


def test_a_command_ends_with_one_message_and_the_exit_code_of_a_wrong_recipe(
    folder: Path, seed: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for chance, again in islice(cases(seed, 0), COUNT // 100):
        entries = drawn(chance, seed)
        spoil(chance, chance.choice(entries))
        path = folder / "r.yaml"
        path.write_text("\n".join(in_one_file(folder, chance, entries).files["r.yaml"]), encoding="utf-8")
        monkeypatch.setattr(sys, "argv", ["lora", chance.choice(["train", "check"]), str(path)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        shown = capsys.readouterr()
        assert (left.value.code, shown.out) == (ExitCode.RECIPE, ""), again
        assert shown.err.startswith(f"error: {path}:"), again
        assert "Traceback" not in shown.err, again


@pytest.mark.parametrize("axis", sorted({*axes().values()}))
def test_whatever_stands_under_the_name_of_a_part_is_right_or_told_with_its_line(
    axis: str, folder: Path
) -> None:
    key = next(key for key, each in axes().items() if each == axis)
    section, _, name = key.partition(".")
    for part in parts.names(axis):
        declared = [setting for setting, _, _ in parts.declared(axis, part)]
        for setting in (*declared, *(f"{each}x" for each in declared), "nothing_like_it"):
            for value in random.sample(JUNK, 8):
                line = f"    {part}: {{{setting}: {as_json(value)}}}"
                text = f"model: {{name: m}}\ndata: {{train: a}}\n{section}:\n  {name}:\n{line}\n"
                check_settings(folder, text, f"{key}.{part}", declared, is_known=setting in declared)


def check_settings(folder: Path, text: str, part: str, settings: list[str], *, is_known: bool) -> None:
    path = folder / "r.yaml"
    path.write_text(text, encoding="utf-8")
    message = refusal(path, load.check_parts)
    assert message or is_known, text
    if message:
        check_wording(message)
        assert all(piece.startswith(f"{path}:5: ") for piece in in_pieces(message)), message
        assert part in message or any(f"'{each}'" in message for each in settings), message
