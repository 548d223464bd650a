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
// that the part may be computed loosely: one comparison is left, and the code above a threshold is the next one. All
// of it is fp32 arithmetic, of which an SM has twice as much as of integers.
struct Binned4bit {
    float threshold; // times -STEEP
    float code;      // up to the threshold

    static constexpr float STEEP = 1152921504606846976.0f; // 2^60: of the least difference it makes more than one

    __device__ explicit Binned4bit(int quant_type)
        : threshold(BIN_THRESHOLDS_4BIT[quant_type][lane_id()] * -STEEP),
          code(float(BIN_CODES_4BIT[quant_type][lane_id()] & 15)) {}

    // The lowest code for NaN.
    __device__ float encode(float scaled) const {
        // The sum's lowest bits are the part's number: at 2^23 they count ones.
        const uint32_t bin = __float_as_uint(__fmaf_rd(scaled, 14.9999f, 8388608.0f + 15.0f));
        const float above = __saturatef(__fmaf_rn(scaled, STEEP, __shfl_sync(FULL_WARP, threshold, bin)));
        return __shfl_sync(FULL_WARP, code, bin) + above;
    }

    __device__ uint32_t encode8(const float (&scaled)[8]) const {
        // Four codes are an integer below 2^16, the lowest bits of a float at 2^23.
        float fours[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            fours[j] = 8388608.0f;
#pragma unroll
            for (int i = 0; i < 4; ++i)
                fours[j] = __fmaf_rn(encode(scaled[4 * j + i]), float(1 << nibble_shift(i)), fours[j]);
        }
        return __byte_perm(__float_as_uint(fours[0]), __float_as_uint(fours[1]), 0x5410);
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

    __device__ uint32_t encode8(const float (&scaled)[8]) const {
        uint32_t word = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i)
            word |= encode(scaled[i]) << nibble_shift(i);
        return word;
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
