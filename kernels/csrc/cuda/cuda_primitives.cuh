// What the kernels need from the hardware, one small function each: asynchronous copies into shared memory, matrix
// loads, matrix products, conversions. Everything above this file is plain C++ and also compiles against
// tests/cuda_emulation/cuda_emulation.h (SAT_CUDA_EMULATION), which runs it on a CPU.
//
// Lane numbers below: g = lane / 4 (0..7), t = lane % 4. Layouts are those of the PTX manual, "Matrix fragments
// for mma.m16n8k16" and "mma.m16n8k8".
#pragma once

#include <stdint.h>

#ifdef SAT_CUDA_EMULATION
#include "cuda_emulation.h"
#define SAT_ARCH emulation::machine.arch
#else
#include <cuda_runtime.h>
#ifdef __CUDA_ARCH__
#define SAT_ARCH __CUDA_ARCH__
#else
#define SAT_ARCH 800    // the host's pass: no code comes of it
#endif
#endif

namespace sat {

// Element types of tensors. 16-bit values are kept as bits: nothing but the functions below looks inside.
struct Half {
    using Bits = uint16_t;
};
struct Bfloat {
    using Bits = uint16_t;
};
struct Float {
    using Bits = float;
};

template <class E>
inline constexpr int kBytes = sizeof(typename E::Bits);

template <class A, class B>
inline constexpr bool kSame = false;
template <class A>
inline constexpr bool kSame<A, A> = true;

__device__ __forceinline__ float as_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t as_bits(float x) { return __float_as_uint(x); }

#ifdef SAT_CUDA_EMULATION

using emulation::copy_async_16;
using emulation::copy_commit;
using emulation::copy_wait_all;
using emulation::exp2_fast;
using emulation::load_matrices;
using emulation::load_matrices_transposed;
using emulation::log2_fast;
using emulation::mma_16816_bf16;
using emulation::mma_16816_f16;
using emulation::mma_1688_f16;
using emulation::mma_1688_tf32;
using emulation::pack_bf16;
using emulation::pack_f16;
using emulation::shared_memory;
using emulation::unpack_f16;

#else

__device__ __forceinline__ unsigned char* shared_memory() {
    extern __shared__ __align__(128) unsigned char shared_bytes[];
    return shared_bytes;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory, zeros if !valid. Seen by this thread after copy_wait_all, by others after a
// barrier that follows it.
__device__ __forceinline__ void copy_async_16(void* to, const void* from, bool valid = true) {
#if SAT_ARCH >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(valid ? 16 : 0)
                 : "memory");
#else
    *static_cast<uint4*>(to) = valid ? *static_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
#endif
}

__device__ __forceinline__ void copy_commit() {
#if SAT_ARCH >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

__device__ __forceinline__ void copy_wait_all() {
#if SAT_ARCH >= 800
    asm volatile("cp.async.wait_group 0;" ::: "memory");
#endif
}

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8 and gets of each matrix
// the elements (g, 2t), (g, 2t + 1); transposed: (2t, g), (2t + 1, g).
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// c += a b with a 16 x 16 (or 16 x 8), b 16 x 8 (8 x 8), c 16 x 8 in fp32: c holds (g, 2t), (g, 2t + 1),
// (g + 8, 2t), (g + 8, 2t + 1).
__device__ __forceinline__ void mma_16816_f16(float (&c)[4], const uint32_t* a, const uint32_t* b) {
#if SAT_ARCH >= 800
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

__device__ __forceinline__ void mma_1688_f16(float (&c)[4], const uint32_t* a, const uint32_t* b) {
    asm(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}

__device__ __forceinline__ void mma_16816_bf16(float (&c)[4], const uint32_t* a, const uint32_t* b) {
#if SAT_ARCH >= 800
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// The low 13 bits of a and b are ignored.
__device__ __forceinline__ void mma_1688_tf32(float (&c)[4], const uint32_t* a, const uint32_t* b) {
#if SAT_ARCH >= 800
    asm(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Two floats rounded to nearest even, `low` in the low half.
__device__ __forceinline__ uint32_t pack_f16(float low, float high) {
#if SAT_ARCH >= 800
    uint32_t packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
#else
    uint16_t l, h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(l) : "f"(low));
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(high));
    return l | static_cast<uint32_t>(h) << 16;
#endif
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
#if SAT_ARCH >= 800
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
#else
    // NaN may become infinity here; a NaN in the input shows in the output either way.
    uint32_t l = as_bits(low), h = as_bits(high);
    l += 0x7fff + ((l >> 16) & 1);
    h += 0x7fff + ((h >> 16) & 1);
    return l >> 16 | (h & 0xffff0000);
#endif
}

__device__ __forceinline__ float unpack_f16(uint16_t bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}

// 2^x and log2(x) to about 2 units in the last place; 2^-inf is 0.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float log2_fast(float x) { return log2f(x); }

#endif

constexpr uint32_t kAllLanes = 0xffffffff;

// Sum, maximum over the four lanes that share g.
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(kAllLanes, x, 1);
    return x + __shfl_xor_sync(kAllLanes, x, 2);
}

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
    return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

// The two floats of 32 bits holding two 16-bit elements.
template <class E>
__device__ __forceinline__ float low_float(uint32_t pair) {
    if constexpr (kSame<E, Half>)
        return unpack_f16(static_cast<uint16_t>(pair));
    else
        return as_float(pair << 16);
}

template <class E>
__device__ __forceinline__ float high_float(uint32_t pair) {
    if constexpr (kSame<E, Half>)
        return unpack_f16(static_cast<uint16_t>(pair >> 16));
    else
        return as_float(pair & 0xffff0000);
}

template <class E>
__device__ __forceinline__ uint32_t pack(float low, float high) {
    if constexpr (kSame<E, Half>)
        return pack_f16(low, high);
    else
        return pack_bf16(low, high);
}

// One operand of a 16 x 16 x 16 product, spread over a warp.
// 16-bit, left: (g, 2t..), (g + 8, 2t..), (g, 2t + 8..), (g + 8, 2t + 8..); right: for each half h of its 16
// columns the elements (2t.., g + 8h), (2t + 8.., g + 8h).
// fp32: two steps s of 8 along the contracted side; left for each s: (g, k0), (g + 8, k0), (g, k1), (g + 8, k1);
// right for each h, s: (k0, g + 8h), (k1, g + 8h). k0, k1 = 8s + t, 8s + t + 4, or 8s + 2t, 8s + 2t + 1: any order
// is right as long as both operands have it.
template <class E>
struct Fragment {
    uint32_t r[4];
};
template <>
struct Fragment<Float> {
    float r[8];
};

// A product that any GPU can do, by handing elements around: for bf16 and fp32 before sm_80, for nothing else.
template <class E>
__device__ inline void mma_by_shuffles(float (&c)[2][4], const Fragment<E>& a, const Fragment<E>& b) {
    const int lane = threadIdx.x % 32, row = lane & ~3, column = lane % 4 * 8;
#pragma unroll 1    // it is inlined for each product of each kernel: unrolled, ptxas takes minutes
    for (int from = 0; from < 4; ++from) {
        if constexpr (kSame<E, Float>) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int s = i / 2, second = i % 2;
                const float low = __shfl_sync(kAllLanes, a.r[s * 4 + second * 2], row + from);
                const float high = __shfl_sync(kAllLanes, a.r[s * 4 + second * 2 + 1], row + from);
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const float source = b.r[(h * 2 + s) * 2 + second];
                    const float left = __shfl_sync(kAllLanes, source, column + from);
                    const float right = __shfl_sync(kAllLanes, source, column + 4 + from);
                    c[h][0] = fmaf(low, left, c[h][0]);
                    c[h][1] = fmaf(low, right, c[h][1]);
                    c[h][2] = fmaf(high, left, c[h][2]);
                    c[h][3] = fmaf(high, right, c[h][3]);
                }
            }
        } else {
#pragma unroll
            for (int second = 0; second < 2; ++second) {
                const uint32_t low = __shfl_sync(kAllLanes, a.r[second * 2], row + from);
                const uint32_t high = __shfl_sync(kAllLanes, a.r[second * 2 + 1], row + from);
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const uint32_t left = __shfl_sync(kAllLanes, b.r[h * 2 + second], column + from);
                    const uint32_t right = __shfl_sync(kAllLanes, b.r[h * 2 + second], column + 4 + from);
                    c[h][0] = fmaf(low_float<E>(low), low_float<E>(left), c[h][0]);
                    c[h][1] = fmaf(low_float<E>(low), low_float<E>(right), c[h][1]);
                    c[h][2] = fmaf(low_float<E>(high), low_float<E>(left), c[h][2]);
                    c[h][3] = fmaf(low_float<E>(high), low_float<E>(right), c[h][3]);
                    c[h][0] = fmaf(high_float<E>(low), high_float<E>(left), c[h][0]);
                    c[h][1] = fmaf(high_float<E>(low), high_float<E>(right), c[h][1]);
                    c[h][2] = fmaf(high_float<E>(high), high_float<E>(left), c[h][2]);
                    c[h][3] = fmaf(high_float<E>(high), high_float<E>(right), c[h][3]);
                }
            }
        }
    }
}

