// Chooses the kernel instance of a launch, and the number of its blocks.
#pragma once
#include "cluster.cuh"
#include "skinny.cuh"

namespace t2 {

constexpr int CLUSTER = 4;  // blocks that share their sums: in bf16, x of 32 tokens then costs half of W (computed)

// Calls run(kernel, blocks, bytes of dynamic shared memory) with the instance for a launch. False if there is none.
template <Product P, class Run>
bool with_kernel(const Launch& l, Run run) {
  const Args& a = l.args;
  const int units = a.unit_end[a.problems - 1];
  const auto at_most = [&](int blocks) { return units < blocks ? units : blocks; };
#define T2_RUN(W, TILES, DEPTH, RESIDENT) \
  return run(skinny_kernel<P, W, TILES, DEPTH, RESIDENT>, at_most(l.sms * RESIDENT), 0), true
#define T2_RUN_CLUSTER(W, TILES) \
  return run(cluster_kernel<P, W, TILES, CLUSTER>, clusters * CLUSTER, SHARED_BYTES<TILES, CLUSTER>), true
  if (l.cluster > 1) {
    if (l.cluster != CLUSTER || a.T <= 8) return false;
    const int clusters = at_most(l.sms / CLUSTER > 0 ? l.sms / CLUSTER : 1);
    if (l.weights == WIDE && a.T <= 16) T2_RUN_CLUSTER(WIDE, 2);
    if (l.weights == WIDE) T2_RUN_CLUSTER(WIDE, 4);
    if (a.T <= 16) T2_RUN_CLUSTER(INT8, 2);
    T2_RUN_CLUSTER(INT8, 4);
  }
  // DEPTH: 64 to 128 KB in flight a multiprocessor (2 blocks of 256 threads, 64 bytes a chunk), if registers allow it.
  if (a.T <= 8) {
    if (l.weights == WIDE) T2_RUN(WIDE, 1, 4, 2);
    T2_RUN(INT8, 1, 3, 2);
  }
  if (a.T <= 16) {
    if (l.weights == WIDE) T2_RUN(WIDE, 2, 3, 2);
    T2_RUN(INT8, 2, 2, 2);
  }
  if (l.weights == WIDE) T2_RUN(WIDE, 4, 4, 1);
  T2_RUN(INT8, 4, 4, 1);
#undef T2_RUN
#undef T2_RUN_CLUSTER
}

}  // namespace t2
