// The C++ implementation for CPUs: a call as plain pointers and sizes, and one table of functions an instruction set.
//
//   g[t, c] = (sum_n x[t, n] Vt[c, n]) * scale[ids[t / repeat], c]
//   y[t, m] = base[t, m] + sum_c g[t, c] U[m, c] + bias[m]
//
// Vt [C, N] and U [M, C] have contiguous rows and are streamed once.
//
// x, V and U are widened to fp32, exactly; products, g and sums are fp32, and y is rounded once. By the instructions
// for bf16, x and V in bf16 are multiplied as they are, as exactly, but subnormal numbers count as 0. In calls of more
// than FEW tokens they also multiply g, rounded to bf16 once, with U. One thread sums a number of y or g, in an order
// that depends on its row alone: threads, other tokens and other members do not change its bits.
#pragma once
#include <cstdint>

namespace t2cpu {

enum Dtype : int { F32 = 0, BF16 = 1, F16 = 2, I8 = 3 };
constexpr int64_t size_of(int dtype) { return dtype == F32 ? 4 : dtype == I8 ? 1 : 2; }

constexpr int TILE = 8;    // tokens that use a weight while it is in a register
// rows that are finished together: a multiple of LANE, and of the rows that any kernel takes at once
constexpr int BLOCK = 48;
constexpr int SHORT = 128;  // the columns of a block, in fp32, take 24 KB of the first cache
constexpr int SUMS = BLOCK * TILE + 4;
// Tokens between two readings of the factors, which bounds the scratch. From 8 on arithmetic costs more than reading.
constexpr int TOKENS = 64;
constexpr int FEW = 32;    // of a decode step, in which g stays in fp32
constexpr int MANY = 512;  // the same with `add`: a block of U is packed once for them
constexpr int MEMBERS = 8;  // matrices that share x in one call
constexpr int LANE = 16;   // fp32 numbers of the widest vector; x and g are padded with zeros to a multiple of it

struct Matrix {  // [rows, K] with K contiguous
  const void* data;
  int64_t rows, K, stride;
};

struct Shrink {
  const void* x;
  int64_t T, stride_x;
  int x_dtype, dtype;  // of x; of V and U
  Matrix Vt;
  const float* scale;
  int64_t E, stride_scale;
  const void* ids;
  int64_t repeat;
  bool ids64;
};

struct Expand {
  Matrix U;
  int64_t column;    // where its columns of g begin
  const void* base;  // may be null, as bias may
  int64_t stride_base;
  const void* bias;
  void* y;           // [T, rows]; rows are contiguous
  int64_t stride_y;
};

struct Kernels {
  const char* name;
  // out[n] = in[n] as fp32
  void (*widen)(int dtype, const void* in, int64_t n, float* out);
  // out[r * T + t] = sum_k W[r, k] x[t, k] for r < rows <= BLOCK, t < T <= TILE. x is padded with zeros to a multiple
  // of LANE. out: SUMS numbers; those behind the last sum are undefined afterwards
  void (*dot)(int dtype, const void* W, int64_t stride, int rows, int64_t K, const float* x, int64_t stride_x, int T,
              float* out);
  // The same sums for short rows, K <= SHORT: a whole block at once, without adding up the lanes of a vector. Null if
  // the instruction set has no use for it. `columns`: out[k * BLOCK + r] = W[r, k] as fp32, once for all tokens.
  // `across`: out[t * BLOCK + r] = sum_k columns[k * BLOCK + r] x[t, k] for T <= TILE. Meanwhile K times `ahead` bytes
  // at `next` come into the cache, unless that is null: memory would rest while the sums are made
  void (*columns)(int dtype, const void* W, int64_t stride, int rows, int64_t K, float* out);
  void (*across)(const float* columns, int64_t K, const float* x, int64_t stride_x, int T, float* out, const char* next,
                 int64_t ahead);
  // y[n] = base[n] + sum[n * stride] + bias[n], rounded once to dtype
  void (*narrow)(int dtype, const float* sum, int stride, int n, const void* base, const void* bias, void* y);
  // `dot` for W and x in bf16, by the instruction for it. x is not padded. Null if there is none
  void (*pairs)(const void* W, int64_t stride, int rows, int64_t K, const void* x, int64_t stride_x, int T,
                float* out) = nullptr;
  // The same for short rows, K <= 2 SHORT, and `narrow` with it. `pack`: out[k / 2 * BLOCK + r] = the bits of W[r, k]
  // and W[r, k + 1], or of W[r, k] and 0. `add`: y[t, r] = base[t, r] + sum_k W[r, k] g[t, k] + bias[r] for
  // r < rows <= BLOCK, t < T <= TILE. g in bf16, padded with a 0 to an even K
  void (*pack)(const void* W, int64_t stride, int rows, int64_t K, float* out) = nullptr;
  void (*add)(const float* packed, int64_t K, const uint16_t* g, int64_t stride_g, int T, int rows, const void* base,
              int64_t stride_base, const void* bias, void* y, int64_t stride_y) = nullptr;
};

const Kernels* portable();
const Kernels* avx2();    // null where it was not compiled
const Kernels* avx512();  // the same
const Kernels* avx512_bf16();

// The widest that this CPU runs, or the named one ("portable", "avx2", "avx512",
// "avx512_bf16"); null if that cannot run here.
const Kernels* kernels(const char* name);

// Find torch's OpenMP runtime, in the library at `path` or its dependencies; calls use its threads. False if there is
// none: calls then use one thread.
bool find_threads(const char* path);

// g [T, C] fp32, contiguous. threads: at most so many.
void shrink(const Kernels&, const Shrink&, float* g, int threads);
// g: as `shrink` made it. dtype: of U; x_dtype: of base, bias and y.
void expand(const Kernels&, const float* g, int64_t stride_g, int64_t T, const Expand*, int members, int dtype,
            int x_dtype, int threads);
void svf_linear(const Kernels&, const Shrink&, const Expand*, int members, int threads);

}  // namespace t2cpu