// x rounded to the 11 significant bits of tf32; half a unit too large at ties, which does not matter here.
__device__ __forceinline__ uint32_t round_tf32(float x) { return (as_bits(x) + 0x1000) & 0xffffe000; }

// c (16 x 16: columns 0-7, columns 8-15) += a b.
template <class E>
__device__ __forceinline__ void multiply(float (&c)[2][4], const Fragment<E>& a, const Fragment<E>& b) {
    if constexpr (kSame<E, Half>) {
        if (SAT_ARCH >= 800) {
            mma_16816_f16(c[0], a.r, b.r);
            mma_16816_f16(c[1], a.r, b.r + 2);
        } else {
#pragma unroll
            for (int s = 0; s < 2; ++s) {
                mma_1688_f16(c[0], a.r + 2 * s, b.r + s);
                mma_1688_f16(c[1], a.r + 2 * s, b.r + 2 + s);
            }
        }
    } else if (SAT_ARCH < 800) {
        mma_by_shuffles(c, a, b);
    } else if constexpr (kSame<E, Bfloat>) {
        mma_16816_bf16(c[0], a.r, b.r);
        mma_16816_bf16(c[1], a.r, b.r + 2);
    } else {
        // fp32 from three tf32 products: x = large + small with 11 bits each; small * small is below fp32's precision.
        uint32_t a_large[8], a_small[8], b_large[8], b_small[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            a_large[i] = round_tf32(a.r[i]);
            a_small[i] = round_tf32(a.r[i] - as_float(a_large[i]));
            b_large[i] = round_tf32(b.r[i]);
            b_small[i] = round_tf32(b.r[i] - as_float(b_large[i]));
        }
        // Tensor cores cut sums towards zero, each time by up to a unit in the last place: they sum these products alone,
        // and an fp32 addition, which rounds to nearest, adds them to c.
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float sum[4] = {};
#pragma unroll
            for (int s = 0; s < 2; ++s) {
                const int right = (h * 2 + s) * 2;
                mma_1688_tf32(sum, a_small + 4 * s, b_large + right);
                mma_1688_tf32(sum, a_large + 4 * s, b_small + right);
                mma_1688_tf32(sum, a_large + 4 * s, b_large + right);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) c[h][i] += sum[i];
        }
    }
}

