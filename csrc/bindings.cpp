// t2kernels._C, the one door into compiled code. Tensors come as addresses, sizes and strides, streams as integers; what they must be is checked
// in Python before (ops/impls/cpp_kernels.py), memory safety once more where they arrive.
#include <pybind11/pybind11.h>

void bind_cpu(pybind11::module_&);
#ifdef T2KERNELS_WITH_CUDA
void bind_cuda(pybind11::module_&);
#endif

PYBIND11_MODULE(_C, m) {
  bind_cpu(m);
#ifdef T2KERNELS_WITH_CUDA
  bind_cuda(m);
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
}
