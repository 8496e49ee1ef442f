"""Compile the Triton kernels ahead of time, without a GPU, as they are launched for Llama-3 shapes, and print what the
machine code holds.

    python tests/ops/impls/compile_kernels.py ARCH [--all | --bad]     ARCH: 80, 90 or 100

It prints a JSON object for each compiled kernel, with its faults.

Launches are built from tensors without data, by the code that launches on a GPU. It must run without TRITON_INTERPRET.
"""

import json
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from t2kernels.ops.impls.triton import backward as triton_backward
from t2kernels.ops.impls.triton import launch_pair as triton_launch
from t2kernels.ops.impls.triton import token_scores
from t2kernels.ops.impls.triton.common import Launch, products
from t2kernels.ops.tuning.tiles import Tiles, shared_bytes, tiles

BF16, FP16, FP32, INT8 = torch.bfloat16, torch.float16, torch.float32, torch.int8
TYPES = {FP32: "*fp32", BF16: "*bf16", FP16: "*fp16", INT8: "*i8", torch.int32: "*i32", torch.int64: "*i64"}
# (N, ranks, out sizes) of a group: q,k,v; o; gate,up; down. Factored with 3 % residual columns, and delta with 256
# components.
LLAMA_8B = [
    (4096, [1056], [4096]),
    (4096, [4224, 4224], [14336, 14336]),
    (14336, [4224], [4096]),
    (4096, [4224, 1056, 1056], [4096, 1024, 1024]),
]
LLAMA_70B = [
    (8192, [8448, 8448], [28672, 28672]),
    (28672, [8448], [8192]),
    (8192, [8448, 1056, 1056], [8192, 1024, 1024]),
]
DELTA = [
    (4096, [256] * 3, [4096, 1024, 1024]),
    (4096, [256], [4096]),
    (4096, [256] * 2, [14336] * 2),
    (14336, [256], [4096]),
]
DELTA_70B = [(8192, [256] * 3, [8192, 1024, 1024]), (8192, [512] * 2, [28672] * 2), (28672, [256], [8192])]

SKINNY = ("shrink_kernel", "expand_kernel", "swiglu_kernel")


def empty(*shape, dtype):
    return torch.empty(*shape, dtype=dtype, device="meta")


def launches(T, group, x_dtype, w_dtype, arch):
    """What `forward_pair` and `forward_swiglu` launch for a group."""
    N, ranks, outs = group
    C, delta = sum(ranks), max(ranks) <= 512
    x, scale, ids = empty(T, N, dtype=x_dtype), empty(8, C, dtype=FP32), empty(T, dtype=torch.int32)
    Us = [empty(M, R, dtype=w_dtype) for M, R in zip(outs, ranks, strict=True)]
    first = tiles("shrink", T, C, N, x_dtype, w_dtype, arch)
    g = empty(first.split, T, C, dtype=FP32) if first.split > 1 else empty(T, C, dtype=products(x_dtype, w_dtype)[0])
    yield triton_launch.shrink_launch(x, empty(C, N, dtype=w_dtype), scale, ids, 1, g, first, arch)
    ys, none = [empty(T, M, dtype=x_dtype) for M in outs], [None] * len(outs)
    second = tiles("expand", T, sum(outs), max(ranks), x_dtype, w_dtype, arch, parts=first.split)
    yield triton_launch.expand_launch(
        g, Us, ys if delta else none, none, ys, second, arch, *((scale, ids) if first.split > 1 else ())
    )
    if len(outs) == 2:
        second = tiles("swiglu", T, outs[0], max(ranks), x_dtype, w_dtype, arch, parts=first.split)
        yield triton_launch.swiglu_launch(
            g, Us, ys if delta else none, none, ys[0], second, arch, *((scale, ids) if first.split > 1 else ())
        )


def elementwise(x_dtype, arch):
    T, C, E = 4096, 4096, 8
    h, scale, ids = empty(T, C, dtype=x_dtype), empty(E, C, dtype=FP32), empty(T, dtype=torch.int32)
    yield triton_backward.scale_rows_launch(
        h, scale, ids, 1, h, tiles("scale_rows", T, C, 1, x_dtype, x_dtype, arch), arch
    )
    small = [empty(n, dtype=torch.int32) for n in (T, T, E + 1, E)]
    parts, tile = triton_backward.Segments(*small), tiles("backward", T, C, 1, x_dtype, x_dtype, arch)
    yield triton_backward.backward_launch(h, h, scale, ids, 1, parts, h, scale, tile, arch)
    yield triton_backward.sum_slots_launch(empty(T, C, dtype=FP32), parts, 1, scale, tile.BT, arch)


