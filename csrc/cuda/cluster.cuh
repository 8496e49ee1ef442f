// The decode kernel for T = 9..32 on sm_90 and later. Clusters of CLUSTER thread blocks share the sums of CLUSTER
// tiles.
//
// In skinny.cuh every 16 rows of W read all of x, from L2 or L1; above 8 tokens that is as much as W itself. Here a
// warp holds x once for CLUSTER tiles of 16 rows, so that x is read a CLUSTER-th as often. The blocks of a cluster
// split k instead of the rows. Block c adds up tile c from the sums in the shared memories of its cluster, in the order
// of the blocks: the same bits in every run on one GPU.
#pragma once
#include "parts.cuh"

namespace t2 {

// Where a warp loads next: the same chunk of k of CLUSTER tiles.
struct Strip {
  Place at;
  int first, from, end;  // as in skinny.cuh, over all warps of the cluster
};

template <int CLUSTER>
__device__ __forceinline__ void enter(Strip& u, const Args& a, int rank) {
  if (u.at.problem < 0) return;
  const Problem& p = a.problem[u.at.problem];
  u.end = p.int8 ? p.K : 2 * p.K;
  u.from = ((rank - u.first) & (WARPS * CLUSTER - 1)) * CHUNK;
  u.first = (u.first + (u.end + CHUNK - 1) / CHUNK) & (WARPS * CLUSTER - 1);
}

// Tile q of the chunk, the tiles one after the other.
template <int CLUSTER>
__device__ __forceinline__ void load(Strip& u, const Args& a, int rank, int lane, int q, Chunk& chunk) {
  if (q == 0)
    while (u.at.problem >= 0 && u.from >= u.end) {
      step<CLUSTER>(u.at, a);
      enter<CLUSTER>(u, a, rank);
    }
  if (u.at.problem < 0) return;
  const Problem& p = a.problem[u.at.problem];
  // Rows behind the last one repeat it. Behind the end of a row its beginning is read, where x is zero.
  const int r = u.at.row + q * ROWS + (lane >> 2), g = min(r, p.R - 1), g8 = min(r + 8, p.R - 1);
  const char* row = static_cast<const char*>(p.W) + static_cast<long long>(g) * u.end;
  const char* row8 = static_cast<const char*>(p.W) + static_cast<long long>(g8) * u.end;
  const int i = u.from + (lane & 3) * 16, i0 = i < u.end ? i : 0, i1 = i + 64 < u.end ? i + 64 : 0;
  chunk.a[0] = load_weights(row + i0);
  chunk.a[1] = load_weights(row + i1);
  chunk.b[0] = load_weights(row8 + i0);
  chunk.b[1] = load_weights(row8 + i1);
  if (q == CLUSTER - 1) u.from += WARPS * CLUSTER * CHUNK;
}

template <int TILES, int CLUSTER>
constexpr int PARTIAL_FLOATS = WARPS * CLUSTER * TILES * 8 * PITCH;
template <int TILES, int CLUSTER>
constexpr int SHARED_BYTES = (PARTIAL_FLOATS<TILES, CLUSTER> + 2 * CLUSTER * TILES * 8 * ROWS) * 4;

template <Product P, Weights W, int TILES, int CLUSTER>
__global__ void __launch_bounds__(THREADS, 1) cluster_kernel(const __grid_constant__ Args a) {
  T2_DYNAMIC_SHARED(float, shared);
  constexpr int TILE = TILES * 8 * PITCH, SUMS = TILES * 8 * ROWS;
  float* const partial = shared;                                         // [WARPS][CLUSTER][TILE]
  float* const block_sums = shared + PARTIAL_FLOATS<TILES, CLUSTER>;  // [2][CLUSTER][SUMS]
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, quarter = lane & 3;
  const int block = cluster_rank(), rank = block * WARPS + warp;

  Chunk ring[CLUSTER];  // one chunk of k in flight, of every tile: 64 KB a multiprocessor
  Strip ahead{};
  ahead.at.unit = blockIdx.x / CLUSTER;
  find<CLUSTER>(ahead.at, a);
  enter<CLUSTER>(ahead, a, rank);
#pragma unroll
  for (int q = 0; q < CLUSTER; ++q) load<CLUSTER>(ahead, a, rank, lane, q, ring[q]);
  launch_dependents();
  wait_for_kernel_before();  // only W was read before this

  Outputs<TILES> outputs;
  outputs.find_experts(a);
  Place here{};
  here.unit = blockIdx.x / CLUSTER;
  find<CLUSTER>(here, a);
  int first = 0, side = 0;
  for (; here.problem >= 0; step<CLUSTER>(here, a), side ^= 1) {
    const Problem& p = a.problem[here.problem];
    const int my_row = here.row + block * ROWS;
    outputs.ask(a, p, my_row);

    float sums[CLUSTER][TILES][4] = {};
    const int end = p.int8 ? p.K : 2 * p.K;
    const char* x = static_cast<const char*>(p.x) + static_cast<long long>(g) * p.x_row * 2;
    const long long eight_rows = static_cast<long long>(p.x_row) * 16;
#pragma unroll 1
    for (int from = ((rank - first) & (WARPS * CLUSTER - 1)) * CHUNK; from < end; from += WARPS * CLUSTER * CHUNK) {
      const int i = from + quarter * 16;
      constexpr int PIECES = W == INT8 ? 4 : 2;  // of 16 bytes of x that meet a chunk
      uint4 X[PIECES][TILES];
#pragma unroll
      for (int n = 0; n < PIECES; ++n) {
        const bool inside = i + n * 2 / PIECES * 64 < end;
        if constexpr (W == INT8)
          load_x<P, false>(X[n], x + 2 * (i + n / 2 * 64) + n % 2 * 16, eight_rows, a.T - g, inside, false);
        else
          load_x<P, P == FP16>(X[n], x + i + n * 64, eight_rows, a.T - g, inside, p.x_is_bf16);
      }
#pragma unroll
      for (int q = 0; q < CLUSTER; ++q) {
#pragma unroll
        for (int n = 0; n < PIECES; ++n) {
          if constexpr (W == INT8)
            multiply_int8<P>(sums[q], ring[q], n / 2, n % 2, X[n]);
          else
            multiply_wide<P>(sums[q], ring[q], n, X[n]);
        }
        load<CLUSTER>(ahead, a, rank, lane, q, ring[q]);  // in place, after its use
      }
    }
    first = (first + (end + CHUNK - 1) / CHUNK) & (WARPS * CLUSTER - 1);

#pragma unroll
    for (int q = 0; q < CLUSTER; ++q) put_sums<TILES>(partial + (warp * CLUSTER + q) * TILE, sums[q], lane);
    block_barrier();
    float* const mine = block_sums + side * CLUSTER * SUMS;
#pragma unroll 1
    for (int o = threadIdx.x; o < CLUSTER * SUMS; o += THREADS) {
      const int q = o / SUMS, t = o % SUMS / ROWS;
      float sum = 0;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) sum += load_shared(partial + (w * CLUSTER + q) * TILE + t * PITCH + o % ROWS);
      store_shared(mine + o, sum);
    }
    // One a unit: `partial` is free then, and the other side of `block_sums` when all threads have come here again.
    cluster_barrier();
#pragma unroll
    for (int i = 0; i < Outputs<TILES>::COUNT; ++i) {
      if (!outputs.exists(a, p, my_row, i)) continue;
      float sum = 0;
#pragma unroll
      for (int b = 0; b < CLUSTER; ++b) {
        sum += load_shared_of(mine + block * SUMS + outputs.token(i) * ROWS + outputs.row(), b);
      }
      outputs.finish(a, here.problem, my_row, i, sum);
    }
  }
  cluster_barrier();  // nobody ends while another block reads its sums
}

}  // namespace t2
