"""Nothing that was saved is lost: kills, power loss, damage, a full disk, signals, two runs in one folder.

LORA_LONG=1 raises every count from what a change is tested with to what a release is tested with.
"""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from matplotlib.backends.backend_agg import FigureCanvasAgg

from lora_cli import cli
from lora_cli import model as models
from lora_cli.errors import ExitCode, UserError
from lora_cli.evaluate.loss import HeldOutLoss
from lora_cli.recipe.schema import Recipe
from lora_cli.run import prepare, save
from lora_cli.run.folder import RunFolder
from lora_cli.run.train import Story, train
from lora_cli.screen import Screen
from lora_cli.train import checkpoint, loop
from tests import tiny, training
from tests.bench import LONG, SMALL, Bench, contents, good, leftovers, often, result, resumed, root_of
from tests.disk import Disk, Operation, Tree, failing, full_disk
from tests.forking import ROOT, Forker, forker


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("durability")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_CACHE", str(folder / "cache"))
        patch.setattr(
            FigureCanvasAgg, "print_png", lambda own, file: file.write(b"\x89PNG")
        )  # drawing is slow
        yield Bench(folder)


@pytest.fixture
def stop_handlers() -> Iterator[None]:
    """What a command sets for the process, put back; it may be ignoring Ctrl-C, as all in the background of a shell."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# ---- G1, G2: kills and power loss -----------------------------------------------------------------------------------


class Recorded:
    """An undisturbed run with every operation on its files, and when which checkpoint was promised."""

    def __init__(self, bench: Bench) -> None:
        """Run it."""
        self.recipe = bench.recipe()
        self.root = root_of(self.recipe)
        self.root.mkdir()
        self.disk = Disk(self.root)
        self.promised: list[tuple[int, str]] = []
        """Operations done when a checkpoint was there, and its name."""
        self.manifests: dict[str, bytes] = {}
        real = checkpoint.save

        def noted(folder: Path, *others: Any) -> Path:
            made = real(folder, *others)
            self.promised.append((len(self.disk.log), made.name))
            self.manifests[made.name] = (made / checkpoint.MANIFEST).read_bytes()
            return made

        with self.disk.watched(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint, "save", noted)
            train(self.recipe, Screen())

    def promised_at(self, number: int) -> int:
        """Step of the newest checkpoint that was there after so many operations; 0 when there was none."""
        return max((int(name[5:]) for done, name in self.promised if done <= number), default=0)


@pytest.fixture(scope="module")
def recorded(bench: Bench) -> Recorded:
    return Recorded(bench)


def test_the_record_of_a_run_gives_its_files(recorded, tmp_path):
    tree = Tree(recorded.root)
    for operation in recorded.disk.log:
        tree.do(operation)
    tree.write(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(recorded.root)
    assert len(recorded.promised) >= 4


def test_a_kill_at_any_operation_is_resumed_to_the_same_bytes(bench, recorded):
    """A kill leaves what was done up to then, and half of a write. Many differ in leftovers only, which the next
    start removes: that is seen for each of them, and one of those that are then alike is resumed (LORA_LONG: each).
    """
    starts: set[str] = set()
    log = recorded.disk.log
    for number in range(len(log) + 1):
        for under_way in (None, *(each for each in log[number : number + 1] if each.kind == "write")):
            again = bench.recipe()
            killed_at(recorded, number, under_way).write(root_of(again))
            with RunFolder(root_of(again)).held():
                assert not leftovers(root_of(again))
            start = kept(root_of(again))
            if start not in starts or LONG:
                assert resumed(again) == bench.expected, f"killed before {log[number : number + 1]}"
            starts.add(start)
            shutil.rmtree(root_of(again))
    assert len(log) > 200
    assert len(starts) > 20


def killed_at(recorded: Recorded, number: int, under_way: Operation | None) -> Tree:
    """The disk after so many operations, and half of the write that was under way."""
    tree = Tree(recorded.root)
    for operation in recorded.disk.log[:number]:
        tree.do(operation)
    if under_way is not None:
        tree.do(replace(under_way, content=under_way.content[: len(under_way.content) // 2]))
    return tree


def kept(root: Path) -> str:
    """One text for all that a run finds when it starts."""
    found = {name: content for name, content in contents(root).items() if name != ".lock"}
    return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()


def test_a_power_loss_at_any_operation_costs_no_promised_checkpoint(bench, recorded, tmp_path):
    chance = random.Random(random.getrandbits(48))
    moments = sorted(chance.choices(range(len(recorded.disk.log) + 1), k=often(1000, 10000)))
    whole = set(chance.sample(range(len(moments)), often(8, 200)))
    tree, done = Tree(recorded.root), 0
    for state, number in enumerate(moments):
        for operation in recorded.disk.log[done:number]:
            tree.do(operation)
        done = number
        again = bench.recipe()
        tree.write_crashed(root_of(again), chance)
        check_recovery(recorded, root_of(again), number)
        if state in whole:
            assert resumed(again) == bench.expected, f"crashed before operation {number}"
        shutil.rmtree(root_of(again))


def check_recovery(recorded: Recorded, root: Path, number: int) -> None:
    """What is there under a final name is whole; at least what was promised is there, with its log."""
    found, problems = checkpoint.newest(root / "checkpoints")
    step = int(found.name[5:]) if found else 0
    assert not problems
    assert step >= recorded.promised_at(number)
    if found:
        assert (found / checkpoint.MANIFEST).read_bytes() == recorded.manifests[found.name]
    logged = {line["step"] for line in RunFolder(root).lines()}
    assert logged >= set(range(1, step + 1))
    if (root / "adapter").exists() or number == len(recorded.disk.log):
        assert contents(root / "adapter") == contents(recorded.root / "adapter")


@pytest.fixture(scope="module")
def processes() -> Iterator[Forker]:
    with forker() as started:
        yield started


def test_processes_killed_at_random_instants_go_on_to_the_same_bytes(bench, processes):
    whole = bench.recipe()
    alone = processes.run(["train", str(bench.file(whole))])
    assert (alone["code"], result(whole)) == (0, bench.expected), alone["said"]
    kills, wanted = 0, often(40, 400)
    while kills < wanted:
        asked = bench.recipe()
        command = ["train", str(bench.file(asked)), "--resume"]
        lives = random.randint(1, 5)
        for _ in range(lives):
            ended = processes.run(command, after=random.uniform(0, alone["seconds"]))
            assert ended["code"] in (0, -signal.SIGKILL), ended["said"]
            kills += ended["code"] == -signal.SIGKILL
        ended = processes.run(command)
        assert ended["code"] == 0, ended["said"]
        assert result(asked) == bench.expected
        assert not leftovers(root_of(asked))


def test_a_run_killed_after_early_stopping_goes_on_to_the_same_bytes(bench, monkeypatch):
    stopping = {"eval_steps": 1, "early_stopping_patience": 2, "save_steps": 1}
    whole, parts = bench.recipe(train=stopping), bench.recipe(train=stopping)
    losses = [3.0, 2.0, 2.1, 2.2, 1.0, 0.9]
    monkeypatch.setattr(
        Story, "held_out_loss", lambda story, stop: HeldOutLoss(losses[story.run.step - 1], 1, ())
    )
    train(whole, Screen())
    assert max(line["step"] for line in RunFolder(root_of(whole)).lines()) == 4

    def killed(story: Story) -> Path:
        raise SystemError

    with monkeypatch.context() as patched:
        patched.setattr(Story, "finish", killed)
        with pytest.raises(SystemError):
            train(parts, Screen())
    assert resumed(parts) == result(whole)


# ---- G3: damage -----------------------------------------------------------------------------------------------------


@pytest.fixture
def unfinished(bench: Bench, recorded: Recorded) -> Recipe:
    """A run that has all of its checkpoints and no adapter."""
    again = bench.recipe()
    shutil.copytree(recorded.root, root_of(again))
    shutil.rmtree(root_of(again) / "adapter")
    return again


def damages(content: bytes, other: bytes) -> Iterator[tuple[str, bytes | None]]:
    """Ways to damage a file; None is gone. `other` is the file of the same name of another checkpoint."""
    yield from ((f"cut at {part}/16", content[: len(content) * part // 16]) for part in range(16))
    yield "zeros at the end", content[: len(content) // 2] + b"\0" * (len(content) - len(content) // 2)
    yield "zeros", b"\0" * len(content)
    yield "an empty object", b"{}"
    yield "more at the end", content + b"\0"
    yield "gone", None
    if other != content:
        yield "that of another checkpoint", other
    for _ in range(often(60, 2000)):
        flipped = bytearray(content)
        place = random.randrange(len(content))
        flipped[place] ^= 1 << random.randrange(8)
        yield f"a bit flipped at {place}", bytes(flipped)


def put(path: Path, content: bytes | None) -> None:
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content)


def test_damage_of_any_file_is_named_and_the_checkpoint_before_is_used(unfinished):
    checkpoints = root_of(unfinished) / "checkpoints"
    *_, before, newest = checkpoint._all(checkpoints)
    count = 0
    for path in sorted(newest.iterdir()):
        content = path.read_bytes()
        for what, damaged in damages(content, (before / path.name).read_bytes()):
            put(path, damaged)
            found, problems = checkpoint.newest(checkpoints)
            assert found == before, (path.name, what)
            assert path.name in problems[0], (problems, what)
            count += 1
        put(path, content)
    assert checkpoint.newest(checkpoints) == (newest, [])
    assert count >= 5 * often(75, 2015)


@pytest.mark.parametrize("name", [*sorted(checkpoint.FILES), checkpoint.MANIFEST])
def test_a_run_goes_on_from_before_the_damage_to_the_same_bytes(bench, unfinished, name, capsys):
    newest = checkpoint._all(root_of(unfinished) / "checkpoints")[-1]
    ways = list(damages((newest / name).read_bytes(), b""))
    put(newest / name, random.choice(ways)[1])
    assert resumed(unfinished) == bench.expected
    said = capsys.readouterr().err
    assert "skipped a damaged checkpoint" in said
    assert name in said
    assert checkpoint.damage(newest) is None, "the damaged one is written anew"


def test_a_checkpoint_under_the_name_of_another_is_damage(unfinished):
    checkpoints = root_of(unfinished) / "checkpoints"
    newest = checkpoint._all(checkpoints)[-1]
    newest.rename(checkpoints / "step-000099")
    (checkpoints / "step-of-mine").mkdir()
    found, problems = checkpoint.newest(checkpoints)
    assert found is not None
    assert found < newest
    assert "step 6" in problems[0]


def test_with_no_checkpoint_left_a_run_ends_and_never_starts_from_nothing(unfinished):
    checkpoints = root_of(unfinished) / "checkpoints"
    for folder in checkpoints.iterdir():
        (folder / random.choice(sorted(checkpoint.FILES))).write_bytes(b"")
    before = contents(root_of(unfinished))
    with pytest.raises(UserError, match="no checkpoint is usable") as caught:
        train(unfinished, Screen(), resume=True)
    assert caught.value.code is ExitCode.NO_CHECKPOINT
    after = contents(root_of(unfinished))
    assert {**before, ".lock": b""} == {**after, ".lock": b""}


# ---- G4: a full disk ------------------------------------------------------------------------------------------------


def refused_everywhere(root: Path, work: Any, target: Path) -> int:
    """Do `work` again and again: with the disk full from operation 0, 1, ... on, with operation 0, 1, ... failing.

    Each time it has to leave all else in `root` as it was; at last it succeeds. Returns how often it was refused.
    """
    refused = 0
    for broken in (failing, full_disk):
        shutil.rmtree(target, ignore_errors=True)
        before, number = contents(root), 0
        while True:
            disk = Disk(root, before=broken(number))
            with disk.watched():
                refusal = refusal_of(work)
            if refusal is None:
                break
            assert refusal.code is ExitCode.DISK
            if target.exists():  # only its name could not be forced to the disk
                assert disk.log[-1].kind in ("rename", "replace")
                shutil.rmtree(target)
            assert contents(root) == before, disk.log[-1:]
            assert not leftovers(root), disk.log[-6:]
            number, refused = number + 1, refused + 1
    return refused


def refusal_of(work: Any) -> UserError | None:
    try:
        work()
    except UserError as error:
        return error
    return None


def test_a_checkpoint_refused_at_any_operation_costs_nothing(bench, monkeypatch):
    asked = bench.recipe()
    real, refused = checkpoint.save, []

    def tried(folder: Path, run: loop.Training, progress: dict[str, Any]) -> Path:
        if run.step != 4:
            return real(folder, run, progress)
        target = folder / "step-000004"
        earlier = good(folder)
        refused.append(refused_everywhere(root_of(asked), lambda: real(folder, run, progress), target))
        assert good(folder) == [*earlier, target.name]
        return target

    monkeypatch.setattr(checkpoint, "save", tried)
    train(asked, Screen())
    assert refused[0] > 50
    assert result(asked) == bench.expected


def test_a_final_save_refused_at_any_operation_costs_nothing(bench, monkeypatch):
    asked = bench.recipe()
    real, refused = save.adapter, []

    def tried(folder: RunFolder, *others: Any) -> None:
        refused.append(refused_everywhere(folder.root, lambda: real(folder, *others), folder.adapter))

    monkeypatch.setattr(save, "adapter", tried)
    train(asked, Screen())
    assert refused[0] > 50
    assert result(asked) == bench.expected


@pytest.mark.parametrize("first", [1, 3, 5])
def test_training_goes_on_while_the_disk_is_full_and_the_exit_code_says_that_the_last_save_failed(
    bench, first, monkeypatch, capsys
):
    asked = bench.recipe()
    root = root_of(asked)
    done: list[int] = []
    real = loop._step
    monkeypatch.setattr(loop, "_step", lambda run, rows: (done.append(run.step), real(run, rows))[1])

    def before(operation: Operation, number: int) -> None:
        if len(done) > first:
            full_disk(0)(operation, number)

    with Disk(root, before=before).watched(), pytest.raises(UserError, match="cannot write") as caught:
        train(asked, Screen())
    assert caught.value.code is ExitCode.DISK
    assert done == [0, 1, 2, 3, 4, 5]
    assert "is not saved, training goes on" in capsys.readouterr().err
    assert not leftovers(root)
    assert len(good(root / "checkpoints")) == {1: 0, 3: 2, 5: 2}[first]
    assert resumed(asked) == bench.expected


def test_log_lines_that_a_full_disk_refused_are_written_when_there_is_space(bench):
    asked, refused = bench.recipe(), []

    def before(operation: Operation, number: int) -> None:
        if operation.path.endswith("log.jsonl") and len(refused) < 3:
            refused.append(number)
            full_disk(0)(operation, number)

    with Disk(root_of(asked), before=before).watched():
        train(asked, Screen())
    assert len(refused) == 3
    assert result(asked) == bench.expected


def test_a_disk_that_is_full_when_a_run_is_stopped_is_what_the_exit_code_says(bench, monkeypatch):
    asked = bench.recipe()
    real = loop._update

    def asked_to_stop(run: loop.Training, norm: float) -> None:
        real(run, norm)
        if run.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop, "_update", asked_to_stop)

    def before(operation: Operation, number: int) -> None:
        if "step-000005" in operation.path:
            full_disk(0)(operation, number)

    with Disk(root_of(asked), before=before).watched(), pytest.raises(UserError) as caught:
        train(asked, Screen())
    assert caught.value.code is ExitCode.DISK
    assert good(root_of(asked) / "checkpoints")[-1] == "step-000004"
    monkeypatch.undo()
    assert resumed(asked) == bench.expected


def test_a_limit_on_the_size_of_files_refuses_checkpoints_and_adapter_but_harms_nothing(bench, processes):
    """`ulimit -f`, in a real process: the optimizer's file is too large, in the second run the adapter's, too."""
    sizes = {path.name: path.stat().st_size for path in root_of(bench.recipe("whole")).rglob("*.safetensors")}
    smaller, larger = sizes["adapter_model.safetensors"], sizes["optimizer.safetensors"]
    assert smaller < larger
    for limit, code in ((larger - 1, ExitCode.DONE), (smaller - 1, ExitCode.DISK)):
        asked = bench.recipe()
        command = ["train", str(bench.file(asked)), "--resume"]
        ended = processes.run(command, file_bytes=limit)
        assert ended["code"] == code, ended["said"]
        assert ended["said"].count("is not saved, training goes on") == 4 or code is ExitCode.DISK
        assert not leftovers(root_of(asked))
        assert processes.run(command)["code"] == 0
        assert result(asked) == bench.expected


def test_a_disk_that_is_really_full_refuses_a_run_which_goes_on_when_there_is_space(bench):
    """A tmpfs in a namespace of its own; a ballast leaves so many KiB of it."""
    may_mount()
    place = bench.folder / "mount"
    place.mkdir(exist_ok=True)
    script = f'mount -t tmpfs -o size=4m none {place} && exec "$@"'
    with forker(["unshare", "-Urm", "sh", "-c", script, "sh"]) as inside:
        seen = Path(f"/proc/{inside.process.pid}/root{place}")
        for room in (40, *random.sample(range(8, 240, 4), often(3, 30))):
            asked = bench.recipe()
            name = root_of(asked).name
            command = ["train", str(bench.file(asked)), "--resume", "--output", str(place / name)]
            assert inside.run(["--version"])["code"] == 0  # the disk is mounted
            fill(seen, room << 10)
            ended = inside.run(command)
            assert ended["code"] in ((0, ExitCode.DISK) if room > 40 else (ExitCode.DISK,)), ended["said"]
            assert "Traceback" not in ended["said"]
            assert not leftovers(seen / name)
            assert checkpoint.newest(seen / name / "checkpoints")[1] == []
            (seen / "ballast").unlink()
            ended = inside.run(command)
            assert ended["code"] == 0, ended["said"]
            shutil.copytree(seen / name, root_of(asked))
            assert result(asked) == bench.expected
            shutil.rmtree(seen / name)


def may_mount() -> None:
    """Skip where a process cannot have mounts of its own."""
    if (
        not shutil.which("unshare")
        or subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode
    ):
        pytest.skip("no mounts of our own here: `unshare -Urm` is missing or refused")


def fill(folder: Path, room: int) -> None:
    """Leave this many bytes of the disk."""
    free = os.statvfs(folder)
    (folder / "ballast").write_bytes(b"\0" * (free.f_bavail * free.f_frsize - room))


# ---- G5: signals ----------------------------------------------------------------------------------------------------

PHASES = {
    "loading": (models, "load"),
    "tokenising": (prepare, "load_data"),
    "injecting": (prepare, "training"),
    "evaluating": (Story, "held_out_sums"),
    "saving a checkpoint": (checkpoint, "save"),
    "removing old ones": (checkpoint, "rotate"),
    "drawing": (save, "plot"),
    "saving the adapter": (save, "adapter"),
}


def lora(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of a command, run here."""
    with monkeypatch.context() as patched:
        patched.setattr(sys, "argv", ["lora", *arguments])
        try:
            cli.main()
        except SystemExit as leaving:
            return int(leaving.code or 0)
    return 0


