// Bound by bytes, of device memory or of the bus: a page is updated where it lies. 28 B an fp32 parameter with fp32
// moments, 16 B with 8-bit ones.
#include "codes.cuh"
#include "memory.cuh"

constexpr int THREADS = 256;
constexpr int CTAS = 3; // of a multiprocessor
constexpr int WARPS = THREADS / 32;
constexpr int BLOCK = 256;
constexpr int BLOCKS_PER_PAGE = 512;
constexpr int SLICE = 32; // blocks that a CTA takes at a time, all of one page
constexpr int SLICES = BLOCKS_PER_PAGE / SLICE;
constexpr int PAGE_ELEMENTS = BLOCKS_PER_PAGE * BLOCK;
constexpr int HALF = BLOCK / 2; // a lane holds four neighbours of each half of a block

// Core's `Rule`; computed in fp64 on the host, rounded once.
struct Rule {
    float decay;     // 1 - lr * weight_decay
    float step_size; // lr / (1 - beta1^t), for 8-bit moments times sqrt(1 - beta2^t)
    float beta1, one_minus_beta1;
    float beta2, one_minus_beta2;
    float eps;                   // for 8-bit moments times sqrt(1 - beta2^t)
    float bias_correction2_sqrt; // sqrt(1 - beta2^t)
};

// The launcher's `DeviceTarget`.
struct Target {
    void* param;      // [numel]
    const void* grad; // [numel], null: nothing changes
    int64_t numel;
    int32_t dtype;  // 0 f32, 1 f16, 2 bf16
    int32_t vector; // whether both may be read four elements at a time
    Rule rule;
};

// The launcher's `DeviceUpdate`.
struct Update {
    uint8_t* const* pages;     // address of every page, of device memory or of mapped host memory
    const uint32_t* starts;    // [params + 1], first block of each parameter
    const Target* targets;     // [params]
    const uint32_t* on_device; // [device_pages]
    const uint32_t* on_host;   // [host_pages]
    int32_t device_pages, host_pages;
    int32_t host_ctas; // the first CTAs of the grid, which take the pages on the host
    int32_t params;
    const float* grad_scale; // [1], null means 1
};

