// From the bytes of a packed matrix to codes, scales and dense values of a row.
#pragma once

#include "packed_vectors.h"

namespace slimwright {
namespace ISA {
namespace {

// -- codes ----------------------------------------------------------------------------------------------------------

// Planes of `length` codes, widest first (weights/packing.py).
template <int BITS>
INLINE void unpack_planes(const uint8_t* packed, uint8_t* codes, int length) {
    int shift = 0;
    for (int width = 8; width; width /= 2) {
        if (!(BITS & width)) continue;
        const int bytes = length * width / 8, mask = (1 << width) - 1;
        if (width == 1) {
            for (int j = 0; j < bytes; j++)
                for (int k = 0; k < 8; k++) {
                    const uint8_t bit = uint8_t(((packed[j] >> k) & 1) << shift);
                    codes[8 * j + k] = shift ? codes[8 * j + k] | bit : bit;
                }
        } else {
            for (int k = 0; k < 8 / width; k++)
                for (int j = 0; j < bytes; j++) {
                    const uint8_t part = uint8_t(((packed[j] >> (k * width)) & mask) << shift);
                    codes[j + k * bytes] = shift ? codes[j + k * bytes] | part : part;
                }
        }
        packed += bytes;
        shift += width;
    }
}

#if VNNI
// The 64 codes of a whole chunk, one byte each.
template <int BITS>
INLINE __m512i load_chunk(const uint8_t* p) {
    static_assert(BITS >= 2 && BITS <= 8, "");
    __m512i codes = _mm512_setzero_si512();
    if constexpr (BITS == 8) return _mm512_loadu_si512(p);
    if constexpr (BITS & 4) {
        const __m512i twice = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        const __m512i shifted = _mm512_srlv_epi64(twice, _mm512_set_epi64(4, 4, 4, 4, 0, 0, 0, 0));
        codes = _mm512_and_si512(shifted, _mm512_set1_epi8(15));
    }
    if constexpr (BITS & 2) {
        const __m128i plane = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + (BITS & 4 ? 32 : 0)));
        const __m512i four = _mm512_broadcast_i32x4(plane);
        if constexpr (BITS & 4) {  // to bits 4 and 5
            const __m512i turned = _mm512_rolv_epi64(four, _mm512_set_epi64(62, 62, 0, 0, 2, 2, 4, 4));
            codes = _mm512_or_si512(codes, _mm512_and_si512(turned, _mm512_set1_epi8(48)));
        } else {
            const __m512i shifted = _mm512_srlv_epi64(four, _mm512_set_epi64(6, 6, 4, 4, 2, 2, 0, 0));
            codes = _mm512_and_si512(shifted, _mm512_set1_epi8(3));
        }
    }
    if constexpr (BITS & 1) {
        uint64_t plane;
        memcpy(&plane, p + (BITS & 6) * 8, 8);
        codes = _mm512_or_si512(codes, _mm512_maskz_set1_epi8(plane, char(1 << (BITS & 6))));
    }
    return codes;
}
#endif

template <int BITS>
INLINE void unpack_chunk(const uint8_t* packed, uint8_t* codes) {
#if VNNI
    _mm512_storeu_si512(codes, load_chunk<BITS>(packed));
#else
    unpack_planes<BITS>(packed, codes, CHUNK);
#endif
}

// Codes of a row of planes; those beyond the columns, up to whole chunks, are 0.
template <int BITS>
void unpack_row(const uint8_t* packed, int64_t columns, uint8_t* codes) {
    const int64_t whole = columns / CHUNK;
    for (int64_t c = 0; c < whole; c++) unpack_chunk<BITS>(packed + c * 8 * BITS, codes + c * CHUNK);
    const int rest = int(columns - whole * CHUNK);
    if (rest) {
        memset(codes + whole * CHUNK, 0, CHUNK);
        const int length = (rest + 7) / 8 * 8;
        unpack_planes<BITS>(packed + whole * 8 * BITS, codes + whole * CHUNK, length);
        memset(codes + whole * CHUNK + rest, 0, size_t(length - rest));
    }
}

INLINE int64_t row_bytes(const Weight& w) {
    switch (w.kind) {
        case Q4_0: return w.columns / 32 * 18;
        case Q8_0: return w.columns / 32 * 34;
        case Q4_K: return w.columns / 256 * 144;
        case Q6_K: return w.columns / 256 * 210;
        default: return (w.columns + 7) / 8 * w.bits;
    }
}

void unpack_any(const uint8_t* packed, int bits, int64_t columns, uint8_t* codes) {
    switch (bits) {
        case 2: return unpack_row<2>(packed, columns, codes);
        case 3: return unpack_row<3>(packed, columns, codes);
        case 4: return unpack_row<4>(packed, columns, codes);
        case 5: return unpack_row<5>(packed, columns, codes);
        case 6: return unpack_row<6>(packed, columns, codes);
        case 7: return unpack_row<7>(packed, columns, codes);
        default: return unpack_row<8>(packed, columns, codes);
    }
}

// MXFP4's elements in halves, plus 12: integers as the other grids have them.
constexpr uint8_t MXFP4_CODES[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

// Codes of a row as unsigned bytes, zeros beyond the columns up to whole chunks.
void codes_of_row(const Weight& w, int64_t row, uint8_t* codes) {
    const uint8_t* p = w.payload + row * row_bytes(w);
    if (w.kind == Q4_0) {
        int64_t block = 0;
#if VNNI
        const __m512i shifts = _mm512_set_epi64(4, 4, 0, 0, 4, 4, 0, 0);
        for (; block + 2 <= w.columns / 32; block += 2, p += 36) {
            const __m256i first = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 2)));
            const __m256i second = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 20)));
            const __m512i both = _mm512_srlv_epi64(_mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1), shifts);
            _mm512_storeu_si512(codes + block * 32, _mm512_and_si512(both, _mm512_set1_epi8(15)));
        }
