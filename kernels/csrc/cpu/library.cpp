// What the library is (ABI number, source hash) and which instruction set it runs.

#include "abi.h"

#include <string.h>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

// Set by compile.sh for files that were left out because the compiler does not know their flags.
#if defined(__x86_64__)
#ifndef SAT_WITHOUT_AVX2
#define SAT_BUILT_AVX2 1
#endif
#ifndef SAT_WITHOUT_AVX512
#define SAT_BUILT_AVX512 1
#endif
#ifndef SAT_WITHOUT_AVX512BF16
#define SAT_BUILT_AVX512BF16 1
#endif
#if defined(__linux__) && !defined(SAT_WITHOUT_AMX)
#define SAT_BUILT_AMX 1
#endif
#endif

#ifndef SAT_SOURCE_HASH
#error "compile with compile.sh, which passes SAT_SOURCE_HASH"
#endif

SAT_EXPORT int sat_abi_version() { return SAT_ABI; }
SAT_EXPORT const char* sat_source_hash() { return SAT_SOURCE_HASH; }

// compile.sh looks for this text in a finished library to see whether it is up to date.
SAT_EXPORT const char* sat_build_id() { return "SAT_BUILD=" SAT_BUILD_ID; }

static const char* const isa_names[SAT_ISA_COUNT] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};

static const char* const missing = "this CPU does not have it";

#if defined(SAT_BUILT_AMX) && !defined(SAT_AMX_EMULATION)
// Whether the CPU has AMX, and Linux lets this process use it: it must be asked once, before the first tile is touched.
static const char* reason_without_tiles() {
    const unsigned bf16 = 1u << 22, tile = 1u << 24;
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || ~d & (bf16 | tile)) return missing;
    const long request_permission = 0x1023, tile_data = 18;    // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0
               ? nullptr
               : "the operating system does not grant it (Linux does from 5.16 on)";
}
#elif defined(SAT_BUILT_AMX)
static const char* reason_without_tiles() { return nullptr; }
#endif

// Why `isa` cannot run here, or null if it can.
static const char* reason_missing(int isa) {
    switch (isa) {
        case SAT_ISA_PORTABLE:
            return nullptr;
#ifdef SAT_BUILT_AVX2
        case SAT_ISA_AVX2:
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? nullptr : missing;
#endif
#ifdef SAT_BUILT_AVX512
        case SAT_ISA_AVX512:
            return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
                       ? nullptr
                       : missing;
#endif
#ifdef SAT_BUILT_AVX512BF16
        case SAT_ISA_AVX512_BF16:
            return __builtin_cpu_supports("avx512bf16") ? reason_missing(SAT_ISA_AVX512) : missing;
#endif
#ifdef SAT_BUILT_AMX
        case SAT_ISA_AMX:
            return __builtin_cpu_supports("avx512bf16") ? reason_without_tiles() : missing;
#endif
        default:
            return "it is not compiled into this library";
    }
}

static int best_isa() {
    int isa = SAT_ISA_COUNT - 1;
    while (reason_missing(isa)) --isa;
    return isa;
}

static int selected_isa = -1;    // written by sat_select_isa only, from one thread while nothing runs

SatIsa sat_isa() {
    static const int best = best_isa();
    return static_cast<SatIsa>(selected_isa < 0 ? best : selected_isa);
}

SAT_EXPORT const char* sat_isa_name() { return isa_names[sat_isa()]; }

// Name of the i-th instruction set, null beyond the last; *reason says why it cannot run here (null if it can).
SAT_EXPORT const char* sat_list_isa(int i, const char** reason) {
    if (i < 0 || i >= SAT_ISA_COUNT) return nullptr;
    *reason = reason_missing(i);
    return isa_names[i];
}

// Chooses the instruction set by name ("" is the best one). 0, or -1 if the name is unknown or cannot run here.
SAT_EXPORT int sat_select_isa(const char* name) {
    if (!*name) {
        selected_isa = -1;
        return 0;
    }
    for (int i = 0; i < SAT_ISA_COUNT; ++i)
        if (!strcmp(name, isa_names[i]) && !reason_missing(i)) {
            selected_isa = i;
            return 0;
        }
    return -1;
}
