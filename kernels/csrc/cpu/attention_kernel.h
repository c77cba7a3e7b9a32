// Block-sparse attention, written once for every instruction set.
//
// The unit of work is a tile: TI queries by TJ keys of one (batch, head). Its scores are held transposed, [TJ][TI],
// so that vector lanes are queries:
//   - the softmax needs no reduction across lanes, and a padded key is a row that is set to zero;
//   - only Q (and dO) of the row of blocks at hand are repacked as [d][TI]; of K and V, rows are copied side by side.
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

// Rows of a product's accumulators: NR * NV of them, and what they are multiplied with, must fit the registers.
constexpr int rows_at_once(int vectors) {
    const int rows = REGISTERS == 32 ? (REGISTERS - vectors - 1) / vectors : (REGISTERS - 4) / vectors;
    return rows < 12 ? rows : 12;
}

// ---- memory that comes next ----

constexpr int GRANULE = 16;    // d, block sizes and so the depths of all products are multiples of it

// Cache lines that will be used soon: the same line of GRANULE rows of a tensor each. The inner loops of products fetch
// one of them to read and one to write at every step, so that some are always on their way and never so many that other
// loads must wait. A kept block is seldom used twice, and no hardware prefetcher knows the layout.
class Ahead {
  public:
    struct Lines {
        const char* line;
        long stride;
    };
    void clear() { num_reads_ = num_writes_ = next_read_ = next_write_ = 0; }

    // Rows of `bytes` bytes; `rows` is a multiple of GRANULE. What finds no room is not fetched.
    void add_read(const char* first, long stride, int rows, int bytes) {
        add(reads_, num_reads_, first, stride, rows, bytes);
    }
    void add_write(const char* first, long stride, int rows, int bytes) {
        add(writes_, num_writes_, first, stride, rows, bytes);
    }

    // The next lines; where there are none, one that is near anyway.
    SAT_INLINE Lines read() { return next_read_ < num_reads_ ? reads_[next_read_++] : near(); }
    SAT_INLINE Lines write() { return next_write_ < num_writes_ ? writes_[next_write_++] : near(); }

  private:
    static constexpr int ROOM = 224;    // K and V of a tile, Q, dO and O of a block, all 128 x 128
    static void add(Lines* to, int& count, const char* first, long stride, int rows, int bytes) {
        for (; rows > 0; rows -= GRANULE, first += GRANULE * stride)
            for (int byte = 0; byte < bytes && count < ROOM; byte += 64) to[count++] = {first + byte, stride};
    }
    Lines near() const { return {reinterpret_cast<const char*>(this), 0}; }
    int num_reads_ = 0, num_writes_ = 0, next_read_ = 0, next_write_ = 0;
    Lines reads_[ROOM], writes_[ROOM];
};

// ---- products ----

// NR x NV accumulators over `depth`, then emit(row, accumulators).
template <int NR, int NV, class Emit>
SAT_INLINE void micro(int row, long depth, const float* a, long a_row, long a_depth, const float* b, long b_depth,
                      Ahead& ahead, Emit& emit) {
    vec acc[NR][NV];
    SAT_UNROLL(16)
    for (int r = 0; r < NR; ++r)
        SAT_UNROLL(16)
        for (int v = 0; v < NV; ++v) acc[r][v] = vec{};
    a += row * a_row;
    for (long granule = 0; granule < depth; granule += GRANULE) {
        Ahead::Lines reads = ahead.read(), writes = ahead.write();
        for (long k = granule; k < granule + GRANULE; ++k) {
            prefetch_to_read(reads.line);
            prefetch_to_write(writes.line);
            reads.line += reads.stride, writes.line += writes.stride;
            if constexpr (REGISTERS == 32) {
                vec y[NV];
                SAT_UNROLL(16)
                for (int v = 0; v < NV; ++v) y[v] = load(b + k * b_depth + v * W);
                SAT_UNROLL(16)
                for (int r = 0; r < NR; ++r) {
                    const vec x = splat(a[r * a_row + k * a_depth]);
                    SAT_UNROLL(16)
                    for (int v = 0; v < NV; ++v) acc[r][v] += x * y[v];
                }
            } else {
                vec x[NR];
                SAT_UNROLL(16)
                for (int r = 0; r < NR; ++r) x[r] = splat(a[r * a_row + k * a_depth]);
                SAT_UNROLL(16)
                for (int v = 0; v < NV; ++v) {
                    const vec y = load(b + k * b_depth + v * W);
                    SAT_UNROLL(16)
                    for (int r = 0; r < NR; ++r) acc[r][v] += x[r] * y;
                }
            }
        }
    }
    emit(row, acc);
}

