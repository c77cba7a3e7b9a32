#define SAT_ISA_NAMESPACE avx512
#define SAT_WIDTH 16
#define SAT_SPECIALISED
#include "attention_kernel.h"
