"""fixed: every layer keeps the r that the recipe gives it. arXiv:2106.09685

Nothing to tune; `rank_pattern` gives some layers another r from the start.
"""

from lora_cli.adapter.lifecycle import Lifecycle

make = Lifecycle
