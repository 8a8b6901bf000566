"""Tokenised examples on disk, read through memory maps: memory does not grow with the number of rows.

A folder holds raw little-endian arrays and an `index.json` that describes them:

    ids.bin       uint16 or uint32, all tokens one behind the other
    trained.bin   one bit a token, each example starting in a byte of its own
    offsets.bin   int64 (examples + 1, 2): where each example starts in ids, and in trained
    rows.bin      int32 (examples, 5): length, trained tokens, source, file, line
    rejected.jsonl  the examples that were left out or cut, and why
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lora_cli import io_ops
from lora_cli.data.example import Example
from lora_cli.data.format import Format
from lora_cli.data.row import Row, wrong
from lora_cli.errors import UserError

INDEX, IDS, TRAINED, OFFSETS, ROWS, REJECTED = (
    "index.json", "ids.bin", "trained.bin", "offsets.bin", "rows.bin", "rejected.jsonl"
)  # fmt: skip
LIBRARIES = ("jinja2", "tokenizers", "transformers")
"""What else decides which ids a row becomes."""
SHOWN = 5
"""Rows named in an error that is about many."""


@dataclass(slots=True)
class Counts:
    """What became of the rows."""

    rows: int = 0
    examples: int = 0
    """Kept."""
    dropped: int = 0
    """Longer than max_length, left out."""
    truncated: int = 0
    """Longer than max_length, cut."""
    untrained: int = 0
    """Without a token to learn, left out."""
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    """Tokens of the longest example, before cutting."""


class Examples:
    """A folder of tokenised examples. Reading one costs no memory."""

    def __init__(self, folder: Path, weights: tuple[float, ...] = (1.0,)) -> None:
        """Open a complete folder; `weights` say how often an epoch holds the examples of each source."""
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        self.folder = folder
        self.weights = weights
        self.counts = Counts(**index["counts"])
        self.max_id: int = index["max_id"]
        """Largest id of all, to be compared with the model's vocabulary."""
        self.longest: int = index["longest"]
        """Tokens of the longest example, as it is learned."""
        self.of_source = tuple(index["of_source"].get(str(source), 0) for source in range(len(weights)))
        """Examples of each source."""
        self._files: list[str] = index["files"]
        self._ids = np.memmap(folder / IDS, dtype=index["dtype"], mode="r")
        self._trained = np.memmap(folder / TRAINED, dtype=np.uint8, mode="r")
        self._offsets = np.memmap(folder / OFFSETS, dtype="<i8", mode="r").reshape(-1, 2)
        self._rows = np.memmap(folder / ROWS, dtype="<i4", mode="r").reshape(-1, 5)

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        """The example at `index`, which may be negative."""
        index = range(len(self))[index]
        start, bits = self._offsets[index]
        end, bits_end = self._offsets[index + 1]
        trained = np.unpackbits(self._trained[bits:bits_end], count=int(end - start))
        return Example(
            tuple(self._ids[start:end].tolist()), tuple(trained.astype(bool).tolist()), self.where(index)
        )

    def rejected(self, most: int) -> list[dict[str, str]]:
        """The first of the examples that were left out or cut: `where` and `reason`."""
        with (self.folder / REJECTED).open(encoding="utf-8") as file:
            return [json.loads(line) for line in islice(file, most)]

    def where(self, index: int) -> str:
        """`file:line` of the row that the example came from."""
        _, _, _, file, line = self._rows[index]
        return f"{self._files[file]}:{line}"

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int32 (examples,)."""
        return self._rows[:, 0]

    @property
    def trained_counts(self) -> np.ndarray:
        """Trained tokens of each example, int32 (examples,)."""
        return self._rows[:, 1]

    @property
    def sources(self) -> np.ndarray:
        """Index of the source of each example, int32 (examples,)."""
        return self._rows[:, 2]


def key(tokenizer: PreTrainedTokenizerBase, *described: Any) -> str:
    """Name of the folder for examples made in this way: changes with all that they depend on.

    Args:
        tokenizer: with the chat template that is used.
        described: JSON values: names and hashes of the files, the recipe's choices.
    """
    code = [path.read_bytes().hex() for path in sorted(Path(__file__).parent.glob("*.py"))]
    versions = [metadata.version(name) for name in LIBRARIES]
    content = json.dumps([versions, code, _state(tokenizer), described], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _state(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """Everything that a tokenizer does to a text, as JSON."""
    known = [type(tokenizer).__name__, repr(tokenizer.special_tokens_map), tokenizer.chat_template]
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        core = tokenizer.backend_tokenizer
        core.no_truncation()  # what a call before this one set up is no property of the tokenizer;
        core.no_padding()  # transformers sets both anew in every call
        return [*known, core.to_str()]
    return [*known, tokenizer.get_vocab(), repr(tokenizer.init_kwargs)]


def is_complete(folder: Path) -> bool:
    """Whether the folder holds all that its index names, in full size."""
    try:
        sizes = json.loads((folder / INDEX).read_text(encoding="utf-8"))["sizes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def build(
    rows: Iterable[tuple[int, Row]],
    form: Format,
    folder: Path,
    *,
    max_length: int,
    overflow: Literal["error", "drop", "truncate"],
) -> None:
    """Tokenise rows, given with the index of their source, into a new folder.

    Raises:
        UserError: a row is wrong, none is left, or, with `overflow: error`, some are too long or teach nothing.
    """
    with io_ops.new_folder(folder) as made, _Writer(made, _largest_id(form.tokenizer)) as writer:
        counts, rejected = writer.counts, _Rejected(writer.reject)
        for source, row in rows:
            counts.rows += 1
            for example in form.examples(row):
                fitted = _fit(example, max_length, overflow, counts, rejected)
                if fitted is not None:
                    writer.add(fitted, source)
        if overflow == "error" and rejected.first:
            raise rejected.error(counts, max_length)
        if counts.examples == 0:
            what = (
                f"no row is left to learn from: {counts.rows} read, {counts.dropped} longer than max_length"
            )
            raise wrong(
                f"{what}, {counts.untrained} without a token to learn",
                "data",
                "see data.max_length and format",
            )
        writer.finish()


def _fit(
    example: Example, max_length: int, overflow: str, counts: Counts, rejected: "_Rejected"
) -> Example | None:
    """The example, shortened or not, or None when it is left out."""
    length = len(example.input_ids)
    counts.longest = max(counts.longest, length)
    if length > max_length:
        if overflow == "truncate":
            counts.truncated += 1
            rejected.add(example.where, f"cut from {length} to {max_length} tokens")
            example = Example(example.input_ids[:max_length], example.trained[:max_length], example.where)
        else:
            counts.dropped += 1
            rejected.add(example.where, f"{length} tokens")
            return None
    if not any(example.trained):
        counts.untrained += 1
        rejected.add(example.where, "no token to learn")
        return None
    return example


@dataclass(slots=True)
class _Rejected:
    """Writes down every example that was left out or cut, and keeps the first for a message."""

    write: Callable[[str, str], None]
    first: list[str] = field(default_factory=list)

    def add(self, where: str, reason: str) -> None:
        self.write(where, reason)
        if len(self.first) < SHOWN:
            self.first.append(f"{where} ({reason})")

    def error(self, counts: Counts, max_length: int) -> UserError:
        found = []
        if counts.dropped:
            found.append(
                f"{counts.dropped} longer than max_length {max_length} (the longest has {counts.longest} tokens)"
            )
        if counts.untrained:
            found.append(f"{counts.untrained} without a token to learn")
        more = counts.dropped + counts.untrained - len(self.first)
        shown = ", ".join(self.first) + (f" and {more} more" if more else "")
        fix = f"data.max_length: {counts.longest}, or " if counts.dropped else "mend the rows, or "
        return wrong(
            f"examples that cannot be learned: {' and '.join(found)}: {shown}",
            "data",
            f"{fix}data.overflow: drop",
        )


class _Writer:
    """Appends examples to the files of a folder."""

    def __init__(self, folder: Path, largest_id: int) -> None:
        self.counts = Counts()
        self.folder = folder
        self.dtype = "<u2" if largest_id < 2**16 else "<u4"
        self.max_id = self.longest = self.tokens_at = self.bits_at = 0
        self.of_source: dict[int, int] = {}
        self.files: dict[str, int] = {}
        self.opened = ExitStack()

    def __enter__(self) -> "_Writer":
        names = (IDS, TRAINED, OFFSETS, ROWS, REJECTED)
        self.append = {
            name: self.opened.enter_context(io_ops.appending(self.folder / name)) for name in names
        }
        self._offset()
        return self

    def __exit__(self, *error: object) -> None:
        self.opened.close()

    def reject(self, where: str, reason: str) -> None:
        line = json.dumps({"where": where, "reason": reason}, ensure_ascii=False)
        self.append[REJECTED](f"{line}\n".encode())

    def add(self, example: Example, source: int) -> None:
        length, learned = len(example.input_ids), sum(example.trained)
        bits = np.packbits(np.array(example.trained, dtype=bool)).tobytes()
        name, _, line = example.where.rpartition(":")
        file = self.files.setdefault(name, len(self.files))
        self.append[IDS](np.array(example.input_ids, dtype=self.dtype).tobytes())
        self.append[TRAINED](bits)
        self.append[ROWS](np.array([length, learned, source, file, int(line)], dtype="<i4").tobytes())
        self.tokens_at += length
        self.bits_at += len(bits)
        self._offset()
        self.max_id = max(self.max_id, *example.input_ids)
        self.longest = max(self.longest, length)
        self.of_source[source] = self.of_source.get(source, 0) + 1
        self.counts.examples += 1
        self.counts.tokens += length
        self.counts.trained_tokens += learned

    def finish(self) -> None:
        """Close the files and write the index."""
        self.opened.close()
        index = {
            "counts": asdict(self.counts),
            "dtype": self.dtype,
            "max_id": self.max_id,
            "longest": self.longest,
            "of_source": self.of_source,
            "files": list(self.files),
            "sizes": {name: (self.folder / name).stat().st_size for name in self.append},
        }
        io_ops.write_json(self.folder / INDEX, index)

    def _offset(self) -> None:
        self.append[OFFSETS](np.array([self.tokens_at, self.bits_at], dtype="<i8").tobytes())


def _largest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return max(tokenizer.get_vocab().values())
