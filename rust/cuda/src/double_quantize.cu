// Bound by bytes: 4 B read twice, 1 B written per block scale, 1/64 of the weights' own traffic.
#include "codes.cuh"
#include "memory.cuh"
#include "overlap.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int64_t CHUNK = 65536;      // scales whose sum is one term of the offset
constexpr int LANES = 256;            // running sums of a chunk
constexpr int ROWS = CHUNK / LANES;   // terms of a running sum
constexpr int NESTED = 256;           // scales that share one nested scale, a warp's work
constexpr int PER_LANE = NESTED / 32; //
constexpr int COPIED = 255 * 32;      // the midpoints, once for every bank of shared memory

// The running sums of a chunk. One CTA takes 32 of them: all threads fetch their terms, one warp adds them in order.
extern "C" __global__ void __launch_bounds__(THREADS)
    double_quantize_lanes(const float* absmax, // [blocks]
                          double* lanes,       // [ceil(blocks / CHUNK), LANES]
                          int64_t blocks) {
    __shared__ float terms[ROWS][32];
    const int lane = blockIdx.x % (LANES / 32) * 32 + lane_id(), warp = threadIdx.x / 32;
    const int64_t chunk = blockIdx.x / (LANES / 32), first = chunk * CHUNK + lane;
    wait_for_previous_kernel();
#pragma unroll
    for (int row = warp; row < ROWS; row += WARPS) {
        const int64_t at = first + row * LANES;
        terms[row][lane_id()] = at < blocks ? absmax[at] : 0.0f; // adding a zero changes nothing
    }
    __syncthreads();
    if (warp > 0)
        return;
    double sum = 0.0;
#pragma unroll 16
    for (int row = 0; row < ROWS; ++row)
        sum += terms[row][lane_id()];
    lanes[chunk * LANES + lane] = sum;
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

// x snapped to 65,536 steps over [-1, 1], then the nearest entry, ties down. Midpoint i of this lane is at 32 * i.
__device__ uint32_t encode_grid(const float* midpoints, float x) {
    const float clamped = fminf(fmaxf(x, -1.0f), 1.0f);
    const float scaled = __fmul_rn(__fmul_rn(__fadd_rn(clamped, 1.0f), 0.5f), 65535.0f);
    const float step = float(uint32_t(__fadd_rn(scaled, 0.5f)));
    const float snapped = __fadd_rn(-1.0f, __fdiv_rn(2.0f * step, 65535.0f));
    uint32_t rank = 0;
#pragma unroll
    for (int half = 128; half > 0; half /= 2)
        rank += snapped > midpoints[32 * (rank + half - 1)] ? half : 0;
    return rank;
}

// One nested scale and the codes under it, by a warp.
__device__ void encode_group(const float* absmax, uint8_t* codes, float* nested_absmax, int64_t group, int64_t blocks,
                             float middle, const float* midpoints) {
    const int64_t first = group * NESTED + lane_id();
    float v[PER_LANE];
    uint32_t bits = 0;
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j)
        v[j] = first + 32 * j < blocks ? __fsub_rn(absmax[first + 32 * j], middle) : 0.0f;
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j)
        bits = max(bits, magnitude(v[j]));
    const float largest = __uint_as_float(lanes_max(bits, 32));
    if (lane_id() == 0)
        nested_absmax[group] = largest;
    const float reciprocal = __fdiv_rn(1.0f, largest);
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j) {
        const uint32_t code = encode_grid(midpoints, __fmul_rn(v[j], reciprocal));
        if (first + 32 * j < blocks)
            codes[first + 32 * j] = largest == 0.0f ? 0 : code;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    double_quantize_codes(const float* absmax,  // [blocks]
                          const double* lanes,  // [ceil(blocks / CHUNK), LANES]
                          uint8_t* codes,       // [blocks]
                          float* nested_absmax, // [ceil(blocks / NESTED)]
                          float* offset,        // [1]
                          int64_t blocks) {
    __shared__ float midpoints[COPIED];
    const float* map = DYNAMIC_MAP[1];
    for (int i = threadIdx.x; i < COPIED; i += THREADS)
        midpoints[i] = 0.5f * (map[i / 32] + map[i / 32 + 1]);
    wait_for_previous_kernel();
    const float middle = mean(lanes, blocks); // all midpoints are there by its barriers
    if (blockIdx.x == 0 && threadIdx.x == 0)
        *offset = middle;
    const int64_t groups = (blocks + NESTED - 1) / NESTED;
    for (int64_t group = int64_t(blockIdx.x) * WARPS + threadIdx.x / 32; group < groups; group += gridDim.x * WARPS)
        encode_group(absmax, codes, nested_absmax, group, blocks, middle, midpoints + lane_id());
}
