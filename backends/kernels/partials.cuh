// Partial results of several tiles folded into the running state of their rows, in one pass over memory.
//
// A partial (normalised output and log-sum-exp) is a state whose sum is 1 and whose maximum is its log-sum-exp: FlashAttention-2,
// arXiv 2307.08691, section 3.1.
#pragma once
#include "rows.cuh"

constexpr int MOST_PARTIALS = 8;

// the part of the state that a partial covers, and the strides of its two arrays, from the first row that it covers
struct Slot {
    long long batch[2], heads[2], rows[2];
    Strides out, lse;
    __device__ __forceinline__ bool covers(const Row& at) const {
        return at.batch >= batch[0] && at.batch < batch[1] && at.head >= heads[0] && at.head < heads[1] && at.row >= rows[0] &&
               at.row < rows[1];
    }
    __device__ __forceinline__ Row within(const Row& at) const {
        return {at.batch - batch[0], at.head - heads[0], at.row - rows[0]};
    }
};

struct Geometry {
    Extent extent;
    Strides acc, row_max, row_sum, result, result_lse;
    long long fresh, slots, vectors;
    Slot slot[MOST_PARTIALS];
};

struct Partials {
    const PARTIAL* out[MOST_PARTIALS];
    const STATE* lse[MOST_PARTIALS];
};

#define RINGSIM_PARTIALS                                                                                                      \
    const PARTIAL *out0, const STATE *lse0, const PARTIAL *out1, const STATE *lse1, const PARTIAL *out2, const STATE *lse2,   \
        const PARTIAL *out3, const STATE *lse3, const PARTIAL *out4, const STATE *lse4, const PARTIAL *out5,                  \
        const STATE *lse5, const PARTIAL *out6, const STATE *lse6, const PARTIAL *out7, const STATE *lse7
#define RINGSIM_PARTIALS_GIVEN                                                                                                \
    Partials{{out0, out1, out2, out3, out4, out5, out6, out7}, {lse0, lse1, lse2, lse3, lse4, lse5, lse6, lse7}}

// What a row's maximum and sum become, and each side's factor on the way there.
struct Fold {
    STATE reference, sum, old_factor, factor[MOST_PARTIALS];
    long long at[MOST_PARTIALS];
    bool old_seen, seen[MOST_PARTIALS], any_new;
};

__device__ __forceinline__ Fold fold_of(const Geometry& g, const Partials& partials, const STATE* row_max, const STATE* row_sum,
                                        const Row& row) {
    Fold fold;
    STATE lse[MOST_PARTIALS];
    const STATE old_sum = g.fresh ? STATE(0) : row_sum[row.in(g.row_sum)];
    fold.old_seen = old_sum != STATE(0);
    const STATE old_max = fold.old_seen ? row_max[row.in(g.row_max)] : -infinity<STATE>();
    fold.reference = old_max;
    fold.any_new = false;
#pragma unroll
    for (int i = 0; i < MOST_PARTIALS; ++i) {
        const Slot& slot = g.slot[i];
        fold.seen[i] = i < g.slots && slot.covers(row);
        lse[i] = fold.seen[i] ? partials.lse[i][slot.within(row).in(slot.lse)] : -infinity<STATE>();
        fold.seen[i] = fold.seen[i] && lse[i] != -infinity<STATE>();
        fold.at[i] = fold.seen[i] ? slot.within(row).in(slot.out) : 0;
        fold.any_new = fold.any_new || fold.seen[i];
        fold.reference = larger(fold.reference, lse[i]);
    }
    fold.old_factor = factor_of(fold.old_seen, old_max, fold.reference);
    fold.sum = old_sum * fold.old_factor;
#pragma unroll
    for (int i = 0; i < MOST_PARTIALS; ++i) {
        fold.factor[i] = factor_of(fold.seen[i], lse[i], fold.reference);
        fold.sum += fold.factor[i];
    }
    return fold;
}

// The folded accumulator at columns [column, column + N) of a row.
template <int N>
__device__ __forceinline__ void fold_columns(STATE (&sum)[N], const Fold& fold, const Partials& partials, const STATE* acc,
                                             long long column) {
    if (fold.old_seen) {
        load(sum, acc + column);
#pragma unroll
        for (int j = 0; j < N; ++j) sum[j] *= fold.old_factor;
    } else {
#pragma unroll
        for (int j = 0; j < N; ++j) sum[j] = STATE(0);
    }
#pragma unroll
    for (int i = 0; i < MOST_PARTIALS; ++i) {
        if (!fold.seen[i]) continue;
        STATE addend[N];
        load_wide<N>(addend, partials.out[i] + fold.at[i] + column);
#pragma unroll
        for (int j = 0; j < N; ++j) sum[j] += fold.factor[i] * addend[j];
    }
}
