// Addresses, sizes and strides come from ops/cpp_kernels.py, which looks at shapes and dtypes; here it is seen to that no row is read or written
// that is not there.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "svf_cpu.h"

namespace py = pybind11;
using namespace t2cpu;

namespace {

const void* pointer(uintptr_t address) { return reinterpret_cast<const void*>(address); }

int dtype_of(int dtype, bool factor) {
  if (dtype < F32 || dtype > (factor ? I8 : F16)) throw std::invalid_argument("dtype " + std::to_string(dtype) + " is unknown");
  return dtype;
}

// (x, T, stride, dtype), (Vt, C, N, stride, dtype), (scale, E, stride), (ids, count, repeat, 64 bits)
Shrink shrink_of(const py::tuple& x, const py::tuple& Vt, const py::tuple& scale, const py::tuple& ids) {
  Shrink s{};
  s.x = pointer(x[0].cast<uintptr_t>());
  s.T = x[1].cast<int64_t>();
  s.stride_x = x[2].cast<int64_t>();
  s.x_dtype = dtype_of(x[3].cast<int>(), false);
  s.Vt = {pointer(Vt[0].cast<uintptr_t>()), Vt[1].cast<int64_t>(), Vt[2].cast<int64_t>(), Vt[3].cast<int64_t>()};
  s.dtype = dtype_of(Vt[4].cast<int>(), true);
  s.scale = static_cast<const float*>(pointer(scale[0].cast<uintptr_t>()));
  s.E = scale[1].cast<int64_t>();
  s.stride_scale = scale[2].cast<int64_t>();
  s.ids = pointer(ids[0].cast<uintptr_t>());
  const int64_t count = ids[1].cast<int64_t>();
  s.repeat = ids[2].cast<int64_t>();
  s.ids64 = ids[3].cast<bool>();
  if (s.T < 0 || s.repeat < 1 || count * s.repeat < s.T) throw std::invalid_argument("fewer ids than tokens");
  for (int64_t i = 0; i < count; ++i) {
    const int64_t e = s.ids64 ? static_cast<const int64_t*>(s.ids)[i] : static_cast<const int32_t*>(s.ids)[i];
    if (e < 0 || e >= s.E)
      throw py::index_error("svf_linear: expert_ids holds " + std::to_string(e) + "; scale has rows 0 to " + std::to_string(s.E - 1));
  }
  return s;
}

// A member: (U, M, C, stride, base, stride, bias, y, stride)
int expand_of(const py::tuple& members, int64_t C, Expand* out) {
  const int count = int(members.size());
  if (count < 1 || count > MEMBERS) throw std::invalid_argument("1 to " + std::to_string(MEMBERS) + " members");
  int64_t column = 0;
  for (int i = 0; i < count; ++i) {
    const py::tuple m = members[i];
    Expand& e = out[i];
    e.U = {pointer(m[0].cast<uintptr_t>()), m[1].cast<int64_t>(), m[2].cast<int64_t>(), m[3].cast<int64_t>()};
    e.column = column;
    e.base = pointer(m[4].cast<uintptr_t>());
    e.stride_base = m[5].cast<int64_t>();
    e.bias = pointer(m[6].cast<uintptr_t>());
    e.y = const_cast<void*>(pointer(m[7].cast<uintptr_t>()));
    e.stride_y = m[8].cast<int64_t>();
    column += e.U.K;
  }
  if (column != C) throw std::invalid_argument("the members have " + std::to_string(column) + " columns, V has " + std::to_string(C));
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
  m.def("cpu_svf_linear", [](const py::tuple& x, const py::tuple& Vt, const py::tuple& scale, const py::tuple& ids, const py::tuple& members,
                             int threads, const char* isa) {
    const Kernels& k = named(isa);
    const Shrink s = shrink_of(x, Vt, scale, ids);
    Expand e[MEMBERS];
    const int count = expand_of(members, s.Vt.rows, e);
    py::gil_scoped_release free;
    svf_linear(k, s, e, count, threads);
  });
  // g: (address, stride) of [T, C] fp32
  m.def("cpu_shrink", [](const py::tuple& x, const py::tuple& Vt, const py::tuple& scale, const py::tuple& ids, const py::tuple& g, int threads,
                         const char* isa) {
    const Kernels& k = named(isa);
    const Shrink s = shrink_of(x, Vt, scale, ids);
    float* out = static_cast<float*>(const_cast<void*>(pointer(g[0].cast<uintptr_t>())));
    const int64_t stride = g[1].cast<int64_t>();
    py::gil_scoped_release free;
    shrink(k, s, out, stride, threads);
  });
  // g: (address, T, C, stride)
  m.def("cpu_expand", [](const py::tuple& g, const py::tuple& members, int dtype, int x_dtype, int threads, const char* isa) {
    const Kernels& k = named(isa);
    Expand e[MEMBERS];
    const int count = expand_of(members, g[2].cast<int64_t>(), e);
    const float* in = static_cast<const float*>(pointer(g[0].cast<uintptr_t>()));
    const int64_t T = g[1].cast<int64_t>(), stride = g[3].cast<int64_t>();
    dtype_of(dtype, true), dtype_of(x_dtype, false);
    py::gil_scoped_release free;
    expand(k, in, stride, T, e, count, dtype, x_dtype, threads);
  });
}