def signalled(monkeypatch: pytest.MonkeyPatch, where: tuple[Any, str], *numbers: int) -> list[str]:
    """Send signals when `where` is about to begin for the second time, or the first if there is only one."""
    owner, name = where
    real, calls = getattr(owner, name), []

    def wrapped(*arguments: Any, **named: Any) -> Any:
        calls.append("begun")
        if calls.count("begun") == (2 if owner in (checkpoint, Story) else 1):
            for number in numbers:
                os.kill(os.getpid(), number)
        found = real(*arguments, **named)
        calls.append("ended")
        return found

    monkeypatch.setattr(owner, name, wrapped)
    return calls


@pytest.mark.usefixtures("stop_handlers")
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_in_any_phase_saves_and_says_so_and_nothing_is_lost(bench, monkeypatch, phase, number):
    asked = bench.recipe()
    command = ["train", str(bench.file(asked)), "--resume"]
    with monkeypatch.context() as patched:
        signalled(patched, PHASES[phase], number)
        code = lora(patched, *command)
    steps = [line["step"] for line in RunFolder(root_of(asked)).lines() if "loss" in line]
    newest = good(root_of(asked) / "checkpoints")[-1:]
    if phase in ("saving a checkpoint", "removing old ones"):
        # step 3, after whose checkpoint it was sent: one more step at most
        assert len(steps) <= 4
    if steps:
        assert newest == [f"step-{steps[-1]:06d}"]
    assert code == ExitCode.INTERRUPTED
    assert not leftovers(root_of(asked))
    assert resumed(asked) == bench.expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_breaks_an_evaluation_off_which_is_made_up_for(bench, monkeypatch, number):
    asked = bench.recipe()
    with monkeypatch.context() as patched:
        calls = signalled(patched, (Story, "held_out_sums"), number)
        with pytest.raises(UserError, match="stopped after step 6 of 6") as caught:
            train(asked, Screen())
    assert caught.value.code is ExitCode.INTERRUPTED
    assert calls == ["begun", "ended", "begun"]
    assert resumed(asked) == bench.expected


