// Bound by bytes: 2 B in, 0.56 B out per 16-bit weight; 28672 x 8192 takes 140 us at 4.3 TB/s.
#include "codes.cuh"
#include "memory.cuh"
#include "overlap.cuh"

constexpr int THREADS = 512;
constexpr int CTAS = 2;           // a multiprocessor, which take the tiles in turn
constexpr int TILE = 8 * THREADS; // elements of a CTA at an edge: a whole number of blocks of any legal size
constexpr int FP4 = 1;            // as quant_type

// A whole block multiplies by the reciprocal, the short last one divides.
__device__ void scale8(float (&v)[8], float absmax, bool whole) {
    const float d = divisor(absmax);
    if (whole) {
        const float reciprocal = __frcp_rn(d);
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

// The last tile, and any tile of unaligned tensors.
template <typename T, typename Encoder>
__device__ void quantize_edge(const T* x, uint8_t* packed, float* absmax, int64_t tile, int64_t n, int log2_blocksize,
                              const Encoder& encoder, bool vector) {
    const int64_t first = tile + threadIdx.x * 8;
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

// Neighbours that a thread encodes at once: 32 bytes of an aligned tensor.
template <typename T>
struct Neighbours {
    static constexpr int EIGHTS = 4 / sizeof(T), COUNT = 8 * EIGHTS;
    Raw8<T> raw[EIGHTS];

    __device__ void load(const T* x) {
#pragma unroll
        for (int i = 0; i < EIGHTS; ++i)
            raw[i].load(x + 8 * i);
    }

    template <typename Encoder>
    __device__ void quantize(uint8_t* packed, float* absmax, int log2_blocksize, const Encoder& encoder) const {
        const int threads_a_block = (1 << log2_blocksize) / COUNT;
        uint32_t largest = 0;
#pragma unroll
        for (int i = 0; i < EIGHTS; ++i)
            largest = max(largest, magnitude(raw[i]));
        largest = threads_max(largest, threads_a_block);
        if (threadIdx.x % threads_a_block == 0)
            *absmax = __uint_as_float(largest);
        uint32_t words[EIGHTS];
#pragma unroll
        for (int i = 0; i < EIGHTS; ++i) {
            float v[8];
            raw[i].unpack(v);
            scale8(v, __uint_as_float(largest), true);
            words[i] = encoder.encode8(v);
        }
        if constexpr (EIGHTS == 1)
            *reinterpret_cast<uint32_t*>(packed) = words[0];
        else
            *reinterpret_cast<uint2*>(packed) = make_uint2(words[0], words[1]);
    }
};

// Whole tiles of aligned tensors; the next one is on its way while one is encoded.
template <typename T, typename Encoder>
__device__ __forceinline__ void quantize_tiles(const T* x, uint8_t* packed, float* absmax, int64_t n,
                                               int log2_blocksize, const Encoder& encoder) {
    constexpr int COUNT = Neighbours<T>::COUNT;
    const int64_t step = int64_t(gridDim.x) * THREADS * COUNT;
    int64_t first = (int64_t(blockIdx.x) * THREADS + threadIdx.x) * COUNT;
    Neighbours<T> next;
    if (first < n)
        next.load(x + first);
#pragma unroll 2
    for (; first < n; first += step) {
        const Neighbours<T> now = next;
        if (first + step < n)
            next.load(x + first + step);
        now.quantize(packed + first / 2, absmax + (first >> log2_blocksize), log2_blocksize, encoder);
    }
}

template <typename T, typename Encoder>
__device__ void quantize_edges(const T* x, uint8_t* packed, float* absmax, int64_t done, int64_t n, int log2_blocksize,
                               const Encoder& encoder, bool vector) {
    for (int64_t tile = done + int64_t(blockIdx.x) * TILE; tile < n; tile += int64_t(gridDim.x) * TILE)
        quantize_edge(x, packed, absmax, tile, n, log2_blocksize, encoder, vector);
}

template <typename T>
__device__ void quantize_4bit(const T* x,         // [n]
                              uint8_t* packed,    // [ceil(n / 2)]
                              float* absmax,      // [ceil(n / blocksize)]
                              int64_t n,          //
                              int log2_blocksize, // 5..12
                              int quant_type,     // row of the codebook tables
                              bool vector) {      // x is 16-byte, packed 8-byte aligned
    if (quant_type == FP4) {
        const Searched4bit encoder(quant_type);
        wait_for_previous_kernel();
        return quantize_edges(x, packed, absmax, 0, n, log2_blocksize, encoder, vector);
    }
    const Binned4bit encoder(quant_type);
    wait_for_previous_kernel();
    const int64_t whole = vector ? n - n % (THREADS * Neighbours<T>::COUNT) : 0;
    if (log2_blocksize == 6) // the usual block, of which the compiler makes a case of its own
        quantize_tiles(x, packed, absmax, whole, 6, encoder);
    else
        quantize_tiles(x, packed, absmax, whole, log2_blocksize, encoder);
    quantize_edges(x, packed, absmax, whole, n, log2_blocksize, encoder, vector);
}

#define QUANTIZE_4BIT(T, dtype)                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS, CTAS) quantize_4bit_##dtype(                                 \
        const T* x, uint8_t* packed, float* absmax, int64_t n, int log2_blocksize, int quant_type, bool vector) {      \
        quantize_4bit(x, packed, absmax, n, log2_blocksize, quant_type, vector);                                       \
    }

QUANTIZE_4BIT(float, f32)
QUANTIZE_4BIT(f16, f16)
QUANTIZE_4BIT(bf16, bf16)
