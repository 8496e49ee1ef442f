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

}  // namespace t2
