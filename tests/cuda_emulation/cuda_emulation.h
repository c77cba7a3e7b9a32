// Runs CUDA kernels on a CPU, for tests only: the .cu files of kernels/csrc/cuda compile against this header with
// -DSAT_CUDA_EMULATION and any C++17 compiler of the GNU kind.
//
// Blocks run one after the other. Each CUDA thread is a fiber with its own stack; a warp's lanes run in turn until
// each has called the same warp-wide function, which then happens for all 32 at once; a block's warps run in turn until
// each thread stands at the same barrier. What a GPU would leave undefined is made visible:
//
//   divergence      a barrier or warp-wide function that some threads miss, or reach at another line: an error
//   uninitialised   shared memory starts as NaN in every type
//   missing wait    asynchronous copies land at copy_wait_all, not before (mode kLate)
//   missing barrier copies land at once (mode kEarly), and threads and warps run in either order (mode kReverse): a
//                   kernel that is right gives the same bits in all four modes
//   out of bounds   shared addresses of copies and matrix loads are checked; all other accesses by an AddressSanitizer
//                   build, for which shared memory is a heap block of exactly the size that was asked for
//
// Matrix products follow the register layouts of the PTX manual; products are summed in fp64 and rounded once, where
// a GPU's order and rounding are its own affair.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <string>
#include <type_traits>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct uint4 {
    uint32_t x, y, z, w;
};
struct float2 {
    float x, y;
};
struct dim3 {
    unsigned x;
    explicit dim3(unsigned x) : x(x) {}
};
using cudaStream_t = void*;
enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorNoKernelImageForDevice = 209,
    cudaErrorLaunchFailure = 719
};
struct cudaFuncAttributes {};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrL2CacheSize = 38, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

inline int min(int a, int b) { return a < b ? a : b; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float __uint_as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
inline uint32_t __float_as_uint(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

namespace emulation {

enum Mode { kEarly = 1, kReverse = 2 };

struct Copy {
    void* to;
    const void* from;    // null: zeros
};

// A warp-wide function: each lane brings its arguments, which lie on its own stack; the last one runs it for all.
using WarpFunction = void (*)(void* const (&lanes)[32]);

struct Fiber {
    enum State { kReady, kAtWarpFunction, kAtBarrier, kDone } state;
    unsigned thread;
    bool started;
    void* jump[5];
    ucontext_t context;
    std::vector<unsigned char> stack;
    std::vector<Copy> copies;
    int line;
    const char* what;
    WarpFunction function;
    void* arguments;
    void* fake_stack;
};

struct Machine {
    int mode = 0;
    int arch = 800;                   // compute capability times 100: which instructions the kernels may use
    int shared_limit = 227 * 1024;    // of an H100
    int multiprocessors = 132;
    int cache = 200 * 1024;           // small, so that heads are taken in several groups
    bool foreign = false;             // a GPU that the library has no kernels for
    std::string error;
    unsigned block = 0, blocks = 0, threads = 0;
    unsigned char* shared = nullptr;
    int shared_bytes = 0;
    std::vector<Fiber> fibers;
    Fiber* running = nullptr;
    void* jump[5];
    void* fake_stack = nullptr;
    const void* main_stack = nullptr;
    size_t main_stack_bytes = 0;
    void (*body)(void*) = nullptr;
    void* body_argument = nullptr;
    int64_t warp_functions = 0;    // how many ran: a measure of the work
};
inline Machine machine;

struct Index {
    unsigned x;
};
inline Index thread_index() { return {machine.running->thread}; }
inline Index block_index() { return {machine.block}; }
inline Index grid_size() { return {machine.blocks}; }

// Control goes back and forth between the scheduler and one fiber. __builtin_longjmp must not stand in the function
// that called __builtin_setjmp, and costs no system call, unlike swapcontext.
[[noreturn]] __attribute__((noinline)) inline void jump_to(void** place) { __builtin_longjmp(place, 1); }

inline void leave_for_fiber(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&machine.fake_stack, fiber.stack.data(), fiber.stack.size());
#else
    (void)fiber;
#endif
}

inline void arrive_in_fiber(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fiber.fake_stack, &machine.main_stack, &machine.main_stack_bytes);
#else
    (void)fiber;
#endif
}

inline void leave_for_scheduler(Fiber& fiber, bool for_good) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.fake_stack, machine.main_stack,
                                   machine.main_stack_bytes);
