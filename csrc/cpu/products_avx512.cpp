// Sums in fp32 and fp64 by AVX-512F. This file is compiled for it: call it only through `products`.
#include "products.h"
#if defined(__AVX512F__)
#include <immintrin.h>

#include "tiles.h"

namespace t2cpu {
namespace {

struct Floats {
  using Item = float;
  using Number = float;
  using Vector = __m512;
  using Packed = __m512;
  static constexpr int lanes = 16, pair = 1;
  static constexpr int64_t depth = 512;
  template <class X>
  static float item(X a, X) { return widened(a); }
  static __m512 zero() { return _mm512_setzero_ps(); }
  static __m512 load(const float* p) { return _mm512_loadu_ps(p); }
  static __m512 all(float f) { return _mm512_set1_ps(f); }
  static __m512 fma(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
  static void store(float* p, __m512 f, bool add) {
    _mm512_storeu_ps(p, add ? _mm512_add_ps(_mm512_loadu_ps(p), f) : f);
  }
};

struct Doubles {
  using Item = double;
  using Number = double;
  using Vector = __m512d;
  using Packed = __m512d;
  static constexpr int lanes = 8, pair = 1;
  static constexpr int64_t depth = 320;  // 288 rows of X take 740 KB, of the second cache's megabyte
  template <class X>
  static double item(X a, X) { return widened(a); }
  static double item(double a, double) { return a; }
  static __m512d zero() { return _mm512_setzero_pd(); }
  static __m512d load(const double* p) { return _mm512_loadu_pd(p); }
  static __m512d all(double f) { return _mm512_set1_pd(f); }
  static __m512d fma(__m512d a, __m512d b, __m512d c) { return _mm512_fmadd_pd(a, b, c); }
  static void store(double* p, __m512d f, bool add) {
    _mm512_storeu_pd(p, add ? _mm512_add_pd(_mm512_loadu_pd(p), f) : f);
  }
};

}  // namespace

const Products* products_avx512(int sum) {
  return sum == FLOATS ? Tiles<Floats>::table() : sum == DOUBLES ? Tiles<Doubles>::table() : nullptr;
}

}  // namespace t2cpu
#else
namespace t2cpu {
const Products* products_avx512(int) { return nullptr; }
}  // namespace t2cpu
#endif
