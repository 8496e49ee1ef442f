// The instructions of the decode kernels. csrc/emulator/device.h has the same functions for the CPU.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#define T2_SHARED(type, name, ...) __shared__ type name __VA_ARGS__
#define T2_DYNAMIC_SHARED(type, name) extern __shared__ type name[]

namespace t2 {

// W is read once: past L1, 256 bytes at a time into L2. It may be read before the previous kernel has ended.
__device__ __forceinline__ uint4 load_weights(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// Every warp of a multiprocessor reads the activations: through L1. Not .nc, because the previous kernel wrote them.
__device__ __forceinline__ uint4 load_activations(const void* p) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}

__device__ __forceinline__ float load_float(const float* p) {
  float v;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ uint16_t load_16(const void* p) {
  uint16_t v;
  asm volatile("ld.global.u16 %0, [%1];" : "=h"(v) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ uint16_t load_bias(const void* p) { return load_16(p); }
__device__ __forceinline__ uint16_t load_base(const void* p) { return load_16(p); }

__device__ __forceinline__ long long load_id(const void* p, int i, bool wide) {
  long long v;
  if (wide) {
    asm volatile("ld.global.s64 %0, [%1];" : "=l"(v) : "l"(static_cast<const long long*>(p) + i) : "memory");
  } else {
    int narrow;
    asm volatile("ld.global.s32 %0, [%1];" : "=r"(narrow) : "l"(static_cast<const int*>(p) + i) : "memory");
    v = narrow;
  }
  return v;
}

__device__ __forceinline__ void store_16(void* p, uint16_t v) {
  asm volatile("st.global.u16 [%0], %1;" ::"l"(p), "h"(v) : "memory");
}

// Volatile, so that no compiler moves it into a divergent branch: all 32 lanes must come together.
template <Product P>
__device__ __forceinline__ void mma(
    float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  if constexpr (P == BF16)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}

// (a & mask) | bits in one LOP3, which takes one constant: `bits` must stand in a register.
__device__ __forceinline__ uint32_t and_or(uint32_t a, uint32_t mask, uint32_t bits) {
  uint32_t v;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(v) : "r"(a), "r"(mask), "r"(bits));
  return v;
}
__device__ __forceinline__ uint32_t in_register(uint32_t v) {
  uint32_t r;
  asm volatile("mov.u32 %0, %1;" : "=r"(r) : "r"(v));
  return r;
}

template <Product P>
__device__ __forceinline__ uint32_t subtract_2(uint32_t a, uint32_t b) {
  uint32_t v;
  if constexpr (P == FP16)
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(v) : "r"(a), "r"(b));
  else
#if __CUDA_ARCH__ >= 900
    asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(v) : "r"(a), "r"(b));
#else
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(v) : "r"(b), "r"(0xbf80bf80u), "r"(a));
#endif
  return v;
}

// Two fp32 to two fp16, the first in the low half.
__device__ __forceinline__ uint32_t pack_fp16(float low, float high) {
  uint32_t v;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}

__device__ __forceinline__ float float_of_bits(uint32_t v) { return __uint_as_float(v); }

__device__ __forceinline__ uint16_t round_to(float v, bool fp16) {
  uint16_t r;
  if (fp16)
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(v));
  else
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v));
  return r;
}

__device__ __forceinline__ float widen(uint16_t v, bool fp16) {
  float r;
  if (fp16)
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v));
  else
    r = __uint_as_float(static_cast<uint32_t>(v) << 16);
  return r;
}

__device__ __forceinline__ float exponential(float v) { return __expf(v); }
__device__ __forceinline__ float divide(float a, float b) { return __fdividef(a, b); }
__device__ __forceinline__ float not_a_number() { return __uint_as_float(0x7fffffffu); }

__device__ __forceinline__ void store_shared(float* p, float v) { *p = v; }
__device__ __forceinline__ float load_shared(const float* p) { return *p; }

__device__ __forceinline__ void block_barrier() { __syncthreads(); }

// Clusters of blocks, sm_90 and later: never launched elsewhere.
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned v = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(v));
#endif
  return v;
}
__device__ __forceinline__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// The number at the same place in the shared memory of another block of the cluster.
__device__ __forceinline__ float load_shared_of(const float* p, unsigned block) {
  float v = 0;
#if __CUDA_ARCH__ >= 900
  uint32_t at;
  const uint32_t mine = static_cast<uint32_t>(__cvta_generic_to_shared(p));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(mine), "r"(block));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(at) : "memory");
#endif
  return v;
}

// Dependent launch, sm_90 and later. These do nothing elsewhere, and for a launch that is not dependent.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace t2
