// Block-sparse attention on CUDA: forward, backward by rows and by columns, statistics of dense attention.
//
// Shape letters: B batch, H heads, N padded length, D head_dim (32, 64, 128), bs block_size (a multiple of 16), M rows
// of a tile, K columns of a tile.
//
// One thread block (M * 2 threads) owns M rows of one (batch, head) and walks the kept blocks of their block row, K
// keys at a time; each warp owns 16 rows. The tile after the current one is on its way while the current one is
// used: two buffers, one barrier a tile. Probabilities live in registers only: as the accumulator of one product they
// already have the layout of the next one's left operand. The backward pass recomputes them from the row's
// log-denominator, once by rows (dq) and once by columns (dk, dv, with everything transposed), so each output is
// summed by one warp in one order: no atomics, the same bits every time.
//
// Scores are kept in base 2: p = 2^(s scale log2(e) - lse).
#pragma once

#include "cuda_primitives.cuh"

// The C ABI: what a call works on. Strides are in elements: batch, head, position; the last dimension's is 1. Rows of
// tensors start at multiples of 16 bytes.
struct SatTensor {
    void* data;
    int64_t strides[3];
};

struct SatAttention {
    SatTensor query, key, value, out, dout, dq, dk, dv;    // [B, H, N, D]
    // [B, H, N] log2 of the softmax denominator, +inf for a row that attends nothing; sum of out * dout over d. The
    // statistics keep the largest score and 1 / denominator there: their sums would feel the rounding of a large lse.
    float *lse, *delta;
    const uint8_t* key_padding_mask;    // [B, N], 1 = real; null: all are
    int64_t mask_strides[2];
    // Kept blocks by row and by column as BlockLayout.lists has them; null: every block.
    const int32_t *row_offsets, *row_columns, *column_offsets, *column_rows;
    float* mean;      // [groups, N, N] or null
    float* pooled;    // [B, H, N / 16, N / 16] sums of p over 16 x 16 pieces
    int64_t batch, heads, length, head_dim, block_size;
    int64_t type;           // 0 fp32, 1 bf16, 2 fp16
    int64_t pruned_zero;    // a pruned score counts as logit 0 (else as minus infinity)
    int64_t causal;         // no query attends to a later key
    int64_t head_lists;     // from one head's offsets to those of the next; 0: all share them
    int64_t groups;
    int64_t accumulate;    // mean: add to what is there
    double scale, mean_factor;
};

namespace sat {

enum Pass { kForward, kDenominator, kBackwardRows, kBackwardColumns, kStatistics };

// Launches one pass, or with `launch` false only finds out whether it could. A cudaError_t, or kTooLarge.
constexpr int kTooLarge = -1;    // needs more shared memory than the device has
struct Run {
    Pass pass;
    int shared_limit;       // bytes a thread block may have
    int multiprocessors;
    int cache;              // bytes of L2
    bool launch;
    void* stream;
};
int run_half(const Run&, const SatAttention&);
int run_bfloat(const Run&, const SatAttention&);
int run_float(const Run&, const SatAttention&);

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kInfinity = __builtin_huge_valf();

template <class E>
__device__ __forceinline__ unsigned char* head_of(const SatTensor& tensor, int64_t batch, int64_t head) {
    return static_cast<unsigned char*>(tensor.data) +
           (batch * tensor.strides[0] + head * tensor.strides[1]) * kBytes<E>;
}

template <class E>
__device__ __forceinline__ int64_t row_bytes(const SatTensor& tensor) {
    return tensor.strides[2] * kBytes<E>;
}

// The keys of a tile that a lane's rows, g and g + 8 of its warp's 16, attend to.
template <int K, bool kCausal>
struct Keys {
    static constexpr int kWords = (K + 31) / 32, kRows = kCausal ? 2 : 1;
    bool real[kWords];                // of the tile that is on its way, keys lane, lane + 32, ..
    uint32_t words[kRows][kWords];    // of this tile: bit c % 32 of word c / 32 for key c

    // The padding mask of keys first.., which `gather` waits for; keys from `count` on are not real.
    __device__ __forceinline__ void fetch(const SatAttention& p, int64_t batch, int64_t first, int count = K) {
        if (!p.key_padding_mask) return;
        const uint8_t* mask = p.key_padding_mask + batch * p.mask_strides[0];
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
            const int key = i * 32 + static_cast<int>(threadIdx.x % 32);
            real[i] = key < count && mask[(first + key) * p.mask_strides[1]];
        }
    }
    // Called by whole warps. row: that of g, counted from the tile's first key.
    __device__ __forceinline__ void gather(const SatAttention& p, int row = 0) {
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
            const uint32_t all = p.key_padding_mask ? __ballot_sync(kAllLanes, real[i]) : 0xffffffff;
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                const int last = row + 8 * r - 32 * i;    // the last key that a causal row sees
                words[r][i] = !kCausal || last >= 31 ? all : last < 0 ? 0 : all & ((2u << last) - 1);
            }
        }
    }
    __device__ __forceinline__ bool attended(int r, int column) const {
        return words[kCausal ? r : 0][column / 32] >> column % 32 & 1;
    }
};

