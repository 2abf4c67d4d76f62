// What lies between the convolutions of a conditioner, each in one pass: concat_elu with dropout; gate, residual and
// layer norm. Rows are positions in channels-last memory, F filters each; WHOLE where F fills the lanes each time.
#pragma once

#include <algorithm>

#include "lanes.h"

// Dropout by a counter-based generator: whether an element is kept is a hash of seed and index, so that the backward
// pass asks again instead of keeping a mask, and threads do not matter. The hash is Chris Wellons' lowbias32, with
// the other half of the seed in its middle.
struct Dropout {
    uint32_t low, high, threshold;
    float scale;

    Dropout(uint64_t seed, double probability)
        : threshold(uint32_t(probability * 4294967296.0)), scale(float(1 / (1 - probability))) {
        // splitmix64 (Steele et al., 2014): seeds that are alike must not be so in either half
        seed += 0x9e3779b97f4a7c15u;
        seed = (seed ^ (seed >> 30)) * 0xbf58476d1ce4e5b9u;
        seed = (seed ^ (seed >> 27)) * 0x94d049bb133111ebu;
        seed ^= seed >> 31;
        low = uint32_t(seed), high = uint32_t(seed >> 32);
    }

    // The factors of a register of elements from `index` on: 0 or 1 / (1 - probability).
    template <class T> V<T> factors(int64_t index) const {
        if (!threshold) return all<T>(1);
        typename Vector<T>::Hash x;
        typename Vector<T>::Factor none{};
        for (int i = 0; i < LANES<T>; i++) x[i] = uint32_t(index) + i;
        x ^= low;
        x ^= x >> 16;
        x *= 0x7feb352du;
        x += high ^ uint32_t(uint64_t(index) >> 32);
        x ^= x >> 15;
        x *= 0x846ca68bu;
        x ^= x >> 16;
        return __builtin_convertvector(x >= threshold ? none + scale : none, V<T>);
    }
};

// x [rows, F] -> elu(x), elu(-x) side by side, [rows, 2F], after dropout.
template <bool WHOLE, class T> void concat_elu(const T* x, int64_t first, int64_t last, int64_t filters, const Dropout& dropout, T* out) {
    for (int64_t row = first; row < last; row++)
        for (int64_t f = 0; f < filters; f += LANES<T>) {
            const int64_t n = WHOLE ? LANES<T> : std::min<int64_t>(LANES<T>, filters - f), place = row * 2 * filters + f;
            V<T> value = load<T>(x + row * filters + f, n), lower = exp_down(-abs(value)) - 1;
            store<T>(out + place, (value > 0 ? value : lower) * dropout.factors<T>(place), n);
            store<T>(out + place + filters, (value > 0 ? lower : -value) * dropout.factors<T>(place + filters), n);
        }
}

// The gradient of x given that of its concat_elu.
template <bool WHOLE, class T>
void concat_elu_backward(const T* grad, const T* x, int64_t first, int64_t last, int64_t filters, const Dropout& dropout, T* grad_x) {
    for (int64_t row = first; row < last; row++)
        for (int64_t f = 0; f < filters; f += LANES<T>) {
            const int64_t n = WHOLE ? LANES<T> : std::min<int64_t>(LANES<T>, filters - f), place = row * 2 * filters + f;
            V<T> value = load<T>(x + row * filters + f, n), slope = exp_down(-abs(value));
            V<T> plus = load<T>(grad + place, n) * dropout.factors<T>(place);
            V<T> minus = load<T>(grad + place + filters, n) * dropout.factors<T>(place + filters);
            store<T>(grad_x + row * filters + f, value > 0 ? plus - minus * slope : plus * slope - minus, n);
        }
}

