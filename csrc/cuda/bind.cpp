// The CUDA kernel's part of t2kernels._C. Loading it creates no CUDA context: the first launch does.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "problem.h"

namespace t2 {
cudaError_t launch_bf16(const Launch&);
cudaError_t launch_fp16(const Launch&);
}  // namespace t2

namespace {

// packed: the words of problem.h, as the host orders them.
void cuda_launch(const pybind11::bytes& packed) {
  const auto view = static_cast<std::string_view>(packed);
  std::vector<int64_t> words(view.size() / sizeof(int64_t));
  std::memcpy(words.data(), view.data(), words.size() * sizeof(int64_t));
  t2::Launch l;
  if (const char* why = t2::unpack(words.data(), words.size(), l)) throw std::invalid_argument(std::string("CUDA kernel: ") + why);
  const cudaError_t error = l.product == t2::BF16 ? t2::launch_bf16(l) : t2::launch_fp16(l);
  if (error == cudaErrorInvalidDeviceFunction || error == cudaErrorNoKernelImageForDevice)
    throw std::runtime_error("CUDA kernel: this build holds no code for this GPU; build again with its architecture in T2KERNELS_CUDA_ARCHS");
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA kernel: ") + cudaGetErrorString(error));
}

}  // namespace

void bind_cuda(pybind11::module_& m) { m.def("cuda_launch", &cuda_launch); }
