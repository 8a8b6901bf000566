"""What a row says, told from its columns: a conversation, a question and its answer, or a document."""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from lora_cli.data import strict_json
from lora_cli.data.row import Row, wrong
from lora_cli.errors import UserError
from lora_cli.recipe.schema import PromptFormat

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages as chat templates read them, and the tools that the assistant may call."""

    messages: tuple[Message, ...]
    trained: tuple[bool, ...]
    """False for messages marked `"train": false` or `"weight": 0`; of the others, the assistant's are trained on."""
    tools: tuple[dict[str, Any], ...] | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """What is read, and what is written behind it."""

    prompt: str
    completion: str | None
    """None where the row has no such columns: a question may be asked, but nothing learned."""


@dataclass(frozen=True, slots=True)
class Document:
    """Text without a question."""

    text: str


RECOGNISED = {
    "messages": "messages",
    "conversations": "sharegpt",
    "instruction": "alpaca",
    "prompt": "prompt",
    "text": "text",
}
"""The column that a format is recognised by, first match first."""

Said = Conversation | Pair | Document
Reader = Callable[[Row], Said]

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
"""The published Alpaca prompts, used where there is no chat template."""


def reader(form: str | PromptFormat, *, chat: bool, references: str | None) -> Reader:
    """How to read a row in the recipe's `data.format`.

    Args:
        form: the value of `data.format`.
        chat: a chat template is active.
        references: column that can stand in for a missing completion.
    """
    if isinstance(form, PromptFormat):
        return prompt_reader(form, references)
    readers: dict[str, Reader] = {
        "messages": read_messages,
        "sharegpt": read_sharegpt,
        "alpaca": read_alpaca if chat else read_alpaca_plain,
        "prompt": prompt_reader(PromptFormat(prompt="{prompt}", completion="{completion}"), references),
        "text": read_text,
    }
    if form == "auto":
        return lambda row: readers[recognise(row.values, row.where)](row)
    return readers[form]


def recognise(columns: Iterable[str], where: str) -> str:
    """The format that has these columns.

    Raises:
        UserError: none has.
    """
    columns = set(columns)
    for column, form in RECOGNISED.items():
        if column in columns:
            return form
    raise wrong(
        f"no known format has the columns {_listed(columns)}",
        where,
        "name the columns to use: data.format: {prompt: '... {column} ...', completion: '{column}'}; recognised are "
        "messages, conversations, instruction + output, prompt + completion, and text",
    )


def conversation(*messages: Message) -> Conversation:
    """Messages that are all learned as their roles say."""
    return Conversation(messages, (True,) * len(messages))


def text_of(message: Message) -> str:
    """A message's content without pictures and the like."""
    content = message.get("content", "")
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))


# Templates over columns


def prompt_reader(form: PromptFormat, references: str | None) -> Reader:
    """Reads rows into pairs; the first reference, if any, stands in for a completion whose columns are missing."""
    prompt, completion = parse(form.prompt, "prompt"), parse(form.completion, "completion")
    needed = {column for _, column in completion if column is not None}

    def read(row: Row) -> Pair:
        if needed <= row.values.keys():
            return Pair(_fill(prompt, row), _fill(completion, row))
        if references is None or references not in row.values:
            return Pair(_fill(prompt, row), None)
        return Pair(_fill(prompt, row), references_of(row, references)[0])

    return read


def parse(template: str, key: str) -> list[tuple[str, str | None]]:
    """Pieces of a template: a literal text and None, or nothing and a column's name.

    Raises:
        UserError: braces that do not match, or nothing between them.
    """
    pieces: list[tuple[str, str | None]] = []
    at = 0
    while at < len(template):
        found = _PIECE.match(template, at)
        if found is None:
            what = f"a brace without its pair: ...{template[at:][:20]!r}"
            raise UserError(
                what, where=f"data.format.{key}", fix="a column is written {column}, a brace {{ or }}"
            )
        column = found["column"]
        pieces.append(("" if column else _BRACES.get(found[0], found[0]), column))
        at = found.end()
    return pieces


_PIECE = re.compile(r"\{\{|\}\}|\{(?P<column>[^{}]+)\}|[^{}]+")
_BRACES = {"{{": "{", "}}": "}"}


def _fill(template: list[tuple[str, str | None]], row: Row) -> str:
    return "".join(text if column is None else _value(row, column) for text, column in template)


def _value(row: Row, column: str) -> str:
    """A column as text: numbers as they are written, true and false as in JSON."""
    if column not in row.values:
        raise wrong(f"no column '{column}'", row.where, f"columns of this row: {_listed(row.values)}")
    value = row.values[column]
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not math.isfinite(value):
        raise wrong(f"the column '{column}' is {value}", row.where, "mend the row, or take it out")
    if isinstance(value, str | int | float):
        return str(value)
    raise wrong(
        f"the column '{column}' is {_kind(value)}, not a text", row.where, "mend the row, or take it out"
    )


