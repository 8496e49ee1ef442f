#include "launch.cuh"

namespace t2 {
cudaError_t launch_fp16(const Launch& l) { return launch_product<FP16>(l); }
cudaError_t load_fp16(int& architecture) { return load_product<FP16>(architecture); }
}  // namespace t2
