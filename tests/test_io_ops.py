"""What is written appears whole or not at all."""

import os
import random
import signal
import stat
from pathlib import Path

import pytest

from lora_cli import io_ops
from lora_cli.errors import ExitCode, UserError
from tests.disk import Disk, Tree, full_disk


def test_a_folder_appears_only_when_the_block_ends_well(tmp_path):
    target = tmp_path / "made"
    with io_ops.new_folder(target) as folder:
        (folder / "a.txt").write_text("a")
        assert not target.exists()
    assert (target / "a.txt").read_text() == "a"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_failed_folder_leaves_nothing(tmp_path):
    def fails() -> None:
        with io_ops.new_folder(tmp_path / "made") as folder:
            (folder / "a.txt").write_text("a")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_or_link_is_never_written_into(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("there", "link"):
        with pytest.raises(UserError, match="already exists"), io_ops.new_folder(tmp_path / name):
            pass
    assert not list((tmp_path / "there").iterdir())


def test_a_file_is_replaced_whole_and_the_old_one_survives_a_failed_write(tmp_path, monkeypatch):
    target = tmp_path / "file.txt"
    io_ops.write_text(target, "old")

    def full(self: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(UserError, match="No space left") as caught:
            io_ops.write_text(target, "new")
    assert caught.value.code is ExitCode.DISK
    assert target.read_text() == "old"
    io_ops.write_text(target, "new")
    assert target.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]


def test_files_get_the_permissions_that_the_umask_asks_for(tmp_path):
    before = os.umask(0o027)
    try:
        with io_ops.new_folder(tmp_path / "made") as folder:
            (folder / "private").touch(mode=0o600)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "made" / "private").stat().st_mode) == 0o640


def test_leftovers_of_a_killed_process_are_removed_and_nothing_else(tmp_path):
    (tmp_path / f"{io_ops.TEMPORARY}step-1-99-0123abcd").mkdir()
    (tmp_path / f"{io_ops.TEMPORARY}file-99-0123abcd").touch()
    (tmp_path / f"{io_ops.TEMPORARY}of-somebody-else").mkdir()
    (tmp_path / "step-000001").mkdir()
    io_ops.remove_leftovers(tmp_path)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [f"{io_ops.TEMPORARY}of-somebody-else", "step-000001"]


def test_what_killed_processes_left_of_a_folder_is_removed_but_not_what_one_is_at_work_on(tmp_path):
    target = tmp_path / "made"
    child = os.fork()
    if child == 0:
        with io_ops.new_folder(target) as folder:
            (folder / "half").write_bytes(b"of a model")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (left,) = tmp_path.iterdir()
    assert io_ops.LEFTOVER.fullmatch(left.name)
    (tmp_path / f"{io_ops.TEMPORARY}made too-99-0123abcd").mkdir()
    (tmp_path / f"{io_ops.TEMPORARY}made-of-somebody-else").mkdir()
    kept = {path.name for path in tmp_path.iterdir()} - {left.name}
    with io_ops.new_folder(target) as folder:
        io_ops.remove_abandoned(target)
        assert {path.name for path in tmp_path.iterdir()} == kept | {folder.name}
    assert {path.name for path in tmp_path.iterdir()} == kept | {"made"}


def test_a_line_is_added_whole_or_not_at_all(tmp_path):
    log = tmp_path / "log"
    io_ops.append_line(log, "first")
    with (
        Disk(tmp_path, before=full_disk(0)).watched(),
        pytest.raises(UserError, match="No space left") as caught,
    ):
        io_ops.append_line(log, "refused")
    assert caught.value.code is ExitCode.DISK
    io_ops.append_line(log, "second")
    assert log.read_text() == "first\nsecond\n"


def test_a_full_disk_in_another_librarys_words_is_a_message(tmp_path):
    """The library safetensors writes files itself, and its errors are no OSError."""
    refused = Exception("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(UserError, match="No space left") as caught, io_ops.new_folder(tmp_path / "made"):
        raise refused
    assert caught.value.code is ExitCode.DISK
    other = Exception("Error while serializing: (os error 5)")
    with pytest.raises(Exception, match="os error 5") as unchanged, io_ops.new_folder(tmp_path / "made"):
        raise other
    assert unchanged.value is other
    assert not list(tmp_path.iterdir())


def test_after_a_power_loss_what_was_made_is_whole_and_what_was_removed_is_gone_whole(tmp_path):
    """Each call, once it has returned, is durable, with all the folders above it."""
    root = tmp_path / "root"
    root.mkdir()
    disk, made = Disk(root), {}
    with disk.watched():
        io_ops.write_text(root / "a" / "b" / "text", "written")
        made["a/b/text"] = len(disk.log)
        with io_ops.new_folder(root / "c" / "d") as folder:
            (folder / "e").mkdir()
            (folder / "e" / "file").write_bytes(b"1234")
        made["c/d/e/file"] = len(disk.log)
        io_ops.remove(root / "c" / "d")
    gone = len(disk.log)
    for state in range(300):
        number, tree = random.randint(0, gone), Tree(root)
        for operation in disk.log[:number]:
            tree.do(operation)
        left = tmp_path / str(state)
        tree.write_crashed(left, random.Random(random.getrandbits(32)))
        assert (left / "a/b/text").exists() or number < made["a/b/text"]
        assert (left / "c/d").exists() == (left / "c/d/e/file").exists()
        assert (left / "c/d").exists() or not made["c/d/e/file"] <= number <= made["c/d/e/file"]
        assert not (left / "c/d").exists() or number < gone
        for name, content in (("a/b/text", b"written"), ("c/d/e/file", b"1234")):
            assert not (left / name).exists() or (left / name).read_bytes() == content
