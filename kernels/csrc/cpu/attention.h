// Block-sparse attention, written once for every instruction set and number: a walk over tiles of Q queries by T keys of one
// (batch, head). The scores of a tile are held transposed, [T keys][Q queries], so that vector lanes are queries: the softmax
// needs no reduction across lanes, and a padded key is a row that is set to zero. An Engine (engine.h) takes the products:
//
//     S[j][i] = sum_c K[j][c] Q[i][c]            A: K where it is           B: Q, transposed
//     dP[j][i] = sum_c V[j][c] dO[i][c]          A: V where it is           B: dO, transposed
//     O[i][c] += sum_j P[j][i] V[j][c]           A: columns of P            B: rows of V
//     dQ[i][c] += sum_j dS[j][i] K[j][c]         A: columns of dS           B: rows of K
//     dV[j][c] += sum_i P[j][i] dO[i][c]         A: rows of P               B: rows of dO
//     dK[j][c] += sum_i dS[j][i] Q[i][c]         A: rows of dS              B: rows of Q
//
// The forward pass takes exp2 of the raw scores, without a pass for the maximum: pruned logits are 0, so 0 is the natural
// reference. Rows whose sum leaves the safe range are done again, with their true maximum.
//
// The result has the same bits for any number of threads: every output element is the sum of the same tiles in the same
// order, whether one thread owns a (batch, head) or its rows and columns of blocks are spread over threads.
//
// Shape letters as in abi.h; T is 32 or 16, Q is T or 64; c is an index into d.
#pragma once

#include "engine.h"

namespace SAT_ISA_NAMESPACE {
namespace {

constexpr float LOG2E = 1.44269504088896341f;
constexpr float SAFE_SUM = 0x1p60f;    // unnormalised sums within [1 / SAFE_SUM, SAFE_SUM] keep full precision
constexpr int MAX_BLOCK = 128;

// ---- which keys ----

enum KeysState : uint8_t { NO_KEY, SOME_KEYS, ALL_KEYS };

KeysState state_of(const uint8_t* real, int count) {
    if (!real) return ALL_KEYS;
    int n = 0;
    for (int j = 0; j < count; ++j) n += real[j] != 0;
    return n == 0 ? NO_KEY : n == count ? ALL_KEYS : SOME_KEYS;
}

// The kept blocks of a row (or column), ascending.
struct Blocks {
    const int32_t* list;    // null: `first` and those that follow
    int first, count;
    int operator[](int n) const { return list ? list[n] : first + n; }
};

// What hides some keys of a tile from a tile of queries.
struct Hiding {
    const uint8_t* real;
    int ahead;    // query i sees keys up to i - ahead
    explicit operator bool() const { return real || ahead > -MAX_BLOCK; }
    // x, zero in lanes that do not see key j; the lanes are queries [first, first + W) of the tile.
    SAT_INLINE vec operator()(vec x, int j, int first) const {
        if (real && !real[j]) return vec{};
        if (ahead == -MAX_BLOCK) return x;
        return reinterpret_cast<vec>(reinterpret_cast<ivec>(x) & (lane_numbers() >= j + ahead - first));
    }
};

// A tile of keys as queries of the row of blocks at hand see it: tiles of queries before `from` do not; the one that starts
// at `from` sees, where it lies on a causal diagonal, no key after itself.
struct Tile {
    long first;             // key
    long column;            // of blocks, its
    const uint8_t* real;    // of its keys, null: all are
    int from;
    int ahead;              // of `from`, on a diagonal, else -MAX_BLOCK
    Hiding hiding(int i) const { return {real, i == from ? ahead : -MAX_BLOCK}; }
};

// ---- products with a softmax ----

// Engines<WIDE>: WIDE says that every depth is a multiple of 32 operands, else of 16.
template <template <bool> class Engines, int D, int Q, int T>
struct Products {
    typedef Engines<D && T == 32> Engine;
    typedef typename Engine::Operand Operand;
    typedef typename Engine::Element Element;
    static constexpr int NV = Q / W;    // vectors of queries in a tile
    static constexpr int NUM = Engine::NUM;