template <int NR, int NV, class Emit>
SAT_INLINE void micro_rest(int rest, int row, long depth, const float* a, long a_row, long a_depth, const float* b,
                           long b_depth, Ahead& ahead, Emit& emit) {
    if constexpr (NR > 0) {
        if (rest == NR)
            micro<NR, NV>(row, depth, a, a_row, a_depth, b, b_depth, ahead, emit);
        else
            micro_rest<NR - 1, NV>(rest, row, depth, a, a_row, a_depth, b, b_depth, ahead, emit);
    }
}

// C[r][lanes] for ROWS rows and NV vectors: sum_k a[r * a_row + k * a_depth] * b[k * b_depth + lanes].
template <int ROWS, int NV, class Emit>
SAT_INLINE void panel(long depth, const float* a, long a_row, long a_depth, const float* b, long b_depth, Ahead& ahead,
                      Emit emit) {
    constexpr int NR = rows_at_once(NV);
    constexpr int WHOLE = ROWS / NR * NR;
    for (int row = 0; row < WHOLE; row += NR) micro<NR, NV>(row, depth, a, a_row, a_depth, b, b_depth, ahead, emit);
    micro_rest<NR - 1, NV>(ROWS - WHOLE, WHOLE, depth, a, a_row, a_depth, b, b_depth, ahead, emit);
}

// c[r][lanes] (FIRST: =, else +=) sum_k a * b over `columns` lanes, a multiple of 16 (and of W).
template <int ROWS, bool FIRST, int NV = MAX_PANEL>
SAT_INLINE void add_product(long depth, const float* a, long a_row, long a_depth, const float* b, long b_depth, float* c,
                            long c_row, int columns, Ahead& ahead) {
    int first = 0;
    for (; first + NV * W <= columns; first += NV * W)
        panel<ROWS, NV>(depth, a, a_row, a_depth, b + first, b_depth, ahead, [&](int row, auto& acc) {
            constexpr int NR = sizeof(acc) / sizeof(acc[0]);
            SAT_UNROLL(16)
            for (int r = 0; r < NR; ++r)
                SAT_UNROLL(16)
                for (int v = 0; v < NV; ++v) {
                    float* p = c + (row + r) * c_row + first + v * W;
                    store(p, FIRST ? acc[r][v] : load(p) + acc[r][v]);
                }
        });
    if constexpr (NV > 1)
        if (first < columns)
            add_product<ROWS, FIRST, NV - 1>(depth, a, a_row, a_depth, b + first, b_depth, c + first, c_row,
                                             columns - first, ahead);
}

// ---- tensors ----

// One head of a [B, H, N, d] tensor.
struct Head {
    char* data;
    long row, column;    // strides in elements
    int64_t type;

    Head(const SatTensor& t, int64_t type, long b, long h)
        : data(const_cast<char*>(head_of(t, type, b, h))), row(t.row), column(t.column), type(type) {}
    static int size_of(int64_t type) { return type == SAT_FLOAT32 ? 4 : 2; }
    long row_bytes() const { return row * size_of(type); }
    char* at(long i) const { return data + i * row_bytes(); }
};

template <int D, class T>
SAT_INLINE void convert_rows(const T* p, long row, long column, int count, int d, float* to) {
    if (column == 1)
        SAT_UNROLL(4)
        for (int i = 0; i < count; ++i)
            for (int c = 0; c < d; c += W) store(to + i * d + c, load(p + i * row + c));
    else
        for (int i = 0; i < count; ++i)
            for (int c = 0; c < d; ++c) to[i * d + c] = to_float(p[i * row + c * column]);
}

// Rows [first, first + count) as fp32 [count][d]. Copied even where they are that already: a distance between rows that
// the compiler knows, and none that is a multiple of many cache lines, is worth more than the copy in what follows.
template <int D>
__attribute__((noinline)) void read_rows(const Head& head, long first, int count, int dim, float* to) {
    const int d = D ? D : dim;
    if (head.type == SAT_FLOAT32)
        convert_rows<D>(reinterpret_cast<const float*>(head.at(first)), head.row, head.column, count, d, to);
    else
        convert_rows<D>(reinterpret_cast<const bf16*>(head.at(first)), head.row, head.column, count, d, to);
}

