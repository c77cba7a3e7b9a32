// Dropout with its neighbours: residual + dropout + layer norm, GELU + dropout, embedding + position + dropout +
// layer norm, forward and backward. One pass over the tokens each; masks are drawn anew in the backward pass.
//
// Rows are tokens of E features, E a multiple of 32 (a block of the mask generator never crosses two rows).
// Sums over tokens (gradients of the norm's weight and bias, of the tables) are taken in pieces whose borders
// depend on the shapes and the ids alone, then added in order: the same bits for any number of threads.
//
// Included by fused_<isa>.cpp, see simd.h.
#pragma once

#include "fused_abi.h"
#include "parallel.h"
#include "simd.h"

namespace SAT_ISA_NAMESPACE {

// ---- dropout: the generator of kernels/fused.py, bit by bit -------------------------------------

static const int MASK_BLOCK = 32;             // elements that share 16 words of 32 bits
static const int PARTS = MASK_BLOCK / W;      // vectors of a block

struct ExampleKey {
    uint32_t low, high;
};

SAT_INLINE ExampleKey example_key(uint64_t site_key, int64_t example) {
    uint64_t z = site_key + static_cast<uint64_t>(example) + 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    z ^= z >> 31;
    return {static_cast<uint32_t>(z), static_cast<uint32_t>(z >> 32)};
}

SAT_INLINE ivec lane_numbers() {
    ivec lanes;
    for (int i = 0; i < W; ++i) lanes[i] = i;
    return lanes;
}

// Which lanes of a vector are kept: bits where the hardware has registers for them, else all ones or zeros a lane.
#if defined(__AVX512F__) && SAT_WIDTH == 16
typedef __mmask16 Keep;
SAT_INLINE Keep at_least(uvec x, uvec limit) {
    return _mm512_cmpge_epu32_mask(reinterpret_cast<__m512i>(x), reinterpret_cast<__m512i>(limit));
}
SAT_INLINE vec scale_kept(Keep keep, vec x, vec scale) { return _mm512_maskz_mul_ps(keep, x, scale); }
#else
typedef ivec Keep;
SAT_INLINE Keep at_least(uvec x, uvec limit) { return reinterpret_cast<ivec>(x) >= reinterpret_cast<ivec>(limit); }
SAT_INLINE vec scale_kept(Keep keep, vec x, vec scale) {
    return reinterpret_cast<vec>(reinterpret_cast<ivec>(x * scale) & keep);
}
#endif

// keep[i]: whether elements 32 * block + W * i + lane are kept (threshold 0: all).
SAT_INLINE void keep_block(const ExampleKey& key, int64_t block, uint32_t threshold, Keep* keep) {
    const uvec limit = uvec{} + threshold;
    for (int i = 0; i < PARTS / 2; ++i) {
        const uint32_t first = static_cast<uint32_t>(block * 16 + i * W) + key.low;
        uvec x = reinterpret_cast<uvec>(lane_numbers()) + first;
        x = (x ^ (x >> 16)) * 0x7FEB352Du;
        x ^= key.high;
        x = (x ^ (x >> 15)) * 0x846CA68Bu;
        x ^= x >> 16;
        keep[i] = at_least(x & 0xFFFFu, limit);
        keep[i + PARTS / 2] = at_least(x >> 16, limit);
    }
}

// ---- one row of E features ----------------------------------------------------------------------

// E is a compile-time constant for the usual width, so that a row lives in registers.
template <int FIXED>
SAT_INLINE int64_t features(int64_t e) {
    return FIXED ? FIXED : e;
}

// Where a row stands: its token, and its example's key of one dropout site.
struct Position {
    int64_t length, next_example, token;
    uint64_t site_key;
    ExampleKey key;

