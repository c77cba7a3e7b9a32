// A program that runs one planted bug by name, for AddressSanitizer. Prints the emulation's error or "ok".
#include "cuda_emulation.h"

extern "C" int run_planted(const char* name, const float* in, float* out);

int main(int, char** argv) {
    void *in, *out;
    if (posix_memalign(&in, 16, 128 * 4) || posix_memalign(&out, 16, 64 * 4)) return 1;
    memset(in, 0, 128 * 4);
    const int status = run_planted(argv[1], static_cast<float*>(in), static_cast<float*>(out));
    puts(status ? emulation::machine.error.c_str() : "ok");
    free(in), free(out);
    return status != 0;
}
