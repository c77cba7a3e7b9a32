// Block-sparse attention, written once for every instruction set.
//
// The unit of work is a tile: TI queries by TJ keys of one (batch, head). Its scores are held transposed, [TJ][TI],
// so that vector lanes are queries:
//   - the softmax needs no reduction across lanes, and a padded key is a row that is set to zero;
//   - only Q (and dO) of the row of blocks at hand are repacked as [d][TI]; K and V are read where they are.
// The other factor of every product is broadcast one element at a time:
//     S[j][i] = sum_c K[j][c] Qt[c][i]      dP[j][i] = sum_c V[j][c] dOt[c][i]       lanes: queries
//     O[i][c] += sum_j P[j][i] V[j][c]      dQ[i][c] += sum_j dS[j][i] K[j][c]       lanes: head_dim
//     dV[j][c] += sum_i P[j][i] dO[i][c]    dK[j][c] += sum_i dS[j][i] Q[i][c]       lanes: head_dim
// scale and log2 e are folded into the packed factor. (-lse and -D as starting values of the accumulators would save two
// subtractions, but then all partial sums are as large as they are: twice the error of the gradients.)
//
// The forward pass takes exp2 of the raw scores, without a pass for the maximum: pruned logits are 0, so 0 is the natural
// reference. Rows whose sum leaves the safe range are done again, with their true maximum.
//
// The result has the same bits for any number of threads: every output element is the sum of the same tiles in the same
// order, whether one thread owns a (batch, head) or its rows and columns of blocks are spread over threads.
//
// Shape letters as in attention.h; TI, TJ sides of a tile; c an index into d.
#include "attention_common.h"

