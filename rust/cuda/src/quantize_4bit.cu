// Bound by bytes: 2 B in, 0.56 B out per 16-bit weight; 28672 x 8192 takes 140 us at 4.3 TB/s.
#include "codes.cuh"
#include "memory.cuh"
#include "overlap.cuh"

constexpr int THREADS = 512;
constexpr int TILE = 8 * THREADS; // elements of a CTA: a whole number of blocks of any legal size
constexpr int FP4 = 1;            // as quant_type

// A whole block multiplies by the reciprocal, the short last one divides.
__device__ void scale8(float (&v)[8], float absmax, bool whole) {
    const float d = divisor(absmax);
    if (whole) {
        const float reciprocal = __fdiv_rn(1.0f, d);
#pragma unroll
        for (int i = 0; i < 8; ++i)
            v[i] = __fmul_rn(v[i], reciprocal);
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            v[i] = __fdiv_rn(v[i], d);
    }
}

// Four bytes of codes at an offset that is a multiple of four, cut at the end of the tensor.
__device__ void store_codes(uint8_t* packed, int64_t first, int64_t bytes, bool vector, uint32_t word) {
    if (vector && first + 4 <= bytes) {
        *reinterpret_cast<uint32_t*>(packed + first) = word;
        return;
    }
    for (int i = 0; i < 4; ++i)
        if (first + i < bytes)
            packed[first + i] = word >> 8 * i;
}

template <typename T, typename Encoder>
__device__ void quantize_tile(const T* x, uint8_t* packed, float* absmax, int64_t n, int log2_blocksize,
                              const Encoder& encoder, bool vector) {
    const int64_t first = int64_t(blockIdx.x) * TILE + threadIdx.x * 8;
    float v[8];
    load8_or_zero(x, first, n, vector, v);
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i)
        largest = max(largest, magnitude(v[i]));
    largest = threads_max(largest, 1 << (log2_blocksize - 3));
    const int64_t block = first >> log2_blocksize;
    const bool opens_block = first == block << log2_blocksize;
    if (opens_block && first < n)
        absmax[block] = __uint_as_float(largest);

    scale8(v, __uint_as_float(largest), (block + 1) << log2_blocksize <= n);
    store_codes(packed, first / 2, (n + 1) / 2, vector, encoder.encode8(v));
}

// A whole tile of aligned tensors in blocks of 64.
template <typename T>
__device__ void quantize_tile64(const T* x, uint8_t* packed, float* absmax, const Binned4bit& encoder) {
    const int64_t first = int64_t(blockIdx.x) * TILE + threadIdx.x * 8;
    Raw8<T> raw;
    raw.load(x + first);
    uint32_t largest = magnitude(raw);
#pragma unroll
    for (int step = 4; step > 0; step /= 2)
        largest = max(largest, __shfl_xor_sync(FULL_WARP, largest, step));
    if (threadIdx.x % 8 == 0)
        absmax[first / 64] = __uint_as_float(largest);
    float v[8];
    raw.unpack(v);
    scale8(v, __uint_as_float(largest), true);
    *reinterpret_cast<uint32_t*>(packed + first / 2) = encoder.encode8(v);
}

template <typename T>
__device__ void quantize_4bit(const T* x,         // [n]
                              uint8_t* packed,    // [ceil(n / 2)]
                              float* absmax,      // [ceil(n / blocksize)]
                              int64_t n,          //
                              int log2_blocksize, // 5..12
                              int quant_type,     // row of the codebook tables
                              bool vector) {      // x is 16-byte, packed 4-byte aligned
    wait_for_previous_kernel();
    const bool whole = vector && (int64_t(blockIdx.x) + 1) * TILE <= n;
    if (whole && log2_blocksize == 6 && quant_type != FP4)
        quantize_tile64(x, packed, absmax, Binned4bit(quant_type));
    else if (quant_type == FP4)
        quantize_tile(x, packed, absmax, n, log2_blocksize, Searched4bit(quant_type), vector);
    else
        quantize_tile(x, packed, absmax, n, log2_blocksize, Binned4bit(quant_type), vector);
}

#define QUANTIZE_4BIT(T, dtype)                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS, 4) quantize_4bit_##dtype(                                    \
        const T* x, uint8_t* packed, float* absmax, int64_t n, int log2_blocksize, int quant_type, bool vector) {      \
        quantize_4bit(x, packed, absmax, n, log2_blocksize, quant_type, vector);                                       \
    }

QUANTIZE_4BIT(float, f32)
QUANTIZE_4BIT(f16, f16)
QUANTIZE_4BIT(bf16, bf16)
