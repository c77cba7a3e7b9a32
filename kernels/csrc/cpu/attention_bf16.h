// Block-sparse attention in bf16, written once for the instruction sets that multiply it.
//
// As in attention_kernel.h the unit of work is a tile of queries by keys, its scores are held transposed (vector lanes are
// queries), the first sweep takes exp2 of the raw scores, and a row whose sum leaves the safe range is done again with its
// true maximum. What differs: operands are bf16, every sum is fp32, and an Engine takes the products
//
//     C[r][n] = sum_k A[r][2k] B[2k][n] + A[r][2k + 1] B[2k + 1][n]
//
// with A one 4-byte pair after another and B as [k][n] pairs, a pair holding rows 2k and 2k + 1. vdpbf16ps (a broadcast pair of
// A times a vector of B) and tdpbf16ps (whole tiles) read the same memory, so an engine is a few loops:
//
//     S[j][i] = sum_c K[j][c] Q[i][c]            A: K where it is           B: Q, transposed
//     dP[j][i] = sum_c V[j][c] dO[i][c]          A: V where it is           B: dO, transposed
//     O[i][c] += sum_j P[j][i] V[j][c]           A: pairs of P, [j/2][i]    B: pairs of rows of V
//     dQ[i][c] += sum_j dS[j][i] K[j][c]         A: pairs of dS, [j/2][i]   B: pairs of rows of K
//     dV[j][c] += sum_i P[j][i] dO[i][c]         A: rows of P               B: pairs of rows of dO
//     dK[j][c] += sum_i dS[j][i] Q[i][c]         A: rows of dS              B: pairs of rows of Q
//
// The scale is applied to fp32 numbers only. The denominator sums the rounded probabilities, those that meet V.
//
// Shape letters as in attention.h; T, the side of a tile, is 32 or 16; c is an index into d.
#pragma once

#include "attention_common.h"

static_assert(SAT_WIDTH == 16, "pairs of bf16 are made with AVX-512");

