#include "products.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

#include "threads.h"

namespace t2cpu {
namespace {

struct Free {
  void operator()(char* p) const { ::operator delete(p, std::align_val_t(64)); }
};
using Room = std::unique_ptr<char, Free>;
Room room(int64_t bytes) { return Room(static_cast<char*>(::operator new(bytes, std::align_val_t(64)))); }

int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step; }

}  // namespace

void multiply(const Products& t, const Product& p, int threads) {
  if (!p.X.rows || !p.Y.rows) return;
  const int64_t tiles = up(p.X.rows, t.tile), panels = up(p.Y.rows, t.panel_rows);
  const Room x = room(tiles * t.tile * t.x_bytes), all = room(std::max(1, threads) * t.panel_rows * t.y_bytes);
  for (int64_t k = 0; k < std::max<int64_t>(p.K, 1); k += t.depth) {
    std::atomic<int64_t> packed{0}, taken{0}, number{0};
    parallel(threads, [&] {
      for (int64_t i; (i = packed++) < tiles;) t.pack_x(p, k, i * t.tile, x.get() + i * t.tile * t.x_bytes);
    });
    parallel(threads, [&] {
      char* mine = all.get() + number++ * t.panel_rows * t.y_bytes;
      // the last panels first: with `upper` they take longest
      for (int64_t j; (j = taken++) < panels;) t.panel(p, k, (panels - 1 - j) * t.panel_rows, x.get(), mine);
    });
  }
}

const Products* products(int sum) {
#if defined(__x86_64__)
  static const bool wide = __builtin_cpu_supports("avx512f");
  static const bool halves = wide && __builtin_cpu_supports("avx512bf16");
#else
  constexpr bool wide = false, halves = false;
#endif
  if (sum == PAIRS) return halves ? products_avx512bf16(sum) : nullptr;
  return wide ? products_avx512(sum) : nullptr;
}

}  // namespace t2cpu
