// Copies and arithmetic of strided arrays: what PyTorch computes the same, bit for bit, but where to call it takes longer than to do it.
#pragma once

#include <cstdint>

enum Elementwise : int64_t { COPY, NEGATE, ADD, SUBTRACT, MULTIPLY, DIVIDE };

constexpr int64_t MOST_DIMENSIONS = 8;

// Arrays out, a and b over the same `dimensions`, of which the last is the innermost loop; strides in elements, of a broadcast one 0.
struct Strided {
    int64_t dimensions;
    const int64_t *shape, *out, *a, *b;

    int64_t length() const { return shape[dimensions - 1]; }
    int64_t rows() const {
        int64_t rows = 1;
        for (int64_t d = 0; d < dimensions - 1; d++) rows *= shape[d];
        return rows;
    }
};

template <class T, class F> inline void compute_row(int64_t n, T* out, int64_t by_out, const T* a, int64_t by_a, const T* b, int64_t by_b, F f) {
    if (by_out == 1 && by_a == 1 && by_b == 1)
        for (int64_t i = 0; i < n; i++) out[i] = f(a[i], b[i]);
    else if (by_out == 1 && by_a == 1 && by_b == 0)
        for (int64_t i = 0; i < n; i++) out[i] = f(a[i], *b);
    else
        for (int64_t i = 0; i < n; i++) out[i * by_out] = f(a[i * by_a], b[i * by_b]);
}

// Rows `first` to `last` of out = f(a, b).
template <class T, class F> void compute(const Strided& of, int64_t first, int64_t last, T* out, const T* a, const T* b, F f) {
    const int64_t outer = of.dimensions - 1;
    int64_t place[MOST_DIMENSIONS], rest = first;
    for (int64_t d = outer - 1; d >= 0; d--) {
        place[d] = rest % of.shape[d];
        rest /= of.shape[d];
        out += place[d] * of.out[d], a += place[d] * of.a[d], b += place[d] * of.b[d];
    }
    for (int64_t row = first; row < last; row++) {
        compute_row(of.length(), out, of.out[outer], a, of.a[outer], b, of.b[outer], f);
        for (int64_t d = outer - 1; d >= 0; d--) {
            out += of.out[d], a += of.a[d], b += of.b[d];
            if (++place[d] < of.shape[d]) break;
            place[d] = 0;
            out -= of.shape[d] * of.out[d], a -= of.shape[d] * of.a[d], b -= of.shape[d] * of.b[d];
        }
    }
}

template <class T> void compute(int64_t operation, const Strided& of, int64_t first, int64_t last, T* out, const T* a, const T* b) {
    switch (operation) {
        case COPY: return compute(of, first, last, out, a, b, [](T x, T) { return x; });
        case NEGATE: return compute(of, first, last, out, a, b, [](T x, T) { return -x; });
        case ADD: return compute(of, first, last, out, a, b, [](T x, T y) { return x + y; });
        case SUBTRACT: return compute(of, first, last, out, a, b, [](T x, T y) { return x - y; });
        case MULTIPLY: return compute(of, first, last, out, a, b, [](T x, T y) { return x * y; });
        case DIVIDE: return compute(of, first, last, out, a, b, [](T x, T y) { return x / y; });
    }
}
