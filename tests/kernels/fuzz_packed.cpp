// Drives slimwright/kernels/packed.cpp with random matrices in buffers of exactly their size, right and wrong ones, and
// compares products with dense rows and dense rows of integer grids with a plain reading of docs/formats.md. Built with
// AddressSanitizer by test_fuzz.py; runs under an emulator for other processors. fuzz_packed ROUNDS SEED

#include "../../slimwright/kernels/packed.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

using namespace slimwright;

extern "C" {
const char* slimwright_packed_isa();
int slimwright_packed_bfloats();
int slimwright_packed_check(const Weight*);
int slimwright_packed_linear(const Weight*, const void*, int64_t, int64_t, int64_t, const void*, void*, int32_t, int32_t,
                             int32_t);
int slimwright_packed_decode(const Weight*, int64_t, int64_t, void*, int32_t, int32_t);
int slimwright_packed_gather(const Weight*, const int64_t*, int64_t, void*, int32_t, int32_t);
}

static std::mt19937_64 random_bits;
static int64_t below(int64_t n) { return int64_t(random_bits() % uint64_t(n)); }
static float uniform() { return float(random_bits() >> 40) / float(1 << 23) - 1; }

// A heap block of exactly that size, so that a byte read beyond it is seen.
struct Bytes {
    uint8_t* data = nullptr;
    int64_t size = 0;
    explicit Bytes(int64_t n) : data(n ? static_cast<uint8_t*>(malloc(size_t(n))) : nullptr), size(n) {
        for (int64_t i = 0; i < n; i++) data[i] = uint8_t(random_bits());
    }
    Bytes(const Bytes&) = delete;
    ~Bytes() { free(data); }
    void halves() {  // finite float16 values of ordinary size
        for (int64_t i = 0; i + 1 < size; i += 2) data[i + 1] = uint8_t(0x24 + (data[i + 1] & 0x03));
    }
    void floats() {
        for (int64_t i = 0; i + 3 < size; i += 4) {
            const float x = uniform();
            memcpy(data + i, &x, 4);
        }
    }
};

static void fail(const char* what, const Weight& w) {
    printf("FAILED: %s (kind %d, bits %d, %lld x %lld, group %lld, zero %d)\n", what, w.kind, w.bits,
           static_cast<long long>(w.rows), static_cast<long long>(w.columns), static_cast<long long>(w.group), w.zero_kind);
    exit(1);
}

static float half(const uint8_t* p) {
    const int bits = p[0] | p[1] << 8, exponent = (bits >> 10) & 31;
    const float size = exponent ? ldexpf(float((bits & 1023) | 1024), exponent - 25) : ldexpf(float(bits & 1023), -24);
    return bits & 0x8000 ? -size : size;
}

// Code `column` of a row of planes, bit by bit as docs/formats.md says.
static int code_of(const uint8_t* row, int64_t columns, int bits, int64_t column) {
    const int64_t chunk = column / 64, rest = columns - chunk * 64;
    const int length = rest >= 64 ? 64 : int((rest + 7) / 8 * 8), at = int(column % 64);
    const uint8_t* plane = row + chunk * 8 * bits;
    int code = 0, shift = 0;
    for (int width = 8; width; width /= 2) {
        if (!(bits & width)) continue;
        const int bytes = length * width / 8;
        const int part = width == 1 ? plane[at / 8] >> (at % 8) & 1
                                    : plane[at % bytes] >> (at / bytes * width) & ((1 << width) - 1);
        code |= part << shift;
        shift += width;
        plane += bytes;
    }
    return code;
}

