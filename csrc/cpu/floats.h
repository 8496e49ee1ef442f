// bf16 and fp16 as bits, and conversions to and from fp32. Each file includes them for its own instruction set.
#pragma once
#ifdef __F16C__
#include <immintrin.h>
#endif
#include <cstdint>
#include <cstring>

namespace t2cpu {
namespace {

struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline uint32_t bits_of(float v) {
  uint32_t b;
  std::memcpy(&b, &v, 4);
  return b;
}
inline float float_of(uint32_t b) {
  float v;
  std::memcpy(&v, &b, 4);
  return v;
}

inline float widened(float v) { return v; }
inline float widened(int8_t v) { return v; }
inline float widened(Bf16 v) { return float_of(uint32_t(v.bits) << 16); }
#ifdef __F16C__
inline float widened(Half v) { return _cvtsh_ss(v.bits); }
#else
inline float widened(Half v) {
  const uint32_t sign = uint32_t(v.bits & 0x8000) << 16, rest = v.bits & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);  // inf, NaN
  return float_of(sign | bits_of(float_of(rest << 13) * 0x1p112f));               // exact, subnormal ones too
}
#endif

template <class X>
inline X narrowed(float v);
template <>
inline float narrowed<float>(float v) {
  return v;
}
template <>
inline Bf16 narrowed<Bf16>(float v) {
  const uint32_t b = bits_of(v);
  if (v != v) return {uint16_t(b >> 16 | 0x40)};
  return {uint16_t((b + 0x7fff + (b >> 16 & 1)) >> 16)};  // to nearest, ties to even
}
template <>
inline Half narrowed<Half>(float v) {
#ifdef __F16C__
  return {uint16_t(_cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT))};
#else
  const uint32_t b = bits_of(v), sign = b >> 16 & 0x8000, rest = b & 0x7fffffff;
  if (rest > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (rest >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // 65520 and more
  if (rest < 0x38800000) {                                   // below 2^-14: steps of 2^-24, which adding 1/2 rounds to
    return {uint16_t(sign | (bits_of(float_of(rest) + 0.5f) - 0x3f000000))};
  }
  return {uint16_t(sign | (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13)};
#endif
}

}  // namespace
}  // namespace t2cpu
