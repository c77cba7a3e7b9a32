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
// any number of threads. fp32 only.
//
// Shape letters: E features, K width of the attended values, F hidden width; all multiples of 32.
#pragma once

#include "fused.h"

namespace SAT_ISA_NAMESPACE {

// ---- small matrix products ----------------------------------------------------------------------

static const int TILE_ROWS = 6;        // 6 x 2 accumulators, 2 vectors of b and 1 of a fill 16 registers
static const int PANEL = 2 * W;        // columns of a product that are computed together
static const int64_t TILE = 96;        // tokens

// c[i][j] = start + sum over k of a[i * a_row + k * a_step] * b[k * b_step + j], i < ROWS, j < PANEL.
// start: what c holds if ADD, else bias[j], or 0 without a bias.
template <int ROWS, bool ADD>
SAT_INLINE void micro_product(int64_t depth, const float* a, int64_t a_row, int64_t a_step, const float* b,
                              int64_t b_step, const float* bias, float* c, int64_t c_row) {
    vec sum[ROWS][2];
    const vec start0 = bias ? load(bias) : vec{}, start1 = bias ? load(bias + W) : vec{};
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; ++i) {
        sum[i][0] = ADD ? load(c + i * c_row) : start0;
        sum[i][1] = ADD ? load(c + i * c_row + W) : start1;
    }
    for (int64_t k = 0; k < depth; ++k) {
        const vec b0 = load(b), b1 = load(b + W);
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; ++i) {
            const vec x = splat(a[i * a_row]);
            sum[i][0] += x * b0;
            sum[i][1] += x * b1;
        }
        a += a_step;
        b += b_step;
    }
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; ++i) {
        store(c + i * c_row, sum[i][0]);
        store(c + i * c_row + W, sum[i][1]);
    }
}

// The same for any number of rows and of panels; panel p of b starts at b + p * b_panel.
template <bool ADD>
static void product(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_row, int64_t a_step,
                    const float* b, int64_t b_panel, int64_t b_step, const float* bias, float* c, int64_t c_row) {
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

// A linear layer's weight [out, in] with its two products packed in panels.
struct PackedWeight {
    int64_t out, in;
    const float* forward;     // panels of `out`: [out / PANEL][in][PANEL]
    const float* backward;    // panels of `in`: [in / PANEL][out][PANEL]

    // c [rows, out] = a [rows, in] W' (+ bias)
    SAT_INLINE void apply(int64_t rows, const float* a, int64_t a_row, const float* bias, float* c,
                          int64_t c_row) const {
        product<false>(rows, out, in, a, a_row, 1, forward, in * PANEL, PANEL, bias, c, c_row);
    }
    // da [rows, in] (+)= dc [rows, out] W
    template <bool ADD>
    SAT_INLINE void apply_transposed(int64_t rows, const float* dc, int64_t dc_row, float* da, int64_t da_row) const {
        product<ADD>(rows, in, out, dc, dc_row, 1, backward, out * PANEL, PANEL, nullptr, da, da_row);
    }
    // dw [out, in] += dc' a
    SAT_INLINE void add_gradient(int64_t rows, const float* dc, int64_t dc_row, const float* a, int64_t a_row,
                                 float* dw) const {
        product<true>(out, in, rows, dc, 1, dc_row, a, PANEL, a_row, nullptr, dw, in);
    }
};

static PackedWeight pack(const float* weight, int64_t out, int64_t in, float*& space) {
    float* forward = space;
    for (int64_t panel = 0; panel < out; panel += PANEL)
        for (int64_t k = 0; k < in; ++k)
            for (int64_t j = 0; j < PANEL; ++j) *space++ = weight[(panel + j) * in + k];
    float* backward = space;
    for (int64_t panel = 0; panel < in; panel += PANEL)
        for (int64_t k = 0; k < out; ++k)
            for (int64_t j = 0; j < PANEL; ++j) *space++ = weight[k * in + panel + j];
    return {out, in, forward, backward};
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

SAT_INLINE void fill_zero(float* rows, int64_t count, int64_t width, int64_t row) {
    for (int64_t r = 0; r < count; ++r)
        for (int64_t i = 0; i < width; i += W) store(rows + r * row + i, vec{});
}

// ---- row by row ---------------------------------------------------------------------------------

// out = keep ? in * scale : 0; in and out may be the same.
template <class In, class Out>
SAT_INLINE void drop_row(const SatLayer& a, const Position& at, int64_t width, In in, Out out) {
    const vec scale = splat(a.scale);
    for (int64_t block = 0; block < width / MASK_BLOCK; ++block) {
        ivec keep[PARTS];
        keep_block(at.key, at.token * (width / MASK_BLOCK) + block, a.threshold, keep);
#pragma GCC unroll 8
        for (int i = 0; i < PARTS; ++i) {
            const int64_t j = block * MASK_BLOCK + i * W;
            out(j, only(keep[i], in(j) * scale));
        }
    }
}

SAT_INLINE void add_into(float* sum, const float* row, int64_t width) {
    for (int64_t i = 0; i < width; i += W) store(sum + i, load(sum + i) + load(row + i));
}

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
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t part = 0; part < (size + 511) / 512; ++part) {
        const int64_t stop = size < part * 512 + 512 ? size : part * 512 + 512;
        for (int64_t i = part * 512; i < stop; ++i) out[i] = pieces[i];
        for (int64_t piece = 1; piece < count; ++piece)
            for (int64_t i = part * 512; i < stop; ++i) out[i] += pieces[piece * size + i];
    }
}

