// Products of activations with rows of a packed matrix: compiled once per instruction set (-DISA=name).
//
// Integer arithmetic, for grids whose codes are integers and whose scales are shared by 16 columns or more. The inputs of
// a segment (one group of the weight, at most 512 columns) are written as integers of 24 bits (float32), 16 bits
// (bfloat16) or 8 bits (where asked) times one power of two; sums of code times integer are exact; each segment's sum is
// multiplied by its scale in float32 and added in a fixed order. So a result depends neither on threads nor on the batch.
// Against exact arithmetic on the same inputs the error is at most
//   (2**-23 or 2**-15) * max|x of the segment| * sum|w|   from writing the inputs as integers, and
//   (segments + 24) * 2**-24 * sum of scale * (code + zero point) * |x|   from adding in float32.
//
// Float arithmetic, for all other grids, and for all where a batch makes decoding cheap beside the products: a row is
// decoded to exactly the float32 values that the grid defines, and multiplied with fused multiply-adds. With bfloat16
// inputs and instructions for them the values are rounded to bfloat16 first, as a dense bfloat16 model has them.

#include "packed_codes.h"
#include "packed_inputs.h"
#include "packed_panels.h"

namespace slimwright {
namespace ISA {
namespace {

// -- integer products -----------------------------------------------------------------------------------------------

// factors (R, M, padded segments): scale of the weight's group times scale of the input's segment.
template <int R, int M>
INLINE void multiply_scales(const float* scale, float* factors, const Inputs& in, int64_t first) {
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) {
            const float *own = scale + r * in.groups, *up = in.scale + (first + m) * in.padded;
            float* out = factors + (r * M + m) * in.padded;
            if (in.segment_group == 1)
                for (int64_t i = 0; i < in.padded; i++) out[i] = own[i] * up[i];
            else
                for (int64_t i = 0; i < in.padded; i++) out[i] = own[i / in.segment_group] * up[i];
        }
}

#if VNNI
#ifndef AHEAD
#define AHEAD 1
#endif

INLINE Floats joined(const Sum* sum, int digits) {
    Floats value = _mm512_cvtepi32_ps(sum[0]);
    if (digits > 1) value = f_fma(_mm512_cvtepi32_ps(sum[1]), f_all(256), value);
    if (digits > 2) value = f_fma(_mm512_cvtepi32_ps(sum[2]), f_all(65536), value);
    return value;
}

// total[r][m] += W[r] x[m] for R rows and M inputs, one scale per segment. BITS: of packed codes, 0 of codes in bytes;
// `stride` bytes from row to row.
template <int BITS, int DIGITS, int R, int M>
INLINE void add_segments(const uint8_t* codes, int64_t stride, const float* scale, float* factors, const Inputs& in,
                         int64_t first, Floats (&total)[R][M]) {
    const int64_t start_stride = start_numbers(in);
    const int32_t* starts = in.start + first * start_stride;
    multiply_scales<R, M>(scale, factors, in, first);
    const int8_t* x = static_cast<const int8_t*>(in.values) + first * in.chunks * DIGITS * CHUNK;
    const int64_t x_stride = in.chunks * DIGITS * CHUNK;
    constexpr int bytes = BITS ? BITS * 8 : CHUNK;
    int64_t chunk = 0;
    for (int64_t segment = 0; segment < in.segments; segment++) {
        const int64_t last = chunk + in.segment_chunks < in.chunks ? chunk + in.segment_chunks : in.chunks;
        Sum sum[R][M][DIGITS];
        for (int m = 0; m < M; m++)
            for (int d = 0; d < DIGITS; d++) {
                const Sum start = i_load(starts + m * start_stride + (segment * DIGITS + d) * LANES);
                for (int r = 0; r < R; r++) sum[r][m][d] = start;
            }
        for (; chunk < last; chunk++) {
            __m512i digit[M][DIGITS];
            for (int m = 0; m < M; m++)
                for (int d = 0; d < DIGITS; d++)
                    digit[m][d] = _mm512_load_si512(x + m * x_stride + (chunk * DIGITS + d) * CHUNK);
            for (int r = 0; r < R; r++) {
                const uint8_t* p = codes + r * stride + chunk * bytes;
                __m512i code;
                if constexpr (BITS) {
                    _mm_prefetch(reinterpret_cast<const char*>(p + AHEAD * R * stride), _MM_HINT_T0);
                    code = load_chunk<BITS>(p);
                }
                else code = _mm512_loadu_si512(p);
                for (int m = 0; m < M; m++)
                    for (int d = 0; d < DIGITS; d++)
                        sum[r][m][d] = _mm512_dpbusd_epi32(sum[r][m][d], code, digit[m][d]);
            }
        }
        for (int m = 0; m < M; m++)
            for (int r = 0; r < R; r++)
                total[r][m] = f_fma(joined(sum[r][m], DIGITS), f_all(factors[(r * M + m) * in.padded + segment]),
                                    total[r][m]);
    }
}

// The same with a scale per 16 columns: lanes (rows, chunks, 4).
template <int DIGITS, int R, int M>
INLINE void add_lanes(const uint8_t* codes, int64_t stride, const float* lanes, const Inputs& in, int64_t first,
                      Floats (&total)[R][M]) {
    const int8_t* x = static_cast<const int8_t*>(in.values) + first * in.chunks * DIGITS * CHUNK;
    const int64_t x_stride = in.chunks * DIGITS * CHUNK;
    const int64_t start_stride = start_numbers(in);
    const int32_t* starts = in.start + first * start_stride;
    const __m512i spread = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    for (int64_t chunk = 0; chunk < in.chunks; chunk++)
        for (int r = 0; r < R; r++) {
            const __m512i code = _mm512_loadu_si512(codes + r * stride + chunk * CHUNK);
            const __m512 four = _mm512_broadcast_f32x4(_mm_loadu_ps(lanes + (r * in.chunks + chunk) * 4));
            const __m512 scale = _mm512_permutevar_ps(four, spread);
            for (int m = 0; m < M; m++) {
                __m512i sum[DIGITS];
                for (int d = 0; d < DIGITS; d++)
                    sum[d] = _mm512_dpbusd_epi32(i_load(starts + m * start_stride + (chunk * DIGITS + d) * LANES), code,
                                                 _mm512_load_si512(x + m * x_stride + (chunk * DIGITS + d) * CHUNK));
                const Floats up = f_all(in.scale[(first + m) * in.padded + chunk]);
                total[r][m] = f_fma(joined(sum, DIGITS), _mm512_mul_ps(scale, up), total[r][m]);
            }
        }
}

#else

INLINE Floats joined(const Sum* sum, int planes) {
    Floats value = i_floats(sum[0]);
    return planes > 1 ? f_fma(i_floats(sum[1]), f_all(4096), value) : value;
}

template <int BITS, int DIGITS, int R, int M>
INLINE void add_segments(const uint8_t* codes, int64_t stride, const float* scale, float* factors, const Inputs& in,
                         int64_t first, Floats (&total)[R][M]) {
    const int64_t start_stride = start_numbers(in);
    const int32_t* starts = in.start + first * start_stride;
    multiply_scales<R, M>(scale, factors, in, first);
    static_assert(BITS == 0, "");
    constexpr int planes = planes_of(DIGITS);
    const int64_t x_stride = in.chunks * planes * CHUNK;
    const int16_t* x = static_cast<const int16_t*>(in.values) + first * x_stride;
    int64_t chunk = 0;
    for (int64_t segment = 0; segment < in.segments; segment++) {
        const int64_t last = chunk + in.segment_chunks < in.chunks ? chunk + in.segment_chunks : in.chunks;
        Sum sum[R][M][planes];
        for (int m = 0; m < M; m++)
            for (int d = 0; d < planes; d++) {
                const Sum start = i_load(starts + m * start_stride + (segment * planes + d) * LANES);
                for (int r = 0; r < R; r++) sum[r][m][d] = start;
            }
        for (; chunk < last; chunk++)
            for (int block = 0; block < CHUNK / BLOCK; block++)
                for (int r = 0; r < R; r++)
                    for (int m = 0; m < M; m++)
                        for (int d = 0; d < planes; d++)
                            sum[r][m][d] = i_add_products(
                                sum[r][m][d], codes + r * stride + chunk * CHUNK + block * BLOCK,
                                x + m * x_stride + (chunk * planes + d) * CHUNK + block * BLOCK);
        for (int m = 0; m < M; m++)
            for (int r = 0; r < R; r++)
                total[r][m] = f_fma(joined(sum[r][m], planes), f_all(factors[(r * M + m) * in.padded + segment]),
                                    total[r][m]);
    }
}

template <int DIGITS, int R, int M>
INLINE void add_lanes(const uint8_t* codes, int64_t stride, const float* lanes, const Inputs& in, int64_t first,
                      Floats (&total)[R][M]) {
    constexpr int planes = planes_of(DIGITS);
    const int64_t x_stride = in.chunks * planes * CHUNK;
    const int16_t* x = static_cast<const int16_t*>(in.values) + first * x_stride;
    const int64_t start_stride = start_numbers(in);
    const int32_t* starts = in.start + first * start_stride;
    for (int64_t chunk = 0; chunk < in.chunks; chunk++)
        for (int block = 0; block < CHUNK / BLOCK; block++)
            for (int r = 0; r < R; r++)
                for (int m = 0; m < M; m++) {
                    Sum sum[planes];
                    for (int d = 0; d < planes; d++)
                        sum[d] = i_add_products(i_load(starts + m * start_stride +
                                                       ((chunk * PARTS + block) * planes + d) * LANES),
                                                codes + r * stride + chunk * CHUNK + block * BLOCK,
                                                x + m * x_stride + (chunk * planes + d) * CHUNK + block * BLOCK);
                    const float up = in.scale[(first + m) * in.padded + chunk];
                    const float scale = lanes[(r * in.chunks + chunk) * 4 + block];
                    total[r][m] = f_fma(joined(sum, planes), f_all(scale * up), total[r][m]);
                }
}

#endif

struct Output {
    const void* bias;
    void* out;
    int64_t stride, first;
    int32_t type;
    // total[r][m] to rows row.. and inputs index..
    template <int R, int M>
    inline __attribute__((always_inline)) void write(int64_t row, int64_t index, const Floats (&total)[R][M]) const {
        const int64_t column = row - first;
        for (int m = 0; m < M; m++) {
            const int64_t at = (index + m) * stride + column;
#if VNNI
            if constexpr (R == 4) {
                const __m128 sums = sum_of_four(total[0][m], total[1][m], total[2][m], total[3][m]);
                if (type == FLOAT32) {
                    const __m128 add = bias ? _mm_loadu_ps(static_cast<const float*>(bias) + column) : _mm_setzero_ps();
                    _mm_storeu_ps(static_cast<float*>(out) + at, _mm_add_ps(sums, add));
                    continue;
                }
                alignas(16) float four[4];
                _mm_store_ps(four, sums);
                for (int r = 0; r < 4; r++)
                    store(out, at + r, type, four[r] + (bias ? load(bias, column + r, type) : 0));
                continue;
            }
#endif
            for (int r = 0; r < R; r++)
                store(out, at + r, type, f_sum(total[r][m]) + (bias ? load(bias, column + r, type) : 0));
        }
    }
};

// R rows with M inputs.
template <int BITS, int DIGITS, int R, int M>
INLINE void multiply_tile(const uint8_t* codes, int64_t stride, const Scratch& scratch, const Inputs& in, int64_t row,
                          int64_t first, const Output& output) {
    Floats total[R][M];
    for (int m = 0; m < M; m++)
        for (int r = 0; r < R; r++) {
            total[r][m] = f_zero();
            for (int64_t g = 0; in.sums && g < in.groups; g += WIDTH)
                total[r][m] = f_minus_product(f_load(scratch.zero + r * in.groups + g),
                                              f_load(in.sums + (first + m) * in.groups + g), total[r][m]);
        }
    if (BITS == 0 && in.lanes) add_lanes<DIGITS, R, M>(codes, stride, scratch.lanes, in, first, total);
    else add_segments<BITS, DIGITS, R, M>(codes, stride, scratch.scale, scratch.lanes, in, first, total);
    output.write(row, first, total);
}

// Scales by 16 columns from scales by group of a multiple of 16 columns.
INLINE void spread_scales(const float* scale, int64_t group, int64_t count, float* lanes) {
    int64_t i = 0;
#if VNNI
    if (group == 32) {
        const __m512i twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
        for (; i + 16 <= count; i += 16)
            _mm512_storeu_ps(lanes + i, _mm512_permutexvar_ps(
                twice, _mm512_castps256_ps512(_mm256_loadu_ps(scale + i / 2))));
    }
#endif
    const int64_t wide = group / BLOCK;
    for (int64_t g = i / wide, left = wide; i < count; i++) {
        lanes[i] = scale[g];
        if (--left == 0) g++, left = wide;
    }
}

template <int BITS, int DIGITS, int R>
void multiply_rows(const Weight& w, const Inputs& in, int64_t row, const Output& output, const Scratch& scratch) {
    const int64_t bytes = row_bytes(w), groups = in.groups, lanes = in.chunks * (CHUNK / BLOCK);
    for (int r = 0; r < R; r++) {
        float* scale = scratch.scale + r * groups;
        parameters<true>(w, row + r, scale, scratch.zero + r * groups);
        if (in.lanes) spread_scales(scale, w.group, lanes, scratch.lanes + r * lanes);
        if (BITS == 0) codes_of_row(w, row + r, scratch.codes + r * in.chunks * CHUNK);
    }
    const uint8_t* codes = BITS ? w.payload + row * bytes : scratch.codes;
    const int64_t stride = BITS ? bytes : in.chunks * CHUNK;
    int64_t m = 0;
    if constexpr (BITS == 0)
        for (; m + 2 <= in.batch; m += 2)
            multiply_tile<0, DIGITS, R, 2>(codes, stride, scratch, in, row, m, output);
    for (; m < in.batch; m++) multiply_tile<BITS, DIGITS, R, 1>(codes, stride, scratch, in, row, m, output);
}

// R rows of values with M inputs in float32.
template <int R, int M>
INLINE void multiply_values(const float* values, const Inputs& in, int64_t row, int64_t first, const Output& output) {
    const int64_t length = in.chunks * CHUNK;
    const float* x = static_cast<const float*>(in.values) + first * length;
    constexpr int parts = R * M >= 4 ? 1 : 4;  // independent sums, where there are few others to hide the latency
    Floats total[R][M][parts];
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++)
            for (int part = 0; part < parts; part++) total[r][m][part] = f_zero();
    for (int64_t i = 0; i < length; i += WIDTH * parts)
        for (int part = 0; part < parts; part++)
            for (int m = 0; m < M; m++) {
                const Floats input = f_load(x + m * length + i + part * WIDTH);
                for (int r = 0; r < R; r++)
                    total[r][m][part] =
                        f_fma(f_load(values + r * length + i + part * WIDTH), input, total[r][m][part]);
            }
    Floats sum[R][M];
    for (int m = 0; m < M; m++)
        for (int r = 0; r < R; r++) {
            sum[r][m] = total[r][m][0];
            for (int part = 1; part < parts; part++) sum[r][m] = f_fma(total[r][m][part], f_all(1), sum[r][m]);
        }
    output.write(row, first, sum);
}

#if BF16
// The same in bfloat16, pairs of products added in float32.
template <int R, int M>
INLINE void multiply_values(const uint16_t* values, const Inputs& in, int64_t row, int64_t first, const Output& output) {
    const int64_t length = in.chunks * CHUNK;
    const uint16_t* x = static_cast<const uint16_t*>(in.values) + first * length;
    Floats total[R][M];
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) total[r][m] = f_zero();
    for (int64_t i = 0; i < length; i += 32)
        for (int m = 0; m < M; m++) {
            const __m512bh input = (__m512bh)_mm512_loadu_si512(x + m * length + i);
            for (int r = 0; r < R; r++)
                total[r][m] = _mm512_dpbf16_ps(total[r][m], (__m512bh)_mm512_loadu_si512(values + r * length + i), input);
        }
    output.write(row, first, total);
}
#endif

