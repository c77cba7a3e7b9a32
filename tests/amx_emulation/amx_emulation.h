// The AMX instructions that kernels/csrc/cpu/attention_amx.cpp uses, in plain C++, for tests on processors without them.
//
// As the manual (Intel SDM, volume 2: LDTILECFG, TILELOADD, TDPBF16PS, ...) has them, and strict: what raises an exception
// there, reads a tile that nothing was written to, or leaves a configuration behind is remembered as an error, which the
// tests read. Tiles are per thread. A tile without a value holds NaN.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#pragma GCC visibility push(default)
extern "C" {
inline char amx_emulation_error[256] = "";
inline long amx_emulation_open = 0;    // configurations loaded and not released
inline long amx_emulation_products = 0;
}
#pragma GCC visibility pop

#define SAT_OUT_OF_LINE inline __attribute__((noinline))

namespace amx_emulation {

struct Tile {
    uint8_t bytes[16][64];
    bool written;
};

struct Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
static_assert(sizeof(Config) == 64, "64 bytes");

struct State {
    Config config;    // palette 0: none
    Tile tiles[8];
};
inline thread_local State state = {};

SAT_OUT_OF_LINE void fail(const char* what, int tile) {
    if (!amx_emulation_error[0]) snprintf(amx_emulation_error, sizeof(amx_emulation_error), "%s (tile %d)", what, tile);
}

inline void poison(Tile& tile) {
    const float nan = NAN;
    for (auto& row : tile.bytes)
        for (int n = 0; n < 64; n += 4) memcpy(row + n, &nan, 4);
    tile.written = false;
}

inline bool usable(int tile) {
    if (!state.config.palette) return fail("no configuration is loaded", tile), false;
    if (tile < 0 || tile > 7) return fail("there is no such tile", tile), false;
    if (!state.config.rows[tile] || !state.config.row_bytes[tile]) return fail("the tile is not configured", tile), false;
    return true;
}

inline bool readable(int tile) {
    if (!usable(tile)) return false;
    if (!state.tiles[tile].written) return fail("the tile is read before it is written", tile), false;
    return true;
}

SAT_OUT_OF_LINE void load_config(const void* from) {
    Config config;
    memcpy(&config, from, 64);
    if (config.palette != 1) fail("only palette 1 has tiles", -1);
    if (config.start_row) fail("start_row is not 0", -1);
    for (uint8_t byte : config.reserved)
        if (byte) fail("a reserved byte is not 0", -1);
    for (int tile = 0; tile < 16; ++tile) {
        const int rows = config.rows[tile], row_bytes = config.row_bytes[tile];
        if (tile > 7 && (rows || row_bytes)) fail("palette 1 has 8 tiles", tile);
        if (rows > 16 || row_bytes > 64) fail("a tile has at most 16 rows of 64 bytes", tile);
        if (!rows != !row_bytes) fail("rows and bytes a row are zero together", tile);
    }
    if (!state.config.palette)
#pragma omp atomic
        ++amx_emulation_open;
    state.config = config;
    for (Tile& tile : state.tiles) poison(tile);
}

SAT_OUT_OF_LINE void release() {
    if (!state.config.palette) return;
#pragma omp atomic
    --amx_emulation_open;
    state.config = Config{};
    for (Tile& tile : state.tiles) poison(tile);
}

SAT_OUT_OF_LINE void load(int tile, const void* base, long stride) {
    if (!usable(tile)) return;
    memset(state.tiles[tile].bytes, 0, sizeof(Tile::bytes));
    for (int row = 0; row < state.config.rows[tile]; ++row)
        memcpy(state.tiles[tile].bytes[row], static_cast<const uint8_t*>(base) + row * stride,
               state.config.row_bytes[tile]);
    state.tiles[tile].written = true;
}

SAT_OUT_OF_LINE void store(int tile, void* base, long stride) {
    if (!readable(tile)) return;
    for (int row = 0; row < state.config.rows[tile]; ++row)
        memcpy(static_cast<uint8_t*>(base) + row * stride, state.tiles[tile].bytes[row], state.config.row_bytes[tile]);
}

SAT_OUT_OF_LINE void zero(int tile) {
    if (!usable(tile)) return;
    memset(state.tiles[tile].bytes, 0, sizeof(Tile::bytes));
    state.tiles[tile].written = true;
}

// Denormal numbers count as zero, on the way in and out.
inline float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x; }

inline void widen(const uint8_t* bytes, float (&out)[32]) {
    for (int n = 0; n < 32; ++n) {
        uint16_t half;
        memcpy(&half, bytes + 2 * n, 2);
        const uint32_t bits = static_cast<uint32_t>(half) << 16;
        memcpy(&out[n], &bits, 4);
        out[n] = flushed(out[n]);
    }
}

// c += a b: sums over the first and over the second half of the pairs, then their sum, each operation rounded to fp32.
SAT_OUT_OF_LINE void dot(int c, int a, int b) {
    if (!readable(c) || !readable(a) || !readable(b)) return;
    const Config& config = state.config;
    if (c == a || c == b || a == b) return fail("the three tiles are not distinct", c);
    if (config.row_bytes[c] % 4 || config.row_bytes[a] % 4 || config.row_bytes[b] % 4)
        return fail("bytes a row are no multiple of 4", c);
    if (config.rows[c] != config.rows[a]) return fail("C and A have different numbers of rows", c);
    if (config.row_bytes[c] != config.row_bytes[b]) return fail("C and B have different numbers of columns", c);
    if (config.row_bytes[a] / 4 != config.rows[b]) return fail("A's pairs are not B's rows", a);
    float right[16][32];
    for (int k = 0; k < config.rows[b]; ++k) widen(state.tiles[b].bytes[k], right[k]);
    for (int row = 0; row < config.rows[c]; ++row) {
        float left[32], sums[32] = {}, total[16];
        widen(state.tiles[a].bytes[row], left);
        for (int k = 0; k < config.rows[b]; ++k)
            for (int n = 0; n < 32; ++n) sums[n] = flushed(fmaf(left[2 * k + n % 2], right[k][n], sums[n]));
        memcpy(total, state.tiles[c].bytes[row], 64);
        for (int n = 0; n < 16; ++n) total[n] = flushed(flushed(total[n]) + flushed(sums[2 * n] + sums[2 * n + 1]));
        memcpy(state.tiles[c].bytes[row], total, config.row_bytes[c]);
    }
#pragma omp atomic
    ++amx_emulation_products;
}

}    // namespace amx_emulation

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) amx_emulation::load_config(config)
#define _tile_release() amx_emulation::release()
#define _tile_loadd(tile, base, stride) amx_emulation::load(tile, base, stride)
#define _tile_stored(tile, base, stride) amx_emulation::store(tile, base, stride)
#define _tile_zero(tile) amx_emulation::zero(tile)
#define _tile_dpbf16ps(c, a, b) amx_emulation::dot(c, a, b)
