"""Files appear whole or not at all; a folder belongs to one job at a time."""

import os
import subprocess
import sys

import pytest

from rolldiff.errors import UsageError
from rolldiff.files import locked, refuse_links, remove_parts, write_text, written_whole

DIE = """
import os, sys
from rolldiff.files import written_whole
with written_whole(sys.argv[1]) as part:
    part.write_text("half")
    os.kill(os.getpid(), 9)
"""
HOLD = """
import sys
from pathlib import Path
from rolldiff.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half \udcff")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.slow
@pytest.mark.parametrize("clean", ["the next write", "remove_parts"])
def test_what_a_killed_job_left_is_removed(tmp_path, clean):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    subprocess.run([sys.executable, "-c", DIE, path], check=False)
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
    remove_parts(tmp_path) if clean == "remove_parts" else write_text(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_file_that_another_job_is_writing_stays(tmp_path):
    path = tmp_path / "a.txt"
    with written_whole(path) as part:
        write_text(tmp_path / "b.txt", "b")
        write_text(tmp_path / "-a.txt", "b")
        part.write_text("a")
    assert path.read_text() == "a"


def test_permissions_are_those_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with written_whole(tmp_path / "a.txt") as part:
            part.unlink()
            part.touch(mode=0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o640


def test_a_link_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "target").write_text("theirs")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(UsageError, match="link"):
        refuse_links(tmp_path / "target", tmp_path / "link")
    write_text(tmp_path / "link", "ours")
    assert (tmp_path / "target").read_text() == "theirs"
    assert (tmp_path / "link").read_text() == "ours"


def test_a_folder_belongs_to_one_job(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UsageError, match="no other job"), locked(tmp_path):
            pass
        other.kill()
    with locked(tmp_path):  # the lock ended with the process
        pass
