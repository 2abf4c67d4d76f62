// As many numbers side by side as a register holds, and the functions of them that the kernels need.
//
// float is what models compute in; double is there so that tests can compare each kernel with its reference to the last
// digits. Compiled without -ffast-math: NaN and infinity mean what they mean in PyTorch.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif

// How many: what one register of the processor holds.
template <class T> constexpr int LANES = BYTES / sizeof(T);

template <class T> struct Vector;
template <> struct Vector<float> {
    typedef float V __attribute__((vector_size(BYTES)));
    typedef int32_t I __attribute__((vector_size(BYTES)));
    typedef uint32_t Hash __attribute__((vector_size(BYTES)));
    typedef float Factor __attribute__((vector_size(BYTES)));
};
template <> struct Vector<double> {
    typedef double V __attribute__((vector_size(BYTES)));
    typedef int64_t I __attribute__((vector_size(BYTES)));
    typedef uint32_t Hash __attribute__((vector_size(BYTES / 2)));
    typedef float Factor __attribute__((vector_size(BYTES / 2)));
};
template <class T> using V = typename Vector<T>::V;
template <class T> using I = typename Vector<T>::I;

typedef V<float> Float;
typedef V<double> Double;
typedef I<float> Int;

template <class T> inline V<T> all(T x) { return V<T>{} + x; }

// The first n of them; the rest are zero.
template <class T> inline V<T> load(const T* from, int64_t n = LANES<T>) {
    V<T> v;
    if (n >= LANES<T>) {
        std::memcpy(&v, from, sizeof v);
    } else {
        v = V<T>{};
        std::memcpy(&v, from, n * sizeof(T));
    }
    return v;
}

template <class T> inline void store(T* to, V<T> v, int64_t n = LANES<T>) {
    std::memcpy(to, &v, (n >= LANES<T> ? LANES<T> : n) * sizeof(T));
}

template <int BY, class W, int... J> inline W rotated(W v, std::integer_sequence<int, J...>) {
    return __builtin_shufflevector(v, v, ((J + BY) % int(sizeof...(J)))...);
}

// The sum over the lanes, by halves.
template <class T, int HALF = LANES<T> / 2> inline T sum(V<T> v) {
    if constexpr (HALF == 0)
        return v[0];
    else
        return sum<T, HALF / 2>(v + rotated<HALF>(v, std::make_integer_sequence<int, LANES<T>>()));
}

// A square of rows, turned about its diagonal: blocks of half its side change places, then of a quarter, and so on.
template <int SIDE, int S, class W, int... J> inline W lower(W a, W b, std::integer_sequence<int, J...>) {
    return __builtin_shufflevector(a, b, (J & S ? SIDE + J - S : J)...);
}

template <int SIDE, int S, class W, int... J> inline W upper(W a, W b, std::integer_sequence<int, J...>) {
    return __builtin_shufflevector(a, b, (J & S ? SIDE + J : J + S)...);
}

template <int SIDE, int S = SIDE / 2, class W> inline void turn(W* rows) {
    std::make_integer_sequence<int, SIDE> lanes;
    for (int i = 0; i < SIDE; i++)
        if (!(i & S)) {
            W a = rows[i], b = rows[i + S];
            rows[i] = lower<SIDE, S>(a, b, lanes);
            rows[i + S] = upper<SIDE, S>(a, b, lanes);
        }
    if constexpr (S > 1) turn<SIDE, S / 2>(rows);
}

template <class M> inline bool any(M mask) {
    bool found = false;
    for (unsigned i = 0; i < sizeof mask / sizeof mask[0]; i++) found |= mask[i] != 0;
    return found;
}

inline Float max(Float a, Float b) { return a > b ? a : b; }
inline Double max(Double a, Double b) { return a > b ? a : b; }
inline Float min(Float a, Float b) { return a < b ? a : b; }
inline Double min(Double a, Double b) { return a < b ? a : b; }
template <class W> inline W abs(W a) { return a < 0 ? -a : a; }

// 2^n of the whole number in the last bits of `shifted`, to multiply with: so NaN stays NaN.
inline Float power_of_two(Float shifted) {
    Int bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits <<= 23;
    std::memcpy(&shifted, &bits, sizeof bits);
    return shifted;
}

// Adding it rounds to the nearest whole number, which is then in the last bits with an exponent's bias: 1.5 * 2^23 + 127.
constexpr float ROUNDING = 12583039.0f;

// e^x for x from -87 to 88 by Cephes' expf: below 2 units in the last place.
inline Float exp_within(Float x) {
    const Float shift = all(ROUNDING);
    Float shifted = x * 1.44269504088896341f + shift, n = shifted - shift;
    Float r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    Float p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + (r + 1.0f);
    return p * power_of_two(shifted);
}

// e^x for x <= 0 beside numbers near 1: nothing where it is below e^-50, which vanishes in a sum with them. Carried on,
// such weights would make gradients too small for a normal number, and the processor takes a hundred times as long for
// those: attention that has learned to look at one place trained four times slower.
inline Float exp_down(Float x) { return x < -50.0f ? all(0.0f) : exp_within(x); }

