// Bound by bytes, of device memory or of the bus: a page is updated where it lies. 28 B an fp32 parameter with fp32
// moments, 16 B with 8-bit ones.
#include "codes.cuh"
#include "entries.cuh"
#include "memory.cuh"

constexpr int THREADS = 256;
constexpr int CTAS = 3; // of a multiprocessor
constexpr int WARPS = THREADS / 32;
constexpr int BLOCK = 256;
constexpr int BLOCKS_PER_PAGE = 512;
constexpr int SLICE = 32;          // blocks that a CTA takes at a time, all of one page
constexpr int RUN = SLICE / WARPS; // of them a warp takes
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

using Eight = float[2][4]; // of a lane: four neighbours of each half of a block

__device__ inline void load4(const float* x, float (&v)[4]) {
    const float4 four = __ldcs(reinterpret_cast<const float4*>(x));
    v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
}

template <typename T>
__device__ void load4(const T* x, float (&v)[4]) {
    const uint2 four = __ldcs(reinterpret_cast<const uint2*>(x));
    v[0] = low<T>(four.x), v[1] = high<T>(four.x), v[2] = low<T>(four.y), v[3] = high<T>(four.y);
}

__device__ inline void store4(float* x, const float (&v)[4]) {
    __stcs(reinterpret_cast<float4*>(x), make_float4(v[0], v[1], v[2], v[3]));
}

template <typename T>
__device__ void store4(T* x, const float (&v)[4]) {
    __stcs(reinterpret_cast<uint2*>(x), make_uint2(narrow2<T>(v[0], v[1]), narrow2<T>(v[2], v[3])));
}

// A block of a parameter, as one lane of a warp has it.
template <typename T>
struct Weights {
    T* param;
    const T* grad;
    int count;  // of elements from the lane's first one to the end of the block
    bool whole; // all elements are there, and aligned
    const Rule& rule;

    __device__ Weights(const Target& t, int64_t first)
        : param(static_cast<T*>(t.param) + first + 4 * lane_id()),
          grad(static_cast<const T*>(t.grad) + first + 4 * lane_id()),
          count(int(min(t.numel - first, int64_t(BLOCK))) - 4 * lane_id()), whole(t.vector && first + BLOCK <= t.numel),
          rule(t.rule) {}

    // Zeros past the end.
    __device__ void load(Eight& p, Eight& g) const {
        if (whole) {
            load4(grad, g[0]), load4(param, p[0]);
            load4(grad + HALF, g[1]), load4(param + HALF, p[1]);
            return;
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int at = i / 4 * HALF + i % 4;
            g[i / 4][i % 4] = at < count ? widen(grad[at]) : 0.0f;
            p[i / 4][i % 4] = at < count ? widen(param[at]) : 0.0f;
        }
    }

    __device__ void store(const Eight& p) const {
        if (whole) {
            store4(param, p[0]), store4(param + HALF, p[1]);
            return;
        }
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if (const int at = i / 4 * HALF + i % 4; at < count)
                param[at] = narrow<T>(p[i / 4][i % 4]);
    }
};

constexpr uint32_t power2(int exponent) { return uint32_t(exponent + 127) << 23; }

// Between these magnitudes the compiler's own steps of an exact root and of a quotient by that root and eps meet
// nothing subnormal or infinite: without its branches for that, eight elements go side by side.
constexpr uint32_t LEAST_SQUARE = power2(-100), MOST_SQUARE = power2(60);
constexpr uint32_t LEAST_DIVIDEND = power2(-75), MOST_DIVIDEND = power2(75);
constexpr float MOST_EPS = 1e15f;

__device__ inline float plain_root(float x) {
    float r;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    const float root = __fmul_rn(x, r);
    return __fmaf_rn(__fmaf_rn(-root, root, x), __fmul_rn(0.5f, r), root);
}

__device__ inline float plain_quotient(float a, float b) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(b));
    r = __fmaf_rn(r, __fmaf_rn(-b, r, 1.0f), r);
    const float quotient = __fmul_rn(a, r);
    return __fmaf_rn(r, __fmaf_rn(-b, quotient, a), quotient);
}

__device__ inline uint32_t largest(const Eight& x) {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i)
        bits = max(bits, magnitude(x[i / 4][i % 4]));
    return bits;
}

__device__ inline uint32_t smallest(const Eight& x) {
    uint32_t bits = 0xffffffff;
#pragma unroll
    for (int i = 0; i < 8; ++i)
        bits = min(bits, magnitude(x[i / 4][i % 4]));
    return bits;
}

// fp32 moments: m [131072] | v [131072].
struct Fp32 {
    struct Shared {};
    struct Scales {
        __device__ Scales(uint8_t*, int) {}
        __device__ void write() {}
    };

    __device__ static void fill(Shared&) {}