    // p = exp2(scale k_j . q_i - reference[i]), zero where hidden; adds the sums over j to total[i].
    template <bool HIDDEN>
    static __attribute__((noinline)) void exp_scores(int d_, const Rows<Operand>& k, const Element* qt, float scale,
                                                     const float* reference, const Hiding& hiding, Element* p, float* total,
                                                     Ahead& ahead) {
        const int d = D ? D : d_;
        // The exponentials of one group of rows overlap with the products of the next.
        Engine::template panel<T, NV>(d / NUM, RowFactor(k), {qt, Q}, ahead, [&](int row, auto& s) __attribute__((always_inline)) {
            constexpr int NR = sizeof(s) / sizeof(s[0]);
            SAT_UNROLL(16)
            for (int v = 0; v < NV; ++v) {
                const vec shift = load(reference + v * W);
                vec sum{};
                SAT_UNROLL(16)
                for (int r = 0; r < NR; r += NUM) {
                    vec x[NUM];
                    SAT_UNROLL(2)
                    for (int n = 0; n < NUM; ++n) {
                        x[n] = Engine::exp_probs(s[r + n][v] * scale - shift);
                        if (HIDDEN) x[n] = hiding(x[n], row + r + n, v * W);
                    }
                    sum = Engine::keep(sum, x, p + (row + r) / NUM * Q + v * W);
                }
                store(total + v * W, load(total + v * W) + sum);
            }
        });
    }

    // top[i] = max over keys that are not hidden of scale k_j . q_i and top[i].
    static __attribute__((noinline)) void max_scores(int d_, const Rows<Operand>& k, const Element* qt, float scale,
                                                     const Hiding& hiding, float* top, Ahead& ahead) {
        const int d = D ? D : d_;
        Engine::template panel<T, NV>(d / NUM, RowFactor(k), {qt, Q}, ahead, [&](int row, auto& s) {
            constexpr int NR = sizeof(s) / sizeof(s[0]);
            for (int r = 0; r < NR; ++r)
                for (int v = 0; v < NV; ++v) {
                    // 0 where hidden, elsewhere all ones
                    const ivec seen = reinterpret_cast<ivec>(hiding(reinterpret_cast<vec>(ivec{} - 1), row + r, v * W));
                    const vec before = load(top + v * W), after = max(before, s[r][v] * scale);
                    store(top + v * W, reinterpret_cast<vec>((reinterpret_cast<ivec>(after) & seen) |
                                                             (reinterpret_cast<ivec>(before) & ~seen)));
                }
        });
    }

    // o[i][c] += sum_j p[j][i] v[j][c], or = where o is fresh; o [Q][d].
    static __attribute__((noinline)) void add_values(int d_, const Element* p, const Panel<Element>& v, float* o, bool fresh,
                                                     Ahead& ahead) {
        Engine::template add<Q>(T / NUM, ColumnFactor<Q>(p), v, o, D ? D : d_, D ? D : d_, fresh, ahead);
    }

    // dk[j][c] += sum_i p[j][i] q[i][c], or = where dk is fresh; rows of dk are `stride` apart.
    static __attribute__((noinline)) void add_keys(int d_, const Operand* p, const Panel<Element>& q, float* dk, long stride,
                                                   bool fresh, Ahead& ahead) {
        Engine::template add<T>(Q / NUM, RowFactor(p, Q), q, dk, stride, D ? D : d_, fresh, ahead);
    }

