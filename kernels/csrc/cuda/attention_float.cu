// The kernels for one element type; a file each, so that they compile side by side.
#include "attention_cuda.cuh"

int sat::run_float(const Run& run, const SatAttention& attention) { return run_type<Float>(run, attention); }
