// What a pipeline in shared memory is made of: barriers and bulk copies (sm_90 and later).
#pragma once
#include <stdint.h>

__device__ inline uint32_t shared_address(const void* p) { return __cvta_generic_to_shared(p); }

// A phase ends when all arrivals and all announced bytes are in; then the next begins.
struct Barrier {
    uint64_t word;

    __device__ void init(uint32_t arrivals) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(arrivals) : "memory");
    }

    // Bulk copies may use barriers that were initialised before this.
    __device__ static void publish() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

    __device__ void arrive() {
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
    }

    __device__ void arrive_expecting(uint32_t bytes) {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)), "r"(bytes)
                     : "memory");
    }

    // Until the phase of this parity has ended; the phase before the first one has parity 1.
    __device__ void wait(uint32_t parity) {
        asm volatile("{\n"
                     ".reg .pred done;\n"
                     "again:\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                     "@!done bra again;\n"
                     "}" ::"r"(shared_address(this)),
                     "r"(parity)
                     : "memory");
    }
};

// One lane of the warp, of which the compiler knows that it is one: what it computes stays in uniform registers, where
// bulk copies want it.
__device__ inline bool elected() {
    uint32_t leads;
    asm volatile("{\n"
                 ".reg .pred leads;\n"
                 "elect.sync _|leads, 0xffffffff;\n"
                 "selp.u32 %0, 1, 0, leads;\n"
                 "}"
                 : "=r"(leads));
    return leads;
}

// From global into shared memory; addresses and size are multiples of 16.
__device__ inline void copy_bulk(void* to, const void* from, uint32_t bytes, Barrier& done) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(&done))
                 : "memory");
}

// 16 bytes from global into shared memory, for the thread that asks (sm_80 and later).
__device__ inline void copy16(void* to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

// Until all that the thread has asked for is there.
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// A tensor map of the driver.
struct alignas(64) Map {
    uint8_t bytes[128];
};

// A box of a matrix, whose map lies among the kernel's parameters.
__device__ inline void copy_box(void* to, const Map* map, int column, int row, Barrier& done) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
                 "[%4];" ::"r"(shared_address(to)),
                 "l"(map), "r"(column), "r"(row), "r"(shared_address(&done))
                 : "memory");
}

// From shared into global memory, cut where the matrix ends.
__device__ inline void store_box(const Map* map, int column, int row, const void* from) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];\n"
                 "cp.async.bulk.commit_group;" ::"l"(map),
                 "r"(column), "r"(row), "r"(shared_address(from))
                 : "memory");
}

// Bulk copies that are started after this see, and overwrite, what the thread stored in shared memory before it.
__device__ inline void order_before_bulk_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Until all but the last PENDING boxes that the thread stores have been read.
template <int PENDING>
__device__ void wait_for_stores() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

// From global memory into L2; address and size are multiples of 16.
__device__ inline void prefetch_bulk(const void* from, uint32_t bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}
