"""Files are complete or absent, and what a killed process leaves is removed."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from t2kernels import storage

WRITER = """
import sys, time
from pathlib import Path
from t2kernels import storage
def write(temporary):
    temporary.write_text("half")
    print("begun", flush=True)
    time.sleep(1000)
storage._replace(sys.argv[1], write)
"""


@pytest.fixture
def writer(tmp_path):
    """A process in the middle of a write to `tmp_path`/file."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "file")], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"begun\n"
    yield process
    process.kill()
    process.communicate()


def temporaries(folder) -> list:
    return list(folder.glob(f".*{storage.TEMPORARY}"))


def test_tensors_and_metadata_come_back(tmp_path):
    path = tmp_path / "new" / "x.safetensors"
    storage.write_tensors(path, {"a": torch.arange(4.0)}, {"b": [1, "é"]})
    assert load_file(path)["a"].tolist() == [0, 1, 2, 3]
    assert storage.header(path) == {"b": [1, "é"]}
    assert storage.read_json(storage.write_json(tmp_path / "x.json", {"c": 1}), "a test") == {"c": 1}
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["new", "x.json", "x.safetensors"]


def test_leftovers_of_a_killed_process_are_removed_by_the_next_write(tmp_path, writer):
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    assert len(temporaries(tmp_path)) == 1
    storage.write_json(tmp_path / "other.json", {})
    assert [p.name for p in tmp_path.iterdir()] == ["other.json"]


def test_a_file_that_is_still_written_stays(tmp_path, writer):
    (file,) = temporaries(tmp_path)
    storage.write_json(tmp_path / "other.json", {})
    assert file.exists()


def test_a_write_that_fails_says_where_and_leaves_the_old_file(tmp_path):
    path = storage.write_json(tmp_path / "x.json", {"old": 1})

    def fail(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"could not write .*x\.json .*an older file there is untouched") as error:
        storage._replace(path, fail)
    assert error.value.errno == 28
    assert storage.read_json(path, "a test") == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match="could not write"):
        storage.write_json(tmp_path / ("n" * 300), {})


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "x.json is not a test: "), ("[1]", "it holds a JSON list"), ("[" * 100_000, "nested more than 64 deep")],
)
def test_json_that_is_not_an_object(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        storage.read_json(tmp_path / "x.json", "a test")
