// Vectors of AVX-512 (F, BW, DQ, VL) for rows.h. Include it only in files that are compiled for it.
#pragma once
#include <immintrin.h>

#include "rows.h"

namespace t2cpu {
namespace {

struct Avx512 {
  static constexpr const char* name = "avx512";
  static constexpr bool transposes = true;
  static constexpr int lanes = 16;
  static constexpr int rows[TILE] = {8, 8, 6, 6, 4, 4, 3, 3};  // sums, weights and one x in 32 registers
  using Float = __m512;
  using Value = Float;  // of the factors and of x
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
  static Float load(const float* p, int stride) {
    if (stride == 1) return load(p);
    const __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_i32gather_ps(_mm512_mullo_epi32(at, _mm512_set1_epi32(stride)), p, 4);
  }
  static __mmask16 first(int n) { return __mmask16((1u << n) - 1); }
  static Float load_part(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static Float load_part(const Bf16* p, int n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n), p)), 16));
  }
  static Float load_part(const Half* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p)); }
  static Float load_part(const int8_t* p, int n) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(n), p)));
  }
  static void store(float* p, Float f) { _mm512_storeu_ps(p, f); }
  static void store(Bf16* p, Float f) {  // to nearest, ties to even; NaN stays NaN
    const __m512i b = _mm512_castps_si512(f), top = _mm512_srli_epi32(b, 16);
    const __m512i even = _mm512_add_epi32(_mm512_and_si512(top, _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7fff));
    const __m512i near = _mm512_srli_epi32(_mm512_add_epi32(b, even), 16);
    const __m512i nan = _mm512_or_si512(top, _mm512_set1_epi32(0x40));
    const __m512i out = _mm512_mask_mov_epi32(near, _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q), nan);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(out));
  }
  static void store(Half* p, Float f) {
    const __m256i out = _mm512_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), out);
  }
  static Float all(float f) { return _mm512_set1_ps(f); }
  // Four numbers, of 4 bytes or so many smaller ones, of rows a, b, c and d in the quarters of a vector.
  static Float quarters(const void* a, const void* b, const void* c, const void* d) {
    const auto at = [](const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); };
    return joined(at(a), at(b), at(c), at(d));
  }
  static Float quarters(const void* a, const void* b, const void* c, const void* d, int bytes) {  // zeros behind them
    const auto at = [&](const void* p) { return _mm_maskz_loadu_epi8(__mmask16((1u << bytes) - 1), p); };
    return joined(at(a), at(b), at(c), at(d));
  }
  static Float joined(__m128i a, __m128i b, __m128i c, __m128i d) {
    const __m512i low = _mm512_inserti32x4(_mm512_castsi128_si512(a), b, 1);
    return _mm512_castsi512_ps(_mm512_inserti32x4(_mm512_inserti32x4(low, c, 2), d, 3));
  }
  static void transpose(Float (&r)[4]) {  // in each quarter
    const Float a = _mm512_unpacklo_ps(r[0], r[1]), b = _mm512_unpackhi_ps(r[0], r[1]);
    const Float c = _mm512_unpacklo_ps(r[2], r[3]), d = _mm512_unpackhi_ps(r[2], r[3]);
    r[0] = pairs<0>(a, c), r[1] = pairs<1>(a, c), r[2] = pairs<0>(b, d), r[3] = pairs<1>(b, d);
  }
  template <int high>
  static Float pairs(Float a, Float b) {
    const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
    return _mm512_castpd_ps(high ? _mm512_unpackhi_pd(x, y) : _mm512_unpacklo_pd(x, y));
  }
  // Number i of those that share 4 bytes, of each lane.
  static Float part(Float v, int, const float*) { return v; }
  static Float part(Float v, int i, const Bf16*) {
    const __m512i b = _mm512_castps_si512(v);
    return _mm512_castsi512_ps(i ? _mm512_and_si512(b, _mm512_set1_epi32(-0x10000)) : _mm512_slli_epi32(b, 16));
  }
  static Float part(Float v, int i, const Half*) {
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(v), 16 * i)));
  }
  static Float part(Float v, int i, const int8_t*) {
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(_mm512_castps_si512(v), 24 - 8 * i), 24));
  }
  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  // base + f; the bits of base where f is 0
  static Float add_to(Float base, Float f) {
    return _mm512_mask_add_ps(base, _mm512_cmp_ps_mask(f, zero(), _CMP_NEQ_UQ), base, f);
  }
  static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static __m256 half(Float f) { return _mm256_add_ps(_mm512_castps512_ps256(f), _mm512_extractf32x8_ps(f, 1)); }
  // Always four at a time, so that each sum is added up in the same order in any position.
  static void sums(Float a, Float b, Float c, Float d, float* out) {
    const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(half(a), half(b)), _mm256_hadd_ps(half(c), half(d)));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
  }
};

}  // namespace
}  // namespace t2cpu
