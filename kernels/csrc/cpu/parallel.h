// Threads and their scratch. The compiler knows nothing of OpenMP: its pragmas would call what the runtime that torch has
// loaded (GNU's, LLVM's or Intel's; two in one process fight) need not have. GOMP_parallel is in all of them.
#pragma once

#include <stdlib.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#include "abi.h"
#include "compiler.h"

extern "C" {
void GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned flags);
int omp_get_thread_num();
int omp_get_num_threads();
}

namespace SAT_ISA_NAMESPACE {
namespace {

// Hands out 64-byte aligned pieces of one allocation. For AddressSanitizer there is a gap after each, that nobody may touch.
class Scratch {
  public:
    explicit Scratch(size_t bytes) : base_(nullptr), next_(nullptr) {
        void* memory;
        if (posix_memalign(&memory, 64, bytes + 4096) == 0) base_ = next_ = static_cast<char*>(memory);
    }
    ~Scratch() {
#ifdef __SANITIZE_ADDRESS__
        __asan_unpoison_memory_region(base_, next_ - base_);
#endif
        free(base_);
    }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    bool failed() const { return !base_; }
    template <class T = float>
    T* take(size_t count) {
        char* piece = next_;
        next_ += (count * sizeof(T) + 63) / 64 * 64;    // the constructor's 4096 bytes pay for the rounding and for gaps
#ifdef __SANITIZE_ADDRESS__
        next_ += 64;
        __asan_poison_memory_region(piece + count * sizeof(T), next_ - piece - count * sizeof(T));
#endif
        return reinterpret_cast<T*>(piece);
    }

  private:
    char *base_, *next_;
};

// Calls work() on `threads` threads at once.
template <class Work>
void parallel(long threads, Work work) {
    GOMP_parallel([](void* data) { (*static_cast<Work*>(data))(); }, &work, static_cast<unsigned>(threads), 0);
}

// Calls work(index) for index in [0, count); each thread takes an equal part, in order.
template <class Work>
void spread(long threads, long count, Work work) {
    parallel(threads, [&] {
        const long n = omp_get_num_threads(), t = omp_get_thread_num();
        for (long i = count * t / n, end = count * (t + 1) / n; i < end; ++i) work(i);
    });
}

// Indices in [0, count), handed out in order, `chunk` at a time, to whichever thread asks.
struct Turns {
    long count, chunk, next = 0;
    template <class Work>
    SAT_INLINE void take(Work work) {
        for (long first; (first = __atomic_fetch_add(&next, chunk, __ATOMIC_RELAXED)) < count;)
            for (long i = first; i < first + chunk && i < count; ++i) work(i);
    }
};

// Calls work(index) for index in [0, count), by turns.
template <class Work>
void spread(long threads, long count, long chunk, Work work) {
    Turns turns{count, chunk};
    parallel(threads, [&] { turns.take(work); });
}

// Calls work(pieces, index) by turns. Each thread has pieces = make(scratch of `bytes` bytes) of its own; if one gets none,
// the result is not complete.
template <class Make, class Work>
int spread(long threads, long count, long chunk, size_t bytes, Make make, Work work) {
    int status = SAT_OK;
    Turns turns{count, chunk};
    parallel(threads, [&, bytes] {
        Scratch scratch(bytes);
        if (scratch.failed()) return __atomic_store_n(&status, SAT_OUT_OF_MEMORY, __ATOMIC_RELAXED);
        const auto pieces = make(scratch);
        turns.take([&](long i) { work(pieces, i); });
    });
    return status;
}

}    // namespace
}    // namespace SAT_ISA_NAMESPACE
