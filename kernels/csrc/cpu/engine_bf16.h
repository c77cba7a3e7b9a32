// bf16 as a Number of engine.h: elements are pairs, the first of a pair in the low half. vdpbf16ps (a broadcast pair of A times
// a vector of B) and tdpbf16ps (whole tiles) read the same memory. The scale is applied to fp32 numbers only; the denominator
// sums the rounded probabilities, those that meet V.
#pragma once

#include "engine.h"

static_assert(SAT_WIDTH == 16, "pairs of bf16 are made with AVX-512");

namespace SAT_ISA_NAMESPACE {
namespace {

typedef uvec pairs;
typedef uint32_t pair_unaligned __attribute__((aligned(2), may_alias));
typedef uint32_t pairs_unaligned __attribute__((vector_size(64), aligned(2), may_alias));

constexpr uint32_t ONES = 0x3f803f80;    // a pair of 1.0

SAT_INLINE pairs splat_pair(uint32_t x) {
    pairs all = x + pairs{};
    SAT_HIDE(all);
    return all;
}
SAT_INLINE pairs load_pairs(const void* p) { return *static_cast<const pairs_unaligned*>(p); }
SAT_INLINE void store_pairs(void* p, pairs x) { *static_cast<pairs_unaligned*>(p) = x; }

// c + the products of both halves of a and b.
SAT_INLINE vec dot2(vec c, pairs a, pairs b) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

// 32 bf16 in order: first, then second.
SAT_INLINE pairs rounded(vec first, vec second) {
    return reinterpret_cast<pairs>(_mm512_cvtne2ps_pbh(second, first));
}

typedef uint16_t words __attribute__((vector_size(64)));

// Lane n: (a[n], b[n]), of a vector that holds 16 elements of a, then 16 of b.
SAT_INLINE pairs interleave(pairs ab) {
    const words index = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                         8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return reinterpret_cast<pairs>(_mm512_permutexvar_epi16(reinterpret_cast<__m512i>(index), reinterpret_cast<__m512i>(ab)));
}

// Lane n of the result: (a[first + n], b[first + n]) of two vectors of 32 bf16; `first` is 0 or 16.
template <int FIRST>
SAT_INLINE pairs interleave(pairs a, pairs b) {
    const words half = {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39,
                        8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const words index = half + static_cast<uint16_t>(FIRST);
    return reinterpret_cast<pairs>(_mm512_permutex2var_epi16(
        reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(index), reinterpret_cast<__m512i>(b)));
}

// 2^x; overflows to inf, underflows to 0, NaN stays NaN. Minimax polynomials of the relative error on [-1/2, 1/2]: of degree 3
// to 7.5e-5, a twentieth of what rounding to bf16 costs; of degree 4 to 2.6e-6.
template <int DEGREE>
SAT_INLINE vec exp2_rough(vec x) {
    const vec whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const vec f = x - whole;
    vec p;
    if constexpr (DEGREE == 3) {
        p = splat(5.517166906e-2f);
        p = p * f + 2.426111222e-1f;
        p = p * f + 6.932609855e-1f;
        p = p * f + 9.999280735e-1f;
    } else {
        static_assert(DEGREE == 4, "a degree with coefficients");
        p = splat(9.570101911e-3f);
        p = p * f + 5.591786032e-2f;
        p = p * f + 2.402474483e-1f;
        p = p * f + 6.931218147e-1f;
        p = p * f + 9.999992614e-1f;
    }
    return _mm512_scalef_ps(p, whole);
}

struct Bfloat16 {
    typedef bf16 Operand;
    typedef uint32_t Element;
    typedef pairs Vector;
    static constexpr int NUM = 2;
    static constexpr int QUERIES = 32;

    static SAT_INLINE pairs splat(const char* p) { return splat_pair(*reinterpret_cast<const pair_unaligned*>(p)); }
    static SAT_INLINE vec multiply_add(vec c, pairs a, pairs b) { return dot2(c, a, b); }

    static SAT_INLINE vec exp_probs(vec x) { return exp2_rough<3>(x); }
    static SAT_INLINE vec exp_statistics(vec x) { return exp2_rough<4>(x); }

    // packed[tile][c / 2][i] = (x[i][c], x[i][c + 1])
    template <int T>
    static SAT_INLINE void pack_columns(const Rows<bf16>& rows, int count, int d, uint32_t* packed) {
        for (int i = 0; i < count; i += W) {
            uint32_t* tile = packed + i / T * T * (d / 2) + i % T;
            for (int c = 0; c < d / 2; c += W) {
                const int n = d / 2 - c < W ? W / 2 : W;
                const __mmask16 lanes = n == W ? 0xffff : 0xff;
                vec x[W];
                SAT_UNROLL(16)
                for (int r = 0; r < W; ++r) x[r] = _mm512_maskz_loadu_ps(lanes, rows.row(i + r) + 2 * c);
                transpose(x);
                SAT_UNROLL(16)
                for (int r = 0; r < W; ++r)
                    if (r < n) store(reinterpret_cast<float*>(tile + (c + r) * T), x[r]);
            }
        }
    }

    // packed[i / 2][c] = (x[i][c], x[i + 1][c])
    static SAT_INLINE Panel<uint32_t> pack_rows(const Rows<bf16>& rows, int count, int d, uint32_t* packed) {
        uint32_t* to = packed;
        for (int i = 0; i < count; i += 2, to += d) {
            const bf16 *even = rows.row(i), *odd = rows.row(i + 1);
            int c = 0;
            for (; c + 2 * W <= d; c += 2 * W) {
                const pairs a = load_pairs(even + c), b = load_pairs(odd + c);
                store_pairs(to + c, interleave<0>(a, b));
                store_pairs(to + c + W, interleave<16>(a, b));
            }
            if (c < d) {
                pairs both;
                memcpy(&both, even + c, 2 * W);
                memcpy(reinterpret_cast<char*>(&both) + 2 * W, odd + c, 2 * W);
                store_pairs(to + c, interleave(both));
            }
        }
        return {packed, d};
    }

    static SAT_INLINE vec keep(vec sum, vec (&x)[2], uint32_t* p) {
        const pairs both = interleave(rounded(x[0], x[1]));
        store_pairs(p, both);
        return dot2(sum, both, splat_pair(ONES));
    }

    template <int T, int NR, int NV>
    static SAT_INLINE void keep(int row, vec (&s)[NR][NV], vec (&ds)[NR][NV], bf16* p, bf16* gradients, uint32_t* columns) {
        SAT_UNROLL(16)
        for (int r = 0; r < NR; r += 2) {
            bf16 *to_p = p + (row + r) * T, *to_ds = gradients + (row + r) * T;
            uint32_t* to_pairs = columns + (row + r) / 2 * T;
            if constexpr (NV == 2) {
                store_pairs(to_p, rounded(s[r][0], s[r][1]));
                store_pairs(to_p + T, rounded(s[r + 1][0], s[r + 1][1]));
                const pairs even = rounded(ds[r][0], ds[r][1]), odd = rounded(ds[r + 1][0], ds[r + 1][1]);
                store_pairs(to_ds, even);
                store_pairs(to_ds + T, odd);
                store_pairs(to_pairs, interleave<0>(even, odd));
                store_pairs(to_pairs + W, interleave<16>(even, odd));
            } else {    // two rows fill a vector
                static_assert(NV == 1, "a tile is 16 or 32 wide");
                store_pairs(to_p, rounded(s[r][0], s[r + 1][0]));
                const pairs both = rounded(ds[r][0], ds[r + 1][0]);
                store_pairs(to_ds, both);
                store_pairs(to_pairs, interleave(both));
            }
        }
    }
    static uint32_t* columns_of(bf16*, uint32_t* columns) { return columns; }

    static constexpr int rows_at_once(int vectors) { return vectors > 2 ? 4 : 8; }    // even, and divides 16
};

}    // namespace
}    // namespace SAT_ISA_NAMESPACE
