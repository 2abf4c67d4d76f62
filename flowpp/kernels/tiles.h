// Convolutions on a processor's matrix tiles (Intel AMX), for float.
//
// Tiles multiply bfloat16 and add up in float. Each number x is taken as the sum of two of them, high + low, of 8 bits
// each: what is left is at most 2^-17 x. Of the four products the one of both lows is left out, at most 2^-16 of it
// (Henry, Tang and Heinecke, "Leveraging the bfloat16 artificial intelligence datatype for higher-precision
// computations", 2019). benchmarks/kernels.py measures what that saves.
#pragma once

#include <algorithm>
#include <memory>
#include <new>

#include "lanes.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define FLOWPP_TILES

#include <immintrin.h>

typedef uint16_t Half;  // a bfloat16

constexpr int64_t SIDE = 16, DEPTH = 32, ENTRIES = SIDE * DEPTH;  // rows of a tile, bfloat16s in one, and in all
constexpr int64_t BLOCK = 2 * SIDE;                             // positions, filters or channels computed at once
constexpr int64_t PART = 512;                                   // positions of a 1x1 convolution at a time

inline int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// All eight tiles of this thread, whole, while it lives.
class Tiles {
public:
    Tiles() {
        struct alignas(64) {
            uint8_t palette = 1, first_row = 0, reserved[14] = {};
            uint16_t bytes[16] = {};
            uint8_t rows[16] = {};
        } shape;
        for (int tile = 0; tile < 8; tile++) shape.bytes[tile] = 2 * DEPTH, shape.rows[tile] = SIDE;
        _tile_loadconfig(&shape);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
};

// Memory on a line of the cache, not cleared.
template <class T> class Scratch {
public:
    explicit Scratch(int64_t size) : memory(static_cast<T*>(::operator new(size * sizeof(T), std::align_val_t(64)))) {}
    T* get() const { return memory.get(); }

private:
    struct Free {
        void operator()(T* what) const { ::operator delete(what, std::align_val_t(64)); }
    };
    std::unique_ptr<T, Free> memory;
};

inline __mmask16 lanes_below(int64_t n) { return n >= SIDE ? 0xffff : n <= 0 ? 0 : (1 << n) - 1; }

// Those below n; nothing else is read.
inline Float load_below(int64_t n, const float* from) { return (Float)_mm512_maskz_loadu_ps(lanes_below(n), from); }

// To the nearest bfloat16.
inline Float rounded(Float x) {
    return (Float)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x)), 16);
}

// Numbers in two bfloat16s each.
inline void split(Float x, __m256i& high, __m256i& low) {
    high = (__m256i)_mm512_cvtneps_pbh((__m512)x);
    low = (__m256i)_mm512_cvtneps_pbh((__m512)(x - rounded(x)));
}

// What is convolved: `kernel` x `kernel` in same padding, channels [batch, height, width] of positions to filters.
struct Convolution {
    int64_t batch, height, width, channels, filters, kernel;
    bool elu;     // of concat_elu(x), whose channels are twice those of x
    bool turned;  // for the gradient: weights are [channels, kernel, kernel, filters], and lie the other way round

    // Without a margin positions know nothing of each other: an image of one row then is as long as is good for the cache.
    Convolution in_parts() const {
        const int64_t positions = batch * height * width;
        if (kernel > 1 || positions == 0) return *this;
        const int64_t length = std::min<int64_t>(positions, PART);
        return {(positions + length - 1) / length, 1, length, channels, filters, kernel, elu, turned};
    }
    // The part of `in_parts` at b, of which the last may be shorter, where there are so many positions in all.
    Convolution part(int64_t b, int64_t positions) const {
        return {1, height, std::min(width, (positions - b * height * width) / height), channels, filters, kernel, elu, turned};
    }

