"""What stands in front of a learned stretch is what generation reads; what is learned is the answer and the end."""

import json

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lora_cli.data import columns, format, tokens
from lora_cli.data.row import Row
from lora_cli.errors import ExitCode, UserError
from lora_cli.recipe.schema import DataRecipe
from tests import tiny

CORPUS = [
    "the cat sat on the mat.\n\nThe answer: it sat on  the mat, then  ran.\n\n\nWhy? Because.",
    "Question: what is the sentiment of this text?\nAnswer: positive, negative, neutral.\n",
]
word = st.text(st.sampled_from("abcno.:\n  "), max_size=8)
fresh = settings(max_examples=60, deadline=None)


def merging(metaspace=False, bos=False):
    """A tokenizer that has learned merges, across newlines and spaces too, in the way of GPT-2 or of Llama 2."""
    core = Tokenizer(models.BPE(unk_token="<unk>" if metaspace else None))
    if metaspace:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        core.decoder = decoders.Metaspace(prepend_scheme="first")
    else:
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
    alphabet = list("\n abcno.:") if metaspace else pre_tokenizers.ByteLevel.alphabet()
    special = [AddedToken(name, special=True, normalized=False) for name in ("<unk>", "<s>", "</s>")]
    core.train_from_iterator(
        CORPUS * 3,
        trainers.BpeTrainer(
            vocab_size=450, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    if bos:
        core.post_processor = processors.TemplateProcessing(
            "<s> $A", None, [("<s>", core.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


TOKENIZERS = {
    "bytes": tiny.tokenizer(None),
    "merging": merging(),
    "merging with BOS": merging(bos=True),
    "metaspace": merging(metaspace=True),
    "metaspace with BOS": merging(metaspace=True, bos=True),
}


def made(tokenizer, row, references=None, **recipe):
    settings_ = {"train": "rows.jsonl", "chat_template": "none", **recipe}
    return format.make(DataRecipe.model_validate(settings_), tokenizer, row, references=references)


def example(tokenizer, values, **recipe):
    (found,) = made(tokenizer, values, **recipe).examples(Row(values, "rows.jsonl:1"))
    return found


def learned(found):
    return tuple(token for token, trained in zip(found.input_ids, found.trained, strict=True) if trained)


PAIR = {"prompt": "{p}", "completion": "{c}"}


@pytest.mark.parametrize("name", TOKENIZERS)
@fresh
@given(prompt=word.filter(str.strip), completion=word.filter(str.strip))
def test_generation_reads_the_same_ids_that_stand_before_the_answer(name, prompt, completion):
    tokenizer = TOKENIZERS[name]
    form = made(tokenizer, {}, format=PAIR)
    (found,) = form.examples(Row({"p": prompt, "c": completion}, "f:1"))
    read = tuple(tokenizer(prompt)["input_ids"])  # what any program that runs the model would do
    start = found.trained.index(True)
    assert found.input_ids[:start] == read == form.prompt_ids(prompt)
    assert all(found.trained[start:])
    assert found.input_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(found.input_ids[:-1], skip_special_tokens=True) == tokenizer.decode(
        tokenizer(prompt + completion)["input_ids"], skip_special_tokens=True
    )


@pytest.mark.parametrize("name", TOKENIZERS)
@fresh
@given(prompt=word.filter(str.strip), completion=word.filter(str.strip))
def test_one_text_is_tokenised_as_one_where_the_boundary_allows_it(name, prompt, completion):
    tokenizer = TOKENIZERS[name]
    before, both = tokens.encode(tokenizer, prompt, prompt + completion)
    assume(both[: len(before)] == before)
    assert tokens.join(tokenizer, prompt, completion) == (before, both[len(before) :])


def test_a_boundary_that_melts_keeps_the_prompts_ids():
    tokenizer = TOKENIZERS["merging"]
    spaced, bare = "the cat sat on ", "the cat sat on"
    assert (
        tokens.encode(tokenizer, spaced + "the")[0][: len(tokens.encode(tokenizer, spaced)[0])]
        != (tokens.encode(tokenizer, spaced)[0])
    ), "the test needs a boundary that melts"
    before, answer = tokens.join(tokenizer, spaced, "the")
    assert before == tokens.encode(tokenizer, spaced)[0]
    assert tokenizer.decode(answer) == "the"
    assert tokenizer.decode(tokens.join(tokenizer, bare, " the")[1]) == " the"


def test_an_answer_for_itself_gets_no_space_that_starts_a_text():
    tokenizer = TOKENIZERS["metaspace"]
    alone = tokens._for_itself(tokenizer, "the mat")
    assert alone != tokens.encode(tokenizer, "the mat")[0]
    before = tokens.encode(tokenizer, "a.")[0]
    assert tokenizer.decode(before + alone) == "a.the mat"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_bos_stands_once_however_it_gets_there(name):
    tokenizer = TOKENIZERS[name]
    habit = tokenizer("on")["input_ids"][0] == tokenizer.bos_token_id
    for prompt in ("on", f"{tokenizer.bos_token}on"):
        ids = example(tokenizer, {"p": prompt, "c": "cat"}, format=PAIR).input_ids
        assert ids.count(tokenizer.bos_token_id) == (habit or prompt != "on")
        assert example(tokenizer, {"text": prompt}).input_ids.count(tokenizer.bos_token_id) == ids.count(
            tokenizer.bos_token_id
        )


def test_eos_stands_once_and_is_learned_even_where_pad_is_the_same_token():
    tokenizer = TOKENIZERS["merging"]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    for completion in ("cat", "cat</s>"):
        found = example(tokenizer, {"p": "the</s>", "c": completion}, format=PAIR)
        assert learned(found).count(tokenizer.eos_token_id) == 1
        assert learned(found)[-1] == tokenizer.eos_token_id


def test_all_learns_every_token_but_the_first():
    for values in ({"text": "the cat"}, {"prompt": "the", "completion": " cat"}):
        found = example(tiny.tokenizer(None), values, train_on="all")
        assert found.trained == (False, *[True] * (len(found.input_ids) - 1))


def test_text_is_learned_whole_without_a_template_even_when_there_is_one():
    tokenizer = tiny.tokenizer()
    found = example(tokenizer, {"text": "the cat"}, chat_template="auto")
    assert tokenizer.decode(found.input_ids) == "the cat<|im_end|>"
    assert found.trained == (False, *[True] * 7)


@pytest.mark.parametrize("values", [{"prompt": "a", "completion": " \n"}, {"text": ""}, {"text": " "}])
def test_an_empty_answer_leaves_nothing_to_learn(values):
    assert not any(example(tiny.tokenizer(None), values).trained)
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}
    assert not any(example(tiny.tokenizer(), chat, chat_template="auto").trained)


# Columns


@given(st.dictionaries(st.text(st.characters(exclude_characters="{}"), min_size=1), word, min_size=1))
@fresh
def test_a_template_is_filled_with_any_column_and_braces_are_doubled(values):
    template = "".join(f"{{{{x}}}} {{{name}}}\n" for name in values)
    read = columns.prompt_reader(DataRecipe.model_validate(
        {"train": "a", "format": {"prompt": template, "completion": "c"}}).format, None)  # fmt: skip
    assert read(Row(values, "f:1")).prompt == "".join(f"{{x}} {text}\n" for text in values.values())


def test_numbers_and_truth_are_written_as_in_the_file():
    values = {"i": 7, "f": 0.5, "t": True, "f2": False, "c": "x"}
    form = made(tiny.tokenizer(None), values, format={"prompt": "{i} {f} {t} {f2}", "completion": "{c}"})
    assert form.question(Row(values, "f:1")).prompt == "7 0.5 true false"


@pytest.mark.parametrize("value", [None, ["a"], {"a": "b"}])
def test_a_column_that_is_no_text_is_named_by_line(value):
    form = made(tiny.tokenizer(None), {}, format=PAIR)
    with pytest.raises(UserError, match="'p' is") as caught:
        form.examples(Row({"p": value, "c": "x"}, "rows.jsonl:7"))
    assert (caught.value.where, caught.value.code) == ("rows.jsonl:7", ExitCode.DATA)


def test_a_missing_column_is_named_with_those_that_are_there():
    form = made(tiny.tokenizer(None), {}, format=PAIR)
    for values in ({"q": "a", "c": "b"}, {"p": "a", "d": "b"}):
        with pytest.raises(UserError) as caught:
            form.examples(Row(values, "rows.jsonl:7"))
        assert caught.value.where == "rows.jsonl:7"
        assert ", ".join(sorted(values)) in caught.value.fix


@pytest.mark.parametrize("template", ["{", "}", "{}", "x {a", "a} x", "{a{b}}", "{{}"])
def test_a_template_that_is_none_is_named_by_key(template):
    for key, other in (("prompt", "completion"), ("completion", "prompt")):
        with pytest.raises(UserError) as caught:
            made(tiny.tokenizer(None), {}, format={key: template, other: "{a}"})
        assert caught.value.where == f"data.format.{key}"
        assert caught.value.code == ExitCode.RECIPE


def test_unknown_columns_are_listed_with_what_is_recognised():
    with pytest.raises(UserError, match="answer, question") as caught:
        made(tiny.tokenizer(None), {"question": "a", "answer": "b"})
    assert "instruction" in caught.value.fix


USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}
SAME_CHAT = {
    "messages": {"messages": [USER, ASSISTANT]},
    "messages as JSON": {"messages": json.dumps([USER, ASSISTANT])},
    "parts": {"messages": [USER, {**ASSISTANT, "name": None}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes."}]},
    "sharegpt with roles": {"conversations": [USER, ASSISTANT]},
    "alpaca": {"instruction": "Hi", "output": "Yes."},
    "alpaca with empty input": {"instruction": "Hi", "input": "", "output": "Yes."},
    "pair": {"prompt": "Hi", "completion": " Yes."},
}


@pytest.mark.parametrize("name", SAME_CHAT)
def test_all_formats_that_say_the_same_give_the_same_chat(name):
    tokenizer = tiny.tokenizer()
    found = example(tokenizer, SAME_CHAT[name], chat_template="auto")
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>"
    assert tokenizer.decode(found.input_ids) == text
    assert tokenizer.decode(learned(found)) == "Yes.<|im_end|>"


def test_columns_are_recognised_row_by_row():
    form = made(tiny.tokenizer(), SAME_CHAT["alpaca"], chat_template="auto")
    assert len({form.examples(Row(values, "f:1"))[0].input_ids for values in SAME_CHAT.values()}) == 1


def test_alpaca_without_a_template_has_the_published_prompt():
    tokenizer = tiny.tokenizer(None)
    values = {"instruction": "Add.", "input": "1 {2}", "output": "3"}
    text = tokenizer.decode(example(tokenizer, values).input_ids)
    assert text.startswith("Below is an instruction that describes a task, paired with an input")
    assert text.endswith("### Instruction:\nAdd.\n\n### Input:\n1 {2}\n\n### Response:\n3<|im_end|>")
    del values["input"]
    text = tokenizer.decode(example(tokenizer, values).input_ids)
    assert text.endswith("completes the request.\n\n### Instruction:\nAdd.\n\n### Response:\n3<|im_end|>")


def test_an_alpaca_input_stands_below_the_instruction_in_a_chat():
    values = {"instruction": "Add.", "input": "1 2", "output": "3"}
    form = made(tiny.tokenizer(), values, chat_template="auto")
    assert "user\nAdd.\n\n1 2<|im_end|>" in form.question(Row(values, "f:1")).prompt


@pytest.mark.parametrize("form", ["messages", "sharegpt", "alpaca", "pair"])
def test_the_system_message_stands_in_front_of_rows_without_one(form):
    tokenizer = tiny.tokenizer()
    (found,) = made(tokenizer, SAME_CHAT[form], chat_template="auto", system="Be kind.").examples(
        Row(SAME_CHAT[form], "f:1")
    )
    assert tokenizer.decode(found.input_ids).startswith(
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user"
    )
    assert tokenizer.decode(learned(found)) == "Yes.<|im_end|>"
    own = {"messages": [{"role": "system", "content": "Mine."}, USER, ASSISTANT]}
    assert "Be kind" not in tokenizer.decode(
        example(tokenizer, own, chat_template="auto", system="Be kind.").input_ids
    )
    own = {"conversations": SAME_CHAT["sharegpt"]["conversations"], "system": "Mine."}
    assert "system\nMine.<" in tokenizer.decode(example(tokenizer, own, chat_template="auto").input_ids)


@pytest.mark.parametrize("mark", [{"train": False}, {"weight": 0}, {"weight": 0.0}])
def test_a_marked_message_is_read_but_not_learned(mark):
    shows_keys = tiny.CHATML.replace("message['content']", "message['content'] + message.keys() | join")
    tokenizer = tiny.tokenizer(shows_keys)
    values = {"messages": [USER, {**ASSISTANT, **mark}, USER, {"role": "assistant", "content": "No."}]}
    found = example(tokenizer, values, chat_template="auto")
    assert tokenizer.decode(learned(found)) == "No.rolecontent<|im_end|>"
    assert "Yes." in tokenizer.decode(found.input_ids)
    for key in mark:
        assert key not in tokenizer.decode(found.input_ids)
        values["messages"][1][key] = 1
        assert tokenizer.decode(learned(example(tokenizer, values, chat_template="auto"))).startswith("Yes.")


BAD_CHATS = {
    "no list": ({"messages": "hello"}, "not a list"),
    "empty": ({"messages": []}, "is empty"),
    "no object": ({"messages": ["hello"]}, "not an object"),
    "no role": ({"messages": [{"content": "a"}]}, "no role"),
    "no content": ({"messages": [{"role": "user"}]}, "no content"),
    "null content": ({"messages": [USER, {"role": "assistant", "content": None}]}, "no content"),
    "content is a number": ({"messages": [{"role": "user", "content": 5}]}, "is 5, not a text"),
    "half a weight": ({"messages": [USER, {**ASSISTANT, "weight": 0.5}]}, "0 or 1"),
    "unknown speaker": ({"conversations": [{"from": "narrator", "value": "a"}]}, "narrator"),
    "unhashable speaker": ({"conversations": [{"from": ["gpt"], "value": "a"}]}, "unknown speaker"),
    "tools no objects": ({"messages": [USER, ASSISTANT], "tools": ["hammer"]}, "'tools'"),
}


@pytest.mark.parametrize("name", BAD_CHATS)
def test_a_row_that_is_no_conversation_is_named_by_line(name):
    values, reason = BAD_CHATS[name]
    form = made(tiny.tokenizer(), {"messages": []}, chat_template="auto")
    with pytest.raises(UserError, match=reason) as caught:
        form.examples(Row(values, "rows.jsonl:9"))
    assert (caught.value.where, caught.value.code) == ("rows.jsonl:9", ExitCode.DATA)


# Recipes that cannot work


def test_conversations_without_a_template_are_refused():
    for tokenizer, choice in ((tiny.tokenizer(None), "auto"), (tiny.tokenizer(), "none")):
        with pytest.raises(UserError, match="chat template"):
            made(tokenizer, SAME_CHAT["messages"], chat_template=choice)


def test_assistant_is_for_chats():
    with pytest.raises(UserError, match="for chats"):
        example(tiny.tokenizer(), {"prompt": "a", "completion": "b"}, train_on="assistant")
    assert any(
        example(tiny.tokenizer(), SAME_CHAT["messages"], train_on="assistant", chat_template="auto").trained
    )


def test_all_and_a_message_left_out_contradict():
    values = {"messages": [USER, {**ASSISTANT, "train": False}]}
    with pytest.raises(UserError, match="train_on is all"):
        example(tiny.tokenizer(), values, train_on="all", chat_template="auto")


def test_a_system_message_needs_a_template_and_every_tokenizer_an_end():
    with pytest.raises(UserError, match="system"):
        made(tiny.tokenizer(None), {"text": "a"}, system="Be kind.")
    endless = tiny.tokenizer(None)
    endless.eos_token = None
    with pytest.raises(UserError, match="no end token") as caught:
        made(endless, {"text": "a"})
    assert caught.value.code == ExitCode.MODEL


def test_a_template_file_becomes_the_tokenizers_own(tmp_path):
    path = tmp_path / "other.jinja"
    path.write_text(tiny.CHATML.replace("<|im_start|>", "<bos>"))
    tokenizer = tiny.tokenizer()
    found = example(tokenizer, SAME_CHAT["messages"], chat_template=str(path))
    assert tokenizer.chat_template == path.read_text()
    assert tokenizer.decode(found.input_ids).startswith("<bos>user\n")
    with pytest.raises(UserError, match="cannot be read") as caught:
        made(tokenizer, SAME_CHAT["messages"], chat_template=str(tmp_path / "missing.jinja"))
    assert caught.value.where == "data.chat_template"


# Questions


@pytest.mark.parametrize("chat", ["auto", "none"])
@fresh
@given(prompt=word.filter(str.strip), completion=st.text(st.sampled_from("abcno."), min_size=1))
def test_question_and_answer_are_what_training_has(chat, prompt, completion):
    tokenizer = tiny.tokenizer()
    form = made(tokenizer, {}, format=PAIR, chat_template=chat)
    row = Row({"p": prompt, "c": completion}, "f:3")
    (found,), question = form.examples(row), form.question(row)
    start = found.trained.index(True)
    assert question.prompt_ids == found.input_ids[:start]
    assert form.encode_answer(question, completion) == found.input_ids[start:-1]
    assert (question.answer, question.references, question.where) == (completion, (completion,), "f:3")
    assert form.prompt_ids(prompt) == question.prompt_ids


def test_a_conversation_is_asked_up_to_its_last_answer():
    tokenizer = tiny.tokenizer()
    last = {"role": "assistant", "content": "No."}
    for messages, answer in (([USER, ASSISTANT, USER, last], "No."), ([USER, ASSISTANT, USER], "")):
        form = made(tokenizer, {"messages": messages}, chat_template="auto")
        question = form.question(Row({"messages": messages}, "f:1"))
        asked = tokenizer.apply_chat_template(messages[:3], add_generation_prompt=True, return_dict=False)
        assert list(question.prompt_ids) == asked
        assert question.answer == answer
        assert question.references == ((answer,) if answer else ())
        assert tokenizer.decode(form.encode_answer(question, "Well.")) == "Well."


def test_references_stand_in_for_a_missing_completion_and_are_all_right_answers():
    tokenizer = tiny.tokenizer()
    for chat in ("auto", "none"):
        form = made(tokenizer, {}, references="r", format=PAIR, chat_template=chat)
        values = {"p": "Why?", "r": ["So.", "Because."]}
        question = form.question(Row(values, "f:1"))
        assert (question.answer, question.references) == ("So.", ("So.", "Because."))
        assert tokenizer.decode(learned(form.examples(Row(values, "f:1"))[0])) == "So.<|im_end|>"
        question = form.question(Row({**values, "c": "Or."}, "f:1"))
        assert (question.answer, question.references) == ("Or.", ("So.", "Because."))
        assert form.question(Row({"p": "Why?", "c": "Or."}, "f:1")).references == ("Or.",)
        for wrong in ([], "", [1], 7, None):
            with pytest.raises(UserError, match=r"eval\.references"):
                form.question(Row({"p": "Why?", "r": wrong or 0}, "f:1"))


def test_a_row_without_an_answer_can_be_asked_but_not_learned():
    for values in ({"prompt": "Why?"}, {"instruction": "Why?"}):
        for chat in ("auto", "none"):
            form = made(tiny.tokenizer(), values, chat_template=chat)
            assert form.question(Row(values, "f:1")).references == ()
            with pytest.raises(UserError, match="no completion"):
                form.examples(Row(values, "f:1"))


def test_a_document_asks_nothing():
    form = made(tiny.tokenizer(), {"text": "a"}, chat_template="auto")
    with pytest.raises(UserError, match="asks nothing"):
        form.question(Row({"text": "a"}, "f:1"))
    assert tiny.tokenizer().decode(form.prompt_ids("Once")) == "Once"
