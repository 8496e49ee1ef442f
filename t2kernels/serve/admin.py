"""Routes that add, replace, make and remove experts at run time. Each call does all of its work or changes nothing."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from t2kernels.serve.experts.folder import read
from t2kernels.serve.experts.registry import Version
from t2kernels.serve.http.access import facts_of
from t2kernels.serve.http.errors import APIError, bad
from t2kernels.serve.http.limits import discard
from t2kernels.storage import parse_json, temporary_beside

from .searches import FewShotRequest, FewShotSearch
from .service import Service


def add_routes(app: FastAPI, service: Service) -> None:
    """Add the routes under /v1/experts to an application."""
    experts, folder, lock = service.experts, service.folder, asyncio.Lock()
    search = FewShotSearch(service, service.settings.search_seconds)

    def check_place(name: str, replace: bool) -> Path:
        """The path of a new expert's file. Raises APIError if neither the name nor the file may be replaced."""
        experts.check_new(name, replace)
        place = folder.place(name)
        if place.exists() and name not in experts.current and not replace:
            message = f"the experts folder has a file {place.name!r}; add replace=true to overwrite it"
            raise APIError(409, message, "expert_exists", "name")
        return place

    async def publish(name: str, replace: bool, admit: Callable[[], Version], store: Callable[[], object]) -> Version:
        """Add an expert to the bank, store its file, and serve it under the name: all three or none."""
        async with lock:
            check_place(name, replace)
            version = await asyncio.to_thread(admit)
            try:
                await asyncio.to_thread(store)
            except OSError as error:
                experts.discard(version.key)
                raise _not_stored(error) from None
            experts.publish(version)
        return version

    @app.get("/v1/experts")
    async def list_experts() -> dict[str, Any]:
        return {"object": "list", "data": [_describe(v) for v in experts.current.values()]}

    @app.post("/v1/experts", status_code=201)
    async def add(http: Request, name: str | None = None, replace: bool = False) -> JSONResponse:
        """Add an expert. The body is its file, with ?name= and ?replace=true in the address.

        Or the body is JSON: {"name": ..., "file": ..., "replace": ...}, with the bare name of a file or an adapter in
        the experts folder.
        """
        service.engine.check_open()
        facts_of(http.scope).said["name"] = name
        if http.headers.get("content-type", "").partition(";")[0].strip() == "application/json":
            body = await _json(http)
            name = body.get("name", name)
            facts_of(http.scope).said |= {"name": str(name), "file": str(body.get("file", ""))}
            source = folder.file(body.get("file", f"{name}.safetensors"))
            replace = body.get("replace", replace) is True
            experts.check_name(name)
            async with lock:
                experts.check_new(name, replace)
                version = await asyncio.to_thread(lambda: experts.admit(name, read(source)))
                experts.publish(version)
            return JSONResponse(_describe(version), 201)
        try:
            experts.check_name(name)
            experts.check_new(name, replace)
            place = folder.place(name)
        except APIError:
            await discard(http.receive)
            raise
        temporary = temporary_beside(place)
        try:
            await _receive(http, temporary)
            version = await publish(
                name, replace, lambda: experts.admit(name, read(temporary)), lambda: os.replace(temporary, place)
            )
        finally:
            temporary.unlink(missing_ok=True)
        return JSONResponse(_describe(version), 201)

    @app.post("/v1/experts/{name}/few-shot", status_code=201)
    async def few_shot(name: str, request: FewShotRequest) -> JSONResponse:
        """Find the mixture of experts that does best on the examples, store it in the experts folder, and serve it."""
        service.engine.check_open()
        place = check_place(experts.check_name(name), request.replace)
        expert, facts = await search.run(name, request)
        version = await publish(name, request.replace, lambda: experts.admit(name, expert), lambda: expert.save(place))
        return JSONResponse({**_describe(version), "few_shot": facts}, 201)

    @app.delete("/v1/experts/{name}")
    async def remove(name: str, file: bool = False) -> dict[str, Any]:
        """Stop serving an expert. Requests that use it keep it to their end. ?file=true also deletes its file."""
        async with lock:
            if file and folder.has_adapter(name):
                message = f"file: the folder of the adapter {name!r} is not deleted here; remove it by hand"
                raise bad(message, "file")
            experts.remove(name)
            service.metrics.forget(name)
            if file:
                folder.delete(name)
        return {"id": name, "object": "expert", "deleted": True}


def _describe(version: Version) -> dict[str, Any]:
    """The expert object of the API."""
    told = ("task", "base_model", "created_by", *(("kind", "rank") if version.adapter else ()))
    facts = {k: version.manifest[k] for k in told if k in version.manifest}
    return {
        "id": version.name,
        "object": "expert",
        "created": version.created,
        "digest": version.digest,
        "numbers": version.numbers,
        **facts,
    }


async def _json(http: Request) -> dict[str, Any]:
    try:
        body = parse_json(await http.body())
    except ValueError:
        body = None
    if not isinstance(body, dict) or not isinstance(body.get("file", ""), str):
        raise bad('the body is not a JSON object such as {"name": "math", "file": "math.safetensors"}')
    return body


async def _receive(http: Request, place: Path) -> None:
    """Write the body to a new file. Raises APIError: 400 the body is empty, 507 it cannot be stored."""
    size = 0
    try:
        with open(place, "xb") as file:
            async for piece in http.stream():
                size += len(piece)
                file.write(piece)
            file.flush()
            await asyncio.to_thread(os.fsync, file.fileno())  # seconds on a slow disk
    except ClientDisconnect:
        raise APIError(499, "the client has hung up") from None
    except OSError as error:
        raise _not_stored(error) from None
    if not size:
        raise bad(
            "the body is empty: send the expert's .safetensors file, as with curl --data-binary @math.safetensors",
            code="bad_expert",
        )


def _not_stored(error: OSError) -> APIError:
    return APIError(507, f"the expert could not be stored ({error.strerror}); nothing has changed", "not_stored")
