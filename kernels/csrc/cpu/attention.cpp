// Hands a call to the kernels of the instruction set in use.

#include "attention.h"

// A file that compile.sh left out is no choice; abi.h orders the instruction sets, each has what those before it have.
#define SAT_TRY(isa, function) \
    if (sat_isa() >= isa) return function(*call);

#if defined(__x86_64__) && !defined(SAT_WITHOUT_AVX2)
#define SAT_TRY_AVX2(function) SAT_TRY(SAT_ISA_AVX2, avx2::function)
#else
#define SAT_TRY_AVX2(function)
#endif
#if defined(__x86_64__) && !defined(SAT_WITHOUT_AVX512)
#define SAT_TRY_AVX512(function) SAT_TRY(SAT_ISA_AVX512, avx512::function)
#else
#define SAT_TRY_AVX512(function)
#endif
#if defined(__x86_64__) && !defined(SAT_WITHOUT_AVX512BF16)
#define SAT_TRY_AVX512BF16(function) SAT_TRY(SAT_ISA_AVX512_BF16, avx512_bf16::function)
#else
#define SAT_TRY_AVX512BF16(function)
#endif

#if defined(__x86_64__) && !defined(SAT_WITHOUT_AMX)
#define SAT_TRY_AMX(function) SAT_TRY(SAT_ISA_AMX, amx::function)
#else
#define SAT_TRY_AMX(function)
#endif

#define SAT_TRY_BFLOAT16(function)       \
    if (call->type == SAT_BFLOAT16) {    \
        SAT_TRY_AMX(function)            \
        SAT_TRY_AVX512BF16(function)     \
    }

#define SAT_DISPATCH(function)   \
    SAT_TRY_AVX512(function)     \
    SAT_TRY_AVX2(function)       \
    return portable::function(*call);

template <class Call>
static bool supported(const Call* call) {
    return call->d >= 16 && call->d <= 128 && call->d % 16 == 0 && call->bs >= 16 && call->bs <= 128 &&
           call->bs % 16 == 0 && call->N % call->bs == 0 && (call->type == SAT_FLOAT32 || call->type == SAT_BFLOAT16);
}

SAT_EXPORT int sat_attention_forward(const SatAttention* call) {
    if (!supported(call)) return SAT_NOT_SUPPORTED;
    SAT_TRY_BFLOAT16(attention_forward)
    SAT_DISPATCH(attention_forward)
}

SAT_EXPORT int sat_attention_backward(const SatAttention* call) {
    if (!supported(call)) return SAT_NOT_SUPPORTED;
    SAT_TRY_BFLOAT16(attention_backward)
    SAT_DISPATCH(attention_backward)
}

SAT_EXPORT int sat_attention_statistics(const SatStatistics* call) {
    if (!supported(call)) return SAT_NOT_SUPPORTED;
    SAT_TRY_BFLOAT16(attention_statistics)
    SAT_DISPATCH(attention_statistics)
}
