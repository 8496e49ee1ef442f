// AVX-512 with bf16 instructions. This file is compiled for them: call it only through `kernels`, which asks the CPU
// first.
#include "svf_cpu.h"
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && \
    defined(__AVX512BF16__)
#include <algorithm>

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

// Numbers that share 4 bytes stay together: as `columns_of` in fp32, of half as many columns.
void pack(const void* w, int64_t stride, int rows, int64_t K, float* out) {
  const Bf16* row[16];
  for (int r = 0; r < rows; r += 16) {
    for (int i = 0; i < 16; ++i) row[i] = static_cast<const Bf16*>(w) + (r + i < rows ? r + i : rows - 1) * stride;
    for (int64_t k = 0; k < K; k += 8) {
      const int n = int(std::min<int64_t>(8, K - k));
      __m512 v[4];
      T2_UNROLL for (int i = 0; i < 4; ++i)
        v[i] = Avx512::quarters(row[i] + k, row[4 + i] + k, row[8 + i] + k, row[12 + i] + k, n * int(sizeof(Bf16)));
      Avx512::transpose(v);
      for (int j = 0; 2 * j < n; ++j) _mm512_storeu_ps(out + (k / 2 + j) * BLOCK + r, v[j]);
    }
  }
}

// whole: rows == BLOCK
template <int T, bool whole>
void add_by(const float* w, int64_t K, const uint16_t* g, int64_t stride_g, int rows, const Bf16* base,
            int64_t stride_base, const Bf16* bias, Bf16* y, int64_t stride_y) {
  constexpr int V = BLOCK / 16;
  __m512 sum[T][V];
  T2_UNROLL for (int t = 0; t < T; ++t) T2_UNROLL for (int v = 0; v < V; ++v) sum[t][v] = _mm512_setzero_ps();
  if (base) {  // of the next tokens: no unit of the CPU sees rows so far apart coming
    T2_UNROLL for (int t = 0; t < T; ++t) {
      const char* next = reinterpret_cast<const char*>(base + (T + t) * stride_base);
      _mm_prefetch(next, _MM_HINT_T0), _mm_prefetch(next + 64, _MM_HINT_T0);
    }
  }
  for (int64_t k = 0; k < K; k += 2, w += BLOCK) {
    __m512bh u[V];
    T2_UNROLL for (int v = 0; v < V; ++v) u[v] = __m512bh(_mm512_loadu_si512(w + 16 * v));
    T2_UNROLL for (int t = 0; t < T; ++t) {
      int two;
      std::memcpy(&two, g + t * stride_g + k, sizeof two);
      const __m512bh x = __m512bh(_mm512_set1_epi32(two));
      T2_UNROLL for (int v = 0; v < V; ++v) sum[t][v] = _mm512_dpbf16_ps(sum[t][v], u[v], x);
    }
  }
  T2_UNROLL for (int v = 0; v < V; ++v) {
    const __mmask16 mask = whole ? __mmask16(-1) : __mmask16((1u << std::clamp(rows - 16 * v, 0, 16)) - 1);
    const auto load = [&](const Bf16* p) __attribute__((always_inline)) {
      return whole ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)) : _mm256_maskz_loadu_epi16(mask, p);
    };
    const auto widened = [](__m256i b) __attribute__((always_inline)) {
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
    };
    T2_UNROLL for (int t = 0; t < T; ++t) {
      __m512 s = sum[t][v];
      if (bias) s = _mm512_add_ps(s, widened(load(bias + 16 * v)));
      __m256i out;
      if (base) {
        const __m256i b = load(base + t * stride_base + 16 * v);
        const __mmask16 changed = _mm512_cmp_ps_mask(s, _mm512_setzero_ps(), _CMP_NEQ_UQ);  // else the bits of base
        out = _mm256_mask_blend_epi16(changed, b, __m256i(_mm512_cvtneps_pbh(_mm512_add_ps(widened(b), s))));
      } else {
        out = __m256i(_mm512_cvtneps_pbh(s));
      }
      Bf16* to = y + t * stride_y + 16 * v;
      if (whole) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), out);
      else _mm256_mask_storeu_epi16(to, mask, out);
    }
  }
}

template <bool whole>
void add_whole(const float* w, int64_t K, const uint16_t* g, int64_t stride_g, int T, int rows, const void* base,
               int64_t stride_base, const void* bias, void* y, int64_t stride_y) {
  using F = void (*)(const float*, int64_t, const uint16_t*, int64_t, int, const Bf16*, int64_t, const Bf16*, Bf16*,
                     int64_t);
  static constexpr F by[TILE] = {add_by<1, whole>, add_by<2, whole>, add_by<3, whole>, add_by<4, whole>,
                                 add_by<5, whole>, add_by<6, whole>, add_by<7, whole>, add_by<8, whole>};
  by[T - 1](w, K, g, stride_g, rows, static_cast<const Bf16*>(base), stride_base, static_cast<const Bf16*>(bias),
            static_cast<Bf16*>(y), stride_y);
}

void add(const float* w, int64_t K, const uint16_t* g, int64_t stride_g, int T, int rows, const void* base,
         int64_t stride_base, const void* bias, void* y, int64_t stride_y) {
  const auto f = rows == BLOCK ? add_whole<true> : add_whole<false>;
  f(w, K, g, stride_g, T, rows, base, stride_base, bias, y, stride_y);
}

}  // namespace

const Kernels* avx512_bf16() {
  static const Kernels all = [] {
    Kernels k = *avx512();
    k.name = "avx512_bf16", k.pairs = pairs, k.pack = pack, k.add = add;
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
