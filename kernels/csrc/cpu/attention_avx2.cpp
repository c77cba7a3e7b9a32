#define SAT_ISA_NAMESPACE avx2
#define SAT_WIDTH 8
#include "attention.h"

SAT_DEFINE_ATTENTION(FloatEngine)
