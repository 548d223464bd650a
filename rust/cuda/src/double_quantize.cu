// Bound by bytes: 4 B read twice, 1 B written per block scale, 1/64 of the weights' own traffic.
#include "codes.cuh"
#include "memory.cuh"

constexpr int THREADS = 256;
constexpr int64_t CHUNK = 65536;
constexpr int NESTED = 256;         // scales that share one nested scale
constexpr int WARPS = THREADS / 32; // groups of NESTED scales a CTA
constexpr int PER_LANE = NESTED / 32;

// Sum of count <= CHUNK scales in the order that defines the offset; the same in every thread.
__device__ double chunk_sum(const float* absmax, int64_t count) {
    __shared__ double lanes[THREADS];
    double sum = 0.0;
#pragma unroll 8
    for (int64_t i = threadIdx.x; i < count; i += THREADS)
        sum += absmax[i];
    lanes[threadIdx.x] = sum;
    __syncthreads();
    for (int step = THREADS / 2; step > 0; step /= 2) {
        if (threadIdx.x < step)
            lanes[threadIdx.x] += lanes[threadIdx.x + step];
        __syncthreads();
    }
    return lanes[0];
}

// A whole chunk owns 256 nested scales, which are written last: the first two hold its sum meanwhile.
__device__ void store_sum(float* nested_absmax, int64_t chunk, double sum) {
    float* p = nested_absmax + chunk * (CHUNK / NESTED);
    p[0] = __int_as_float(__double2loint(sum));
    p[1] = __int_as_float(__double2hiint(sum));
}

__device__ double load_sum(const float* nested_absmax, int64_t chunk) {
    const float* p = nested_absmax + chunk * (CHUNK / NESTED);
    return __hiloint2double(__float_as_int(p[1]), __float_as_int(p[0]));
}

// Sum of all whole chunks in ascending order, valid in thread 0.
__device__ double sum_of_chunks(const float* nested_absmax, int64_t chunks) {
    __shared__ double sums[THREADS];
    double total = 0.0;
    for (int64_t base = 0; base < chunks; base += THREADS) {
        const int64_t chunk = base + threadIdx.x;
        if (chunk < chunks)
            sums[threadIdx.x] = load_sum(nested_absmax, chunk);
        __syncthreads();
        if (threadIdx.x == 0)
            for (int i = 0; i < THREADS && base + i < chunks; ++i)
                total += sums[i];
        __syncthreads();
    }
    return total;
}

// One CTA a whole chunk.
extern "C" __global__ void __launch_bounds__(THREADS)
    double_quantize_sums(const float* absmax,    // [blocks]
                         float* nested_absmax) { // [ceil(blocks / 256)], scratch
    const double sum = chunk_sum(absmax + blockIdx.x * CHUNK, CHUNK);
    if (threadIdx.x == 0)
        store_sum(nested_absmax, blockIdx.x, sum);
}

// One CTA in all.
extern "C" __global__ void __launch_bounds__(THREADS)
    double_quantize_offset(const float* absmax,        // [blocks]
                           const float* nested_absmax, // [ceil(blocks / 256)], sums of whole chunks
                           float* offset,              // [1]
                           int64_t blocks) {
    const int64_t chunks = blocks / CHUNK, rest = blocks % CHUNK;
    const double last = chunk_sum(absmax + chunks * CHUNK, rest);
    double total = sum_of_chunks(nested_absmax, chunks);
    if (rest > 0)
        total += last;
    if (threadIdx.x == 0)
        *offset = blocks > 0 ? float(total / double(blocks)) : 0.0f;
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
                          const float* offset,  // [1]
                          uint8_t* codes,       // [blocks]
                          float* nested_absmax, // [ceil(blocks / 256)]
                          int64_t blocks) {
    __shared__ float midpoints[255];
    const float* map = DYNAMIC_MAP[1];
    if (threadIdx.x < 255)
        midpoints[threadIdx.x] = 0.5f * (map[threadIdx.x] + map[threadIdx.x + 1]);
    __syncthreads();

    const int64_t group = int64_t(blockIdx.x) * WARPS + threadIdx.x / 32;
    const int64_t first = group * NESTED + lane_id();
    if (first - lane_id() >= blocks)
        return;
    float v[PER_LANE];
    uint32_t bits = 0;
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j) {
        const bool inside = first + 32 * j < blocks;
        v[j] = inside ? __fsub_rn(absmax[first + 32 * j], *offset) : 0.0f;
        bits = max(bits, magnitude(v[j]));
    }
    const float largest = __uint_as_float(lanes_max(bits, 32));
    if (lane_id() == 0)
        nested_absmax[group] = largest;
    const float reciprocal = __fdiv_rn(1.0f, largest);
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j) {
        if (first + 32 * j >= blocks)
            break;
        const uint32_t code = encode_grid(midpoints, __fmul_rn(v[j], reciprocal));
        codes[first + 32 * j] = largest == 0.0f ? 0 : code;
    }
}