template <int D, class T>
SAT_INLINE void convert_back(const float* from, const float* factor, int count, int d, T* p, long row) {
    SAT_UNROLL(4)
    for (int i = 0; i < count; ++i)
        for (int c = 0; c < d; c += W) store(p + i * row + c, load(from + i * d + c) * factor[i]);
}

// Rows [first, first + count) become from[i][c] * factor[i].
template <int D>
__attribute__((noinline)) void write_rows(const Head& head, long first, int count, int dim, const float* from,
                                          const float* factor) {
    const int d = D ? D : dim;
    if (head.type == SAT_FLOAT32)
        convert_back<D>(from, factor, count, d, reinterpret_cast<float*>(head.at(first)), head.row);
    else
        convert_back<D>(from, factor, count, d, reinterpret_cast<bf16*>(head.at(first)), head.row);
}

void zero_rows(const Head& head, long first, int count, int d) {
    const int bytes = d * Head::size_of(head.type);
    for (int i = 0; i < count; ++i) {
        char* row = head.at(first + i);
        for (int byte = 0; byte < bytes; byte += 32) memset(row + byte, 0, 32);    // inlined
    }
}

// [count][d] -> tiles of [d][TI], times `factor`.
template <int TI>
void pack(const float* rows, int count, int d, float factor, float* packed) {
    for (int i = 0; i < count; i += W) {
        float* tile = packed + i / TI * TI * d + i % TI;
        for (int c = 0; c < d; c += W) {
            vec x[W];
            SAT_UNROLL(16)
            for (int r = 0; r < W; ++r) x[r] = load(rows + (i + r) * d + c) * factor;
            transpose(x);
            SAT_UNROLL(16)
            for (int r = 0; r < W; ++r) store(tile + (c + r) * TI, x[r]);
        }
    }
}

