// takes: TARGET SOURCE COLUMNS
// COLUMNS elements of the last axis at once, of which the axes' counts and strides speak as one position.
#include "strided.cuh"

extern "C" __global__ void __launch_bounds__(256) cast(const __grid_constant__ Axes axes, TARGET* target, const SOURCE* source) {
    for_elements(axes, [&](long long to, long long from) {
        SOURCE wide[COLUMNS];
        load(wide, source + from);
        store_narrow<COLUMNS>(target + to, wide);
    });
}
