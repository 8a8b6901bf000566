"""What every system is asked to train, and what is done to it meanwhile.

Standard library only: it is imported by the tool's own environment and by the peers'.
"""

import signal
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Task:
    """A few steps of LoRA on a tiny model."""

    model: str
    rows: str
    """JSON lines with `prompt` and `completion`."""
    out: str
    """Folder of the run."""
    steps: int = 8
    save_steps: int = 2
    batch_size: int = 4
    """Rows of an optimizer step."""
    at_once: int = 4
    """Rows computed at once; the batch is accumulated from them."""
    dropout: float = 0.1
    learning_rate: float = 1e-2
    max_length: int = 256
    targets: tuple[str, ...] = ()
    """Modules to adapt; empty: all linear layers but the head."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Keys of the section `train`, or of the peer's arguments."""
    configs: tuple[str, ...] = ()
    """Not trained at all: these configuration files are only read, one after the other."""


@dataclass(frozen=True)
class Fault:
    """What happens to the process of a task; by default nothing."""

    after: float | None = None
    """Seconds until it gets the signal."""
    signal: int = signal.SIGKILL
    once: str = ""
    """It is killed as soon as there is this file."""
    operation: int | None = None
    """It is killed just before this one of its operations on files, counted from 0."""
    pace: float = 0.0
    """Seconds that every forward pass takes longer, so that there is time for something to happen."""
    most_tokens: int | None = None
    """More than so many at once do not fit in memory ..."""
    from_forward: int = 0
    """... from this forward pass on."""
    beside: float | None = None
    """The same command is started once more, so many seconds later."""


R, ALPHA, SEED = 2, 4, 0
"""The adapter, and where all chance starts, of every system."""

BEST: dict[str, Any] = {
    "enable_jit_checkpoint": True,
    "logging_nan_inf_filter": False,
    "logging_steps": 1,
    "full_determinism": True,
    "restore_callback_states_from_checkpoint": True,
    "auto_find_batch_size": True,
}
"""What the documentation of the peers offers against faults."""
BEST_OF_TRL = {"bf16": False, "gradient_checkpointing": False}
"""As the task is stated: in float32, nothing recomputed."""
