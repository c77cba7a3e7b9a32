// Vectors of SAT_WIDTH floats, on the vector extensions of GCC and clang: the same source is 8 wide on AVX2, 16 wide on AVX-512,
// and any width on any CPU (the compiler splits what the hardware does not have).
//
// A translation unit x_<isa>.cpp defines SAT_ISA_NAMESPACE and SAT_WIDTH, then includes its kernel header. Everything
// stands in that namespace, and nothing here includes a C++ standard header with inline functions: the linker
// keeps one copy of those, and that copy might use instructions which this CPU does not have.
#pragma once

#if !defined(SAT_WIDTH) || !defined(SAT_ISA_NAMESPACE)
#error "define SAT_WIDTH and SAT_ISA_NAMESPACE before including simd.h"
#endif

#include <stdint.h>
#include <string.h>

#include "compiler.h"

#if defined(__SSE2__)
#if SAT_WIDTH == 16 && defined(__GNUC__) && !defined(__clang__)
// GCC's own header leaves the pass-through operand of unmasked intrinsics undefined on purpose (its bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif

namespace SAT_ISA_NAMESPACE {

constexpr int W = SAT_WIDTH;

typedef float vec __attribute__((vector_size(SAT_WIDTH * 4)));
typedef int32_t ivec __attribute__((vector_size(SAT_WIDTH * 4)));
typedef float vec_unaligned __attribute__((vector_size(SAT_WIDTH * 4), aligned(4), may_alias));
typedef uint16_t bvec __attribute__((vector_size(SAT_WIDTH * 2)));
typedef uint16_t bvec_unaligned __attribute__((vector_size(SAT_WIDTH * 2), aligned(2), may_alias));
typedef uint32_t uvec __attribute__((vector_size(SAT_WIDTH * 4)));

// bf16 is kept as its bits: the upper half of an fp32.
struct bf16 {
    uint16_t bits;
};

SAT_INLINE ivec lane_numbers() {
    ivec lanes;
    for (int i = 0; i < W; ++i) lanes[i] = i;
    return lanes;
}

SAT_INLINE vec splat(float x) { return x - vec{}; }    // x - 0 is x for every x; x + 0 is not, and costs an add
SAT_INLINE vec load(const float* p) { return *reinterpret_cast<const vec_unaligned*>(p); }
SAT_INLINE void store(float* p, vec x) { *reinterpret_cast<vec_unaligned*>(p) = x; }

SAT_INLINE vec load(const bf16* p) {
    bvec bits = *reinterpret_cast<const bvec_unaligned*>(p);
    return reinterpret_cast<vec>(__builtin_convertvector(bits, uvec) << 16);
}

// Rounds to nearest even; NaN stays NaN.
SAT_INLINE void store(bf16* p, vec x) {
#if defined(__AVX512BF16__) && SAT_WIDTH == 16
    __m256bh rounded = _mm512_cvtneps_pbh(x);    // subnormal numbers become 0
    memcpy(p, &rounded, sizeof rounded);
}
#else
    uvec bits = reinterpret_cast<uvec>(x);
    uvec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    rounded = reinterpret_cast<ivec>(x != x) ? (bits >> 16) | 0x40 : rounded;
    *reinterpret_cast<bvec_unaligned*>(p) = __builtin_convertvector(rounded, bvec);
}
#endif

// Whether all lanes lie between low and high; false for NaN.
SAT_INLINE bool within(vec x, float low, float high) {
#if defined(__AVX512F__) && SAT_WIDTH == 16
    return (_mm512_cmp_ps_mask(x, splat(low), _CMP_GT_OQ) & _mm512_cmp_ps_mask(x, splat(high), _CMP_LT_OQ)) == 0xffff;
#else
    bool all = true;
    for (int lane = 0; lane < W; ++lane) all &= x[lane] > low && x[lane] < high;
    return all;
#endif
}

// Fetches a cache line to the second level: the first would not hold what comes next beside what is in use.
SAT_INLINE void prefetch_to_read(const char* p) { __builtin_prefetch(p, 0, 2); }

// Fetches a cache line that will be written. (GCC's __builtin_prefetch does so only with -mprfchw; all CPUs with AVX2 can.)
SAT_INLINE void prefetch_to_write(const char* p) {
#if defined(__AVX2__)
    asm volatile("prefetchw %0" : : "m"(*p));
#else
    __builtin_prefetch(p, 1);
#endif
}