#endif
        for (; block < w.columns / 32; block++, p += 18)
            for (int j = 0; j < 16; j++) {
                codes[block * 32 + j] = p[2 + j] & 15;
                codes[block * 32 + 16 + j] = p[2 + j] >> 4;
            }
    } else if (w.kind == Q8_0) {
        for (int64_t block = 0; block < w.columns / 32; block++, p += 34)
#if VNNI
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + block * 32),
                                _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 2)),
                                                 _mm256_set1_epi8(char(128))));
#else
            for (int j = 0; j < 32; j++) codes[block * 32 + j] = p[2 + j] ^ 128;
#endif
    } else if (w.kind == Q4_K) {
        for (int64_t block = 0; block < w.columns / 256; block++, p += 144)
            for (int c = 0; c < 4; c++) unpack_chunk<4>(p + 16 + c * 32, codes + block * 256 + c * CHUNK);
    } else if (w.kind == Q6_K) {
        for (int64_t block = 0; block < w.columns / 256; block++, p += 210)
            for (int half = 0; half < 2; half++) {
                const uint8_t *low = p + 64 * half, *high = p + 128 + 32 * half;
                uint8_t* out = codes + block * 256 + 128 * half;
                for (int j = 0; j < 32; j++) {
                    out[j] = uint8_t((low[j] & 15) | (high[j] & 3) << 4);
                    out[32 + j] = uint8_t((low[32 + j] & 15) | (high[j] >> 2 & 3) << 4);
                    out[64 + j] = uint8_t((low[j] >> 4) | (high[j] >> 4 & 3) << 4);
                    out[96 + j] = uint8_t((low[32 + j] >> 4) | (high[j] >> 6) << 4);
                }
            }
    } else {
        unpack_any(p, w.bits, w.columns, codes);
        if (w.kind == MXFP4) {
            const int64_t count = chunks_of(w) * CHUNK;
#if VNNI
            const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128(
                reinterpret_cast<const __m128i*>(MXFP4_CODES)));
            for (int64_t i = 0; i < count; i += CHUNK)
                _mm512_storeu_si512(codes + i, _mm512_shuffle_epi8(table, _mm512_loadu_si512(codes + i)));
#else
            for (int64_t i = 0; i < count; i++) codes[i] = MXFP4_CODES[codes[i]];
#endif
        }
        return;
    }
    memset(codes + w.columns, 0, size_t(chunks_of(w) * CHUNK - w.columns));
}

