// The gate of SwiGLU.
#pragma once
#include "scalars.cuh"

// 1 / (1 + exp(-x)). In 16 bits by the approximations of the special function unit, whose errors of a few fp32 steps no
// rounding to 16 bits shows; with exact functions the kernel would be bound by instructions.
template <typename T>
__device__ float sigmoid(float x) {
    if constexpr (sizeof(T) == 4)
        return __fdiv_rn(1.0f, 1.0f + expf(-x));
    float power, reciprocal;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * -1.44269504f));
    asm("rcp.approx.f32 %0, %1;" : "=f"(reciprocal) : "f"(1.0f + power));
    return reciprocal;
}

// x * sigmoid(x), rounded to T as torch rounds it.
template <typename T>
__device__ float silu(float x) {
    return rounded<T>(x * sigmoid<T>(x));
}
