// Bound by bytes: 28 B per fp32 parameter, 22 B per 16-bit one.
#include "memory.cuh"

constexpr int THREADS = 256;
constexpr int PER_THREAD = 4;

// Laid out as the launcher's `DeviceScalars`; computed in fp64 on the host, rounded once.
struct Scalars {
    float decay;     // 1 - lr * weight_decay
    float step_size; // lr / (1 - beta1^t)
    float one_minus_beta1;
    float beta2, one_minus_beta2;
    float bias_correction2_sqrt; // sqrt(1 - beta2^t)
    float eps;
};

template <typename T>
__device__ void update(T* param, T grad, float* exp_avg, float* exp_avg_sq, const Scalars& s, float grad_scale) {
    const float g = widen(grad) * grad_scale;
    const float m = *exp_avg + s.one_minus_beta1 * (g - *exp_avg);
    const float v = *exp_avg_sq * s.beta2 + s.one_minus_beta2 * g * g;
    const float denominator = __fsqrt_rn(v) / s.bias_correction2_sqrt + s.eps;
    *param = narrow<T>(widen(*param) * s.decay - s.step_size * m / denominator);
    *exp_avg = m;
    *exp_avg_sq = v;
}

template <typename T>
__device__ void adamw(T* param,                // [n]
                      const T* grad,           // [n]
                      float* exp_avg,          // [n]
                      float* exp_avg_sq,       // [n]
                      int64_t n,               //
                      const Scalars& scalars,  //
                      const float* grad_scale) // [1], null means 1
{
    const float scale = grad_scale == nullptr ? 1.0f : *grad_scale;
    const int64_t first = int64_t(blockIdx.x) * THREADS * PER_THREAD + threadIdx.x;
#pragma unroll
    for (int j = 0; j < PER_THREAD; ++j) {
        const int64_t i = first + j * THREADS;
        if (i < n)
            update(param + i, grad[i], exp_avg + i, exp_avg_sq + i, scalars, scale);
    }
}

#define ADAMW(T, dtype)                                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        adamw_##dtype(T* param, const T* grad, float* exp_avg, float* exp_avg_sq, int64_t n, Scalars scalars,          \
                      const float* grad_scale) {                                                                       \
        adamw(param, grad, exp_avg, exp_avg_sq, n, scalars, grad_scale);                                               \
    }

ADAMW(float, f32)
ADAMW(f16, f16)
ADAMW(bf16, bf16)
