#define SAT_ISA_NAMESPACE sat_avx512
#define SAT_WIDTH 16
#include "fused_layer.h"
