"""Experts at run time: uploaded, taken from the folder, replaced, removed. Each step is whole or leaves everything as it was."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from t2kernels.serve.http.errors import APIError, bad
from t2kernels.serve.http.limits import discard
from t2kernels.storage import parse_json, temporary_beside

from .registry import Experts, Version
from .searches import FewShotRequest, FewShots

if TYPE_CHECKING:
    from .app import Service


def add_routes(app: FastAPI, service: Service) -> None:
    experts, lock = service.experts, asyncio.Lock()
    few_shots = FewShots(service, service.settings.search_seconds)

    def check_place(name: str, replace: bool) -> Path:
        """Where the expert's file goes. Raises APIError if nothing may go there."""
        place = experts.home() / f"{name}.safetensors"
        experts.check_new(name, replace)
        if place.exists() and name not in experts.current and not replace:
            raise APIError(
                409,
                f"the experts folder holds a file {place.name!r}; add replace=true to overwrite it",
                "expert_exists",
                "name",
            )
        return place

    async def publish(name: str, replace: bool, admit: Callable[[], Version], store: Callable[[], Any]) -> Version:
        """Take an expert into the bank, store its file, and let the name stand for it; all of it or nothing."""
        async with lock:
            check_place(name, replace)
            version = await asyncio.to_thread(admit)
            try:
                await asyncio.to_thread(store)
            except OSError as error:
                experts.discard(version)
                raise _not_stored(error) from None
            experts.publish(version)
        return version

    @app.get("/v1/experts")
    async def listed() -> dict:
        return {"object": "list", "data": [_shown(v) for v in experts.current.values()]}

    @app.post("/v1/experts", status_code=201)
    async def add(http: Request, name: str | None = None, replace: bool = False) -> JSONResponse:
        """The file itself as the body, with ?name=; or JSON {"name": ..., "file": a name inside the experts folder}. ?replace=true replaces."""
        service.engine.check_open()
        if http.headers.get("content-type", "").partition(";")[0].strip() == "application/json":
            asked = await _json(http)
            name = asked.get("name", name)
            source = experts.file(asked.get("file", f"{name}.safetensors"))
            replace = asked.get("replace", replace) is True
            experts.check_name(name)
            async with lock:
                experts.check_new(name, replace)
                version = await asyncio.to_thread(_read, experts, name, source)
                experts.publish(version)
            return JSONResponse(_shown(version), 201)
        try:
            experts.check_name(name)
            experts.check_new(name, replace)
            place = experts.home() / f"{name}.safetensors"
        except APIError:
            await discard(http.receive)
            raise
        temporary = temporary_beside(place)
        try:
            await _receive(http, temporary)
            version = await publish(
                name, replace, lambda: _read(experts, name, temporary), lambda: os.replace(temporary, place)
            )
        finally:
            temporary.unlink(missing_ok=True)
        return JSONResponse(_shown(version), 201)

    @app.post("/v1/experts/{name}/few-shot", status_code=201)
    async def few_shot(name: str, asked: FewShotRequest) -> JSONResponse:
        """Make the mixture of experts that does best on the examples, store it in the experts folder, and serve it."""
        service.engine.check_open()
        place = check_place(experts.check_name(name), asked.replace)
        expert, said = await few_shots.make(name, asked)
        version = await publish(name, asked.replace, lambda: experts.admit(name, expert), lambda: expert.save(place))
        return JSONResponse({**_shown(version), "few_shot": said}, 201)

    @app.delete("/v1/experts/{name}")
    async def remove(name: str, file: bool = False) -> dict:
        """Requests that have it keep it to their end. ?file=true deletes the file too, if it is in the experts folder."""
        async with lock:
            experts.remove(name)
            service.metrics.forget(name)
            if file and experts.folder is not None:
                (experts.folder / f"{name}.safetensors").unlink(missing_ok=True)
        return {"id": name, "object": "expert", "deleted": True}


def _shown(version: Version) -> dict:
    facts = {k: version.manifest[k] for k in ("task", "base_model", "created_by") if k in version.manifest}
    return {
        "id": version.name,
        "object": "expert",
        "created": version.created,
        "digest": version.digest,
        "numbers": version.numbers,
        **facts,
    }


def _read(experts: Experts, name: str, path: Path) -> Version:
    return experts.admit(name, experts.read(path))


async def _json(http: Request) -> dict:
    try:
        asked = parse_json(await http.body())
    except ValueError:
        asked = None
    if not isinstance(asked, dict) or not isinstance(asked.get("file", ""), str):
        raise bad('the body is no JSON object such as {"name": "math", "file": "math.safetensors"}')
    return asked


async def _receive(http: Request, place: Path) -> None:
    """Write the body to a new file. Raises APIError: 400 nothing came, 507 it cannot be stored."""
    size = 0
    try:
        with open(place, "xb") as file:
            async for piece in http.stream():
                size += len(piece)
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
    except ClientDisconnect:
        raise APIError(499, "the client has gone") from None
    except OSError as error:
        raise _not_stored(error) from None
    if not size:
        raise bad(
            "the body is empty: send the expert's .safetensors file, as with curl --data-binary @math.safetensors",
            code="bad_expert",
        )


def _not_stored(error: OSError) -> APIError:
    return APIError(507, f"the expert could not be stored ({error.strerror}); nothing has changed", "not_stored")
