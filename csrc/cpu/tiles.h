// A strip of a product in tiles that stay in registers. Each file includes it for its own instruction set.
#pragma once
#include <algorithm>

#include "floats.h"
#include "products.h"

namespace t2cpu {
namespace {

// S: one way to sum. Item: what a packed row holds for `pair` numbers of k; Sum: of C; `lanes` sums in a Vector
template <class S>
struct Tiles {
  using Item = typename S::Item;
  using Number = typename S::Number;
  static constexpr int rows = 8, vectors = 3, width = vectors * S::lanes;

  // out[k * count + r] = the k-th item of row r, for count rows of which those behind the last are zero.
  template <int count, class From>
  static void pack(const View& v, int64_t row, int64_t first_k, int64_t depth, Item* out) {
    const From* from = static_cast<const From*>(v.data) + row * v.stride + first_k * v.stride_k;
    const int n = int(std::min<int64_t>(count, v.rows - row));
    const int64_t whole = depth / S::pair;
    if (n < count) std::fill(out, out + (depth + S::pair - 1) / S::pair * count, Item{});
    if (v.stride == 1 && n == count) {
      for (int64_t k = 0; k < whole; ++k) {
        const From* a = from + k * S::pair * v.stride_k;
        for (int r = 0; r < count; ++r) out[k * count + r] = S::item(a[r], a[r + (S::pair - 1) * v.stride_k]);
      }
    } else {
      constexpr int64_t BATCH = 16;  // items of a row that are read together
      for (int64_t k = 0; k < whole; k += BATCH) {
        const int64_t end = std::min(k + BATCH, whole);
        for (int r = 0; r < n; ++r) {
          const From* a = from + r * v.stride;
          for (int64_t i = k; i < end; ++i) {
            out[i * count + r] = S::item(a[i * S::pair * v.stride_k], a[(i * S::pair + S::pair - 1) * v.stride_k]);
          }
        }
      }
    }
    if (whole * S::pair < depth) {  // one number without a partner
      for (int r = 0; r < n; ++r) {
        out[whole * count + r] = S::item(from[r * v.stride + (depth - 1) * v.stride_k], From{});
      }
    }
  }

  template <int count>
  static void pack(const View& v, int64_t row, int64_t first_k, int64_t depth, Item* out) {
    if (v.number == N_BF16) return pack<count, Bf16>(v, row, first_k, depth, out);
    if constexpr (S::pair == 1) {
      if (v.number == N_F32) return pack<count, float>(v, row, first_k, depth, out);
      if constexpr (sizeof(Number) == 8) pack<count, double>(v, row, first_k, depth, out);
    }
  }

  static int64_t depth_at(const Product& p, int64_t first_k) { return std::min(S::depth, p.K - first_k); }

  static void pack_x(const Product& p, int64_t first_k, int64_t row, void* out) {
    pack<rows>(p.X, row, first_k, depth_at(p, first_k), static_cast<Item*>(out));
  }

  static void panel(const Product& p, int64_t first_k, int64_t row, const void* packed_x, void* room) {
    const int64_t depth = depth_at(p, first_k), items = (depth + S::pair - 1) / S::pair;
    Item* y = static_cast<Item*>(room);
    pack<width>(p.Y, row, first_k, depth, y);
    const int64_t end = p.upper ? std::min(p.X.rows, row + width) : p.X.rows;
    const bool add = p.add || first_k;
    for (int64_t i = 0; i < end; i += rows) {
      const Item* x = static_cast<const Item*>(packed_x) + i * (S::depth / S::pair);
      Number* c = static_cast<Number*>(p.C) + i * p.stride + row;
      const int64_t high = std::min<int64_t>(rows, p.X.rows - i), wide = std::min<int64_t>(width, p.Y.rows - row);
      if (high == rows && wide == width) {
        tile(x, y, items, c, p.stride, add);
        continue;
      }
      alignas(64) Number part[rows * width];
      tile(x, y, items, part, width, false);
      for (int64_t r = 0; r < high; ++r)
        for (int64_t j = 0; j < wide; ++j) {
          Number& to = c[r * p.stride + j];
          to = add ? to + part[r * width + j] : part[r * width + j];
        }
    }
  }

  static void tile(const Item* x, const Item* y, int64_t items, Number* c, int64_t stride, bool add) {
    typename S::Vector sum[rows][vectors];
    for (auto& row : sum)
      for (auto& s : row) s = S::zero();
    for (int64_t k = 0; k < items; ++k, x += rows, y += width) {
      typename S::Packed w[vectors];
      for (int v = 0; v < vectors; ++v) w[v] = S::load(y + v * S::lanes);
      for (int r = 0; r < rows; ++r) {
        const typename S::Packed a = S::all(x[r]);
        for (int v = 0; v < vectors; ++v) sum[r][v] = S::fma(a, w[v], sum[r][v]);
      }
    }
    for (int r = 0; r < rows; ++r)
      for (int v = 0; v < vectors; ++v) S::store(c + r * stride + v * S::lanes, sum[r][v], add);
  }

  static const Products* table() {
    static const Products t{S::depth, rows, width, int64_t(S::depth / S::pair * sizeof(Item)),
                            int64_t(S::depth / S::pair * sizeof(Item)), pack_x, panel};
    return &t;
  }
};

}  // namespace
}  // namespace t2cpu
