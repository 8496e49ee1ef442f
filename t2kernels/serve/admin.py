"""Experts at run time: uploaded, taken from the folder, replaced, removed. Each step is whole or leaves everything as it was."""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from ..storage import TEMPORARY
from .errors import APIError, bad
from .experts import Experts, Version
from .limits import discard

if TYPE_CHECKING:
    from .app import Service


def add_routes(app: FastAPI, service: Service) -> None:
    experts, lock = service.experts, asyncio.Lock()

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
        temporary = place.with_name(f".{uuid.uuid4().hex}{TEMPORARY}")
        try:
            await _receive(http, temporary)
            async with lock:
                experts.check_new(name, replace)
                if place.exists() and name not in experts.current and not replace:
                    raise APIError(
                        409, f"the experts folder holds a file {place.name!r}; add replace=true to overwrite it", "expert_exists", "name"
                    )
                version = await asyncio.to_thread(_read, experts, name, temporary)
                try:
                    os.replace(temporary, place)
                except OSError as error:
                    experts.discard(version)
                    raise _not_stored(error) from None
                experts.publish(version)
        finally:
            temporary.unlink(missing_ok=True)
        return JSONResponse(_shown(version), 201)

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
        asked = json.loads(await http.body())
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
        raise bad("the body is empty: send the expert's .safetensors file, as with curl --data-binary @math.safetensors", code="bad_expert")


def _not_stored(error: OSError) -> APIError:
    return APIError(507, f"the expert could not be stored ({error.strerror}); nothing has changed", "not_stored")
