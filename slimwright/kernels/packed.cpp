// Products with packed matrices: entry points and checks of every bound. Plain C ABI, no torch. The arithmetic is in
// packed_rows.cpp, threads are in packed_threads.cpp, whole decoding steps in packed_step.cpp. Every function returns 0
// or the number of what is wrong (slimwright_packed_error says it).

#include "packed.h"
#include "packed_threads.h"

#include <atomic>
#include <cstring>

namespace slimwright {

namespace {

const char* const MESSAGES[] = {
    "", "a shape is not positive or too large", "the number format is unknown or its parameters are out of range",
    "the payload's size is not that of the shape", "the scales' size is not that of the shape",
    "the zero points' size is not that of the shape", "a row is outside the matrix", "an argument is out of range",
    "there is not enough memory", "the cache of keys and values is full",
    "the cache of keys and values contradicts itself",
};

const Rows& rows = ISA::rows;

}  // namespace

// -- checks ---------------------------------------------------------------------------------------------------------

int check(const Weight* w) {
    constexpr int64_t MOST = int64_t(1) << 40;
    if (!w || w->rows < 1 || w->columns < 1 || w->group < 1 || w->rows > MOST || w->columns > (1 << 24)) return BAD_SHAPE;
    if (w->rows > MOST / w->columns) return BAD_SHAPE;
    if (w->kind < 0 || w->kind >= KINDS || w->bits < 2 || w->bits > 8 || !w->payload || w->group > w->columns)
        return BAD_GRID;
    const int64_t groups = groups_of(*w), all = w->rows * groups;
    int64_t payload = w->rows * ((w->columns + 7) / 8 * w->bits), scale = 0, zero = 0;
    switch (w->kind) {
        case INT:
            scale = all * 2;
            if (w->zero_kind == BYTES) zero = all;
            else if (w->zero_kind == NIBBLES) zero = w->rows * ((groups + 1) / 2);
            else if (w->zero_kind == HALVES) zero = all * 2;
            else if (w->zero_kind != MIDDLE) return BAD_GRID;
            break;
        case NF4: {
            if (w->bits != 4 || w->group != (w->columns < 64 ? w->columns : 64)) return BAD_GRID;
            const bool twice = w->block_scale != nullptr;
            scale = twice ? all : all * 4;
            if (twice && (!w->mean || !w->table)) return BAD_GRID;
            if (twice && w->block_scale_bytes != divide_up(all, 256) * 4) return SHORT_SCALE;
            break;
        }
        case MXFP4:
            if (w->bits != 4 || w->group != (w->columns < 32 ? w->columns : 32)) return BAD_GRID;
            scale = all;
            break;
        case FP8:
            if (w->bits != 8 || !w->table) return BAD_GRID;
            scale = w->scale_bytes == 4 ? 4 : w->rows * 4;
            break;
        default: {
            const int64_t block = w->kind >= Q4_K ? 256 : 32;
            if (w->columns % block || w->group != (w->kind == Q6_K ? 16 : 32)) return BAD_GRID;
            const int64_t bytes = w->kind == Q4_0 ? 18 : w->kind == Q8_0 ? 34 : w->kind == Q4_K ? 144 : 210;
            payload = w->rows * (w->columns / block * bytes);
        }
    }
    if (w->payload_bytes != payload) return SHORT_PAYLOAD;
    if (scale && (!w->scale || w->scale_bytes != scale)) return SHORT_SCALE;
    if (zero && (!w->zero || w->zero_bytes != zero)) return SHORT_ZERO;
    return FINE;
}

// -- inputs ---------------------------------------------------------------------------------------------------------

Inputs inputs_of(const Weight& w, int64_t batch, int32_t digits) {
    Inputs in{};
    in.batch = batch, in.chunks = chunks_of(w), in.groups = padded_groups(w), in.digits = digits;
    in.segments = in.segment_chunks = in.segment_group = 1;
    if (digits && digits != BFLOATS) {
        const bool whole = w.group >= w.columns;
        in.lanes = !whole && w.group % CHUNK != 0;
        if (in.lanes) in.segments = in.chunks;
        else {
            const int64_t group_chunks = whole ? in.chunks : w.group / CHUNK;
            int64_t per = group_chunks < MOST_CHUNKS ? group_chunks : MOST_CHUNKS;
            if (!whole) while (group_chunks % per) per--;
            in.segment_chunks = per;
            in.segments = divide_up(in.chunks, per);
            in.segment_group = divide_up(group_chunks, per);
        }
    }
    in.padded = divide_up(in.segments, 16) * 16;
    return in;
}

bool takes(const Weight& w, int32_t digits, int32_t type) {
    if (type != FLOAT32 && type != BFLOAT16) return false;
    if (digits == PANELS) return true;
    if (digits == BFLOATS || digits == BFLOAT_PANELS) return rows.bfloats && type == BFLOAT16;
    if (digits < 0 || digits > 3) return false;
    const bool integers = w.kind != NF4 && w.kind != FP8 && (w.group >= w.columns || w.group % BLOCK == 0);
    return digits == 0 || integers;
}

namespace {
int64_t value_bytes(const Inputs& in) { return divide_up(in.batch * in.chunks * rows.chunk_bytes(in.digits), 64) * 64; }
}  // namespace

int64_t inputs_bytes(const Inputs& in) {
    const bool integers = in.digits && in.digits != BFLOATS;
    const int64_t start = integers ? in.batch * rows.start_numbers(in) * 4 : 0;
    return divide_up(value_bytes(in) + in.batch * (in.padded + in.groups) * 4 + start, 64) * 64;
}

void place_inputs(const Weight& w, Inputs& in, uint8_t* memory) {
    in.values = memory;
    memory += value_bytes(in);
    in.scale = reinterpret_cast<float*>(memory);
    memory += in.batch * in.padded * 4;
    in.sums = common_zero(w) < 0 ? reinterpret_cast<float*>(memory) : nullptr;
    in.start = reinterpret_cast<int32_t*>(memory + in.batch * in.groups * 4);
}

// Rows per task: a few tasks per thread, in whole fours, so that a slow thread does not hold up the others for long.
int64_t task_rows(int64_t count, int threads) {
    const int64_t step = divide_up(count, int64_t(threads) * 6);
    return divide_up(step < 16 ? 16 : step > 512 ? 512 : step, 4) * 4;
}

uint8_t* row_memory(const Weight& w) {
    thread_local Buffer memory;
    return memory.get(size_t(scratch_bytes(w)));
}

namespace {

thread_local Buffer inputs_memory;

// -- linear ---------------------------------------------------------------------------------------------------------

struct Linear {
    const Weight& weight;
    Inputs inputs;
    const uint8_t* x;
    const void* bias;
    void* out;
    int64_t x_stride, first, last, step;
    int32_t type;
    std::atomic<bool> failed{false};
};

void prepare_task(void* context, int64_t index) {
    Linear& job = *static_cast<Linear*>(context);
    rows.prepare(job.weight, job.x + index * job.x_stride, job.type, index, job.inputs);
}

void linear_task(void* context, int64_t index) {
    Linear& job = *static_cast<Linear*>(context);
    uint8_t* scratch = row_memory(job.weight);
    if (!scratch) return job.failed.store(true);
    const int64_t first = job.first + index * job.step;
    const int64_t last = first + job.step < job.last ? first + job.step : job.last;
    rows.linear(job.weight, job.inputs, first, last, job.bias, job.out, job.last - job.first, job.first, job.type, scratch);
}

// -- many inputs ----------------------------------------------------------------------------------------------------

constexpr int64_t MOST_INPUTS = 768;       // multiplied at a time: with 4864 columns 7.5 MB in bfloat16
constexpr int64_t CACHED = 640 << 10;      // bytes of decoded rows of a task, which stay in a second-level cache

struct ManyLinear {
    const Weight& weight;
    Inputs inputs;                         // where they have to be written anew
    Many many;
    const uint8_t* x;
    const void* bias;
    uint8_t* out;
    int64_t first, last, step;
    int32_t type;
    std::atomic<bool> failed{false};
    int64_t element() const { return type == FLOAT32 ? 4 : 2; }
    int64_t row() const { return chunks_of(weight) * CHUNK * (many.bfloats ? 2 : 4); }
};

void write_input(void* context, int64_t index) {
    ManyLinear& job = *static_cast<ManyLinear*>(context);
    rows.prepare(job.weight, job.x + index * job.weight.columns * job.element(), job.type, index, job.inputs);
}

void many_task(void* context, int64_t index) {
    ManyLinear& job = *static_cast<ManyLinear*>(context);
    thread_local Buffer kept;
    const int64_t first = job.first + index * job.step;
    const int64_t last = first + job.step < job.last ? first + job.step : job.last;
    const int64_t bytes = (divide_up(job.step, rows.width) + 1) * rows.width * job.row();
    uint8_t *scratch = row_memory(job.weight), *memory = kept.get(size_t(bytes));
    if (!scratch || !memory) return job.failed.store(true);
    const int64_t column = (first - job.first) * job.element();
    const uint8_t* bias = job.bias ? static_cast<const uint8_t*>(job.bias) + column : nullptr;
    rows.multiply_many(job.weight, job.many, first, last, bias, job.out + column, job.last - job.first, job.type, memory,
                       scratch);
}

// Rows of a task, whole vectors: at most as many as stay cached, so many that threads end together.
int64_t many_rows(const ManyLinear& job, int threads) {
    const int64_t count = job.last - job.first, width = rows.width;
    int64_t best = 0, least = 0, most = CACHED / job.row();
    most = (most > 96 ? 96 : most < width ? width : most) / width * width;
    for (int64_t step = most; step >= width; step -= width) {
        const int64_t longest = divide_up(divide_up(count, step), threads) * step;
        if (!best || longest < least) best = step, least = longest;
    }
    return best;
}

// As slimwright_packed_linear; a part of the inputs after the other, for each of which rows are decoded anew. Inputs are
// read where they lie, except bfloat16 ones that are multiplied in float32 and those with half a step at the end.
int many_linear(const Weight& w, const void* x, int64_t batch, int64_t first, int64_t last, const void* bias, void* out,
                int32_t type, bool bfloats, int threads) {
    const int64_t parts = divide_up(batch, MOST_INPUTS), part = divide_up(batch, parts);
    const bool anew = bfloats ? w.columns % 2 != 0 : type == BFLOAT16;
    for (int64_t start = 0; start < batch; start += part) {
        const int64_t count = batch - start < part ? batch - start : part, element = type == FLOAT32 ? 4 : 2;
        ManyLinear job{w, inputs_of(w, count, bfloats ? BFLOATS : 0), {count, w.columns * element, bfloats, nullptr},
                       static_cast<const uint8_t*>(x) + start * w.columns * element, bias,
                       static_cast<uint8_t*>(out) + start * (last - first) * element, first, last, 0, type};
        job.many.x = job.x;
        if (anew) {
            uint8_t* memory = inputs_memory.get(size_t(inputs_bytes(job.inputs)));
            if (!memory) return NO_MEMORY;
            place_inputs(w, job.inputs, memory);
            job.many.x = memory, job.many.stride = job.row();
            parallel(write_input, &job, count, threads);
        }
        job.step = many_rows(job, threads);
        parallel(many_task, &job, divide_up(last - first, job.step), threads);
        if (job.failed) return NO_MEMORY;
    }
    return FINE;
}

struct Dense {
    const Weight& weight;
    const int64_t* index;
    uint8_t* out;
    int64_t first, count, step;
    int32_t type;
    std::atomic<bool> failed{false};
};

void decode_task(void* context, int64_t task) {
    Dense& job = *static_cast<Dense*>(context);
    uint8_t* scratch = row_memory(job.weight);
    if (!scratch) return job.failed.store(true);
    const int64_t width = job.weight.columns * (job.type == FLOAT32 ? 4 : 2);
    const int64_t last = (task + 1) * job.step < job.count ? (task + 1) * job.step : job.count;
    for (int64_t i = task * job.step; i < last; i++)
        rows.decode(job.weight, job.index ? job.index[i] : job.first + i, job.out + i * width, job.type, scratch);
}

int run_dense(Dense& job, int threads) {
    job.step = task_rows(job.count, threads);
    const bool small = job.count * job.weight.columns < 16384;
    parallel(decode_task, &job, divide_up(job.count, job.step), small ? 1 : threads);
    return job.failed ? NO_MEMORY : FINE;
}

}  // namespace
}  // namespace slimwright

