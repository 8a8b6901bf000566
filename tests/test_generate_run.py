"""`lora generate` and `lora chat`: what is printed is what the model answers, and switching leaves no trace."""

import io
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

from lora_cli.adapter import files
from lora_cli.errors import UserError
from lora_cli.evaluate import generation
from lora_cli.run.chat import chat
from lora_cli.run.generate import Generation, generate
from lora_cli.run.open import base_of, open_model
from lora_cli.screen import Screen
from tests import on_disk, tiny

EVAL = {"max_new_tokens": 7, "batch_size": 2}
CHAT = {"train": "gone.jsonl", "system": "be brief"}


@pytest.fixture
def base(tmp_path):
    return on_disk.model(tmp_path / "base")


@pytest.fixture
def run(tmp_path, base):
    return on_disk.adapter(tmp_path / "run", base, 1, {**on_disk.PLAIN, "train": "gone.jsonl"}, eval=EVAL)


def expected(path, name, prompts, **settings):
    """Answers of a fresh load."""
    opened = open_model([path])
    opened.use(name)
    tokenizer = opened.language.tokenizer
    ids = [tuple(tokenizer.encode(prompt)) for prompt in prompts]
    return generation.answers(
        opened.language.model, tokenizer, ids, **{"max_new_tokens": 7, "batch_size": 1, **settings}
    )


def chat_prompt(*turns: str, system: str | None = "be brief") -> str:
    roles = itertools.cycle(("user", "assistant"))
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]
    return tiny.tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_rows_are_answered_by_base_and_adapter_in_order(run, tmp_path, capsys):
    texts = ["a long one, longest of all", "b", "cc"]
    file = on_disk.rows(tmp_path / "in.jsonl", *({"text": text} for text in texts))
    generate(run, Generation(None, file, compare=True), Screen(), as_json=True)
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    prompts = [f"Review: {text}\nMood:" for text in texts]
    assert [line["prompt"] for line in found] == prompts
    assert [line["where"] for line in found] == [f"{file}:{number}" for number in (1, 2, 3)]
    assert [line["base"] for line in found] == expected(run, None, prompts)
    assert [line["adapter"] for line in found] == expected(run, "run", prompts)


@pytest.mark.parametrize("column", ["prompt", "messages"])
def test_rows_of_prompts_or_messages_do_without_the_columns_of_the_recipe(base, tmp_path, capsys, column):
    run = on_disk.adapter(tmp_path / "talks", base, 1, {**CHAT, "format": on_disk.PLAIN["format"]}, eval=EVAL)
    asked = {"prompt": "hi", "messages": [{"role": "user", "content": "hi"}]}
    file = on_disk.rows(tmp_path / "in.jsonl", {column: asked[column]})
    generate(run, Generation(None, file), Screen(), as_json=True)
    line = json.loads(capsys.readouterr().out)
    assert line["prompt"] == chat_prompt("hi")
    assert [line["adapter"]] == expected(run, "talks", [chat_prompt("hi")])


def test_one_prompt_gives_the_bare_answer_and_the_same_on_a_terminal(run, capsys, monkeypatch):
    (answer,) = expected(run, "run", ["once upon"], max_new_tokens=30)
    wanted = Generation("once upon", None, max_new_tokens=30)
    generate(run, wanted, Screen())
    assert capsys.readouterr().out == f"{answer}\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    generate(run, wanted, Screen())
    assert capsys.readouterr().out == f"{answer}\n"


def test_a_model_without_a_recipe_is_asked_by_its_own_template(base, tmp_path, capsys):
    generate(base, Generation("hi", None, max_new_tokens=7), Screen(), as_json=True)
    assert [json.loads(capsys.readouterr().out)["base"]] == expected(
        base, None, [chat_prompt("hi", system=None)]
    )
    plain = on_disk.model(tmp_path / "plain", chat_template=None)
    generate(plain, Generation("hi", None, max_new_tokens=7), Screen(), as_json=True)
    assert [json.loads(capsys.readouterr().out)["base"]] == expected(plain, None, ["hi"])


