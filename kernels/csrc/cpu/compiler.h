// What GCC 11 to 14 and clang 14 to 16 spell differently.
#pragma once

#define SAT_INLINE inline __attribute__((always_inline))

// Unrolls the loop that follows, which runs at most n times: arrays of vectors become registers that way.
#define SAT_PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define SAT_UNROLL(n) SAT_PRAGMA(unroll)
#else
#define SAT_UNROLL(n) SAT_PRAGMA(GCC unroll n)
#endif

// SAT_SHUFFLE(a, b, integer vector type, lanes): lanes of vectors of n elements; n and higher count in b.
#if defined(__clang__) || __GNUC__ >= 12
#define SAT_SHUFFLE(a, b, index, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SAT_SHUFFLE(a, b, index, ...) __builtin_shuffle(a, b, index{__VA_ARGS__})
#endif

// clang 16 crashes where it would read a factor of vdpbf16ps, broadcast, from memory: it must not see that it could.
#if __clang_major__ == 16
#define SAT_HIDE(x) asm("" : "+v"(x))
#else
#define SAT_HIDE(x)
#endif
