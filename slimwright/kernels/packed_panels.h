// Products with many inputs: rows of the weight are decoded into a thread's cache and laid out there in panels, so that
// of a step of columns the values of all rows of a panel stand side by side. A value of an input is then multiplied with
// whole vectors of rows, and sums are never added up across a vector. Nothing dense is written to memory, which the
// library's product with dense tiles would read again.
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
constexpr int AT_ONCE = 8;             // inputs
#else
constexpr int AT_ONCE = 4;
#endif
static_assert(PANEL_VECTORS == 3, "the calls below are by vectors");

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
#endif

// Rows of `steps` numbers of 32 bits, `stride` apart, as vector `v` of a panel of `width` rows.
INLINE void lay_out(const uint32_t* rows, int64_t stride, int64_t steps, int64_t width, int64_t v, uint32_t* panel) {
    uint32_t* out = panel + v * WIDTH;
#if VNNI
    for (int64_t at = 0; at < steps; at += 16) {  // rows have whole chunks
        __m512i block[16];
        for (int i = 0; i < 16; i++) block[i] = _mm512_loadu_si512(rows + i * stride + at);
        transpose(block);
        const int64_t last = steps - at < 16 ? steps - at : 16;
        for (int64_t i = 0; i < last; i++) _mm512_storeu_si512(out + (at + i) * width, block[i]);
    }
#else
    for (int64_t at = 0; at < steps; at++)
        for (int i = 0; i < WIDTH; i++) out[at * width + i] = rows[i * stride + at];
#endif
}

template <bool BF>
INLINE Floats add_steps(const uint8_t* input, Floats weight, Floats sum) {
    uint32_t x;
    memcpy(&x, input, 4);
#if BF16
    if constexpr (BF)
        return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(int32_t(x)), (__m512bh)_mm512_castps_si512(weight));
#endif
    return f_fma(f_all(from_bits(x)), weight, sum);
}

// sums (AT_ONCE, V vectors): of `count` steps, added to what is there if `more`.
template <bool BF, int V>
INLINE void multiply_steps(const uint8_t* const* inputs, int64_t start, const float* weight, int64_t count, float* sums,
                           bool more) {
    const uint8_t* x[AT_ONCE];
    for (int r = 0; r < AT_ONCE; r++) x[r] = inputs[r] + start * 4;
    Floats total[AT_ONCE][V];
    for (int r = 0; r < AT_ONCE; r++)
        for (int v = 0; v < V; v++) total[r][v] = f_zero();
    for (int64_t k = 0; k < count; k++, weight += V * WIDTH) {
        Floats own[V];
        for (int v = 0; v < V; v++) own[v] = f_load(weight + v * WIDTH);
        for (int r = 0; r < AT_ONCE; r++)
            for (int v = 0; v < V; v++) total[r][v] = add_steps<BF>(x[r] + k * 4, own[v], total[r][v]);
    }
    for (int r = 0; r < AT_ONCE; r++)
        for (int v = 0; v < V; v++) {
            float* at = sums + (r * V + v) * WIDTH;
            f_store(at, more ? f_add(f_load(at), total[r][v]) : total[r][v]);
        }
}

// sums (AT_ONCE, V vectors) of all steps.
template <bool BF, int V>
void multiply_panel(const uint8_t* const* inputs, const float* weight, int64_t steps, float* sums) {
    for (int64_t k = 0; k < steps; k += STEPS)
        multiply_steps<BF, V>(inputs, k, weight + k * V * WIDTH, steps - k < STEPS ? steps - k : STEPS, sums, k > 0);
}