#else
    (void)fiber, (void)for_good;
#endif
}

inline void arrive_in_scheduler() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(machine.fake_stack, nullptr, nullptr);
#endif
}

__attribute__((noinline)) inline void pause_fiber() {
    Fiber& fiber = *machine.running;
    leave_for_scheduler(fiber, false);
    if (__builtin_setjmp(fiber.jump) == 0) jump_to(machine.jump);
    arrive_in_fiber(*machine.running);
}

inline void fiber_main() {
    Fiber& fiber = *machine.running;
    arrive_in_fiber(fiber);
    machine.body(machine.body_argument);
    fiber.state = Fiber::kDone;
    leave_for_scheduler(fiber, true);
    jump_to(machine.jump);
}

__attribute__((noinline)) inline void run_fiber(Fiber& fiber) {
    machine.running = &fiber;
    leave_for_fiber(fiber);
    if (__builtin_setjmp(machine.jump) == 0) {
        if (fiber.started) jump_to(fiber.jump);
        fiber.started = true;
        setcontext(&fiber.context);
    }
    arrive_in_scheduler();
    machine.running = nullptr;
}

inline void fail(const std::string& message) {
    if (machine.error.empty()) machine.error = message;
}

inline std::string describe(const Fiber& fiber) {
    std::string who = "thread " + std::to_string(fiber.thread) + " of block " + std::to_string(machine.block);
    if (fiber.state == Fiber::kDone) return who + " has ended";
    return who + " is at " + fiber.what + (fiber.line ? " in line " + std::to_string(fiber.line) : "");
}

// Runs one warp until all its threads stand at a barrier or have ended. False on divergence.
inline bool run_warp(unsigned first, unsigned count) {
    const bool reverse = machine.mode & kReverse;
    while (true) {
        for (unsigned i = 0; i < count; ++i) {
            Fiber& fiber = machine.fibers[first + (reverse ? count - 1 - i : i)];
            if (fiber.state == Fiber::kReady) run_fiber(fiber);
        }
        Fiber& leader = machine.fibers[first];
        void* lanes[32];
        unsigned waiting = 0;
        for (unsigned i = 0; i < count; ++i) waiting += machine.fibers[first + i].state == Fiber::kAtWarpFunction;
        if (waiting == 0) return true;    // at a barrier or ended: the block's affair
        for (unsigned i = 0; i < 32; ++i) {
            if (i >= count) {
                fail(describe(leader) + ", but its warp has only " + std::to_string(count) + " threads");
                return false;
            }
            Fiber& fiber = machine.fibers[first + i];
            if (fiber.state != leader.state || fiber.function != leader.function || fiber.line != leader.line) {
                fail("divergence in a warp: " + describe(leader) + ", " + describe(fiber));
                return false;
            }
            lanes[i] = fiber.arguments;
        }
        ++machine.warp_functions;
        leader.function(lanes);
        for (unsigned i = 0; i < count; ++i) machine.fibers[first + i].state = Fiber::kReady;
        if (!machine.error.empty()) return false;
    }
}

inline bool run_block() {
    const unsigned warps = (machine.threads + 31) / 32;
    while (true) {
        for (unsigned i = 0; i < warps; ++i) {
            const unsigned warp = machine.mode & kReverse ? warps - 1 - i : i;
            const unsigned count = warp * 32 + 32 <= machine.threads ? 32 : machine.threads % 32;
            if (!run_warp(warp * 32, count)) return false;
        }
        const Fiber& leader = machine.fibers[0];
        for (unsigned i = 0; i < machine.threads; ++i) {
            const Fiber& fiber = machine.fibers[i];
            if (fiber.state == leader.state && fiber.line == leader.line) continue;
            fail("divergence at a barrier: " + describe(leader) + ", " + describe(fiber));
            return false;
        }
        if (leader.state == Fiber::kDone) return true;
        for (unsigned i = 0; i < machine.threads; ++i) machine.fibers[i].state = Fiber::kReady;
    }
}

