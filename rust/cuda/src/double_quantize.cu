// Bound by bytes: 4 B read twice, 1 B written per block scale, 1/64 of the weights' own traffic.
#include "codes.cuh"
#include "memory.cuh"
#include "overlap.cuh"

constexpr int THREADS = 256;
constexpr int64_t CHUNK = 65536;
constexpr int BATCH = 64;           // loads of a thread in flight: what one SM can take in
constexpr int NESTED = 256;         // scales that share one nested scale
constexpr int WARPS = THREADS / 32; // groups of NESTED scales a CTA
constexpr int PER_LANE = NESTED / 32;

__device__ inline void load_batch(const float* absmax, int64_t first, int64_t count, float (&v)[BATCH]) {
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
        const int64_t at = first + i * THREADS;
        v[i] = at < count ? absmax[at] : 0.0f;
    }
}

// Sum of count <= CHUNK scales in the order that defines the offset, to which zeros past the end add nothing; the same
// in every thread.
__device__ double chunk_sum(const float* absmax, int64_t count) {
    __shared__ double lanes[THREADS];
    float now[BATCH], next[BATCH];
    double sum = 0.0;
    load_batch(absmax, threadIdx.x, count, next);
    for (int64_t first = threadIdx.x; first < count; first += BATCH * THREADS) {
#pragma unroll
        for (int i = 0; i < BATCH; ++i)
            now[i] = next[i];
        load_batch(absmax, first + BATCH * THREADS, count, next);
#pragma unroll
        for (int i = 0; i < BATCH; ++i)
            sum += now[i];
    }
    lanes[threadIdx.x] = sum;
    __syncthreads();
    for (int step = THREADS / 2; step > 0; step /= 2) {
        if (threadIdx.x < step)
            lanes[threadIdx.x] += lanes[threadIdx.x + step];
        __syncthreads();
    }
    return lanes[0];
}

// One CTA a chunk.
extern "C" __global__ void __launch_bounds__(THREADS, 1) double_quantize_sums(const float* absmax, // [blocks]
                                                                              double* sums, // [ceil(blocks / CHUNK)]
                                                                              int64_t blocks) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    const int64_t first = blockIdx.x * CHUNK;
    const double sum = chunk_sum(absmax + first, min(CHUNK, blocks - first));
    if (threadIdx.x == 0)
        sums[blockIdx.x] = sum;
}

// The mean of all scales: the chunks' sums in ascending order; the same in every thread.
__device__ float mean(const double* sums, int64_t blocks) {
    __shared__ double some[THREADS];
    const int64_t chunks = (blocks + CHUNK - 1) / CHUNK;
    double total = 0.0;
    for (int64_t base = 0; base < chunks; base += THREADS) {
        if (base + threadIdx.x < chunks)
            some[threadIdx.x] = sums[base + threadIdx.x];
        __syncthreads();
        for (int i = 0; i < THREADS && base + i < chunks; ++i)
            total += some[i];
        __syncthreads();
    }
    return blocks > 0 ? float(total / double(blocks)) : 0.0f;
}

// x snapped to 65,536 steps over [-1, 1], then the nearest entry, ties down.
__device__ uint32_t encode_grid(const float* midpoints, float x) {
    const float clamped = fminf(fmaxf(x, -1.0f), 1.0f);
    const float scaled = __fmul_rn(__fmul_rn(__fadd_rn(clamped, 1.0f), 0.5f), 65535.0f);
    const float step = float(uint32_t(__fadd_rn(scaled, 0.5f)));
    return rank256(midpoints, __fadd_rn(-1.0f, __fdiv_rn(2.0f * step, 65535.0f)));
}

// One warp a group of 256 scales.
extern "C" __global__ void __launch_bounds__(THREADS)
    double_quantize_codes(const float* absmax,  // [blocks]
                          const double* sums,   // [ceil(blocks / CHUNK)]
                          uint8_t* codes,       // [blocks]
                          float* nested_absmax, // [ceil(blocks / 256)]
                          float* offset,        // [1]
                          int64_t blocks) {
    __shared__ float midpoints[255];
    const float* map = DYNAMIC_MAP[1];
    if (threadIdx.x < 255)
        midpoints[threadIdx.x] = 0.5f * (map[threadIdx.x] + map[threadIdx.x + 1]);
    let_next_kernel_start();
    wait_for_previous_kernel();

    const int64_t group = int64_t(blockIdx.x) * WARPS + threadIdx.x / 32;
    const int64_t first = group * NESTED + lane_id();
    float v[PER_LANE];
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j)
        v[j] = first + 32 * j < blocks ? absmax[first + 32 * j] : 0.0f;
    const float middle = mean(sums, blocks);
    if (blockIdx.x == 0 && threadIdx.x == 0)
        *offset = middle;
    __syncthreads(); // the midpoints are there
    if (first - lane_id() >= blocks)
        return;
    uint32_t bits = 0;
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j) {
        v[j] = __fsub_rn(v[j], middle);
        if (first + 32 * j < blocks)
            bits = max(bits, magnitude(v[j]));
    }
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
