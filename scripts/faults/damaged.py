"""A checkpoint that is not what was written; each try damages the newest one of a run that was killed half-way."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from scripts.faults.lab import OTHER, SAME, Finding, Lab, Outcome, tally
from scripts.faults.task import Task

NAMED = "finished with other weights, and named the file"
EXECUTED, NOT_EXECUTED = "ran the code", "ran no code"
OURS = (
    "adapter.safetensors",
    "optimizer.safetensors",
    "lifecycle.safetensors",
    "state.json",
    "MANIFEST.json",
)
THEIRS = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
"""The files of a checkpoint that are read when a run goes on; the peers' tokenizer, arguments and card are not."""
Damage = Callable[[Path], None]


def zeroed_tails(lab: Lab, system: str) -> Finding:
    """P3: the second half of a file is zeros, as after a power loss that comes before the data."""

    def zero(path: Path) -> None:
        content = path.read_bytes()
        half = len(content) // 2
        path.write_bytes(content[:half] + bytes(len(content) - half))

    return _each_file(lab, system, "P3", [zero])


def flipped_bits(lab: Lab, system: str) -> Finding:
    """P4: one bit of a file is another one."""
    rng = lab.rng("P4")

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)

    return _each_file(lab, system, "P4", [flip] * lab.draws(8, 100))


def lost_files(lab: Lab, system: str) -> Finding:
    """P5: a file is gone."""
    return _each_file(lab, system, "P5", [Path.unlink])


def _each_file(lab: Lab, system: str, about: str, damages: list[Damage]) -> Finding:
    task, happened, bad = lab.task(), [], set[str]()
    for name in OURS if system == "ours" else THEIRS:
        for damage in damages:
            newest = lab.half_done(system, task)
            damage(newest / name)
            judged = _judged(lab, system, task, lab.run(system, task, f"{about} {name}"), name)
            happened.append(judged)
            if judged == OTHER:
                bad.add(name)
    good = {each for each in happened if each == SAME or (each.startswith("ended") and "signal" not in each)}
    found = tally(about, system, happened, good)
    where = f" ({', '.join(sorted(bad))})" if bad else ""
    return Finding(about, system, found.tried, found.ok, found.said.replace(OTHER, OTHER + where))


def _files(lab: Lab, system: str, task: Task) -> list[str]:
    return sorted(path.name for path in lab.half_done(system, task).iterdir() if path.stat().st_size)


def _judged(lab: Lab, system: str, task: Task, outcome: Outcome, name: str) -> str:
    judged = lab.judged(system, task, outcome)
    return NAMED if judged == OTHER and name in outcome.said else judged


def hostile_files(lab: Lab, system: str) -> Finding:
    """P14: pickles that run code, in every way that torch has ever saved one, in place of each file that is read."""
    from tests import hostile

    happened = []
    canary = lab.folder / hostile.CANARY
    source = hostile.code(lab.folder)
    for number, (task, path, beside) in enumerate(_places(lab, system)):
        for way in hostile.WAYS:
            _put(lab, system, task, path, beside, way(source))
            canary.unlink(missing_ok=True)
            lab.run(system, task, f"P14 {number} {path.name} {way.__name__}")
            happened.append(f"{EXECUTED} in {path.name}" if canary.exists() else NOT_EXECUTED)
    return tally("P14", system, happened, {NOT_EXECUTED})


def _places(lab: Lab, system: str) -> Iterator[tuple[Task, Path, str]]:
    """A task, a file to replace, and the file that has to go so that it is read."""
    task = lab.task()
    newest = lab.half_done(system, task)
    for name in _files(lab, system, task):
        if not name.endswith((".json", ".md", ".jinja")) or system == "ours":
            yield task, newest / name, ""
    yield task, newest / "adapter_model.bin", "adapter_model.safetensors"
    yield task, newest / "pytorch_model.bin", ""
    other = lab.model.with_name("model-of-others")
    yield lab.task(model=str(other)), other / "pytorch_model.bin", "model.safetensors"


def _put(lab: Lab, system: str, task: Task, path: Path, beside: str, content: bytes) -> None:
    shutil.rmtree(lab.model.with_name("model-of-others"), ignore_errors=True)
    shutil.copytree(lab.model, lab.model.with_name("model-of-others"))
    if task.model == str(lab.model):
        lab.half_done(system, task)
    else:
        lab.clear(task)
    path.write_bytes(content)
    if beside:
        path.with_name(beside).unlink(missing_ok=True)
