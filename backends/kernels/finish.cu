// takes: STATE PARTIAL RESULT
#include "partials.cuh"

template <int N>
__device__ __forceinline__ void finish_rows(const Geometry& g, const Partials& partials, const STATE* acc, const STATE* row_max,
                                            const STATE* row_sum, RESULT* out, STATE* lse) {
    for_rows(g.extent, [&](const Row& row, bool inside) {
        if (!inside) return;
        const Fold fold = fold_of(g, partials, row_max, row_sum, row);
        const STATE divisor = fold.sum == STATE(0) ? STATE(1) : fold.sum;
        const STATE* const source = fold.old_seen ? acc + row.in(g.acc) : nullptr;
        RESULT* const target = out + row.in(g.result);
        for (long long column = static_cast<long long>(threadIdx.x) * N; column < g.extent.width; column += blockDim.x * N) {
            STATE sum[N];
            fold_columns<N>(sum, fold, partials, source, column);
#pragma unroll
            for (int j = 0; j < N; ++j) sum[j] /= divisor;
            store_narrow<N>(target + column, sum);
        }
        if (threadIdx.x == 0) lse[row.in(g.result_lse)] = log_of(fold.sum) + fold.reference;
    });
}

extern "C" __global__ void __launch_bounds__(256, 3) finish_partials(const __grid_constant__ Geometry g, const STATE* acc,
                                                                  const STATE* row_max, const STATE* row_sum, RESULT* out,
                                                                  STATE* lse, RINGSIM_PARTIALS) {
    constexpr int lanes = 16 / static_cast<int>(sizeof(PARTIAL));
    if (g.vectors) finish_rows<lanes>(g, RINGSIM_PARTIALS_GIVEN, acc, row_max, row_sum, out, lse);
    else finish_rows<1>(g, RINGSIM_PARTIALS_GIVEN, acc, row_max, row_sum, out, lse);
}
