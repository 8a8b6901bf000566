"""Conversation -> text, with the tokenizer's own chat template and nothing beside it.

What is learned is told by comparing two renderings, so that a template needs no `{% generation %}` marks: the one that
generation reads before message i, render(messages[:i], add_generation_prompt=True), and the one with message i in it.
What the second has beyond the first is what generation should write.
"""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lora_cli.data import template_trial
from lora_cli.data.columns import Conversation, Message, text_of
from lora_cli.data.row import wrong
from lora_cli.errors import ExitCode, UserError

THINK, END_THINK = "<think>", "</think>"
_OPENED = re.compile(rf"{THINK}\s*\Z")
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message under which transformers accepts the reasoning."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of the assistant, as text."""

    prompt: str
    """What generation reads."""
    body: str
    """What it should write, up to the end of the turn."""
    end: str
    """The special tokens that end the turn; empty where the template writes none. What follows them is left out."""


def use(tokenizer: PreTrainedTokenizerBase, choice: str) -> bool:
    """Give the tokenizer the template that `data.chat_template` chooses; whoever saves it saves the template too.

    Returns whether a template is active: never for `none`, else when the tokenizer has one or a file was named.

    Raises:
        UserError: the file cannot be read.
    """
    if choice == "none":
        return False
    if choice != "auto":
        try:
            tokenizer.chat_template = Path(choice).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"the chat template cannot be read ({error})",
                where="data.chat_template",
                fix="write auto, none, or the path of a jinja file",
            ) from error
    return tokenizer.chat_template is not None


def with_system(conversation: Conversation, system: str | None) -> Conversation:
    """The conversation with a system message in front, unless it has one or there is none to put."""
    if system is None or conversation.messages[0]["role"] in ("system", "developer"):
        return conversation
    first: Message = {"role": "system", "content": system}
    return replace(
        conversation, messages=(first, *conversation.messages), trained=(True, *conversation.trained)
    )


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] | None,
    where: str,
    *,
    generate: bool,
) -> str:
    """The text of a conversation; with `generate` it ends where the assistant's next message begins.

    Raises:
        UserError: the template refuses the conversation, cannot cope with it, or needs more than a template may.
    """
    _check_limits(tokenizer.chat_template)
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=list(tools) if tools else None,
            add_generation_prompt=generate,
            tokenize=False,
        )
    except Exception as error:  # a template is a program: it can fail in every way
        raise wrong(
            f"the chat template does not accept this conversation: {str(error) or type(error).__name__}",
            where,
            "mend the row, or name another template in data.chat_template",
        ) from error
    assert isinstance(text, str)
    return text


def _check_limits(template: str | dict[str, str] | None) -> None:
    """Refuse a template that needs too much for a short conversation: on a row it might never end.

    Raises:
        UserError: what it needs too much of.
    """
    for text in template.values() if isinstance(template, dict) else [template or ""]:
        excess = _excess(text)
        if excess is not None:
            raise UserError(
                f"the chat template {excess} for five short messages",
                where="data.chat_template",
                fix="it may be meant to do harm: name another one, or none",
                code=ExitCode.DATA,
            )


@cache
def _excess(template: str) -> str | None:
    """What a template needs too much of, found out once in another process; see `template_trial`."""
    command = [sys.executable, "-P", template_trial.__file__]
    code = subprocess.run(command, input=json.dumps(template).encode(), capture_output=True).returncode
    reasons = {
        0: None,
        template_trial.TOO_LONG: f"writes more than {template_trial.LENGTH // 2**20} MB",
        template_trial.TOO_LARGE: f"takes more than {template_trial.MEMORY // 2**20} MB of memory",
        -signal.SIGXCPU: f"takes longer than {template_trial.SECONDS} seconds",
    }
    return reasons.get(code, f"ends Python with code {code}")


def turns(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, where: str) -> list[Turn]:
    """The assistant's messages that are learned, in order.

    Context only: a first message, which answers nothing, and an empty one, which says nothing.
    """
    marked = enumerate(zip(conversation.messages, conversation.trained, strict=True))
    learned = [i for i, (message, trained) in marked if i and trained and _says_something(message)]
    return [turn(tokenizer, conversation, i, where) for i in learned]


def _says_something(message: Message) -> bool:
    if message["role"] != "assistant":
        return False
    return bool(text_of(message).strip() or message.get("tool_calls") or any(map(message.get, REASONING)))