// x + a sigmoid(b) in `kept`, and sigmoid(b) after it; mean and reciprocal standard deviation of the sums. `gates` holds
// a and b, F each.
template <bool WHOLE, class T> void gated(const T* x, const T* gates, int64_t filters, T* kept, T& mean, T& rate) {
    V<T> total{};
    for (int64_t f = 0; f < filters; f += LANES<T>) {
        const int64_t n = WHOLE ? LANES<T> : std::min<int64_t>(LANES<T>, filters - f);
        V<T> open = sigmoid(load<T>(gates + filters + f, n)), value = load<T>(x + f, n) + load<T>(gates + f, n) * open;
        store<T>(kept + f, value, n);
        store<T>(kept + filters + f, open, n);
        total += value;
    }
    mean = sum<T>(total) / filters;
    V<T> squares{};
    for (int64_t f = 0; f < filters; f += LANES<T>) {
        const int64_t n = WHOLE ? LANES<T> : std::min<int64_t>(LANES<T>, filters - f);
        V<T> centred = load<T>(kept + f, n) - mean;
        if (n < LANES<T>)
            for (int i = n; i < LANES<T>; i++) centred[i] = 0;
        squares += centred * centred;
    }
    rate = 1 / std::sqrt(sum<T>(squares) / filters + T(1e-5));
}

// out = layer_norm(x + a sigmoid(b)) of rows; without a gain, the sum itself. `kept` is room for 2F.
template <bool WHOLE, class T>
void gate_norm(const T* x, const T* gates, const T* gain, const T* bias, int64_t first, int64_t last, int64_t filters, T* kept, T* out) {
    for (int64_t row = first; row < last; row++) {
        T mean, rate;
        gated<WHOLE>(x + row * filters, gates + row * 2 * filters, filters, kept, mean, rate);
        for (int64_t f = 0; f < filters; f += LANES<T>) {
            const int64_t n = WHOLE ? LANES<T> : std::min<int64_t>(LANES<T>, filters - f);
            V<T> value = load<T>(kept + f, n);
            if (gain) value = (value - mean) * rate * load<T>(gain + f, n) + load<T>(bias + f, n);
            store<T>(out + row * filters + f, value, n);
        }
    }
}

// Gradients of x and the gates; those of gain and bias are added to `grad_gain` and `grad_bias`.
template <bool WHOLE, class T>
void gate_norm_backward(const T* grad, const T* x, const T* gates, const T* gain, int64_t first, int64_t last, int64_t filters,
                        T* kept, T* grad_x, T* grad_gates, T* grad_gain, T* grad_bias) {
    for (int64_t row = first; row < last; row++) {
        const T *from = grad + row * filters, *gate = gates + row * 2 * filters;
        T mean = 0, rate = 1, mean_grad = 0, mean_product = 0;
        gated<WHOLE>(x + row * filters, gate, filters, kept, mean, rate);
        if (gain) {
            V<T> total{}, products{};
            for (int64_t f = 0; f < filters; f += LANES<T>) {
                const int64_t n = WHOLE ? LANES<T> : std::min<int64_t>(LANES<T>, filters - f);
                V<T> out = load<T>(from + f, n), normal = (load<T>(kept + f, n) - mean) * rate;
                store<T>(kept + f, normal, n);
                store<T>(grad_gain + f, load<T>(grad_gain + f, n) + out * normal, n);
                store<T>(grad_bias + f, load<T>(grad_bias + f, n) + out, n);
                V<T> scaled = out * load<T>(gain + f, n);
                total += scaled;
                products += scaled * normal;
            }
            mean_grad = sum<T>(total) / filters;
            mean_product = sum<T>(products) / filters;
        }
        for (int64_t f = 0; f < filters; f += LANES<T>) {
            const int64_t n = WHOLE ? LANES<T> : std::min<int64_t>(LANES<T>, filters - f);
            V<T> value = load<T>(from + f, n);
            if (gain) value = (value * load<T>(gain + f, n) - mean_grad - load<T>(kept + f, n) * mean_product) * rate;
            V<T> a = load<T>(gate + f, n), open = load<T>(kept + filters + f, n);
            store<T>(grad_x + row * filters + f, value, n);
            store<T>(grad_gates + row * 2 * filters + f, value * open, n);
            store<T>(grad_gates + row * 2 * filters + filters + f, value * a * open * (1 - open), n);
        }
    }
}