    // p = exp2(scale log2(e) k . q - lse), zero where hidden; ds = p * (scale v . do - delta).
    template <bool HIDDEN>
    static __attribute__((noinline)) void score_gradients(int d_, const Rows<Operand>& k, const Rows<Operand>& v,
                                                          const Element* qt, const Element* dot, float scale,
                                                          const float* lse, const float* delta, const Hiding& hiding,
                                                          Operand* p, Operand* ds, Element* ds_columns, Ahead& ahead) {
        const int d = D ? D : d_;
        Engine::template panels<T, NV>(
            d / NUM, RowFactor(k), {qt, Q}, RowFactor(v), {dot, Q}, p, ahead,
            [&](int row, auto& s) __attribute__((always_inline)) {
                constexpr int NR = sizeof(s) / sizeof(s[0]);
                SAT_UNROLL(16)
                for (int r = 0; r < NR; ++r)
                    SAT_UNROLL(4)
                    for (int n = 0; n < NV; ++n) {
                        s[r][n] = Engine::exp_probs(s[r][n] * (scale * LOG2E) - load(lse + n * W));
                        if (HIDDEN) s[r][n] = hiding(s[r][n], row + r, n * W);
                    }
            },
            [&](int row, auto& s, auto& dp) __attribute__((always_inline)) {
                constexpr int NR = sizeof(s) / sizeof(s[0]);
                SAT_UNROLL(16)
                for (int r = 0; r < NR; ++r)
                    SAT_UNROLL(4)
                    for (int n = 0; n < NV; ++n) dp[r][n] = s[r][n] * (dp[r][n] * scale - load(delta + n * W));
                Engine::template keep<Q>(row, s, dp, p, ds, ds_columns);
            });
    }
};

// ---- the walk ----

template <template <bool> class Engines, int D, int Q, int T>
struct Walk : Products<Engines, D, Q, T> {
    typedef Products<Engines, D, Q, T> Tiles;
    typedef typename Tiles::Engine Engine;
    typedef typename Tiles::Operand Operand;
    typedef typename Tiles::Element Element;
    static constexpr int NUM = Engine::NUM;
    const SatAttention& call;
    const int d;
    const int bs;
    const long nb;

    explicit Walk(const SatAttention& c)
        : call(c), d(D ? D : static_cast<int>(c.d)), bs(static_cast<int>(c.bs)), nb(c.N / c.bs) {}

    // A row of blocks of one head; none where r is nb or beyond.
    struct Place {
        long b, h, r;
    };

    Blocks blocks_of(const int32_t* offsets, const int32_t* list, long h, long index) const {
        if (!offsets) return {nullptr, 0, static_cast<int>(nb)};
        offsets += (call.layouts > 1 ? h : 0) * (nb + 1) + index;
        return {list + offsets[0], 0, offsets[1] - offsets[0]};
    }
    // The blocks of keys that a row of blocks keeps.
    Blocks columns_of(const Place& at) const {
        Blocks blocks = blocks_of(call.row_offsets, call.row_columns, at.h, at.r);
        while (call.causal && blocks.count && blocks[blocks.count - 1] > at.r) --blocks.count;
        return blocks;
    }
    // The rows of blocks that keep a column.
    Blocks rows_of_column(long h, long c) const {
        Blocks blocks = blocks_of(call.column_offsets, call.column_rows, h, c);
        while (call.causal && blocks.count && blocks[0] < c) {
            if (blocks.list) ++blocks.list;
            else ++blocks.first;
            --blocks.count;
        }
        return blocks;
    }

    const char* head(const SatTensor& t, const Place& at) const { return head_of(t, call.type, at.b, at.h); }
    Rows<Operand> rows(const SatTensor& t, const Place& at, long first, int count, Operand* scratch) const {
        return rows_of(t, call.type, head(t, at), first, count, d, scratch);
    }
    void write(const SatTensor& t, const Place& at, long first, int count, const float* from, const float* factor) const {
        write_rows(t, call.type, head(t, at), first, count, d, from, factor);
    }
    void expect(Ahead& ahead, const SatTensor& t, const Place& at, long first, int count) const {
        const int size = call.type == SAT_FLOAT32 ? 4 : 2;
        ahead.expect(head(t, at) + first * t.row * size, t.row * size, count, d * size);
    }

    // Calls use(tile) for each tile of keys in `columns` that has a real key, while the next one, at `first`, is fetched with what
    // along(first) expects and, at the last, what rest() expects. `next` is the row of blocks that comes after this one.
    template <class Along, class Rest, class Use>
    SAT_INLINE void each_tile(const Blocks& columns, const Place& at, const Place& next, Ahead& ahead, Along along, Rest rest,
                              Use use) const {
        const uint8_t* real = call.real ? call.real + at.b * call.N : nullptr;
        auto expect_tile = [&](const Place& place, long first) {
            expect(ahead, call.key, place, first, T);
            expect(ahead, call.value, place, first, T);
            along(first);
        };
        for (int n = 0; n < columns.count; ++n)
            for (int t = 0; t < bs; t += T) {
                const long first = static_cast<long>(columns[n]) * bs + t;
                ahead.restart();
                if (t + T < bs) {
                    expect_tile(at, first + T);
                } else if (n + 1 < columns.count) {
                    expect_tile(at, static_cast<long>(columns[n + 1]) * bs);
                } else {
                    if (next.r < nb) {
                        const Blocks others = columns_of(next);
                        if (others.count) expect_tile(next, static_cast<long>(others[0]) * bs);
                    }
                    rest();
                }
                const KeysState state = state_of(real ? real + first : nullptr, T);
                const bool diagonal = call.causal && columns[n] == at.r;
                if (state != NO_KEY)
                    use(Tile{first, columns[n], state == ALL_KEYS ? nullptr : real + first, diagonal ? t / Q * Q : 0,
                             diagonal ? t % Q : -MAX_BLOCK});
            }
    }

