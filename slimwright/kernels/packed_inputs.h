// Activations as integers of 8, 16 or 24 bits, or as float32 in whole chunks.
#pragma once

#include "packed_vectors.h"

namespace slimwright {
namespace ISA {
namespace {

// -- inputs ---------------------------------------------------------------------------------------------------------

#if VNNI
using Digit = int8_t;
constexpr int planes_of(int digits) { return digits; }
#else
using Digit = int16_t;  // 24 bits are two numbers of 12
constexpr int planes_of(int digits) { return digits == 3 ? 2 : 1; }
#endif

constexpr int STEP = CHUNK / PARTS;  // columns that i_add_products takes
int64_t start_numbers(const Inputs& in) {
    return planes_of(in.digits) * LANES * (in.lanes ? in.chunks * PARTS : in.segments);
}

int64_t chunk_bytes(int32_t digits) {
    if (digits == BFLOATS) return CHUNK * 2;
    return digits ? planes_of(digits) * CHUNK * int64_t(sizeof(Digit)) : CHUNK * 4;
}

// Splits integers into balanced digits, lowest first.
template <int DIGITS>
INLINE void split(const int32_t* x, Digit* out) {
    constexpr int planes = planes_of(DIGITS), width = sizeof(Digit) == 1 ? 8 : 12;
    for (int i = 0; i < CHUNK; i++) {
        int32_t rest = x[i];
        for (int plane = 0; plane < planes - 1; plane++) {
            const int32_t low = int32_t(uint32_t(rest) << (32 - width)) >> (32 - width);
            out[plane * CHUNK + i] = Digit(low);
            rest = (rest - low) >> width;
        }
        out[(planes - 1) * CHUNK + i] = Digit(rest);
    }
}

template <int DIGITS>
void prepare_integers(const Weight& w, const void* inputs, int32_t type, int64_t index, const Inputs& in) {
    constexpr float limit = DIGITS == 1 ? 127.0f : DIGITS == 2 ? 32639.0f : 8355711.0f;
    constexpr int top = DIGITS == 2 ? 15 : 23;
    Digit* out = static_cast<Digit*>(const_cast<void*>(in.values)) + index * in.chunks * planes_of(DIGITS) * CHUNK;
    float* scales = const_cast<float*>(in.scale) + index * in.padded;
    float* sums = in.sums ? const_cast<float*>(in.sums) + index * in.groups : nullptr;
    int32_t* start = const_cast<int32_t*>(in.start) + index * start_numbers(in);
    if (sums) memset(sums, 0, size_t(in.groups) * 4);
    const int32_t zero = common_zero(w);
    uint8_t zeros[CHUNK];
    memset(zeros, zero < 0 ? 0 : zero, CHUNK);
    constexpr int planes = planes_of(DIGITS);
    memset(scales, 0, size_t(in.padded) * 4);
    const int64_t step = in.segment_chunks * CHUNK;
    double group_sum = 0;
    for (int64_t segment = 0; segment < in.segments; segment++) {
        const int64_t begin = segment * step, stop = begin + step < w.columns ? begin + step : w.columns;
        alignas(64) float x[MOST_CHUNKS * CHUNK];
        const int64_t columns = stop - begin;
        if (type == FLOAT32) memcpy(x, static_cast<const float*>(inputs) + begin, size_t(columns) * 4);
        else
            for (int64_t i = 0; i < columns; i++)
                x[i] = bfloat_to_float(static_cast<const uint16_t*>(inputs)[begin + i]);
        uint32_t most = 0;  // as bits, so that infinity and NaN come out on top
        for (int64_t i = 0; i < columns; i++) {
            const uint32_t size = to_bits(x[i]) & 0x7fffffff;
            most = size > most ? size : most;
        }
        const bool finite = most < 0x7f800000;
        float up = 0, down = 0;
        if (!finite) {
            down = from_bits(0x7fc00000);  // makes every product NaN
        } else if (most && DIGITS == 1) {
            up = 127.0f / from_bits(most);
            up = up < 3e38f ? up : 3e38f;
            down = 1 / up;
        } else if (most) {
            int power = top + 126 - int(most >> 23);
            power = power < 126 ? power : 126;
            if (from_bits(most) * from_bits(uint32_t(power + 127) << 23) > limit) power--;
            up = from_bits(uint32_t(power + 127) << 23);
            down = from_bits(uint32_t(127 - power) << 23);
        }
        scales[segment] = down;
        int64_t total = 0;
        Sum product[planes];
        for (int plane = 0; plane < planes; plane++) product[plane] = i_zero();
        const int64_t last = begin + step < in.chunks * CHUNK ? begin + step : in.chunks * CHUNK;
        for (int64_t at = begin; at < last; at += CHUNK, out += planes * CHUNK) {
            alignas(64) int32_t integers[CHUNK];
            const int count = int(stop - at < CHUNK ? stop - at : CHUNK);
            for (int i = 0; i < CHUNK; i++) integers[i] = 0;
            if (finite)
                for (int i = 0; i < count; i++) {
                    float value = __builtin_rintf(x[at - begin + i] * up);
                    value = value > limit ? limit : value < -limit ? -limit : value;
                    integers[i] = int32_t(value);
                }
            split<DIGITS>(integers, out);
            for (int part = 0; part < PARTS; part++) {
                for (int plane = 0; plane < planes; plane++) {
                    Sum& sum = product[plane];
                    sum = i_add_products(in.lanes ? i_zero() : sum, zeros, out + plane * CHUNK + part * STEP);
                    if (in.lanes) i_negate(sum, start + plane * LANES);
                }
                if (in.lanes) start += planes * LANES;
            }
            if (!sums) continue;
            if (in.lanes) {
                for (int64_t i = 0; i < count; i += BLOCK) {
                    int32_t sum = 0;
                    for (int k = 0; k < BLOCK; k++) sum += integers[i + k];
                    sums[(at + i) / w.group] += float(sum) * down;
                }
            } else {
                int32_t sum = 0;
                for (int i = 0; i < CHUNK; i++) sum += integers[i];
                total += sum;
            }
        }
        if (in.lanes) continue;
        for (int plane = 0; plane < planes; plane++, start += LANES) i_negate(product[plane], start);
        if (sums) {
            group_sum += double(total) * double(down);
            if ((segment + 1) % in.segment_group == 0 || segment + 1 == in.segments) {
                sums[segment / in.segment_group] = float(group_sum);
                group_sum = 0;
            }
        }
    }
}

void prepare(const Weight& w, const void* x, int32_t type, int64_t index, const Inputs& in) {
    if (in.digits == BFLOATS) {
        uint16_t* out = static_cast<uint16_t*>(const_cast<void*>(in.values)) + index * in.chunks * CHUNK;
        memcpy(out, x, size_t(w.columns) * 2);
        memset(out + w.columns, 0, size_t(in.chunks * CHUNK - w.columns) * 2);
        return;
    }
    if (in.digits == 0) {
        float* out = static_cast<float*>(const_cast<void*>(in.values)) + index * in.chunks * CHUNK;
        if (type == FLOAT32) memcpy(out, x, size_t(w.columns) * 4);
        else
            for (int64_t i = 0; i < w.columns; i++) out[i] = bfloat_to_float(static_cast<const uint16_t*>(x)[i]);
        for (int64_t i = w.columns; i < in.chunks * CHUNK; i++) out[i] = 0;
        return;
    }
    if (in.digits == 1) prepare_integers<1>(w, x, type, index, in);
    else if (in.digits == 2) prepare_integers<2>(w, x, type, index, in);
    else prepare_integers<3>(w, x, type, index, in);
}

}  // namespace
}  // namespace ISA
}  // namespace slimwright
