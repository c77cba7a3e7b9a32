// Small matrix products of a linear layer: its weight packed in panels, tokens as they are.
//
// T is the type of products' operands: float, or bf16 where the CPU multiplies that. Sums are fp32.
#pragma once

#include "parallel.h"
#include "simd.h"

namespace SAT_ISA_NAMESPACE {
namespace {

// Products take their operands in elements that go through the multiplier together: an fp32 number, or two bf16 of
// consecutive depth, whose products are added in fp32.
struct Pair {
    bf16 low, high;
};

template <class T>
struct Packing;
template <>
struct Packing<float> {
    typedef float Element;
    static const int NUM = 1;
};
template <>
struct Packing<bf16> {
    typedef Pair Element;
    static const int NUM = 2;
};

constexpr int TILE_ROWS = W == 16 ? 12 : 6;    // x 2 accumulators: they, 2 vectors of b and 1 of a fill the registers
constexpr int PANEL = 2 * W;                   // columns of a product that are computed together

SAT_INLINE vec multiply_add(float a, const float* b, vec sum) { return sum + splat(a) * load(b); }

#if defined(__AVX512BF16__) && SAT_WIDTH == 16
SAT_INLINE vec multiply_add(Pair a, const Pair* b, vec sum) {
    int bits;
    memcpy(&bits, &a, 4);
    ivec all = bits + ivec{};
    SAT_HIDE(all);
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(all), reinterpret_cast<__m512bh>(_mm512_loadu_si512(b)));
}
#endif

// c[i][j] = start + sum over k of a[i * a_row + k * a_step] * b[k * b_step + j], i < ROWS, j < PANEL.
// start: what c holds if ADD, else bias[j], or 0 without a bias.
template <int ROWS, bool ADD, class Element, class C>
SAT_INLINE void micro_product(int64_t depth, const Element* a, int64_t a_row, int64_t a_step, const Element* b,
                              int64_t b_step, const float* bias, C* c, int64_t c_row) {
    vec sum[ROWS][2];
    const vec start0 = bias ? load(bias) : vec{}, start1 = bias ? load(bias + W) : vec{};
    SAT_UNROLL(12)
    for (int i = 0; i < ROWS; ++i) {
        sum[i][0] = ADD ? load(c + i * c_row) : start0;
        sum[i][1] = ADD ? load(c + i * c_row + W) : start1;
    }
    for (int64_t k = 0; k < depth; ++k) {
        SAT_UNROLL(12)
        for (int i = 0; i < ROWS; ++i) {
            sum[i][0] = multiply_add(a[i * a_row], b, sum[i][0]);
            sum[i][1] = multiply_add(a[i * a_row], b + W, sum[i][1]);
        }
        a += a_step;
        b += b_step;
    }
    SAT_UNROLL(12)
    for (int i = 0; i < ROWS; ++i) {
        store(c + i * c_row, sum[i][0]);
        store(c + i * c_row + W, sum[i][1]);
    }
}

// The same for any number of rows and of panels; panel p of b starts at b + p * b_panel.
template <bool ADD, class Element, class C>
void product(int64_t rows, int64_t columns, int64_t depth, const Element* a, int64_t a_row, int64_t a_step,
                    const Element* b, int64_t b_panel, int64_t b_step, const float* bias, C* c, int64_t c_row) {
    for (int64_t j = 0; j < columns; j += PANEL, b += b_panel) {
        const float* start = bias ? bias + j : bias;
        int64_t i = 0;
        for (; i + TILE_ROWS <= rows; i += TILE_ROWS)
            micro_product<TILE_ROWS, ADD>(depth, a + i * a_row, a_row, a_step, b, b_step, start, c + i * c_row + j,
                                          c_row);
        for (; i + 4 <= rows; i += 4)
            micro_product<4, ADD>(depth, a + i * a_row, a_row, a_step, b, b_step, start, c + i * c_row + j, c_row);
        for (; i < rows; ++i)
            micro_product<1, ADD>(depth, a + i * a_row, a_row, a_step, b, b_step, start, c + i * c_row + j, c_row);
    }
}

// A linear layer's weight [out, in], packed in panels for one of its products.
template <class T>
struct PackedWeight {
    typedef typename Packing<T>::Element Element;
    static const int NUM = Packing<T>::NUM;
    int64_t out, in;
    const Element* panels;    // forward [out / PANEL][in / NUM][PANEL], backward [in / PANEL][out / NUM][PANEL]

    static SAT_INLINE const Element* elements(const T* a) { return reinterpret_cast<const Element*>(a); }

