// Bound by bytes: 4 B a 16-bit element of q and k; 8192 tokens of 32 + 8 heads of 128 take 39 us at 4.3 TB/s.
#include "memory.cuh"
#include "overlap.cuh"

constexpr int THREADS = 256;
constexpr int WIDTH = 8; // pairs that a thread rotates: one 16-byte access a half in 16 bits

// Laid out as the launcher's `DeviceHeads`; strides in elements, a head's own elements are neighbours.
struct Heads {
    const void* x; // [batch, tokens, heads, 2 * half]
    void* out;     // the same, contiguous
    int64_t batch_stride, token_stride, head_stride;
    int64_t heads;
};

struct Angles {
    const void* cos; // [batch or 1, tokens, 2 * half], both halves alike
    const void* sin; // the same, the first half negated
    int64_t batch_stride;
};

// Every product and every sum is rounded, as torch rounds them.
template <typename T>
__device__ void rotate(float& first, float& second, float cos, float sin) {
    const float x = first, y = second;
    first = __fsub_rn(rounded<T>(__fmul_rn(x, cos)), rounded<T>(__fmul_rn(y, sin)));
    second = __fadd_rn(rounded<T>(__fmul_rn(y, cos)), rounded<T>(__fmul_rn(x, sin)));
}

template <typename T>
__device__ void rope(Heads q, Heads k, Angles angles, int64_t tokens, int64_t rows, int64_t half, bool inverse,
                     bool vector) {
    const int64_t units = (half + WIDTH - 1) / WIDTH, heads = q.heads + k.heads; // units of a head, heads of a token
    const int64_t unit = int64_t(blockIdx.x) * THREADS + threadIdx.x;
    const int64_t row = unit / (units * heads);
    if (row >= rows)
        return;
    const int64_t batch = row / tokens, token = row % tokens;
    const int within = unit % (units * heads);
    const int head = within / int(units);
    const int64_t i = within % int(units) * WIDTH;
    const bool of_q = head < q.heads;
    const Heads& h = of_q ? q : k;
    const int64_t own = of_q ? head : head - q.heads;

    const T* x = static_cast<const T*>(h.x) + batch * h.batch_stride + token * h.token_stride + own * h.head_stride;
    T* out = static_cast<T*>(h.out) + (row * h.heads + own) * 2 * half;
    const int64_t angle = batch * angles.batch_stride + token * 2 * half + half;
    float a[WIDTH], b[WIDTH], cos[WIDTH], sin[WIDTH];
    let_next_kernel_start();
    wait_for_previous_kernel();
    load8_or_zero(x, i, half, vector, a);
    load8_or_zero(x + half, i, half, vector, b);
    load8_or_zero(static_cast<const T*>(angles.cos) + angle, i, half, vector, cos);
    load8_or_zero(static_cast<const T*>(angles.sin) + angle, i, half, vector, sin);
#pragma unroll
    for (int j = 0; j < WIDTH; ++j)
        rotate<T>(a[j], b[j], cos[j], inverse ? -sin[j] : sin[j]);
    store8_inside(out, i, half, vector, a);
    store8_inside(out + half, i, half, vector, b);
}

#define ROPE(T, dtype)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS) rope_##dtype(                                                \
        Heads q, Heads k, Angles angles, int64_t tokens, int64_t rows, int64_t half, bool inverse, bool vector) {      \
        rope<T>(q, k, angles, tokens, rows, half, inverse, vector);                                                    \
    }

ROPE(float, f32)
ROPE(f16, f16)
ROPE(bf16, bf16)
