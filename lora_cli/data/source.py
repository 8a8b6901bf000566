"""Files, folders and Hub ids -> rows, one at a time.

`.jsonl` (an object a line), `.json` (a list of objects, or objects line by line), `.csv` (the first line names the
columns) and `.txt` (a document per paragraph: the lines up to a blank one, kept as they are; its column is `text`)
have our own readers, `.parquet` goes through pyarrow, ids on the Hub through datasets, streamed. A folder stands for
the data files in it, in the order of their names.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from lora_cli import parts
from lora_cli.data.files import read_csv, read_json, read_jsonl, read_txt
from lora_cli.data.row import Row, reading, wrong
from lora_cli.data.tables import HUB_ID, SPLIT_NAMES, Hub, read_parquet
from lora_cli.recipe.schema import WeightedSource

READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".txt": read_txt,
    ".parquet": read_parquet,
}


def read_rows(sources: tuple[WeightedSource, ...], split: str) -> Iterator[tuple[int, Row]]:
    """All rows in order, each with the index of its source; `split` is `train` or `eval`, what the rows are for.

    Raises:
        UserError: something is missing, empty or broken; names file and line.
    """
    for index, source in enumerate(sources):
        for row in _rows(source, split):
            yield index, row


def fingerprint(sources: tuple[WeightedSource, ...], split: str) -> list[tuple[str, str]]:
    """Name and content hash of everything `read_rows` would read, in its order."""
    found: list[tuple[str, str]] = []
    for source in sources:
        files = _files(source, split)
        if files is None:
            found.append((source.path, Hub(source, split).fingerprint()))
        else:
            found.extend((str(path), _sha256(path)) for path in files)
    return found


def snapshot(sources: tuple[WeightedSource, ...], split: str) -> list[tuple[str, int, int]]:
    """Name, size and time of change of every local file: tells cheaply whether one changed while it was read."""
    paths = [path for source in sources for path in _files(source, split) or ()]
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


def _rows(source: WeightedSource, split: str) -> Iterator[Row]:
    files = _files(source, split)
    if files is None:
        yield from _not_empty(Hub(source, split).rows(), source.path)
        return
    for path in files:
        yield from _not_empty(READERS[path.suffix.lower()](path), str(path))


def _not_empty(rows: Iterable[Row], name: str) -> Iterator[Row]:
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise wrong(
            "holds no rows", name, "an empty file is most likely a mistake; take it out of the recipe"
        )


# Which files


def _files(source: WeightedSource, split: str) -> list[Path] | None:
    """The local files of a source, or None for an id on the Hub."""
    path = Path(source.path).expanduser()
    if not path.exists():
        if _may_be_on_hub(source.path):
            return None
        near = parts.nearest(path.name, _names(path.parent))
        fix = f"did you mean '{path.with_name(near[0])}'?" if near else ""
        raise wrong("no such file or folder", source.path, fix)
    if source.split is not None:
        raise wrong(
            "'split' is for ids on the Hub", source.path, "leave it out, or name the file of that split"
        )
    if path.is_dir():
        return _in_folder(path, split)
    if not path.is_file():
        raise wrong("is neither a file nor a folder", source.path)
    if path.suffix.lower() not in READERS:
        raise wrong(f"unknown kind of file '{path.suffix}'", source.path, f"known: {', '.join(READERS)}")
    return [path]


def _may_be_on_hub(name: str) -> bool:
    """`owner/name` is a file's name as well: what lies in a folder that exists, or ends like a file, is a file."""
    match = HUB_ID.fullmatch(name)
    if match is None or Path(name).suffix.lower() in READERS or name.startswith("."):
        return False
    parent = Path(name).parent
    return parent == Path() or not parent.exists()


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def _in_folder(folder: Path, split: str) -> list[Path]:
    """The data files below a folder; files of two splits side by side would mix what must stay apart."""
    found = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in READERS and path.is_file()]
    found = [path for path in found if not _is_hidden(path.relative_to(folder))]
    if not found:
        raise wrong("no data files in this folder", str(folder), f"known: {', '.join(READERS)}")
    other = {word for kind, words in SPLIT_NAMES.items() if kind != split for word in words}
    for path in found:
        for word in re.split(r"[^a-z]+", str(path.relative_to(folder)).lower()):
            if word in other and len(found) > 1:
                what = f"{path.name} looks like another split than '{split}'"
                raise wrong(what, str(folder), "name the files to use")
    return found


def _is_hidden(path: Path) -> bool:
    return any(name.startswith(".") for name in path.parts)


def _sha256(path: Path) -> str:
    with reading(path):
        stat = path.stat()
        return _sha256_of(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=1024)
def _sha256_of(path: Path, size: int, changed: int) -> str:
    """Several ask for the hash of one large file; one of another size or time is another file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
