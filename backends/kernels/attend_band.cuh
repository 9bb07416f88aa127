// Where a tile's band lets rows see columns, where its operands lie, and which rows of which head a block computes.
#pragma once

#include "common.cuh"

// what is summed up in float32, but for float64
template <class T> struct Accumulated { using type = float; };
template <> struct Accumulated<double> { using type = double; };

// strides of an operand (batch, rows, heads, width) with a dense last axis, in elements
struct Strides {
    long long batch, row, head;
};

// of numbers (batch, heads, rows), one for each row, with a dense last axis
struct RowStrides {
    long long batch, head;
};

struct Interval {
    int begin, end;
};

__device__ __forceinline__ long long floor_divide(long long value, long long divisor) {
    return value / divisor - (value % divisor < 0);
}

__device__ __forceinline__ int clip(long long value, int most) {
    return value < 0 ? 0 : value > most ? most : static_cast<int>(value);
}

constexpr long long NO_BOUND = -0x7fffffffffffffffll - 1;

// Row i sees column j where lo <= distance + row_step * i - column_step * j <= hi; steps are positive, NO_BOUND is none.
// With keys for rows and queries for columns it is the band transposed: (-distance, k_step, q_step, -hi, -lo).
struct Band {
    long long distance, row_step, column_step, lo, hi;

    // the columns of [0, columns) that a row sees, none if end <= begin; neither end decreases from row to row
    __device__ __forceinline__ Interval seen(int row, int columns) const {
        const long long at = distance + row_step * row;
        Interval made = {0, columns};
        if (hi != NO_BOUND) made.begin = clip(-floor_divide(hi - at, column_step), columns);
        if (lo != NO_BOUND) made.end = clip(floor_divide(at - lo, column_step) + 1, columns);
        return made;
    }
};

// rows [first, first + count) of one head of one sequence
struct Place {
    int batch, head, first, count;
};

// Blocks go head by head, then sequence by sequence, then from the last rows to the first: those of a causal band, which
// see the most, begin first.
__device__ __forceinline__ Place place_of(int block, int batches, int heads, int rows, int rows_a_block) {
    const int blocks = (rows + rows_a_block - 1) / rows_a_block;
    const int first = (blocks - 1 - block / heads / batches) * rows_a_block;
    return {block / heads % batches, block % heads, first, min(rows_a_block, rows - first)};
}

// An argument by value, as cuda_attend.py writes it: `rows` queries and `keys` keys; query head h goes with key/value head
// h / group; `vectors`: q, k, v (and dout) may be read 16 bytes at a time.
struct Problem {
    long long batches, heads, group, rows, keys, head_dim, v_head_dim, vectors;
    Band band;
    Strides q, k, v;
};

struct ForwardProblem : Problem {
    Strides out;
    RowStrides lse;
};

struct BackwardProblem : Problem {
    Strides dout, dq, dk, dv;
    RowStrides lse, delta;
};

// where a head of an operand begins
template <class T> __device__ __forceinline__ T* head_of(T* first, const Strides& strides, int batch, int head) {
    return first + batch * strides.batch + head * strides.head;
}
template <class T> __device__ __forceinline__ T* head_of(T* first, const RowStrides& strides, int batch, int head) {
    return first + batch * strides.batch + head * strides.head;
}

// this block's number, of which the compiler does not know that it is: what comes of it is made anew, not kept in registers
__device__ __forceinline__ int block_again() {
    int block = blockIdx.x;
#ifdef __CUDA_ARCH__
    asm volatile("" : "+r"(block));
#endif
    return block;
}
