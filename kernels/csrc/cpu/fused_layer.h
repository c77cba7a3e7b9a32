// What stands between two attentions, in one pass over the tokens:
//
//     y = x + dropout(attended Wo' + bo),  n = LayerNorm(y),  h = n W1' + b1,  g = dropout(gelu(h)),
//     z = y + dropout(g W2' + b2),  normed = LayerNorm(z)
//
// A tile of tokens goes through all of it while it stays in the L1 and L2 caches; of the intermediate values only
// y and h are written to memory, for the backward pass, which draws the masks anew and takes g and n from h and y.
// And the three projections before an attention. With block-sparse attention a block of queries without any active
// block gives zero, and keys and values without one are read by nobody: their products are left out, exactly.
//
// Parameter gradients are summed over pieces of SAT_LAYER_PIECE tokens, then the pieces in order: the same bits for
// any number of threads.
//
// T is the type of products' operands and of what only products read or write: float, or bf16 (autocast) where the
// CPU multiplies that. Sums, the residual stream and all row operations are fp32.
//
// Shape letters: E features, K width of the attended values, F hidden width; all multiples of 32.
#pragma once

#include "fused.h"

namespace SAT_ISA_NAMESPACE {

// ---- small matrix products ----------------------------------------------------------------------

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

static const int TILE_ROWS = W == 16 ? 12 : 6;    // x 2 accumulators: they, 2 vectors of b and 1 of a fill the registers
static const int PANEL = 2 * W;                   // columns of a product that are computed together
static const int64_t TILE = 96;                   // tokens

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
static void product(int64_t rows, int64_t columns, int64_t depth, const Element* a, int64_t a_row, int64_t a_step,
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
static const Pair* pair_rows(int64_t count, int64_t width, const bf16* rows, int64_t row, Pair* pairs) {
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
static PackedWeight<T> pack(const float* weight, int64_t out, int64_t in, typename Packing<T>::Element*& space) {
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
static PackedWeight<T> pack_transposed(const float* weight, int64_t out, int64_t in,
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

// Rows of a tile's buffers lie an odd number of cache lines apart, or they would share few cache sets.
SAT_INLINE int64_t padded(int64_t width) { return width + 16; }

// ---- active blocks ------------------------------------------------------------------------------

// Calls work(from, count, active) for the longest stretches of rows first .. end - 1, at most TILE rows each, whose
// blocks are alike. active: the blocks' flags [length / block_size], or null: all rows have flag 3.
template <class Work>
SAT_INLINE void for_stretches(const uint8_t* active, int64_t block_size, int64_t length, int64_t first, int64_t end,
                              Work work) {
    while (first < end) {
        const uint8_t flag = active ? active[first % length / block_size] : 3;
        int64_t stop = active ? first : end;
        while (stop < end && stop - first < TILE && active[stop % length / block_size] == flag)
            stop += block_size - stop % block_size;
        if (stop > end) stop = end;
        if (stop > first + TILE) stop = first + TILE;
        work(first, stop - first, flag);
        first = stop;
    }
}

template <class T>
SAT_INLINE void fill_zero(T* rows, int64_t count, int64_t width) {
    memset(rows, 0, count * width * sizeof(T));
}

// ---- row by row ---------------------------------------------------------------------------------

// out = keep ? in * scale : 0; in and out may be the same.
template <class In, class Out>
SAT_INLINE void drop_row(const SatLayer& a, const Position& at, int64_t width, In in, Out out) {
    const vec scale = splat(a.scale);
    for (int64_t block = 0; block < width / MASK_BLOCK; ++block) {
        Keep keep[PARTS];
        keep_block(at.key, at.token * (width / MASK_BLOCK) + block, a.threshold, keep);
        SAT_UNROLL(8)
        for (int i = 0; i < PARTS; ++i) {
            const int64_t j = block * MASK_BLOCK + i * W;
            out(j, scale_kept(keep[i], in(j), scale));
        }
    }
}

// Asks for a row that is needed soon; where rows lie beyond the L2 cache, a tile's first use of each costs more than
// its arithmetic.
template <class T>
SAT_INLINE void fetch(const T* row, int64_t width) {
    for (int64_t byte = 0; byte < width * static_cast<int64_t>(sizeof(T)); byte += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(row) + byte);
}

template <class T>
SAT_INLINE void add_into(float* sum, const T* row, int64_t width) {
    for (int64_t i = 0; i < width; i += W) store(sum + i, load(sum + i) + load(row + i));
}

SAT_INLINE void add_into(float* sum, int64_t at, vec x) { store(sum + at, load(sum + at) + x); }

// Where the pieces of a parameter-gradient record start; the order of SatLayer's parameters.
struct LayerGradients {
    float *out_weight, *out_bias, *norm_weight, *norm_bias, *expand_weight, *expand_bias, *contract_weight,
        *contract_bias, *next_weight, *next_bias;

    SAT_INLINE LayerGradients(const SatLayer& a, float* at) {
        const int64_t E = a.features, K = a.attended, F = a.hidden;
        const int64_t sizes[] = {E * K, E, E, E, F * E, F, E * F, E, E, E};
        float** parts[] = {&out_weight,  &out_bias,        &norm_weight,   &norm_bias,   &expand_weight,
                           &expand_bias, &contract_weight, &contract_bias, &next_weight, &next_bias};
        for (int i = 0; i < 10; ++i) {
            *parts[i] = at;
            at += sizes[i];
        }
    }
    static SAT_INLINE int64_t size(const SatLayer& a) {
        return a.features * (a.attended + 2 * a.hidden + 6) + a.hidden;
    }
};

// The pieces in order; threads share the parameters, not the pieces.
static void add_shared_pieces(const float* pieces, int64_t count, int64_t size, int threads, float* out) {
    spread(threads, (size + 511) / 512, [&](int64_t part) {
        const int64_t stop = size < part * 512 + 512 ? size : part * 512 + 512;
        for (int64_t i = part * 512; i < stop; ++i) out[i] = pieces[i];
        for (int64_t piece = 1; piece < count; ++piece)
            for (int64_t i = part * 512; i < stop; ++i) out[i] += pieces[piece * size + i];
    });
}

// ---- the two passes -----------------------------------------------------------------------------

template <int FIXED, class T>
static int layer_forward(const SatLayer& a, const float* x, const T* attended, float* y, T* h, float* z, T* normed,
                         float* stats) {
    typedef typename Packing<T>::Element Element;
    const int64_t E = features<FIXED>(a.features), K = a.attended, F = a.hidden;
    const int64_t e = padded(E), f = padded(F), rows = a.rows;
    Scratch weights(E * (K + 2 * F) * sizeof(T));
    if (weights.failed()) return SAT_OUT_OF_MEMORY;
    Element* space = weights.take<Element>(E * (K + 2 * F) / Packing<T>::NUM);
    const PackedWeight<T> out = pack<T>(a.out_weight, E, K, space), expand = pack<T>(a.expand_weight, F, E, space),
                          contract = pack<T>(a.contract_weight, E, F, space);
    struct Buffers {
        float *branch, *wide;
        T *norm, *hidden;
    };
    return spread(
        a.threads, (rows + TILE - 1) / TILE, 1, TILE * (e + f) * (sizeof(float) + sizeof(T)),
        [&](Scratch& s) {
            return Buffers{s.take(TILE * e), s.take(TILE * f), s.take<T>(TILE * e), s.take<T>(TILE * f)};
        },
        [&](const Buffers& s, int64_t tile) {
            float *const branch = s.branch, *const wide = s.wide;
            T *const norm = s.norm, *const hidden = s.hidden;
            const int64_t first = tile * TILE, count = rows - first < TILE ? rows - first : TILE;

            for_stretches(a.active, a.block_size, a.length, first, first + count,
                          [&](int64_t from, int64_t n, uint8_t flag) {
                              float* to = branch + (from - first) * e;
                              if (flag & 1) {
                                  out.apply(n, attended + from * K, K, a.out_bias, to, e);
                              } else {
                                  for (int64_t r = 0; r < n; ++r)
                                      memcpy(to + r * e, a.out_bias, E * sizeof(float));
                              }
                          });
            Position at(a.length, a.site_key[0], a.first_example, first);
            for (int64_t r = 0; r < count; ++r, at.next()) {
                const float *b = branch + r * e, *from = x + (first + r) * E;
                float *to = y + (first + r) * E, *s = stats + 4 * (first + r);
                drop_row(a, at, E, [&](int64_t j) { return load(b + j); },
                         [&](int64_t j, vec v) { store(to + j, load(from + j) + v); });
                row_statistics<FIXED>(to, E, a.eps, s);
                normalise_row<FIXED>(to, E, s, a.norm_weight, a.norm_bias, norm + r * e);
                fetch(h + (first + r) * F, F);
            }

            expand.apply(count, norm, e, a.expand_bias, wide, f);
            at = Position(a.length, a.site_key[1], a.first_example, first);
            for (int64_t r = 0; r < count; ++r, at.next()) {
                const float* from = wide + r * f;
                T *g = hidden + r * f, *to = h + (first + r) * F;
                fetch(z + (first + r) * E, E);
                fetch(normed + (first + r) * E, E);
                if (first + r + TILE < rows) {
                    fetch(attended + (first + r + TILE) * K, K);
                    fetch(x + (first + r + TILE) * E, E);
                    fetch(y + (first + r + TILE) * E, E);
                }
                drop_row(a, at, F,
                         [&](int64_t j) {
                             const vec v = load(from + j);
                             store(to + j, v);
                             return gelu(v, normal_tail<T>(v));
                         },
                         [&](int64_t j, vec v) { store(g + j, v); });
            }

            contract.apply(count, hidden, f, a.contract_bias, branch, e);
            at = Position(a.length, a.site_key[2], a.first_example, first);
            for (int64_t r = 0; r < count; ++r, at.next()) {
                const float *b = branch + r * e, *from = y + (first + r) * E;
                float *to = z + (first + r) * E, *s = stats + 4 * (first + r) + 2;
                drop_row(a, at, E, [&](int64_t j) { return load(b + j); },
                         [&](int64_t j, vec v) { store(to + j, load(from + j) + v); });
                row_statistics<FIXED>(to, E, a.eps, s);
                normalise_row<FIXED>(to, E, s, a.next_weight, a.next_bias, normed + (first + r) * E);
            }
        });
}

template <int FIXED, class T>
static int layer_backward(const SatLayer& a, const T* attended, const float* y, const T* h, const float* z,
                          const float* stats, const float* dz, const T* dnormed, float* dx, T* dattended,
                          float* pieces, float* dparameters) {
    typedef typename Packing<T>::Element Element;
    const int64_t E = features<FIXED>(a.features), K = a.attended, F = a.hidden, widest = F > K ? F : K;
    const int64_t e = padded(E), f = padded(F), size = LayerGradients::size(a);
    Scratch weights(E * (K + 2 * F) * sizeof(T));
    if (weights.failed()) return SAT_OUT_OF_MEMORY;
    Element* space = weights.take<Element>(E * (K + 2 * F) / Packing<T>::NUM);
    const PackedWeight<T> out = pack_transposed<T>(a.out_weight, E, K, space),
                          expand = pack_transposed<T>(a.expand_weight, F, E, space),
                          contract = pack_transposed<T>(a.contract_weight, E, F, space);
    const int64_t count_pieces = (a.rows + SAT_LAYER_PIECE - 1) / SAT_LAYER_PIECE;
    struct Buffers {
        float *stream, *dnorm, *dwide;    // gradients: of z, then of y; of the norm; of the hidden values
        T *branch, *norm, *g, *dg;        // operands: gradient of the branch, norm, gelu's output and its input's gradient
        Pair* pairs;
    };
    const int status = spread(
        a.threads, count_pieces, 1, TILE * (2 * e + f) * (sizeof(float) + sizeof(T)) + TILE * (f + E + widest) * sizeof(T),
        [&](Scratch& s) {
            return Buffers{s.take(TILE * e),    s.take(TILE * e),    s.take(TILE * f),
                           s.take<T>(TILE * e), s.take<T>(TILE * e), s.take<T>(TILE * f),
                           s.take<T>(TILE * f), s.take<Pair>(TILE * (E + widest) * sizeof(T) / sizeof(Pair))};
        },
        [&](const Buffers& s, int64_t piece) {
            float *const stream = s.stream, *const dnorm = s.dnorm, *const dwide = s.dwide;
            T *const branch = s.branch, *const norm = s.norm, *const g = s.g, *const dg = s.dg;
            Pair* const pairs = s.pairs;
            float* sums = pieces + piece * size;
            for (int64_t i = 0; i < size; ++i) sums[i] = 0.0f;
            const LayerGradients d(a, sums);
            const int64_t begin = piece * SAT_LAYER_PIECE;
            const int64_t end = a.rows < begin + SAT_LAYER_PIECE ? a.rows : begin + SAT_LAYER_PIECE;
            for (int64_t first = begin; first < end; first += TILE) {
                const int64_t count = end - first < TILE ? end - first : TILE;

                Position at(a.length, a.site_key[2], a.first_example, first);
                for (int64_t r = 0; r < count; ++r, at.next()) {
                    const int64_t row = (first + r) * E;
                    float* s = stream + r * e;
                    T* b = branch + r * e;
                    fetch(h + (first + r) * F, F);
                    norm_backward_row<FIXED>(z + row, dz ? dz + row : dz, dnormed + row, E, stats + 4 * (first + r) + 2,
                                             a.next_weight, d.next_weight, d.next_bias, s);
                    drop_row(a, at, E, [&](int64_t j) { return load(s + j); },
                             [&](int64_t j, vec v) {
                                 store(b + j, v);
                                 add_into(d.contract_bias, j, v);
                             });
                }

                contract.template apply_transposed<false>(count, branch, e, dwide, f);
                at = Position(a.length, a.site_key[1], a.first_example, first);
                for (int64_t r = 0; r < count; ++r, at.next()) {
                    const T* hidden = h + (first + r) * F;
                    const float* from = dwide + r * f;
                    T *value = g + r * f, *grad = dg + r * f;
                    fetch(y + (first + r) * E, E);
                    fetch(dx + (first + r) * E, E);
                    fetch(attended + (first + r) * K, K);
                    fetch(dattended + (first + r) * K, K);
                    if (first + r + TILE < end) {
                        fetch(z + (first + r + TILE) * E, E);
                        fetch(dnormed + (first + r + TILE) * E, E);
                        if (dz) fetch(dz + (first + r + TILE) * E, E);
                    }
                    const vec scale = splat(a.scale);
                    for (int64_t block = 0; block < F / MASK_BLOCK; ++block) {
                        Keep keep[PARTS];
                        keep_block(at.key, at.token * (F / MASK_BLOCK) + block, a.threshold, keep);
                        SAT_UNROLL(8)
                        for (int i = 0; i < PARTS; ++i) {
                            const int64_t j = block * MASK_BLOCK + i * W;
                            const vec v = load(hidden + j);
                            const Normal n = normal_tail<T>(v);
                            store(value + j, scale_kept(keep[i], gelu(v, n), scale));
                            const vec dv = scale_kept(keep[i], load(from + j) * gelu_slope(v, n), scale);
                            store(grad + j, dv);
                            add_into(d.expand_bias, j, dv);
                        }
                    }
                }
                add_gradient(E, F, count, branch, e, g, f, d.contract_weight, pairs);

                for (int64_t r = 0; r < count; ++r)
                    normalise_row<FIXED>(y + (first + r) * E, E, stats + 4 * (first + r), a.norm_weight, a.norm_bias,
                                         norm + r * e);
                add_gradient(F, E, count, dg, f, norm, e, d.expand_weight, pairs);
                expand.template apply_transposed<false>(count, dg, f, dnorm, e);

                at = Position(a.length, a.site_key[0], a.first_example, first);
                for (int64_t r = 0; r < count; ++r, at.next()) {
                    const int64_t row = (first + r) * E;
                    T* b = branch + r * e;
                    norm_backward_row<FIXED>(y + row, stream + r * e, dnorm + r * e, E, stats + 4 * (first + r),
                                             a.norm_weight, d.norm_weight, d.norm_bias, dx + row);
                    drop_row(a, at, E, [&](int64_t j) { return load(dx + row + j); },
                             [&](int64_t j, vec v) {
                                 store(b + j, v);
                                 add_into(d.out_bias, j, v);
                             });
                }
                for_stretches(a.active, a.block_size, a.length, first, first + count,
                              [&](int64_t from, int64_t n, uint8_t flag) {
                                  const T* grad = branch + (from - first) * e;
                                  if (!(flag & 1)) return fill_zero(dattended + from * K, n, K);
                                  add_gradient(E, K, n, grad, e, attended + from * K, K, d.out_weight, pairs);
                                  out.template apply_transposed<false>(n, grad, e, dattended + from * K, K);
                              });
            }
        });
    add_shared_pieces(pieces, count_pieces, size, a.threads, dparameters);
    return status;
}

// ---- query, key and value -----------------------------------------------------------------------

// q, k, v [rows, K] = x [rows, E] W' + bias each; active: bit 0 of a block's flag, q is needed, bit 1, k and v are.
// What is not needed is zero.
template <class T>
static int project(const SatProjections& a, const T* x, T* const out[3]) {
    typedef typename Packing<T>::Element Element;
    const int64_t E = a.features, K = a.attended;
    Scratch space(3 * E * K * sizeof(T));
    if (space.failed()) return SAT_OUT_OF_MEMORY;
    Element* next = space.take<Element>(3 * E * K / Packing<T>::NUM);
    PackedWeight<T> weights[3];
    for (int i = 0; i < 3; ++i) weights[i] = pack<T>(a.weight[i], K, E, next);
    spread(a.threads, (a.rows + SAT_PIECE - 1) / SAT_PIECE, 1, [&](int64_t piece) {
        const int64_t end = a.rows < (piece + 1) * SAT_PIECE ? a.rows : (piece + 1) * SAT_PIECE;
        for_stretches(a.active, a.block_size, a.length, piece * SAT_PIECE, end,
                      [&](int64_t from, int64_t n, uint8_t flag) {
                          for (int i = 0; i < 3; ++i) {
                              if (flag & (i ? 2 : 1))
                                  weights[i].apply(n, x + from * E, E, a.bias[i], out[i] + from * K, K);
                              else
                                  fill_zero(out[i] + from * K, n, K);
                          }
                      });
    });
    return SAT_OK;
}

// dparameters: weight [K, E] and bias [K] of query, key, value.
template <class T>
static int project_backward(const SatProjections& a, const T* x, const T* const dout[3], T* dx, float* pieces,
                            float* dparameters) {
    typedef typename Packing<T>::Element Element;
    const int64_t E = a.features, K = a.attended, size = 3 * K * (E + 1), e = padded(E);
    Scratch space(3 * E * K * sizeof(T));
    if (space.failed()) return SAT_OUT_OF_MEMORY;
    Element* next = space.take<Element>(3 * E * K / Packing<T>::NUM);
    PackedWeight<T> weights[3];
    for (int i = 0; i < 3; ++i) weights[i] = pack_transposed<T>(a.weight[i], K, E, next);
    const int64_t count_pieces = (a.rows + SAT_LAYER_PIECE - 1) / SAT_LAYER_PIECE;
    struct Buffers {
        float* sum;    // dx, before it is rounded
        Pair* pairs;
    };
    const int status = spread(
        a.threads, count_pieces, 1, TILE * e * sizeof(float) + TILE * (E + K) * sizeof(T),
        [&](Scratch& s) {
            return Buffers{s.take(TILE * e), s.take<Pair>(TILE * (E + K) * sizeof(T) / sizeof(Pair))};
        },
        [&](const Buffers& s, int64_t piece) {
            float* const sum = s.sum;
            Pair* const pairs = s.pairs;
            float* sums = pieces + piece * size;
            for (int64_t i = 0; i < size; ++i) sums[i] = 0.0f;
            const int64_t begin = piece * SAT_LAYER_PIECE;
            const int64_t end = a.rows < begin + SAT_LAYER_PIECE ? a.rows : begin + SAT_LAYER_PIECE;
            for_stretches(a.active, a.block_size, a.length, begin, end, [&](int64_t from, int64_t n, uint8_t flag) {
                if (!flag) return fill_zero(dx + from * E, n, E);
                bool first = true;
                for (int i = 0; i < 3; ++i) {
                    if (!(flag & (i ? 2 : 1))) continue;
                    const T* grad = dout[i] + from * K;
                    float* dweight = sums + i * K * (E + 1);
                    if (first)
                        weights[i].template apply_transposed<false>(n, grad, K, sum, e);
                    else
                        weights[i].template apply_transposed<true>(n, grad, K, sum, e);
                    first = false;
                    add_gradient(K, E, n, grad, K, x + from * E, E, dweight, pairs);
                    for (int64_t r = 0; r < n; ++r) add_into(dweight + K * E, grad + r * K, K);
                }
                for (int64_t r = 0; r < n; ++r) {
                    for (int64_t i = 0; i < E; i += W) store(dx + (from + r) * E + i, load(sum + r * e + i));
                    if (from + r + n >= end) continue;
                    fetch(x + (from + r + n) * E, E);
                    fetch(dx + (from + r + n) * E, E);
                    for (int i = 0; i < 3; ++i) fetch(dout[i] + (from + r + n) * K, K);
                }
            });
        });
    add_shared_pieces(pieces, count_pieces, size, a.threads, dparameters);
    return status;
}

// ---- the table of this instruction set ----------------------------------------------------------

template <class T>
static int layer_forward_any(const SatLayer& a, const float* x, const void* attended, float* y, void* h, float* z,
                             void* normed, float* stats) {
    return (a.features == 64 ? layer_forward<64, T> : layer_forward<0, T>)(
        a, x, static_cast<const T*>(attended), y, static_cast<T*>(h), z, static_cast<T*>(normed), stats);
}

template <class T>
static int layer_backward_any(const SatLayer& a, const void* attended, const float* y, const void* h, const float* z,
                              const float* stats, const float* dz, const void* dnormed, float* dx, void* dattended,
                              float* pieces, float* dparameters) {
    return (a.features == 64 ? layer_backward<64, T> : layer_backward<0, T>)(
        a, static_cast<const T*>(attended), y, static_cast<const T*>(h), z, stats, dz, static_cast<const T*>(dnormed),
        dx, static_cast<T*>(dattended), pieces, dparameters);
}

template <class T>
static int project_any(const SatProjections& a, const void* x, void* const out[3]) {
    T* const parts[] = {static_cast<T*>(out[0]), static_cast<T*>(out[1]), static_cast<T*>(out[2])};
    return project(a, static_cast<const T*>(x), parts);
}

template <class T>
static int project_backward_any(const SatProjections& a, const void* x, const void* const dout[3], void* dx,
                                float* pieces, float* dparameters) {
    const T* const parts[] = {static_cast<const T*>(dout[0]), static_cast<const T*>(dout[1]),
                              static_cast<const T*>(dout[2])};
    return project_backward(a, static_cast<const T*>(x), parts, static_cast<T*>(dx), pieces, dparameters);
}

template <class T>
static SatLayerKernels layer_kernels() {
    return {layer_forward_any<T>, layer_backward_any<T>, project_any<T>, project_backward_any<T>};
}

SatFusedKernels fused_kernels() {
#if defined(__AVX512BF16__) && SAT_WIDTH == 16
    const SatLayerKernels bfloat = layer_kernels<bf16>();
#else
    const SatLayerKernels bfloat = {nullptr, nullptr, nullptr, nullptr};
#endif
    return {add_norm_any, add_norm_backward_any, embed_norm_any,       embed_norm_backward_any,
            gelu_any,     mean_any,              mean_backward_any,    {layer_kernels<float>(), bfloat}};
}

}    // namespace SAT_ISA_NAMESPACE
