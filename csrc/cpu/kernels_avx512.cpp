// AVX-512 (F, BW, DQ, VL). This file is compiled for it: call it only through `kernels`, which asks the CPU first.
#include "svf_cpu.h"
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "avx512.h"

namespace t2cpu {
const Kernels* avx512() { return table<Avx512>(); }
}  // namespace t2cpu
#else
namespace t2cpu {
const Kernels* avx512() { return nullptr; }
}  // namespace t2cpu
#endif
