// The coupling by a mixture of logistics, elementwise: y = logit(F(x)) exp(tanh a) + b (Flow++ eq. 16), its gradient
// and its inverse. The formulas are those of flowpp/logistic.py, which says why they are taken so.
//
// As many positions of a channel as there are lanes pass at once; their 2 + 3K parameters are brought side by side into a tile that stays
// in the first cache, since in channels-last memory those of one position lie together.
#pragma once

#include <limits>
#include <vector>

#include "lanes.h"

constexpr double LOG_SCALE_FLOOR = -7;

// Elements [batch, channel, position]; of parameters, channel counts all of them.
template <class T> struct Field {
    T* data;
    int64_t batch, channel, position;

    T* at(int64_t b, int64_t c, int64_t p) const { return data + b * batch + c * channel + p * position; }

    V<T> read(int64_t b, int64_t c, int64_t p, int64_t n) const {
        const T* from = at(b, c, p);
        if (position == 1) return load<T>(from, n);
        V<T> v{};
        for (int64_t i = 0; i < n; i++) v[i] = from[i * position];
        return v;
    }

    void write(int64_t b, int64_t c, int64_t p, int64_t n, V<T> v) const {
        T* to = at(b, c, p);
        if (position == 1) return store<T>(to, v, n);
        for (int64_t i = 0; i < n; i++) to[i * position] = v[i];
    }
};

