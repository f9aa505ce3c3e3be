// Kernels of the solvers: plain C ABI, no torch, no threads of their own. Every function works on a range of rows that
// the caller owns, so that any number of threads may call it at once, and gives the same result for any such cut.
//
// Arithmetic is that of the torch code beside it (round half to even, no contraction into fused multiply-adds), so that
// codes and values are equal bit for bit; only the order of sums inside the range search differs.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common.h"

namespace {

constexpr int LANES = 32;

// The float32 value of x rounded to float16 (to nearest, ties to even); 0 <= x <= 65504.
INLINE float half_value(float x) {
    if (x < 6.103515625e-05f) return rintf(x * 16777216.0f) / 16777216.0f;  // subnormal: steps of 2**-24
    uint32_t bits = to_bits(x);
    bits += 0x0fff + ((bits >> 13) & 1);
    return from_bits(bits & ~0x1fffu);
}

// Int.stored_scale: positive, finite, subnormal ones rounded up; 1 for 0.
INLINE float stored_scale(float scale) {
    float x = scale > 0 ? scale : 1.0f;
    x = x < 5.9604645e-08f ? 5.9604645e-08f : x > 65504.0f ? 65504.0f : x;
    float half = half_value(x);
    if (half < 6.103515625e-05f && half < scale) half += 5.9604645e-08f;
    return half;
}

struct Range { float scale, zero; };

// Int.from_range for one group.
INLINE Range from_range(float low, float high, int bits, int kind) {
    const float top = float((1 << bits) - 1);
    if (kind == 1) {  // symmetric
        float most = -low > high ? -low : high;
        return {stored_scale(most / float((1 << (bits - 1)) - 1)), float(1 << (bits - 1))};
    }
    float scale = stored_scale(high / top - low / top);
    float zero = -low / scale;
    zero = zero < 0 ? 0 : zero > top ? top : zero;
    if (kind == 0) return {scale, rintf(zero)};
    return {scale, half_value(zero)};
}

// |error| ** norm by scaling the bits of the error; exact for norm 2.
INLINE float power(float error, float norm, float shift, bool square) {
    if (square) return error * error;
    float bits = float(int32_t(to_bits(fabsf(error)))) * norm + shift;
    bits = bits < 0 ? 0 : bits > 2130706432.0f ? 2130706432.0f : bits;
    return from_bits(uint32_t(int32_t(bits)));
}

// sum weight * |Q(w) - w| ** norm over one group, in steps of the scale.
INLINE float group_error(const float* w, const float* weight, int64_t n, Range range, float top, float norm,
                         bool square, bool weighted) {
    const float inverse = 1 / range.scale, zero = range.zero, shift = (1 - norm) * float(127 << 23);
    float sums[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int lane = 0; lane < LANES; lane++) {
            float x = w[i + lane] * inverse + zero;
            float code = rintf(x);
            code = code < 0 ? 0 : code > top ? top : code;
            float e = power(x - code, norm, shift, square);
            sums[lane] += weighted ? e * weight[i + lane] : e;
        }
    for (int lane = 0; i < n; i++, lane++) {
        float x = w[i] * inverse + zero;
        float code = rintf(x);
        code = code < 0 ? 0 : code > top ? top : code;
        float e = power(x - code, norm, shift, square);
        sums[lane] += weighted ? e * weight[i] : e;
    }
    for (int width = LANES / 2; width; width /= 2)
        for (int lane = 0; lane < width; lane++) sums[lane] += sums[lane + width];
    return sums[0];
}

// Widest plane first (weights/packing.py).
INLINE int next_plane(int bits, int above) {
    for (int width = above / 2; width; width /= 2)
        if (bits & width) return width;
    return 0;
}

INLINE void pack_chunk(const uint8_t* codes, uint8_t* out, int length, int bits) {
    int shift = 0;
    for (int width = next_plane(bits, 16); width; width = next_plane(bits, width)) {
        const int bytes = length * width / 8, mask = (1 << width) - 1;
        if (width == 1) {
            for (int j = 0; j < bytes; j++) {
                uint8_t value = 0;
                for (int k = 0; k < 8; k++) value |= uint8_t(((codes[8 * j + k] >> shift) & 1) << k);
                out[j] = value;
            }
        } else {
            for (int j = 0; j < bytes; j++) out[j] = uint8_t((codes[j] >> shift) & mask);
            for (int k = 1; k < 8 / width; k++)
                for (int j = 0; j < bytes; j++)
                    out[j] |= uint8_t(((codes[j + k * bytes] >> shift) & mask) << (k * width));
        }
        out += bytes;
        shift += width;
    }
}

INLINE void unpack_chunk(const uint8_t* packed, uint8_t* codes, int length, int bits) {
    std::memset(codes, 0, size_t(length));
    int shift = 0;
    for (int width = next_plane(bits, 16); width; width = next_plane(bits, width)) {
        const int bytes = length * width / 8, mask = (1 << width) - 1;
        if (width == 1) {
            for (int j = 0; j < bytes; j++)
                for (int k = 0; k < 8; k++) codes[8 * j + k] |= uint8_t(((packed[j] >> k) & 1) << shift);
        } else {
            for (int k = 0; k < 8 / width; k++)
                for (int j = 0; j < bytes; j++)
                    codes[j + k * bytes] |= uint8_t(((packed[j] >> (k * width)) & mask) << shift);
        }
        packed += bytes;
        shift += width;
    }
}

}  // namespace

