// The bindings of the CUDA kernel. Loading them creates no CUDA context: the first launch does.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>

#include "problem.h"

namespace t2 {
cudaError_t launch_bf16(const Launch&);
cudaError_t launch_fp16(const Launch&);
cudaError_t load_bf16(int& architecture);
cudaError_t load_fp16(int& architecture);
}  // namespace t2

namespace {

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  if (error == cudaErrorInvalidDeviceFunction || error == cudaErrorNoKernelImageForDevice)
    throw std::runtime_error(
        "CUDA kernel: this build has no code for this GPU; build again with its architecture in T2KERNELS_CUDA_ARCHS");
  throw std::runtime_error(std::string("CUDA kernel: ") + cudaGetErrorString(error));
}

// The architecture that the code on the current device was compiled for. The first call loads the code.
int architecture() {
  constexpr int DEVICES = 64;
  static std::atomic<int> known[DEVICES];
  int device = 0;
  check(cudaGetDevice(&device));
  int found = device < DEVICES ? known[device].load() : 0;
  if (!found) {
    found = 1 << 20;
    check(t2::load_bf16(found));
    check(t2::load_fp16(found));
    if (device < DEVICES) known[device].store(found);
  }
  return found;
}

// packed: the words of problem.h, in the order of the host.
void cuda_launch(const pybind11::bytes& packed) {
  constexpr size_t MOST = t2::HEADER + t2::PROBLEMS * t2::WORDS;
  const auto view = static_cast<std::string_view>(packed);
  if (view.size() > MOST * sizeof(int64_t) || view.size() % sizeof(int64_t)) {
    const std::string size = std::to_string(view.size());
    throw std::invalid_argument("CUDA kernel: expected the words of a launch, got " + size + " bytes");
  }
  int64_t words[MOST];
  std::memcpy(words, view.data(), view.size());
  t2::Launch l;
  if (const char* reason = t2::unpack(words, view.size() / sizeof(int64_t), l)) {
    throw std::invalid_argument(std::string("CUDA kernel: ") + reason);
  }
  const bool modern = architecture() >= 90;
  if (l.cluster > 1 && !modern) {
    throw std::invalid_argument("CUDA kernel: clusters of thread blocks need sm_90 or later");
  }
  l.dependent = l.dependent && modern;
  check(l.product == t2::BF16 ? t2::launch_bf16(l) : t2::launch_fp16(l));
}

}  // namespace

void bind_cuda(pybind11::module_& m) {
  m.def("cuda_launch", &cuda_launch);
  m.def("cuda_architecture", &architecture);
}
