"""The examples of README.md run as they stand, with the built-in model in place of one from the hub."""

import re
import shutil
from pathlib import Path

import t2kernels as t2

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(t2.tiny.path().parent / "experts", tmp_path / "experts")
    code = [
        block.replace("meta-llama/Llama-3.1-8B", str(t2.tiny.path())).replace("max_steps=150", "max_steps=2")
        for block in BLOCKS
    ]
    assert sum(a != b for a, b in zip(code, BLOCKS, strict=True)) == 2  # both replacements were made
    names: dict = {}
    for block in code:
        exec(compile(block, "README.md", "exec"), names)
    assert names["out"].shape[0] == 3
    assert t2.Expert.load("experts/mine").numel == sum(names["bank"].matrices.values())
    assert "'47+8+6?" in capsys.readouterr().out


def test_the_example_is_short():
    lines = [line for line in BLOCKS[0].splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(lines) <= 10


def test_links_and_commands_exist():
    root = Path(__file__).parents[2]
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (root / link).is_file(), link
    targets = re.findall(r"^make ([\w-]+)", README, re.MULTILINE)
    makefile = (root / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in targets)
    assert targets
