// The C ABI of kernels/libsat_cuda.so, called by kernels/cuda.py: checks nothing that Python has checked. Functions
// return 0, a cudaError_t, or -1 if the device has too little shared memory. They enqueue on `stream` and never wait.
#include "attention_cuda.cuh"

#define SAT_EXPORT extern "C" __attribute__((visibility("default")))

// Raise with SatAttention or a signature, and in kernels/cuda.py.
SAT_EXPORT int sat_abi_version() { return 2; }
SAT_EXPORT const char* sat_source_hash() { return SAT_SOURCE_HASH; }
// build_cuda.sh looks for this text in a finished library to see whether it is up to date.
SAT_EXPORT const char* sat_build_id() { return "SAT_BUILD=" SAT_BUILD_ID; }

// What ctypes' struct must have.
SAT_EXPORT int sat_cuda_struct_bytes() { return sizeof(SatAttention); }

SAT_EXPORT const char* sat_cuda_error(int status) {
    if (status == sat::kTooLarge) return "the GPU has too little shared memory for this shape and dtype";
    return cudaGetErrorString(static_cast<cudaError_t>(status));
}

static int run_pass(sat::Pass pass, const SatAttention& attention, int device, void* stream, bool launch) {
    // This library's runtime has a current device of its own.
    int limit = 0, multiprocessors = 0, cache = 0;
    cudaError_t status = cudaSetDevice(device);
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&cache, cudaDevAttrL2CacheSize, device);
    if (status != cudaSuccess) return status;
    const sat::Run run{pass, limit, multiprocessors, cache, launch, stream};
    switch (attention.type) {
        case 0:
            return sat::run_float(run, attention);
        case 1:
            return sat::run_bfloat(run, attention);
        default:
            return sat::run_half(run, attention);
    }
}

// out and lse.
SAT_EXPORT int sat_cuda_forward(const SatAttention* attention, int device, void* stream) {
    return run_pass(sat::kForward, *attention, device, stream, true);
}

// dq, dk, dv and delta from out, lse and dout.
SAT_EXPORT int sat_cuda_backward(const SatAttention* attention, int device, void* stream) {
    const int status = run_pass(sat::kBackwardRows, *attention, device, stream, true);
    return status ? status : run_pass(sat::kBackwardColumns, *attention, device, stream, true);
}

// lse and delta for the statistics.
SAT_EXPORT int sat_cuda_denominators(const SatAttention* attention, int device, void* stream) {
    return run_pass(sat::kDenominator, *attention, device, stream, true);
}

// mean and pooled from lse and delta.
SAT_EXPORT int sat_cuda_statistics(const SatAttention* attention, int device, void* stream) {
    return run_pass(sat::kStatistics, *attention, device, stream, true);
}

// Whether the device has what the passes need, for the attention's type, head_dim and block_size: 0 if so.
SAT_EXPORT int sat_cuda_fits(const SatAttention* attention, int device) {
    for (sat::Pass pass : {sat::kForward, sat::kBackwardRows, sat::kBackwardColumns, sat::kStatistics})
        if (const int status = run_pass(pass, *attention, device, nullptr, false)) return status;
    return 0;
}