    // c [rows, out] = a [rows, in] W' (+ bias)
    template <class C>
    SAT_INLINE void apply(int64_t rows, const T* a, int64_t a_row, const float* bias, C* c, int64_t c_row) const {
        product<false>(rows, out, in / NUM, elements(a), a_row / NUM, 1, panels, in / NUM * PANEL, PANEL, bias, c,
                       c_row);
    }
    // da [rows, in] (+)= dc [rows, out] W
    template <bool ADD, class C>
    SAT_INLINE void apply_transposed(int64_t rows, const T* dc, int64_t dc_row, C* da, int64_t da_row) const {
        product<ADD>(rows, in, out / NUM, elements(dc), dc_row / NUM, 1, panels, out / NUM * PANEL, PANEL, nullptr, da,
                     da_row);
    }
};

// dw [out, in] += dc' a, over `rows` tokens. pairs: space of TILE / 2 * (out + in) elements, for bf16.
SAT_INLINE void add_gradient(int64_t out, int64_t in, int64_t rows, const float* dc, int64_t dc_row, const float* a,
                             int64_t a_row, float* dw, Pair*) {
    product<true>(out, in, rows, dc, 1, dc_row, a, PANEL, a_row, nullptr, dw, in);
}

#if defined(__AVX512BF16__) && SAT_WIDTH == 16
// rows [count, width] of bf16, as pairs of consecutive rows [(count + 1) / 2, width]; a missing last row is zero.
const Pair* pair_rows(int64_t count, int64_t width, const bf16* rows, int64_t row, Pair* pairs) {
    for (int64_t r = 0; r < count; r += 2) {
        const bf16 *low = rows + r * row, *high = low + row;
        Pair* to = pairs + r / 2 * width;
        for (int64_t i = 0; i < width; i += W) {
            const uvec first = __builtin_convertvector(*reinterpret_cast<const bvec_unaligned*>(low + i), uvec);
            uvec both = first;
            if (r + 1 < count)
                both |= __builtin_convertvector(*reinterpret_cast<const bvec_unaligned*>(high + i), uvec) << 16;
            memcpy(to + i, &both, sizeof both);
        }
    }
    return pairs;
}

SAT_INLINE void add_gradient(int64_t out, int64_t in, int64_t rows, const bf16* dc, int64_t dc_row, const bf16* a,
                             int64_t a_row, float* dw, Pair* pairs) {
    const Pair *dc_pairs = pair_rows(rows, out, dc, dc_row, pairs),
               *a_pairs = pair_rows(rows, in, a, a_row, pairs + (rows + 1) / 2 * out);
    product<true>(out, in, (rows + 1) / 2, dc_pairs, 1, out, a_pairs, PANEL, in, nullptr, dw, in);
}
#endif

// The elements that W outputs share, as a vector: of one output from W * NUM inputs, of W outputs from NUM inputs each.
SAT_INLINE vec across(const float* weight, const float*) { return load(weight); }
SAT_INLINE vec along(const float* weight, int64_t, const float*) { return load(weight); }

#if defined(__AVX512BF16__) && SAT_WIDTH == 16
SAT_INLINE vec across(const float* weight, const Pair*) {
    return reinterpret_cast<vec>(_mm512_cvtne2ps_pbh(load(weight + W), load(weight)));
}
SAT_INLINE vec along(const float* weight, int64_t row, const Pair*) {
    bf16 rows[2 * W];
    store(rows, load(weight));
    store(rows + W, load(weight + row));
    Pair pairs[W];
    pair_rows(2, W, rows, W, pairs);
    return load(reinterpret_cast<const float*>(pairs));
}
#endif

template <class T>
PackedWeight<T> pack(const float* weight, int64_t out, int64_t in, typename Packing<T>::Element*& space) {
    const int64_t NUM = Packing<T>::NUM;
    const PackedWeight<T> packed{out, in, space};
    for (int64_t j = 0; j < out; j += W) {
        float* panel = reinterpret_cast<float*>(space + j / PANEL * (in / NUM) * PANEL + j % PANEL);
        for (int64_t k = 0; k < in; k += W * NUM) {
            vec x[W];
            for (int r = 0; r < W; ++r) x[r] = across(weight + (j + r) * in + k, space);
            transpose(x);
            for (int c = 0; c < W; ++c) store(panel + (k / NUM + c) * PANEL, x[c]);
        }
    }
    space += out * in / NUM;
    return packed;
}

template <class T>
PackedWeight<T> pack_transposed(const float* weight, int64_t out, int64_t in,
                                       typename Packing<T>::Element*& space) {
    const int64_t NUM = Packing<T>::NUM;
    const PackedWeight<T> packed{out, in, space};
    for (int64_t j = 0; j < in; j += W) {
        float* panel = reinterpret_cast<float*>(space + j / PANEL * (out / NUM) * PANEL + j % PANEL);
        for (int64_t k = 0; k < out; k += NUM) store(panel + k / NUM * PANEL, along(weight + k * in + j, in, space));
    }
    space += out * in / NUM;
    return packed;
}

}    // namespace
}    // namespace SAT_ISA_NAMESPACE
