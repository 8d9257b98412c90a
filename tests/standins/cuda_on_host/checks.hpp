// A failure in a kernel ends the launch with an error instead of the process: a failed check that the compiler has added
// (-fsanitize=undefined), which calls one of these functions with the line, or an access to unmapped memory.

#pragma once

#include <signal.h>

#include "block.hpp"

namespace cuda_on_host {

// The location in the source; the data of every check begin with it.
struct Location {
    const char* file;
    unsigned line, column;
};

struct Mismatch {
    Location location;
    const void* type;
    unsigned char log_alignment, kind;
};

[[noreturn]] inline void fail_at(const void* data, const char* what) {
    const Location& location = *static_cast<const Location*>(data);
    fail("%s at %s:%u", what, location.file, location.line);
}

// During the lifetime of this object, a segmentation fault is an error of the kernel.
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

// Called by the code that the compiler adds to the source.
extern "C" {

[[gnu::used]] inline void __ubsan_handle_type_mismatch_v1(void* data, void* pointer) {
    const auto& mismatch = *static_cast<const cuda_on_host::Mismatch*>(data);
    if (!pointer) {
        cuda_on_host::fail_at(data, "null pointer");
    }
    cuda_on_host::fail("misaligned address %p, not a multiple of %llu, at %s:%u", pointer,
                       1ULL << mismatch.log_alignment, mismatch.location.file, mismatch.location.line);
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