    int64_t depth() const { return up_to(channels, DEPTH); }
    int64_t margin() const { return kernel / 2; }
    // Rows of a plane are one margin longer than the image's: it is the right one of a row and the left one of the next.
    int64_t row() const { return width + margin(); }
    int64_t rows() const { return height + 2 * margin(); }
    int64_t outputs() const { return height * row(); }
    int64_t blocks() const { return (outputs() + BLOCK - 1) / BLOCK; }
    // Positions of a plane, with what the last block reads beyond the image.
    int64_t positions() const { return up_to(outputs(), BLOCK) + 2 * margin() * (row() + 1); }
    int64_t plane() const { return positions() * 2 * depth(); }
    int64_t filter_blocks() const { return (filters + BLOCK - 1) / BLOCK; }
    int64_t steps() const { return kernel * kernel * (depth() / DEPTH); }
    int64_t weights() const { return filter_blocks() * steps() * 4 * ENTRIES; }
};

// Numbers of two rows in turns, as tiles take them on the right: pairs of what is summed.
inline __m512i paired(__m256i even, __m256i odd) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

// weight [filters, kernel, kernel, channels] of SIDE filters, one place in the kernel and DEPTH channels -> two tiles.
inline void pack_tile(const Convolution& c, int64_t filter, int64_t place, int64_t channel, const float* weight, Int* high, Int* low) {
    const int64_t places = c.kernel * c.kernel;
    for (int64_t row = 0; row < SIDE; row++) {
        __m256i h[2], l[2];
        for (int64_t part = 0; part < 2; part++)
            if (c.turned) {  // rows of pairs of channels
                const int64_t at = channel + 2 * row + part;
                split(load_below(at < c.channels ? c.filters - filter : 0, weight + (at * places + places - 1 - place) * c.filters + filter), h[part], l[part]);
            } else {  // rows of filters
                const int64_t at = filter + row, first = channel + part * SIDE;
                split(load_below(at < c.filters ? c.channels - first : 0, weight + (at * places + place) * c.channels + first), h[part], l[part]);
            }
        high[row] = (Int)(c.turned ? paired(h[0], h[1]) : _mm512_inserti64x4(_mm512_castsi256_si512(h[0]), h[1], 1));
        low[row] = (Int)(c.turned ? paired(l[0], l[1]) : _mm512_inserti64x4(_mm512_castsi256_si512(l[0]), l[1], 1));
    }
    if (!c.turned) turn<SIDE>(high), turn<SIDE>(low);
}

// The weights of a block of filters: for each place in the kernel and DEPTH channels four tiles, high of the first SIDE
// filters and of the others, then low.
inline void pack(const Convolution& c, int64_t block, const float* weight, Half* to) {
    to += block * c.steps() * 4 * ENTRIES;
    for (int64_t place = 0; place < c.kernel * c.kernel; place++)
        for (int64_t channel = 0; channel < c.depth(); channel += DEPTH, to += 4 * ENTRIES)
            for (int64_t side = 0; side < 2; side++) {
                Int high[SIDE], low[SIDE];
                pack_tile(c, block * BLOCK + side * SIDE, place, channel, weight, high, low);
                std::memcpy(to + side * ENTRIES, high, sizeof high);
                std::memcpy(to + (2 + side) * ENTRIES, low, sizeof low);
            }
}

inline void write(Float x, int64_t depth, Half* to) {
    __m256i high, low;
    split(x, high, low);
    _mm256_store_si256(reinterpret_cast<__m256i*>(to), high);
    _mm256_store_si256(reinterpret_cast<__m256i*>(to + depth), low);
}

// One position of a plane: high and then low of each channel, zero beyond the last.
inline void write_position(const Convolution& c, const float* x, Half* to) {
    const int64_t depth = c.depth();
    int64_t channel = 0;
    if (c.elu) {  // only of halves that fill registers
        const int64_t half = c.channels / 2;
        for (; channel < half; channel += SIDE) {
            const Float value = load(x + channel), lower = exp_down(-abs(value)) - 1;
            write(value > 0 ? value : lower, depth, to + channel);
            write(value > 0 ? lower : -value, depth, to + half + channel);
        }
        channel = c.channels;
    }
    for (; channel < depth; channel += SIDE)
        write(load_below(c.channels - channel, x + channel), depth, to + channel);
}