// ---- the two passes -----------------------------------------------------------------------------

template <int FIXED>
static int layer_forward(const SatLayer& a, const float* x, const float* attended, float* y, float* h, float* z,
                         float* normed, float* stats) {
    const int64_t E = features<FIXED>(a.features), K = a.attended, F = a.hidden;
    const int64_t e = padded(E), f = padded(F), rows = a.rows;
    float* packed = static_cast<float*>(aligned_alloc(64, 2 * E * (K + 2 * F) * sizeof(float)));
    if (!packed) return SAT_OUT_OF_MEMORY;
    float* space = packed;
    const PackedWeight out = pack(a.out_weight, E, K, space), expand = pack(a.expand_weight, F, E, space),
                       contract = pack(a.contract_weight, E, F, space);
    int status = SAT_OK;
#pragma omp parallel num_threads(a.threads)
    {
        // branch [TILE, E], norm [TILE, E], hidden [TILE, F]
        float* buffers = static_cast<float*>(aligned_alloc(64, TILE * (2 * e + f) * sizeof(float)));
        if (!buffers) {
#pragma omp atomic write
            status = SAT_OUT_OF_MEMORY;
        }
        float *branch = buffers, *norm = branch + TILE * e, *hidden = norm + TILE * e;
#pragma omp for schedule(dynamic, 1)
        for (int64_t tile = 0; tile < (rows + TILE - 1) / TILE; ++tile) {
            if (!buffers) continue;
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
            }

            expand.apply(count, norm, e, a.expand_bias, hidden, f);
            at = Position(a.length, a.site_key[1], a.first_example, first);
            for (int64_t r = 0; r < count; ++r, at.next()) {
                float *g = hidden + r * f, *to = h + (first + r) * F;
                drop_row(a, at, F,
                         [&](int64_t j) {
                             const vec v = load(g + j);
                             store(to + j, v);
                             return gelu(v, normal_tail(v));
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
        }
        free(buffers);
    }
    free(packed);
    return status;
}

template <int FIXED>
static int layer_backward(const SatLayer& a, const float* attended, const float* y, const float* h, const float* z,
                          const float* stats, const float* dz, const float* dnormed, float* dx, float* dattended,
                          float* pieces, float* dparameters) {
    const int64_t E = features<FIXED>(a.features), K = a.attended, F = a.hidden;
    const int64_t e = padded(E), f = padded(F), size = LayerGradients::size(a);
    float* packed = static_cast<float*>(aligned_alloc(64, 2 * E * (K + 2 * F) * sizeof(float)));
    if (!packed) return SAT_OUT_OF_MEMORY;
    float* space = packed;
    const PackedWeight out = pack(a.out_weight, E, K, space), expand = pack(a.expand_weight, F, E, space),
                       contract = pack(a.contract_weight, E, F, space);
    const int64_t count_pieces = (a.rows + SAT_LAYER_PIECE - 1) / SAT_LAYER_PIECE;
    int status = SAT_OK;
#pragma omp parallel num_threads(a.threads)
    {
        // stream [TILE, E]: gradient of z, then of y; branch [TILE, E]; norm [TILE, E]; g, dg [TILE, F]
        float* buffers = static_cast<float*>(aligned_alloc(64, TILE * (3 * e + 2 * f) * sizeof(float)));
        if (!buffers) {
#pragma omp atomic write
            status = SAT_OUT_OF_MEMORY;
        }
        float *stream = buffers, *branch = stream + TILE * e, *norm = branch + TILE * e, *g = norm + TILE * e,
              *dg = g + TILE * f;
#pragma omp for schedule(dynamic, 1)
        for (int64_t piece = 0; piece < count_pieces; ++piece) {
            if (!buffers) continue;
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
                    float *s = stream + r * e, *b = branch + r * e;
                    norm_backward_row<FIXED>(z + row, dz ? dz + row : dz, dnormed + row, E, stats + 4 * (first + r) + 2,
                                             a.next_weight, d.next_weight, d.next_bias, s);
                    drop_row(a, at, E, [&](int64_t j) { return load(s + j); },
                             [&](int64_t j, vec v) { store(b + j, v); });
                    add_into(d.contract_bias, b, E);
                }

                contract.apply_transposed<false>(count, branch, e, dg, f);
                at = Position(a.length, a.site_key[1], a.first_example, first);
                for (int64_t r = 0; r < count; ++r, at.next()) {
                    const float* hidden = h + (first + r) * F;
                    float *value = g + r * f, *grad = dg + r * f;
                    const vec scale = splat(a.scale);
                    for (int64_t block = 0; block < F / MASK_BLOCK; ++block) {
                        ivec keep[PARTS];
                        keep_block(at.key, at.token * (F / MASK_BLOCK) + block, a.threshold, keep);
#pragma GCC unroll 8
                        for (int i = 0; i < PARTS; ++i) {
                            const int64_t j = block * MASK_BLOCK + i * W;
                            const vec v = load(hidden + j);
                            const Normal n = normal_tail(v);
                            store(value + j, only(keep[i], gelu(v, n) * scale));
                            store(grad + j, only(keep[i], load(grad + j) * gelu_slope(v, n) * scale));
                        }
                    }
                    add_into(d.expand_bias, grad, F);
                }
                contract.add_gradient(count, branch, e, g, f, d.contract_weight);

                for (int64_t r = 0; r < count; ++r)
                    normalise_row<FIXED>(y + (first + r) * E, E, stats + 4 * (first + r), a.norm_weight, a.norm_bias,
                                         norm + r * e);
                expand.add_gradient(count, dg, f, norm, e, d.expand_weight);
                expand.apply_transposed<false>(count, dg, f, branch, e);

                at = Position(a.length, a.site_key[0], a.first_example, first);
                for (int64_t r = 0; r < count; ++r, at.next()) {
                    const int64_t row = (first + r) * E;
                    float *s = stream + r * e, *b = branch + r * e;
                    norm_backward_row<FIXED>(y + row, s, b, E, stats + 4 * (first + r), a.norm_weight, d.norm_weight,
                                             d.norm_bias, dx + row);
                    drop_row(a, at, E, [&](int64_t j) { return load(dx + row + j); },
                             [&](int64_t j, vec v) { store(b + j, v); });
                    add_into(d.out_bias, b, E);
                }
                for_stretches(a.active, a.block_size, a.length, first, first + count,
                              [&](int64_t from, int64_t n, uint8_t flag) {
                                  const float* grad = branch + (from - first) * e;
                                  if (!(flag & 1)) return fill_zero(dattended + from * K, n, K, K);
                                  out.add_gradient(n, grad, e, attended + from * K, K, d.out_weight);
                                  out.apply_transposed<false>(n, grad, e, dattended + from * K, K);
                              });
            }
        }
        free(buffers);
    }
    add_shared_pieces(pieces, count_pieces, size, a.threads, dparameters);
    free(packed);
    return status;
}

