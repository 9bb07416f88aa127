// Plain tiles of 32 rows and 32 columns, for any dtype and any width, exact about what a row does not see: 0 x NaN is not taken.
//
// 128 threads: thread (ty, tx) of 8 x 16 has rows 4 ty .. 4 ty + 3, and columns tx, tx + 16, .. of scores and of products.
#pragma once

#include "attend_band.cuh"

namespace plain {

constexpr int SIDE = 32, PITCH = SIDE + 1, CHUNK = 128, THREADS = 128, ROWS = 4, ACROSS = 16;

// of one block; cuda_attend.py counts the bytes again
template <class W> struct Shared {
    W left[SIDE * PITCH], right[SIDE * PITCH], weights[SIDE * PITCH], values[SIDE * CHUNK];
    int begin[SIDE], end[SIDE];
};

// rows of one head, and how many numbers each has
template <class T> struct Rows {
    const T* first;
    long long stride;
    int count, width;

    __device__ __forceinline__ Rows(const T* operand, const Strides& strides, int batch, int head, long long count, long long width)
        : first(head_of(operand, strides, batch, head)), stride(strides.row), count(int(count)), width(int(width)) {}
};

template <class W> using Scores = W[ROWS][SIDE / ACROSS];
template <class W> using Sums = W[ROWS][CHUNK / ACROSS];

// blocks that share rows of so many numbers
__device__ __forceinline__ int chunks_of(long long width) { return int((width + CHUNK - 1) / CHUNK); }
__device__ __forceinline__ int row_of(int r) { return static_cast<int>(threadIdx.x) / ACROSS * ROWS + r; }
__device__ __forceinline__ int column_of(int c) { return static_cast<int>(threadIdx.x) % ACROSS + c * ACROSS; }

// `to`, SIDE x `across`: rows from `row` and columns from `column`, 0 outside of the operand
template <class T, class W> __device__ void copy(W* to, int pitch, int across, const Rows<T>& from, int row, int column) {
    for (int at = threadIdx.x; at < SIDE * across; at += THREADS) {
        const int r = row + at / across, c = column + at % across;
        const bool inside = r < from.count && c < from.width;
        to[at / across * pitch + at % across] = inside ? widen<W>(from.first[r * from.stride + c]) : W(0);
    }
}

// products of rows of `left` from `row` with rows of `right` from `column`; begins and ends with a barrier between uses of `shared`
template <class T, class W>
__device__ void multiply(Scores<W>& made, Shared<W>& shared, const Rows<T>& left, int row, const Rows<T>& right, int column) {
    for (int r = 0; r < ROWS; ++r) made[r][0] = made[r][1] = 0;
    for (int begin = 0; begin < left.width; begin += SIDE) {
        __syncthreads();
        copy(shared.left, PITCH, SIDE, left, row, begin);
        copy(shared.right, PITCH, SIDE, right, column, begin);
        __syncthreads();
        const int across = min(SIDE, left.width - begin);
        for (int x = 0; x < across; ++x) {
            const W one = shared.right[column_of(0) * PITCH + x], other = shared.right[column_of(1) * PITCH + x];
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                const W value = shared.left[row_of(r) * PITCH + x];
                made[r][0] += value * one;
                made[r][1] += value * other;
            }
        }
    }
}

// the columns that each of the rows from `first` sees, into shared memory; ends with a barrier
template <class W> __device__ void find_seen(Shared<W>& shared, const Band& band, const Place& at, int columns) {
    __syncthreads();
    for (int r = threadIdx.x; r < SIDE; r += THREADS) {
        const Interval seen = band.seen(at.first + min(r, at.count - 1), columns);
        shared.begin[r] = r < at.count ? seen.begin : columns;
        shared.end[r] = r < at.count ? seen.end : columns;
    }
    __syncthreads();
}

template <class W> __device__ __forceinline__ bool sees(const Shared<W>& shared, int r, int column) {
    return column >= shared.begin[r] && column < shared.end[r];
}

// whether each of the rows sees every column of [column, column + SIDE)
template <class W> __device__ __forceinline__ bool all_seen(const Shared<W>& shared, const Place& at, int column) {
    return at.count == SIDE && shared.begin[SIDE - 1] <= column && shared.end[0] >= column + SIDE;
}