@pytest.mark.usefixtures("stop_handlers")
@pytest.mark.parametrize("place", [(save, "plot"), (models, "load"), (Story, "held_out_sums")])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_a_library_makes_an_error_of_is_a_stop_all_the_same(
    bench, monkeypatch, capsys, place, number
):
    """As C code does that is asked to call back in the middle of an import."""
    asked = bench.recipe()

    def broken(*arguments: Any) -> None:
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt as error:
            raise ImportError("initialization failed") from error

    with monkeypatch.context() as patched:
        patched.setattr(*place, broken)
        assert lora(patched, "train", str(bench.file(asked))) == ExitCode.INTERRUPTED
    assert "stopped" in capsys.readouterr().err
    assert resumed(asked) == bench.expected


@pytest.mark.usefixtures("stop_handlers")
@pytest.mark.parametrize("place", [(models, "load"), (prepare, "load_data"), (Story, "announce")])
@pytest.mark.parametrize("options", [[], ["--resume"]])
def test_a_stop_before_the_first_step_says_so_and_leaves_no_run(bench, monkeypatch, capsys, place, options):
    asked = bench.recipe()
    root, command = root_of(asked), ["train", str(bench.file(asked))]
    with monkeypatch.context() as patched:
        signalled(patched, place, *([signal.SIGINT] if place[0] is not Story else []))
        if place[0] is Story:
            patched.setattr(*place, lambda _: os.kill(os.getpid(), signal.SIGINT))
        assert lora(patched, *command, *options) == ExitCode.INTERRUPTED
    told = " ".join(capsys.readouterr().err.split())
    assert "stopped before the first step; nothing to resume → the same command starts anew" in told
    assert not root.exists() or {path.name for path in root.iterdir()} == {".lock", "cache"}
    assert lora(monkeypatch, *command) == 0
    assert result(asked) == bench.expected


