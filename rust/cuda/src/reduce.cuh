// Reductions over warps and thread groups; every order is fixed, nothing is atomic.
#pragma once
#include <stdint.h>

constexpr uint32_t FULL_WARP = 0xffffffffu;

__device__ inline int lane_id() { return threadIdx.x % 32; }

// Bits of |value|. Unsigned order is that of magnitudes, with Inf and then NaN on top,
// so that the largest magnitude of a block reports what must not be quantized.
__device__ inline uint32_t magnitude(float value) { return __float_as_uint(value) & 0x7fffffffu; }

// Sum over the warp in butterfly order, in every lane.
__device__ inline float warp_sum(float value) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
        value += __shfl_xor_sync(FULL_WARP, value, step);
    return value;
}

// Sums of eight values each over the warp, with warp_sum's bits: that of value i is in the four lanes from 4 i on. Two
// lanes a step apart share what is left: each adds up one half for both.
__device__ inline float warp_sums(float (&values)[8]) {
    int step = 16;
#pragma unroll
    for (int half = 4; half > 0; half /= 2, step /= 2) {
        const bool upper = lane_id() & step;
#pragma unroll
        for (int i = 0; i < half; ++i) {
            const float given = upper ? values[i] : values[i + half];
            values[i] = (upper ? values[i + half] : values[i]) + __shfl_xor_sync(FULL_WARP, given, step);
        }
    }
    float value = values[0];
    value += __shfl_xor_sync(FULL_WARP, value, 2);
    value += __shfl_xor_sync(FULL_WARP, value, 1);
    return value;
}

// Largest value among `group` neighbouring lanes (a power of two <= 32), in every lane.
__device__ inline uint32_t lanes_max(uint32_t value, int group) {
#if __CUDA_ARCH__ >= 800
    if (group == 32)
        return __reduce_max_sync(FULL_WARP, value);
#endif
    for (int step = group / 2; step > 0; step /= 2)
        value = max(value, __shfl_xor_sync(FULL_WARP, value, step));
    return value;
}

// The same for groups of a power of two of threads, up to the whole CTA.
__device__ inline uint32_t threads_max(uint32_t value, int group) {
    value = lanes_max(value, min(group, 32));
    if (group <= 32)
        return value;
    __shared__ uint32_t of_warp[32];
    const int warp = threadIdx.x / 32, warps = group / 32;
    __syncthreads(); // an earlier call's values have been read
    if (lane_id() == 0)
        of_warp[warp] = value;
    __syncthreads();
    const int first = warp / warps * warps;
    for (int i = 0; i < warps; ++i)
        value = max(value, of_warp[first + i]);
    return value;
}

// Sums over `group` neighbouring threads, in all of them: a power of two <= 32, or the whole CTA of full warps. Once in
// a kernel: no barrier keeps a second call from what the first one still reads.
template <int COUNT>
__device__ void threads_sum(float (&values)[COUNT], int group) {
    for (int step = min(group, 32) / 2; step > 0; step /= 2)
#pragma unroll
        for (int i = 0; i < COUNT; ++i)
            values[i] += __shfl_xor_sync(FULL_WARP, values[i], step);
    if (group <= 32)
        return;
    __shared__ float of_warp[COUNT][32];
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
        if (lane_id() == 0)
            of_warp[i][threadIdx.x / 32] = values[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
        values[i] = warp_sum(lane_id() < group / 32 ? of_warp[i][lane_id()] : 0.0f);
}