// sums += weights @ (rows of `right` from `column`, its numbers from `begin`); what a row does not see is not touched, nor are
// columns whose `dead` is set. `weights` were written before the call; begins with the barrier for that.
template <class T, class W>
__device__ void add_product(Sums<W>& sums, Shared<W>& shared, const Rows<T>& right, int column, int begin, bool whole,
                            const unsigned dead = 0) {
    const int across = min(CHUNK, right.width - begin);
    copy(shared.values, CHUNK, across, right, column, begin);
    __syncthreads();
    for (int x = 0; x < SIDE; ++x) {
        if (dead >> x & 1) continue;
        W weight[ROWS];
        bool take[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            weight[r] = shared.weights[row_of(r) * PITCH + x];
            take[r] = whole || sees(shared, row_of(r), column + x);
        }
#pragma unroll
        for (int c = 0; c < CHUNK / ACROSS; ++c) {
            if (column_of(c) >= across) break;
            const W value = shared.values[x * CHUNK + column_of(c)];
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
                if (take[r]) sums[r][c] += weight[r] * value;
        }
    }
}

// `sums` times `factor` into the rows of `at`, their numbers from `begin`
template <class W>
__device__ void write(W* to, long long stride, const Place& at, int begin, int width, const Sums<W>& sums, W factor) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int c = 0; c < CHUNK / ACROSS; ++c)
            if (row_of(r) < at.count && begin + column_of(c) < width)
                to[(at.first + row_of(r)) * stride + begin + column_of(c)] = sums[r][c] * factor;
}

// ---- forward: rows are queries, columns are keys

template <class T, class W> struct Forward {
    Rows<T> q, k, v;
    W* out;
    long long out_stride;
    W* lse;
    W scale;

    __device__ __forceinline__ Forward(const ForwardProblem& of, const Place& at, const T* q, const T* k, const T* v, W* out, W* lse, W scale)
        : q(q, of.q, at.batch, at.head, of.rows, of.head_dim),
          k(k, of.k, at.batch, at.head / int(of.group), of.keys, of.head_dim),
          v(v, of.v, at.batch, at.head / int(of.group), of.keys, of.v_head_dim),
          out(head_of(out, of.out, at.batch, at.head)),
          out_stride(of.out.row),
          lse(head_of(lse, of.lse, at.batch, at.head)),
          scale(scale) {}
};

// the rows of `at`, at most SIDE, and numbers [begin, begin + CHUNK) of their output
template <class T, class W> __device__ void attend(const Forward<T, W>& of, const Band& band, const Place& at, int begin, Shared<W>& shared) {
    find_seen(shared, band, at, of.k.count);
    W top[ROWS], total[ROWS];
    Sums<W> sums;
    for (int r = 0; r < ROWS; ++r) {
        top[r] = -infinity<W>(), total[r] = 0;
        for (int c = 0; c < CHUNK / ACROSS; ++c) sums[r][c] = 0;
    }
    const int last = shared.end[at.count - 1];
    for (int column = shared.begin[0]; column < last; column += SIDE) {
        const bool whole = all_seen(shared, at, column);
        Scores<W> scores;
        multiply(scores, shared, of.q, at.first, of.k, column);
        for (int r = 0; r < ROWS; ++r) {
            for (int c = 0; c < 2; ++c)
                scores[r][c] = sees(shared, row_of(r), column + column_of(c)) ? scores[r][c] * of.scale : -infinity<W>();
            const W highest = larger(top[r], max_over_lanes(larger(scores[r][0], scores[r][1]), ACROSS));
            // where nothing is above -inf the reference is 0, so that exp(-inf - 0) is 0 and not NaN
            const W reference = highest == -infinity<W>() ? W(0) : highest;
            const W factor = exp_of(top[r] - reference);
            top[r] = highest;
            for (int c = 0; c < 2; ++c) shared.weights[row_of(r) * PITCH + column_of(c)] = scores[r][c] = exp_of(scores[r][c] - reference);
            total[r] = total[r] * factor + sum_over_lanes(scores[r][0] + scores[r][1], ACROSS);
            for (int c = 0; c < CHUNK / ACROSS; ++c) sums[r][c] *= factor;
        }
        add_product(sums, shared, of.v, column, begin, whole);
    }
    for (int r = 0; r < ROWS; ++r) {
        for (int c = 0; c < CHUNK / ACROSS; ++c) sums[r][c] /= total[r] == 0 ? W(1) : total[r];
        if (begin == 0 && threadIdx.x % ACROSS == 0 && row_of(r) < at.count) of.lse[at.first + row_of(r)] = top[r] + log_of(total[r]);
    }
    write(of.out, of.out_stride, at, begin, of.v.width, sums, W(1));
}