extern "C" {

// Least and largest weight of each group, 0 included (Int.extent): low, high (rows, groups).
CLONES void slimwright_extent(const float* w, int64_t rows, int64_t columns, int64_t group, float* low, float* high) {
    const int64_t groups = (columns + group - 1) / group;
    for (int64_t row = 0; row < rows; row++)
        for (int64_t g = 0; g < groups; g++) {
            const int64_t start = g * group, n = columns - start < group ? columns - start : group;
            const float* x = w + row * columns + start;
            float least[LANES] = {0}, most[LANES] = {0};
            int64_t i = 0;
            for (; i + LANES <= n; i += LANES)
                for (int lane = 0; lane < LANES; lane++) {
                    least[lane] = x[i + lane] < least[lane] ? x[i + lane] : least[lane];
                    most[lane] = x[i + lane] > most[lane] ? x[i + lane] : most[lane];
                }
            for (int lane = 0; i < n; i++, lane++) {
                least[lane] = x[i] < least[lane] ? x[i] : least[lane];
                most[lane] = x[i] > most[lane] ? x[i] : most[lane];
            }
            for (int lane = 1; lane < LANES; lane++) {
                least[0] = least[lane] < least[0] ? least[lane] : least[0];
                most[0] = most[lane] > most[0] ? most[lane] : most[0];
            }
            low[row * groups + g] = least[0];
            high[row * groups + g] = most[0];
        }
}

// Shrinks the ranges low, high (rows, groups) of w (rows, columns) in place: weights/ranges.py says how.
// kind: 0 integer zero point, 1 symmetric, 2 real zero point. weight: (columns) or null.
CLONES void slimwright_shrink_ranges(const float* w, int64_t rows, int64_t columns, int64_t group, int bits, int kind,
                                     int steps, int last, float norm, const float* weight,
                                     float* low, float* high) {
    const float top = float((1 << bits) - 1);
    const bool square = norm == 2.0f;
    const int64_t groups = (columns + group - 1) / group;
    for (int64_t row = 0; row < rows; row++)
        for (int64_t g = 0; g < groups; g++) {
            const int64_t start = g * group, n = columns - start < group ? columns - start : group;
            const float* x = w + row * columns + start;
            const float* own = weight ? weight + start : nullptr;
            const float least = low[row * groups + g], most = high[row * groups + g];
            int best = 0;
            float best_error = INFINITY;
            auto trial = [&](int index) __attribute__((always_inline)) {
                const float shrink = 1 - float(index) / float(steps);
                const Range range = from_range(least * shrink, most * shrink, bits, kind);
                const float factor = norm == 2.0f ? range.scale * range.scale : powf(range.scale, norm);
                const float error = factor * (square ? weight ? group_error(x, own, n, range, top, norm, true, true)
                                                              : group_error(x, own, n, range, top, norm, true, false)
                                                     : weight ? group_error(x, own, n, range, top, norm, false, true)
                                                              : group_error(x, own, n, range, top, norm, false, false));
                const bool better = error < best_error || (error == best_error && index < best);
                if (better) { best_error = error; best = index; }
                return better;
            };
            int misses = 0;
            for (int index = 0; index <= last && misses < 2; index += 8) misses = trial(index) ? 0 : misses + 1;
            for (int stride = 4; stride; stride /= 2) {
                const int centre = best;
                trial(centre - stride < 0 ? 0 : centre - stride);
                trial(centre + stride > last ? last : centre + stride);
            }
            const float shrink = 1 - float(best) / float(steps);
            low[row * groups + g] = least * shrink;
            high[row * groups + g] = most * shrink;
        }
}

// Codes of w (rows, columns) with scale and zero (rows, groups); zero null: every zero point is `middle`.
// shifted: the zero point is added before rounding (real ones), else after.
CLONES void slimwright_int_encode(const float* w, int64_t rows, int64_t columns, int64_t group, int bits,
                                  const float* scale, const float* zero, float middle, int shifted, uint8_t* codes) {
    const float top = float((1 << bits) - 1);
    const int64_t groups = (columns + group - 1) / group;
    for (int64_t row = 0; row < rows; row++)
        for (int64_t g = 0; g < groups; g++) {
            const int64_t start = g * group, n = columns - start < group ? columns - start : group;
            const float* x = w + row * columns + start;
            uint8_t* out = codes + row * columns + start;
            const float s = scale[row * groups + g], z = zero ? zero[row * groups + g] : middle;
            if (shifted)
                for (int64_t i = 0; i < n; i++) {
                    float code = rintf(x[i] / s + z);
                    out[i] = uint8_t(int(code < 0 ? 0 : code > top ? top : code));
                }
            else
                for (int64_t i = 0; i < n; i++) {
                    float code = rintf(x[i] / s) + z;
                    out[i] = uint8_t(int(code < 0 ? 0 : code > top ? top : code));
                }
        }
}

// Values (rows, columns) of codes: (code - zero) * scale.
CLONES void slimwright_int_decode(const uint8_t* codes, int64_t rows, int64_t columns, int64_t group,
                                  const float* scale, const float* zero, float middle, float* values) {
    const int64_t groups = (columns + group - 1) / group;
    for (int64_t row = 0; row < rows; row++)
        for (int64_t g = 0; g < groups; g++) {
            const int64_t start = g * group, n = columns - start < group ? columns - start : group;
            const uint8_t* in = codes + row * columns + start;
            float* out = values + row * columns + start;
            const float s = scale[row * groups + g], z = zero ? zero[row * groups + g] : middle;
            for (int64_t i = 0; i < n; i++) out[i] = (float(in[i]) - z) * s;
        }
}

// Bit planes in chunks of 64 (weights/packing.py); out has (columns + 7) / 8 * bits bytes a row.
CLONES void slimwright_pack(const uint8_t* codes, int64_t rows, int64_t columns, int bits, uint8_t* out) {
    const int64_t row_bytes = (columns + 7) / 8 * bits;
    for (int64_t row = 0; row < rows; row++) {
        const uint8_t* in = codes + row * columns;
        uint8_t* to = out + row * row_bytes;
        int64_t i = 0;
        for (; i + 64 <= columns; i += 64, to += 8 * bits) pack_chunk(in + i, to, 64, bits);
        if (i < columns) {
            uint8_t rest[64] = {0};
            std::memcpy(rest, in + i, size_t(columns - i));
            pack_chunk(rest, to, int((columns - i + 7) / 8 * 8), bits);
        }
    }
}

CLONES void slimwright_unpack(const uint8_t* packed, int64_t rows, int64_t columns, int bits, int64_t stride,
                              uint8_t* codes) {
    for (int64_t row = 0; row < rows; row++) {
        const uint8_t* in = packed + row * stride;
        uint8_t* to = codes + row * columns;
        int64_t i = 0;
        for (; i + 64 <= columns; i += 64, in += 8 * bits) unpack_chunk(in, to + i, 64, bits);
        if (i < columns) {
            uint8_t rest[128];
            unpack_chunk(in, rest, int((columns - i + 7) / 8 * 8), bits);
            std::memcpy(to + i, rest, size_t(columns - i));
        }
    }
}

// Sum of (a - b)² and of a², in double: errors[0], errors[1].
CLONES void slimwright_squared_error(const float* a, const float* b, int64_t n, double* errors) {
    double difference[LANES / 4] = {0}, norm[LANES / 4] = {0};
    int64_t i = 0;
    for (; i + LANES / 4 <= n; i += LANES / 4)
        for (int lane = 0; lane < LANES / 4; lane++) {
            const double x = a[i + lane], e = double(b[i + lane] - a[i + lane]);
            difference[lane] += e * e;
            norm[lane] += x * x;
        }
    for (int lane = 0; i < n; i++, lane++) {
        const double x = a[i], e = double(b[i] - a[i]);
        difference[lane] += e * e;
        norm[lane] += x * x;
    }
    for (int width = LANES / 8; width; width /= 2)
        for (int lane = 0; lane < width; lane++) {
            difference[lane] += difference[lane + width];
            norm[lane] += norm[lane + width];
        }
    errors[0] = difference[0];
    errors[1] = norm[0];
}

// One block of GPTQ: rounds the columns of block (columns, rows) one after the other into rounded (columns, rows) and
// moves those still to come by upper (columns, columns), the block of U. step, offset: (blocks, rows), of which column i
// takes row index[i]; table: ascending levels, or null for the integers 0..top.
CLONES void slimwright_feedback(float* block, int64_t columns, int64_t rows, const float* upper, const float* step,
                                const float* offset, const int64_t* index, const float* table, int64_t levels,
                                float top, float* rounded) {
    constexpr int64_t WIDTH = 64;
    float error[WIDTH];
    for (int64_t first = 0; first < rows; first += WIDTH) {
        const int64_t width = rows - first < WIDTH ? rows - first : WIDTH;
        for (int64_t i = 0; i < columns; i++) {
            const float* current = block + i * rows + first;
            float* out = rounded + i * rows + first;
            const float* s = step + index[i] * rows + first;
            const float* o = offset ? offset + index[i] * rows + first : nullptr;
            const float pivot = upper[i * columns + i];
            if (table) {
                for (int64_t r = 0; r < width; r++) {
                    const float unit = s[r] == 0 ? 0 : (current[r] - (o ? o[r] : 0)) / s[r];
                    int64_t low = 0, high = levels - 1;  // the first level whose upper midpoint is not below unit
                    while (low < high) {
                        const int64_t middle = (low + high) / 2;
                        if ((table[middle] + table[middle + 1]) / 2 < unit) low = middle + 1;
                        else high = middle;
                    }
                    out[r] = table[low] * s[r] + (o ? o[r] : 0);
                }
            } else if (o) {
                for (int64_t r = 0; r < width; r++) {
                    float code = s[r] == 0 ? 0 : rintf((current[r] - o[r]) / s[r]);
                    code = code < 0 ? 0 : code > top ? top : code;
                    out[r] = code * s[r] + o[r];
                }
            } else {
                for (int64_t r = 0; r < width; r++) {
                    float code = s[r] == 0 ? 0 : rintf(current[r] / s[r]);
                    code = code < 0 ? 0 : code > top ? top : code;
                    out[r] = code * s[r];
                }
            }
            for (int64_t r = 0; r < width; r++) error[r] = (current[r] - out[r]) / pivot;
            for (int64_t k = i + 1; k < columns; k++) {
                const float u = upper[i * columns + k];
                float* later = block + k * rows + first;
                for (int64_t r = 0; r < width; r++) later[r] -= u * error[r];
            }
        }
    }
}

}  // extern "C"
