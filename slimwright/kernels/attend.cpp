// The key and value cache of one attention layer, and attention of one new token over it. Plain C ABI, no torch.
//
// Threads are those of the caller's OpenMP runtime, whose `GOMP_parallel` it hands over: a second pool would fight with
// torch's for the cores. Work is cut by 256 tokens whatever the number of threads, so that results do not depend on it.
//
// Layout. Tokens t of a window of `window` slots lie in slot t % window in the model's own dtype. With bits < 16 and
// `length` tokens, the keys before the newest one's block of `window` tokens and the values before the newest `window`
// are packed. With bits 16 nothing is, and a window shorter than the tokens serves sliding attention. Codes come in
// tiles of 32: byte i of a tile of 4 * bits bytes holds the codes i, i + n, i + 2n ... (n = 4 * bits) from its low bits
// up, a tile of keys is 32 tokens of one channel, a tile of values 32 channels of one token. value = low + scale * code.

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "attend.h"
#include "common.h"

namespace {

constexpr int64_t TILE = 32, SPLIT = 256, LANES = 16;
constexpr float NOTHING = -3.0e38f;
enum Dtype { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
enum Error { OK = 0, BAD_SHAPE = 1, FULL = 2, NO_MEMORY = 3 };

// A finite float16, subnormal ones too, by arithmetic that vectorizes.
INLINE float half_to_float(uint16_t half) {
    const float magnitude = from_bits(uint32_t(half & 0x7fff) << 13) * from_bits(0x77800000u);  // 2**112
    return from_bits(to_bits(magnitude) | (uint32_t(half & 0x8000) << 16));
}

// To nearest, ties to even; what is larger than 65504 becomes 65504.
INLINE uint16_t float_to_half(float x) {
    const uint16_t sign = uint16_t((to_bits(x) >> 16) & 0x8000);
    float magnitude = std::fabs(x);
    if (!(magnitude < 65504.0f)) return sign | 0x7bff;
    if (magnitude < 6.103515625e-05f) return sign | uint16_t(rintf(magnitude * 16777216.0f));
    uint32_t bits = to_bits(magnitude);
    bits += 0x0fff + ((bits >> 13) & 1);
    return sign | uint16_t((bits >> 13) - (112u << 10));
}

// Elements of any of the three dtypes as float32, and back.
INLINE void load_row(const void* from, int64_t dtype, int64_t offset, int64_t n, float* to) {
    if (dtype == FLOAT32) {
        std::memcpy(to, static_cast<const float*>(from) + offset, sizeof(float) * n);
        return;
    }
    const uint16_t* source = static_cast<const uint16_t*>(from) + offset;
    if (dtype == BFLOAT16)
        for (int64_t i = 0; i < n; ++i) to[i] = from_bits(uint32_t(source[i]) << 16);
    else
        for (int64_t i = 0; i < n; ++i) to[i] = half_to_float(source[i]);
}

INLINE void store_row(const float* from, int64_t dtype, int64_t offset, int64_t n, void* to) {
    if (dtype == FLOAT32) {
        std::memcpy(static_cast<float*>(to) + offset, from, sizeof(float) * n);
        return;
    }
    uint16_t* target = static_cast<uint16_t*>(to) + offset;
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t bits = to_bits(from[i]);
        target[i] = dtype == FLOAT16 ? float_to_half(from[i]) : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
}

INLINE int64_t element_size(int64_t dtype) { return dtype == FLOAT32 ? 4 : 2; }

}  // namespace

extern "C" {
typedef void (*SlimwrightParallel)(void (*)(void*), void*, unsigned, unsigned);
}

namespace {

using Kv = SlimwrightKv;
SlimwrightParallel parallel_runtime = nullptr;

INLINE int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t keys_packed(const SlimwrightKv& kv, int64_t length) { return length > 0 ? (length - 1) / kv.window * kv.window : 0; }

// -- packing -----------------------------------------------------------------------------------------------------

struct Range { float scale, low; uint16_t scale_half, low_half; };

// The stored range of values in [low, high]: both ends rounded to float16, codes then measured from the rounded ones.
INLINE Range stored_range(float low, float high, int64_t bits) {
    Range range;
    range.low_half = float_to_half(low);
    range.low = half_to_float(range.low_half);
    range.scale_half = float_to_half((high - range.low) / float((1 << bits) - 1));
    range.scale = half_to_float(range.scale_half);
    return range;
}

INLINE uint8_t code_of(float x, const Range& range, int64_t bits) {
    if (!(range.scale > 0)) return 0;
    const float code = rintf((x - range.low) / range.scale), top = float((1 << bits) - 1);
    return uint8_t(code < 0 ? 0 : code > top ? top : code);
}

INLINE void put(uint8_t* tile, int64_t index, uint8_t code, int64_t bits) {
    const int64_t n = 4 * bits;
    tile[index % n] |= uint8_t(code << (index / n * bits));
}

// The window's keys, tokens first .. first + window, of one head.
INLINE void pack_keys(const Kv& kv, int64_t row, int64_t first, std::vector<float>& tokens) {
    const int64_t D = kv.key_dim, G = kv.group, bytes = 4 * kv.bits;
    tokens.resize(G * D);
    uint8_t* codes = kv.key_codes + (row * (kv.key_capacity / TILE) + first / TILE) * D * bytes;
    const int64_t ranges = (row * (kv.key_capacity / G) + first / G) * D;
    std::memset(codes, 0, kv.window / TILE * D * bytes);
    for (int64_t g = 0; g < kv.window / G; ++g) {
        load_row(kv.key_window, kv.dtype, (row * kv.window + g * G) * D, G * D, tokens.data());
        for (int64_t d = 0; d < D; ++d) {
            float low = tokens[d], high = low;
            for (int64_t t = 1; t < G; ++t) {
                const float x = tokens[t * D + d];
                low = x < low ? x : low;
                high = x > high ? x : high;
            }
            const Range range = stored_range(low, high, kv.bits);
            kv.key_scale[ranges + g * D + d] = range.scale_half;
            kv.key_low[ranges + g * D + d] = range.low_half;
            for (int64_t t = 0; t < G; ++t) {
                uint8_t* tile = codes + ((g * G + t) / TILE * D + d) * bytes;
                put(tile, t % TILE, code_of(tokens[t * D + d], range, kv.bits), kv.bits);
            }
        }
    }
}

// One value of the window, token `token`, of one head.
INLINE void pack_value(const Kv& kv, int64_t row, int64_t token, std::vector<float>& value) {
    const int64_t D = kv.value_dim, G = kv.group, bytes = 4 * kv.bits, tiles = up(D, TILE), groups = up(D, G);
    value.resize(D);
    load_row(kv.value_window, kv.dtype, (row * kv.window + token % kv.window) * D, D, value.data());
    uint8_t* codes = kv.value_codes + (row * kv.value_capacity + token) * tiles * bytes;
    const int64_t ranges = (row * kv.value_capacity + token) * groups;
    std::memset(codes, 0, tiles * bytes);
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t end = (g + 1) * G < D ? (g + 1) * G : D;
        float low = value[g * G], high = low;
        for (int64_t d = g * G + 1; d < end; ++d) {
            low = value[d] < low ? value[d] : low;
            high = value[d] > high ? value[d] : high;
        }
        const Range range = stored_range(low, high, kv.bits);
        kv.value_scale[ranges + g] = range.scale_half;
        kv.value_low[ranges + g] = range.low_half;
        for (int64_t d = g * G; d < end; ++d)
            put(codes + d / TILE * bytes, d % TILE, code_of(value[d], range, kv.bits), kv.bits);
    }
}

INLINE void append_row(const Kv& kv, int64_t row, const void* keys, const void* values, int64_t count) {
    std::vector<float> scratch;
    const int64_t size = element_size(kv.dtype), key_bytes = size * kv.key_dim, value_bytes = size * kv.value_dim;
    const char* key = static_cast<const char*>(keys) + row * count * key_bytes;
    const char* value = static_cast<const char*>(values) + row * count * value_bytes;
    char* key_window = static_cast<char*>(kv.key_window) + row * kv.window * key_bytes;
    char* value_window = static_cast<char*>(kv.value_window) + row * kv.window * value_bytes;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t token = kv.length + i, slot = token % kv.window;
        if (kv.bits < 16 && token >= kv.window) pack_value(kv, row, token - kv.window, scratch);
        if (kv.bits < 16 && slot == 0 && token > 0) pack_keys(kv, row, token - kv.window, scratch);
        std::memcpy(key_window + slot * key_bytes, key + i * key_bytes, key_bytes);
        std::memcpy(value_window + slot * value_bytes, value + i * value_bytes, value_bytes);
    }
}