// What the mixtures of so many positions need; scratch that a thread reuses.
template <class T> struct Mixture {
    typedef V<T> W;
    int k;
    W a, b;
    std::vector<W> log_weight, mean, log_scale, inverse_scale, below, above, log_sigmoid_, log_sigmoid_negative, terms, tile;

    explicit Mixture(int components)
        : k(components), log_weight(k), mean(k), log_scale(k), inverse_scale(k), below(k), above(k), log_sigmoid_(k),
          log_sigmoid_negative(k), terms(k), tile(2 + 3 * k) {}

    // Positions of channel c, from p; beyond the first n there is nothing of account.
    void read(const Field<T>& h, int64_t b_, int64_t c, int64_t p, int64_t n) {
        int width = 2 + 3 * k;
        if (h.position == 1) {
            for (int j = 0; j < width; j++) tile[j] = load<T>(h.at(b_, c * width + j, p), n);
        } else {
            for (int64_t i = 0; i < LANES<T>; i++) {
                const T* from = h.at(b_, c * width, p + (i < n ? i : n - 1));
                T* to = reinterpret_cast<T*>(tile.data()) + i;
                for (int j = 0; j < width; j++) to[j * LANES<T>] = from[j * h.channel];
            }
        }
        a = tile[0], b = tile[1];
        W most = tile[2];
        for (int j = 1; j < k; j++) most = max(most, tile[2 + j]);
        W total{};
        for (int j = 0; j < k; j++) total += exp_down(tile[2 + j] - most);
        W shift = most + log(total);
        for (int j = 0; j < k; j++) {
            log_weight[j] = tile[2 + j] - shift;
            mean[j] = tile[2 + k + j];
            log_scale[j] = max(all<T>(LOG_SCALE_FLOOR), tile[2 + 2 * k + j]);  // in this order NaN stays
            inverse_scale[j] = exp(-log_scale[j]);
        }
    }

    // The tile, as gradients of the parameters.
    void write(const Field<T>& h, int64_t b_, int64_t c, int64_t p, int64_t n) const {
        int width = 2 + 3 * k;
        if (h.position == 1) {
            for (int j = 0; j < width; j++) store<T>(h.at(b_, c * width + j, p), tile[j], n);
        } else {
            for (int64_t i = 0; i < n; i++) {
                T* to = h.at(b_, c * width, p + i);
                const T* from = reinterpret_cast<const T*>(tile.data()) + i;
                for (int j = 0; j < width; j++) to[j * h.channel] = from[j * LANES<T>];
            }
        }
    }

    // What log F and log(1 - F) are sums of: their greatest terms, and the logarithms of what is left with them taken out.
    struct Tails {
        W most_below, most_above, rest_below, rest_above;
        W log_cdf() const { return most_below + rest_below; }
        W log_survival() const { return most_above + rest_above; }
    };

    // Fills below and above with log pi_k + log sigmoid(+-z_k), less the greatest of them: as numbers they grow with |z|
    // and with them their rounding, which their differences are free of.
    Tails tails(W x) {
        W most_below = all<T>(-HUGE_VAL), most_above = most_below;
        for (int j = 0; j < k; j++) {
            W z = (x - mean[j]) * inverse_scale[j];
            W ls = log_sigmoid(z);
            log_sigmoid_[j] = ls;
            log_sigmoid_negative[j] = ls - z;
            below[j] = log_weight[j] + ls;
            above[j] = log_weight[j] + (ls - z);
            most_below = max(most_below, below[j]);
            most_above = max(most_above, above[j]);
        }
        W sum_below{}, sum_above{};
        for (int j = 0; j < k; j++) {
            below[j] -= most_below;
            above[j] -= most_above;
            sum_below += exp_down(below[j]);
            sum_above += exp_down(above[j]);
        }
        return {most_below, most_above, log(sum_below), log(sum_above)};
    }

    // u = logit F(x) and log du/dx.
    void logit(W x, W& u, W& log_derivative) {
        const Tails found = tails(x);
        const W log_cdf = found.log_cdf(), log_survival = found.log_survival();
        auto upper = log_cdf > log_survival;
        W most = all<T>(-HUGE_VAL);
        for (int j = 0; j < k; j++) {
            W term = (upper ? above[j] + log_sigmoid_[j] : below[j] + log_sigmoid_negative[j]) - log_scale[j];
            terms[j] = term;
            most = max(most, term);
        }
        W total{};
        for (int j = 0; j < k; j++) total += exp_down(terms[j] - most);
        u = log_cdf - log_survival;
        log_derivative = most + log(total) - (upper ? found.rest_above : found.rest_below) - (upper ? log_cdf : log_survival);
    }

    // Gradients of the parameters into the tile, given those of u and of its log derivative; the gradient of x.
    W gradients(W x, W grad_u, W grad_log_derivative, W& u) {
        const Tails found = tails(x);
        u = found.log_cdf() - found.log_survival();
        W most = all<T>(-HUGE_VAL);
        for (int j = 0; j < k; j++) {
            terms[j] = above[j] + log_sigmoid_[j] - log_scale[j];
            most = max(most, terms[j]);
        }
        W total{};
        for (int j = 0; j < k; j++) {
            terms[j] = exp_down(terms[j] - most);
            total += terms[j];
        }
        W grad_x{};
        for (int j = 0; j < k; j++) {
            W z = (x - mean[j]) * inverse_scale[j];
            W grad_below = (grad_u - grad_log_derivative) * exp_down(below[j] - found.rest_below);
            W grad_above = (grad_u + grad_log_derivative) * exp_down(above[j] - found.rest_above);
            W grad_density = grad_log_derivative * (terms[j] / total);
            W up = exp_down(log_sigmoid_[j]), down = exp_down(log_sigmoid_negative[j]);
            W grad_z = (grad_below + grad_density) * down + (grad_above - grad_density) * up;
            W grad_mean = -inverse_scale[j] * grad_z;
            grad_x -= grad_mean;
            tile[2 + j] = grad_below - grad_above + grad_density + grad_log_derivative * exp_down(log_weight[j]);
            tile[2 + k + j] = grad_mean;
            W raw = tile[2 + 2 * k + j];
            tile[2 + 2 * k + j] = raw < (T)LOG_SCALE_FLOOR ? all<T>(0) : -z * grad_z - grad_density;
        }
        return grad_x;
    }

    // x with logit F(x) = u, and log du/dx there: flowpp.logistic.solve, lane by lane.
    void solve(W u, int free, int most_evaluations, W& x, W& log_derivative) {
        typedef I<T> M;
        const T epsilon = std::numeric_limits<T>::epsilon();
        W low = mean[0] + u / inverse_scale[0], high = low;
        x = W{};
        for (int j = 0; j < k; j++) {
            W root = mean[j] + exp(log_scale[j]) * u;
            low = min(low, root);
            high = max(high, root);
            x += exp_down(log_weight[j]) * root;
        }
        x = min(high, max(low, x));  // in this order NaN stays
        W step = high - low, before = step, tolerance = 4 * epsilon * (1 + abs(u));
        M resting{};
        log_derivative = W{};
        for (int n = 1; n <= most_evaluations; n++) {
            W reached, slope;
            logit(x, reached, slope);
            log_derivative = resting ? log_derivative : slope;
            W error = reached - u;
            low = error <= 0 ? x : low;
            high = error >= 0 ? x : high;
            W newton = error * exp(-slope), bisection = x - (low + high) / 2;
            W chosen = bisection;
            if (n <= free || n % 2 == 0) {
                M good = (x - newton >= low) & (x - newton <= high) & (2 * abs(newton) <= abs(before));
                chosen = good ? newton : bisection;
            }
            before = step, step = chosen;
            M moves = (abs(error) > tolerance) & (2 * abs(step) > epsilon * abs(x));  // false for NaN
            resting |= ~moves;
            if (!any(~resting)) break;
            x = resting ? x : x - step;
        }
    }
};
