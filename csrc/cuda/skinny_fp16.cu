#include "launch.cuh"

namespace t2 {
cudaError_t launch_fp16(const Launch& l) { return launch_product<FP16>(l); }
}  // namespace t2
