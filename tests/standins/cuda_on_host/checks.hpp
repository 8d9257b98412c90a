// What fails in a kernel ends the launch with an error, where it would end the process: the checks that the compiler adds
// (-fsanitize=undefined), which call these functions and name the line, and memory that nobody has.

#pragma once

#include <signal.h>

#include "block.hpp"

namespace cuda_on_host {

// How the data of every check begins.
struct Place {
    const char* file;
    unsigned line, column;
};

struct Mismatch {
    Place place;
    const void* type;
    unsigned char log_alignment, kind;
};

[[noreturn]] inline void fail_at(const void* data, const char* what) {
    const Place& place = *static_cast<const Place*>(data);
    fail("%s at %s:%u", what, place.file, place.line);
}

// While this lives, a fault is an error of the kernel.
class Faults {
    struct sigaction before;

   public:
    Faults() {
        struct sigaction action = {};
        action.sa_sigaction = [](int, siginfo_t* info, void*) { fail("no memory at address %p", info->si_addr); };
        action.sa_flags = SA_SIGINFO | SA_NODEFER;  // fail leaves the handler for good
        sigaction(SIGSEGV, &action, &before);
    }

    ~Faults() { sigaction(SIGSEGV, &before, nullptr); }
};

}  // namespace cuda_on_host

// Nothing in the source calls these, but what the compiler adds to it.
extern "C" {

[[gnu::used]] inline void __ubsan_handle_type_mismatch_v1(void* data, void* pointer) {
    const auto& mismatch = *static_cast<const cuda_on_host::Mismatch*>(data);
    if (!pointer) {
        cuda_on_host::fail_at(data, "null pointer");
    }
    cuda_on_host::fail("misaligned address %p, not a multiple of %llu, at %s:%u", pointer,
                       1ULL << mismatch.log_alignment, mismatch.place.file, mismatch.place.line);
}

#define CHECK(name, what, ...) \
    [[gnu::used]] inline void __ubsan_handle_##name(void* data, ##__VA_ARGS__) { cuda_on_host::fail_at(data, what); }

CHECK(out_of_bounds, "index out of bounds", void*)
CHECK(shift_out_of_bounds, "shift by too many bits", void*, void*)
CHECK(divrem_overflow, "integer division by zero", void*, void*)
CHECK(add_overflow, "integer overflow", void*, void*)
CHECK(sub_overflow, "integer overflow", void*, void*)
CHECK(mul_overflow, "integer overflow", void*, void*)
CHECK(negate_overflow, "integer overflow", void*)

#undef CHECK

}
