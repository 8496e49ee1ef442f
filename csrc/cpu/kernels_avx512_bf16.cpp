// AVX-512 with bf16 instructions. This file is compiled for them: call it only through `kernels`, which asks the CPU
// first.
#include "svf_cpu.h"
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && \
    defined(__AVX512BF16__)
#include "avx512.h"

namespace t2cpu {
namespace {

// 32 numbers in bf16 at once: their products are exact, sums are fp32, and subnormal numbers count as 0.
struct Pairs : Avx512 {
  static constexpr int lanes = 32;
  using Value = __m512bh;
  static Value load(const Bf16* p) { return Value(_mm512_loadu_si512(p)); }
  static Value load_part(const Bf16* p, int n) { return Value(_mm512_maskz_loadu_epi16((1u << n) - 1, p)); }
  static Float fma(Value a, Value b, Float c) { return _mm512_dpbf16_ps(c, a, b); }
};

void pairs(const void* w, int64_t stride, int rows, int64_t K, const void* x, int64_t stride_x, int T, float* out) {
  rows_of<Pairs, Bf16>(w, stride, rows, K, static_cast<const Bf16*>(x), stride_x, T, out);
}

}  // namespace

const Kernels* avx512_bf16() {
  static const Kernels all = [] {
    Kernels k = *avx512();
    k.name = "avx512_bf16", k.pairs = pairs;
    return k;
  }();
  return &all;
}

}  // namespace t2cpu
#else
namespace t2cpu {
const Kernels* avx512_bf16() { return nullptr; }
}  // namespace t2cpu
#endif