// Column of element i of an accumulator's 8 columns j.
__device__ __forceinline__ int column_of(int j, int i) { return j * 8 + threadIdx.x % 4 * 2 + i % 2; }

// The tiles that a thread block walks: `index` counts K-wide tiles through the kept blocks of block row (or column)
// `block`.
template <int K>
struct Walk {
    const int32_t* blocks;
    int kept;      // blocks
    int tiles;     // K-wide
    int parts;     // tiles a block
    int block_size;

    __device__ __forceinline__ Walk(const SatAttention& p, const int32_t* offsets, const int32_t* list, int64_t head,
                                    int row)
        : blocks(nullptr), block_size(static_cast<int>(p.block_size)) {
        kept = static_cast<int>(p.length) / block_size;
        if (offsets) {
            const int64_t block = head * p.head_lists + row / block_size;
            kept = offsets[block + 1] - offsets[block];
            blocks = list + offsets[block];
        }
        parts = block_size / K;
        tiles = kept * parts;
    }
    // First position of tile `index`.
    __device__ __forceinline__ int first(int index) const {
        const int which = index / parts;
        return (blocks ? blocks[which] : which) * block_size + (index - which * parts) * K;
    }
    // Keys in pruned blocks that query `row` would see.
    template <bool kCausal>
    __device__ __forceinline__ int pruned(const SatAttention& p, int row) const {
        if constexpr (!kCausal) return static_cast<int>(p.length) - kept * block_size;
        const int block = row / block_size;
        if (kept > 0 && blocks[kept - 1] == block) return (block + 1 - kept) * block_size;
        return row + 1 - kept * block_size;
    }
};

// What the passes over kept blocks get.
struct Walks : SatAttention {
    unsigned together;    // heads
};

// Which tile of M rows a thread block takes, counted through all heads. With kept blocks in lists: `together` heads at a
// time, first the longest rows (or columns) of all of them, so that no long walk begins last, while what these heads
// read stays in the L2 cache. Not with wider rows, which leave no register for it.
template <int D, int M>
__device__ __forceinline__ unsigned tile_of_block(const Walks& p, const int32_t* list) {
    if (D > 32 || !list) return blockIdx.x;
    const unsigned tiles = static_cast<unsigned>(p.length) / M, nb = static_cast<unsigned>(p.length / p.block_size);
    const unsigned heads = static_cast<unsigned>(p.heads), parts = tiles / nb;
    const unsigned first = blockIdx.x / (tiles * p.together) * p.together;
    const unsigned several = min(p.together, static_cast<unsigned>(p.batch) * heads - first);
    const unsigned at = blockIdx.x - first * tiles, rank = at / several, batch_head = first + at - rank * several;
    // The order stands behind the blocks of all masks.
    const int32_t* order = list + (p.head_lists ? heads * nb + batch_head % heads : nb) * nb;
    unsigned tile = batch_head * tiles + order[rank / parts] * parts + rank % parts;
#ifdef __CUDA_ARCH__
    asm volatile("" : "+r"(tile));    // so that a place is one register, from which the rest can be computed again
#endif
    return tile;
}

// Where a thread block works.
template <int D, int M>
struct Place {
    int row0;    // first row of its tile
    int64_t batch, head, batch_head;

    __device__ __forceinline__ Place(const Walks& p, const int32_t* list) {
        const unsigned tiles = static_cast<unsigned>(p.length) / M, tile = tile_of_block<D, M>(p, list);
        const unsigned index = tile / tiles;
        row0 = static_cast<int>(tile - index * tiles) * M;
        batch_head = index;
        batch = index / static_cast<unsigned>(p.heads);
        head = index - batch * p.heads;
    }
};

// Shared memory of a walk: `kResident` tiles of M rows, then two stages of two tiles of K rows and 2 K floats.
template <class E, int D, int M, int K, int kResident>
struct Shared {
    static constexpr int kRow = Tile<E, D>::kRowBytes;
    static constexpr int kStage = 2 * K * kRow + 2 * K * 4;
    static constexpr int kTotal = kResident * M * kRow + 2 * kStage;

