#include "launch.cuh"

namespace t2 {
cudaError_t launch_bf16(const Launch& l) { return launch_product<BF16>(l); }
}  // namespace t2