__attribute__((noinline)) inline void prepare_fiber(Fiber& fiber, unsigned thread) {
    fiber.state = Fiber::kReady;
    fiber.thread = thread;
    fiber.started = false;
    fiber.line = 0;
    fiber.what = "";
    fiber.function = nullptr;
    fiber.copies.clear();
    fiber.stack.resize(256 * 1024);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
}

inline cudaError_t run_grid(void (*body)(void*), void* argument, unsigned blocks, unsigned threads, int shared_bytes) {
    machine.error.clear();
    machine.body = body;
    machine.body_argument = argument;
    machine.blocks = blocks;
    machine.threads = threads;
    machine.shared_bytes = shared_bytes;
    if (shared_bytes > machine.shared_limit) {
        fail("too much shared memory: " + std::to_string(shared_bytes) + " bytes");
        return cudaErrorInvalidConfiguration;
    }
    if (machine.fibers.size() < threads) machine.fibers.resize(threads);
    for (machine.block = 0; machine.block < blocks && machine.error.empty(); ++machine.block) {
        void* block = nullptr;
        if (posix_memalign(&block, 128, shared_bytes)) abort();
        machine.shared = static_cast<unsigned char*>(block);
        memset(machine.shared, 0xff, shared_bytes);
        for (unsigned i = 0; i < threads; ++i) {
            prepare_fiber(machine.fibers[i], i);
        }
        run_block();
        free(machine.shared);
        machine.shared = nullptr;
    }
    return machine.error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

inline void barrier(int line) {
    Fiber& fiber = *machine.running;
    fiber.state = Fiber::kAtBarrier;
    fiber.line = line;
    fiber.what = "__syncthreads";
    fiber.function = nullptr;
    pause_fiber();
    fiber.line = 0;
}

template <class Arguments>
inline void warp_function(const char* what, Arguments& arguments, WarpFunction function, int line = 0) {
    Fiber& fiber = *machine.running;
    fiber.state = Fiber::kAtWarpFunction;
    fiber.line = line;
    fiber.what = what;
    fiber.function = function;
    fiber.arguments = &arguments;
    pause_fiber();
    fiber.line = 0;
    fiber.function = nullptr;
}

inline void warp_barrier(int line) {
    int nothing = 0;
    warp_function("__syncwarp", nothing, [](void* const(&)[32]) {}, line);
}

template <class T>
struct Shuffle {
    T value, result;
    int from;
};

template <class T>
inline T shuffle(uint32_t mask, T value, int from) {
    static_assert(std::is_trivially_copyable<T>::value && sizeof(T) == 4, "32 bits");
    if (mask != 0xffffffff) fail("a shuffle without all lanes");
    Shuffle<T> arguments{value, value, from};
    warp_function("a shuffle", arguments, [](void* const(&lanes)[32]) {
        for (void* lane : lanes) {
            auto& mine = *static_cast<Shuffle<T>*>(lane);
            mine.result = static_cast<Shuffle<T>*>(lanes[mine.from & 31])->value;
        }
    });
    return arguments.result;
}

inline uint32_t ballot(uint32_t mask, bool value) {
    if (mask != 0xffffffff) fail("a ballot without all lanes");
    Shuffle<uint32_t> arguments{value, 0, 0};
    warp_function("a ballot", arguments, [](void* const(&lanes)[32]) {
        uint32_t bits = 0;
        for (int i = 0; i < 32; ++i) bits |= static_cast<Shuffle<uint32_t>*>(lanes[i])->value << i;
        for (void* lane : lanes) static_cast<Shuffle<uint32_t>*>(lane)->result = bits;
    });
    return arguments.result;
}

inline unsigned char* shared_memory() { return machine.shared; }

// Whether 16 bytes at `pointer` lie in shared memory, aligned; else an error.
inline bool shared_chunk(const void* pointer, const char* what) {
    const auto* byte = static_cast<const unsigned char*>(pointer);
    const bool inside = byte >= machine.shared && byte + 16 <= machine.shared + machine.shared_bytes;
    if (!inside || (byte - machine.shared) % 16) {
        fail(std::string(what) + (inside ? ": misaligned" : ": out of the bounds of shared memory") + " at byte " +
             std::to_string(byte - machine.shared));
        return false;
    }
    return true;
}

inline void land(const Copy& copy) {
    if (copy.from)
        memcpy(copy.to, copy.from, 16);
    else
        memset(copy.to, 0, 16);
}

inline void copy_async_16(void* to, const void* from, bool valid = true) {
    if (!shared_chunk(to, "an asynchronous copy")) return;
    if (reinterpret_cast<uintptr_t>(from) % 16) fail("an asynchronous copy: misaligned in global memory");
    const Copy copy{to, valid ? from : nullptr};
    if (machine.mode & kEarly)
        land(copy);
    else
        machine.running->copies.push_back(copy);
}

inline void copy_commit() {}

inline void copy_wait_all() {
    for (const Copy& copy : machine.running->copies) land(copy);
    machine.running->copies.clear();
}

struct MatrixLoad {
    uint32_t* r;
    const void* row;
};

template <bool transposed>
inline void load_matrices_of_warp(void* const (&lanes)[32]) {
    for (int matrix = 0; matrix < 4; ++matrix) {
        uint16_t elements[8][8];
        for (int row = 0; row < 8; ++row) {
            const void* from = static_cast<MatrixLoad*>(lanes[matrix * 8 + row])->row;
            if (!shared_chunk(from, "a matrix load")) return;
            memcpy(elements[row], from, 16);
        }
        for (int lane = 0; lane < 32; ++lane) {
            const int g = lane / 4, t = lane % 4;
            const uint32_t low = transposed ? elements[2 * t][g] : elements[g][2 * t];
            const uint32_t high = transposed ? elements[2 * t + 1][g] : elements[g][2 * t + 1];
            static_cast<MatrixLoad*>(lanes[lane])->r[matrix] = low | high << 16;
        }
    }
}

inline void load_matrices(uint32_t (&r)[4], const void* row) {
    MatrixLoad arguments{r, row};
    warp_function("ldmatrix", arguments, load_matrices_of_warp<false>);
}

inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
    MatrixLoad arguments{r, row};
    warp_function("ldmatrix.trans", arguments, load_matrices_of_warp<true>);
}

