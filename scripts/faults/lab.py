"""Where the tries are made: a tiny model and rows on disk, the systems, and what each makes of them undisturbed."""

import hashlib
import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from scripts.faults import hooks
from scripts.faults.server import ROOT, Server
from scripts.faults.task import Fault, Task

SYSTEMS = {
    "ours": "lora",
    "trainer": "Trainer + PEFT, defaults",
    "trainer-best": "Trainer + PEFT, best settings",
    "sft": "TRL SFTTrainer, defaults",
    "sft-best": "TRL SFTTrainer, best settings",
}
ENDED = "ended with "
SAME, OTHER = "finished with the same bytes", "finished with other weights, and said nothing"
ERROR = re.compile(r"^(?:\w+\.)*(\w*(?:Error|Exception|Exit|Interrupt|Warning))\b:? ?(.*)$", re.MULTILINE)

PATH = re.compile(r"\S*/\S*")


@dataclass(frozen=True)
class Outcome:
    """How a process ended."""

    code: int
    """Its exit code, or minus the signal that killed it."""
    seconds: float
    log: Path
    """All it said; beside it stand its forward passes and its operations on files."""

    @property
    def said(self) -> str:
        """On stdout and stderr."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    @property
    def reason(self) -> str:
        """Why it ended, in a few words."""
        if self.code <= 0:
            return f"signal {-self.code}" if self.code else "finished"
        found = [each for each in ERROR.findall(self.said) if each[0] != "ChildFailedError"]
        if not found:
            return f"exit {self.code}"
        name, text = found[-1]
        files = re.findall(r"['\"]([^'\"]*/[^'\"]*)['\"]", text)
        if files and name == "FileNotFoundError":
            return f"{name} ({Path(files[-1]).name})"
        return (
            f"{name} ({PATH.sub('…', text)[:40].strip()})" if name in ("ValueError", "RuntimeError") else name
        )


@dataclass(frozen=True)
class Finding:
    """What became of a system under a fault."""

    fault: str
    system: str
    tried: int
    ok: int
    """Of `tried`: did what the promise asks."""
    said: str
    """What happened, in a sentence."""


def tally(fault: str, system: str, happened: Iterable[str], good: Iterable[str]) -> Finding:
    """Count what happened; `good` is what the promise asks, and goes without saying when it is always the same."""
    counts, wanted = Counter(happened), set(good)
    ok = sum(count for what, count in counts.items() if what in wanted)
    return Finding(fault, system, counts.total(), ok, _sentence(counts))


def _sentence(counts: Counter[str]) -> str:
    """The most frequent first, and all that ended with errors together."""
    ended = {
        what.removeprefix(ENDED): count for what, count in counts.most_common() if what.startswith(ENDED)
    }
    parts = [f"{count} {what}" for what, count in counts.most_common() if not what.startswith(ENDED)]
    if ended:
        parts.append(f"{sum(ended.values())} {ENDED}{', '.join(ended)}")
    return "; ".join(parts)


@dataclass
class Lab:
    """Everything that a fault needs."""

    folder: Path
    """For the runs; emptied again and again."""
    logs: Path
    """Kept."""
    full: bool
    servers: dict[str, Server] = field(default_factory=dict)
    known: dict[str, tuple[str, Outcome]] = field(default_factory=dict)
    number: int = 0

    def __post_init__(self) -> None:
        """Make the model and the rows."""
        import transformers

        from tests import tiny

        transformers.utils.logging.disable_progress_bar()
        sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16}
        tiny.model("llama", 0, **sizes).save_pretrained(self.model)
        tiny.tokenizer().save_pretrained(self.model)
        rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(4) for b in range(3)]
        self.write_rows("rows", rows)

    @property
    def model(self) -> Path:
        """A folder."""
        return self.folder / "model"

    def write_rows(self, name: str, rows: Iterable[Any]) -> Path:
        """One a line."""
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def draws(self, small: int, large: int) -> int:
        """How often something is tried."""
        return large if self.full else small

    def task(self, **changes: Any) -> Task:
        """The usual one, in a folder that is not there yet; the same task always has the same folder."""
        out = self.folder / "run"
        task = replace(Task(str(self.model), str(self.folder / "rows.jsonl"), str(out)), **changes)
        self.clear(task)
        return task

    def clear(self, task: Task) -> None:
        """Nothing was run yet."""
        shutil.rmtree(task.out, ignore_errors=True)
        Path(task.out).with_suffix(".yaml").unlink(missing_ok=True)

    def run(self, system: str, task: Task, about: str, fault: Fault | None = None) -> Outcome:
        """One try of the command; `about` becomes the name of its log."""
        return self.run_all(system, task, about, fault)[0]

    def run_all(self, system: str, task: Task, about: str, fault: Fault | None = None) -> list[Outcome]:
        """All processes of a try."""
        self.number += 1
        log = self.logs / f"{about} {system} {self.number:05d}.log".replace(" ", "-")
        for old in self.logs.glob(f"{log.name}*"):
            old.unlink()
        answers = self.server(system).ask(system, task, fault or Fault(), log)
        logs = (log, Path(f"{log}.2"))
        return [
            Outcome(each["code"], each["seconds"], path) for each, path in zip(answers, logs, strict=False)
        ]

    def server(self, system: str) -> Server:
        """Ours, or the one of all peers; only one is kept, for the memory's sake."""
        kind = "ours" if system == "ours" else "peer"
        if kind not in self.servers:
            python = ROOT / (".venv" if kind == "ours" else ".bench-venv") / "bin" / "python"
            self.servers[kind] = Server(python, f"scripts.faults.{kind}", self.folder / "cache")
        return self.servers[kind]

    @contextmanager
    def open(self) -> Iterator["Lab"]:
        """End the servers at the end."""
        try:
            yield self
        finally:
            for server in self.servers.values():
                server.close()

    def undisturbed(self, system: str, task: Task) -> tuple[str, Outcome]:
        """Hash of the adapter that a task gives, and how the process went; run once for each task."""
        key = json.dumps([system, asdict(replace(task, out=""))])
        if key not in self.known:
            for _ in range(2):  # the second one says how long it takes: what can be kept is there
                self.clear(task)
                outcome = self.run(system, task, "undisturbed")
            found = digest(system, task)
            if found is None:
                raise SystemExit(f"{system} does not train undisturbed: see {outcome.log}")
            self.known[key] = (found, outcome)
            self.clear(task)
        return self.known[key]

    def judged(self, system: str, task: Task, outcome: Outcome) -> str:
        """SAME, OTHER, or why it did not finish."""
        if outcome.code:
            return f"{ENDED}{outcome.reason}"
        found = digest(system, task)
        if found is None:
            return "finished without an adapter"
        return SAME if found == self.undisturbed(system, task)[0] else OTHER

    def half_done(self, system: str, task: Task) -> Path:
        """A run that was killed after its second checkpoint, put where it can be damaged; its newest checkpoint."""
        stash = self.folder / f"half-{system}"
        newest = checkpoint(system, task, 2 * task.save_steps)
        if not stash.exists():
            self.undisturbed(system, task)
            self.clear(task)
            fault = Fault(once=str(newest / last_file(system)), pace=0.1)
            outcome = self.run(system, task, "half done", fault)
            if outcome.code != -9 or checkpoint(system, task, 3 * task.save_steps).exists():
                raise SystemExit(f"{system} was not killed in time: see {outcome.log}")
            shutil.copytree(task.out, stash / "run")
        self.clear(task)
        shutil.copytree(stash / "run", task.out)
        return newest

    def rng(self, fault: str) -> random.Random:
        """The same draws for each system."""
        return random.Random(f"{fault} 0")


def last_file(system: str) -> str:
    """The file of a checkpoint that is written last."""
    return "MANIFEST.json" if system == "ours" else "trainer_state.json"


def checkpoint(system: str, task: Task, step: int) -> Path:
    """Its folder."""
    name = f"checkpoints/step-{step:06d}" if system == "ours" else f"checkpoint-{step}"
    return Path(task.out) / name


def adapter(system: str, task: Task) -> Path:
    """The file with the trained weights."""
    return Path(task.out) / ("adapter" if system == "ours" else "final") / "adapter_model.safetensors"


def digest(system: str, task: Task) -> str | None:
    """Hash of the trained weights, if there are any."""
    path = adapter(system, task)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def forwards(outcome: Outcome) -> int:
    """Forward passes of a process."""
    return hooks.count(outcome.log, "forwards")