// The rows from first to last of a plane; the first and last `margin` rows are zero, as what follows the plane.
inline void write_rows(const Convolution& c, const float* x, int64_t first, int64_t last, Half* plane) {
    const int64_t margin = c.margin(), size = 2 * c.depth();
    for (int64_t row = first; row < last; row++) {
        Half* to = plane + row * c.row() * size;
        const int64_t y = row - margin;
        if (y < 0 || y >= c.height) {
            std::memset(to, 0, c.row() * size * sizeof(Half));
            continue;
        }
        std::memset(to, 0, margin * size * sizeof(Half));
        const int64_t channels = c.elu ? c.channels / 2 : c.channels;
        for (int64_t place = 0; place < c.width; place++)
            write_position(c, x + (y * c.width + place) * channels, to + (margin + place) * size);
    }
    const int64_t written = c.rows() * c.row() * size;
    if (last == c.rows()) std::memset(plane + written, 0, (c.plane() - written) * sizeof(Half));
}

// Writes the plane of an image a few positions at a time: between products, which the tiles are long busy with.
class ComingPlane {
public:
    ComingPlane() = default;
    ComingPlane(const Convolution& c, const float* x, Half* plane) : c(c), x(x), to(plane), left(c.positions()), column(-c.margin()), row(-c.margin()) {}

    int64_t positions() const { return left; }

    void write(int64_t count) {
        const int64_t size = 2 * c.depth(), channels = c.elu ? c.channels / 2 : c.channels;
        for (count = std::min(count, left), left -= count; count > 0; count--, to += size) {
            if (row < 0 || row >= c.height || column < 0) {
                std::memset(to, 0, size * sizeof(Half));
            } else {
                write_position(c, x, to);
                x += channels;
            }
            if (++column == c.width) column = -c.margin(), row++;
        }
    }

private:
    Convolution c{};
    const float* x = nullptr;
    Half* to = nullptr;
    int64_t left = 0, column = 0, row = 0;
};

// What was found of BLOCK filters at BLOCK positions, on its way to where it belongs: a few positions at a time, likewise.
class Found {
public:
    alignas(64) float values[BLOCK * BLOCK];

    // Of the filters from `filter` on, at n positions of the plane from `start` on.
    void begin(const Convolution& c, int64_t start, int64_t n, int64_t filter, float* out) {
        const int64_t filters = std::min(BLOCK, c.filters - filter);
        first_ones = lanes_below(filters), others = lanes_below(filters - SIDE);
        column = start % c.row();
        to = out + (start / c.row() * c.width + std::min(column, c.width)) * c.filters + filter;  // beyond a row the next one follows
        row = c.row(), width = c.width, stride = c.filters;
        from = values, end = values + n * BLOCK;
    }

    void write(int64_t count) {
        for (; count > 0 && from < end; count--, from += BLOCK) {
            if (column < width) {
                _mm512_mask_storeu_ps(to, first_ones, (__m512)load(from));
                _mm512_mask_storeu_ps(to + SIDE, others, (__m512)load(from + SIDE));
                to += stride;
            }
            if (++column == row) column = 0;
        }
    }

private:
    const float *from = nullptr, *end = nullptr;
    float* to = nullptr;
    int64_t column = 0, row = 0, width = 0, stride = 0;
    __mmask16 first_ones = 0, others = 0;
};

