// A table in shared memory turns a byte of two codes into one register of two 16-bit values. It holds each of its
// entries once for every lane, so that no two lanes ever want the same bank.
#pragma once
#include "codes.cuh"
#include "scalars.cuh"

constexpr int TABLE = 65536;

struct Codebook {
    float values[16];
};

// The table's values of T are the codebook times this, so that rounding them costs least: fp4's and int4's are then
// whole numbers, nf4's rms error falls from 1.4e-3 to 0.8e-3 in bf16, from 1.8e-4 to 0.8e-4 in fp16. The sums are
// divided by it.
template <typename T>
constexpr float NF4_GAIN = 1.43675f;
template <>
constexpr float NF4_GAIN<f16> = 1.3662f;
template <typename T>
__device__ inline float table_gain(int quant_type) {
    return quant_type == 0 ? NF4_GAIN<T> : quant_type == 1 ? 12.0f : 7.0f;
}

// Row b of the table: 32 times the pair of values of byte b, then 32 times entry b of the nested scales' map. An
// address is put together by one permutation of bytes, since a row has 256 of them, and the place where the table
// begins.
struct Table {
    uint32_t lane4 = 4 * lane_id(), base;

    __device__ explicit Table(const void* shared) : base(__cvta_generic_to_shared(shared)) {}

    // At the beginning of dynamic shared memory, on sm_90 a constant that lookups take as an immediate offset; not in
    // clusters.
    __device__ static Table first(const void* shared) {
        Table table(shared);
#if __CUDA_ARCH__ == 900
        if (table.base != 1024)
            __trap();
        table.base = 1024;
#endif
        return table;
    }

    // Where this lane reads the row of byte `i` of a word.
    __device__ const char* row(uint32_t word, int i) const {
        const uint32_t offset = __byte_perm(word, lane4, 0x7604 + 0x10 * i);
        return static_cast<const char*>(__cvta_shared_to_generic(offset)) + base;
    }
    __device__ uint32_t pair(uint32_t word, int i) const { return *reinterpret_cast<const uint32_t*>(row(word, i)); }
    __device__ float scale(uint32_t word, int i) const { return *reinterpret_cast<const float*>(row(word, i) + 128); }
};

// An eighth of the first (half 0) or second 128 bytes of a row: the i-th of all rows.
__device__ inline void fill_eighth(uint4* table, int half, int i, uint32_t value) {
    table[i / 8 * 16 + half * 8 + i % 8] = make_uint4(value, value, value, value);
}

// `value(b)` into one half of each row b, by the CTA's first `threads`; eight a row.
template <typename Value>
__device__ void fill_table(uint4* table, int half, int threads, const Value& value) {
#pragma unroll 4
    for (int i = threadIdx.x; i < 256 * 8; i += threads)
        fill_eighth(table, half, i, value(i / 8));
}

// All of one half of row b, by a thread of its own; neighbours begin in different banks.
__device__ inline void fill_row(uint4* table, int half, int b, uint32_t value) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
        table[b * 16 + half * 8 + (i + b) % 8] = make_uint4(value, value, value, value);
}
