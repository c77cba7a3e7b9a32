#define SAT_ISA_NAMESPACE avx512_bf16
#define SAT_WIDTH 16
#include "attention.h"
#include "engine_bf16.h"

namespace SAT_ISA_NAMESPACE {
template <bool>
struct PairEngine : Loops<Bfloat16> {};
}    // namespace SAT_ISA_NAMESPACE

SAT_DEFINE_ATTENTION(PairEngine)
