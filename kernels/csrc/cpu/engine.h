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
//     panels<ROWS, NV>(depth, A, B, A', B', P, first, second)   calls first(row, C[NR][NV]), then second(row, C, C'[NR][NV]);
//                                                       an engine of one operand an element leaves C in P [ROWS][NV * W]
//     add<ROWS>(depth, A, B, C, columns, fresh)         C [ROWS][columns] += A B, or = A B where it is fresh
// Each takes the rows to fetch meanwhile, too.
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

// ---- fetching ahead ----

constexpr int GRANULE = 16;    // block sizes are multiples of it

// Rows that will be read or written soon. The inner loops of products fetch two cache lines of them at every step, so that some
// are always on their way and never so many that other loads must wait: a kept block is seldom used twice, and no hardware
// prefetcher knows the layout.
class Ahead {
  public:
    // The same line of GRANULE rows.
    struct Lines {
        const char* at;
        long stride;
        // To the second level: the first would not hold what comes next beside what is in use.
        SAT_INLINE void fetch() {
            __builtin_prefetch(at, 0, 2);
            at += stride;
        }
    };
    // What has not been fetched by now is no longer worth it.
    void restart() { first_ = last_ = 0; }
    // Rows of `bytes` bytes, `stride` bytes apart; `rows` is a multiple of GRANULE.
    void expect(const char* first, long stride, int rows, int bytes) {
        for (; rows > 0; rows -= GRANULE, first += GRANULE * stride)
            for (int byte = 0; byte < bytes && last_ < ROOM; byte += 64) lines_[last_++] = {first + byte, stride};
    }
    void expect(const float* first, long stride, int rows, int columns) {
        expect(reinterpret_cast<const char*>(first), 4 * stride, rows, 4 * columns);
    }
    // Of the expected lines, `count` times GRANULE at once.
    SAT_INLINE void fetch(int count) {
        for (; count > 0 && first_ < last_; --count) {
            Lines lines = next();
            for (int i = 0; i < GRANULE; ++i) lines.fetch();
        }
    }
    // The next lines; where there are none, one that is near anyway.
    SAT_INLINE Lines next() { return first_ < last_ ? lines_[first_++] : Lines{reinterpret_cast<const char*>(this), 0}; }

  private:
    static constexpr int ROOM = 256;    // K and V of a tile, Q, dO, O and dQ of a block, all 128 x 128
    int first_ = 0, last_ = 0;
    Lines lines_[ROOM];
};

// ---- accumulators ----

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

template <int NR, int NV>
SAT_INLINE void write(const vec (&c)[NR][NV], float* to, int row) {
    SAT_UNROLL(16)
    for (int r = 0; r < NR; ++r)
        SAT_UNROLL(4)
        for (int v = 0; v < NV; ++v) store(to + (row + r) * NV * W + v * W, c[r][v]);
}

// ---- numbers ----

struct Float32 {
    typedef float Operand, Element;
    typedef vec Vector;
    static constexpr int NUM = 1;    // operands in an element
    static constexpr int QUERIES = W == 16 ? 64 : 32;    // of a tile, at most

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