// Tiles 0 to 3 gather what 4 and 5 on the left and 6 and 7 on the right have in common; unless WHOLE, 4 alone.
template <bool WHOLE> inline void products() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (WHOLE) {
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

// BLOCK filters at BLOCK positions (or SIDE, unless WHOLE), into rows of `filters`. `meanwhile` is called at each of c.steps().
template <bool WHOLE, class Meanwhile> void multiply(const Convolution& c, const Half* at, const Half* weights, const float* bias,
                                                     float* out, int64_t filters, Meanwhile meanwhile) {
    const int64_t depth = c.depth(), stride = 2 * depth * sizeof(Half), below = SIDE * 2 * depth;
    _tile_loadd(0, bias, 0);
    _tile_loadd(1, bias + SIDE, 0);
    if (WHOLE) {
        _tile_loadd(2, bias, 0);
        _tile_loadd(3, bias + SIDE, 0);
    }
    for (int64_t dy = 0; dy < c.kernel; dy++)
        for (int64_t dx = 0; dx < c.kernel; dx++) {
            const Half* x = at + (dy * c.row() + dx) * 2 * depth;
            for (int64_t chunk = 0; chunk < depth; chunk += DEPTH, weights += 4 * ENTRIES) {
                _tile_loadd(6, weights, 64);
                _tile_loadd(7, weights + ENTRIES, 64);
                _tile_loadd(4, x + depth + chunk, stride);
                if (WHOLE) _tile_loadd(5, x + depth + chunk + below, stride);
                products<WHOLE>();  // low of x, high of the weights
                _tile_loadd(4, x + chunk, stride);
                if (WHOLE) _tile_loadd(5, x + chunk + below, stride);
                products<WHOLE>();  // both high
                _tile_loadd(6, weights + 2 * ENTRIES, 64);
                _tile_loadd(7, weights + 3 * ENTRIES, 64);
                products<WHOLE>();  // high of x, low of the weights
                meanwhile();
            }
        }
    _tile_stored(0, out, filters * sizeof(float));
    _tile_stored(1, out + SIDE, filters * sizeof(float));
    if (WHOLE) {
        _tile_stored(2, out + SIDE * filters, filters * sizeof(float));
        _tile_stored(3, out + SIDE * filters + SIDE, filters * sizeof(float));
    }
}

// The blocks of positions from first to last of an image, given its plane: out [height, width, filters]. Meanwhile a plane is written.
inline void convolve_blocks(const Convolution& c, const Half* plane, const Half* weights, const float* bias, int64_t first, int64_t last,
                            float* out, ComingPlane& coming) {
    Found found[2];
    const int64_t steps = (last - first) * c.filter_blocks() * c.steps(), share = steps ? (coming.positions() + steps - 1) / steps : 0;
    const int64_t rows = (BLOCK + c.steps() - 1) / c.steps();
    for (int64_t block = first, turn = 0; block < last; block++) {
        const int64_t start = block * BLOCK, n = std::min(BLOCK, c.outputs() - start);
        const Half* at = plane + start * 2 * c.depth();
        for (int64_t f = 0; f < c.filter_blocks(); f++, turn = 1 - turn) {
            const Half* packed = weights + f * c.steps() * 4 * ENTRIES;
            Found &now = found[turn], &before = found[1 - turn];
            const auto meanwhile = [&] { before.write(rows), coming.write(share); };
            if (n == BLOCK && c.margin() == 0 && (f + 1) * BLOCK <= c.filters) {
                multiply<true>(c, at, packed, bias + f * BLOCK, out + start * c.filters + f * BLOCK, c.filters, meanwhile);
                continue;
            }
            n > SIDE ? multiply<true>(c, at, packed, bias + f * BLOCK, now.values, BLOCK, meanwhile)
                     : multiply<false>(c, at, packed, bias + f * BLOCK, now.values, BLOCK, meanwhile);
            now.begin(c, start, n, f * BLOCK, out);
        }
    }
    for (Found& each : found) each.write(BLOCK);
    coming.write(coming.positions());
}

// What the gradient of the weights is summed from: of one image, for all places in the kernel.
struct Summed {
    Scratch<Half> plane, pairs, grads;

    explicit Summed(const Convolution& c)
        : plane(c.plane()), pairs(2 * c.plane()), grads(c.filter_blocks() * BLOCK * up_to(c.outputs(), BLOCK) * 2) {}

    // Pairs of positions of the plane, from `first` to `last`: of each phase, the even and the odd ones, a plane.
    void pair(const Convolution& c, int64_t first, int64_t last) {
        const int64_t size = 2 * c.depth();
        for (int64_t pair = first; pair < last; pair++)
            for (int64_t phase = 0; phase < (c.kernel > 1 ? 2 : 1); phase++) {
                if (2 * pair + phase + 1 >= c.positions()) continue;
                const Half* from = plane.get() + (2 * pair + phase) * size;
                Half* to = pairs.get() + phase * c.plane() + pair * 2 * size;
                for (int64_t at = 0; at < size; at += SIDE) {
                    const auto row = [&](int64_t position) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(from + position * size + at)); };
                    _mm512_store_si512(to + 2 * at, paired(row(0), row(1)));
                }
            }
    }

    // The gradient [height, width, filters] of the results, turned about: tiles of SIDE filters and DEPTH positions, high
    // and low, of the blocks of positions from first to last. Zero where positions are none of the image's.
    void turn_grads(const Convolution& c, const float* grad, int64_t first, int64_t last) {
        for (int64_t block = first; block < last; block++)
            for (int64_t filter = 0; filter < c.filter_blocks() * BLOCK; filter += SIDE) {
                Half* to = grads.get() + (filter / SIDE * c.blocks() + block) * 2 * ENTRIES;
                for (int64_t part = 0; part < 2; part++) {
                    Float rows[SIDE];
                    int64_t y = (block * BLOCK + part * SIDE) / c.row(), x = (block * BLOCK + part * SIDE) % c.row();
                    for (int64_t i = 0; i < SIDE; i++) {
                        const bool within = y < c.height && x < c.width;
                        rows[i] = load_below(within ? c.filters - filter : 0, grad + (y * c.width + x) * c.filters + filter);
                        if (++x == c.row()) x = 0, y++;
                    }
                    turn<SIDE>(rows);
                    for (int64_t i = 0; i < SIDE; i++) write(rows[i], ENTRIES, to + i * DEPTH + part * SIDE);
                }
            }
    }
};

