// The entry points: plain C over pointers and strides in elements, of one dtype, Real: the library is built for float
// and, where something asks for it, for double.
//
// Threads are those of PyTorch: compiled for OpenMP but linked without its runtime, so that the symbols are found in the
// one that PyTorch has loaded, and torch.set_num_threads holds here, too. Work is divided the same way each time.
#include "attention.h"
#include "attention_tiles.h"
#include "elementwise.h"
#include "gates.h"
#include "mixture.h"
#include "tiles.h"

typedef FLOWPP_REAL Real;
typedef Field<Real> F;
typedef V<Real> W;

extern "C" int omp_get_thread_num(void);
extern "C" int omp_get_num_threads(void);

constexpr int64_t WORTH_A_THREAD = 1 << 14;  // elements

// How PyTorch tensors [batch, channels, positions] come in: a pointer and three strides.
F field(Real* data, const int64_t* strides) { return {data, strides[0], strides[1], strides[2]}; }

// The gradients of y and of the terms become those of the parameters (into the tile) and of x.
W coupling_gradients(Mixture<Real>& mixture, W x, W grad_y, W grad_terms) {
    W bent = tanh(mixture.a), scale = exp(bent), u;
    W grad_x = mixture.gradients(x, grad_y * scale, grad_terms, u);
    mixture.tile[0] = (grad_y * u * scale + grad_terms) * (1 - bent * bent);
    mixture.tile[1] = grad_y;
    return grad_x;
}

// `shape` is batch, channels, positions, components. Calls body(mixture, b, c, p, n) for n positions from p on, as many as there are lanes.
template <class Body> void each_block(const int64_t* shape, Body body) {
    const int64_t batch = shape[0], channels = shape[1], positions = shape[2], components = shape[3];
    const int64_t blocks = (positions + LANES<Real> - 1) / LANES<Real>, units = batch * blocks;
#pragma omp parallel if (batch * channels * positions * components > WORTH_A_THREAD)
    {
        Mixture<Real> mixture(components);
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < units; unit++) {
            const int64_t b = unit / blocks, p = unit % blocks * LANES<Real>, n = std::min<int64_t>(LANES<Real>, positions - p);
            for (int64_t c = 0; c < channels; c++) body(mixture, b, c, p, n);
        }
    }
}

extern "C" void couple(const int64_t* shape, Real* x_, const int64_t* xs, Real* h_, const int64_t* hs, Real* y_, const int64_t* ys,
                       Real* terms_, const int64_t* ts) {
    const F x = field(x_, xs), h = field(h_, hs), y = field(y_, ys), terms = field(terms_, ts);
    each_block(shape, [=](Mixture<Real>& mixture, int64_t b, int64_t c, int64_t p, int64_t n) {
        mixture.read(h, b, c, p, n);
        W u, log_derivative, bent = tanh(mixture.a);
        mixture.logit(x.read(b, c, p, n), u, log_derivative);
        y.write(b, c, p, n, u * exp(bent) + mixture.b);
        terms.write(b, c, p, n, log_derivative + bent);
    });
}

extern "C" void couple_backward(const int64_t* shape, Real* grad_y_, const int64_t* gys, Real* grad_terms_, const int64_t* gts, Real* x_,
                                const int64_t* xs, Real* h_, const int64_t* hs, Real* grad_x_, const int64_t* gxs, Real* grad_h_,
                                const int64_t* ghs) {
    const F grad_y = field(grad_y_, gys), grad_terms = field(grad_terms_, gts), x = field(x_, xs), h = field(h_, hs);
    const F grad_x = field(grad_x_, gxs), grad_h = field(grad_h_, ghs);
    each_block(shape, [=](Mixture<Real>& mixture, int64_t b, int64_t c, int64_t p, int64_t n) {
        mixture.read(h, b, c, p, n);
        W grad = coupling_gradients(mixture, x.read(b, c, p, n), grad_y.read(b, c, p, n), grad_terms.read(b, c, p, n));
        grad_x.write(b, c, p, n, grad);
        mixture.write(grad_h, b, c, p, n);
    });
}

