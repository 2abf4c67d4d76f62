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

// One head of one image at a time. SIDE queries are weighed while the scores of the next come in, so that
// tiles and exponentials can be computed side by side.
template <int D> class TileAttention {
public:
    explicit TileAttention(int64_t length)
        : length(length), padded(up_to(length, BLOCK)), keys(padded * STEPS * DEPTH), values(padded * FEATURES * 2), scores(2 * padded * SIDE) {}

    // out [length, D] and logsumexp [length], of rows of q, k and v `stride` apart.
    void attend(const float* q, const float* k, const float* v, int64_t stride, float* out, int64_t out_stride, float* lse) {
        read_keys(k, stride);
        read_values(v, stride);
        float *now = scores.get(), *next = now + padded * SIDE;
        read_queries(q, stride, std::min(SIDE, length));
        for (int64_t key = 0; key < padded; key += BLOCK) score(key, now);
        for (int64_t first = 0; first < length; first += SIDE, std::swap(now, next)) {
            const int64_t n = std::min(SIDE, length - first), following = std::min(SIDE, length - first - n);
            std::fill(now + length * SIDE, now + padded * SIDE, -HUGE_VALF);
            if (following) read_queries(q + (first + n) * stride, stride, following);
            const Float most = greatest(now);
            Float total{};
            _tile_zero(0);
            if (FEATURES > SIDE) _tile_zero(1);
            for (int64_t key = 0; key < padded; key += BLOCK) {
                if (following) score(key, next);
                weigh(key, now, most, total);
                if (key) gather(key - BLOCK, now);  // not what was just written, which tiles would wait for
            }
            gather(padded - BLOCK, now);
            store(lse + first, most * float(std::log(2.0)) + log(total), n);
            finish(n, 1.0f / total, out + first * out_stride, out_stride);
        }
    }

private:
    static constexpr int64_t STEPS = (6 * D + DEPTH - 1) / DEPTH, FEATURES = (D + SIDE - 1) / SIDE * SIDE;
    const int64_t length, padded;
    const Scratch<Half> keys, values;  // tiles of SIDE keys a step; of BLOCK keys, SIDE features high and low
    const Scratch<float> scores;       // [keys, SIDE queries], twice
    alignas(64) Int queries[STEPS][SIDE] = {};

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

    // As columns: a row holds a pair of numbers of each query.
    void read_queries(const float* q, int64_t stride, int64_t n) {
        const Float scale = all(float(1 / std::log(2.0) / std::sqrt(double(D))));
        Float parts[3][FEATURES];
        for (int64_t feature = 0; feature < FEATURES; feature += SIDE) {
            Float rows[SIDE];
            for (int64_t i = 0; i < SIDE; i++) rows[i] = load_below(i < n ? D - feature : 0, q + i * stride + feature) * scale;
            turn<SIDE>(rows);
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
    }

    // Of the queries with BLOCK keys, in powers of two.
    void score(int64_t key, float* to) const {
        const Half* from = keys.get() + key * STEPS * DEPTH;
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t step = 0; step < STEPS; step++) {
            _tile_loadd(4, from + step * ENTRIES, 64);
            _tile_loadd(5, from + (STEPS + step) * ENTRIES, 64);
            _tile_loadd(6, queries[step], 64);
            _tile_dpbf16ps(2, 4, 6);
            _tile_dpbf16ps(3, 5, 6);
        }
        _tile_stored(2, to + key * SIDE, 64);
        _tile_stored(3, to + (key + SIDE) * SIDE, 64);
    }

    // Four at a time, so that none waits for the one before.
    Float greatest(const float* from) const {
        Float most[4] = {all(-HUGE_VALF), all(-HUGE_VALF), all(-HUGE_VALF), all(-HUGE_VALF)};
        for (int64_t key = 0; key < padded; key += 4)
            for (int64_t i = 0; i < 4; i++) most[i] = max(most[i], load(from + (key + i) * SIDE));
        return max(max(most[0], most[1]), max(most[2], most[3]));
    }

    // Scores become weights, in their place: of two keys high, and low.
    static void weigh(int64_t key, float* scores, Float most, Float& total) {
        for (int64_t row = 0; row < SIDE; row++) {
            float* at = scores + (key + 2 * row) * SIDE;
            const Float even = exp2_down(load(at) - most), odd = exp2_down(load(at + SIDE) - most);
            total += even + odd;
            __m512i high, low;
            split_weights(even, odd, high, low);
            _mm512_store_si512(at, high);
            _mm512_store_si512(at + SIDE, low);
        }
    }

    // Adds BLOCK values by their weights.
    void gather(int64_t key, const float* weights) const {
        const Half* from = values.get() + key * FEATURES * 2;
        _tile_loadd(6, weights + key * SIDE, 128);
        _tile_loadd(7, weights + (key + 1) * SIDE, 128);
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