template <int R, typename Value>
INLINE void multiply_batch(const Value* values, const Inputs& in, int64_t row, const Output& output) {
    int64_t m = 0;
    for (; m + 4 <= in.batch; m += 4) multiply_values<R, 4>(values, in, row, m, output);
    for (; m < in.batch; m++) multiply_values<R, 1>(values, in, row, m, output);
}

template <int R>
void multiply_decoded(const Weight& w, const Inputs& in, int64_t row, const Output& output, const Scratch& scratch) {
    const int64_t length = in.chunks * CHUNK;
#if BF16
    if (in.digits == BFLOATS) {  // the room for four rows of float32 holds four of bfloat16 and one of float32
        uint16_t* narrowed = reinterpret_cast<uint16_t*>(scratch.values);
        float* wide = scratch.values + 3 * length;
        for (int r = 0; r < R; r++)
            bfloats_of_row(w, row + r, narrowed + r * length, wide, scratch.codes, scratch.scale, scratch.zero);
        return multiply_batch<R>(narrowed, in, row, output);
    }
#endif
    for (int r = 0; r < R; r++)
        values_of_row(w, row + r, scratch.values + r * length, scratch.codes, scratch.scale, scratch.zero);
    multiply_batch<R>(scratch.values, in, row, output);
}

template <int BITS, int DIGITS>
void linear_integers(const Weight& w, const Inputs& in, int64_t first, int64_t last, const Output& output,
                     const Scratch& scratch) {
    int64_t row = first;
    for (; row + 4 <= last; row += 4) multiply_rows<BITS, DIGITS, 4>(w, in, row, output, scratch);
    for (; row < last; row++) multiply_rows<0, DIGITS, 1>(w, in, row, output, scratch);
}

