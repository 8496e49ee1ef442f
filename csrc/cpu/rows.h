// The kernels, written once over a vector type S of an instruction set. Each file that includes this is compiled for
// one instruction set. Everything is in an unnamed namespace: otherwise the linker might use code for a wide
// instruction set in place of the same function elsewhere.
#pragma once
#include <cstring>
#include <type_traits>

#include "floats.h"
#include "svf_cpu.h"

namespace t2cpu {
namespace {

// The first n < S::lanes numbers at p. Zeros stand for the memory behind them.
template <class S, class W>
typename S::Float copied_part(const W* p, int n) {
  W part[S::lanes] = {};
  std::memcpy(part, p, n * sizeof(W));
  return S::load(part);
}

#define T2_UNROLL _Pragma("GCC unroll 32")  // sums stay in registers only if every loop over them is unrolled

// x: fp32, padded with zeros to a whole vector, or W's own type
template <class S, class W, class X, int R, int T>
[[gnu::always_inline]] inline void tile(
    const W* const (&w)[R], int64_t K, const X* x, int64_t stride_x, float* out) {
  typename S::Float sum[(R * T + 3) / 4 * 4];
  T2_UNROLL for (auto& s : sum) s = S::zero();
  const auto step = [&](const auto& row, const auto& token) __attribute__((always_inline)) {
    typename S::Value v[R];
    T2_UNROLL for (int r = 0; r < R; ++r) v[r] = row(r);
    T2_UNROLL for (int t = 0; t < T; ++t) {
      const auto xv = token(x + t * stride_x);
      T2_UNROLL for (int r = 0; r < R; ++r) sum[r * T + t] = S::fma(v[r], xv, sum[r * T + t]);
    }
  };
  int64_t k = 0;
  for (; k + S::lanes <= K; k += S::lanes) {
    step([&](int r) { return S::load(w[r] + k); }, [&](const X* row) { return S::load(row + k); });
  }
  if (k < K) {
    step([&](int r) { return S::load_part(w[r] + k, int(K - k)); }, [&](const X* row) {
      if constexpr (std::is_same_v<X, float>) return S::load(row + k);
      else return S::load_part(row + k, int(K - k));
    });
  }
  T2_UNROLL for (int i = 0; i < R * T; i += 4) S::sums(sum[i], sum[i + 1], sum[i + 2], sum[i + 3], out + i);
}

template <class S, class W, class X, int T>
void rows_by(const W* w, int64_t stride, int rows, int64_t K, const X* x, int64_t stride_x, float* out) {
  constexpr int R = S::rows[T - 1];
  static_assert(BLOCK % R == 0);
  for (int r = 0; r < rows; r += R) {
    const W* row[R];
    // behind the last row, the last one again
    for (int i = 0; i < R; ++i) row[i] = w + (r + i < rows ? r + i : rows - 1) * stride;
    tile<S, W, X, R, T>(row, K, x, stride_x, out + r * T);
  }
}

template <class S, class W>
void columns_of(const W* w, int64_t stride, int rows, int64_t K, float* out) {
  constexpr int shared = 4 / sizeof(W), G = 4 * shared;  // numbers in 4 bytes, and in 16
  for (int r = 0; r < rows; r += S::lanes) {
    const W* row[S::lanes];
    for (int i = 0; i < S::lanes; ++i) row[i] = w + (r + i < rows ? r + i : rows - 1) * stride;
    for (int64_t k = 0; k < K; k += G) {
      typename S::Float v[4];
      const auto finish = [&](int n) __attribute__((always_inline)) {
        S::transpose(v);
        T2_UNROLL for (int j = 0; j < G; ++j) {
          if (j < n) S::store(out + (k + j) * BLOCK + r, S::part(v[j / shared], j % shared, w));
        }
      };
      if (K - k >= G) {
        T2_UNROLL for (int i = 0; i < 4; ++i)
          v[i] = S::quarters(row[i] + k, row[4 + i] + k, row[8 + i] + k, row[12 + i] + k);
        finish(G);
      } else {
        const int n = int(K - k);
        T2_UNROLL for (int i = 0; i < 4; ++i)
          v[i] = S::quarters(row[i] + k, row[4 + i] + k, row[8 + i] + k, row[12 + i] + k, n * int(sizeof(W)));
        finish(n);
      }
    }
  }
}

template <class S>
void columns(int dtype, const void* w, int64_t stride, int rows, int64_t K, float* out) {
  switch (dtype) {
    case F32: return columns_of<S>(static_cast<const float*>(w), stride, rows, K, out);
    case BF16: return columns_of<S>(static_cast<const Bf16*>(w), stride, rows, K, out);
    case F16: return columns_of<S>(static_cast<const Half*>(w), stride, rows, K, out);
    default: return columns_of<S>(static_cast<const int8_t*>(w), stride, rows, K, out);
  }
}

template <class S, int T>
void across_by(const float* w, int64_t K, const float* x, int64_t stride_x, float* out, const char* next,
               int64_t ahead) {
  constexpr int V = BLOCK / S::lanes;
  typename S::Float sum[V][T];
  T2_UNROLL for (int i = 0; i < V; ++i) T2_UNROLL for (int t = 0; t < T; ++t) sum[i][t] = S::zero();
  int64_t asked = 0;
  for (int64_t k = 0; k < K; ++k, w += BLOCK) {
    for (; next && asked < (k + 1) * ahead; asked += 64) __builtin_prefetch(next + asked);
    typename S::Float v[V];
    T2_UNROLL for (int i = 0; i < V; ++i) v[i] = S::load(w + i * S::lanes);
    T2_UNROLL for (int t = 0; t < T; ++t) {
      const auto xv = S::all(x[t * stride_x + k]);
      T2_UNROLL for (int i = 0; i < V; ++i) sum[i][t] = S::fma(v[i], xv, sum[i][t]);
    }
  }
  T2_UNROLL for (int t = 0; t < T; ++t) T2_UNROLL for (int i = 0; i < V; ++i)
    S::store(out + t * BLOCK + i * S::lanes, sum[i][t]);
}

template <class S>
void across(const float* w, int64_t K, const float* x, int64_t stride_x, int T, float* out, const char* next,
            int64_t ahead) {
  using F = void (*)(const float*, int64_t, const float*, int64_t, float*, const char*, int64_t);
  static constexpr F by[TILE] = {across_by<S, 1>, across_by<S, 2>, across_by<S, 3>, across_by<S, 4>,
                                 across_by<S, 5>, across_by<S, 6>, across_by<S, 7>, across_by<S, 8>};
  by[T - 1](w, K, x, stride_x, out, next, ahead);
}

template <class S, class W, class X>
void rows_of(const void* w, int64_t stride, int rows, int64_t K, const X* x, int64_t stride_x, int T, float* out) {
  using F = void (*)(const W*, int64_t, int, int64_t, const X*, int64_t, float*);
  static constexpr F by[TILE] = {rows_by<S, W, X, 1>, rows_by<S, W, X, 2>, rows_by<S, W, X, 3>, rows_by<S, W, X, 4>,
                                 rows_by<S, W, X, 5>, rows_by<S, W, X, 6>, rows_by<S, W, X, 7>, rows_by<S, W, X, 8>};
  by[T - 1](static_cast<const W*>(w), stride, rows, K, x, stride_x, out);
}

template <class S>
void dot(int dtype, const void* w, int64_t stride, int rows, int64_t K, const float* x, int64_t stride_x, int T,
         float* out) {
  switch (dtype) {
    case F32: return rows_of<S, float>(w, stride, rows, K, x, stride_x, T, out);
    case BF16: return rows_of<S, Bf16>(w, stride, rows, K, x, stride_x, T, out);
    case F16: return rows_of<S, Half>(w, stride, rows, K, x, stride_x, T, out);
    default: return rows_of<S, int8_t>(w, stride, rows, K, x, stride_x, T, out);
  }
}

template <class S, class X>
void widen_as(const X* in, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + S::lanes <= n; i += S::lanes) S::store(out + i, S::load(in + i));
  for (; i < n; ++i) out[i] = widened(in[i]);
}

template <class S>
void widen(int dtype, const void* in, int64_t n, float* out) {
  if (dtype == F32) std::memcpy(out, in, n * sizeof(float));
  else if (dtype == BF16) widen_as<S>(static_cast<const Bf16*>(in), n, out);
  else widen_as<S>(static_cast<const Half*>(in), n, out);
}

template <class S, class X>
void narrow_as(const float* sum, int stride, int n, const X* base, const X* bias, X* y) {
  int i = 0;
  for (; i + S::lanes <= n; i += S::lanes) {
    auto v = S::load(sum + i * stride, stride);
    if (bias) v = S::add(v, S::load(bias + i));
    if (base) v = S::add_to(S::load(base + i), v);
    S::store(y + i, v);
  }
  for (; i < n; ++i) {
    float v = sum[i * stride];
    if (bias) v += widened(bias[i]);
    if (base) v = v == 0 ? widened(base[i]) : v + widened(base[i]);  // 0 added: the bits of base, -0 too
    y[i] = narrowed<X>(v);
  }
}

template <class S>
void narrow(int dtype, const float* sum, int stride, int n, const void* base, const void* bias, void* y) {
  const auto as = [&](auto* out) {
    using X = std::remove_pointer_t<decltype(out)>;
    narrow_as<S>(sum, stride, n, static_cast<const X*>(base), static_cast<const X*>(bias), out);
  };
  if (dtype == F32) as(static_cast<float*>(y));
  else if (dtype == BF16) as(static_cast<Bf16*>(y));
  else as(static_cast<Half*>(y));
}

template <class S>
const Kernels* table() {
  if constexpr (S::transposes) {
    static constexpr Kernels all{S::name, widen<S>, dot<S>, columns<S>, across<S>, narrow<S>};
    return &all;
  } else {
    static constexpr Kernels all{S::name, widen<S>, dot<S>, nullptr, nullptr, narrow<S>};
    return &all;
  }
}

}  // namespace
}  // namespace t2cpu
