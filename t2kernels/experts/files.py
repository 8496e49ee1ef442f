"""The file of an expert: z and sketch of each matrix in safetensors, a manifest in the header
(docs/reference/experts.md)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from t2kernels import printable
from t2kernels.factors import schema
from t2kernels.factors.identity import ExpertError
from t2kernels.storage import FileError, parse_json, read_tensors, why_unreadable, write_tensors

FORMAT = 1
SUFFIX = ".safetensors"
# The tensors that a file of this format may hold for a matrix. A later format may add kinds, for example an output
# scale "d". A file with an unknown kind is refused: an expert that lacks a part of itself is another expert.
KINDS = ("z", "sketch")
# The facts that the library reads. All others are free.
MANIFEST: schema.Schema = {
    "name?": schema.optional(schema.TEXT),
    "base_model?": schema.optional(schema.TEXT),
    "revision?": schema.optional(schema.TEXT),
    "fingerprint?": schema.DIGEST,
    "fingerprints?": schema.Each(schema.DIGEST),
    "created_by?": schema.TEXT,
}


def find_file(path: str | Path) -> Path | None:
    """The file of an expert, given with or without ".safetensors"; "~" is the home directory. None if there is none."""
    path = Path(path).expanduser()
    if not path.name:
        return None
    return next((p for p in (path, path.with_name(path.name + SUFFIX)) if p.is_file()), None)


def require_file(path: str | Path) -> Path:
    """`find_file`, but raises ExpertError if there is none."""
    found = find_file(path)
    if found is None:
        path = Path(path)
        where = "is a directory" if path.expanduser().is_dir() else "does not exist"
        raise ExpertError(
            f"{path} {where}, nor is there {path.name}{SUFFIX} beside it; wanted the file that Expert.save wrote"
        )
    return found


def write_file(
    path: str | Path, z: Mapping[str, Tensor], sketch: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> Path:
    """Write an expert's file, whole or not at all.

    path: ".safetensors" is added if it is missing
    z, sketch: {matrix: [k]}
    facts: the manifest

    Returns the file's path. Raises ExpertError for a manifest that is not JSON, OSError.
    """
    path = Path(path)
    path = path if path.suffix == SUFFIX else path.with_name(path.name + SUFFIX)
    tensors = {f"{n}.z": v for n, v in z.items()} | {f"{n}.sketch": s.half() for n, s in sketch.items()}
    try:
        facts = parse_json(json.dumps(dict(facts)))
    except (TypeError, ValueError, RecursionError) as e:
        raise ExpertError(f"{printable(path)}: not saved, its manifest is not JSON: {e}") from None
    facts = {"created_by": _version(), **facts, "format": FORMAT}
    check_manifest(facts, f"{printable(path)}: not saved")
    write_tensors(path, tensors, facts)
    return path


def check_manifest(facts: Mapping[str, Any], where: object) -> None:
    """Raise ExpertError, which names `where`, if a fact that the library reads is of a wrong kind."""
    schema.check(facts, MANIFEST, where, ExpertError, "make the expert again, or give it another manifest")


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """(z, sketch, manifest) from an expert's file.

    Raises ExpertError: a pickle (never loaded), a truncated or changed file (by its digest; files of older versions
    have none), another kind of file, a newer format.
    """
    try:
        tensors, facts = read_tensors(path)
    except SafetensorError as e:
        why = why_unreadable(path)
        advice = "Expert.from_sakana reads the release's files" if "pickle" in why else "copy or make it again"
        raise ExpertError(f"{path} is not an expert: {why} ({e}); {advice}") from None
    except FileError as e:
        raise ExpertError(
            f"{path}: it is damaged, its content is not one that Expert.save writes: {e}; copy or make it again"
        ) from None
    if facts is None:
        raise ExpertError(
            f"{path} is safetensors but not an expert: its header has no t2kernels manifest; Expert.save writes experts"
        )
    _check_format(path, facts)
    z: dict[str, Tensor] = {}
    sketch: dict[str, Tensor] = {}
    for key, t in tensors.items():
        name, _, kind = key.rpartition(".")
        if kind not in KINDS or not name:
            raise ExpertError(
                f"{path}: tensor {printable(key)!r} is of a kind that this version does not know ({', '.join(KINDS)}); "
                f"it was written by {facts.get('created_by', 'another version')}: update t2kernels"
            )
        if kind == "z" and t.dtype != torch.float32:
            raise ExpertError(
                f"{path}: {name}: z is {t.dtype}, an expert's file holds torch.float32; make the file with Expert.save"
            )
        (z if kind == "z" else sketch)[name] = t
    if orphans := sorted(set(sketch) - set(z)):
        raise ExpertError(f"{path}: {orphans[0]} has a sketch but no z; make the file again with Expert.save")
    return z, sketch, facts


def _check_format(path: Path, facts: dict[str, Any]) -> None:
    if "format" not in facts:
        raise ExpertError(f"{path} is not an expert: the manifest in its header is not one that Expert.save writes")
    if (found := facts.pop("format")) != FORMAT:
        by = facts.get("created_by")
        raise ExpertError(
            f"{path} has format {schema.shortened(found)}, written by {by if isinstance(by, str) else '?'}; "
            f"this version reads {FORMAT}: update t2kernels"
        )
    check_manifest(facts, path)


def _version() -> str:
    try:
        return f"t2kernels {metadata.version('t2kernels')}"
    except metadata.PackageNotFoundError:
        return "t2kernels"
