"""`t2 serve`: an OpenAI-compatible server with an expert for each request."""

from __future__ import annotations

import math
from pathlib import Path

import typer

from t2kernels import InputError, MissingFileError, PackageError
from t2kernels.cli import models
from t2kernels.cli.console import err
from t2kernels.cli.model_files import GGUF, locate

ENGINES: tuple[str, ...] = ("auto", "transformers", "vllm")

SHARED: frozenset[str] = frozenset(
    ("model", "experts", "host", "port", "api_key", "rows", "factors", "engine", "option", "rank", "form")
)
"""Parameters that both engines take. rank and form may be given with factors, which hold them already."""


def serve(
    context: typer.Context,
    model: str = typer.Argument(
        help="'tiny' (built in), the directory of a checkpoint, a .gguf file, or the id of a model on the hub.",
        show_default=False,
    ),
    experts: Path = typer.Option(
        None,
        help="Directory of experts: each .safetensors file is served under its name.  \\[default for tiny: its own]",
        show_default=False,
    ),
    host: str = typer.Option("127.0.0.1", help="Address to listen on."),
    port: int = typer.Option(8000, min=0, max=65535, help="Port to listen on; 0: any free one."),
    api_key: str = typer.Option(
        None, envvar="T2_API_KEY", help="Key that clients must send; without one everybody may ask.", show_default=False
    ),
    name: str = typer.Option(
        None, help="Name of the base model in the API.  \\[default: the last part of MODEL]", show_default=False
    ),
    rows: int = typer.Option(
        None,
        min=2,
        help="Rows of the tables with row 0, the base model; more experts take turns.  \\[default: 64]",
        show_default=False,
    ),
    route: str = typer.Option(
        None,
        help="How model='auto' chooses: a strategy by name, such as 'prompt', or the name of a classification expert.",
        show_default=False,
    ),
    margin: float = typer.Option(
        0.0, help="Nats by which an expert must lead for --route, else the base model answers."
    ),
    chat_template: Path = typer.Option(
        None, help="File with a chat template to use instead of the tokenizer's.", show_default=False
    ),
    engine: str = typer.Option("auto", help="transformers, vllm, or auto: vllm where it is installed."),
    option: list[str] = typer.Option(
        [], help="An option for vLLM, such as --option=--max-model-len=4096. May be repeated."
    ),
    kv_tokens: int = typer.Option(16384, min=64, help="Tokens of the KV cache, for all requests together."),
    page_size: int = typer.Option(16, min=4, help="Tokens of one block of the KV cache."),
    batch_tokens: int = typer.Option(512, min=16, help="Most tokens of one step; longer prompts are split."),
    max_running: int = typer.Option(64, min=1, help="Most requests that run at once."),
    max_waiting: int = typer.Option(512, min=0, help="Most requests that wait; more are answered with status 429."),
    max_upload: int = typer.Option(256, min=1, help="Largest size of an uploaded expert, in MiB."),
    drain: float = typer.Option(
        30.0, min=0, help="Seconds that running requests may still take when the server stops."
    ),
    log_level: str = typer.Option("info", help="Least level of the log: debug, info, warning or error."),
    keep_alive: int = typer.Option(
        75, min=1, help="Seconds after which an unused connection is closed; more than clients and proxies wait."
    ),
    max_connections: int = typer.Option(1000, min=1, help="Most connections at once; further ones get status 503."),
    allow_host: list[str] = typer.Option(
        [],
        help="Name that clients may call the server by, besides localhost; for a server without a key.",
        show_default=False,
    ),
    allow_origin: list[str] = typer.Option(
        [], help="Origin such as https://chat.example whose web pages may use the server.", show_default=False
    ),
    no_ui: bool = typer.Option(False, "--no-ui", help="Serve no playground at /."),
    targets: str = models.TargetsOption,
    rank: str = models.RankOption,
    form: str = models.FormOption,
    factors: str = models.FactorsOption,
    dtype: str = models.DtypeOption,
    device: str = models.DeviceOption,
) -> None:
    """Serve a model with its experts over OpenAI's API. The model of a request is the name of an expert.

    [dim]$[/] t2 serve tiny

    [dim]$[/] t2 serve meta-llama/Llama-3.1-8B-Instruct --experts experts --rank 256 --form delta --route prompt
    """
    if engine not in ENGINES:
        raise InputError(f"--engine {engine}: expected one of {', '.join(ENGINES)}")
    if not math.isfinite(margin):
        raise InputError(f"--margin {margin}: expected a finite number")
    if experts is not None and not experts.is_dir():
        raise MissingFileError(f"--experts {experts}: no such directory")
    if engine == "vllm" or (engine == "auto" and vllm_is_installed()):
        for other in context.params.keys() - SHARED:
            if context.get_parameter_source(other).name == "COMMANDLINE":
                raise InputError(
                    f"--{other.replace('_', '-')} is for --engine transformers; options of vLLM are passed as "
                    "--option=--NAME=VALUE"
                )
        if form not in ("auto", "delta" if factors else "factored"):
            raise InputError(
                f"--form {form} with --engine vllm: the form is delta with --factors, and factored without it"
            )
        _serve_vllm(model, experts, host, port, api_key, rows, factors, option)
        return
    if option:
        raise InputError("--option is for --engine vllm")
    try:
        from t2kernels.serve.engine.batching import BatchSettings, check_transformers
        from t2kernels.serve.experts.folder import ExpertFolder
        from t2kernels.serve.server import LEVELS, listen, run
        from t2kernels.serve.service import Service, Settings
    except ImportError as e:
        raise PackageError(f"t2 serve needs a web server: pip install 't2kernels[serve]' ({e})") from e
    if log_level not in LEVELS:
        raise InputError(f"--log-level {log_level}: expected one of {', '.join(LEVELS)}")
    check_transformers()
    locate(model)
    at = listen(host, port)  # before the model is loaded, so that a taken port is reported at once
    template = None if chat_template is None else _text(chat_template)
    tiny = model == models.TINY
    loaded = models.load(model, dtype, device)
    if template is not None:
        loaded.tokenizer.chat_template = template
    if experts is not None:
        ExpertFolder(experts).check(loaded.model, loaded.name, targets, factors)
    bank = models.patch(loaded, targets, rank, form, factors, rows or 64)
    settings = Settings(
        name=name or Path(model).name,
        experts=experts,
        api_key=api_key,
        route=route,
        margin=margin,
        tiny=tiny,
        batch=BatchSettings(page_size, kv_tokens, batch_tokens, min(max_running, batch_tokens)),
        max_running=max_running,
        max_waiting=max_waiting,
        upload=max_upload << 20,
        hosts=_hosts(host, api_key, allow_host),
        origins=tuple(allow_origin),
        ui=not no_ui,
    )
    service = Service(loaded.model, loaded.tokenizer, settings, _shipped(model) if experts is None else None)
    names = ", ".join(service.experts.current) or "none yet"
    row = sum(layer.scale[0].numel() * layer.scale.element_size() for layer, _ in bank.layers)
    err.print(f"{settings.name} on http://{host}:{port}/v1, experts: {names}", soft_wrap=True)
    if settings.ui:
        err.print(f"playground: http://{host}:{port}/", soft_wrap=True)
    err.print(f"{bank.rows} rows of {row / 1e3:,.0f} kB; {bank.describe()}", soft_wrap=True)
    run(service, at, drain, keep_alive, max_connections, log_level)