def test_what_is_wrong_with_a_run_that_has_not_begun_leaves_nothing_of_it(bench):
    asked = bench.recipe()
    asked = asked.model_copy(update={"model": asked.model.model_copy(update={"name": "/nowhere"})})
    with pytest.raises(UserError, match="/nowhere"):
        train(asked, Screen())
    assert not root_of(asked).exists()


@pytest.mark.usefixtures("stop_handlers")
def test_a_stop_while_a_run_is_opened_again_leaves_what_was_saved(bench, monkeypatch, capsys):
    asked = bench.recipe()
    command = ["train", str(bench.file(asked)), "--resume"]
    with monkeypatch.context() as patched:
        signalled(patched, (checkpoint, "save"), signal.SIGINT)
        assert lora(patched, *command) == ExitCode.INTERRUPTED
    saved = good(root_of(asked) / "checkpoints")
    with monkeypatch.context() as patched:
        signalled(patched, (models, "load"), signal.SIGINT)
        assert lora(patched, *command) == ExitCode.INTERRUPTED
    told = " ".join(capsys.readouterr().err.split())
    assert "stopped; what was saved is untouched → the same command with --resume goes on" in told
    assert good(root_of(asked) / "checkpoints") == saved != []
    assert resumed(asked) == bench.expected


def test_a_resume_that_finds_no_step_says_where_it_starts(bench, capsys):
    train(bench.recipe(), Screen(), resume=True)
    assert "nothing to go on with here: starting at step 1" in " ".join(capsys.readouterr().err.split())