    // ---- forward ----

    struct Forward {
        typename Engine::Session session;
        mutable Ahead ahead;
        Operand *rows, *keys, *values;    // copies of inputs that cannot be read in place
        Element* qt;                      // [bs / Q][d / NUM][Q]
        Element* v;                       // [T / NUM][d], where rows must be packed
        Element* p;                       // [T / NUM][Q]
        float* o;                         // [bs][d]
        float *reference, *total;         // [bs]
        static size_t size(int d) {
            return sizeof(Operand) * (2 * MAX_BLOCK * d + 3 * T * d + T * Q) + 4 * MAX_BLOCK * (d + 2);
        }
        Forward(Scratch& s, int d)
            : rows(s.take<Operand>(MAX_BLOCK * d)), keys(s.take<Operand>(T * d)), values(s.take<Operand>(T * d)),
              qt(s.take<Element>(MAX_BLOCK * d / NUM)), v(s.take<Element>(T * d / NUM)), p(s.take<Element>(T * Q / NUM)),
              o(s.take(MAX_BLOCK * d)), reference(s.take(MAX_BLOCK)), total(s.take(MAX_BLOCK)) {}
    };

    // How many logits count as 0 for query i of a row of blocks.
    struct Pruned {
        float all;      // for every one
        float slope;    // 1: and i + 1 more
        explicit operator bool() const { return all || slope; }
        SAT_INLINE vec operator()(int i) const {
            return splat(all) + slope * __builtin_convertvector(lane_numbers() + (i + 1), vec);
        }
    };
    Pruned pruned_of(const Blocks& columns, long r) const {
        if (!call.pruned_zero) return {0, 0};
        if (!call.causal) return {static_cast<float>((nb - columns.count) * bs), 0};
        const bool diagonal = columns.count && columns[columns.count - 1] == r;
        return {static_cast<float>((r - columns.count + diagonal) * bs), diagonal ? 0.0f : 1.0f};
    }

    void forward_row(const Place& at, const Place& next, const Forward& s) const {
        const long first_row = at.r * bs;
        const Blocks columns = columns_of(at);
        const Pruned pruned = pruned_of(columns, at.r);
        const float scale = call.scale * LOG2E;

        Engine::template pack_columns<Q>(rows(call.query, at, first_row, bs, s.rows), bs, d, s.qt);
        auto expect_rows = [&] {
            expect(s.ahead, call.out, at, first_row, bs);
            if (next.r < nb) expect(s.ahead, call.query, next, next.r * bs, bs);
        };
        long first_key = call.N;    // the first that any query sees
        auto sweep = [&] {
            memset(s.total, 0, sizeof(float) * bs);
            first_key = call.N;
            each_tile(columns, at, next, s.ahead, [](long) {}, expect_rows, [&](const Tile& tile) {
                bool fresh = first_key == call.N;
                if (fresh) {
                    first_key = tile.first;
                    while (tile.real && !tile.real[first_key - tile.first]) ++first_key;
                    if (tile.from) memset(s.o, 0, sizeof(float) * tile.from * d);    // nobody sees less
                }
                const Rows<Operand> k = rows(call.key, at, tile.first, T, s.keys);
                const Panel<Element> v = Engine::pack_rows(rows(call.value, at, tile.first, T, s.values), T, d, s.v);
                for (int i = tile.from; i < bs; i += Q) {
                    const Element* qt = s.qt + i * (d / NUM);
                    const Hiding hiding = tile.hiding(i);
                    if (hiding)
                        Tiles::template exp_scores<true>(d, k, qt, scale, s.reference + i, hiding, s.p, s.total + i, s.ahead);
                    else
                        Tiles::template exp_scores<false>(d, k, qt, scale, s.reference + i, hiding, s.p, s.total + i, s.ahead);
                    Tiles::add_values(d, s.p, v, s.o + i * d, fresh, s.ahead);
                }
            });
        };
        memset(s.reference, 0, sizeof(float) * bs);
        sweep();
        float* lse = call.lse + (at.b * call.H + at.h) * call.N + first_row;
        if (first_key < call.N) {
            if (!add_pruned(s, pruned)) {
                find_maxima(columns, at, next, pruned, s);
                sweep();
                add_pruned(s, pruned);
            }
            for (int i = 0; i < bs; i += W) {
                const vec total = load(s.total + i);
                store(lse + i, log2(total) + load(s.reference + i));
                store(s.total + i, 1.0f / total);
            }
        } else {
            memset(s.o, 0, sizeof(float) * bs * d);
        }
        // Queries that see no key: all or none, unless it is causal.
        const long blind = first_key < call.N && !call.causal ? 0 : first_key - first_row;
        for (int i = 0; i < bs && i < blind; ++i) s.total[i] = 0, lse[i] = SAT_EMPTY;
        write(call.out, at, first_row, bs, s.o, s.total);
    }

