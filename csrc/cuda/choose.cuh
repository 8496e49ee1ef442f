// Which kernel a launch wants, and on how many blocks.
#pragma once
#include "cluster.cuh"
#include "skinny.cuh"

namespace t2 {

constexpr int CLUSTER = 4;  // blocks that share their sums: at 32 tokens x then costs half of what W does in bf16 (computed)

// Calls run(kernel, blocks, bytes of dynamic shared memory) with the instance that a launch wants; false where there is none.
template <Product P, class Run>
bool with_kernel(const Launch& l, Run run) {
  const Args& a = l.args;
  const auto grid = [&](int resident) {
    const int first = a.unit_end[a.first - 1], rest = a.unit_end[a.problems - 1] - first, units = first > rest ? first : rest;
    int blocks = l.sms * resident;
    if (l.blocks && l.blocks < blocks) blocks = l.blocks;
    return units < blocks ? units : blocks;
  };
#define T2_RUN(W, TILES, FUSED, DEPTH, RESIDENT) return run(skinny_kernel<P, W, TILES, FUSED, DEPTH, RESIDENT>, grid(RESIDENT), 0), true
#define T2_RUN_CLUSTER(W, TILES) return run(cluster_kernel<P, W, TILES, CLUSTER>, clusters() * CLUSTER, SHARED_BYTES<TILES, CLUSTER>), true
  if (l.cluster > 1) {
    const auto clusters = [&] {
      const int units = a.unit_end[a.problems - 1];
      int most = l.sms / CLUSTER > 0 ? l.sms / CLUSTER : 1;
      if (l.blocks && l.blocks / CLUSTER < most) most = l.blocks / CLUSTER > 0 ? l.blocks / CLUSTER : 1;
      return units < most ? units : most;
    };
    if (l.cluster != CLUSTER || a.T <= 8 || l.fused || l.depth) return false;
    if (l.weights == WIDE && a.T <= 16) T2_RUN_CLUSTER(WIDE, 2);
    if (l.weights == WIDE) T2_RUN_CLUSTER(WIDE, 4);
    if (l.weights == INT8 && a.T <= 16) T2_RUN_CLUSTER(INT8, 2);
    if (l.weights == INT8) T2_RUN_CLUSTER(INT8, 4);
    return false;
  }
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
#undef T2_RUN_CLUSTER
}

}  // namespace t2