// -- scales ---------------------------------------------------------------------------------------------------------

// Scale and zero point (in units of codes) of every group of a row of integer codes; Q4_K: the offset itself. OFFSETS:
// scale times zero point instead, nothing where all have a common zero point. Room is for the groups rounded up to 16; what is beyond the groups becomes 0.
template <bool OFFSETS>
INLINE void parameters(const Weight& w, int64_t row, float* scale, float* zero) {
    const int64_t groups = groups_of(w);
    if (w.kind == INT) {
        const uint8_t* s = static_cast<const uint8_t*>(w.scale) + row * groups * 2;
        const uint8_t* z = static_cast<const uint8_t*>(w.zero);
        int64_t g = 0;
#if VNNI
        for (; g < groups; g += 16) {
            const __mmask16 mask = groups - g < 16 ? __mmask16((1u << (groups - g)) - 1) : __mmask16(0xffff);
            const __m512 scales = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, s + g * 2));
            __m512 zeros = _mm512_set1_ps(float(1 << (w.bits - 1)));
            if (w.zero_kind == BYTES) {
                const __m128i bytes = _mm_maskz_loadu_epi8(mask, z + row * groups + g);
                zeros = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
            } else if (w.zero_kind == NIBBLES) {
                const int64_t stride = (groups + 1) / 2, rest = stride - g / 2;
                const __mmask8 some = rest < 8 ? __mmask8((1u << rest) - 1) : __mmask8(0xff);
                const __m128i pairs = _mm_cvtepu8_epi16(_mm_maskz_loadu_epi8(some, z + row * stride + g / 2));
                const __m128i nibbles = _mm_and_si128(_mm_or_si128(pairs, _mm_slli_epi16(pairs, 4)),
                                                      _mm_set1_epi16(0x0f0f));
                zeros = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(nibbles));
            } else if (w.zero_kind == HALVES) {
                zeros = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, z + (row * groups + g) * 2));
            }
            _mm512_storeu_ps(scale + g, scales);
            if (!OFFSETS || w.zero_kind != MIDDLE)
                _mm512_storeu_ps(zero + g, OFFSETS ? _mm512_mul_ps(scales, zeros) : zeros);
        }
        return;
#endif
        const float middle = float(1 << (w.bits - 1));
        for (; g < groups; g++) {
            scale[g] = half_to_float(read16(s + g * 2));
            if (w.zero_kind == BYTES) zero[g] = z[row * groups + g];
            else if (w.zero_kind == NIBBLES) zero[g] = (z[row * ((groups + 1) / 2) + g / 2] >> (g % 2 * 4)) & 15;
            else if (w.zero_kind == HALVES) zero[g] = half_to_float(read16(z + (row * groups + g) * 2));
            else zero[g] = middle;
        }
    } else if (w.kind == MXFP4) {
        const uint8_t* exponent = static_cast<const uint8_t*>(w.scale) + row * groups;
        for (int64_t g = 0; g < groups; g++) {
            const uint32_t e = exponent[g];  // 2**(e - 128), because codes count halves
            scale[g] = from_bits(e == 255 ? 0x7f800000 : e >= 2 ? (e - 1) << 23 : e == 1 ? 0x00400000 : 0x00200000);
            zero[g] = 12;
        }
    } else {
        const uint8_t* p = w.payload + row * row_bytes(w);
        for (int64_t g = 0; g < groups; g++) {
            if (w.kind == Q4_0) {
                scale[g] = half_to_float(read16(p + g * 18));
                zero[g] = 8;
            } else if (w.kind == Q8_0) {
                scale[g] = half_to_float(read16(p + g * 34));
                zero[g] = 128;
            } else if (w.kind == Q4_K) {
                const uint8_t *block = p + g / 8 * 144, *packed = block + 4;
                const int k = int(g % 8), i = k % 4;
                const int s = k < 4 ? packed[i] & 63 : (packed[8 + i] & 15) | packed[i] >> 6 << 4;
                const int m = k < 4 ? packed[4 + i] & 63 : packed[8 + i] >> 4 | packed[4 + i] >> 6 << 4;
                scale[g] = half_to_float(read16(block)) * float(s);
                zero[g] = half_to_float(read16(block + 2)) * float(m);
            } else {  // Q6_K
                const uint8_t* block = p + g / 16 * 210;
                scale[g] = half_to_float(read16(block + 208)) * float(int8_t(block[192 + g % 16]));
                zero[g] = 32;
            }
        }
    }
    if (OFFSETS) {
        if (w.kind == INT)
            for (int64_t g = 0; g < groups; g++) zero[g] *= scale[g];
        for (int64_t g = groups; g < padded_groups(w); g++) scale[g] = zero[g] = 0;
    }
}

