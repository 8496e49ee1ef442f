"""Compile the CUDA decode kernel without a GPU and read its machine code: what it must hold, and what it must not.

    python tests/ops/impls/compile_cuda.py ARCH...     80, 90a or 100: a line for each instance, with its faults

It wants nvcc, and cuobjdump, which comes with the toolkit and with Triton.
"""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).resolve().parents[3] / "csrc"
SOURCES = ("skinny_bf16.cu", "skinny_fp16.cu")
SHARED = {80: 163, 90: 227, 100: 227}  # KB a multiprocessor's blocks may have together
REGISTERS, THREADS = 65536, 256


class Instance(NamedTuple):
    """Template arguments of a `skinny_kernel`, or of a `cluster_kernel`, which is 4 chunks deep and alone on its
    multiprocessor."""

    product: int
    weights: int
    tiles: int
    depth: int
    resident: int
    cluster: int = 1


def tools() -> tuple[str | None, str | None]:
    """nvcc and cuobjdump, where they are."""
    toolkit = Path("/usr/local/cuda/bin")
    triton = importlib.util.find_spec("triton")
    places = [
        toolkit / "cuobjdump",
        *([Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"] if triton else []),
    ]
    nvcc = shutil.which("nvcc") or next((str(p) for p in [toolkit / "nvcc"] if p.is_file()), None)
    return nvcc, shutil.which("cuobjdump") or next((str(p) for p in places if p.is_file()), None)


def why_not() -> str | None:
    names = [name for name, found in zip(("nvcc", "cuobjdump"), tools(), strict=True) if found is None]
    return f"{' and '.join(names)} not found" if names else None


def compiled(source: Path, arch: str, folder: Path) -> str:
    """Disassembly and resource usage of everything in a source."""
    nvcc, cuobjdump = tools()
    cubin = folder / f"{source.stem}.{arch}.cubin"
    command = [
        nvcc,
        "-std=c++17",
        "-O3",
        "-cubin",
        f"-gencode=arch=compute_{arch},code=sm_{arch}",
        "-I",
        CSRC,
        source,
        "-o",
        cubin,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return subprocess.run([cuobjdump, "-sass", "-res-usage", cubin], capture_output=True, text=True, check=True).stdout


def kernels(text: str) -> dict[Instance, tuple[list[tuple[int, str]], dict[str, int]]]:
    """{instance: ((address, instruction) in order, resource usage)}."""
    found: dict[Instance, tuple[list, dict]] = {}

    def of(name: str):
        numbers = [int(n) for n in re.findall(r"(?:E|L[ib])(\d+)E", name[name.index("_kernelI") :])]
        clustered = "cluster_kernel" in name
        return found.setdefault(
            Instance(*numbers[:3], 4, 1, numbers[3]) if clustered else Instance(*numbers[:5]), ([], {})
        )

    current = None
    for line in text.splitlines():
        if at := re.search(r"Function :? ?(\S*(?:skinny|cluster)_kernel\w+):?", line):
            current = of(at[1])
        elif current and (usage := re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)):
            current[1].update({k: int(v) for k, v in usage})
        elif current and (op := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", line)):
            current[0].append((int(op[1], 16), op[2].strip()))
    return found


def name_of(instruction: str) -> str:
    """ "@!P0 LDG.E.128 R4, ..." is an LDG.E.128."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split(" ")[0]


def is_load_of_W(instruction: str) -> bool:
    return name_of(instruction).startswith("LDG") and ".CONSTANT" in instruction


def faults(kernel: Instance, code: list[tuple[int, str]], usage: dict[str, int], arch: int) -> list[str]:
    """What is wrong with the machine code of an instance."""
    found, ops = [], [name_of(i) for _, i in code]
    if usage["STACK"] or usage["LOCAL"] or any(op.startswith(("LDL", "STL")) for op in ops):
        found.append(f"spills: {usage['STACK']} bytes of stack at {usage['REG']} registers")
    if -(-usage["REG"] // 8) * 8 * THREADS * kernel.resident > REGISTERS:
        found.append(f"{usage['REG']} registers leave no room for {kernel.resident} blocks")
    if (usage["SHARED"] + 1024) * kernel.resident > SHARED[arch] * 1024:
        found.append(f"{usage['SHARED']} bytes of shared memory leave no room for {kernel.resident} blocks")

    loads = [i for i, (_, text) in enumerate(code) if is_load_of_W(text)]
    kinds = Counter(ops[i] for i in loads)
    into_L2 = ".LTC256B" if arch >= 90 else ".LTC"  # an A100 takes 128 bytes
    if any(".128" not in op or into_L2 not in op or ".NA" not in op for op in kinds):
        found.append(f"W is not read 16 bytes a lane, past L1: {dict(kinds)}")
    if len(loads) != 8 * kernel.depth:  # 4 a chunk, before the loop and in it
        found.append(f"{len(loads)} loads of W, not {8 * kernel.depth}")
    wanted = "HMMA.16816.F32" + (".BF16" if kernel.product == 0 else "")
    products = [i for i, op in enumerate(ops) if op == wanted]
    if not products or any(op.startswith(("HMMA", "HGMMA")) and op != wanted for op in ops):
        found.append(f"no {wanted}, or another")
    if not any(op == "LDG.E.128" for op in ops):
        found.append("x is not read 16 bytes a lane")
    if slow := {op for op in ops if op.startswith(("I2F", "F2F.", "I2FP"))} - {"F2F.F16.F32", "F2F.BF16.F32"}:
        found.append(f"slow conversions: {', '.join(sorted(slow))}")
    if products and loads:
        found += _waits(code, loads, products)
    if arch >= 90:
        found += _dependent_launch(kernel, ops, loads)
    if kernel.cluster > 1 and arch >= 90 and not {"UCGABAR_ARV", "UCGABAR_WAIT"} <= set(ops):
        found.append("no barrier of the cluster")
    return found


def _waits(code: list[tuple[int, str]], loads: list[int], products: list[int]) -> list[str]:
    """A chunk that is refilled in the loop must not be looked at before the loop comes round: that would wait for
    memory there and then."""
    inside = [i for i in loads if i > products[0]]
    ends = [
        i
        for i, (_, text) in enumerate(code)
        if name_of(text) == "BRA" and _target(text) <= code[products[0]][0] and inside and i > inside[-1]
    ]
    if not inside or not ends:
        return ["no loop over the ring was found"]
    for i in inside:
        first = int(re.search(r" R(\d+),", code[i][1])[1])
        mine = {f"R{first + n}" for n in range(4)}
        for _, text in code[i + 1 : ends[0]]:
            if mine & _read(text):
                return [f"a load of the ring is waited for in its own turn: {code[i][1]}; {text}"]
    return []


def _target(text: str) -> int:
    at = re.search(r"0x([0-9a-f]+)", text)
    return int(at[1], 16) if at else 1 << 40


def _read(text: str) -> set[str]:
    """Registers that an instruction reads, as far as MOV-like ones and products go."""
    words = re.sub(r"^@!?U?P\w+\s+", "", text).split(" ", 1)
    if len(words) < 2:
        return set()
    operands = words[1].split(",")
    stores = words[0].startswith(("ST", "RED", "ATOM"))
    read = operands if stores else operands[1:]
    found = set(re.findall(r"\bR\d+\b", ",".join(read)))
    if words[0].startswith("HMMA") and len(operands) > 1 and (a := re.search(r"R(\d+)", operands[1])):
        found |= {f"R{int(a[1]) + n}" for n in range(4)}
    return found


def _dependent_launch(kernel: Instance, ops: list[str], loads: list[int]) -> list[str]:
    """Before the wait for the kernel before stand the first loads of W, all of them, and no other load."""
    found, waits, triggers = (
        [],
        [i for i, op in enumerate(ops) if op == "ACQBULK"],
        [i for i, op in enumerate(ops) if op == "PREEXIT"],
    )
    if len(waits) != 1 or len(triggers) != 1:
        return [f"{len(waits)} griddepcontrol.wait and {len(triggers)} launch_dependents"]
    before = [i for i, op in enumerate(ops[: waits[0]]) if op.startswith("LD") and not op.startswith(("LDC", "LDS"))]
    if before != loads[: 4 * kernel.depth]:
        found.append(f"before the wait stand {len(before)} loads, not the first {4 * kernel.depth} of W")
    if triggers[0] > waits[0]:
        found.append("dependents are launched after the wait")
    if any(op.startswith(("ST", "RED", "ATOM")) for op in ops[: waits[0]]):
        found.append("something is written before the wait")
    return found


def report(arch: str, sources: list[Path], folder: Path) -> dict[Instance, dict]:
    """{instance: {"REG": ..., "faults": [...]}} of all kernels in the sources."""
    with ThreadPoolExecutor(2) as pool:
        texts = list(pool.map(lambda s: compiled(s, arch, folder), sources))
    number = int(arch.rstrip("af"))
    return {
        k: {**usage, "faults": faults(k, code, usage, number)}
        for text in texts
        for k, (code, usage) in kernels(text).items()
    }


def main(*archs: str) -> int:
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        for arch in archs:
            for kernel, row in report(arch, [CSRC / "cuda" / s for s in SOURCES], Path(folder)).items():
                print(json.dumps({"arch": arch, **kernel._asdict(), **row}), flush=True)
                bad += bool(row["faults"])
    return bad > 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
