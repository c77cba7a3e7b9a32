// What the attention kernels of every instruction set and dtype share: heads in memory, padding, scratch, the lists of
// kept blocks, threads. Included after SAT_ISA_NAMESPACE and SAT_WIDTH are defined, like simd.h.
#pragma once

#include "attention.h"
#include "parallel.h"
#include "simd.h"

namespace SAT_ISA_NAMESPACE {
namespace {

constexpr float LOG2E = 1.44269504088896341f;
constexpr float HUGE_LSE = 1e30f;       // stands for +inf in kernels: exp2(s - HUGE_LSE) is 2^-126, no NaN
constexpr float SAFE_SUM = 0x1p60f;     // unnormalised sums within [1 / SAFE_SUM, SAFE_SUM] keep full precision
constexpr int MAX_BLOCK = 128;

// ---- tensors ----

const char* head_of(const SatTensor& t, int64_t type, long b, long h) {
    return static_cast<const char*>(t.data) + (b * t.batch + h * t.head) * (type == SAT_FLOAT32 ? 4 : 2);
}

// ---- padding ----

enum KeysState : uint8_t { NO_KEY, SOME_KEYS, ALL_KEYS };

KeysState state_of(const uint8_t* real, int count) {
    if (!real) return ALL_KEYS;
    int n = 0;
    for (int j = 0; j < count; ++j) n += real[j] != 0;
    return n == 0 ? NO_KEY : n == count ? ALL_KEYS : SOME_KEYS;
}

// ---- kept blocks ----

// The blocks of a row (or column): all of them where there are no lists.
struct Blocks {
    const int32_t* list;
    int count;
    int operator[](int n) const { return list ? list[n] : n; }
};

Blocks blocks_of(const int32_t* offsets, const int32_t* list, long index, long nb) {
    if (!offsets) return {nullptr, static_cast<int>(nb)};
    return {list + offsets[index], offsets[index + 1] - offsets[index]};
}

// ---- statistics ----

// Adds the sums over a tile of T queries and the keys of each block, `sums` [nb][T] times `inverse` [T], to pooled [nb], and
// weighted by row to real_sum.
template <int T>
void pool(const SatStatistics& call, long b, long row, const float* sums, const float* inverse, float* pooled) {
    const long nb = call.N / call.bs;
    vec weights[T / W];
    double* real_sum = nullptr;
    if (call.row_weights) {
        const float* of_rows = call.row_weights + b * call.N + row;
        real_sum = call.real_sum + (b / (call.B / call.groups) * nb + row / call.bs) * nb;
        for (int v = 0; v < T / W; ++v) weights[v] = load(of_rows + v * W) * load(inverse + v * W);
    }
    for (long c = 0; c < nb; ++c, sums += T) {
        vec block{}, of_real{};
        for (int v = 0; v < T / W; ++v) block += load(sums + v * W) * load(inverse + v * W);
        pooled[c] += sum(block);
        if (!real_sum) continue;
        for (int v = 0; v < T / W; ++v) of_real += load(sums + v * W) * weights[v];
        real_sum[c] += static_cast<double>(sum(of_real)) / (call.bs * call.bs);
    }
}

// `pooled` [heads of a group][nb]: sums over the blocks of row r. Their means, and the squares of those, summed over heads.
void sum_pooled(const SatStatistics& call, long group, long r, const float* pooled) {
    const long nb = call.N / call.bs, heads = call.B / call.groups * call.H;
    double squares = 0;
    double* sums = call.pooled_sum + (group * nb + r) * nb;
    for (long c = 0; c < nb; ++c) sums[c] = 0;
    for (long n = 0; n < heads; ++n)
        for (long c = 0; c < nb; ++c) {
            const double value = static_cast<double>(pooled[n * nb + c]) / (call.bs * call.bs);
            sums[c] += value;
            squares += value * value;
        }
    call.square_sum[group * nb + r] = squares;
}

}    // namespace
}    // namespace SAT_ISA_NAMESPACE
