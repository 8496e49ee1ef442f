// The decode kernel: y = base + times * ((x Wᵀ) * scale[e]) + bias for up to eight W at once and T <= 8 * TILES tokens.
// W is streamed once.
//
// A lane of a warp loads 16 bytes of row g and of row g + 8 of W. As they come, these bytes are fragments of the A
// operand of the tensor cores, if k is permuted in the same way in B, the activations: no shared memory, no shuffle, no
// second layout of W. The 8 warps of a block split k in chunks of 128 bytes and add their sums through shared memory,
// in the order of k: the same bits in every run and on any number of multiprocessors. Each warp keeps DEPTH chunks in
// flight, in registers. The loads run ahead over tiles and problems, and over the wait for the previous kernel, because
// no kernel writes W.
//
// Compiled by nvcc; and as C++ with csrc/emulator/device.h in place of device.cuh.
#pragma once
#include "parts.cuh"

namespace t2 {

// Where a warp loads next.
struct Cursor {
  Place at;
  // the warp with the first chunk of the tile; it moves on at each tile, so that short rows keep all warps busy
  int first;
  int from, end;     // bytes into the row: the chunk of this warp, the end of the row
  const char* row;   // row g of the tile
  long long second;  // distance to row g + 8
};

__device__ __forceinline__ void enter(Cursor& u, const Args& a, int warp, int lane) {
  if (u.at.problem < 0) return;
  const Problem& p = a.problem[u.at.problem];
  // Rows behind the last one repeat it. What is computed for them is not stored.
  const int g = min(u.at.row + (lane >> 2), p.R - 1), g8 = min(u.at.row + (lane >> 2) + 8, p.R - 1);
  u.end = p.int8 ? p.K : 2 * p.K;
  u.row = static_cast<const char*>(p.W) + static_cast<long long>(g) * u.end;
  u.second = static_cast<long long>(g8 - g) * u.end;
  u.from = ((warp - u.first) & (WARPS - 1)) * CHUNK;
  u.first = (u.first + (u.end + CHUNK - 1) / CHUNK) & (WARPS - 1);
}

__device__ __forceinline__ void load(Cursor& u, const Args& a, int warp, int lane, Chunk& chunk) {
  while (u.at.problem >= 0 && u.from >= u.end) {
    step<1>(u.at, a);
    enter(u, a, warp, lane);
  }
  if (u.at.problem < 0) return;
  // Behind the end of a row its beginning is read: x is zero there, and W is a number.
  const int i = u.from + (lane & 3) * 16, i0 = i < u.end ? i : 0, i1 = i + 64 < u.end ? i + 64 : 0;
  chunk.a[0] = load_weights(u.row + i0);
  chunk.a[1] = load_weights(u.row + i1);
  chunk.b[0] = load_weights(u.row + u.second + i0);
  chunk.b[1] = load_weights(u.row + u.second + i1);
  u.from += WARPS * CHUNK;
}

template <Product P, Weights W, int TILES, int DEPTH, int RESIDENT>
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
  launch_dependents();
  wait_for_kernel_before();  // only W was read before this

  Outputs<TILES> outputs;
  outputs.find_experts(a);

  Place here{};
  here.unit = blockIdx.x;
  find<1>(here, a);
  // slot: chunk of the ring that comes next; side: of `partial`, which two tiles use in turn
  int first = 0, slot = 0, side = 0;
  for (; here.problem >= 0; step<1>(here, a), side ^= 1) {
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
        if (d < slot) continue;  // where the previous tile stopped
        if (from >= end) {
          slot = d;
          break;
        }
        const int i = from + quarter * 16;
        uint4 X[TILES];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const bool inside = i + h * 64 < end;
          if constexpr (W == INT8) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              load_x<P, false>(X, x + 2 * (i + h * 64) + half * 16, eight_rows, a.T - g, inside, false);
              multiply_int8<P>(sums, ring[d], h, half, X);
            }
          } else {
            load_x<P, P == FP16>(X, x + i + h * 64, eight_rows, a.T - g, inside, p.x_is_bf16);
            multiply_wide<P>(sums, ring[d], h, X);
          }
        }
        // Refilled in place, after its use. A copy before the use would wait for the load that was just sent.
        load(ahead, a, warp, lane, ring[d]);
        from += WARPS * CHUNK;
        if (d == DEPTH - 1) slot = 0;
      }
    }

    put_sums<TILES>(partial[side][rank], sums, lane);
    block_barrier();  // one a tile: the other side of `partial` is free when all threads have come here again
#pragma unroll
    for (int i = 0; i < Outputs<TILES>::COUNT; ++i) {
      if (!outputs.exists(a, p, here.row, i)) continue;
      float sum = 0;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) {
        sum += load_shared(partial[side][w] + outputs.token(i) * PITCH + outputs.row());
      }
      outputs.finish(a, here.problem, here.row, i, sum);
    }
  }
}

}  // namespace t2
