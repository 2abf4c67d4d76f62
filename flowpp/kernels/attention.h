// Softmax attention over all positions, of rows (q, k, v) as a 1x1 convolution leaves them in channels-last memory.
//
// Scores never reach memory beyond the first cache. Forward, queries lie side by side and keys pass in tiles
// under a running maximum (Milakov & Gimelshein, 2018; Dao et al., 2022). Backward, keys lie side by side, and a
// square of both is turned about for the gradient of the queries.
#pragma once

#include <algorithm>

#include "lanes.h"

constexpr int TILE = 64;

// So that what is summed over d stays in registers.
#ifdef __clang__
#define FLOWPP_UNROLL _Pragma("clang loop unroll(full)")
#else
#define FLOWPP_UNROLL _Pragma("GCC unroll 64")
#endif

// Rows of D numbers, `stride` apart, side by side; beyond n of them zeros.
template <class T, int D> inline void transposed(const T* rows, int64_t stride, int64_t n, V<T>* to) {
    FLOWPP_UNROLL for (int d = 0; d < D; d++) to[d] = V<T>{};
    T* flat = reinterpret_cast<T*>(to);
    for (int64_t i = 0; i < n; i++)
        FLOWPP_UNROLL for (int d = 0; d < D; d++) flat[d * LANES<T> + i] = rows[i * stride + d];
}

// out [length, D] and logsumexp [length] of one head of one image.
template <class T, int D>
void attend(const T* q, const T* k, const T* v, int64_t length, int64_t stride, T* out, int64_t out_stride, T* lse) {
    typedef V<T> W;
    const T scale = T(1 / std::log(2.0) / std::sqrt(double(D)));
    for (int64_t first = 0; first < length; first += LANES<T>) {
        const int64_t n = std::min<int64_t>(LANES<T>, length - first);
        W query[D], gathered[D], scores[TILE];
        transposed<T, D>(q + first * stride, stride, n, query);
        FLOWPP_UNROLL for (int d = 0; d < D; d++) query[d] *= scale, gathered[d] = W{};
        W most = all<T>(-HUGE_VAL), total{};
        for (int64_t start = 0; start < length; start += TILE) {
            const int tile = std::min<int64_t>(TILE, length - start);
            W highest = most;
            for (int j = 0; j < tile; j++) {
                const T* key = k + (start + j) * stride;
                W even{}, odd{};
                FLOWPP_UNROLL for (int d = 0; d < D; d += 2) {
                    even += query[d] * key[d];
                    odd += query[d + 1] * key[d + 1];
                }
                scores[j] = even + odd;
                highest = max(highest, scores[j]);
            }
            W rescale = exp2_down(most - highest);
            most = highest;
            total *= rescale;
            FLOWPP_UNROLL for (int d = 0; d < D; d++) gathered[d] *= rescale;
            for (int j = 0; j < tile; j++) {
                scores[j] = exp2_down(scores[j] - most);
                total += scores[j];
            }
            for (int j = 0; j < tile; j++) {
                const T* value = v + (start + j) * stride;
                FLOWPP_UNROLL for (int d = 0; d < D; d++) gathered[d] += scores[j] * value[d];
            }
        }
        W share = 1 / total;
        store<T>(lse + first, most * T(std::log(2.0)) + log(total), n);
        FLOWPP_UNROLL for (int d = 0; d < D; d++) gathered[d] *= share;
        const T* flat = reinterpret_cast<const T*>(gathered);
        for (int64_t i = 0; i < n; i++)
            FLOWPP_UNROLL for (int d = 0; d < D; d++) out[(first + i) * out_stride + d] = flat[d * LANES<T> + i];
    }
}