def _hosts(host: str, api_key: str | None, allowed: list[str]) -> tuple[str, ...]:
    """The hosts that a server answers to. A local one without a key answers to nobody who gives it another name."""
    local = ("localhost", "127.0.0.1", "[::1]")
    return (*local, *allowed) if api_key is None and host in (*local, "::1") else ()


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise InputError(f"{file} is not text in UTF-8: {e}") from None


def vllm_is_installed() -> bool:
    """True if vLLM can be used here."""
    from t2kernels.integrations.vllm.support import installed

    return installed() is not None


def _shipped(model: str) -> dict[str, Path]:
    from t2kernels import tiny

    return tiny.experts(model)


def _serve_vllm(
    model: str,
    experts: Path | None,
    host: str,
    port: int,
    api_key: str | None,
    rows: int | None,
    factors: str | None,
    option: list[str],
) -> None:
    if not vllm_is_installed():
        raise PackageError("--engine vllm: vllm is not installed here; install it, or use --engine transformers")
    from t2kernels.experts.exchange.peft_files import CONFIG
    from t2kernels.integrations.vllm.server import launch as vllm
    from t2kernels.tiny import smollm2

    named = _shipped(model) if experts is None else {}
    if experts is not None:
        named |= {path.stem: path for path in sorted(experts.glob("*.safetensors"))}
        named |= {path.parent.name: path.parent for path in sorted(experts.glob(f"*/{CONFIG}"))}
    if Path(model).suffix == GGUF or model == smollm2.NAME:
        raise InputError(f"--engine vllm: {model} is a GGUF file; give the directory of its original checkpoint")
    model = locate(model).source if model == models.TINY else model  # vLLM looks for any other model itself
    more = {} if rows is None else {"rows": rows}
    vllm.serve(model, named, host=host, port=port, api_key=api_key, factors=factors, options=tuple(option), **more)
