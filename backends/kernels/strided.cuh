// Arrays of four axes with free strides: a block's x goes along the last, its y along the third; no element is divided for.
#pragma once

struct Axes {
    long long count[4];
    long long target[4];  // in elements
    long long source[4];
};

// Calls body(element of the target, element of the source) for each position of this thread.
template <class Body> __device__ __forceinline__ void for_elements(const Axes& axes, Body body) {
    const long long inner_step = static_cast<long long>(gridDim.x) * blockDim.x;
    const long long row_step = static_cast<long long>(gridDim.y) * blockDim.y;
    for (long long outer = blockIdx.z; outer < axes.count[0] * axes.count[1]; outer += gridDim.z) {
        const long long i0 = outer / axes.count[1], i1 = outer % axes.count[1];
        for (long long i2 = static_cast<long long>(blockIdx.y) * blockDim.y + threadIdx.y; i2 < axes.count[2]; i2 += row_step) {
            const long long to = i0 * axes.target[0] + i1 * axes.target[1] + i2 * axes.target[2];
            const long long from = i0 * axes.source[0] + i1 * axes.source[1] + i2 * axes.source[2];
            for (long long i3 = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i3 < axes.count[3]; i3 += inner_step)
                body(to + i3 * axes.target[3], from + i3 * axes.source[3]);
        }
    }
}
