"""Writing: nothing is planted, destroyed, left behind or shown raw."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys

import pytest

from molgen_energy import output
from molgen_energy.errors import InputError
from molgen_energy.output import (
    atomic_replace,
    atomic_write,
    check_writable,
    display_names,
    display_path,
    move_over,
    open_to_append,
    printable,
    remove,
    temporary_folder,
)

posix = pytest.mark.skipif(os.name != "posix", reason="needs links, modes and pipes")


@pytest.fixture
def umask():
    """A mask under which new files are 0640."""
    before = os.umask(0o027)
    yield
    os.umask(before)


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@posix
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("before", [None, 0o600, 0o664, 0o444])
def test_a_file_that_is_overwritten_keeps_its_mode(tmp_path, umask, before, own):
    path = tmp_path / "a.sdf"
    if before is not None:
        path.touch()
        path.chmod(before)
    with atomic_replace(path, own=own) as replacement:
        # What replaces a private file must not be readable while it is written either.
        readable = mode(replacement.temporary) & ~stat.S_IWUSR
        assert readable & ~(0o666 if before is None else before) == 0
        replacement.temporary.write_text("new")
    assert path.read_text() == "new"
    assert mode(path) == (0o640 if before is None else before)


@posix
def test_a_file_that_is_moved_into_place_keeps_the_mode_of_the_other(tmp_path, umask):
    (tmp_path / "old").touch(mode=0o600)
    for name in ("old", "absent"):
        (tmp_path / "new").write_text("new")
        move_over(tmp_path / "new", tmp_path / name)
    assert mode(tmp_path / "old") == 0o600
    assert mode(tmp_path / "absent") == 0o640


def planted(tmp_path, what):
    """Something else than a regular file, under a name that is to be written."""
    path = tmp_path / "f.h5"
    if what == "pipe":
        os.mkfifo(path)
    elif what == "link to a pipe":
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to("pipe")
    elif what == "link to a device":
        path.symlink_to("/dev/null")
    elif what == "device":
        path = type(path)("/dev/null")
    elif what == "link to itself":
        path.symlink_to("f.h5")
    elif what == "circle of links":
        (tmp_path / "other").symlink_to("f.h5")
        path.symlink_to("other")
    elif what == "folder":
        path.mkdir()
    return path


@posix
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("pipe", "f.h5 is a device or a pipe; name a file to write"),
        ("link to a pipe", "f.h5 is a device or a pipe; name a file to write"),
        ("link to a device", "f.h5 is a device or a pipe; name a file to write"),
        ("device", "/dev/null is a device or a pipe; name a file to write"),
        ("link to itself", "f.h5 is a link that leads to itself; remove it"),
        ("circle of links", "f.h5 is a link that leads to itself; remove it"),
        ("folder", "f.h5 is a folder; name a file to write"),
    ],
)
def test_what_is_no_regular_file_stays(tmp_path, what, message):
    path = planted(tmp_path, what)
    before = {file.name: file.lstat().st_mode for file in tmp_path.iterdir()}
    with pytest.raises(InputError, match=re.escape(message)):
        check_writable(path)
    if "device" not in what:  # root could replace it
        with pytest.raises(InputError, match=re.escape(message)):
            atomic_write(path, b"")
    assert {file.name: file.lstat().st_mode for file in tmp_path.iterdir()} == before


@posix
def test_an_output_that_is_a_link_stays_one(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a").symlink_to("elsewhere/b")
    atomic_write(tmp_path / "a", b"new")
    assert (tmp_path / "a").is_symlink()
    assert (tmp_path / "elsewhere" / "b").read_bytes() == b"new"
    assert len(list(tmp_path.rglob("*"))) == 3


@posix
@pytest.mark.parametrize("what", ["link", "dangling link", "pipe"])
@pytest.mark.parametrize("write", [lambda p: atomic_write(p, b"x", own=True), open_to_append])
def test_names_of_this_package_are_no_links(tmp_path, what, write):
    """In a folder that comes from somebody else; a pipe must not block."""
    victim, path = tmp_path / "victim", tmp_path / "log.txt"
    if what == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(victim)
        if what == "link":
            victim.write_text("mine")
    with pytest.raises(InputError, match="remove it"):
        write(path)
    assert victim.exists() == (what == "link")
    assert what != "link" or victim.read_text() == "mine"


@posix
def test_temporary_names_cannot_be_planted(tmp_path, monkeypatch):
    """A name that is guessed nevertheless is not opened."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    monkeypatch.setattr(output.secrets, "token_hex", lambda size: "0" * 2 * size)
    (tmp_path / ".a.sdf.0000000000000000.tmp").symlink_to(victim)
    with pytest.raises(FileExistsError):
        atomic_write(tmp_path / "a.sdf", b"new")
    assert victim.read_text() == "mine"
    assert not (tmp_path / "a.sdf").exists()


