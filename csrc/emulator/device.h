// csrc/cuda/device.cuh for the CPU: the same functions, with checks.
#pragma once
#include <algorithm>
#include <cmath>

#include "emulator.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define T2_SHARED(type, name, ...)   \
  typedef type name##_type __VA_ARGS__; \
  static_assert(sizeof(name##_type) <= t2::emulator::SHARED_WORDS * 4); \
  name##_type& name = *reinterpret_cast<name##_type*>(t2::emulator::machine.current->block->shared.data())
#define T2_DYNAMIC_SHARED(type, name) \
  type* const name = reinterpret_cast<type*>(t2::emulator::machine.current->block->shared.data())
#define threadIdx (t2::emulator::Index{t2::emulator::machine.current->thread})
#define blockIdx (t2::emulator::Index{t2::emulator::machine.current->block->index})
#define gridDim (t2::emulator::Index{unsigned(t2::emulator::machine.blocks.size())})

struct uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

namespace t2 {
using std::min;

inline float float_of_bits(uint32_t v) {
  float f;
  std::memcpy(&f, &v, 4);
  return f;
}
inline uint32_t bits_of(float f) {
  uint32_t v;
  std::memcpy(&v, &f, 4);
  return v;
}

inline uint16_t round_to(float f, bool fp16) {
  const uint32_t v = bits_of(f), sign = v >> 16 & 0x8000u, size = v & 0x7fffffffu;
  if (!fp16) return size > 0x7f800000u ? 0x7fff : uint16_t((v + 0x7fff + (v >> 16 & 1)) >> 16);
  if (size > 0x7f800000u) return uint16_t(sign | 0x7fff);
  if (size >= 0x477ff000u) return uint16_t(sign | 0x7c00);               // rounds to 65536 or more
  // subnormal: steps of 2^-24
  if (size < 0x38800000u) return uint16_t(sign | uint32_t(std::nearbyint(std::fabs(double(f)) * 16777216.0)));
  return uint16_t(sign | ((size - 0x38000000u + 0xfff + (size >> 13 & 1)) >> 13));
}

inline float widen(uint16_t v, bool fp16) {
  if (!fp16) return float_of_bits(uint32_t(v) << 16);
  const uint32_t sign = uint32_t(v & 0x8000) << 16, exponent = v >> 10 & 31, fraction = v & 0x3ff;
  if (exponent == 0) return float_of_bits(sign | bits_of(float(fraction) * 0x1p-24f));
  return float_of_bits(sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13);
}

template <class T>
inline T get(const void* p, emulator::Kind kind) {
  emulator::check(p, sizeof(T), kind);
  T v;
  std::memcpy(&v, p, sizeof(T));
  return v;
}

inline uint4 load_weights(const void* p) { return get<uint4>(p, emulator::W); }
inline uint4 load_activations(const void* p) { return get<uint4>(p, emulator::X); }
inline float load_float(const float* p) { return get<float>(p, emulator::SCALE); }
inline uint16_t load_bias(const void* p) { return get<uint16_t>(p, emulator::BIAS); }
inline uint16_t load_base(const void* p) { return get<uint16_t>(p, emulator::BASE); }
inline long long load_id(const void* p, int i, bool wide) {
  if (wide) return get<int64_t>(static_cast<const int64_t*>(p) + i, emulator::IDS);
  return get<int32_t>(static_cast<const int32_t*>(p) + i, emulator::IDS);
}
inline void store_16(void* p, uint16_t v) {
  emulator::check(p, 2, emulator::Y);
  std::memcpy(p, &v, 2);
}

inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = uint64_t(b) << 32 | a;
  uint32_t v = 0;
  for (int i = 0; i < 4; ++i) v |= uint32_t(both >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  return v;
}
inline uint32_t and_or(uint32_t a, uint32_t mask, uint32_t bits) { return (a & mask) | bits; }
inline uint32_t in_register(uint32_t v) { return v; }

template <Product P>
inline float half_of(uint32_t v, int high) {
  return widen(uint16_t(high ? v >> 16 : v), P == FP16);
}
template <Product P>
inline uint32_t subtract_2(uint32_t a, uint32_t b) {
  const auto one = [&](int high) { return uint32_t(round_to(half_of<P>(a, high) - half_of<P>(b, high), P == FP16)); };
  return one(0) | one(1) << 16;
}
inline uint32_t pack_fp16(float low, float high) { return round_to(low, true) | uint32_t(round_to(high, true)) << 16; }
inline float exponential(float v) { return std::exp(v); }
inline float divide(float a, float b) { return a / b; }
inline float not_a_number() { return float_of_bits(0x7fffffffu); }

// mma.sync.m16n8k16: all 32 lanes come together, then the last to come does the work. Fragments as in the PTX ISA.
template <Product P>
inline void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  emulator::Fiber& me = *emulator::machine.current;
  emulator::Warp& w = me.block->warps[me.thread / 32];
  const unsigned lane = me.thread % 32, generation = w.generation;
  const uint32_t a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
  std::copy(a, a + 4, w.a[lane]);
  std::copy(b, b + 2, w.b[lane]);
  w.d[lane] = d;
  if (++w.arrived < 32) return emulator::sleep_while(w.generation, generation);
  float A[16][16], B[16][8];
  for (int l = 0; l < 32; ++l)
    for (int h = 0; h < 2; ++h) {
      const int row = l / 4, k = 2 * (l % 4) + h;
      A[row][k] = half_of<P>(w.a[l][0], h), A[row + 8][k] = half_of<P>(w.a[l][1], h);
      A[row][k + 8] = half_of<P>(w.a[l][2], h), A[row + 8][k + 8] = half_of<P>(w.a[l][3], h);
      B[k][row] = half_of<P>(w.b[l][0], h), B[k + 8][row] = half_of<P>(w.b[l][1], h);
    }
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 4; ++i) {
      const int row = l / 4 + i / 2 * 8, column = 2 * (l % 4) + i % 2;
      float sum = w.d[l][i];
      for (int k = 0; k < 16; ++k) sum += A[row][k] * B[k][column];
      w.d[l][i] = sum;
    }
  w.arrived = 0, ++w.generation, ++emulator::machine.progress;
}

inline void store_shared(float* p, float v) {
  emulator::Block& block = *emulator::machine.current->block;
  emulator::Shadow& s = emulator::shadow_of(p, block);
  const int me = int(emulator::machine.current->thread);
  const unsigned now = block.generation;
  if ((s.writer >= 0 && s.writer != me && s.written == now) || (s.reader >= 0 && s.reader != me && s.read == now))
    emulator::fail("a race in shared memory: a word is written that another thread uses before the next barrier");
  if (s.cluster_read == block.cluster->generation) {
    emulator::fail("a race in shared memory: a word is written that another block has read since the last barrier");
  }
  s.writer = me, s.written = now, s.cluster_written = block.cluster->generation;
  *p = v;
}
inline float load_shared(const float* p) {
  emulator::Block& block = *emulator::machine.current->block;
  emulator::Shadow& s = emulator::shadow_of(p, block);
  const int me = int(emulator::machine.current->thread);
  const unsigned now = block.generation;
  if (s.writer < 0) emulator::fail("a word of shared memory is read that nobody wrote");
  if (s.writer != me && s.written == now) {
    emulator::fail("a race in shared memory: a word is read that another thread wrote since the last barrier");
  }
  s.reader = me, s.read = now;
  return *p;
}
// The word at the same place in another block of the cluster.
inline float load_shared_of(const float* p, unsigned rank) {
  emulator::Block& mine = *emulator::machine.current->block;
  emulator::Block& other = emulator::machine.blocks[mine.index - mine.rank + rank];
  const auto offset = p - reinterpret_cast<const float*>(mine.shared.data());
  const auto* there = reinterpret_cast<const float*>(other.shared.data()) + offset;
  emulator::Shadow& s = emulator::shadow_of(there, other);
  if (other.ended) emulator::fail("shared memory is read of a block that has ended");
  if (s.writer < 0) emulator::fail("a word of shared memory is read that nobody wrote");
  if (s.cluster_written == mine.cluster->generation) {
    emulator::fail("a race in shared memory: a word is read that another block wrote since the last barrier");
  }
  s.cluster_read = mine.cluster->generation;
  return *there;
}
inline unsigned cluster_rank() { return emulator::machine.current->block->rank; }
inline void cluster_barrier() {
  emulator::Cluster& c = *emulator::machine.current->block->cluster;
  const unsigned generation = c.generation;
  if (++c.arrived < c.threads) return emulator::sleep_while(c.generation, generation);
  c.arrived = 0, ++c.generation, ++emulator::machine.progress;
  for (emulator::Block& b : emulator::machine.blocks)
    if (b.cluster == &c) ++b.generation;  // it is a barrier of each block, too
}

inline void block_barrier() {
  emulator::Block& b = *emulator::machine.current->block;
  const unsigned generation = b.generation;
  if (++b.arrived < b.threads) return emulator::sleep_while(b.generation, generation);
  b.arrived = 0, ++b.generation, ++emulator::machine.progress;
}

inline void launch_dependents() {}
inline void wait_for_kernel_before() { emulator::machine.current->waited = true; }

}  // namespace t2
