// One block of threads at a time: each thread is a fiber, and the fibers run in turn from barrier to barrier.
//
// Between two barriers the threads run in an order that is shuffled anew each time, so that a kernel without a needed
// barrier gets wrong values. _setjmp and _longjmp leave a fiber and resume it; they make no system calls. An error in a
// kernel ends the launch: its fibers are abandoned, and the next launch starts new ones.

#pragma once

#include <setjmp.h>
#include <stdio.h>
#include <string.h>
#include <ucontext.h>

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x, y, z;
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace cuda_on_host {

constexpr unsigned MOST_THREADS = 1024, WARP = 32;
constexpr size_t STACK = (64 << 10) + 7 * 64;  // no multiple of a page: their tops would share a set of the cache

// The same numbers for the same seed. Source: xorshift64*, Vigna, An experimental exploration of Marsaglia's xorshift
// generators, scrambled, 2016.
struct Generator {
    unsigned long long state;

    unsigned below(unsigned bound) {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        return static_cast<unsigned>(((state * 0x2545F4914F6CDD1DULL >> 32) * bound) >> 32);
    }

    void shuffle(unsigned* values, unsigned count) {
        for (; count > 1; --count) {
            unsigned other = below(count), value = values[other];
            values[other] = values[count - 1];
            values[count - 1] = value;
        }
    }
};

// All threads of a block or of a warp have to reach a barrier, at the same line, before any continues.
struct Barrier {
    unsigned size, arrived;
    int line;
};

struct Fiber {
    jmp_buf context;
    uint3 index;
    Barrier* waits_at;
    bool started, returned;
};

inline Fiber fibers[MOST_THREADS];
inline char* stacks;
inline unsigned threads, current;                  // the threads of a block, and the thread that runs
inline unsigned order[MOST_THREADS], ready, next;  // the threads that run until all wait, and the next of them
inline Barrier block_barrier, warp_barriers[MOST_THREADS / WARP];
inline Generator generator;
inline void (*body)(void* const*);
inline void* const* arguments;
inline jmp_buf launcher;
inline char error[512];

enum Outcome { STARTED, ENDED, FAILED };  // returned by _setjmp(launcher)

template <class... Values>
[[noreturn]] void fail(const char* format, Values... values) {
    snprintf(error, sizeof error, format, values...);
    size_t length = strlen(error);
    snprintf(error + length, sizeof error - length, " [block (%u, %u, %u), thread (%u, %u, %u)]", blockIdx.x,
             blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
    for (Fiber& fiber : fibers) {
        fiber.started = false;
    }
    _longjmp(launcher, FAILED);
}

// Let the threads continue that wait at no barrier, or at one that all its threads have reached.
inline void begin_round() {
    const Barrier* closed = nullptr;
    ready = next = 0;
    for (unsigned thread = 0; thread < threads; ++thread) {
        const Barrier* barrier = fibers[thread].waits_at;
        if (barrier && barrier->arrived < barrier->size) {
            closed = barrier;
        } else if (!fibers[thread].returned) {
            order[ready++] = thread;
        }
    }
    if (!ready && closed) {
        fail("divergent barrier: %u of %u threads wait at line %d", closed->arrived, closed->size, closed->line);
    }
    if (!ready) {
        _longjmp(launcher, ENDED);
    }
    for (unsigned i = 0; i < ready; ++i) {
        Barrier*& barrier = fibers[order[i]].waits_at;
        if (barrier) {
            barrier->arrived = 0;
        }
        barrier = nullptr;
    }
    generator.shuffle(order, ready);
}

[[noreturn]] inline void run_next();

// Leave the running fiber until it is its turn again.
[[gnu::noinline]] inline void yield() {
    if (_setjmp(fibers[current].context) == 0) {
        run_next();
    }
}

inline void run_fiber() {
    for (;;) {
        body(arguments);
        fibers[current].returned = true;
        yield();
    }
}

inline void start_fiber() {
    fibers[current].started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks + current * STACK;
    context.uc_stack.ss_size = STACK;
    context.uc_link = nullptr;
    makecontext(&context, run_fiber, 0);
    setcontext(&context);
}

[[noreturn]] inline void run_next() {
    if (next == ready) {
        begin_round();
    }
    current = order[next++];
    threadIdx = fibers[current].index;
    if (!fibers[current].started) {
        start_fiber();
    }
    _longjmp(fibers[current].context, 1);
}

inline void wait(Barrier& barrier, int line) {
    if (barrier.arrived && barrier.line != line) {
        fail("divergent barrier: %u threads wait at line %d, another one at line %d", barrier.arrived, barrier.line,
             line);
    }
    barrier.line = line;
    ++barrier.arrived;
    fibers[current].waits_at = &barrier;
    yield();
}

[[gnu::noinline]] inline bool run_block() {
    block_barrier = {threads, 0, 0};
    for (unsigned thread = 0; thread < threads; ++thread) {
        fibers[thread].index = {thread % blockDim.x, thread / blockDim.x % blockDim.y,
                                thread / blockDim.x / blockDim.y};
        fibers[thread].waits_at = nullptr;
        fibers[thread].returned = false;
        if (thread % WARP == 0) {
            warp_barriers[thread / WARP] = {threads - thread < WARP ? threads - thread : WARP, 0, 0};
        }
    }
    ready = next = 0;
    int outcome = _setjmp(launcher);
    if (outcome == STARTED) {
        run_next();
    }
    return outcome == ENDED;
}

}  // namespace cuda_on_host