// `count` sums of one input with rows side by side to `out`, with their bias.
INLINE void write_sums(const float* sums, int64_t count, const void* bias, void* out, int32_t type) {
    int64_t i = 0;
#if VNNI
    for (; i < count; i += 16) {
        const __mmask16 some = count - i < 16 ? __mmask16((1u << (count - i)) - 1) : __mmask16(0xffff);
        __m512 sum = _mm512_loadu_ps(sums + i);
        if (type == FLOAT32) {
            if (bias) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(some, static_cast<const float*>(bias) + i));
            _mm512_mask_storeu_ps(static_cast<float*>(out) + i, some, sum);
            continue;
        }
        if (bias) {
            const __m256i add = _mm256_maskz_loadu_epi16(some, static_cast<const uint16_t*>(bias) + i);
            sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(add), 16)));
        }
        const __m512i bits = _mm512_castps_si512(sum);  // to nearest, ties to even, as torch rounds
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(sum, sum, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
        _mm256_mask_storeu_epi16(static_cast<uint16_t*>(out) + i, some, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
    }
#endif
    for (; i < count; i++) store(out, i, type, sums[i] + (bias ? load(bias, i, type) : 0));
}

// Rows first .. last of the weight with all inputs; see Rows.
void multiply_many(const Weight& w, const Many& in, int64_t first, int64_t last, const void* bias, void* out,
                   int64_t stride, int32_t type, uint8_t* memory, uint8_t* row_memory) {
    const Scratch scratch(w, row_memory);
    const int64_t length = chunks_of(w) * CHUNK, rows = last - first, vectors = divide_up(rows, WIDTH);
    const int64_t step = in.bfloats ? length / 2 : length, steps = in.bfloats ? divide_up(w.columns, 2) : w.columns;
    uint32_t* strip = reinterpret_cast<uint32_t*>(memory);  // the rows of a vector
    uint32_t* weight = strip + WIDTH * step;
    alignas(64) float sums[AT_ONCE * PANEL_VECTORS * WIDTH];
    for (int64_t v = 0; v < vectors; v++) {
        for (int64_t r = 0; r < WIDTH; r++) {
            const int64_t row = first + v * WIDTH + r;
            uint32_t* to = strip + r * step;
            if (row >= last) memset(to, 0, size_t(step) * 4);
#if BF16
            else if (in.bfloats)
                bfloats_of_row(w, row, reinterpret_cast<uint16_t*>(to), scratch.values, scratch.codes, scratch.scale,
                               scratch.zero);
#endif
            else values_of_row(w, row, reinterpret_cast<float*>(to), scratch.codes, scratch.scale, scratch.zero);
        }
        const int64_t panel = v / PANEL_VECTORS * PANEL_VECTORS;
        const int64_t width = (vectors - panel < PANEL_VECTORS ? vectors - panel : PANEL_VECTORS) * WIDTH;
        lay_out(strip, step, steps, width, v - panel, weight + panel * WIDTH * steps);
    }
    const int64_t element = type == FLOAT32 ? 4 : 2;
    for (int64_t m = 0; m < in.batch; m += AT_ONCE) {
        const uint8_t* x[AT_ONCE];
        const int64_t count = in.batch - m < AT_ONCE ? in.batch - m : AT_ONCE;
        for (int r = 0; r < AT_ONCE; r++) x[r] = in.x + (m + (r < count ? r : count - 1)) * in.stride;
        for (int64_t panel = 0; panel < vectors; panel += PANEL_VECTORS) {
            const float* own = reinterpret_cast<const float*>(weight + panel * WIDTH * steps);
            const int64_t here = vectors - panel < PANEL_VECTORS ? vectors - panel : PANEL_VECTORS;
            if (in.bfloats) {
                if (here == 3) multiply_panel<true, 3>(x, own, steps, sums);
                else if (here == 2) multiply_panel<true, 2>(x, own, steps, sums);
                else multiply_panel<true, 1>(x, own, steps, sums);
            } else {
                if (here == 3) multiply_panel<false, 3>(x, own, steps, sums);
                else if (here == 2) multiply_panel<false, 2>(x, own, steps, sums);
                else multiply_panel<false, 1>(x, own, steps, sums);
            }
            const int64_t column = panel * WIDTH, left = rows - column < here * WIDTH ? rows - column : here * WIDTH;
            for (int64_t r = 0; r < count; r++)
                write_sums(sums + r * here * WIDTH, left,
                           bias ? static_cast<const uint8_t*>(bias) + column * element : nullptr,
                           static_cast<uint8_t*>(out) + ((m + r) * stride + column) * element, type);
        }
    }
}

}  // namespace
}  // namespace ISA
}  // namespace slimwright