// NF4: the absmax of one block.
INLINE float absmax_of(const Weight& w, int64_t index) {
    if (!w.block_scale) return static_cast<const float*>(w.scale)[index];
    const float offset = w.table[static_cast<const uint8_t*>(w.scale)[index]] * w.block_scale[index / 256];
    const float value = offset + *w.mean, most = 3.4028234663852886e38f;
    return value > most ? most : value < -most ? -most : value;
}

constexpr float NF4_LEVELS[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
    0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f,
};

// -- dense rows -----------------------------------------------------------------------------------------------------

#if VNNI
// Whether whole chunks have one scale.
INLINE bool has_tables(const Weight& w) {
    return w.kind == NF4 || (w.kind == INT && (w.group % CHUNK == 0 || w.group == w.columns));
}

// The values of the 16 codes of a group of 4 bits or less.
INLINE __m512 values_of_codes(const Weight& w, int64_t row, int64_t group, const float* scale, const float* zero) {
    if (w.kind == NF4)
        return _mm512_mul_ps(_mm512_loadu_ps(NF4_LEVELS), _mm512_set1_ps(absmax_of(w, row * groups_of(w) + group)));
    const __m512 codes = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_mul_ps(_mm512_sub_ps(codes, _mm512_set1_ps(zero[group])), _mm512_set1_ps(scale[group]));
}
#endif

// The values of a row in float32, zeros beyond the columns up to whole chunks. codes: room for the row's codes; scale
// and zero: for its groups.
void values_of_row(const Weight& w, int64_t row, float* values, uint8_t* codes, float* scale, float* zero) {
    const int64_t chunks = chunks_of(w);
    int64_t first = 0;  // of the chunks that remain
#if VNNI
    if (w.bits == 4 && has_tables(w)) {
        const uint8_t* p = w.payload + row * row_bytes(w);
        if (w.kind == INT) parameters<false>(w, row, scale, zero);
        __m512 table = _mm512_setzero_ps();
        for (int64_t until = 0; first < w.columns / CHUNK; first++, p += 32) {
            if (first * CHUNK == until) {
                table = values_of_codes(w, row, until / w.group, scale, zero);
                until += w.group;
            }
            for (int half = 0; half < 2; half++) {
                const __m512i q = _mm512_cvtepu8_epi32(_mm_loadu_si128(
                    reinterpret_cast<const __m128i*>(p + 16 * half)));
                float* out = values + first * CHUNK + 16 * half;
                _mm512_storeu_ps(out, _mm512_permutexvar_ps(q, table));
                _mm512_storeu_ps(out + 32, _mm512_permutexvar_ps(_mm512_srli_epi32(q, 4), table));
            }
        }
        if (first == chunks) return;
    }
#endif
    if (w.kind == NF4) {
        unpack_row<4>(w.payload + row * row_bytes(w), w.columns, codes);
        for (int64_t c = first; c < chunks; c++) {
            const float absmax = absmax_of(w, row * chunks + c);
            for (int64_t i = c * CHUNK; i < (c + 1) * CHUNK; i++) values[i] = NF4_LEVELS[codes[i]] * absmax;
        }
    } else if (w.kind == FP8) {
        const float s = static_cast<const float*>(w.scale)[w.scale_bytes == 4 ? 0 : row];
        const uint8_t* p = w.payload + row * row_bytes(w);
        for (int64_t i = 0; i < w.columns; i++) values[i] = w.table[p[i]] * s;
    } else {
        codes_of_row(w, row, codes);
        parameters<false>(w, row, scale, zero);
        for (int64_t start = 0, g = 0; start < w.columns; start += w.group, g++) {
            const int64_t stop = start + w.group < w.columns ? start + w.group : w.columns;
            const float s = scale[g], z = zero[g];
            int64_t i = start;
            if (w.kind == Q4_K)
                for (; i < stop; i++) values[i] = float(codes[i]) * s - z;
            for (; i + BLOCK <= stop; i += BLOCK)  // a fixed length, so that short groups are vectors too
                for (int k = 0; k < BLOCK; k++) values[i + k] = (float(codes[i + k]) - z) * s;
            for (; i < stop; i++) values[i] = (float(codes[i]) - z) * s;
        }
    }
    for (int64_t i = w.columns; i < chunks * CHUNK; i++) values[i] = 0;
}

