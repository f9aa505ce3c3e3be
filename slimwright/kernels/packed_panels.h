// Products with many inputs: rows of the weight are decoded into a thread's cache and multiplied there with inputs that
// lie in panels, so that of a step of columns the values of all inputs of a panel stand side by side. A value of the
// weight is then multiplied with whole vectors of inputs, and sums are never added up across a vector. Nothing dense is
// written to memory, which the library's product with dense tiles would read again.
//
// A step is one column in float32, or two neighbours in bfloat16: 32 bits either way. Sums of 256 steps are taken in
// registers, in order, and these added in order: a result depends neither on threads nor on the other inputs.
#pragma once

#include "packed_codes.h"

namespace slimwright {
namespace ISA {
namespace {

constexpr int64_t STEPS = 256;         // that are summed in registers
#if VNNI
constexpr int AT_ONCE = 8;             // rows of the weight
#else
constexpr int AT_ONCE = 4;
#endif
static_assert(PANEL_VECTORS == 3, "the calls below are by vectors");

int64_t panel_width() { return PANEL_VECTORS * WIDTH; }

#if VNNI
// 16 rows of 16 numbers of 32 bits become columns.
INLINE void transpose(__m512i (&r)[16]) {
    __m512i t[16];
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {  // r[4 i + j], part p: rows 4 i .. 4 i + 3 of column 4 p + j
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int j = 0; j < 4; j++) {
        const __m512i even = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), odd = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
        const __m512i even2 = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
        const __m512i odd2 = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
        t[j] = _mm512_shuffle_i32x4(even, even2, 0x88), t[8 + j] = _mm512_shuffle_i32x4(even, even2, 0xdd);
        t[4 + j] = _mm512_shuffle_i32x4(odd, odd2, 0x88), t[12 + j] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
    }
    for (int i = 0; i < 16; i++) r[i] = t[i];
}

// 16 steps of an input of `columns`, from step `at` on; zeros beyond the columns.
INLINE __m512i steps_of(const void* x, int32_t type, bool bfloats, int64_t columns, int64_t at) {
    const int64_t left = columns - (bfloats ? 2 * at : at);
    if (bfloats) {
        const __mmask32 some = left >= 32 ? ~__mmask32(0) : __mmask32((uint64_t(1) << left) - 1);
        return _mm512_maskz_loadu_epi16(some, static_cast<const uint16_t*>(x) + 2 * at);
    }
    const __mmask16 some = left >= 16 ? __mmask16(0xffff) : __mmask16((1u << left) - 1);
    if (type == FLOAT32) return _mm512_maskz_loadu_epi32(some, static_cast<const float*>(x) + at);
    const __m256i halves = _mm256_maskz_loadu_epi16(some, static_cast<const uint16_t*>(x) + at);
    return _mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
}
#endif

// Writes the inputs of vector `index` of all panels: (batch, columns) of a type, contiguous, rows beyond the batch 0.
void prepare_panel(const void* x, int32_t type, int64_t columns, int64_t index, const Panels& p) {
    const int64_t panel = index / PANEL_VECTORS * PANEL_VECTORS * WIDTH, first = index * WIDTH;
    const int64_t width = p.padded - panel < panel_width() ? p.padded - panel : panel_width();
    uint32_t* out = p.values + panel * p.steps + (first - panel);
    const int64_t element = type == FLOAT32 ? 4 : 2, count = p.batch - first < WIDTH ? p.batch - first : WIDTH;
    const uint8_t* from = static_cast<const uint8_t*>(x) + first * columns * element;
#if VNNI
    for (int64_t at = 0; at < p.steps; at += 16) {
        __m512i rows[16];
        for (int i = 0; i < 16; i++)
            rows[i] = i < count ? steps_of(from + i * columns * element, type, p.bfloats, columns, at) : _mm512_setzero_si512();
        transpose(rows);
        const int64_t last = p.steps - at < 16 ? p.steps - at : 16;
        for (int64_t i = 0; i < last; i++) _mm512_storeu_si512(out + (at + i) * width, rows[i]);
    }
#else
    for (int64_t i = 0; i < WIDTH; i++)
        for (int64_t at = 0; at < p.steps; at++)
            out[at * width + i] = i < count ? to_bits(load(from + i * columns * element, at, type)) : 0;
#endif
}

template <bool BF>
INLINE Floats add_steps(uint32_t weight, Floats x, Floats sum) {
#if BF16
    if constexpr (BF)
        return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(int32_t(weight)), (__m512bh)_mm512_castps_si512(x));
#endif
    return f_fma(f_all(from_bits(weight)), x, sum);
}

// sums (AT_ONCE, V vectors): of `count` steps, added to what is there if `more`. stride: from row to row of the weight.
template <bool BF, int V>
INLINE void multiply_steps(const uint32_t* weight, int64_t stride, const float* x, int64_t count, float* sums, bool more) {
    Floats total[AT_ONCE][V];
    for (int r = 0; r < AT_ONCE; r++)
        for (int v = 0; v < V; v++) total[r][v] = f_zero();
    for (int64_t k = 0; k < count; k++, x += V * WIDTH) {
        Floats in[V];
        for (int v = 0; v < V; v++) in[v] = f_load(x + v * WIDTH);
        for (int r = 0; r < AT_ONCE; r++)
            for (int v = 0; v < V; v++) total[r][v] = add_steps<BF>(weight[r * stride + k], in[v], total[r][v]);
    }
    for (int r = 0; r < AT_ONCE; r++)
        for (int v = 0; v < V; v++) {
            float* at = sums + (r * V + v) * WIDTH;
            f_store(at, more ? f_add(f_load(at), total[r][v]) : total[r][v]);
        }
}

// sums (rows rounded up, V vectors) of a whole panel.
template <bool BF, int V>
void multiply_panel(const uint32_t* weight, int64_t rows, int64_t stride, const float* x, int64_t steps, float* sums) {
    for (int64_t k = 0; k < steps; k += STEPS)
        for (int64_t r = 0; r < rows; r += AT_ONCE)
            multiply_steps<BF, V>(weight + r * stride + k, stride, x + k * V * WIDTH, steps - k < STEPS ? steps - k : STEPS,
                                  sums + r * V * WIDTH, k > 0);
}

// sums (rows, width) to out (inputs, stride), with the bias.
void write_panel(const float* sums, int64_t rows, int64_t width, int64_t inputs, const void* bias, void* out,
                 int64_t stride, int32_t type) {
#if VNNI
    for (int64_t r = 0; r < rows; r += 16) {
        const __mmask16 some = rows - r < 16 ? __mmask16((1u << (rows - r)) - 1) : __mmask16(0xffff);
        __m512 add = _mm512_setzero_ps();
        if (bias && type == FLOAT32) add = _mm512_maskz_loadu_ps(some, static_cast<const float*>(bias) + r);
        else if (bias)
            add = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(
                _mm256_maskz_loadu_epi16(some, static_cast<const uint16_t*>(bias) + r)), 16));
        for (int64_t m = 0; m < inputs; m += 16) {
            __m512i block[16];
            for (int i = 0; i < 16; i++)
                block[i] = r + i < rows ? _mm512_loadu_si512(sums + (r + i) * width + m) : _mm512_setzero_si512();
            transpose(block);
            for (int i = 0; i < 16 && m + i < inputs; i++) {
                const __m512 sum = _mm512_add_ps(_mm512_castsi512_ps(block[i]), add);
                const int64_t at = (m + i) * stride + r;
                if (type == FLOAT32) {
                    _mm512_mask_storeu_ps(static_cast<float*>(out) + at, some, sum);
                    continue;
                }
                const __m512i bits = _mm512_castps_si512(sum);  // to nearest, ties to even, as torch rounds
                const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
                __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
                const __mmask16 nan = _mm512_cmp_ps_mask(sum, sum, _CMP_UNORD_Q);
                rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
                _mm256_mask_storeu_epi16(static_cast<uint16_t*>(out) + at, some,
                                         _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
            }
        }
    }
#else
    for (int64_t m = 0; m < inputs; m++)
        for (int64_t r = 0; r < rows; r++)
            store(out, m * stride + r, type, sums[r * width + m] + (bias ? load(bias, r, type) : 0));
#endif
}

