// takes: TARGET SOURCE COLUMNS
// COLUMNS elements of the last axis at once, of which the axes' counts and strides speak as one position.
#include "strided.cuh"

extern "C" __global__ void __launch_bounds__(256) accumulate(const __grid_constant__ Axes axes, TARGET* total,
                                                             const SOURCE* addend) {
    for_elements(axes, [&](long long to, long long from) {
        TARGET sum[COLUMNS], more[COLUMNS];
        load_wide<COLUMNS>(more, addend + from);
        load(sum, total + to);
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) sum[i] += more[i];
        store(total + to, sum);
    });
}