// ---- forward and backward ----

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
    Head head(const SatTensor& t, long b, long h) const { return Head(t, call.type, b, h); }
    int row_bytes() const { return d * Head::size_of(call.type); }
    Blocks row_blocks(long r) const { return blocks_of(call.row_offsets, call.row_columns, r, nb); }

    // ---- tiles ----

    // p[j][i] = exp2(k_j . qt_i - reference[i]), zero at padded keys; adds the sums over j to total[i].
    static __attribute__((noinline)) void exp_scores(int d_, const float* k, const float* qt, const float* reference,
                                                     const uint8_t* real, float* p, float* total, Ahead& ahead) {
        const int dim = D ? D : d_;
        panel<TJ, NV>(dim, k, dim, 1, qt, TI, ahead, [&](int row, auto& acc) {
            constexpr int NR = sizeof(acc) / sizeof(acc[0]);
            SAT_UNROLL(16)
            for (int v = 0; v < NV; ++v) {
                const vec shift = load(reference + v * W);
                vec sum{};
                SAT_UNROLL(16)
                for (int r = 0; r < NR; ++r) {
                    vec x = exp2(acc[r][v] - shift);
                    if (real && !real[row + r]) x = vec{};
                    sum += x;
                    store(p + (row + r) * TI + v * W, x);
                }
                if (total) store(total + v * W, load(total + v * W) + sum);
            }
        });
    }

    // top[i] = max over real keys of k_j . qt_i and top[i].
    static __attribute__((noinline)) void max_scores(int d_, const float* k, const float* qt, const uint8_t* real,
                                                     float* top, Ahead& ahead) {
        const int dim = D ? D : d_;
        panel<TJ, NV>(dim, k, dim, 1, qt, TI, ahead, [&](int row, auto& acc) {
            constexpr int NR = sizeof(acc) / sizeof(acc[0]);
            for (int r = 0; r < NR; ++r)
                if (!real || real[row + r])
                    for (int v = 0; v < NV; ++v) store(top + v * W, max(load(top + v * W), acc[r][v]));
        });
    }

    // p[j][i] *= v_j . dot_i - delta[i]: the gradients of the scores.
    static __attribute__((noinline)) void score_gradients(int d_, const float* v, const float* dot, const float* delta,
                                                          float* p, Ahead& ahead) {
        const int dim = D ? D : d_;
        panel<TJ, NV>(dim, v, dim, 1, dot, TI, ahead, [&](int row, auto& acc) {
            constexpr int NR = sizeof(acc) / sizeof(acc[0]);
            SAT_UNROLL(16)
            for (int v = 0; v < NV; ++v) {
                const vec shift = load(delta + v * W);
                SAT_UNROLL(16)
                for (int r = 0; r < NR; ++r) {
                    float* x = p + (row + r) * TI + v * W;
                    store(x, load(x) * (acc[r][v] - shift));
                }
            }
        });
    }

    // o[i][c] (+)= sum_j p[j][i] v[j][c], o [TI][d].
    template <bool FIRST>
    static __attribute__((noinline)) void add_values(int d_, const float* v, const float* p, float* o, Ahead& ahead) {
        const int dim = D ? D : d_;
        add_product<TI, FIRST>(TJ, p, 1, TI, v, dim, o, dim, dim, ahead);
    }

    // dk[j][c] (+)= sum_i p[j][i] q[i][c]
    template <bool FIRST>
    static __attribute__((noinline)) void add_keys(int d_, const float* p, const float* q, float* dk, long stride,
                                                   Ahead& ahead) {
        const int dim = D ? D : d_;
        add_product<TJ, FIRST>(TI, p, TI, 1, q, dim, dk, stride, dim, ahead);
    }

    // Calls use(first, real) for each tile of keys in `columns` that has a real key, after prepare(next): `next` is the
    // first key of the tile that follows in `columns`, or -1.
    template <class Prepare, class Use>
    SAT_INLINE void each_tile(const Blocks& columns, const uint8_t* real, Prepare prepare, Use use) const {
        for (int n = 0; n < columns.count; ++n)
            for (int t = 0; t < bs; t += TJ) {
                const long first = static_cast<long>(columns[n]) * bs + t;
                const KeysState state = state_of(real ? real + first : nullptr, TJ);
                if (state == NO_KEY) continue;
                const long after = n + 1 < columns.count ? columns[n + 1] * static_cast<long>(bs) : -1;
                prepare(t + TJ < bs ? first + TJ : after);
                use(first, state == ALL_KEYS ? nullptr : real + first);
            }
    }

    // The next row of blocks that keeps any; nb if there is none.
    long row_after(long r) const {
        do ++r;
        while (r < nb && row_blocks(r).count == 0);
        return r;
    }

    void fetch(Ahead& ahead, const Head& head, long first, int count) const {
        ahead.add_read(head.at(first), head.row_bytes(), count, row_bytes());
    }
    void fetch_to_write(Ahead& ahead, const Head& head, long first, int count) const {
        ahead.add_write(head.at(first), head.row_bytes(), count, row_bytes());
    }

    // ---- forward ----

    struct Forward {
        float *rows;               // [bs][d]
        float *keys, *values;      // [TJ][d]
        float* qt;                 // [bs / TI][d][TI]
        float* o;                  // [bs][d]
        float* p;                  // [TJ][TI]
        float *reference, *total;  // [bs]
        static size_t size(int d, int bs) { return 4 * (3 * bs * d + 2 * TJ * d + TJ * TI + 2 * bs); }
        Forward(Scratch& scratch, int d, int bs)
            : rows(scratch.take(bs * d)), keys(scratch.take(TJ * d)), values(scratch.take(TJ * d)),
              qt(scratch.take(bs * d)), o(scratch.take(bs * d)), p(scratch.take(TJ * TI)),
              reference(scratch.take(bs)), total(scratch.take(bs)) {}
    };

    void forward_row(long b, long h, long r, const Forward& s) const {
        const Head query = head(call.query, b, h), key = head(call.key, b, h), value = head(call.value, b, h);
        const Head out = head(call.out, b, h);
        const uint8_t* real = real_of(b);
        const Blocks columns = row_blocks(r);
        const long num_pruned = call.pruned_zero ? (nb - columns.count) * bs : 0;
        float* lse = call.lse + (b * call.H + h) * call.N + r * bs;

        Ahead ahead;
        bool any_key = false;
        auto prepare = [&](long next) {
            const bool last = next < 0;
            const long below = last ? row_after(r) : nb;
            ahead.clear();
            if (below < nb) next = row_blocks(below)[0] * static_cast<long>(bs);
            if (last) fetch_to_write(ahead, out, r * bs, bs);
            if (below < nb) fetch(ahead, query, below * bs, bs);
            if (next >= 0) {
                fetch(ahead, key, next, TJ);
                fetch(ahead, value, next, TJ);
            }
        };
        auto sweep = [&] {
            any_key = false;
            memset(s.total, 0, sizeof(float) * bs);
            each_tile(columns, real, prepare, [&](long first, const uint8_t* mask) {
                read_rows<D>(key, first, TJ, d, s.keys);
                read_rows<D>(value, first, TJ, d, s.values);
                for (int i = 0; i < bs; i += TI) {
                    exp_scores(d, s.keys, s.qt + i * d, s.reference + i, mask, s.p, s.total + i, ahead);
                    if (any_key)
                        add_values<false>(d, s.values, s.p, s.o + i * d, ahead);
                    else
                        add_values<true>(d, s.values, s.p, s.o + i * d, ahead);
                }
                any_key = true;
            });
        };
        if (columns.count) {
            read_rows<D>(query, r * bs, bs, d, s.rows);
            pack<TI>(s.rows, bs, d, call.scale * LOG2E, s.qt);
            memset(s.reference, 0, sizeof(float) * bs);
            sweep();
        }
        if (!any_key) {
            for (int i = 0; i < bs; ++i) lse[i] = HUGE_LSE;
            zero_rows(out, r * bs, bs, d);
            return;
        }
        if (!add_pruned(s, num_pruned)) {
            find_maxima(columns, real, key, num_pruned, s);
            sweep();
            add_pruned(s, num_pruned);
        }
        for (int i = 0; i < bs; i += W) {
            const vec total = load(s.total + i);
            store(lse + i, log2(total) + load(s.reference + i));
            store(s.total + i, 1.0f / total);
        }
        write_rows<D>(out, r * bs, bs, d, s.o, s.total);
    }

    // Adds the pruned logits to the sums; false if one lies outside the range where they are exact.
    bool add_pruned(const Forward& s, long num_pruned) const {
        bool safe = true;
        for (int i = 0; i < bs; i += W) {
            vec total = load(s.total + i);
            if (num_pruned) total += exp2(-load(s.reference + i)) * static_cast<float>(num_pruned);
            store(s.total + i, total);
            safe &= within(total, 1 / SAFE_SUM, SAFE_SUM);
        }
        return safe;
    }

    __attribute__((noinline)) void find_maxima(const Blocks& columns, const uint8_t* real, const Head& key,
                                               long num_pruned, const Forward& s) const {
        for (int i = 0; i < bs; ++i) s.reference[i] = num_pruned ? 0.0f : -__builtin_inff();
        Ahead ahead;
        each_tile(columns, real, [](long) {}, [&](long first, const uint8_t* mask) {
            read_rows<D>(key, first, TJ, d, s.keys);
            for (int i = 0; i < bs; i += TI) max_scores(d, s.keys, s.qt + i * d, mask, s.reference + i, ahead);
        });
    }

    // ---- backward ----

    struct Backward {
        float *rows, *drows, *orows;    // [bs][d] Q, dO, O
        float *keys, *values;           // [TJ][d]
        float *qt, *dot;                // [bs / TI][d][TI]
        float* dq;                      // [bs][d]
        float* p;                       // [TJ][TI]
        float *lse, *delta, *ones;      // [bs]
        float *dk, *dv;                 // [`accumulated`][d], only where outputs are not fp32
        static size_t size(int d, int bs, long accumulated) {
            return 4 * (6 * bs * d + 2 * TJ * d + TJ * TI + 3 * bs + 2 * accumulated * d);
        }
        Backward(Scratch& scratch, int d, int bs, long accumulated)
            : rows(scratch.take(bs * d)), drows(scratch.take(bs * d)), orows(scratch.take(bs * d)),
              keys(scratch.take(TJ * d)), values(scratch.take(TJ * d)), qt(scratch.take(bs * d)),
              dot(scratch.take(bs * d)), dq(scratch.take(bs * d)), p(scratch.take(TJ * TI)), lse(scratch.take(bs)),
              delta(scratch.take(bs)), ones(scratch.take(bs)), dk(scratch.take(accumulated * d)),
              dv(scratch.take(accumulated * d)) {
            for (int i = 0; i < bs; ++i) ones[i] = 1.0f;
        }
    };

    // What a row of blocks contributes: rows of Q and dO as they are and packed, log-denominators, D = scale * dO . O.
    void load_row(long b, long h, long r, const Backward& s) const {
        read_rows<D>(head(call.query, b, h), r * bs, bs, d, s.rows);
        read_rows<D>(head(call.dout, b, h), r * bs, bs, d, s.drows);
        read_rows<D>(head(call.out, b, h), r * bs, bs, d, s.orows);
        pack<TI>(s.rows, bs, d, call.scale * LOG2E, s.qt);
        pack<TI>(s.drows, bs, d, call.scale, s.dot);
        memcpy(s.lse, call.lse + (b * call.H + h) * call.N + r * bs, sizeof(float) * bs);
        for (int i = 0; i < bs; i += W) {
            vec x[W];
            for (int k = 0; k < W; ++k) {
                x[k] = vec{};
                for (int c = (i + k) * d; c < (i + k + 1) * d; c += W) x[k] += load(s.drows + c) * load(s.orows + c);
            }
            transpose(x);
            vec delta = x[0];
            for (int k = 1; k < W; ++k) delta += x[k];
            store(s.delta + i, delta * call.scale);
        }
    }

    // One tile of keys against one row of blocks. FIRST: dk and dv hold nothing yet.
    template <bool DQ, bool DKV, bool FIRST>
    void backward_tile(const uint8_t* mask, bool first_dq, float* dk, float* dv, long stride, Ahead& ahead,
                       const Backward& s) const {
        for (int i = 0; i < bs; i += TI) {
            exp_scores(d, s.keys, s.qt + i * d, s.lse + i, mask, s.p, nullptr, ahead);
            if (DKV) {
                if (FIRST && i == 0)
                    add_keys<true>(d, s.p, s.drows + i * d, dv, stride, ahead);
                else
                    add_keys<false>(d, s.p, s.drows + i * d, dv, stride, ahead);
            }
            score_gradients(d, s.values, s.dot + i * d, s.delta + i, s.p, ahead);
            if (DKV) {
                if (FIRST && i == 0)
                    add_keys<true>(d, s.p, s.rows + i * d, dk, stride, ahead);
                else
                    add_keys<false>(d, s.p, s.rows + i * d, dk, stride, ahead);
            }
            if (DQ) {
                if (first_dq)
                    add_values<true>(d, s.keys, s.p, s.dq + i * d, ahead);
                else
                    add_values<false>(d, s.keys, s.p, s.dq + i * d, ahead);
            }
        }
    }

    // dK and dV of a head or a column of blocks: in place where they are fp32, else in scratch.
    struct Target {
        float *dk, *dv;
        long stride;    // of both
    };

    bool in_place() const { return call.type == SAT_FLOAT32 && call.dkey.row == call.dvalue.row; }

    Target target(const Head& dkey, const Head& dvalue, long first, const Backward& s) const {
        if (!in_place()) return {s.dk, s.dv, d};
        return {reinterpret_cast<float*>(dkey.at(first)), reinterpret_cast<float*>(dvalue.at(first)), dkey.row};
    }

    // The first row of blocks that keeps column c; -1 if none does.
    long first_row(long c) const {
        const Blocks rows = blocks_of(call.column_offsets, call.column_rows, c, nb);
        return rows.count ? rows[0] : -1;
    }

    static void zero(const Target& to, long first, int count, int d) {
        for (long j = first; j < first + count; ++j)
            for (int c = 0; c < d; c += W) {
                store(to.dk + j * to.stride + c, vec{});
                store(to.dv + j * to.stride + c, vec{});
            }
    }

    // Row r of blocks: dQ, and (where one thread owns the head) its share of dK and dV.
    template <bool DKV>
    void backward_row(long b, long h, long r, const Target& to, const Backward& s) const {
        const Head query = head(call.query, b, h), key = head(call.key, b, h), value = head(call.value, b, h);
        const Head out = head(call.out, b, h), dout = head(call.dout, b, h);
        const Head dquery = head(call.dquery, b, h), dkey = head(call.dkey, b, h), dvalue = head(call.dvalue, b, h);
        const uint8_t* real = real_of(b);
        const Blocks columns = row_blocks(r);
        bool any_key = false;
        if (columns.count) {
            Ahead ahead;
            load_row(b, h, r, s);
            auto prepare = [&](long next) {
                const bool last = next < 0;
                const long below = last ? row_after(r) : nb;
                ahead.clear();
                if (below < nb) next = row_blocks(below)[0] * static_cast<long>(bs);
                if (last) fetch_to_write(ahead, dquery, r * bs, bs);
                if (below < nb) {
                    fetch(ahead, query, below * bs, bs);
                    fetch(ahead, dout, below * bs, bs);
                    fetch(ahead, out, below * bs, bs);
                }
                if (next >= 0) {
                    fetch(ahead, key, next, TJ);
                    fetch(ahead, value, next, TJ);
                    if (DKV && in_place()) {
                        fetch_to_write(ahead, dvalue, next, TJ);
                        fetch_to_write(ahead, dkey, next, TJ);
                    }
                }
            };
            each_tile(columns, real, prepare, [&](long first, const uint8_t* mask) {
                read_rows<D>(key, first, TJ, d, s.keys);
                read_rows<D>(value, first, TJ, d, s.values);
                float *dk = nullptr, *dv = nullptr;
                bool first_dkv = false;
                if (DKV) {
                    dk = to.dk + first * to.stride, dv = to.dv + first * to.stride;
                    first_dkv = first_row(first / bs) == r;
                }
                if (first_dkv)
                    backward_tile<true, DKV, true>(mask, !any_key, dk, dv, to.stride, ahead, s);
                else
                    backward_tile<true, DKV, false>(mask, !any_key, dk, dv, to.stride, ahead, s);
                any_key = true;
            });
        }
        if (any_key)
            write_rows<D>(dquery, r * bs, bs, d, s.dq, s.ones);
        else
            zero_rows(dquery, r * bs, bs, d);
    }

    // One thread does a whole (batch, head).
    void backward_head(long b, long h, const Backward& s) const {
        const Head dkey = head(call.dkey, b, h), dvalue = head(call.dvalue, b, h);
        const Target to = target(dkey, dvalue, 0, s);
        const uint8_t* real = real_of(b);
        for (long c = 0; c < nb; ++c)    // what no tile writes
            for (long first = c * bs; first < (c + 1) * bs; first += TJ)
                if (first_row(c) < 0 || state_of(real ? real + first : nullptr, TJ) == NO_KEY) zero(to, first, TJ, d);
        for (long r = 0; r < nb; ++r) backward_row<true>(b, h, r, to, s);
        if (!in_place())
            for (long r = 0; r < nb; ++r) {
                write_rows<D>(dkey, r * bs, bs, d, to.dk + r * bs * d, s.ones);
                write_rows<D>(dvalue, r * bs, bs, d, to.dv + r * bs * d, s.ones);
            }
    }

    // Column c of blocks: dK and dV alone, when the heads are too few to give every thread one.
    void backward_column(long b, long h, long c, const Backward& s) const {
        const Head key = head(call.key, b, h), value = head(call.value, b, h);
        const Head dkey = head(call.dkey, b, h), dvalue = head(call.dvalue, b, h);
        const Target to = target(dkey, dvalue, c * bs, s);
        zero(to, 0, bs, d);
        const Blocks rows = blocks_of(call.column_offsets, call.column_rows, c, nb);
        const int32_t column = static_cast<int32_t>(c);
        for (int n = 0; n < rows.count; ++n) {
            Ahead ahead;
            load_row(b, h, rows[n], s);
            each_tile({&column, 1}, real_of(b), [](long) {}, [&](long first, const uint8_t* mask) {
                read_rows<D>(key, first, TJ, d, s.keys);
                read_rows<D>(value, first, TJ, d, s.values);
                const long offset = (first - c * bs) * to.stride;
                if (n == 0)
                    backward_tile<false, true, true>(mask, false, to.dk + offset, to.dv + offset, to.stride, ahead, s);
                else
                    backward_tile<false, true, false>(mask, false, to.dk + offset, to.dv + offset, to.stride, ahead, s);
            });
        }
        if (!in_place()) {
            write_rows<D>(dkey, c * bs, bs, d, to.dk, s.ones);
            write_rows<D>(dvalue, c * bs, bs, d, to.dv, s.ones);
        }
    }

    // ---- whole calls ----

    int forward() const {
        const long H = call.H, heads = call.B * H;
        return spread(
            call.threads, heads * nb, static_cast<int>(heads >= call.threads ? nb : 1), Forward::size(d, bs),
            [&](Scratch& scratch) { return Forward(scratch, d, bs); },
            [&](const Forward& s, long i) { forward_row(i / nb / H, i / nb % H, i % nb, s); });
    }

    int backward() const {
        const long H = call.H, heads = call.B * H;
        if (heads >= call.threads) {
            const long accumulated = in_place() ? 0 : call.N;
            return spread(
                call.threads, heads, 1, Backward::size(d, bs, accumulated),
                [&](Scratch& scratch) { return Backward(scratch, d, bs, accumulated); },
                [&](const Backward& s, long i) { backward_head(i / H, i % H, s); });
        }
        const long accumulated = in_place() ? 0 : bs;
        const size_t size = Backward::size(d, bs, accumulated);
        auto make = [&](Scratch& scratch) { return Backward(scratch, d, bs, accumulated); };
        const int status = spread(call.threads, heads * nb, 1, size, make, [&](const Backward& s, long i) {
            backward_row<false>(i / nb / H, i / nb % H, i % nb, {}, s);
        });
        if (status != SAT_OK) return status;
        return spread(call.threads, heads * nb, 1, size, make, [&](const Backward& s, long i) {
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
        return 4 * (TI * d + TJ * d + TI * d + 2 * (call.mean ? N : TJ) * TI + nb * TI + 3 * TI + heads * nb);
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
    bool sweep(const Head& key, const Head* next, const uint8_t* real, const Pieces& s) const {
        memset(s.sums, 0, sizeof(float) * nb * TI);
        Ahead ahead;
        each_tile(real, [&](long first, const uint8_t* mask) {
            ahead.clear();
            if (first + TJ < N)
                ahead.add_read(key.at(first + TJ), key.row_bytes(), TJ, d * Head::size_of(key.type));
            else if (next)
                ahead.add_read(next->at(0), next->row_bytes(), TJ, d * Head::size_of(key.type));
            read_rows<D>(key, first, TJ, d, s.keys);
            float* p = call.mean ? s.p + first * TI : s.p;
            Tile::exp_scores(d, s.keys, s.qt, s.reference, mask, p, s.sums + first / bs * TI, ahead);
        });
        bool safe = true;
        for (int v = 0; v < NV; ++v) {
            vec total{};
            for (long c = 0; c < nb; ++c) total += load(s.sums + c * TI + v * W);
            store(s.total + v * W, total);
            safe &= within(total, 1 / SAFE_SUM, SAFE_SUM);
        }
        return safe;
    }

    // One head against the tile of queries that starts at `row`.
    void head(long b, long h, long row, float* pooled, const Pieces& s) const {
        const uint8_t* real = call.real ? call.real + b * N : nullptr;
        if (real && !memchr(real, 1, N)) return;    // p is 0
        const Head query(call.query, call.type, b, h), key(call.key, call.type, b, h);
        read_rows<D>(query, row, TI, d, s.rows);
        pack<TI>(s.rows, TI, d, call.scale * LOG2E, s.qt);
        memset(s.reference, 0, sizeof(float) * TI);
        if (!sweep(key, &key, real, s)) {
            for (int i = 0; i < TI; ++i) s.reference[i] = -__builtin_inff();
            Ahead ahead;
            each_tile(real, [&](long first, const uint8_t* mask) {
                read_rows<D>(key, first, TJ, d, s.keys);
                Tile::max_scores(d, s.keys, s.qt, mask, s.reference, ahead);
            });
            sweep(key, &key, real, s);
        }
        for (int v = 0; v < NV; ++v) store(s.inverse + v * W, 1.0f / load(s.total + v * W));
        pool<TI>(call, b, row, s.sums, s.inverse, pooled);
        if (call.mean) each_tile(real, [&](long first, const uint8_t*) { add_probs(s, first); });
    }

    static __attribute__((noinline)) void add_probs(const Pieces& s, long first) {
        vec inverse[NV];
        for (int v = 0; v < NV; ++v) inverse[v] = load(s.inverse + v * W);
        for (long j = first; j < first + TJ; ++j)
            SAT_UNROLL(4)
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
                        for (int k = 0; k < W; ++k) {
                            // no hardware prefetcher follows so many rows
                            prefetch_to_read(reinterpret_cast<const char*>(mean + k * N + 8 * W));
                            store(mean + k * N, load(mean + k * N) + x[k] * weight);
                        }
                    }
        }
        sum_pooled(call, group, r, s.pooled);
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
