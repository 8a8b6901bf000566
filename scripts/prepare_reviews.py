"""Turn the movie reviews inside the source package of vaderSentiment into train.jsonl and test.jsonl.

    python scripts/prepare_reviews.py downloads/vaderSentiment-3.3.2.tar.gz data/reviews

10,605 snippets, each rated by about 20 people from -4 to 4 (Hutto and Gilbert, ICWSM 2014; MIT licence). A row is
{"text": ..., "label": "positive" or "negative"}, the label the sign of the mean rating; snippets with mean 0 are
left out. The same text, whatever its case, spaces and punctuation, is never in both files.
"""

import argparse
import hashlib
import html
import json
import re
import sys
import tarfile
import zlib
from io import BytesIO
from pathlib import Path

from lora_cli import io_ops
from lora_cli.errors import ExitCode, UserError

INNER_ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
MAX_BYTES = 64 * 2**20
"""Far above the real files; stops an archive that unpacks without end."""
NUM_TEST = 1000
SEED = 0

Row = dict[str, str]


def main() -> int:
    """Read the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sdist", type=Path, help="source package of vaderSentiment (.tar.gz)")
    parser.add_argument("target", type=Path, help="folder to make; must not exist")
    options = parser.parse_args()
    try:
        num_train, num_test = prepare(options.sdist, options.target)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.code
    print(f"{options.target}: {num_train} rows to train on, {num_test} held out")
    return 0


def prepare(sdist: Path, target: Path, num_test: int = NUM_TEST, seed: int = SEED) -> tuple[int, int]:
    """Write `target`/train.jsonl and test.jsonl, both or none; return their numbers of rows.

    Raises:
        UserError: the package is not what it should be, or `target` exists.
    """
    try:
        ratings = read_member(read_member(sdist.read_bytes(), INNER_ARCHIVE), RATINGS).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError, tarfile.TarError, zlib.error) as error:
        raise UserError(
            f"cannot be read ({error})", where=str(sdist), fix="download it again", code=ExitCode.DATA
        ) from error
    train, test = split(read_rows(ratings), num_test, seed)
    io_ops.remove_leftovers(target.parent)
    with io_ops.new_folder(target) as folder:
        for name, rows in (("train", train), ("test", test)):
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            io_ops.write_text(folder / f"{name}.jsonl", "".join(lines))
    return len(train), len(test)


def read_member(archive: bytes, ending: str) -> bytes:
    """The content of the file whose name ends like this. Nothing is unpacked to disk, no link is followed."""
    with tarfile.open(fileobj=BytesIO(archive), mode="r:gz") as tar:
        for member in tar:
            named = f"/{member.name}".endswith(f"/{ending}")
            content = tar.extractfile(member) if named and member.isreg() else None
            if content is None:
                continue
            if member.size > MAX_BYTES:
                raise UserError("larger than it can be", where=member.name, code=ExitCode.DATA)
            return content.read()
    raise UserError("no such file in the package", where=ending, code=ExitCode.DATA)


def read_rows(ratings: str) -> list[Row]:
    """Rows from lines of `id <tab> mean rating <tab> text`; the first of several equal texts counts."""
    rows: dict[str, Row] = {}
    for number, line in enumerate(ratings.splitlines(), start=1):
        try:
            _, rating, text = line.split("\t")
            mean = float(rating)
        except ValueError:
            raise UserError(
                "expected id, mean rating and text with tabs between them",
                where=f"{RATINGS}:{number}",
                code=ExitCode.DATA,
            ) from None
        if mean == 0:
            continue
        text = html.unescape(text).strip()
        rows.setdefault(normalised(text), {"text": text, "label": "positive" if mean > 0 else "negative"})
    return list(rows.values())


def normalised(text: str) -> str:
    """What two spellings of one text have in common: letters and digits."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def split(rows: list[Row], num_test: int, seed: int) -> tuple[list[Row], list[Row]]:
    """(train, test) in an order given by a hash of seed and text, the same on every machine."""

    def order(row: Row) -> bytes:
        return hashlib.sha256(f"{seed}:{normalised(row['text'])}".encode()).digest()

    shuffled = sorted(rows, key=order)
    return shuffled[num_test:], shuffled[:num_test]


if __name__ == "__main__":
    sys.exit(main())
