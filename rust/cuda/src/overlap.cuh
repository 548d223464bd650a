// Programmatic dependent launch: a kernel whose launch says that it overlaps may start before the one in front of it
// has ended.
#pragma once

// By kernels that write nothing but activations. What makes weights (codes and scales) stays silent, so that whoever
// has started early may read weights at once, and everything else after the wait. Decode attention reads older tokens of
// the cache at once too: between two of its launches on one cache lies one that does not overlap, such as an embedding's.
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
