// The binding of `multiply`. factors/algorithms/compiled.py checks shapes, dtypes and strides.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "products.h"

namespace py = pybind11;
using namespace t2cpu;

namespace {

// address, number, rows, stride of a row, stride of k
View view_of(const py::tuple& t) {
  const View v{reinterpret_cast<const void*>(py::cast<uintptr_t>(t[0])), py::cast<int>(t[1]), py::cast<int64_t>(t[2]),
               py::cast<int64_t>(t[3]), py::cast<int64_t>(t[4])};
  if (v.number < N_F32 || v.number > N_F64) throw std::invalid_argument("an unknown number");
  return v;
}

}  // namespace

void bind_products(py::module_& m) {
  m.def("cpu_can_multiply", [](int sum) { return products(sum) != nullptr; });
  m.def("cpu_multiply", [](int sum, const py::tuple& X, const py::tuple& Y, int64_t K, uintptr_t C, int64_t stride,
                           bool add, bool upper, int threads) {
    const Products* t = products(sum);
    if (t == nullptr) throw std::invalid_argument("this CPU, or this build, has no such product");
    const Product p{view_of(X), view_of(Y), K, reinterpret_cast<void*>(C), stride, add, upper};
    for (const View& v : {p.X, p.Y}) {
      if (sum == PAIRS ? v.number != N_BF16 : sum == FLOATS && v.number == N_F64) {
        throw std::invalid_argument("numbers that the sums do not hold");
      }
    }
    if (stride < p.Y.rows || K < 0) throw std::invalid_argument("rows of C that overlap, or K below 0");
    py::gil_scoped_release free;
    multiply(*t, p, threads);
  });
}