// -- attention ---------------------------------------------------------------------------------------------------

typedef uint8_t Bytes16 __attribute__((vector_size(16)));
typedef int32_t Ints16 __attribute__((vector_size(64)));
typedef float Floats16 __attribute__((vector_size(64)));

// The 32 codes of a tile as float32. Always 16 at a time: what reads them loads 16, and shorter stores would stall it.
template <int BITS> INLINE void unpack(const uint8_t* tile, float* codes) {
    constexpr int n = 4 * BITS, per = 8 / BITS;
    if constexpr (BITS == 2) {
        Bytes16 bytes;  // the same 8 bytes twice
        std::memcpy(&bytes, tile, 8);
        std::memcpy(reinterpret_cast<char*>(&bytes) + 8, tile, 8);
        const Ints16 wide = __builtin_convertvector(bytes, Ints16);
        const Ints16 low = {0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 2};
        for (int half = 0; half < 2; ++half) {
            const Floats16 values = __builtin_convertvector((wide >> (low + 4 * half)) & 3, Floats16);
            std::memcpy(codes + 16 * half, &values, sizeof(values));
        }
    } else {
        int32_t wide[n];
        for (int i = 0; i < n; ++i) wide[i] = tile[i];
        for (int j = 0; j < per; ++j)
            for (int i = 0; i < n; ++i) codes[j * n + i] = float((wide[i] >> (j * BITS)) & ((1 << BITS) - 1));
    }
}

