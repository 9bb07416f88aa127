// What threads do together: shuffles, votes, tensor cores, and what CUDA copies behind their backs.
#pragma once
#include "fibers.h"

namespace on_cpu {

// ---- half precision

static inline float float_of_half(unsigned short half) {
    const std::uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
    std::uint32_t bits;
    if (exponent == 31) bits = sign | 0x7f800000u | fraction << 13;
    else if (exponent) bits = sign | (exponent + 112) << 23 | fraction << 13;
    else {
        const float value = static_cast<float>(fraction) * 0x1p-24f;
        return sign ? -value : value;
    }
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

static inline unsigned short half_of_float(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const std::uint32_t sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return 0x7fff;  // as PTX has it
    if (rest >= 0x47800000u) return static_cast<unsigned short>(sign | 0x7c00u);
    if (rest >= 0x38800000u) {
        const std::uint32_t rounded = rest - 0x38000000u + 0xfffu + (rest >> 13 & 1);
        return static_cast<unsigned short>(sign | rounded >> 13);
    }
    if (rest < 0x33000000u) return static_cast<unsigned short>(sign);
    const std::uint32_t shift = 126 - (rest >> 23), fraction = (rest & 0x7fffffu) | 0x800000u;
    const std::uint32_t kept = fraction >> shift, lost = fraction & ((1u << shift) - 1), middle = 1u << (shift - 1);
    return static_cast<unsigned short>(sign | (kept + (lost > middle || (lost == middle && (kept & 1)))));
}

static inline float float_of_bfloat16(unsigned short half) {
    const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// ---- shuffles and votes

template <class T> struct Shuffle {
    T value;
    unsigned source;
};

template <class T> void shuffled(void** operands, unsigned mask) {
    T taken[WARP] = {};
    for (unsigned lane = 0; lane < WARP; ++lane)
        if (mask >> lane & 1) {
            const unsigned source = static_cast<Shuffle<T>*>(operands[lane])->source;
            if (mask >> source & 1) taken[lane] = static_cast<Shuffle<T>*>(operands[source])->value;
            else std::memset(static_cast<void*>(&taken[lane]), 0xff, sizeof(T));  // undefined in CUDA
        }
    for (unsigned lane = 0; lane < WARP; ++lane)
        if (mask >> lane & 1) static_cast<Shuffle<T>*>(operands[lane])->value = taken[lane];
}

// `source` gives the lane to read, or `lane` itself where that would leave its group of `width`
template <class T, class Source> T shuffle(Site site, unsigned mask, T value, int width, Source source) {
    const int lane = static_cast<int>(current->number % WARP), first = lane / width * width;
    const int from = source(lane, first, width);
    Shuffle<T> shuffle{value, static_cast<unsigned>(from < first || from >= first + width ? lane : from)};
    together(site, shuffled<T>, mask, &shuffle);
    return shuffle.value;
}

template <class T> T shuffle_xor(Site site, unsigned mask, T value, int step, int width = 32) {
    return shuffle(site, mask, value, width, [=](int lane, int, int) { return lane ^ step; });
}
template <class T> T shuffle_down(Site site, unsigned mask, T value, unsigned step, int width = 32) {
    return shuffle(site, mask, value, width, [=](int lane, int, int) { return lane + static_cast<int>(step); });
}
template <class T> T shuffle_up(Site site, unsigned mask, T value, unsigned step, int width = 32) {
    return shuffle(site, mask, value, width, [=](int lane, int, int) { return lane - static_cast<int>(step); });
}
template <class T> T shuffle_from(Site site, unsigned mask, T value, int source, int width = 32) {
    return shuffle(site, mask, value, width, [=](int, int first, int wide) { return first + (source % wide + wide) % wide; });
}

static void voted(void** operands, unsigned mask) {
    unsigned votes = 0;
    for (unsigned lane = 0; lane < WARP; ++lane)
        if (mask >> lane & 1 && *static_cast<unsigned*>(operands[lane])) votes |= 1u << lane;
    for (unsigned lane = 0; lane < WARP; ++lane)
        if (mask >> lane & 1) *static_cast<unsigned*>(operands[lane]) = votes;
}

static inline unsigned ballot(Site site, unsigned mask, bool vote) {
    unsigned votes = vote;
    together(site, voted, mask, &votes);
    return votes;
}

static void nothing(void**, unsigned) {}
static inline void synchronize_warp(Site site, unsigned mask = ~0u) { together(site, nothing, mask, nullptr); }

// A barrier at which threads vote; how many voted for it.
static inline int barrier_count(Site site, bool vote) {
    votes_given += vote;
    barrier(site);
    const int votes = votes_given;
    if (++votes_read == thread_count) votes_given = votes_read = 0;
    barrier(site);
    return votes;
}

// ---- tensor cores

struct Product {
    float* d;
    const unsigned* a;
    const unsigned* b;
};

template <bool BFLOAT16> void multiplied(void** operands, unsigned) {
    const auto pick = [](unsigned pair, unsigned high) {
        const unsigned short bits = static_cast<unsigned short>(pair >> 16 * high);
        return BFLOAT16 ? float_of_bfloat16(bits) : float_of_half(bits);
    };
    float a[16][16], b[16][8], d[16][8];
    for (unsigned lane = 0; lane < WARP; ++lane) {
        const Product& mine = *static_cast<Product*>(operands[lane]);
        const unsigned g = lane / 4, t = lane % 4;
        for (unsigned high = 0; high < 2; ++high)
            for (unsigned i = 0; i < 4; ++i) {
                a[g + i % 2 * 8][2 * t + i / 2 * 8 + high] = pick(mine.a[i], high);
                if (i < 2) b[2 * t + 8 * i + high][g] = pick(mine.b[i], high);
                if (i < 2) d[g + 8 * i][2 * t + high] = mine.d[2 * i + high];
            }
    }
    for (unsigned i = 0; i < 16; ++i)
        for (unsigned k = 0; k < 16; ++k)
            for (unsigned j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
    for (unsigned lane = 0; lane < WARP; ++lane)
        for (unsigned i = 0; i < 4; ++i)
            static_cast<Product*>(operands[lane])->d[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

static inline void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], bool bfloat16) {
    Product product{d, a, b};
    together(Site{"mma", 0}, bfloat16 ? multiplied<true> : multiplied<false>, ~0u, &product);
}

struct Matrices {
    unsigned* to;
    const unsigned short* row;
};

template <bool TRANSPOSED> void loaded(void** operands, unsigned) {
    for (unsigned lane = 0; lane < WARP; ++lane)
        for (unsigned matrix = 0; matrix < 4; ++matrix) {
            const auto element = [&](unsigned row, unsigned column) -> unsigned {
                return static_cast<Matrices*>(operands[8 * matrix + row])->row[column];
            };
            const unsigned g = lane / 4, t = lane % 4;
            const unsigned low = TRANSPOSED ? element(2 * t, g) : element(g, 2 * t);
            const unsigned high = TRANSPOSED ? element(2 * t + 1, g) : element(g, 2 * t + 1);
            static_cast<Matrices*>(operands[lane])->to[matrix] = low | high << 16;
        }
}

static inline void load_matrices(unsigned (&to)[4], const void* row, bool transposed) {
    if (reinterpret_cast<std::uintptr_t>(row) % 16) fail("load_matrices: thread %u: %p is not aligned to 16", current->number, row);
    Matrices matrices{to, static_cast<const unsigned short*>(row)};
    together(Site{"load_matrices", 0}, transposed ? loaded<true> : loaded<false>, ~0u, &matrices);
}

// ---- asynchronous copies: done as late as wait_copies allows, so that a missing wait is seen

static inline void copy_async(void* to, const void* from, bool inside) {
    if ((reinterpret_cast<std::uintptr_t>(to) | (inside ? reinterpret_cast<std::uintptr_t>(from) : 0)) % 16)
        fail("copy_async: thread %u: %p or %p is not aligned to 16", current->number, to, from);
    if (current->copies_end - current->copies_begin == MOST_COPIES) fail("copy_async: more than %u copies", MOST_COPIES);
    current->copies[current->copies_end++ % MOST_COPIES] = {to, from, current->groups, inside};
}

static inline void commit_copies() { ++current->groups; }

static inline void wait_copies(unsigned most) {
    while (current->copies_begin != current->copies_end) {
        const Copy& copy = current->copies[current->copies_begin % MOST_COPIES];
        if (copy.group + most >= current->groups) return;
        if (copy.inside) std::memcpy(copy.to, copy.from, 16);
        else std::memset(copy.to, 0, 16);
        ++current->copies_begin;
    }
}

}  // namespace on_cpu
