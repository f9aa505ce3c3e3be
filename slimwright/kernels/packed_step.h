// One step of a whole model, which brings every text one token or more: what slimwright_packed_step takes.
// kernels/step.py has the same fields.
#pragma once

#include "attend.h"
#include "packed.h"

extern "C" {

// A product with a packed matrix.
struct SlimwrightProduct {
    const slimwright::Weight* weight;
    const float* bias;                     // or null
    int64_t digits;                        // of the inputs (Inputs.digits)
};

// A decoder layer: x += o(attention(norm(x))); x += down(silu(gate(norm(x))) * up(norm(x))), norms of root mean squares.
struct SlimwrightLayer {
    SlimwrightProduct q, k, v, o, gate, up, down;
    const float *input_gain, *middle_gain;  // (width,)
    const float *q_gain, *k_gain;           // (key_dim,): heads are normalized too; or null
    SlimwrightKv* const* kv;                // SlimwrightStep.caches of them
};

struct SlimwrightStep {
    int64_t batch, width, layers;
    int64_t caches;                        // of a layer
    const int64_t* tokens;                 // (caches,): rows that are its next tokens, one cache's after the other's; or
                                           // null: one cache of all rows, each of which has one token
    int64_t rotary;                        // of a head's channels are rotated
    int64_t positions;                     // rows of cosine and sine: 1, or the batch
    int64_t type, threads;                 // type: of activations that are multiplied, and of the cache
    double epsilon, head_epsilon;          // of the layers' norms and of queries and keys
    const SlimwrightLayer* layer;
    const float *cosine, *sine;            // (positions, rotary)
    float* hidden;                         // (batch, width): changed
    const float* final_gain;               // (width,), or null: the step ends with the layers
    SlimwrightProduct head;                // without a weight the step ends with the last norm, in `hidden`
    int64_t outputs;                       // rows that logits are wanted of
    const int64_t* output;                 // (outputs,), ascending; or null: all
    float* logits;                         // (outputs, rows of the head)
    const SlimwrightKvParts* parts;        // of attend.cpp
};

}
