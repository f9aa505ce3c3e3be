// Kernels of merging: plain C ABI, no torch, no threads of their own. Each passes once over a tile of stored weights
// (float32, bfloat16 or float16), a few hundred elements at a time, so that nothing but the result leaves the cache.
//
// Arithmetic is that of the torch code of the methods, operation by operation in float32 (no contraction but where
// torch's `add` with a factor has one), so that the bytes are equal. Every function returns flags: 1, an input is NaN or
// Inf; 2, the result is. The caller then takes the torch path, which says where.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common.h"

namespace {

constexpr int PIECE = 512;                 // elements that are worked on at a time
constexpr int64_t BLOCK = int64_t(1) << 18;  // slimwright.methods.merging.BLOCK
constexpr int COUNTERS = 2, UPPER = 1 << 15, LOWER = 1 << 16;
constexpr int LANES = 64, RUN = 16384;     // slimwright.methods.products
constexpr float TINY = 1e-30f;             // slimwright.methods.consensus
constexpr uint32_t EVERYTHING = 0, NOTHING = 0x7f800000u;  // least bits that all finite magnitudes have, that none has

// One vector of a tile: what is stored, and what becomes of it before vectors meet.
struct Source {
    const void* data;
    const uint32_t* keys;  // of random masks: three words for each block from the tile's first; null for no mask
    int64_t place;         // elements before it are trimmed at `before`, others at `behind`
    uint32_t before, behind;    // least bits of a magnitude that stays; EVERYTHING: all do
    uint32_t outlier_before, outlier_behind;  // least bits of a magnitude that goes; NOTHING: none does
    int64_t outlier_place;
    uint32_t limit;        // random numbers (31 bits) below it stay
    int32_t kind;          // 0 float32, 1 bfloat16, 2 float16
    float factor, weight;  // a multiplier, and what counts in the divisor of a mean
};

// n values in float32; true if one is not finite.
INLINE bool load(const void* data, int kind, int64_t start, int n, float* out) {
    uint32_t bad = 0;
    if (kind == 0) {
        const float* from = static_cast<const float*>(data) + start;
        for (int i = 0; i < n; i++) {
            out[i] = from[i];
            bad |= uint32_t((to_bits(from[i]) & 0x7f800000u) == 0x7f800000u);
        }
    } else if (kind == 1) {
        const uint16_t* from = static_cast<const uint16_t*>(data) + start;
        for (int i = 0; i < n; i++) {
            out[i] = from_bits(uint32_t(from[i]) << 16);
            bad |= uint32_t((from[i] & 0x7f80u) == 0x7f80u);
        }
    } else {
        const uint16_t* from = static_cast<const uint16_t*>(data) + start;
        for (int i = 0; i < n; i++) {
            const uint32_t h = from[i];
            const float scaled = from_bits((h & 0x7fffu) << 13) * from_bits(0x77800000u);  // 2**112; exact
            out[i] = from_bits(to_bits(scaled) | ((h & 0x8000u) << 16));
            bad |= uint32_t((h & 0x7c00u) == 0x7c00u);
        }
    }
    return bad != 0;
}

// n results in their dtype, to nearest, ties to even; true if one is not finite.
INLINE bool store(const float* values, int kind, int64_t start, int n, void* data) {
    uint32_t bad = 0;
    if (kind == 0) {
        float* to = static_cast<float*>(data) + start;
        for (int i = 0; i < n; i++) {
            to[i] = values[i];
            bad |= uint32_t((to_bits(values[i]) & 0x7f800000u) == 0x7f800000u);
        }
    } else if (kind == 1) {
        uint16_t* to = static_cast<uint16_t*>(data) + start;
        for (int i = 0; i < n; i++) {
            const uint32_t bits = to_bits(values[i]), rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
            to[i] = uint16_t(rounded);
            bad |= uint32_t((rounded & 0x7f80u) == 0x7f80u || (bits & 0x7f800000u) == 0x7f800000u);
        }
    } else {
        uint16_t* to = static_cast<uint16_t*>(data) + start;
        for (int i = 0; i < n; i++) {
            const uint32_t bits = to_bits(values[i]), u = bits & 0x7fffffffu;
            const uint32_t small = to_bits(from_bits(u) + 0.5f) - 0x3f000000u;  // subnormal: steps of 2**-24
            const uint32_t normal = (u + 0xc8000fffu + ((u >> 13) & 1)) >> 13;
            const uint32_t half = u >= 0x47800000u ? 0x7c00u : u < 0x38800000u ? small : normal;
            to[i] = uint16_t(half | ((bits >> 16) & 0x8000u));
            bad |= uint32_t((half & 0x7c00u) == 0x7c00u);
        }
    }
    return bad != 0;
}

// 31 random bits of each element (slimwright.methods.chance), and what stays by them.
INLINE void drop(float* x, int64_t inside, int n, const uint32_t* words, uint32_t limit) {
    const uint32_t first = words[0], second = words[1] | 1, third = words[2] | 1;
    for (int i = 0; i < n; i++) {
        uint32_t h = uint32_t(inside) + uint32_t(i);
        h = (h ^ (h >> 16)) * 0x7feb352du;
        h = (h ^ (h >> 15)) * 0x846ca68bu;
        h ^= h >> 16;
        h = (h ^ first) * second;
        h ^= uint32_t(int32_t(h) >> 15);
        h *= third;
        h ^= uint32_t(int32_t(h) >> 16);
        h = (h * 0x846ca68bu) & 0x7fffffffu;
        x[i] = from_bits(h < limit ? to_bits(x[i]) : 0u);
    }
}

INLINE void trim(float* x, int n, uint32_t least) {
    for (int i = 0; i < n; i++) x[i] = (to_bits(x[i]) & 0x7fffffffu) >= least ? x[i] : 0.0f;
}

INLINE void drop_outliers(float* x, int n, uint32_t least) {
    for (int i = 0; i < n; i++) x[i] = x[i] - ((to_bits(x[i]) & 0x7fffffffu) >= least ? x[i] : 0.0f);
}

// How many of n elements from `at` on lie before a place.
INLINE int before_place(int64_t place, int64_t at, int n) {
    const int64_t count = place - at;
    return int(count < 0 ? 0 : count > n ? n : count);
}

// Elements at .. at + n of one vector: stored, minus the base.
INLINE bool difference(const Source& source, const float* base, int64_t at, int n, float* x) {
    const bool bad = load(source.data, source.kind, at, n, x);
    if (base)
        for (int i = 0; i < n; i++) x[i] -= base[i];
    return bad;
}

// Trimmed and dropped; `start` is the tile's first element in its tensor, a multiple of BLOCK.
INLINE void masked(const Source& source, int64_t at, int n, float* x) {
    const int first = before_place(source.place, at, n);
    if (source.before != EVERYTHING) trim(x, first, source.before);
    if (source.behind != EVERYTHING) trim(x + first, n - first, source.behind);
    const int top = before_place(source.outlier_place, at, n);
    if (source.outlier_before != NOTHING) drop_outliers(x, top, source.outlier_before);
    if (source.outlier_behind != NOTHING) drop_outliers(x + top, n - top, source.outlier_behind);
    if (source.keys) drop(x, at % BLOCK, n, source.keys + 3 * (at / BLOCK), source.limit);
}

INLINE float sign(float x) { return float((x > 0) - (x < 0)); }

}  // namespace

