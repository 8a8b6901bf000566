"""Published chat templates, as TRL ships them: what is learned is what generation should write, where it writes it.

The table says what each family writes around an answer; everything else is checked against `apply_chat_template`.
"""

import json
import random
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.data import format
from lora_cli.data.row import Row
from lora_cli.errors import ExitCode, UserError
from lora_cli.recipe.schema import DataRecipe
from tests import tiny

found = find_spec("trl")  # its files are data here; nothing of it is imported
pytestmark = pytest.mark.skipif(found is None, reason="trl ships the templates")
TEMPLATES = Path(found.submodule_search_locations[0]) / "chat_templates" if found else Path()
EOS = "<|im_end|>"  # of the tiny tokenizer


class Family(NamedTuple):
    """What a template writes around an answer."""

    end: str
    before: str = ""
    """What generation writes before an answer without reasoning."""
    reasoning: str | None = None
    """What it writes before an answer with the reasoning R; None: the template cannot."""
    key: str = "reasoning_content"
    """Where the reasoning stands in the message; `content` for <think> ... </think> in it."""
    tools: bool = False
    system: bool = True
    parts: bool = False
    """The content must be a list of parts."""
    special: tuple[str, ...] = ()


DEEPSEEK = "<｜end▁of▁sentence｜>"
THOUGHT = "R\n</think>\n\n"
EMPTY = "<think>\n\n</think>\n\n"
FAMILIES = {
    "cohere": Family("<|END_OF_TURN_TOKEN|>"),
    "cohere2": Family(
        "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", special=("<|END_RESPONSE|>", "<|END_OF_TURN_TOKEN|>")
    ),
    "deepseek_r1_distill": Family(DEEPSEEK, "\n</think>\n\n", THOUGHT, "content"),
    "deepseekv3": Family(DEEPSEEK, "\n</think>\n\n", THOUGHT, "content"),
    "gemma": Family("<end_of_turn>", system=False),
    "gemma3": Family("<end_of_turn>"),
    "gemma4_v5": Family(
        "<turn|>", "", "<|channel>thought\nR\n<channel|>", tools=True, special=("<turn|>", "<|tool_response>")
    ),
    "glm4moe": Family(
        EOS, "\n<think></think>\n", "\n<think>R</think>\n", tools=True
    ),  # writes no end of its own
    "gptoss": Family(
        "<|return|>",
        "<|channel|>final<|message|>",
        "<|channel|>analysis<|message|>R<|end|><|start|>assistant<|channel|>final<|message|>",
        "thinking",
        tools=True,
        special=("<|return|>", "<|call|>", "<|end|>", "<|start|>", "<|channel|>", "<|message|>"),
    ),
    "idefics3": Family("<end_of_utterance>", " ", parts=True),
    "lfm2": Family(EOS),
    "lfm2_2_5_v2": Family(EOS, "", "<think>R</think>", tools=True),
    "llama3": Family("<|eot_id|>"),
    "llama3_1": Family("<|eot_id|>", tools=True),
    "llama3_2": Family("<|eot_id|>", tools=True),
    "muse_glimmer": Family(
        "<|eot|>",
        " to=user<|message|>",
        " to=self<|message|>R<|eom|><|start|>assistant to=user<|message|>",
        tools=True,
        special=("<|eot|>", "<|eom|>", "<|start|>", "<|message|>"),
    ),
    "nemotron_3_nano": Family(EOS, "</think>", "R\n</think>\n", tools=True),
    "phi3": Family("<|end|>"),
    "phi3_5": Family("<|end|>"),
    "qwen2_5": Family(EOS, tools=True),
    "qwen3": Family(EOS, EMPTY, f"<think>\n{THOUGHT}", tools=True),
    "qwen3_5_nothink": Family(EOS, tools=True),
    "qwen3_5_think": Family(EOS, "\n</think>\n\n", THOUGHT, tools=True),
    "qwen3_8": Family(EOS, "\n</think>\n\n", THOUGHT, tools=True),
    "qwen3_instruct_2507": Family(EOS, tools=True),
    "qwen3_vl": Family(EOS, tools=True),
    "smolvlm": Family("<end_of_utterance>", " ", parts=True),
}
WITH = {
    kind: [name for name, family in FAMILIES.items() if getattr(family, kind)]
    for kind in ("tools", "reasoning", "system")
}


