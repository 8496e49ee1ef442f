// bf16 products with sums in fp32, by AVX512-BF16. This file is compiled for it: call it only through `products`.
#include "products.h"
#if defined(__AVX512BF16__)
#include <immintrin.h>

#include "tiles.h"

namespace t2cpu {
namespace {

struct Pairs {
  using Item = uint32_t;
  using Number = float;
  using Vector = __m512;
  using Packed = __m512i;
  static constexpr int lanes = 16, pair = 2;
  static constexpr int64_t depth = 1024;
  static uint32_t item(Bf16 a, Bf16 b) { return a.bits | uint32_t(b.bits) << 16; }
  static __m512 zero() { return _mm512_setzero_ps(); }
  static __m512i load(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static __m512i all(uint32_t i) { return _mm512_set1_epi32(int(i)); }
  static __m512 fma(__m512i a, __m512i b, __m512 c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
  static void store(float* p, __m512 f, bool add) {
    _mm512_storeu_ps(p, add ? _mm512_add_ps(_mm512_loadu_ps(p), f) : f);
  }
};

}  // namespace

const Products* products_avx512bf16(int sum) { return sum == PAIRS ? Tiles<Pairs>::table() : nullptr; }

}  // namespace t2cpu
#else
namespace t2cpu {
const Products* products_avx512bf16(int) { return nullptr; }
}  // namespace t2cpu
#endif