    // Adds the pruned logits to the sums; false if one lies outside the range where they are exact.
    bool add_pruned(const Forward& s, const Pruned& pruned) const {
        bool exact = true;
        for (int i = 0; i < bs; i += W) {
            vec total = load(s.total + i);
            if (pruned) total += exp2(-load(s.reference + i)) * pruned(i);
            store(s.total + i, total);
            exact &= within(total, 1 / SAFE_SUM, SAFE_SUM);
        }
        return exact;
    }

    __attribute__((noinline)) void find_maxima(const Blocks& columns, const Place& at, const Place& next,
                                               const Pruned& pruned, const Forward& s) const {
        const vec none = splat(-__builtin_inff());
        for (int i = 0; i < bs; i += W) store(s.reference + i, pruned(i) > 0.0f ? vec{} : none);
        each_tile(columns, at, next, s.ahead, [](long) {}, [] {}, [&](const Tile& tile) {
            const Rows<Operand> k = rows(call.key, at, tile.first, T, s.keys);
            for (int i = tile.from; i < bs; i += Q)
                Tiles::max_scores(d, k, s.qt + i * (d / NUM), call.scale * LOG2E, tile.hiding(i),
                                  s.reference + i, s.ahead);
        });
        for (int i = 0; i < bs; i += W) {    // who sees no key needs a number all the same
            const vec top = load(s.reference + i);
            store(s.reference + i, top == none ? vec{} : top);
        }
    }

    // ---- backward ----

    struct Backward {
        typename Engine::Session session;
        mutable Ahead ahead;
        Operand *rows, *drows, *orows, *keys, *values;    // copies of inputs that cannot be read in place
        Element *qt, *dot;                                // [bs / Q][d / NUM][Q]
        Element *q, *dout;                                // [bs / NUM][d], where rows must be packed
        Element* k;                                       // [T / NUM][d]
        Operand *p, *ds;                                  // [T][Q], rows are keys
        Element* ds_columns;                              // [T / NUM][Q]
        float* dq;                                        // [bs][d]
        float *lse, *delta, *ones;                        // [bs]
        float *dk, *dv;                                   // [`accumulated`][d], where outputs are not fp32
        mutable Panel<Element> q_rows, dout_rows;         // of the row of blocks at hand
        static size_t size(int d, long accumulated) {
            return sizeof(Operand) * (7 * MAX_BLOCK * d + 3 * T * d + 3 * T * Q) + 4 * MAX_BLOCK * (d + 3) + 8 * accumulated * d;
        }
        Backward(Scratch& s, int d, long accumulated)
            : rows(s.take<Operand>(MAX_BLOCK * d)), drows(s.take<Operand>(MAX_BLOCK * d)),
              orows(s.take<Operand>(MAX_BLOCK * d)), keys(s.take<Operand>(T * d)), values(s.take<Operand>(T * d)),
              qt(s.take<Element>(MAX_BLOCK * d / NUM)), dot(s.take<Element>(MAX_BLOCK * d / NUM)),
              q(s.take<Element>(MAX_BLOCK * d / NUM)), dout(s.take<Element>(MAX_BLOCK * d / NUM)),
              k(s.take<Element>(T * d / NUM)), p(s.take<Operand>(T * Q)), ds(s.take<Operand>(T * Q)),
              ds_columns(Engine::columns_of(ds, s.take<Element>(T * Q / NUM))), dq(s.take(MAX_BLOCK * d)),
              lse(s.take(MAX_BLOCK)), delta(s.take(MAX_BLOCK)), ones(s.take(MAX_BLOCK)),
              dk(s.take(accumulated * d)), dv(s.take(accumulated * d)), q_rows{}, dout_rows{} {
            for (int i = 0; i < MAX_BLOCK; ++i) ones[i] = 1.0f;
        }
    };

