// Attention in bf16 with AMX: tdpbf16ps multiplies whole tiles, 16 rows by 16 columns by 16 (or 8) pairs.
//
// Written against the intrinsics' documentation and tested on an emulation of them (tests/amx_emulation): it has not met a
// processor with AMX yet.
#define SAT_ISA_NAMESPACE amx
#define SAT_WIDTH 16
#include "attention.h"
#include "engine_bf16.h"

#ifdef SAT_AMX_EMULATION
#include "amx_emulation.h"
#endif

namespace SAT_ISA_NAMESPACE {
namespace {

// What ldtilecfg reads.
struct TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64, "64 bytes");

// The compiler does not know that tile loads read memory (GCC 12 declares no such operand): stores come first.
SAT_INLINE void finish_stores() { asm volatile("" ::: "memory"); }

template <bool WIDE>
struct TileEngine : Bfloat16 {
    static constexpr int STEP = WIDE ? 16 : 8;    // pairs that one instruction takes

    // Tiles 0 to 3 accumulate, 4 and 5 hold A, 6 and 7 hold B.
    struct Session {
        Session() {
            alignas(64) TileConfig config;
            for (int tile = 0; tile < 8; ++tile) {
                config.rows[tile] = tile < 6 ? 16 : STEP;
                config.row_bytes[tile] = tile == 4 || tile == 5 ? 4 * STEP : 64;
            }
            finish_stores();
            _tile_loadconfig(&config);
        }
        ~Session() { _tile_release(); }
        Session(const Session&) = delete;
        Session& operator=(const Session&) = delete;
    };

    // Rows [row, row + 16) and pairs [k, k + STEP) of A, where a tile load can read them.
    struct Window {
        const void* data;
        long row_bytes;
    };
    static SAT_INLINE Window window(const RowFactor& a, int row, long k, float*) {
        return {a.data + row * a.row_bytes + 4 * k, a.row_bytes};
    }
    template <int COLUMNS>
    static SAT_INLINE Window window(const ColumnFactor<COLUMNS>& a, int row, long k, float* buffer) {
        const float* pairs_of_k = reinterpret_cast<const float*>(a.data) + k * COLUMNS + row;
        vec x[W];
        SAT_UNROLL(16)
        for (int n = 0; n < W; ++n) x[n] = n < STEP ? load(pairs_of_k + n * COLUMNS) : vec{};
        transpose(x);
        SAT_UNROLL(16)
        for (int n = 0; n < W; ++n) store(buffer + n * W, x[n]);
        return {buffer, 64};
    }

    // C = A B, or C += A B, for RT by CT tiles of C.
    template <int RT, int CT, class A>
    static SAT_INLINE void block(long depth, const A& a, const Panel<uint32_t>& b, float* c, long c_columns,
                                 bool fresh, Ahead& ahead) {
        ahead.fetch(4 * RT * CT);
        alignas(64) float buffer[2][W * W];
        const long c_bytes = 4 * c_columns;
        float *upper = c, *lower = c + W * c_columns;
        finish_stores();
        if (fresh) {
            _tile_zero(0);
            if constexpr (CT > 1) _tile_zero(1);
            if constexpr (RT > 1) _tile_zero(2);
            if constexpr (RT > 1 && CT > 1) _tile_zero(3);
        } else {
            _tile_loadd(0, upper, c_bytes);
            if constexpr (CT > 1) _tile_loadd(1, upper + W, c_bytes);
            if constexpr (RT > 1) _tile_loadd(2, lower, c_bytes);
            if constexpr (RT > 1 && CT > 1) _tile_loadd(3, lower + W, c_bytes);
        }
        for (long k = 0; k < depth; k += STEP) {
            const Window first = window(a, 0, k, buffer[0]);
            Window second{};
            if constexpr (RT > 1) second = window(a, W, k, buffer[1]);
            finish_stores();
            _tile_loadd(4, first.data, first.row_bytes);
            _tile_loadd(6, b.data + k * b.stride, 4 * b.stride);
            _tile_dpbf16ps(0, 4, 6);
            if constexpr (CT > 1) {
                _tile_loadd(7, b.data + k * b.stride + W, 4 * b.stride);
                _tile_dpbf16ps(1, 4, 7);
            }
            if constexpr (RT > 1) {
                _tile_loadd(5, second.data, second.row_bytes);
                _tile_dpbf16ps(2, 5, 6);
                if constexpr (CT > 1) _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, upper, c_bytes);
        if constexpr (CT > 1) _tile_stored(1, upper + W, c_bytes);
        if constexpr (RT > 1) _tile_stored(2, lower, c_bytes);
        if constexpr (RT > 1 && CT > 1) _tile_stored(3, lower + W, c_bytes);
    }

    template <int ROWS, class A>
    static SAT_INLINE void add(long depth, const A& a, const Panel<uint32_t>& b, float* c, long stride, long columns, bool fresh,
                               Ahead& ahead) {
        constexpr int RT = ROWS / W;
        static_assert(ROWS % W == 0 && RT <= 2, "a product is one or two tiles high");
        long first = 0;
        for (; first + 2 * W <= columns; first += 2 * W) {
            block<RT, 2>(depth, a, b + first, c + first, stride, fresh, ahead);
        }
        if (first < columns) block<RT, 1>(depth, a, b + first, c + first, stride, fresh, ahead);
    }

    template <int ROWS, int NV, class A, class Emit>
    static SAT_INLINE void panel(long depth, const A& a, const Panel<uint32_t>& b, Ahead& ahead, Emit emit) {
        alignas(64) float c[ROWS * NV * W];
        block<ROWS / W, NV>(depth, a, b, c, NV * W, true, ahead);
        for (int row = 0; row < ROWS; row += 4) {
            vec acc[4][NV];
            read(acc, c, row);
            emit(row, acc);
        }
    }

    template <int ROWS, int NV, class A, class First, class Second>
    static SAT_INLINE void panels(long depth, const A& a, const Panel<uint32_t>& b, const A& a2, const Panel<uint32_t>& b2,
                                  bf16*, Ahead& ahead, First first, Second second) {
        alignas(64) float c[ROWS * NV * W], c2[ROWS * NV * W];
        block<ROWS / W, NV>(depth, a, b, c, NV * W, true, ahead);
        block<ROWS / W, NV>(depth, a2, b2, c2, NV * W, true, ahead);
        for (int row = 0; row < ROWS; row += 4) {
            vec acc[4][NV], acc2[4][NV];
            read(acc, c, row);
            read(acc2, c2, row);
            first(row, acc);
            second(row, acc, acc2);
        }
    }
};

}    // namespace
}    // namespace SAT_ISA_NAMESPACE

SAT_DEFINE_ATTENTION(TileEngine)
