// AVX-512 (F, BW, DQ, VL). This file is compiled for it: call it only through `kernels`, which asks the CPU first.
#include "svf_cpu.h"
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include <immintrin.h>

#include "rows.h"

namespace t2cpu {
namespace {

struct Avx512 {
  static constexpr const char* name = "avx512";
  static constexpr int lanes = 16;
  static constexpr int rows[TILE] = {8, 8, 6, 6, 4, 4, 3, 3};  // sums, weights and one x in 32 registers
  using Float = __m512;
  static Float zero() { return _mm512_setzero_ps(); }
  static Float load(const float* p) { return _mm512_loadu_ps(p); }
  static Float load(const Bf16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static Float load(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static Float load(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static void store(float* p, Float f) { _mm512_storeu_ps(p, f); }
  static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static __m256 half(Float f) { return _mm256_add_ps(_mm512_castps512_ps256(f), _mm512_extractf32x8_ps(f, 1)); }
  // Always four at a time, so that each sum is added up in the same order in any position.
  static void sums(Float a, Float b, Float c, Float d, float* out) {
    const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(half(a), half(b)), _mm256_hadd_ps(half(c), half(d)));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
  }
};

}  // namespace

const Kernels* avx512() { return table<Avx512>(); }

}  // namespace t2cpu
#else
namespace t2cpu {
const Kernels* avx512() { return nullptr; }
}  // namespace t2cpu
#endif
