"""Examples on disk are the examples of the rows; nothing is tokenised twice; all that matters is in the key."""

import json
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.data import cache, load
from lora_cli.data.cache import Examples
from lora_cli.data.example import Example
from lora_cli.data.pack import epoch_order
from lora_cli.data.row import Row
from lora_cli.errors import ExitCode, UserError
from lora_cli.recipe.schema import DataRecipe
from tests import tiny

fresh = settings(max_examples=40, deadline=None)


def rows_file(path, texts, **more):
    path.write_text("".join(json.dumps({"prompt": f"{i}?", "completion": text, **more}) + "\n"
                            for i, text in enumerate(texts)))  # fmt: skip
    return path


def loaded(tmp_path, tokenizer=None, seed=0, references=None, **recipe):
    data = DataRecipe.model_validate({"train": str(tmp_path / "rows.jsonl"), **recipe})
    return load.load(
        data, tokenizer or tiny.tokenizer(), cache=tmp_path / "cache", seed=seed, references=references
    )


class Fixed:
    """Stands for a format: each row brings its examples with it."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def examples(self, row):
        return row.values["examples"]


marks = st.lists(st.tuples(st.integers(0, 260), st.booleans()), min_size=1, max_size=40)


def example(pairs, where):
    return Example(tuple(t for t, _ in pairs), tuple(m for _, m in pairs), where)


def built(folder, rows, overflow="drop", max_length=100, tokenizer=None):
    """Rows are lists of lists of (token, trained)."""
    found = (
        (
            i % 2,
            Row({"examples": [example(pairs, f"f{i % 3}:{i + 1}") for pairs in row]}, f"f{i % 3}:{i + 1}"),
        )
        for i, row in enumerate(rows)
    )
    form = Fixed(tokenizer or tiny.tokenizer())
    cache.build(found, form, folder, max_length=max_length, overflow=overflow)
    return Examples(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A new name for each draw."""
    folder = tmp_path_factory.mktemp("drawn")
    return (folder / str(i) for i in range(10**9))


@fresh
@given(rows=st.lists(st.lists(marks, max_size=3), max_size=8))
def test_what_is_written_is_read(folders, rows):
    wanted = [
        (example(pairs, f"f{i % 3}:{i + 1}"), i % 2)
        for i, row in enumerate([[[(7, True)]], *rows])
        for pairs in row
        if any(mark for _, mark in pairs)
    ]
    found = built(next(folders), [[[(7, True)]], *rows])
    assert [found[i] for i in range(len(found))] == [item for item, _ in wanted]
    assert found[-1] == wanted[-1][0]
    assert found.lengths.tolist() == [len(item.input_ids) for item, _ in wanted]
    assert found.trained_counts.tolist() == [sum(item.trained) for item, _ in wanted]
    assert found.sources.tolist() == [source for _, source in wanted]
    assert found.max_id == max(t for item, _ in wanted for t in item.input_ids)
    assert found.counts.tokens == sum(len(item.input_ids) for item, _ in wanted)
    assert found.counts.trained_tokens == sum(sum(item.trained) for item, _ in wanted)
    assert found.counts.rows == len(rows) + 1
    assert found.counts.untrained == sum(len(row) for row in rows) + 1 - len(wanted)
    with pytest.raises(IndexError):
        found[len(found)]


@pytest.mark.parametrize(("largest", "width"), [(2**16 - 1, 2), (2**16, 4), (2**20, 4)])
def test_ids_take_as_many_bytes_as_the_vocabulary_needs(folders, largest, width):
    class Wide:
        def get_vocab(self):
            return {"a": 0, "z": largest}

    found = built(next(folders), [[[(largest, True), (0, False)]]], tokenizer=Wide())
    assert found[0].input_ids == (largest, 0)
    assert (found.folder / "ids.bin").stat().st_size == 2 * width


