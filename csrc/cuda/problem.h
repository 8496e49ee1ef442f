// One launch of the decode kernel, as the host packs it and as the device reads it. Plain C++: no CUDA, no torch.
#pragma once
#include <cstddef>
#include <cstdint>
#include <initializer_list>

namespace t2 {

constexpr int PROBLEMS = 8;  // of one launch: a shrink is 1, an expand one a member
constexpr int TOKENS = 32;
constexpr int WARPS = 8;
constexpr int THREADS = WARPS * 32;
constexpr int ROWS = 16;    // of W in a tile: the long side of the m16n8k16 of the tensor cores
constexpr int CHUNK = 128;  // bytes of a row of W that a warp takes at a time

enum Product : int { BF16 = 0, FP16 = 1 };  // the dtype in which x meets W; sums are fp32
enum Weights : int { WIDE = 0, INT8 = 1 };  // dtype of all W of a launch: that of the product, or int8

// y[t, r] = base[t, r] + times * scale[e(t), r] * sum_k x[t, k] W[r, k] + bias[r]. scale, base and bias may be missing.
struct Problem {
  const void* W;       // [R, K], rows without gaps, on 16 bytes
  const void* x;       // [T, K], on 16 bytes, and so are its rows
  const float* scale;  // [E, R] or null
  const void* bias;    // [R] or null
  const void* base;    // [T, R] or null; may be y
  void* y;             // [T, R]
  int R, K;
  int x_row, y_row, base_row, scale_row;  // distances between rows, in elements
  float times;
  bool int8;       // W is int8, else in the dtype of the product
  bool x_is_bf16;  // x is bf16 for a product in fp16: it is divided by 32 (t2kernels/ops/precision.py)
  bool y_is_fp16;  // y, base and bias are fp16, else bf16
};

struct Args {
  Problem problem[PROBLEMS];
  int unit_end[PROBLEMS];  // units up to and with a problem: tiles of ROWS rows, one for each block of a cluster
  int problems;
  int pair;  // index of `gate`, which is one problem with the next, `up`: y = silu(y_gate) * y_up; -1 if there is none
  int T;
  const void* ids;  // [ceil(T / repeat)], int64 or int32; null if there is no scale
  bool ids_are_64;
  int repeat;   // tokens that an id covers
  int inverse;  // t / repeat = t * inverse >> 16: a division would convert to floating point and back
  int E;
};

struct Launch {
  Args args;
  Product product;
  Weights weights;
  bool dependent;  // may start under the previous kernel (programmatic dependent launch)
  int cluster;     // thread blocks that share the sums of a tile; 1: none
  int sms;
  void* stream;
};

// The words of the host: Header of a launch, then Word of each problem. Raw addresses and sizes; `times` as log2.
enum Header : int {
  H_PRODUCT, H_T, H_IDS, H_IDS_ARE_64, H_REPEAT, H_E, H_PAIR, H_DEPENDENT, H_CLUSTER, H_SMS, H_STREAM, HEADER
};
enum Word : int {
  P_W, P_X, P_SCALE, P_BIAS, P_BASE, P_Y, P_R, P_K, P_X_ROW, P_Y_ROW, P_BASE_ROW, P_SCALE_ROW, P_TIMES, P_INT8,
  P_X_IS_BF16, P_Y_IS_FP16, WORDS
};

// Null, or what is wrong: all that memory safety demands of sizes and addresses.
inline const char* unpack(const int64_t* words, size_t count, Launch& l) {
  if (count < HEADER + WORDS || (count - HEADER) % WORDS) return "a launch is a header and one to eight problems";
  const size_t problems = (count - HEADER) / WORDS;
  if (problems > PROBLEMS) return "more than eight problems";
  l = Launch{};
  Args& a = l.args;
  const int64_t *h = words, LIMIT = 1ll << 31;
  for (int i : {H_T, H_REPEAT, H_E, H_CLUSTER, H_SMS})
    if (h[i] < 0 || h[i] >= LIMIT) return "a size is negative or above 2^31";
  if (h[H_PRODUCT] != BF16 && h[H_PRODUCT] != FP16) return "products are made in bf16 (0) or fp16 (1)";
  l.product = Product(h[H_PRODUCT]);
  a.T = int(h[H_T]), a.repeat = int(h[H_REPEAT]), a.E = int(h[H_E]);
  a.ids = reinterpret_cast<const void*>(h[H_IDS]), a.ids_are_64 = h[H_IDS_ARE_64];
  a.problems = int(problems), a.pair = int(h[H_PAIR]);
  l.dependent = h[H_DEPENDENT], l.cluster = int(h[H_CLUSTER]);
  l.sms = int(h[H_SMS]), l.stream = reinterpret_cast<void*>(h[H_STREAM]);
  if (a.T < 1 || a.T > TOKENS) return "T is not in 1..32";
  if (a.repeat < 1 || a.repeat > TOKENS) return "repeat is not in 1..32";
  a.inverse = (65536 + a.repeat - 1) / a.repeat;
  if (l.sms < 1) return "the number of multiprocessors is missing";
  if (l.cluster < 1 || l.cluster > 8 || (l.cluster & (l.cluster - 1))) return "a cluster is 1, 2, 4 or 8 blocks";
  if (a.pair != -1 && (a.pair < 0 || a.pair != a.problems - 2)) return "gate and up are the last two problems";
  int units = 0;
  for (int i = 0; i < a.problems; ++i) {
    const int64_t* w = words + HEADER + i * WORDS;
    Problem& p = a.problem[i];
    for (int j : {P_R, P_K, P_X_ROW, P_Y_ROW, P_BASE_ROW, P_SCALE_ROW})
      if (w[j] < 0 || w[j] >= LIMIT) return "a size of a problem is negative or above 2^31";
    p.W = reinterpret_cast<const void*>(w[P_W]), p.x = reinterpret_cast<const void*>(w[P_X]);
    p.scale = reinterpret_cast<const float*>(w[P_SCALE]), p.bias = reinterpret_cast<const void*>(w[P_BIAS]);
    p.base = reinterpret_cast<const void*>(w[P_BASE]), p.y = reinterpret_cast<void*>(w[P_Y]);
    p.R = int(w[P_R]), p.K = int(w[P_K]), p.x_row = int(w[P_X_ROW]), p.y_row = int(w[P_Y_ROW]);
    p.base_row = int(w[P_BASE_ROW]), p.scale_row = int(w[P_SCALE_ROW]);
    p.int8 = w[P_INT8], p.x_is_bf16 = w[P_X_IS_BF16], p.y_is_fp16 = w[P_Y_IS_FP16];
    if (w[P_TIMES] < -64 || w[P_TIMES] > 64) return "times is not a power of two within 2^-64 and 2^64";
    p.times = w[P_TIMES] < 0 ? 1.0f / float(1ull << (-w[P_TIMES] % 64)) : float(1ull << (w[P_TIMES] % 64));
    if (!p.W || !p.x || !p.y) return "W, x or y of a problem is null";
    if (p.R < 1 || p.K < 1 || p.R > (1 << 27)) return "R or K of a problem is 0, or R is above 2^27";
    if (p.int8 != a.problem[0].int8) return "the W of a launch have different dtypes";
    const int64_t bytes = int64_t(p.K) * (p.int8 ? 1 : 2);
    if (bytes % 16 || bytes >= LIMIT) return "a row of W is no multiple of 16 bytes";
    if (w[P_W] % 16 || w[P_X] % 16 || p.x_row % 8) return "W, x or a row of x is not on 16 bytes";
    if (w[P_Y] % 2 || w[P_BASE] % 2 || w[P_BIAS] % 2 || w[P_SCALE] % 4) {
      return "y, base, bias or scale is not on a whole number";
    }
    if (p.scale && !a.ids) return "scale without ids";
    if (a.ids && (h[H_IDS] % (a.ids_are_64 ? 8 : 4) || a.E < 1)) {
      return "ids are not on a whole number, or there is no row of scale";
    }
    if (p.x_is_bf16 && (l.product != FP16 || p.int8)) return "x is converted only for fp16 factors";
    if (i != a.pair + 1 || a.pair < 0) units += (p.R + l.cluster * ROWS - 1) / (l.cluster * ROWS);
    a.unit_end[i] = units;
  }
  if (a.pair >= 0 && a.problem[a.pair].R != a.problem[a.pair + 1].R) return "gate and up have different sizes";
  l.weights = a.problem[0].int8 ? INT8 : WIDE;
  return nullptr;
}

}  // namespace t2