namespace SAT_ISA_NAMESPACE {
namespace {

#if SAT_WIDTH == 8 || defined(__SSE2__) && SAT_WIDTH == 4
constexpr int REGISTERS = 16;
#else
constexpr int REGISTERS = 32;
#endif
constexpr int MAX_PANEL = 4;    // vectors side by side in a product's accumulators

// Rows of a product's accumulators: NR * NV of them, NV loaded vectors or one, and NR broadcasts must fit the registers.
constexpr int rows_at_once(int vectors) { return (REGISTERS - 4) / vectors < 12 ? (REGISTERS - 4) / vectors : 12; }

// ---- products ----

// NR x NV accumulators over `depth`, then emit(row, accumulators).
template <int NR, int NV, class Emit>
SAT_INLINE void micro(int row, long depth, const float* a, long a_row, long a_depth, const float* b, long b_depth,
                      Emit& emit) {
    vec acc[NR][NV];
#pragma GCC unroll 16
    for (int r = 0; r < NR; ++r)
#pragma GCC unroll 16
        for (int v = 0; v < NV; ++v) acc[r][v] = vec{};
    a += row * a_row;
#pragma GCC unroll 2
    for (long k = 0; k < depth; ++k) {
        vec x[NR];
#pragma GCC unroll 16
        for (int r = 0; r < NR; ++r) x[r] = splat(a[r * a_row + k * a_depth]);
#pragma GCC unroll 16
        for (int v = 0; v < NV; ++v) {
            vec y = load(b + k * b_depth + v * W);
#pragma GCC unroll 16
            for (int r = 0; r < NR; ++r) acc[r][v] += x[r] * y;
        }
    }
    emit(row, acc);
}

template <int NR, int NV, class Emit>
SAT_INLINE void micro_rest(int rest, int row, long depth, const float* a, long a_row, long a_depth, const float* b,
                           long b_depth, Emit& emit) {
    if constexpr (NR > 0) {
        if (rest == NR)
            micro<NR, NV>(row, depth, a, a_row, a_depth, b, b_depth, emit);
        else
            micro_rest<NR - 1, NV>(rest, row, depth, a, a_row, a_depth, b, b_depth, emit);
    }
}

// C[r][lanes] for ROWS rows and NV vectors: sum_k a[r * a_row + k * a_depth] * b[k * b_depth + lanes].
template <int ROWS, int NV, class Emit>
SAT_INLINE void panel(long depth, const float* a, long a_row, long a_depth, const float* b, long b_depth,
                      Emit emit) {
    constexpr int NR = rows_at_once(NV);
    constexpr int WHOLE = ROWS / NR * NR;
    for (int row = 0; row < WHOLE; row += NR) micro<NR, NV>(row, depth, a, a_row, a_depth, b, b_depth, emit);
    micro_rest<NR - 1, NV>(ROWS - WHOLE, WHOLE, depth, a, a_row, a_depth, b, b_depth, emit);
}

// c[r][lanes] += sum_k a * b over `columns` lanes, a multiple of 16 (and of W).
template <int ROWS, int NV = MAX_PANEL>
SAT_INLINE void add_product(long depth, const float* a, long a_row, long a_depth, const float* b, long b_depth, float* c,
                            long c_row, int columns) {
    int first = 0;
    for (; first + NV * W <= columns; first += NV * W)
        panel<ROWS, NV>(depth, a, a_row, a_depth, b + first, b_depth, [&](int row, auto& acc) {
            constexpr int NR = sizeof(acc) / sizeof(acc[0]);
#pragma GCC unroll 16
            for (int r = 0; r < NR; ++r)
#pragma GCC unroll 16
                for (int v = 0; v < NV; ++v) {
                    float* p = c + (row + r) * c_row + first + v * W;
                    store(p, load(p) + acc[r][v]);
                }
        });
    if constexpr (NV > 1)
        if (first < columns)
            add_product<ROWS, NV - 1>(depth, a, a_row, a_depth, b + first, b_depth, c + first, c_row, columns - first);
}

// ---- tensors ----

// Rows of fp32 with unit column stride.
struct Rows {
    const float* data;
    long stride;
    const float* row(long i) const { return data + i * stride; }
};

// Rows [first, first + count) of one head: in place where they are fp32 with unit stride, else converted to `scratch`.
Rows rows_of(const SatTensor& t, int64_t type, const char* head, long first, int count, int d, float* scratch) {
    if (type == SAT_FLOAT32) {
        const float* p = reinterpret_cast<const float*>(head) + first * t.row;
        if (t.column == 1) return {p, t.row};
        for (int i = 0; i < count; ++i)
            for (int c = 0; c < d; ++c) scratch[i * d + c] = p[i * t.row + c * t.column];
    } else {
        const bf16* p = reinterpret_cast<const bf16*>(head) + first * t.row;
        for (int i = 0; i < count; ++i)
            if (t.column == 1)
                for (int c = 0; c < d; c += W) store(scratch + i * d + c, load(p + i * t.row + c));
            else
                for (int c = 0; c < d; ++c) scratch[i * d + c] = to_float(p[i * t.row + c * t.column]);
    }
    return {scratch, d};
}

// Writes rows scratch[i][c] * factor[i] to rows [first, first + count) of a head.
void write_rows(const SatTensor& t, int64_t type, const char* head, long first, int count, int d, const float* scratch,
                const float* factor) {
    for (int i = 0; i < count; ++i)
        for (int c = 0; c < d; c += W) {
            vec x = load(scratch + i * d + c) * factor[i];
            if (type == SAT_FLOAT32)
                store(const_cast<float*>(reinterpret_cast<const float*>(head)) + (first + i) * t.row + c, x);
            else
                store(const_cast<bf16*>(reinterpret_cast<const bf16*>(head)) + (first + i) * t.row + c, x);
        }
}

// [count][d] -> tiles of [d][TI], times `factor`.
template <int TI>
void pack(Rows rows, int count, int d, float factor, float* packed) {
    for (int i = 0; i < count; i += W) {
        float* tile = packed + i / TI * TI * d + i % TI;
        for (int c = 0; c < d; c += W) {
            vec x[W];
#pragma GCC unroll 16
            for (int r = 0; r < W; ++r) x[r] = load(rows.row(i + r) + c) * factor;
            transpose(x);
#pragma GCC unroll 16
            for (int r = 0; r < W; ++r) store(tile + (c + r) * TI, x[r]);
        }
    }
}

// ---- forward ----

template <int D, int TI, int TJ>
struct Kernel {
    static constexpr int NV = TI / W;    // vectors of queries in a tile
    const SatAttention& call;
    const int d;
    const int bs;
    const long nb;

    explicit Kernel(const SatAttention& c)
        : call(c), d(D ? D : static_cast<int>(c.d)), bs(static_cast<int>(c.bs)), nb(c.N / c.bs) {}

    static_assert(TI % W == 0 && NV <= MAX_PANEL, "a tile is at most one panel wide");

    const uint8_t* real_of(long b) const { return call.real ? call.real + b * call.N : nullptr; }

