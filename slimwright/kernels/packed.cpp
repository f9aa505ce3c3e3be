// Products with packed matrices: entry points, checks of every bound, threads. Plain C ABI, no torch. The arithmetic is
// in packed_rows.cpp. Every function returns 0 or the number of what is wrong (slimwright_packed_error says it).

#include "packed.h"

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <unistd.h>

#ifndef ISA
#define ISA portable
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#define PAUSE() _mm_pause()
#else
#define PAUSE() std::this_thread::yield()
#endif

namespace slimwright {
namespace ISA { extern const Rows rows; }

namespace {

enum Error { FINE = 0, BAD_SHAPE, BAD_GRID, SHORT_PAYLOAD, SHORT_SCALE, SHORT_ZERO, BAD_RANGE, BAD_ARGUMENT, NO_MEMORY };

const char* const MESSAGES[] = {
    "", "a shape is not positive or too large", "the number format is unknown or its parameters are out of range",
    "the payload's size is not that of the shape", "the scales' size is not that of the shape",
    "the zero points' size is not that of the shape", "a row is outside the matrix", "an argument is out of range",
    "there is not enough memory",
};

const Rows& rows = ISA::rows;

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

// -- threads --------------------------------------------------------------------------------------------------------

using Task = void (*)(void* context, int64_t index);

struct Job {
    Task task;
    void* context;
    int64_t count;
    std::atomic<int64_t> next;
};

void work(Job& job) {
    for (;;) {
        const int64_t index = job.next.fetch_add(1, std::memory_order_relaxed);
        if (index >= job.count) return;
        job.task(job.context, index);
    }
}

// Threads that wait for a moment awake, giving way to others, then sleep. Made again after a fork, which copies none.
class Pool {
public:
    void run(Job& job, int threads) {
        if (getpid() != process_) start_over();
        try {
            for (; workers_ < threads - 1; workers_++) std::thread(&Pool::serve, this, workers_).detach();
        } catch (const std::system_error&) {  // the system gives no more threads
            threads = workers_ + 1;
        }
        {
            std::lock_guard<std::mutex> hold(mutex_);
            job_ = &job;
            wanted_ = threads - 1;
            busy_.store(threads - 1, std::memory_order_relaxed);
            generation_.fetch_add(1, std::memory_order_release);
        }
        if (asleep_.load(std::memory_order_acquire)) wake_.notify_all();
        work(job);
        for (int spins = 0; busy_.load(std::memory_order_acquire); spins++)
            if (spins < 2000) PAUSE();
            else std::this_thread::yield();
    }
    std::mutex& turn() { return turn_; }

private:
    void serve(int index) {
        uint64_t seen = 0;
        for (;;) {
            uint64_t now;
            int spins = 0;
            while ((now = generation_.load(std::memory_order_acquire)) == seen) {
                if (++spins < 1000) PAUSE();
                else if (spins < 1200) std::this_thread::yield();
                else {
                    std::unique_lock<std::mutex> hold(mutex_);
                    asleep_.fetch_add(1, std::memory_order_release);
                    wake_.wait(hold, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
                    asleep_.fetch_sub(1, std::memory_order_relaxed);
                }
            }
            Job* job = nullptr;
            {
                std::lock_guard<std::mutex> hold(mutex_);
                now = generation_.load(std::memory_order_relaxed);
                if (index < wanted_) job = job_;
            }
            seen = now;
            if (!job) continue;
            work(*job);
            busy_.fetch_sub(1, std::memory_order_release);
        }
    }
    void start_over() {
        workers_ = 0;
        new (&mutex_) std::mutex();
        new (&wake_) std::condition_variable();
        generation_ = 0, asleep_ = 0, busy_ = 0, wanted_ = 0;
        process_ = getpid();
    }
    int workers_ = 0;
    std::mutex mutex_, turn_;
    std::condition_variable wake_;
    std::atomic<uint64_t> generation_{0};
    std::atomic<int> asleep_{0}, busy_{0};
    Job* job_ = nullptr;
    int wanted_ = 0;
    pid_t process_ = 0;
};

Pool& pool() {
    static Pool* one = new Pool();  // never destroyed: its threads may still wait when the process ends
    return *one;
}

// torch's own threads, where its OpenMP library has this function: threads of two libraries would spin against each other.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<GompParallel> gomp_parallel{nullptr};

void parallel(Task task, void* context, int64_t count, int threads) {
    Job job{task, context, count, {0}};
    if (int64_t(threads) > count) threads = int(count);
    if (threads <= 1) return work(job);
    if (const GompParallel run = gomp_parallel.load(std::memory_order_relaxed)) {
        run([](void* data) { work(*static_cast<Job*>(data)); }, &job, unsigned(threads), 0);
        return;
    }
    std::unique_lock<std::mutex> turn(pool().turn(), std::try_to_lock);
    if (!turn.owns_lock()) return work(job);  // another thread of the program uses the pool now
    pool().run(job, threads);
}

// Memory that a thread keeps for its next call.
struct Buffer {
    uint8_t* data = nullptr;
    size_t size = 0;
    ~Buffer() { free(data); }
    uint8_t* get(size_t bytes) {
        if (bytes > size) {
            free(data);
            size = (bytes + 4095) / 4096 * 4096;
            data = static_cast<uint8_t*>(aligned_alloc(64, size));
            if (!data) size = 0;
        }
        return data;
    }
};
thread_local Buffer inputs_memory, rows_memory;

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
    uint8_t* scratch = rows_memory.get(size_t(scratch_bytes(job.weight)));
    if (!scratch) return job.failed.store(true);
    const int64_t first = job.first + index * job.step;
    const int64_t last = first + job.step < job.last ? first + job.step : job.last;
    rows.linear(job.weight, job.inputs, first, last, job.bias, job.out, job.last - job.first, job.first, job.type, scratch);
}

// Rows per task: a few tasks per thread, in whole fours, so that a slow thread does not hold up the others for long.
int64_t task_rows(int64_t count, int threads) {
    const int64_t step = divide_up(count, int64_t(threads) * 6);
    return divide_up(step < 16 ? 16 : step > 512 ? 512 : step, 4) * 4;
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
    uint8_t* scratch = rows_memory.get(size_t(scratch_bytes(job.weight)));
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

int slimwright_packed_abi() { return 1; }

const char* slimwright_packed_isa() { return rows.name; }

// Whether products can be taken in bfloat16.
int slimwright_packed_bfloats() { return rows.bfloats; }

const char* slimwright_packed_error(int code) {
    return code < 0 || code > NO_MEMORY ? "unknown error" : MESSAGES[code];
}

// Use this GOMP_parallel from now on; null: threads of this library's own.
void slimwright_packed_threads(void* function) { gomp_parallel = reinterpret_cast<GompParallel>(function); }

int slimwright_packed_check(const Weight* weight) { return check(weight); }

// out (batch, last - first) = x (batch, columns) W[first..last)' + bias; x, bias, out of the same type, contiguous.
// digits: 0 float arithmetic, 1 to 3 integers of 8, 16, 24 bits (the grid's groups must be multiples of 16 columns, or
// whole rows), 4 bfloat16 (where slimwright_packed_bfloats).
int slimwright_packed_linear(const Weight* weight, const void* x, int64_t batch, int64_t first, int64_t last,
                             const void* bias, void* out, int32_t type, int32_t digits, int32_t threads) {
    if (const int wrong = check(weight)) return wrong;
    const Weight& w = *weight;
    if (first < 0 || last > w.rows || first >= last) return BAD_RANGE;
    if (!x || !out || batch < 1 || batch > (1 << 20) || digits < 0 || digits > (rows.bfloats && type == BFLOAT16 ? BFLOATS : 3) || threads < 1 || threads > 4096 ||
        (type != FLOAT32 && type != BFLOAT16))
        return BAD_ARGUMENT;
    Inputs in{};
    in.batch = batch, in.chunks = chunks_of(w), in.groups = padded_groups(w), in.digits = digits;
    in.segments = in.segment_chunks = in.segment_group = 1;
    const bool integers = digits && digits != BFLOATS;
    if (integers) {
        const bool whole = w.group >= w.columns;
        if (w.kind == NF4 || w.kind == FP8 || (!whole && w.group % BLOCK)) return BAD_GRID;
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
    const int64_t value_bytes = divide_up(batch * in.chunks * rows.chunk_bytes(digits), 64) * 64;
    const int64_t scale_bytes = batch * in.padded * 4;
    const int64_t sum_bytes = batch * in.groups * 4;
    const int64_t start_bytes = integers ? batch * rows.start_numbers(in) * 4 : 0;
    uint8_t* memory = inputs_memory.get(size_t(value_bytes + scale_bytes + sum_bytes + start_bytes));
    if (!memory) return NO_MEMORY;
    in.values = memory;
    in.scale = reinterpret_cast<float*>(memory + value_bytes);
    if (common_zero(w) < 0) in.sums = reinterpret_cast<float*>(memory + value_bytes + scale_bytes);
    in.start = reinterpret_cast<int32_t*>(memory + value_bytes + scale_bytes + sum_bytes);
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
