"""Row -> Examples: which ids, and which of them are learned. Decided here and nowhere else.

Everything holds one law: the ids in front of a learned stretch are the ids that generation reads there.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from transformers import PreTrainedTokenizerBase

from lora_cli.data import columns, template
from lora_cli.data.columns import Conversation, Document, Message, Pair, Reader, Said
from lora_cli.data.example import Example
from lora_cli.data.row import Row, wrong
from lora_cli.data.template import Turn
from lora_cli.data.tokens import Ids, encode, join, leading
from lora_cli.errors import ExitCode, UserError
from lora_cli.recipe.schema import DataRecipe


@dataclass(frozen=True, slots=True)
class Question:
    """What generation reads for a row, and what it should write."""

    prompt_ids: Ids
    prompt: str
    answer: str
    """Empty when the row has none."""
    references: tuple[str, ...]
    """All right answers; just `answer` when the row names no others; empty when there is none."""
    where: str
    before: Conversation | None = field(default=None, repr=False)
    """In a chat, the messages up to the answer."""


@dataclass(frozen=True)
class Format:
    """How rows become ids, for one recipe and one tokenizer; see `make`."""

    tokenizer: PreTrainedTokenizerBase
    read: Reader
    chat: bool
    """A chat template is active: a prompt is the user's message, its completion the assistant's."""
    documents: bool
    """The rows are texts without a prompt."""
    system: str | None
    train_on: Literal["completion", "assistant", "all"]
    references: str | None
    eos: str
    eos_id: int
    leading: Ids
    """What stands in front of plain text, BOS or nothing. Chat templates write their own."""

    def examples(self, row: Row) -> list[Example]:
        """The row's documents: one, or several where a template shows earlier turns otherwise than they were written.

        Raises:
            UserError: the row does not say what the format needs; names file and line.
        """
        said = self.read(row)
        if isinstance(said, Pair) and said.completion is None:
            raise wrong(
                "the row has no completion", row.where, f"its columns are {', '.join(sorted(row.values))}"
            )
        said = self._as_chat(said, row.where)
        if isinstance(said, Conversation):
            return self._whole(said, row.where) if self.train_on == "all" else self._turns(said, row.where)
        if self.train_on == "assistant":
            fix = "set data.train_on to completion or all"
            raise wrong("train_on: assistant is for chats, and this row is none", row.where, fix)
        prompt, completion = ("", said.text) if isinstance(said, Document) else (said.prompt, said.completion)
        return [self._plain(prompt, completion or "", row.where)]

    def question(self, row: Row) -> Question:
        """What generation reads up to the last answer of the row.

        Raises:
            UserError: the row is a document, which asks nothing, or does not fit the format.
        """
        said = self._as_chat(self.read(row), row.where)
        if isinstance(said, Document):
            raise wrong(
                "a text without a prompt asks nothing", row.where, "use rows with a prompt, or messages"
            )
        if isinstance(said, Pair):
            ids = self._behind_leading(encode(self.tokenizer, said.prompt)[0])
            return self._question(row, ids, said.prompt, said.completion, None)
        answered = said.messages[-1]["role"] == "assistant"
        before = replace(said, messages=said.messages[: len(said.messages) - answered])
        prompt = self._render(before, row.where, generate=True)
        answer = columns.text_of(said.messages[-1]) if answered else None
        return self._question(row, encode(self.tokenizer, prompt)[0], prompt, answer, before)

    def encode_answer(self, question: Question, text: str) -> Ids:
        """Ids of an answer as they would stand behind the question in training, without the end of the turn."""
        if question.before is None:
            return join(self.tokenizer, question.prompt, text)[1]
        messages = (*question.before.messages, {"role": "assistant", "content": text})
        answered = replace(question.before, messages=messages)
        turn = template.turn(self.tokenizer, answered, len(messages) - 1, question.where)
        _, ids = self._turn(turn)
        return ids[: len(ids) - len(encode(self.tokenizer, self._end(turn))[0])]

    def prompt_ids(self, text: str) -> Ids:
        """Ids of a bare question: a user's message in a chat, else plain text."""
        if not self.chat or self.documents:
            return self._behind_leading(encode(self.tokenizer, text)[0])
        return self.conversation_ids([{"role": "user", "content": text}])

    def conversation_ids(self, messages: Sequence[Message]) -> Ids:
        """Ids of a conversation up to the next answer, in the chat template, however rows are read."""
        asked = template.with_system(columns.conversation(*messages), self.system)
        return encode(self.tokenizer, self._render(asked, "the prompt", generate=True))[0]

    def _as_chat(self, said: Said, where: str) -> Said:
        """With a template everything but a document is a conversation; without one nothing is."""
        if self.chat and isinstance(said, Pair):
            said = _as_conversation(said)
        if not isinstance(said, Conversation):
            return said
        if not self.chat:
            raise _without_template(where)
        return template.with_system(said, self.system)

    def _question(
        self, row: Row, ids: Ids, prompt: str, answer: str | None, before: Conversation | None
    ) -> Question:
        right = () if answer is None else (answer,)
        if self.references is not None and self.references in row.values:
            right = columns.references_of(row, self.references)
        if answer is None:
            answer = right[0] if right else ""
        return Question(ids, prompt, answer, right, row.where, before)

    # Plain text

    def _plain(self, prompt: str, completion: str, where: str) -> Example:
        """Prompt, completion and the end token; an empty completion leaves nothing to learn."""
        before, answer = join(self.tokenizer, prompt, completion)
        ids = self._behind_leading(before + answer)
        if not completion.strip():
            return Example(ids, (False,) * len(ids), where)
        start = len(ids) - len(answer)
        if ids[-1] != self.eos_id:
            ids += (self.eos_id,)
        return _example(ids, range(1 if self.train_on == "all" else start, len(ids)), where)

    def _behind_leading(self, ids: Ids) -> Ids:
        """The ids behind what the tokenizer puts in front, once: a text may start with BOS by itself."""
        return ids if ids[: len(self.leading)] == self.leading else self.leading + ids

    # Chats

    def _turns(self, said: Conversation, where: str) -> list[Example]:
        """One example as long as each prompt goes on exactly where the example ends; else the next one starts.

        A template that shows an earlier turn without its reasoning, or ends the last turn in its own way, makes
        generation read something else than what was learned there: then the turns stand in examples of their own.
        """
        found: list[Example] = []
        ids: Ids = ()
        learned: list[int] = []
        for turn in template.turns(self.tokenizer, said, where):
            prompt, answer = self._turn(turn)
            if prompt[: len(ids)] != ids:
                found.append(_example(ids, learned, where))
                learned = []
            ids = prompt + answer
            learned.extend(range(len(prompt), len(ids)))
        if not learned:
            ids = encode(self.tokenizer, self._render(said, where, generate=False))[0]
        return [*found, _example(ids, learned, where)]

    def _whole(self, said: Conversation, where: str) -> list[Example]:
        """The conversation as one document, every token of it learned."""
        if not all(said.trained):
            fix = "take the mark away, or set data.train_on to assistant"
            raise wrong("a message is marked not to be learned, and train_on is all", where, fix)
        text = self._render(said, where, generate=False)
        if said.messages[-1]["role"] == "assistant":
            body, end = template.split_end(self.tokenizer, text)
            text = body + (end or self.eos)
        ids = encode(self.tokenizer, text)[0]
        return [_example(ids, range(len(ids)), where)]

    def _turn(self, turn: Turn) -> tuple[Ids, Ids]:
        return join(self.tokenizer, turn.prompt, turn.body + self._end(turn))

    def _end(self, turn: Turn) -> str:
        """The template's end of the turn, or the tokenizer's where it has none: a model must learn to stop."""
        return turn.end or self.eos

    def _render(self, said: Conversation, where: str, *, generate: bool) -> str:
        return template.render(self.tokenizer, said.messages, said.tools, where, generate=generate)


