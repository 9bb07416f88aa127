// Tiles on tensor cores (mma.m16n8k16, from sm_80): copies into shared memory, products of them, and what a mask has to know.
//
// A block is 4 warps; a warp has M_TILES x 16 rows. Rows in shared memory are 8 elements longer than they need be, so that the 8
// rows of 16 bytes that make a matrix lie in different banks.
#pragma once

#include "attend_plain.cuh"

namespace tensor {

constexpr int THREADS = 128, WARPS = 4, PAD = 8;

__device__ __forceinline__ int lane() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp() { return threadIdx.x / 32; }
// of an accumulator's four numbers the row (within 16) and column (within 8) of number i
__device__ __forceinline__ int row_of(int i) { return lane() / 4 + i / 2 * 8; }
__device__ __forceinline__ int column_of(int i) { return lane() % 4 * 2 + i % 2; }

// 2 to the power of x, within 2 units of the last place; 0 below the normal numbers
__device__ __forceinline__ float power_of_two(float x) {
#ifdef __CUDA_ARCH__
    float made;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(made) : "f"(x));
    return made;
#else
    return exp2f(x);
#endif
}

template <class T> __device__ __forceinline__ unsigned pair_of(float low, float high);
#ifdef __CUDA_ARCH__
template <> __device__ __forceinline__ unsigned pair_of<half_t>(float low, float high) {
    unsigned made;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(made) : "f"(high), "f"(low));
    return made;
}
template <> __device__ __forceinline__ unsigned pair_of<bf16_t>(float low, float high) {
    unsigned made;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(made) : "f"(high), "f"(low));
    return made;
}
#else
template <class T> __device__ __forceinline__ unsigned pair_of(float low, float high) { return pack_pair<T>(low, high); }
#endif

// Pieces of 8 elements: a thread has the same one of each row that it takes, and every SPAN-th row; where a row has no power of
// two of pieces, some threads have none.
template <int WIDTH> struct Pieces {
    static constexpr int ACROSS = WIDTH <= 16 ? 2 : WIDTH <= 32 ? 4 : WIDTH <= 64 ? 8 : WIDTH <= 128 ? 16 : 32;
    static constexpr int SPAN = THREADS / ACROSS;

    __device__ static __forceinline__ int row() { return threadIdx.x / ACROSS; }
    __device__ static __forceinline__ int column() { return threadIdx.x % ACROSS * 8; }
};

// Begin to copy rows [row, row + ROWS) of `from` (0 beyond the last). `vectors`: the operand may be read 16 bytes at a time.
template <int ROWS, int WIDTH, class T>
__device__ __forceinline__ void begin_copy(T* to, const plain::Rows<T>& from, int row, bool vectors) {
    using P = Pieces<WIDTH>;
    if (P::column() >= WIDTH) return;
    const T* source = from.first + (row + P::row()) * from.stride + P::column();
    const long long step = from.stride * P::SPAN;
    T* const target = to + P::row() * (WIDTH + PAD) + P::column();
    const int left = from.count - row - P::row();
    if (P::SPAN > ROWS && P::row() >= ROWS) return;
    if (vectors) {
#pragma unroll
        for (int r = 0; r < ROWS; r += P::SPAN, source += step) copy_async(target + r * (WIDTH + PAD), source, r < left);
        return;
    }
#pragma unroll 1
    for (int r = 0; r < ROWS; r += P::SPAN, source += step) {
        T piece[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) piece[i] = r < left ? source[i] : T{0};
        store(target + r * (WIDTH + PAD), piece);
    }
}

// whether this thread finds NaN or infinity in its part of what a copy brought
template <int ROWS, int WIDTH, class T> __device__ __forceinline__ bool finds_non_finite(const T* rows) {
    using P = Pieces<WIDTH>;
    bool found = false;
    if (P::column() >= WIDTH) return found;
    for (int r = P::row(); r < ROWS; r += P::SPAN) {
        T piece[8];
        load(piece, rows + r * (WIDTH + PAD) + P::column());
#pragma unroll
        for (int i = 0; i < 8; ++i) found |= !(abs_of(to_float(piece[i])) < infinity<float>());
    }
    return found;
}