def references_of(row: Row, column: str) -> tuple[str, ...]:
    """The right answers in a column: a list of texts, or one text.

    Raises:
        UserError: missing, empty, or something else.
    """
    value = row.values.get(column)
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not found or not all(isinstance(item, str) for item in found):
        fix = f"columns of this row: {_listed(row.values)}"
        raise wrong(f"the column '{column}' is not a list of texts (eval.references)", row.where, fix)
    return tuple(found)


# Fixed formats


def read_text(row: Row) -> Document:
    """A row with a `text` column."""
    return Document(_value(row, "text"))


def read_alpaca(row: Row) -> Pair:
    """instruction, input (may be missing) and output; the input stands below the instruction."""
    given = _optional(row, "input")
    prompt = _value(row, "instruction") + (f"\n\n{given}" if given else "")
    return Pair(prompt, _output(row))


def read_alpaca_plain(row: Row) -> Pair:
    """The same, with the prompt that the Alpaca data was published with."""
    given = _optional(row, "input")
    template = ALPACA_WITH_INPUT if given else ALPACA
    return Pair(template.format(instruction=_value(row, "instruction"), input=given), _output(row))


def _output(row: Row) -> str | None:
    return _value(row, "output") if "output" in row.values else None


def read_messages(row: Row) -> Conversation:
    """A `messages` column of objects with role and content, and `tools` beside it or not."""
    return _conversation(row, "messages", [_message(item, row.where) for item in _list(row, "messages")])


def read_sharegpt(row: Row) -> Conversation:
    """A `conversations` column of objects with from and value; `system` and `tools` beside it or not."""
    messages = [_message(_renamed(item, row.where), row.where) for item in _list(row, "conversations")]
    system = _optional(row, "system")
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return _conversation(row, "conversations", messages)


def _conversation(row: Row, column: str, messages: list[Message]) -> Conversation:
    if not messages:
        raise wrong(f"the column '{column}' is empty", row.where)
    trained = tuple(_is_trained(message, row.where) for message in messages)
    bare = tuple({key: item for key, item in message.items() if key not in _MARKS} for message in messages)
    return Conversation(bare, trained, _tools(row))


_MARKS = ("train", "weight")


def _is_trained(message: Message, where: str) -> bool:
    marks = [message[key] for key in _MARKS if key in message]
    if any(mark not in (0, 1) for mark in marks):
        raise wrong("'train' is true or false, 'weight' 0 or 1: a message is learned or not", where)
    return all(marks)


def _message(item: Any, where: str) -> Message:
    """Checked, and without keys that are null: chat templates treat those as something."""
    if not isinstance(item, dict):
        raise wrong(f"a message is {_kind(item)}, not an object with role and content", where)
    message = {key: value for key, value in item.items() if value is not None}
    if not isinstance(message.get("role"), str):
        raise wrong(f"a message has no role; its keys are {_listed(item)}", where)
    if not isinstance(message.get("content", ""), str | list):
        raise wrong(f"the content of a message is {_kind(message['content'])}, not a text", where)
    if "content" not in message and not message.get("tool_calls"):
        raise wrong(f"a message of the {message['role']} has no content", where)
    return message


def _renamed(item: Any, where: str) -> Any:
    """from/value as role/content; what has role/content already stays."""
    if not isinstance(item, dict) or "from" not in item:
        return item
    role = SHAREGPT_ROLES.get(item["from"]) if isinstance(item["from"], str) else None
    if role is None:
        raise wrong(f"unknown speaker {item['from']!r}", where, f"known: {', '.join(SHAREGPT_ROLES)}")
    rest = {key: value for key, value in item.items() if key not in ("from", "value")}
    return {"role": role, "content": item.get("value"), **rest}


def _list(row: Row, column: str) -> list[Any]:
    """A column that holds a list, or the same written as JSON, which is all that a CSV file can do."""
    value = _parsed(row.values.get(column), column, row.where)
    if not isinstance(value, list):
        fix = f"columns of this row: {_listed(row.values)}"
        raise wrong(f"the column '{column}' is {_kind(value)}, not a list", row.where, fix)
    return value


def _tools(row: Row) -> tuple[dict[str, Any], ...] | None:
    if not row.values.get("tools"):
        return None
    tools = [_parsed(tool, "tools", row.where) for tool in _list(row, "tools")]
    if not all(isinstance(tool, dict) for tool in tools):
        raise wrong("the column 'tools' is not a list of objects", row.where)
    return tuple(tools) or None


def _parsed(value: Any, column: str, where: str) -> Any:
    """A list or an object that is written as JSON in a text; everything else as it is."""
    text = value.strip() if isinstance(value, str) else ""
    if not text.startswith(("[", "{")):
        return value
    try:
        return strict_json.whole(text, where, 1)
    except UserError as error:
        raise wrong(f"the column '{column}': {error.what}", where, error.fix) from None


def _optional(row: Row, column: str) -> str:
    return _value(row, column) if row.values.get(column) is not None else ""


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", type(None): "null or missing"}
    return names.get(type(value), f"{value!r}")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
