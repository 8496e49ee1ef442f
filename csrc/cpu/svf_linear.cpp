#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>

#include "svf_cpu.h"
#include "threads.h"

namespace t2cpu {
namespace {

// One thread works alone below this many microseconds. Two threads save half of them at best. If another process keeps
// the other core busy, waiting for its share took 4 to 16 ms (two cores of an AMD EPYC, load 4).
constexpr int64_t ALONE = 200;

// Keeps rows of x one cache line off a power of two, at which they would share the sets of a cache.
constexpr int64_t PAGE_OFFSET = LANE;

int64_t padded(int64_t K) { return (K + LANE - 1) / LANE * LANE + PAGE_OFFSET; }

const char* at(const void* p, int64_t offset, int dtype) {
  return static_cast<const char*>(p) + offset * size_of(dtype);
}

// Scratch of the calling thread, kept for its next call.
float* scratch(int64_t count) {
  struct Free {
    void operator()(float* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  thread_local std::unique_ptr<float, Free> buffer;
  thread_local int64_t size = 0;
  if (count > size) {
    buffer.reset();
    size = 0;
    buffer.reset(static_cast<float*>(::operator new(count * sizeof(float), std::align_val_t(64))));
    size = count;
  }
  return buffer.get();
}

struct Rows {  // [stride] fp32 a token, or bf16
  float* data;
  int64_t stride;
  bool halves = false;

  float* at(int64_t t, int64_t k = 0) const { return data + t * stride + k; }
  uint16_t* half_at(int64_t t, int64_t k = 0) const { return reinterpret_cast<uint16_t*>(data) + t * stride + k; }
  int64_t floats(int64_t T) const { return halves ? T * stride / 2 : T * stride; }
};

void clear_ends(Rows rows, int64_t T, int64_t K) {
  const int64_t numbers = padded(K) - PAGE_OFFSET - K;
  for (int64_t t = 0; t < T; ++t) {
    if (rows.halves) std::memset(rows.half_at(t, K), 0, numbers * sizeof(uint16_t));
    else std::memset(rows.at(t, K), 0, numbers * sizeof(float));
  }
}

void widen_rows(const Kernels& k, const void* x, int64_t stride_x, int dtype, int64_t T, int64_t N, Rows out) {
  for (int64_t t = 0; t < T; ++t) k.widen(dtype, at(x, t * stride_x, dtype), N, out.at(t));
  clear_ends(out, T, N);
}

template <class F>
void by_tiles(int64_t T, F f) {  // of equal size: 9 tokens are 5 and 4
  const int64_t tiles = (T + TILE - 1) / TILE;
  for (int64_t i = 0; i < tiles; ++i) f(T * i / tiles, int(T * (i + 1) / tiles - T * i / tiles));
}

// Blocks of rows that threads take one by one. If a thread is late, because its core is slow or busy, others take more.
struct Blocks {
  std::atomic<int64_t> taken{0}, done{0};

  // Calls f(member, first row, rows, part) for every block of each of `parts` that no other thread has taken. wait:
  // until the others are done.
  template <class Count, class F>
  void each(int members, Count rows_of, int64_t parts, bool wait, F f) {
    const auto blocks = [&](int i) { return (rows_of(i) + BLOCK - 1) / BLOCK; };
    int64_t all = 0, mine = 0;
    for (int i = 0; i < members; ++i) all += blocks(i);
    for (int64_t n; (n = taken.fetch_add(1, std::memory_order_relaxed)) < all * parts; ++mine) {
      int i = 0;
      int64_t b = n % all;
      for (; b >= blocks(i); ++i) b -= blocks(i);
      f(i, b * BLOCK, int(std::min<int64_t>(BLOCK, rows_of(i) - b * BLOCK)), n / all);
    }
    done.fetch_add(mine, std::memory_order_release);
    for (int spins = 0; wait && done.load(std::memory_order_acquire) < all * parts; ++spins)
      if (spins > 1000) sched_yield();
  }
};

// A round of tokens: x, and g of each member, as padded rows of fp32 (g in bf16 with `halves`). For one half of the op,
// in or out is null.
struct Round {
  const Kernels& k;
  const Shrink* in;
  const Expand* out;
  int members, dtype, x_dtype;
  int64_t first, T;
  Rows x, g[MEMBERS];
  Blocks shrinking, expanding;
};

// Whether the instructions for bf16 multiply.
bool in_pairs(const Kernels& k, int dtype, int x_dtype) { return k.pairs && dtype == BF16 && x_dtype == BF16; }

void widen_x(Round& r) {
  const Shrink& s = *r.in;
  if (in_pairs(r.k, r.dtype, r.x_dtype)) return;
  widen_rows(r.k, at(s.x, r.first * s.stride_x, s.x_dtype), s.stride_x, s.x_dtype, r.T, s.Vt.K, r.x);
}

int64_t columns(const Round& r, int i) { return r.out[i].U.K; }

// sums[r * T + t] of rows of V and tokens of x in bf16, strip by strip of N: x of one stays in the first cache.
void pairs(const Kernels& k, const Shrink& s, int64_t c, int rows, int64_t t, int T, float* sums) {
  constexpr int64_t STRIP = 1536, STEP = 32;
  const int64_t N = s.Vt.K, strips = std::max<int64_t>(1, (N + STRIP - 1) / STRIP);
  const int64_t strip = (N / STEP + strips) / strips * STEP;
  float more[SUMS];
  for (int64_t n = 0; n == 0 || n < N; n += strip) {
    const char* x = at(s.x, t * s.stride_x + n, BF16);
    float* out = n ? more : sums;
    k.pairs(at(s.Vt.data, c * s.Vt.stride + n, BF16), s.Vt.stride, rows, std::min(strip, N - n), x, s.stride_x, T, out);
    for (int i = 0; n && i < rows * T; ++i) sums[i] += more[i];
  }
}

void shrink_rows(Round& r, bool wait) {
  const Shrink& s = *r.in;
  const auto columns_of = [&](int i) { return columns(r, i); };
  const int64_t parts = (r.T + TOKENS - 1) / TOKENS;  // so that x of one stays in the second cache
  r.shrinking.each(r.members, columns_of, parts, wait, [&](int i, int64_t row, int rows, int64_t part) {
    const int64_t c = r.out[i].column + row, start = part * TOKENS;
    by_tiles(std::min<int64_t>(TOKENS, r.T - start), [&](int64_t t0, int T) {
      t0 += start;
      float sums[SUMS];
      const char* Vt = at(s.Vt.data, c * s.Vt.stride, s.dtype);
      if (in_pairs(r.k, s.dtype, s.x_dtype)) pairs(r.k, s, c, rows, r.first + t0, T, sums);
      else r.k.dot(s.dtype, Vt, s.Vt.stride, rows, s.Vt.K, r.x.at(t0), r.x.stride, T, sums);
      for (int t = 0; t < T; ++t) {
        const int64_t id = (r.first + t0 + t) / s.repeat;
        const int64_t e = s.ids64 ? static_cast<const int64_t*>(s.ids)[id] : static_cast<const int32_t*>(s.ids)[id];
        const float* scale = s.scale + e * s.stride_scale + c;
        float here[BLOCK];
        float* g = r.g[i].halves ? here : r.g[i].at(t0 + t, row);
        for (int j = 0; j < rows; ++j) g[j] = sums[j * T + t] * scale[j];
        if (r.g[i].halves) r.k.narrow(BF16, here, 1, rows, nullptr, nullptr, r.g[i].half_at(t0 + t, row));
      }
    });
  });
}

// The widest K of U whose blocks are turned into columns: by K alone, as T must not change the order of a sum.
int64_t short_for(const Kernels& k, bool halves) { return halves ? 2 * SHORT : k.columns ? SHORT : -1; }

void expand_rows(Round& r) {
  const auto rows_of = [&](int i) { return r.out[i].U.rows; };
  r.expanding.each(r.members, rows_of, 1, false, [&](int i, int64_t m, int rows, int64_t) {
    const Expand& e = r.out[i];
    const Rows& g = r.g[i];
    const char* U = at(e.U.data, m * e.U.stride, r.dtype);
    const bool is_short = e.U.K <= short_for(r.k, g.halves);
    alignas(64) float columns[SHORT * BLOCK];
    if (is_short && g.halves) r.k.pack(U, e.U.stride, rows, e.U.K, columns);
    else if (is_short) r.k.columns(r.dtype, U, e.U.stride, rows, e.U.K, columns);
    const void* bias = e.bias ? at(e.bias, m, r.x_dtype) : nullptr;
    // the next block, and for every column a share of it
    const char* next = m + rows < e.U.rows ? at(e.U.data, (m + rows) * e.U.stride, r.dtype) : nullptr;
    const int64_t share = BLOCK * e.U.stride * size_of(r.dtype) / std::max<int64_t>(1, e.U.K);
    by_tiles(r.T, [&](int64_t t0, int T) {
      const auto base_of = [&](int64_t t) {
        return e.base ? at(e.base, (r.first + t) * e.stride_base + m, r.x_dtype) : nullptr;
      };
      const auto y_of = [&](int64_t t) {
        return const_cast<char*>(at(e.y, (r.first + t) * e.stride_y + m, r.x_dtype));
      };
      if (is_short && g.halves) {
        return r.k.add(columns, e.U.K, g.half_at(t0), g.stride, T, rows, base_of(t0), e.stride_base, bias, y_of(t0),
                       e.stride_y);
      }
      alignas(64) float sums[SUMS];
      if (is_short) r.k.across(columns, e.U.K, g.at(t0), g.stride, T, sums, t0 ? nullptr : next, share);
      else if (g.halves) r.k.pairs(U, e.U.stride, rows, e.U.K, g.half_at(t0), g.stride, T, sums);
      else r.k.dot(r.dtype, U, e.U.stride, rows, e.U.K, g.at(t0), g.stride, T, sums);
      for (int t = 0; t < T; ++t) {
        const float* mine = is_short ? sums + t * BLOCK : sums + t;
        r.k.narrow(r.x_dtype, mine, is_short ? 1 : T, rows, base_of(t0 + t), bias, y_of(t0 + t));
      }
    });
  });
}

// Whether g is rounded to bf16 for its product with U: by the number of tokens of the call alone.
bool rounds(const Kernels& k, int dtype, int x_dtype, int64_t T) { return in_pairs(k, dtype, x_dtype) && T > FEW; }

// Tokens of a round.
int64_t tokens(const Kernels& k, const Expand* out, int members, bool halves) {
  bool all = halves;
  for (int i = 0; i < members; ++i) all = all && out[i].U.K <= short_for(k, halves);
  return all ? MANY : TOKENS;
}

// The number of threads: 1 for little work. About 60 bytes (32 to 84 measured, memory to L3) are read, and 80 products
// are made, in a nanosecond.
int worth(int threads, const Shrink* in, const Expand* out, int members, int dtype, int64_t T) {
  int64_t numbers = in ? in->Vt.rows * in->Vt.K : 0;
  for (int i = 0; i < members; ++i) numbers += out[i].U.rows * out[i].U.K;
  const int64_t nanoseconds = numbers * size_of(dtype) / 60 + numbers * T / 80;
  return nanoseconds < 1000 * ALONE ? 1 : threads;
}

}  // namespace

void svf_linear(const Kernels& k, const Shrink& in, const Expand* out, int members, int threads) {
  threads = worth(threads, &in, out, members, in.dtype, in.T);
  const bool pairs = in_pairs(k, in.dtype, in.x_dtype), halves = rounds(k, in.dtype, in.x_dtype, in.T);
  const int64_t most = std::min(in.T, tokens(k, out, members, halves));
  int64_t width = pairs ? 0 : padded(in.Vt.K);
  for (int i = 0; i < members; ++i) width += padded(out[i].U.K);
  float* room = scratch(most * width);
  for (int64_t first = 0; first < in.T; first += most) {
    const int64_t T = std::min(most, in.T - first);
    Round r{k, &in, out, members, in.dtype, in.x_dtype, first, T, {room, padded(in.Vt.K)}, {}, {}, {}};
    widen_x(r);
    float* g = pairs ? room : room + r.x.floats(T);
    for (int i = 0; i < members; ++i) {
      r.g[i] = {g, padded(columns(r, i)), halves};
      clear_ends(r.g[i], T, columns(r, i));
      g += r.g[i].floats(T);
    }
    parallel(threads, [&] {
      shrink_rows(r, true);
      expand_rows(r);
    });
  }
}

void shrink(const Kernels& k, const Shrink& in, float* g, int threads) {
  threads = worth(threads, &in, nullptr, 0, in.dtype, in.T);
  const Expand all{{nullptr, 0, in.Vt.rows, 0}, 0, nullptr, 0, nullptr, nullptr, 0};
  float* room = scratch(std::min<int64_t>(in.T, TOKENS) * padded(in.Vt.K));
  for (int64_t first = 0; first < in.T; first += TOKENS) {
    const int64_t T = std::min<int64_t>(TOKENS, in.T - first);
    const Rows out{g + first * in.Vt.rows, in.Vt.rows};
    Round r{k, &in, &all, 1, in.dtype, in.x_dtype, first, T, {room, padded(in.Vt.K)}, {out}, {}, {}};
    widen_x(r);
    parallel(threads, [&] { shrink_rows(r, false); });
  }
}

void expand(const Kernels& k, const float* g, int64_t stride_g, int64_t T_all, const Expand* out, int members,
            int dtype, int x_dtype, int threads) {
  threads = worth(threads, nullptr, out, members, dtype, T_all);
  const bool halves = rounds(k, dtype, x_dtype, T_all);
  const int64_t most = std::min(T_all, tokens(k, out, members, halves));
  int64_t width = 0;
  for (int i = 0; i < members; ++i) width += padded(out[i].U.K);
  float* room = scratch(most * width);
  for (int64_t first = 0; first < T_all; first += most) {
    const int64_t T = std::min(most, T_all - first);
    Round r{k, nullptr, out, members, dtype, x_dtype, first, T, {}, {}, {}, {}};
    float* at_g = room;
    for (int i = 0; i < members; ++i) {
      const Rows rows = r.g[i] = {at_g, padded(columns(r, i)), halves};
      const float* from = g + first * stride_g + out[i].column;
      if (halves) {
        for (int64_t t = 0; t < T; ++t)
          k.narrow(BF16, from + t * stride_g, 1, int(columns(r, i)), nullptr, nullptr, rows.half_at(t));
        clear_ends(rows, T, columns(r, i));
      } else {
        widen_rows(k, from, stride_g, F32, T, columns(r, i), rows);
      }
      at_g += rows.floats(T);
    }
    parallel(threads, [&] { expand_rows(r); });
  }
}

const Kernels* kernels(const char* name) {
#if defined(__x86_64__)
  static const bool has_512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const bool has_bf16 = __builtin_cpu_supports("avx512bf16");
  static const bool has_2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  constexpr bool has_512 = false, has_2 = false, has_bf16 = false;
#endif
  const Kernels* all[] = {has_512 && has_2 && has_bf16 ? avx512_bf16() : nullptr,
                          has_512 && has_2 ? avx512() : nullptr, has_2 ? avx2() : nullptr, portable()};
  for (const Kernels* k : all)
    if (k && (name == nullptr || std::strcmp(name, k->name) == 0)) return k;
  return nullptr;
}

}  // namespace t2cpu
