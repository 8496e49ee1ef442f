"""`serve`: start vLLM's OpenAI-compatible server with experts. Everything here runs before the server does.

It checks the experts, writes vLLM's command line, and names the plugin so that vLLM loads `front.FrontEnd`, which takes
over from there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from t2kernels import InputError
from t2kernels.experts.exchange.lora import LoraAdapter
from t2kernels.experts.exchange.peft_files import is_adapter
from t2kernels.experts.expert import Expert
from t2kernels.experts.names import AUTO, BASE, MIX
from t2kernels.factors.checkpoint import name_of
from t2kernels.factors.store import Factors
from t2kernels.integrations.vllm.api import engine_args
from t2kernels.integrations.vllm.constants import FACTS, GROUP
from t2kernels.integrations.vllm.engine.check import check_adapter, origin_of, shapes_of
from t2kernels.integrations.vllm.engine.model_folder import is_factored
from t2kernels.integrations.vllm.rollouts.memory import WORKER
from t2kernels.integrations.vllm.support import release


def serve(
    model: str,
    experts: Mapping[str, Path],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    rows: int = 8,
    factors: str | Path | None = None,
    options: Sequence[str] = (),
) -> None:
    """Serve a model with its experts until the process gets SIGTERM or SIGINT; then finish the running requests.

    Clients ask for model="math" (an expert), "base" (none), "mix:math=0.7,code=0.3" (made into a row on first use) or
    "auto" (chosen by the prompt). `/v1/load_lora_adapter` and `/v1/unload_lora_adapter` add and remove experts; files
    must lie in the directories of the given ones.

    model: a checkpoint's directory, or an id on the hub; one that `t2 decompose --format vllm` wrote is served in
        factored form
    experts: {name: file, or the folder of a LoRA adapter of PEFT}
    factors: directory that `t2 decompose` wrote for the model (delta form)
    api_key: which clients must send; None: none; rows: as in `engine_args`; options: further arguments of vLLM's own
        command line
    Raises, before the engine is started, UnsupportedVllm, or ValueError or ExpertError for what it could not serve.
    """
    vllm = release()
    roots = check_experts(model, experts, factors)
    arguments = command(model, host, port, api_key, rows, factors, options)
    allow_plugins()

    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    line: Any = import_module(vllm.command_line)
    args: Any = line.make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
    line.validate_parsed_serve_args(args)
    # `front.FrontEnd.init_state` gets these arguments, and reads these two.
    args.t2kernels_roots, args.t2kernels_experts = roots, {n: str(p) for n, p in experts.items()}
    uvloop.run(run_server(args))


def check_experts(model: str, experts: Mapping[str, Path], factors: str | Path | None) -> list[Path]:
    """Check that a model with these factors can serve the experts. Returns the directories that their files lie in.

    model, experts, factors: as in `serve`
    Raises ValueError for a name that is reserved or a model without factors, ExpertError for a file that is not an
    expert of this model.
    """
    for name in experts:
        if not name or name in (AUTO, BASE) or name.startswith(MIX) or "=" in name or "," in name:
            raise InputError(f"an expert cannot be called {name!r} here: the name is reserved, or has '=' or ',' in it")
    place = Path(model).expanduser() / FACTS if factors is None else Path(factors).expanduser()
    if factors is None and not is_factored(model):
        raise InputError(
            f"{model} is no factored checkpoint: pass factors=DIR, written by `t2 decompose {model} --out DIR`"
        )
    given = Factors.load(place)
    origin = origin_of(given)
    for path in experts.values():
        if is_adapter(path):
            check_adapter(LoraAdapter.load(path), shapes_of(given))
        else:
            Expert.load(Path(path)).check(origin)
    return sorted({Path(p).expanduser().resolve().parent for p in experts.values()})


def command(
    model: str,
    host: str,
    port: int,
    api_key: str | None,
    rows: int,
    factors: str | Path | None,
    options: Sequence[str],
) -> list[str]:
    """The arguments of vLLM's command line. All parameters are those of `serve`."""
    engine = engine_args(factors=factors, rows=rows)
    out = ["--model", str(model), "--served-model-name", name_of(model)[0], BASE, "--host", host, "--port", str(port)]
    out += ["--enable-lora", "--max-loras", str(engine["max_loras"]), "--max-cpu-loras", str(engine["max_cpu_loras"])]
    out += ["--additional-config", json.dumps(engine["additional_config"])]
    out += ["--worker-extension-cls", WORKER]
    out += ["--shutdown-timeout", "30"]  # seconds for running requests to finish
    if api_key:
        out += ["--api-key", api_key]
    return [*out, *options]


def allow_plugins() -> None:
    """Add this package to VLLM_PLUGINS.

    vLLM loads endpoint plugins only by name; the other plugins that it would load stay in the list.
    """
    given = os.environ.get("VLLM_PLUGINS")
    names = [p.name for p in metadata.entry_points(group=GROUP)] if given is None else given.split(",")
    os.environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*names, "t2kernels"]))
