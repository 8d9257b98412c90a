// The parts of CUDA C++ that C++ lacks and that mbn's kernels use, for kernels that run on the host.
//
// The source of the kernels follows this header, then CUDA_ON_HOST_KERNEL for each of them.

#pragma once

#include <link.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <type_traits>
#include <utility>

#include "block.hpp"
#include "checks.hpp"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
// Thread-local variables lie in a segment of their own, which launch() finds and fills; "used" keeps the compiler from
// removing variables that seem to be never written.
#define __shared__ __attribute__((used)) static thread_local

struct alignas(8) uint2 {
    unsigned x, y;
};

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

template <class T>
T __ldca(const T* address) {
    return *address;
}

template <class T>
void __stwb(T* address, T value) {
    *address = value;
}

inline double __dmul_rn(double a, double b) { return a * b; }

inline void __syncthreads(int line = __builtin_LINE()) { cuda_on_host::wait(cuda_on_host::block_barrier, line); }

inline void __syncwarp(unsigned = ~0U, int line = __builtin_LINE()) {
    cuda_on_host::wait(cuda_on_host::warp_barriers[cuda_on_host::current / cuda_on_host::WARP], line);
}

namespace cuda_on_host {

inline thread_local char is_shared;  // makes the segment exist, even if no kernel has shared memory

// Return the value of another lane of the warp, or the lane's own value if there is no such lane. All lanes take part.
template <class T>
T exchange(unsigned mask, T value, unsigned lane, int line) {
    static T values[MOST_THREADS];
    if (mask != ~0U) {
        fail("a shuffle of a part of a warp, at line %d", line);
    }
    unsigned first = current / WARP * WARP;
    values[current] = value;
    __syncwarp(mask, line);
    T other = lane < WARP && first + lane < threads ? values[first + lane] : value;
    __syncwarp(mask, line);
    return other;
}

struct Memory {
    char* start;
    size_t size;
};

// Return the shared memory of the kernels of this library, for the calling thread of the host.
inline Memory find_shared_memory() {
    Memory found{&is_shared, 1};
    auto look = [](dl_phdr_info* info, size_t, void* result) {
        char* start = static_cast<char*>(info->dlpi_tls_data);
        for (int header = 0; start && header < info->dlpi_phnum; ++header) {
            size_t size = info->dlpi_phdr[header].p_memsz;
            if (info->dlpi_phdr[header].p_type == PT_TLS && &is_shared >= start && &is_shared < start + size) {
                *static_cast<Memory*>(result) = {start, size};
                return 1;
            }
        }
        return 0;
    };
    dl_iterate_phdr(look, &found);
    return found;
}

// Run all blocks in an order that the seed determines; return an error message, or null.
inline const char* launch(void (*kernel)(void* const*), const unsigned* grid, const unsigned* block,
                          void* const* values, unsigned long long seed) {
    if (!stacks) {
        void* mapped = mmap(nullptr, MOST_THREADS * STACK, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (mapped == MAP_FAILED) {
            return "no memory for the stacks of the threads";
        }
        stacks = static_cast<char*>(mapped);
    }
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    threads = block[0] * block[1] * block[2];
    body = kernel;
    arguments = values;
    generator = {seed};
    unsigned count = grid[0] * grid[1] * grid[2];
    unsigned* blocks = static_cast<unsigned*>(malloc(count * sizeof(unsigned)));
    for (unsigned i = 0; i < count; ++i) {
        blocks[i] = i;
    }
    generator.shuffle(blocks, count);
    Memory shared = find_shared_memory();
    Faults faults;
    bool is_right = true;
    for (unsigned i = 0; is_right && i < count; ++i) {
        memset(shared.start, 0xFF, shared.size);  // NaN in every precision
        blockIdx = {blocks[i] % grid[0], blocks[i] / grid[0] % grid[1], blocks[i] / grid[0] / grid[1]};
        is_right = run_block();
    }
    free(blocks);
    return is_right ? nullptr : error;
}

// The description of a kernel, which the host reads in this layout.
struct Kernel {
    const char* (*launch)(const unsigned*, const unsigned*, void* const*, unsigned long long);
    unsigned bound, parameters;
    char kinds[64];
    unsigned char sizes[64];
};

template <class T>
constexpr char kind() {
    return std::is_pointer_v<T> ? 'P' : std::is_floating_point_v<T> ? 'F' : std::is_integral_v<T> ? 'I' : '?';
}

template <auto>
struct Signature;

template <class... T, void (*kernel)(T...)>
struct Signature<kernel> {
    template <size_t... index>
    static void call([[maybe_unused]] void* const* values, std::index_sequence<index...>) {
        kernel(*static_cast<T*>(values[index])...);
    }

    static void body(void* const* values) { call(values, std::index_sequence_for<T...>()); }

    static const char* launch(const unsigned* grid, const unsigned* block, void* const* values,
                              unsigned long long seed) {
        return cuda_on_host::launch(body, grid, block, values, seed);
    }

    static constexpr Kernel describe(unsigned bound) {
        static_assert(sizeof...(T) <= 64);
        return {launch, bound, sizeof...(T), {kind<T>()...}, {sizeof(T)...}};
    }
};

}  // namespace cuda_on_host

template <class T>
T __shfl_sync(unsigned mask, T value, unsigned lane, int line = __builtin_LINE()) {
    return cuda_on_host::exchange(mask, value, lane, line);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int line = __builtin_LINE()) {
    return cuda_on_host::exchange(mask, value, cuda_on_host::current % cuda_on_host::WARP + delta, line);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, unsigned lanes, int line = __builtin_LINE()) {
    return cuda_on_host::exchange(mask, value, (cuda_on_host::current % cuda_on_host::WARP) ^ lanes, line);
}

#define CUDA_ON_HOST_KERNEL(name, bound)                                              \
    extern "C" __attribute__((visibility("default"))) cuda_on_host::Kernel cuda_on_host_##name; \
    cuda_on_host::Kernel cuda_on_host_##name = cuda_on_host::Signature<name>::describe(bound);