inline float unpack_f16(uint16_t bits) {
    _Float16 x;
    memcpy(&x, &bits, 2);
    return x;
}

inline float unpack_bf16(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }

inline uint32_t pack_f16(float low, float high) {
    const _Float16 both[2] = {static_cast<_Float16>(low), static_cast<_Float16>(high)};
    uint32_t packed;
    memcpy(&packed, both, 4);
    return packed;
}

inline uint32_t round_bf16(float x) {
    const uint32_t bits = __float_as_uint(x);
    if (x != x) return (bits >> 16) | 0x40;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

inline uint32_t pack_bf16(float low, float high) { return round_bf16(low) | round_bf16(high) << 16; }

struct Product {
    float* c;
    const uint32_t *a, *b;
};

// One 16 x 8 x K product. K 16-bit elements, two in a register, or (pairs = false) one fp32 in each.
template <int K, bool pairs, float (*unpack)(uint32_t)>
inline void multiply_warp(void* const (&lanes)[32]) {
    float a[16][K], b[K][8];
    for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4;
        const Product& mine = *static_cast<Product*>(lanes[lane]);
        if constexpr (pairs) {
            for (int k = 0; k < K / 8; ++k)
                for (int half = 0; half < 2; ++half) {
                    a[g][k * 8 + 2 * t + half] = unpack(mine.a[2 * k] >> 16 * half & 0xffff);
                    a[g + 8][k * 8 + 2 * t + half] = unpack(mine.a[2 * k + 1] >> 16 * half & 0xffff);
                    b[k * 8 + 2 * t + half][g] = unpack(mine.b[k] >> 16 * half & 0xffff);
                }
        } else {
            for (int k = 0; k < 2; ++k) {
                a[g][k * 4 + t] = unpack(mine.a[2 * k]);
                a[g + 8][k * 4 + t] = unpack(mine.a[2 * k + 1]);
                b[k * 4 + t][g] = unpack(mine.b[k]);
            }
        }
    }
    double c[16][8] = {};
    for (int i = 0; i < 16; ++i)
        for (int k = 0; k < K; ++k)
            for (int j = 0; j < 8; ++j) c[i][j] += static_cast<double>(a[i][k]) * b[k][j];
    for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4;
        float* mine = static_cast<Product*>(lanes[lane])->c;
        for (int i = 0; i < 4; ++i) mine[i] = static_cast<float>(mine[i] + c[g + i / 2 * 8][2 * t + i % 2]);
    }
}

