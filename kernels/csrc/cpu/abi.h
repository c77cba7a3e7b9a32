// The C ABI of kernels/libsat_cpu.so. Every operation is one line of SAT_OPERATIONS and one function
//     int sat_<operation>(const <its struct>*)                   returns a SatStatus
// Raise SAT_ABI, here and in kernels/native.py, whenever a struct changes; their sizes are compared when Python loads the library.
//
// Shape letters: B batch, H heads, N padded length, d head_dim, bs block_size, nb = N / bs; E features, K width of the attended
// values, F hidden width, V words. [shape] names a contiguous array; a pointer that may be null says what null means.
#pragma once

#include <stdint.h>

#define SAT_ABI 4
#define SAT_EXPORT extern "C" __attribute__((visibility("default")))

enum SatStatus {
    SAT_OK = 0,
    SAT_OUT_OF_MEMORY = 1,        // scratch space could not be allocated
    SAT_NOT_SUPPORTED = 2,        // shape or dtype that the caller should have refused
    SAT_ID_OUT_OF_RANGE = 100,    // a token id beyond the word table
};

// What the elements of a tensor are.
enum SatType { SAT_FLOAT32 = 0, SAT_BFLOAT16 = 1 };

// Types of (residual stream, branch, norm's output).
enum SatTypes { SAT_ALL_FLOAT = 0, SAT_FLOAT_STREAM = 1, SAT_ALL_BFLOAT = 2 };

enum {
    SAT_PIECE = 256,           // tokens whose parameter gradients are summed in one go
    SAT_LAYER_PIECE = 1024,    // the same in the half layer and the projections, whose gradients are larger
    SAT_MAX_FEATURES = 4096,
};

// Instruction sets, worst first. compile.sh gives a file x_<isa>.cpp its flags by the ending of its name.
enum SatIsa {
    SAT_ISA_PORTABLE = 0,
    SAT_ISA_AVX2 = 1,
    SAT_ISA_AVX512 = 2,
    SAT_ISA_AVX512_BF16 = 3,    // attention in bf16 and layers; the rest as AVX512
    SAT_ISA_AMX = 4,            // attention in bf16; the rest as AVX512_BF16
    SAT_ISA_COUNT = 5
};

// ---- attention ----------------------------------------------------------------------------------

// A [B, H, N, d] tensor: address of its first element and strides in elements.
struct SatTensor {
    void* data;
    int64_t batch, head, row, column;
};

struct SatAttention {
    SatTensor query, key, value, out;          // dtype `type`; column stride of outputs: 1
    SatTensor dout, dquery, dkey, dvalue;      // backward only
    float* lse;                                // [B, H, N] log2 of the softmax denominator; SAT_EMPTY in rows without a key
    const uint8_t* real;                       // [B, N] 1 = real token; null: all are
    const int32_t *row_offsets, *row_columns;  // kept blocks by row [layouts, nb + 1], [nnz]; null: all blocks
    const int32_t *column_offsets, *column_rows;
    int64_t B, H, N, d, bs;                    // d and bs are multiples of 16, at most 128
    int64_t layouts;                           // 1, or H: one for each head, offsets running on through all of them
    int64_t type;                              // SatType
    int64_t pruned_zero;                       // 1: a pruned score counts as logit 0 in the denominator
    int64_t causal;                            // 1: no query sees a later key; blocks above the diagonal count as not kept
    int64_t threads;
    float scale;
};
#define SAT_EMPTY 1e30f    // stands for +inf: exp2(s - SAT_EMPTY) is 0 or 2^-126, no NaN

// Statistics of the dense probabilities; kernels/statistics.py says what they mean.
struct SatStatistics {
    SatTensor query, key;
    const uint8_t* real;         // as in SatAttention
    float* mean;                 // [groups, N, N], added to; null: not wanted
    double* pooled_sum;          // [groups, nb, nb] sums over the group's heads of block means
    double* square_sum;          // [groups, nb] sums of their squares over heads and a row of blocks
    const float* row_weights;    // [B, N]; null: real_sum is not wanted
    double* real_sum;            // [groups, nb, nb], zeroed: as pooled_sum, of rows by their weight
    const float* lse;            // [B, H, N] of a dense forward pass, as in SatAttention; null: found here, in another pass
    int64_t B, H, N, d, bs, groups;
    int64_t type;
    int64_t threads;
    float scale;
    float weight;    // factor on the mean
};

// ---- rows of tokens: E and all other widths are multiples of 32 -----------------------------------

struct SatNorm {
    int64_t rows, length, features;    // rows = examples * length tokens of E values
    int types;                         // SatTypes
    const float *weight, *bias;        // [E] of the norm; bias is not read in the backward pass
    float eps;
    uint32_t threshold;    // of dropout, in units of 2^-16; 0: none
    float scale;           // of what is kept
    uint64_t site_key;
    int64_t first_example;
    int threads;
};