@pytest.mark.usefixtures("stop_handlers")
@pytest.mark.parametrize("phase", PHASES)
def test_a_second_signal_ends_the_process_at_once_and_the_last_checkpoint_is_whole(bench, monkeypatch, phase):
    asked = bench.recipe()
    command = ["train", str(bench.file(asked)), "--resume"]
    with monkeypatch.context() as patched:
        calls = signalled(
            patched, PHASES[phase], signal.SIGTERM, random.choice([signal.SIGINT, signal.SIGTERM])
        )
        assert lora(patched, *command) == ExitCode.INTERRUPTED
    assert calls[-1] == "begun"
    assert checkpoint.newest(root_of(asked) / "checkpoints")[1] == []
    assert resumed(asked) == bench.expected


def test_processes_asked_to_stop_at_random_instants_are_resumable(bench, processes):
    whole = bench.recipe()
    alone = processes.run(["train", str(bench.file(whole))])
    for _ in range(often(8, 100)):
        asked = bench.recipe()
        command = ["train", str(bench.file(asked)), "--resume"]
        number = random.choice([signal.SIGINT, signal.SIGTERM])
        ended = processes.run(command, after=random.uniform(0, alone["seconds"]), number=number)
        assert ended["code"] in (0, ExitCode.INTERRUPTED), ended["said"]
        assert "Traceback" not in ended["said"]
        ended = processes.run(command)
        assert ended["code"] == 0, ended["said"]
        assert result(asked) == bench.expected


