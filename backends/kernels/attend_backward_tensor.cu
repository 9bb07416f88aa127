// takes: ELEMENT HEAD_DIM V_HEAD_DIM
// One tile of attention backward on tensor cores, after FlashAttention-2 (arXiv 2307.08691, algorithm 2), without atomics: dq in one
// kernel, dk and dv in another. Rows are queries in the first and keys in the second; a block keeps its 64 rows (128 of narrow
// heads) in shared memory and goes through the columns of the other side 32 at a time, while the next come.
#include "attend_tensor.cuh"

namespace {

constexpr int M_TILES = HEAD_DIM <= 64 && V_HEAD_DIM <= 64 ? 2 : 1, COLUMNS = 32, ROWS = tensor::WARPS * M_TILES * 16;
constexpr float LOG2_E = 1.4426950408889634f;
using Scores = float[M_TILES][COLUMNS / 8][4];
using PerRow = float[M_TILES][2];
using Sums = float[M_TILES][HEAD_DIM / 8][4];
using ValueSums = float[M_TILES][V_HEAD_DIM / 8][4];
using Operands = plain::Backward<ELEMENT, float>;

struct Columns {
    ELEMENT far[COLUMNS * (HEAD_DIM + tensor::PAD)], value[COLUMNS * (V_HEAD_DIM + tensor::PAD)];
    float lse[COLUMNS], delta[COLUMNS];  // where columns are queries
};

struct Shared {
    ELEMENT near[ROWS * (HEAD_DIM + tensor::PAD)], value[ROWS * (V_HEAD_DIM + tensor::PAD)];
    Columns columns[2];
    tensor::Seen<ROWS> seen;
};

__device__ __forceinline__ void begin_copy(Columns& to, const Operands& of, int column, bool vectors) {
    tensor::begin_copy<COLUMNS, HEAD_DIM>(to.far, of.far, column, vectors);
    tensor::begin_copy<COLUMNS, V_HEAD_DIM>(to.value, of.far_value, column, vectors);
    commit_copies();
}

__device__ __forceinline__ void begin_copy(Shared& shared, const Operands& of, int row, bool vectors) {
    tensor::begin_copy<ROWS, HEAD_DIM>(shared.near, of.near, row, vectors);
    tensor::begin_copy<ROWS, V_HEAD_DIM>(shared.value, of.near_value, row, vectors);
}

// lse of a query as the exponent's second term; one of -inf as +inf, so that no weight is left
__device__ __forceinline__ float reference_of(float lse) { return lse == -infinity<float>() ? infinity<float>() : lse * LOG2_E; }

// no weight and no gradient where the band hides a column from a row
__device__ __forceinline__ void hide(Scores& weights, Scores& rates, const tensor::Seen<ROWS>& seen, int column) {
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = (tensor::warp() * M_TILES + m) * 16 + tensor::row_of(i);
            const int begin = seen.begin[row] - column - tensor::column_of(i), end = seen.end[row] - column - tensor::column_of(i);
#pragma unroll
            for (int n = 0; n < COLUMNS / 8; ++n)
                if (n * 8 < begin || n * 8 >= end) weights[m][n][i] = rates[m][n][i] = 0;
        }
}

// false if a row would touch what it does not see and that is not finite
__device__ __forceinline__ bool add_dq(Sums& dq, const Operands& of, const Band& band, const Place& at, bool vectors, Shared& shared) {
    shared.seen.find(band, at, of.far.count);
    __syncthreads();
    const int begin = shared.seen.begin[0], end = shared.seen.end[ROWS - 1];
    begin_copy(shared, of, at.first, vectors);
    begin_copy(shared.columns[0], of, begin, vectors);
    PerRow references, deltas;
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = at.first + min((tensor::warp() * M_TILES + m) * 16 + tensor::row_of(half * 2), at.count - 1);
            references[m][half] = reference_of(of.lse[row]);
            deltas[m][half] = of.delta[row];
        }
    const float scale = of.scale * LOG2_E;
    bool leaks = false;
    for (int column = begin, turn = 0; column < end && !leaks; column += COLUMNS, turn ^= 1) {
        wait_copies<0>();
        __syncthreads();
        if (column + COLUMNS < end) begin_copy(shared.columns[turn ^ 1], of, column + COLUMNS, vectors);
        const Columns& columns = shared.columns[turn];
        Scores scores = {}, rates = {};
        tensor::multiply<M_TILES, COLUMNS, HEAD_DIM>(scores, shared.near, columns.far);
        tensor::multiply<M_TILES, COLUMNS, V_HEAD_DIM>(rates, shared.value, columns.value);
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int n = 0; n < COLUMNS / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    rates[m][n][i] = tensor::power_of_two(fmaf(scores[m][n][i], scale, -references[m][i / 2])) *
                                     (rates[m][n][i] - deltas[m][i / 2]);
        if (!shared.seen.whole(column, COLUMNS)) {
            hide(scores, rates, shared.seen, column);
            const bool found = tensor::finds_non_finite<COLUMNS, HEAD_DIM>(columns.far);
            leaks = __syncthreads_or(found);
        }
        tensor::add_product<M_TILES, COLUMNS, HEAD_DIM>(dq, rates, columns.far);
    }
    wait_copies<0>();
    return !leaks;
}

