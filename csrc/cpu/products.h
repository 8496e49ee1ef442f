// C = X Yᵀ of large matrices, in wide sums, for the decomposition of weights: torch rounds bf16 products to bf16, and
// its fp64 ones use half of the vector units of some CPUs.
//
//   c[i, j] = (add ? c[i, j] : 0) + sum_k X[i, k] Y[j, k]
//
// PAIRS: X and Y in bf16, sums in fp32; FLOATS, DOUBLES: X and Y are widened to what is summed. Nothing is rounded but
// the sums. Each number is summed in an order that depends on K alone: threads do not change its bits.
#pragma once
#include <cstdint>

namespace t2cpu {

enum Sum : int { PAIRS = 0, FLOATS = 1, DOUBLES = 2 };
enum Number : int { N_F32 = 0, N_BF16 = 1, N_F64 = 2 };
constexpr int64_t bytes_of(int number) { return number == N_F32 ? 4 : number == N_BF16 ? 2 : 8; }

struct View {  // [rows, K], strides in numbers
  const void* data;
  int number;
  int64_t rows, stride, stride_k;
};

struct Product {
  View X, Y;
  int64_t K;
  void* C;  // fp32 or fp64, [X.rows, Y.rows], contiguous columns
  int64_t stride;
  bool add;
  bool upper;  // tiles below the diagonal are left as they are
};

// A product of one strip of K: `pack_x` for tiles of rows of X, then `panel` for panels of rows of Y, in any order.
struct Products {
  int64_t depth, tile, panel_rows;           // of a strip; rows of X in a tile; rows of Y in a panel
  int64_t x_bytes, y_bytes;                  // of a packed row of X, and a packed row of Y
  void (*pack_x)(const Product&, int64_t first_k, int64_t row, void* out);
  void (*panel)(const Product&, int64_t first_k, int64_t row, const void* packed_x, void* room);
};

const Products* products_avx512(int sum);      // FLOATS and DOUBLES; null where it was not compiled
const Products* products_avx512bf16(int sum);  // PAIRS; the same

// What this CPU runs, or null.
const Products* products(int sum);
void multiply(const Products&, const Product&, int threads);

}  // namespace t2cpu