def make(
    recipe: DataRecipe,
    tokenizer: PreTrainedTokenizerBase,
    columns_of_first_row: Iterable[str],
    *,
    references: str | None = None,
) -> Format:
    """The format of a recipe; gives the tokenizer the recipe's chat template where that is a file.

    Args:
        recipe: the recipe's `data`.
        tokenizer: the model's.
        columns_of_first_row: for `format: auto`.
        references: column that holds all right answers, see `eval.references`.

    Raises:
        UserError: the recipe, the columns and the tokenizer do not go together.
    """
    eos, eos_id = tokenizer.eos_token, tokenizer.eos_token_id
    if not isinstance(eos, str) or not isinstance(eos_id, int):
        raise UserError(
            "the tokenizer has no end token: nothing would teach the model to stop",
            where="model.name",
            fix="set eos_token in the model's tokenizer_config.json",
            code=ExitCode.MODEL,
        )
    chat = template.use(tokenizer, recipe.chat_template)
    if recipe.system is not None and not chat:
        raise UserError("a system message needs a chat template", where="data.system", fix="leave it out")
    form = recipe.format
    if form == "auto":
        form = columns.recognise(columns_of_first_row, "data.train")
    if form in ("messages", "sharegpt") and not chat:
        raise _without_template("data.chat_template")
    return Format(
        tokenizer=tokenizer,
        read=columns.reader(recipe.format, chat=chat, references=references),
        chat=chat,
        documents=form == "text",
        system=recipe.system,
        train_on=recipe.train_on,
        references=references,
        eos=eos,
        eos_id=eos_id,
        leading=leading(tokenizer),
    )


def _as_conversation(said: Pair) -> Conversation:
    """Prompt and completion as messages. The space that joins a completion to its prompt has no place in a chat."""
    messages = [{"role": "user", "content": said.prompt}]
    if said.completion is not None:
        messages.append({"role": "assistant", "content": re.sub(r"\A (?=\S)", "", said.completion)})
    return columns.conversation(*messages)


def _example(ids: Ids, learned: Iterable[int], where: str) -> Example:
    """Marks the learned positions; never the first one, which nothing predicts."""
    marks = set(learned) - {0}
    return Example(ids, tuple(i in marks for i in range(len(ids))), where)


def _without_template(where: str) -> UserError:
    return UserError(
        "conversations need a chat template, and none is active",
        where=where,
        fix="set data.chat_template to a file, or to auto when the tokenizer has one",
        code=ExitCode.DATA,
    )
