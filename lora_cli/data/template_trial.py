"""A chat template on a few short conversations, in a process of its own that may not take long or much.

    python -P template_trial.py < JSON of the template

A template is a program that came with a model. Jinja's sandbox keeps it from reaching files or Python, but not from
counting to 10^10 or writing a gigabyte. Ends with exit code 0 when the template stayed inside the limits, also where
it refused the conversations: rows will tell. Only Jinja is imported, so that this takes a tenth of a second.
"""

import json
import math
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 2
"""Of processor time, rounded up."""
MEMORY = 256 * 2**20
"""Bytes on top of what Python and Jinja take; Linux alone knows how much that is."""
LENGTH = 2**20
"""Characters of one text; the conversations have a hundred."""
TOO_LONG, TOO_LARGE = 3, 4
"""Exit codes: the text, and the memory. The system itself ends what takes too much time."""

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is two plus two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And plus three?"},
    {"role": "assistant", "content": "Seven."},
]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
    },
}


class Generation(Extension):
    """`{% generation %}` ... `{% endgeneration %}`, which marks and changes nothing."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own form)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The body alone."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def environment() -> ImmutableSandboxedEnvironment:
    """What transformers renders chat templates with."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = _json
    made.globals |= {"raise_exception": _refuse, "strftime_now": time.strftime}
    return made


def conversations() -> Iterator[dict[str, Any]]:
    """Variables of a template: with and without a system message, tools, and the start of an answer."""
    for first in (0, 1):
        for end in (2, 3, 5):
            for tools in (None, [TOOL]):
                yield {"messages": TALK[first:end], "tools": tools, "add_generation_prompt": end == 2}


def _json(value: Any, ensure_ascii: bool = False, **how: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **how)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _limit() -> None:
    seconds = math.ceil(time.process_time()) + SECONDS - 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    used = Path("/proc/self/statm")
    if used.exists():
        largest = int(used.read_text().split()[0]) * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (largest, largest))


def main() -> int:
    """Read the template; the exit code says how it went."""
    template = json.load(sys.stdin)
    _limit()
    for variables in conversations():
        try:
            text = environment().from_string(template).render(TOKENS | variables)
        except MemoryError:
            return TOO_LARGE
        except Exception:  # a refusal; the row that is refused in earnest will say why
            continue
        if len(text) > LENGTH:
            return TOO_LONG
    return 0


if __name__ == "__main__":
    sys.exit(main())