    // Rows [row, row + NR) of probabilities (here they are in p) and of gradients of the scores, [T] wide.
    template <int T, int NR, int NV>
    static SAT_INLINE void keep(int row, vec (&)[NR][NV], vec (&ds)[NR][NV], float*, float* gradients, float*) {
        write(ds, gradients, row);
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

// Calls work(Count<NR>, row) for all rows below ROWS, in the fewest groups of at most MOST rows, of much the same size.
template <int ROWS, int MOST, class Work>
SAT_INLINE void by_rows(Work work) {
    constexpr int GROUPS = (ROWS + MOST - 1) / MOST, NR = (ROWS + GROUPS - 1) / GROUPS;
    constexpr int SMALLER = GROUPS * NR - ROWS, WHOLE = (GROUPS - SMALLER) * NR;
    for (int row = 0; row < WHOLE; row += NR) work(Count<NR>(), row);
    if constexpr (SMALLER)
        for (int row = WHOLE; row < ROWS; row += NR - 1) work(Count<NR - 1>(), row);
}

template <class Number>
struct Loops : Number {
    typedef typename Number::Operand Operand;
    typedef typename Number::Element Element;
    typedef typename Number::Vector Vector;
    struct Session {};

    // c += A B over element k of the NR rows of A from `a_row` on.
    template <int NR, int NV, class A>
    static SAT_INLINE void step(vec (&c)[NR][NV], const char* a_row, long k, const A& a, const Panel<Element>& b) {
        const Element* from = b.data + k * b.stride;
        const auto factor = [&](int r) { return Number::splat(a_row + k * a.step_bytes + r * a.row_bytes); };
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

    // Calls step(k) for every element k.
    template <class Step>
    static SAT_INLINE void along(long depth, Ahead& ahead, Step step) {
        for (long granule = 0; granule < depth; granule += GRANULE) {
            Ahead::Lines lines = ahead.next(), more = ahead.next();
            const long end = granule + GRANULE < depth ? granule + GRANULE : depth;
            SAT_UNROLL(2)
            for (long k = granule; k < end; ++k) {
                lines.fetch();
                more.fetch();
                step(k);
            }
        }
    }

    template <int ROWS, int NV, class A, class Emit>
    static SAT_INLINE void panel(long depth, const A& a, const Panel<Element>& b, Ahead& ahead, Emit emit) {
        by_rows<ROWS, Number::rows_at_once(NV)>([&](auto rows, int row) __attribute__((always_inline)) {
            vec c[decltype(rows)::value][NV];
            clear(c);
            const char* a_row = a.data + row * a.row_bytes;
            along(depth, ahead, [&](long k) __attribute__((always_inline)) { step(c, a_row, k, a, b); });
            emit(row, c);
        });
    }

    template <int ROWS, int NV, class A, class First, class Second>
    static SAT_INLINE void panels(long depth, const A& a, const Panel<Element>& b, const A& a2, const Panel<Element>& b2,
                                  Operand* p, Ahead& ahead, First first, Second second) {
        if constexpr (Number::NUM == 1) {    // one after the other: more rows at a time are worth more than what p costs
            panel<ROWS, NV>(depth, a, b, ahead, [&](int row, auto& c) __attribute__((always_inline)) {
                first(row, c);
                write(c, p, row);
            });
            panel<ROWS, NV>(depth, a2, b2, ahead, [&](int row, auto& c2) __attribute__((always_inline)) {
                vec c[sizeof(c2) / sizeof(c2[0])][NV];
                read(c, p, row);
                second(row, c, c2);
            });
        } else {
            by_rows<ROWS, Number::rows_at_once(2 * NV)>([&](auto rows, int row) __attribute__((always_inline)) {
                vec c[decltype(rows)::value][NV], c2[decltype(rows)::value][NV];
                clear(c);
                clear(c2);
                const char *a_row = a.data + row * a.row_bytes, *a2_row = a2.data + row * a2.row_bytes;
                along(depth, ahead, [&](long k) __attribute__((always_inline)) {
                    step(c, a_row, k, a, b);
                    step(c2, a2_row, k, a2, b2);
                });
                first(row, c);
                second(row, c, c2);
            });
        }
    }

    // c += A B, or = where c is fresh; rows of c are `stride` apart.
    template <int ROWS, int NV = 4, class A>
    static SAT_INLINE void add(long depth, const A& a, const Panel<Element>& b, float* c, long stride, long columns, bool fresh,
                               Ahead& ahead, long first = 0) {
        for (; first + NV * W <= columns; first += NV * W)
            panel<ROWS, NV>(depth, a, b + first, ahead, [&](int row, auto& sum) __attribute__((always_inline)) {
                constexpr int NR = sizeof(sum) / sizeof(sum[0]);
                SAT_UNROLL(16)
                for (int r = 0; r < NR; ++r)
                    SAT_UNROLL(4)
                    for (int v = 0; v < NV; ++v) {
                        float* p = c + (row + r) * stride + first + v * W;
                        store(p, fresh ? sum[r][v] : load(p) + sum[r][v]);
                    }
            });
        if constexpr (NV > 1)
            if (first < columns) add<ROWS, NV - 1>(depth, a, b, c, stride, columns, fresh, ahead, first);
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
