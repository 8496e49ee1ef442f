"""HTTP: the endpoint plugin `FrontEnd` of vLLM's server. vLLM loads it if VLLM_PLUGINS names it.

It answers `/v1/load_lora_adapter` and `/v1/unload_lora_adapter` in vLLM's place, takes experts as bytes at
`/v1/upload_lora_adapter?lora_name=NAME` (header x-digest), and replaces the models "auto" and
"mix:..." of a request by the name of a served expert, before vLLM sees it. `served.ServedExperts` does the work.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any

from t2kernels import InputError
from t2kernels.experts.names import AUTO, MIX
from t2kernels.integrations.vllm.support import asks_for_experts, takes_seeds

from .served import Refused, ServedExperts
from .uploads import Uploads

PATHS = ("/v1/completions", "/v1/chat/completions")
"""The requests whose model may be "auto" or a mixture."""
HEADER = b"x-expert"
"""The answer's header with the name of the expert that was chosen."""
KINDS: dict[HTTPStatus, str] = {
    HTTPStatus.BAD_REQUEST: "BadRequestError",
    HTTPStatus.FORBIDDEN: "PermissionDeniedError",
    HTTPStatus.NOT_FOUND: "NotFoundError",
}
"""The types of errors in OpenAI's API."""


class FrontEnd:
    """The entry point of `vllm.endpoint_plugins`. Methods as in `vllm.plugins.endpoint_plugins.interface`."""

    name: str = "t2kernels"
    required_tasks: tuple[str, ...] = ("generate",)

    def attach_router(self, app: Any) -> None:
        """Add the three routes and the middleware `Models` to a FastAPI app, before the server starts."""
        from fastapi import Request
        from fastapi.responses import JSONResponse

        async def answer(request: Request, do: Callable[[ServedExperts, dict[str, Any]], Awaitable[str]]) -> Any:
            try:
                body = await request.json()
                if not isinstance(body, dict):
                    raise InputError("wanted a JSON object")
                return JSONResponse({"message": await do(app.state.t2_experts, body)})
            except (ValueError, KeyError, TypeError) as e:
                return JSONResponse(
                    error(HTTPStatus.BAD_REQUEST, f"the body does not fit: {e!r}"), HTTPStatus.BAD_REQUEST
                )
            except Refused as e:
                return JSONResponse(error(e.status, str(e)), e.status)

        async def load(served: ServedExperts, body: dict[str, Any]) -> str:
            await served.load(str(body["lora_name"]), str(body["lora_path"]), bool(body.get("load_inplace")))
            return f"expert {body['lora_name']!r} is being served"

        async def unload(served: ServedExperts, body: dict[str, Any]) -> str:
            await served.unload(str(body["lora_name"]))
            await app.state.t2_uploads.sweep()
            return f"expert {body['lora_name']!r} is not served any more"

        async def load_route(request: Request):
            return await answer(request, load)

        async def unload_route(request: Request):
            return await answer(request, unload)

        async def upload_route(request: Request):
            try:
                name, wanted = request.query_params.get("lora_name", ""), request.headers.get("x-digest")
                digest = await app.state.t2_uploads.take(name, await request.body(), wanted)
            except Refused as e:
                return JSONResponse(error(e.status, str(e)), e.status)
            config = app.state.t2_experts.config
            facts = {"logprobs_mode": config.model_config.logprobs_mode, "takes_seeds": takes_seeds(config)}
            return JSONResponse({"message": f"expert {name!r} is served", "digest": digest, **facts})

        # FastAPI must find the class itself: this module's annotations are strings, and Request is a local name.
        for route in (load_route, unload_route, upload_route):
            route.__annotations__["request"] = Request
        app.post("/v1/load_lora_adapter")(load_route)
        app.post("/v1/unload_lora_adapter")(unload_route)
        app.post("/v1/upload_lora_adapter")(upload_route)
        app.add_middleware(Models)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Make `state.t2_experts`, and serve the experts that `launch.serve` was given. args: vLLM's command line.

        Raises ValueError, so that the server does not start, for an engine without experts or an unusable expert.
        """
        from t2kernels import tiny

        config = engine_client.vllm_config
        if not asks_for_experts(config) or config.lora_config is None:
            raise InputError(
                "VLLM_PLUGINS names t2kernels, but the engine is not configured with experts: "
                "use engine_args(...), or `t2 serve`"
            )
        given = getattr(args, "t2kernels_roots", None)
        modules = [Path(m.path).parent for m in args.lora_modules or []]
        built_in = Path(config.model_config.model).resolve() == tiny.path().resolve()
        state.t2_experts = ServedExperts(
            engine_client, state.openai_serving_models, config, modules if given is None else given, built_in
        )
        state.t2_uploads = Uploads(state.t2_experts)
        for name, path in getattr(args, "t2kernels_experts", {}).items():
            try:
                await state.t2_experts.load(name, path)
            except Refused as e:
                raise InputError(f"expert {name!r}: {e}") from None


class Models:
    """ASGI middleware: turns a request for "auto" or a mixture into one for a served expert.

    The answer's x-expert header names it.
    """

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle one request, as ASGI defines it."""
        if (
            scope["type"] != "http"
            or scope["method"] != "POST"
            or scope["path"].removeprefix(scope.get("root_path", "")) not in PATHS
        ):
            return await self.app(scope, receive, send)
        body = await _whole(receive)
        if body is None:
            return None  # the client has disconnected
        # Most requests name an expert: do not parse their bodies, vLLM does that.
        if AUTO.encode() not in body and MIX.encode() not in body:
            return await self.app(scope, _again(body, receive), send)
        data: Any = None
        try:
            data = json.loads(body)
            model = data.get("model") if isinstance(data, dict) else None
        except ValueError:
            model = None  # vLLM answers with the error
        if not isinstance(model, str) or not (model == AUTO or model.startswith(MIX)):
            return await self.app(scope, _again(body, receive), send)
        try:
            chosen = await scope["app"].state.t2_experts.resolve(model, data.get("messages", data.get("prompt")))
        except Refused as e:
            return await _respond(send, e.status, error(e.status, str(e)))
        body = json.dumps({**data, "model": chosen}).encode()
        headers = [(k, v) for k, v in scope["headers"] if k.lower() != b"content-length"]
        scope = {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}

        async def tell(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {
                    **message,
                    "headers": [*message.get("headers", []), (HEADER, chosen.encode("ascii", "replace"))],
                }
            await send(message)

        return await self.app(scope, _again(body, receive), tell)


def error(status: HTTPStatus, message: str) -> dict[str, Any]:
    """An error in the form of OpenAI's API."""
    kind = KINDS.get(status, "InternalServerError")
    return {"error": {"message": message, "type": kind, "param": "model", "code": int(status)}}


async def _whole(receive: Any) -> bytes | None:
    """A request's body; None if the client disconnects first."""
    parts = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


def _again(body: bytes, receive: Any) -> Any:
    """A `receive` that returns this body first, and then later messages, such as the client's disconnect."""
    given = False

    async def again() -> Any:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _respond(send: Any, status: HTTPStatus, content: dict[str, Any]) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": int(status), "headers": headers})
    await send({"type": "http.response.body", "body": body})
