// Bound by bytes: 4 B in, 1 B out per fp32 element; the search reads shared memory 8 times each.
#include "codes.cuh"
#include "memory.cuh"

constexpr int THREADS = 512;
constexpr int TILE = 8 * THREADS; // elements a CTA: a whole number of blocks of any legal size

// Eight codes from `first`, a multiple of eight, cut at the end of the tensor.
__device__ void store_codes(uint8_t* codes, int64_t first, int64_t n, bool vector, const uint32_t (&code)[8]) {
    if (vector && first + 8 <= n) {
        const uint32_t low = code[0] | code[1] << 8 | code[2] << 16 | code[3] << 24;
        const uint32_t high = code[4] | code[5] << 8 | code[6] << 16 | code[7] << 24;
        *reinterpret_cast<uint2*>(codes + first) = make_uint2(low, high);
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
        if (first + i < n)
            codes[first + i] = code[i];
}

template <typename T>
__device__ void quantize_blockwise(const T* x,         // [n]
                                   uint8_t* codes,     // [n]
                                   float* absmax,      // [ceil(n / blocksize)]
                                   int64_t n,          //
                                   int log2_blocksize, // 6..12
                                   int is_signed,      // which dynamic map
                                   bool vector) {      // x is 16-byte, codes 8-byte aligned
    __shared__ float thresholds[255];
    if (threadIdx.x < 255)
        thresholds[threadIdx.x] = NEAREST_THRESHOLDS[is_signed][threadIdx.x];
    const int64_t first = int64_t(blockIdx.x) * TILE + threadIdx.x * 8;
    float v[8];
    load8_or_zero(x, first, n, vector, v);
    __syncthreads();

    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i)
        largest = max(largest, magnitude(v[i]));
    largest = threads_max(largest, 1 << (log2_blocksize - 3));
    const int64_t block = first >> log2_blocksize;
    const bool opens_block = first == block << log2_blocksize;
    if (opens_block && first < n)
        absmax[block] = __uint_as_float(largest);

    const float reciprocal = __fdiv_rn(1.0f, divisor(__uint_as_float(largest)));
    uint32_t code[8];
#pragma unroll
    for (int i = 0; i < 8; ++i)
        code[i] = rank256(thresholds, __fmul_rn(v[i], reciprocal));
    store_codes(codes, first, n, vector, code);
}

#define QUANTIZE_BLOCKWISE(T, dtype)                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS) quantize_blockwise_##dtype(                                  \
        const T* x, uint8_t* codes, float* absmax, int64_t n, int log2_blocksize, int is_signed, bool vector) {        \
        quantize_blockwise(x, codes, absmax, n, log2_blocksize, is_signed, vector);                                    \
    }

QUANTIZE_BLOCKWISE(float, f32)
QUANTIZE_BLOCKWISE(f16, f16)
QUANTIZE_BLOCKWISE(bf16, bf16)