def test_drawn_answers_follow_from_the_seed(run, tmp_path, capsys):
    file = on_disk.rows(tmp_path / "in.jsonl", *({"text": text} for text in "abc"))
    printed = []
    for seed in (1, 1, 2):
        generate(run, Generation(None, file, temperature=2.0, seed=seed), Screen())
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != printed[2]


def test_what_cannot_be_asked_is_said(run):
    for wanted in (Generation(None, None), Generation("a", run)):
        with pytest.raises(UserError, match="either --prompt or --input"):
            generate(run, wanted, Screen())
    with pytest.raises(UserError, match="the prompt is empty"):
        generate(run, Generation("", None), Screen())


def test_a_folder_of_the_command_line_that_is_no_model_is_what_is_at_fault(base, run, tmp_path):
    """Not `model.name`: there is no recipe."""
    (tmp_path / "empty").mkdir()
    for nothing in (tmp_path / "nowhere", tmp_path / "empty", Path("no/such/folder")):
        with pytest.raises(UserError, match=nothing.name) as refused:
            generate(nothing, Generation("a", None), Screen())
        assert refused.value.where == str(nothing)
        with pytest.raises(UserError, match=nothing.name) as refused:
            generate(run, Generation("a", None), Screen(), base=str(nothing))
        assert refused.value.where == "--base"
    base.rename(tmp_path / "moved")
    with pytest.raises(UserError) as refused:
        generate(run, Generation("a", None), Screen())
    assert refused.value.where == str(run / "adapter" / files.CONFIG)


# Several adapters on one base

KINDS = [
    {},
    {"target_modules": ("embed_tokens", "q_proj"), "scale": "rslora"},
    {"train_also": ("norms",), "rank_pattern": {"q_proj": 2}},
    {"train_also": ("norms", "lm_head"), "target_modules": ("down_proj",)},
]


def test_switching_gives_the_logits_of_a_fresh_load_to_the_bit(base, tmp_path):
    ids = torch.randint(5, tiny.VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(3))
    paths = [
        on_disk.adapter(tmp_path / f"run{i}", base, i, adapter=settings) for i, settings in enumerate(KINDS)
    ]
    fresh = {None: open_model([base]).language.model(ids).logits}
    fresh |= {path.name: open_model([path]).language.model(ids).logits for path in paths}
    together = open_model(paths)
    assert torch.equal(together.language.model(ids).logits, fresh["run0"])
    for name in (*itertools.chain(*itertools.permutations(fresh, 2)), None):
        together.use(name)
        assert torch.equal(together.language.model(ids).logits, fresh[name]), name
    assert not any(torch.allclose(fresh[a], fresh[b]) for a, b in itertools.combinations(fresh, 2))


def test_adapters_may_be_called_alike_or_like_a_method_of_pytorch(base, tmp_path):
    paths = [on_disk.adapter(tmp_path / place / "train", base, seed) for seed, place in enumerate("ab")]
    opened = open_model(paths)
    assert list(opened.adapters) == ["train", "train-2"]


def test_another_base_is_not_asked_for_the_revision_of_the_one_it_replaces(base, run):
    path = run / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "revision": "a" * 40}))
    saved = {"run": files.read(run / "adapter")}
    assert base_of(saved, None, None, None).revision == "a" * 40
    assert base_of(saved, None, str(base), None).revision == "a" * 40
    assert base_of(saved, None, "somebody/else", None).revision is None


def test_adapters_of_different_bases_are_refused(base, tmp_path):
    other = on_disk.model(tmp_path / "other")
    paths = [on_disk.adapter(tmp_path / f"run{i}", at, i) for i, at in enumerate((base, other))]
    with pytest.raises(UserError, match="different bases"):
        open_model(paths)
    with pytest.raises(UserError, match="one model, or adapters of one model"):
        open_model([paths[0], base])


# Chat


