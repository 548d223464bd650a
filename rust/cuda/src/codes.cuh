// Codes to values and back. Sixteen-entry tables live one entry a lane (two copies a warp), so that
// one shuffle reads 32 entries: no shared memory, no bank conflicts, no barrier.
#pragma once
#include "codebook.cuh"
#include "reduce.cuh"

// Bits above the lowest five of `index` may be anything: the shuffle takes it modulo 32.
__device__ inline float lookup16(float entry, uint32_t index) { return __shfl_sync(FULL_WARP, entry, index); }

// Where element i lies in a word of packed codes: the even element of a byte is its high nibble.
__device__ constexpr int nibble_shift(int i) { return 8 * (i / 2) + 4 * (1 - i % 2); }

// A lane holds one of 30 equal parts of [-1, 1]. In nf4 and int4 no part has two thresholds or one near its edge, so
// that the part may be computed loosely: one comparison is left.
struct Binned4bit {
    float threshold;
    uint32_t codes;

    __device__ explicit Binned4bit(int quant_type)
        : threshold(BIN_THRESHOLDS_4BIT[quant_type][lane_id()]), codes(BIN_CODES_4BIT[quant_type][lane_id()]) {}

    // The lowest code for NaN.
    __device__ uint32_t encode(float scaled) const {
        const float from_zero = __saturatef(__fmaf_rn(scaled, 0.5f, 0.5f));
        // The sum's lowest bits are the part's number: at 2^23 they count ones.
        const uint32_t bin = __float_as_uint(__fmaf_rd(from_zero, 29.9999f, 8388608.0f));
        const uint32_t pair = __shfl_sync(FULL_WARP, codes, bin);
        return pair >> (scaled > lookup16(threshold, bin) ? 4 : 0) & 15;
    }
};

// Thresholds and code order of any 4-bit codebook, held by lanes.
struct Searched4bit {
    float threshold, order;
    float t3, t7, t11;

    __device__ explicit Searched4bit(int quant_type) {
        const float (&t)[16] = THRESHOLDS_4BIT[quant_type];
        threshold = t[lane_id() % 16];
        order = __uint_as_float(ORDER_4BIT[quant_type][lane_id() % 16]);
        t3 = t[3], t7 = t[7], t11 = t[11];
    }

    // Rank = number of thresholds strictly below `scaled`, by binary search; 0 for NaN.
    __device__ uint32_t encode(float scaled) const {
        uint32_t rank = scaled > t7 ? 8 : 0;
        rank += scaled > (rank ? t11 : t3) ? 4 : 0;
        rank += scaled > lookup16(threshold, rank + 1) ? 2 : 0;
        rank += scaled > lookup16(threshold, rank) ? 1 : 0;
        return __float_as_uint(lookup16(order, rank));
    }
};

// Number of the 255 ascending thresholds strictly below x; 0 for NaN.
__device__ inline uint32_t rank256(const float* thresholds, float x) {
    uint32_t rank = 0;
#pragma unroll
    for (int step = 128; step > 0; step /= 2)
        rank += x > thresholds[rank + step - 1] ? step : 0;
    return rank;
}

// The divisor of a block, as every quantizer has it: a block of zeros scales to zeros.
__device__ inline float divisor(float absmax) { return fmaxf(absmax, ABSMAX_MIN); }
