"""`lora chat`: talk to a model, and change its adapter while the conversation goes on."""

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from lora_cli import parts
from lora_cli.data.format import Format
from lora_cli.data.tokens import Ids
from lora_cli.errors import UserError
from lora_cli.evaluate import generation
from lora_cli.recipe.schema import Recipe
from lora_cli.run.generate import data_of, prompt_format
from lora_cli.run.open import Opened, best_device, open_model, trained_with
from lora_cli.screen import Screen

HELP = """/adapter NAME   answer with this adapter
/base           answer with the bare base
/adapters       list them
/clear          forget the conversation
/quit           leave; so does Ctrl-D. Ctrl-C stops an answer"""


def chat(
    paths: Sequence[Path],
    screen: Screen,
    *,
    base: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
) -> None:
    """Read questions and commands from stdin until it ends; answers go to stdout, everything else to the screen.

    Args:
        paths: adapters of one base, or a model.
        screen: for notes.
        base: use this model instead of the one the adapters name.
        max_new_tokens: longest answer.
        temperature: 0 takes the most probable token.
        seed: of the draws when the temperature is above 0.

    Raises:
        UserError: the model cannot be opened.
    """
    opened = open_model(paths, base=base, device=best_device())
    talk = Talk(opened, screen, max_new_tokens, temperature, seed)
    for line in _lines(lambda: talk.speaker):
        if line == "/quit":
            return
        try:
            talk.command(line) if line.startswith("/") else talk.answer(line)
        except UserError as error:
            screen.error(str(error))


class Talk:
    """A conversation, and who answers next."""

    def __init__(
        self, opened: Opened, screen: Screen, max_new_tokens: int, temperature: float, seed: int
    ) -> None:
        """Start with the first adapter, or with the base when there is none."""
        self.opened, self.screen = opened, screen
        self.max_new_tokens, self.temperature, self.seed = max_new_tokens, temperature, seed
        self.messages: list[dict[str, str]] = []
        self.formats = _formats(opened)
        first = next(iter(self.formats))
        self.format = self.formats[first]
        self.use(first)
        screen.note("/help lists the commands")

    @property
    def speaker(self) -> str:
        """Who answers next."""
        return self.name or "base"

    def use(self, name: str | None) -> None:
        """Switch adapters, and to the chat template that this one was trained with; the base goes on with the last."""
        self.name = name
        self.opened.use(name)
        self.format = self.formats.get(name, self.format)
        self.screen.note(f"{self.speaker} answers")
        if not self.format.chat:
            self.screen.note("without a chat template: every line is continued for itself, as plain text")

    def command(self, line: str) -> None:
        """Do what a line with a slash says.

        Raises:
            UserError: there is no such command or adapter.
        """
        command, _, name = (piece.strip() for piece in line.partition(" "))
        known: dict[str, Callable[[], None]] = {
            "/adapter": lambda: self.use(self._known(name)),
            "/base": lambda: self.use(None),
            "/adapters": self._list,
            "/clear": self.messages.clear,
            "/help": lambda: self.screen.note(HELP),
        }
        if command not in known:
            raise UserError(f"unknown command {command}", fix=parts.did_you_mean(command, [*known, "/quit"]))
        known[command]()

    def answer(self, text: str) -> None:
        """Show the answer while it is written; Ctrl-C keeps what is there.

        Raises:
            UserError: the conversation is longer than the model can read.
        """
        self.messages.append({"role": "user", "content": text})
        written: list[str] = []
        try:
            for piece in self._pieces(self._prompt(text)):
                written.append(piece)
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            self.screen.note(" (stopped)")
        except UserError:
            self.messages.pop()
            raise
        print(flush=True)
        self.messages.append({"role": "assistant", "content": "".join(written)})

    def _prompt(self, text: str) -> Ids:
        if not self.format.chat:
            return self.format.prompt_ids(text)
        return self.format.conversation_ids(self.messages)

    def _pieces(self, prompt: Ids) -> Iterator[str]:
        return generation.stream(
            self.opened.language.model,
            self.format.tokenizer,
            prompt,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=self.seed + len(self.messages),
        )

    def _known(self, name: str) -> str:
        if name in self.opened.adapters:
            return name
        fix = (
            parts.did_you_mean(name, self.opened.adapters) if self.opened.adapters else "this model has none"
        )
        raise UserError(f"no adapter is called '{name}'", fix=fix)

    def _list(self) -> None:
        for name in (None, *self.opened.adapters):
            self.screen.note(f"{'*' if name == self.name else ' '} {name or 'base'}")


def _formats(opened: Opened) -> dict[str | None, Format]:
    """For each adapter, or for a model without one, how questions become ids."""
    folders = {name: saved.folder for name, saved in opened.saved.items()}
    recipes: dict[str | None, Recipe | None] = {name: trained_with(each) for name, each in folders.items()}
    # A tokenizer each, since the chat template is part of it; a shallow copy shares everything else.
    return {
        name: prompt_format(data_of(recipe), copy.copy(opened.language.tokenizer))
        for name, recipe in (recipes or {None: None}).items()
    }


def _lines(speaker: Callable[[], str]) -> Iterator[str]:
    """What is typed, line by line, up to the end of the input or Ctrl-C; blank lines are passed over."""
    typed = sys.stdin.isatty() and sys.stdout.isatty()
    if typed:
        with suppress(ImportError):
            import readline  # noqa: F401 (gives `input` line editing and a history)
    while True:
        try:
            line = input(f"{speaker()}> " if typed else "").strip()
        except (EOFError, KeyboardInterrupt):
            if typed:
                print()
            return
        if line:
            yield line
