"""What is written appears whole or not at all."""

import os
import stat
from pathlib import Path

import pytest

from lora_cli import io_ops
from lora_cli.errors import ExitCode, UserError


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
    (tmp_path / "step-000001").mkdir()
    io_ops.remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
