// Bound by bytes: 0.516 B in, 2 B out per 16-bit weight; 28672 x 8192 takes 137 us at 4.3 TB/s.
#include "absmax.cuh"
#include "codes.cuh"
#include "memory.cuh"
#include "overlap.cuh"

constexpr int THREADS = 512;
constexpr int GROUPS = 2; // 16-byte stores a thread, all their loads in flight at once
constexpr int CTAS = 4;   // an SM: small tiles and all of its threads, so that few are left over at the end

// The codes of one 16-byte store: eight (4 bytes) or four (2 bytes).
template <int COUNT>
__device__ uint32_t load_codes(const uint8_t* p) {
    if constexpr (COUNT == 8)
        return __ldg(reinterpret_cast<const uint32_t*>(p));
    return __ldg(reinterpret_cast<const uint16_t*>(p));
}

// This thread's share of a tile: COUNT values in each group.
template <typename T>
struct Tile {
    static constexpr int COUNT = 16 / sizeof(T), SIZE = THREADS * GROUPS * COUNT;
    uint32_t codes[GROUPS];
    RawScale scales[GROUPS];

    __device__ void load(const uint8_t* packed, const Absmax& absmax, int64_t tile, int log2_blocksize) {
        packed += tile / 2;
        const int64_t first_block = tile >> log2_blocksize; // of a tile and a block one divides the other
#pragma unroll
        for (int j = 0; j < GROUPS; ++j) {
            const uint32_t i = (j * THREADS + threadIdx.x) * COUNT;
            codes[j] = load_codes<COUNT>(packed + i / 2);
            scales[j] = load_scale(absmax, first_block + (i >> log2_blocksize));
        }
    }

    __device__ void store(const Absmax& absmax, T* out, float entry) const {
#pragma unroll
        for (int j = 0; j < GROUPS; ++j) {
            const float scale = decode_scale(absmax, scales[j]);
            float v[COUNT];
#pragma unroll
            for (int i = 0; i < COUNT; ++i)
                v[i] = __fmul_rn(lookup16(entry, codes[j] >> nibble_shift(i)), scale);
            store16(out + (j * THREADS + threadIdx.x) * COUNT, v);
        }
    }
};

// The last tile, and any tile of unaligned tensors.
template <typename T>
__device__ void dequantize_edge(const uint8_t* packed, const Absmax& absmax, T* out, int64_t first, int64_t end,
                                int log2_blocksize, const float (&table)[16]) {
    for (int64_t i = first + threadIdx.x; i < end; i += THREADS) {
        const uint32_t code = packed[i / 2] >> nibble_shift(i % 2) & 15;
        const float scale = decode_scale(absmax, load_scale(absmax, i >> log2_blocksize));
        out[i] = narrow<T>(__fmul_rn(table[code], scale));
    }
}

template <typename T>
__device__ void dequantize_4bit(const uint8_t* packed, // [ceil(n / 2)]
                                const Absmax& absmax,  // [ceil(n / blocksize)]
                                T* out,                // [n]
                                int64_t n,             //
                                int log2_blocksize,    // 5..12
                                int quant_type,        // row of the codebook tables
                                bool vector) {         // packed is 4-byte, out 16-byte aligned
    const int64_t first = int64_t(blockIdx.x) * Tile<T>::SIZE, end = first + Tile<T>::SIZE;
    const float (&table)[16] = CODEBOOK_4BIT[quant_type];
    let_next_kernel_start();
    const bool whole = vector && end <= n;
    Tile<T> tile;
    if (whole) // weights, which the kernel before this one does not write
        tile.load(packed, absmax, first, log2_blocksize);
    wait_for_previous_kernel();
    if (whole)
        tile.store(absmax, out + first, table[lane_id() % 16]);
    else
        dequantize_edge(packed, absmax, out, first, min(end, n), log2_blocksize, table);
}

#define DEQUANTIZE_4BIT(T, dtype)                                                                                      \
    extern "C" __global__ void __launch_bounds__(THREADS, CTAS) dequantize_4bit_##dtype(                               \
        const uint8_t* packed, Absmax absmax, T* out, int64_t n, int log2_blocksize, int quant_type, bool vector) {    \
        dequantize_4bit(packed, absmax, out, n, log2_blocksize, quant_type, vector);                                   \
    }

DEQUANTIZE_4BIT(float, f32)
DEQUANTIZE_4BIT(f16, f16)
DEQUANTIZE_4BIT(bf16, bf16)