def tokenizer_of(name):
    tokenizer = tiny.tokenizer((TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"))
    tokenizer.add_tokens(list(FAMILIES[name].special or (FAMILIES[name].end,)), special_tokens=True)
    return tokenizer


def examples(tokenizer, messages, tools=None, **recipe):
    data = DataRecipe.model_validate({"train": "a", "format": "messages", **recipe})
    form = format.make(data, tokenizer, ["messages"])
    return form.examples(Row({"messages": messages, "tools": tools}, "rows.jsonl:1"))


def stretches(found):
    """Start and end of each run of learned tokens."""
    marks = [False, *found.trained, False]
    edges = [i for i in range(len(marks) - 1) if marks[i] != marks[i + 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))


def check(tokenizer, messages, written, tools=None, **recipe):
    """The law: learned stretches are the turns in `written` (index -> text), each behind what generation reads."""
    learned = [
        (found, *edge)
        for found in examples(tokenizer, messages, tools, **recipe)
        for edge in stretches(found)
    ]
    assert len(learned) == len(written)
    for (found, start, end), (index, text) in zip(learned, sorted(written.items()), strict=True):
        read = tokenizer.apply_chat_template(
            messages[:index], tools=tools, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert list(found.input_ids[:start]) == read
        assert tokenizer.decode(found.input_ids[start:end]) == text
    for found in {item[0].input_ids for item in learned}:
        assert found.count(tokenizer.bos_token_id) <= 1


def message(name, role, text, **more):
    content = [{"type": "text", "text": text}] if FAMILIES[name].parts else text
    return {"role": role, "content": content, **more}


word = st.text(st.sampled_from("abcXYZ09äß字.,!? \n"), min_size=1, max_size=12)
said = word.map(str.strip).filter(bool)
conversation = st.tuples(
    st.lists(st.tuples(said, said), min_size=1, max_size=3), st.none() | said, st.booleans()
)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=8, deadline=None)
@given(drawn=conversation)
def test_every_answer_is_learned_where_generation_writes_it(name, drawn):
    turns, system, question_last = drawn
    family = FAMILIES[name]
    messages = [message(name, "system", system)] if system and family.system else []
    written = {}
    for question, answer in turns:
        messages.append(message(name, "user", question))
        written[len(messages)] = family.before + answer + family.end
        messages.append(message(name, "assistant", answer))
    if question_last:
        messages.append(message(name, "user", "And?"))
    check(tokenizer_of(name), messages, written)


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_that_are_not_to_be_learned_are_context(name):
    family = FAMILIES[name]
    messages = [
        message(name, role, text, **({"train": False} if text == "no" else {}))
        for role, text in (("user", "a"), ("assistant", "no"), ("user", "b"), ("assistant", "yes"))
    ]
    bare = [{k: v for k, v in item.items() if k != "train"} for item in messages]
    (only,) = examples(tokenizer_of(name), messages)
    tokenizer = tokenizer_of(name)
    ((start, end),) = stretches(only)
    assert tokenizer.decode(only.input_ids[start:end]) == family.before + "yes" + family.end
    read = tokenizer.apply_chat_template(bare[:3], add_generation_prompt=True, return_dict=False)
    assert list(only.input_ids[:start]) == read


@pytest.mark.parametrize("name", WITH["reasoning"])
def test_reasoning_is_learned_in_its_own_turn_and_read_later_as_the_template_shows_it(name):
    family = FAMILIES[name]
    tokenizer, messages, written = tokenizer_of(name), [], {}
    for turn in range(3):
        thought, answer = f"because {random.random()}", f"answer {random.random()}"
        messages.append({"role": "user", "content": f"question {turn}"})
        written[len(messages)] = (family.reasoning or "").replace("R", thought, 1) + answer + family.end
        if family.key == "content":
            answer = f"<think>\n{thought}\n</think>\n\n{answer}"
            messages.append({"role": "assistant", "content": answer})
        else:
            messages.append({"role": "assistant", "content": answer, family.key: thought})
    check(tokenizer, messages, written)


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Its name."}},
                "required": ["city"],
            },
        },
    }
]


@pytest.mark.parametrize("name", WITH["tools"])
def test_tool_calls_are_learned_and_tool_results_are_not(name):
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    call = {"name": "get_weather", "arguments": {"city": "Rome"}}
    messages = [
        {"role": "user", "content": "How is the weather in Rome?"},
        {"role": "assistant", "tool_calls": [{"type": "function", "id": "call00001", "function": call}]},
        {"role": "tool", "name": "get_weather", "tool_call_id": "call00001", "content": "sunny result"},
        {"role": "assistant", "content": "The sun shines."},
    ]
    if "llama" not in name and name not in ("gemma4_v5", "gptoss"):
        messages[1]["content"] = ""
    learned = [(found, *edge) for found in examples(tokenizer, messages, TOOLS) for edge in stretches(found)]
    assert len(learned) == 2
    for (found, start, end), index in zip(learned, (1, 3), strict=True):
        read = tokenizer.apply_chat_template(
            messages[:index], tools=TOOLS, add_generation_prompt=True, return_dict=False
        )
        assert list(found.input_ids[:start]) == read
        text = tokenizer.decode(found.input_ids[start:end])
        assert "sunny result" not in text
        assert ("get_weather" in text and "Rome" in text) == (index == 1)
        assert found.input_ids[end - 1] in tokenizer.added_tokens_decoder  # it ends where generation stops
    last, start, end = learned[1]
    assert "sunny result" in tokenizer.decode(last.input_ids[:start])
    assert "Weather of a city." in tokenizer.decode(last.input_ids[:start])
    bare = tokenizer.decode(last.input_ids[start:end])
    assert bare in (family.before + "The sun shines." + family.end, "The sun shines." + family.end)


