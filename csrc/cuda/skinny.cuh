// The decode kernel: y = base + times * ((x Wᵀ) * scale[e]) + bias for up to eight W at once and T <= 8 * TILES tokens, W streamed once.
//
// A warp's lane loads 16 bytes of row g and of row g + 8 of W. Those bytes are fragments of the tensor cores' A operand as they come, if k is
// permuted alike in B, the activations: no shared memory, no shuffle, no second layout of W. The 8 warps of a block split k in chunks of 128
// bytes and add their sums through shared memory, in the order of k: the same bits in every run and on every number of multiprocessors.
// Each warp keeps DEPTH chunks in flight, in registers; the chunks run ahead over tiles, problems and phases, and over the wait for the kernel
// before, because W depends on nothing.
//
// Compiled by nvcc, and as C++ with csrc/emulator/device.h in place of device.cuh.
#pragma once
#include "problem.h"
#ifdef T2_EMULATED
#include "../emulator/device.h"
#else
#include "device.cuh"
#endif

namespace t2 {

constexpr int PITCH = 20;  // floats of a token's 16 sums in shared memory: 4 lanes that write 2 tokens apart meet no bank twice

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

// A block's, or a cluster's, way through the tiles: every n-th unit, a unit being 16 rows of a problem for each block of a cluster, or 16 of gate
// and then of up.
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

// Where a warp loads next.
struct Cursor {
  Place at;
  int first;         // the warp that takes the first chunk of the tile: it moves on from tile to tile, so that short rows keep every warp busy
  int from, end;     // bytes into the row: this warp's chunk, the row's end
  const char* row;   // of W: row g of the tile
  long long second;  // and from there to row g + 8
};

__device__ __forceinline__ void enter(Cursor& u, const Args& a, int warp, int lane) {
  if (u.at.problem < 0) return;
  const Problem& p = a.problem[u.at.problem];
  // Rows behind the last repeat it; what is computed for them is not stored.
  const int g = min(u.at.row + (lane >> 2), p.R - 1), g8 = min(u.at.row + (lane >> 2) + 8, p.R - 1);
  u.end = p.int8 ? p.K : 2 * p.K;
  u.row = static_cast<const char*>(p.W) + static_cast<long long>(g) * u.end;
  u.second = static_cast<long long>(g8 - g) * u.end;
  u.from = ((warp - u.first) & (WARPS - 1)) * CHUNK;
  u.first = (u.first + (u.end + CHUNK - 1) / CHUNK) & (WARPS - 1);
}

// One chunk, ready to be multiplied: row g and row g + 8, 2 x 16 bytes each.
struct Chunk {
  uint4 a[2], b[2];
};

__device__ __forceinline__ void load(Cursor& u, const Args& a, int warp, int lane, Chunk& chunk) {
  while (u.at.problem >= 0 && u.from >= u.end) {
    step<1>(u.at, a);
    enter(u, a, warp, lane);
  }
  if (u.at.problem < 0) return;
  // Behind the end of a row stands its beginning: x is zero there, and W is a number.
  const int i = u.from + (lane & 3) * 16, i0 = i < u.end ? i : 0, i1 = i + 64 < u.end ? i + 64 : 0;
  chunk.a[0] = load_weights(u.row + i0);
  chunk.a[1] = load_weights(u.row + i1);
  chunk.b[0] = load_weights(u.row + u.second + i0);
  chunk.b[1] = load_weights(u.row + u.second + i1);
  u.from += WARPS * CHUNK;
}

// 16 bytes of x for each of TILES groups of 8 tokens; zero for tokens behind T and behind the end of a row.
template <Product P, bool CONVERT, int TILES>
__device__ __forceinline__ void load_x(uint4 (&X)[TILES], const char* x, long long eight_rows, int tokens, bool inside, bool convert) {
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
    X[n] = make_uint4(0, 0, 0, 0);
    if (inside && n * 8 < tokens) X[n] = load_activations(x + n * eight_rows);
    if (CONVERT && convert) X[n] = make_uint4(bf16_to_fp16(X[n].x), bf16_to_fp16(X[n].y), bf16_to_fp16(X[n].z), bf16_to_fp16(X[n].w));
  }
}

