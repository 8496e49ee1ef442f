#include "launch.cuh"

namespace t2 {
cudaError_t launch_bf16(const Launch& l) { return launch_product<BF16>(l); }
cudaError_t load_bf16(int& architecture) { return load_product<BF16>(architecture); }
}  // namespace t2
