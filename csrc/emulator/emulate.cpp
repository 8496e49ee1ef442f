// The door of the emulator: the words of a launch in, an error or nothing out.
#define T2_EMULATED
#include "../cuda/choose.cuh"

namespace {

void allow(t2::emulator::Kind kind, const void* p, int64_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(p);
  if (p) t2::emulator::machine.ranges.push_back({kind, begin, begin + uintptr_t(bytes)});
}

// What a launch may touch, to the byte.
void allow_all(const t2::Args& a) {
  using namespace t2::emulator;
  machine.ranges.clear();
  allow(IDS, a.ids, int64_t((a.T + a.repeat - 1) / a.repeat) * (a.ids_are_64 ? 8 : 4));
  for (int i = 0; i < a.problems; ++i) {
    const t2::Problem& p = a.problem[i];
    const auto rows = [&](int64_t count, int64_t row, int64_t width) { return (count - 1) * row + width; };
    allow(W, p.W, int64_t(p.R) * p.K * (p.int8 ? 1 : 2));
    allow(X, p.x, rows(a.T, p.x_row, p.K) * 2);
    allow(SCALE, p.scale, rows(a.E, p.scale_row, p.R) * 4);
    allow(BIAS, p.bias, int64_t(p.R) * 2);
    allow(BASE, p.base, rows(a.T, p.base_row, p.R) * 2);
    allow(Y, p.y, rows(a.T, p.y_row, p.R) * 2);
  }
}

}  // namespace

// 0, or 1 with the reason in `error`.
extern "C" __attribute__((visibility("default"))) int t2_emulate(
    const int64_t* words, size_t count, unsigned order, char* error, size_t size) {
  try {
    t2::Launch l;
    if (const char* why = t2::unpack(words, count, l)) throw std::invalid_argument(why);
    allow_all(l.args);
    const auto run = [&](auto kernel, int blocks, int shared) {
      if (shared > int(t2::emulator::SHARED_WORDS) * 4) {
        throw std::invalid_argument("more shared memory than the emulator has");
      }
      t2::emulator::run(unsigned(blocks), t2::THREADS, unsigned(l.cluster), order, [&] { kernel(l.args); });
    };
#ifdef T2_ONE_KERNEL
    if (l.cluster == 1)
      run(t2::skinny_kernel<t2::BF16, t2::WIDE, 1, 4, 2>, l.sms, 0);
    else
      run(t2::cluster_kernel<t2::BF16, t2::WIDE, 2, t2::CLUSTER>, l.cluster, 0);
#else
    const bool found = l.product == t2::BF16 ? t2::with_kernel<t2::BF16>(l, run) : t2::with_kernel<t2::FP16>(l, run);
    if (!found) throw std::invalid_argument("there is no such kernel");
#endif
  } catch (const std::exception& e) {
    std::strncpy(error, e.what(), size - 1);
    error[size - 1] = 0;
    return 1;
  }
  return 0;
}

// All 256 int8 in order as 16-bit floats of a product, as the kernel makes them: out [256].
extern "C" __attribute__((visibility("default"))) void t2_widen_all(int product, uint16_t* out) {
  for (int i = 0; i < 256; i += 4) {
    const uint32_t q = uint32_t(i) * 0x01010101u + 0x03020100u;
    uint32_t low, high;
    product == t2::FP16 ? t2::widen_int8<t2::FP16>(q, low, high) : t2::widen_int8<t2::BF16>(q, low, high);
    out[i] = uint16_t(low), out[i + 1] = uint16_t(low >> 16);
    out[i + 2] = uint16_t(high), out[i + 3] = uint16_t(high >> 16);
  }
}