    static __device__ __forceinline__ unsigned char* resident(int i) { return shared_memory() + i * M * kRow; }
    static __device__ __forceinline__ unsigned char* stage(int tile, int i) {
        return shared_memory() + kResident * M * kRow + tile % 2 * kStage + i * K * kRow;
    }
    static __device__ __forceinline__ float* floats(int tile) { return reinterpret_cast<float*>(stage(tile, 2)); }
};

// Left operands of a warp's 16 rows: kept in registers where there is room, else read again for each use.
template <class E, int D>
struct Rows {
    static constexpr bool kKeep = D * kBytes<E> <= 128;
    const unsigned char* tile;
    int row;
    Fragment<E> kept[kKeep ? D / 16 : 1];

    __device__ __forceinline__ Rows(const unsigned char* tile, int row) : tile(tile), row(row) {}
    __device__ __forceinline__ void load() {
        if constexpr (kKeep)
#pragma unroll
            for (int k = 0; k < D / 16; ++k) kept[k] = Tile<E, D>::left(tile, row, k);
    }
    __device__ __forceinline__ Fragment<E> operator[](int k) const {
        if constexpr (kKeep)
            return kept[k];
        else
            return Tile<E, D>::left(tile, row, k);
    }
};

// scores[16 x 16 n] = rows times (tile rows first..)^T.
template <class E, int D, int n>
__device__ __forceinline__ void products(float (&scores)[n][2][4], const Rows<E, D>& rows, const unsigned char* tile,
                                         int first) {
#pragma unroll
    for (int j = 0; j < n; ++j)
#pragma unroll
        for (int i = 0; i < 8; ++i) scores[j][i / 4][i % 4] = 0;
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
        const Fragment<E> left = rows[k];
#pragma unroll
        for (int j = 0; j < n; ++j) multiply<E>(scores[j], left, Tile<E, D>::right(tile, first + 16 * j, k));
    }
}

// sums[16 x D] += weights[16 x 16 n] (rounded to E) times tile rows first...
template <class E, int D, int n>
__device__ __forceinline__ void add_weighted(float (&sums)[D / 16][2][4], const float (&weights)[n][2][4],
                                             const unsigned char* tile, int first) {
#pragma unroll
    for (int j = 0; j < n; ++j) {
        const Fragment<E> left = as_left<E>(weights[j]);
#pragma unroll
        for (int k = 0; k < D / 16; ++k)
            multiply<E>(sums[k], left, Tile<E, D>::right_transposed(tile, first + 16 * j, k));
    }
}

// Thread blocks that a multiprocessor shall hold at least, which bounds the registers of a thread: 384 threads leave
// 65,536 / 384 = 168 (in eights) to each. Wide rows and fp32 would have to spill, as would all on compute capability
// 7.5 (products by shuffles) and 12; blocks of 16 rows are no fast path, nor are causal ones.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 800 || __CUDA_ARCH__ >= 1200)
inline constexpr bool kBoundRegisters = false;
#else
inline constexpr bool kBoundRegisters = true;
#endif
template <class E, int D, int M, bool kCausal>
inline constexpr int kMinBlocks = kBoundRegisters && kBytes<E> == 2 && D <= 64 && M > 16 && !kCausal ? 384 / (M * 2) : 1;