// `limits`: evaluations until every other step is a bisection, and the most there can be.
extern "C" void uncouple(const int64_t* shape, const int64_t* limits, Real* y_, const int64_t* ys, Real* h_, const int64_t* hs, Real* x_,
                         const int64_t* xs, Real* terms_, const int64_t* ts) {
    const F y = field(y_, ys), h = field(h_, hs), x = field(x_, xs), terms = field(terms_, ts);
    const int free = limits[0], most = limits[1];
    each_block(shape, [=](Mixture<Real>& mixture, int64_t b, int64_t c, int64_t p, int64_t n) {
        mixture.read(h, b, c, p, n);
        W bent = tanh(mixture.a), found, log_derivative;
        W u = (y.read(b, c, p, n) - mixture.b) * exp(-bent);
        mixture.solve(u, free, most, found, log_derivative);
        x.write(b, c, p, n, found);
        terms.write(b, c, p, n, -log_derivative - bent);
    });
}

// Rows in equal parts to the threads: body(thread, first, last).
template <class Body> void each_part(int64_t rows, int64_t width, Body body) {
#pragma omp parallel if (rows * width > WORTH_A_THREAD)
    {
        const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
        body(thread, rows * thread / threads, rows * (thread + 1) / threads);
    }
}

// Calls body with std::true_type where rows of F fill the lanes each time, which spares every load a question.
template <class Body> void by_width(int64_t filters, Body body) {
    filters % LANES<Real> ? body(std::false_type{}) : body(std::true_type{});
}

extern "C" void concat_elu_forward(int64_t rows, int64_t filters, const Real* x, uint64_t seed, double probability, Real* out) {
    const Dropout dropout(seed, probability);
    each_part(rows, filters, [=](int64_t, int64_t first, int64_t last) {
        by_width(filters, [=](auto whole) { concat_elu<whole>(x, first, last, filters, dropout, out); });
    });
}

extern "C" void concat_elu_backward(int64_t rows, int64_t filters, const Real* grad, const Real* x, uint64_t seed, double probability,
                                    Real* grad_x) {
    const Dropout dropout(seed, probability);
    each_part(rows, filters, [=](int64_t, int64_t first, int64_t last) {
        by_width(filters, [=](auto whole) { concat_elu_backward<whole>(grad, x, first, last, filters, dropout, grad_x); });
    });
}

extern "C" void gate_norm_forward(int64_t rows, int64_t filters, const Real* x, const Real* gates, const Real* gain, const Real* bias,
                                  Real* out) {
    each_part(rows, filters, [=](int64_t, int64_t first, int64_t last) {
        std::vector<Real> kept(2 * filters);
        by_width(filters, [&](auto whole) { gate_norm<whole>(x, gates, gain, bias, first, last, filters, kept.data(), out); });
    });
}

// The gradients of gain and bias are sums of a thread each, [threads, F].
extern "C" void gate_norm_backward(int64_t rows, int64_t filters, const Real* grad, const Real* x, const Real* gates, const Real* gain,
                                   Real* grad_x, Real* grad_gates, Real* grad_gain, Real* grad_bias) {
    each_part(rows, filters, [=](int64_t thread, int64_t first, int64_t last) {
        std::vector<Real> kept(2 * filters);
        by_width(filters, [&](auto whole) {
            gate_norm_backward<whole>(grad, x, gates, gain, first, last, filters, kept.data(), grad_x, grad_gates,
                                      grad_gain + thread * filters, grad_bias + thread * filters);
        });
    });
}

// out = operation(a, b), of which some take a alone. `strides` are those of out, a and b, [3, dimensions].
extern "C" void elementwise(int64_t operation, int64_t dimensions, const int64_t* shape, const int64_t* strides, Real* out, const Real* a,
                            const Real* b) {
    const Strided of = {dimensions, shape, strides, strides + dimensions, strides + 2 * dimensions};
    if (dimensions > 1) {
        each_part(of.rows(), of.length(), [=](int64_t, int64_t first, int64_t last) { compute(operation, of, first, last, out, a, b); });
    } else {
        each_part(*shape, 1, [=](int64_t, int64_t first, int64_t last) {
            const int64_t length = last - first;
            const Strided part = {1, &length, of.out, of.a, of.b};
            compute(operation, part, 0, 1, out + first * *of.out, a + first * *of.a, b + first * *of.b);
        });
    }
}