    // p[j][i] = exp2(k_j . qt_i - reference[i]), zero at padded keys; adds the sums over j to total[i].
    static __attribute__((noinline)) void exp_scores(int d_, const Rows& k, const float* qt, const float* reference,
                                                     const uint8_t* real, float* p, float* total) {
        const int dim = D ? D : d_;
        // The exponentials of one group of rows overlap with the products of the next.
        panel<TJ, NV>(dim, k.data, k.stride, 1, qt, TI, [&](int row, auto& acc) {
            constexpr int NR = sizeof(acc) / sizeof(acc[0]);
#pragma GCC unroll 16
            for (int v = 0; v < NV; ++v) {
                const vec shift = load(reference + v * W);
                vec sum{};
#pragma GCC unroll 16
                for (int r = 0; r < NR; ++r) {
                    vec x = exp2(acc[r][v] - shift);
                    if (real && !real[row + r]) x = vec{};
                    sum += x;
                    store(p + (row + r) * TI + v * W, x);
                }
                store(total + v * W, load(total + v * W) + sum);
            }
        });
    }

    // top[i] = max over real keys of k_j . qt_i and top[i].
    static __attribute__((noinline)) void max_scores(int d_, const Rows& k, const float* qt, const uint8_t* real,
                                                     float* top) {
        const int dim = D ? D : d_;
        panel<TJ, NV>(dim, k.data, k.stride, 1, qt, TI, [&](int row, auto& acc) {
            constexpr int NR = sizeof(acc) / sizeof(acc[0]);
            for (int r = 0; r < NR; ++r)
                if (!real || real[row + r])
                    for (int v = 0; v < NV; ++v) store(top + v * W, max(load(top + v * W), acc[r][v]));
        });
    }

    static __attribute__((noinline)) void add_values(int d_, const Rows& v, const float* p, float* o) {
        const int dim = D ? D : d_;
        add_product<TI>(TJ, p, 1, TI, v.data, v.stride, o, dim, dim);
    }

    struct Forward {
        float *rows, *keys, *values;    // converted inputs
        float* qt;                      // [bs / TI][d][TI]
        float* o;                       // [bs][d]
        float* p;                       // [TJ][TI]
        float *reference, *total;       // [bs]
        static size_t size(int d) {
            return 3 * MAX_BLOCK * d + 2 * TJ * d + TJ * TI + 2 * MAX_BLOCK;
        }
        Forward(Scratch& scratch, int d)
            : rows(scratch.take(MAX_BLOCK * d)), keys(scratch.take(TJ * d)), values(scratch.take(TJ * d)),
              qt(scratch.take(MAX_BLOCK * d)), o(scratch.take(MAX_BLOCK * d)), p(scratch.take(TJ * TI)),
              reference(scratch.take(MAX_BLOCK)), total(scratch.take(MAX_BLOCK)) {}
    };

    template <class Use>
    SAT_INLINE void each_tile(const Blocks& columns, const uint8_t* real, long b, long h, long row, Use use) const {
        each_kept_tile<TJ>(call, columns, real, b, h, row, use);
    }

    void forward_row(long b, long h, long r, const Forward& s) const {
        const char* q_head = head_of(call.query, call.type, b, h);
        const char* k_head = head_of(call.key, call.type, b, h);
        const char* v_head = head_of(call.value, call.type, b, h);
        const uint8_t* real = real_of(b);
        const Blocks columns = blocks_of(call.row_offsets, call.row_columns, r, nb);
        const long num_pruned = call.pruned_zero ? (nb - columns.count) * bs : 0;

        pack<TI>(rows_of(call.query, call.type, q_head, r * bs, bs, d, s.rows), bs, d, call.scale * LOG2E, s.qt);
        if (r + 1 < nb) prefetch_rows(call.query, call.type, q_head, (r + 1) * bs, bs, d);
        bool any_key = false;
        auto sweep = [&] {
            memset(s.o, 0, sizeof(float) * bs * d);
            memset(s.total, 0, sizeof(float) * bs);
            each_tile(columns, real, b, h, r, [&](long first, const uint8_t* mask) {
                any_key = true;
                const Rows k = rows_of(call.key, call.type, k_head, first, TJ, d, s.keys);
                const Rows v = rows_of(call.value, call.type, v_head, first, TJ, d, s.values);
                for (int i = 0; i < bs; i += TI) {
                    exp_scores(d, k, s.qt + i * d, s.reference + i, mask, s.p, s.total + i);
                    add_values(d, v, s.p, s.o + i * d);
                }
            });
        };
        memset(s.reference, 0, sizeof(float) * bs);
        sweep();
        float* lse = call.lse + (b * call.H + h) * call.N + r * bs;
        if (!any_key) {
            for (int i = 0; i < bs; ++i) s.total[i] = 0, lse[i] = HUGE_LSE;
        } else {
            if (!add_pruned(s, num_pruned)) {
                find_maxima(columns, real, b, h, r, num_pruned, s);
                sweep();
                add_pruned(s, num_pruned);
            }
            for (int i = 0; i < bs; i += W) {
                const vec total = load(s.total + i);
                store(lse + i, log2(total) + load(s.reference + i));
                store(s.total + i, 1.0f / total);
            }
        }
        write_rows(call.out, call.type, head_of(call.out, call.type, b, h), r * bs, bs, d, s.o, s.total);
    }

