// Rows of a state: a block's x is the lanes of a row (a power of two, at most 32), its y the rows that it takes at once.
#pragma once

// so many of each axis: (batch, heads, rows, width)
struct Extent {
    long long batch, heads, rows, width;
};

// elements from one batch, head and row to the next, whatever the order of the axes in memory
struct Strides {
    long long batch, head, row;
};

// the row that a thread works on
struct Row {
    long long batch, head, row;
    __device__ __forceinline__ long long in(const Strides& strides) const {
        return batch * strides.batch + head * strides.head + row * strides.row;
    }
};

// Calls body(row, inside) for each row of this thread; all threads of a block make as many calls, so that a body may use
// shuffles; where not `inside`, there is no such row.
template <class Body> __device__ __forceinline__ void for_rows(const Extent& extent, Body body) {
    const long long rows_step = static_cast<long long>(gridDim.x) * blockDim.y;
    for (long long batch = blockIdx.z; batch < extent.batch; batch += gridDim.z)
        for (long long head = blockIdx.y; head < extent.heads; head += gridDim.y)
            for (long long begin = static_cast<long long>(blockIdx.x) * blockDim.y; begin < extent.rows; begin += rows_step) {
                const long long row = begin + threadIdx.y;
                body(Row{batch, head, row}, row < extent.rows);
            }
}

// A side's factor when states meet: exp(maximum - reference), 0 where the side saw no key.
template <class W> __device__ __forceinline__ W factor_of(bool seen, W maximum, W reference) {
    return seen ? exp_of(maximum - reference) : W(0);
}
