// takes: ELEMENT HEAD_DIM V_HEAD_DIM
// One tile of attention forward on tensor cores, after FlashAttention-2 (arXiv 2307.08691, algorithm 1): a block makes 128 rows of
// one head (64 where heads are wider than 128), 64 keys at a time (32 where values are wider than 80: more do not fit the
// registers beside the sums); the next keys come while the values are multiplied.
#include "attend_tensor.cuh"

namespace {

constexpr bool WIDE = HEAD_DIM > 128 || V_HEAD_DIM > 128;
constexpr int M_TILES = WIDE ? 1 : 2, COLUMNS = WIDE || V_HEAD_DIM > 80 ? 32 : 64, ROWS = tensor::WARPS * M_TILES * 16;
using Scores = float[M_TILES][COLUMNS / 8][4];
using Sums = float[M_TILES][V_HEAD_DIM / 8][4];
using PerRow = float[M_TILES][2];

struct Shared {
    ELEMENT q[ROWS * (HEAD_DIM + tensor::PAD)], k[COLUMNS * (HEAD_DIM + tensor::PAD)], v[COLUMNS * (V_HEAD_DIM + tensor::PAD)];
    tensor::Seen<ROWS> seen;
};

__device__ __forceinline__ void hide(Scores& scores, const tensor::Seen<ROWS>& seen, int column) {
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = (tensor::warp() * M_TILES + m) * 16 + tensor::row_of(i);
            const int begin = seen.begin[row] - column - tensor::column_of(i), end = seen.end[row] - column - tensor::column_of(i);
#pragma unroll
            for (int n = 0; n < COLUMNS / 8; ++n)
                if (n * 8 < begin || n * 8 >= end) scores[m][n][i] = -infinity<float>();
        }
}

// Scores become weights relative to the largest score yet, which sums and totals follow. `scale` is for powers of two. `totals`
// are of this thread's columns alone.
__device__ __forceinline__ void weigh(Scores& scores, Sums& sums, PerRow& tops, PerRow& totals, float scale) {
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float top = tops[m][half];
#pragma unroll
            for (int n = 0; n < COLUMNS / 8; ++n) top = fmaxf(top, fmaxf(scores[m][n][half * 2], scores[m][n][half * 2 + 1]));
            top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 1));
            top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 2));
            // where nothing is above -inf the reference is 0, so that exp(-inf - 0) is 0 and not NaN
            const float reference = top == -infinity<float>() ? 0.f : top * scale;
            const float factor = tensor::power_of_two(fmaf(tops[m][half], scale, -reference));
            tops[m][half] = top;
            float total = totals[m][half] * factor;
#pragma unroll
            for (int n = 0; n < COLUMNS / 8; ++n)
#pragma unroll
                for (int i = half * 2; i < half * 2 + 2; ++i) {
                    scores[m][n][i] = tensor::power_of_two(fmaf(scores[m][n][i], scale, -reference));
                    total += scores[m][n][i];
                }
            totals[m][half] = total;
#pragma unroll
            for (int n = 0; n < V_HEAD_DIM / 8; ++n)
#pragma unroll
                for (int i = half * 2; i < half * 2 + 2; ++i) sums[m][n][i] *= factor;
        }
}

__device__ __forceinline__ void finish(const plain::Forward<ELEMENT, float>& of, const Place& at, const Sums& sums, const PerRow& tops,
                                       const PerRow& totals) {
    PerRow factors;
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float total = sum_over_lanes(totals[m][half], 4);
            factors[m][half] = total == 0 ? 1.f : 1.f / total;
            const int row = (tensor::warp() * M_TILES + m) * 16 + tensor::row_of(half * 2);
            const float reference = tops[m][half] == -infinity<float>() ? 0.f : tops[m][half] * of.scale;
            if (tensor::lane() % 4 == 0 && row < at.count) of.lse[at.first + row] = reference + logf(total);
        }
    tensor::write<M_TILES, V_HEAD_DIM>(of.out, of.out_stride, at, sums, factors);
}

// false if a row would touch a value that it does not see and that is not finite
__device__ __forceinline__ bool attend(Sums& sums, PerRow& tops, PerRow& totals, const plain::Forward<ELEMENT, float>& of,
                                       const Band& band, const Place& at, bool vectors, Shared& shared) {
    shared.seen.find(band, at, of.k.count);
    __syncthreads();
    const int begin = shared.seen.begin[0], end = shared.seen.end[ROWS - 1];
    const float scale = of.scale * 1.4426950408889634f;
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) tops[m][0] = tops[m][1] = -infinity<float>();
    tensor::begin_copy<ROWS, HEAD_DIM>(shared.q, of.q, at.first, vectors);
    tensor::begin_copy<COLUMNS, HEAD_DIM>(shared.k, of.k, begin, vectors);
    commit_copies();
    bool leaks = false;
    for (int column = begin; column < end && !leaks; column += COLUMNS) {
        wait_copies<0>();
        __syncthreads();
        tensor::begin_copy<COLUMNS, V_HEAD_DIM>(shared.v, of.v, column, vectors);
        commit_copies();
        Scores scores = {};
        tensor::multiply<M_TILES, COLUMNS, HEAD_DIM>(scores, shared.q, shared.k);
        wait_copies<0>();
        __syncthreads();
        if (column + COLUMNS < end) tensor::begin_copy<COLUMNS, HEAD_DIM>(shared.k, of.k, column + COLUMNS, vectors);
        commit_copies();
        if (!shared.seen.whole(column, COLUMNS)) {
            hide(scores, shared.seen, column);
            const bool found = tensor::finds_non_finite<COLUMNS, V_HEAD_DIM>(shared.v);
            leaks = __syncthreads_or(found);
        }
        weigh(scores, sums, tops, totals, scale);
        tensor::add_product<M_TILES, COLUMNS, V_HEAD_DIM>(sums, scores, shared.v);
    }
    wait_copies<0>();
    return !leaks;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(128, 2) attend_tensor(ForwardProblem of, const ELEMENT* q, const ELEMENT* k,
                                                                   const ELEMENT* v, float* out, float* lse, float scale) {
    DYNAMIC_SHARED(memory);
    Sums sums = {};
    PerRow tops, totals = {};
    const Place first = place_of(blockIdx.x, of.batches, of.heads, of.rows, ROWS);
    const bool done = attend(sums, tops, totals, {of, first, q, k, v, out, lse, scale}, of.band, first, of.vectors,
                             *reinterpret_cast<Shared*>(memory));
    const Place at = place_of(block_again(), of.batches, of.heads, of.rows, ROWS);
    const plain::Forward<ELEMENT, float> operands(of, at, q, k, v, out, lse, scale);
    if (done) return finish(operands, at, sums, tops, totals);
    for (int row = 0; row < at.count; row += plain::SIDE)
        for (int begin = 0; begin < V_HEAD_DIM; begin += plain::CHUNK)
            plain::attend(operands, of.band, {at.batch, at.head, at.first + row, min(plain::SIDE, at.count - row)}, begin,
                          *reinterpret_cast<plain::Shared<float>*>(memory));
}