template <int DIGITS>
void linear_digits(const Weight& w, const Inputs& in, int64_t first, int64_t last, const Output& output,
                   const Scratch& scratch) {
#if VNNI
    if (w.kind == INT && !in.lanes && w.columns % CHUNK == 0 && in.batch == 1) {  // codes go from the file to registers
        switch (w.bits) {
            case 2: return linear_integers<2, DIGITS>(w, in, first, last, output, scratch);
            case 3: return linear_integers<3, DIGITS>(w, in, first, last, output, scratch);
            case 4: return linear_integers<4, DIGITS>(w, in, first, last, output, scratch);
            case 5: return linear_integers<5, DIGITS>(w, in, first, last, output, scratch);
            case 6: return linear_integers<6, DIGITS>(w, in, first, last, output, scratch);
            case 7: return linear_integers<7, DIGITS>(w, in, first, last, output, scratch);
            default: return linear_integers<8, DIGITS>(w, in, first, last, output, scratch);
        }
    }
#endif
    linear_integers<0, DIGITS>(w, in, first, last, output, scratch);
}

void linear(const Weight& w, const Inputs& in, int64_t first, int64_t last, const void* bias, void* out,
            int64_t out_stride, int64_t out_first, int32_t type, uint8_t* memory) {
    const Scratch scratch(w, memory);
    const Output output{bias, out, out_stride, out_first, type};
    if (in.digits == 1) return linear_digits<1>(w, in, first, last, output, scratch);
    if (in.digits == 2) return linear_digits<2>(w, in, first, last, output, scratch);
    if (in.digits == 3) return linear_digits<3>(w, in, first, last, output, scratch);
    int64_t row = first;
    for (; row + 4 <= last; row += 4) multiply_decoded<4>(w, in, row, output, scratch);
    for (; row < last; row++) multiply_decoded<1>(w, in, row, output, scratch);
}

}  // namespace

const Rows rows = {NAME_OF(ISA), BF16, chunk_bytes, start_numbers, prepare, linear, WIDTH, multiply_many, decode};

}  // namespace ISA
}  // namespace slimwright
