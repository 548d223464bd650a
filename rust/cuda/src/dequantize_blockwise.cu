// Bound by bytes: 1 B in, 4 B out per fp32 element.
#include "codes.cuh"
#include "memory.cuh"

constexpr int THREADS = 256;
constexpr int PER_THREAD = 8;
constexpr int TILE = THREADS * PER_THREAD;

template <typename T>
__device__ void dequantize_blockwise(const uint8_t* codes, // [n]
                                     const float* absmax,  // [ceil(n / blocksize)]
                                     T* out,               // [n]
                                     int64_t n,            //
                                     int log2_blocksize,   // 6..12
                                     int is_signed) {      // which dynamic map
    __shared__ float map[256];
    map[threadIdx.x] = DYNAMIC_MAP[is_signed][threadIdx.x];
    __syncthreads();
    const int64_t first = int64_t(blockIdx.x) * TILE + threadIdx.x;
#pragma unroll
    for (int j = 0; j < PER_THREAD; ++j) {
        const int64_t i = first + j * THREADS;
        if (i < n)
            out[i] = narrow<T>(__fmul_rn(map[codes[i]], absmax[i >> log2_blocksize]));
    }
}

#define DEQUANTIZE_BLOCKWISE(T, dtype)                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS) dequantize_blockwise_##dtype(                                \
        const uint8_t* codes, const float* absmax, T* out, int64_t n, int log2_blocksize, int is_signed) {             \
        dequantize_blockwise(codes, absmax, out, n, log2_blocksize, is_signed);                                        \
    }

DEQUANTIZE_BLOCKWISE(float, f32)
DEQUANTIZE_BLOCKWISE(f16, f16)
DEQUANTIZE_BLOCKWISE(bf16, bf16)