// out and lse; without kOutput instead a row's largest score (in lse) and 1 / sum of 2^(s - largest) (in delta).
template <class E, int D, int M, int K, bool kCausal, bool kOutput>
__global__ void __launch_bounds__(M * 2, kMinBlocks<E, D, M, kCausal>) forward_kernel(const __grid_constant__ Walks p) {
    using T = Tile<E, D>;
    using S = Shared<E, D, M, K, 1>;
    constexpr int kThreads = M * 2;
    const Place<D, M> place(p, p.row_columns);
    const Walk<K> walk(p, p.row_offsets, p.row_columns, place.head, place.row0);
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16, mine = place.row0 + row + lane / 4;
    const bool hides = kCausal || p.key_padding_mask;
    const unsigned char* query = head_of<E>(p.query, place.batch, place.head);
    const unsigned char* key = head_of<E>(p.key, place.batch, place.head);
    const unsigned char* value = kOutput ? head_of<E>(p.value, place.batch, place.head) : nullptr;
    const float scale = static_cast<float>(p.scale) * kLog2e;

    Keys<K, kCausal> keys;
    auto copy_tile = [&](int tile) {
        const int64_t first = walk.first(tile);
        keys.fetch(p, place.batch, first);
        T::template copy<K, kThreads>(S::stage(tile, 0), key + first * row_bytes<E>(p.key), row_bytes<E>(p.key));
        if constexpr (kOutput)
            T::template copy<K, kThreads>(S::stage(tile, 1), value + first * row_bytes<E>(p.value),
                                          row_bytes<E>(p.value));
        copy_commit();
    };
    if (walk.tiles > 0) {
        T::template copy<M, kThreads>(S::resident(0), query + place.row0 * row_bytes<E>(p.query),
                                      row_bytes<E>(p.query));
        copy_tile(0);
    }

    float highest[2] = {-kInfinity, -kInfinity}, denominator[2] = {};    // a lane sums its own columns
    float out[D / 16][2][4] = {};
    Rows<E, D> rows(S::resident(0), row);

    for (int tile = 0; tile < walk.tiles; ++tile) {
        if (hides) keys.gather(p, mine - walk.first(tile));
        copy_wait_all();
        __syncthreads();    // the tile is there for all, and all have left the buffer that is filled next
        if (tile + 1 < walk.tiles) copy_tile(tile + 1);
        if (tile == 0) rows.load();

        float scores[K / 16][2][4];
        products(scores, rows, S::stage(tile, 0), 0);
        float top[2] = {-kInfinity, -kInfinity};
#pragma unroll
        for (int j = 0; j < K / 8; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (!hides || keys.attended(i / 2, column_of(j, i)))
                    top[i / 2] = fmaxf(top[i / 2], scores[j / 2][j % 2][i] * scale);
        float base[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float now = fmaxf(highest[r], quad_max(top[r]));
            base[r] = now == -kInfinity ? 0.0f : now;    // nothing attended yet: 2^(-inf - 0) is 0, not NaN
            const float shrink = exp2_fast(highest[r] - base[r]);
            highest[r] = now;
            denominator[r] *= shrink;
            if constexpr (kOutput)
#pragma unroll
                for (int j = 0; j < D / 8; ++j)
#pragma unroll
                    for (int i = 0; i < 2; ++i) out[j / 2][j % 2][r * 2 + i] *= shrink;
        }
#pragma unroll
        for (int j = 0; j < K / 8; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                // Rounded once, as in the backward pass: their probabilities have to agree for dq to sum up right.
                float& s = scores[j / 2][j % 2][i];
                s = exp2_fast(fmaf(s, scale, -base[i / 2]));
                if (hides && !keys.attended(i / 2, column_of(j, i))) s = 0;
                denominator[i / 2] += s;
            }
        if constexpr (kOutput) add_weighted<E, D>(out, scores, S::stage(tile, 1), 0);
    }

    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        // The pruned scores come last: exp(0) each.
        const bool attends = highest[r] > -kInfinity;
        const int pruned = p.pruned_zero ? walk.template pruned<kCausal>(p, mine + r * 8) : 0;
        const float top = pruned > 0 ? fmaxf(highest[r], 0) : highest[r], shrink = exp2_fast(highest[r] - top);
        float total = quad_sum(denominator[r]) * shrink;
        if (pruned > 0) total += static_cast<float>(pruned) * exp2_fast(-top);
        inverse[r] = attends ? shrink / total : 0.0f;
        if (lane % 4) continue;
        const int64_t at = place.batch_head * p.length + mine + r * 8;
        if constexpr (kOutput) {
            p.lse[at] = attends ? top + log2_fast(total) : kInfinity;
        } else {
            p.lse[at] = attends ? top : 0.0f;
            p.delta[at] = inverse[r];
        }
    }
    if constexpr (kOutput)
        T::store(S::resident(0), row, out, inverse[0], inverse[1],
                 head_of<E>(p.out, place.batch, place.head) + place.row0 * row_bytes<E>(p.out), row_bytes<E>(p.out));
}

// Sum of out * dout over the D elements of this warp's rows; two lanes a row. Rows g, g + 8 in delta.
template <class E, int D>
__device__ __forceinline__ void row_deltas(float (&delta)[2], const unsigned char* out, int64_t out_row,
                                           const unsigned char* dout, int64_t dout_row) {
    const int lane = threadIdx.x % 32, row = lane / 2;
    constexpr int kChunks = Tile<E, D>::kChunks / 2;
    const uint4* a = reinterpret_cast<const uint4*>(out + row * out_row) + lane % 2 * kChunks;
    const uint4* b = reinterpret_cast<const uint4*>(dout + row * dout_row) + lane % 2 * kChunks;
    float sum = 0;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
        const uint4 x = a[chunk], y = b[chunk];
        const uint32_t xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if constexpr (kSame<E, Float>)
                sum = fmaf(as_float(xs[i]), as_float(ys[i]), sum);
            else
                sum = fmaf(low_float<E>(xs[i]), low_float<E>(ys[i]),
                           fmaf(high_float<E>(xs[i]), high_float<E>(ys[i]), sum));
        }
    }
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    delta[0] = __shfl_sync(kAllLanes, sum, lane / 4 * 2);
    delta[1] = __shfl_sync(kAllLanes, sum, lane / 4 * 2 + 16);
}

