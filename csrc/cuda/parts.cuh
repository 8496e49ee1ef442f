// The parts of the decode kernels: conversions, a block's way through the tiles, products, and finishing a sum.
#pragma once
#include "problem.h"
#ifdef T2_EMULATED
#include "../emulator/device.h"
#else
#include "device.cuh"
#endif

namespace t2 {

// Floats of a token's 16 sums in shared memory: 4 lanes that write 2 tokens apart use different banks.
constexpr int PITCH = 20;

// Four int8 to two pairs of P, exactly.
template <Product P>
__device__ __forceinline__ void widen_int8(uint32_t q, uint32_t& low, uint32_t& high) {
  if constexpr (P == FP16) {  // 1024 + (q + 128) is the fp16 whose last bits are q + 128
    q ^= 0x80808080u;
    low = subtract_2<P>(permute_bytes(q, 0x64646464u, 0x4140), 0x64806480u);
    high = subtract_2<P>(permute_bytes(q, 0x64646464u, 0x4342), 0x64806480u);
  } else {  // bf16 has 7 bits behind the point: 128 + the low 7 bits, minus 128 or, for negative q, 256
    const uint32_t bits = in_register(0x43004300u);
    const uint32_t a = permute_bytes(q, 0, 0x4140), b = permute_bytes(q, 0, 0x4342);
    low = subtract_2<P>(and_or(a, 0x007f007fu, bits), and_or(a, 0x00800080u, bits));
    high = subtract_2<P>(and_or(b, 0x007f007fu, bits), and_or(b, 0x00800080u, bits));
  }
}

// Two bf16 to two fp16 of a 32nd: x may then reach 2e6.
__device__ __forceinline__ uint32_t bf16_to_fp16(uint32_t v) {
  return pack_fp16(float_of_bits(v << 16) * 0.03125f, float_of_bits(v & 0xffff0000u) * 0.03125f);
}

// The way of a block, or of a cluster, through the tiles: it takes every n-th unit. A unit is 16 rows of a problem for
// each block of a cluster; of gate and up, 16 rows of one and then of the other.
struct Place {
  int unit, second;  // second: 1 at `up`
  int problem;       // -1 behind the end
  int row;           // the first of the unit
};

template <int CLUSTER>
__device__ __forceinline__ void find(Place& at, const Args& a) {
  at.problem = -1;
  if (at.unit >= a.unit_end[a.problems - 1]) return;
  int p = 0, begin = 0;
#pragma unroll 1
  while (at.unit >= a.unit_end[p]) begin = a.unit_end[p++];
  at.problem = p + at.second;
  at.row = (at.unit - begin) * (ROWS * CLUSTER);
}

template <int CLUSTER>
__device__ __forceinline__ void step(Place& at, const Args& a) {
  if (at.problem == a.pair && at.second == 0) {
    at.second = 1;
    ++at.problem;
  } else {
    at.second = 0;
    at.unit += gridDim.x / CLUSTER;
    find<CLUSTER>(at, a);
  }
}

// One chunk, ready for the product: row g and row g + 8, 2 x 16 bytes each.
struct Chunk {
  uint4 a[2], b[2];
};

// 16 bytes of x for each of TILES groups of 8 tokens; zero for tokens behind T and behind the end of a row.
template <Product P, bool CONVERT, int TILES>
__device__ __forceinline__ void load_x(
    uint4 (&X)[TILES], const char* x, long long eight_rows, int tokens, bool inside, bool convert) {
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
    X[n] = make_uint4(0, 0, 0, 0);
    if (inside && n * 8 < tokens) X[n] = load_activations(x + n * eight_rows);
    if (CONVERT && convert) {
      X[n] = make_uint4(bf16_to_fp16(X[n].x), bf16_to_fp16(X[n].y), bf16_to_fp16(X[n].z), bf16_to_fp16(X[n].w));
    }
  }
}

// sums += half `h` of a chunk of W, times x as `load_x` left it.
template <Product P, int TILES>
__device__ __forceinline__ void multiply_wide(float (&sums)[TILES][4], const Chunk& w, int h, const uint4 (&X)[TILES]) {
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
    mma<P>(sums[n], w.a[h].x, w.b[h].x, w.a[h].y, w.b[h].y, X[n].x, X[n].y);
    mma<P>(sums[n], w.a[h].z, w.b[h].z, w.a[h].w, w.b[h].w, X[n].z, X[n].w);
  }
}