// sums += chunk of W times x. x: this lane's token at the row's beginning; tokens: how many there are from this lane's on.
template <Product P, int TILES>
__device__ __forceinline__ void multiply_wide(float (&sums)[TILES][4], const Chunk& w, const char* x, long long eight_rows, int tokens, int i, int end, bool convert) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    uint4 X[TILES];
    load_x<P, P == FP16>(X, x + i + h * 64, eight_rows, tokens, i + h * 64 < end, convert);
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
      mma<P>(sums[n], w.a[h].x, w.b[h].x, w.a[h].y, w.b[h].y, X[n].x, X[n].y);
      mma<P>(sums[n], w.a[h].z, w.b[h].z, w.a[h].w, w.b[h].w, X[n].z, X[n].w);
    }
  }
}

template <Product P, int TILES>
__device__ __forceinline__ void multiply_int8(float (&sums)[TILES][4], const Chunk& w, const char* x, long long eight_rows, int tokens, int i, int end) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const uint32_t a[4] = {w.a[h].x, w.a[h].y, w.a[h].z, w.a[h].w}, b[4] = {w.b[h].x, w.b[h].y, w.b[h].z, w.b[h].w};
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // 8 numbers of x at a time
      uint4 X[TILES];
      load_x<P, false>(X, x + 2 * (i + h * 64) + half * 16, eight_rows, tokens, i + h * 64 < end, false);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        uint32_t a0, a1, a2, a3;
        widen_int8<P>(a[2 * half + j], a0, a2);
        widen_int8<P>(b[2 * half + j], a1, a3);
#pragma unroll
        for (int n = 0; n < TILES; ++n) mma<P>(sums[n], a0, a1, a2, a3, j ? X[n].z : X[n].x, j ? X[n].w : X[n].y);
      }
    }
  }
}

// All blocks of the grid have come here. Two words, {arrived, generation}; the last to arrive sets the first back, so that a launch leaves the
// barrier as it found it, and a graph may replay it. What was written before by any thread is seen by all after.
__device__ __forceinline__ void grid_barrier(unsigned* words) {
  block_barrier();
  if (threadIdx.x == 0) {
    const unsigned generation = load_acquire(words + 1);
    if (add_acquire_release(words, 1) == gridDim.x - 1) {
      store_release(words, 0);
      store_release(words + 1, generation + 1);
    } else {
      while (load_acquire(words + 1) == generation) {
      }
    }
  }
  block_barrier();
}

// The numbers of y that a thread finishes in a tile, and what they need beside the sums.
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

  // Asked for before the products, which hide the latency. A row of scale that is not there gives NaN instead of somebody's memory.
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
      if (p.base) base[i] = widen(load_base(static_cast<const uint16_t*>(p.base) + static_cast<long long>(t) * p.base_row + r), p.y_is_fp16);
    }
  }

  __device__ __forceinline__ bool exists(const Args& a, const Problem& p, int first_row, int i) const {
    return token(i) < a.T && first_row + row() < p.R;
  }

  __device__ __forceinline__ void finish(const Args& a, int problem, int first_row, int i, float sum) {
    const Problem& p = a.problem[problem];
    float y = sum * scale[i] * p.times;
    // -0.0 + base is base bit for bit, +0.0 + base is not where base is -0.0: a row of zeros returns the base model exactly.
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

template <Product P, Weights W, int TILES, bool FUSED, int DEPTH, int RESIDENT>
__global__ void __launch_bounds__(THREADS, RESIDENT) skinny_kernel(const __grid_constant__ Args a) {
  T2_SHARED(float, partial, [2][WARPS][TILES * 8 * PITCH]);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, quarter = lane & 3;

  Chunk ring[DEPTH];
  Cursor ahead{};
  ahead.at.unit = blockIdx.x;
  find<1>(ahead.at, a);
  enter(ahead, a, warp, lane);
#pragma unroll
  for (int d = 0; d < DEPTH; ++d) load(ahead, a, warp, lane, ring[d]);
  if constexpr (!FUSED) launch_dependents();
  wait_for_kernel_before();  // only W was touched so far

  Outputs<TILES> outputs;
  outputs.find_experts(a);

  Place here{};
  here.unit = blockIdx.x;
  find<1>(here, a);
  bool crossed = false;
  int first = 0, slot = 0, side = 0;  // slot: of the ring, whose chunk comes next; side: of `partial`, which two tiles use in turn
  for (; here.problem >= 0; step<1>(here, a), side ^= 1) {
    if (FUSED && !crossed && here.problem >= a.first) {
      crossed = true;
      grid_barrier(a.barrier);
    }
    const Problem& p = a.problem[here.problem];

    outputs.ask(a, p, here.row);

    float sums[TILES][4] = {};
    const int end = p.int8 ? p.K : 2 * p.K, rank = (warp - first) & (WARPS - 1);
    const char* x = static_cast<const char*>(p.x) + static_cast<long long>(g) * p.x_row * 2;
    const long long eight_rows = static_cast<long long>(p.x_row) * 16;
    first = (first + (end + CHUNK - 1) / CHUNK) & (WARPS - 1);
    int from = rank * CHUNK;
    while (from < end) {
#pragma unroll
      for (int d = 0; d < DEPTH; ++d) {
        if (d < slot) continue;  // where the tile before left off
        if (from >= end) {
          slot = d;
          break;
        }
        const int i = from + quarter * 16;
        if (W == INT8 || (W == BOTH && p.int8))
          multiply_int8<P>(sums, ring[d], x, eight_rows, a.T - g, i, end);
        else
          multiply_wide<P>(sums, ring[d], x, eight_rows, a.T - g, i, end, p.x_is_bf16);
        // Refilled in place, after its use: a copy first would wait for the load it has just sent.
        load(ahead, a, warp, lane, ring[d]);
        from += WARPS * CHUNK;
        if (d == DEPTH - 1) slot = 0;
      }
    }

    put_sums<TILES>(partial[side][rank], sums, lane);
    block_barrier();  // one a tile: the other side of `partial` is free when all have come here again
#pragma unroll
    for (int i = 0; i < Outputs<TILES>::COUNT; ++i) {
      if (!outputs.exists(a, p, here.row, i)) continue;
      float sum = 0;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) sum += load_shared(partial[side][w] + outputs.token(i) * PITCH + outputs.row());
      outputs.finish(a, here.problem, here.row, i, sum);
    }
  }
  if constexpr (FUSED)
    if (!crossed) grid_barrier(a.barrier);  // no tile of the second phase, but waited for
}