// How many 16 x 16 pieces of scores a warp works on at a time: more hide latency, fewer spare registers.
template <class E, int D, int K>
inline constexpr int kPieces = D <= 64 && K >= 32 ? 2 : 1;

// dq and delta.
template <class E, int D, int M, int K, bool kCausal>
__global__ void __launch_bounds__(M * 2, kMinBlocks<E, D, M, kCausal>) backward_rows_kernel(const __grid_constant__ Walks p) {
    using T = Tile<E, D>;
    using S = Shared<E, D, M, K, 2>;
    constexpr int kThreads = M * 2, n = kPieces<E, D, K>;
    const Place<D, M> place(p, p.row_columns);
    const Walk<K> walk(p, p.row_offsets, p.row_columns, place.head, place.row0);
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16, mine = place.row0 + row + lane / 4;
    const bool hides = kCausal || p.key_padding_mask;
    const unsigned char* query = head_of<E>(p.query, place.batch, place.head);
    const unsigned char* key = head_of<E>(p.key, place.batch, place.head);
    const unsigned char* value = head_of<E>(p.value, place.batch, place.head);
    const unsigned char* out = head_of<E>(p.out, place.batch, place.head);
    const unsigned char* dout = head_of<E>(p.dout, place.batch, place.head);
    const float scale = static_cast<float>(p.scale) * kLog2e;

    Keys<K, kCausal> keys;
    auto copy_tile = [&](int tile) {
        const int64_t first = walk.first(tile);
        keys.fetch(p, place.batch, first);
        T::template copy<K, kThreads>(S::stage(tile, 0), key + first * row_bytes<E>(p.key), row_bytes<E>(p.key));
        T::template copy<K, kThreads>(S::stage(tile, 1), value + first * row_bytes<E>(p.value),
                                      row_bytes<E>(p.value));
        copy_commit();
    };
    if (walk.tiles > 0) {
        T::template copy<M, kThreads>(S::resident(0), query + place.row0 * row_bytes<E>(p.query),
                                      row_bytes<E>(p.query));
        T::template copy<M, kThreads>(S::resident(1), dout + place.row0 * row_bytes<E>(p.dout),
                                      row_bytes<E>(p.dout));
        copy_tile(0);
    }

    float delta[2], lse[2];
    row_deltas<E, D>(delta, out + (place.row0 + row) * row_bytes<E>(p.out), row_bytes<E>(p.out),
                     dout + (place.row0 + row) * row_bytes<E>(p.dout), row_bytes<E>(p.dout));
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int64_t at = place.batch_head * p.length + mine + r * 8;
        lse[r] = p.lse[at];
        if (lane % 4 == 0) p.delta[at] = delta[r];
    }
    float dq[D / 16][2][4] = {};
    Rows<E, D> queries(S::resident(0), row), douts(S::resident(1), row);

    for (int tile = 0; tile < walk.tiles; ++tile) {
        if (hides) keys.gather(p, mine - walk.first(tile));
        copy_wait_all();
        __syncthreads();
        if (tile + 1 < walk.tiles) copy_tile(tile + 1);
        if (tile == 0) queries.load(), douts.load();
#pragma unroll
        for (int first = 0; first < K; first += 16 * n) {
            float probs[n][2][4], dprobs[n][2][4];
            products(probs, queries, S::stage(tile, 0), first);
            products(dprobs, douts, S::stage(tile, 1), first);
#pragma unroll
            for (int j = 0; j < 2 * n; ++j)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float& s = probs[j / 2][j % 2][i];
                    s = exp2_fast(fmaf(s, scale, -lse[i / 2]));
                    if (hides && !keys.attended(i / 2, first + column_of(j, i))) s = 0;
                    s *= dprobs[j / 2][j % 2][i] - delta[i / 2];
                }
            add_weighted<E, D>(dq, probs, S::stage(tile, 0), first);
        }
    }
    const float factor = static_cast<float>(p.scale);
    T::store(S::resident(0), row, dq, factor, factor,
             head_of<E>(p.dq, place.batch, place.head) + place.row0 * row_bytes<E>(p.dq), row_bytes<E>(p.dq));
}