using namespace slimwright;

extern "C" {

int slimwright_packed_abi() { return 2; }

const char* slimwright_packed_isa() { return rows.name; }

// Whether products can be taken in bfloat16.
int slimwright_packed_bfloats() { return rows.bfloats; }

const char* slimwright_packed_error(int code) {
    return code < 0 || code >= ERRORS ? "unknown error" : MESSAGES[code];
}

// Use this GOMP_parallel from now on; null: threads of this library's own.
void slimwright_packed_threads(void* function) { use_threads_of(function); }

int slimwright_packed_check(const Weight* weight) { return check(weight); }

// out (batch, last - first) = x (batch, columns) W[first..last)' + bias; x, bias, out of the same type, contiguous.
// digits: 0 float arithmetic, 1 to 3 integers of 8, 16, 24 bits (the grid's groups must be multiples of 16 columns, or
// whole rows), 4 bfloat16 (where slimwright_packed_bfloats), 5 and 6 many inputs in float32 and bfloat16.
int slimwright_packed_linear(const Weight* weight, const void* x, int64_t batch, int64_t first, int64_t last,
                             const void* bias, void* out, int32_t type, int32_t digits, int32_t threads) {
    if (const int wrong = check(weight)) return wrong;
    const Weight& w = *weight;
    if (first < 0 || last > w.rows || first >= last) return BAD_RANGE;
    if (!x || !out || batch < 1 || batch > (1 << 20) || threads < 1 || threads > 4096) return BAD_ARGUMENT;
    if (!takes(w, digits, type)) return digits > 0 && digits < BFLOATS && (type == FLOAT32 || type == BFLOAT16)
                                        ? BAD_GRID : BAD_ARGUMENT;
    if (digits >= PANELS) return many_linear(w, x, batch, first, last, bias, out, type, digits == BFLOAT_PANELS, threads);
    Inputs in = inputs_of(w, batch, digits);
    uint8_t* memory = inputs_memory.get(size_t(inputs_bytes(in)));
    if (!memory) return NO_MEMORY;
    place_inputs(w, in, memory);
    Linear job{w, in, static_cast<const uint8_t*>(x), bias, out, w.columns * (type == FLOAT32 ? 4 : 2), first, last, 0, type};
    parallel(prepare_task, &job, batch, batch < 4 ? 1 : threads);
    job.step = task_rows(last - first, threads);
    const bool small = (last - first) * w.columns * batch < 32768;
    parallel(linear_task, &job, divide_up(last - first, job.step), small ? 1 : threads);
    return job.failed ? NO_MEMORY : FINE;
}

// out (last - first, columns): dense rows.
int slimwright_packed_decode(const Weight* weight, int64_t first, int64_t last, void* out, int32_t type, int32_t threads) {
    if (const int wrong = check(weight)) return wrong;
    if (first < 0 || last > weight->rows || first >= last) return BAD_RANGE;
    if (!out || threads < 1 || threads > 4096 || (type != FLOAT32 && type != BFLOAT16)) return BAD_ARGUMENT;
    Dense job{*weight, nullptr, static_cast<uint8_t*>(out), first, last - first, 1, type};
    return run_dense(job, threads);
}

// out (count, columns): the rows that index names.
int slimwright_packed_gather(const Weight* weight, const int64_t* index, int64_t count, void* out, int32_t type,
                             int32_t threads) {
    if (const int wrong = check(weight)) return wrong;
    if (!index || !out || count < 1 || threads < 1 || threads > 4096 || (type != FLOAT32 && type != BFLOAT16))
        return BAD_ARGUMENT;
    for (int64_t i = 0; i < count; i++)
        if (index[i] < 0 || index[i] >= weight->rows) return BAD_RANGE;
    Dense job{*weight, index, static_cast<uint8_t*>(out), 0, count, 1, type};
    return run_dense(job, threads);
}

}  // extern "C"
