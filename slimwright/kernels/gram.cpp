// Gram matrices of bfloat16 inputs, summed in float32: torch has no such product on the CPU (its bfloat16 products round
// their sums to bfloat16, and the float32 ones run at half the rate). Plain C ABI, no torch. Threads are those of the
// caller's OpenMP runtime, whose `GOMP_parallel` it hands over; every element is summed by one of them in one order, so
// that the result does not depend on how many there are.

#include <atomic>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && ((defined(__GNUC__) && __GNUC__ >= 10) || defined(__clang__))
#define HAS_BF16 1
#include <immintrin.h>
#define BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,fma")))
#else
#define HAS_BF16 0
#endif

namespace {

constexpr int64_t PANEL = 16;  // columns that are packed together: one register of pairs
constexpr int64_t WIDE = 3;    // panels of the wide side of a tile
constexpr int64_t TALL = 8;    // columns of its other side

#if HAS_BF16

// total[r][c] += sum over pairs of a[r] b[c] for TALL columns r of one panel and N panels of columns c.
// a, b: panels (pairs, PANEL) of two tokens each; rows, columns: how many of the tile are real.
template <int N>
BF16 void tile(const uint32_t* a, const uint32_t* b, int64_t pairs, float* total, int64_t stride, int64_t rows,
               int64_t columns) {
    __m512 sums[TALL][N];
    for (int r = 0; r < TALL; r++)
        for (int n = 0; n < N; n++) sums[r][n] = _mm512_setzero_ps();
    for (int64_t k = 0; k < pairs; k++) {
        __m512bh right[N];
        for (int n = 0; n < N; n++) right[n] = (__m512bh)_mm512_loadu_si512(b + (n * pairs + k) * PANEL);
        for (int r = 0; r < TALL; r++) {
            const __m512bh left = (__m512bh)_mm512_set1_epi32(int(a[k * PANEL + r]));
            for (int n = 0; n < N; n++) sums[r][n] = _mm512_dpbf16_ps(sums[r][n], left, right[n]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int n = 0; n < N; n++) {
            const int64_t left = columns - n * PANEL;
            if (left <= 0) break;
            const __mmask16 real = left >= PANEL ? __mmask16(0xffff) : __mmask16((1u << left) - 1);
            float* to = total + r * stride + n * PANEL;
            _mm512_mask_storeu_ps(to, real, _mm512_add_ps(_mm512_maskz_loadu_ps(real, to), sums[r][n]));
        }
}

// Sums over the tokens of 16 columns: bits of the largest magnitude (NaN above Inf), sums of magnitudes and of values.
struct Sums {
    __m512i most;
    __m512 magnitudes, values;
};

// One pair of tokens of 16 columns; second null: there is no second token.
BF16 inline void pack_pair(const uint16_t* first, const uint16_t* second, __mmask16 real, uint32_t* out, Sums* sums) {
    const __m512i low = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(real, first)), 16);
    const __m512i high = second ? _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(real, second)), 16)
                                : _mm512_setzero_si512();
    _mm512_storeu_si512(out, _mm512_or_si512(_mm512_srli_epi32(low, 16), high));
    const __m512i sign = _mm512_set1_epi32(int(0x80000000u));
    const __m512i left = _mm512_andnot_si512(sign, low), right = _mm512_andnot_si512(sign, high);
    sums->most = _mm512_max_epu32(sums->most, _mm512_max_epu32(left, right));
    sums->magnitudes = _mm512_add_ps(sums->magnitudes,
                                     _mm512_add_ps(_mm512_castsi512_ps(left), _mm512_castsi512_ps(right)));
    sums->values = _mm512_add_ps(sums->values, _mm512_add_ps(_mm512_castsi512_ps(low), _mm512_castsi512_ps(high)));
}

// What the threads of one call share: some tokens x (tokens, columns) of it, packed as panels (panels, pairs, 16) of two
// bfloat16 each, the sums, and the next panel or strip that nobody works on yet.
struct Job {
    const uint16_t* x;
    int64_t tokens, columns;
    uint32_t* packed;
    float *total, *moments;
    std::atomic<int64_t> next;

