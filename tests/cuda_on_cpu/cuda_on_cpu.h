// CUDA's names, for kernels compiled by g++: tests/emulator.py puts this before a source and launch.h after it.
#pragma once
#include <cmath>
#include "warps.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define __shared__ static
#define __constant__ static

#define threadIdx (on_cpu::current->index)
#define blockIdx (on_cpu::block_index)
#define blockDim (on_cpu::block_dim)
#define gridDim (on_cpu::grid_dim)
#define warpSize 32

#define ON_CPU_SITE (on_cpu::Site{__FILE__, __LINE__})
#define __syncthreads() on_cpu::barrier(ON_CPU_SITE)
#define __syncthreads_or(vote) (on_cpu::barrier_count(ON_CPU_SITE, vote) != 0)
#define __syncthreads_and(vote) (on_cpu::barrier_count(ON_CPU_SITE, !(vote)) == 0)
#define __syncthreads_count(vote) on_cpu::barrier_count(ON_CPU_SITE, vote)
#define __syncwarp(...) on_cpu::synchronize_warp(ON_CPU_SITE __VA_OPT__(, ) __VA_ARGS__)
#define __shfl_xor_sync(...) on_cpu::shuffle_xor(ON_CPU_SITE, __VA_ARGS__)
#define __shfl_down_sync(...) on_cpu::shuffle_down(ON_CPU_SITE, __VA_ARGS__)
#define __shfl_up_sync(...) on_cpu::shuffle_up(ON_CPU_SITE, __VA_ARGS__)
#define __shfl_sync(...) on_cpu::shuffle_from(ON_CPU_SITE, __VA_ARGS__)
#define __ballot_sync(mask, vote) on_cpu::ballot(ON_CPU_SITE, mask, vote)
#define __any_sync(mask, vote) (on_cpu::ballot(ON_CPU_SITE, mask, vote) != 0)
#define __all_sync(mask, vote) (on_cpu::ballot(ON_CPU_SITE, mask, !(vote)) == 0)

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <class To, class From> To on_cpu_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
static inline float __uint_as_float(unsigned bits) { return on_cpu_bits<float>(bits); }
static inline float __int_as_float(int bits) { return on_cpu_bits<float>(bits); }
static inline unsigned __float_as_uint(float value) { return on_cpu_bits<unsigned>(value); }
static inline int __float_as_int(float value) { return on_cpu_bits<int>(value); }
static inline double __longlong_as_double(long long bits) { return on_cpu_bits<double>(bits); }
static inline long long __double_as_longlong(double value) { return on_cpu_bits<long long>(value); }
template <class T> T __ldg(const T* from) { return *from; }
static inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
static inline int __clz(int bits) { return bits ? __builtin_clz(static_cast<unsigned>(bits)) : 32; }
static inline int __ffs(int bits) { return __builtin_ffs(bits); }
static inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
static inline float __fdividef(float a, float b) { return a / b; }
#define __expf(value) expf(value)  // glibc has these names for itself
#define __logf(value) logf(value)
#define __exp2f(value) exp2f(value)
template <class T> T max(T a, T b) { return a < b ? b : a; }
template <class T> T min(T a, T b) { return b < a ? b : a; }
namespace on_cpu {
static inline unsigned char* dynamic_shared();  // in launch.h
}
