#define SAT_ISA_NAMESPACE sat_portable
#define SAT_WIDTH 4
#include "fused_layer.h"