#if BF16
INLINE void narrow(const float* values, int64_t length, uint16_t* out) {
    for (int64_t i = 0; i < length; i += 32) {
        const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(values + i + 16), _mm512_loadu_ps(values + i));
        _mm512_storeu_si512(out + i, (__m512i)both);
    }
}

// (codes - z) * s of 32 codes.
INLINE __m512i narrow_codes(__m256i bytes, __m512 s, __m512 z) {
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm256_castsi256_si128(bytes)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm256_extracti128_si256(bytes, 1)));
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(_mm512_sub_ps(high, z), s),
                                        _mm512_mul_ps(_mm512_sub_ps(low, z), s));
}

// Whole chunks of one scale each, straight to bfloat16.
template <int BITS>
INLINE void narrow_chunks(const Weight& w, int64_t row, uint16_t* out, const float* scale, const float* zero) {
    const uint8_t* p = w.payload + row * row_bytes(w);
    __m512i table = _mm512_setzero_si512();
    __m512 s = _mm512_setzero_ps(), z = s;
    for (int64_t c = 0, until = 0; c < w.columns / CHUNK; c++, p += 8 * BITS, out += CHUNK) {
        if (c * CHUNK == until) {
            const int64_t group = until / w.group;
            if constexpr (BITS <= 4)
                table = _mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh(values_of_codes(w, row, group, scale, zero)));
            else s = _mm512_set1_ps(scale[group]), z = _mm512_set1_ps(zero[group]);
            until += w.group;
        }
        const __m512i codes = load_chunk<BITS>(p);
        for (int half = 0; half < 2; half++) {
            const __m256i bytes = half ? _mm512_extracti64x4_epi64(codes, 1) : _mm512_castsi512_si256(codes);
            const __m512i words = BITS <= 4 ? _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(bytes), table)
                                            : narrow_codes(bytes, s, z);
            _mm512_storeu_si512(out + 32 * half, words);
        }
    }
}

// Groups of a multiple of 32 columns from unpacked codes.
INLINE void narrow_groups(const Weight& w, int64_t row, uint16_t* out, const uint8_t* codes, const float* scale,
                          const float* zero) {
    const bool tables = w.kind == Q4_0 || (w.kind == INT && w.bits <= 4);
    for (int64_t i = 0, group = 0; i < w.columns; group++) {
        const __m512 s = _mm512_set1_ps(scale[group]), z = _mm512_set1_ps(zero[group]);
        const int64_t stop = i + w.group < w.columns ? i + w.group : w.columns;
        if (tables) {
            const __m512i table = _mm512_castsi256_si512(
                (__m256i)_mm512_cvtneps_pbh(values_of_codes(w, row, group, scale, zero)));
            for (; i < stop; i += 32) {
                const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i));
                _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(bytes), table));
            }
        } else {
            for (; i < stop; i += 32) {
                const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i));
                _mm512_storeu_si512(out + i, narrow_codes(bytes, s, z));
            }
        }
    }
}