    // Packs what one row of blocks contributes; delta = scale dO . O.
    void load_row(const Place& at, const Backward& s) const {
        const long first = at.r * bs;
        const Rows<Operand> q = rows(call.query, at, first, bs, s.rows), dout = rows(call.dout, at, first, bs, s.drows);
        const Rows<Operand> out = rows(call.out, at, first, bs, s.orows);
        Engine::template pack_columns<Q>(q, bs, d, s.qt);
        Engine::template pack_columns<Q>(dout, bs, d, s.dot);
        s.q_rows = Engine::pack_rows(q, bs, d, s.q);
        s.dout_rows = Engine::pack_rows(dout, bs, d, s.dout);
        memcpy(s.lse, call.lse + (at.b * call.H + at.h) * call.N + first, sizeof(float) * bs);
        for (int i = 0; i < bs; i += W) {
            vec products[W];
            for (int n = 0; n < W; ++n) {
                products[n] = vec{};
                for (int c = 0; c < d; c += W) products[n] += load(dout.row(i + n) + c) * load(out.row(i + n) + c);
            }
            store(s.delta + i, sums(products) * call.scale);
        }
    }

    void expect_row(const Place& next, const Backward& s) const {
        const SatTensor* const inputs[] = {&call.query, &call.dout, &call.out};
        if (next.r < nb)
            for (const SatTensor* t : inputs) expect(s.ahead, *t, next, next.r * bs, bs);
    }

    // Where the sums of dK and dV are held: in the outputs if those are fp32.
    struct Target {
        float *dk, *dv;    // of the first key of the head, or of the column of blocks
        long dk_row, dv_row;
        long first;
    };
    bool in_place() const { return call.type == SAT_FLOAT32; }
    Target target(const Place& at, long first, const Backward& s) const {
        if (!in_place()) return {s.dk, s.dv, d, d, first};
        auto start = [&](const SatTensor& t) {
            return reinterpret_cast<float*>(const_cast<char*>(head(t, at))) + first * t.row;
        };
        return {start(call.dkey), start(call.dvalue), call.dkey.row, call.dvalue.row, first};
    }
    // Rows of blocks of dK and dV from their sums, the first one's of `to`.
    void write_keys(const Place& at, int blocks, const Backward& s) const {
        if (in_place()) return;
        for (int n = 0; n < blocks; ++n) {
            write(call.dkey, at, (at.r + n) * bs, bs, s.dk + n * bs * d, s.ones);
            write(call.dvalue, at, (at.r + n) * bs, bs, s.dv + n * bs * d, s.ones);
        }
    }
    // Clears the sums of a column of blocks to which no tile adds: `fresh` ones are stored.
    void clear_keys(const Place& at, const Target& to) const {
        const bool kept = rows_of_column(at.h, at.r).count;
        const uint8_t* real = call.real ? call.real + at.b * call.N : nullptr;
        for (long first = at.r * bs; first < (at.r + 1) * bs; first += T) {
            if (kept && state_of(real ? real + first : nullptr, T) != NO_KEY) continue;
            for (long j = first - to.first; j < first - to.first + T; ++j) {
                memset(to.dk + j * to.dk_row, 0, sizeof(float) * d);
                memset(to.dv + j * to.dv_row, 0, sizeof(float) * d);
            }
        }
    }