// The same for int8, where 16 bytes of W meet 2 x 16 of x: `half` of the half.
template <Product P, int TILES>
__device__ __forceinline__ void multiply_int8(
    float (&sums)[TILES][4], const Chunk& w, int h, int half, const uint4 (&X)[TILES]) {
  const uint4 &a = w.a[h], &b = w.b[h];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    uint32_t a0, a1, a2, a3;
    widen_int8<P>(half ? (j ? a.w : a.z) : (j ? a.y : a.x), a0, a2);
    widen_int8<P>(half ? (j ? b.w : b.z) : (j ? b.y : b.x), a1, a3);
#pragma unroll
    for (int n = 0; n < TILES; ++n) mma<P>(sums[n], a0, a1, a2, a3, j ? X[n].z : X[n].x, j ? X[n].w : X[n].y);
  }
}

// The numbers of y that a thread finishes in a tile, and their scale, bias and base.
template <int TILES>
struct Outputs {
  static constexpr int COUNT = (TILES * 8 * ROWS + THREADS - 1) / THREADS;
  long long expert[COUNT];  // row of scale
  float scale[COUNT], bias[COUNT], base[COUNT], gate[COUNT] = {};

  __device__ __forceinline__ static int token(int i) { return (threadIdx.x + i * THREADS) / ROWS; }
  __device__ __forceinline__ static int row() { return threadIdx.x % ROWS; }

  __device__ __forceinline__ void find_experts(const Args& a) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      expert[i] = 0;
      if (a.ids && token(i) < a.T) expert[i] = load_id(a.ids, token(i) * a.inverse >> 16, a.ids_are_64);
    }
  }

  // Loads before the products, which hide the latency. A row of scale that does not exist gives NaN, and is not read.
  __device__ __forceinline__ void ask(const Args& a, const Problem& p, int first_row) {
    const int r = first_row + row();
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const int t = token(i);
      scale[i] = 1, bias[i] = 0, base[i] = 0;
      if (t >= a.T || r >= p.R) continue;
      if (p.scale) {
        const bool there = expert[i] >= 0 && expert[i] < a.E;
        scale[i] = not_a_number();
        if (there) scale[i] = load_float(p.scale + expert[i] * p.scale_row + r);
      }
      if (p.bias) bias[i] = widen(load_bias(static_cast<const uint16_t*>(p.bias) + r), p.y_is_fp16);
      if (p.base) {
        const auto* row = static_cast<const uint16_t*>(p.base) + static_cast<long long>(t) * p.base_row;
        base[i] = widen(load_base(row + r), p.y_is_fp16);
      }
    }
  }

  __device__ __forceinline__ bool exists(const Args& a, const Problem& p, int first_row, int i) const {
    return token(i) < a.T && first_row + row() < p.R;
  }

  __device__ __forceinline__ void finish(const Args& a, int problem, int first_row, int i, float sum) {
    const Problem& p = a.problem[problem];
    float y = sum * scale[i] * p.times;
    // A row of zeros must return the base model exactly: -0.0 + base is base bit for bit, +0.0 + base is not for -0.0.
    if (p.base) y = (y == 0.f ? -0.f : y) + base[i];
    if (p.bias) y += bias[i];
    uint16_t out = round_to(y, p.y_is_fp16);
    if (a.pair >= 0 && problem >= a.pair) {
      y = widen(out, p.y_is_fp16);  // gate, silu(gate) and up are rounded as separate ops would
      if (problem == a.pair) {
        gate[i] = y;
        return;
      }
      const float silu = widen(round_to(divide(gate[i], 1.f + exponential(-gate[i])), p.y_is_fp16), p.y_is_fp16);
      out = round_to(silu * y, p.y_is_fp16);
    }
    store_16(static_cast<uint16_t*>(p.y) + static_cast<long long>(token(i)) * p.y_row + first_row + row(), out);
  }
};

// A warp's sums of a tile into shared memory, [token][row]: it holds rows g, g + 8 and tokens 2 quarter, 2 quarter + 1.
template <int TILES>
__device__ __forceinline__ void put_sums(float* partial, const float (&sums)[TILES][4], int lane) {
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
    float* at = partial + (n * 8 + 2 * (lane & 3)) * PITCH + (lane >> 2);
    store_shared(at, sums[n][0]);
    store_shared(at + PITCH, sums[n][1]);
    store_shared(at + 8, sums[n][2]);
    store_shared(at + PITCH + 8, sums[n][3]);
  }
}

}  // namespace t2
