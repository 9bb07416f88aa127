// takes: ELEMENT
// One tile of attention forward, plain: any dtype, width, alignment and band. A block makes 32 rows of one head, and 128 of its
// numbers: wider values are cut, and the scores of their rows computed once for each cut.
#include "attend_plain.cuh"

using Real = Accumulated<ELEMENT>::type;

extern "C" __global__ void __launch_bounds__(128) attend_plain(ForwardProblem of, const ELEMENT* q, const ELEMENT* k,
                                                               const ELEMENT* v, Real* out, Real* lse, Real scale) {
    DYNAMIC_SHARED(memory);
    const int chunks = plain::chunks_of(of.v_head_dim), begin = blockIdx.x % chunks * plain::CHUNK;
    const Place at = place_of(blockIdx.x / chunks, of.batches, of.heads, of.rows, plain::SIDE);
    const plain::Forward<ELEMENT, Real> operands(of, at, q, k, v, out, lse, scale);
    plain::attend(operands, of.band, at, begin, *reinterpret_cast<plain::Shared<Real>*>(memory));
}