@pytest.mark.parametrize("name", WITH["tools"])
def test_tools_may_be_written_as_json(name):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    tokenizer = tokenizer_of(name)
    assert examples(tokenizer, messages, json.dumps(TOOLS)) == examples(tokenizer, messages, TOOLS)
    assert examples(tokenizer, messages, [json.dumps(TOOLS[0])]) == examples(tokenizer, messages, TOOLS)


@pytest.mark.parametrize("name", ["llama3", "qwen2_5", "phi3", "gemma3", "cohere2"])
def test_templates_that_keep_history_give_one_example_with_the_text_between_turns(name):
    messages = [{"role": role, "content": f"{role} {i}"} for i in range(3) for role in ("user", "assistant")]
    tokenizer = tokenizer_of(name)
    (one,) = examples(tokenizer, messages)
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    assert whole[: len(one.input_ids)] == list(one.input_ids)
    assert len(stretches(one)) == 3
    assert one.trained[-1]  # what the template writes behind the last turn is dropped


@pytest.mark.parametrize("name", FAMILIES)
def test_all_learns_the_conversation_as_the_template_shows_it(name):
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    messages = [message(name, role, text) for role, text in (("user", "a"), ("assistant", "yes"))]
    (one,) = examples(tokenizer, messages, train_on="all")
    shown = tokenizer.apply_chat_template(messages, tokenize=False)
    text = tokenizer.decode(one.input_ids)
    assert text.endswith("yes" + family.end)
    assert shown.startswith(text) or text == shown + EOS
    assert one.trained == (False, *[True] * (len(one.input_ids) - 1))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_end_of_an_answer_may_be_whitespace_without_changing_where_it_stops(name):
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    messages = [message(name, "user", "a"), message(name, "assistant", "yes \n\n")]
    (one,) = examples(tokenizer, messages)
    ((start, end),) = stretches(one)
    text = tokenizer.decode(one.input_ids[start:end])
    assert text.startswith(family.before + "yes")
    assert text.endswith(family.end)
    assert text.count(family.end) == 1


# Where no honest answer exists, the row and the reason are named


def refused(name, messages, reason, tools=None):
    with pytest.raises(UserError, match=reason) as caught:
        examples(tokenizer_of(name), messages, tools)
    assert (caught.value.where, caught.value.code) == ("rows.jsonl:1", ExitCode.DATA)


CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}
ASKED = {"role": "user", "content": "Why?"}


def test_a_template_that_refuses_names_the_row():
    answer = {"role": "assistant", "content": "So."}
    refused("gemma", [{"role": "system", "content": "Be kind."}, ASKED, answer], "System role not supported")
    refused("gemma", [ASKED, ASKED, answer], "must alternate")
    refused("deepseekv3", [ASKED, {"role": "assistant", "tool_calls": [CALL]}], "does not accept")


@pytest.mark.parametrize("name", ["llama3", "phi3", "lfm2"])
def test_tool_calls_that_a_template_does_not_show_are_refused(name):
    refused(
        name, [ASKED, {"role": "assistant", "content": "", "tool_calls": [CALL]}], "leaves out the tool calls"
    )


@pytest.mark.parametrize("name", ["llama3", "qwen2_5", "qwen3_vl"])
def test_reasoning_that_a_template_does_not_show_is_refused(name):
    answer = {"role": "assistant", "content": "So.", "reasoning_content": "Because."}
    refused(name, [ASKED, answer], "leaves out the reasoning")


def test_reasoning_where_generation_skips_it_is_refused():
    answer = {"role": "assistant", "content": "So.", "reasoning_content": "Because."}
    refused("qwen3_5_nothink", [ASKED, answer], "generation would begin with")


def test_reasoning_in_the_content_is_refused_where_it_would_open_twice():
    refused(
        "qwen3_8",
        [ASKED, {"role": "assistant", "content": "<think>\nA\n</think>\n\nSo."}],
        "opens the reasoning twice",
    )


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_text_that_a_template_does_not_show_is_refused(name):
    refused(name, [ASKED, {"role": "assistant", "content": "So."}], "leaves out the text")


def test_messages_that_a_template_passes_over_are_refused():
    without_system = tiny.CHATML.replace("in messages", "in messages if message.role != 'system'")
    answer = {"role": "assistant", "content": "So."}
    with pytest.raises(UserError, match="leaves out the text of a message of the system"):
        examples(tiny.tokenizer(without_system), [{"role": "system", "content": "Be kind."}, ASKED, answer])
    with pytest.raises(UserError, match="leaves out the text of a message of the system"):
        examples(tiny.tokenizer(without_system), [ASKED, answer], system="Be kind.")


def test_a_greeting_is_context():
    tokenizer = tokenizer_of("llama3")
    greeting = {"role": "assistant", "content": "Welcome."}
    (one,) = examples(tokenizer, [greeting, ASKED, {"role": "assistant", "content": "So."}])
    ((start, end),) = stretches(one)
    assert tokenizer.decode(one.input_ids[start:end]) == "So.<|eot_id|>"
    assert "Welcome." in tokenizer.decode(one.input_ids)


def test_a_conversation_without_an_answer_has_nothing_to_learn():
    (one,) = examples(tokenizer_of("llama3"), [ASKED])
    assert not any(one.trained)