// dk and dv; M keys of a block column meet the queries of its kept blocks. Runs after backward_rows_kernel (delta).
template <class E, int D, int M, int K, bool kCausal>
__global__ void __launch_bounds__(M * 2, kMinBlocks<E, D, M, kCausal>) backward_columns_kernel(const __grid_constant__ Walks p) {
    using T = Tile<E, D>;
    using S = Shared<E, D, M, K, 2>;
    constexpr int kThreads = M * 2, n = kPieces<E, D, K>;
    const Place<D, M> place(p, p.column_rows);
    const Walk<K> walk(p, p.column_offsets, p.column_rows, place.head, place.row0);
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16, mine = place.row0 + row + lane / 4;
    const unsigned char* query = head_of<E>(p.query, place.batch, place.head);
    const unsigned char* key = head_of<E>(p.key, place.batch, place.head);
    const unsigned char* value = head_of<E>(p.value, place.batch, place.head);
    const unsigned char* dout = head_of<E>(p.dout, place.batch, place.head);
    const float scale = static_cast<float>(p.scale) * kLog2e;

    auto copy_tile = [&](int tile) {
        const int64_t first = walk.first(tile), of_row = place.batch_head * p.length + first;
        T::template copy<K, kThreads>(S::stage(tile, 0), query + first * row_bytes<E>(p.query),
                                      row_bytes<E>(p.query));
        T::template copy<K, kThreads>(S::stage(tile, 1), dout + first * row_bytes<E>(p.dout), row_bytes<E>(p.dout));
        // The rows' lse, then their delta, 16 bytes a thread.
        const int chunk = static_cast<int>(threadIdx.x);
        if (chunk < K / 2)
            copy_async_16(S::floats(tile) + chunk * 4,
                          (chunk < K / 4 ? p.lse + of_row : p.delta + of_row - K) + chunk * 4);
        copy_commit();
    };
    if (walk.tiles > 0) {
        T::template copy<M, kThreads>(S::resident(0), key + place.row0 * row_bytes<E>(p.key), row_bytes<E>(p.key));
        T::template copy<M, kThreads>(S::resident(1), value + place.row0 * row_bytes<E>(p.value),
                                      row_bytes<E>(p.value));
        copy_tile(0);
    }

    bool real[2] = {true, true};
    if (p.key_padding_mask)
#pragma unroll
        for (int r = 0; r < 2; ++r)
            real[r] = p.key_padding_mask[place.batch * p.mask_strides[0] + (mine + r * 8) * p.mask_strides[1]];
    float dk[D / 16][2][4] = {}, dv[D / 16][2][4] = {};
    Rows<E, D> keys(S::resident(0), row), values(S::resident(1), row);

    for (int tile = 0; tile < walk.tiles; ++tile) {
        copy_wait_all();
        __syncthreads();
        if (tile + 1 < walk.tiles) copy_tile(tile + 1);
        if (tile == 0) keys.load(), values.load();
        const int hidden = mine - walk.first(tile);    // queries of the tile that are before the first key
        const float* lse = S::floats(tile);
        const float* delta = lse + K;
#pragma unroll
        for (int first = 0; first < K; first += 16 * n) {
            float probs[n][2][4], dprobs[n][2][4];    // transposed: rows are keys, columns queries
            products(probs, keys, S::stage(tile, 0), first);
            products(dprobs, values, S::stage(tile, 1), first);
#pragma unroll
            for (int j = 0; j < 2 * n; ++j) {
                const float2 of_lse = *reinterpret_cast<const float2*>(lse + first + column_of(j, 0));
                const float2 of_delta = *reinterpret_cast<const float2*>(delta + first + column_of(j, 0));
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float& s = probs[j / 2][j % 2][i];
                    float& ds = dprobs[j / 2][j % 2][i];
                    s = exp2_fast(fmaf(s, scale, -(i % 2 ? of_lse.y : of_lse.x)));
                    if (!real[i / 2]) s = 0;
                    if (kCausal && first + column_of(j, i) < hidden + i / 2 * 8) s = 0;
                    ds = s * (ds - (i % 2 ? of_delta.y : of_delta.x));
                }
            }
            add_weighted<E, D>(dv, probs, S::stage(tile, 1), first);
            add_weighted<E, D>(dk, dprobs, S::stage(tile, 0), first);
        }
    }
    const float factor = static_cast<float>(p.scale);
    T::store(S::resident(0), row, dk, factor, factor,
             head_of<E>(p.dk, place.batch, place.head) + place.row0 * row_bytes<E>(p.dk), row_bytes<E>(p.dk));
    T::store(S::resident(1), row, dv, 1.0f, 1.0f,
             head_of<E>(p.dv, place.batch, place.head) + place.row0 * row_bytes<E>(p.dv), row_bytes<E>(p.dv));
}

