"""Write a tiny random model with a byte-level tokenizer and a chat template, to try things in seconds.

python scripts/make_tiny.py models/tiny
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' tiny models, which are not installed

from lora_cli import io_ops
from lora_cli.errors import UserError
from tests import tiny


def main() -> int:
    """Read the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("target", type=Path, help="folder to make; must not exist")
    target = parser.parse_args().target
    try:
        make(target)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.code
    return 0


def make(target: Path) -> None:
    """Save two blocks of Llama, 64 wide, and the tokenizer.

    Raises:
        UserError: `target` exists.
    """
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "max_position_embeddings": 1024}
    with io_ops.new_folder(target) as folder:
        tiny.model("llama", **sizes).save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