// Four elements from `first` on; zeros past the end.
template <typename T>
__device__ void load4(const T* x, int64_t first, int64_t n, bool vector, float (&v)[4]) {
    if (vector && first + 4 <= n) {
        if constexpr (sizeof(T) == 4) {
            const float4 four = __ldcs(reinterpret_cast<const float4*>(x + first));
            v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
        } else {
            const uint2 four = __ldcs(reinterpret_cast<const uint2*>(x + first));
            v[0] = widen(T{uint16_t(four.x)}), v[1] = widen(T{uint16_t(four.x >> 16)});
            v[2] = widen(T{uint16_t(four.y)}), v[3] = widen(T{uint16_t(four.y >> 16)});
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
        v[i] = first + i < n ? widen(x[first + i]) : 0.0f;
}

template <typename T>
__device__ void store4(T* x, int64_t first, int64_t n, bool vector, const float (&v)[4]) {
    if (vector && first + 4 <= n) {
        if constexpr (sizeof(T) == 4)
            __stcs(reinterpret_cast<float4*>(x + first), make_float4(v[0], v[1], v[2], v[3]));
        else
            __stcs(reinterpret_cast<uint2*>(x + first), make_uint2(narrow2<T>(v[0], v[1]), narrow2<T>(v[2], v[3])));
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (first + i < n)
            x[first + i] = narrow<T>(v[i]);
}

__device__ inline void load4(const float* x, float (&v)[4]) { load4(x, 0, 4, true, v); }
__device__ inline void store4(float* x, const float (&v)[4]) { store4(x, 0, 4, true, v); }

// fp32 moments: m [131072] | v [131072].
struct Fp32 {
    struct Shared {};
    struct Slice {
        __device__ Slice(Shared&, uint8_t*, int) {}
        __device__ void write() {}
    };

    __device__ static void fill(Shared&) {}

    // One warp a block; `block` counts in the page, `first` is its first element of the parameter.
    template <typename T>
    __device__ static void step(Shared&, uint8_t* page, int block, const Target& t, int64_t first, float grad_scale) {
        float* const moment1 = reinterpret_cast<float*>(page) + block * BLOCK + 4 * lane_id();
        float* const moment2 = moment1 + PAGE_ELEMENTS;
        T* const param = static_cast<T*>(t.param);
        float m[2][4], v[2][4], g[2][4], p[2][4];
        first += 4 * lane_id();
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            load4(moment1 + h * HALF, m[h]);
            load4(moment2 + h * HALF, v[h]);
            load4(static_cast<const T*>(t.grad), first + h * HALF, t.numel, t.vector, g[h]);
            load4(param, first + h * HALF, t.numel, t.vector, p[h]);
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                update(t.rule, p[h][i], g[h][i] * grad_scale, m[h][i], v[h][i]);
            store4(moment1 + h * HALF, m[h]);
            store4(moment2 + h * HALF, v[h]);
            store4(param, first + h * HALF, t.numel, t.vector, p[h]);
        }
    }

    __device__ static void update(const Rule& r, float& p, float g, float& m, float& v) {
        m = m + r.one_minus_beta1 * (g - m);
        v = v * r.beta2 + r.one_minus_beta2 * g * g;
        const float denominator = __fsqrt_rn(v) / r.bias_correction2_sqrt + r.eps;
        p = p * r.decay - r.step_size * m / denominator;
    }
};

// 8-bit moments: m [131072] | v [131072] | absmax_m [512] | absmax_v [512].
struct Block8 {
    struct Shared {
        float first[256], second[256];                       // the maps
        float first_thresholds[256], second_thresholds[256]; // of their codes, padded with infinity
        uint8_t ranks[3][BUCKETS];                           // of the thresholds, by the leading bits of a value
        float absmax[2][SLICE];                              // of the slice in work
    };

    __device__ static void fill(Shared& shared) {
        const int i = threadIdx.x;
        shared.first[i] = DYNAMIC_MAP[1][i];
        shared.second[i] = DYNAMIC_MAP[0][i];
        shared.first_thresholds[i] = i < 255 ? NEAREST_THRESHOLDS[1][i] : __int_as_float(0x7f800000);
        shared.second_thresholds[i] = i < 255 ? NEAREST_THRESHOLDS[0][i] : __int_as_float(0x7f800000);
        for (int row = 0; row < 3; ++row)
            for (int j = i; j < BUCKETS; j += THREADS)
                shared.ranks[row][j] = NEAREST_RANKS[row][j];
    }

    // The slice's scales, read and written in one piece: single floats would waste the bus.
    struct Slice {
        Shared& shared;
        float* scale;

        __device__ Slice(Shared& shared, uint8_t* page, int slice) : shared(shared) {
            float* const scales = reinterpret_cast<float*>(page + 2 * PAGE_ELEMENTS);
            const int moment = threadIdx.x / SLICE, i = threadIdx.x % SLICE;
            scale = scales + moment * BLOCKS_PER_PAGE + slice * SLICE + i;
            if (moment < 2)
                shared.absmax[moment][i] = *scale;
            __syncthreads();
        }

        __device__ void write() {
            __syncthreads();
            const int moment = threadIdx.x / SLICE, i = threadIdx.x % SLICE;
            if (moment < 2)
                *scale = shared.absmax[moment][i];
            __syncthreads();
        }
    };

    template <typename T>
    __device__ static void step(Shared& shared, uint8_t* page, int block, const Target& t, int64_t first,
                                float grad_scale) {
        uint32_t* const codes1 = reinterpret_cast<uint32_t*>(page + block * BLOCK) + lane_id();
        uint32_t* const codes2 = codes1 + PAGE_ELEMENTS / 4;
        T* const param = static_cast<T*>(t.param);
        float& absmax1 = shared.absmax[0][block % SLICE];
        float& absmax2 = shared.absmax[1][block % SLICE];
        const float old1 = absmax1, old2 = absmax2;
        float m[2][4], v[2][4], g[2][4], p[2][4];
        uint32_t packed1[2], packed2[2], bits1 = 0, bits2 = 0;
        first += 4 * lane_id();
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            packed1[h] = __ldcs(codes1 + h * (HALF / 4));
            packed2[h] = __ldcs(codes2 + h * (HALF / 4));
            load4(static_cast<const T*>(t.grad), first + h * HALF, t.numel, t.vector, g[h]);
            load4(param, first + h * HALF, t.numel, t.vector, p[h]);
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                m[h][i] = shared.first[packed1[h] >> 8 * i & 255] * old1;
                v[h][i] = shared.second[packed2[h] >> 8 * i & 255] * old2;
                update(t.rule, p[h][i], g[h][i] * grad_scale, m[h][i], v[h][i]);
                if (first + h * HALF + i >= t.numel)
                    m[h][i] = v[h][i] = 0.0f;
                bits1 = max(bits1, magnitude(m[h][i]));
                bits2 = max(bits2, magnitude(v[h][i]));
            }
            store4(param, first + h * HALF, t.numel, t.vector, p[h]);
        }
        const float new1 = __uint_as_float(lanes_max(bits1, 32));
        const float new2 = __uint_as_float(lanes_max(bits2, 32));
        const float reciprocal1 = 1.0f / divisor(new1), reciprocal2 = 1.0f / divisor(new2);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            uint32_t four1 = 0, four2 = 0;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                four1 |= encode_first(shared, m[h][i] * reciprocal1) << 8 * i;
                four2 |= rank(shared.ranks[0], shared.second_thresholds, v[h][i] * reciprocal2) << 8 * i;
            }
            __stcs(codes1 + h * (HALF / 4), four1);
            __stcs(codes2 + h * (HALF / 4), four2);
        }
        if (lane_id() == 0)
            absmax1 = new1, absmax2 = new2;
    }

    // Number of thresholds below x, 0 for NaN: at most two lie inside one bucket.
    __device__ static uint32_t rank(const uint8_t (&ranks)[BUCKETS], const float* thresholds, float x) {
        const uint32_t bits = min(max(magnitude(x), MAGNITUDE_MIN), 0x3f800000u);
        uint32_t rank = ranks[(bits - MAGNITUDE_MIN) >> BUCKET_SHIFT];
        rank += x > thresholds[rank] ? 1 : 0;
        rank += x > thresholds[rank] ? 1 : 0;
        return x == x ? rank : 0;
    }

    // A negative moment never takes code 127, which is zero: codes keep the sign.
    __device__ static uint32_t encode_first(const Shared& shared, float scaled) {
        const uint32_t code = rank(shared.ranks[scaled < 0.0f ? 2 : 1], shared.first_thresholds, scaled);
        return code == 127 && scaled < 0.0f ? 126 : code;
    }

    // A NaN or Inf gradient clears the moments and leaves the parameter alone.
    __device__ static void update(const Rule& r, float& p, float g, float& m, float& v) {
        if (magnitude(g) >= 0x7f800000u) {
            m = v = 0.0f;
            return;
        }
        m = r.beta1 * m + r.one_minus_beta1 * g;
        v = r.beta2 * v + r.one_minus_beta2 * g * g;
        p = p * r.decay - r.step_size * (m / (__fsqrt_rn(v) + r.eps));
    }
};

