// Statistics of dense attention. One task is a row of blocks of one group of examples, tile of queries by tile. The
// probabilities of a tile and one head, [N][T] and fp32, await their sum; they are added to the tile's mean while the next
// head's replace them, under the products. Where a forward pass has left the sums (lse), they are added at once.
// `bs` here only pools: it is as large as a tile or a multiple of it.
//
// Included by attention.h.
#pragma once

namespace SAT_ISA_NAMESPACE {
namespace {

template <template <bool> class Engines, int D, int Q, int T>
struct Statistics : Products<Engines, D, Q, T> {
    static_assert(Q == T, "a tile is a square");
    typedef Products<Engines, D, Q, T> Tiles;
    typedef typename Tiles::Engine Engine;
    typedef typename Tiles::Operand Operand;
    typedef typename Tiles::Element Element;
    using Tiles::NV;
    static constexpr int NUM = Engine::NUM;
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
        Operand *rows, *keys;                  // copies of inputs that cannot be read in place
        Element* qt;                           // [d / NUM][T]
        float *p, *mean;                       // [N][T], not where only the pooled sums are wanted
        float* sums;                           // [nb][T] over the keys of a block
        float *reference, *total, *inverse;    // [T]
        float* pooled;                         // [heads][nb] sums over a block
        static size_t probs(const SatStatistics& call) { return call.mean ? call.N * T : 0; }
        static size_t size(const Statistics& s) {
            return sizeof(Operand) * T * s.d * 3 + 4 * (2 * probs(s.call) + s.nb * T + 3 * T + s.heads * s.nb);
        }
        Pieces(Scratch& s, const Statistics& to)
            : rows(s.take<Operand>(T * to.d)), keys(s.take<Operand>(T * to.d)), qt(s.take<Element>(T * to.d / NUM)),
              p(s.take(probs(to.call))), mean(s.take(probs(to.call))), sums(s.take(to.nb * T)), reference(s.take(T)),
              total(s.take(T)), inverse(s.take(T)), pooled(s.take(to.heads * to.nb)) {}
    };

    enum Mean { NONE, WAITING, KNOWN };    // no mean is wanted; probabilities await their sum; their sum is known

    // Exponentials of scale k_j . q_i - reference[i], zero at padded keys; their sums over j are added to sums[i]. They are
    // kept in p, and what stood there is added to the mean, or they are added to it themselves.
    template <Mean MEAN, bool PADDED>
    static __attribute__((noinline)) void exp_scores(int d_, const Rows<Operand>& k, float scale, const uint8_t* real, float* p,
                                                     float* mean, float* sums, const Pieces& s) {
        const int d = D ? D : d_;
        Engine::template panel<T, NV>(d / NUM, RowFactor(k), {s.qt, T}, s.ahead, [&](int row, auto& scores) __attribute__((always_inline)) {
            constexpr int NR = sizeof(scores) / sizeof(scores[0]);
            SAT_UNROLL(4)
            for (int v = 0; v < NV; ++v) {
                const vec shift = load(s.reference + v * W), inverse = load(s.inverse + v * W);
                vec sum{};
                SAT_UNROLL(16)
                for (int r = 0; r < NR; ++r) {
                    vec x = Engine::exp_statistics(scores[r][v] * scale - shift);
                    if (PADDED && !real[row + r]) x = vec{};
                    sum += x;
                    const long place = (row + r) * T + v * W;
                    if constexpr (MEAN == WAITING) {
                        store(mean + place, load(mean + place) + load(p + place) * inverse);
                        store(p + place, x);
                    } else if constexpr (MEAN == KNOWN) {
                        store(mean + place, load(mean + place) + x);
                    }
                }
                store(sums + v * W, load(sums + v * W) + sum);
            }
        });
    }

    // Calls use(first, keys, state) for each tile of keys, `keys` being its rows.
    template <class Use>
    SAT_INLINE void each_tile(const char* k_head, const uint8_t* real, const Pieces& s, Use use) const {
        const int size = call.type == SAT_FLOAT32 ? 4 : 2;
        for (long first = 0; first < N; first += T) {
            s.ahead.restart();
            if (first + T < N)
                s.ahead.expect(k_head + (first + T) * call.key.row * size, call.key.row * size, T, d * size);
            use(first, rows_of(call.key, call.type, k_head, first, T, d, s.keys), state_of(real ? real + first : nullptr, T));
        }
    }

    // Exponentials to p, their sums over each block to sums, over all keys to total. False if out of the safe range.
    template <Mean MEAN>
    bool sweep(const char* k_head, const uint8_t* real, const Pieces& s) const {
        const float scale = call.scale * LOG2E;
        memset(s.sums, 0, sizeof(float) * nb * T);
        each_tile(k_head, real, s, [&](long first, const Rows<Operand>& k, KeysState state) {
            const long place = MEAN == NONE ? 0 : first * T;
            float *p = s.p + place, *mean = s.mean + place, *sums = s.sums + first / bs * T;
            if (state == ALL_KEYS) {
                exp_scores<MEAN, false>(d, k, scale, nullptr, p, mean, sums, s);
            } else if (state == SOME_KEYS) {
                exp_scores<MEAN, true>(d, k, scale, real + first, p, mean, sums, s);
            } else if (MEAN == WAITING) {
                add_probs(p, mean, s);
                memset(p, 0, sizeof(float) * T * T);
            }
        });
        bool exact = true;
        for (int v = 0; v < NV; ++v) {
            vec total{};
            for (long c = 0; c < nb; ++c) total += load(s.sums + c * T + v * W);
            store(s.total + v * W, total);
            exact &= within(total, 1 / SAFE_SUM, SAFE_SUM);
        }
        return exact;
    }

