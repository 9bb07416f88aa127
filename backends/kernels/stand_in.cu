// takes: ELEMENT
// A row in place of `out`, such that rowsum(dout * row) is a given delta: cuDNN's backward forms delta itself, from `out`.
#include "rows.cuh"

struct Geometry {
    Extent extent;
    Strides target, dout, delta;
    long long vectors;
};

constexpr float SMALL = 1.0f / 4096;  // the last entry's dout is at least so large beside the first's, that none overflows

template <class T> struct Bits;
template <> struct Bits<half_t> {
    static constexpr unsigned short largest = 0x7bff, nan = 0x7e00;
};
template <> struct Bits<bf16_t> {
    static constexpr unsigned short largest = 0x7f7f, nan = 0x7fc0;
};

struct Entry {
    long long column = -1;
    ELEMENT value = {0};
};

// An element's magnitude above its column, so that one maximum finds both; of equal ones the first column is the largest.
__device__ __forceinline__ unsigned key_of(ELEMENT element, long long column) {
    return static_cast<unsigned>(element.bits & 0x7fffu) << 16 | (0xffffu - static_cast<unsigned>(column));
}

__device__ __forceinline__ long long column_of(unsigned key) { return 0xffff - (key & 0xffffu); }

__device__ __forceinline__ float magnitude_of(unsigned key) {
    return to_float(ELEMENT{static_cast<unsigned short>(key >> 16)});
}

// Folds visit(state, key) over the row's elements of this lane, `known` ones left out.
template <int N, class Visit>
__device__ __forceinline__ unsigned over_row(const ELEMENT* row, long long width, unsigned state, Visit visit) {
    for (long long column = static_cast<long long>(threadIdx.x) * N; column < width; column += blockDim.x * N) {
        ELEMENT element[N];
        load(element, row + column);
#pragma unroll
        for (int j = 0; j < N; ++j) state = visit(state, key_of(element[j], column + j));
    }
    return state;
}

// An entry that takes what it can of `rest`; it saturates at the largest finite number. What is left is exact.
__device__ __forceinline__ Entry take(float& rest, const ELEMENT* row, unsigned key) {
    const float factor = to_float(row[column_of(key)]), limit = to_float(ELEMENT{Bits<ELEMENT>::largest});
    const ELEMENT value = from_float<ELEMENT>(fminf(fmaxf(rest / factor, -limit), limit));
    rest = fmaf(-to_float(value), factor, rest);
    return {column_of(key), value};
}

// The entries for one row, given the largest, the second largest and a small one of it (0: there is none).
__device__ __forceinline__ void choose(Entry (&entry)[3], float delta, const ELEMENT* row, unsigned first, unsigned second,
                                       unsigned small) {
    const float limit = to_float(ELEMENT{Bits<ELEMENT>::largest});
    const bool finite = fabsf(delta) < infinity<float>() && magnitude_of(first) <= limit;
    if (finite && (magnitude_of(first) == 0.0f || delta == 0.0f)) return;
    entry[0] = {column_of(first), {Bits<ELEMENT>::nan}};
    if (!finite) return;
    float rest = delta;
    const Entry main = take(rest, row, first);
    if (rest != 0.0f && magnitude_of(second) != 0.0f) entry[1] = take(rest, row, second);
    if (rest != 0.0f && small) entry[2] = take(rest, row, small);
    // too large for so few entries: a NaN is seen, a wrong gradient is not
    const bool too_large = (main.value.bits & 0x7fffu) == Bits<ELEMENT>::largest && fabsf(rest) > fabsf(delta) * SMALL;
    if (!too_large) entry[0] = main;
}

template <int N>
__device__ __forceinline__ void write_rows(const Geometry& g, const ELEMENT* dout, const float* delta, ELEMENT* target) {
    for_rows(g.extent, [&](const Row& at, bool inside) {
        const ELEMENT* const row = dout + (inside ? at.in(g.dout) : 0);
        const long long width = inside ? g.extent.width : 0;
        const unsigned first = max_over_lanes(over_row<N>(row, width, 0u, [](unsigned best, unsigned key) { return larger(best, key); }),
                                              blockDim.x);
        const unsigned second = max_over_lanes(
            over_row<N>(row, width, 0u, [=](unsigned best, unsigned key) { return key == first ? best : larger(best, key); }),
            blockDim.x);
        const float least = magnitude_of(first) * SMALL;
        // the smallest is the largest of the complements
        const unsigned small = max_over_lanes(over_row<N>(row, width, 0u, [=](unsigned best, unsigned key) {
                                                  const bool fits = key != first && key != second && key >> 16 && magnitude_of(key) >= least;
                                                  return fits ? larger(best, ~key) : best;
                                              }), blockDim.x);
        if (!inside) return;
        Entry entry[3];
        choose(entry, delta[at.in(g.delta)], row, first, second, small ? ~small : 0u);
        for (long long column = static_cast<long long>(threadIdx.x) * N; column < width; column += blockDim.x * N) {
            ELEMENT made[N];
#pragma unroll
            for (int j = 0; j < N; ++j) {
                made[j] = {0};
#pragma unroll
                for (int i = 0; i < 3; ++i)
                    if (entry[i].column == column + j) made[j] = entry[i].value;
            }
            store(target + at.in(g.target) + column, made);
        }
    });
}

extern "C" __global__ void __launch_bounds__(256) stand_in(const __grid_constant__ Geometry g, const ELEMENT* dout,
                                                           const float* delta, ELEMENT* target) {
    constexpr int lanes = 16 / static_cast<int>(sizeof(ELEMENT));
    if (g.vectors) write_rows<lanes>(g, dout, delta, target);
    else write_rows<1>(g, dout, delta, target);
}