__device__ __forceinline__ void write_dq(const Operands& of, const Place& at, const Sums& dq, float* to, long long stride) {
    PerRow factors;
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) factors[m][half] = of.scale;
    tensor::write<M_TILES, HEAD_DIM>(to, stride, at, dq, factors);
    __syncthreads();
    for (int row = threadIdx.x / 32; row < at.count; row += tensor::WARPS)
        if (of.lse[at.first + row] == -infinity<float>())
            for (int x = tensor::lane(); x < HEAD_DIM; x += 32) to[(at.first + row) * stride + x] = 0;
}

// What the queries of one head, in steps of COLUMNS, have for a thread to carry into shared memory: lse or delta of one of them.
struct Carried {
    float value;
    bool dead;

    __device__ __forceinline__ void take(const Operands& of, int column) {
        const int x = threadIdx.x % COLUMNS;
        const bool inside = column + x < of.far.count, is_lse = threadIdx.x < COLUMNS;
        value = 0, dead = false;
        if (!inside || threadIdx.x >= 2 * COLUMNS) return;
        value = is_lse ? of.lse[column + x] : of.delta[column + x];
        if (!is_lse) return;
        dead = value == -infinity<float>();
        value = reference_of(value);
    }
    __device__ __forceinline__ void put(Columns& to) const {
        if (threadIdx.x < COLUMNS) to.lse[threadIdx.x] = value;
        else if (threadIdx.x < 2 * COLUMNS) to.delta[threadIdx.x - COLUMNS] = value;
    }
};

// scores become weights, and rates the gradient of the scores
__device__ __forceinline__ void weigh(Scores& scores, Scores& rates, const Columns& columns, float scale) {
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float reference = columns.lse[n * 8 + tensor::column_of(i)], delta = columns.delta[n * 8 + tensor::column_of(i)];
#pragma unroll
            for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                for (int j = i; j < 4; j += 2) {
                    scores[m][n][j] = tensor::power_of_two(fmaf(scores[m][n][j], scale, -reference));
                    rates[m][n][j] = scores[m][n][j] * (rates[m][n][j] - delta);
                }
        }
}