    SAT_INLINE Position(int64_t length, uint64_t site_key, int64_t first_example, int64_t row)
        : length(length), next_example(first_example + row / length + 1), token(row % length), site_key(site_key),
          key(example_key(site_key, next_example - 1)) {}
    SAT_INLINE void next() {
        if (++token < length) return;
        token = 0;
        key = example_key(site_key, next_example++);
    }
};

// buffer [E] -> its mean and 1 / standard deviation.
template <int FIXED>
SAT_INLINE void row_statistics(const float* buffer, int64_t e, float eps, float* stats) {
    const int64_t E = features<FIXED>(e);
    vec sum0{}, sum1{};
    SAT_UNROLL(16)
    for (int64_t i = 0; i < E; i += 2 * W) {
        sum0 += load(buffer + i);
        sum1 += load(buffer + i + W);
    }
    const vec mean = total(sum0 + sum1) * (1.0f / static_cast<float>(E));
    vec square0{}, square1{};
    SAT_UNROLL(16)
    for (int64_t i = 0; i < E; i += 2 * W) {
        const vec d0 = load(buffer + i) - mean, d1 = load(buffer + i + W) - mean;
        square0 += d0 * d0;
        square1 += d1 * d1;
    }
    const float variance = total(square0 + square1)[0] / static_cast<float>(E);
    stats[0] = mean[0];
    stats[1] = 1.0f / __builtin_sqrtf(variance + eps);
}

template <int FIXED, class Normed>
SAT_INLINE void normalise_row(const float* buffer, int64_t e, const float* stats, const float* weight,
                              const float* bias, Normed* out) {
    const int64_t E = features<FIXED>(e);
    const vec mean = splat(stats[0]), rstd = splat(stats[1]);
    SAT_UNROLL(16)
    for (int64_t i = 0; i < E; i += W)
        store(out + i, (load(buffer + i) - mean) * rstd * load(weight + i) + load(bias + i));
}

// total_grad = dy + gradient of the layer norm at y; adds this row's share to dweight and dbias.
template <int FIXED, class Y, class Normed>
SAT_INLINE void norm_backward_row(const Y* y, const Y* dy, const Normed* dnormed, int64_t e, const float* stats,
                                  const float* weight, float* dweight, float* dbias, float* total_grad) {
    const int64_t E = features<FIXED>(e);
    const vec mean = splat(stats[0]), rstd = splat(stats[1]);
    vec sum{}, dot{};
    SAT_UNROLL(16)
    for (int64_t i = 0; i < E; i += W) {
        const vec dn = load(dnormed + i), normalised = (load(y + i) - mean) * rstd;
        const vec g = dn * load(weight + i);
        sum += g;
        dot += g * normalised;
        store(dweight + i, load(dweight + i) + dn * normalised);
        store(dbias + i, load(dbias + i) + dn);
    }
    sum = total(sum) * (1.0f / static_cast<float>(E));
    dot = total(dot) * (1.0f / static_cast<float>(E));
    SAT_UNROLL(16)
    for (int64_t i = 0; i < E; i += W) {
        const vec normalised = (load(y + i) - mean) * rstd;
        const vec g = load(dnormed + i) * load(weight + i);
        vec d = (g - sum - normalised * dot) * rstd;
        if (dy) d += load(dy + i);
        store(total_grad + i, d);
    }
}

// Adds the pieces' partial sums in order.
static void add_pieces(const float* pieces, int64_t count, int64_t size, float* out) {
    for (int64_t i = 0; i < size; ++i) out[i] = pieces[i];
    for (int64_t piece = 1; piece < count; ++piece)
        for (int64_t i = 0; i < size; ++i) out[i] += pieces[piece * size + i];
}

// ---- y = x + dropout(branch), LayerNorm(y) ------------------------------------------------------

template <int FIXED, class X, class Branch, class Normed>
static void add_norm(const SatNorm& a, const X* x, const Branch* branch, X* y, Normed* normed, float* stats) {
    const int64_t E = features<FIXED>(a.features), blocks = E / MASK_BLOCK;
    const vec scale = splat(a.scale);
    spread(a.threads, sat_pieces(a.rows), [&](int64_t piece) {
        float buffer[SAT_MAX_FEATURES];
        const int64_t end = a.rows < (piece + 1) * SAT_PIECE ? a.rows : (piece + 1) * SAT_PIECE;
        Position at_row(a.length, a.site_key, a.first_example, piece * SAT_PIECE);
        for (int64_t row = piece * SAT_PIECE; row < end; ++row, at_row.next()) {
            SAT_UNROLL(4)
            for (int64_t block = 0; block < blocks; ++block) {
                Keep keep[PARTS];
                keep_block(at_row.key, at_row.token * blocks + block, a.threshold, keep);
                SAT_UNROLL(8)
                for (int i = 0; i < PARTS; ++i) {
                    const int64_t at = block * MASK_BLOCK + i * W;
                    const vec b = scale_kept(keep[i], load(branch + row * E + at), scale);
                    store(y + row * E + at, load(x + row * E + at) + b);
                    store(buffer + at, load(y + row * E + at));    // as rounded: what the backward pass will see
                }
            }
            row_statistics<FIXED>(buffer, E, a.eps, stats + 2 * row);
            normalise_row<FIXED>(buffer, E, stats + 2 * row, a.weight, a.bias, normed + row * E);
        }
    });
}

template <int FIXED, class X, class Branch, class Normed>
static void add_norm_backward(const SatNorm& a, const X* y, const float* stats, const X* dy, const Normed* dnormed,
                              X* dx, Branch* dbranch, float* pieces, float* dparameters) {
    const int64_t E = features<FIXED>(a.features), blocks = E / MASK_BLOCK;
    const vec scale = splat(a.scale);
    spread(a.threads, sat_pieces(a.rows), [&](int64_t piece) {
        float buffer[SAT_MAX_FEATURES];
        float* dweight = pieces + piece * 2 * E;
        for (int64_t i = 0; i < 2 * E; ++i) dweight[i] = 0.0f;
        const int64_t end = a.rows < (piece + 1) * SAT_PIECE ? a.rows : (piece + 1) * SAT_PIECE;
        Position at_row(a.length, a.site_key, a.first_example, piece * SAT_PIECE);
        for (int64_t row = piece * SAT_PIECE; row < end; ++row, at_row.next()) {
            const int64_t start = row * E;
            norm_backward_row<FIXED>(y + start, dy ? dy + start : dy, dnormed + start, E, stats + 2 * row, a.weight,
                                     dweight, dweight + E, buffer);
            SAT_UNROLL(4)
            for (int64_t block = 0; block < blocks; ++block) {
                Keep keep[PARTS];
                keep_block(at_row.key, at_row.token * blocks + block, a.threshold, keep);
                SAT_UNROLL(8)
                for (int i = 0; i < PARTS; ++i) {
                    const int64_t at = block * MASK_BLOCK + i * W;
                    const vec d = load(buffer + at);
                    store(dx + start + at, d);
                    store(dbranch + start + at, scale_kept(keep[i], d, scale));
                }
            }
        }
    });
    add_pieces(pieces, sat_pieces(a.rows), 2 * E, dparameters);
}

// ---- x = dropout(word_table[ids] + position_table), LayerNorm(x) --------------------------------

template <int FIXED, class X, class Normed>
static void embed_norm(const SatNorm& a, const int64_t* ids, const X* words, const X* positions, X* x, Normed* normed,
                       float* stats) {
    const int64_t E = features<FIXED>(a.features), blocks = E / MASK_BLOCK;
    const vec scale = splat(a.scale);
    spread(a.threads, sat_pieces(a.rows), [&](int64_t piece) {
        float buffer[SAT_MAX_FEATURES];
        const int64_t end = a.rows < (piece + 1) * SAT_PIECE ? a.rows : (piece + 1) * SAT_PIECE;
        Position at_row(a.length, a.site_key, a.first_example, piece * SAT_PIECE);
        for (int64_t row = piece * SAT_PIECE; row < end; ++row, at_row.next()) {
            const X* word = words + ids[row] * E;
            const X* position = positions + at_row.token * E;
            SAT_UNROLL(4)
            for (int64_t block = 0; block < blocks; ++block) {
                Keep keep[PARTS];
                keep_block(at_row.key, at_row.token * blocks + block, a.threshold, keep);
                SAT_UNROLL(8)
                for (int i = 0; i < PARTS; ++i) {
                    const int64_t at = block * MASK_BLOCK + i * W;
                    const vec sum = load(word + at) + load(position + at);
                    store(x + row * E + at, scale_kept(keep[i], sum, scale));
                    store(buffer + at, load(x + row * E + at));
                }
            }
            row_statistics<FIXED>(buffer, E, a.eps, stats + 2 * row);
            normalise_row<FIXED>(buffer, E, stats + 2 * row, a.weight, a.bias, normed + row * E);
        }
    });
}

// dsum [rows, E]: the gradient of word + position at every token.
template <int FIXED, class X, class Normed>
static void embed_norm_backward(const SatNorm& a, const X* x, const float* stats, const X* dx, const Normed* dnormed,
                                float* dsum, float* pieces, float* dparameters) {
    const int64_t E = features<FIXED>(a.features), blocks = E / MASK_BLOCK;
    const vec scale = splat(a.scale);
    spread(a.threads, sat_pieces(a.rows), [&](int64_t piece) {
        float* dweight = pieces + piece * 2 * E;
        for (int64_t i = 0; i < 2 * E; ++i) dweight[i] = 0.0f;
        const int64_t end = a.rows < (piece + 1) * SAT_PIECE ? a.rows : (piece + 1) * SAT_PIECE;
        Position at_row(a.length, a.site_key, a.first_example, piece * SAT_PIECE);
        for (int64_t row = piece * SAT_PIECE; row < end; ++row, at_row.next()) {
            const int64_t start = row * E;
            norm_backward_row<FIXED>(x + start, dx ? dx + start : dx, dnormed + start, E, stats + 2 * row, a.weight,
                                     dweight, dweight + E, dsum + start);
            SAT_UNROLL(4)
            for (int64_t block = 0; block < blocks; ++block) {
                Keep keep[PARTS];
                keep_block(at_row.key, at_row.token * blocks + block, a.threshold, keep);
                SAT_UNROLL(8)
                for (int i = 0; i < PARTS; ++i) {
                    float* d = dsum + start + block * MASK_BLOCK + i * W;
                    store(d, scale_kept(keep[i], load(d), scale));
                }
            }
        }
    });
    add_pieces(pieces, sat_pieces(a.rows), 2 * E, dparameters);
}

// out [E] = sum of the rows `order[begin .. end)` of dsum, in that order.
SAT_INLINE void sum_rows(const float* dsum, const int64_t* order, int64_t begin, int64_t end, int64_t E, float* out) {
    for (int64_t i = 0; i < E; i += W) store(out + i, vec{});
    for (int64_t k = begin; k < end; ++k) {
        const float* row = dsum + order[k] * E;
        for (int64_t i = 0; i < E; i += W) store(out + i, load(out + i) + load(row + i));
    }
}

// dwords [V, E], dpositions [N, E] (may be null) from dsum [rows, E].
static int tables_backward(const SatNorm& a, const int64_t* ids, const float* dsum, int64_t vocabulary, float* dwords,
                           float* dpositions) {
    const int64_t E = a.features;
    if (dpositions) {
        spread(a.threads, a.length, [&](int64_t token) {
            float* out = dpositions + token * E;
            for (int64_t i = 0; i < E; i += W) store(out + i, vec{});
            for (int64_t row = token; row < a.rows; row += a.length)
                for (int64_t i = 0; i < E; i += W) store(out + i, load(out + i) + load(dsum + row * E + i));
        });
    }
    // Tokens sorted by word (counting sort, stable), cut into pieces: one frequent word (a picture's black) is
    // shared by all threads, and each sum has a fixed order.
    const int64_t most = vocabulary + a.rows / SAT_PIECE;    // pieces
    int64_t* start = static_cast<int64_t*>(calloc(vocabulary + 1, sizeof(int64_t)));
    int64_t* order = static_cast<int64_t*>(malloc(a.rows * sizeof(int64_t)));
    int64_t* begin = static_cast<int64_t*>(malloc(2 * (most + 1) * sizeof(int64_t)));    // then the piece's word
    float* partial = static_cast<float*>(malloc((a.rows / SAT_PIECE + 1) * E * sizeof(float)));
    int status = SAT_OUT_OF_MEMORY;
    if (start && order && begin && partial) {
        for (int64_t row = 0; row < a.rows; ++row) ++start[ids[row] + 1];
        for (int64_t word = 0; word < vocabulary; ++word) start[word + 1] += start[word];
        for (int64_t row = 0; row < a.rows; ++row) order[start[ids[row]]++] = row;
        for (int64_t word = vocabulary; word > 0; --word) start[word] = start[word - 1];
        start[0] = 0;
        int64_t count = 0, *word_of = begin + most + 1;
        for (int64_t word = 0; word < vocabulary; ++word) {
            int64_t at = start[word];
            do {    // a word that does not occur has one empty piece: zeros
                begin[count] = at;
                word_of[count++] = word;
                at += SAT_PIECE;
            } while (at < start[word + 1]);
        }
        // A word's first piece goes to the table, piece k > 0 to partial[k - word - 1 ...]: pieces beyond the first
        // are numbered through all words, piece minus word.
        spread(a.threads, count, 8, [&](int64_t piece) {
            const int64_t word = word_of[piece];
            const int64_t end = start[word + 1] < begin[piece] + SAT_PIECE ? start[word + 1] : begin[piece] + SAT_PIECE;
            const bool first = begin[piece] == start[word];
            sum_rows(dsum, order, begin[piece], end, E, first ? dwords + word * E : partial + (piece - word - 1) * E);
        });
        for (int64_t piece = 0; piece < count; ++piece) {
            const int64_t word = word_of[piece];
            if (begin[piece] == start[word]) continue;
            for (int64_t i = 0; i < E; ++i) dwords[word * E + i] += partial[(piece - word - 1) * E + i];
        }
        status = SAT_OK;
    }
    free(start);
    free(order);
    free(begin);
    free(partial);
    return status;
}

// ---- dropout(gelu(x)) ---------------------------------------------------------------------------

// 1 / x for x >= 1 to ROUNDS == 0: 6e-5, 1: an fp32 rounding or two. (A division occupies the CPU for ten others.)
template <int ROUNDS>
SAT_INLINE vec reciprocal(vec x) {
#if defined(__AVX512F__) && SAT_WIDTH == 16
    const vec guess = _mm512_rcp14_ps(x);
    return ROUNDS ? guess * (2.0f - x * guess) : guess;
#else
    return 1.0f / x;
#endif
}

// What gelu and its slope are made of, at a = min(|x|, 12.9): density = exp(-a*a/2), tail = Phi(-a).
//
// Phi(-a) = exp(-a*a/2) t P(t), t = 1 / (1 + q a), P fitted for the relative error on 0 <= a <= 13 (minimax by
// reweighted least squares). Taking the tail itself, and not 1 + erf, which cancels for negative x, keeps the relative
// error of gelu small everywhere; and the backward pass has the density for nothing.
struct Normal {
    vec a, density, tail;
};

// T float: P and exp to 9e-8, so that gelu is right to a few units in the last place, plus a*a/4 for the rounding of
// a*a. T bf16, for values that are rounded to 2e-3 before and after: to 2e-4 in all.
template <class T>
SAT_INLINE Normal normal_tail(vec x) {
    const bool fine = sizeof(T) == 4;
    // Phi(-12.9) = 2e-38 is the last normal number. The order of min's arguments keeps NaN.
    const vec a = min(splat(12.9f), reinterpret_cast<vec>(reinterpret_cast<ivec>(x) & 0x7fffffff));
    const vec t = reciprocal<fine>(1.0f + (fine ? 0.30500001f : 0.25f) * a);
    vec p;
    if (fine) {
        p = splat(0.0366991758f);
        p = p * t - 0.152988225f;
        p = p * t + 0.185716718f;
        p = p * t - 0.0379766375f;
        p = p * t + 0.121021561f;
        p = p * t + 0.103420906f;
        p = p * t + 0.12246681f;
        p = p * t + 0.121639736f;
    } else {
        p = splat(0.241996844f);
        p = p * t - 0.104848691f;
        p = p * t + 0.181230704f;
        p = p * t + 0.0802168723f;
        p = p * t + 0.101386724f;
    }
    // exp(-a*a/2) = 2^(n + f), n the nearest integer: adding 1.5 * 2^23 leaves it in the low bits.
    const vec square = a * a, magic = splat(12582912.0f);
    const vec shifted = square * -0.72134752f + magic;
    const vec f = square * -0.72134752f - (shifted - magic);    // fused: exact before it is rounded
    vec e;
    if (fine) {
        e = splat(1.3276472e-3f);
        e = e * f + 9.675541e-3f;
        e = e * f + 5.5507131e-2f;
        e = e * f + 0.24022120f;
        e = e * f + 0.69314694f;
        e = e * f + 1.0000001f;
    } else {
        e = splat(0.0551716847f);
        e = e * f + 0.242611161f;
        e = e * f + 0.693260986f;
        e = e * f + 0.999928071f;
    }
    e = reinterpret_cast<vec>(reinterpret_cast<ivec>(e) + (reinterpret_cast<ivec>(shifted) << 23));
    return {a, e, e * (t * p)};
}

// gelu(x) = max(x, 0) - |x| Phi(-|x|)
SAT_INLINE vec gelu(vec x, const Normal& n) { return max(vec{}, x) - n.a * n.tail; }

// gelu'(x) = Phi(x) + x density / sqrt(2 pi) = step(x) - sign(x) (Phi(-|x|) - |x| density / sqrt(2 pi))
SAT_INLINE vec gelu_slope(vec x, const Normal& n) {
    const vec part = n.tail - n.a * n.density * 0.39894228f;
    const ivec sign = reinterpret_cast<ivec>(x) & static_cast<int32_t>(0x80000000);
    const vec step = reinterpret_cast<vec>(reinterpret_cast<ivec>(splat(1.0f)) & (x > 0.0f));
    return step - reinterpret_cast<vec>(reinterpret_cast<ivec>(part) ^ sign);
}

// BACKWARD: out = dropout's factor * grad * gelu'(x); else out = dropout(gelu(x)).
template <bool BACKWARD, class T>
SAT_INLINE void gelu_block(const SatGelu& a, const T* x, const T* grad, T* out, ExampleKey key, int64_t block) {
    Keep keep[PARTS];
    keep_block(key, block, a.threshold, keep);
    const vec scale = splat(a.scale);
    SAT_UNROLL(8)
    for (int i = 0; i < PARTS; ++i) {
        const vec v = load(x + i * W);
        const Normal n = normal_tail<T>(v);
        const vec y = BACKWARD ? gelu_slope(v, n) * load(grad + i * W) : gelu(v, n);
        store(out + i * W, scale_kept(keep[i], y, scale));
    }
}

template <bool BACKWARD, class T>
static void gelu_dropout(const SatGelu& a, const T* x, const T* grad, T* out) {
    const int64_t blocks = (a.size + MASK_BLOCK - 1) / MASK_BLOCK;    // of an example
    const int64_t step = 64, pieces = (blocks + step - 1) / step;
    spread(a.threads, a.examples * pieces, [&](int64_t piece) {
        const int64_t example = piece / pieces, first = piece % pieces * step;
        const int64_t end = first + step < blocks ? first + step : blocks;
        const ExampleKey key = example_key(a.site_key, a.first_example + example);
        for (int64_t block = first; block < end; ++block) {
            const int64_t at = example * a.size + block * MASK_BLOCK, left = a.size - block * MASK_BLOCK;
            if (left >= MASK_BLOCK) {
                gelu_block<BACKWARD>(a, x + at, BACKWARD ? grad + at : grad, out + at, key, block);
            } else {
                T padded[3][MASK_BLOCK] = {};
                for (int64_t i = 0; i < left; ++i) {
                    padded[0][i] = x[at + i];
                    if (BACKWARD) padded[1][i] = grad[at + i];
                }
                gelu_block<BACKWARD>(a, padded[0], padded[1], padded[2], key, block);
                for (int64_t i = 0; i < left; ++i) out[at + i] = padded[2][i];
            }
        }
    });
}

// ---- mean over tokens ---------------------------------------------------------------------------

template <class T>
static void mean(const SatMean& a, const T* x, float* out) {
    const int64_t N = a.length, E = a.features;
    spread(a.threads, a.examples, [&](int64_t example) {
        float* sum = out + example * E;
        for (int64_t i = 0; i < E; ++i) sum[i] = 0.0f;
        for (int64_t row = example * N; row < (example + 1) * N; ++row)
            if (a.mask[row])
                for (int64_t i = 0; i < E; i += W) store(sum + i, load(sum + i) + load(x + row * E + i));
        for (int64_t i = 0; i < E; ++i) sum[i] /= static_cast<float>(N);
    });
}

template <class T>
static void mean_backward(const SatMean& a, const float* dout, T* dx) {
    const int64_t N = a.length, E = a.features;
    spread(a.threads, a.examples, [&](int64_t example) {
        T share[SAT_MAX_FEATURES];
        for (int64_t i = 0; i < E; i += W) store(share + i, load(dout + example * E + i) / static_cast<float>(N));
        for (int64_t row = example * N; row < (example + 1) * N; ++row) {
            if (a.mask[row])
                memcpy(dx + row * E, share, E * sizeof(T));
            else
                memset(dx + row * E, 0, E * sizeof(T));
        }
    });
}

// ---- the table of this instruction set ----------------------------------------------------------

// Types are template arguments; width 64, the one of every task, is compiled as a constant.
#define SAT_BY_WIDTH(function, ...) (a.features == 64 ? function<64, __VA_ARGS__> : function<0, __VA_ARGS__>)

static int add_norm_any(const SatNorm& a, const void* x, const void* branch, void* y, void* normed, float* stats) {
#define SAT_CASE(X, BRANCH, NORMED)                                                                        \
    SAT_BY_WIDTH(add_norm, X, BRANCH, NORMED)                                                              \
    (a, static_cast<const X*>(x), static_cast<const BRANCH*>(branch), static_cast<X*>(y),                  \
     static_cast<NORMED*>(normed), stats)
    switch (a.types) {
        case SAT_ALL_FLOAT: SAT_CASE(float, float, float); return SAT_OK;
        case SAT_FLOAT_STREAM: SAT_CASE(float, bf16, bf16); return SAT_OK;
        case SAT_ALL_BFLOAT: SAT_CASE(bf16, bf16, bf16); return SAT_OK;
    }
#undef SAT_CASE
    return SAT_NOT_SUPPORTED;
}

static int add_norm_backward_any(const SatNorm& a, const void* y, const float* stats, const void* dy,
                                 const void* dnormed, void* dx, void* dbranch, float* pieces, float* dparameters) {
#define SAT_CASE(X, BRANCH, NORMED)                                                                        \
    SAT_BY_WIDTH(add_norm_backward, X, BRANCH, NORMED)                                                     \
    (a, static_cast<const X*>(y), stats, static_cast<const X*>(dy), static_cast<const NORMED*>(dnormed),   \
     static_cast<X*>(dx), static_cast<BRANCH*>(dbranch), pieces, dparameters)
    switch (a.types) {
        case SAT_ALL_FLOAT: SAT_CASE(float, float, float); return SAT_OK;
        case SAT_FLOAT_STREAM: SAT_CASE(float, bf16, bf16); return SAT_OK;
        case SAT_ALL_BFLOAT: SAT_CASE(bf16, bf16, bf16); return SAT_OK;
    }
#undef SAT_CASE
    return SAT_NOT_SUPPORTED;
}

static int embed_norm_any(const SatNorm& a, const int64_t* ids, const void* words, const void* positions, void* x,
                          void* normed, float* stats) {
#define SAT_CASE(X, NORMED)                                                                                \
    SAT_BY_WIDTH(embed_norm, X, NORMED)                                                                    \
    (a, ids, static_cast<const X*>(words), static_cast<const X*>(positions), static_cast<X*>(x),           \
     static_cast<NORMED*>(normed), stats)
    switch (a.types) {
        case SAT_ALL_FLOAT: SAT_CASE(float, float); return SAT_OK;
        case SAT_FLOAT_STREAM: SAT_CASE(float, bf16); return SAT_OK;
        case SAT_ALL_BFLOAT: SAT_CASE(bf16, bf16); return SAT_OK;
    }
#undef SAT_CASE
    return SAT_NOT_SUPPORTED;
}

static int embed_norm_backward_any(const SatNorm& a, const int64_t* ids, const void* x, const float* stats,
                                   const void* dx, const void* dnormed, float* dsum, float* pieces,
                                   float* dparameters, int64_t vocabulary, float* dwords, float* dpositions) {
#define SAT_CASE(X, NORMED)                                                                                \
    SAT_BY_WIDTH(embed_norm_backward, X, NORMED)                                                           \
    (a, static_cast<const X*>(x), stats, static_cast<const X*>(dx), static_cast<const NORMED*>(dnormed),   \
     dsum, pieces, dparameters)
    switch (a.types) {
        case SAT_ALL_FLOAT: SAT_CASE(float, float); break;
        case SAT_FLOAT_STREAM: SAT_CASE(float, bf16); break;
        case SAT_ALL_BFLOAT: SAT_CASE(bf16, bf16); break;
        default: return SAT_NOT_SUPPORTED;
    }
#undef SAT_CASE
    return tables_backward(a, ids, dsum, vocabulary, dwords, dpositions);
}

static int gelu_any(const SatGelu& a, const void* x, const void* grad, void* out) {
    if (a.type == SAT_FLOAT32) {
        const float *in = static_cast<const float*>(x), *g = static_cast<const float*>(grad);
        g ? gelu_dropout<true>(a, in, g, static_cast<float*>(out))
          : gelu_dropout<false>(a, in, g, static_cast<float*>(out));
    } else if (a.type == SAT_BFLOAT16) {
        const bf16 *in = static_cast<const bf16*>(x), *g = static_cast<const bf16*>(grad);
        g ? gelu_dropout<true>(a, in, g, static_cast<bf16*>(out))
          : gelu_dropout<false>(a, in, g, static_cast<bf16*>(out));
    } else {
        return SAT_NOT_SUPPORTED;
    }
    return SAT_OK;
}

static int mean_any(const SatMean& a, const void* x, float* out) {
    a.type == SAT_BFLOAT16 ? mean(a, static_cast<const bf16*>(x), out) : mean(a, static_cast<const float*>(x), out);
    return SAT_OK;
}

static int mean_backward_any(const SatMean& a, const float* dout, void* dx) {
    a.type == SAT_BFLOAT16 ? mean_backward(a, dout, static_cast<bf16*>(dx))
                           : mean_backward(a, dout, static_cast<float*>(dx));
    return SAT_OK;
}

}    // namespace SAT_ISA_NAMESPACE
