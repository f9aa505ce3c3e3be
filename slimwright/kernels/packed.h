// What packed.cpp (entry points, checks, threads) and packed_rows.cpp (the arithmetic, compiled once per instruction
// set) share. Plain C types only: a template of the standard library compiled for AVX-512 could end up in code that runs
// without it.
#pragma once

#include <cstdint>

#ifndef ISA
#define ISA portable
#endif

namespace slimwright {

enum Kind : int32_t { INT = 0, NF4 = 1, MXFP4 = 2, FP8 = 3, Q4_0 = 4, Q8_0 = 5, Q4_K = 6, Q6_K = 7, KINDS = 8 };
enum Zero : int32_t { MIDDLE = 0, BYTES = 1, NIBBLES = 2, HALVES = 3 };
enum Type : int32_t { FLOAT32 = 0, BFLOAT16 = 1 };

constexpr int64_t CHUNK = 64;       // codes per chunk (weights/packing.py)
constexpr int64_t BLOCK = 16;       // columns that must share a scale for integer arithmetic
constexpr int32_t BFLOATS = 4;      // Inputs.digits of products in bfloat16
constexpr int32_t PANELS = 5;       // digits of products with many inputs in float32, and in bfloat16 (packed_panels.h)
constexpr int32_t BFLOAT_PANELS = 6;
constexpr int64_t PANEL_VECTORS = 3;
constexpr int64_t MOST_CHUNKS = 8;  // of a segment: sums of a segment stay below 2**31

// A packed matrix as its tensors lie in the file; kernels/packed.py has the same fields.
struct Weight {
    int64_t rows, columns, group;     // group: columns that share a scale; the columns where a row has one
    int32_t kind, bits, zero_kind, reserved;
    const uint8_t* payload;
    int64_t payload_bytes;
    const void* scale;                // INT: float16 (rows, groups); NF4: absmax; MXFP4: exponents; FP8: float32
    int64_t scale_bytes;
    const void* zero;                 // INT, where zero_kind is not MIDDLE
    int64_t zero_bytes;
    const float* block_scale;         // NF4 with double quantization: one per 256 absmaxes; else null
    int64_t block_scale_bytes;
    const float* mean;                // NF4 with double quantization: one value
    const float* table;               // NF4: 256 values of the absmax code; FP8: 256 values of the code; else null
};

// Activations as the kernels want them.
struct Inputs {
    int64_t batch, chunks, groups;    // groups: of the weight, rounded up to a multiple of 16
    int64_t segments, segment_chunks, segment_group;  // segment_group: segments per group of the weight
    int64_t padded;                   // segments rounded up to a multiple of 16
    int32_t digits;                   // 0: float32 values; 1, 2, 3: integers of 8, 16, 24 bits; 4: bfloat16 values
    int32_t lanes;                    // a scale per 16 columns instead of per segment
    const void* values;               // float (batch, chunks, 64), or the instruction set's own form of the integers
    const float* scale;               // (batch, padded)
    const float* sums;                // (batch, groups): sum of the inputs of every group; null where `start` does it
    const int32_t* start;             // what sums of products start from: minus the one zero point times the inputs
};

// Many inputs (packed_panels.h).
struct Many {
    int64_t batch, stride;            // stride: bytes from input to input
    bool bfloats;                     // values are bfloat16, padded to pairs, else float32
    const uint8_t* x;
};

// One instruction set's functions.
struct Rows {
    const char* name;
    bool bfloats;                     // whether it multiplies bfloat16 values
    // Bytes of Inputs.values per chunk of one row with that many digits.
    int64_t (*chunk_bytes)(int32_t digits);
    // Numbers of Inputs.start for one row.
    int64_t (*start_numbers)(const Inputs& inputs);
    // Fills values, scale and sums of row `index` of the batch from x (columns).
    void (*prepare)(const Weight& weight, const void* x, int32_t type, int64_t index, const Inputs& inputs);
    // out (batch, out_stride)[first..last) = x W' + bias; `scratch` has scratch_bytes.
    void (*linear)(const Weight& weight, const Inputs& inputs, int64_t first, int64_t last, const void* bias, void* out,
                   int64_t out_stride, int64_t out_first, int32_t type, uint8_t* scratch);
    // Numbers of a vector; rows first .. last with many inputs to out (batch, stride), whose first column is row first;
    // memory: many_bytes.
    int64_t width;
    void (*multiply_many)(const Weight& weight, const Many& inputs, int64_t first, int64_t last, const void* bias,
                          void* out, int64_t stride, int32_t type, uint8_t* memory, uint8_t* scratch);
    // One row as dense values.
    void (*decode)(const Weight& weight, int64_t row, void* out, int32_t type, uint8_t* scratch);
};

namespace ISA { extern const Rows rows; }  // packed_rows.cpp

// The zero point of all groups where they have the same whole one, else -1. Subtracted in integers, so that groups of
// nothing but zeros give exactly 0 whatever their scale is.
inline int32_t common_zero(const Weight& w) {
    switch (w.kind) {
        case INT: return w.zero_kind == MIDDLE ? 1 << (w.bits - 1) : -1;
        case MXFP4: return 12;
        case Q4_0: return 8;
        case Q8_0: return 128;
        case Q6_K: return 32;
        default: return -1;
    }
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t chunks_of(const Weight& w) { return divide_up(w.columns, CHUNK); }
inline int64_t groups_of(const Weight& w) { return divide_up(w.columns, w.group); }
inline int64_t padded_groups(const Weight& w) { return divide_up(groups_of(w), 16) * 16; }

enum Error : int {
    FINE = 0, BAD_SHAPE, BAD_GRID, SHORT_PAYLOAD, SHORT_SCALE, SHORT_ZERO, BAD_RANGE, BAD_ARGUMENT, NO_MEMORY,
    CACHE_FULL, BAD_CACHE, ERRORS
};

// packed.cpp: FINE, or what is wrong with a matrix; whether it can be multiplied so with inputs of a type.
int check(const Weight* weight);
bool takes(const Weight& weight, int32_t digits, int32_t type);

// The shape of the inputs of a product, their bytes, and where they lie in memory that is aligned to 64 bytes.
Inputs inputs_of(const Weight& weight, int64_t batch, int32_t digits);
int64_t inputs_bytes(const Inputs& inputs);
void place_inputs(const Weight& weight, Inputs& inputs, uint8_t* memory);

int64_t task_rows(int64_t count, int threads);
uint8_t* row_memory(const Weight& weight);  // scratch of this thread; null where there is no memory

constexpr int64_t ROWS = 4;  // most rows at a time

// Scratch of one thread: codes and values of a few rows, their scales and zero points by group, scales by 16 columns.
inline int64_t scratch_bytes(const Weight& w) {
    return ROWS * (chunks_of(w) * (CHUNK * 5 + 16) + padded_groups(w) * 8 + (chunks_of(w) + 16) * 8) + 64;
}

}  // namespace slimwright