static void one(int64_t number) {
    Weight w{};
    w.kind = int32_t(number % KINDS);
    w.rows = 1 + below(40), w.columns = 1 + below(300), w.bits = 8;
    if (w.kind == INT) {
        w.bits = 2 + int(below(7)), w.zero_kind = int32_t(below(4));
        if (w.bits > 4 && w.zero_kind == NIBBLES) w.zero_kind = BYTES;
        const int64_t groups[] = {8, 16, 20, 32, 48, 64, 128, 192, 100000};
        w.group = groups[below(9)];
    } else if (w.kind == NF4 || w.kind == MXFP4) {
        w.bits = 4, w.group = w.kind == NF4 ? 64 : 32;
    } else if (w.kind == FP8) {
        w.group = w.columns;
    } else {
        const int64_t block = w.kind >= Q4_K ? 256 : 32;
        w.columns = block * (1 + below(4)), w.group = w.kind == Q6_K ? 16 : 32;
    }
    if (w.group > w.columns) w.group = w.columns;
    const int64_t all = w.rows * groups_of(w);
    const int64_t block_bytes = w.kind == Q4_0 ? 18 : w.kind == Q8_0 ? 34 : w.kind == Q4_K ? 144 : 210;
    Bytes payload(w.kind >= Q4_0 ? w.rows * (w.columns / (w.kind >= Q4_K ? 256 : 32)) * block_bytes
                                 : w.rows * ((w.columns + 7) / 8 * w.bits));
    const bool twice = w.kind == NF4 && below(2);
    Bytes scale(w.kind == INT ? all * 2 : w.kind == NF4 ? (twice ? all : all * 4) : w.kind == MXFP4 ? all
                : w.kind == FP8 ? w.rows * 4 : 0);
    Bytes zero(w.kind != INT || w.zero_kind == MIDDLE ? 0 : w.zero_kind == BYTES ? all
               : w.zero_kind == NIBBLES ? w.rows * ((groups_of(w) + 1) / 2) : all * 2);
    Bytes block_scale(twice ? divide_up(all, 256) * 4 : 0), mean(4), table(1024);
    block_scale.floats(), mean.floats(), table.floats();
    if (w.kind == INT) scale.halves();
    if (w.kind == NF4 || w.kind == FP8) twice ? void() : scale.floats();
    if (w.kind == MXFP4) for (int64_t i = 0; i < scale.size; i++) scale.data[i] = uint8_t(120 + scale.data[i] % 10);
    if (w.zero_kind == HALVES) zero.halves();
    if (w.kind >= Q4_0)
        for (int64_t at = 0; at < payload.size; at += block_bytes) {
            uint8_t* d = payload.data + at + (w.kind == Q6_K ? 208 : 0);
            d[1] = uint8_t(0x20 + (d[1] & 3));
            if (w.kind == Q4_K) d[3] = uint8_t(0x20 + (d[3] & 3));
        }
    w.payload = payload.data, w.payload_bytes = payload.size;
    w.scale = scale.data, w.scale_bytes = scale.size, w.zero = zero.data, w.zero_bytes = zero.size;
    w.block_scale = reinterpret_cast<const float*>(block_scale.data), w.block_scale_bytes = block_scale.size;
    w.mean = twice ? reinterpret_cast<const float*>(mean.data) : nullptr;
    w.table = twice || w.kind == FP8 ? reinterpret_cast<const float*>(table.data) : nullptr;
    if (slimwright_packed_check(&w)) fail("a right matrix is refused", w);

    const int threads = 1 + int(below(3));
    const int64_t first = below(w.rows), last = first + 1 + below(w.rows - first);
    Bytes dense(w.rows * w.columns * 4), part((last - first) * w.columns * 2);
    const float* values = reinterpret_cast<const float*>(dense.data);
    if (slimwright_packed_decode(&w, 0, w.rows, dense.data, FLOAT32, threads)) fail("decode", w);
    if (slimwright_packed_decode(&w, first, last, part.data, BFLOAT16, threads)) fail("decode a part", w);
    if (w.kind == INT)
        for (int64_t row = 0; row < w.rows; row++)
            for (int64_t column = 0; column < w.columns; column++) {
                const int64_t group = column / w.group, at = row * groups_of(w) + group;
                const uint8_t* nibbles = zero.data + row * ((groups_of(w) + 1) / 2);
                const float z = w.zero_kind == MIDDLE ? float(1 << (w.bits - 1)) : w.zero_kind == BYTES ? zero.data[at]
                                : w.zero_kind == NIBBLES ? float(nibbles[group / 2] >> (group % 2 * 4) & 15)
                                                         : half(zero.data + 2 * at);
                const int code = code_of(payload.data + row * ((w.columns + 7) / 8 * w.bits), w.columns, w.bits, column);
                if (values[row * w.columns + column] != (float(code) - z) * half(scale.data + 2 * at)) fail("a value", w);
            }
    const int64_t count = 1 + below(9);
    std::vector<int64_t> index(static_cast<size_t>(count));
    for (auto& row : index) row = below(w.rows);
    Bytes rows(count * w.columns * 4);
    if (slimwright_packed_gather(&w, index.data(), count, rows.data, FLOAT32, threads)) fail("gather", w);
    for (int64_t i = 0; i < count; i++)
        if (memcmp(rows.data + i * w.columns * 4, values + index[size_t(i)] * w.columns, size_t(w.columns) * 4))
            fail("a gathered row", w);

    // few inputs, several panels of them, and now and then more than are prepared at a time
    const int64_t batch = 1 + (below(50) ? below(below(3) ? 9 : 110) : 700 + below(200)), outputs = last - first;
    Bytes x(batch * w.columns * 4), bias(outputs * 4), out(batch * outputs * 4);
    x.floats(), bias.floats();
    const bool integers = w.kind != NF4 && w.kind != FP8 && (w.group >= w.columns || w.group % 16 == 0);
    const float *in = reinterpret_cast<const float*>(x.data), *add = reinterpret_cast<const float*>(bias.data);
    for (int digits : {0, 1, 2, 3, int(PANELS)}) {
        if (digits && digits < BFLOATS && !integers) continue;
        const int wrong = slimwright_packed_linear(&w, x.data, batch, first, last, bias.data, out.data, FLOAT32, digits, threads);
        if (wrong) fail("linear", w);
        const double resolution = digits == 1 ? 2e-2 : digits == 2 ? 2e-4 : 4e-6;
        for (int64_t m = 0; m < batch; m++)
            for (int64_t r = 0; r < outputs; r++) {
                double exact = add[r], size = fabs(exact);
                for (int64_t k = 0; k < w.columns; k++) {
                    const double product = double(in[m * w.columns + k]) * values[(first + r) * w.columns + k];
                    exact += product, size += fabs(values[(first + r) * w.columns + k]);
                }
                float got;
                memcpy(&got, out.data + (m * outputs + r) * 4, 4);
                if (!(fabs(got - exact) <= resolution * (size + 1))) fail("a product", w);
            }
    }
    Bytes narrow(batch * w.columns * 2), narrow_out(batch * outputs * 2);
    for (int64_t i = 0; i < narrow.size / 2; i++) memcpy(narrow.data + 2 * i, x.data + 4 * i + 2, 2);
    const bool narrows = slimwright_packed_bfloats();
    for (int digits : {integers ? 2 : 0, narrows ? int(BFLOATS) : 0, narrows ? int(BFLOAT_PANELS) : int(PANELS)})
        if (slimwright_packed_linear(&w, narrow.data, batch, first, last, nullptr, narrow_out.data, BFLOAT16, digits, threads))
            fail("linear in bfloat16", w);

    // damaged descriptions: refused, or at least nothing outside the buffers is touched
    for (int trial = 0; trial < 8; trial++) {
        Weight bad = w;
        int64_t* const longs[] = {&bad.rows, &bad.columns, &bad.group, &bad.payload_bytes, &bad.scale_bytes, &bad.zero_bytes,
                                  &bad.block_scale_bytes};
        int32_t* const integers32[] = {&bad.kind, &bad.bits, &bad.zero_kind};
        const int64_t values64[] = {0, -1, 1, int64_t(1) << 40, INT64_MAX, INT64_MIN, 7, 64, 300};
        if (below(2)) *longs[below(7)] = values64[below(9)];
        else *integers32[below(3)] = int32_t(below(12)) - 2;
        if (slimwright_packed_check(&bad) == 0) continue;  // another matrix of the same size: nothing to refuse
        if (!slimwright_packed_linear(&bad, x.data, batch, 0, 1, nullptr, out.data, FLOAT32, 0, 1) ||
            !slimwright_packed_decode(&bad, 0, 1, dense.data, FLOAT32, 1) ||
            !slimwright_packed_gather(&bad, index.data(), 1, rows.data, FLOAT32, 1))
            fail("a damaged description is used", bad);
    }
    const int64_t beyond[] = {w.rows, -1};
    if (!slimwright_packed_gather(&w, beyond, 1, rows.data, FLOAT32, 1) ||
        !slimwright_packed_gather(&w, beyond + 1, 1, rows.data, FLOAT32, 1) ||
        !slimwright_packed_decode(&w, first, w.rows + 1, dense.data, FLOAT32, 1) ||
        !slimwright_packed_linear(&w, x.data, batch, -1, 1, nullptr, out.data, FLOAT32, 0, 1) ||
        !slimwright_packed_linear(&w, x.data, 0, first, last, nullptr, out.data, FLOAT32, 0, 1) ||
        !slimwright_packed_linear(&w, x.data, batch, first, last, nullptr, out.data, 2, 0, 1) ||
        !slimwright_packed_linear(&w, x.data, batch, first, last, nullptr, out.data, FLOAT32, 4, 1) ||
        !slimwright_packed_linear(&w, x.data, batch, first, last, nullptr, out.data, FLOAT32, BFLOAT_PANELS, 1) ||
        !slimwright_packed_linear(&w, x.data, batch, first, last, nullptr, out.data, FLOAT32, 7, 1) ||
        !slimwright_packed_linear(&w, nullptr, batch, first, last, nullptr, out.data, FLOAT32, 0, 1))
        fail("a wrong argument is taken", w);
}

int main(int count, char** words) {
    const int64_t rounds = count > 1 ? atoll(words[1]) : 200;
    random_bits.seed(count > 2 ? uint64_t(atoll(words[2])) : 0);
    for (int64_t i = 0; i < rounds; i++) one(i);
    printf("%s: %lld matrices\n", slimwright_packed_isa(), static_cast<long long>(rounds));
    return 0;
}
