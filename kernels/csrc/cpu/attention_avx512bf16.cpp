// The products of attention_bf16.h with AVX512_BF16: vdpbf16ps multiplies a pair, broadcast, by a vector of pairs.
#define SAT_ISA_NAMESPACE avx512_bf16
#define SAT_WIDTH 16
#include "attention_bf16.h"

namespace SAT_ISA_NAMESPACE {
namespace {

template <bool>
struct Dot {
    struct Session {};

    // Rows of accumulators: NR * NV of them, NV loaded vectors and a broadcast must fit 32 registers, NR divide 16.
    static constexpr int rows_at_once(int vectors) { return vectors > 2 ? 4 : 8; }

    template <class A>
    static SAT_INLINE pairs broadcast(const A& a, long row, long k) {
        return splat_pair(*reinterpret_cast<const pair_unaligned*>(a.data + row * a.row_bytes + k * a.pair_bytes));
    }

    // acc += A B over `depth` pairs for rows [row, row + NR).
    template <int NR, int NV, class A>
    static SAT_INLINE void step(vec (&acc)[NR][NV], int row, long k, const A& a, const uint32_t* b, long columns) {
        pairs y[NV];
        SAT_UNROLL(4)
        for (int v = 0; v < NV; ++v) y[v] = load_pairs(b + k * columns + v * W);
        SAT_UNROLL(16)
        for (int r = 0; r < NR; ++r) {
            const pairs x = broadcast(a, row + r, k);
            SAT_UNROLL(4)
            for (int v = 0; v < NV; ++v) acc[r][v] = dot2(acc[r][v], x, y[v]);
        }
    }

    template <int NR, int NV>
    static SAT_INLINE void clear(vec (&acc)[NR][NV]) {
        SAT_UNROLL(16)
        for (int r = 0; r < NR; ++r)
            SAT_UNROLL(4)
            for (int v = 0; v < NV; ++v) acc[r][v] = vec{};
    }

    template <int ROWS, int NV, class A, class Emit>
    static SAT_INLINE void panel(long depth, const A& a, const uint32_t* b, long columns, Emit emit) {
        constexpr int NR = rows_at_once(NV);
        for (int row = 0; row < ROWS; row += NR) {
            vec acc[NR][NV];
            clear(acc);
            SAT_UNROLL(2)
            for (long k = 0; k < depth; ++k) step(acc, row, k, a, b, columns);
            emit(row, acc);
        }
    }

    template <int ROWS, int NV, class A, class Emit>
    static SAT_INLINE void panels(long depth, const A& a, const uint32_t* b, const A& a2, const uint32_t* b2, long columns,
                                  Emit emit) {
        constexpr int NR = rows_at_once(2 * NV);
        for (int row = 0; row < ROWS; row += NR) {
            vec acc[NR][NV], acc2[NR][NV];
            clear(acc);
            clear(acc2);
            for (long k = 0; k < depth; ++k) {
                step(acc, row, k, a, b, columns);
                step(acc2, row, k, a2, b2, columns);
            }
            emit(row, acc, acc2);
        }
    }

    template <int ROWS, int NV = 4, class A, class Pause>
    static SAT_INLINE void add(long depth, const A& a, const uint32_t* b, float* c, long columns, bool fresh,
                               Pause& pause, long first = 0) {
        for (; first + NV * W <= columns; first += NV * W)
            panel<ROWS, NV>(depth, a, b + first, columns, [&](int row, auto& acc) {
                constexpr int NR = sizeof(acc) / sizeof(acc[0]);
                pause();
                SAT_UNROLL(16)
                for (int r = 0; r < NR; ++r)
                    SAT_UNROLL(4)
                    for (int v = 0; v < NV; ++v) {
                        float* p = c + (row + r) * columns + first + v * W;
                        store(p, fresh ? acc[r][v] : load(p) + acc[r][v]);
                    }
            });
        if constexpr (NV > 1)
            if (first < columns) add<ROWS, NV - 1>(depth, a, b, c, columns, fresh, pause, first);
    }
};

}    // namespace

int attention_forward(const SatAttention& call) { return forward_with<Dot>(call); }
int attention_backward(const SatAttention& call) { return backward_with<Dot>(call); }
int attention_statistics(const SatStatistics& call) { return statistics_with<Dot>(call); }

}    // namespace SAT_ISA_NAMESPACE