// The left operand made of a 16 x 16 accumulator, its columns being the contracted side.
template <class E>
__device__ __forceinline__ Fragment<E> as_left(const float (&c)[2][4]) {
    Fragment<E> a;
    if constexpr (kSame<E, Float>) {
        // Column 2t plays k0 and 2t + 1 plays k1, as right_transposed has it too.
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            a.r[4 * s] = c[s][0];
            a.r[4 * s + 1] = c[s][2];
            a.r[4 * s + 2] = c[s][1];
            a.r[4 * s + 3] = c[s][3];
        }
    } else {
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            a.r[2 * s] = pack<E>(c[s][0], c[s][1]);
            a.r[2 * s + 1] = pack<E>(c[s][2], c[s][3]);
        }
    }
    return a;
}

// A tile of rows of D elements in shared memory, in chunks of 16 bytes. Rows are padded (fp32) or their chunks
// permuted (16-bit) so that no two lanes of a load meet in a bank.
template <class E, int D>
struct Tile {
    static constexpr int kChunks = D * kBytes<E> / 16;
    static constexpr int kRowBytes = D * kBytes<E> + (kBytes<E> == 4 ? 16 : 0);

    static __device__ __forceinline__ int offset(int row, int chunk) {
        if constexpr (kBytes<E> == 2) chunk ^= kChunks == 4 ? row / 2 % 4 : row % 8;
        return row * kRowBytes + chunk * 16;
    }

