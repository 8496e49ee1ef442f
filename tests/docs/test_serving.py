"""Pages on serving: their commands run as they stand, with a small model of random weights in place of the one from the
hub, and with the built-in one."""

import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from t2kernels import tiny
from tests.helpers.commandline import t2_
from tests.helpers.serving import KEY, Process

openai = pytest.importorskip("openai")
ROOT = Path(__file__).parents[2]
HOW_TO = (ROOT / "docs" / "howto" / "serve.md").read_text()
REFERENCE = (ROOT / "docs" / "reference" / "server.md").read_text()
ENGINES = (ROOT / "docs" / "howto" / "other-engines.md").read_text()
COMMANDS = re.findall(r"^t2 .*", re.search(r"three experts\n\n```\n(.*?)```", HOW_TO, re.DOTALL).group(1), re.MULTILINE)
REPLACED = {
    "meta-llama/Llama-3.1-8B": "{model}",
    "--task gsm8k": "--task math",
    "--task mbpp": "--task code",
    "--task arc_easy": "--task reason",
}


def random_llama(folder):
    tiny_config = LlamaConfig.from_pretrained(tiny.path())
    torch.manual_seed(0)
    changes = dict(
        hidden_size=256,
        intermediate_size=320,
        num_hidden_layers=2,
        num_key_value_heads=2,
        num_attention_heads=8,
        head_dim=32,
    )
    LlamaForCausalLM(LlamaConfig(**{**tiny_config.to_dict(), **changes})).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((tiny.path() / file).read_bytes())
    return folder


@pytest.mark.parametrize("which", ["built-in", "random"])
def test_five_commands(which, tmp_path, monkeypatch):
    assert len(COMMANDS) == 5
    monkeypatch.chdir(tmp_path)
    model = tiny.path() if which == "built-in" else random_llama(tmp_path / "llama")
    *before, serve = [shlex.split(_replaced(c, model)) for c in COMMANDS]
    for _, verb, *args in before:
        short = ["--steps", "1", "--batch", "4", "-n", "4"] if verb == "train" else []
        t2_(verb, *args, *short)
    _, verb, *args = serve
    assert verb == "serve"
    server = Process(args, tmp_path / "log")
    try:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
        assert {m.id for m in client.models.list()} == {model.name, "math", "code", "science"}
        for name in ("math", "code", "science", model.name):
            answer = client.chat.completions.create(
                model=name, messages=[{"role": "user", "content": "47+8+6?"}], max_tokens=4
            )
            assert answer.usage.completion_tokens >= 1
    finally:
        server.kill()
    assert "rows of" in (tmp_path / "log").read_text()


def _replaced(command, model):
    for old, new in REPLACED.items():
        command = command.replace(old, new.format(model=model))
    return command


def test_what_a_row_costs():
    """The table's counts, from the shapes of Llama-3-8B."""
    layer = dict(
        q=(4096, 4096),
        k=(1024, 4096),
        v=(1024, 4096),
        o=(4096, 4096),
        gate=(14336, 4096),
        up=(14336, 4096),
        down=(4096, 14336),
    )
    for words, rank in (("delta, rank 128", 128), ("delta, rank 256", 256), ("factored, every component", 10**9)):
        numbers = 32 * sum(min(*shape, rank) for shape in layer.values())
        row = re.search(rf"\| {words} \| ([\d,]+) \| ([\d.]+) MB \| (\d+) MB \|", REFERENCE).groups()
        assert int(row[0].replace(",", "")) == numbers
        assert float(row[1]) == pytest.approx(numbers * 4 / 1e6, abs=0.05)
        assert float(row[2]) == pytest.approx(64 * numbers * 4 / 1e6, abs=0.6)
    assert f"{16 * 32 * sum(m + n for m, n in layer.values()):,}" == "41,943,040"


def test_the_custom_linear_method():
    example = runpy.run_path(str(ROOT / "examples" / "custom_linear_method.py"))
    assert example["main"]() < 1e-5
    code = re.search(r"```python\n(def apply.*?)```", ENGINES, re.DOTALL).group(1)
    source = (ROOT / "examples" / "custom_linear_method.py").read_text()
    for line in code.splitlines():
        assert line.partition("  #")[0].strip() in source
