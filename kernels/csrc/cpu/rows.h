// Dropout with its neighbours, a row of tokens at a time: residual + dropout + layer norm, embedding + position + dropout +
// layer norm, GELU + dropout, the mean over tokens; forward and backward. One pass over the tokens each; masks are drawn anew
// in the backward pass.
//
// Rows are tokens of E features, E a multiple of 32 (a block of the mask generator never crosses two rows).
// Sums over tokens (gradients of the norm's weight and bias, of the tables) are taken in pieces whose borders
// depend on the shapes and the ids alone, then added in order: the same bits for any number of threads.
#pragma once

#include "abi.h"
#include "parallel.h"
#include "simd.h"

namespace SAT_ISA_NAMESPACE {
namespace {

// ---- dropout: the generator of kernels/fused.py, bit by bit -------------------------------------

constexpr int MASK_BLOCK = 32;             // elements that share 16 words of 32 bits
constexpr int PARTS = MASK_BLOCK / W;      // vectors of a block

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

template <class T>
SAT_INLINE void add_into(float* sum, const T* row, int64_t width) {
    for (int64_t i = 0; i < width; i += W) store(sum + i, load(sum + i) + load(row + i));
}

// Calls out(i, dropout(in(i))) for every W-th i of a row of `width` elements.
template <class In, class Out>
SAT_INLINE void drop_row(uint32_t threshold, float scale, const Position& at, int64_t width, In in, Out out) {
    const vec factor = splat(scale);
    for (int64_t block = 0; block < width / MASK_BLOCK; ++block) {
        Keep keep[PARTS];
        keep_block(at.key, at.token * (width / MASK_BLOCK) + block, threshold, keep);
        SAT_UNROLL(8)
        for (int i = 0; i < PARTS; ++i) {
            const int64_t j = block * MASK_BLOCK + i * W;
            out(j, scale_kept(keep[i], in(j), factor));
        }
    }
}

// Calls work(row, position, begin(piece)) for each row of each piece of SAT_PIECE rows.
template <class Begin, class Work>
SAT_INLINE void each_row(const SatNorm& a, Begin begin, Work work) {
    spread(a.threads, (a.rows + SAT_PIECE - 1) / SAT_PIECE, [&](int64_t piece) {
        const int64_t first = piece * SAT_PIECE, end = a.rows < first + SAT_PIECE ? a.rows : first + SAT_PIECE;
        auto of_piece = begin(piece);
        Position at(a.length, a.site_key, a.first_example, first);
        for (int64_t row = first; row < end; ++row, at.next()) work(row, at, of_piece);
    });
}

// A piece's sums, zero: [2, E] of the gradients of the norm's weight and bias.
SAT_INLINE float* begin_sums(float* pieces, int64_t piece, int64_t E) {
    float* sums = pieces + piece * 2 * E;
    for (int64_t i = 0; i < 2 * E; ++i) sums[i] = 0.0f;
    return sums;
}

// Adds the pieces' partial sums in order; threads share the sums, not the pieces.
void add_pieces(const float* pieces, int64_t rows, int64_t rows_of_piece, int64_t size, int threads, float* out) {
    const int64_t count = (rows + rows_of_piece - 1) / rows_of_piece;
    spread(threads, (size + 511) / 512, [&](int64_t part) {
        const int64_t stop = size < part * 512 + 512 ? size : part * 512 + 512;
        for (int64_t i = part * 512; i < stop; ++i) out[i] = pieces[i];
        for (int64_t piece = 1; piece < count; ++piece)
            for (int64_t i = part * 512; i < stop; ++i) out[i] += pieces[piece * size + i];
    });
}

template <int N>
struct Width {
    static constexpr int value = N;
};

// Calls run(width, stream, branch, normed): null pointers of the types, and the width where it is compiled as a constant (64,
// the one of every task), else 0.
template <class Run>
SAT_INLINE int with_types(const SatNorm& a, Run run) {
    const auto with = [&](auto stream, auto branch, auto normed) {
        a.features == 64 ? run(Width<64>(), stream, branch, normed) : run(Width<0>(), stream, branch, normed);
        return SAT_OK;
    };
    const float* wide = nullptr;
    const bf16* narrow = nullptr;
    switch (a.types) {
        case SAT_ALL_FLOAT: return with(wide, wide, wide);
        case SAT_FLOAT_STREAM: return with(wide, narrow, narrow);
        case SAT_ALL_BFLOAT: return with(narrow, narrow, narrow);
    }
    return SAT_NOT_SUPPORTED;
}

// The same for operations on one type.
template <class Run>
SAT_INLINE int with_type(int type, Run run) {
    if (type == SAT_FLOAT32)
        run(static_cast<const float*>(nullptr));
    else if (type == SAT_BFLOAT16)
        run(static_cast<const bf16*>(nullptr));
    else
        return SAT_NOT_SUPPORTED;
    return SAT_OK;
}

// Drops out a row into `to` and takes its norm, as rounded: what the backward pass will see.
template <int FIXED, class X, class Normed, class In, class Out>
SAT_INLINE void drop_and_norm(const SatNorm& a, const Position& at, int64_t row, X* to, Normed* normed, float* stats, In in,
                              Out out) {
    const int64_t E = features<FIXED>(a.features);
    float buffer[FIXED ? FIXED : SAT_MAX_FEATURES];
    drop_row(a.threshold, a.scale, at, E, in, [&](int64_t j, vec v) {
        store(to + row * E + j, out(j, v));
        store(buffer + j, load(to + row * E + j));
    });
    row_statistics<FIXED>(buffer, E, a.eps, stats + 2 * row);
    normalise_row<FIXED>(buffer, E, stats + 2 * row, a.weight, a.bias, normed + row * E);
}

// ---- y = x + dropout(branch), LayerNorm(y) ------------------------------------------------------

template <int FIXED, class X, class Branch, class Normed>
void add_norm(const SatAddNorm& call, const X*, const Branch*, const Normed*) {
    const int64_t E = features<FIXED>(call.norm.features);
    const X* const x = static_cast<const X*>(call.x);
    const Branch* const branch = static_cast<const Branch*>(call.branch);
    each_row(call.norm, [](int64_t) { return 0; }, [&](int64_t row, const Position& at, int) {
        drop_and_norm<FIXED>(
            call.norm, at, row, static_cast<X*>(call.y), static_cast<Normed*>(call.normed), call.stats,
            [&](int64_t j) { return load(branch + row * E + j); },
            [&](int64_t j, vec v) { return load(x + row * E + j) + v; });
    });
}

template <int FIXED, class X, class Branch, class Normed>
void add_norm_backward(const SatAddNormBackward& call, const X*, const Branch*, const Normed*) {
    const SatNorm& a = call.norm;
    const int64_t E = features<FIXED>(a.features);
    const X *const y = static_cast<const X*>(call.y), *const dy = static_cast<const X*>(call.dy);
    const Normed* const dnormed = static_cast<const Normed*>(call.dnormed);
    X* const dx = static_cast<X*>(call.dx);
    Branch* const dbranch = static_cast<Branch*>(call.dbranch);
    each_row(a, [&](int64_t piece) { return begin_sums(call.pieces, piece, E); },
             [&](int64_t row, const Position& at, float* dweight) {
                 float buffer[FIXED ? FIXED : SAT_MAX_FEATURES];
                 const int64_t start = row * E;
                 norm_backward_row<FIXED>(y + start, dy ? dy + start : dy, dnormed + start, E, call.stats + 2 * row, a.weight,
                                          dweight, dweight + E, buffer);
                 drop_row(a.threshold, a.scale, at, E,
                          [&](int64_t j) {
                              const vec d = load(buffer + j);
                              store(dx + start + j, d);
                              return d;
                          },
                          [&](int64_t j, vec v) { store(dbranch + start + j, v); });
             });
    add_pieces(call.pieces, a.rows, SAT_PIECE, 2 * E, a.threads, call.dparameters);
}

// ---- x = dropout(word_table[ids] + position_table), LayerNorm(x) --------------------------------

template <int FIXED, class X, class Normed>
void embed_norm(const SatEmbedNorm& call, const X*, const Normed*) {
    const int64_t E = features<FIXED>(call.norm.features);
    const X *const words = static_cast<const X*>(call.words), *const positions = static_cast<const X*>(call.positions);
    each_row(call.norm, [](int64_t) { return 0; }, [&](int64_t row, const Position& at, int) {
        const X *word = words + call.ids[row] * E, *position = positions + at.token * E;
        drop_and_norm<FIXED>(
            call.norm, at, row, static_cast<X*>(call.x), static_cast<Normed*>(call.normed), call.stats,
            [&](int64_t j) { return load(word + j) + load(position + j); }, [&](int64_t, vec v) { return v; });
    });
}

// dsum [rows, E]: the gradient of word + position at every token.
template <int FIXED, class X, class Normed>
void embed_norm_backward(const SatEmbedNormBackward& call, const X*, const Normed*) {
    const SatNorm& a = call.norm;
    const int64_t E = features<FIXED>(a.features);
    const X *const x = static_cast<const X*>(call.x), *const dx = static_cast<const X*>(call.dx);
    const Normed* const dnormed = static_cast<const Normed*>(call.dnormed);
    each_row(a, [&](int64_t piece) { return begin_sums(call.pieces, piece, E); },
             [&](int64_t row, const Position& at, float* dweight) {
                 const int64_t start = row * E;
                 float* const dsum = call.dsum + start;
                 norm_backward_row<FIXED>(x + start, dx ? dx + start : dx, dnormed + start, E, call.stats + 2 * row, a.weight,
                                          dweight, dweight + E, dsum);
                 drop_row(a.threshold, a.scale, at, E, [&](int64_t j) { return load(dsum + j); },
                          [&](int64_t j, vec v) { store(dsum + j, v); });
             });
    add_pieces(call.pieces, a.rows, SAT_PIECE, 2 * E, a.threads, call.dparameters);
}

// out [E] = sum of the rows `order[begin .. end)` of dsum, in that order.
SAT_INLINE void sum_rows(const float* dsum, const int64_t* order, int64_t begin, int64_t end, int64_t E, float* out) {
    for (int64_t i = 0; i < E; i += W) store(out + i, vec{});
    for (int64_t k = begin; k < end; ++k) add_into(out, dsum + order[k] * E, E);
}

// dwords [V, E], dpositions [N, E] (may be null) from dsum [rows, E].
int tables_backward(const SatEmbedNormBackward& call) {
    const SatNorm& a = call.norm;
    const int64_t E = a.features, vocabulary = call.vocabulary, *const ids = call.ids;
    const float* const dsum = call.dsum;
    float *const dwords = call.dwords, *const dpositions = call.dpositions;
    if (dpositions) {
        spread(a.threads, a.length, [&](int64_t token) {
            float* out = dpositions + token * E;
            for (int64_t i = 0; i < E; i += W) store(out + i, vec{});
            for (int64_t row = token; row < a.rows; row += a.length) add_into(out, dsum + row * E, E);
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
void gelu_dropout(const SatGelu& a, const T*) {
    const T *const x = static_cast<const T*>(a.x), *const grad = static_cast<const T*>(a.grad);
    T* const out = static_cast<T*>(a.out);
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
void mean(const SatMean& a, const T*) {
    const int64_t N = a.length, E = a.features;
    spread(a.threads, a.examples, [&](int64_t example) {
        float* sum = static_cast<float*>(a.to) + example * E;
        for (int64_t i = 0; i < E; ++i) sum[i] = 0.0f;
        for (int64_t row = example * N; row < (example + 1) * N; ++row)
            if (a.mask[row]) add_into(sum, static_cast<const T*>(a.from) + row * E, E);
        for (int64_t i = 0; i < E; ++i) sum[i] /= static_cast<float>(N);
    });
}

template <class T>
void mean_backward(const SatMean& a, const T*) {
    const int64_t N = a.length, E = a.features;
    spread(a.threads, a.examples, [&](int64_t example) {
        T share[SAT_MAX_FEATURES];
        const float* dmean = static_cast<const float*>(a.from) + example * E;
        for (int64_t i = 0; i < E; i += W) store(share + i, load(dmean + i) / static_cast<float>(N));
        for (int64_t row = example * N; row < (example + 1) * N; ++row) {
            T* to = static_cast<T*>(a.to) + row * E;
            if (a.mask[row])
                memcpy(to, share, E * sizeof(T));
            else
                memset(to, 0, E * sizeof(T));
        }
    });
}

}    // namespace

// ---- the operations -----------------------------------------------------------------------------

int add_norm(const SatAddNorm& call) {
    return with_types(call.norm, [&](auto width, auto stream, auto branch, auto normed) {
        add_norm<decltype(width)::value>(call, stream, branch, normed);
    });
}

int add_norm_backward(const SatAddNormBackward& call) {
    return with_types(call.norm, [&](auto width, auto stream, auto branch, auto normed) {
        add_norm_backward<decltype(width)::value>(call, stream, branch, normed);
    });
}

int embed_norm(const SatEmbedNorm& call) {
    for (int64_t row = 0; row < call.norm.rows; ++row)
        if (call.ids[row] < 0 || call.ids[row] >= call.vocabulary) return SAT_ID_OUT_OF_RANGE;
    return with_types(call.norm, [&](auto width, auto stream, auto, auto normed) {
        embed_norm<decltype(width)::value>(call, stream, normed);
    });
}

int embed_norm_backward(const SatEmbedNormBackward& call) {
    const int status = with_types(call.norm, [&](auto width, auto stream, auto, auto normed) {
        embed_norm_backward<decltype(width)::value>(call, stream, normed);
    });
    return status == SAT_OK ? tables_backward(call) : status;
}

int gelu(const SatGelu& call) {
    return with_type(call.type, [&](auto x) { call.grad ? gelu_dropout<true>(call, x) : gelu_dropout<false>(call, x); });
}

int mean(const SatMean& call) {
    return with_type(call.type, [&](auto x) { mean(call, x); });
}

int mean_backward(const SatMean& call) {
    return with_type(call.type, [&](auto x) { mean_backward(call, x); });
}

}    // namespace SAT_ISA_NAMESPACE