    static __device__ __forceinline__ float element(const unsigned char* tile, int row, int column) {
        return *reinterpret_cast<const float*>(tile + row * kRowBytes + column * 4);
    }

    // kRows rows from global memory by kThreads threads; those from `valid` on are zero.
    template <int kRows, int kThreads>
    static __device__ __forceinline__ void copy(unsigned char* tile, const unsigned char* from, int64_t row_bytes,
                                                int valid = kRows) {
        // The count of rounds is a constant: a loop from threadIdx.x on would not be unrolled, and each copy would cost
        // thirty instructions for its addresses.
        static_assert(kThreads % kChunks == 0 || kRows * kChunks < kThreads, "uneven");
        constexpr int kStep = kThreads / kChunks, kRounds = (kRows * kChunks + kThreads - 1) / kThreads;
        const int first = static_cast<int>(threadIdx.x / kChunks), chunk = static_cast<int>(threadIdx.x % kChunks);
        const unsigned char* here = from + first * row_bytes + chunk * 16;
#pragma unroll
        for (int j = 0; j < kRounds; ++j, here += kStep * row_bytes) {
            const int row = first + j * kStep;
            if (kRows % kStep != 0 && row >= kRows) break;
            // An invalid row names row 0: the address is not read, but has to be one that could be.
            copy_async_16(tile + offset(row, chunk), row < valid ? here : from + chunk * 16, row < valid);
        }
    }

    // Left operand: rows row.. + 15, columns 16 k.. + 15.
    static __device__ __forceinline__ Fragment<E> left(const unsigned char* tile, int row, int k) {
        const int lane = threadIdx.x % 32;
        Fragment<E> a;
        if constexpr (kBytes<E> == 4) {
            const int g = lane / 4, t = lane % 4;
#pragma unroll
            for (int i = 0; i < 8; ++i)
                a.r[i] = element(tile, row + g + i % 2 * 8, k * 16 + i / 4 * 8 + i / 2 % 2 * 4 + t);
        } else {
            load_matrices(a.r, tile + offset(row + lane % 16, k * 2 + lane / 16));
        }
        return a;
    }

    // Right operand whose columns are the rows row.. + 15 and whose contracted side is columns 16 k.. + 15.
    static __device__ __forceinline__ Fragment<E> right(const unsigned char* tile, int row, int k) {
        const int lane = threadIdx.x % 32;
        Fragment<E> b;
        if constexpr (kBytes<E> == 4) {
            const int g = lane / 4, t = lane % 4;
#pragma unroll
            for (int i = 0; i < 8; ++i)
                b.r[i] = element(tile, row + i / 4 * 8 + g, k * 16 + i / 2 % 2 * 8 + i % 2 * 4 + t);
        } else {
            load_matrices(b.r, tile + offset(row + lane % 8 + lane / 16 * 8, k * 2 + lane / 8 % 2));
        }
        return b;
    }