@posix
def test_a_temporary_file_that_is_exchanged_is_not_renamed(tmp_path):
    (tmp_path / "victim").write_text("mine")
    with (
        pytest.raises(OSError, match="another process replaced"),
        atomic_replace(tmp_path / "a.sdf") as replacement,
    ):
        replacement.temporary.unlink()
        replacement.temporary.symlink_to(tmp_path / "victim")
    assert [path.name for path in tmp_path.iterdir()] == ["victim"]


def test_a_link_to_a_folder_is_removed_without_its_target(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    (tmp_path / "link").symlink_to("folder")
    remove(tmp_path / "link")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert (tmp_path / "folder" / "file").exists()


KILLED = """
import sys, time
from pathlib import Path
from molgen_energy.output import atomic_replace, temporary_folder
with atomic_replace(Path("a.sdf")) as a, temporary_folder(Path("a.sdf.shards")):
    a.temporary.write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no locks")
def test_the_next_run_removes_what_a_killed_one_left(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    try:
        process.stdout.readline()
        assert len(list(tmp_path.iterdir())) == 2
        for path in (tmp_path / "a.sdf", tmp_path / "b.sdf"):
            atomic_write(path, b"whole")  # while the other writes, and of another name
        assert len(list(tmp_path.iterdir())) == 4
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    unlike = tmp_path / ".a.sdf.notes.tmp"
    unlike.touch()
    atomic_write(tmp_path / "b.sdf", b"whole")
    assert len(list(tmp_path.iterdir())) == 5
    atomic_write(tmp_path / "a.sdf", b"whole")
    with temporary_folder(tmp_path / "a.sdf.shards"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [unlike.name, "a.sdf", "b.sdf"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("C:\\new [red]x[/] 2 Å ± 日本 🙂\tz", "C:\\new [red]x[/] 2 Å ± 日本 🙂\tz"),
        ("\x1b[31mred\x07\x00\x7f", r"\x1b[31mred\x07\x00\x7f"),
        ("one\nerror: two\r", r"one\nerror: two\r"),
        ("\x9b31m\x85", r"\x9b31m\x85"),  # the same as ESC [ in one character, and a new line
        ("\u202egnp.exe\u2066\u2028", r"\u202egnp.exe\u2066\u2028"),
        ("\udcff\udcfe\ud800", r"\xff\xfe\ud800"),
    ],
)
def test_printable(text, shown):
    assert printable(text) == shown
    assert printable(shown) == shown


def test_names_that_tell_files_apart(tmp_path):
    def names(*texts):
        return display_names([tmp_path / text for text in texts])

    assert names("a.sdf", "b.sdf") == ["a.sdf", "b.sdf"]
    assert names("x/a.sdf", "y/a.sdf", "y/b.sdf") == ["x/a.sdf", "y/a.sdf", "y/b.sdf"]
    assert names("x/1/a.sdf", "y/1/a.sdf") == ["x/1/a.sdf", "y/1/a.sdf"]
    assert names("a.sdf", "a.sdf") == ["a.sdf", "a.sdf"]
    assert names("a\x1b[0m\udcff.sdf") == ["a\\x1b[0m\ufffd.sdf"]
    assert display_path(tmp_path) == str(tmp_path)
    assert display_names([]) == []
