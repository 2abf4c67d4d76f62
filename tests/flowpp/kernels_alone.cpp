// Each kernel without Python, on fixed inputs: prints its results, one number a line. tests/flowpp/test_aarch64.py compares
// those of two processors. Build it with -DFLOWPP_REAL=float or double.
#include <cstdio>
#include <vector>

#include "kernels.cpp"

typedef std::vector<Real> Numbers;

// From -2 to 2, the same for each compiler (the generator of Numerical Recipes).
Numbers numbers(int64_t count, uint32_t seed) {
    Numbers found(count);
    for (Real& each : found) {
        seed = seed * 1664525u + 1013904223u;
        each = Real(int32_t(seed >> 8) - (1 << 23)) / (1 << 22);
    }
    return found;
}

void print(const Numbers& found) {
    for (Real each : found) std::printf("%.17g\n", double(each));
}

// x [1, 2, 37] and the parameters of `components` logistics [1, 2 (2 + 3 components), 37], in channels-last memory.
void mixtures(int64_t components) {
    const int64_t batch = 1, channels = 2, positions = 37, width = channels * (2 + 3 * components);
    const int64_t shape[] = {batch, channels, positions, components}, limits[] = {24, 60};
    const int64_t s[] = {channels * positions, 1, channels}, hs[] = {width * positions, 1, width};
    Numbers x = numbers(channels * positions, 1), h = numbers(width * positions, 2), y(x.size()), terms(x.size()), back(x.size());
    Numbers grad_x(x.size()), grad_h(h.size()), grad_y = numbers(x.size(), 3), grad_terms = numbers(x.size(), 4);
    couple(shape, x.data(), s, h.data(), hs, y.data(), s, terms.data(), s);
    print(y), print(terms);
    couple_backward(shape, grad_y.data(), s, grad_terms.data(), s, x.data(), s, h.data(), hs, grad_x.data(), s, grad_h.data(), hs);
    print(grad_x), print(grad_h);
    uncouple(shape, limits, y.data(), s, h.data(), hs, back.data(), s, terms.data(), s);
    print(back), print(terms);
}

void layers(int64_t filters) {
    const int64_t rows = 19;  // too few for a second thread
    Numbers x = numbers(rows * filters, 5), gates = numbers(2 * rows * filters, 6), gain = numbers(filters, 7), bias = numbers(filters, 8);
    Numbers out(2 * rows * filters), grad = numbers(2 * rows * filters, 9), grad_x(rows * filters), grad_gates(2 * rows * filters);
    concat_elu_forward(rows, filters, x.data(), 12345, 0.3, out.data());
    print(out);
    concat_elu_backward(rows, filters, grad.data(), x.data(), 12345, 0.3, grad_x.data());
    print(grad_x);
    Numbers normal(rows * filters), grad_gain(filters), grad_bias(filters);
    gate_norm_forward(rows, filters, x.data(), gates.data(), gain.data(), bias.data(), normal.data());
    print(normal);
    gate_norm_backward(rows, filters, grad.data(), x.data(), gates.data(), gain.data(), grad_x.data(), grad_gates.data(), grad_gain.data(),
                       grad_bias.data());
    print(grad_x), print(grad_gates), print(grad_gain), print(grad_bias);
}

void attentions(int64_t size) {
    const int64_t length = 83, heads = 2, width = heads * size, shape[] = {1, length, heads};
    Numbers qkv = numbers(3 * length * width, 10), out(length * width), lse(heads * length), grad = numbers(length * width, 11), grad_qkv(qkv.size());
    attention_forward(shape, size, qkv.data(), 54321, 0.2, out.data(), lse.data());
    print(out), print(lse);
    attention_backward(shape, size, grad.data(), qkv.data(), out.data(), lse.data(), 54321, 0.2, grad_qkv.data());
    print(grad_qkv);
}

void copies() {
    const int64_t shape[] = {5, 7}, strides[] = {7, 1, 1, 5, 7, 1};  // of the result, of a turned array, of another one
    Numbers a = numbers(35, 12), b = numbers(35, 13), out(35);
    for (int64_t operation = COPY; operation <= DIVIDE; operation++) {
        elementwise(operation, 2, shape, strides, out.data(), a.data(), b.data());
        print(out);
    }
}

int main() {
    for (int64_t components : {1, 3, 8}) mixtures(components);
    for (int64_t filters : {5, 8, 32}) layers(filters);
    for (int64_t size : {4, 8, 16, 24, 26, 32}) attentions(size);
    copies();
    std::fprintf(stderr, "%s\n", level());
}
