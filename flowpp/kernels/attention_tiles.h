// Softmax attention forward on a processor's matrix tiles, as attention.h has it, for float.
//
// Scores become exponents, so each number of a query or key is the sum of three bfloat16s, all that a float holds: six
// products, the others being below its last digit. Weights and values are sums of two, as in tiles.h. Keys are rows,
// queries columns: a row of scores is a register of queries.
#pragma once

#include "tiles.h"

#ifdef FLOWPP_TILES

// The parts of numbers, side by side as factors of the products: which part of a key meets which of a query.
constexpr int KEY_PARTS[6] = {0, 0, 1, 0, 2, 1}, QUERY_PARTS[6] = {0, 1, 0, 2, 0, 1};

// D numbers of a key in the parts that meet a query's, one after the other: 6 D bfloat16s.
template <int D> inline void write_parts(const float* from, Half* to) {
    constexpr int64_t REGISTERS = (D + SIDE - 1) / SIDE;
    Half parts[3][REGISTERS * SIDE];
    for (int64_t i = 0; i < REGISTERS; i++) {
        Float rest = load_below(D - i * SIDE, from + i * SIDE);
        for (int part = 0; part < 3; part++) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(parts[part] + i * SIDE), (__m256i)_mm512_cvtneps_pbh((__m512)rest));
            rest -= rounded(rest);
        }
    }
    for (int product = 0; product < 6; product++) std::memcpy(to + product * D, parts[KEY_PARTS[product]], D * sizeof(Half));
}

// The bfloat16s of two rows of floats, in turns.
inline __m512i upper_halves(Float even, Float odd) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32((__m512i)even, 16), (__m512i)odd);
}

// Of two rows of weights from 0 to 1. They are rounded by their bits, which is quicker and takes no care of NaN: `total` does.
inline void split_weights(Float even, Float odd, __m512i& high, __m512i& low) {
    const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(0xffff0000);
    const auto nearest = [=](Float x) { return (Float)_mm512_and_si512(_mm512_add_epi32((__m512i)x, half), upper); };
    const Float a = nearest(even), b = nearest(odd);
    high = upper_halves(a, b);
    low = upper_halves((Float)_mm512_add_epi32((__m512i)(even - a), half), (Float)_mm512_add_epi32((__m512i)(odd - b), half));
}

// A float this large ends in the digit of one: what is added to it is rounded to whole numbers, which its last bits then are.
constexpr float WHOLE = 12582912.0f;

// 2^(score - most) where that is a normal number, with `base` = WHOLE - most and `most` whole. Polynomial of the least relative
// error, 2^-23.7, on [-1/2, 1/2]; the power is added to its exponent.
inline Float exp2_from(Float score, Float base) {
    const Float shifted = score + base, r = score - (shifted - base);
    Float p = all(1.3276471993e-3f);
    p = p * r + 9.6755413345e-3f;
    p = p * r + 5.5507132735e-2f;
    p = p * r + 2.4022119724e-1f;
    p = p * r + 6.9314696706e-1f;
    p = p * r + 1.0f;
    return (Float)((Int)p + ((Int)shifted << 23));
}

// Scores within so much of zero, in powers of two, are weighed from their bound: no weight is too small for a normal number.
constexpr float MOST_BOUND = 48.0f;

