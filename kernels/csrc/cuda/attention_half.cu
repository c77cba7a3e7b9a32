// The kernels for one element type; a file each, so that they compile side by side.
#include "attention_cuda.cuh"

int sat::run_half(const Run& run, const SatAttention& attention) { return run_type<Half>(run, attention); }
