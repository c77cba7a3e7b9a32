// What attention multiplies with. A product of attention.h is
//
//     C[r][n] = sum_k A[r][k] B[k][n]
//
// over elements of 4 bytes that go through the multiplier together: an fp32 number, or two bf16 of consecutive depth (rows 2k and
// 2k + 1 of B), whose products are added in fp32. A is read one element after another, B a vector at a time; C is fp32.
//
// A Number says what elements are: how rows become operands and products become operands of the next. An engine is a
// Number with products of it:
//     Session                                           what a thread holds while it multiplies
//     panel<ROWS, NV>(depth, A, B, emit)                calls emit(row, C[NR][NV]) for NR rows at a time
//     panels<ROWS, NV>(depth, A, B, A', B', emit)       calls emit(row, C[NR][NV], C'[NR][NV])
//     add<ROWS>(depth, A, B, C, columns, fresh, pause)  C [ROWS][columns] += A B, or = A B where it is fresh; calls pause()
//                                                       now and then
// Loops is the engine of vector instructions; attention_amx.cpp has one of tiles.
#pragma once

#include "abi.h"
#include "parallel.h"
#include "simd.h"

namespace SAT_ISA_NAMESPACE {
namespace {

#if SAT_WIDTH == 8 || defined(__SSE2__) && SAT_WIDTH == 4
constexpr int REGISTERS = 16;
#else
constexpr int REGISTERS = 32;
#endif

// ---- rows of tensors ----

const char* head_of(const SatTensor& t, int64_t type, long b, long h) {
    return static_cast<const char*>(t.data) + (b * t.batch + h * t.head) * (type == SAT_FLOAT32 ? 4 : 2);
}

// Rows of operands with unit column stride.
template <class Operand>
struct Rows {
    const Operand* data;
    long stride;
    const Operand* row(long i) const { return data + i * stride; }
};

SAT_INLINE void convert(float x, float* to) { *to = x; }
SAT_INLINE void convert(bf16 x, float* to) { *to = to_float(x); }
SAT_INLINE void convert(bf16 x, bf16* to) { *to = x; }

template <class Operand, class Stored>
__attribute__((noinline)) void copy_rows(const Stored* p, long row, long column, int count, int d, Operand* to) {
    for (int i = 0; i < count; ++i, p += row, to += d) {
        if constexpr (sizeof(Operand) == sizeof(float))
            if (column == 1) {
                for (int c = 0; c < d; c += W) store(to + c, load(p + c));
                continue;
            }
        for (int c = 0; c < d; ++c) convert(p[c * column], to + c);
    }
}

// Rows [first, first + count) of one head: where they are if they can be read there, else copied to `scratch`.
template <class Operand>
SAT_INLINE Rows<Operand> rows_of(const SatTensor& t, int64_t type, const char* head, long first, int count, int d,
                                 Operand* scratch) {
    if constexpr (sizeof(Operand) == sizeof(float)) {
        const float* p = reinterpret_cast<const float*>(head) + first * t.row;
        if (type == SAT_FLOAT32 && t.column == 1) return {p, t.row};
        if (type == SAT_FLOAT32) {
            copy_rows(p, t.row, t.column, count, d, scratch);
            return {scratch, d};
        }
    }
    const bf16* p = reinterpret_cast<const bf16*>(head) + first * t.row;
    if constexpr (sizeof(Operand) == sizeof(bf16))
        if (t.column == 1) return {p, t.row};
    copy_rows(p, t.row, t.column, count, d, scratch);
    return {scratch, d};
}

template <class Stored>
SAT_INLINE void convert_back(Stored* to, long row, int count, int d, const float* from, const float* factor) {
    for (int i = 0; i < count; ++i, to += row, from += d)
        for (int c = 0; c < d; c += W) store(to + c, load(from + c) * factor[i]);
}

// Rows [first, first + count) of a head become from[i][c] * factor[i].
__attribute__((noinline)) void write_rows(const SatTensor& t, int64_t type, const char* head, long first, int count, int d,
                                          const float* from, const float* factor) {
    char* to = const_cast<char*>(head);
    if (type == SAT_FLOAT32)
        convert_back(reinterpret_cast<float*>(to) + first * t.row, t.row, count, d, from, factor);
    else
        convert_back(reinterpret_cast<bf16*>(to) + first * t.row, t.row, count, d, from, factor);
}

// ---- factors ----

// Element (row, k) of A is at data + row * row_bytes + k * step_bytes.
struct RowFactor {
    const char* data;
    long row_bytes;
    static constexpr long step_bytes = 4;
    template <class Operand>
    RowFactor(const Operand* p, long stride) : data(reinterpret_cast<const char*>(p)), row_bytes(stride * sizeof(Operand)) {}
    template <class Operand>
    explicit RowFactor(const Rows<Operand>& rows) : RowFactor(rows.data, rows.stride) {}
};

// Elements [k][COLUMNS], whose columns are the rows of A.
template <int COLUMNS>
struct ColumnFactor {
    const char* data;
    static constexpr long row_bytes = 4, step_bytes = 4 * COLUMNS;
    explicit ColumnFactor(const void* p) : data(static_cast<const char*>(p)) {}
};

// Elements [k][stride].
template <class Element>
struct Panel {
    const Element* data;
    long stride;
    Panel operator+(long columns) const { return {data + columns, stride}; }
};

// ---- numbers ----

struct Float32 {
    typedef float Operand, Element;
    typedef vec Vector;
    static constexpr int NUM = 1;    // operands in an element