def said(monkeypatch, capsys, paths, *lines: str) -> tuple[list[str], str]:
    """Type the lines; returns the answers and what was noted beside them."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    capsys.readouterr()
    chat(paths, Screen(), max_new_tokens=7)
    shown = capsys.readouterr()
    return shown.out.splitlines(), shown.err


@pytest.fixture
def talkers(base, tmp_path, monkeypatch):
    """Two adapters whose answers are one line each: the byte of a line break is made impossible."""
    plain = generation._text

    def in_one_line(tokenizer, ids):
        return plain(tokenizer, ids).replace("\n", "_").replace("\r", "_").replace("\x0b", "_")

    monkeypatch.setattr(generation, "_text", in_one_line)
    return [on_disk.adapter(tmp_path / name, base, seed, CHAT) for seed, name in enumerate(("ann", "bob"))]


def fresh_answer(path, name, *turns: str) -> str:
    return expected(path, name, [chat_prompt(*turns)])[0]


def one_line(text: str) -> str:
    """As a terminal that splits lines shows it."""
    return "".join(text.splitlines())


def test_a_conversation_is_remembered_across_adapters_and_the_base(talkers, monkeypatch, capsys):
    ann, bob = talkers
    answers, notes = said(
        monkeypatch, capsys, talkers, "hi", "/adapter bob", "", "again", "/base", "and?", "/clear", "hi"
    )
    first = fresh_answer(ann, "ann", "hi")
    second = fresh_answer(bob, "bob", "hi", first, "again")
    third = fresh_answer(bob, None, "hi", first, "again", second, "and?")
    fourth = fresh_answer(bob, None, "hi")
    assert "".join(answers) == one_line(first + second + third + fourth)
    assert "bob answers" in notes
    assert "base answers" in notes


def test_commands_list_explain_and_refuse(talkers, monkeypatch, capsys):
    lines = ("/adapters", "/help", "/adapter bab", "/adaptor", "/base", "/adapters", "/quit", "never read")
    answers, notes = said(monkeypatch, capsys, talkers, *lines)
    assert answers == []
    assert "* ann" in notes
    assert "* base" in notes
    assert "/clear" in notes
    assert "did you mean 'bob'?" in notes
    assert "did you mean '/adapter" in notes
    assert "Traceback" not in notes


def test_a_conversation_that_is_too_long_is_said_and_the_talk_goes_on(talkers, monkeypatch, capsys):
    answers, notes = said(monkeypatch, capsys, talkers, "x" * 600, "hi")
    assert "do not fit" in notes
    assert "".join(answers) == one_line(fresh_answer(talkers[0], "ann", "hi"))


def test_ctrl_c_stops_the_answer_and_keeps_what_is_there(talkers, monkeypatch, capsys):
    whole = generation.stream

    def interrupted(*args, **given):
        pieces = whole(*args, **given)
        monkeypatch.setattr(generation, "stream", whole)
        yield next(pieces)
        pieces.close()
        raise KeyboardInterrupt

    monkeypatch.setattr(generation, "stream", interrupted)
    answers, notes = said(monkeypatch, capsys, talkers, "hi", "go on")
    assert "stopped" in notes
    start = fresh_answer(talkers[0], "ann", "hi")[0]
    assert "".join(answers) == one_line(start + fresh_answer(talkers[0], "ann", "hi", start, "go on"))


@pytest.mark.usefixtures("talkers")
def test_an_adapter_of_rows_with_columns_of_their_own_talks_in_its_chat_template(
    base, tmp_path, monkeypatch, capsys
):
    data = {**CHAT, "format": {"prompt": "{question}", "completion": "{answer}"}}
    path = on_disk.adapter(tmp_path / "asked", base, 3, data)
    answers, notes = said(monkeypatch, capsys, [path], "hi", "again")
    first = fresh_answer(path, "asked", "hi")
    assert "".join(answers) == one_line(first + fresh_answer(path, "asked", "hi", first, "again"))
    assert "error" not in notes


def test_without_a_chat_template_each_line_is_continued(run, monkeypatch, capsys):
    answers, notes = said(monkeypatch, capsys, [run], "once", "upon")
    assert "without a chat template" in notes
    assert "".join(answers) == one_line("".join(expected(run, "run", ["once", "upon"])))


def test_ctrl_c_at_the_prompt_leaves(talkers, monkeypatch):
    def pressed(prompt: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", pressed)
    chat(talkers, Screen())