INLINE float dot(const float* a, const float* b, int64_t n) {
    float lanes[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int64_t l = 0; l < LANES; ++l) lanes[l] += a[i + l] * b[i + l];
    float sum = 0;
    for (; i < n; ++i) sum += a[i] * b[i];
    for (int64_t step = LANES / 2; step; step /= 2)
        for (int64_t l = 0; l < step; ++l) lanes[l] += lanes[l + step];
    return sum + lanes[0];
}

typedef float Floats4 __attribute__((vector_size(16)));
#ifdef __clang__
#define PICK(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
typedef int32_t Ints4 __attribute__((vector_size(16)));
#define PICK(a, b, i, j, k, l) __builtin_shuffle(a, b, Ints4{i, j, k, l})
#endif

INLINE Floats4 folded(const Floats16& sum) {
    Floats4 parts[4];
    std::memcpy(parts, &sum, sizeof(parts));
    return (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

// One vector with four others, each result in the same order of sums.
INLINE void dot_four(const float* x, const float* const* rows, int64_t n, float* out) {
    Floats16 sums[4] = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        Floats16 own, other;
        std::memcpy(&own, x + i, sizeof(own));
        for (int k = 0; k < 4; ++k) {
            std::memcpy(&other, rows[k] + i, sizeof(other));
            sums[k] += own * other;
        }
    }
    const Floats4 a = folded(sums[0]), b = folded(sums[1]), c = folded(sums[2]), d = folded(sums[3]);
    const Floats4 ab = PICK(a, b, 0, 4, 1, 5) + PICK(a, b, 2, 6, 3, 7), cd = PICK(c, d, 0, 4, 1, 5) + PICK(c, d, 2, 6, 3, 7);
    const Floats4 all = PICK(ab, cd, 0, 1, 4, 5) + PICK(ab, cd, 2, 3, 6, 7);
    std::memcpy(out, &all, sizeof(all));
    for (; i < n; ++i)
        for (int k = 0; k < 4; ++k) out[k] += x[i] * rows[k][i];
}

// Tokens of a window as float32: where they lie, or copies in `buffer`, which has room for four.
struct Rows {
    const void* window;
    const Kv& kv;
    int64_t row, width;
    float* buffer;
    inline __attribute__((always_inline)) Rows(const void* window, const Kv& kv, int64_t row, int64_t width, float* buffer)
        : window(window), kv(kv), row(row), width(width), buffer(buffer) {}
    // Tokens t .. t + n; after them the last one again.
    inline __attribute__((always_inline)) void load(int64_t t, int64_t n, const float** four) const {
        for (int64_t i = 0; i < n; ++i) {
            const int64_t at = (row * kv.window + (t + i) % kv.window) * width;
            four[i] = kv.dtype == FLOAT32 ? static_cast<const float*>(window) + at : buffer + i * width;
            if (kv.dtype != FLOAT32) load_row(window, kv.dtype, at, width, buffer + i * width);
        }
        for (int64_t i = n; i < 4; ++i) four[i] = four[n - 1];
    }
};

struct Scratch {  // of one thread
    std::vector<float> scores, queries, scaled, row, weights, ranges;
};

// Scores of up to HEADS query heads for one tile of 32 keys.
template <int BITS, int HEADS>
INLINE void score_tile(const uint8_t* codes, const float* scaled, const float* bias, int64_t D, float* scores, int64_t stride) {
    float sums[HEADS][TILE], key[TILE];
    for (int h = 0; h < HEADS; ++h)
        for (int t = 0; t < TILE; ++t) sums[h][t] = bias[h];
    for (int64_t d = 0; d < D; ++d) {
        unpack<BITS>(codes + d * 4 * BITS, key);
        for (int h = 0; h < HEADS; ++h)
            for (int t = 0; t < TILE; ++t) sums[h][t] += scaled[h * D + d] * key[t];
    }
    for (int h = 0; h < HEADS; ++h)
        for (int t = 0; t < TILE; ++t) scores[h * stride + t] = sums[h][t];
}

template <int BITS>
INLINE void score_heads(const uint8_t* codes, const float* scaled, const float* bias, int64_t D, float* scores, int64_t heads) {
    int64_t h = 0;
    for (; h + 4 <= heads; h += 4) score_tile<BITS, 4>(codes, scaled + h * D, bias + h, D, scores + h * SPLIT, SPLIT);
    switch (heads - h) {
        case 3: score_tile<BITS, 3>(codes, scaled + h * D, bias + h, D, scores + h * SPLIT, SPLIT); break;
        case 2: score_tile<BITS, 2>(codes, scaled + h * D, bias + h, D, scores + h * SPLIT, SPLIT); break;
        case 1: score_tile<BITS, 1>(codes, scaled + h * D, bias + h, D, scores + h * SPLIT, SPLIT); break;
    }
}

// Adds weights * codes of one tile of 32 channels over `count` tokens.
template <int BITS, int HEADS>
INLINE void mix_tile(const uint8_t* codes, int64_t step, const float* weights, int64_t count, float* out, int64_t stride) {
    float sums[HEADS][TILE], value[TILE];
    for (int h = 0; h < HEADS; ++h)
        for (int i = 0; i < TILE; ++i) sums[h][i] = 0;
    for (int64_t t = 0; t < count; ++t) {
        unpack<BITS>(codes + t * step, value);
        for (int h = 0; h < HEADS; ++h)
            for (int i = 0; i < TILE; ++i) sums[h][i] += weights[h * SPLIT + t] * value[i];
    }
    for (int h = 0; h < HEADS; ++h)
        for (int i = 0; i < TILE; ++i) out[h * stride + i] += sums[h][i];
}

template <int BITS>
INLINE void mix_heads(const uint8_t* codes, int64_t step, const float* weights, int64_t count, float* out, int64_t stride, int64_t heads) {
    int64_t h = 0;
    for (; h + 4 <= heads; h += 4) mix_tile<BITS, 4>(codes, step, weights + h * SPLIT, count, out + h * stride, stride);
    switch (heads - h) {
        case 3: mix_tile<BITS, 3>(codes, step, weights + h * SPLIT, count, out + h * stride, stride); break;
        case 2: mix_tile<BITS, 2>(codes, step, weights + h * SPLIT, count, out + h * stride, stride); break;
        case 1: mix_tile<BITS, 1>(codes, step, weights + h * SPLIT, count, out + h * stride, stride); break;
    }
}

// Tokens begin .. end of one (batch, kv head): for each query head the maximum score, the sum of exponentials and the
// weighted sum of values, at partial[head * (value_dim padded + 2)].
template <int BITS>
INLINE void attend_split(const Kv& kv, const void* query, int64_t row, int64_t begin, int64_t end, float* partial, Scratch& s) {
    const int64_t g = kv.heads / kv.kv_heads, D = kv.key_dim, V = kv.value_dim, tiles = up(V, TILE), padded = tiles * TILE;
    const int64_t batch = row / kv.kv_heads, head = row % kv.kv_heads * g, width = padded + 2;
    const int64_t packed_keys = BITS < 16 ? keys_packed(kv, kv.length) : 0;
    const int64_t packed_values = BITS < 16 && kv.length > kv.window ? kv.length - kv.window : 0;
    int64_t start = kv.start ? kv.start[batch] : 0;
    if (kv.sliding && kv.length - kv.sliding > start) start = kv.length - kv.sliding;
    const int64_t count = end - begin;
    s.scores.resize(g * SPLIT); s.queries.resize(g * D); s.scaled.resize(g * D); s.row.resize(4 * (D > V ? D : V));
    s.weights.resize(g * SPLIT); s.ranges.resize(2 * SPLIT);
    float *scores = s.scores.data(), *queries = s.queries.data(), *scaled = s.scaled.data();
    load_row(query, kv.dtype, (batch * kv.heads + head) * D, g * D, queries);
    for (int64_t i = 0; i < g * D; ++i) queries[i] *= kv.scaling;

    int64_t t = begin;
    if constexpr (BITS < 16) {
        std::vector<float>& bias = s.row;
        if (int64_t(bias.size()) < g) bias.resize(g);
        float low[SPLIT];
        for (; t < end && t < packed_keys; t += TILE) {
            if (t == begin || t % kv.group == 0) {
                const int64_t ranges = (row * (kv.key_capacity / kv.group) + t / kv.group) * D;
                for (int64_t h = 0; h < g; ++h) bias[h] = 0;
                for (int64_t d0 = 0; d0 < D; d0 += SPLIT) {
                    const int64_t n = D - d0 < SPLIT ? D - d0 : SPLIT;
                    for (int64_t d = 0; d < n; ++d) low[d] = half_to_float(kv.key_scale[ranges + d0 + d]);
                    for (int64_t h = 0; h < g; ++h)
                        for (int64_t d = 0; d < n; ++d) scaled[h * D + d0 + d] = queries[h * D + d0 + d] * low[d];
                    for (int64_t d = 0; d < n; ++d) low[d] = half_to_float(kv.key_low[ranges + d0 + d]);
                    for (int64_t h = 0; h < g; ++h) bias[h] += dot(queries + h * D + d0, low, n);
                }
            }
            const uint8_t* codes = kv.key_codes + (row * (kv.key_capacity / TILE) + t / TILE) * D * 4 * BITS;
            score_heads<BITS>(codes, scaled, bias.data(), D, scores + (t - begin), g);
        }
        if (t > end) t = end;
    }
    const Rows keys(kv.key_window, kv, row, D, s.row.data());
    for (; t < end; t += 4) {
        const int64_t n = end - t < 4 ? end - t : 4;
        const float* four[4];
        keys.load(t, n, four);
        for (int64_t h = 0; h < g; ++h) {
            float found[4];
            dot_four(queries + h * D, four, D, found);
            for (int64_t i = 0; i < n; ++i) scores[h * SPLIT + t - begin + i] = found[i];
        }
    }

    const int64_t masked = start > begin ? (start < end ? start - begin : count) : 0;
    for (int64_t h = 0; h < g; ++h) {
        float* score = scores + h * SPLIT;
        if (kv.softcap > 0)
            for (int64_t i = 0; i < count; ++i) score[i] = kv.softcap * std::tanh(score[i] / kv.softcap);
        float most = NOTHING, sum = 0;
        for (int64_t i = masked; i < count; ++i) most = score[i] > most ? score[i] : most;
        for (int64_t i = 0; i < masked; ++i) score[i] = 0;
        for (int64_t i = masked; i < count; ++i) score[i] = exponential(score[i] - most);
        for (int64_t i = masked; i < count; ++i) sum += score[i];
        float* out = partial + h * width;
        out[0] = most; out[1] = sum;
        for (int64_t i = 0; i < padded; ++i) out[2 + i] = 0;
    }

    t = begin;
    if constexpr (BITS < 16) {
        const int64_t stop = packed_values < end ? packed_values : end, n = stop - begin;
        if (n > 0) {
            const int64_t groups = up(V, kv.group), step = tiles * 4 * BITS, first = row * kv.value_capacity + begin;
            float *weights = s.weights.data(), *scale = s.ranges.data(), *low = scale + SPLIT;
            for (int64_t j = 0; j < tiles; ++j) {
                const int64_t group = j * TILE / kv.group;
                if (j == 0 || j * TILE % kv.group == 0) {
                    for (int64_t i = 0; i < n; ++i) scale[i] = half_to_float(kv.value_scale[(first + i) * groups + group]);
                    for (int64_t i = 0; i < n; ++i) low[i] = half_to_float(kv.value_low[(first + i) * groups + group]);
                    for (int64_t h = 0; h < g; ++h)
                        for (int64_t i = 0; i < n; ++i) weights[h * SPLIT + i] = scores[h * SPLIT + i] * scale[i];
                }
                float* out = partial + 2 + j * TILE;
                mix_heads<BITS>(kv.value_codes + first * step + j * 4 * BITS, step, weights, n, out, width, g);
                for (int64_t h = 0; h < g; ++h) {
                    const float base = dot(scores + h * SPLIT, low, n);
                    for (int64_t i = 0; i < TILE; ++i) out[h * width + i] += base;
                }
            }
            t = stop;
        }
    }
    const Rows values(kv.value_window, kv, row, V, s.row.data());
    for (; t < end; t += 4) {
        const int64_t n = end - t < 4 ? end - t : 4;
        const float* four[4];
        values.load(t, n, four);
        for (int64_t h = 0; h < g; ++h) {
            const float* weight = scores + h * SPLIT + t - begin;
            float* out = partial + h * width + 2;
            if (n == 4)
                for (int64_t d = 0; d < V; ++d)
                    out[d] = out[d] + weight[0] * four[0][d] + weight[1] * four[1][d] + weight[2] * four[2][d] +
                             weight[3] * four[3][d];
            else
                for (int64_t i = 0; i < n; ++i)
                    for (int64_t d = 0; d < V; ++d) out[d] += weight[i] * four[i][d];
        }
    }
}

INLINE void combine(const Kv& kv, const float* partials, int64_t row, int64_t splits, void* output) {
    const int64_t g = kv.heads / kv.kv_heads, V = kv.value_dim, width = up(V, TILE) * TILE + 2;
    std::vector<float> total(V);
    for (int64_t h = 0; h < g; ++h) {
        const int64_t head = row % kv.kv_heads * g + h;
        float most = kv.sinks ? kv.sinks[head] : NOTHING;
        for (int64_t i = 0; i < splits; ++i) {
            const float m = partials[(i * g + h) * width];
            most = m > most ? m : most;
        }
        float sum = kv.sinks ? exponential(kv.sinks[head] - most) : 0;
        for (int64_t d = 0; d < V; ++d) total[d] = 0;
        for (int64_t i = 0; i < splits; ++i) {
            const float* part = partials + (i * g + h) * width;
            const float weight = part[0] > NOTHING ? exponential(part[0] - most) : 0;
            sum += weight * part[1];
            for (int64_t d = 0; d < V; ++d) total[d] += weight * part[2 + d];
        }
        const float scale = sum > 0 ? 1 / sum : 0;
        for (int64_t d = 0; d < V; ++d) total[d] *= scale;
        store_row(total.data(), kv.dtype, (row / kv.kv_heads * kv.heads + head) * V, V, output);
    }
}

// -- jobs --------------------------------------------------------------------------------------------------------

struct Job {
    const Kv* kv;
    const void *query, *keys, *values;
    void* output;
    int64_t count, first, splits;  // tokens to append; the first split that is seen, and how many
    float* partials;
    std::atomic<int64_t> next{0};
    std::atomic<int> error{OK};
};

template <int BITS> INLINE void one_split(const Job& job, int64_t index, Scratch& scratch) {
    const Kv& kv = *job.kv;
    const int64_t g = kv.heads / kv.kv_heads, width = up(kv.value_dim, TILE) * TILE + 2;
    const int64_t row = index / job.splits, begin = (job.first + index % job.splits) * SPLIT;
    const int64_t end = begin + SPLIT < kv.length ? begin + SPLIT : kv.length;
    attend_split<BITS>(kv, job.query, row, begin, end, job.partials + index * g * width, scratch);
}

CLONES void attend_2(const Job& job, int64_t index, Scratch& scratch) { one_split<2>(job, index, scratch); }
CLONES void attend_4(const Job& job, int64_t index, Scratch& scratch) { one_split<4>(job, index, scratch); }
CLONES void attend_8(const Job& job, int64_t index, Scratch& scratch) { one_split<8>(job, index, scratch); }
CLONES void attend_16(const Job& job, int64_t index, Scratch& scratch) { one_split<16>(job, index, scratch); }

void attend_one(const Job& job, int64_t index) {
    static thread_local Scratch scratch;
    switch (job.kv->bits) {
        case 2: return attend_2(job, index, scratch);
        case 4: return attend_4(job, index, scratch);
        case 8: return attend_8(job, index, scratch);
        default: return attend_16(job, index, scratch);
    }
}

void attend_worker(void* data) {
    Job& job = *static_cast<Job*>(data);
    try {
        const int64_t tasks = job.kv->batch * job.kv->kv_heads * job.splits;
        for (int64_t i; (i = job.next.fetch_add(1)) < tasks;) attend_one(job, i);
    } catch (const std::bad_alloc&) { job.error = NO_MEMORY; }
}

CLONES void append_one(const Job& job, int64_t row) { append_row(*job.kv, row, job.keys, job.values, job.count); }

void append_worker(void* data) {
    Job& job = *static_cast<Job*>(data);
    try {
        for (int64_t row; (row = job.next.fetch_add(1)) < job.kv->batch * job.kv->kv_heads;) append_one(job, row);
    } catch (const std::bad_alloc&) { job.error = NO_MEMORY; }
}

void run(void (*worker)(void*), Job& job, int64_t work) {
    job.next = 0;
    if (parallel_runtime && job.kv->threads > 1 && work > (1 << 17))
        parallel_runtime(worker, &job, unsigned(job.kv->threads), 0);
    else
        worker(&job);
}

// Every bound that the loops rely on.
int check(const Kv& kv, int64_t length) {
    const bool packed = kv.bits == 2 || kv.bits == 4 || kv.bits == 8;
    if (!packed && kv.bits != 16) return BAD_SHAPE;
    if (kv.batch < 1 || kv.kv_heads < 1 || kv.heads < 1 || kv.heads % kv.kv_heads || kv.key_dim < 1 || kv.value_dim < 1)
        return BAD_SHAPE;
    if (kv.window < 1 || kv.length < 0 || kv.dtype < 0 || kv.dtype > 2) return BAD_SHAPE;
    if (!kv.key_window || !kv.value_window) return BAD_SHAPE;
    if (!packed) return length <= kv.window || (kv.sliding > 0 && kv.sliding <= kv.window) ? OK : FULL;
    if (kv.group < TILE || kv.group % TILE || SPLIT % kv.group || kv.window % kv.group) return BAD_SHAPE;
    if (kv.key_capacity % kv.window) return BAD_SHAPE;
    if (keys_packed(kv, length) > kv.key_capacity || length - kv.window > kv.value_capacity) return FULL;
    if (kv.key_capacity && (!kv.key_codes || !kv.key_scale || !kv.key_low)) return BAD_SHAPE;
    if (kv.value_capacity && (!kv.value_codes || !kv.value_scale || !kv.value_low)) return BAD_SHAPE;
    return OK;
}

// The splits of 256 tokens that attention sees; false where a row starts outside the tokens.
bool seen_splits(const Kv& kv, int64_t& first, int64_t& splits) {
    int64_t least = kv.length;
    for (int64_t b = 0; b < kv.batch; ++b) {
        const int64_t start = kv.start ? kv.start[b] : 0;
        if (start < 0 || start >= kv.length) return false;
        least = start < least ? start : least;
    }
    if (kv.sliding && kv.length - kv.sliding > least) least = kv.length - kv.sliding;
    first = least / SPLIT;
    splits = up(kv.length, SPLIT) - first;
    return true;
}

// -- parts of a step ---------------------------------------------------------------------------------------------

INLINE Kv with_tokens(const Kv& kv, int64_t count) {
    Kv longer = kv;
    longer.length += count;
    return longer;
}

CLONES void combine_row(const Kv& kv, const float* partials, int64_t row, int64_t splits, void* output) {
    combine(kv, partials, row, splits, output);
}

int part_shape(const Kv* kv, int64_t token, int64_t* shape) {
    const Kv longer = with_tokens(*kv, token + 1);
    if (const int wrong = check(*kv, longer.length)) return wrong;
    if (token && (kv->bits < 16 || longer.length > kv->window)) return BAD_SHAPE;
    if (!seen_splits(longer, shape[0], shape[1])) return BAD_SHAPE;
    shape[2] = kv->batch * kv->heads * shape[1] * (up(kv->value_dim, TILE) * TILE + 2);
    return OK;
}

int part_append(const Kv* kv, int64_t token, int64_t row, const void* keys, const void* values) {
    const Kv before = with_tokens(*kv, token);
    Job job;
    job.kv = &before; job.keys = keys; job.values = values; job.count = 1;
    try { append_one(job, row); } catch (const std::bad_alloc&) { return NO_MEMORY; }
    return OK;
}

int part_attend(const Kv* kv, int64_t token, const int64_t* shape, int64_t index, const void* query, float* partials) {
    const Kv longer = with_tokens(*kv, token + 1);
    Job job;
    job.kv = &longer; job.query = query; job.first = shape[0]; job.splits = shape[1]; job.partials = partials;
    try { attend_one(job, index); } catch (const std::bad_alloc&) { return NO_MEMORY; }
    return OK;
}

int part_combine(const Kv* kv, const int64_t* shape, int64_t row, const float* partials, void* output) {
    const int64_t part = shape[1] * (kv->heads / kv->kv_heads) * (up(kv->value_dim, TILE) * TILE + 2);
    try { combine_row(*kv, partials + row * part, row, shape[1], output); } catch (const std::bad_alloc&) { return NO_MEMORY; }
    return OK;
}

const SlimwrightKvParts PARTS = {part_shape, part_append, part_attend, part_combine};

}  // namespace

