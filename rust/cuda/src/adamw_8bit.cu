// Bound by bytes: 10 B per 16-bit parameter, 16 B per fp32 one; the two searches read shared memory 16 times each.
#include "codes.cuh"
#include "memory.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32; // blocks of state in work at once in a CTA
constexpr int BLOCKSIZE = 256;
constexpr int PER_LANE = BLOCKSIZE / 32;

// Laid out as the launcher's `DeviceScalars`; computed in fp64 on the host, rounded once.
struct Scalars {
    float decay;     // 1 - lr * weight_decay
    float step_size; // lr * sqrt(1 - beta2^t) / (1 - beta1^t)
    float beta1, one_minus_beta1;
    float beta2, one_minus_beta2;
    float eps; // eps * sqrt(1 - beta2^t)
};

// The maps and the thresholds of their codes.
struct Maps {
    float first[256], second[256];
    float first_thresholds[255], second_thresholds[255];

    __device__ void fill() {
        const int i = threadIdx.x;
        first[i] = DYNAMIC_MAP[1][i];
        second[i] = DYNAMIC_MAP[0][i];
        if (i == 255)
            return;
        first_thresholds[i] = NEAREST_THRESHOLDS[1][i];
        second_thresholds[i] = NEAREST_THRESHOLDS[0][i];
    }

    // A negative moment never takes code 127, which is zero: codes keep the sign.
    __device__ uint32_t encode_first(float scaled) const {
        const uint32_t code = rank256(first_thresholds, scaled);
        return code == 127 && scaled < 0.0f ? 126 : code;
    }

    __device__ uint32_t encode_second(float scaled) const { return rank256(second_thresholds, scaled); }
};

// Writes the new parameter and leaves the new moments in m and v; a NaN or Inf gradient clears
// them and leaves the parameter alone.
template <typename T>
__device__ void update(T* param, float g, float& m, float& v, const Scalars& s) {
    if (magnitude(g) >= 0x7f800000u) {
        m = v = 0.0f;
        return;
    }
    m = s.beta1 * m + s.one_minus_beta1 * g;
    v = s.beta2 * v + s.one_minus_beta2 * g * g;
    const float p = widen(*param) * s.decay;
    *param = narrow<T>(p - s.step_size * (m / (__fsqrt_rn(v) + s.eps)));
}

template <typename T>
struct Tensors {
    T* param;        // [n]
    const T* grad;   // [n]
    uint8_t* state1; // [n], signed map
    uint8_t* state2; // [n], unsigned map
    float* absmax1;  // [ceil(n / 256)]
    float* absmax2;  // [ceil(n / 256)]
    int64_t n;
};

// One warp a block; lane l holds elements l, l + 32, ...
template <typename T>
__device__ void step_block(const Tensors<T>& t, int64_t block, const Maps& maps, const Scalars& s, float grad_scale) {
    const int64_t first = block * BLOCKSIZE + lane_id();
    const float old1 = t.absmax1[block], old2 = t.absmax2[block];
    float m[PER_LANE] = {}, v[PER_LANE] = {};
    uint32_t bits1 = 0, bits2 = 0;
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j) {
        const int64_t i = first + 32 * j;
        if (i >= t.n)
            break;
        m[j] = maps.first[t.state1[i]] * old1;
        v[j] = maps.second[t.state2[i]] * old2;
        update(t.param + i, widen(t.grad[i]) * grad_scale, m[j], v[j], s);
        bits1 = max(bits1, magnitude(m[j]));
        bits2 = max(bits2, magnitude(v[j]));
    }
    const float new1 = __uint_as_float(lanes_max(bits1, 32));
    const float new2 = __uint_as_float(lanes_max(bits2, 32));
    const float reciprocal1 = 1.0f / divisor(new1), reciprocal2 = 1.0f / divisor(new2);
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j) {
        const int64_t i = first + 32 * j;
        if (i >= t.n)
            break;
        t.state1[i] = maps.encode_first(m[j] * reciprocal1);
        t.state2[i] = maps.encode_second(v[j] * reciprocal2);
    }
    if (lane_id() == 0)
        t.absmax1[block] = new1, t.absmax2[block] = new2;
}

template <typename T>
__device__ void adamw_8bit(const Tensors<T>& t, const Scalars& scalars,
                           const float* grad_scale) { // [1], null means 1
    __shared__ Maps maps;
    maps.fill();
    __syncthreads();
    const float scale = grad_scale == nullptr ? 1.0f : *grad_scale;
    const int64_t blocks = (t.n + BLOCKSIZE - 1) / BLOCKSIZE;
    int64_t block = int64_t(blockIdx.x) * WARPS + threadIdx.x / 32;
    for (; block < blocks; block += int64_t(gridDim.x) * WARPS)
        step_block(t, block, maps, scalars, scale);
}

#define ADAMW_8BIT(T, dtype)                                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        adamw_8bit_##dtype(Tensors<T> tensors, Scalars scalars, const float* grad_scale) {                             \
        adamw_8bit(tensors, scalars, grad_scale);                                                                      \
    }

ADAMW_8BIT(float, f32)
ADAMW_8BIT(f16, f16)
ADAMW_8BIT(bf16, bf16)