// Sums of n values over a warp; lane l ends with that of value l / (32 / n), returned, in values[0]. Each step halves what
// a lane still holds: n - 1 exchanges instead of 5 n.
template <int n>
__device__ __forceinline__ int distributed_sum(float (&values)[n]) {
    const int lane = threadIdx.x % 32;
    int step = 16;
#pragma unroll
    for (int half = n / 2; half > 0; half /= 2, step /= 2) {
        const bool upper = lane & step;
#pragma unroll
        for (int i = 0; i < half; ++i) {
            const float given = __shfl_xor_sync(kAllLanes, upper ? values[i] : values[i + half], step);
            values[i] = (upper ? values[i + half] : values[i]) + given;
        }
    }
#pragma unroll
    for (; step > 0; step /= 2) values[0] += __shfl_xor_sync(kAllLanes, values[0], step);
    return lane / (32 / n);
}

// mean and pooled from what kDenominator left. A thread block (2 M threads) owns an M x M piece of [N, N] of one group and walks the
// batch and heads of that group; the mean stays in registers all the while.
template <class E, int D, int M>
__global__ void __launch_bounds__(M * 2) statistics_kernel(const __grid_constant__ SatAttention p) {
    using T = Tile<E, D>;
    using S = Shared<E, D, M, M, 0>;
    constexpr int kThreads = M * 2;
    const int length = static_cast<int>(p.length), heads = static_cast<int>(p.heads);
    const unsigned side = (length + M - 1) / M;
    const unsigned group = blockIdx.x / (side * side), piece = blockIdx.x % (side * side);
    const int row0 = static_cast<int>(piece / side) * M, column0 = static_cast<int>(piece % side) * M;
    // The last piece may reach beyond N: rows and columns there are computed from zeros and not written.
    const int num_rows = min(M, length - row0), num_columns = min(M, length - column0);
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16;
    const int examples = static_cast<int>(p.batch / p.groups), first_example = static_cast<int>(group) * examples;
    const int walk = examples * heads;
    const float scale = static_cast<float>(p.scale) * kLog2e;

    Keys<M, false> keys;
    auto copy_tile = [&](int index) {
        const int64_t batch = first_example + index / heads, head = index % heads;
        if (head == 0) keys.fetch(p, batch, column0, num_columns);
        T::template copy<M, kThreads>(S::stage(index, 0),
                                      head_of<E>(p.query, batch, head) + row0 * row_bytes<E>(p.query),
                                      row_bytes<E>(p.query), num_rows);
        T::template copy<M, kThreads>(S::stage(index, 1),
                                      head_of<E>(p.key, batch, head) + column0 * row_bytes<E>(p.key),
                                      row_bytes<E>(p.key), num_columns);
        const int chunk = static_cast<int>(threadIdx.x);
        if (chunk < M / 4) {
            const int64_t from = (batch * heads + head) * p.length + row0 + (chunk * 4 < num_rows ? chunk * 4 : 0);
            copy_async_16(S::floats(index) + chunk * 4, p.lse + from, chunk * 4 < num_rows);
            copy_async_16(S::floats(index) + M + chunk * 4, p.delta + from, chunk * 4 < num_rows);
        }
        copy_commit();
    };
    if (walk > 0) copy_tile(0);

    float mean[M / 16][2][4] = {};
    for (int index = 0; index < walk; ++index) {
        const int64_t batch = first_example + index / heads;
        if (p.key_padding_mask && index % heads == 0) keys.gather(p);
        copy_wait_all();
        __syncthreads();
        if (index + 1 < walk) copy_tile(index + 1);
        Rows<E, D> rows(S::stage(index, 0), row);
        rows.load();
        const float* largest = S::floats(index) + row + lane / 4;
        const float highest[2] = {largest[0], largest[8]}, inverse[2] = {largest[M], largest[M + 8]};
        float sums[M / 16];    // of p over this lane's part of each 16 x 16 piece
#pragma unroll
        for (int first = 0; first < M; first += 32) {
            float probs[2][2][4];
            products(probs, rows, S::stage(index, 1), first);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                float of_row[2] = {};
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    const int r = i / 2 % 2;
                    float s = exp2_fast(fmaf(probs[j][i / 4][i % 4], scale, -highest[r]));
                    if (p.key_padding_mask && !keys.attended(r, first + j * 16 + column_of(i / 4, i % 4))) s = 0;
                    of_row[r] += s;
                    float& sum = mean[first / 16 + j][i / 4][i % 4];
                    sum = fmaf(s, inverse[r], sum);
                }
                sums[first / 16 + j] = of_row[0] * inverse[0] + of_row[1] * inverse[1];
            }
        }
        const int column = distributed_sum(sums) * 16;
        if (lane % (32 / (M / 16)) == 0 && row < num_rows && column < num_columns) {
            const int64_t side_16 = length / 16;
            const int64_t of_head = (batch * heads + index % heads) * side_16 + (row0 + row) / 16;
            p.pooled[of_head * side_16 + (column0 + column) / 16] = sums[0];
        }
    }
    if (!p.mean) return;
    const float factor = static_cast<float>(p.mean_factor);