    // Adds the pruned logits to the sums; false if one lies outside the range where they are exact.
    bool add_pruned(const Forward& s, long num_pruned) const {
        bool safe = true;
        for (int i = 0; i < bs; i += W) {
            vec total = load(s.total + i);
            if (num_pruned) total += exp2(-load(s.reference + i)) * static_cast<float>(num_pruned);
            store(s.total + i, total);
            for (int lane = 0; lane < W; ++lane) safe &= total[lane] > 1 / SAFE_SUM && total[lane] < SAFE_SUM;
        }
        return safe;
    }

    __attribute__((noinline)) void find_maxima(const Blocks& columns, const uint8_t* real, long b, long h, long r,
                                               long num_pruned, const Forward& s) const {
        const char* k_head = head_of(call.key, call.type, b, h);
        for (int i = 0; i < bs; ++i) s.reference[i] = num_pruned ? 0.0f : -__builtin_inff();
        each_tile(columns, real, b, h, r, [&](long first, const uint8_t* mask) {
            const Rows k = rows_of(call.key, call.type, k_head, first, TJ, d, s.keys);
            for (int i = 0; i < bs; i += TI) max_scores(d, k, s.qt + i * d, mask, s.reference + i);
        });
    }

    // ---- backward ----

    struct Backward {
        float *rows, *drows, *orows, *keys, *values;    // converted inputs
        float *qt, *dot;                                // [bs / TI][d][TI]
        float* dq;                                      // [bs][d]
        float *p, *ds;                                  // [TJ][TI]
        float *lse, *delta, *ones;          // [bs]
        float *dk, *dv;                                 // [`accumulated`][d], only where outputs are not fp32
        static size_t size(int d, long accumulated) {
            return 6 * MAX_BLOCK * d + 2 * TJ * d + 2 * TJ * TI + 3 * MAX_BLOCK + 2 * accumulated * d;
        }
        Backward(Scratch& scratch, int d, long accumulated)
            : rows(scratch.take(MAX_BLOCK * d)), drows(scratch.take(MAX_BLOCK * d)), orows(scratch.take(MAX_BLOCK * d)),
              keys(scratch.take(TJ * d)), values(scratch.take(TJ * d)), qt(scratch.take(MAX_BLOCK * d)),
              dot(scratch.take(MAX_BLOCK * d)), dq(scratch.take(MAX_BLOCK * d)), p(scratch.take(TJ * TI)),
              ds(scratch.take(TJ * TI)), lse(scratch.take(MAX_BLOCK)), delta(scratch.take(MAX_BLOCK)),
              ones(scratch.take(MAX_BLOCK)), dk(scratch.take(accumulated * d)), dv(scratch.take(accumulated * d)) {
            for (int i = 0; i < MAX_BLOCK; ++i) ones[i] = 1.0f;
        }
    };

    // What one row of blocks contributes: natural rows of Q and dO, and the packed forms.
    struct RowInputs {
        Rows q, dout;
    };