def loss(dtype, base):
    """What the loss of a training step launches on logits of Llama-3's vocabulary."""
    T, V = 256, 128256
    x, row, tokens = empty(T, V, dtype=dtype), empty(T, dtype=FP32), empty(T, 1, dtype=torch.int64)
    read = token_scores.Read(row, row if base else None, row, row if base else None)
    q, g = (x, row) if base else (None, None)
    yield token_scores.forward_launch(x, q, read, 0.7, True)
    yield token_scores.backward_launch(x, q, read, tokens, empty(T, 1, dtype=FP32), row, g, x, 0.7, True)


def every_launch(arch, everything):
    """What `tiles` chooses for one group each of the shapes that differ: what make test compiles. Or for all shapes and
    dtypes."""
    if everything:
        for T in (1, 32, 64, 128):
            for x_dtype, w_dtype in ((BF16, BF16), (BF16, INT8), (FP16, INT8)):
                for group in (*LLAMA_8B, *LLAMA_70B, *DELTA, *DELTA_70B):
                    yield from launches(T, group, x_dtype, w_dtype, arch)
        yield from launches(4, DELTA[0], FP32, FP32, arch)
        yield from elementwise(FP16, arch)
    else:
        o, gate_up, down, qkv = LLAMA_8B
        yield from launches(1, DELTA[0], BF16, BF16, arch)
        yield from launches(32, DELTA[0], BF16, INT8, arch)
        yield from launches(1, gate_up, BF16, INT8, arch)
        yield from launches(128, gate_up, BF16, BF16, arch)
        yield from list(launches(128, down, BF16, INT8, arch))[1:]
        yield from list(launches(1, qkv, FP16, INT8, arch))[1:]
        yield from list(launches(1, o, BF16, FP16, arch))[:1]
        yield from list(launches(32, o, FP16, BF16, arch))[1:]
        yield from list(launches(1, o, FP32, FP32, arch))[1:]
    yield from elementwise(BF16, arch)
    for dtype in (BF16, FP16, FP32) if everything else (BF16,):
        for base in (True, False):
            yield from loss(dtype, base)


def source(launch: Launch):
    """The compiler's input for a launch, with the hints that Triton's own launcher would give, and a key that tells two
    such inputs apart."""
    signature, constants, hints = {}, dict(launch.meta), {}
    runtime_only = {p.name for p in launch.kernel.params if p.do_not_specialize}
    for i, name in enumerate(launch.kernel.arg_names):
        value = launch.args.get(name)
        if (
            name in launch.meta
            or value is None
            or (value == 1 if isinstance(value, int) and name not in runtime_only else False)
        ):
            signature[name], constants[name] = "constexpr", launch.meta.get(name, value)
        elif isinstance(value, torch.Tensor):
            signature[name], hints[(i,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0 and name not in runtime_only:
                hints[(i,)] = [["tt.divisibility", 16]]
    key = repr((launch.kernel.fn.__name__, signature, constants, hints, launch.options))
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=hints), key


def disassemble(cubin: bytes) -> tuple[list[str], dict[str, int]]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-sass", "-res-usage", file.name], capture_output=True, text=True, check=True)
    # "/*0a10*/  @!P0 LDG.E.128 R4, ... ;" is an instruction, perhaps after a predicate
    ops = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text.stdout, re.M)
    usage = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", text.stdout + text.stderr)}
    return ops, usage