    static SAT_INLINE vec splat(const char* p) { return SAT_ISA_NAMESPACE::splat(*reinterpret_cast<const float*>(p)); }
    static SAT_INLINE vec multiply_add(vec c, vec a, vec b) { return c + a * b; }

    // 2^x for probabilities and for statistics.
    static SAT_INLINE vec exp_probs(vec x) { return exp2(x); }
    static SAT_INLINE vec exp_statistics(vec x) { return exp2(x); }

    // As B with depth along the columns, in tiles of T rows: packed[tile][c][i] = x[i][c].
    template <int T>
    static SAT_INLINE void pack_columns(const Rows<float>& rows, int count, int d, float* packed) {
        for (int i = 0; i < count; i += W) {
            float* tile = packed + i / T * T * d + i % T;
            for (int c = 0; c < d; c += W) {
                vec x[W];
                SAT_UNROLL(16)
                for (int r = 0; r < W; ++r) x[r] = load(rows.row(i + r) + c);
                transpose(x);
                SAT_UNROLL(16)
                for (int r = 0; r < W; ++r) store(tile + (c + r) * T, x[r]);
            }
        }
    }

    // As B with depth along the rows: where they are.
    static Panel<float> pack_rows(const Rows<float>& rows, int, int, float*) { return {rows.data, rows.stride}; }

    // Keeps the probabilities of NUM keys as a row of elements; returns sum + what is kept.
    static SAT_INLINE vec keep(vec sum, vec (&x)[1], float* p) {
        store(p, x[0]);
        return sum + x[0];
    }

    // Rows [row, row + NR) of probabilities and of gradients of the scores, [T] wide.
    template <int T, int NR, int NV>
    static SAT_INLINE void keep(int row, vec (&s)[NR][NV], vec (&ds)[NR][NV], float* p, float* gradients, float*) {
        SAT_UNROLL(16)
        for (int r = 0; r < NR; ++r)
            SAT_UNROLL(4)
            for (int v = 0; v < NV; ++v) {
                store(p + (row + r) * T + v * W, s[r][v]);
                store(gradients + (row + r) * T + v * W, ds[r][v]);
            }
    }
    // The gradients as a ColumnFactor.
    static float* columns_of(float* gradients, float*) { return gradients; }

    // Rows of accumulators: NR * NV of them, and what they are multiplied with, must fit the registers.
    static constexpr int rows_at_once(int vectors) {
        const int rows = REGISTERS == 32 ? (REGISTERS - vectors - 1) / vectors : (REGISTERS - 4) / vectors;
        return rows < 1 ? 1 : rows < 12 ? rows : 12;
    }
};

// ---- products ----

template <int N>
struct Count {
    static constexpr int value = N;
};

// Calls work(Count<NR>, row) for all rows below ROWS, NR at a time, then what is left.
template <int ROWS, int NR, class Work>
SAT_INLINE void by_rows(Work work) {
    for (int row = 0; row + NR <= ROWS; row += NR) work(Count<NR>(), row);
    if constexpr (ROWS % NR) work(Count<ROWS % NR>(), ROWS / NR * NR);
}

template <int NR, int NV>
SAT_INLINE void clear(vec (&c)[NR][NV]) {
    SAT_UNROLL(16)
    for (int r = 0; r < NR; ++r)
        SAT_UNROLL(4)
        for (int v = 0; v < NV; ++v) c[r][v] = vec{};
}

// Rows [row, row + NR) of a product in memory, [NV * W] wide.
template <int NR, int NV>
SAT_INLINE void read(vec (&c)[NR][NV], const float* from, int row) {
    SAT_UNROLL(16)
    for (int r = 0; r < NR; ++r)
        SAT_UNROLL(4)
        for (int v = 0; v < NV; ++v) c[r][v] = load(from + (row + r) * NV * W + v * W);
}

template <class Number>
struct Loops : Number {
    typedef typename Number::Element Element;
    typedef typename Number::Vector Vector;
    struct Session {};

