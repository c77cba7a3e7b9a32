#define SAT_ISA_NAMESPACE portable
#define SAT_WIDTH 4
#include "layer.h"