// The last parameter that starts at or before `block`, past empty ones.
__device__ inline int param_of(const uint32_t* starts, int params, uint32_t block) {
    int low = 0, high = params - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (starts[middle] <= block)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

template <typename State>
__device__ void step_slice(const Update& u, typename State::Shared& shared, uint32_t page, int slice,
                           float grad_scale) {
    uint8_t* const address = u.pages[page];
    typename State::Slice scales(shared, address, slice);
    const uint32_t end = u.starts[u.params];
    uint32_t block = page * BLOCKS_PER_PAGE + slice * SLICE + threadIdx.x / 32;
    int param = param_of(u.starts, u.params, block);
    for (int i = 0; i < SLICE / WARPS && block < end; ++i, block += WARPS) {
        while (u.starts[param + 1] <= block)
            ++param;
        const Target target = u.targets[param];
        if (target.grad == nullptr)
            continue;
        const int64_t first = int64_t(block - u.starts[param]) * BLOCK;
        const int in_page = block % BLOCKS_PER_PAGE;
        if (target.dtype == 0)
            State::template step<float>(shared, address, in_page, target, first, grad_scale);
        else if (target.dtype == 1)
            State::template step<f16>(shared, address, in_page, target, first, grad_scale);
        else
            State::template step<bf16>(shared, address, in_page, target, first, grad_scale);
    }
    scales.write();
}

// Few CTAs saturate the bus, so that pages on the host do not keep the others waiting, nor the next forward pass.
template <typename State>
__device__ void adamw(const Update& u) {
    __shared__ typename State::Shared shared;
    State::fill(shared);
    __syncthreads();
    const float grad_scale = u.grad_scale == nullptr ? 1.0f : *u.grad_scale;
    const bool host = blockIdx.x < u.host_ctas;
    const int ctas = host ? u.host_ctas : gridDim.x - u.host_ctas;
    const uint32_t* const work = host ? u.on_host : u.on_device;
    const int slices = (host ? u.host_pages : u.device_pages) * SLICES;
    for (int i = host ? blockIdx.x : blockIdx.x - u.host_ctas; i < slices; i += ctas)
        step_slice<State>(u, shared, work[i / SLICES], i % SLICES, grad_scale);
}

extern "C" __global__ void __launch_bounds__(THREADS, CTAS) adamw_fp32(Update update) { adamw<Fp32>(update); }
extern "C" __global__ void __launch_bounds__(THREADS, CTAS) adamw_8bit(Update update) { adamw<Block8>(update); }