// Adds an image's part of a block of the gradient of the weights, [BLOCK filters, BLOCK channels] of one place.
inline void add_products(const Convolution& c, const Summed& summed, int64_t filter, int64_t place, int64_t channel, float* sums) {
    const int64_t shift = place / c.kernel * c.row() + place % c.kernel, size = 4 * c.depth(), depth = 2 * c.depth();
    const Half* x = summed.pairs.get() + shift % 2 * c.plane() + shift / 2 * size + 2 * channel;
    const Half* g = summed.grads.get() + filter / SIDE * c.blocks() * 2 * ENTRIES;
    const int64_t other = c.blocks() * 2 * ENTRIES, stride = size * sizeof(Half), row = BLOCK * sizeof(float);
    _tile_loadd(0, sums, row);
    _tile_loadd(1, sums + SIDE, row);
    _tile_loadd(2, sums + SIDE * BLOCK, row);
    _tile_loadd(3, sums + SIDE * BLOCK + SIDE, row);
    for (int64_t block = 0; block < c.blocks(); block++, x += SIDE * size, g += 2 * ENTRIES) {
        _tile_loadd(4, g + ENTRIES, 64);
        _tile_loadd(5, g + ENTRIES + other, 64);
        _tile_loadd(6, x, stride);
        _tile_loadd(7, x + 2 * SIDE, stride);
        products<true>();  // low of the gradient, high of x
        _tile_loadd(4, g, 64);
        _tile_loadd(5, g + other, 64);
        products<true>();  // both high
        _tile_loadd(6, x + depth, stride);
        _tile_loadd(7, x + depth + 2 * SIDE, stride);
        products<true>();  // high of the gradient, low of x
    }
    _tile_stored(0, sums, row);
    _tile_stored(1, sums + SIDE, row);
    _tile_stored(2, sums + SIDE * BLOCK, row);
    _tile_stored(3, sums + SIDE * BLOCK + SIDE, row);
}

#endif
