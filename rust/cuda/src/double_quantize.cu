// Bound by bytes: 4 B read twice, 1 B written per block scale, 1/64 of the weights' own traffic.
#include "codes.cuh"
#include "entries.cuh"
#include "memory.cuh"
#include "overlap.cuh"

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / 32;
constexpr int64_t CHUNK = 65536;    // scales whose sum is one term of the offset
constexpr int LANES = 256;          // running sums of a chunk
constexpr int ROWS = CHUNK / LANES; // terms of a running sum
constexpr int SHARE = 16;           // running sums of a CTA
constexpr int CTAS = 2;             // a multiprocessor, where scales are encoded
constexpr int NESTED = 256;         // scales that share one nested scale, a warp's work
constexpr int PER_LANE = NESTED / 32;

// The running sums of a chunk. One CTA takes SHARE of them: all threads fetch and widen their terms, which is what
// takes longest, and half a warp adds them in order.
extern "C" __global__ void __launch_bounds__(THREADS)
    double_quantize_lanes(const float* absmax, // [blocks]
                          double* lanes,       // [ceil(blocks / CHUNK), LANES]
                          int64_t blocks) {
    constexpr int PER_THREAD = ROWS * SHARE / THREADS;
    __shared__ double terms[ROWS][SHARE];
    const int at = blockIdx.x % (LANES / SHARE) * SHARE + threadIdx.x % SHARE;
    const int64_t chunk = blockIdx.x / (LANES / SHARE), first = chunk * CHUNK + threadIdx.x / SHARE * LANES + at;
    let_next_kernel_start(); // which reads no weights before it waits
    wait_for_previous_kernel();
    float v[PER_THREAD];
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) {
        const int64_t block = first + i * (THREADS / SHARE) * LANES;
        v[i] = block < blocks ? absmax[block] : 0.0f; // adding a zero changes nothing
    }
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i)
        terms[i * (THREADS / SHARE) + threadIdx.x / SHARE][threadIdx.x % SHARE] = v[i];
    __syncthreads();
    if (threadIdx.x >= SHARE)
        return;
    double sum = 0.0;
#pragma unroll 16
    for (int row = 0; row < ROWS; ++row)
        sum += terms[row][threadIdx.x];
    lanes[chunk * LANES + at] = sum;
}

// The sum of a chunk, in lane 0 of a warp: running sums are halved until one is left.
__device__ double chunk_sum(const double* lanes) {
    double v[LANES / 32];
#pragma unroll
    for (int i = 0; i < LANES / 32; ++i)
        v[i] = lanes[32 * i + lane_id()];
#pragma unroll
    for (int half = LANES / 64; half > 0; half /= 2)
#pragma unroll
        for (int i = 0; i < half; ++i)
            v[i] += v[i + half];
#pragma unroll
    for (int half = 16; half > 0; half /= 2)
        v[0] += __shfl_down_sync(FULL_WARP, v[0], half);
    return v[0];
}

// The mean of all scales: the chunks' sums in ascending order; the same in every thread.
__device__ float mean(const double* lanes, int64_t blocks) {
    __shared__ double sums[THREADS];
    const int64_t chunks = (blocks + CHUNK - 1) / CHUNK;
    double total = 0.0;
    for (int64_t base = 0; base < chunks; base += THREADS) {
        const int here = min(int64_t(THREADS), chunks - base);
#pragma unroll 4
        for (int i = threadIdx.x / 32; i < here; i += WARPS) {
            const double sum = chunk_sum(lanes + (base + i) * LANES);
            if (lane_id() == 0)
                sums[i] = sum;
        }
        __syncthreads();
        for (int i = 0; i < here; ++i)
            total += sums[i];
        __syncthreads();
    }
    return blocks > 0 ? float(total / double(blocks)) : 0.0f;
}

// The scales under one nested scale, by a warp.
struct Group {
    int64_t first; // of this lane
    int count;     // from there to the end
    float v[PER_LANE];

    __device__ Group(const float* absmax, int64_t group, int64_t blocks)
        : first(group * NESTED + lane_id()), count(min(blocks - first, int64_t(NESTED))) {
#pragma unroll
        for (int j = 0; j < PER_LANE; ++j)
            v[j] = 32 * j < count ? absmax[first + 32 * j] : 0.0f;
    }

    __device__ void encode(uint8_t* codes, float* nested_absmax, float middle, const uint32_t* entries) {
        uint32_t bits = 0;
#pragma unroll
        for (int j = 0; j < PER_LANE; ++j) {
            v[j] = 32 * j < count ? __fsub_rn(v[j], middle) : 0.0f;
            bits = max(bits, magnitude(v[j]));
        }
        const float largest = __uint_as_float(lanes_max(bits, 32));
        if (lane_id() == 0)
            nested_absmax[first / NESTED] = largest;
        const float reciprocal = __frcp_rn(largest);
#pragma unroll
        for (int j = 0; j < PER_LANE; ++j) {
            // By the grid rule, whose first step is to add one; the lowest code for NaN, which zeros make, the highest
            // for the infinity that what has no reciprocal makes.
            const float scaled = fminf(fmaxf(__fmul_rn(v[j], reciprocal), -1.0f), 1.0f);
            const uint32_t code = signed_code(entries, __fadd_rn(scaled, 1.0f) - 1.0f) >> 24;
            if (32 * j < count)
                codes[first + 32 * j] = code;
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, CTAS)
    double_quantize_codes(const float* absmax,  // [blocks]
                          const double* lanes,  // [ceil(blocks / CHUNK), LANES]
                          uint8_t* codes,       // [blocks]
                          float* nested_absmax, // [ceil(blocks / NESTED)]
                          float* offset,        // [1]
                          int64_t blocks) {
    __shared__ __align__(16) uint32_t entries[SIGNED_ENTRIES];
    copy_entries(entries, GRID_ENTRIES[0]);
    wait_for_previous_kernel();
    int64_t group = int64_t(blockIdx.x) * WARPS + threadIdx.x / 32;
    Group next(absmax, group, blocks);
    const float middle = mean(lanes, blocks); // all entries are there by its barriers
    if (blockIdx.x == 0 && threadIdx.x == 0)
        *offset = middle;
    for (; group * NESTED < blocks; group += gridDim.x * WARPS) {
        Group now = next;
        next = Group(absmax, group + gridDim.x * WARPS, blocks);
        now.encode(codes, nested_absmax, middle, entries);
    }
}
