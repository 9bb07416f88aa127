// takes: ELEMENT
// One tile of attention backward, plain: any dtype, width, alignment and band. A block makes 32 rows of one head, and 128 of its
// numbers: of dq in one kernel; of dk or of dv in the other, where it goes through all queries of all heads that share them.
#include "attend_plain.cuh"

using Real = Accumulated<ELEMENT>::type;

extern "C" __global__ void __launch_bounds__(128, 2) attend_dq_plain(BackwardProblem of, const ELEMENT* q, const ELEMENT* k,
                                                                  const ELEMENT* v, const ELEMENT* dout, const Real* lse,
                                                                  const Real* delta, Real* dq, Real scale) {
    DYNAMIC_SHARED(memory);
    const int chunks = plain::chunks_of(of.head_dim), begin = blockIdx.x % chunks * plain::CHUNK;
    const Place at = place_of(blockIdx.x / chunks, of.batches, of.heads, of.rows, plain::SIDE);
    const plain::Given<ELEMENT, Real> given{q, k, v, dout, lse, delta, scale};
    const plain::Backward<ELEMENT, Real> operands(of, given, at.batch, at.head, false);
    plain::Sums<Real> sums = {};
    plain::add_gradient<plain::DQ>(sums, operands, of.band, at, begin, *reinterpret_cast<plain::Shared<Real>*>(memory));
    plain::write(head_of(dq, of.dq, at.batch, at.head), of.dq.row, at, begin, of.head_dim, sums, scale);
}

// the band is the transposed one: rows are keys
extern "C" __global__ void __launch_bounds__(128, 2) attend_dkv_plain(BackwardProblem of, const ELEMENT* q, const ELEMENT* k,
                                                                   const ELEMENT* v, const ELEMENT* dout, const Real* lse,
                                                                   const Real* delta, Real* dk, Real* dv, Real scale) {
    DYNAMIC_SHARED(memory);
    const int of_dk = plain::chunks_of(of.head_dim), chunks = of_dk + plain::chunks_of(of.v_head_dim);
    const int chunk = blockIdx.x % chunks, begin = (chunk < of_dk ? chunk : chunk - of_dk) * plain::CHUNK;
    const Place at = place_of(blockIdx.x / chunks, of.batches, of.heads / of.group, of.keys, plain::SIDE);
    const plain::Given<ELEMENT, Real> given{q, k, v, dout, lse, delta, scale};
    auto& shared = *reinterpret_cast<plain::Shared<Real>*>(memory);
    plain::Sums<Real> sums = {};
    for (int head = at.head * of.group; head < (at.head + 1) * of.group; ++head) {
        const plain::Backward<ELEMENT, Real> operands(of, given, at.batch, head, true);
        if (chunk < of_dk) plain::add_gradient<plain::DK>(sums, operands, of.band, at, begin, shared);
        else plain::add_gradient<plain::DV>(sums, operands, of.band, at, begin, shared);
    }
    if (chunk < of_dk)
        plain::write(head_of(dk, of.dk, at.batch, at.head), of.dk.row, at, begin, of.head_dim, sums, scale);
    else
        plain::write(head_of(dv, of.dv, at.batch, at.head), of.dv.row, at, begin, of.v_head_dim, sums, Real(1));
}
