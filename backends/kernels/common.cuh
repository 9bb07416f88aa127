// What every kernel starts from: element types, conversions, vector loads, warp-wide products and asynchronous copies.
//
// It includes nothing, so that NVRTC needs no include path. __CUDA_ARCH__ tells a device from tests/cuda_on_cpu, whose shim
// gives CUDA's built-in names and, in namespace on_cpu, what is PTX here. A source is compiled once per set of macros that name
// C types (backends/cuda_sources.py); its first line says which: "// takes: ELEMENT STATE". Kernels are extern "C".
#pragma once

// ---- element types: 16 bits each, no arithmetic of their own

struct half_t {
    unsigned short bits;
};

struct bf16_t {
    unsigned short bits;
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(double value) { return static_cast<float>(value); }
__device__ __forceinline__ float to_float(bf16_t value) { return __uint_as_float(static_cast<unsigned>(value.bits) << 16); }
__device__ __forceinline__ float to_float(half_t value) {
#ifdef __CUDA_ARCH__
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
    return wide;
#else
    return on_cpu::float_of_half(value.bits);
#endif
}

template <class T> __device__ __forceinline__ T from_float(float value);
template <> __device__ __forceinline__ float from_float<float>(float value) { return value; }
template <> __device__ __forceinline__ double from_float<double>(float value) { return value; }
// to the nearest, ties to even; a NaN stays one (its sign and upper bits too)
template <> __device__ __forceinline__ bf16_t from_float<bf16_t>(float value) {
    const unsigned bits = __float_as_uint(value);
    const unsigned rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return {static_cast<unsigned short>((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded)};
}
template <> __device__ __forceinline__ half_t from_float<half_t>(float value) {
#ifdef __CUDA_ARCH__
    half_t narrow;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
    return narrow;
#else
    return {on_cpu::half_of_float(value)};
#endif
}

// any element as W, float or double: double stays double
template <class W, class T> __device__ __forceinline__ W widen(T value) { return static_cast<W>(to_float(value)); }
template <> __device__ __forceinline__ double widen<double, double>(double value) { return value; }

// a float or double as any element
template <class T> __device__ __forceinline__ T narrow(float value) { return from_float<T>(value); }
template <class T> __device__ __forceinline__ T narrow(double value) { return from_float<T>(static_cast<float>(value)); }
template <> __device__ __forceinline__ double narrow<double>(double value) { return value; }

// two neighbours in one register, as mma and 32-bit stores take them: `low` is the first in memory
template <class T> __device__ __forceinline__ unsigned pack_pair(float low, float high) {
    return static_cast<unsigned>(from_float<T>(low).bits) | static_cast<unsigned>(from_float<T>(high).bits) << 16;
}

// ---- functions of float and double under one name

template <class W> __device__ __forceinline__ W infinity();
template <> __device__ __forceinline__ float infinity<float>() { return __uint_as_float(0x7f800000u); }
template <> __device__ __forceinline__ double infinity<double>() { return __longlong_as_double(0x7ff0000000000000ll); }

__device__ __forceinline__ float exp_of(float x) { return expf(x); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }
__device__ __forceinline__ float exp2_of(float x) { return exp2f(x); }
__device__ __forceinline__ double exp2_of(double x) { return exp2(x); }
__device__ __forceinline__ float log_of(float x) { return logf(x); }
__device__ __forceinline__ double log_of(double x) { return log(x); }
__device__ __forceinline__ float abs_of(float x) { return fabsf(x); }
__device__ __forceinline__ double abs_of(double x) { return fabs(x); }
// the larger number; a NaN wins, as in numpy.maximum and unlike fmaxf
template <class W> __device__ __forceinline__ W larger(W a, W b) { return (a >= b || a != a) ? a : b; }

// ---- dynamic shared memory: DYNAMIC_SHARED(tile); makes `unsigned char* tile`, aligned to 128 bytes, uninitialised

#ifdef __CUDA_ARCH__
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#else
#define DYNAMIC_SHARED(name) unsigned char* const name = on_cpu::dynamic_shared()
#endif

// ---- vectors: N elements at once, in accesses of at most 16 bytes to which the address must be aligned

template <int NBYTES> struct Word;
template <> struct Word<1> { using type = unsigned char; };
template <> struct Word<2> { using type = unsigned short; };
template <> struct Word<4> { using type = unsigned; };
template <> struct Word<8> { using type = uint2; };
template <> struct Word<16> { using type = uint4; };

__device__ constexpr int least(int a, int b) { return a < b ? a : b; }

template <class T, int N> __device__ __forceinline__ void load(T (&to)[N], const T* from) {
    constexpr int lanes = least(N, 16 / static_cast<int>(sizeof(T)));
    using word = typename Word<lanes * static_cast<int>(sizeof(T))>::type;
#pragma unroll
    for (int i = 0; i < N; i += lanes) {
        union { word all; T lane[lanes]; } cast;
        cast.all = *reinterpret_cast<const word*>(from + i);
#pragma unroll
        for (int j = 0; j < lanes; ++j) to[i + j] = cast.lane[j];
    }
}

template <class T, int N> __device__ __forceinline__ void store(T* to, const T (&from)[N]) {
    constexpr int lanes = least(N, 16 / static_cast<int>(sizeof(T)));
    using word = typename Word<lanes * static_cast<int>(sizeof(T))>::type;
#pragma unroll
    for (int i = 0; i < N; i += lanes) {
        union { word all; T lane[lanes]; } cast;
#pragma unroll
        for (int j = 0; j < lanes; ++j) cast.lane[j] = from[i + j];
        *reinterpret_cast<word*>(to + i) = cast.all;
    }
}

// N elements widened to W
template <int N, class W, class T> __device__ __forceinline__ void load_wide(W (&to)[N], const T* from) {
    T raw[N];
    load(raw, from);
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = widen<W>(raw[i]);
}

// N numbers rounded to T
template <int N, class W, class T> __device__ __forceinline__ void store_narrow(T* to, const W (&from)[N]) {
    T raw[N];
#pragma unroll
    for (int i = 0; i < N; ++i) raw[i] = narrow<T>(from[i]);
    store(to, raw);
}

// ---- sums and maxima over groups of `lanes` neighbouring lanes, a power of two; each lane gets the result. All 32 lanes call it

constexpr unsigned ALL_LANES = 0xffffffffu;

template <class W> __device__ __forceinline__ W sum_over_lanes(W value, int lanes) {
    for (int step = lanes / 2; step; step /= 2) value += __shfl_xor_sync(ALL_LANES, value, step);
    return value;
}

template <class W> __device__ __forceinline__ W max_over_lanes(W value, int lanes) {
    for (int step = lanes / 2; step; step /= 2) value = larger(value, __shfl_xor_sync(ALL_LANES, value, step));
    return value;
}

// ---- tensor cores: d (16 x 8, float32) += a (16 x 16) b (16 x 8), by all 32 lanes of a warp
//
// With g = lane / 4 and t = lane % 4, and each register two neighbours, the first in the lower half (PTX ISA, mma.m16n8k16):
//   a[0] = A[g][2t, 2t+1]      a[1] = A[g+8][2t, 2t+1]      a[2] = A[g][2t+8, 2t+9]      a[3] = A[g+8][2t+8, 2t+9]
//   b[0] = B[2t, 2t+1][g]      b[1] = B[2t+8, 2t+9][g]
//   d[0], d[1] = D[g][2t, 2t+1]                             d[2], d[3] = D[g+8][2t, 2t+1]

template <class T> __device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]);
#ifdef __CUDA_ARCH__
#define RINGSIM_MMA(type, name)                                                                                              \
    template <> __device__ __forceinline__ void mma<type>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {   \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                        \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                    \
    }
