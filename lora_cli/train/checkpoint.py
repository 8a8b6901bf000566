"""What is needed to go on exactly: adapter, optimizer, and a few numbers. Written whole, verified, rotated.

checkpoints/step-000100/adapter.safetensors, optimizer.safetensors, lifecycle.safetensors, state.json, MANIFEST.json
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from lora_cli import io_ops
from lora_cli.adapter.inject import tensors_of
from lora_cli.errors import ExitCode, UserError
from lora_cli.train import optim
from lora_cli.train.loop import Training, check_weights

MANIFEST = "MANIFEST.json"
ADAPTER, OPTIMIZER, LIFECYCLE = "adapter.safetensors", "optimizer.safetensors", "lifecycle.safetensors"
STATE = "state.json"
FILES = {ADAPTER, OPTIMIZER, LIFECYCLE, STATE}
NAME = re.compile(r"step-(\d+)")


def save(folder: Path, run: Training, progress: dict[str, Any]) -> Path:
    """Write `folder`/step-NNNNNN and return it. `progress` is what the caller has to remember (best loss ...).

    What stands there is left as it is when it is good, and replaced when it is damaged.

    Raises:
        UserError: a weight is not a finite number.
    """
    check_weights(run)
    target = folder / f"step-{run.step:06d}"
    if target.exists():
        if damage(target) is None:
            return target
        io_ops.remove(target)
    state = {
        "step": run.step,
        "scaler": run.scaler.state_dict(),
        "skipped": run.skipped,
        "max_tokens": run.max_tokens,
        "max_rows": run.max_rows,
        "connected": run.connected.tolist(),
        "codes": run.adapter.codes,
        "progress": progress,
    }
    with io_ops.new_folder(target) as made:
        _save_tensors(made / ADAPTER, tensors_of(run.adapter))
        _save_tensors(made / OPTIMIZER, optim.named_state(run.optimizer, run.adapter.trainable()))
        _save_tensors(made / LIFECYCLE, _lifecycle_state(run) | _absorbed(run))
        io_ops.write_json(made / STATE, state)
        io_ops.write_json(made / MANIFEST, {path.name: _described(path) for path in sorted(made.iterdir())})
    return target


def restore(folder: Path, run: Training) -> dict[str, Any]:
    """Put `run` in the state that was saved in `folder`; returns the caller's progress.

    Raises:
        UserError: the folder is damaged, or is that of another adapter.
    """
    problem = damage(folder)
    if problem:
        raise UserError(problem, where=str(folder), code=ExitCode.NO_CHECKPOINT)
    state = json.loads((folder / STATE).read_text())
    if state.get("codes") != run.adapter.codes:
        what = "was made on a base that is quantised to other codes than here"
        fix = "go on where it was begun, or start anew with --output"
        raise UserError(what, where=str(folder), fix=fix, code=ExitCode.NO_CHECKPOINT)
    _restore_lifecycle(run, load_file(folder / LIFECYCLE))  # first: it may have frozen tensors, or tied them
    tensors, named = load_file(folder / ADAPTER), run.adapter.named_tensors()
    if {name: t.shape for name, t in tensors.items()} != {name: t.shape for name, t in named.items()}:
        what = "holds the tensors of another adapter"
        raise UserError(what, where=str(folder), fix="start anew with --output", code=ExitCode.NO_CHECKPOINT)
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(tensors[name])
    optim.restore_state(run.optimizer, run.adapter.trainable(), load_file(folder / OPTIMIZER))
    _restore_absorbed(run, load_file(folder / LIFECYCLE))
    run.step, run.skipped = state["step"], state["skipped"]
    run.max_tokens, run.max_rows = state["max_tokens"], state["max_rows"]
    run.connected = torch.tensor(state["connected"])
    run.scaler.load_state_dict(state["scaler"])
    return state["progress"]


def _lifecycle_state(run: Training) -> dict[str, Tensor]:
    return {
        f"{index}|{key}": tensor
        for index, lifecycle in enumerate(run.lifecycles)
        for key, tensor in lifecycle.state().items()
    }


def _restore_lifecycle(run: Training, tensors: dict[str, Tensor]) -> None:
    for index, lifecycle in enumerate(run.lifecycles):
        mine = {key.partition("|")[2]: t for key, t in tensors.items() if key.startswith(f"{index}|")}
        lifecycle.restore(mine)


def _absorbed(run: Training) -> dict[str, Tensor]:
    """The factors of what W took in; `absorbed|<layer>` alone, an empty tensor, where they are not remembered."""
    found: dict[str, Tensor] = {}
    for layer, pairs in run.adapter.absorbed.items():
        if pairs is None:
            found[f"absorbed|{layer}"] = torch.zeros(0)
        for index, (B, A) in enumerate(pairs or ()):
            found |= {f"absorbed|{layer}|{index}|B": B, f"absorbed|{layer}|{index}|A": A}
    return found


def _restore_absorbed(run: Training, tensors: dict[str, Tensor]) -> None:
    for layer in run.adapter.absorbed:
        pairs = run.adapter.absorbed[layer] = None if f"absorbed|{layer}" in tensors else []
        device = run.adapter.layers[layer].base_layer.weight.device
        while pairs is not None and f"absorbed|{layer}|{len(pairs)}|B" in tensors:
            key = f"absorbed|{layer}|{len(pairs)}"
            pairs.append((tensors[f"{key}|B"].to(device), tensors[f"{key}|A"].to(device)))


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are what they were when written, and what is wrong with newer ones."""
    problems: list[str] = []
    for path in reversed(_all(folder)):
        problem = damage(path)
        if problem is None:
            return path, problems
        problems.append(f"{path}: {problem}")
    return None, problems


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None when every file has the size and sha256 of its manifest."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if not isinstance(manifest, dict) or manifest.keys() != FILES:
            return f"{MANIFEST} is not what was written"
    except (OSError, ValueError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    wrong = (_damage_of(folder / name, expected) for name, expected in manifest.items())
    return next((each for each in wrong if each), None) or _misnamed(folder)


def _damage_of(path: Path, expected: Any) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    try:
        return None if _described(path) == expected else f"{path.name} is not what {MANIFEST} says"
    except OSError as error:
        return f"{path.name} cannot be read ({error})"


def _misnamed(folder: Path) -> str | None:
    """A whole checkpoint under the name of another one would set the clock wrong."""
    step = json.loads((folder / STATE).read_text(encoding="utf-8"))["step"]
    return None if folder.name == f"step-{step:06d}" else f"{STATE} is that of step {step}"


def rotate(folder: Path, keep: int, best: str | None) -> None:
    """Remove all but the newest `keep` checkpoints and the best one, after the newest has been read back."""
    steps = _all(folder)
    if not steps or damage(steps[-1]):
        return
    for path in steps[:-keep]:
        if path.name != best:
            io_ops.remove(path)


def _all(folder: Path) -> list[Path]:
    """Oldest first, by number: as text, step-1000000 would come before step-999999."""
    named = [(NAME.fullmatch(path.name), path) for path in folder.glob("step-*")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in named if match)]


def _save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    io_ops.write_bytes(path, to_bytes({name: tensor.contiguous() for name, tensor in tensors.items()}))


def _described(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}
