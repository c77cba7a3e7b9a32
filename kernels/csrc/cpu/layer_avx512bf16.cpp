#define SAT_ISA_NAMESPACE avx512_bf16
#define SAT_WIDTH 16
#include "layer.h"
