"""`serve`: vLLM's OpenAI-compatible server, with experts as the models that clients ask for."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from t2kernels.experts.expert import Expert
from t2kernels.experts.names import AUTO, BASE, MIX
from t2kernels.factors.checkpoint import name_of
from t2kernels.factors.store import Factors
from t2kernels.integrations.vllm.engine.build import origin_of
from t2kernels.integrations.vllm.engine.check import FACTS
from t2kernels.integrations.vllm.engine.model_folder import is_factored
from t2kernels.integrations.vllm.hooks import GROUP, check_version
from t2kernels.integrations.vllm.settings import engine_args


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
    """Serve a model with its experts until the process is told to stop; then finish what is running.

    Clients ask for model="math" (an expert), "base" (none), "mix:math=0.7,code=0.3" (made into a row on first use) or "auto" (chosen by the
    prompt). `/v1/load_lora_adapter` and `/v1/unload_lora_adapter` add and remove experts from the directories that the given ones lie in.

    model: a checkpoint's directory, or an id on the hub; one that `t2 decompose --format vllm` wrote is served in factored form
    experts: {name: file}; factors: directory that `t2 decompose` wrote for the model (delta form)
    rows: as in `engine_args`; options: further arguments of vLLM's own command line
    Raises UnsupportedVllm, ValueError or ExpertError before the engine is started, for what it could not serve.
    """
    check_version()
    roots = check_experts(model, experts, factors)
    arguments = command(model, host, port, api_key, rows, factors, options)
    allow_plugins()

    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    args = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
    validate_parsed_serve_args(args)
    args.t2kernels_roots, args.t2kernels_experts = roots, {n: str(p) for n, p in experts.items()}
    uvloop.run(run_server(args))


def check_experts(model: str, experts: Mapping[str, Path], factors: str | Path | None) -> list[Path]:
    """The directories that the experts lie in. Raises ValueError or ExpertError for a name or a file that cannot be served with these factors."""
    for name in experts:
        if not name or name in (AUTO, BASE) or name.startswith(MIX) or "=" in name or "," in name:
            raise ValueError(
                f"an expert cannot be called {name!r} here: the name has a meaning already, or holds '=' or ','"
            )
    place = Path(model).expanduser() / FACTS if factors is None else Path(factors).expanduser()
    if factors is None and not is_factored(model):
        raise ValueError(
            f"{model} is no factored checkpoint: pass factors, the directory that `t2 decompose {model} --out DIR` writes"
        )
    origin = origin_of(Factors.load(place))
    for path in experts.values():
        Expert.load(path).check(origin)
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
    """The arguments of vLLM's server."""
    engine = engine_args(factors=factors, rows=rows)
    out = ["--model", str(model), "--served-model-name", name_of(model)[0], BASE, "--host", host, "--port", str(port)]
    out += ["--enable-lora", "--max-loras", str(engine["max_loras"]), "--max-cpu-loras", str(engine["max_cpu_loras"])]
    out += ["--additional-config", json.dumps(engine["additional_config"])]
    out += ["--shutdown-timeout", "30"]  # seconds that running requests have to end
    if api_key:
        out += ["--api-key", api_key]
    return [*out, *options]


def allow_plugins() -> None:
    """Name this package in VLLM_PLUGINS, without which vLLM loads no endpoint plugin, beside every plugin that it would have loaded."""
    given = os.environ.get("VLLM_PLUGINS")
    names = [p.name for p in metadata.entry_points(group=GROUP)] if given is None else given.split(",")
    os.environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*names, "t2kernels"]))
