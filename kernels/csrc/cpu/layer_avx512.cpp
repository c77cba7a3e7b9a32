#define SAT_ISA_NAMESPACE avx512
#define SAT_WIDTH 16
#include "layer.h"