    // c += A B over element k of rows [row, row + NR).
    template <int NR, int NV, class A>
    static SAT_INLINE void step(vec (&c)[NR][NV], int row, long k, const A& a, const Panel<Element>& b) {
        const Element* from = b.data + k * b.stride;
        const auto factor = [&](int r) { return Number::splat(a.data + (row + r) * a.row_bytes + k * a.step_bytes); };
        if constexpr (REGISTERS == 32) {
            Vector y[NV];
            SAT_UNROLL(4)
            for (int v = 0; v < NV; ++v) y[v] = load_elements(from + v * W);
            SAT_UNROLL(16)
            for (int r = 0; r < NR; ++r) {
                const Vector x = factor(r);
                SAT_UNROLL(4)
                for (int v = 0; v < NV; ++v) c[r][v] = Number::multiply_add(c[r][v], x, y[v]);
            }
        } else {
            Vector x[NR];
            SAT_UNROLL(16)
            for (int r = 0; r < NR; ++r) x[r] = factor(r);
            SAT_UNROLL(4)
            for (int v = 0; v < NV; ++v) {
                const Vector y = load_elements(from + v * W);
                SAT_UNROLL(16)
                for (int r = 0; r < NR; ++r) c[r][v] = Number::multiply_add(c[r][v], x[r], y);
            }
        }
    }

    template <int ROWS, int NV, class A, class Emit>
    static SAT_INLINE void panel(long depth, const A& a, const Panel<Element>& b, Emit emit) {
        by_rows<ROWS, Number::rows_at_once(NV)>([&](auto rows, int row) __attribute__((always_inline)) {
            vec c[decltype(rows)::value][NV];
            clear(c);
            SAT_UNROLL(2)
            for (long k = 0; k < depth; ++k) step(c, row, k, a, b);
            emit(row, c);
        });
    }

    template <int ROWS, int NV, class A, class Emit>
    static SAT_INLINE void panels(long depth, const A& a, const Panel<Element>& b, const A& a2, const Panel<Element>& b2,
                                  Emit emit) {
        if constexpr (REGISTERS == 32) {
            by_rows<ROWS, Number::rows_at_once(2 * NV)>([&](auto rows, int row) __attribute__((always_inline)) {
                vec c[decltype(rows)::value][NV], c2[decltype(rows)::value][NV];
                clear(c);
                clear(c2);
                for (long k = 0; k < depth; ++k) {
                    step(c, row, k, a, b);
                    step(c2, row, k, a2, b2);
                }
                emit(row, c, c2);
            });
        } else {    // too few registers for both
            alignas(64) float first[ROWS * NV * W];
            panel<ROWS, NV>(depth, a, b, [&](int row, auto& c) __attribute__((always_inline)) {
                constexpr int NR = sizeof(c) / sizeof(c[0]);
                for (int r = 0; r < NR; ++r)
                    for (int v = 0; v < NV; ++v) store(first + (row + r) * NV * W + v * W, c[r][v]);
            });
            panel<ROWS, NV>(depth, a2, b2, [&](int row, auto& c2) __attribute__((always_inline)) {
                constexpr int NR = sizeof(c2) / sizeof(c2[0]);
                vec c[NR][NV];
                read(c, first, row);
                emit(row, c, c2);
            });
        }
    }

    template <int ROWS, int NV = 4, class A, class Pause>
    static SAT_INLINE void add(long depth, const A& a, const Panel<Element>& b, float* c, long columns, bool fresh,
                               Pause& pause, long first = 0) {
        for (; first + NV * W <= columns; first += NV * W)
            panel<ROWS, NV>(depth, a, b + first, [&](int row, auto& sum) __attribute__((always_inline)) {
                constexpr int NR = sizeof(sum) / sizeof(sum[0]);
                pause();
                SAT_UNROLL(16)
                for (int r = 0; r < NR; ++r)
                    SAT_UNROLL(4)
                    for (int v = 0; v < NV; ++v) {
                        float* p = c + (row + r) * columns + first + v * W;
                        store(p, fresh ? sum[r][v] : load(p) + sum[r][v]);
                    }
            });
        if constexpr (NV > 1)
            if (first < columns) add<ROWS, NV - 1>(depth, a, b, c, columns, fresh, pause, first);
    }

  private:
    static SAT_INLINE Vector load_elements(const Element* p) {
        typedef Vector Unaligned __attribute__((aligned(2), may_alias));
        return *reinterpret_cast<const Unaligned*>(p);
    }
};

template <bool>
struct FloatEngine : Loops<Float32> {};

}    // namespace
}    // namespace SAT_ISA_NAMESPACE