    RowInputs load_row(long b, long h, long r, const Backward& s) const {
        const Rows q = rows_of(call.query, call.type, head_of(call.query, call.type, b, h), r * bs, bs, d, s.rows);
        const Rows dout = rows_of(call.dout, call.type, head_of(call.dout, call.type, b, h), r * bs, bs, d, s.drows);
        const Rows out = rows_of(call.out, call.type, head_of(call.out, call.type, b, h), r * bs, bs, d, s.orows);
        pack<TI>(q, bs, d, call.scale * LOG2E, s.qt);
        pack<TI>(dout, bs, d, call.scale, s.dot);
        const SatTensor* const inputs[] = {&call.query, &call.dout, &call.out};
        if (r + 1 < nb)
            for (const SatTensor* t : inputs)
                prefetch_rows(*t, call.type, head_of(*t, call.type, b, h), (r + 1) * bs, bs, d);
        const float* lse = call.lse + (b * call.H + h) * call.N + r * bs;
        for (int i = 0; i < bs; ++i) {
            vec delta{};
            for (int c = 0; c < d; c += W) delta += load(dout.row(i) + c) * load(out.row(i) + c);
            s.lse[i] = lse[i];
            s.delta[i] = call.scale * sum(delta);
        }
        return {q, dout};
    }

    // p = exp2(k . qt - lse), zero at padded keys; ds = p * (v . dot - delta).
    static __attribute__((noinline)) void score_gradients(int d_, const Rows& k, const Rows& v, const float* qt,
                                                          const float* dot, const float* lse,
                                                          const float* delta, const uint8_t* real, float* p,
                                                          float* ds) {
        const int dim = D ? D : d_;
        auto keep = [](float* to) {
            return [to](int row, auto& acc) {
                constexpr int NR = sizeof(acc) / sizeof(acc[0]);
#pragma GCC unroll 16
                for (int r = 0; r < NR; ++r)
#pragma GCC unroll 16
                    for (int v = 0; v < NV; ++v) store(to + (row + r) * TI + v * W, acc[r][v]);
            };
        };
        panel<TJ, NV>(dim, k.data, k.stride, 1, qt, TI, keep(p));
        panel<TJ, NV>(dim, v.data, v.stride, 1, dot, TI, keep(ds));
        for (int j = 0; j < TJ; ++j)
#pragma GCC unroll 16
            for (int v = 0; v < NV; ++v) {
                vec x = exp2(load(p + j * TI + v * W) - load(lse + v * W));
                if (real && !real[j]) x = vec{};
                store(p + j * TI + v * W, x);
                store(ds + j * TI + v * W, x * (load(ds + j * TI + v * W) - load(delta + v * W)));
            }
    }

    // dk[j][c] += sum_i p[j][i] q[i][c]
    static __attribute__((noinline)) void add_keys(int d_, const float* p, const Rows& q, float* dk, long stride) {
        const int dim = D ? D : d_;
        add_product<TJ>(TI, p, TI, 1, q.data, q.stride, dk, stride, dim);
    }

    // One tile of keys against one row of blocks.
    template <bool DQ, bool DKV>
    SAT_INLINE void backward_tile(const RowInputs& row, const Rows& k, const Rows& v, const uint8_t* mask, float* dk,
                                  float* dv, long stride, const Backward& s) const {
        for (int i = 0; i < bs; i += TI) {
            score_gradients(d, k, v, s.qt + i * d, s.dot + i * d, s.lse + i, s.delta + i, mask, s.p, s.ds);
            if (DKV) {
                add_keys(d, s.p, {row.dout.row(i), row.dout.stride}, dv, stride);
                add_keys(d, s.ds, {row.q.row(i), row.q.stride}, dk, stride);
            }
            if (DQ) add_values(d, k, s.ds, s.dq + i * d);
        }
    }

    // Row r of blocks: dQ, and (where one thread owns the head) its share of dK and dV, [N][d] with row stride `stride`.
    template <bool DKV>
    void backward_row(long b, long h, long r, float* dk, float* dv, long stride, const Backward& s) const {
        const char* k_head = head_of(call.key, call.type, b, h);
        const char* v_head = head_of(call.value, call.type, b, h);
        const Blocks columns = blocks_of(call.row_offsets, call.row_columns, r, nb);
        memset(s.dq, 0, sizeof(float) * bs * d);
        if (columns.count) {
            const RowInputs row = load_row(b, h, r, s);
            each_tile(columns, real_of(b), b, h, r, [&](long first, const uint8_t* mask) {
                const Rows k = rows_of(call.key, call.type, k_head, first, TJ, d, s.keys);
                const Rows v = rows_of(call.value, call.type, v_head, first, TJ, d, s.values);
                backward_tile<true, DKV>(row, k, v, mask, dk + first * stride, dv + first * stride, stride, s);
            });
        }
        write_rows(call.dquery, call.type, head_of(call.dquery, call.type, b, h), r * bs, bs, d, s.dq, s.ones);
    }

