// What the library exports: its identity, the choice of an instruction set, and the operations of abi.h, each handed to
// the best instruction set in use that has it.

#include "abi.h"

#include <string.h>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#ifndef SAT_SOURCE_HASH
#error "compile with compile.sh, which passes SAT_SOURCE_HASH"
#endif

// The operations of each instruction set; null where compile.sh left its files out.
#define SAT_DECLARE(name, Call) int name(const Call& call) __attribute__((weak));
#define SAT_DECLARE_ALL(isa) namespace isa { SAT_OPERATIONS(SAT_DECLARE) }
SAT_DECLARE_ALL(portable)
SAT_DECLARE_ALL(avx2)
SAT_DECLARE_ALL(avx512)
SAT_DECLARE_ALL(avx512_bf16)
SAT_DECLARE_ALL(amx)

template <class Call>
using Kernel = int (*)(const Call&);

static int selected_isa = -1;    // written by sat_select_isa only, from one thread while nothing runs
static int best_isa();

// The instruction set in use: the best one that is compiled in and that this CPU has, or the one selected.
static int isa_in_use() {
    static const int best = best_isa();
    return selected_isa < 0 ? best : selected_isa;
}

// An instruction set has what those before it have; one that does not support a call leaves it to them.
template <class Call>
static int run(const Kernel<Call> (&kernels)[SAT_ISA_COUNT], const Call& call) {
    int status = SAT_NOT_SUPPORTED;
    for (int isa = isa_in_use(); isa >= 0 && status == SAT_NOT_SUPPORTED; --isa)
        if (kernels[isa]) status = kernels[isa](call);
    return status;
}

#define SAT_DEFINE(name, Call)                                                                              \
    static const Kernel<Call> name##_kernels[SAT_ISA_COUNT] = {portable::name, avx2::name, avx512::name,    \
                                                               avx512_bf16::name, amx::name};               \
    SAT_EXPORT int sat_##name(const Call* call) { return run(name##_kernels, *call); }
SAT_OPERATIONS(SAT_DEFINE)

static const struct {
    const char* name;
    int64_t bytes;
} operations[] = {
#define SAT_ROW(name, Call) {#name, sizeof(Call)},
    SAT_OPERATIONS(SAT_ROW)};

// Name of the i-th operation, null beyond the last; *bytes is the size of its struct.
SAT_EXPORT const char* sat_operation(int i, int64_t* bytes) {
    if (i < 0 || i >= static_cast<int>(sizeof operations / sizeof *operations)) return nullptr;
    *bytes = operations[i].bytes;
    return operations[i].name;
}

SAT_EXPORT int sat_abi_version() { return SAT_ABI; }
SAT_EXPORT const char* sat_source_hash() { return SAT_SOURCE_HASH; }

// compile.sh looks for this text in a finished library to see whether it is up to date.
SAT_EXPORT const char* sat_build_id() { return "SAT_BUILD=" SAT_BUILD_ID; }

// Whether layers and projections multiply bf16 on the instruction set in use.
SAT_EXPORT int sat_layer_has_bfloat() { return isa_in_use() >= SAT_ISA_AVX512_BF16 && layer_forward_kernels[SAT_ISA_AVX512_BF16]; }

static const char* const isa_names[SAT_ISA_COUNT] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};

#if defined(__x86_64__) && defined(__linux__)
// Why AMX cannot be used: Linux must be asked for it once, before the first tile is touched.
static const char* reason_without_tiles() {
#ifndef SAT_AMX_EMULATION
    const unsigned bf16 = 1u << 22, tile = 1u << 24;
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || ~d & (bf16 | tile)) return "this CPU does not have it";
    const long request_permission = 0x1023, tile_data = 18;    // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    if (syscall(SYS_arch_prctl, request_permission, tile_data) != 0)
        return "the operating system does not grant it (Linux does from 5.16 on)";
#endif
    return nullptr;
}
#else
static const char* reason_without_tiles() { return "it needs Linux"; }
#endif

static bool cpu_has(int isa) {
#if defined(__x86_64__)
    switch (isa) {
        case SAT_ISA_AVX2:
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        case SAT_ISA_AVX512:
            return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        case SAT_ISA_AVX512_BF16:
        case SAT_ISA_AMX:
            return cpu_has(SAT_ISA_AVX512) && __builtin_cpu_supports("avx512bf16");
    }
#endif
    return isa == SAT_ISA_PORTABLE;
}

// Why `isa` cannot run here, or null if it can.
static const char* reason_missing(int isa) {
    if (!attention_forward_kernels[isa]) return "it is not compiled into this library";
    if (!cpu_has(isa)) return "this CPU does not have it";
    return isa == SAT_ISA_AMX ? reason_without_tiles() : nullptr;
}

static int best_isa() {
    int isa = SAT_ISA_COUNT - 1;
    while (isa > 0 && reason_missing(isa)) --isa;
    return isa;
}

SAT_EXPORT const char* sat_isa_name() { return isa_names[isa_in_use()]; }

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