    // One head against the tile of queries that starts at `row`.
    template <Mean MEAN>
    void head(long b, long h, long row, float* pooled, const Pieces& s) const {
        const uint8_t* real = call.real ? call.real + b * N : nullptr;
        if (real && !memchr(real, 1, N)) return;    // p is 0
        const char* k_head = head_of(call.key, call.type, b, h);
        Engine::template pack_columns<T>(
            rows_of(call.query, call.type, head_of(call.query, call.type, b, h), row, T, d, s.rows), T, d, s.qt);
        if (call.lse) {
            memcpy(s.reference, call.lse + (b * call.H + h) * N + row, sizeof(float) * T);
            sweep<MEAN>(k_head, real, s);
        } else {
            memset(s.reference, 0, sizeof(float) * T);
            if (!sweep<MEAN>(k_head, real, s)) {
                for (int i = 0; i < T; ++i) s.reference[i] = -__builtin_inff();
                each_tile(k_head, real, s, [&](long first, const Rows<Operand>& k, KeysState state) {
                    const Hiding hiding{state == SOME_KEYS ? real + first : nullptr, -MAX_BLOCK};
                    if (state != NO_KEY) Tiles::max_scores(d, k, s.qt, call.scale * LOG2E, hiding, s.reference, s.ahead);
                });
                // What the head before left is in the mean already.
                if (MEAN == WAITING) memset(s.p, 0, sizeof(float) * N * T);
                sweep<MEAN>(k_head, real, s);
            }
            for (int v = 0; v < NV; ++v) store(s.inverse + v * W, 1.0f / load(s.total + v * W));
        }
        pool(b, row, s, pooled);
    }

    // Adds the sums over a tile of queries and the keys of each block to pooled, and weighted by row to real_sum.
    void pool(long b, long row, const Pieces& s, float* pooled) const {
        vec weights[NV];
        double* real_sum = nullptr;
        if (call.row_weights) {
            real_sum = call.real_sum + (b / (call.B / call.groups) * nb + row / bs) * nb;
            for (int v = 0; v < NV; ++v) weights[v] = load(call.row_weights + b * N + row + v * W) * load(s.inverse + v * W);
        }
        for (long c = 0; c < nb; ++c) {
            const float* sums = s.sums + c * T;
            vec block{}, of_real{};
            for (int v = 0; v < NV; ++v) block += load(sums + v * W) * load(s.inverse + v * W);
            pooled[c] += sum(block);
            if (!real_sum) continue;
            for (int v = 0; v < NV; ++v) of_real += load(sums + v * W) * weights[v];
            real_sum[c] += static_cast<double>(sum(of_real)) / (bs * bs);
        }
    }

    // Adds a tile of the probabilities that wait to the mean.
    static void add_probs(const float* p, float* mean, const Pieces& s) {
        for (int j = 0; j < T; ++j)
            for (int v = 0; v < NV; ++v) {
                const int place = j * T + v * W;
                store(mean + place, load(mean + place) + load(p + place) * load(s.inverse + v * W));
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
            for (int i = 0; i < T; ++i) s.inverse[i] = call.lse ? 1.0f : 0.0f;
            for (long n = 0; n < heads; ++n) {
                const long b = group * (call.B / call.groups) + n / call.H, h = n % call.H;
                if (!call.mean)
                    head<NONE>(b, h, row, s.pooled + n * nb, s);
                else if (call.lse)
                    head<KNOWN>(b, h, row, s.pooled + n * nb, s);
                else
                    head<WAITING>(b, h, row, s.pooled + n * nb, s);
            }
            if (call.mean) write_mean(group, row, s);
        }
        sum_pooled(group, r, s.pooled);
    }

    // `pooled` [heads of a group][nb]: sums over the blocks of row r. Their means, and the squares of those, summed over heads.
    void sum_pooled(long group, long r, const float* pooled) const {
        double squares = 0;
        double* sums = call.pooled_sum + (group * nb + r) * nb;
        for (long c = 0; c < nb; ++c) sums[c] = 0;
        for (long n = 0; n < heads; ++n)
            for (long c = 0; c < nb; ++c) {
                const double value = static_cast<double>(pooled[n * nb + c]) / (bs * bs);
                sums[c] += value;
                squares += value * value;
            }
        call.square_sum[group * nb + r] = squares;
    }

    int run() const {
        return spread(
            call.threads, call.groups * nb, 1, Pieces::size(*this), [&](Scratch& s) { return Pieces(s, *this); },
            [&](const Pieces& s, long i) { row_of_blocks(i / nb, i % nb, s); });
    }
};

}    // namespace
}    // namespace SAT_ISA_NAMESPACE
