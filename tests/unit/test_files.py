"""Checksums and atomic writes, with the failures a file system has to offer."""

import errno
import hashlib
import os
import resource
import signal
import subprocess
import sys

import pytest

from helpers import files


def test_sha256_of_a_file(tmp_path):
    content = bytes(range(256)) * 10_000  # more than one block
    (tmp_path / "file").write_bytes(content)
    assert files.sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()
    assert files.sha256(str(tmp_path / "file")) == files.sha256(tmp_path / "file")


def test_the_name_appears_only_when_the_block_has_ended(tmp_path):
    target = tmp_path / "new" / "folders" / "result.npz"
    with files.atomic(target) as temporary:
        temporary.write_bytes(b"whole")
        assert not target.exists()
        assert temporary.parent == target.parent
        assert temporary.suffix == ".npz"  # numpy would append it to another name
        inode = temporary.stat().st_ino
    assert target.read_bytes() == b"whole"
    assert target.stat().st_ino == inode  # renamed, not copied
    assert os.listdir(target.parent) == ["result.npz"]


def test_permissions_are_those_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_text("")
    with files.atomic(tmp_path / "atomic") as temporary:
        temporary.write_text("")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("error", [RuntimeError("in the block"), KeyboardInterrupt()])
def test_a_failed_block_leaves_the_old_file_and_nothing_else(tmp_path, error):
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(type(error)), files.atomic(target) as temporary:
        temporary.write_text("half")
        raise error
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_killed_process_leaves_the_old_file(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")
    script = f"""
import os, signal
from helpers import files
with files.atomic({str(target)!r}) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert target.read_text() == "old"


def test_two_writers_do_not_share_a_temporary_file(tmp_path):
    with files.atomic(tmp_path / "file") as first, files.atomic(tmp_path / "file") as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "file").read_text() == "first"  # the outer block ends last


def test_another_file_that_is_missing_is_not_blamed_on_the_target(tmp_path):
    with pytest.raises(FileNotFoundError, match="lost.npz"), files.atomic(tmp_path / "kept.tar"):
        (tmp_path / "lost.npz").read_bytes()


def test_a_parent_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    target = tmp_path / "file" / "result.json"
    with pytest.raises(OSError, match=f"cannot write {target}"), files.atomic(target):
        pytest.fail("the block must not run")


def test_a_folder_without_write_permission_is_named(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    target = tmp_path / "result.json"
    with pytest.raises(PermissionError, match=f"cannot write {target}"), files.atomic(target) as temporary:
        temporary.write_text("")


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path):
    """The limit on file size is the only shortage of space that a test may cause for real."""
    target = tmp_path / "result.npz"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=f"cannot write {target}") as caught, files.atomic(target) as temporary:
            temporary.write_bytes(bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fills_up_at_the_last_moment(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    target = tmp_path / "result.npz"
    target.write_text("old")
    with pytest.raises(OSError, match=f"cannot write {target}: No space left"), files.atomic(target) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["result.npz"]