RINGSIM_MMA(half_t, "f16")
RINGSIM_MMA(bf16_t, "bf16")
#undef RINGSIM_MMA
#else
template <> inline void mma<half_t>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { on_cpu::mma(d, a, b, false); }
template <> inline void mma<bf16_t>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { on_cpu::mma(d, a, b, true); }
#endif

// Four 8 x 8 matrices of 16-bit elements from shared memory: lane i gives the address of row i % 8 of matrix i / 8 (8 elements,
// aligned to 16 bytes); to[j] becomes M_j[g][2t, 2t+1], or M_j[2t, 2t+1][g] where transposed.
template <bool TRANSPOSED> __device__ __forceinline__ void load_matrices(unsigned (&to)[4], const void* row) {
#ifdef __CUDA_ARCH__
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
    if (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(address) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(address) : "memory");
#else
    on_cpu::load_matrices(to, row, TRANSPOSED);
#endif
}

// ---- asynchronous copies, global to shared memory, 16 bytes each, both sides aligned to 16; zeros where not `inside`
//
// They end at wait_copies<N> (all but the last N committed groups of this thread) and other threads see them after a barrier.

__device__ __forceinline__ void copy_async(void* shared, const void* global, bool inside = true) {
#ifdef __CUDA_ARCH__
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(inside ? 16 : 0) : "memory");
#else
    on_cpu::copy_async(shared, global, inside);
#endif
}

__device__ __forceinline__ void commit_copies() {
#ifdef __CUDA_ARCH__
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    on_cpu::commit_copies();
#endif
}

template <int N> __device__ __forceinline__ void wait_copies() {
#ifdef __CUDA_ARCH__
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#else
    on_cpu::wait_copies(N);
#endif
}