    // fp32 outputs are accumulated in place, others in scratch.
    bool in_place() const { return call.type == SAT_FLOAT32; }

    // One thread does a whole (batch, head).
    void backward_head(long b, long h, const Backward& s) const {
        const char* dk_head = head_of(call.dkey, call.type, b, h);
        const char* dv_head = head_of(call.dvalue, call.type, b, h);
        float* dk = in_place() ? (float*)dk_head : s.dk;
        float* dv = in_place() ? (float*)dv_head : s.dv;
        const long stride = in_place() ? call.dkey.row : d;
        for (long j = 0; j < call.N; ++j) {
            memset(dk + j * stride, 0, sizeof(float) * d);
            memset(dv + j * stride, 0, sizeof(float) * d);
        }
        for (long r = 0; r < nb; ++r) backward_row<true>(b, h, r, dk, dv, stride, s);
        if (!in_place())
            for (long r = 0; r < nb; ++r) {
                write_rows(call.dkey, call.type, dk_head, r * bs, bs, d, dk + r * bs * d, s.ones);
                write_rows(call.dvalue, call.type, dv_head, r * bs, bs, d, dv + r * bs * d, s.ones);
            }
    }

    // Column c of blocks: dK and dV alone, when the heads are too few to give every thread one.
    void backward_column(long b, long h, long c, const Backward& s) const {
        const char* k_head = head_of(call.key, call.type, b, h);
        const char* v_head = head_of(call.value, call.type, b, h);
        const char* dk_head = head_of(call.dkey, call.type, b, h);
        const char* dv_head = head_of(call.dvalue, call.type, b, h);
        float* dk = in_place() ? (float*)dk_head + c * bs * call.dkey.row : s.dk;
        float* dv = in_place() ? (float*)dv_head + c * bs * call.dkey.row : s.dv;
        const long stride = in_place() ? call.dkey.row : d;
        for (long j = 0; j < bs; ++j) {
            memset(dk + j * stride, 0, sizeof(float) * d);
            memset(dv + j * stride, 0, sizeof(float) * d);
        }
        const Blocks rows = blocks_of(call.column_offsets, call.column_rows, c, nb);
        const int32_t column = static_cast<int32_t>(c);
        for (int n = 0; n < rows.count; ++n) {
            const RowInputs row = load_row(b, h, rows[n], s);
            each_tile({&column, 1}, real_of(b), b, h, nb, [&](long first, const uint8_t* mask) {
                const Rows k = rows_of(call.key, call.type, k_head, first, TJ, d, s.keys);
                const Rows v = rows_of(call.value, call.type, v_head, first, TJ, d, s.values);
                const long offset = (first - c * bs) * stride;
                backward_tile<false, true>(row, k, v, mask, dk + offset, dv + offset, stride, s);
            });
        }
        if (!in_place()) {
            write_rows(call.dkey, call.type, dk_head, c * bs, bs, d, dk, s.ones);
            write_rows(call.dvalue, call.type, dv_head, c * bs, bs, d, dv, s.ones);
        }
    }

    // ---- whole calls ----

    int forward() const {
        const long H = call.H, heads = call.B * H;
        // The heads of an example lie side by side in memory: one thread takes them together.
        return spread(
            call.threads, heads * nb, static_cast<int>(heads >= call.threads ? nb : 1), Forward::size(d),
            [&](Scratch& scratch) { return Forward(scratch, d); },
            [&](const Forward& s, long i) { forward_row(i / nb / H, i / nb % H, i % nb, s); });
    }

