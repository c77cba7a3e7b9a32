// What fused.cpp (exports, choice of the instruction set) and fused.h (the kernels) share.
#pragma once

#include "abi.h"

enum {
    SAT_PIECE = 256,              // tokens whose parameter gradients are summed in one go
    SAT_LAYER_PIECE = 1024,       // the same in the whole half layer, whose gradients are larger
    SAT_MAX_FEATURES = 4096,      // a row is buffered on the stack
    SAT_ID_OUT_OF_RANGE = 100,    // status: a token id beyond the word table
};

// Types of (residual stream, branch, norm's output).
enum SatTypes { SAT_ALL_FLOAT = 0, SAT_FLOAT_STREAM = 1, SAT_ALL_BFLOAT = 2 };

static inline int64_t sat_pieces(int64_t rows) { return (rows + SAT_PIECE - 1) / SAT_PIECE; }

// One call on rows = examples * length tokens of `features` values.
struct SatNorm {
    int64_t rows, length, features;
    int types;
    const float *weight, *bias;    // of the norm; bias may be null in the backward pass
    float eps;
    uint32_t threshold;    // 0: no dropout
    float scale;
    uint64_t site_key;
    int64_t first_example;
    int threads;
};

struct SatGelu {
    int64_t examples, size;    // size: elements of an example
    int type;
    uint32_t threshold;
    float scale;
    uint64_t site_key;
    int64_t first_example;
    int threads;
};

// Mean over the tokens of an example, those with mask 0 counting as zero.
struct SatMean {
    int64_t examples, length, features;
    int type;    // SatType of the tokens
    const uint8_t* mask;
    int threads;
};

// Everything between two attentions; `attended`, `hidden`: widths. Three dropout sites.
struct SatLayer {
    int type;    // SatType
    int64_t rows, length, features, attended, hidden;
    const float *out_weight, *out_bias, *norm_weight, *norm_bias, *expand_weight, *expand_bias, *contract_weight,
        *contract_bias, *next_weight, *next_bias;
    const uint8_t* active;    // flags of the blocks of a sequence; bit 0: its queries attend to something. Null: all
    int64_t block_size;
    float eps;
    uint32_t threshold;
    float scale;
    uint64_t site_key[3];
    int64_t first_example;
    int threads;
};

// Query, key and value projections, weights [attended, features].
struct SatProjections {
    int type;    // SatType
    int64_t rows, length, features, attended;
    const float *weight[3], *bias[3];
    const uint8_t* active;    // as in SatLayer; bit 1: its keys are attended to
    int64_t block_size;
    int threads;
};

// T of csrc/fused_layer.h: what products read and write, fp32 or bf16; void stands for it here.
struct SatLayerKernels {
    int (*forward)(const SatLayer&, const float* x, const void* attended, float* y, void* h, float* z, void* normed,
                   float* stats);
    int (*backward)(const SatLayer&, const void* attended, const float* y, const void* h, const float* z,
                    const float* stats, const float* dz, const void* dnormed, float* dx, void* dattended,
                    float* pieces, float* dparameters);
    int (*project)(const SatProjections&, const void* x, void* const out[3]);
    int (*project_backward)(const SatProjections&, const void* x, const void* const dout[3], void* dx, float* pieces,
                            float* dparameters);
};

struct SatFusedKernels {
    int (*add_norm)(const SatNorm&, const void* x, const void* branch, void* y, void* normed, float* stats);
    int (*add_norm_backward)(const SatNorm&, const void* y, const float* stats, const void* dy, const void* dnormed,
                             void* dx, void* dbranch, float* pieces, float* dparameters);
    int (*embed_norm)(const SatNorm&, const int64_t* ids, const void* words, const void* positions, void* x,
                      void* normed, float* stats);
    int (*embed_norm_backward)(const SatNorm&, const int64_t* ids, const void* x, const float* stats, const void* dx,
                               const void* dnormed, float* dsum, float* pieces, float* dparameters,
                               int64_t vocabulary, float* dwords, float* dpositions);
    int (*gelu)(const SatGelu&, const void* x, const void* grad, void* out);
    int (*mean)(const SatMean&, const void* x, float* out);
    int (*mean_backward)(const SatMean&, const float* dout, void* dx);
    SatLayerKernels layer[2];    // by SatType; null where this instruction set has no products of bf16
};

namespace sat_portable {
SatFusedKernels fused_kernels();
}
namespace sat_avx2 {
SatFusedKernels fused_kernels();
}
namespace sat_avx512 {
SatFusedKernels fused_kernels();
}
namespace sat_avx512_bf16 {
SatFusedKernels fused_kernels();
}
