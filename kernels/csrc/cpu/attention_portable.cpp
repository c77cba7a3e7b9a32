// For CPUs without a path of their own: 4 wide, what SSE2 and NEON have.
#define SAT_ISA_NAMESPACE portable
#define SAT_WIDTH 4
#include "attention.h"

SAT_DEFINE_ATTENTION(FloatEngine)