    int backward() const {
        const long H = call.H, heads = call.B * H;
        if (heads >= call.threads) {
            const long accumulated = in_place() ? 0 : call.N;
            return spread(
                call.threads, heads, 1, Backward::size(d, accumulated),
                [&](Scratch& scratch) { return Backward(scratch, d, accumulated); },
                [&](const Backward& s, long i) { backward_head(i / H, i % H, s); });
        }
        const long accumulated = in_place() ? 0 : bs;
        auto make = [&](Scratch& scratch) { return Backward(scratch, d, accumulated); };
        const int status = spread(call.threads, heads * nb, 1, Backward::size(d, accumulated), make, [&](const Backward& s, long i) {
            backward_row<false>(i / nb / H, i / nb % H, i % nb, nullptr, nullptr, 0, s);
        });
        if (status != SAT_OK) return status;
        return spread(call.threads, heads * nb, 1, Backward::size(d, accumulated), make, [&](const Backward& s, long i) {
            backward_column(i / nb / H, i / nb % H, i % nb, s);
        });
    }
};

// ---- statistics ----

// One task is a row of blocks of one group of examples, tile of queries by tile. All probabilities of a tile and one head,
// [N][TI], stay in cache between the sweep that takes their exponentials and the one that adds them, divided by
// their sum, to the tile's mean. `bs` here only pools: it is as large as a tile or a multiple of it.
template <int D, int TI, int TJ>
struct Statistics {
    using Tile = Kernel<D, TI, TJ>;
    static constexpr int NV = TI / W;
    const SatStatistics& call;
    const int d;
    const int bs;
    const long N, nb;
    const long heads;    // of a group: its examples times H

    explicit Statistics(const SatStatistics& c)
        : call(c), d(D ? D : static_cast<int>(c.d)), bs(static_cast<int>(c.bs)), N(c.N), nb(c.N / c.bs),
          heads(c.B / c.groups * c.H) {}

    struct Pieces {
        float *rows, *keys;    // converted inputs
        float* qt;             // [d][TI]
        float* p;              // [N][TI], or [TJ][TI] where only the pooled sums are wanted
        float* mean;           // [N][TI]
        float* sums;           // [nb][TI] over the keys of a block
        float *reference, *total, *inverse;    // [TI]
        float* pooled;         // [heads][nb] sums over a block
    };
    size_t size() const {
        return TI * d + TJ * d + TI * d + 2 * (call.mean ? N : TJ) * TI + nb * TI + 3 * TI + heads * nb;
    }
    Pieces pieces(Scratch& s) const {
        const size_t probs = (call.mean ? N : TJ) * TI;
        Pieces x;
        x.rows = s.take(TI * d), x.keys = s.take(TJ * d), x.qt = s.take(d * TI);
        x.p = s.take(probs), x.mean = s.take(probs), x.sums = s.take(nb * TI);
        x.reference = s.take(TI), x.total = s.take(TI), x.inverse = s.take(TI);
        x.pooled = s.take(heads * nb);
        return x;
    }

    // Calls use(first, real) for each tile of keys that has a real one.
    template <class Use>
    SAT_INLINE void each_tile(const uint8_t* real, Use use) const {
        for (long first = 0; first < N; first += TJ) {
            const KeysState state = state_of(real ? real + first : nullptr, TJ);
            if (state != NO_KEY) use(first, state == ALL_KEYS ? nullptr : real + first);
        }
    }

    // Exponentials to p, their sums over each block to sums, over all keys to total. False if out of the safe range.
    bool sweep(const char* k_head, const uint8_t* real, const Pieces& s) const {
        memset(s.sums, 0, sizeof(float) * nb * TI);
        each_tile(real, [&](long first, const uint8_t* mask) {
            const Rows k = rows_of(call.key, call.type, k_head, first, TJ, d, s.keys);
            Tile::exp_scores(d, k, s.qt, s.reference, mask, call.mean ? s.p + first * TI : s.p, s.sums + first / bs * TI);
        });
        bool safe = true;
        for (int v = 0; v < NV; ++v) {
            vec total{};
            for (long c = 0; c < nb; ++c) total += load(s.sums + c * TI + v * W);
            store(s.total + v * W, total);
            for (int lane = 0; lane < W; ++lane) safe &= total[lane] > 1 / SAFE_SUM && total[lane] < SAFE_SUM;
        }
        return safe;
    }

    // One head against the tile of queries that starts at `row`.
    void head(long b, long h, long row, float* pooled, const Pieces& s) const {
        const uint8_t* real = call.real ? call.real + b * N : nullptr;
        if (real && !memchr(real, 1, N)) return;    // p is 0
        const char* q_head = head_of(call.query, call.type, b, h);
        const char* k_head = head_of(call.key, call.type, b, h);
        pack<TI>(rows_of(call.query, call.type, q_head, row, TI, d, s.rows), TI, d, call.scale * LOG2E, s.qt);
        memset(s.reference, 0, sizeof(float) * TI);
        if (!sweep(k_head, real, s)) {
            for (int i = 0; i < TI; ++i) s.reference[i] = -__builtin_inff();
            each_tile(real, [&](long first, const uint8_t* mask) {
                Tile::max_scores(d, rows_of(call.key, call.type, k_head, first, TJ, d, s.keys), s.qt, mask, s.reference);
            });
            sweep(k_head, real, s);
        }
        for (int v = 0; v < NV; ++v) store(s.inverse + v * W, 1.0f / load(s.total + v * W));
        for (long c = 0; c < nb; ++c) {
            vec block{};
            for (int v = 0; v < NV; ++v) block += load(s.sums + c * TI + v * W) * load(s.inverse + v * W);
            pooled[c] += sum(block);
        }
        if (call.mean) each_tile(real, [&](long first, const uint8_t*) { add_probs(s, first); });
    }