#pragma unroll
    for (int j = 0; j < M / 8; ++j)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int mine = row + lane / 4 + r * 8, column = column_of(j, 0);
            if (mine >= num_rows || column >= num_columns) continue;
            float2* to = reinterpret_cast<float2*>(p.mean + (static_cast<int64_t>(group) * length + row0 + mine) * length +
                                                   column0 + column);
            const float(&x)[4] = mean[j / 2][j % 2];
            const float2 old = p.accumulate ? *to : make_float2(0, 0);
            *to = make_float2(fmaf(x[2 * r], factor, old.x), fmaf(x[2 * r + 1], factor, old.y));
        }
}

// Launches on the device, the kernel of this pass with M rows a thread block.
template <class E, int D, int M, bool kCausal>
int run_rows(const Run& run, const SatAttention& p) {
    // Columns of a tile: as many as rows, but few enough that the backward pass fits into 64 KB (D 128: 68 KB in fp32).
    constexpr int kMost = kBytes<E> == 2 ? (D == 128 ? 32 : 64) : (D == 128 ? 16 : 32);
    constexpr int K = M < kMost ? M : kMost;
    constexpr int k = K < 32 ? K : 32;    // the backward pass has no registers left for the addresses of larger tiles
    const int64_t blocks = p.batch * p.heads * (p.length / M);
    // Groups of heads, equal ones, whose keys and values (or queries and dout) take about half of the L2 cache.
    const int64_t heads = p.batch * p.heads, fit = run.cache / (4 * p.length * D * kBytes<E>) + 1;
    const int64_t groups = (heads + fit - 1) / fit;
    const Walks walks{p, static_cast<unsigned>(groups > 0 ? (heads + groups - 1) / groups : 1)};
    auto go = [&](auto kernel, int shared) {
        if (shared > run.shared_limit) return kTooLarge;
        return run.launch ? launch(kernel, blocks, M * 2, shared, run.stream, walks) : loadable(kernel);
    };
    switch (run.pass) {
        case kForward:
            return go(forward_kernel<E, D, M, K, kCausal, true>, Shared<E, D, M, K, 1>::kTotal);
        case kDenominator:    // of dense attention
            return go(forward_kernel<E, D, M, K, false, false>, Shared<E, D, M, K, 1>::kTotal);
        case kBackwardRows:
            return go(backward_rows_kernel<E, D, M, k, kCausal>, Shared<E, D, M, k, 2>::kTotal);
        default:
            return go(backward_columns_kernel<E, D, M, k, kCausal>, Shared<E, D, M, k, 2>::kTotal);
    }
}

template <class E, int D, int M>
int run_statistics(const Run& run, const SatAttention& p) {
    constexpr int kShared = Shared<E, D, M, M, 0>::kTotal;
    if (kShared > run.shared_limit) return kTooLarge;
    const int64_t side = (p.length + M - 1) / M;
    return run.launch ? launch(statistics_kernel<E, D, M>, p.groups * side * side, M * 2, kShared, run.stream, p)
                      : loadable(statistics_kernel<E, D, M>);
}

template <class E, int D>
int run_dim(const Run& run, const SatAttention& p) {
    if (run.pass == kStatistics) {
        // Halved where there would be too few blocks to fill the device twice.
        constexpr int M = kBytes<E> == 2 ? (D == 128 ? 64 : 128) : (D == 128 ? 32 : 64);
        const int64_t side = (p.length + M - 1) / M;
        if constexpr (M >= 64)
            if (p.groups * side * side < 2 * run.multiprocessors) return run_statistics<E, D, M / 2>(run, p);
        return run_statistics<E, D, M>(run, p);
    }
    // As many rows as the blocks and the device allow; in fp32 with D = 128, 64 rows would fit on few devices.
    if constexpr (D * kBytes<E> <= 256)
        if (p.block_size % 64 == 0 && !p.causal) {
            const int status = run_rows<E, D, 64, false>(run, p);
            if (status != kTooLarge) return status;
        }
    if (p.block_size % 32) return p.causal ? run_rows<E, D, 16, true>(run, p) : run_rows<E, D, 16, false>(run, p);
    return p.causal ? run_rows<E, D, 32, true>(run, p) : run_rows<E, D, 32, false>(run, p);
}

template <class E>
int run_type(const Run& run, const SatAttention& p) {
    switch (p.head_dim) {
        case 32:
            return run_dim<E, 32>(run, p);
        case 64:
            return run_dim<E, 64>(run, p);
        default:
            return run_dim<E, 128>(run, p);
    }
}

}    // namespace sat
