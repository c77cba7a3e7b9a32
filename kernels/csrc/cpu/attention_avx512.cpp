#define SAT_ISA_NAMESPACE avx512
#define SAT_WIDTH 16
#include "attention.h"

SAT_DEFINE_ATTENTION(FloatEngine)
