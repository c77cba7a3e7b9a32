// Block-sparse attention, forward and backward: what kernels/cpu.py, attention.cpp and the kernels share.
//
// Shape letters: B batch, H heads, N padded length, d head_dim, bs block_size, nb = N / bs.
#pragma once

#include "abi.h"

// A [B, H, N, d] tensor: address of its first element and strides in elements.
struct SatTensor {
    void* data;
    int64_t batch, head, row, column;
};

// One call. kernels/cpu.py fills the same fields in the same order. Outputs have column stride 1.
struct SatAttention {
    SatTensor query, key, value, out;          // dtype `type`
    SatTensor dout, dquery, dkey, dvalue;      // backward only, dtype `type`
    float* lse;                                // [B, H, N] log2 of the softmax denominator; +inf in rows without a key
    const uint8_t* real;                       // [B, N] 1 = real token, or null: all are
    const int32_t *row_offsets, *row_columns;  // kept blocks by row [nb + 1], [nnz]; null: all blocks (dense)
    const int32_t *column_offsets, *column_rows;
    int64_t B, H, N, d, bs;                    // d and bs are multiples of 16, at most 128
    int64_t type;                              // SatType
    int64_t pruned_zero;                       // 1: a pruned score counts as logit 0 in the denominator
    int64_t threads;
    float scale;
};

// Statistics of the dense probabilities. See kernels/statistics.py for what they mean.
struct SatStatistics {
    SatTensor query, key;
    const uint8_t* real;
    float* mean;               // [groups, N, N], added to; or null
    double* pooled_sum;        // [groups, nb, nb] sums over the group's heads of block means
    double* square_sum;        // [groups, nb] sums of their squares over heads and a row of blocks
    const float* row_weights;  // [B, N], or null: all rows weigh 1 and no real_sum is asked for
    double* real_sum;          // [groups, nb, nb], zeroed: as pooled_sum, of rows by their weight
    int64_t B, H, N, d, bs, groups;
    int64_t type;
    int64_t threads;
    float scale;
    float weight;              // factor on the mean
};

#define SAT_DECLARE_ATTENTION(isa)                       \
    namespace isa {                                      \
    int attention_forward(const SatAttention& call);     \
    int attention_backward(const SatAttention& call);    \
    int attention_statistics(const SatStatistics& call); \
    }

SAT_DECLARE_ATTENTION(portable)
SAT_DECLARE_ATTENTION(avx2)
SAT_DECLARE_ATTENTION(avx512)
SAT_DECLARE_ATTENTION(avx512_bf16)    // bf16 only, and so is
SAT_DECLARE_ATTENTION(amx)