// The values of a row rounded to bfloat16, zeros beyond the columns up to whole chunks. wide: room for them in float32.
void bfloats_of_row(const Weight& w, int64_t row, uint16_t* out, float* wide, uint8_t* codes, float* scale,
                    float* zero) {
    if (has_tables(w) && w.columns % CHUNK == 0) {
        if (w.kind == INT) parameters<false>(w, row, scale, zero);
        switch (w.bits) {
            case 2: return narrow_chunks<2>(w, row, out, scale, zero);
            case 3: return narrow_chunks<3>(w, row, out, scale, zero);
            case 4: return narrow_chunks<4>(w, row, out, scale, zero);
            case 5: return narrow_chunks<5>(w, row, out, scale, zero);
            case 6: return narrow_chunks<6>(w, row, out, scale, zero);
            case 7: return narrow_chunks<7>(w, row, out, scale, zero);
            default: return narrow_chunks<8>(w, row, out, scale, zero);
        }
    }
    if (w.kind != FP8 && w.kind != NF4 && w.kind != Q4_K && w.group % 32 == 0 && w.columns % CHUNK == 0) {
        codes_of_row(w, row, codes);
        parameters<false>(w, row, scale, zero);
        return narrow_groups(w, row, out, codes, scale, zero);
    }
    values_of_row(w, row, wide, codes, scale, zero);
    narrow(wide, chunks_of(w) * CHUNK, out);
}
#endif

// Where the parts of a thread's scratch begin, each for ROWS rows.
struct Scratch {
    float* values;         // chunks * 64
    uint8_t* codes;        // chunks * 64
    float *scale, *zero;   // padded groups
    float* lanes;          // scales by 16 columns, chunks * 4; else 2 * padded segments
    Scratch(const Weight& w, uint8_t* memory) {
        const int64_t room = chunks_of(w) * CHUNK * ROWS;
        values = reinterpret_cast<float*>(memory + (64 - reinterpret_cast<uintptr_t>(memory) % 64) % 64);
        codes = reinterpret_cast<uint8_t*>(values + room);
        scale = reinterpret_cast<float*>(codes + room);
        zero = scale + ROWS * padded_groups(w);
        lanes = zero + ROWS * padded_groups(w);
    }
};

void decode(const Weight& w, int64_t row, void* out, int32_t type, uint8_t* memory) {
    const Scratch scratch(w, memory);
    float* values = scratch.values;
#if BF16
    if (type == BFLOAT16) {
        if (w.columns % CHUNK == 0)  // whole chunks: nothing is written beyond the row
            return bfloats_of_row(w, row, static_cast<uint16_t*>(out), values, scratch.codes, scratch.scale, scratch.zero);
        uint16_t* narrowed = reinterpret_cast<uint16_t*>(values + chunks_of(w) * CHUNK);
        bfloats_of_row(w, row, narrowed, values, scratch.codes, scratch.scale, scratch.zero);
        memcpy(out, narrowed, size_t(w.columns) * 2);
        return;
    }
#endif
    if (type == FLOAT32 && w.columns % CHUNK == 0)
        return values_of_row(w, row, static_cast<float*>(out), scratch.codes, scratch.scale, scratch.zero);
    values_of_row(w, row, values, scratch.codes, scratch.scale, scratch.zero);
    if (type == FLOAT32) memcpy(out, values, size_t(w.columns) * 4);
    else
        for (int64_t i = 0; i < w.columns; i++) static_cast<uint16_t*>(out)[i] = float_to_bfloat(values[i]);
}

}  // namespace
}  // namespace ISA
}  // namespace slimwright
