// The bindings of the C++ kernels. ops/impls/cpp_kernels.py checks shapes and dtypes and passes addresses, sizes and
// strides. This file checks that no row outside of a tensor is read or written.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "svf_cpu.h"

namespace py = pybind11;
using namespace t2cpu;

namespace {

int dtype_of(int dtype, bool factor) {
  if (dtype < F32 || dtype > (factor ? I8 : F16)) {
    throw std::invalid_argument("dtype " + std::to_string(dtype) + " is unknown");
  }
  return dtype;
}

// Takes the numbers of a tuple one after the other.
struct Reader {
  const py::tuple& from;
  size_t i = 0;
  template <class T>
  T next() {
    if (i >= from.size()) throw std::invalid_argument("too few numbers");
    return py::cast<T>(py::handle(PyTuple_GET_ITEM(from.ptr(), Py_ssize_t(i++))));
  }
  template <class T = void>
  T* address() {
    return reinterpret_cast<T*>(next<uintptr_t>());
  }
};

// x, T, stride, dtype; Vt, C, N, stride, dtype; scale, E, stride; ids, count, whether they have 64 bits
Shrink shrink_of(const py::tuple& numbers) {
  Reader r{numbers};
  Shrink s{};
  s.x = r.address();
  s.T = r.next<int64_t>(), s.stride_x = r.next<int64_t>();
  s.x_dtype = dtype_of(r.next<int>(), false);
  s.Vt.data = r.address();
  s.Vt.rows = r.next<int64_t>(), s.Vt.K = r.next<int64_t>(), s.Vt.stride = r.next<int64_t>();
  s.dtype = dtype_of(r.next<int>(), true);
  s.scale = r.address<const float>();
  s.E = r.next<int64_t>(), s.stride_scale = r.next<int64_t>();
  s.ids = r.address();
  const int64_t count = r.next<int64_t>();
  s.ids64 = r.next<bool>();
  if (count == 0 ? s.T != 0 : s.T % count != 0) {
    throw std::invalid_argument(std::to_string(count) + " ids for " + std::to_string(s.T) + " tokens");
  }
  s.repeat = count ? s.T / count : 1;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t e = s.ids64 ? static_cast<const int64_t*>(s.ids)[i] : static_cast<const int32_t*>(s.ids)[i];
    if (e < 0 || e >= s.E) {
      throw py::index_error("svf_linear: expert_ids holds " + std::to_string(e) + "; scale has rows 0 to " +
                            std::to_string(s.E - 1));
    }
  }
  return s;
}

// A member: U, M, C, stride; base, stride; bias; y
int expand_of(const py::tuple& members, int64_t C, Expand* out) {
  const int count = int(members.size());
  if (count < 1 || count > MEMBERS) throw std::invalid_argument("1 to " + std::to_string(MEMBERS) + " members");
  int64_t column = 0;
  for (int i = 0; i < count; ++i) {
    const py::tuple numbers = members[i];
    Reader r{numbers};
    Expand& e = out[i];
    e.U.data = r.address();
    e.U.rows = r.next<int64_t>(), e.U.K = r.next<int64_t>(), e.U.stride = r.next<int64_t>();
    e.base = r.address();
    e.stride_base = r.next<int64_t>();
    e.bias = r.address();
    e.y = r.address();
    e.column = column;
    column += e.U.K;
  }
  if (column != C) {
    throw std::invalid_argument("the members have " + std::to_string(column) + " columns, V has " + std::to_string(C));
  }
  return count;
}

const Kernels& named(const char* name) {
  const Kernels* k = kernels(name);
  if (k == nullptr) throw std::invalid_argument(std::string("this CPU, or this build, has no ") + name);
  return *k;
}

}  // namespace

void bind_cpu(py::module_& m) {
  // isa: None for the widest that this CPU has, or "portable", "avx2", "avx512"
  m.def("cpu_isa", [](const char* isa) { return named(isa).name; }, py::arg("isa") = py::none());
  m.def("cpu_find_threads", &find_threads);
  m.def("cpu_svf_linear", [](const py::tuple& first, const py::tuple& members, int threads, const char* isa) {
    const Kernels& k = named(isa);
    const Shrink s = shrink_of(first);
    Expand e[MEMBERS];
    const int count = expand_of(members, s.Vt.rows, e);
    py::gil_scoped_release free;
    svf_linear(k, s, e, count, threads);
  });
  // g: the address of [T, C] fp32
  m.def("cpu_shrink", [](const py::tuple& first, uintptr_t g, int threads, const char* isa) {
    const Kernels& k = named(isa);
    const Shrink s = shrink_of(first);
    py::gil_scoped_release free;
    shrink(k, s, reinterpret_cast<float*>(g), threads);
  });
  // g, T, C, stride; dtype of U; dtype of base, bias and y
  m.def("cpu_expand", [](const py::tuple& numbers, const py::tuple& members, int threads, const char* isa) {
    const Kernels& k = named(isa);
    Reader r{numbers};
    const float* g = r.address<const float>();
    const int64_t T = r.next<int64_t>(), C = r.next<int64_t>(), stride = r.next<int64_t>();
    const int dtype = dtype_of(r.next<int>(), true), x_dtype = dtype_of(r.next<int>(), false);
    Expand e[MEMBERS];
    const int count = expand_of(members, C, e);
    py::gil_scoped_release free;
    expand(k, g, stride, T, e, count, dtype, x_dtype, threads);
  });
}
