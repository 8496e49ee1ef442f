"""Experts on the Hugging Face hub: one file each, fetched through the hub's cache, and a model card.

The hub's address is that of huggingface_hub (HF_ENDPOINT), as are its cache (HF_HOME) and its token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t2kernels import HubError, one_line
from t2kernels.tasks.hub.network import unreachable

FILE = "expert.safetensors"
"""The file of an expert in a repository, unless another is named."""
CARD = "README.md"
_ADDRESS = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(?P<file>\w[\w.-]*(?:/\w[\w.-]*)*))?")


def address(text: str) -> tuple[str, str] | None:
    """(repository, file) of "user/repo" or "user/repo:file"; None for any other text, and for a path.

    "a/b" is a path if there is a folder "a" here. ".safetensors" is added to the file if it is missing.
    """
    found = _ADDRESS.fullmatch(text)
    if found is None or (found["file"] is None and Path(text).parent.exists()):
        return None
    file = found["file"] or FILE
    return found["repo"], file if file.endswith(".safetensors") else f"{file}.safetensors"


def fetch(repo: str, file: str, revision: str | None = None) -> Path:
    """The local file of a file in a repository, from the hub or from its cache.

    revision: a branch, a tag or a commit; None: the newest
    Without a network the file of the cache is used. Raises HubError.
    """
    from huggingface_hub import hf_hub_download

    why = unreachable()
    try:
        options: dict[str, Any] = {"revision": revision, "local_files_only": why is not None}
        return Path(hf_hub_download(repo, file, **options))
    except Exception as e:  # offline, gated, missing, interrupted: each is another class of hub, HTTP or OS error
        at = f"{repo}:{file}" + (f" ({revision})" if revision else "")
        reason = f"{why}, and it was not downloaded before" if why else one_line(e).rstrip(".")
        raise HubError(
            f"{at}: there is no such file here, and the hub did not provide it: {reason}. "
            "Check the name, or give the path of an expert's file"
        ) from e


def upload(path: Path, repo: str, file: str, card: str, private: bool) -> str:
    """Upload an expert's file in one commit, and make the repository if there is none.

    card: the README, written for the default file, and for others if the repository has none
    private: whether a new repository is private
    Returns the address of the repository. Raises HubError.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    why = unreachable()
    if why is not None:
        raise HubError(f"{repo}: not uploaded, {why}")
    api = HfApi()
    try:
        url = str(api.create_repo(repo, private=private, exist_ok=True))
        files = [CommitOperationAdd(file, str(path))]
        if file == FILE or not api.file_exists(repo, CARD):
            files.append(CommitOperationAdd(CARD, card.encode()))
        api.create_commit(repo, files, commit_message=f"Upload {file}")
    except Exception as e:  # no token, no right, interrupted: each is another class of hub, HTTP or OS error
        raise HubError(f"{repo}: not uploaded, {one_line(e).rstrip('.')}. `hf auth login` stores a token") from e
    return url


def card(facts: Mapping[str, Any], ranks: Mapping[str, int], repo: str, file: str) -> str:
    """A model card from an expert's manifest.

    facts: the manifest; what it lacks is left out
    ranks: {matrix: numbers of z}
    """
    name, base = str(facts.get("name") or repo.rpartition("/")[2]), facts.get("base_model")
    head: dict[str, Any] = {"library_name": "t2kernels", "tags": ["svf", "transformer2", "t2kernels"]}
    if isinstance(base, str) and _ADDRESS.fullmatch(base):  # the hub refuses a card whose base model is no id
        head["base_model"] = base
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items())  # JSON is YAML
    per = sorted(set(ranks.values()))
    table = {
        "base model": base,
        "revision": facts.get("revision"),
        "task": facts.get("task"),
        "numbers": f"{sum(ranks.values()):,} in {len(ranks)} matrices",
        "rank": f"{per[0]}" if len(per) == 1 else f"{per[0]} to {per[-1]}",
        **_accuracy(facts),
    }
    rows = "\n".join(f"| {key} | {_cell(value)} |" for key, value in table.items() if value is not None)
    where = repo if file == FILE else f"{repo}:{file}"
    return f"""---
{front}
---

# {_cell(name)}

An SVF expert (Transformer², [arXiv 2501.06252](https://arxiv.org/abs/2501.06252)): it rescales the singular values of
the base model's weights, W' = U diag(sigma * z) Vᵀ.

| | |
|---|---|
{rows}

```python
import t2kernels as t2
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(base or "BASE MODEL")!r})
bank = t2.patch_model(model)
bank.add("mine", {where!r})  # then model.generate(..., experts="mine")
```

Engines without t2kernels: `t2 export {where} DIR --to lora`, or `--to merged`.
"""


def _accuracy(facts: Mapping[str, Any]) -> dict[str, str]:
    """The accuracy before and after training, as `t2 train` or `SVFTrainer` recorded it."""
    test = facts.get("test")
    test = test if isinstance(test, Mapping) else facts
    found = [test.get(f"accuracy_{when}") for when in ("before", "after")]
    if not all(isinstance(a, int | float) for a in found):
        return {}
    count = f" on {test['problems']:,} problems" if isinstance(test.get("problems"), int) else ""
    before, after = (f"{a:.1%}" for a in found)
    return {"accuracy": f"{after}{count}; the base model {before}"}


def _cell(value: object) -> str:
    """A value for one cell of a table of Markdown, without HTML."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")