// Of one head's results, [length, D] from `start` on in rows of `width`, those that are not kept.
template <int D, class T> void drop(T* out, int64_t start, int64_t length, int64_t width, const Dropout& dropout) {
    if (!dropout.threshold) return;
    for (int64_t row = 0; row < length; row++)
        for (int64_t d = 0; d < D; d += LANES<T>) {
            const int64_t place = start + row * width + d, n = std::min<int64_t>(LANES<T>, D - d);
            store<T>(out + place, load<T>(out + place, n) * dropout.factors<T>(place), n);
        }
}

// `shape` is batch, length, heads. qkv rows hold q, k and v, heads x D each; out rows heads x D. One unit a head.
template <int D>
void attention(const int64_t* shape, const Real* qkv, Dropout dropout, Real* out, Real* lse) {
    const int64_t batch = shape[0], length = shape[1], heads = shape[2], width = heads * D;
#pragma omp parallel for schedule(static) if (batch * length * width > WORTH_A_THREAD)
    for (int64_t unit = 0; unit < batch * heads; unit++) {
        const int64_t image = unit / heads, head = unit % heads;
        const Real* q = qkv + image * length * 3 * width + head * D;
        Real* to = out + image * length * width + head * D;
        attend<Real, D>(q, q + width, q + 2 * width, length, 3 * width, to, width, lse + unit * length);
        drop<D>(out, to - out, length, width, dropout);
    }
}

template <int D>
void attention_backward(const int64_t* shape, const Real* grad, const Real* qkv, const Real* out, const Real* lse, Dropout dropout, Real* grad_qkv) {
    const int64_t batch = shape[0], length = shape[1], heads = shape[2], width = heads * D;
#pragma omp parallel if (batch * length * width > WORTH_A_THREAD)
    {
        std::vector<Real> delta(length), undropped(length * D);
        std::vector<W> sums((length + LANES<Real> - 1) / LANES<Real> * D);
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < batch * heads; unit++) {
            const int64_t image = unit / heads, head = unit % heads, start = image * length * width + head * D;
            const int64_t place = image * length * 3 * width + head * D;
            for (int64_t row = 0; row < length; row++) {
                delta[row] = 0;  // of what was dropped the product is zero either way
                for (int64_t d = 0; d < D; d++) delta[row] += grad[start + row * width + d] * out[start + row * width + d];
                for (int64_t d = 0; d < D; d += LANES<Real>) {
                    const int64_t from = start + row * width + d, n = std::min<int64_t>(LANES<Real>, D - d);
                    store<Real>(undropped.data() + row * D + d, load<Real>(grad + from, n) * dropout.factors<Real>(from), n);
                }
            }
            attend_backward<Real, D>(qkv + place, qkv + place + width, qkv + place + 2 * width, length, 3 * width, undropped.data(), D,
                                  lse + unit * length, delta.data(), grad_qkv + place, grad_qkv + place + width,
                                  grad_qkv + place + 2 * width, sums.data());
        }
    }
}

#define FLOWPP_EACH_HEAD_SIZE(CASE) CASE(4) CASE(8) CASE(16) CASE(24) CASE(26) CASE(32)

// False where there is no kernel for heads of `size` features.
extern "C" bool attention_forward(const int64_t* shape, int64_t size, const Real* qkv, uint64_t seed, double probability, Real* out,
                                  Real* lse) {
    const Dropout dropout(seed, probability);
    switch (size) {
#define FLOWPP_CASE(D) case D: attention<D>(shape, qkv, dropout, out, lse); return true;
        FLOWPP_EACH_HEAD_SIZE(FLOWPP_CASE)
#undef FLOWPP_CASE
    }
    return false;
}

extern "C" bool attention_backward(const int64_t* shape, int64_t size, const Real* grad, const Real* qkv, const Real* out, const Real* lse,
                                   uint64_t seed, double probability, Real* grad_qkv) {
    const Dropout dropout(seed, probability);
    switch (size) {
#define FLOWPP_CASE(D) case D: attention_backward<D>(shape, grad, qkv, out, lse, dropout, grad_qkv); return true;
        FLOWPP_EACH_HEAD_SIZE(FLOWPP_CASE)
#undef FLOWPP_CASE
    }
    return false;
}

#ifdef FLOWPP_TILES
// `shape` is batch, height, width, channels (after concat_elu, where `elu` says so), filters, kernel.
Convolution convolution(const int64_t* shape, bool elu, bool turned) {
    return {shape[0], shape[1], shape[2], shape[3], shape[4], shape[5], elu, turned};
}