    // One warp a block; `block` counts in the page.
    template <typename T>
    __device__ static void step(Shared&, Scales&, uint8_t* page, int block, const Weights<T>& w, float grad_scale) {
        float* const moment1 = reinterpret_cast<float*>(page) + block * BLOCK + 4 * lane_id();
        float* const moment2 = moment1 + PAGE_ELEMENTS;
        const Rule& r = w.rule;
        Eight m, v, g, p;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            load4(moment1 + h * HALF, m[h]);
            load4(moment2 + h * HALF, v[h]);
        }
        w.load(p, g);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                update(r, p[h][i], g[h][i] * grad_scale, m[h][i], v[h][i]);
            store4(moment1 + h * HALF, m[h]);
            store4(moment2 + h * HALF, v[h]);
        }
        w.store(p);
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
        alignas(16) uint32_t first_entries[SIGNED_ENTRIES];
        alignas(16) uint32_t second_entries[UNSIGNED_ENTRIES];
        float first[256], second[256]; // the maps
    };

    __device__ static void fill(Shared& shared) {
        copy_entries(shared.first_entries, FIRST_MOMENT_ENTRIES[0]);
        copy_entries(shared.second_entries, SECOND_MOMENT_ENTRIES[0]);
        shared.first[threadIdx.x] = DYNAMIC_MAP[1][threadIdx.x];
        shared.second[threadIdx.x] = DYNAMIC_MAP[0][threadIdx.x];
    }

    // Of the blocks of a warp, the first moment's and then the second's, one a lane: single floats would waste the bus.
    struct Scales {
        float* at;
        float value;

        __device__ Scales(uint8_t* page, int block)
            : at(reinterpret_cast<float*>(page + 2 * PAGE_ELEMENTS) + lane_id() / RUN * BLOCKS_PER_PAGE + block +
                 lane_id() % RUN) {
            if (lane_id() < 2 * RUN)
                value = *at;
        }

        __device__ void write() const {
            if (lane_id() < 2 * RUN)
                *at = value;
        }
    };

    template <typename T>
    __device__ static void step(const Shared& shared, Scales& scales, uint8_t* page, int block, const Weights<T>& w,
                                float grad_scale) {
        uint32_t* const codes1 = reinterpret_cast<uint32_t*>(page + block * BLOCK) + lane_id();
        uint32_t* const codes2 = codes1 + PAGE_ELEMENTS / 4;
        const Rule& r = w.rule;
        Eight m, v, g, p;
        uint32_t packed1[2], packed2[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            packed1[h] = __ldcs(codes1 + h * (HALF / 4));
            packed2[h] = __ldcs(codes2 + h * (HALF / 4));
        }
        w.load(p, g);
        const float old1 = __shfl_sync(FULL_WARP, scales.value, block % RUN);
        const float old2 = __shfl_sync(FULL_WARP, scales.value, block % RUN + RUN);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                g[h][i] *= grad_scale;
                m[h][i] = r.beta1 * (shared.first[packed1[h] >> 8 * i & 255] * old1) + r.one_minus_beta1 * g[h][i];
                v[h][i] =
                    r.beta2 * (shared.second[packed2[h] >> 8 * i & 255] * old2) + r.one_minus_beta2 * g[h][i] * g[h][i];
            }
        }
        uint32_t bits1 = largest(m), bits2 = largest(v);
        const bool plain = w.whole && smallest(m) >= LEAST_DIVIDEND && bits1 <= MOST_DIVIDEND &&
                           smallest(v) >= LEAST_SQUARE && bits2 <= MOST_SQUARE && r.eps <= MOST_EPS;
        if (plain) {
#pragma unroll
            for (int h = 0; h < 2; ++h)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    p[h][i] = p[h][i] * r.decay - r.step_size * plain_quotient(m[h][i], plain_root(v[h][i]) + r.eps);
        } else {
#pragma unroll
            for (int h = 0; h < 2; ++h)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    if (h * HALF + i >= w.count || magnitude(g[h][i]) >= 0x7f800000u)
                        m[h][i] = v[h][i] = 0.0f; // a NaN or Inf gradient leaves the parameter alone
                    else
                        p[h][i] = p[h][i] * r.decay - r.step_size * (m[h][i] / (__fsqrt_rn(v[h][i]) + r.eps));
            bits1 = largest(m), bits2 = largest(v);
        }
        w.store(p);
        const float new1 = __uint_as_float(lanes_max(bits1, 32)), new2 = __uint_as_float(lanes_max(bits2, 32));
        const float reciprocal1 = 1.0f / divisor(new1), reciprocal2 = 1.0f / divisor(new2);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            uint32_t four1[4], four2[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                // The lowest code for NaN, and no -0, which is not negative.
                four1[i] = signed_code(shared.first_entries, fmaxf(m[h][i] * reciprocal1, -1.0f) + 0.0f);
                four2[i] = unsigned_code(shared.second_entries, v[h][i] * reciprocal2);
            }
            __stcs(codes1 + h * (HALF / 4), top_bytes(four1));
            __stcs(codes2 + h * (HALF / 4), top_bytes(four2));
        }
        if (lane_id() % RUN == block % RUN)
            scales.value = lane_id() < RUN ? new1 : new2;
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
    const int run = slice * SLICE + threadIdx.x / 32 * RUN; // its first block
    typename State::Scales scales(address, run);
    const uint32_t end = u.starts[u.params];
    uint32_t block = page * BLOCKS_PER_PAGE + run;
    int param = param_of(u.starts, u.params, block);
    for (int i = run; i < run + RUN && block < end; ++i, ++block) {
        while (u.starts[param + 1] <= block)
            ++param;
        const Target& target = u.targets[param];
        if (target.grad == nullptr)
            continue;
        const int64_t first = int64_t(block - u.starts[param]) * BLOCK;
        if (target.dtype == 0)
            State::step(shared, scales, address, i, Weights<float>(target, first), grad_scale);
        else if (target.dtype == 1)
            State::step(shared, scales, address, i, Weights<f16>(target, first), grad_scale);
        else
            State::step(shared, scales, address, i, Weights<bf16>(target, first), grad_scale);
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
