// t2kernels._C, the one door into compiled code. Tensors come as addresses, sizes and strides, streams as integers.
// Python checks shapes and dtypes (ops/impls/); each binding checks again what memory safety needs.
#include <pybind11/pybind11.h>

void bind_cpu(pybind11::module_&);
void bind_products(pybind11::module_&);
#ifdef T2KERNELS_WITH_CUDA
void bind_cuda(pybind11::module_&);
#endif

PYBIND11_MODULE(_C, m) {
  bind_cpu(m);
  bind_products(m);
  m.attr("interface") = 4;  // as in ops/impls/extension.py
#ifdef T2KERNELS_WITH_CUDA
  bind_cuda(m);
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
}