// How many bfloat16s `pack_weights` writes.
extern "C" int64_t packed_weights(const int64_t* shape) { return convolution(shape, false, false).weights(); }

// The weight as `convolve_tiles` takes it with `packed`.
extern "C" void pack_weights(const int64_t* shape, const float* weight, Half* packed) {
    const Convolution c = convolution(shape, false, false);
    for (int64_t block = 0; block < c.filter_blocks(); block++) pack(c, block, weight, packed);
}

// Convolution of x, or with `turned` the gradient of what was convolved given that of the results, x. No bias is zero.
extern "C" void convolve_tiles(const int64_t* shape, bool elu, bool turned, bool packed, const float* x, const void* weight, const float* bias, float* out) {
    const Convolution all = convolution(shape, elu, turned), c = all.in_parts();
    const int64_t positions = all.batch * all.height * all.width, image = c.height * c.width;
    const Scratch<Half> own(packed ? 0 : c.weights());
    const Half* weights = packed ? static_cast<const Half*>(weight) : own.get();
    std::vector<float> biases(c.filter_blocks() * BLOCK);
    if (bias) std::copy(bias, bias + c.filters, biases.begin());
    std::unique_ptr<Scratch<Half>> shared;  // the plane of an image that all threads compute together
#pragma omp parallel if (positions * c.filters > WORTH_A_THREAD)
    {
        const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
        const Tiles tiles;
#pragma omp for schedule(static)
        for (int64_t block = 0; block < (packed ? 0 : c.filter_blocks()); block++)
            pack(c, block, static_cast<const float*>(weight), own.get());
        const auto from = [&](int64_t b) { return x + b * image * (elu ? c.channels / 2 : c.channels); };
        const auto to = [&](int64_t b) { return out + b * image * c.filters; };
        if (c.batch >= threads) {
            const Scratch<Half> planes[2] = {Scratch<Half>(c.plane()), Scratch<Half>(c.plane())};
            const int64_t first = c.batch * thread / threads, last = c.batch * (thread + 1) / threads;
            const bool ahead = c.margin() > 0;  // to write a position for a 1x1 convolution takes as long as its products
            for (int64_t b = first; b < last; b++) {
                const Convolution p = c.part(b, positions);
                Half* plane = planes[b % 2].get();
                if (b == first || !ahead) write_rows(p, from(b), 0, p.rows(), plane);
                ComingPlane next;
                if (ahead && b + 1 < last) next = ComingPlane(c.part(b + 1, positions), from(b + 1), planes[(b + 1) % 2].get());
                convolve_blocks(p, plane, weights, biases.data(), 0, p.blocks(), to(b), next);
            }
        } else {
#pragma omp single
            shared = std::make_unique<Scratch<Half>>(c.plane());
            for (int64_t b = 0; b < c.batch; b++) {
                const Convolution p = c.part(b, positions);
                write_rows(p, from(b), p.rows() * thread / threads, p.rows() * (thread + 1) / threads, shared->get());
#pragma omp barrier
                ComingPlane none;
                convolve_blocks(p, shared->get(), weights, biases.data(), p.blocks() * thread / threads,
                                p.blocks() * (thread + 1) / threads, to(b), none);
#pragma omp barrier
            }
        }
    }
}

