// What tests ask of the emulation, for Python.
#include "cuda_emulation.h"

#define SAT_EXPORT extern "C" __attribute__((visibility("default")))

// bits: 1 copies land at once, 2 threads run in reverse order
SAT_EXPORT void emulation_mode(int bits) { emulation::machine.mode = bits; }
SAT_EXPORT void emulation_arch(int arch) { emulation::machine.arch = arch; }
SAT_EXPORT void emulation_foreign(int foreign) { emulation::machine.foreign = foreign; }
SAT_EXPORT void emulation_shared_limit(int bytes) { emulation::machine.shared_limit = bytes; }
SAT_EXPORT void emulation_multiprocessors(int count) { emulation::machine.multiprocessors = count; }
SAT_EXPORT int64_t emulation_warp_functions() { return emulation::machine.warp_functions; }
SAT_EXPORT const char* emulation_error() { return emulation::machine.error.c_str(); }