# ---- G6: retention --------------------------------------------------------------------------------------------------


class Retention(RuleBasedStateMachine):
    """Saves, failed saves, damage and resumes in any order; `best` is set now and then."""

    folder: Path
    number = 0

    def __init__(self) -> None:
        """An empty folder."""
        super().__init__()
        Retention.number += 1
        self.checkpoints = self.folder / str(Retention.number) / "checkpoints"
        self.run = self.training
        self.run.step = 0
        self.best: str | None = None
        self.damaged = False

    training: loop.Training

    def good(self) -> set[str]:
        return set(good(self.checkpoints))

    @rule(steps=st.integers(1, 3), keep=st.integers(2, 3), is_best=st.booleans())
    def save(self, steps: int, keep: int, is_best: bool) -> None:
        """Train on, save, rotate."""
        before = self.good()
        self.run.step += steps
        name = f"step-{self.run.step:06d}"
        if is_best:
            self.best = name
        checkpoint.save(self.checkpoints, self.run, {})
        checkpoint.rotate(self.checkpoints, keep, self.best)
        after = self.good()
        assert name in after
        assert max(before | {name}) in after
        assert self.best not in before or self.best in after
        assert len(after) >= min(keep, len(before | {name})) or self.broken(), "a good one went too early"

    def broken(self) -> bool:
        return len(list(self.checkpoints.iterdir())) > len(self.good())

    @rule(steps=st.integers(1, 3), operation=st.integers(0, 60))
    def fail(self, steps: int, operation: int) -> None:
        """A save that the disk refuses at some point."""
        before = self.good()
        self.run.step += steps
        try:
            with Disk(self.checkpoints, before=full_disk(operation)).watched():
                checkpoint.save(self.checkpoints, self.run, {})
                checkpoint.rotate(self.checkpoints, 2, self.best)
        except UserError:
            after = self.good()
            if f"step-{self.run.step:06d}" in after:  # saved; removing an old one was refused
                assert after & before or not before
                assert self.best not in before or self.best in after
            else:
                assert after >= before

    @precondition(lambda self: self.checkpoints.exists() and any(self.checkpoints.iterdir()))
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        """A bit rots."""
        path = data.draw(st.sampled_from(sorted(self.checkpoints.glob("step-*/*"))))
        content = bytearray(path.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content)

    @rule()
    def resume(self) -> None:
        """A killed run goes on from the newest good one."""
        found, _ = checkpoint.newest(self.checkpoints)
        self.run.step = int(found.name[5:]) if found else 0

    @invariant()
    def nothing_is_left_over(self) -> None:
        """Saves clean up after themselves."""
        assert not leftovers(self.checkpoints)


