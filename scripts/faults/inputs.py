"""Rows and configurations that are wrong."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.faults import ours
from scripts.faults.lab import Finding, Lab, Outcome, tally

NAMED = "refused, place named"
KEYS = {
    "learning_rate": "learning_rat", "max_steps": "max_setps", "save_steps": "save_step", "seed": "sed",
}  # fmt: skip
"""Keys that all systems have, and what somebody typed."""
TARGETS = {"q_proj": "q_porj", "v_proj": "v_prj", "lm_head": "lm_heda"}
LINES, BROKEN = 100_000, 70_000
MISSPELT, READ, REFUSED = "misspelt key passed over", "read", "refused in words"
RIGHT = '{"prompt": "1+1=", "completion": "2"}\n'
CHUNK = 250
"""Configurations that one process reads."""


def long_prompts(lab: Lab, system: str) -> Finding:
    """P9: rows whose prompt alone is longer than max_length teach nothing; they are named by their line."""
    happened = []
    for at in range(lab.draws(3, 12)):
        rows = [{"prompt": f"{a}+{a}=" * (60 if a == at else 1), "completion": str(2 * a)} for a in range(12)]
        task = lab.task(rows=str(lab.write_rows("long", rows)), max_length=128)
        outcome = lab.run(system, task, f"P9 line {at + 1}")
        if outcome.code:
            happened.append(NAMED if _names(outcome, at + 1) else f"ended with {outcome.reason}")
        else:
            happened.append(
                "trained without it, line named" if _names(outcome, at + 1) else "trained, no line named"
            )
    return tally("P9", system, happened, {NAMED, "trained without it, line named"})


def _names(outcome: Outcome, line: int) -> bool:
    return bool(re.search(rf"(?:\.jsonl:|\bline |\brow ){line}\b", outcome.said))


def misspelt_names(lab: Lab, system: str) -> Finding:
    """P10: a module that does not exist beside one that does, and a misspelt key."""
    happened = []
    for right, wrong in TARGETS.items():
        task = lab.task(targets=("k_proj", wrong))
        happened.append("target " + _told(lab.run(system, task, f"P10 {wrong}"), wrong, right))
    for right, wrong in KEYS.items():
        task = lab.task(extra={wrong: 3})
        happened.append("key " + _told(lab.run(system, task, f"P10 {wrong}"), wrong, right))
    good = {each for each in happened if each.split(" ", 1)[1].startswith("refused")}
    return tally("P10", system, happened, good)


def _told(outcome: Outcome, wrong: str, right: str) -> str:
    if not outcome.code:
        return "passed over"
    message = outcome.said.rpartition("Traceback")[2]
    if wrong not in message:
        return f"not named ({outcome.reason})"
    return "refused with the right name" if re.search(rf"\b{right}\b", message) else "refused"


def configs(lab: Lab, system: str) -> Finding:
    """P11: configuration files with a mistake, or with bytes that are others; no traceback, no key passed over."""
    rng, folder = lab.rng("P11"), lab.folder / "configs"
    folder.mkdir(exist_ok=True)
    base = _config(lab, system)
    count = lab.draws(500, 20_000)
    drawn = [_mistaken(rng, base) for _ in range(count)]
    paths = [folder / f"{number}.yaml" for number in range(count)]
    for path, (_, content) in zip(paths, drawn, strict=True):
        path.write_bytes(content)
    ended: list[tuple[str, str]] = []
    for first in range(0, count, CHUNK):
        task = lab.task(configs=tuple(str(path) for path in paths[first : first + CHUNK]))
        said = lab.run(system, task, f"P11 from {first}").said
        ended += [tuple(json.loads(line)) for line in said.splitlines() if line.startswith('["')]
    if len(ended) != count:
        raise SystemExit(f"{system} read {len(ended)} of {count} configurations")
    happened = [_read(how, kind) for (how, _), (kind, _) in zip(ended, drawn, strict=True)]
    lines = sum(bool(re.search(r"\.yaml:\d+|\bline \d+", said)) for how, said in ended if how != "read")
    found = tally("P11", system, happened, {READ, REFUSED})
    errors = sum(how != "read" for how, _ in ended)
    return Finding(
        "P11", system, found.tried, found.ok, f"{found.said}; {lines} of {errors} errors with a line"
    )


def _read(how: str, kind: str) -> str:
    if how == "read":
        return MISSPELT if kind == "misspelt" else READ
    return REFUSED if how == "refused" else "traceback"


def _config(lab: Lab, system: str) -> str:
    """What a user of the system would write for the usual task."""
    task = lab.task()
    if system == "ours":
        return _yaml(ours.recipe_of(task))
    known: dict[str, Any] = {
        "output_dir": task.out,
        "max_steps": task.steps,
        "save_steps": task.save_steps,
        "per_device_train_batch_size": task.batch_size,
        "learning_rate": task.learning_rate,
        "lr_scheduler_type": "linear",
        "seed": 0,
        "use_cpu": True,
        "report_to": "none",
    }
    if system.startswith("sft"):
        known |= {"model_name_or_path": task.model, "dataset_name": task.rows, "max_length": 256}
        known |= {"use_peft": True, "lora_r": 2, "lora_alpha": 4, "lora_dropout": 0.1}
    return _yaml(known)


def _yaml(values: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(values, sort_keys=False)


def _mistaken(rng: random.Random, base: str) -> tuple[str, bytes]:
    kind = rng.choice([*MISTAKES])
    return kind, MISTAKES[kind](rng, base)


def _misspelt(rng: random.Random, base: str) -> bytes:
    """A letter of a key is lost, or stands twice, or has changed places with the next one."""
    lines, keys = base.splitlines(), base.count(":")
    long = [number for number, line in enumerate(lines) if len(line.partition(":")[0].strip()) > 2]
    while True:
        number = rng.choice(long)
        key = lines[number].partition(":")[0]
        at = rng.randrange(len(key) - len(key.lstrip()), len(key) - 1)
        wrong = rng.choice(
            [
                key[:at] + key[at + 1 :],
                key[:at] + key[at] + key[at:],
                key[:at] + key[at + 1] + key[at] + key[at + 2 :],
            ]
        )
        changed = [*lines[:number], lines[number].replace(key, wrong, 1), *lines[number + 1 :]]
        if wrong != key and keys == "\n".join(changed).count(":"):
            return "\n".join(changed).encode()


def _other_value(rng: random.Random, base: str) -> bytes:
    """A value of another type."""
    lines = base.splitlines()
    number = rng.choice([at for at, line in enumerate(lines) if line.partition(": ")[2]])
    values = ("[]", "{}", "null", "-1", "1e400", "two", "[1, 2]", "{a: b}", ".nan", "''")
    lines[number] = f"{lines[number].partition(':')[0]}: {rng.choice(values)}"
    return "\n".join(lines).encode()


def _other_bytes(rng: random.Random, base: str) -> bytes:
    """A few bytes are lost, others, or more."""
    content = bytearray(base.encode())
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(content))
        content[at : at + rng.randint(0, 2)] = rng.randbytes(rng.randint(0, 2))
    return bytes(content)


def _cut(rng: random.Random, base: str) -> bytes:
    """The end is missing."""
    return base.encode()[: rng.randrange(1, len(base))]


def _moved(rng: random.Random, base: str) -> bytes:
    """A line is somewhere else, or indented by mistake."""
    lines = base.splitlines()
    line = lines.pop(rng.randrange(len(lines)))
    lines.insert(rng.randrange(len(lines) + 1), " " * rng.randint(0, 3) + line)
    return "\n".join(lines).encode()


MISTAKES: dict[str, Callable[[random.Random, str], bytes]] = {
    "misspelt": _misspelt,
    "another value": _other_value,
    "other bytes": _other_bytes,
    "cut": _cut,
    "moved": _moved,
}


def broken_line(lab: Lab, system: str) -> Finding:
    """P15: one line of a large file is wrong; it is named."""
    wrong = {
        "no brace": '{"prompt": "1+1=", "completion": "2"\n',
        "a list": '{"prompt": "1+1=", "completion": ["2"]}\n',
        "no completion": '{"prompt": "1+1="}\n',
    }
    happened = []
    for what, line in wrong.items():
        task = lab.task(rows=str(_large(lab.folder, line)))
        outcome = lab.run(system, task, f"P15 {what}")
        refused = NAMED if _names(outcome, BROKEN) else f"ended with {outcome.reason}"
        happened.append(refused if outcome.code else "trained, no line named")
    found = tally("P15", system, happened, {NAMED})
    right = lab.run(system, lab.task(rows=str(_large(lab.folder, RIGHT))), "P15 right")
    more = _growth(right) - _growth(lab.undisturbed(system, lab.task())[1])
    said = f"{found.said}; {LINES:,} right rows take {more / 2**20:.0f} MiB more than 12"
    return Finding("P15", system, found.tried, found.ok, said)


def _large(folder: Path, line: str) -> Path:
    rows = [json.dumps({"prompt": f"{a}+{a}=", "completion": str(2 * a)}) + "\n" for a in range(LINES)]
    rows[BROKEN - 1] = line
    path = folder / "large.jsonl"
    path.write_text("".join(rows))
    return path


def _growth(outcome: Outcome) -> int:
    """Bytes from the start of the process to its largest memory."""
    before, after = Path(f"{outcome.log}.memory").read_text(encoding="utf-8").split()
    return int(after) - int(before)
