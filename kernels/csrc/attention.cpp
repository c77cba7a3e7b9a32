// Hands a call to the kernels of the instruction set in use.

#include "attention.h"

#if defined(__x86_64__) && !defined(SAT_WITHOUT_AVX2)
#define SAT_CASE_AVX2(function) \
    case SAT_ISA_AVX2:          \
        return avx2::function(*call);
#else
#define SAT_CASE_AVX2(function)
#endif
#if defined(__x86_64__) && !defined(SAT_WITHOUT_AVX512)
#define SAT_CASE_AVX512(function) \
    case SAT_ISA_AVX512:          \
    case SAT_ISA_AVX512_BF16:     \
        return avx512::function(*call);
#else
#define SAT_CASE_AVX512(function)
#endif

#define SAT_DISPATCH(function)                   \
    switch (sat_isa()) {                         \
        SAT_CASE_AVX2(function)                  \
        SAT_CASE_AVX512(function)                \
        default:                                 \
            return portable::function(*call);    \
    }

template <class Call>
static bool supported(const Call* call) {
    return call->d >= 16 && call->d <= 128 && call->d % 16 == 0 && call->bs >= 16 && call->bs <= 128 &&
           call->bs % 16 == 0 && call->N % call->bs == 0 && (call->type == SAT_FLOAT32 || call->type == SAT_BFLOAT16);
}

SAT_EXPORT int sat_attention_forward(const SatAttention* call) {
    if (!supported(call)) return SAT_NOT_SUPPORTED;
    SAT_DISPATCH(attention_forward)
}

SAT_EXPORT int sat_attention_backward(const SatAttention* call) {
    if (!supported(call)) return SAT_NOT_SUPPORTED;
    SAT_DISPATCH(attention_backward)
}

SAT_EXPORT int sat_attention_statistics(const SatStatistics* call) {
    if (!supported(call)) return SAT_NOT_SUPPORTED;
    SAT_DISPATCH(attention_statistics)
}
