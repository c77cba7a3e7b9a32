// Small kernels with one mistake each, some also without it: what the emulation has to find.
#include "../../kernels/csrc/cuda/cuda_primitives.cuh"

struct Work {
    const float* in;
    float* out;
};

namespace {

using namespace sat;

__device__ float* floats() { return reinterpret_cast<float*>(shared_memory()); }

// Copies `in` through shared memory and takes the neighbour's element.
template <bool kWait, bool kBarrier>
__global__ void neighbour(Work w) {
    const int i = static_cast<int>(threadIdx.x);
    if (i < 16) copy_async_16(floats() + 4 * i, w.in + 4 * i);
    copy_commit();
    if (kWait) copy_wait_all();
    if (kBarrier) __syncthreads();
    w.out[i] = floats()[(i + 1) % 64];
}

// Two buffers of 64 floats, filled in turn with the halves of `in`, three times; without the barrier a fast warp fills a
// buffer that a slow one still reads.
template <bool kBarrier>
__global__ void double_buffer(Work w) {
    const int i = static_cast<int>(threadIdx.x);
    auto fill = [&](int round) {
        if (i < 16) copy_async_16(floats() + round % 2 * 64 + 4 * i, w.in + (round / 2 % 2) * 64 + 4 * i);
        copy_commit();
    };
    float sum = 0;
    fill(0);
    for (int round = 0; round < 6; ++round) {
        copy_wait_all();
        if (kBarrier || round < 2) __syncthreads();
        if (round + 1 < 6) fill(round + 1);
        sum += floats()[round % 2 * 64 + 63 - i];
    }
    w.out[i] = sum;
}

// Half of the threads miss the barrier.
__global__ void missed_barrier(Work w) {
    if (threadIdx.x < 32) __syncthreads();
    w.out[threadIdx.x] = 0;
}

// All threads reach a barrier, but not the same one.
__global__ void other_barrier(Work w) {
    if (threadIdx.x < 32)
        __syncthreads();
    else
        __syncthreads();
    w.out[threadIdx.x] = 0;
}

// Some lanes of a warp miss an exchange.
__global__ void missed_shuffle(Work w) {
    float x = w.in[threadIdx.x];
    if (threadIdx.x % 32 < 20) x += __shfl_xor_sync(kAllLanes, x, 1);
    w.out[threadIdx.x] = x;
}

// One element of shared memory that nobody wrote.
__global__ void uninitialised(Work w) {
    floats()[threadIdx.x] = w.in[threadIdx.x];
    __syncthreads();
    w.out[threadIdx.x] = floats()[threadIdx.x + 1];
}

// One chunk beyond the shared memory that was asked for.
__global__ void copy_out_of_bounds(Work w) {
    copy_async_16(floats() + 4 * (threadIdx.x + 1), w.in);
    copy_commit();
    copy_wait_all();
    w.out[threadIdx.x] = 0;
}

__global__ void load_out_of_bounds(Work w) {
    uint32_t r[4];
    load_matrices(r, floats() + 8 * (threadIdx.x + 1));
    w.out[threadIdx.x] = static_cast<float>(r[0]);
}

// A plain store beyond shared memory and a plain read beyond `in`: for AddressSanitizer.
__global__ void store_out_of_bounds(Work w) { floats()[threadIdx.x + 1] = w.in[threadIdx.x]; }
__global__ void read_out_of_bounds(Work w) { w.out[threadIdx.x] = w.in[threadIdx.x + 65]; }

struct Named {
    const char* name;
    void (*kernel)(Work);
};
const Named kKernels[] = {
    {"right", neighbour<true, true>},
    {"missing wait", neighbour<false, true>},
    {"missing barrier", neighbour<true, false>},
    {"right buffers", double_buffer<true>},
    {"missing barrier between buffers", double_buffer<false>},
    {"missed barrier", missed_barrier},
    {"other barrier", other_barrier},
    {"missed shuffle", missed_shuffle},
    {"uninitialised", uninitialised},
    {"copy out of bounds", copy_out_of_bounds},
    {"load out of bounds", load_out_of_bounds},
    {"store out of bounds", store_out_of_bounds},
    {"read out of bounds", read_out_of_bounds},
};

}    // namespace

// Runs the kernel of that name with 64 threads on 128 floats in, 64 out, and 512 bytes of shared memory, or 256 where
// that is meant to be too little.
extern "C" __attribute__((visibility("default"))) int run_planted(const char* name, const float* in, float* out) {
    for (const Named& it : kKernels)
        if (!strcmp(it.name, name))
            return launch(it.kernel, 1, 64, strstr(name, "out of bounds") ? 256 : 512, nullptr, Work{in, out});
    return -1;
}