    // One tile of keys against one row of blocks; fresh: nothing has been added to dQ, to dK and dV.
    template <bool DQ, bool DKV>
    SAT_INLINE void backward_tile(const Place& at, const Tile& tile, const Target& to, bool fresh, bool fresh_keys,
                                  const Backward& s) const {
        float *dk = to.dk + (tile.first - to.first) * to.dk_row, *dv = to.dv + (tile.first - to.first) * to.dv_row;
        const Rows<Operand> k = rows(call.key, at, tile.first, T, s.keys);
        const Rows<Operand> v = rows(call.value, at, tile.first, T, s.values);
        Panel<Element> k_rows{};
        if (DQ) k_rows = Engine::pack_rows(k, T, d, s.k);
        for (int i = tile.from; i < bs; i += Q) {
            const Element *qt = s.qt + i * (d / NUM), *dot = s.dot + i * (d / NUM);
            const Hiding hiding = tile.hiding(i);
            if (hiding)
                Tiles::template score_gradients<true>(d, k, v, qt, dot, call.scale, s.lse + i, s.delta + i, hiding, s.p, s.ds,
                                                      s.ds_columns, s.ahead);
            else
                Tiles::template score_gradients<false>(d, k, v, qt, dot, call.scale, s.lse + i, s.delta + i, hiding, s.p, s.ds,
                                                       s.ds_columns, s.ahead);
            if (DKV) {
                const bool store = fresh_keys && i == tile.from;
                Tiles::add_keys(d, s.p, s.dout_rows + i / NUM * s.dout_rows.stride, dv, to.dv_row, store, s.ahead);
                Tiles::add_keys(d, s.ds, s.q_rows + i / NUM * s.q_rows.stride, dk, to.dk_row, store, s.ahead);
            }
            if (DQ) Tiles::add_values(d, s.ds_columns, k_rows, s.dq + i * d, fresh, s.ahead);
        }
    }

    // Row r of blocks: dQ, and (where one thread owns the head) its share of dK and dV.
    template <bool DKV>
    void backward_row(const Place& at, const Place& next, const Target& to, const Backward& s) const {
        const Blocks columns = columns_of(at);
        bool any_key = false;
        auto expect_rows = [&] {
            expect_row(next, s);
            expect(s.ahead, call.dquery, at, at.r * bs, bs);
        };
        if (columns.count) {
            load_row(at, s);
            auto expect_sums = [&](long first) {
                if (!DKV) return;
                s.ahead.expect(to.dk + first * to.dk_row, to.dk_row, T, d);
                s.ahead.expect(to.dv + first * to.dv_row, to.dv_row, T, d);
            };
            each_tile(columns, at, next, s.ahead, expect_sums, expect_rows, [&](const Tile& tile) {
                if (!any_key && tile.from) memset(s.dq, 0, sizeof(float) * tile.from * d);
                const bool fresh_keys = DKV && rows_of_column(at.h, tile.column)[0] == at.r;
                backward_tile<true, DKV>(at, tile, to, !any_key, fresh_keys, s);
                any_key = true;
            });
        }
        if (!any_key) memset(s.dq, 0, sizeof(float) * bs * d);
        write(call.dquery, at, at.r * bs, bs, s.dq, s.ones);
    }

    // One thread does a whole head.
    void backward_head(long b, long h, const Backward& s) const {
        const Target to = target({b, h, 0}, 0, s);
        for (long c = 0; c < nb; ++c) clear_keys({b, h, c}, to);
        for (long r = 0; r < nb; ++r) backward_row<true>({b, h, r}, {b, h, r + 1}, to, s);
        write_keys({b, h, 0}, nb, s);
    }

    // Column c of blocks: dK and dV alone, when the heads are too few to give every thread one.
    void backward_column(long b, long h, long c, const Backward& s) const {
        const Target to = target({b, h, c}, c * bs, s);
        clear_keys({b, h, c}, to);
        const Blocks rows = rows_of_column(h, c);
        const int32_t column = static_cast<int32_t>(c);
        for (int n = 0; n < rows.count; ++n) {
            const Place at = {b, h, rows[n]}, none = {b, h, nb};
            load_row(at, s);
            auto expect_rows = [&] { expect_row({b, h, n + 1 < rows.count ? rows[n + 1] : nb}, s); };
            each_tile({&column, 0, 1}, at, none, s.ahead, [](long) {}, expect_rows, [&](const Tile& tile) {
                backward_tile<false, true>(at, tile, to, false, n == 0, s);
            });
        }
        write_keys({b, h, c}, 1, s);
    }