inline float from_f16(uint32_t bits) { return unpack_f16(static_cast<uint16_t>(bits)); }
inline float from_bf16(uint32_t bits) { return unpack_bf16(static_cast<uint16_t>(bits)); }
inline float from_tf32(uint32_t bits) { return __uint_as_float(bits & 0xffffe000); }

inline void mma_16816_f16(float (&c)[4], const uint32_t* a, const uint32_t* b) {
    Product arguments{c, a, b};
    warp_function("mma.m16n8k16.f16", arguments, multiply_warp<16, true, from_f16>);
}
inline void mma_1688_f16(float (&c)[4], const uint32_t* a, const uint32_t* b) {
    Product arguments{c, a, b};
    warp_function("mma.m16n8k8.f16", arguments, multiply_warp<8, true, from_f16>);
}
inline void mma_16816_bf16(float (&c)[4], const uint32_t* a, const uint32_t* b) {
    Product arguments{c, a, b};
    warp_function("mma.m16n8k16.bf16", arguments, multiply_warp<16, true, from_bf16>);
}
inline void mma_1688_tf32(float (&c)[4], const uint32_t* a, const uint32_t* b) {
    Product arguments{c, a, b};
    warp_function("mma.m16n8k8.tf32", arguments, multiply_warp<8, false, from_tf32>);
}

inline float exp2_fast(float x) { return exp2f(x); }
inline float log2_fast(float x) { return log2f(x); }

}    // namespace emulation

#define threadIdx (emulation::thread_index())
#define blockIdx (emulation::block_index())
#define gridDim (emulation::grid_size())
#define __syncthreads() emulation::barrier(__LINE__)
#define __syncwarp() emulation::warp_barrier(__LINE__)
#define __shfl_sync emulation::shuffle
#define __shfl_xor_sync(mask, value, bits) emulation::shuffle(mask, value, (threadIdx.x ^ (bits)) & 31)
#define __ballot_sync emulation::ballot

inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) {
    return emulation::machine.foreign ? cudaErrorNoKernelImageForDevice : cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int) {
    const emulation::Machine& machine = emulation::machine;
    *value = what == cudaDevAttrMultiProcessorCount ? machine.multiprocessors
             : what == cudaDevAttrL2CacheSize       ? machine.cache
                                                    : machine.shared_limit;
    return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) {
    return emulation::machine.error.empty() ? "no error" : emulation::machine.error.c_str();
}

namespace emulation {

template <class Parameters>
struct Launch {
    void (*kernel)(Parameters);
    const Parameters* parameters;
};

template <class Parameters>
inline cudaError_t launch(void (*kernel)(Parameters), unsigned blocks, unsigned threads, int shared_bytes,
                          const Parameters& parameters) {
    Launch<Parameters> it{kernel, &parameters};
    return run_grid(
        [](void* argument) {
            auto& it = *static_cast<Launch<Parameters>*>(argument);
            it.kernel(*it.parameters);
        },
        &it, blocks, threads, shared_bytes);
}

}    // namespace emulation
