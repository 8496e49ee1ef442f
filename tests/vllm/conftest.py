"""The tier that needs vLLM (make test-vllm). What its tests share stands in `worlds.py`."""

import os

# Before vLLM is imported, here and in the processes that it starts.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from importlib import metadata
from pathlib import Path

import pytest

from tests.vllm.worlds import World, make


def _installed(name: str) -> bool:
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False


# `make test` collects this folder in an environment without vLLM, where its tests cannot even be imported.
collect_ignore_glob = [] if _installed("vllm") or _installed("vllm-cpu") else ["test_*.py"]


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(item.fspath).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.vllm)


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    return make(tmp_path_factory.mktemp("world"))