    // Right operand whose contracted side is the rows row.. + 15 and whose columns are columns 16 n.. + 15.
    static __device__ __forceinline__ Fragment<E> right_transposed(const unsigned char* tile, int row, int n) {
        const int lane = threadIdx.x % 32;
        Fragment<E> b;
        if constexpr (kBytes<E> == 4) {
            const int g = lane / 4, t = lane % 4;
#pragma unroll
            for (int i = 0; i < 8; ++i)
                b.r[i] = element(tile, row + i / 2 % 2 * 8 + 2 * t + i % 2, n * 16 + i / 4 * 8 + g);
        } else {
            load_matrices_transposed(b.r, tile + offset(row + lane % 8 + lane / 8 % 2 * 8, n * 2 + lane / 16));
        }
        return b;
    }

    // This warp's 16 rows from `row` on: accumulators times a factor for row g and one for row g + 8, rounded, through
    // the tile (which no other warp reads there) to global memory in whole chunks.
    static __device__ __forceinline__ void store(unsigned char* tile, int row, const float (&c)[D / 16][2][4],
                                                 float factor, float factor_8, unsigned char* to, int64_t row_bytes) {
        const unsigned lane = threadIdx.x % 32;
        const int g = static_cast<int>(lane / 4), t = static_cast<int>(lane % 4);
        __syncwarp();
#pragma unroll
        for (int j = 0; j < D / 8; ++j) {
            const float(&x)[4] = c[j / 2][j % 2];
            if constexpr (kBytes<E> == 4) {
                const int chunk = 2 * j + t / 2, inside = t % 2 * 8;
                *reinterpret_cast<float2*>(tile + offset(row + g, chunk) + inside) =
                    make_float2(x[0] * factor, x[1] * factor);
                *reinterpret_cast<float2*>(tile + offset(row + g + 8, chunk) + inside) =
                    make_float2(x[2] * factor_8, x[3] * factor_8);
            } else {
                *reinterpret_cast<uint32_t*>(tile + offset(row + g, j) + t * 4) =
                    pack<E>(x[0] * factor, x[1] * factor);
                *reinterpret_cast<uint32_t*>(tile + offset(row + g + 8, j) + t * 4) =
                    pack<E>(x[2] * factor_8, x[3] * factor_8);
            }
        }
        __syncwarp();
#pragma unroll
        for (int j = 0; j < kChunks / 2; ++j) {
            const unsigned i = lane + j * 32;
            const int r = static_cast<int>(i / kChunks), chunk = static_cast<int>(i % kChunks);
            *reinterpret_cast<uint4*>(to + (row + r) * row_bytes + chunk * 16) =
                *reinterpret_cast<const uint4*>(tile + offset(row + r, chunk));
        }
    }
};

// Whether the library has this kernel for the device: cudaSuccess, or cudaErrorNoKernelImageForDevice on an older one.
template <class Parameters>
int loadable(void (*kernel)(Parameters)) {
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
}

// Runs kernel(parameters) on `blocks` blocks of `threads` threads with `shared` bytes; the CUDA error code.
template <class Parameters>
int launch(void (*kernel)(Parameters), int64_t blocks, int threads, int shared, void* stream,
           const Parameters& parameters) {
    if (blocks == 0) return cudaSuccess;
    if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
#ifdef SAT_CUDA_EMULATION
    (void)stream;
    return emulation::launch(kernel, static_cast<unsigned>(blocks), threads, shared, parameters);
#else
    const void* function = reinterpret_cast<const void*>(kernel);
    // More than 48 KB has to be asked for.
    const cudaError_t status = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (status != cudaSuccess) return status;
    void* arguments[] = {const_cast<Parameters*>(&parameters)};
    return cudaLaunchKernel(function, dim3(static_cast<unsigned>(blocks)), dim3(threads), arguments, shared,
                            static_cast<cudaStream_t>(stream));
#endif
}

}    // namespace sat