extern "C" {

int slimwright_attend_abi() { return 2; }
const SlimwrightKvParts* slimwright_kv_parts() { return &PARTS; }
int64_t slimwright_kv_size() { return int64_t(sizeof(Kv)); }
void slimwright_set_parallel(SlimwrightParallel runtime) { parallel_runtime = runtime; }

// Appends `count` tokens: keys (batch, kv_heads, count, key_dim), values alike. Advances kv->length.
int slimwright_kv_append(Kv* kv, const void* keys, const void* values, int64_t count) {
    const int wrong = count < 0 ? int(BAD_SHAPE) : check(*kv, kv->length + count);
    if (wrong) return wrong;
    Job job;
    job.kv = kv; job.keys = keys; job.values = values; job.count = count;
    run(append_worker, job, kv->batch * kv->kv_heads * count * (kv->key_dim + kv->value_dim));
    if (job.error) return job.error;
    kv->length += count;
    return OK;
}

// Attention of one query a row, (batch, heads, key_dim), over the tokens in the cache: (batch, heads, value_dim).
int slimwright_kv_attend(const Kv* kv, const void* query, void* output) {
    const int wrong = check(*kv, kv->length);
    if (wrong) return wrong;
    if (kv->length < 1) return BAD_SHAPE;
    try {
        Job job;
        job.kv = kv; job.query = query; job.output = output;
        const int64_t g = kv->heads / kv->kv_heads, rows = kv->batch * kv->kv_heads;
        if (!seen_splits(*kv, job.first, job.splits)) return BAD_SHAPE;
        std::vector<float> partials(rows * job.splits * g * (up(kv->value_dim, TILE) * TILE + 2));
        job.partials = partials.data();
        run(attend_worker, job, rows * g * (kv->length - job.first * SPLIT) * kv->key_dim);
        if (job.error) return job.error;
        const int64_t part = job.splits * g * (up(kv->value_dim, TILE) * TILE + 2);
        for (int64_t row = 0; row < rows; ++row)
            combine_row(*kv, job.partials + row * part, row, job.splits, output);
    } catch (const std::bad_alloc&) { return NO_MEMORY; }
    return OK;
}

// One decoding step: append one token, then attend.
int slimwright_kv_step(Kv* kv, const void* query, const void* keys, const void* values, void* output) {
    const int wrong = slimwright_kv_append(kv, keys, values, 1);
    return wrong ? wrong : slimwright_kv_attend(kv, query, output);
}
}
