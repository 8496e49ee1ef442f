// AVX2, FMA and F16C. This file is compiled for them: call it only through `kernels`, which asks the CPU first.
#include "svf_cpu.h"
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>

#include "rows.h"

namespace t2cpu {
namespace {

struct Avx2 {
  static constexpr const char* name = "avx2";
  static constexpr int lanes = 8;
  static constexpr int rows[TILE] = {8, 4, 3, 3, 2, 2, 1, 1};  // sums, weights and one x in 16 registers
  using Float = __m256;
  static Float zero() { return _mm256_setzero_ps(); }
  static Float load(const float* p) { return _mm256_loadu_ps(p); }
  static Float load(const Bf16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static Float load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static Float load(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static void store(float* p, Float f) { _mm256_storeu_ps(p, f); }
  static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  // Always four at a time, so that each sum is added up in the same order in any position.
  static void sums(Float a, Float b, Float c, Float d, float* out) {
    const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
  }
};

}  // namespace

const Kernels* avx2() { return table<Avx2>(); }

}  // namespace t2cpu
#else
namespace t2cpu {
const Kernels* avx2() { return nullptr; }
}  // namespace t2cpu
#endif
