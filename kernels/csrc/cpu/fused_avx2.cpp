#define SAT_ISA_NAMESPACE sat_avx2
#define SAT_WIDTH 8
#include "fused_layer.h"
