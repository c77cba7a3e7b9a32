// The contract with kernels/native.py: raise SAT_ABI (there too) whenever an exported signature changes.
#pragma once

#include <stdint.h>

#define SAT_ABI 3
#define SAT_EXPORT extern "C" __attribute__((visibility("default")))

// What exported functions return.
enum SatStatus {
    SAT_OK = 0,
    SAT_OUT_OF_MEMORY = 1,    // scratch space could not be allocated
    SAT_NOT_SUPPORTED = 2,    // shape or dtype that the caller should have refused
};

// What the elements of a tensor are.
enum SatType { SAT_FLOAT32 = 0, SAT_BFLOAT16 = 1 };

// Instruction sets, worst first. One translation unit each (x.h included by x_portable.cpp, x_avx2.cpp, ...);
// compile.sh gives a file its flags by the ending of its name.
enum SatIsa {
    SAT_ISA_PORTABLE = 0,
    SAT_ISA_AVX2 = 1,
    SAT_ISA_AVX512 = 2,
    SAT_ISA_AVX512_BF16 = 3,    // AVX512 for fp32, and for whatever has no bf16 kernel of its own
    SAT_ISA_AMX = 4,            // as well
    SAT_ISA_COUNT = 5
};

// The instruction set in use: the best one that is compiled in and that this CPU has, or the one selected.
SatIsa sat_isa();