namespace SAT_ISA_NAMESPACE {
namespace {

typedef uvec pairs;    // 16 pairs of bf16, the first of a pair in the low half
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

// Whether unnormalised sums keep full precision: all of them within [1 / SAFE_SUM, SAFE_SUM].
SAT_INLINE bool safe(vec total) {
    return (_mm512_cmp_ps_mask(total, splat(1 / SAFE_SUM), _CMP_GT_OQ) &
            _mm512_cmp_ps_mask(total, splat(SAFE_SUM), _CMP_LT_OQ)) == 0xffff;
}

// Lane n: sum of x[n].
SAT_INLINE vec sums(vec (&x)[W]) {
    transpose(x);
    for (int step = W / 2; step; step /= 2)
        SAT_UNROLL(8)
        for (int r = 0; r < step; ++r) x[r] += x[r + step];
    return x[0];
}

// ---- operands ----

// A factor A: the pair (row, k) is at data + row * row_bytes + k * pair_bytes.
struct RowFactor {    // rows of bf16
    const char* data;
    long row_bytes;
    static constexpr long pair_bytes = 4;
    RowFactor(const void* p, long stride) : data(static_cast<const char*>(p)), row_bytes(stride * 2) {}
};

template <int COLUMNS>
struct PairFactor {    // pairs [k][COLUMNS], so that its rows are columns here
    const char* data;
    static constexpr long row_bytes = 4, pair_bytes = 4 * COLUMNS;
    explicit PairFactor(const uint32_t* p) : data(reinterpret_cast<const char*>(p)) {}
};

// Rows of bf16 with unit column stride.
struct Rows {
    const bf16* data;
    long stride;
    const bf16* row(long i) const { return data + i * stride; }
    RowFactor factor() const { return {data, stride}; }
};

// Rows [first, first + count) of one head: in place where their column stride is 1, else copied to `scratch`.
Rows rows_of(const SatTensor& t, const char* head, long first, int count, int d, bf16* scratch) {
    const bf16* p = reinterpret_cast<const bf16*>(head) + first * t.row;
    if (t.column == 1) return {p, t.row};
    for (int i = 0; i < count; ++i)
        for (int c = 0; c < d; ++c) scratch[i * d + c] = p[i * t.row + c * t.column];
    return {scratch, d};
}

// Writes scratch[i][c] * factor[i] to rows [first, first + count) of a head.
void write_rows(const SatTensor& t, const char* head, long first, int count, int d, const float* scratch,
                const float* factor) {
    for (int i = 0; i < count; ++i) {
        bf16* to = const_cast<bf16*>(reinterpret_cast<const bf16*>(head)) + (first + i) * t.row;
        const float* from = scratch + i * d;
        int c = 0;
        for (; c + 2 * W <= d; c += 2 * W)
            store_pairs(to + c, rounded(load(from + c) * factor[i], load(from + c + W) * factor[i]));
        if (c < d) {
            const pairs half = rounded(load(from + c) * factor[i], vec{});
            memcpy(to + c, &half, 2 * W);
        }
    }
}

// Pairs of columns, transposed, in tiles of T rows: packed[tile][c / 2][i] = (x[i][c], x[i][c + 1]).
template <int T>
SAT_INLINE void pack_columns(const Rows& rows, int count, int d, uint32_t* packed) {
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

// Pairs of rows: packed[i / 2][c] = (x[i][c], x[i + 1][c]).
SAT_INLINE void pack_rows(const Rows& rows, int count, int d, uint32_t* packed) {
    for (int i = 0; i < count; i += 2, packed += d) {
        const bf16 *even = rows.row(i), *odd = rows.row(i + 1);
        int c = 0;
        for (; c + 2 * W <= d; c += 2 * W) {
            const pairs a = load_pairs(even + c), b = load_pairs(odd + c);
            store_pairs(packed + c, interleave<0>(a, b));
            store_pairs(packed + c + W, interleave<16>(a, b));
        }
        if (c < d) {
            pairs both;
            memcpy(&both, even + c, 2 * W);
            memcpy(reinterpret_cast<char*>(&both) + 2 * W, odd + c, 2 * W);
            store_pairs(packed + c, interleave(both));
        }
    }
}

// ---- fetching ahead ----

// Rows that will be read or written soon. They come from memory while something else is computed: no hardware prefetcher
// knows the layout, and a burst of prefetches would wait for the few misses that a core can have under way.
class Ahead {
  public:
    // Rows [first, first + count) of a head.
    void expect(const SatTensor& t, const char* head, long first, int count, int d, bool written = false) {
        if (last_ == CAPACITY) return;    // it is a hint
        rows_ += count;
        pieces_[last_++] = {head + first * t.row * 2, t.row * 2, count, d * 2, written};
    }
    // The rest is to be fetched within the next `calls` calls.
    void within(int calls) { share_ = (rows_ + calls - 1) / calls; }
    SAT_INLINE void operator()() {
        for (int left = share_; left > 0 && first_ < last_;) {
            Piece& piece = pieces_[first_];
            const int n = piece.rows < left ? piece.rows : left;
            for (int i = 0; i < n; ++i, piece.address += piece.stride)
                for (int byte = 0; byte < piece.bytes; byte += 64)
                    if (piece.written)
                        __builtin_prefetch(piece.address + byte, 1);
                    else
                        __builtin_prefetch(piece.address + byte);
            left -= n, rows_ -= n, piece.rows -= n;
            if (!piece.rows) ++first_;
        }
        if (first_ == last_) first_ = last_ = 0;
    }

  private:
    struct Piece {
        const char* address;
        long stride;
        int rows, bytes;
        bool written;
    };
    static constexpr int CAPACITY = 16;
    Piece pieces_[CAPACITY];
    int first_ = 0, last_ = 0, rows_ = 0, share_ = 0;
};

// ---- forward ----

// An Engine<WIDE> multiplies. WIDE: every depth is a multiple of 16 pairs, else of 8. It has
//     Session                                                    what a thread holds while it multiplies
//     panel<ROWS, NV>(pairs, A, B, columns of B, emit)           calls emit(row, C[NR][NV]) for NR rows (even) at a time
//     panels<ROWS, NV>(pairs, A, B, A', B', columns, emit)       emit(row, C[NR][NV], C'[NR][NV])
//     add<ROWS>(pairs, A, B, C, columns, fresh, pause)           C += A B, or C = A B where it is fresh, [ROWS][columns];
//                                                                calls pause() now and then
template <template <bool> class Engines, int D, int T>
struct Kernel {
    using Engine = Engines<D && T == 32>;
    static constexpr int NV = T / W;    // vectors of queries in a tile
    const SatAttention& call;
    const int d;
    const int bs;
    const long nb;

    explicit Kernel(const SatAttention& c)
        : call(c), d(D ? D : static_cast<int>(c.d)), bs(static_cast<int>(c.bs)), nb(c.N / c.bs) {}

    const uint8_t* real_of(long b) const { return call.real ? call.real + b * call.N : nullptr; }

    struct Forward {
        typename Engine::Session session;
        mutable Ahead ahead;
        bf16 *rows, *keys, *values;     // copies of strided inputs
        uint32_t* qt;                   // [bs / T][d / 2][T]
        uint32_t* v;                    // [T / 2][d]
        uint32_t* p;                    // [T / 2][T]
        float* o;                       // [bs][d]
        float *reference, *total;       // [bs]
        static size_t size(int d) {
            return 4 * (MAX_BLOCK * d / 2 * 4 + T * d / 2 * 3 + T * T / 2 + 2 * MAX_BLOCK);
        }
        Forward(Scratch& s, int d)
            : rows((bf16*)s.take(MAX_BLOCK * d / 2)), keys((bf16*)s.take(T * d / 2)), values((bf16*)s.take(T * d / 2)),
              qt((uint32_t*)s.take(MAX_BLOCK * d / 2)), v((uint32_t*)s.take(T * d / 2)), p((uint32_t*)s.take(T * T / 2)),
              o(s.take(MAX_BLOCK * d)), reference(s.take(MAX_BLOCK)), total(s.take(MAX_BLOCK)) {}
    };

    // p = exp2(scale k_j . q_i - reference[i]) in pairs of j, zero at padded keys; adds the sums over j to total[i].
    template <bool PADDED>
    static __attribute__((noinline)) void exp_scores(int d_, const Rows& k, const uint32_t* qt, float scale,
                                                     const float* reference, const uint8_t* real, uint32_t* p,
                                                     float* total, Ahead& ahead) {
        const int dim = D ? D : d_;
        // The exponentials of one group of rows overlap with the products of the next.
        Engine::template panel<T, NV>(dim / 2, k.factor(), qt, T, [&](int row, auto& acc) {
            constexpr int NR = sizeof(acc) / sizeof(acc[0]);
            ahead();
            SAT_UNROLL(16)
            for (int v = 0; v < NV; ++v) {
                const vec shift = load(reference + v * W);
                vec sum = load(total + v * W);
                SAT_UNROLL(16)
                for (int r = 0; r < NR; r += 2) {
                    vec x = exp2_rough<3>(acc[r][v] * scale - shift);
                    vec y = exp2_rough<3>(acc[r + 1][v] * scale - shift);
                    if (PADDED && !real[row + r]) x = vec{};
                    if (PADDED && !real[row + r + 1]) y = vec{};
                    const pairs both = interleave(rounded(x, y));
                    sum = dot2(sum, both, splat_pair(ONES));
                    store_pairs(p + (row + r) / 2 * T + v * W, both);
                }
                store(total + v * W, sum);
            }
        });
    }

    // top[i] = max over real keys of scale k_j . q_i and top[i].
    static __attribute__((noinline)) void max_scores(int d_, const Rows& k, const uint32_t* qt, float scale,
                                                     const uint8_t* real, float* top) {
        const int dim = D ? D : d_;
        Engine::template panel<T, NV>(dim / 2, k.factor(), qt, T, [&](int row, auto& acc) {
            constexpr int NR = sizeof(acc) / sizeof(acc[0]);
            for (int r = 0; r < NR; ++r)
                if (!real || real[row + r])
                    for (int v = 0; v < NV; ++v) store(top + v * W, max(load(top + v * W), acc[r][v] * scale));
        });
    }

    static __attribute__((noinline)) void add_values(int d_, const uint32_t* p, const uint32_t* v, float* o, bool fresh, Ahead& ahead) {
        const int dim = D ? D : d_;
        Engine::template add<T>(T / 2, PairFactor<T>(p), v, o, dim, fresh, ahead);
    }

    // A row of blocks of one head; none where r is nb or beyond.
    struct Place {
        long b, h, r;
    };

    // Calls use(first, real) for each tile of keys in `columns` that has a real key, and has the next one fetched within
    // `calls` calls of ahead(). `next` is the row of blocks that comes after this one.
    template <class Use>
    SAT_INLINE void each_tile(const Blocks& columns, const Place& at, const Place& next, int calls, Ahead& ahead,
                              Use use) const {
        const uint8_t* real = real_of(at.b);
        auto expect = [&](const Place& place, long first) {
            ahead.expect(call.key, head_of(call.key, call.type, place.b, place.h), first, T, d);
            ahead.expect(call.value, head_of(call.value, call.type, place.b, place.h), first, T, d);
        };
        for (int n = 0; n < columns.count; ++n)
            for (int t = 0; t < bs; t += T) {
                const long first = static_cast<long>(columns[n]) * bs + t;
                if (t + T < bs)
                    expect(at, first + T);
                else if (n + 1 < columns.count)
                    expect(at, static_cast<long>(columns[n + 1]) * bs);
                else if (next.r < nb) {
                    const Blocks others = blocks_of(call.row_offsets, call.row_columns, next.r, nb);
                    if (others.count) expect(next, static_cast<long>(others[0]) * bs);
                }
                ahead.within(calls);
                const KeysState state = state_of(real ? real + first : nullptr, T);
                if (state != NO_KEY) use(first, state == ALL_KEYS ? nullptr : real + first);
            }
    }

    void forward_row(const Place& at, const Place& next, const Forward& s) const {
        const long b = at.b, h = at.h, r = at.r;
        const char* q_head = head_of(call.query, call.type, b, h);
        const char* k_head = head_of(call.key, call.type, b, h);
        const char* v_head = head_of(call.value, call.type, b, h);
        const Blocks columns = blocks_of(call.row_offsets, call.row_columns, r, nb);
        const long num_pruned = call.pruned_zero ? (nb - columns.count) * bs : 0;
        const float scale = call.scale * LOG2E;

        pack_columns<T>(rows_of(call.query, q_head, r * bs, bs, d, s.rows), bs, d, s.qt);
        s.ahead.expect(call.out, head_of(call.out, call.type, b, h), r * bs, bs, d, true);
        if (next.r < nb) s.ahead.expect(call.query, head_of(call.query, call.type, next.b, next.h), next.r * bs, bs, d);
        bool any_key = false;
        auto sweep = [&] {
            memset(s.total, 0, sizeof(float) * bs);
            any_key = false;
            each_tile(columns, at, next, 4 * bs / T, s.ahead, [&](long first, const uint8_t* real) {
                const bool fresh = !any_key;
                any_key = true;
                const Rows k = rows_of(call.key, k_head, first, T, d, s.keys);
                pack_rows(rows_of(call.value, v_head, first, T, d, s.values), T, d, s.v);
                for (int i = 0; i < bs; i += T) {
                    const uint32_t* qt = s.qt + i * (d / 2);
                    if (real)
                        exp_scores<true>(d, k, qt, scale, s.reference + i, real, s.p, s.total + i, s.ahead);
                    else
                        exp_scores<false>(d, k, qt, scale, s.reference + i, real, s.p, s.total + i, s.ahead);
                    add_values(d, s.p, s.v, s.o + i * d, fresh, s.ahead);
                }
            });
        };
        memset(s.reference, 0, sizeof(float) * bs);
        sweep();
        float* lse = call.lse + (b * call.H + h) * call.N + r * bs;
        if (!any_key) {
            memset(s.o, 0, sizeof(float) * bs * d);
            for (int i = 0; i < bs; ++i) s.total[i] = 0, lse[i] = HUGE_LSE;
        } else {
            if (!add_pruned(s, num_pruned)) {
                for (int i = 0; i < bs; ++i) s.reference[i] = num_pruned ? 0.0f : -__builtin_inff();
                each_tile(columns, at, next, 1, s.ahead, [&](long first, const uint8_t* real) {
                    const Rows k = rows_of(call.key, k_head, first, T, d, s.keys);
                    for (int i = 0; i < bs; i += T) max_scores(d, k, s.qt + i * (d / 2), scale, real, s.reference + i);
                });
                sweep();
                add_pruned(s, num_pruned);
            }
            for (int i = 0; i < bs; i += W) {
                const vec total = load(s.total + i);
                store(lse + i, log2(total) + load(s.reference + i));
                store(s.total + i, 1.0f / total);
            }
        }
        write_rows(call.out, head_of(call.out, call.type, b, h), r * bs, bs, d, s.o, s.total);
    }

    // Adds the pruned logits to the sums; false if one lies outside the range where they are exact.
    bool add_pruned(const Forward& s, long num_pruned) const {
        bool exact = true;
        for (int i = 0; i < bs; i += W) {
            vec total = load(s.total + i);
            if (num_pruned) total += exp2(-load(s.reference + i)) * static_cast<float>(num_pruned);
            store(s.total + i, total);
            exact &= safe(total);
        }
        return exact;
    }

    // ---- backward ----

    struct Backward {
        typename Engine::Session session;
        mutable Ahead ahead;
        bf16 *rows, *drows, *orows, *keys, *values;    // copies of strided inputs
        uint32_t *qt, *dot;                            // [bs / T][d / 2][T]
        uint32_t *q, *dout;                            // [bs / 2][d]
        uint32_t* k;                                   // [T / 2][d]
        bf16 *p, *ds;                                  // [T][T], rows are keys
        uint32_t* ds_pairs;                            // [T / 2][T]
        float* dq;                                     // [bs][d]
        float *lse, *delta, *ones, *scales;            // [bs]
        float *dk, *dv;                                // [`accumulated`][d]
        static size_t size(int d, long accumulated) {
            return 4 * (MAX_BLOCK * d / 2 * 9 + T * d / 2 * 3 + T * T / 2 * 3 + 4 * MAX_BLOCK + 2 * accumulated * d);
        }
        Backward(Scratch& s, int d, long accumulated, float scale)
            : rows((bf16*)s.take(MAX_BLOCK * d / 2)), drows((bf16*)s.take(MAX_BLOCK * d / 2)),
              orows((bf16*)s.take(MAX_BLOCK * d / 2)), keys((bf16*)s.take(T * d / 2)), values((bf16*)s.take(T * d / 2)),
              qt((uint32_t*)s.take(MAX_BLOCK * d / 2)), dot((uint32_t*)s.take(MAX_BLOCK * d / 2)),
              q((uint32_t*)s.take(MAX_BLOCK * d / 2)), dout((uint32_t*)s.take(MAX_BLOCK * d / 2)),
              k((uint32_t*)s.take(T * d / 2)), p((bf16*)s.take(T * T / 2)), ds((bf16*)s.take(T * T / 2)),
              ds_pairs((uint32_t*)s.take(T * T / 2)), dq(s.take(MAX_BLOCK * d)), lse(s.take(MAX_BLOCK)),
              delta(s.take(MAX_BLOCK)), ones(s.take(MAX_BLOCK)), scales(s.take(MAX_BLOCK)),
              dk(s.take(accumulated * d)), dv(s.take(accumulated * d)) {
            for (int i = 0; i < MAX_BLOCK; ++i) ones[i] = 1.0f, scales[i] = scale;
        }
    };

    // Packs what one row of blocks contributes.
    void load_row(const Place& at, const Place& next, const Backward& s) const {
        const long b = at.b, h = at.h, r = at.r;
        const SatTensor* const inputs[] = {&call.query, &call.dout, &call.out};
        const Rows q = rows_of(call.query, head_of(call.query, call.type, b, h), r * bs, bs, d, s.rows);
        const Rows dout = rows_of(call.dout, head_of(call.dout, call.type, b, h), r * bs, bs, d, s.drows);
        const Rows out = rows_of(call.out, head_of(call.out, call.type, b, h), r * bs, bs, d, s.orows);
        pack_columns<T>(q, bs, d, s.qt);
        pack_columns<T>(dout, bs, d, s.dot);
        pack_rows(q, bs, d, s.q);
        pack_rows(dout, bs, d, s.dout);
        if (next.r < nb)
            for (const SatTensor* t : inputs)
                s.ahead.expect(*t, head_of(*t, call.type, next.b, next.h), next.r * bs, bs, d);
        memcpy(s.lse, call.lse + (b * call.H + h) * call.N + r * bs, sizeof(float) * bs);
        for (int i = 0; i < bs; i += W) {
            vec products[W];
            for (int n = 0; n < W; ++n) {
                products[n] = vec{};
                const bf16 *x = dout.row(i + n), *y = out.row(i + n);
                int c = 0;
                for (; c + 2 * W <= d; c += 2 * W) products[n] = dot2(products[n], load_pairs(x + c), load_pairs(y + c));
                if (c < d)
                    products[n] = dot2(products[n], reinterpret_cast<pairs>(_mm512_maskz_loadu_ps(0xff, x + c)),
                                       reinterpret_cast<pairs>(_mm512_maskz_loadu_ps(0xff, y + c)));
            }
            store(s.delta + i, sums(products));
        }
    }

    // p = exp2(scale k . q - lse), zero at padded keys; ds = p * (v . do - delta), still without the factor `scale`.
    template <bool PADDED>
    static __attribute__((noinline)) void score_gradients(int d_, const Rows& k, const Rows& v, const uint32_t* qt,
                                                          const uint32_t* dot, float scale, const float* lse,
                                                          const float* delta, const uint8_t* real, bf16* p, bf16* ds,
                                                          uint32_t* ds_pairs, Ahead& ahead) {
        const int dim = D ? D : d_;
        Engine::template panels<T, NV>(dim / 2, k.factor(), qt, v.factor(), dot, T, [&](int row, auto& s, auto& dp) {
            constexpr int NR = sizeof(s) / sizeof(s[0]);
            ahead();
            SAT_UNROLL(16)
            for (int r = 0; r < NR; ++r)
                SAT_UNROLL(16)
                for (int n = 0; n < NV; ++n) {
                    s[r][n] = exp2_rough<3>(s[r][n] * scale - load(lse + n * W));
                    if (PADDED && !real[row + r]) s[r][n] = vec{};
                    dp[r][n] = s[r][n] * (dp[r][n] - load(delta + n * W));
                }
            SAT_UNROLL(16)
            for (int r = 0; r < NR; r += 2) {
                bf16 *to_p = p + (row + r) * T, *to_ds = ds + (row + r) * T;
                uint32_t* to_pairs = ds_pairs + (row + r) / 2 * T;
                if constexpr (NV == 2) {
                    store_pairs(to_p, rounded(s[r][0], s[r][1]));
                    store_pairs(to_p + T, rounded(s[r + 1][0], s[r + 1][1]));
                    const pairs even = rounded(dp[r][0], dp[r][1]), odd = rounded(dp[r + 1][0], dp[r + 1][1]);
                    store_pairs(to_ds, even);
                    store_pairs(to_ds + T, odd);
                    store_pairs(to_pairs, interleave<0>(even, odd));
                    store_pairs(to_pairs + W, interleave<16>(even, odd));
                } else {    // two rows fill a vector
                    static_assert(NV == 1, "a tile is 16 or 32 wide");
                    store_pairs(to_p, rounded(s[r][0], s[r + 1][0]));
                    const pairs both = rounded(dp[r][0], dp[r + 1][0]);
                    store_pairs(to_ds, both);
                    store_pairs(to_pairs, interleave(both));
                }
            }
        });
    }

    // dk[j][c] += sum_i p[j][i] q[i][c]
    static __attribute__((noinline)) void add_keys(int d_, const bf16* p, const uint32_t* q, float* dk, Ahead& ahead) {
        const int dim = D ? D : d_;
        Engine::template add<T>(T / 2, RowFactor(p, T), q, dk, dim, false, ahead);
    }

    // One tile of keys against one row of blocks.
    template <bool DQ, bool DKV>
    SAT_INLINE void backward_tile(const Rows& k, const Rows& v, const uint8_t* real, float* dk, float* dv, bool fresh,
                                  const Backward& s) const {
        if (DQ) pack_rows(k, T, d, s.k);
        for (int i = 0; i < bs; i += T) {
            const uint32_t *qt = s.qt + i * (d / 2), *dot = s.dot + i * (d / 2);
            const float scale = call.scale * LOG2E;
            if (real)
                score_gradients<true>(d, k, v, qt, dot, scale, s.lse + i, s.delta + i, real, s.p, s.ds, s.ds_pairs, s.ahead);
            else
                score_gradients<false>(d, k, v, qt, dot, scale, s.lse + i, s.delta + i, real, s.p, s.ds, s.ds_pairs, s.ahead);
            if (DKV) {
                add_keys(d, s.p, s.dout + i / 2 * d, dv, s.ahead);
                add_keys(d, s.ds, s.q + i / 2 * d, dk, s.ahead);
            }
            if (DQ) add_values(d, s.ds_pairs, s.k, s.dq + i * d, fresh, s.ahead);
        }
    }

    // Row r of blocks: dQ, and (where one thread owns the head) its share of dK and dV, [N][d].
    template <bool DKV>
    void backward_row(const Place& at, const Place& next, float* dk, float* dv, const Backward& s) const {
        const long b = at.b, h = at.h, r = at.r;
        const char* k_head = head_of(call.key, call.type, b, h);
        const char* v_head = head_of(call.value, call.type, b, h);
        const Blocks columns = blocks_of(call.row_offsets, call.row_columns, r, nb);
        bool any_key = false;
        s.ahead.expect(call.dquery, head_of(call.dquery, call.type, b, h), r * bs, bs, d, true);
        if (columns.count) {
            load_row(at, next, s);
            each_tile(columns, at, next, 10 * bs / T, s.ahead, [&](long first, const uint8_t* real) {
                const Rows k = rows_of(call.key, k_head, first, T, d, s.keys);
                const Rows v = rows_of(call.value, v_head, first, T, d, s.values);
                backward_tile<true, DKV>(k, v, real, dk + first * d, dv + first * d, !any_key, s);
                any_key = true;
            });
        }
        if (!any_key) memset(s.dq, 0, sizeof(float) * bs * d);
        write_rows(call.dquery, head_of(call.dquery, call.type, b, h), r * bs, bs, d, s.dq, s.scales);
    }

    // One thread does heads [first, first + count) of an example, in turns.
    void backward_heads(long b, long first, long count, const Backward& s) const {
        memset(s.dk, 0, sizeof(float) * count * call.N * d);
        memset(s.dv, 0, sizeof(float) * count * call.N * d);
        for (long r = 0; r < nb; ++r)
            for (long n = 0; n < count; ++n) {
                const Place next = {b, first + (n + 1) % count, r + (n + 1) / count};
                backward_row<true>({b, first + n, r}, next, s.dk + n * call.N * d, s.dv + n * call.N * d, s);
            }
        for (long r = 0; r < nb; ++r)
            for (long n = 0; n < count; ++n) {
                const char* dk_head = head_of(call.dkey, call.type, b, first + n);
                const char* dv_head = head_of(call.dvalue, call.type, b, first + n);
                s.ahead.expect(call.dkey, dk_head, (r + 1) % nb * bs, bs, d, true);
                s.ahead.expect(call.dvalue, dv_head, (r + 1) % nb * bs, bs, d, true);
                s.ahead.within(1);
                s.ahead();
                const long offset = (n * call.N + r * bs) * d;
                write_rows(call.dkey, dk_head, r * bs, bs, d, s.dk + offset, s.scales);
                write_rows(call.dvalue, dv_head, r * bs, bs, d, s.dv + offset, s.ones);
            }
    }

    // Column c of blocks: dK and dV alone, when the heads are too few to give every thread one.
    void backward_column(long b, long h, long c, const Backward& s) const {
        const char* k_head = head_of(call.key, call.type, b, h);
        const char* v_head = head_of(call.value, call.type, b, h);
        memset(s.dk, 0, sizeof(float) * bs * d);
        memset(s.dv, 0, sizeof(float) * bs * d);
        const Blocks rows = blocks_of(call.column_offsets, call.column_rows, c, nb);
        const int32_t column = static_cast<int32_t>(c);
        for (int n = 0; n < rows.count; ++n) {
            load_row({b, h, rows[n]}, {b, h, n + 1 < rows.count ? rows[n + 1] : nb}, s);
            each_tile({&column, 1}, {b, h, nb}, {b, h, nb}, 8 * bs / T, s.ahead, [&](long first, const uint8_t* real) {
                const Rows k = rows_of(call.key, k_head, first, T, d, s.keys);
                const Rows v = rows_of(call.value, v_head, first, T, d, s.values);
                const long offset = (first - c * bs) * d;
                backward_tile<false, true>(k, v, real, s.dk + offset, s.dv + offset, false, s);
            });
        }
        write_rows(call.dkey, head_of(call.dkey, call.type, b, h), c * bs, bs, d, s.dk, s.scales);
        write_rows(call.dvalue, head_of(call.dvalue, call.type, b, h), c * bs, bs, d, s.dv, s.ones);
    }

    // ---- whole calls ----

    int forward() const {
        const long H = call.H, heads = call.B * H;
        return spread(
            call.threads, heads * nb, static_cast<int>(call.B >= call.threads ? nb * H : 1), Forward::size(d),
            [&](Scratch& scratch) { return Forward(scratch, d); },
            [&](const Forward& s, long i) {
                // The heads of an example lie side by side in memory: one thread takes them in turns.
                const Place at = {i / H / nb, i % H, i / H % nb};
                forward_row(at, {at.b, (at.h + 1) % H, at.r + (at.h + 1) / H}, s);
            });
    }

    int backward() const {
        const long H = call.H, heads = call.B * H;
        // Beyond 2 MiB the sums of all heads leave the cache, and taking heads in turns gains nothing.
        const bool in_cache = 2 * sizeof(float) * H * call.N * d <= (2 << 20);
        const long together = call.B >= call.threads && in_cache ? H : heads >= call.threads ? 1 : 0;
        const long accumulated = together ? together * call.N : bs;
        const size_t size = Backward::size(d, accumulated);
        auto make = [&](Scratch& scratch) { return Backward(scratch, d, accumulated, call.scale); };
        if (together)
            return spread(call.threads, heads / together, 1, size, make, [&](const Backward& s, long i) {
                backward_heads(i * together / H, i * together % H, together, s);
            });
        const int status = spread(call.threads, heads * nb, 1, size, make, [&](const Backward& s, long i) {
            const Place at = {i / nb / H, i / nb % H, i % nb};
            backward_row<false>(at, {at.b, at.h, at.r + 1}, nullptr, nullptr, s);
        });
        if (status != SAT_OK) return status;
        return spread(call.threads, heads * nb, 1, size, make, [&](const Backward& s, long i) {
            backward_column(i / nb / H, i / nb % H, i % nb, s);
        });
    }
};

// ---- statistics ----

// One task is a row of blocks of one group of examples, tile of queries by tile. The probabilities of a tile and one head,
// [N][T] and fp32, await their sum; they are added to the tile's mean while the next head's replace them, under the
// products. `bs` here only pools: it is as large as a tile or a multiple of it.
template <template <bool> class Engines, int D, int T>
struct Statistics {
    using Tile = Kernel<Engines, D, T>;
    using Engine = typename Tile::Engine;
    static constexpr int NV = T / W;
    const SatStatistics& call;
    const int d;
    const int bs;
    const long N, nb;
    const long heads;    // of a group: its examples times H

    explicit Statistics(const SatStatistics& c)
        : call(c), d(D ? D : static_cast<int>(c.d)), bs(static_cast<int>(c.bs)), N(c.N), nb(c.N / c.bs),
          heads(c.B / c.groups * c.H) {}

    struct Pieces {
        typename Engine::Session session;
        mutable Ahead ahead;
        bf16 *rows, *keys;                     // copies of strided inputs
        uint32_t* qt;                          // [d / 2][T]
        float *p, *mean;                       // [N][T], not where only the pooled sums are wanted
        float* sums;                           // [nb][T] over the keys of a block
        float *reference, *total, *inverse;    // [T]
        float* pooled;                         // [heads][nb] sums over a block
        static size_t size(const Statistics& call) {
            const size_t probs = call.call.mean ? call.N * T : 0;
            return 4 * (T * call.d / 2 * 3 + 2 * probs + call.nb * T + 3 * T + call.heads * call.nb);
        }
        Pieces(Scratch& s, const Statistics& call)
            : rows((bf16*)s.take(T * call.d / 2)), keys((bf16*)s.take(T * call.d / 2)),
              qt((uint32_t*)s.take(T * call.d / 2)), p(s.take(call.call.mean ? call.N * T : 0)),
              mean(s.take(call.call.mean ? call.N * T : 0)), sums(s.take(call.nb * T)), reference(s.take(T)),
              total(s.take(T)), inverse(s.take(T)), pooled(s.take(call.heads * call.nb)) {}
    };

    // Exponentials of scale k_j . q_i - reference[i], zero at padded keys; their sums over j are added to sums[i]. Where they
    // are kept, in p, what stood there is added to the mean.
    template <bool KEPT, bool PADDED>
    static __attribute__((noinline)) void exp_scores(int d_, const Rows& k, float scale, const uint8_t* real, float* p,
                                                     float* mean, float* sums, const Pieces& s) {
        const int dim = D ? D : d_;
        Engine::template panel<T, NV>(dim / 2, k.factor(), s.qt, T, [&](int row, auto& acc) {
            constexpr int NR = sizeof(acc) / sizeof(acc[0]);
            s.ahead();
            SAT_UNROLL(4)
            for (int v = 0; v < NV; ++v) {
                const vec shift = load(s.reference + v * W), inverse = load(s.inverse + v * W);
                vec sum{};
                SAT_UNROLL(16)
                for (int r = 0; r < NR; ++r) {
                    vec x = exp2_rough<4>(acc[r][v] * scale - shift);
                    if (PADDED && !real[row + r]) x = vec{};
                    sum += x;
                    if constexpr (KEPT) {
                        const long place = (row + r) * T + v * W;
                        store(mean + place, load(mean + place) + load(p + place) * inverse);
                        store(p + place, x);
                    }
                }
                store(sums + v * W, load(sums + v * W) + sum);
            }
        });
    }

    // Calls use(first, state) for each tile of keys.
    template <class Use>
    SAT_INLINE void each_tile(const uint8_t* real, Use use) const {
        for (long first = 0; first < N; first += T) use(first, state_of(real ? real + first : nullptr, T));
    }

    // Exponentials to p, their sums over each block to sums, over all keys to total. False if out of the safe range.
    template <bool KEPT>
    bool sweep(const char* k_head, const uint8_t* real, const Pieces& s) const {
        const float scale = call.scale * LOG2E;
        memset(s.sums, 0, sizeof(float) * nb * T);
        each_tile(real, [&](long first, KeysState state) {
            float *p = s.p + (KEPT ? first * T : 0), *mean = s.mean + (KEPT ? first * T : 0);
            float* sums = s.sums + first / bs * T;
            if (state == NO_KEY) {
                if (KEPT) {
                    add_probs(first, s);
                    memset(p, 0, sizeof(float) * T * T);
                }
                return;
            }
            if (first + T < N) s.ahead.expect(call.key, k_head, first + T, T, d);
            s.ahead.within(2);
            const Rows k = rows_of(call.key, k_head, first, T, d, s.keys);
            if (state == ALL_KEYS)
                exp_scores<KEPT, false>(d, k, scale, nullptr, p, mean, sums, s);
            else
                exp_scores<KEPT, true>(d, k, scale, real + first, p, mean, sums, s);
        });
        bool exact = true;
        for (int v = 0; v < NV; ++v) {
            vec total{};
            for (long c = 0; c < nb; ++c) total += load(s.sums + c * T + v * W);
            store(s.total + v * W, total);
            exact &= safe(total);
        }
        return exact;
    }

    // One head against the tile of queries that starts at `row`.
    template <bool KEPT>
    void head(long b, long h, long row, float* pooled, const Pieces& s) const {
        const uint8_t* real = call.real ? call.real + b * N : nullptr;
        if (real && !memchr(real, 1, N)) return;    // p is 0
        const char* q_head = head_of(call.query, call.type, b, h);
        const char* k_head = head_of(call.key, call.type, b, h);
        pack_columns<T>(rows_of(call.query, q_head, row, T, d, s.rows), T, d, s.qt);
        memset(s.reference, 0, sizeof(float) * T);
        if (!sweep<KEPT>(k_head, real, s)) {
            for (int i = 0; i < T; ++i) s.reference[i] = -__builtin_inff();
            each_tile(real, [&](long first, KeysState state) {
                const uint8_t* some = state == SOME_KEYS ? real + first : nullptr;
                const Rows k = rows_of(call.key, k_head, first, T, d, s.keys);
                if (state != NO_KEY) Tile::max_scores(d, k, s.qt, call.scale * LOG2E, some, s.reference);
            });
            // What the head before left is in the mean already.
            if (KEPT) memset(s.p, 0, sizeof(float) * N * T);
            sweep<KEPT>(k_head, real, s);
        }
        for (int v = 0; v < NV; ++v) store(s.inverse + v * W, 1.0f / load(s.total + v * W));
        pool<T>(call, b, row, s.sums, s.inverse, pooled);
    }

    // Adds a tile of the probabilities that wait to the mean.
    static void add_probs(long first, const Pieces& s) {
        for (long j = first; j < first + T; ++j)
            for (int v = 0; v < NV; ++v) {
                float* mean = s.mean + j * T + v * W;
                store(mean, load(mean) + load(s.p + j * T + v * W) * load(s.inverse + v * W));
            }
    }

    // Adds the tile's mean, transposed, to rows `row` and following of the group's.
    void write_mean(long group, long row, const Pieces& s) const {
        const float weight = call.weight / static_cast<float>(heads);
        for (int i = 0; i < T; i += W) {
            const vec inverse = load(s.inverse + i);
            for (long j = 0; j < N; j += W) {
                float* mean = call.mean + (group * N + row + i) * N + j;
                vec x[W];
                SAT_UNROLL(16)
                for (int k = 0; k < W; ++k)
                    x[k] = load(s.mean + (j + k) * T + i) + load(s.p + (j + k) * T + i) * inverse;
                transpose(x);
                SAT_UNROLL(16)
                for (int k = 0; k < W; ++k) {
                    __builtin_prefetch(mean + k * N + 8 * W, 0, 2);    // rows 4 KiB apart share a set of L1
                    store(mean + k * N, load(mean + k * N) + x[k] * weight);
                }
            }
        }
    }

    void row_of_blocks(long group, long r, const Pieces& s) const {
        memset(s.pooled, 0, sizeof(float) * heads * nb);
        for (long row = r * bs; row < (r + 1) * bs; row += T) {
            if (call.mean) {
                memset(s.mean, 0, sizeof(float) * N * T);
                memset(s.p, 0, sizeof(float) * N * T);
            }
            memset(s.inverse, 0, sizeof(float) * T);
            for (long n = 0; n < heads; ++n) {
                const long b = group * (call.B / call.groups) + n / call.H, h = n % call.H;
                if (call.mean)
                    head<true>(b, h, row, s.pooled + n * nb, s);
                else
                    head<false>(b, h, row, s.pooled + n * nb, s);
            }
            if (call.mean) write_mean(group, row, s);
        }
        sum_pooled(call, group, r, s.pooled);
    }

    int run() const {
        return spread(
            call.threads, call.groups * nb, 1, Pieces::size(*this), [&](Scratch& s) { return Pieces(s, *this); },
            [&](const Pieces& s, long i) { row_of_blocks(i / nb, i % nb, s); });
    }
};

// Calls run(kernel) with the Kernel (or Statistics) made for the call's head_dim and block_size.
template <template <template <bool> class, int, int> class Made, template <bool> class Engine, class Call, class Run>
int with_kernel(const Call& call, Run run) {
    if (call.bs % 32 == 0) {
        if (call.d == 32) return run(Made<Engine, 32, 32>(call));
        if (call.d == 64) return run(Made<Engine, 64, 32>(call));
        if (call.d == 128) return run(Made<Engine, 128, 32>(call));
        return run(Made<Engine, 0, 32>(call));
    }
    return run(Made<Engine, 0, 16>(call));
}

template <template <bool> class Engine>
int forward_with(const SatAttention& call) {
    return with_kernel<Kernel, Engine>(call, [](const auto& kernel) { return kernel.forward(); });
}

template <template <bool> class Engine>
int backward_with(const SatAttention& call) {
    return with_kernel<Kernel, Engine>(call, [](const auto& kernel) { return kernel.backward(); });
}

template <template <bool> class Engine>
int statistics_with(const SatStatistics& call) {
    return with_kernel<Statistics, Engine>(call, [](const auto& kernel) { return kernel.run(); });
}

}    // namespace
}    // namespace SAT_ISA_NAMESPACE