// ---- query, key and value -----------------------------------------------------------------------

// q, k, v [rows, K] = x [rows, E] W' + bias each; active: bit 0 of a block's flag, q is needed, bit 1, k and v are.
// What is not needed is zero.
static int project(const SatProjections& a, const float* x, float* const out[3]) {
    const int64_t E = a.features, K = a.attended;
    float* packed = static_cast<float*>(aligned_alloc(64, 6 * E * K * sizeof(float)));
    if (!packed) return SAT_OUT_OF_MEMORY;
    float* space = packed;
    PackedWeight weights[3];
    for (int i = 0; i < 3; ++i) weights[i] = pack(a.weight[i], K, E, space);
#pragma omp parallel for schedule(dynamic, 1) num_threads(a.threads)
    for (int64_t piece = 0; piece < (a.rows + SAT_PIECE - 1) / SAT_PIECE; ++piece) {
        const int64_t end = a.rows < (piece + 1) * SAT_PIECE ? a.rows : (piece + 1) * SAT_PIECE;
        for_stretches(a.active, a.block_size, a.length, piece * SAT_PIECE, end,
                      [&](int64_t from, int64_t n, uint8_t flag) {
                          for (int i = 0; i < 3; ++i) {
                              if (flag & (i ? 2 : 1))
                                  weights[i].apply(n, x + from * E, E, a.bias[i], out[i] + from * K, K);
                              else
                                  fill_zero(out[i] + from * K, n, K, K);
                          }
                      });
    }
    free(packed);
    return SAT_OK;
}

