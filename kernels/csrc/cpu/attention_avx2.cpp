#define SAT_ISA_NAMESPACE avx2
#define SAT_WIDTH 8
#define SAT_SPECIALISED
#include "attention_kernel.h"