// Rows first .. last of the weight with all panels. memory: panel_bytes.
void multiply_panels(const Weight& w, const Panels& p, int64_t first, int64_t last, const void* bias, void* out,
                     int64_t stride, int32_t type, uint8_t* memory, uint8_t* row_memory) {
    const Scratch scratch(w, row_memory);
    const int64_t length = chunks_of(w) * CHUNK, rows = last - first;
    const int64_t step = p.bfloats ? length / 2 : length;  // 32-bit numbers of a decoded row
    uint32_t* weight = reinterpret_cast<uint32_t*>(memory);
    float* sums = reinterpret_cast<float*>(weight + divide_up(rows, 8) * 8 * step);
    for (int64_t r = 0; r < rows; r++) {
#if BF16
        if (p.bfloats) {
            bfloats_of_row(w, first + r, reinterpret_cast<uint16_t*>(weight + r * step), scratch.values, scratch.codes,
                           scratch.scale, scratch.zero);
            continue;
        }
#endif
        values_of_row(w, first + r, reinterpret_cast<float*>(weight + r * step), scratch.codes, scratch.scale, scratch.zero);
    }
    const int64_t padded = divide_up(rows, AT_ONCE) * AT_ONCE, element = type == FLOAT32 ? 4 : 2;
    memset(weight + rows * step, 0, size_t((padded - rows) * step * 4));
    for (int64_t panel = 0; panel < p.padded; panel += panel_width()) {
        const int64_t width = p.padded - panel < panel_width() ? p.padded - panel : panel_width();
        const float* x = reinterpret_cast<const float*>(p.values + panel * p.steps);
        const int64_t vectors = width / WIDTH;
        if (p.bfloats) {
            if (vectors == 3) multiply_panel<true, 3>(weight, rows, step, x, p.steps, sums);
            else if (vectors == 2) multiply_panel<true, 2>(weight, rows, step, x, p.steps, sums);
            else multiply_panel<true, 1>(weight, rows, step, x, p.steps, sums);
        } else {
            if (vectors == 3) multiply_panel<false, 3>(weight, rows, step, x, p.steps, sums);
            else if (vectors == 2) multiply_panel<false, 2>(weight, rows, step, x, p.steps, sums);
            else multiply_panel<false, 1>(weight, rows, step, x, p.steps, sums);
        }
        const int64_t inputs = p.batch - panel < width ? p.batch - panel : width;
        write_panel(sums, rows, width, inputs, bias, static_cast<uint8_t*>(out) + panel * stride * element, stride, type);
    }
}

}  // namespace
}  // namespace ISA
}  // namespace slimwright