// dparameters: weight [K, E] and bias [K] of query, key, value.
static int project_backward(const SatProjections& a, const float* x, const float* const dout[3], float* dx,
                            float* pieces, float* dparameters) {
    const int64_t E = a.features, K = a.attended, size = 3 * K * (E + 1);
    float* packed = static_cast<float*>(aligned_alloc(64, 6 * E * K * sizeof(float)));
    if (!packed) return SAT_OUT_OF_MEMORY;
    float* space = packed;
    PackedWeight weights[3];
    for (int i = 0; i < 3; ++i) weights[i] = pack(a.weight[i], K, E, space);
    const int64_t count_pieces = (a.rows + SAT_LAYER_PIECE - 1) / SAT_LAYER_PIECE;
#pragma omp parallel for schedule(dynamic, 1) num_threads(a.threads)
    for (int64_t piece = 0; piece < count_pieces; ++piece) {
        float* sums = pieces + piece * size;
        for (int64_t i = 0; i < size; ++i) sums[i] = 0.0f;
        const int64_t begin = piece * SAT_LAYER_PIECE;
        const int64_t end = a.rows < begin + SAT_LAYER_PIECE ? a.rows : begin + SAT_LAYER_PIECE;
        for_stretches(a.active, a.block_size, a.length, begin, end, [&](int64_t from, int64_t n, uint8_t flag) {
            if (!flag) return fill_zero(dx + from * E, n, E, E);
            bool first = true;
            for (int i = 0; i < 3; ++i) {
                if (!(flag & (i ? 2 : 1))) continue;
                const float* grad = dout[i] + from * K;
                float* dweight = sums + i * K * (E + 1);
                if (first)
                    weights[i].apply_transposed<false>(n, grad, K, dx + from * E, E);
                else
                    weights[i].apply_transposed<true>(n, grad, K, dx + from * E, E);
                first = false;
                weights[i].add_gradient(n, grad, K, x + from * E, E, dweight);
                for (int64_t r = 0; r < n; ++r) add_into(dweight + K * E, grad + r * K, K);
            }
        });
    }
    add_shared_pieces(pieces, count_pieces, size, a.threads, dparameters);
    free(packed);
    return SAT_OK;
}

static int layer_forward_any(const SatLayer& a, const float* x, const float* attended, float* y, float* h, float* z,
                             float* normed, float* stats) {
    return (a.features == 64 ? layer_forward<64> : layer_forward<0>)(a, x, attended, y, h, z, normed, stats);
}

static int layer_backward_any(const SatLayer& a, const float* attended, const float* y, const float* h, const float* z,
                              const float* stats, const float* dz, const float* dnormed, float* dx, float* dattended,
                              float* pieces, float* dparameters) {
    return (a.features == 64 ? layer_backward<64> : layer_backward<0>)(a, attended, y, h, z, stats, dz, dnormed, dx,
                                                                      dattended, pieces, dparameters);
}

SatFusedKernels fused_kernels() {
    return {add_norm_any,      add_norm_backward_any, embed_norm_any, embed_norm_backward_any, gelu_any,
            layer_forward_any, layer_backward_any,    project,        project_backward};
}

}    // namespace SAT_ISA_NAMESPACE