@fresh
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=10), max_length=st.integers(1, 20))
def test_overflow_drops_cuts_or_names(folders, lengths, max_length):
    rows = [[[(i, i == 0 or i >= length // 2) for i in range(length)]] for length in lengths]
    long = [length for length in lengths if length > max_length]
    cut = built(next(folders), rows, "truncate", max_length)
    assert cut.lengths.tolist() == [min(length, max_length) for length in lengths]
    assert (cut.counts.truncated, cut.counts.dropped, cut.counts.longest) == (len(long), 0, max(lengths))
    if len(long) < len(lengths):
        kept = built(next(folders), rows, "drop", max_length)
        assert kept.lengths.tolist() == [length for length in lengths if length <= max_length]
        assert (kept.counts.dropped, kept.counts.examples) == (len(long), len(lengths) - len(long))
        rejected = [json.loads(line) for line in (kept.folder / "rejected.jsonl").read_text().splitlines()]
        assert [item["reason"] for item in rejected] == [f"{length} tokens" for length in long]
    if long:
        with pytest.raises(UserError) as caught:
            built(next(folders), rows, "error", max_length)
        assert f"{len(long)} longer than max_length {max_length}" in caught.value.what
        first = next(i for i, length in enumerate(lengths) if length > max_length)
        assert f"f{first % 3}:{first + 1} ({long[0]} tokens)" in caught.value.what
        assert f"{max(lengths)}" in caught.value.fix
        assert caught.value.code == ExitCode.DATA


def test_a_cut_that_leaves_nothing_to_learn_is_reported(folders):
    rows = [[[(1, False), (2, False), (3, True)]], [[(1, True)]]]
    found = built(next(folders), rows, "truncate", 2)
    assert (len(found), found.counts.truncated, found.counts.untrained) == (1, 1, 1)
    assert "no token to learn" in (found.folder / "rejected.jsonl").read_text()


def test_rows_without_a_token_to_learn_are_errors_that_name_them(folders):
    rows = [[[(1, True)]], *[[[(1, False)]]] * 8]
    with pytest.raises(UserError, match="8 without a token to learn") as caught:
        built(next(folders), rows, "error")
    assert "f1:2 (no token to learn)" in caught.value.what
    assert "and 3 more" in caught.value.what


@pytest.mark.parametrize("overflow", ["drop", "truncate"])
def test_nothing_left_is_an_error_and_leaves_no_folder(folders, overflow):
    folder = next(folders)
    with pytest.raises(UserError, match="no row is left") as caught:
        built(folder, [[[(1, False)]], []], overflow)
    assert caught.value.code == ExitCode.DATA
    assert not folder.exists()


# Loading


def test_a_second_run_tokenises_nothing(tmp_path, monkeypatch):
    rows_file(tmp_path / "rows.jsonl", ["yes", "no"])
    first = loaded(tmp_path)

    def refuse(*_):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(load.Format, "examples", refuse)
    again = loaded(tmp_path)
    assert [again.train[i] for i in range(2)] == [first.train[i] for i in range(2)]
    assert again.train.counts == first.train.counts


def test_the_key_follows_all_that_the_examples_depend_on(tmp_path):
    path = rows_file(tmp_path / "rows.jsonl", ["yes", "no", "why", "so"], r=["right"])
    folders = [loaded(tmp_path).train.folder]
    assert loaded(tmp_path).train.folder == folders[0]
    assert loaded(tmp_path, seed=1, packing=True).train.folder == folders[0]  # these change no example
    changes = (
        {"chat_template": "none"},
        {"max_length": 500},
        {"overflow": "drop"},
        {"train_on": "all"},
        {"system": "Be kind."},
        {"format": {"prompt": "{prompt}", "completion": "{completion}!"}},
        {"references": "r"},
        {"eval_fraction": 0.25},
        {"eval_fraction": 0.25, "seed": 1},
        {"tokenizer": tiny.tokenizer(tiny.CHATML.replace("<|im_start|>", "<bos>"))},
    )
    folders.extend(loaded(tmp_path, **change).train.folder for change in changes)
    for change in ({"eos_token": "<eos>"}, {"bos_token": "<pad>"}):
        tokenizer = tiny.tokenizer()
        for name, value in change.items():
            setattr(tokenizer, name, value)
        folders.append(loaded(tmp_path, tokenizer).train.folder)
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["yes"])
    folders.append(loaded(tmp_path, tokenizer).train.folder)
    path.write_text(path.read_text().replace("why", "hmm"))
    folders.append(loaded(tmp_path).train.folder)
    assert len(set(folders)) == len(folders)


def test_a_change_of_this_code_changes_the_key(tmp_path, monkeypatch):
    before = cache.key(tiny.tokenizer(), "x")
    for path in Path(cache.__file__).parent.glob("*.py"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "cache.py"))
    assert cache.key(tiny.tokenizer(), "x") == before
    (tmp_path / "tokens.py").write_text("# other")
    assert cache.key(tiny.tokenizer(), "x") != before


def test_what_a_tokenizer_did_before_changes_no_key():
    used = tiny.tokenizer()
    used(["a", "bc"], padding=True, truncation=True, max_length=1)
    assert cache.key(used, "x") == cache.key(tiny.tokenizer(), "x")


@pytest.mark.parametrize("file", ["ids.bin", "trained.bin", "offsets.bin", "rows.bin", "index.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_folder_is_made_again(tmp_path, file, damage):
    rows_file(tmp_path / "rows.jsonl", ["yes", "no"])
    first = loaded(tmp_path).train
    wanted = [first[i] for i in range(2)]
    path = first.folder / file
    path.unlink() if damage == "gone" else path.write_bytes(path.read_bytes()[:-1])
    again = loaded(tmp_path).train
    assert [again[i] for i in range(2)] == wanted


def test_a_file_that_changes_while_it_is_read_is_an_error_and_is_not_kept(tmp_path, monkeypatch):
    path = rows_file(tmp_path / "rows.jsonl", ["yes", "no"])
    build = cache.build

    def while_somebody_writes(*args, **more):
        build(*args, **more)
        path.write_text(path.read_text() * 2)

    monkeypatch.setattr(cache, "build", while_somebody_writes)
    with pytest.raises(UserError, match="changed while it was read"):
        loaded(tmp_path)
    assert list((tmp_path / "cache").iterdir()) == []


def test_two_processes_that_make_the_same_folder_agree(tmp_path, monkeypatch):
    rows_file(tmp_path / "rows.jsonl", ["yes", "no"])
    build = cache.build

    def after_another(rows, form, folder, **more):
        build(rows, form, folder, **more)
        build(rows, form, folder, **more)

    monkeypatch.setattr(cache, "build", after_another)
    assert len(loaded(tmp_path).train) == 2


def test_sources_bring_their_weights_and_eval_its_own_rows(tmp_path):
    for name, texts in (("a", ["1", "2"]), ("b", ["3"]), ("c", ["4", "5", "6"])):
        rows_file(tmp_path / f"{name}.jsonl", texts)
    train = [{"path": str(tmp_path / "a.jsonl"), "weight": 2.0}, str(tmp_path / "b.jsonl")]
    data = loaded(tmp_path, train=train, eval=str(tmp_path / "c.jsonl"))
    assert data.train.weights == (2.0, 1.0)
    assert data.train.sources.tolist() == [0, 0, 1]
    assert [data.eval.where(i) for i in range(3)] == [f"{tmp_path / 'c.jsonl'}:{i}" for i in (1, 2, 3)]
    for _ in range(2):
        assert [row.values["completion"] for row in data.eval_rows()] == ["4", "5", "6"]


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.3, 0.5, 1 / 3])
def test_the_held_out_rows_are_disjoint_complete_and_as_many_as_asked_for(tmp_path, fraction):
    count = 120
    rows_file(tmp_path / "rows.jsonl", [f"answer {i}" for i in range(count)])
    data = loaded(tmp_path, eval_fraction=fraction)
    train = {data.train.where(i) for i in range(len(data.train))}
    held_out = [data.eval.where(i) for i in range(len(data.eval))]
    assert not train & set(held_out)
    assert len(train) + len(held_out) == count
    assert abs(len(held_out) - fraction * count) <= 1
    assert [row.where for row in data.eval_rows()] == held_out
    other = loaded(tmp_path, eval_fraction=fraction, seed=1)
    assert [other.eval.where(i) for i in range(len(other.eval))] != held_out


@fresh
@given(fraction=st.floats(0.001, 0.5), seed=st.integers(0, 99), start=st.integers(0, 10**6))
def test_any_stretch_of_rows_has_its_share_held_out(fraction, seed, start):
    stretch = range(start, start + 400)
    held_out = sum(load.is_held_out(number, fraction, seed) for number in stretch)
    assert abs(held_out - 400 * fraction) <= 2


def test_held_out_rows_follow_no_pattern():
    held_out = [number % 10 for number in range(4000) if load.is_held_out(number, 0.1, 5)]
    assert np.bincount(held_out, minlength=10).min() > 20


def test_held_out_references_need_no_completion(tmp_path):
    rows_file(tmp_path / "rows.jsonl", ["yes"])
    (tmp_path / "test.jsonl").write_text(json.dumps({"prompt": "Why?", "refs": ["So.", "Because."]}) + "\n")
    data = loaded(tmp_path, eval=str(tmp_path / "test.jsonl"), references="refs")
    tokenizer = data.format.tokenizer
    assert tokenizer.decode(data.eval[0].input_ids).endswith("So.<|im_end|>")
    (row,) = data.eval_rows()
    assert data.format.question(row).references == ("So.", "Because.")


def test_a_bad_row_late_in_the_file_leaves_nothing_behind(tmp_path):
    path = rows_file(tmp_path / "rows.jsonl", ["yes"] * 50)
    path.write_text(path.read_text() + '{"prompt": "x"}\n')
    with pytest.raises(UserError) as caught:
        loaded(tmp_path)
    assert caught.value.where == f"{path}:51"
    assert list((tmp_path / "cache").iterdir()) == []


def test_memory_does_not_grow_with_the_number_of_rows(tmp_path, monkeypatch):
    count, process, seen = 200_000, psutil.Process(), []
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"text": "{i}"}}\n' for i in range(count)))

    def without_a_tokenizer(self, row):
        if int(row.values["text"]) % 1000 == 0:
            seen.append(process.memory_info().rss / 1e6)
        return [Example((1, 2), (False, True), row.where)]

    monkeypatch.setattr(load.Format, "examples", without_a_tokenizer)
    found = loaded(tmp_path).train
    assert max(seen[10:]) - seen[10] < 16  # MB; the rows are 120 MB as Python objects
    assert found[count - 1] == Example((1, 2), (False, True), f"{path}:{count}")
    assert found.counts.rows == found.counts.examples == len(epoch_order(found, 0, 0)) == count
