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

#include "product.h"
#include "rows.h"

namespace SAT_ISA_NAMESPACE {
namespace {

constexpr int64_t TILE = 96;    // tokens

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

// ---- rows -------------------------------------------------------------------------------------

// Asks for a row that is needed soon; where rows lie beyond the L2 cache, a tile's first use of each costs more than
// its arithmetic.
template <class T>
SAT_INLINE void fetch(const T* row, int64_t width) {
    for (int64_t byte = 0; byte < width * static_cast<int64_t>(sizeof(T)); byte += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(row) + byte);
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

// ---- the two passes -----------------------------------------------------------------------------

template <int FIXED, class T>
int layer_forward(const SatLayerForward& call, const T*) {
    const SatLayer& a = call.layer;
    const float* const x = call.x;
    const T* const attended = static_cast<const T*>(call.attended);
    float *const y = call.y, *const z = call.z, *const stats = call.stats;
    T *const h = static_cast<T*>(call.h), *const normed = static_cast<T*>(call.normed);
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
                drop_row(a.threshold, a.scale, at, E, [&](int64_t j) { return load(b + j); },
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
                drop_row(a.threshold, a.scale, at, F,
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
                drop_row(a.threshold, a.scale, at, E, [&](int64_t j) { return load(b + j); },
                         [&](int64_t j, vec v) { store(to + j, load(from + j) + v); });
                row_statistics<FIXED>(to, E, a.eps, s);
                normalise_row<FIXED>(to, E, s, a.next_weight, a.next_bias, normed + (first + r) * E);
            }
        });
}

template <int FIXED, class T>
int layer_backward(const SatLayerBackward& call, const T*) {
    const SatLayer& a = call.layer;
    const T *const attended = static_cast<const T*>(call.attended), *const h = static_cast<const T*>(call.h),
            *const dnormed = static_cast<const T*>(call.dnormed);
    const float *const y = call.y, *const z = call.z, *const stats = call.stats, *const dz = call.dz;
    float* const dx = call.dx;
    T* const dattended = static_cast<T*>(call.dattended);
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
            float* sums = call.pieces + piece * size;
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
                    drop_row(a.threshold, a.scale, at, E, [&](int64_t j) { return load(s + j); },
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
                    drop_row(a.threshold, a.scale, at, E, [&](int64_t j) { return load(dx + row + j); },
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
    add_pieces(call.pieces, a.rows, SAT_LAYER_PIECE, size, a.threads, call.dparameters);
    return status;
}

// ---- query, key and value -----------------------------------------------------------------------

// q, k, v [rows, K] = x [rows, E] W' + bias each; active: bit 0 of a block's flag, q is needed, bit 1, k and v are.
// What is not needed is zero.
template <class T>
int project(const SatProject& call, const T*) {
    const SatProjections& a = call.projections;
    const T* const x = static_cast<const T*>(call.x);
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
                              T* const out = static_cast<T*>(call.out[i]);
                              if (flag & (i ? 2 : 1))
                                  weights[i].apply(n, x + from * E, E, a.bias[i], out + from * K, K);
                              else
                                  fill_zero(out + from * K, n, K);
                          }
                      });
    });
    return SAT_OK;
}

// dparameters: weight [K, E] and bias [K] of query, key, value.
template <class T>
int project_backward(const SatProjectBackward& call, const T*) {
    const SatProjections& a = call.projections;
    const T* const x = static_cast<const T*>(call.x);
    T* const dx = static_cast<T*>(call.dx);
    const auto dout = [&](int i) { return static_cast<const T*>(call.dout[i]); };
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
            float* sums = call.pieces + piece * size;
            for (int64_t i = 0; i < size; ++i) sums[i] = 0.0f;
            const int64_t begin = piece * SAT_LAYER_PIECE;
            const int64_t end = a.rows < begin + SAT_LAYER_PIECE ? a.rows : begin + SAT_LAYER_PIECE;
            for_stretches(a.active, a.block_size, a.length, begin, end, [&](int64_t from, int64_t n, uint8_t flag) {
                if (!flag) return fill_zero(dx + from * E, n, E);
                bool first = true;
                for (int i = 0; i < 3; ++i) {
                    if (!(flag & (i ? 2 : 1))) continue;
                    const T* grad = dout(i) + from * K;
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
                    for (int i = 0; i < 3; ++i) fetch(dout(i) + (from + r + n) * K, K);
                }
            });
        });
    add_pieces(call.pieces, a.rows, SAT_LAYER_PIECE, size, a.threads, call.dparameters);
    return status;
}

}    // namespace

// ---- the operations -----------------------------------------------------------------------------

// Calls run(x) with a null pointer of the products' type.
template <class Run>
static int with_products(int type, Run run) {
    if (type == SAT_FLOAT32) return run(static_cast<const float*>(nullptr));
#if defined(__AVX512BF16__) && SAT_WIDTH == 16
    if (type == SAT_BFLOAT16) return run(static_cast<const bf16*>(nullptr));
#endif
    return SAT_NOT_SUPPORTED;
}

int layer_forward(const SatLayerForward& call) {
    return with_products(call.layer.type, [&](auto x) {
        return call.layer.features == 64 ? layer_forward<64>(call, x) : layer_forward<0>(call, x);
    });
}

int layer_backward(const SatLayerBackward& call) {
    return with_products(call.layer.type, [&](auto x) {
        return call.layer.features == 64 ? layer_backward<64>(call, x) : layer_backward<0>(call, x);
    });
}

int project(const SatProject& call) {
    return with_products(call.projections.type, [&](auto x) { return project(call, x); });
}

int project_backward(const SatProjectBackward& call) {
    return with_products(call.projections.type, [&](auto x) { return project_backward(call, x); });
}

}    // namespace SAT_ISA_NAMESPACE