def test_no_order_of_saves_failures_and_damage_deletes_the_newest_the_best_or_the_only_checkpoint(tmp_path):
    run = training.training({"r": 2}, rows=training.Rows(4), **SMALL)
    machine = type("Machine", (Retention,), {"folder": tmp_path, "training": run})
    limits = settings(
        max_examples=often(15, 300),
        stateful_step_count=often(12, 40),
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    run_state_machine_as_test(machine, settings=limits)


# ---- G7: one run in a folder, and the same one ----------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from lora_cli.errors import UserError
from lora_cli.run.folder import RunFolder
try:
    with RunFolder(Path(sys.argv[1])).held():
        print("held", flush=True)
        sys.stdin.read()
except UserError as error:
    print(int(error.code), error, flush=True)
"""


def holder(folder: Path) -> "subprocess.Popen[str]":
    """A process that holds a run folder until its stdin is closed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLD, str(folder)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )


def test_of_many_starts_in_one_folder_exactly_one_proceeds_and_the_others_name_it(tmp_path):
    started = [holder(tmp_path / "run") for _ in range(often(8, 40))]
    said = [process.stdout.readline() for process in started]
    winner = said.index("held\n")
    others = said[:winner] + said[winner + 1 :]
    assert all(line.startswith(f"{int(ExitCode.LOCKED)} ") for line in others)
    # one that comes while the winner has the lock, and not yet written its name, cannot name it
    late = holder(tmp_path / "run")
    assert f"process {started[winner].pid} on " in late.communicate()[0]
    for process in started:
        process.communicate()


def test_a_killed_run_holds_nothing(tmp_path):
    first = holder(tmp_path / "run")
    assert first.stdout.readline() == "held\n"
    first.kill()
    first.communicate()
    with RunFolder(tmp_path / "run").held():
        pass


CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "train.learning_rate": {"train": {"learning_rate": 5e-3}},
    "train.epochs": {"train": {"epochs": 3}},
    "adapter.dropout": {"adapter": {"dropout": 0.2}},
    "data.format": {"data": {"format": {"prompt": "Q {question}", "completion": "{answer}"}}},
}


@pytest.mark.parametrize("key", CHANGES)
def test_another_recipe_cannot_go_on_with_a_run_unless_the_key_is_named(bench, unfinished, key):
    name = root_of(unfinished).name
    other = bench.recipe(name, **CHANGES[key])
    for allowed in ((), ("eval", "train.warmup_steps")):
        before = contents(root_of(unfinished))
        with pytest.raises(UserError, match=rf"(?s)another recipe.*{key} was .*, is ") as caught:
            train(other, Screen(), resume=True, allowed=allowed)
        assert caught.value.code is ExitCode.LOCKED
        assert f"--allow-change {key}" in caught.value.fix
        assert "train.seed" not in str(caught.value), "what is the same is not shown"
        assert {**before, ".lock": b""} == {**contents(root_of(unfinished)), ".lock": b""}
    train(other, Screen(), resume=True, allowed=[random.choice([key, key.partition(".")[0]])])
    with pytest.raises(UserError, match="another recipe"):
        train(unfinished, Screen(), resume=True)


def test_a_finished_run_takes_no_change_even_an_allowed_one(bench):
    asked = bench.recipe()
    train(asked, Screen())
    other = bench.recipe(root_of(asked).name, **CHANGES["train.epochs"])
    with pytest.raises(UserError, match="another recipe"):
        train(other, Screen(), resume=True, allowed=["train.epochs"])


@pytest.mark.parametrize("key", ["data.train", "data.eval", "data.chat_template", "model.name"])
def test_other_files_under_the_same_names_cannot_go_on_with_a_run_unless_the_key_is_named(
    bench, tmp_path, monkeypatch, key
):
    names = {"data.train": "train.jsonl", "data.eval": "eval.jsonl", "data.chat_template": "mine.jinja"}
    shutil.copytree(bench.folder / "model", tmp_path / "model")
    for file in ("train.jsonl", "eval.jsonl"):
        shutil.copy(bench.folder / "rows.jsonl", tmp_path / file)
    (tmp_path / "mine.jinja").write_text(tiny.CHATML)
    asked = bench.recipe(
        model={"name": str(tmp_path / "model")},
        data={
            "train": str(tmp_path / "train.jsonl"),
            "eval": str(tmp_path / "eval.jsonl"),
            "eval_fraction": 0.0,
            "chat_template": str(tmp_path / "mine.jinja"),
        },
    )

    def killed(story: Story) -> Path:
        raise SystemError

    with monkeypatch.context() as patched:
        patched.setattr(Story, "finish", killed)
        with pytest.raises(SystemError):
            train(asked, Screen())
    if key == "model.name":
        tiny.model("llama", random.getrandbits(16) + 2**16, **SMALL).save_pretrained(tmp_path / "model")
        file = "model.safetensors"
    else:
        file = names[key]
        path = tmp_path / file
        path.write_text(
            path.read_text().replace("0+0", "9+9").replace("<|im_start|>", "<|im_start|><|im_start|>")
        )
    loaded: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr(models, "load", lambda *_: loaded.append("loaded"))
        with pytest.raises(UserError, match=rf"other files:\n  {key}: .*{file} changed") as caught:
            train(asked, Screen(), resume=True)
    assert not loaded
    assert caught.value.code is ExitCode.LOCKED
    train(asked, Screen(), resume=True, allowed=[key])


