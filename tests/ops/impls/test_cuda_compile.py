"""The CUDA decode kernel compiled for Hopper, without a GPU: no spills, wide loads, W on its way before the wait, and
no load waited for at once.

`python tests/ops/impls/compile_cuda.py 80 90a 100` asks the same of every generation; it takes a minute.
"""

import pytest

from tests.ops.impls import compile_cuda
from tests.ops.impls.compile_cuda import CSRC, SOURCES, Instance

pytestmark = pytest.mark.skipif(compile_cuda.why_not() is not None, reason=f"compile checks: {compile_cuda.why_not()}")
PLAIN = Instance(product=0, weights=0, tiles=1, depth=4, resident=2)


def test_machine_code_is_what_the_source_promises(tmp_path):
    rows = compile_cuda.report("90a", [CSRC / "cuda" / name for name in SOURCES], tmp_path)
    for product in (0, 1):
        mine = [k for k in rows if k.product == product]
        alone, together = ([k for k in mine if (k.cluster > 1) == c] for c in (False, True))
        assert {(k.weights, k.tiles) for k in alone} == {(w, t) for w in range(2) for t in (1, 2, 4)}
        assert {(k.weights, k.tiles) for k in together} == {(w, t) for w in range(2) for t in (2, 4)}
    bad = [f"{kernel}: {row['faults']}" for kernel, row in rows.items() if row["faults"]]
    assert not bad, "\n".join(bad)


SPOILED = {
    "waited for in its own turn": (
        "        const int i = from + quarter * 16;\n        uint4 X",
        "        const Chunk used = ring[d];\n        load(ahead, a, warp, lane, ring[d]);\n"
        "        const int i = from + quarter * 16;\n        uint4 X",
    ),
    "not read 16 bytes a lane": ("ld.global.nc.L1::no_allocate.L2::256B.v4.u32", "ld.global.nc.v4.u32"),
    "before the wait stand 0 loads": ("  Chunk ring[DEPTH];", "  wait_for_kernel_before();\n  Chunk ring[DEPTH];"),
    "spills": ("__launch_bounds__(THREADS, RESIDENT)", "__launch_bounds__(THREADS, 4)"),
}


@pytest.mark.parametrize("fault", SPOILED)
def test_the_checks_can_fail(fault, tmp_path):
    old, new = SPOILED[fault]
    hits = 0
    for name in ("problem.h", "device.cuh", "parts.cuh", "skinny.cuh"):
        text = (CSRC / "cuda" / name).read_text()
        hits += text.count(old)
        text = text.replace(old, new)
        if fault == "waited for in its own turn":  # the load stands in `new` already
            text = text.replace("        load(ahead, a, warp, lane, ring[d]);\n        from", "        from")
            text = text.replace("multiply_wide<P>(sums, ring[d]", "multiply_wide<P>(sums, used")
        if fault == "before the wait stand 0 loads":
            text = text.replace("  wait_for_kernel_before();  // only", "  // only")
        (tmp_path / name).write_text(text)
    assert hits == 1
    source = tmp_path / "one.cu"
    source.write_text(
        '#include "skinny.cuh"\ntemplate __global__ void t2::skinny_kernel<t2::BF16, t2::WIDE, 1, 4, 2>('
        "const __grid_constant__ t2::Args);\n"
    )
    rows = compile_cuda.report("90a", [source], tmp_path)
    assert any(fault in said for said in rows[PLAIN]["faults"]), rows
