// For CPUs without a path of their own. On x86-64, where nearly every CPU has AVX2, it is 16 wide: the compiler splits
// the vectors, and what runs is the logic of the AVX-512 path, on any machine.
#define SAT_ISA_NAMESPACE portable
#if defined(__x86_64__)
#define SAT_WIDTH 16
#else
#define SAT_WIDTH 4
#endif
#include "attention_kernel.h"
