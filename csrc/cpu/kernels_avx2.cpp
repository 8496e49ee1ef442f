// AVX2, FMA and F16C. This file is compiled for them: call it only through `kernels`, which asks the CPU first.
#include "svf_cpu.h"
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>

#include "rows.h"

namespace t2cpu {
namespace {

struct Avx2 {
  static constexpr const char* name = "avx2";
  static constexpr bool transposes = false;
  static constexpr int lanes = 8;
  static constexpr int rows[TILE] = {8, 4, 3, 3, 2, 2, 1, 1};  // sums, weights and one x in 16 registers
  using Float = __m256;
  using Value = Float;  // of the factors and of x
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
  static Float load(const float* p, int stride) {
    if (stride == 1) return load(p);
    const int s = stride;
    return _mm256_setr_ps(p[0], p[s], p[2 * s], p[3 * s], p[4 * s], p[5 * s], p[6 * s], p[7 * s]);
  }
  template <class W>
  static Float load_part(const W* p, int n) {
    return copied_part<Avx2>(p, n);
  }
  static void store(float* p, Float f) { _mm256_storeu_ps(p, f); }
  static void store(Bf16* p, Float f) {  // to nearest, ties to even; NaN stays NaN
    const __m256i b = _mm256_castps_si256(f), top = _mm256_srli_epi32(b, 16);
    const __m256i even = _mm256_add_epi32(_mm256_and_si256(top, _mm256_set1_epi32(1)), _mm256_set1_epi32(0x7fff));
    const __m256i near = _mm256_srli_epi32(_mm256_add_epi32(b, even), 16);
    const __m256i nan = _mm256_or_si256(top, _mm256_set1_epi32(0x40));
    const __m256i out = _mm256_blendv_epi8(near, nan, _mm256_castps_si256(_mm256_cmp_ps(f, f, _CMP_UNORD_Q)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_packus_epi32(_mm256_castsi256_si128(out), _mm256_extracti128_si256(out, 1)));
  }
  static void store(Half* p, Float f) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT));
  }
  static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  // base + f; the bits of base where f is 0
  static Float add_to(Float base, Float f) {
    return _mm256_blendv_ps(_mm256_add_ps(base, f), base, _mm256_cmp_ps(f, zero(), _CMP_EQ_OQ));
  }
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
