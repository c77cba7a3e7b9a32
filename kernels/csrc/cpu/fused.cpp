// Exports of the fused operations: they pick the kernels of the instruction set in use. kernels/fused.py calls these.

#include "fused_abi.h"

static SatFusedKernels kernels() {
    switch (sat_isa()) {
#if defined(__x86_64__) && !defined(SAT_WITHOUT_AVX512BF16)
        case SAT_ISA_AMX:
        case SAT_ISA_AVX512_BF16: return sat_avx512_bf16::fused_kernels();
#endif
#if defined(__x86_64__) && !defined(SAT_WITHOUT_AVX512)
        case SAT_ISA_AVX512: return sat_avx512::fused_kernels();
#endif
#if defined(__x86_64__) && !defined(SAT_WITHOUT_AVX2)
        case SAT_ISA_AVX2: return sat_avx2::fused_kernels();
#endif
        default: return sat_portable::fused_kernels();
    }
}

SAT_EXPORT int sat_add_norm(const SatNorm* a, const void* x, const void* branch, void* y, void* normed,
                            float* stats) {
    return kernels().add_norm(*a, x, branch, y, normed, stats);
}

SAT_EXPORT int sat_add_norm_backward(const SatNorm* a, const void* y, const float* stats, const void* dy,
                                     const void* dnormed, void* dx, void* dbranch, float* pieces,
                                     float* dparameters) {
    return kernels().add_norm_backward(*a, y, stats, dy, dnormed, dx, dbranch, pieces, dparameters);
}

SAT_EXPORT int sat_embed_norm(const SatNorm* a, const int64_t* ids, int64_t vocabulary, const void* words,
                              const void* positions, void* x, void* normed, float* stats) {
    for (int64_t row = 0; row < a->rows; ++row)
        if (ids[row] < 0 || ids[row] >= vocabulary) return SAT_ID_OUT_OF_RANGE;
    return kernels().embed_norm(*a, ids, words, positions, x, normed, stats);
}

SAT_EXPORT int sat_embed_norm_backward(const SatNorm* a, const int64_t* ids, int64_t vocabulary, const void* x,
                                       const float* stats, const void* dx, const void* dnormed, float* dsum,
                                       float* pieces, float* dparameters, float* dwords, float* dpositions) {
    return kernels().embed_norm_backward(*a, ids, x, stats, dx, dnormed, dsum, pieces, dparameters, vocabulary,
                                         dwords, dpositions);
}

// grad null: out = dropout(gelu(x)); else out = grad times its derivative.
SAT_EXPORT int sat_gelu(const SatGelu* a, const void* x, const void* grad, void* out) {
    return kernels().gelu(*a, x, grad, out);
}

SAT_EXPORT int sat_mean(const SatMean* a, const void* x, float* out) { return kernels().mean(*a, x, out); }

SAT_EXPORT int sat_mean_backward(const SatMean* a, const float* dout, void* dx) {
    return kernels().mean_backward(*a, dout, dx);
}

// Whether the layer and the projections are compiled for products of bf16.
SAT_EXPORT int sat_layer_has_bfloat() { return kernels().layer[SAT_BFLOAT16].forward != nullptr; }

SAT_EXPORT int sat_layer_forward(const SatLayer* a, const float* x, const void* attended, float* y, void* h, float* z,
                                 void* normed, float* stats) {
    return kernels().layer[a->type].forward(*a, x, attended, y, h, z, normed, stats);
}

SAT_EXPORT int sat_layer_backward(const SatLayer* a, const void* attended, const float* y, const void* h,
                                  const float* z, const float* stats, const float* dz, const void* dnormed, float* dx,
                                  void* dattended, float* pieces, float* dparameters) {
    return kernels().layer[a->type].backward(*a, attended, y, h, z, stats, dz, dnormed, dx, dattended, pieces,
                                             dparameters);
}

SAT_EXPORT int sat_project(const SatProjections* a, const void* x, void* query, void* key, void* value) {
    void* const out[3] = {query, key, value};
    return kernels().layer[a->type].project(*a, x, out);
}

SAT_EXPORT int sat_project_backward(const SatProjections* a, const void* x, const void* dquery, const void* dkey,
                                    const void* dvalue, void* dx, float* pieces, float* dparameters) {
    const void* const dout[3] = {dquery, dkey, dvalue};
    return kernels().layer[a->type].project_backward(*a, x, dout, dx, pieces, dparameters);
}
