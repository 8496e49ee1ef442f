"""A program's files are limited in number and size, and none of them is left, however they are nested."""

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from t2kernels.tasks.sandbox import Job, isolation, run, run_many, scratch_folder
from tests.helpers.sandboxes import LAYERS, SMALL, SQUARE

WRITES = """
import time
def f(n, wait):
    for i in range(n):
        open(f"x{i}", "wb").write(bytes(1 << 19))
    time.sleep(wait)
    return n
"""
MAKES = """
import os, time
def f(n, wait):
    for i in range(n):
        os.mkdir(str(i))
    time.sleep(wait)
    return n
"""


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    ("program", "few", "many", "said"),
    [
        (WRITES, 7, 9, f"wrote more than {4 << 20} bytes"),
        (MAKES, 200, 400, "made more than 300 files and folders"),
    ],
    ids=["bytes", "number"],
)
def test_files_are_bounded_together(program, few, many, said, layer):
    """In one layer by the size of a file system, in the other by looking: a program that sleeps is ended."""
    limits = replace(SMALL, isolation=layer, wall_seconds=60.0, scratch_bytes=4 << 20, scratch_files=300)
    assert run(Job(program, f"assert f({few}, 0) == {few}", ("f",)), limits).passed
    result = run(Job(program, f"f({many}, 1000)", ("f",)), limits)
    assert ("No space left" if layer == "namespaces" else said) in result.detail


NESTED = "import os\nfor _ in range(1100):\n    os.mkdir('d'); os.chdir('d')\n"
FOLDERS = "import os\nfor i in range(20_000):\n    os.mkdir(f'd{i}')\n"
EMPTY_FILES = "import os\nfor i in range(20_000):\n    os.close(os.open(f'd{i}', os.O_CREAT))\n"
HIDDEN = "import os\nos.mkdir('d', 0o300)\nopen('d/x', 'w').close()\n"


@pytest.fixture
def scratch_root(tmp_path, monkeypatch):
    """The folder in which scratch folders are made; afterwards none is left."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    "program", [NESTED, FOLDERS, EMPTY_FILES, HIDDEN], ids=["nested", "folders", "files", "hidden"]
)
def test_folders_and_files_are_bounded_and_removed(program, layer, scratch_root):
    program += "def f():\n    return 0"
    result = run(Job(program, "assert f()", ("f",)), replace(SMALL, isolation=layer))
    assert result.verdict in ("wrong", "error", "timeout")


@pytest.mark.skipif("filters" not in LAYERS, reason="no Landlock")
def test_a_program_that_nests_folders_does_not_spoil_the_others_of_its_batch(scratch_root):
    jobs = [SQUARE, replace(SQUARE, program=NESTED + "def f(x):\n    return x + x"), SQUARE]
    assert [r.passed for r in run_many(jobs, replace(SMALL, isolation="filters"))] == [True, False, True]


def test_excess_stops_at_the_first_broken_limit(tmp_path):
    assert scratch_folder.excess(str(tmp_path), 1 << 20, 3) == ""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_bytes(bytes(1 << 16))
    assert scratch_folder.excess(str(tmp_path), 1 << 20, 3) == ""
    assert scratch_folder.excess(str(tmp_path), 1 << 20, 2) == "made more than 2 files and folders"
    assert scratch_folder.excess(str(tmp_path), 1 << 15, 3) == f"wrote more than {1 << 15} bytes"
    (tmp_path / "a" / "up").symlink_to(tmp_path.parent)  # not followed
    assert scratch_folder.excess(str(tmp_path), 1 << 20, 4) == ""


def test_a_tree_of_any_depth_is_removed_and_nothing_outside(tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    outside.mkdir()
    (outside / "file").write_text("precious")
    folder.mkdir()
    (folder / "link").symlink_to(outside)
    (folder / "0").mkdir()  # a name that the removal uses itself
    at = os.open(folder, os.O_RDONLY)
    for i in range(1200):  # a path of 6000 characters, deeper than Python recurses
        os.mkdir("dddd", dir_fd=at)
        os.mkdir("e", 0, dir_fd=at)
        os.close(os.open(f"file{i % 2}", os.O_CREAT | os.O_WRONLY, dir_fd=at))
        below = os.open("dddd", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    os.close(at)
    scratch_folder.remove(str(folder))
    assert list(tmp_path.iterdir()) == [outside]
    assert (outside / "file").read_text() == "precious"


def test_empty_folders_are_removed_without_a_look_into_each(tmp_path, monkeypatch):
    """4,000 of them, opened one by one, took longer to remove than a program may run."""
    folder, opened, real = tmp_path / "folder", [], os.open
    for i in range(50):
        (folder / f"a{i}").mkdir(parents=True)
        (folder / "full" / f"b{i}").mkdir(parents=True)
    monkeypatch.setattr(os, "open", lambda path, *args, **kwargs: opened.append(path) or real(path, *args, **kwargs))
    scratch_folder.remove(str(folder))
    assert opened == [str(folder), "full"]
    assert not folder.exists()


def test_an_owner_without_privileges_removes_folders_without_permissions():
    folder = tempfile.mkdtemp()
    child = os.fork()
    if not child:  # no test may go on in this process
        left = True
        try:
            os.chmod(folder, 0o777)
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(isolation.NOBODY)
                os.setuid(isolation.NOBODY)
            inner = os.path.join(folder, "own")
            os.makedirs(f"{inner}/a/b")
            Path(inner, "a", "file").touch()
            for name in (f"{inner}/a/b", f"{inner}/a"):
                os.chmod(name, 0)
            scratch_folder.remove(inner)
            left = os.path.exists(inner)
        finally:
            os._exit(left)
    assert os.waitpid(child, 0)[1] == 0
    os.rmdir(folder)