def faults(row: dict, ops: list[str], arch: tuple[int, int]) -> list[str]:
    """What is wrong with a kernel's machine code."""
    found = []
    if row["STACK"] or any(op.startswith(("LDL", "STL")) for op in ops):
        found.append(f"spills: {row['STACK']} bytes of stack at {row['REG']} registers")
    if row["shared"] > shared_bytes(arch):
        found.append(f"{row['shared']} bytes of shared memory, {shared_bytes(arch)} are there")
    wide = [op for op in ops if op.startswith("LDG") and ".128" in op]
    if row["kernel"] == "token_scores_backward_kernel" and row["REG"] * 256 > 65536 // 2:
        found.append(f"{row['REG']} registers: fewer than two programs a multiprocessor")
    if row["kernel"] not in SKINNY:
        return found if wide else [*found, "no 128-bit loads"]
    fp32 = "fp32" in (row["types"].get("x_ptr"), row["types"].get("y0"), row["types"].get("y_ptr"))
    # mma.sync takes any tile; from 64 rows on sm_90 has wgmma and sm_100 tcgen05.
    wanted = "HMMA" if arch[0] == 8 or row["BR"] < 64 else {9: "HGMMA", 10: "UTCHMMA"}[arch[0]]
    products = [i for i, op in enumerate(ops) if op.startswith("FFMA" if fp32 else wanted)]
    if not products:
        return [*found, f"no {wanted}"]
    narrow = {op for op in ops if op.startswith(("LDGSTS", "LDG.E.EF")) and ".128" not in op}
    if narrow:
        found.append(f"narrow loads of the factor or the activations: {', '.join(sorted(narrow))}")
    # F2F and I2F convert one number a lane at a quarter of the rate or less. After the sum, a few are nothing; I2F.RP
    # belongs to a division.
    slow = {op for op in ops[: products[-1]] if op.startswith(("F2F.", "I2F")) and not op.startswith("I2F.RP")}
    if slow and not fp32:
        found.append(f"slow conversions in the sum: {', '.join(sorted(slow))}")
    if arch[0] >= 9:
        # The factor (evict first) is asked for before the wait for the kernel before, and nothing else is.
        wait = ops.index("ACQBULK") if "ACQBULK" in ops else -1
        before = [op for op in ops[: max(wait, 0)] if op.startswith("LD") and not op.startswith(("LDC", "LDS"))]
        if wait < 0 or row["wait"] != 1:
            found.append("no griddepcontrol.wait")
        elif not before or any(".EF" not in op for op in before):
            found.append(f"loads before griddepcontrol.wait: {before}")
    return found


def compiled(launch: Launch, arch_number: int) -> dict:
    src, _ = source(launch)
    made = triton.compile(src, target=GPUTarget("cuda", arch_number, 32), options=launch.options)
    ops, usage = disassemble(made.asm["cubin"])
    types = {
        name: src.signature[name].strip("*")
        for name in ("x_ptr", "vt_ptr", "g_ptr", "u0", "y0", "y_ptr")
        if name in src.signature
    }
    meta = {k: v if isinstance(v, int | float) else str(v) for k, v in launch.meta.items()}
    row = dict(
        kernel=launch.kernel.fn.__name__, types=types, **meta, **launch.options, **usage, shared=made.metadata.shared
    )
    row["wait"] = made.asm["ptx"].count("griddepcontrol.wait")
    return {**row, "faults": faults(row, ops, (arch_number // 10, arch_number % 10))}


def bad_launches(arch):
    """Launches that must be found bad: a tile that spills; rows of 33 numbers, which no wide load fits."""
    x, scale, ids = empty(128, 4096, dtype=BF16), empty(8, 4096, dtype=FP32), empty(128, dtype=torch.int32)
    spills = Tiles(BR=128, BT=128, BK=128, split=1, warps=4, stages=2)
    yield triton_launch.shrink_launch(
        x, empty(4096, 4096, dtype=BF16), scale, ids, 1, empty(128, 4096, dtype=BF16), spills, arch
    )
    odd = Tiles(BR=32, BT=16, BK=32, split=1, warps=4, stages=2)
    yield triton_launch.shrink_launch(
        x[:8, :33].clone(), empty(64, 33, dtype=BF16), scale, ids, 1, empty(8, 64, dtype=BF16), odd, arch
    )


def main(arch_number: int, *options: str) -> None:
    warnings.simplefilter("ignore")
    arch, seen = (arch_number // 10, arch_number % 10), set()
    for launch in bad_launches(arch) if "--bad" in options else every_launch(arch, "--all" in options):
        key = source(launch)[1]
        if key not in seen:
            seen.add(key)
            print(json.dumps(compiled(launch, arch_number)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