// as add_dq, for the query heads that share the rows, of which `of` is the first
__device__ __forceinline__ bool add_dkv(Sums& dk, ValueSums& dv, Operands of, const BackwardProblem& problem, const Place& at,
                                        Shared& shared) {
    const bool vectors = problem.vectors;
    shared.seen.find(problem.band, at, of.far.count);
    __syncthreads();
    const int begin = shared.seen.begin[0], end = shared.seen.end[ROWS - 1];
    if (end <= begin) return true;
    const float scale = of.scale * LOG2_E;
    begin_copy(shared, of, at.first, vectors);
    begin_copy(shared.columns[0], of, begin, vectors);
    Carried carried;
    carried.take(of, begin);
    carried.put(shared.columns[0]);
    bool leaks = false;
    for (int heads = problem.group, column = begin, turn = 0; heads && !leaks; turn ^= 1) {
        wait_copies<0>();
        const bool dead = __syncthreads_or(carried.dead);
        const bool whole = !dead && shared.seen.whole(column, COLUMNS);
        const int now = column;
        column += COLUMNS;
        if (column >= end) {
            column = begin, --heads;
            of.advance(problem);
        }
        if (heads) {
            begin_copy(shared.columns[turn ^ 1], of, column, vectors);
            carried.take(of, column);
        }
        const Columns& columns = shared.columns[turn];
        Scores scores = {}, rates = {};
        tensor::multiply<M_TILES, COLUMNS, HEAD_DIM>(scores, shared.near, columns.far);
        tensor::multiply<M_TILES, COLUMNS, V_HEAD_DIM>(rates, shared.value, columns.value);
        weigh(scores, rates, columns, scale);
        if (!whole) {
            hide(scores, rates, shared.seen, now);
            bool found = tensor::finds_non_finite<COLUMNS, HEAD_DIM>(columns.far);
            found |= tensor::finds_non_finite<COLUMNS, V_HEAD_DIM>(columns.value);
            leaks = __syncthreads_or(found);
        }
        tensor::add_product<M_TILES, COLUMNS, V_HEAD_DIM>(dv, scores, columns.value);
        tensor::add_product<M_TILES, COLUMNS, HEAD_DIM>(dk, rates, columns.far);
        carried.put(shared.columns[turn ^ 1]);
    }
    wait_copies<0>();
    return !leaks;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(128, 2) attend_dq_tensor(BackwardProblem of, const ELEMENT* q, const ELEMENT* k,
                                                                      const ELEMENT* v, const ELEMENT* dout, const float* lse,
                                                                      const float* delta, float* dq, float scale) {
    DYNAMIC_SHARED(memory);
    const plain::Given<ELEMENT, float> given{q, k, v, dout, lse, delta, scale};
    const Place first = place_of(blockIdx.x, of.batches, of.heads, of.rows, ROWS);
    Sums sums = {};
    const bool done = add_dq(sums, {of, given, first.batch, first.head, false}, of.band, first, of.vectors,
                             *reinterpret_cast<Shared*>(memory));
    const Place at = place_of(block_again(), of.batches, of.heads, of.rows, ROWS);
    const Operands operands(of, given, at.batch, at.head, false);
    float* const made = head_of(dq, of.dq, at.batch, at.head);
    if (done) return write_dq(operands, at, sums, made, of.dq.row);
    for (int row = 0; row < at.count; row += plain::SIDE) {
        const Place part{at.batch, at.head, at.first + row, min(plain::SIDE, at.count - row)};
        plain::Sums<float> exact = {};
        plain::add_gradient<plain::DQ>(exact, operands, of.band, part, 0, *reinterpret_cast<plain::Shared<float>*>(memory));
        plain::write(made, of.dq.row, part, 0, HEAD_DIM, exact, scale);
    }
}

// the band is the transposed one: rows are keys
extern "C" __global__ void __launch_bounds__(128, 2) attend_dkv_tensor(BackwardProblem of, const ELEMENT* q, const ELEMENT* k,
                                                                       const ELEMENT* v, const ELEMENT* dout, const float* lse,
                                                                       const float* delta, float* dk, float* dv, float scale) {
    DYNAMIC_SHARED(memory);
    const plain::Given<ELEMENT, float> given{q, k, v, dout, lse, delta, scale};
    const int group = of.group, kv_heads = of.heads / of.group;
    const Place first = place_of(blockIdx.x, of.batches, kv_heads, of.keys, ROWS);
    Sums sums = {};
    ValueSums value_sums = {};
    const bool done = add_dkv(sums, value_sums, {of, given, first.batch, first.head * group, true}, of, first,
                              *reinterpret_cast<Shared*>(memory));
    const Place at = place_of(block_again(), of.batches, kv_heads, of.keys, ROWS);
    float* const made = head_of(dk, of.dk, at.batch, at.head);
    float* const value_made = head_of(dv, of.dv, at.batch, at.head);
    if (done) {
        PerRow factors, ones;
        for (int m = 0; m < M_TILES; ++m) factors[m][0] = factors[m][1] = scale, ones[m][0] = ones[m][1] = 1;
        tensor::write<M_TILES, HEAD_DIM>(made, of.dk.row, at, sums, factors);
        tensor::write<M_TILES, V_HEAD_DIM>(value_made, of.dv.row, at, value_sums, ones);
        return;
    }
    auto& shared = *reinterpret_cast<plain::Shared<float>*>(memory);
    for (int row = 0; row < at.count; row += plain::SIDE) {
        const Place part{at.batch, at.head, at.first + row, min(plain::SIDE, at.count - row)};
        plain::Sums<float> exact = {}, exact_value = {};
        Operands operands(of, given, at.batch, at.head * group, true);
        for (int index = 0; index < group; ++index, operands.advance(of)) {
            plain::add_gradient<plain::DK>(exact, operands, of.band, part, 0, shared);
            plain::add_gradient<plain::DV>(exact_value, operands, of.band, part, 0, shared);
        }
        plain::write(made, of.dk.row, part, 0, HEAD_DIM, exact, scale);
        plain::write(value_made, of.dv.row, part, 0, V_HEAD_DIM, exact_value, 1.f);
    }
}
