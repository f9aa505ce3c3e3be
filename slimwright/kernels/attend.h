// The cache of keys and values of one layer, as attend.cpp and packed_step.cpp see it.
#pragma once

#include <cstdint>

extern "C" {

// What Python fills; pointers stay the property of the tensors behind them.
struct SlimwrightKv {
    int64_t batch, kv_heads, heads, key_dim, value_dim;
    int64_t bits, group, window;           // bits 16: nothing is packed and window is the capacity
    int64_t key_capacity, value_capacity;  // tokens that the packed parts hold
    int64_t length;                        // tokens in the cache
    int64_t dtype, threads, sliding;       // sliding 0: all tokens are seen
    float scaling, softcap;                // softcap 0: none
    const int64_t* start;                  // (batch,) first token that counts; null: 0
    const float* sinks;                    // (heads,) or null
    void* key_window;                      // (batch, kv_heads, window, key_dim)
    void* value_window;
    uint8_t* key_codes;                    // (batch, kv_heads, key_capacity / 32, key_dim, 4 * bits)
    uint16_t* key_scale;                   // (batch, kv_heads, key_capacity / group, key_dim)
    uint16_t* key_low;
    uint8_t* value_codes;                  // (batch, kv_heads, value_capacity, value_dim / 32 rounded up, 4 * bits)
    uint16_t* value_scale;                 // (batch, kv_heads, value_capacity, value_dim / group rounded up)
    uint16_t* value_low;
};

// Parts of a decoding step for a caller that has threads of its own, on what `slimwright_kv_shape` has found right. `token`
// of the tokens that a step brings come before the one meant, whose places in an unpacked cache follow each other; a packed
// cache, and the ring of a sliding window that is full, take one token a step.
struct SlimwrightKvParts {
    // Whether the token may be appended and attended to: 0, or what is wrong. shape: the first split of 256 tokens that
    // attention sees, how many splits, floats of partial results.
    int (*shape)(const SlimwrightKv* kv, int64_t token, int64_t* shape);
    // Stores the new token of row `row` (of batch x kv_heads); kv->length stays.
    int (*append)(const SlimwrightKv* kv, int64_t token, int64_t row, const void* keys, const void* values);
    // Attention over the kept tokens and those appended: part `index` of rows x splits, then the sum of a row's parts.
    int (*attend)(const SlimwrightKv* kv, int64_t token, const int64_t* shape, int64_t index, const void* query,
                  float* partials);
    int (*combine)(const SlimwrightKv* kv, const int64_t* shape, int64_t row, const float* partials, void* output);
};

}
