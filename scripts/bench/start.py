"""Write the adapter that every system starts from, in PEFT's format.  usage: start.py MODEL FOLDER"""

import sys
from pathlib import Path

from ours import recipe_of
from system import SEED

from lora_cli import io_ops
from lora_cli import model as models
from lora_cli.adapter import files
from lora_cli.adapter.inject import inject
from lora_cli.run import prepare


def main(model: str, folder: str) -> None:
    """Make it as a run makes it: the tool's default start."""
    recipe = recipe_of(model, 1, 1)
    language = models.load(recipe.model)
    adapter = inject(language.model, prepare.plan_for(recipe, language), SEED)
    with io_ops.new_folder(Path(folder)) as made:
        files.save(made, adapter, model, None)


if __name__ == "__main__":
    main(*sys.argv[1:])
