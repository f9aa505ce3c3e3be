// Threads: torch's own, where its OpenMP library lets them be used, since threads of two libraries would spin against
// each other; else a pool.

#include "packed_threads.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <unistd.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define PAUSE() _mm_pause()
#else
#define PAUSE() std::this_thread::yield()
#endif

namespace slimwright {

void wait_a_moment(int turns) {
    if (turns < 2000) PAUSE();
    else std::this_thread::yield();
}

namespace {

// Threads that wait for a moment awake, giving way to others, then sleep. Made again after a fork, which copies none.
class Pool {
public:
    void run(void (*body)(void*), void* data, int threads) {
        if (getpid() != process_) start_over();
        try {
            for (; workers_ < threads - 1; workers_++) std::thread(&Pool::serve, this, workers_).detach();
        } catch (const std::system_error&) {  // the system gives no more threads
            threads = workers_ + 1;
        }
        {
            std::lock_guard<std::mutex> hold(mutex_);
            body_ = body, data_ = data;
            wanted_ = threads - 1;
            busy_.store(threads - 1, std::memory_order_relaxed);
            generation_.fetch_add(1, std::memory_order_release);
        }
        if (asleep_.load(std::memory_order_acquire)) wake_.notify_all();
        body(data);
        for (int turns = 0; busy_.load(std::memory_order_acquire); turns++) wait_a_moment(turns);
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
            void (*body)(void*) = nullptr;
            void* data = nullptr;
            {
                std::lock_guard<std::mutex> hold(mutex_);
                now = generation_.load(std::memory_order_relaxed);
                if (index < wanted_) body = body_, data = data_;
            }
            seen = now;
            if (!body) continue;
            body(data);
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
    void (*body_)(void*) = nullptr;
    void* data_ = nullptr;
    int wanted_ = 0;
    pid_t process_ = 0;
};

Pool& pool() {
    static Pool* one = new Pool();  // never destroyed: its threads may still wait when the process ends
    return *one;
}

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<GompParallel> gomp_parallel{nullptr};

struct Job {
    Task task;
    void* context;
    int64_t count;
    std::atomic<int64_t> next;
};

void work(void* data) {
    Job& job = *static_cast<Job*>(data);
    for (;;) {
        const int64_t index = job.next.fetch_add(1, std::memory_order_relaxed);
        if (index >= job.count) return;
        job.task(job.context, index);
    }
}

}  // namespace

void use_threads_of(void* function) { gomp_parallel = reinterpret_cast<GompParallel>(function); }

void team(void (*body)(void*), void* data, int threads) {
    if (threads <= 1) return body(data);
    if (const GompParallel run = gomp_parallel.load(std::memory_order_relaxed))
        return run(body, data, unsigned(threads), 0);
    std::unique_lock<std::mutex> turn(pool().turn(), std::try_to_lock);
    if (!turn.owns_lock()) return body(data);  // another thread of the program uses the pool now
    pool().run(body, data, threads);
}

void parallel(Task task, void* context, int64_t count, int threads) {
    Job job{task, context, count, {0}};
    team(work, &job, int64_t(threads) > count ? int(count) : threads);
}

}  // namespace slimwright
