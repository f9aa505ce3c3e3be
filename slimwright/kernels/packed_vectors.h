// Numbers and short vectors of one instruction set: float32 values, and sums of products of codes with integers.
#pragma once

#include "packed.h"

#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define STRING_OF(x) #x
#define NAME_OF(x) STRING_OF(x)

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define VNNI 1
#else
#define VNNI 0
#endif

#if VNNI && defined(__AVX512BF16__)
#define BF16 1
#else
#define BF16 0
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
INLINE void f_store(float* p, Floats a) { _mm512_storeu_ps(p, a); }
INLINE Floats f_all(float x) { return _mm512_set1_ps(x); }
INLINE Floats f_add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
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
INLINE void f_store(float* p, Floats a) { _mm256_storeu_ps(p, a); }
INLINE Floats f_all(float x) { return _mm256_set1_ps(x); }
INLINE Floats f_add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
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
INLINE void f_store(float* p, Floats a) { vst1q_f32(p, a.a), vst1q_f32(p + 4, a.b); }
INLINE Floats f_all(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
INLINE Floats f_add(Floats a, Floats b) { return {vaddq_f32(a.a, b.a), vaddq_f32(a.b, b.b)}; }
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
INLINE void f_store(float* p, const Floats& a) { memcpy(p, a.v, 32); }
INLINE Floats f_all(float x) { return {{x, x, x, x, x, x, x, x}}; }
INLINE Floats f_add(Floats a, const Floats& b) {
    for (int i = 0; i < 8; i++) a.v[i] += b.v[i];
    return a;
}
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

}  // namespace
}  // namespace ISA
}  // namespace slimwright
