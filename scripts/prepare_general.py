"""Write general English text that every machine has: paragraphs of Python's own reference, for measuring forgetting.

    python scripts/prepare_general.py data/general.jsonl

A row is {"text": ...}, prose of 60 to 160 words, without code. The text comes with Python (pydoc_data), so it differs
a little from version to version: compare methods on one machine.
"""

import argparse
import json
import random
import sys
from pathlib import Path
from pydoc_data import topics

from lora_cli import io_ops

ROWS, SEED = 64, 0


def main() -> int:
    """Read the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("target", type=Path, help="file to write")
    target = parser.parse_args().target
    rows = paragraphs()
    io_ops.make_folder(target.parent)
    io_ops.write_text(target, "".join(json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows))
    print(f"{target}: {len(rows)} paragraphs")
    return 0


def paragraphs() -> list[str]:
    """`ROWS` of them, drawn by lot."""
    known = [" ".join(each.split()) for text in topics.topics.values() for each in text.split("\n\n")]
    prose = [each for each in dict.fromkeys(known) if 60 <= len(each.split()) <= 160 and not _is_code(each)]
    return random.Random(SEED).sample(prose, min(ROWS, len(prose)))


def _is_code(text: str) -> bool:
    return "::" in text or ">>>" in text


if __name__ == "__main__":
    sys.exit(main())
