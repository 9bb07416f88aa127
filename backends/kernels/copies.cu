// takes: UNIT
// Copies and zeros of any dtype, in units of 1 to 16 bytes.
#include "strided.cuh"

using Unit = Word<UNIT>::type;

extern "C" __global__ void __launch_bounds__(256) copy(const __grid_constant__ Axes axes, Unit* target, const Unit* source) {
    for_elements(axes, [&](long long to, long long from) { target[to] = source[from]; });
}

extern "C" __global__ void __launch_bounds__(256) clear(const __grid_constant__ Axes axes, Unit* target) {
    for_elements(axes, [&](long long to, long long) { target[to] = Unit{}; });
}
