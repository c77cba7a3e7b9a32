// What the attention kernels of every instruction set and dtype share: heads in memory, padding, scratch, the lists of
// kept blocks, threads. Included after SAT_ISA_NAMESPACE and SAT_WIDTH are defined, like simd.h.
#pragma once

#include <omp.h>
#include <stdlib.h>

#include "attention.h"
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

void prefetch_rows(const SatTensor& t, int64_t type, const char* head, long first, int count, int d) {
    const int size = type == SAT_FLOAT32 ? 4 : 2;
    for (int i = 0; i < count; ++i)
        for (int byte = 0; byte < d * size; byte += 64) __builtin_prefetch(head + (first + i) * t.row * size + byte);
}

// ---- padding ----

enum KeysState : uint8_t { NO_KEY, SOME_KEYS, ALL_KEYS };

KeysState state_of(const uint8_t* real, int count) {
    if (!real) return ALL_KEYS;
    int n = 0;
    for (int j = 0; j < count; ++j) n += real[j] != 0;
    return n == 0 ? NO_KEY : n == count ? ALL_KEYS : SOME_KEYS;
}

// ---- scratch ----

// Hands out 64-byte aligned pieces of one allocation.
class Scratch {
  public:
    explicit Scratch(size_t floats) : base_(nullptr), next_(nullptr) {
        if (posix_memalign(reinterpret_cast<void**>(&base_), 64, (floats + 1024) * sizeof(float)) != 0) base_ = nullptr;
        next_ = base_;
    }
    ~Scratch() { free(base_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    bool failed() const { return !base_; }
    float* take(size_t floats) {
        float* piece = next_;
        next_ += (floats + 15) / 16 * 16;    // the constructor's 1024 floats pay for the rounding
        return piece;
    }

  private:
    float *base_, *next_;
};

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

// ---- threads ----

// Calls work(pieces, index) for index in [0, count) on `threads` threads, each with scratch of its own.
template <class Make, class Work>
int spread(long threads, long count, int chunk, size_t floats, Make make, Work work) {
    bool failed = false;
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
        Scratch scratch(floats);
        if (scratch.failed()) {
#pragma omp atomic write
            failed = true;
        }
#pragma omp barrier
        if (!failed) {    // the same for every thread
            const auto pieces = make(scratch);
#pragma omp for schedule(dynamic, chunk)
            for (long i = 0; i < count; ++i) work(pieces, i);
        }
    }
    return failed ? SAT_OUT_OF_MEMORY : SAT_OK;
}

// ---- tiles of keys ----

// Calls use(first, real) for each tile of keys in `columns` that has a real key. The rows of K and V that come next are
// fetched meanwhile: a tile is seldom used twice, and no hardware prefetcher knows the layout. `row` is the row of
// blocks that `columns` belong to; the next tile of its last one is the first of row + 1.
template <int TJ, class Use>
SAT_INLINE void each_kept_tile(const SatAttention& call, const Blocks& columns, const uint8_t* real, long b, long h,
                               long row, Use use) {
    const int d = static_cast<int>(call.d), bs = static_cast<int>(call.bs);
    const long nb = call.N / call.bs;
    const char* k_head = head_of(call.key, call.type, b, h);
    const char* v_head = head_of(call.value, call.type, b, h);
    for (int n = 0; n < columns.count; ++n)
        for (int t = 0; t < bs; t += TJ) {
            const long first = static_cast<long>(columns[n]) * bs + t;
            long next = first + TJ;
            if (t + TJ == bs) {
                const Blocks below = row + 1 < nb ? blocks_of(call.row_offsets, call.row_columns, row + 1, nb) : columns;
                next = n + 1 < columns.count ? columns[n + 1] * static_cast<long>(bs)
                       : below.count         ? below[0] * static_cast<long>(bs)
                                             : first;
            }
            prefetch_rows(call.key, call.type, k_head, next, TJ, d);
            prefetch_rows(call.value, call.type, v_head, next, TJ, d);
            const KeysState state = state_of(real ? real + first : nullptr, TJ);
            if (state != NO_KEY) use(first, state == ALL_KEYS ? nullptr : real + first);
        }
}

}    // namespace
}    // namespace SAT_ISA_NAMESPACE