extern "C" {

// How vectors are put together.
enum { SUM = 0, SUM_FUSED = 1, AGREEING_MEAN = 2, AGREEING_SUM = 3, AGREEING_MAX = 4 };

// The merged elements of a tile of n elements: out = scale * (sources put together) / divisor + base_factor * base.
// `out` null: only the elected signs are added up, into `votes`. `scratch`: (sources + 4) * PIECE floats.
CLONES int slimwright_blend(const Source* sources, int count, const void* base, int base_kind, int subtract, int64_t n,
                            int how, int by_count, float majority, float divisor, float scale, float base_factor,
                            int add_base, void* out, int out_kind, int64_t* votes, float* scratch) {
    float* start = scratch;
    float* total = scratch + PIECE;
    float* signs = scratch + 2 * PIECE;
    float* weights = scratch + 3 * PIECE;
    float* vectors = scratch + 4 * PIECE;
    int flags = 0;
    int64_t elected = 0;
    for (int64_t at = 0; at < n; at += PIECE) {
        const int m = int(n - at < PIECE ? n - at : PIECE);
        if (base && load(base, base_kind, at, m, start)) flags |= 1;
        for (int s = 0; s < count; s++) {
            float* x = vectors + s * PIECE;
            if (difference(sources[s], subtract ? start : nullptr, at, m, x)) flags |= 1;
            masked(sources[s], at, m, x);
            const float factor = sources[s].factor;
            if (how != SUM_FUSED && factor != 1)
                for (int i = 0; i < m; i++) x[i] *= factor;
        }
        if (how == SUM_FUSED) {
            const float first = sources[0].factor;
            for (int i = 0; i < m; i++) total[i] = vectors[i] * first;
            for (int s = 1; s < count; s++) {
                const float* x = vectors + s * PIECE;
                const float factor = sources[s].factor;
                for (int i = 0; i < m; i++) total[i] = __builtin_fmaf(x[i], factor, total[i]);
            }
        } else if (how == SUM) {
            for (int i = 0; i < m; i++) total[i] = vectors[i];
            for (int s = 1; s < count; s++) {
                const float* x = vectors + s * PIECE;
                for (int i = 0; i < m; i++) total[i] += x[i];
            }
        } else {
            for (int i = 0; i < m; i++) signs[i] = by_count ? sign(vectors[i]) : vectors[i];
            for (int s = 1; s < count; s++) {
                const float* x = vectors + s * PIECE;
                if (by_count) for (int i = 0; i < m; i++) signs[i] += sign(x[i]);
                else for (int i = 0; i < m; i++) signs[i] += x[i];
            }
            if (majority != 0)
                for (int i = 0; i < m; i++) signs[i] += majority * TINY;
            for (int i = 0; i < m; i++) signs[i] = sign(signs[i]);
            if (!out) {
                int32_t won = 0;
                for (int i = 0; i < m; i++) won += int32_t(signs[i]);
                elected += won;
                continue;
            }
            for (int s = 0; s < count; s++) {
                float* x = vectors + s * PIECE;
                for (int i = 0; i < m; i++) {
                    const float agreeing = x[i] * signs[i];
                    x[i] = agreeing < 0 ? 0.0f : agreeing;
                }
            }
            for (int i = 0; i < m; i++) total[i] = vectors[i];
            for (int s = 1; s < count; s++) {
                const float* x = vectors + s * PIECE;
                if (how == AGREEING_MAX) for (int i = 0; i < m; i++) total[i] = total[i] > x[i] ? total[i] : x[i];
                else for (int i = 0; i < m; i++) total[i] += x[i];
            }
            for (int i = 0; i < m; i++) total[i] *= signs[i];
            if (how == AGREEING_MEAN) {
                bool negative = false;
                for (int s = 0; s < count; s++) negative |= sources[s].weight < 0;
                for (int s = 0; s < count; s++) {
                    const float* x = vectors + s * PIECE;
                    const float weight = sources[s].weight;
                    if (s == 0) for (int i = 0; i < m; i++) weights[i] = sign(x[i]) * weight;
                    else for (int i = 0; i < m; i++) weights[i] += sign(x[i]) * weight;
                }
                if (negative) for (int i = 0; i < m; i++) weights[i] = weights[i] == 0 ? 1.0f : weights[i];
                else for (int i = 0; i < m; i++) weights[i] = weights[i] < TINY ? TINY : weights[i];
                for (int i = 0; i < m; i++) total[i] /= weights[i];
            }
        }
        if (divisor != 1) for (int i = 0; i < m; i++) total[i] /= divisor;
        if (scale != 1) for (int i = 0; i < m; i++) total[i] *= scale;
        if (add_base) {
            if (base_factor != 1) for (int i = 0; i < m; i++) total[i] += start[i] * base_factor;
            else for (int i = 0; i < m; i++) total[i] += start[i];
        }
        if (store(total, out_kind, at, m, out)) flags |= 2;
    }
    if (votes) *votes = elected;
    return flags;
}

// Counts of the upper 16 bits (high < 0), or of the lower 16 bits of those whose upper are `high`, of the magnitudes of
// each source: counts (sources, 32768 or 65536). Many differences are equal (of fine-tunes in 16 bits most are zero), and
// a counter that is counted up again at once waits for itself: so neighbours count in COUNTERS sets, which `counts` has
// room for, and which are added into the first.
CLONES int slimwright_count_bits(const Source* sources, int count, const void* base, int base_kind, int64_t n,
                                 const int64_t* high, int32_t* const* counts) {
    float start[PIECE], x[PIECE];
    uint32_t bits[PIECE];
    int flags = 0;
    for (int64_t at = 0; at < n; at += PIECE) {
        const int m = int(n - at < PIECE ? n - at : PIECE);
        if (base && load(base, base_kind, at, m, start)) flags |= 1;
        for (int s = 0; s < count; s++) {
            if (difference(sources[s], base ? start : nullptr, at, m, x)) flags |= 1;
            for (int i = 0; i < m; i++) bits[i] = to_bits(x[i]) & 0x7fffffffu;
            int32_t* to = counts[s];
            if (high[s] < 0) {
                for (int i = m; i % COUNTERS; i++) bits[i] = 0;
                for (int i = 0; i < m; i += COUNTERS)
                    for (int set = 0; set < COUNTERS; set++) to[set * UPPER + (bits[i + set] >> 16)]++;
                for (int i = m; i % COUNTERS; i++) to[i % COUNTERS * UPPER]--;
            } else {
                const uint32_t wanted = uint32_t(high[s]);
                uint32_t inside[PIECE];
                int found = 0;
                for (int i = 0; i < m; i++) {
                    inside[found] = bits[i] & 0xffffu;
                    found += bits[i] >> 16 == wanted;
                }
                for (int i = 0; i < found; i++) to[i % COUNTERS * LOWER + inside[i]]++;
            }
        }
    }
    for (int s = 0; s < count; s++) {
        const int bins = high[s] < 0 ? UPPER : LOWER;
        for (int set = 1; set < COUNTERS; set++)
            for (int i = 0; i < bins; i++) counts[s][i] += counts[s][set * bins + i];
    }
    return flags;
}

// Places and bits of the magnitudes of one source whose upper 16 bits are `high`. `found` is how many there are; all are
// given if it is at most `room` less 32.
CLONES int slimwright_gather(const Source* source, const void* base, int base_kind, int64_t n, int64_t high, int64_t room,
                             int32_t* places, int32_t* bits_out, int64_t* found) {
    constexpr int GROUP = 32;
    float start[PIECE], x[PIECE];
    uint32_t bits[PIECE];
    const uint32_t wanted = uint32_t(high);
    int64_t total = 0;
    int flags = 0;
    for (int64_t at = 0; at < n; at += PIECE) {
        const int m = int(n - at < PIECE ? n - at : PIECE);
        if (base && load(base, base_kind, at, m, start)) flags |= 1;
        if (difference(*source, base ? start : nullptr, at, m, x)) flags |= 1;
        for (int i = 0; i < m; i++) bits[i] = to_bits(x[i]) & 0x7fffffffu;
        for (int i = m; i < PIECE; i++) bits[i] = 0xffffffffu;
        for (int first = 0; first < m; first += GROUP) {
            uint32_t any = 0;
            for (int i = 0; i < GROUP; i++) any += uint32_t(bits[first + i] >> 16 == wanted);
            if (!any) continue;
            if (total + GROUP > room) {
                total += any;
                continue;
            }
            for (int i = first; i < first + GROUP; i++) {  // without a branch: which match is not to be foreseen
                places[total] = int32_t(at + i);
                bits_out[total] = int32_t(bits[i]);
                total += bits[i] >> 16 == wanted;
            }
        }
    }
    *found = total;
    return flags;
}

// How many magnitudes of one source have exactly these bits, by block of the tile.
CLONES int slimwright_count_equal(const Source* source, const void* base, int base_kind, int64_t n, int64_t threshold,
                                  int64_t* counts) {
    float start[PIECE], x[PIECE];
    const uint32_t wanted = uint32_t(threshold);
    int flags = 0;
    for (int64_t at = 0; at < n; at += PIECE) {
        const int m = int(n - at < PIECE ? n - at : PIECE);
        if (base && load(base, base_kind, at, m, start)) flags |= 1;
        if (difference(*source, base ? start : nullptr, at, m, x)) flags |= 1;
        int32_t equal = 0;
        for (int i = 0; i < m; i++) equal += (to_bits(x[i]) & 0x7fffffffu) == wanted;
        counts[at / BLOCK] += equal;
    }
    return flags;
}

// Sums over runs of RUN elements, pairwise: sums (runs, quantities). The quantities are the products of all pairs of
// sources (0,0), (0,1), ..., (1,1), ...; or with `masks` the magnitudes of each source, then those of each masked one.
// `scratch`: (2 * sources + 1) * PIECE + quantities * 9 * LANES floats.
CLONES int slimwright_run_sums(const Source* sources, int count, const void* base, int base_kind, int64_t n, int masks,
                               float* sums, float* scratch) {
    const int quantities = masks ? 2 * count : count * (count + 1) / 2;
    float* start = scratch;
    float* plain = scratch + PIECE;
    float* dropped = plain + count * PIECE;
    float* stacks = dropped + count * PIECE;  // (quantities, 9, LANES): partial sums of 1, 2, 4, ... rows of LANES
    int flags = 0;
    const int64_t runs = (n + RUN - 1) / RUN;
    for (int64_t run = 0; run < runs; run++) {
        for (int piece = 0; piece < RUN / PIECE; piece++) {
            const int64_t at = run * RUN + piece * PIECE;
            const int m = int(n - at < 0 ? 0 : n - at < PIECE ? n - at : PIECE);
            if (m && base && load(base, base_kind, at, m, start)) flags |= 1;
            for (int s = 0; s < count; s++) {
                float* x = plain + s * PIECE;
                if (m && difference(sources[s], base ? start : nullptr, at, m, x)) flags |= 1;
                for (int i = m; i < PIECE; i++) x[i] = 0;
                if (masks) {
                    float* y = dropped + s * PIECE;
                    for (int i = 0; i < PIECE; i++) y[i] = x[i];
                    if (m) masked(sources[s], at, m, y);
                    for (int i = 0; i < PIECE; i++) x[i] = fabsf(x[i]);
                    for (int i = 0; i < PIECE; i++) y[i] = fabsf(y[i]);
                }
            }
            int quantity = 0;
            for (int first = 0; first < (masks ? 2 * count : count); first++)
                for (int second = masks ? 0 : first; second < (masks ? 1 : count); second++, quantity++) {
                    const float* a = plain + first * PIECE;
                    const float* b = plain + second * PIECE;
                    float* stack = stacks + quantity * 9 * LANES;
                    for (int row = 0; row < PIECE / LANES; row++) {
                        float sum[LANES];
                        if (masks) for (int i = 0; i < LANES; i++) sum[i] = a[row * LANES + i];
                        else for (int i = 0; i < LANES; i++) sum[i] = a[row * LANES + i] * b[row * LANES + i];
                        int number = piece * (PIECE / LANES) + row, level = 0;
                        for (; number & 1; number >>= 1, level++)
                            for (int i = 0; i < LANES; i++) sum[i] = stack[level * LANES + i] + sum[i];
                        for (int i = 0; i < LANES; i++) stack[level * LANES + i] = sum[i];
                    }
                }
        }
        for (int quantity = 0; quantity < quantities; quantity++) {
            float* total = stacks + (quantity * 9 + 8) * LANES;
            for (int width = LANES / 2; width; width /= 2)
                for (int i = 0; i < width; i++) total[i] = total[i] + total[i + width];
            sums[run * quantities + quantity] = total[0];
        }
    }
    return flags;
}

}  // extern "C"
