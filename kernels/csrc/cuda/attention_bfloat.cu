// The kernels for one element type; a file each, so that they compile side by side.
#include "attention_cuda.cuh"

int sat::run_bfloat(const Run& run, const SatAttention& attention) { return run_type<Bfloat>(run, attention); }
