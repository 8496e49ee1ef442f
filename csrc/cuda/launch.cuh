// From a `Launch` to a kernel on a stream. Included once for each product, so that the two compile side by side.
#pragma once
#include <map>
#include <mutex>
#include <utility>

#include "choose.cuh"

namespace t2 {

// How many clusters of a launch run at one time on the current device. If some groups of multiprocessors have an odd
// number, these are fewer than a quarter of the multiprocessors. One cluster more would run alone, after the others.
inline cudaError_t resident_clusters(const void* kernel, const cudaLaunchConfig_t& how, int& found) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> known;
  int device = 0;
  if (cudaError_t error = cudaGetDevice(&device)) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  int& n = known[{kernel, device}];
  cudaError_t error = cudaSuccess;
  if (!n) error = cudaOccupancyMaxActiveClusters(&n, kernel, &how);
  found = n;
  return error;
}

template <Product P>
cudaError_t launch_product(const Launch& l) {
  cudaError_t error = cudaSuccess;
  const bool found = with_kernel<P>(l, [&](auto kernel, int blocks, int shared) {
    cudaLaunchAttribute attributes[2] = {};
    int count = 0;
    if (l.dependent) {
      attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[count++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (l.cluster > 1) {
      attributes[count].id = cudaLaunchAttributeClusterDimension;
      attributes[count].val.clusterDim.x = l.cluster;
      attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
      ++count;
    }
    cudaLaunchConfig_t how = {};
    how.dynamicSmemBytes = shared;
    how.gridDim = dim3(blocks);
    how.blockDim = dim3(THREADS);
    how.stream = static_cast<cudaStream_t>(l.stream);
    how.attrs = attributes;
    how.numAttrs = count;
    if (l.cluster > 1) {
      int most = 0;
      error = resident_clusters(reinterpret_cast<const void*>(kernel), how, most);
      if (error != cudaSuccess) return;
      if (most > 0 && most * l.cluster < blocks) how.gridDim.x = most * l.cluster;
    }
    error = cudaLaunchKernelEx(&how, kernel, l.args);
  });
  return found ? error : cudaErrorInvalidValue;
}

// Loads every kernel on the current device, which must not happen first while a graph is captured. `architecture`
// becomes that of the code which runs there (80, 90, ...): only from 90 on it waits for the previous kernel, and a
// dependent launch needs that wait.
template <Product P>
cudaError_t load_product(int& architecture) {
  Launch l{};
  l.sms = 1;
  l.args.problems = 1;
  l.args.unit_end[0] = 1;
  cudaError_t error = cudaSuccess;
  const auto load = [&](auto kernel, int, int shared) {
    cudaFuncAttributes attributes;
    error = cudaFuncGetAttributes(&attributes, kernel);
    if (error == cudaSuccess) architecture = min(architecture, attributes.ptxVersion);
    if (error == cudaSuccess && shared > 48 * 1024 && attributes.ptxVersion >= 90)
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  };
  for (const Weights weights : {WIDE, INT8})
    for (const int T : {8, 16, 32})
      for (const int cluster : {1, CLUSTER}) {
        l.weights = weights, l.args.T = T, l.cluster = cluster;
        with_kernel<P>(l, load);
        if (error != cudaSuccess) return error;
      }
  return cudaSuccess;
}

}  // namespace t2