// Gradients of q, k and v [length, D], given that of the output [length, D], rows `stride` and `out_stride` apart.
// `delta` [length] is each position's sum of output times its gradient; `sums` is room for length x D.
template <class T, int D>
void attend_backward(const T* q, const T* k, const T* v, int64_t length, int64_t stride, const T* grad, int64_t out_stride,
                     const T* lse, const T* delta, T* grad_q, T* grad_k, T* grad_v, V<T>* sums) {
    typedef V<T> W;
    const T scale = 1 / std::sqrt(T(D)), log2_e = T(1 / std::log(2.0)), score_scale = scale * log2_e;
    const int64_t blocks = (length + LANES<T> - 1) / LANES<T>;
    for (int64_t i = 0; i < blocks * D; i++) sums[i] = W{};
    for (int64_t first = 0; first < length; first += LANES<T>) {
        const int64_t n = std::min<int64_t>(LANES<T>, length - first);
        W key[D], value[D], sum_key[D], sum_value[D];
        transposed<T, D>(k + first * stride, stride, n, key);
        transposed<T, D>(v + first * stride, stride, n, value);
        FLOWPP_UNROLL for (int d = 0; d < D; d++) key[d] *= score_scale, sum_key[d] = W{}, sum_value[d] = W{};
        typename Vector<T>::I beyond{};
        for (int i = 0; i < LANES<T>; i++) beyond[i] = i < n ? 0 : -1;
        for (int64_t start = 0; start < length; start += LANES<T>) {
            const int rows = std::min<int64_t>(LANES<T>, length - start);
            W weights[LANES<T>], grad_scores[LANES<T>];
            for (int i = 0; i < rows; i++) {  // keys, then values: both together are more than there are registers
                const T* query = q + (start + i) * stride;
                W even = all<T>(-lse[start + i] * log2_e), odd{};
                FLOWPP_UNROLL for (int d = 0; d < D; d += 2) {
                    even += key[d] * query[d];
                    odd += key[d + 1] * query[d + 1];
                }
                weights[i] = even + odd;
            }
            for (int i = 0; i < rows; i++) {
                const T* from = grad + (start + i) * out_stride;
                W even = all<T>(-delta[start + i]), odd{};
                FLOWPP_UNROLL for (int d = 0; d < D; d += 2) {
                    even += value[d] * from[d];
                    odd += value[d + 1] * from[d + 1];
                }
                grad_scores[i] = even + odd;
            }
            for (int i = 0; i < rows; i++) {  // apart from the sums, so that the exponentials overlap
                weights[i] = exp2_down(weights[i]);
                if (n < LANES<T>) weights[i] = beyond ? W{} : weights[i];
                grad_scores[i] *= weights[i];
            }
            for (int i = 0; i < rows; i++) {
                const T* from = grad + (start + i) * out_stride;
                FLOWPP_UNROLL for (int d = 0; d < D; d++) sum_value[d] += weights[i] * from[d];
            }
            for (int i = 0; i < rows; i++) {
                const T* query = q + (start + i) * stride;
                FLOWPP_UNROLL for (int d = 0; d < D; d++) sum_key[d] += grad_scores[i] * query[d];
            }
            for (int i = rows; i < LANES<T>; i++) grad_scores[i] = W{};
            turn<LANES<T>>(grad_scores);
            W sum_query[D];
            W* kept = sums + start / LANES<T> * D;
            FLOWPP_UNROLL for (int d = 0; d < D; d++) sum_query[d] = kept[d];
            for (int64_t j = 0; j < n; j++) {
                const T* row = k + (first + j) * stride;
                FLOWPP_UNROLL for (int d = 0; d < D; d++) sum_query[d] += grad_scores[j] * row[d];
            }
            FLOWPP_UNROLL for (int d = 0; d < D; d++) kept[d] = sum_query[d];
        }
        const T *flat_key = reinterpret_cast<const T*>(sum_key), *flat_value = reinterpret_cast<const T*>(sum_value);
        for (int64_t i = 0; i < n; i++)
            FLOWPP_UNROLL for (int d = 0; d < D; d++) {
                grad_k[(first + i) * stride + d] = flat_key[d * LANES<T> + i] * scale;
                grad_v[(first + i) * stride + d] = flat_value[d * LANES<T> + i];
            }
    }
    for (int64_t i = 0; i < length; i++) {
        const T* flat = reinterpret_cast<const T*>(sums + i / LANES<T> * D);
        FLOWPP_UNROLL for (int d = 0; d < D; d++) grad_q[i * stride + d] = flat[d * LANES<T> + i % LANES<T>] * scale;
    }
}
