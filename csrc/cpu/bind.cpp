// The bindings of the C++ kernels. ops/impls/cpp_kernels.py checks shapes and dtypes and passes addresses, sizes and
// strides. This file checks that no row outside of a tensor is read or written.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

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

// Sets `repeat`. Throws unless `count` ids fit the tokens and are rows of the table.
void check_ids(Shrink& s, int64_t count) {
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
}

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
  check_ids(s, count);
  return s;
}

// A member: U, M, C, stride; and, with `outputs`: base, stride; bias; y
int members_of(const py::tuple& members, int64_t C, Expand* out, bool outputs) {
  const int count = int(members.size());
  if (count < 1 || count > MEMBERS) throw std::invalid_argument("1 to " + std::to_string(MEMBERS) + " members");
  int64_t column = 0;
  for (int i = 0; i < count; ++i) {
    const py::tuple numbers = members[i];
    Reader r{numbers};
    Expand& e = out[i];
    e.U.data = r.address();
    e.U.rows = r.next<int64_t>(), e.U.K = r.next<int64_t>(), e.U.stride = r.next<int64_t>();
    if (outputs) {
      e.base = r.address();
      e.stride_base = r.next<int64_t>();
      e.bias = r.address();
      e.y = r.address();
      e.stride_y = e.U.rows;
    }
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

// A group whose factors and table stay where they are.
struct Group {
  const Kernels* kernels;
  Shrink in{};
  Expand out[MEMBERS]{};
  int count;

  // Vt, C, N, stride, dtype; scale, E, stride. A member: U, M, C, stride
  Group(const py::tuple& numbers, const py::tuple& members, const char* isa) : kernels(&named(isa)) {
    Reader r{numbers};
    in.Vt.data = r.address();
    in.Vt.rows = r.next<int64_t>(), in.Vt.K = r.next<int64_t>(), in.Vt.stride = r.next<int64_t>();
    in.dtype = dtype_of(r.next<int>(), true);
    in.scale = r.address<const float>();
    in.E = r.next<int64_t>(), in.stride_scale = r.next<int64_t>();
    count = members_of(members, in.Vt.rows, out, false);
  }

  // x: [T, N] contiguous. ys: [T, M] of each member, to which its change is added: rows are `stride_y` apart, or M if
  // that is 0.
  void add(uintptr_t x, int64_t T, int x_dtype, uintptr_t ids, int64_t ids_count, bool ids64, int threads,
           const std::vector<uintptr_t>& ys, int64_t stride_y) const {
    int64_t widest = 0;
    for (int i = 0; i < count; ++i) widest = std::max(widest, out[i].U.rows);
    if (stride_y && stride_y < widest) throw std::invalid_argument("rows of y that overlap");
    if (int(ys.size()) != count) throw std::invalid_argument("one base a member");
    Shrink s = in;
    s.x = reinterpret_cast<const void*>(x), s.T = T, s.stride_x = s.Vt.K, s.x_dtype = dtype_of(x_dtype, false);
    s.ids = reinterpret_cast<const void*>(ids), s.ids64 = ids64;
    check_ids(s, ids_count);
    Expand e[MEMBERS];
    for (int i = 0; i < count; ++i) {
      e[i] = out[i];
      e[i].y = reinterpret_cast<void*>(ys[i]), e[i].base = e[i].y;
      e[i].stride_y = e[i].stride_base = stride_y ? stride_y : e[i].U.rows;
    }
    py::gil_scoped_release free;
    svf_linear(*kernels, s, e, count, threads);
  }
};

}  // namespace

void bind_cpu(py::module_& m) {
  py::class_<Group>(m, "CpuGroup")
      .def(py::init<const py::tuple&, const py::tuple&, const char*>())
      .def("add", &Group::add);
  // isa: None for the widest that this CPU has, or "portable", "avx2", "avx512", "avx512_bf16"
  m.def("cpu_isa", [](const char* isa) { return named(isa).name; }, py::arg("isa") = py::none());
  m.def("cpu_find_threads", &find_threads);
  m.def("cpu_svf_linear", [](const py::tuple& first, const py::tuple& members, int threads, const char* isa) {
    const Kernels& k = named(isa);
    const Shrink s = shrink_of(first);
    Expand e[MEMBERS];
    const int count = members_of(members, s.Vt.rows, e, true);
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
    const int count = members_of(members, C, e, true);
    py::gil_scoped_release free;
    expand(k, g, stride, T, e, count, dtype, x_dtype, threads);
  });
}
