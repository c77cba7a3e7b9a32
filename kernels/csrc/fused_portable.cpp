#define SAT_ISA_NAMESPACE sat_portable
#define SAT_WIDTH 8
#include "fused_layer.h"