// 2^x for x <= 0, likewise: its rest needs no splitting, so it takes two thirds of the operations. Polynomial of the
// least relative error, 2^-28, on [-1/2, 1/2].
inline Float exp2_down(Float x) {
    const Float shift = all(ROUNDING);
    Float shifted = x + shift, r = x - (shifted - shift);
    Float p = all(1.5353362030e-4f);
    p = p * r + 1.3398874651e-3f;
    p = p * r + 9.6184373591e-3f;
    p = p * r + 5.5503324705e-2f;
    p = p * r + 2.4022647914e-1f;
    p = p * r + 6.9314720286e-1f;
    p = p * r + 1.0f;
    return x < -72.0f ? all(0.0f) : p * power_of_two(shifted);
}

// e^x of any x; 0 below the least normal number. e^x = 1 / e^-x above zero.
inline Float exp(Float x) {
    Float down = x > 0 ? -x : x;
    down = down < -87.0f ? all(0.0f) : exp_within(down);
    return x > 0 ? 1.0f / down : down;
}

// log x of normal x by Cephes' logf; -infinity at 0.
inline Float log(Float x) {
    Int bits;
    std::memcpy(&bits, &x, sizeof bits);
    Int exponent = ((bits >> 23) & 0xff) - 126;
    bits = (bits & 0x007fffff) | 0x3f000000;
    Float m;
    std::memcpy(&m, &bits, sizeof m);  // in [1/2, 1)
    Int small = m < 0.707106781186547524f;
    Float e = __builtin_convertvector(exponent + small, Float);  // a true comparison is -1
    m = (small ? m + m : m) - 1.0f;
    Float z = m * m;
    Float p = all(7.0376836292e-2f);
    p = p * m - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    Float y = p * m * z + e * -2.12194440e-4f - 0.5f * z;
    y = m + y + e * 0.693359375f;
    y = x > 0 ? y : (x == 0 ? all(-HUGE_VALF) : all(NAN));
    return x == HUGE_VALF ? x : (x == x ? y : x);
}

// As Cephes' exp and log, for double.
inline Double exp(Double x) {
    Double bounded = min(x, all(709.0));
    bounded = bounded < -708.0 ? all(-708.0) : bounded;
    const Double shift = all(6755399441055744.0);  // 1.5 * 2^52
    Double n = (bounded * 1.4426950408889634073599 + shift) - shift;
    Double r = bounded - n * 6.93145751953125e-1;
    r = r - n * 1.42860682030941723212e-6;
    Double z = r * r;
    Double p = r * ((1.26177193074810590878e-4 * z + 3.02994407707441961300e-2) * z + 9.99999999999999999910e-1);
    Double q = ((3.00198505138664455042e-6 * z + 2.52448340349684104192e-3) * z + 2.27265548208155028766e-1) * z + 2.0;
    I<double> bits = (__builtin_convertvector(n, I<double>) + 1023) << 52;
    Double scale;
    std::memcpy(&scale, &bits, sizeof scale);
    Double y = (1 + 2 * (p / (q - p))) * scale;
    return x < -708.0 ? all(0.0) : (x > 709.0 ? all(HUGE_VAL) : (x == x ? y : x));
}

inline Double exp_down(Double x) { return exp(x); }
inline Double exp2_down(Double x) { return exp(x * 0.693147180559945309417); }

inline Double log(Double x) {
    I<double> bits;
    std::memcpy(&bits, &x, sizeof bits);
    I<double> exponent = ((bits >> 52) & 0x7ff) - 1022;
    bits = (bits & 0x000fffffffffffffLL) | 0x3fe0000000000000LL;
    Double m;
    std::memcpy(&m, &bits, sizeof m);
    I<double> small = m < 0.70710678118654752440;
    Double e = __builtin_convertvector(exponent + small, Double);
    m = (small ? m + m : m) - 1;
    Double z = m * m;
    Double p = all(1.01875663804580931796e-4);
    p = p * m + 4.97494994976747001425e-1;
    p = p * m + 4.70579119878881725854;
    p = p * m + 14.4989225341610930846;
    p = p * m + 17.9368678507819816313;
    p = p * m + 7.70838733755885391666;
    Double q = m + 11.2873587189167450590;
    q = q * m + 45.2279145837532221105;
    q = q * m + 82.9875266912776603211;
    q = q * m + 71.1544750618563894466;
    q = q * m + 23.1251620126765340583;
    Double y = m * (z * p / q) + e * -2.121944400546905827679e-4 - 0.5 * z;
    y = m + y + e * 0.693359375;
    y = x > 0 ? y : (x == 0 ? all(-HUGE_VAL) : all((double)NAN));
    return x == HUGE_VAL ? x : (x == x ? y : x);
}

// log(1 + x) for x in [0, 1]: what rounding 1 + x loses is added to first order.
template <class W> inline W log1p(W x) {
    W u = 1 + x;
    return log(u) + (x - (u - 1)) / u;
}

template <class W> inline W sigmoid(W x) {
    W e = exp_down(-abs(x)), share = 1 / (1 + e);
    return x < 0 ? e * share : share;
}

template <class W> inline W log_sigmoid(W z) { return min(W{}, z) - log1p(exp_down(-abs(z))); }

template <class W> inline W tanh(W x) {
    W e = exp_down(-2 * abs(x));
    W y = (1 - e) / (1 + e);
    return x < 0 ? -y : y;
}