SAT_INLINE float to_float(float x) { return x; }
SAT_INLINE float to_float(bf16 x) {
    uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

SAT_INLINE bf16 to_bf16(float x) {
    bf16 lanes[W];
    store(lanes, splat(x));
    return lanes[0];
}

// max(c, x) and min(c, x) return x if x is NaN, so that NaN travels on. (GCC makes a comparison and a blend of `?:`.)
#if defined(__AVX512F__) && SAT_WIDTH == 16
SAT_INLINE vec max(vec c, vec x) { return _mm512_max_ps(c, x); }
SAT_INLINE vec min(vec c, vec x) { return _mm512_min_ps(c, x); }
#elif defined(__AVX__) && SAT_WIDTH == 8
SAT_INLINE vec max(vec c, vec x) { return _mm256_max_ps(c, x); }
SAT_INLINE vec min(vec c, vec x) { return _mm256_min_ps(c, x); }
#elif defined(__SSE2__) && SAT_WIDTH == 4
SAT_INLINE vec max(vec c, vec x) { return _mm_max_ps(c, x); }
SAT_INLINE vec min(vec c, vec x) { return _mm_min_ps(c, x); }
#else
SAT_INLINE vec max(vec c, vec x) { return c > x ? c : x; }
SAT_INLINE vec min(vec c, vec x) { return c < x ? c : x; }
#endif

// 2^x with a relative error below 2e-7 (16 wide) or 1e-7. Below -126 it gives 0 or 2^-126, from 128 on inf or 2^127; NaN stays
// NaN.
#if defined(__AVX512F__) && SAT_WIDTH == 16
SAT_INLINE vec exp2(vec x) {
    x = max(splat(-1000.0f), x);    // -inf - -inf would be NaN
    // vreduceps would be one instruction, but Zen 4 takes 16 cycles more when vscalefps follows it.
    const vec f = x - _mm512_roundscale_ps(x, _MM_FROUND_TO_NEG_INF);
    // Minimax polynomial of 2^f on [0, 1] with p(0) = 1, relative error 8e-8.
    vec p = splat(1.86713e-3f);
    p = p * f + 9.017031e-3f;
    p = p * f + 5.5799913e-2f;
    p = p * f + 2.4016444e-1f;
    p = p * f + 6.931513e-1f;
    p = p * f + 1.0f;
    return _mm512_scalef_ps(p, x);
}
#else
SAT_INLINE vec exp2(vec x) {
    x = min(splat(127.0f), max(splat(-126.0f), x));
    // Adding 1.5 * 2^23 leaves round(x) in the low bits of the mantissa.
    const vec magic = splat(12582912.0f);
    vec shifted = x + magic;
    vec f = x - (shifted - magic);
    // Minimax polynomial of 2^f on [-1/2, 1/2], relative error 2e-9: what remains is rounding.
    vec p = splat(1.5345812e-4f);
    p = p * f + 1.3399931e-3f;
    p = p * f + 9.618489e-3f;
    p = p * f + 5.5503286e-2f;
    p = p * f + 2.4022646e-1f;
    p = p * f + 6.931472e-1f;
    p = p * f + 1.0f;
    return reinterpret_cast<vec>(reinterpret_cast<ivec>(p) + (reinterpret_cast<ivec>(shifted) << 23));
}
#endif

// log2 of positive normal numbers, error below 2e-7 * max(1, |log2 x|).
SAT_INLINE vec log2(vec x) {
    // x = 2^e m with m in [sqrt(1/2), sqrt(2)).
    ivec shifted = reinterpret_cast<ivec>(x) - 0x3f3504f3;
    ivec e = shifted >> 23;
    vec m = reinterpret_cast<vec>((shifted & 0x7fffff) + 0x3f3504f3);
    // log2 m = 2 / ln 2 * artanh((m - 1) / (m + 1)).
    vec s = (m - 1.0f) / (m + 1.0f);
    vec t = s * s;
    vec p = splat(0.32059889f);    // 2 / ln 2 / 9
    p = p * t + 0.41219858f;
    p = p * t + 0.57707802f;
    p = p * t + 0.96179669f;
    p = p * t + 2.8853901f;
    return p * s + __builtin_convertvector(e, vec);
}

template <int... LANE>
struct Lanes {};
#if SAT_WIDTH == 4
typedef Lanes<0, 1, 2, 3> AllLanes;
#elif SAT_WIDTH == 8
typedef Lanes<0, 1, 2, 3, 4, 5, 6, 7> AllLanes;
#else
typedef Lanes<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15> AllLanes;
#endif

// One step of a transposition: swaps the off-diagonal S x S blocks of each 2S x 2S block.
template <int S, int... LANE>
SAT_INLINE void swap_blocks(vec (&x)[W], Lanes<LANE...>) {
    SAT_UNROLL(16)
    for (int r = 0; r < W; ++r)
        if (!(r & S)) {
            vec a = x[r], b = x[r + S];
            x[r] = SAT_SHUFFLE(a, b, ivec, (LANE & S ? W + LANE - S : LANE)...);
            x[r + S] = SAT_SHUFFLE(a, b, ivec, (LANE & S ? W + LANE : LANE + S)...);
        }
}

template <int S, int... LANE>
SAT_INLINE vec exchange(vec x, Lanes<LANE...>) {
    return SAT_SHUFFLE(x, x, ivec, (LANE ^ S)...);
}

// Transposes the W x W matrix whose rows are x[0 .. W).
SAT_INLINE void transpose(vec (&x)[W]) {
#if SAT_WIDTH >= 16
    swap_blocks<8>(x, AllLanes());
#endif
#if SAT_WIDTH >= 8
    swap_blocks<4>(x, AllLanes());
#endif
    swap_blocks<2>(x, AllLanes());
    swap_blocks<1>(x, AllLanes());
}

// Every lane: the sum of all.
template <int HALF = W / 2>
SAT_INLINE vec total(vec x) {
    if constexpr (HALF == 0)
        return x;
    else
        return total<HALF / 2>(x + exchange<HALF>(x, AllLanes()));
}

// Lane n: the sum of x[n].
SAT_INLINE vec sums(vec (&x)[W]) {
    transpose(x);
    for (int step = W / 2; step; step /= 2)
        SAT_UNROLL(8)
        for (int r = 0; r < step; ++r) x[r] += x[r + step];
    return x[0];
}

SAT_INLINE float sum(vec x) {
    float total = x[0];
    for (int i = 1; i < W; ++i) total += x[i];
    return total;
}

}    // namespace SAT_ISA_NAMESPACE