// The gradient of the weights [filters, kernel, kernel, channels], given that of the results [batch, height, width, filters].
extern "C" void convolve_tiles_weights(const int64_t* shape, bool elu, const float* x, const float* grad, float* grad_weight) {
    const Convolution all = convolution(shape, elu, false), c = all.in_parts();
    const int64_t positions = all.batch * all.height * all.width, image = c.height * c.width, places = c.kernel * c.kernel;
    const int64_t chunks = c.depth() / DEPTH, units = c.filter_blocks() * places * chunks;
    Summed summed(c);
    const Scratch<float> sums(units * BLOCK * BLOCK);
#pragma omp parallel if (positions * c.filters > WORTH_A_THREAD)
    {
        const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
        const auto part = [=](int64_t n, int64_t of) { return n * of / threads; };
        const int64_t first = part(units, thread), last = part(units, thread + 1);
        const Tiles tiles;
        std::fill(sums.get() + first * BLOCK * BLOCK, sums.get() + last * BLOCK * BLOCK, 0.0f);
        for (int64_t b = 0; b < c.batch; b++) {
            const Convolution p = c.part(b, positions);
            write_rows(p, x + b * image * (elu ? c.channels / 2 : c.channels), part(p.rows(), thread), part(p.rows(), thread + 1), summed.plane.get());
            summed.turn_grads(p, grad + b * image * c.filters, part(p.blocks(), thread), part(p.blocks(), thread + 1));
#pragma omp barrier
            summed.pair(p, part(p.positions() / 2, thread), part(p.positions() / 2, thread + 1));
#pragma omp barrier
            for (int64_t unit = first; unit < last; unit++)
                add_products(p, summed, unit / chunks / places * BLOCK, unit / chunks % places, unit % chunks * DEPTH, sums.get() + unit * BLOCK * BLOCK);
#pragma omp barrier
        }
        for (int64_t unit = first; unit < last; unit++) {
            const int64_t filter = unit / chunks / places * BLOCK, place = unit / chunks % places, channel = unit % chunks * DEPTH;
            for (int64_t n = 0; n < std::min(BLOCK, c.filters - filter); n++) {
                const float* from = sums.get() + (unit * BLOCK + n) * BLOCK;
                std::copy(from, from + std::min(DEPTH, c.channels - channel), grad_weight + ((filter + n) * places + place) * c.channels + channel);
            }
        }
    }
}
// As `attention`.
template <int D> void attention_tiles(const int64_t* shape, const float* qkv, Dropout dropout, float* out, float* lse) {
    const int64_t batch = shape[0], length = shape[1], heads = shape[2], width = heads * D;
#pragma omp parallel if (batch * length * width > WORTH_A_THREAD)
    {
        const Tiles tiles;
        TileAttention<D> attention(length);
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < batch * heads; unit++) {
            const int64_t image = unit / heads, start = image * length * width + unit % heads * D;
            const float* q = qkv + image * length * 3 * width + unit % heads * D;
            attention.attend(q, q + width, q + 2 * width, 3 * width, out + start, width, lse + unit * length);
            drop<D>(out, start, length, width, dropout);
        }
    }
}

// As `attention_forward`, for heads as large as a tile's side.
extern "C" bool attention_tiles_forward(const int64_t* shape, int64_t size, const float* qkv, uint64_t seed, double probability,
                                        float* out, float* lse) {
    const Dropout dropout(seed, probability);
    switch (size) {
        case 16: attention_tiles<16>(shape, qkv, dropout, out, lse); return true;
        case 24: attention_tiles<24>(shape, qkv, dropout, out, lse); return true;
        case 26: attention_tiles<26>(shape, qkv, dropout, out, lse); return true;
        case 32: attention_tiles<32>(shape, qkv, dropout, out, lse); return true;
    }
    return false;
}
#endif

// The level of these kernels (flowpp/levels.py), by the instructions that the compiler was permitted to use.
extern "C" const char* level() {
#if defined(FLOWPP_TILES)
    return "amx";
#elif defined(__AVX512F__)
    return "avx512";
#elif defined(__AVX2__) && defined(__FMA__)
    return "avx2";
#else
    return "baseline";
#endif
}

// Kernels that recordings call (flowpp/program.py): each of them as <name>_of, which finds the places of its arguments in an array.
template <class R, class... A, size_t... I> void call(R (*kernel)(A...), void* const* arguments, std::index_sequence<I...>) {
    kernel(*static_cast<A*>(arguments[I])...);
}
template <class R, class... A> void call(R (*kernel)(A...), void* const* arguments) { call(kernel, arguments, std::index_sequence_for<A...>()); }

#define FLOWPP_RECORDED(KERNEL) \
    extern "C" void KERNEL##_of(void* const* arguments) { call(KERNEL, arguments); }
FLOWPP_RECORDED(attention_forward)
FLOWPP_RECORDED(concat_elu_forward)
FLOWPP_RECORDED(couple)
FLOWPP_RECORDED(elementwise)
FLOWPP_RECORDED(gate_norm_forward)
FLOWPP_RECORDED(uncouple)
#ifdef FLOWPP_TILES
FLOWPP_RECORDED(attention_tiles_forward)
FLOWPP_RECORDED(convolve_tiles)
#endif

struct Call {
    void (*kernel)(void* const*);
    void* const* arguments;
};

extern "C" void run(const Call* calls, int64_t n) {
    for (const Call* each = calls; each < calls + n; each++) each->kernel(each->arguments);
}
