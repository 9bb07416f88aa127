// takes: STATE PARTIAL
#include "partials.cuh"

template <int N>
__device__ __forceinline__ void merge_rows(const Geometry& g, const Partials& partials, STATE* acc, STATE* row_max,
                                           STATE* row_sum) {
    for_rows(g.extent, [&](const Row& row, bool inside) {
        Fold fold = {};
        if (inside) fold = fold_of(g, partials, row_max, row_sum, row);
        __syncwarp();  // every lane of a row has read its maximum and sum before one writes them
        if (!inside || !(fold.any_new || g.fresh)) return;
        STATE* const target = acc + row.in(g.acc);
        for (long long column = static_cast<long long>(threadIdx.x) * N; column < g.extent.width; column += blockDim.x * N) {
            STATE sum[N];
            fold_columns<N>(sum, fold, partials, target, column);
            store(target + column, sum);
        }
        if (threadIdx.x == 0) {
            row_max[row.in(g.row_max)] = fold.sum == STATE(0) ? -infinity<STATE>() : fold.reference;
            row_sum[row.in(g.row_sum)] = fold.sum;
        }
    });
}

extern "C" __global__ void __launch_bounds__(256, 3) merge_partials(const __grid_constant__ Geometry g, STATE* acc, STATE* row_max,
                                                                 STATE* row_sum, RINGSIM_PARTIALS) {
    constexpr int lanes = 16 / static_cast<int>(sizeof(PARTIAL));
    if (g.vectors) merge_rows<lanes>(g, RINGSIM_PARTIALS_GIVEN, acc, row_max, row_sum);
    else merge_rows<1>(g, RINGSIM_PARTIALS_GIVEN, acc, row_max, row_sum);
}
