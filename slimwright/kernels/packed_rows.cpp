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
// Float arithmetic, for all other grids: a row is decoded to exactly the float32 values that the grid defines, and
// multiplied with fused multiply-adds.

#include "packed.h"

#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#ifndef ISA
#define ISA portable
#endif
#define INLINE static inline __attribute__((always_inline))
#define STRING_OF(x) #x
#define NAME_OF(x) STRING_OF(x)

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define VNNI 1
#else
#define VNNI 0
#endif

namespace slimwright {
namespace ISA {
namespace {

// -- numbers --------------------------------------------------------------------------------------------------------

INLINE float from_bits(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
INLINE uint32_t to_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }

INLINE uint16_t read16(const uint8_t* p) { uint16_t x; memcpy(&x, p, 2); return x; }

INLINE float half_to_float(uint16_t half) {
#if defined(__F16C__)
    return _cvtsh_ss(half);
#else
    const uint32_t sign = uint32_t(half & 0x8000) << 16, rest = half & 0x7fff;
    if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    if (rest >= 0x400) return from_bits(sign | ((rest << 13) + 0x38000000));
    return from_bits(sign | to_bits(float(rest) * 5.9604644775390625e-08f));
#endif
}

INLINE float bfloat_to_float(uint16_t x) { return from_bits(uint32_t(x) << 16); }

// To nearest, ties to even, as torch rounds.
INLINE uint16_t float_to_bfloat(float x) {
    const uint32_t bits = to_bits(x);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

INLINE void store(void* out, int64_t index, int32_t type, float value) {
    if (type == FLOAT32) static_cast<float*>(out)[index] = value;
    else static_cast<uint16_t*>(out)[index] = float_to_bfloat(value);
}

INLINE float load(const void* in, int64_t index, int32_t type) {
    return type == FLOAT32 ? static_cast<const float*>(in)[index]
                           : bfloat_to_float(static_cast<const uint16_t*>(in)[index]);
}

// -- vectors of float32 ---------------------------------------------------------------------------------------------

#if VNNI
constexpr int WIDTH = 16;
using Floats = __m512;
INLINE Floats f_zero() { return _mm512_setzero_ps(); }
INLINE Floats f_load(const float* p) { return _mm512_loadu_ps(p); }
INLINE Floats f_all(float x) { return _mm512_set1_ps(x); }
INLINE Floats f_fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
INLINE Floats f_minus_product(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
INLINE float f_sum(Floats a) { return _mm512_reduce_add_ps(a); }
INLINE __m128 sum_of_four(Floats a, Floats b, Floats c, Floats d) {
    const __m256 w = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    const __m256 x = _mm256_add_ps(_mm512_castps512_ps256(b), _mm512_extractf32x8_ps(b, 1));
    const __m256 y = _mm256_add_ps(_mm512_castps512_ps256(c), _mm512_extractf32x8_ps(c, 1));
    const __m256 z = _mm256_add_ps(_mm512_castps512_ps256(d), _mm512_extractf32x8_ps(d, 1));
    const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(w, x), _mm256_hadd_ps(y, z));
    return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int WIDTH = 8;
using Floats = __m256;
INLINE Floats f_zero() { return _mm256_setzero_ps(); }
INLINE Floats f_load(const float* p) { return _mm256_loadu_ps(p); }
INLINE Floats f_all(float x) { return _mm256_set1_ps(x); }
INLINE Floats f_fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
INLINE Floats f_minus_product(Floats a, Floats b, Floats c) { return _mm256_fnmadd_ps(a, b, c); }
INLINE float f_sum(Floats a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
#elif defined(__ARM_NEON) && defined(__aarch64__)
constexpr int WIDTH = 8;
struct Floats { float32x4_t a, b; };
INLINE Floats f_zero() { return {vdupq_n_f32(0), vdupq_n_f32(0)}; }
INLINE Floats f_load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
INLINE Floats f_all(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
INLINE Floats f_fma(Floats a, Floats b, Floats c) { return {vfmaq_f32(c.a, a.a, b.a), vfmaq_f32(c.b, a.b, b.b)}; }
INLINE Floats f_minus_product(Floats a, Floats b, Floats c) {
    return {vfmsq_f32(c.a, a.a, b.a), vfmsq_f32(c.b, a.b, b.b)};
}
INLINE float f_sum(Floats a) { return vaddvq_f32(vaddq_f32(a.a, a.b)); }
#else
constexpr int WIDTH = 8;
struct Floats { float v[8]; };
INLINE Floats f_zero() { return {{0, 0, 0, 0, 0, 0, 0, 0}}; }
INLINE Floats f_load(const float* p) { Floats a; memcpy(a.v, p, 32); return a; }
INLINE Floats f_all(float x) { return {{x, x, x, x, x, x, x, x}}; }
INLINE Floats f_fma(Floats a, Floats b, Floats c) {
    for (int i = 0; i < 8; i++) c.v[i] += a.v[i] * b.v[i];
    return c;
}
INLINE Floats f_minus_product(Floats a, Floats b, Floats c) {
    for (int i = 0; i < 8; i++) c.v[i] -= a.v[i] * b.v[i];
    return c;
}
INLINE float f_sum(Floats a) {
    return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7]));
}
#endif

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

// The values of a row in float32, zeros beyond the columns up to whole chunks. codes: room for the row's codes; scale
// and zero: for its groups.
void values_of_row(const Weight& w, int64_t row, float* values, uint8_t* codes, float* scale, float* zero) {
    const int64_t chunks = chunks_of(w);
    if (w.kind == NF4) {
        const uint8_t* p = w.payload + row * row_bytes(w);
        int64_t c = 0;
#if VNNI
        const __m512 levels = _mm512_loadu_ps(NF4_LEVELS);
        for (; c < w.columns / CHUNK; c++, p += 32) {
            const __m512 absmax = _mm512_set1_ps(absmax_of(w, row * chunks + c));
            for (int half = 0; half < 2; half++) {
                const __m512i q = _mm512_cvtepu8_epi32(_mm_loadu_si128(
                    reinterpret_cast<const __m128i*>(p + 16 * half)));
                float* out = values + c * CHUNK + 16 * half;
                _mm512_storeu_ps(out, _mm512_mul_ps(_mm512_permutexvar_ps(q, levels), absmax));
                const __m512i high = _mm512_srli_epi32(q, 4);
                _mm512_storeu_ps(out + 32, _mm512_mul_ps(_mm512_permutexvar_ps(high, levels), absmax));
            }
        }
        p = w.payload + row * row_bytes(w);
#endif
        if (c < chunks) unpack_row<4>(p, w.columns, codes);
        for (; c < chunks; c++) {
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
            if (w.kind == Q4_K)
                for (int64_t i = start; i < stop; i++) values[i] = float(codes[i]) * s - z;
            else
                for (int64_t i = start; i < stop; i++) values[i] = (float(codes[i]) - z) * s;
        }
    }
    for (int64_t i = w.columns; i < chunks * CHUNK; i++) values[i] = 0;
}

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
    values_of_row(w, row, values, scratch.codes, scratch.scale, scratch.zero);
    if (type == FLOAT32) memcpy(out, values, size_t(w.columns) * 4);
    else
        for (int64_t i = 0; i < w.columns; i++) static_cast<uint16_t*>(out)[i] = float_to_bfloat(values[i]);
}

// -- sums of products -----------------------------------------------------------------------------------------------

#if VNNI
constexpr int LANES = 16, PARTS = 1;  // numbers in a Sum; Sums of a chunk with a scale per 16 columns
using Sum = __m512i;
INLINE Sum i_zero() { return _mm512_setzero_si512(); }
INLINE Sum i_add_products(Sum sum, const uint8_t* codes, const int8_t* x) {  // of 64 columns
    return _mm512_dpbusd_epi32(sum, _mm512_loadu_si512(codes), _mm512_load_si512(x));
}
#else
constexpr int LANES = 8, PARTS = 4;
#if defined(__AVX2__) && defined(__FMA__)
using Sum = __m256i;
INLINE Sum i_zero() { return _mm256_setzero_si256(); }
INLINE Sum i_add_products(Sum sum, const uint8_t* codes, const int16_t* x) {  // of 16 columns
    const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(wide, _mm256_load_si256(reinterpret_cast<const __m256i*>(x))));
}
INLINE Floats i_floats(Sum sum) { return _mm256_cvtepi32_ps(sum); }
#elif defined(__ARM_NEON) && defined(__aarch64__)
struct Sum { int32x4_t a, b; };
INLINE Sum i_zero() { return {vdupq_n_s32(0), vdupq_n_s32(0)}; }
INLINE Sum i_add_products(Sum sum, const uint8_t* codes, const int16_t* x) {
    const uint8x16_t bytes = vld1q_u8(codes);
    const int16x8_t low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(bytes)));
    const int16x8_t high = vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(bytes)));
    const int16x8_t x0 = vld1q_s16(x), x1 = vld1q_s16(x + 8);
    sum.a = vmlal_s16(vmlal_s16(sum.a, vget_low_s16(low), vget_low_s16(x0)), vget_low_s16(high), vget_low_s16(x1));
    sum.b = vmlal_high_s16(vmlal_high_s16(sum.b, low, x0), high, x1);
    return sum;
}
INLINE Floats i_floats(Sum sum) { return {vcvtq_f32_s32(sum.a), vcvtq_f32_s32(sum.b)}; }
#else
struct Sum { int32_t v[8]; };
INLINE Sum i_zero() { return {{0, 0, 0, 0, 0, 0, 0, 0}}; }
INLINE Sum i_add_products(Sum sum, const uint8_t* codes, const int16_t* x) {
    for (int i = 0; i < 8; i++) sum.v[i] += int32_t(codes[i]) * x[i] + int32_t(codes[i + 8]) * x[i + 8];
    return sum;
}
INLINE Floats i_floats(Sum sum) {
    Floats a;
    for (int i = 0; i < 8; i++) a.v[i] = float(sum.v[i]);
    return a;
}
#endif
#endif
INLINE void i_negate(const Sum& sum, int32_t* out) {
    memcpy(out, &sum, sizeof(sum));
    for (int i = 0; i < LANES; i++) out[i] = -out[i];
}
INLINE Sum i_load(const int32_t* p) { Sum sum; memcpy(&sum, p, sizeof(sum)); return sum; }

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

template <int R>
void multiply_decoded(const Weight& w, const Inputs& in, int64_t row, const Output& output, const Scratch& scratch) {
    const int64_t length = in.chunks * CHUNK;
    for (int r = 0; r < R; r++)
        values_of_row(w, row + r, scratch.values + r * length, scratch.codes, scratch.scale, scratch.zero);
    int64_t m = 0;
    for (; m + 4 <= in.batch; m += 4) multiply_values<R, 4>(scratch.values, in, row, m, output);
    for (; m < in.batch; m++) multiply_values<R, 1>(scratch.values, in, row, m, output);
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
    for (; row + 2 <= last; row += 2) multiply_decoded<2>(w, in, row, output, scratch);
    for (; row < last; row++) multiply_decoded<1>(w, in, row, output, scratch);
}

}  // namespace

extern const Rows rows;
const Rows rows = {NAME_OF(ISA), chunk_bytes, start_numbers, prepare, linear, decode};

}  // namespace ISA
}  // namespace slimwright
