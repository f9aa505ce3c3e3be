// One step of a whole model in one call, a row for each token that it brings, on threads that stay together for it:
// between products stand only a norm, a rotation or an activation, and waking threads for each would take longer than
// these.
//
// The step is a list of phases, each of them tasks that do not depend on each other. Every thread goes through the list,
// takes what tasks are left and waits until all of a phase are done: so any number of threads will do, also one that
// comes late. Numbers are added in an order that does not depend on who adds them.
//
// Hidden states stay in float32 from layer to layer; what a product multiplies, and keys and values, are rounded to the
// model's dtype first, as in the model's own forward.

#include "common.h"
#include "packed_step.h"
#include "packed_threads.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

namespace slimwright {

namespace {

using Step = SlimwrightStep;
using Layer = SlimwrightLayer;
using Product = SlimwrightProduct;

const Rows& rows = ISA::rows;

// To nearest, ties to even, as torch rounds.
inline uint16_t bfloat_of(float x) {
    const uint32_t bits = to_bits(x);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

void store_row(const float* from, int64_t count, int64_t type, void* to) {
    if (type == FLOAT32) memcpy(to, from, size_t(count) * 4);
    else for (int64_t i = 0; i < count; i++) static_cast<uint16_t*>(to)[i] = bfloat_of(from[i]);
}

// x * sigmoid(x) * factor; NaN stays NaN.
inline float gated(float x, float factor) {
    const float small = exponential(-std::fabs(x));
    return x * ((x < 0 ? small : 1.0f) / (1.0f + small)) * factor;
}

// out = x / sqrt(mean of squares + epsilon) * gain; sums in 16 parts.
void normalize(const float* x, const float* gain, int64_t count, double epsilon, float* out) {
    float parts[16] = {0};
    int64_t i = 0;
    for (; i + 16 <= count; i += 16)
        for (int k = 0; k < 16; k++) parts[k] += x[i + k] * x[i + k];
    double sum = 0;
    for (; i < count; i++) sum += double(x[i]) * x[i];
    for (int k = 0; k < 16; k++) sum += parts[k];
    const float scale = float(1 / std::sqrt(sum / double(count) + epsilon));
    for (i = 0; i < count; i++) out[i] = x[i] * scale * gain[i];
}

// The inputs of products that read the same vector; those of the same shape are written once.
struct Shared {
    const Product* products[3];
    Inputs inputs[3];
    int64_t source[3];     // which of them has the inputs
    int count = 0;
    int64_t rows = 0, step = 0;
};

bool alike(const Weight& a, const Weight& b) {
    return a.columns == b.columns && a.group == b.group && common_zero(a) == common_zero(b);
}

struct Run;
using Work = void (*)(Run&, int64_t layer, int64_t index);

struct alignas(64) Phase {
    Work work;
    int64_t layer, count;
    alignas(64) std::atomic<int64_t> next{0};
    alignas(64) std::atomic<int64_t> done{0};
};

// Attention of one row, or of all rows of one cache: its shape (SlimwrightKvParts.shape), and where its tasks and partial
// results begin among those of the layer.
struct Part {
    int64_t shape[3];
    int64_t task, partial;
};

struct Planned {
    Shared qkv, o, up, down;
    std::vector<Part> parts;  // of each row; where one cache has all, one
    int64_t tasks = 0;        // of attention
};

// Which cache a row's token goes to, and how many of the step's tokens go there before it.
struct Place { int64_t cache, token; };

struct Run {
    const Step& step;
    std::vector<Place> places;  // of each row; where one cache has all, one
    std::vector<Planned> layers;
    Shared head;
    std::vector<Phase> phases;
    uint8_t* x;            // (batch, widest) in the step's type: what a product reads
    float *first, *second, *third;  // (batch, widest): what products give
    float *added;          // (batch, width): what is to be added to the hidden states
    uint8_t *query, *keys, *values;
    float* partials;
    int64_t widest, element;
    std::atomic<int> error{FINE};
    explicit Run(const Step& s) : step(s) {}
};

// -- the list -------------------------------------------------------------------------------------------------------

int check_product(const Product& product, int64_t columns, int64_t count, int64_t type) {
    if (const int wrong = check(product.weight)) return wrong;
    if (product.weight->columns != columns || (count && product.weight->rows != count)) return BAD_SHAPE;
    return product.digits >= 0 && product.digits <= BFLOATS && takes(*product.weight, int32_t(product.digits), int32_t(type))
        ? FINE : BAD_ARGUMENT;
}

int check_step(const Step& s) {
    if (s.batch < 1 || s.batch > 4096 || s.width < 1 || s.layers < 0 || s.threads < 1 || s.threads > 4096) return BAD_ARGUMENT;
    if ((s.type != FLOAT32 && s.type != BFLOAT16) || !s.hidden || !s.parts || (s.layers && !s.layer)) return BAD_ARGUMENT;
    if (s.positions != 1 && s.positions != s.batch) return BAD_ARGUMENT;
    if (s.rotary < 0 || s.rotary % 2 || (s.rotary && (!s.cosine || !s.sine))) return BAD_ARGUMENT;
    if (s.caches < 1 || s.caches > s.batch || (!s.tokens && s.caches != 1)) return BAD_ARGUMENT;
    int64_t rows = 0;
    for (int64_t c = 0; s.tokens && c < s.caches; c++) {
        if (s.tokens[c] < 1 || s.tokens[c] > s.batch) return BAD_ARGUMENT;
        rows += s.tokens[c];
    }
    if (s.tokens && rows != s.batch) return BAD_ARGUMENT;
    if (s.outputs < 1 || s.outputs > s.batch || (!s.output && s.outputs != s.batch)) return BAD_ARGUMENT;
    for (int64_t i = 0; s.output && i < s.outputs; i++)
        if (s.output[i] < 0 || s.output[i] >= s.batch || (i && s.output[i] <= s.output[i - 1])) return BAD_ARGUMENT;
    for (int64_t i = 0; i < s.layers; i++) {
        const Layer& layer = s.layer[i];
        if (!layer.kv) return BAD_CACHE;
        const SlimwrightKv* kv = layer.kv[0];
        for (int64_t c = 0; c < s.caches; c++) {
            const SlimwrightKv* other = layer.kv[c];
            if (!other || other->batch != (s.tokens ? 1 : s.batch) || other->dtype != s.type) return BAD_CACHE;
            if (other->heads != kv->heads || other->kv_heads != kv->kv_heads) return BAD_CACHE;
            if (other->key_dim != kv->key_dim || other->value_dim != kv->value_dim) return BAD_CACHE;
        }
        if (kv->kv_heads < 1 || kv->heads % kv->kv_heads) return BAD_CACHE;
        if (kv->key_dim < s.rotary || kv->key_dim > (1 << 16) || kv->value_dim < 1 || kv->value_dim > (1 << 16)) return BAD_CACHE;
        if (!layer.input_gain || !layer.middle_gain || !layer.gate.weight) return BAD_ARGUMENT;
        const int64_t inner = layer.gate.weight->rows;
        const int wrong[] = {
            check_product(layer.q, s.width, kv->heads * kv->key_dim, s.type),
            check_product(layer.k, s.width, kv->kv_heads * kv->key_dim, s.type),
            check_product(layer.v, s.width, kv->kv_heads * kv->value_dim, s.type),
            check_product(layer.o, kv->heads * kv->value_dim, s.width, s.type),
            check_product(layer.gate, s.width, inner, s.type), check_product(layer.up, s.width, inner, s.type),
            check_product(layer.down, inner, s.width, s.type),
        };
        for (const int one : wrong) if (one) return one;
    }
    if (!s.head.weight) return FINE;
    if (!s.final_gain || !s.logits) return BAD_ARGUMENT;
    return check_product(s.head, s.width, 0, s.type);
}

Shared shared(const Run& run, int64_t batch, std::initializer_list<const Product*> products) {
    Shared found;
    for (const Product* product : products) {
        const int i = found.count++;
        found.products[i] = product;
        found.inputs[i] = inputs_of(*product->weight, batch, int32_t(product->digits));
        found.source[i] = i;
        for (int j = i - 1; j >= 0; j--)
            if (alike(*product->weight, *found.products[j]->weight) && product->digits == found.products[j]->digits)
                found.source[i] = j;
        found.rows += product->weight->rows;
    }
    found.step = task_rows(found.rows / (products.size() == 2 ? 2 : 1), int(run.step.threads));
    return found;
}

int64_t shared_bytes(const Shared& s) {
    int64_t sum = 0;
    for (int i = 0; i < s.count; i++) if (s.source[i] == i) sum += inputs_bytes(s.inputs[i]);
    return sum;
}

void place_shared(Shared& s, uint8_t* memory) {
    for (int i = 0; i < s.count; i++) {
        if (s.source[i] == i) {
            place_inputs(*s.products[i]->weight, s.inputs[i], memory);
            memory += inputs_bytes(s.inputs[i]);
        } else {
            s.inputs[i] = s.inputs[s.source[i]];
        }
    }
}

int64_t tasks_of(const Shared& s) {
    int64_t tasks = 0;
    for (int i = 0; i < s.count; i++) tasks += divide_up(s.products[i]->weight->rows, s.step);
    return tasks;
}

// -- work -----------------------------------------------------------------------------------------------------------

void prepare_shared(Run& run, const Shared& s, int64_t index) {
    for (int i = 0; i < s.count; i++)
        if (s.source[i] == i)
            rows.prepare(*s.products[i]->weight, run.x + index * s.products[i]->weight->columns * run.element,
                         int32_t(run.step.type), index, s.inputs[i]);
}

// Rows first .. last of one product into out (batch, rows of the weight).
void multiply(Run& run, const Shared& s, int i, int64_t first, int64_t last, float* out) {
    const Product& product = *s.products[i];
    uint8_t* scratch = row_memory(*product.weight);
    if (!scratch) return run.error.store(NO_MEMORY);
    rows.linear(*product.weight, s.inputs[i], first, last, product.bias ? product.bias + first : nullptr, out + first,
                product.weight->rows, first, FLOAT32, scratch);
}

// Adds to the hidden states of a row, normalizes them, and writes them as the `index`-th input of what comes next.
void next_input(Run& run, int64_t row, int64_t index, bool add, const float* gain, const Shared& s) {
    const int64_t width = run.step.width;
    float* hidden = run.step.hidden + row * width;
    if (add) {
        const float* more = run.added + row * width;
        for (int64_t i = 0; i < width; i++) hidden[i] += more[i];
    }
    float* normal = run.first + index * run.widest;
    normalize(hidden, gain, width, run.step.epsilon, normal);
    store_row(normal, width, run.step.type, run.x + index * width * run.element);
    prepare_shared(run, s, index);
}

void input_work(Run& run, int64_t layer, int64_t index) {
    next_input(run, index, index, layer > 0, run.step.layer[layer].input_gain, run.layers[size_t(layer)].qkv);
}

void qkv_work(Run& run, int64_t layer, int64_t index) {
    const Shared& s = run.layers[size_t(layer)].qkv;
    float* outs[] = {run.first, run.second, run.third};
    for (int i = 0; i < 3; i++) {
        const int64_t count = s.products[i]->weight->rows, tasks = divide_up(count, s.step);
        if (index < tasks) {
            const int64_t last = (index + 1) * s.step;
            return multiply(run, s, i, index * s.step, last < count ? last : count, outs[i]);
        }
        index -= tasks;
    }
}

// A head's vector normalized where that is asked, rotated, and rounded.
void rotate(Run& run, float* head, int64_t dim, const float* gain, int64_t batch, void* out) {
    if (gain) normalize(head, gain, dim, run.step.head_epsilon, head);
    const int64_t half = run.step.rotary / 2, row = (run.step.positions == 1 ? 0 : batch) * run.step.rotary;
    const float *cosine = run.step.cosine + row, *sine = run.step.sine + row;
    for (int64_t i = 0; i < half; i++) {
        const float a = head[i], b = head[half + i];
        head[i] = a * cosine[i] - b * sine[i];
        head[half + i] = b * cosine[half + i] + a * sine[half + i];
    }
    store_row(head, dim, run.step.type, out);
}

// The first of the rows that a row's place and part are of: itself, where rows have caches of their own.
inline int64_t first_of(const Run& run, int64_t row) { return run.step.tokens ? row : 0; }

void rotate_work(Run& run, int64_t layer, int64_t row) {
    const Layer& own = run.step.layer[layer];
    const int64_t kv_heads = own.kv[0]->kv_heads, batch = row / kv_heads, first = first_of(run, batch);
    const Place& place = run.places[size_t(first)];
    const SlimwrightKv& kv = *own.kv[place.cache];
    const int64_t group = kv.heads / kv_heads, dim = kv.key_dim;
    for (int64_t i = row * group; i < (row + 1) * group; i++)
        rotate(run, run.first + i * dim, dim, own.q_gain, batch, run.query + i * dim * run.element);
    rotate(run, run.second + row * dim, dim, own.k_gain, batch, run.keys + row * dim * run.element);
    store_row(run.third + row * kv.value_dim, kv.value_dim, run.step.type, run.values + row * kv.value_dim * run.element);
    const int64_t before = first * kv_heads * run.element;
    if (run.step.parts->append(&kv, place.token, row - first * kv_heads, run.keys + before * dim,
                               run.values + before * kv.value_dim))
        run.error.store(NO_MEMORY);
}

void attend_work(Run& run, int64_t layer, int64_t index) {
    const std::vector<Part>& parts = run.layers[size_t(layer)].parts;
    const auto earlier = [](int64_t task, const Part& part) { return task < part.task; };
    const int64_t first = std::upper_bound(parts.begin(), parts.end(), index, earlier) - parts.begin() - 1;
    const Part& part = parts[size_t(first)];
    const Place& place = run.places[size_t(first)];
    const SlimwrightKv* kv = run.step.layer[layer].kv[place.cache];
    const uint8_t* query = run.query + first * kv->heads * kv->key_dim * run.element;
    if (run.step.parts->attend(kv, place.token, part.shape, index - part.task, query, run.partials + part.partial))
        run.error.store(NO_MEMORY);
}

void combine_work(Run& run, int64_t layer, int64_t index) {
    const Planned& planned = run.layers[size_t(layer)];
    const int64_t first = first_of(run, index);
    const SlimwrightKv& kv = *run.step.layer[layer].kv[run.places[size_t(first)].cache];
    const Part& part = planned.parts[size_t(first)];
    uint8_t* out = run.x + first * kv.heads * kv.value_dim * run.element;
    for (int64_t row = (index - first) * kv.kv_heads; row < (index - first + 1) * kv.kv_heads; row++)
        if (run.step.parts->combine(&kv, part.shape, row, run.partials + part.partial, out)) run.error.store(NO_MEMORY);
    prepare_shared(run, planned.o, index);
}

void one_product(Run& run, const Shared& s, int64_t index, float* out) {
    const int64_t count = s.rows, last = (index + 1) * s.step;
    multiply(run, s, 0, index * s.step, last < count ? last : count, out);
}

void o_work(Run& run, int64_t layer, int64_t index) { one_product(run, run.layers[size_t(layer)].o, index, run.added); }

void middle_work(Run& run, int64_t layer, int64_t index) {
    next_input(run, index, index, true, run.step.layer[layer].middle_gain, run.layers[size_t(layer)].up);
}

void up_work(Run& run, int64_t layer, int64_t index) {
    const Shared& s = run.layers[size_t(layer)].up;
    const int64_t inner = s.products[0]->weight->rows, first = index * s.step;
    const int64_t last = first + s.step < inner ? first + s.step : inner;
    multiply(run, s, 0, first, last, run.first);
    multiply(run, s, 1, first, last, run.second);
    for (int64_t b = 0; b < run.step.batch; b++) {
        float* gate = run.first + b * inner;
        const float* up = run.second + b * inner;
        for (int64_t i = first; i < last; i++) gate[i] = gated(gate[i], up[i]);
        // the inputs of gate and up are no longer in x: they were written as the products' inputs
        store_row(gate + first, last - first, run.step.type, run.x + (b * inner + first) * run.element);
    }
}

void gate_work(Run& run, int64_t layer, int64_t index) { prepare_shared(run, run.layers[size_t(layer)].down, index); }

void down_work(Run& run, int64_t layer, int64_t index) { one_product(run, run.layers[size_t(layer)].down, index, run.added); }

void add_work(Run& run, int64_t, int64_t index) {
    const int64_t width = run.step.width;
    for (int64_t i = index * width; i < (index + 1) * width; i++) run.step.hidden[i] += run.added[i];
}

void final_work(Run& run, int64_t layer, int64_t index) {
    if (run.step.head.weight) {
        const int64_t row = run.step.output ? run.step.output[index] : index;
        return next_input(run, row, index, layer > 0, run.step.final_gain, run.head);
    }
    if (layer > 0) add_work(run, layer, index);
    float* hidden = run.step.hidden + index * run.step.width;
    normalize(hidden, run.step.final_gain, run.step.width, run.step.epsilon, hidden);
}

void head_work(Run& run, int64_t, int64_t index) { one_product(run, run.head, index, run.step.logits); }

void body(void* data) {
    Run& run = *static_cast<Run*>(data);
    for (Phase& phase : run.phases) {
        int64_t mine = 0;
        for (int64_t i; (i = phase.next.fetch_add(1, std::memory_order_relaxed)) < phase.count; mine++)
            phase.work(run, phase.layer, i);
        if (mine) phase.done.fetch_add(mine, std::memory_order_acq_rel);
        for (int turns = 0; phase.done.load(std::memory_order_acquire) < phase.count; turns++) wait_a_moment(turns);
    }
}

int plan(Run& run) {
    const Step& s = run.step;
    int64_t inputs = 64, partials = 16, heads = 1, widest = s.width;
    const auto larger = [](int64_t& a, int64_t b) { a = a < b ? b : a; };
    for (int64_t c = 0; s.tokens && c < s.caches; c++)
        for (int64_t t = 0; t < s.tokens[c]; t++) run.places.push_back({c, t});
    if (!s.tokens) run.places.push_back({0, 0});
    run.layers.resize(size_t(s.layers));
    for (int64_t i = 0; i < s.layers; i++) {
        const Layer& layer = s.layer[i];
        Planned& planned = run.layers[size_t(i)];
        int64_t floats = 0;
        planned.parts.resize(run.places.size());
        for (size_t p = 0; p < run.places.size(); p++) {
            const Place& place = run.places[p];
            const SlimwrightKv* kv = layer.kv[place.cache];
            Part& part = planned.parts[p];
            if (const int wrong = s.parts->shape(kv, place.token, part.shape)) return wrong == 2 ? CACHE_FULL : BAD_CACHE;
            part.task = planned.tasks, part.partial = floats;
            planned.tasks += kv->batch * kv->kv_heads * part.shape[1];
            floats += part.shape[2];
        }
        planned.qkv = shared(run, s.batch, {&layer.q, &layer.k, &layer.v});
        planned.o = shared(run, s.batch, {&layer.o});
        planned.up = shared(run, s.batch, {&layer.gate, &layer.up});
        planned.down = shared(run, s.batch, {&layer.down});
        for (Shared* one : {&planned.qkv, &planned.o, &planned.up, &planned.down}) larger(inputs, shared_bytes(*one));
        larger(partials, floats);
        for (const Product* one : {&layer.q, &layer.k, &layer.v, &layer.gate, &layer.o, &layer.down}) {
            larger(widest, one->weight->rows);
            larger(widest, one->weight->columns);
        }
        const SlimwrightKv& kv = *layer.kv[0];
        larger(heads, kv.heads * (kv.key_dim < kv.value_dim ? kv.value_dim : kv.key_dim));
    }
    if (s.head.weight) {
        run.head = shared(run, s.outputs, {&s.head});
        larger(inputs, shared_bytes(run.head));
    }
    run.widest = widest, run.element = s.type == FLOAT32 ? 4 : 2;
    const auto bytes = [](int64_t n) { return divide_up(n, 64) * 64; };
    const int64_t wide = bytes(s.batch * widest * 4), head = bytes(s.batch * heads * 4);
    thread_local Buffer kept;
    uint8_t* memory = kept.get(size_t(inputs + 4 * wide + 3 * head + bytes(s.batch * s.width * 4) + bytes(partials * 4)));
    if (!memory) return NO_MEMORY;
    for (Planned& planned : run.layers)
        for (Shared* one : {&planned.qkv, &planned.o, &planned.up, &planned.down}) place_shared(*one, memory);
    if (s.head.weight) place_shared(run.head, memory);
    const auto take = [&memory](int64_t n) { uint8_t* at = memory; memory += n; return at; };
    take(inputs);
    run.x = take(wide);
    run.first = reinterpret_cast<float*>(take(wide));
    run.second = reinterpret_cast<float*>(take(wide));
    run.third = reinterpret_cast<float*>(take(wide));
    run.query = take(head), run.keys = take(head), run.values = take(head);
    run.added = reinterpret_cast<float*>(take(bytes(s.batch * s.width * 4)));
    run.partials = reinterpret_cast<float*>(take(bytes(partials * 4)));

    std::vector<Phase> phases(size_t(s.layers * 10 + 2));
    size_t count = 0;
    const auto add = [&](Work work, int64_t layer, int64_t tasks) {
        Phase& phase = phases[count++];
        phase.work = work, phase.layer = layer, phase.count = tasks;
    };
    for (int64_t i = 0; i < s.layers; i++) {
        const Planned& planned = run.layers[size_t(i)];
        add(input_work, i, s.batch);
        add(qkv_work, i, tasks_of(planned.qkv));
        add(rotate_work, i, s.batch * s.layer[i].kv[0]->kv_heads);
        add(attend_work, i, planned.tasks);
        add(combine_work, i, s.batch);
        add(o_work, i, tasks_of(planned.o));
        add(middle_work, i, s.batch);
        add(up_work, i, divide_up(planned.up.products[0]->weight->rows, planned.up.step));
        add(gate_work, i, s.batch);
        add(down_work, i, tasks_of(planned.down));
    }
    if (s.final_gain) add(final_work, s.layers, s.head.weight ? s.outputs : s.batch);
    else if (s.layers) add(add_work, s.layers, s.batch);
    if (s.head.weight) add(head_work, 0, tasks_of(run.head));
    for (; count < phases.size(); count++) phases[count].count = 0;
    run.phases.swap(phases);
    return FINE;
}

}  // namespace
}  // namespace slimwright

using namespace slimwright;

extern "C" {

int64_t slimwright_packed_step_size() { return int64_t(sizeof(SlimwrightStep) + sizeof(SlimwrightLayer)); }

// The step's tokens through the layers: adds to step->hidden, appends to every cache (kv->length grows), writes the logits.
// Nothing is changed where an error is returned, except NO_MEMORY.
int slimwright_packed_step(const SlimwrightStep* step) {
    if (!step) return BAD_ARGUMENT;
    try {
        if (const int wrong = check_step(*step)) return wrong;
        Run run(*step);
        if (const int wrong = plan(run)) return wrong;
        team(body, &run, int(step->threads));
        if (const int wrong = run.error.load()) return wrong;
        for (int64_t i = 0; i < step->layers; i++)
            for (int64_t c = 0; c < step->caches; c++)
                step->layer[i].kv[c]->length += step->tokens ? step->tokens[c] : 1;
    } catch (const std::bad_alloc&) { return NO_MEMORY; }
    return FINE;
}

}  // extern "C"