    // ---- whole calls ----

    int forward() const {
        const long H = call.H, heads = call.B * H;
        return spread(
            call.threads, heads * nb, call.B >= call.threads ? nb * H : 1, Forward::size(d),
            [&](Scratch& scratch) { return Forward(scratch, d); },
            [&](const Forward& s, long i) {
                // The heads of an example lie side by side in memory: one thread takes them in turns.
                const Place at = {i / H / nb, i % H, i / H % nb};
                forward_row(at, {at.b, (at.h + 1) % H, at.r + (at.h + 1) / H}, s);
            });
    }

    int backward() const {
        const long H = call.H, heads = call.B * H;
        const bool whole = heads >= call.threads;
        const long accumulated = in_place() ? 0 : whole ? call.N : bs;
        const size_t size = Backward::size(d, accumulated);
        auto make = [&](Scratch& scratch) { return Backward(scratch, d, accumulated); };
        if (whole)
            return spread(call.threads, heads, 1, size, make,
                          [&](const Backward& s, long i) { backward_head(i / H, i % H, s); });
        const int status = spread(call.threads, heads * nb, 1, size, make, [&](const Backward& s, long i) {
            const Place at = {i / nb / H, i / nb % H, i % nb};
            backward_row<false>(at, {at.b, at.h, at.r + 1}, {}, s);
        });
        if (status != SAT_OK) return status;
        return spread(call.threads, heads * nb, 1, size, make, [&](const Backward& s, long i) {
            backward_column(i / nb / H, i / nb % H, i % nb, s);
        });
    }
};

// ---- calls ----

template <template <template <bool> class, int, int, int> class Made, template <bool> class Engine, int Q, class Call, class Run>
int with_head_dim(const Call& call, Run run) {
    if (call.d == 32) return run(Made<Engine, 32, Q, 32>(call));
    if (call.d == 64) return run(Made<Engine, 64, Q, 32>(call));
    if (call.d == 128) return run(Made<Engine, 128, Q, 32>(call));
    return run(Made<Engine, 0, Q, 32>(call));
}

// Calls run(walk) with the Walk (or Statistics) made for the call's head_dim and block_size, of at most WIDEST queries a tile.
template <template <template <bool> class, int, int, int> class Made, template <bool> class Engine, int WIDEST, class Call, class Run>
int with_tiles(const Call& call, Run run) {
    if (call.d < 16 || call.d > 128 || call.d % 16 || call.bs < 16 || call.bs > MAX_BLOCK || call.bs % 16 || call.N % call.bs)
        return SAT_NOT_SUPPORTED;
    if (call.type != SAT_BFLOAT16 && (call.type != SAT_FLOAT32 || Engine<true>::NUM == 2)) return SAT_NOT_SUPPORTED;
#if SAT_WIDTH > 4    // the portable path has too few registers for more, and takes long to compile
    if constexpr (WIDEST == 64)
        if (call.bs % 64 == 0) return with_head_dim<Made, Engine, 64>(call, run);
    if (call.bs % 32 == 0) return with_head_dim<Made, Engine, 32>(call, run);
#endif
    return run(Made<Engine, 0, 16, 16>(call));
}

}    // namespace
}    // namespace SAT_ISA_NAMESPACE

#include "statistics.h"

// Defines the operations of an instruction set by an engine.
#define SAT_DEFINE_ATTENTION(Engine)                                                                         \
    namespace SAT_ISA_NAMESPACE {                                                                            \
    int attention_forward(const SatAttention& call) {                                                        \
        return with_tiles<Walk, Engine, Engine<true>::QUERIES>(call, [](const auto& walk) { return walk.forward(); });              \
    }                                                                                                        \
    int attention_backward(const SatAttention& call) {                                                       \
        return with_tiles<Walk, Engine, Engine<true>::QUERIES>(call, [](const auto& walk) { return walk.backward(); });             \
    }                                                                                                        \
    int attention_statistics(const SatStatistics& call) {                                                    \
        return with_tiles<Statistics, Engine, 32>(call, [](const auto& statistics) { return statistics.run(); }); \
    }                                                                                                        \
    }