// Calls run(kernel, blocks) with the instance that a launch wants; false where there is none.
template <Product P, class Run>
bool with_kernel(const Launch& l, Run run) {
  const Args& a = l.args;
  const auto grid = [&](int resident) {
    const int first = a.unit_end[a.first - 1], rest = a.unit_end[a.problems - 1] - first, units = first > rest ? first : rest;
    int blocks = l.sms * resident;
    if (l.blocks && l.blocks < blocks) blocks = l.blocks;
    return units < blocks ? units : blocks;
  };
#define T2_RUN(W, TILES, FUSED, DEPTH, RESIDENT) return run(skinny_kernel<P, W, TILES, FUSED, DEPTH, RESIDENT>, grid(RESIDENT)), true
  // DEPTH: 64 to 128 KB in flight a multiprocessor (2 blocks of 256 threads, 64 bytes a chunk), and no register more than there are.
  if (l.depth) {  // how deep is deep enough: for measuring
    if constexpr (P == BF16)
      if (a.T <= 8 && !l.fused) {
        if (l.weights == WIDE && l.depth == 2) T2_RUN(WIDE, 1, false, 2, 2);
        if (l.weights == WIDE && l.depth == 3) T2_RUN(WIDE, 1, false, 3, 2);
        if (l.weights == INT8 && l.depth == 2) T2_RUN(INT8, 1, false, 2, 2);
        if (l.weights == INT8 && l.depth == 4) T2_RUN(INT8, 1, false, 4, 2);
      }
    return false;
  }
  if (l.fused) {
    if (a.T > 8) return false;
    if (l.weights == WIDE) T2_RUN(WIDE, 1, true, 4, 2);
    if (l.weights == INT8) T2_RUN(INT8, 1, true, 3, 2);
    T2_RUN(BOTH, 1, true, 3, 2);
  }
  if (a.T <= 8) {
    if (l.weights == WIDE) T2_RUN(WIDE, 1, false, 4, 2);
    if (l.weights == INT8) T2_RUN(INT8, 1, false, 3, 2);
    T2_RUN(BOTH, 1, false, 3, 2);
  }
  if (a.T <= 16) {
    if (l.weights == WIDE) T2_RUN(WIDE, 2, false, 3, 2);
    if (l.weights == INT8) T2_RUN(INT8, 2, false, 2, 2);
    T2_RUN(BOTH, 2, false, 2, 2);
  }
  if (l.weights == WIDE) T2_RUN(WIDE, 4, false, 4, 1);
  if (l.weights == INT8) T2_RUN(INT8, 4, false, 4, 1);
  T2_RUN(BOTH, 4, false, 4, 1);
#undef T2_RUN
}

}  // namespace t2
