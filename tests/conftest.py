"""Shared by all tests: nothing reaches the network, and a tiny model with rows on disk."""

import json
import os
from pathlib import Path

import pytest

os.environ.update(
    HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1")
)

ROWS = [
    {"question": f"What is {a} plus {b}?", "answer": str(a + b)} for a in range(3, 12) for b in range(1, 9, 2)
]
"""36 rows of different lengths."""


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Llama and its tokenizer."""
    from tests import tiny

    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny.model("llama", bos_token_id=1).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """Questions and answers, one JSON object a line."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path
