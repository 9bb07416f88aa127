// takes: STATE ELEMENT
#include "rows.cuh"

struct Geometry {
    Extent extent;
    Strides out, dout, delta;
    long long vectors;
};

// delta = rowsum(dout * out). FlashAttention-2, arXiv 2307.08691, section 2.2.
template <int N>
__device__ __forceinline__ void multiply_rows(const Geometry& g, const ELEMENT* out, const ELEMENT* dout, STATE* delta) {
    for_rows(g.extent, [&](const Row& row, bool inside) {
        STATE sum = 0;
        for (long long column = static_cast<long long>(threadIdx.x) * N; inside && column < g.extent.width;
             column += blockDim.x * N) {
            STATE left[N], right[N];
            load_wide<N>(left, out + row.in(g.out) + column);
            load_wide<N>(right, dout + row.in(g.dout) + column);
#pragma unroll
            for (int j = 0; j < N; ++j) sum += left[j] * right[j];
        }
        sum = sum_over_lanes(sum, blockDim.x);
        if (inside && threadIdx.x == 0) delta[row.in(g.delta)] = sum;
    });
}

extern "C" __global__ void __launch_bounds__(256) delta(const __grid_constant__ Geometry g, const ELEMENT* out,
                                                        const ELEMENT* dout, STATE* delta) {
    constexpr int lanes = 16 / static_cast<int>(sizeof(ELEMENT));
    if (g.vectors) multiply_rows<lanes>(g, out, dout, delta);
    else multiply_rows<1>(g, out, dout, delta);
}