def turn(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, index: int, where: str) -> Turn:
    """The message at `index`, which is the assistant's.

    Raises:
        UserError: generation would not write this message where the template puts it, or the template leaves out
            a part of the conversation.
    """
    messages, tools = conversation.messages, conversation.tools
    prompt = render(tokenizer, messages[:index], tools, where, generate=True)
    whole = render(tokenizer, messages[: index + 1], tools, where, generate=False)
    completion = _completion(prompt, whole, messages[index], where)
    body, end = split_end(tokenizer, completion)
    _check_shown(messages[:index], prompt, where)
    _check_answered(messages[index], body, where)
    return Turn(prompt, body, end)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts that stand for one token each, never for letters; the longest first."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*added, *tokenizer.all_special_tokens}, key=lambda token: (-len(token), token))


def _completion(prompt: str, whole: str, message: Message, where: str) -> str:
    """What `whole` has beyond `prompt`."""
    opened = _OPENED.search(prompt)
    if whole.startswith(prompt):
        found = whole.removeprefix(prompt)
        if opened and found.count(END_THINK) > 1:
            what = "the chat template opens the reasoning twice: it does not know <think> in the content"
            raise wrong(what, where, "write the reasoning under the key reasoning_content")
        return found
    if opened and whole.startswith(prompt[: opened.start()]):
        return _behind_opened_reasoning(whole[opened.start() :], message)
    same = next(i for i in range(len(prompt)) if prompt[i : i + 1] != whole[i : i + 1])
    raise wrong(
        f"generation would begin with {prompt[same:]!r} where this message begins with {whole[same:][:40]!r}",
        where,
        "take the reasoning out of the row, or name a template in data.chat_template that keeps both alike",
    )


def _behind_opened_reasoning(rest: str, message: Message) -> str:
    """The completion where generation starts inside <think>, but the template leaves the reasoning out.

    `rest` is what the template shows instead: an empty block (Nemotron), or the bare answer (DeepSeek-R1). The block
    is closed in the way both families document; without reasoning in the row it is closed at once.
    """
    if rest.startswith(THINK):
        return rest.removeprefix(THINK).lstrip("\n")
    content = message.get("content", "")
    written = content.rpartition(END_THINK)[0].rpartition(THINK)[2] if isinstance(content, str) else ""
    reasoning = next((message[key] for key in REASONING if message.get(key)), written)
    return f"{reasoning.strip(chr(10))}\n{END_THINK}\n\n{rest.lstrip(chr(10))}"


def split_end(tokenizer: PreTrainedTokenizerBase, completion: str) -> tuple[str, str]:
    """The answer, and the special tokens right behind it; whatever a template writes behind those is dropped.

    Of `answer<|end|>\\n<|endoftext|>` the end is `<|end|>`: there generation stops, and there the next turn goes on.
    """
    token = "|".join(map(re.escape, special_tokens(tokenizer)))
    found = re.search(rf"((?:{token})+)(?:\s|{token})*\Z", completion)
    return (completion[: found.start()], found[1]) if found else (completion, "")


# A template that leaves out what it does not know would train on something else than the row says


def _check_shown(messages: Sequence[Message], prompt: str, where: str) -> None:
    for message in messages:
        if message["role"] in ("system", "user") and not _shows(prompt, message.get("content")):
            what = f"the chat template leaves out the text of a message of the {message['role']}"
            raise wrong(what, where, _AS_PARTS)


def _check_answered(message: Message, body: str, where: str) -> None:
    content = message.get("content")
    if isinstance(content, str):
        content = content.rpartition(END_THINK)[2]
    if not _shows(body, content):
        raise wrong("the chat template leaves out the text of the assistant's message", where, _AS_PARTS)
    if not all(_shows(body, message[key]) for key in REASONING if key in message):
        what = "the chat template leaves out the reasoning of the assistant's message"
        raise wrong(
            what, where, "take it out of the row, or name a template that shows it in data.chat_template"
        )
    for call in message.get("tool_calls", ()):
        function = call.get("function", call)
        if str(function.get("name")) not in body:
            what = "the chat template leaves out the tool calls of the assistant's message"
            raise wrong(what, where, "name a template that shows them in data.chat_template")


_AS_PARTS = 'some templates want the content as a list: [{"type": "text", "text": "..."}]'


def _shows(text: str, content: Any) -> bool:
    """Whether the first word stands in the text: templates may trim or shorten, but not pass over."""
    if isinstance(content, list):
        parts = (part.get("text") for part in content if isinstance(part, dict))
        return all(_shows(text, part) for part in parts)
    words = content.split(maxsplit=1) if isinstance(content, str) else []
    return not words or words[0] in text
