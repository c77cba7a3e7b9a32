#define SAT_ISA_NAMESPACE avx2
#define SAT_WIDTH 8
#include "layer.h"
