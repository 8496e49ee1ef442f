// Any CPU: vectors of eight as plain arrays, which the compiler maps to the vectors of the target.
#include "rows.h"

namespace t2cpu {
namespace {

struct Portable {
  static constexpr const char* name = "portable";
  static constexpr bool transposes = false;
  static constexpr int lanes = 8;
  static constexpr int rows[TILE] = {2, 1, 1, 1, 1, 1, 1, 1};
  struct Float {
    float v[lanes];
  };
  using Value = Float;  // of the factors and of x
  static Float zero() { return {}; }
  template <class W>
  static Float load(const W* p) {
    Float f;
    for (int i = 0; i < lanes; ++i) f.v[i] = widened(p[i]);
    return f;
  }
  static Float load(const float* p, int stride) {
    Float f;
    for (int i = 0; i < lanes; ++i) f.v[i] = p[i * stride];
    return f;
  }
  template <class W>
  static Float load_part(const W* p, int n) {
    return copied_part<Portable>(p, n);
  }
  template <class X>
  static void store(X* p, const Float& f) {
    for (int i = 0; i < lanes; ++i) p[i] = narrowed<X>(f.v[i]);
  }
  static Float add(Float a, const Float& b) {
    for (int i = 0; i < lanes; ++i) a.v[i] += b.v[i];
    return a;
  }
  // base + f; the bits of base where f is 0
  static Float add_to(Float base, const Float& f) {
    for (int i = 0; i < lanes; ++i) base.v[i] = f.v[i] == 0 ? base.v[i] : base.v[i] + f.v[i];
    return base;
  }
  static Float fma(const Float& a, const Float& b, Float c) {
    for (int i = 0; i < lanes; ++i) c.v[i] += a.v[i] * b.v[i];
    return c;
  }
  static float sum(const Float& f) {
    return ((f.v[0] + f.v[1]) + (f.v[2] + f.v[3])) + ((f.v[4] + f.v[5]) + (f.v[6] + f.v[7]));
  }
  static void sums(const Float& a, const Float& b, const Float& c, const Float& d, float* out) {
    out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
  }
};

}  // namespace

const Kernels* portable() { return table<Portable>(); }

}  // namespace t2cpu
