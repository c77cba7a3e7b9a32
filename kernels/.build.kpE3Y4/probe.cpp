#define SAT_ISA_NAMESPACE probe
#define SAT_WIDTH 16
#include "../csrc/cpu/parallel.h"
#include "../csrc/cpu/simd.h"
SAT_EXPORT void probe_all(float* p) {
    using namespace probe;
    parallel(2, [=] {
        vec x[W];
        for (int i = 0; i < W; ++i) x[i] = exp2(load(p + i));
        transpose(x);
        store(reinterpret_cast<bf16*>(p), total(x[0]) + x[W - 1]);
        ;
    });
}
