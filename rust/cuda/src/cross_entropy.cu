// Bound by bytes: a 16-bit logit is read from memory once, again from L2, and written once: 4 B. 1024 rows of 128256
// take 122 us at 4.3 TB/s.
#include "memory.cuh"
#include "overlap.cuh"

// One CTA fills an SM, so that the rows of all of them stay in L2 until they are read again.
constexpr int THREADS = 1024;
constexpr int STEP = 8 * THREADS;
constexpr int AHEAD = 4; // accesses of a thread in flight
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LOWEST = -3.4028235e38f; // below every logit, and its difference from one is a number

// exp(x) of the special function unit, within two steps of fp32.
__device__ inline float power(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * LOG2_E));
    return result;
}

// sum of exp(x - largest) over some of the row.
struct Partial {
    float largest, sum;

    __device__ void rescale(float larger) {
        sum *= power(largest - larger);
        largest = larger;
    }
};

// Of the whole CTA, in every thread.
__device__ float cta_max(float value) {
    __shared__ float of_warp[32];
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
        value = fmaxf(value, __shfl_xor_sync(FULL_WARP, value, step));
    if (lane_id() == 0)
        of_warp[threadIdx.x / 32] = value;
    __syncthreads();
    value = of_warp[lane_id()];
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
        value = fmaxf(value, __shfl_xor_sync(FULL_WARP, value, step));
    return value;
}

// Eights of a row that are in flight together.
template <typename T>
struct Eights {
    Raw8<T> raw[AHEAD];

    __device__ void load(const T* x, int first, int vocab, bool vector) {
#pragma unroll
        for (int j = 0; j < AHEAD; ++j)
            raw[j] = load_raw8(x, first + j * STEP, vocab, vector);
    }
};

template <typename T>
__device__ float logsumexp(const T* x, int vocab, bool vector) {
    Partial partial = {LOWEST, 0.0f};
    for (int first = threadIdx.x * 8; first < vocab; first += AHEAD * STEP) {
        Eights<T> eights;
        eights.load(x, first, vocab, vector);
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) {
            const int here = first + j * STEP;
            float v[8], larger = partial.largest;
            eights.raw[j].unpack(v);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                v[i] = here + i < vocab ? v[i] : LOWEST;
                larger = fmaxf(larger, v[i]);
            }
            partial.rescale(larger);
#pragma unroll
            for (int i = 0; i < 8; ++i)
                partial.sum += here + i < vocab ? power(v[i] - larger) : 0.0f;
        }
    }
    partial.rescale(cta_max(partial.largest));
    float sum[1] = {partial.sum};
    threads_sum(sum, THREADS);
    return partial.largest + logf(sum[0]);
}

template <typename T>
__device__ void store_gradient(T* x, int vocab, int label, float logsumexp, float scale, bool vector) {
    for (int first = threadIdx.x * 8; first < vocab; first += AHEAD * STEP) {
        Eights<T> eights;
        eights.load(x, first, vocab, vector);
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) {
            const int here = first + j * STEP;
            float v[8];
            eights.raw[j].unpack(v);
#pragma unroll
            for (int i = 0; i < 8; ++i)
                v[i] = (power(v[i] - logsumexp) - (here + i == label ? 1.0f : 0.0f)) * scale;
            store8_inside(x, here, vocab, vector, v);
        }
    }
}

template <typename T>
__device__ void cross_entropy(T* logits,            // [rows, stride]
                              const int* labels,    // [rows]
                              float* losses,        // [rows]
                              float* logsumexps,    // [rows]
                              int64_t stride,       //
                              const float* divisor, // [1], null where no gradient is asked for
                              int vocab, bool vector) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    T* x = logits + blockIdx.x * stride;
    const int label = labels[blockIdx.x];
    if (label < 0 || label >= vocab) {
        const float zeros[8] = {};
        for (int first = threadIdx.x * 8; divisor != nullptr && first < vocab; first += STEP)
            store8_inside(x, first, vocab, vector, zeros);
        if (threadIdx.x == 0)
            losses[blockIdx.x] = 0.0f;
        return;
    }
    const float picked = widen(x[label]); // before any thread may replace it
    const float total = logsumexp(x, vocab, vector);
    if (threadIdx.x == 0)
        losses[blockIdx.x] = total - picked, logsumexps[blockIdx.x] = total;
    if (divisor != nullptr)
        store_gradient(x, vocab, label, total, __fdiv_rn(1.0f, *divisor), vector);
}

// A row's columns of the vocabulary from `first` on, eight a thread.
constexpr int FEW = 256;

template <typename T>
__device__ void cross_entropy_backward(T* logits,               // [rows, stride]
                                       const int* labels,       // [rows]
                                       const float* logsumexps, // [rows]
                                       int64_t stride,          //
                                       const float* divisor,    // [1]
                                       int first, int width, bool vector) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    T* x = logits + blockIdx.x * stride;
    const int here = (blockIdx.y * FEW + threadIdx.x) * 8, label = labels[blockIdx.x];
    if (here >= width)
        return;
    const float logsumexp = logsumexps[blockIdx.x], scale = __fdiv_rn(1.0f, *divisor);
    float v[8];
    load_raw8(x, here, width, vector).unpack(v);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        v[i] = (power(v[i] - logsumexp) - (first + here + i == label ? 1.0f : 0.0f)) * scale;
        v[i] = label < 0 ? 0.0f : v[i];
    }
    store8_inside(x, here, width, vector, v);
}

#define CROSS_ENTROPY(T, dtype)                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                           \
        cross_entropy_##dtype(T* logits, const int* labels, float* losses, float* logsumexps, int64_t stride,          \
                              const float* divisor, int vocab, bool vector) {                                          \
        cross_entropy(logits, labels, losses, logsumexps, stride, divisor, vocab, vector);                             \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(FEW)                                                                  \
        cross_entropy_backward_##dtype(T* logits, const int* labels, const float* logsumexps, int64_t stride,          \
                                       const float* divisor, int first, int width, bool vector) {                      \
        cross_entropy_backward(logits, labels, logsumexps, stride, divisor, first, width, vector);                     \
    }

CROSS_ENTROPY(float, f32)
CROSS_ENTROPY(f16, f16)
CROSS_ENTROPY(bf16, bf16)
