// Bound by bytes: 4 B a 16-bit element of q and k; 8192 tokens of 32 + 8 heads of 128 take 39 us at 4.3 TB/s.
#include "memory.cuh"
#include "overlap.cuh"

constexpr int THREADS = 256;
constexpr int WIDTH = 8; // pairs that a thread rotates at once: one 16-byte access a half in 16 bits

// Laid out as the launcher's `DeviceHeads`; strides in elements, a head's own elements are neighbours.
struct Heads {
    const void* x; // [batch, tokens, heads, 2 * half]
    void* out;     // the same, contiguous
    int64_t batch_stride, token_stride, head_stride;
    int heads;
};

struct Angles {
    const void* cos; // [batch or 1, tokens, 2 * half], both halves alike
    const void* sin; // the same, the first half negated
    int64_t batch_stride;
};

// Eight pairs and their angles. Every product and every sum is rounded, as torch rounds them.
template <typename T>
__device__ void rotate(Raw8<T>& first, Raw8<T>& second, const Raw8<T>& cos, const Raw8<T>& sin, bool inverse) {
    const uint32_t negative = 0x80008000u, turn = inverse ? 0 : negative;
    const auto pair = [&](uint32_t& x, uint32_t& y, uint32_t c, uint32_t s) {
        const uint32_t a = x, b = y;
        x = add2<T>(multiply2<T>(a, c), multiply2<T>(b, s ^ turn));
        y = add2<T>(multiply2<T>(b, c), multiply2<T>(a, s ^ turn ^ negative));
    };
    pair(first.words.x, second.words.x, cos.words.x, sin.words.x);
    pair(first.words.y, second.words.y, cos.words.y, sin.words.y);
    pair(first.words.z, second.words.z, cos.words.z, sin.words.z);
    pair(first.words.w, second.words.w, cos.words.w, sin.words.w);
}

__device__ inline void rotate(Raw8<float>& first, Raw8<float>& second, const Raw8<float>& cos, const Raw8<float>& sin,
                              bool inverse) {
    float x[8], y[8], c[8], s[8];
    first.unpack(x), second.unpack(y), cos.unpack(c), sin.unpack(s);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const float a = x[i], b = y[i], sine = inverse ? -s[i] : s[i];
        x[i] = __fsub_rn(__fmul_rn(a, c[i]), __fmul_rn(b, sine));
        y[i] = __fadd_rn(__fmul_rn(b, c[i]), __fmul_rn(a, sine));
    }
    first.pack(x), second.pack(y);
}

// Where one head's eight pairs lie.
template <typename T>
struct Place {
    const T *x, *cos, *sin;
    T* out;

    __device__ Place(const Heads& q, const Heads& k, const Angles& angles, int row, int tokens, int half) {
        const int heads = q.heads + k.heads;
        const int all_tokens = row / heads, head = row % heads;
        const int batch = all_tokens / tokens, token = all_tokens % tokens;
        const bool of_q = head < q.heads;
        const Heads& h = of_q ? q : k;
        const int own = of_q ? head : head - q.heads;
        x = static_cast<const T*>(h.x) + batch * h.batch_stride + token * h.token_stride + own * h.head_stride;
        out = static_cast<T*>(h.out) + (int64_t(all_tokens) * h.heads + own) * 2 * half;
        const int64_t angle = batch * angles.batch_stride + int64_t(token) * 2 * half + half;
        cos = static_cast<const T*>(angles.cos) + angle;
        sin = static_cast<const T*>(angles.sin) + angle;
    }
};

// `lanes` threads share a head, a power of two.
template <typename T>
__device__ void rope(const Heads& q, const Heads& k, const Angles& angles, int tokens, int rows, int half, int lanes,
                     bool inverse, bool vector) {
    const int row = blockIdx.x * (THREADS / lanes) + threadIdx.x / lanes;
    if (row >= rows)
        return;
    const Place<T> at(q, k, angles, row, tokens, half);
    let_next_kernel_start();
    wait_for_previous_kernel();
    for (int i = threadIdx.x % lanes * WIDTH; i < half; i += lanes * WIDTH) {
        Raw8<T> first = load_raw8(at.x, i, half, vector), second = load_raw8(at.x + half, i, half, vector);
        const Raw8<T> cos = load_raw8(at.cos, i, half, vector), sin = load_raw8(at.sin, i, half, vector);
        rotate(first, second, cos, sin, inverse);
        store_raw8(at.out, i, half, vector, first);
        store_raw8(at.out + half, i, half, vector, second);
    }
}

#define ROPE(T, dtype)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS) rope_##dtype(                                                \
        Heads q, Heads k, Angles angles, int tokens, int rows, int half, int lanes, bool inverse, bool vector) {       \
        rope<T>(q, k, angles, tokens, rows, half, lanes, inverse, vector);                                             \
    }

ROPE(float, f32)
ROPE(f16, f16)
ROPE(bf16, bf16)