    int64_t panels() const { return (columns + PANEL - 1) / PANEL; }
    int64_t pairs() const { return (tokens + 1) / 2; }
};

// Packs panels, and adds their tokens to the moments (3, columns): the largest magnitudes so far, which NaN stays in,
// sums of magnitudes and of values.
BF16 void pack(void* data) {
    Job& job = *static_cast<Job*>(data);
    const int64_t columns = job.columns, pairs = job.pairs();
    for (int64_t p; (p = job.next.fetch_add(1, std::memory_order_relaxed)) < job.panels();) {
        const int64_t left = columns - p * PANEL;
        const __mmask16 real = left >= PANEL ? __mmask16(0xffff) : __mmask16((1u << left) - 1);
        Sums sums = {_mm512_setzero_si512(), _mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int64_t k = 0; k < pairs; k++) {
            const uint16_t* token = job.x + 2 * k * columns + p * PANEL;
            const uint16_t* second = 2 * k + 1 < job.tokens ? token + columns : nullptr;
            pack_pair(token, second, real, job.packed + (p * pairs + k) * PANEL, &sums);
        }
        float* own = job.moments + p * PANEL;
        const __m512i most = _mm512_maskz_loadu_epi32(real, own);
        _mm512_mask_storeu_epi32(own, real, _mm512_max_epu32(most, sums.most));
        own += columns;
        _mm512_mask_storeu_ps(own, real, _mm512_add_ps(_mm512_maskz_loadu_ps(real, own), sums.magnitudes));
        own += columns;
        _mm512_mask_storeu_ps(own, real, _mm512_add_ps(_mm512_maskz_loadu_ps(real, own), sums.values));
    }
}

// Adds packedᵀ packed to the lower triangle of the sums, what is beside it in a tile included.
BF16 void add(void* data) {
    Job& job = *static_cast<Job*>(data);
    const int64_t columns = job.columns, panels = job.panels(), pairs = job.pairs();
    for (;;) {
        const int64_t wide = job.next.fetch_add(1, std::memory_order_relaxed) * WIDE;  // the longest strips come first
        if (wide >= panels) return;
        const uint32_t* b = job.packed + wide * pairs * PANEL;
        for (int64_t row = wide * PANEL; row < columns; row += TALL) {
            const uint32_t* a = job.packed + row / PANEL * pairs * PANEL + row % PANEL;
            const int64_t n = panels - wide < WIDE ? panels - wide : WIDE;
            const int64_t needed = row / PANEL - wide + 1 < n ? row / PANEL - wide + 1 : n;  // none right of the diagonal
            float* to = job.total + row * columns + wide * PANEL;
            const int64_t rows = columns - row < TALL ? columns - row : TALL, left = columns - wide * PANEL;
            if (needed == 3) tile<3>(a, b, pairs, to, columns, rows, left);
            else if (needed == 2) tile<2>(a, b, pairs, to, columns, rows, left);
            else tile<1>(a, b, pairs, to, columns, rows, left);
        }
    }
}

#endif

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

}  // namespace

extern "C" {

int slimwright_has_bf16() {
#if HAS_BF16
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl");
#else
    return 0;
#endif
}

// Adds xᵀ x, x (tokens, columns) of bfloat16, to the lower triangle of total (columns, columns), and the moments of x to
// moments (3, columns), so many tokens at a time. packed: room for so many tokens, an even number, in panels of 16
// columns. parallel: GOMP_parallel; null: one thread.
void slimwright_gram(const uint16_t* x, int64_t tokens, int64_t columns, int64_t chunk, int64_t threads, void* parallel,
                     uint32_t* packed, float* total, float* moments) {
#if HAS_BF16
    const Parallel run = reinterpret_cast<Parallel>(parallel);
    for (int64_t start = 0; start < tokens; start += chunk) {
        const int64_t count = tokens - start < chunk ? tokens - start : chunk;
        Job job{x + start * columns, count, columns, packed, total, moments, {0}};
        void (*const steps[])(void*) = {pack, add};
        for (auto step : steps) {
            job.next.store(0, std::memory_order_relaxed);
            if (run && threads > 1) run(step, &job, unsigned(threads), 0);
            else step(&job);
        }
    }
#endif
}

}  // extern "C"
