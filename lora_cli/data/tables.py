"""parquet files and datasets on the Hub -> rows. Rows are counted from 1."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_cli.data.row import Row, reading, wrong
from lora_cli.errors import UserError
from lora_cli.recipe.schema import WeightedSource

HUB_ID = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[\w.-]+))?", re.ASCII)
SPLIT_NAMES = {"train": ("train",), "eval": ("validation", "valid", "val", "dev", "eval", "test")}
"""Splits on the Hub that can stand for ours, best first."""


def read_parquet(path: Path) -> Iterator[Row]:
    """The rows of a local table."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with reading(path), ParquetFile(path) as table:
            names = table.schema_arrow.names
            if len(set(names)) < len(names):
                raise wrong(f"the column '{max(names, key=names.count)}' is there twice", str(path))
            first = 1
            for batch in table.iter_batches(batch_size=1024):
                for number, values in enumerate(_values(batch, path, first), first):
                    yield Row(_clean(values), f"{path}:{number}")
                first += batch.num_rows
    except (ArrowException, UnicodeDecodeError) as error:  # the second: names of columns
        raise wrong(f"not a readable parquet file: {error}", str(path)) from error


def _values(batch: Any, path: Path, first: int) -> list[dict[str, Any]]:
    """Rows as Python values; what has none, such as a text that is not UTF-8, is named by its row."""
    try:
        return batch.to_pylist()
    except (ValueError, ArithmeticError):
        for row in range(batch.num_rows):
            try:
                batch.slice(row, 1).to_pylist()
            except (ValueError, ArithmeticError) as error:
                raise wrong(f"the row cannot be read: {error}", f"{path}:{first + row}") from error
        raise


class Hub:
    """A dataset on the Hub, `owner/name` or `owner/name:config`, read row by row without storing it."""

    def __init__(self, source: WeightedSource, split: str) -> None:
        match = HUB_ID.fullmatch(source.path)
        self.path, self.split = source.path, source.split
        self.name, self.config = (match["name"], match["config"]) if match else (source.path, None)
        self.split_names = SPLIT_NAMES[split]

    def fingerprint(self) -> str:
        """What identifies the published version: its commit and files, not their bytes."""
        from datasets import load_dataset_builder

        with self._reading():
            builder = load_dataset_builder(self.name, self.config)
            return f"{builder.config_id} {builder.hash} {self._split()}"

    def rows(self) -> Iterator[Row]:
        from datasets import load_dataset

        with self._reading():
            table = load_dataset(self.name, self.config, split=self._split(), streaming=True)
            for number, values in enumerate(table, 1):
                yield Row(_clean(values), f"{self.path}:{number}")

    def _split(self) -> str:
        from datasets import get_dataset_split_names

        known = get_dataset_split_names(self.name, self.config)
        wanted = self.split_names if self.split is None else (self.split,)
        found = [name for name in wanted if name in known]
        if not found:
            fix = f"set split to one of: {', '.join(known)}"
            raise wrong(f"no split named {' or '.join(wanted)}", self.path, fix)
        return found[0]

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # the network and every file format can fail here, each in its own way
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise wrong(
                f"no such file or folder, and not readable from the Hub: {reason}",
                self.path,
                "check the name; a gated dataset needs `hf auth login`",
            ) from error


def _clean(values: dict[str, Any]) -> dict[str, Any]:
    """Columns as plain Python. Tables fill in what other rows have: missing keys inside a column come as None."""
    return {name: _without_none(value) for name, value in values.items()}


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value
