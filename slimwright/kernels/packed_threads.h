// Threads of the packed kernels: torch's own, or a pool.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

namespace slimwright {

// task(context, index) for every index below count, on at most so many threads.
using Task = void (*)(void* context, int64_t index);
void parallel(Task task, void* context, int64_t count, int threads);

// body(data) once on each of at most so many threads, the caller's among them, at the same time where they are free.
void team(void (*body)(void*), void* data, int threads);

// Run on the threads of the OpenMP library that has this GOMP_parallel; null: on a pool.
void use_threads_of(void* function);

// A moment's wait for another thread; the more of them, the more way is given.
void wait_a_moment(int turns);

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

}  // namespace slimwright