// made += left @ right^T: the warp's rows of `left` with COLUMNS rows of `right`
template <int M_TILES, int COLUMNS, int WIDTH, class T>
__device__ __forceinline__ void multiply(float (&made)[M_TILES][COLUMNS / 8][4], const T* left, const T* right) {
    constexpr int pitch = WIDTH + PAD;
    left += (warp() * M_TILES * 16 + lane() % 16) * pitch + lane() / 16 * 8;
    right += (lane() % 8 + lane() / 16 * 8) * pitch + lane() / 8 % 2 * 8;
#pragma unroll 2
    for (int x = 0; x < WIDTH; x += 16) {
        unsigned a[M_TILES][4];
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) load_matrices<false>(a[m], left + m * 16 * pitch + x);
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n += 2) {
            unsigned both[4];
            load_matrices<false>(both, right + n * 8 * pitch + x);
            const unsigned first[2] = {both[0], both[1]}, second[2] = {both[2], both[3]};
#pragma unroll
            for (int m = 0; m < M_TILES; ++m) {
                mma<T>(made[m][n], a[m], first);
                mma<T>(made[m][n + 1], a[m], second);
            }
        }
    }
}

// made += weights @ right: accumulators of COLUMNS columns, rounded to T, with as many rows of `right`
template <int M_TILES, int COLUMNS, int WIDTH, class T>
__device__ __forceinline__ void add_product(float (&made)[M_TILES][WIDTH / 8][4], const float (&weights)[M_TILES][COLUMNS / 8][4],
                                            const T* right) {
    constexpr int pitch = WIDTH + PAD;
    right += lane() % 16 * pitch + lane() / 16 * 8;
#pragma unroll
    for (int x = 0; x < COLUMNS; x += 16) {
        unsigned a[M_TILES][4];
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float(&from)[4] = weights[m][x / 8 + i / 2];
                a[m][i] = pair_of<T>(from[i % 2 * 2], from[i % 2 * 2 + 1]);
            }
#pragma unroll
        for (int n = 0; n < WIDTH / 8; n += 2) {
            unsigned both[4];
            load_matrices<true>(both, right + x * pitch + n * 8);
            const unsigned first[2] = {both[0], both[1]}, second[2] = {both[2], both[3]};
#pragma unroll
            for (int m = 0; m < M_TILES; ++m) {
                mma<T>(made[m][n], a[m], first);
                mma<T>(made[m][n + 1], a[m], second);
            }
        }
    }
}

// what the rows of a block see of the columns; rows beyond the last as the last: their results are not written
template <int ROWS> struct Seen {
    int begin[ROWS], end[ROWS];

    // the caller's next barrier makes it known to all threads
    __device__ __forceinline__ void find(const Band& band, const Place& at, int columns) {
        for (int r = threadIdx.x; r < ROWS; r += THREADS) {
            const Interval seen = band.seen(at.first + min(r, at.count - 1), columns);
            begin[r] = seen.begin, end[r] = seen.end;
        }
    }
    __device__ __forceinline__ bool whole(int column, int columns) const {
        return begin[ROWS - 1] <= column && end[0] >= column + columns;
    }
    __device__ __forceinline__ bool sees(int row, int column) const { return column >= begin[row] && column < end[row]; }
};

// `sums` times `factor` into the rows of `at`, with one factor for the upper and one for the lower rows of each 16
template <int M_TILES, int WIDTH>
__device__ __forceinline__ void write(float* to, long long stride, const Place& at, const float (&sums)[M_TILES][WIDTH / 8][4],
                                      const float (&factors)[M_TILES][2]) {
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = (warp() * M_TILES + m) * 16 + row_of(i);
            if (row >= at.count) continue;
            float* const target = to + (at.first + row) * stride + column_of(i);
#pragma unroll
            for (int n = 0; n < WIDTH / 8; ++n) target[n * 8] = sums[m][n][i] * factors[m][i / 2];
        }
}

}  // namespace tensor