    static __attribute__((noinline)) void add_probs(const Pieces& s, long first) {
        vec inverse[NV];
        for (int v = 0; v < NV; ++v) inverse[v] = load(s.inverse + v * W);
        for (long j = first; j < first + TJ; ++j)
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) {
                float* mean = s.mean + j * TI + v * W;
                store(mean, load(mean) + load(s.p + j * TI + v * W) * inverse[v]);
            }
    }

    void row_of_blocks(long group, long r, const Pieces& s) const {
        const float weight = call.weight / static_cast<float>(heads);
        memset(s.pooled, 0, sizeof(float) * heads * nb);
        for (long row = r * bs; row < (r + 1) * bs; row += TI) {
            if (call.mean) memset(s.mean, 0, sizeof(float) * N * TI);
            for (long n = 0; n < heads; ++n)
                head(group * (call.B / call.groups) + n / call.H, n % call.H, row, s.pooled + n * nb, s);
            if (call.mean)
                for (int i = 0; i < TI; i += W)
                    for (long j = 0; j < N; j += W) {
                        vec x[W];
                        for (int k = 0; k < W; ++k) x[k] = load(s.mean + (j + k) * TI + i);
                        transpose(x);
                        float* mean = call.mean + (group * N + row + i) * N + j;
                        for (int k = 0; k < W; ++k) store(mean + k * N, load(mean + k * N) + x[k] * weight);
                    }
        }
        double squares = 0;
        double* pooled_sum = call.pooled_sum + (group * nb + r) * nb;
        for (long c = 0; c < nb; ++c) pooled_sum[c] = 0;
        for (long n = 0; n < heads; ++n)
            for (long c = 0; c < nb; ++c) {
                const double value = static_cast<double>(s.pooled[n * nb + c]) / (bs * bs);
                pooled_sum[c] += value;
                squares += value * value;
            }
        call.square_sum[group * nb + r] = squares;
    }

    int run() const {
        return spread(
            call.threads, call.groups * nb, 1, size(), [&](Scratch& scratch) { return pieces(scratch); },
            [&](const Pieces& s, long i) { row_of_blocks(i / nb, i % nb, s); });
    }
};

// Calls run(kernel) with the Kernel (or Statistics) made for the call's head_dim and block_size.
template <template <int, int, int> class Made, int D, class Call>
int with_tile(const Call& call) {
#if SAT_WIDTH == 16
    if (call.bs % 64 == 0) return Made<D, 64, 32>(call).run();
#endif
#if SAT_WIDTH >= 8
    if (call.bs % 32 == 0) return Made<D, 32, 32>(call).run();
#endif
    return Made<D, 16, 16>(call).run();
}

template <template <int, int, int> class Made, class Call>
int with_kernel(const Call& call) {
#ifdef SAT_SPECIALISED    // the portable path takes too long to compile three times
    if (call.d == 32) return with_tile<Made, 32>(call);
    if (call.d == 64) return with_tile<Made, 64>(call);
#endif
    return with_tile<Made, 0>(call);
}

template <int D, int TI, int TJ>
struct ForwardPass : Kernel<D, TI, TJ> {
    using Kernel<D, TI, TJ>::Kernel;
    int run() const { return this->forward(); }
};

template <int D, int TI, int TJ>
struct BackwardPass : Kernel<D, TI, TJ> {
    using Kernel<D, TI, TJ>::Kernel;
    int run() const { return this->backward(); }
};

}    // namespace

int attention_forward(const SatAttention& call) { return with_kernel<ForwardPass>(call); }
int attention_backward(const SatAttention& call) { return with_kernel<BackwardPass>(call); }
int attention_statistics(const SatStatistics& call) { return with_kernel<Statistics>(call); }

}    // namespace SAT_ISA_NAMESPACE