// One head of one image at a time. Where no score can be large, SIDE queries meet BLOCK keys after BLOCK keys in the first cache,
// and tiles and exponentials are computed side by side. Else each query's greatest score is found first: SIDE queries are weighed
// while the scores of the next come in.
template <int D> class TileAttention {
public:
    explicit TileAttention(int64_t length)
        : length(length), padded(up_to(length, BLOCK)), keys(padded * STEPS * DEPTH), values(padded * FEATURES * 2), scores(2 * padded * SIDE) {}

    // out [length, D] and logsumexp [length], of rows of q, k and v `stride` apart.
    void attend(const float* q, const float* k, const float* v, int64_t stride, float* out, int64_t out_stride, float* lse) {
        read_keys(k, stride);
        read_values(v, stride);
        const float longest = std::sqrt(greatest_square(k, stride)), most = std::sqrt(greatest_square(q, stride)) * longest * float(SCALE);
        if (most <= MOST_BOUND && padded > BLOCK)
            attend_bounded(q, stride, longest, out, out_stride, lse);
        else
            attend_any(q, stride, out, out_stride, lse);
    }

private:
    static constexpr int64_t STEPS = (6 * D + DEPTH - 1) / DEPTH, FEATURES = (D + SIDE - 1) / SIDE * SIDE;
    static inline const double SCALE = 1 / std::log(2.0) / std::sqrt(double(D));
    const int64_t length, padded;
    const Scratch<Half> keys, values;  // tiles of SIDE keys a step; of BLOCK keys, SIDE features high and low
    const Scratch<float> scores;       // [keys, SIDE queries], twice
    alignas(64) Int queries[STEPS][SIDE] = {};
    alignas(64) float blocks[4][BLOCK * SIDE];  // weights, scores that are weighed, that will be next, and that come in

    void attend_bounded(const float* q, int64_t stride, float longest, float* out, int64_t out_stride, float* lse) {
        Float squares = read_queries(q, stride, std::min(SIDE, length));
        score(0, blocks[0]);
        score(BLOCK, blocks[1]);
        for (int64_t first = 0, turn = 0; first < length; first += SIDE) {
            const int64_t n = std::min(SIDE, length - first), following = std::min(SIDE, length - first - n);
            const Float most = (Float)_mm512_roundscale_ps(_mm512_sqrt_ps((__m512)squares) * longest, _MM_FROUND_TO_POS_INF);
            const Float base = all(WHOLE) - most;
            Float total{};
            _tile_zero(0);
            if (FEATURES > SIDE) _tile_zero(1);
            for (int64_t key = 0; key < padded; key += BLOCK, turn++) {
                const float* before = blocks[(turn + 3) % 4];
                float *now = blocks[turn % 4], *later = blocks[(turn + 2) % 4];
                if (key + 2 * BLOCK == padded && following) squares = read_queries(q + (first + n) * stride, stride, following);
                const int64_t coming = key + 2 * BLOCK < padded ? key + 2 * BLOCK : key + 2 * BLOCK - padded;
                if (key + BLOCK <= length && (key < coming || following)) {
                    weigh_between(key, coming, before, now, later, base, total);
                } else {
                    if (following) score(coming, later);
                    if (key) gather(key - BLOCK, before);
                    weigh_block(length - key, now, base, total);
                }
            }
            gather(padded - BLOCK, blocks[(turn + 3) % 4]);
            store(lse + first, most * float(std::log(2.0)) + log(total), n);
            finish(n, 1.0f / total, out + first * out_stride, out_stride);
        }
    }

    void attend_any(const float* q, int64_t stride, float* out, int64_t out_stride, float* lse) {
        float *now = scores.get(), *next = now + padded * SIDE;
        read_queries(q, stride, std::min(SIDE, length));
        for (int64_t key = 0; key < padded; key += BLOCK) score(key, now + key * SIDE);
        for (int64_t first = 0; first < length; first += SIDE, std::swap(now, next)) {
            const int64_t n = std::min(SIDE, length - first), following = std::min(SIDE, length - first - n);
            std::fill(now + length * SIDE, now + padded * SIDE, -HUGE_VALF);
            if (following) read_queries(q + (first + n) * stride, stride, following);
            const Float most = greatest(now);
            Float total{};
            _tile_zero(0);
            if (FEATURES > SIDE) _tile_zero(1);
            for (int64_t key = 0; key < padded; key += BLOCK) {
                if (following) score(key, next + key * SIDE);
                weigh(now + key * SIDE, most, total);
                if (key) gather(key - BLOCK, now + (key - BLOCK) * SIDE);  // not what was just written, which tiles would wait for
            }
            gather(padded - BLOCK, now + (padded - BLOCK) * SIDE);
            store(lse + first, most * float(std::log(2.0)) + log(total), n);
            finish(n, 1.0f / total, out + first * out_stride, out_stride);
        }
    }

    // Of the rows' lengths.
    float greatest_square(const float* from, int64_t stride) const {
        float most = 0;
        for (int64_t row = 0; row < length; row++) {
            Float squares{};
            for (int64_t d = 0; d < D; d += SIDE) {
                const Float x = load_below(D - d, from + row * stride + d);
                squares += x * x;
            }
            const float square = sum<float>(squares);
            most = square <= most ? most : square;  // NaN is kept
        }
        return most;
    }

    void read_keys(const float* k, int64_t stride) {
        std::memset(keys.get(), 0, padded * STEPS * DEPTH * sizeof(Half));
        Half row[STEPS * DEPTH] = {};
        for (int64_t key = 0; key < length; key++) {
            write_parts<D>(k + key * stride, row);
            Half* to = keys.get() + key / SIDE * STEPS * ENTRIES + key % SIDE * DEPTH;
            for (int64_t step = 0; step < STEPS; step++) std::memcpy(to + step * ENTRIES, row + step * DEPTH, DEPTH * sizeof(Half));
        }
    }

    void read_values(const float* v, int64_t stride) {
        for (int64_t key = 0; key < padded; key += SIDE)
            for (int64_t feature = 0; feature < FEATURES; feature += SIDE) {
                Float rows[SIDE];
                for (int64_t i = 0; i < SIDE; i++)
                    rows[i] = load_below(key + i < length ? D - feature : 0, v + (key + i) * stride + feature);
                turn<SIDE>(rows);
                Half* to = values.get() + (key / BLOCK * (FEATURES / SIDE) + feature / SIDE) * 2 * ENTRIES + key % BLOCK;
                for (int64_t i = 0; i < SIDE; i++) write(rows[i], ENTRIES, to + i * DEPTH);
            }
    }

    // As columns: a row holds a pair of numbers of each query. Gives the squares of their lengths, in powers of two.
    Float read_queries(const float* q, int64_t stride, int64_t n) {
        const Float scale = all(float(SCALE));
        Float squares{};
        Float parts[3][FEATURES];
        for (int64_t feature = 0; feature < FEATURES; feature += SIDE) {
            Float rows[SIDE];
            for (int64_t i = 0; i < SIDE; i++) rows[i] = load_below(i < n ? D - feature : 0, q + i * stride + feature) * scale;
            turn<SIDE>(rows);
            for (int64_t i = 0; i < SIDE; i++) squares += rows[i] * rows[i];
            for (int64_t i = 0; i < SIDE; i++)
                for (int part = 0; part < 3; part++) {
                    parts[part][feature + i] = rounded(rows[i]);
                    rows[i] -= parts[part][feature + i];
                }
        }
        Int* to = queries[0];
        for (int product = 0; product < 6; product++)
            for (int64_t d = 0; d < D; d += 2) {
                const Float* from = parts[QUERY_PARTS[product]] + d;
                *to++ = (Int)upper_halves(from[0], from[1]);
            }
        return squares;
    }

    // Of the queries with BLOCK keys, in powers of two.
    void score(int64_t key, float* to) const {
        for (int64_t step = 0; step < STEPS; step++) score_step(step, key);
        _tile_stored(2, to, 64);
        _tile_stored(3, to + SIDE * SIDE, 64);
    }

    void score_step(int64_t step, int64_t key) const {
        load_step(step, key);
        multiply_step();
    }

    static void multiply_step() {
        _tile_dpbf16ps(2, 4, 6);
        _tile_dpbf16ps(3, 5, 6);
    }

    void load_step(int64_t step, int64_t key) const {
        const Half* from = keys.get() + key * STEPS * DEPTH + step * ENTRIES;
        if (step == 0) {
            _tile_zero(2);
            _tile_zero(3);
        }
        _tile_loadd(4, from, 64);
        _tile_loadd(5, from + STEPS * ENTRIES, 64);
        _tile_loadd(6, queries[step], 64);
    }

    // Weighs a block while the scores of the one after the next, `coming`, come in and the weights of the one before are used: what these
    // take of the tiles lies between what the exponentials take of the registers, and nothing is asked for before it can be there.
    void weigh_between(int64_t key, int64_t coming, const float* before, float* now, float* later, Float base, Float& total) const {
        static_assert(2 * STEPS <= SIDE - 4);
#pragma GCC unroll 16
        for (int64_t row = 0; row < SIDE; row++) {
            if (row % 2 == 0 && row / 2 < STEPS) load_step(row / 2, coming);
            if (row % 2 == 1 && row / 2 < STEPS) multiply_step();
            if (row == SIDE - 4 && key) gather(key - BLOCK, before);
            if (row == SIDE - 2) _tile_stored(2, later, 64);
            if (row == SIDE - 1) _tile_stored(3, later + SIDE * SIDE, 64);
            weigh_pair(now + 2 * row * SIDE, base, total);
        }
    }

    // Of the last blocks, of which the last of all may have no more than `count` keys.
    static void weigh_block(int64_t count, float* now, Float base, Float& total) {
        for (int64_t row = 0; row < SIDE; row++) {
            float* at = now + 2 * row * SIDE;
            if (2 * row + 1 < count) {
                weigh_pair(at, base, total);
            } else {
                const Float even = 2 * row < count ? exp2_from(load(at), base) : Float{};
                total += even;
                write_weights(even, Float{}, at);
            }
        }
    }

    // Scores of two keys become weights, high and low, in their place.
    static void weigh_pair(float* at, Float base, Float& total) {
        const Float even = exp2_from(load(at), base), odd = exp2_from(load(at + SIDE), base);
        total += even + odd;
        write_weights(even, odd, at);
    }

    static void write_weights(Float even, Float odd, float* at) {
        __m512i high, low;
        split_weights(even, odd, high, low);
        _mm512_store_si512(at, high);
        _mm512_store_si512(at + SIDE, low);
    }

    // Four at a time, so that none waits for the one before.
    Float greatest(const float* from) const {
        Float most[4] = {all(-HUGE_VALF), all(-HUGE_VALF), all(-HUGE_VALF), all(-HUGE_VALF)};
        for (int64_t key = 0; key < padded; key += 4)
            for (int64_t i = 0; i < 4; i++) most[i] = max(most[i], load(from + (key + i) * SIDE));
        return max(max(most[0], most[1]), max(most[2], most[3]));
    }

    static void weigh(float* scores, Float most, Float& total) {
        for (int64_t row = 0; row < SIDE; row++) {
            float* at = scores + 2 * row * SIDE;
            const Float even = exp2_down(load(at) - most), odd = exp2_down(load(at + SIDE) - most);
            total += even + odd;
            write_weights(even, odd, at);
        }
    }

    // Adds BLOCK values by their weights.
    void gather(int64_t key, const float* weights) const {
        const Half* from = values.get() + key * FEATURES * 2;
        _tile_loadd(6, weights, 128);
        _tile_loadd(7, weights + SIDE, 128);
        _tile_loadd(4, from, 64);
        _tile_loadd(5, from + ENTRIES, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(0, 5, 6);
        _tile_dpbf16ps(0, 4, 7);
        if (FEATURES > SIDE) {
            _tile_loadd(4, from + 2 * ENTRIES, 64);
            _tile_loadd(5, from + 3 * ENTRIES, 64);
            _tile_dpbf16ps(1, 4, 6);
            _tile_dpbf16ps(1, 5, 6);
            _tile_dpbf16ps(1, 4, 7);
        }
    }

    static void finish(int64_t n, Float share, float* out, int64_t out_stride) {
        alignas(64) Float rows[FEATURES];
        _tile_stored(0, rows, 64);
        if (FEATURES > SIDE) _tile_stored(1, rows + SIDE, 64);
        for (int64_t feature = 0; feature < FEATURES; feature += SIDE) {
            for (int64_t i = 0; i < SIDE; i++) rows[feature + i] *= share;
            turn<SIDE>(rows + feature);
            for (int64_t i = 0; i < n; i++)
                _mm512_mask_storeu_ps(out + i * out_stride + feature, lanes_below(D - feature), (__m512)rows[feature + i]);
        }
    }
};

#endif