def test_a_run_folder_may_be_moved_and_files_that_nothing_is_read_from_may_change(bench, unfinished):
    moved = bench.recipe()
    root_of(unfinished).rename(root_of(moved))
    (bench.folder / "model" / "README.md").write_text(str(random.random()))
    os.utime(bench.folder / "rows.jsonl")
    assert resumed(moved) == bench.expected


@pytest.mark.usefixtures("stop_handlers")
def test_the_command_line_names_what_may_change(bench, unfinished, monkeypatch, capsys):
    command = ["train", str(bench.file(unfinished)), "--resume", "--set", "train.learning_rate=5e-3"]
    assert lora(monkeypatch, *command) == ExitCode.LOCKED
    assert "train.learning_rate was 0.01, is 0.005" in capsys.readouterr().err
    assert lora(monkeypatch, *command, "--allow-change", "train.learning_rate") == 0


def test_checkpoints_of_another_size_cannot_be_gone_on_with_even_when_allowed(bench, unfinished):
    other = bench.recipe(root_of(unfinished).name, adapter={"r": 3})
    with pytest.raises(UserError, match="the tensors of another adapter") as caught:
        train(other, Screen(), resume=True, allowed=["adapter.r"])
    assert caught.value.code is ExitCode.NO_CHECKPOINT


# ---- G8: places that cannot be written to ---------------------------------------------------------------------------


def a_file(root: Path) -> None:
    root.write_text("mine")


def a_link_to_nowhere(root: Path) -> None:
    root.symlink_to(root.with_name("nowhere"))


def a_pipe(root: Path) -> None:
    os.mkfifo(root)


def below_a_file(root: Path) -> None:
    root.parent.rmdir()
    root.parent.write_text("mine")


def a_link_for_a_lock(root: Path) -> None:
    (root.parent / "precious").write_text("mine")
    root.mkdir()
    (root / ".lock").symlink_to(root.parent / "precious")


def a_file_for_checkpoints(root: Path) -> None:
    root.mkdir()
    (root / "checkpoints").write_text("mine")


def a_link_for_an_adapter(root: Path) -> None:
    root.mkdir()
    (root / "adapter").symlink_to(root / "nowhere")


@pytest.mark.parametrize(
    "obstacle",
    [
        a_file,
        a_link_to_nowhere,
        a_pipe,
        below_a_file,
        a_link_for_a_lock,
        a_file_for_checkpoints,
        a_link_for_an_adapter,
    ],
)
def test_an_output_that_is_something_else_is_refused_before_the_model_is_loaded(
    bench, tmp_path, monkeypatch, obstacle
):
    (tmp_path / "runs").mkdir()
    root = tmp_path / "runs" / "run"
    obstacle(root)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    asked = bench.recipe()
    asked = asked.model_copy(update={"output": asked.output.model_copy(update={"dir": str(root)})})
    loaded: list[str] = []
    monkeypatch.setattr(models, "load", lambda *_: loaded.append("loaded"))
    with pytest.raises(UserError) as caught:
        train(asked, Screen())
    assert caught.value.code in (ExitCode.DISK, ExitCode.LOCKED)
    assert not loaded
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path: after.get(path) for path in before} == before
    assert not (root / "recipe.yaml").exists()


@pytest.mark.parametrize("where", ["new", "with a lock in it"])
def test_a_read_only_disk_is_refused_and_nothing_is_made(where, tmp_path):
    may_mount()
    root = tmp_path / "run"
    root.mkdir()
    (root / ".lock").touch()
    folder = root if where != "new" else root / "below"
    script = f'mount --bind {tmp_path} {tmp_path} && mount -o remount,bind,ro {tmp_path} && exec "$@"'
    command = ["unshare", "-Urm", "sh", "-c", script, "sh", sys.executable, "-c", HOLD, str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.stdout.startswith(f"{int(ExitCode.DISK)} "), done.stdout + done.stderr
    assert "Read-only file system" in done.stdout
    assert list(contents(root)) == [".lock"]
