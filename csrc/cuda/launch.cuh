// From a `Launch` to a kernel on a stream; included once for each product, so that the two compile side by side.
#pragma once
#include "skinny.cuh"

namespace t2 {

template <Product P>
cudaError_t launch_product(const Launch& l) {
  cudaError_t error = cudaSuccess;
  const bool found = with_kernel<P>(l, [&](auto kernel, int blocks) {
    cudaLaunchAttribute attributes[1] = {};
    if (l.fused) {
      attributes[0].id = cudaLaunchAttributeCooperative;
      attributes[0].val.cooperative = 1;
    } else {
      attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[0].val.programmaticStreamSerializationAllowed = 1;
    }
    cudaLaunchConfig_t how = {};
    how.gridDim = dim3(blocks);
    how.blockDim = dim3(THREADS);
    how.stream = static_cast<cudaStream_t>(l.stream);
    how.attrs = attributes;
    how.numAttrs = l.fused || l.dependent;
    error = cudaLaunchKernelEx(&how, kernel, l.args);
  });
  return found ? error : cudaErrorInvalidValue;
}

// Loads every kernel on the current device, which must not happen first while a graph is captured, and says for which architecture (80, 90, ...)
// the code that runs there was written: only from 90 on does it wait for the kernel before, which a dependent launch relies on.
template <Product P>
cudaError_t load_product(int& architecture) {
  Launch l{};
  l.sms = 1;
  l.args.problems = l.args.first = 1;
  l.args.unit_end[0] = 1;
  for (const bool fused : {false, true})
    for (const int T : {8, 16, 32})
      for (const Weights weights : {WIDE, INT8, BOTH}) {
        l.fused = fused, l.args.T = T, l.weights = weights;
        cudaError_t error = cudaSuccess;
        with_kernel<P>(l, [&](auto kernel, int) {
          cudaFuncAttributes attributes;
          error = cudaFuncGetAttributes(&attributes, kernel);
          if (error == cudaSuccess) architecture = min(architecture, attributes.ptxVersion);
        });
        if (error != cudaSuccess) return error;
      }
  return cudaSuccess;
}

}  // namespace t2
