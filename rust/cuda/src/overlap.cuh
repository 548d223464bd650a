// Programmatic dependent launch: a kernel whose launch says that it overlaps may start before the one in front of it
// has ended.
#pragma once
#include <stdint.h>

// By kernels that write nothing but activations. What makes weights (codes and scales) stays silent, so that whoever
// has started early may read weights at once, and everything else after the wait. Decode attention reads older tokens
// of the cache at once too: between two of its launches on one cache lies one that does not overlap, such as an
// embedding's.
__device__ inline void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ inline void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Of three launches in a row the third may need what the first has written before the second has ended. The second,
// whose CTAs are there before any of the third, says once it has waited that the first has ended.

// By one thread that has waited; `word` is zero. Without a fence, which would take a quarter of a microsecond: there is
// nothing of this kernel to be seen, and what the first has written the device sees already.
__device__ inline void announce_end(uint32_t* word) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], 1;" ::"l"(word) : "memory");
}

// By one thread of each of the CTAs that wait. They count on from the announcement, the last one back to zero; nobody
// waits for the count.
__device__ inline void wait_for_announced_end(uint32_t* word, uint32_t ctas) {
    uint32_t seen;
    do
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(word) : "memory");
    while (seen == 0);
    asm volatile("red.relaxed.gpu.global.inc.u32 [%0], %1;" ::"l"(word), "r"(ctas) : "memory");
}