// y = x + dropout(branch), normed = LayerNorm(y), all [rows, E]; stats [rows, 2] mean and 1 / deviation.
struct SatAddNorm {
    SatNorm norm;
    const void *x, *branch;
    void *y, *normed;
    float* stats;
};
struct SatAddNormBackward {
    SatNorm norm;
    const void* y;
    const float* stats;
    const void *dy, *dnormed;    // dy null: zero
    void *dx, *dbranch;
    float* pieces;         // [rows / SAT_PIECE, rounded up, 2 E] scratch
    float* dparameters;    // [2, E] of weight and bias
};

// x = dropout(words[ids] + positions), normed = LayerNorm(x).
struct SatEmbedNorm {
    SatNorm norm;
    const int64_t* ids;       // [rows]
    int64_t vocabulary;       // V
    const void *words, *positions;    // [V, E], [N, E]
    void *x, *normed;
    float* stats;
};
struct SatEmbedNormBackward {
    SatNorm norm;
    const int64_t* ids;
    int64_t vocabulary;
    const void* x;
    const float* stats;
    const void *dx, *dnormed;    // dx null: zero
    float *dsum, *pieces;        // [rows, E] and as above: scratch
    float *dparameters, *dwords, *dpositions;    // [2, E], [V, E], [N, E]; dpositions null: not wanted
};

// grad null: out = dropout(gelu(x)); else out = grad times its derivative.
struct SatGelu {
    int64_t examples, size;    // size: elements of an example
    int type;                  // SatType
    uint32_t threshold;
    float scale;
    uint64_t site_key;
    int64_t first_example;
    int threads;
    const void *x, *grad;
    void* out;
};

// Mean [examples, E] fp32 over the tokens [examples, length, E] of an example, those with mask 0 counting as zero. `from` and
// `to` are the tokens and the mean; in the backward pass the mean's gradient and that of the tokens.
struct SatMean {
    int64_t examples, length, features;
    int type;               // SatType of the tokens
    const uint8_t* mask;    // [examples, length]
    int threads;
    const void* from;
    void* to;
};

// ---- what stands between two attentions -----------------------------------------------------------

// y = x + dropout(attended Wo' + bo), n = LayerNorm(y), h = n W1' + b1, z = y + dropout(dropout(gelu(h)) W2' + b2),
// normed = LayerNorm(z). The residual stream x, y, z is fp32; attended, h and normed are of `type`.
struct SatLayer {
    int type;    // SatType
    int64_t rows, length, features, attended, hidden;    // E, K, F
    const float *out_weight, *out_bias, *norm_weight, *norm_bias, *expand_weight, *expand_bias, *contract_weight,
        *contract_bias, *next_weight, *next_bias;    // weights [out, in]
    const uint8_t* active;    // [length / block_size] bit 0: a block's queries attend to something; null: all do
    int64_t block_size;
    float eps;
    uint32_t threshold;
    float scale;
    uint64_t site_key[3];
    int64_t first_example;
    int threads;
};
struct SatLayerForward {
    SatLayer layer;
    const float* x;
    const void* attended;
    float* y;
    void* h;
    float* z;
    void* normed;
    float* stats;    // [rows, 4]: of both norms
};
struct SatLayerBackward {
    SatLayer layer;
    const void* attended;
    const float* y;
    const void* h;
    const float *z, *stats, *dz;    // dz null: zero
    const void* dnormed;
    float* dx;
    void* dattended;
    float* pieces;         // [rows / SAT_LAYER_PIECE, rounded up, parameters] scratch
    float* dparameters;    // the parameters' gradients one after the other, in their order
};

// Query, key and value [rows, K] = x [rows, E] W' + b, weights [K, E].
struct SatProjections {
    int type;    // SatType
    int64_t rows, length, features, attended;
    const float *weight[3], *bias[3];
    const uint8_t* active;    // as in SatLayer; bit 1: a block's keys are attended to. What is not needed becomes zero
    int64_t block_size;
    int threads;
};
struct SatProject {
    SatProjections projections;
    const void* x;
    void* out[3];
};
struct SatProjectBackward {
    SatProjections projections;
    const void* x;
    const void* dout[3];
    void* dx;
    float *pieces, *dparameters;    // as in SatLayerBackward; weight and bias of query, key, value
};

// ---- the table ------------------------------------------------------------------------------------

#define SAT_OPERATIONS(X)                          \
    X(attention_forward, SatAttention)             \
    X(attention_backward, SatAttention)            \
    X(attention_statistics, SatStatistics)         \
    X(add_norm, SatAddNorm)                        \
    X(add_norm_backward, SatAddNormBackward)       \
    X(embed_norm, SatEmbedNorm)                    \
    X(embed_norm_backward, SatEmbedNormBackward)   \
    X(gelu, SatGelu)                               \
    X(mean, SatMean)                               \
    X(mean_backward, SatMean)                      \
    X(layer_forward, SatLayerForward)              \
    X(layer_backward, SatLayerBackward)            \
    X(project, SatProject)                         \
    X(project_backward, SatProjectBackward)