// ---- backward: rows are queries for dq, and keys for dk and dv

// what both kernels are given: whole operands
template <class T, class W> struct Given {
    const T *q, *k, *v, *dout;
    const W *lse, *delta;
    W scale;
};

template <class T, class W> struct Backward {
    Rows<T> near, near_value, far, far_value;  // rows: q and dout, columns: k and v; or the other way round
    const W *lse, *delta;                      // of the queries
    W scale;

    // of one query head; `keys_near`: rows are keys
    __device__ __forceinline__ Backward(const BackwardProblem& of, const Given<T, W>& given, int batch, int head, bool keys_near)
        : Backward(Rows<T>(given.q, of.q, batch, head, of.rows, of.head_dim),
                   Rows<T>(given.dout, of.dout, batch, head, of.rows, of.v_head_dim),
                   Rows<T>(given.k, of.k, batch, head / int(of.group), of.keys, of.head_dim),
                   Rows<T>(given.v, of.v, batch, head / int(of.group), of.keys, of.v_head_dim), keys_near,
                   head_of(given.lse, of.lse, batch, head), head_of(given.delta, of.delta, batch, head), given.scale) {}

    // where rows are keys: on to the next query head
    __device__ __forceinline__ void advance(const BackwardProblem& of) {
        far.first += of.q.head, far_value.first += of.dout.head, lse += of.lse.head, delta += of.delta.head;
    }

private:
    __device__ __forceinline__ Backward(const Rows<T>& q, const Rows<T>& dout, const Rows<T>& k, const Rows<T>& v, bool keys_near,
                                        const W* lse, const W* delta, W scale)
        : near(keys_near ? k : q), near_value(keys_near ? v : dout), far(keys_near ? q : k), far_value(keys_near ? dout : v),
          lse(lse), delta(delta), scale(scale) {}
};

enum Wanted { DQ, DK, DV };

// sums += what the columns add to the gradient of the rows of `at`, its numbers [begin, begin + CHUNK). A query whose lse is
// -inf sees nothing anywhere: it gets 0 and gives nothing.
template <Wanted WANTED, class T, class W>
__device__ void add_gradient(Sums<W>& sums, const Backward<T, W>& of, const Band& band, const Place& at, int begin, Shared<W>& shared) {
    find_seen(shared, band, at, of.far.count);
    const int last = shared.end[at.count - 1];
    for (int column = shared.begin[0]; column < last; column += SIDE) {
        const bool whole = all_seen(shared, at, column);
        unsigned dead = 0;
        if (WANTED != DQ)
            for (int x = 0; x < SIDE && column + x < of.far.count; ++x)
                dead |= unsigned(of.lse[column + x] == -infinity<W>()) << x;
        Scores<W> scores, rates;
        multiply(scores, shared, of.near, at.first, of.far, column);
        if (WANTED != DV) multiply(rates, shared, of.near_value, at.first, of.far_value, column);
        for (int r = 0; r < ROWS; ++r)
            for (int c = 0; c < 2; ++c) {
                W weight = 0;
                if (sees(shared, row_of(r), column + column_of(c))) {
                    const int query = WANTED == DQ ? at.first + row_of(r) : column + column_of(c);
                    weight = exp_of(scores[r][c] * of.scale - of.lse[query]);
                    if (WANTED != DV) weight *= rates[r][c] - of.delta[query];
                }
                shared.weights[row_of(r) * PITCH + column_of(c)] = weight;
            }
        add_product(sums, shared, WANTED == DV ? of.far_value : of.far, column, begin, whole, dead);
    }
    if constexpr (WANTED == DQ)
        for (int r = 0; r < ROWS; ++r)
            if (row_of(r) < at.count && of.lse[at.first + row_of(r)] == -infinity<W>())
                for (int c = 0; c < CHUNK / ACROSS; ++c) sums[r][c] = 0;
}

}  // namespace plain
