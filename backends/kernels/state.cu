// takes: STATE
#include "rows.cuh"

struct Sides {
    Extent extent;
    Strides acc, row_max, row_sum, acc2, row_max2, row_sum2;
    long long vectors;
};

// Merges a state into another, in place; a side that saw no key has sum 0. FlashAttention-2, arXiv 2307.08691, section 3.1.
template <int N>
__device__ __forceinline__ void merge_rows(const Sides& g, STATE* acc, STATE* row_max, STATE* row_sum, const STATE* acc2,
                                           const STATE* row_max2, const STATE* row_sum2) {
    for_rows(g.extent, [&](const Row& row, bool inside) {
        const STATE sum = inside ? row_sum[row.in(g.row_sum)] : STATE(0);
        const STATE sum2 = inside ? row_sum2[row.in(g.row_sum2)] : STATE(0);
        const STATE maximum = sum != STATE(0) ? row_max[row.in(g.row_max)] : -infinity<STATE>();
        const STATE maximum2 = sum2 != STATE(0) ? row_max2[row.in(g.row_max2)] : -infinity<STATE>();
        __syncwarp();  // every lane of a row has read its maximum and sum before one writes them
        if (!inside || sum2 == STATE(0)) return;
        const STATE reference = larger(maximum, maximum2);
        const STATE factor = factor_of(sum != STATE(0), maximum, reference);
        const STATE factor2 = factor_of(true, maximum2, reference);
        STATE* const target = acc + row.in(g.acc);
        const STATE* const source = acc2 + row.in(g.acc2);
        for (long long column = static_cast<long long>(threadIdx.x) * N; column < g.extent.width; column += blockDim.x * N) {
            STATE mine[N], other[N];
            load(other, source + column);
            load(mine, target + column);
#pragma unroll
            for (int j = 0; j < N; ++j) mine[j] = mine[j] * factor + factor2 * other[j];
            store(target + column, mine);
        }
        if (threadIdx.x != 0) return;
        const STATE total = sum * factor + factor2 * sum2;
        if (total != STATE(0)) row_max[row.in(g.row_max)] = reference;
        row_sum[row.in(g.row_sum)] = total;
    });
}

extern "C" __global__ void __launch_bounds__(256) merge(const __grid_constant__ Sides g, STATE* acc, STATE* row_max,
                                                        STATE* row_sum, const STATE* acc2, const STATE* row_max2,
                                                        const STATE* row_sum2) {
    constexpr int lanes = 16 / static_cast<int>(sizeof(STATE));
    if (g.vectors) merge_rows<lanes>(g, acc, row_max, row_sum, acc2, row_max2, row_sum2);
    else merge_rows<1>(g, acc, row_max, row_sum, acc2, row_max2, row_sum2);
}
