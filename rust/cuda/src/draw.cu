// Bound by what one CTA reads of a row from L2: once for the largest score, and unless that is the one to take once for
// each of a few passes. Instead of sorting, the limits of top-k and top-p are found by histograms: of the whole row,
// then of one bin's tokens, until a bin is one number.
#include "memory.cuh"

constexpr int THREADS = 1024;
constexpr int WARPS = THREADS / 32;
constexpr int BIN_BITS = 11;
constexpr int BINS = 1 << BIN_BITS; // two a thread
constexpr int COARSE = 64;          // bins to a factor of e
constexpr int SHARE_BITS = 27;
constexpr int WEIGHT_BITS = 40;
constexpr int LOW_BITS = 14; // of a weight: the rest is added in another bin, so that 32 bits hold both sums
constexpr uint32_t INFINITE = 0x7f800000u;

template <typename T>
struct Row {
    const T* scores;
    int vocab;
    float largest, inverse;

    // How much less likely than the likeliest: not negative, so that its bits are in the order of numbers.
    __device__ uint32_t x(int i) const { return magnitude(__fmul_rn(__fsub_rn(largest, widen(scores[i])), inverse)); }
};

__device__ inline float likelihood(uint32_t x) { return expf(-__uint_as_float(x)); }

struct Shared {
    uint32_t low[BINS], high[BINS];
    uint64_t of_warp[WARPS];
    float largest[WARPS];
    int place[WARPS];
    uint64_t before; // the bin that was found: the sum of those before it
    int bin;
};

__device__ inline uint64_t warp_sum(uint64_t value) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
        value += __shfl_xor_sync(FULL_WARP, value, step);
    return value;
}

// With those of the lanes before.
__device__ inline uint64_t warp_scan(uint64_t value) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const uint64_t other = __shfl_up_sync(FULL_WARP, value, step);
        value += lane_id() >= step ? other : 0;
    }
    return value;
}

// A score and where it stands. Of equal ones the first is the larger.
struct Place {
    float score;
    int at;

    __device__ bool exceeds(const Place& other) const {
        return score > other.score || (score == other.score && at < other.at);
    }
};

__device__ inline Place warp_max(Place own) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        const Place other = {__shfl_xor_sync(FULL_WARP, own.score, step), __shfl_xor_sync(FULL_WARP, own.at, step)};
        own = other.exceeds(own) ? other : own;
    }
    return own;
}

// The largest score; nowhere (-1) if it is not finite or one is NaN.
template <typename T>
__device__ Place row_max(const T* scores, int vocab, bool vector, Shared& shared) {
    Place own = {-INFINITY, vocab};
    bool finite = true;
#pragma unroll 4
    for (int first = 8 * threadIdx.x; first < vocab; first += 8 * THREADS) {
        float v[8];
        load8_or_zero(scores, first, vocab, vector, v);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const bool inside = first + i < vocab;
            finite = finite && (!inside || v[i] < INFINITY);
            if (inside && v[i] > own.score)
                own = {v[i], first + i};
        }
    }
    own = warp_max(own);
    if (lane_id() == 0)
        shared.largest[threadIdx.x / 32] = own.score, shared.place[threadIdx.x / 32] = own.at;
    finite = __syncthreads_and(finite);
    own = warp_max({shared.largest[lane_id()], shared.place[lane_id()]});
    return {own.score, finite && own.score > -INFINITY ? own.at : -1};
}

// The smallest x so that the tokens up to it, at most `most`, reach the goal: `top_k` tokens, or if WEIGH a share of
// the sum of their likelihoods.
template <bool WEIGH, typename T>
__device__ uint32_t limit_of(const Row<T>& row, uint32_t most, int top_k, float share, Shared& shared) {
    uint32_t begin = 0, end = most;
    uint64_t goal = top_k;
    for (bool coarse = true; begin < end; coarse = false) {
        const int shift = coarse ? 0 : max(0, 32 - __clz(end - begin) - BIN_BITS);
        for (int i = threadIdx.x; i < BINS; i += THREADS)
            shared.low[i] = 0, shared.high[i] = 0;
        shared.bin = -1;
        __syncthreads();
#pragma unroll 4
        for (int i = threadIdx.x; i < row.vocab; i += THREADS) {
            const uint32_t x = row.x(i);
            if (x < begin || x > end)
                continue;
            // Equal steps of x spread the tokens of a vocabulary over many bins; its bits would not.
            const int bin = coarse ? int(fminf(__uint_as_float(x) * COARSE, float(BINS - 1))) : int(x - begin >> shift);
            if constexpr (WEIGH) {
                const uint32_t weight = __float2uint_rn(likelihood(x) * float(1 << SHARE_BITS));
                atomicAdd(shared.low + bin, weight % (1u << LOW_BITS));
                atomicAdd(shared.high + bin, weight >> LOW_BITS);
            } else {
                atomicAdd(shared.low + bin, 1u);
            }
        }
        __syncthreads();
        uint64_t sums[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int bin = 2 * threadIdx.x + i;
            sums[i] = shared.low[bin] + (uint64_t(shared.high[bin]) << LOW_BITS);
        }
        const uint64_t scanned = warp_scan(sums[0] + sums[1]);
        if (lane_id() == 31)
            shared.of_warp[threadIdx.x / 32] = scanned;
        __syncthreads();
        const uint64_t warps = warp_scan(shared.of_warp[lane_id()]);
        const uint64_t total = __shfl_sync(FULL_WARP, warps, 31);
        const uint64_t of_warps_before = __shfl_sync(FULL_WARP, warps, max(0, int(threadIdx.x) / 32 - 1));
        if (WEIGH && coarse)
            goal = max(uint64_t(1), uint64_t(ceil(double(share) * double(total))));
        uint64_t before = scanned - sums[0] - sums[1] + (threadIdx.x < 32 ? 0 : of_warps_before);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (before < goal && goal <= before + sums[i])
                shared.bin = 2 * threadIdx.x + i, shared.before = before;
            before += sums[i];
        }
        __syncthreads();
        const int bin = shared.bin;
        if (bin < 0)
            return most; // there are fewer
        goal -= shared.before;
        if (coarse) {
            begin = __float_as_uint(float(bin) / COARSE);
            end = bin == BINS - 1 ? end : min(end, __float_as_uint(float(bin + 1) / COARSE) - 1);
        } else {
            begin += uint32_t(bin) << shift;
            end = min(end, begin + (1u << shift) - 1);
        }
        __syncthreads();
    }
    return end;
}

// The token at which the weights' sum exceeds the fraction `uniform` of 2^64 of all of it. Each round narrows the row
// to one of as many pieces as there are warps.
template <typename T>
__device__ int find(const Row<T>& row, uint32_t limit, uint64_t uniform, Shared& shared) {
    const auto weight = [&](int i) {
        const uint32_t x = row.x(i);
        return x <= limit ? __float2ull_rn(likelihood(x) * float(1ull << WEIGHT_BITS)) : 0;
    };
    int begin = 0, end = row.vocab;
    uint64_t target = 0;
    for (bool first = true; first || end - begin > 32; first = false) {
        const int piece = (end - begin + WARPS - 1) / WARPS;
        const int own = begin + threadIdx.x / 32 * piece, own_end = min(own + piece, end);
        uint64_t sum = 0;
#pragma unroll 4
        for (int i = own + lane_id(); i < own_end; i += 32)
            sum += weight(i);
        sum = warp_sum(sum);
        if (lane_id() == 0)
            shared.of_warp[threadIdx.x / 32] = sum;
        __syncthreads();
        const uint64_t sums = shared.of_warp[lane_id()], scanned = warp_scan(sums);
        if (first)
            target = __umul64hi(uniform, __shfl_sync(FULL_WARP, scanned, 31));
        const uint32_t beyond = __ballot_sync(FULL_WARP, scanned > target);
        const int chosen = beyond ? __ffs(beyond) - 1 : 0;
        target -= __shfl_sync(FULL_WARP, scanned - sums, chosen);
        begin += chosen * piece, end = min(begin + piece, end);
        __syncthreads();
    }
    const uint64_t scanned = warp_scan(begin + lane_id() < end ? weight(begin + lane_id()) : 0);
    const uint32_t beyond = __ballot_sync(FULL_WARP, scanned > target);
    return beyond ? begin + __ffs(beyond) - 1 : 0;
}

__device__ inline uint64_t mix(uint64_t x) {
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x ^ x >> 31;
}

// keys: 64 bits, of which only halves need to be aligned. vector: whether rows are whole groups of eight at a multiple
// of 16 bytes.
template <typename T>
__device__ void draw(const T* scores, const float* settings, const int* top_k, const uint32_t* keys, const int* running,
                     int* lengths, int* tokens, int* reported, int vocab, bool vector) {
    __shared__ Shared shared;
    const int at = blockIdx.x, length = lengths[at];
    const float temperature = settings[3 * at], top_p = settings[3 * at + 1], min_p = settings[3 * at + 2];
    scores += int64_t(at) * vocab;
    const Place most = row_max(scores, vocab, vector, shared);
    int token = most.at;
    if (token >= 0 && temperature != 0) {
        const Row<T> row = {scores, vocab, most.score, fminf(__fdiv_rn(1.0f, temperature), 3.4028235e38f)};
        uint32_t limit = INFINITE;
        if (top_k[at] < vocab)
            limit = limit_of<false>(row, limit, max(top_k[at], 1), 0, shared);
        if (top_p < 1)
            limit = limit_of<true>(row, limit, 0, top_p, shared);
        limit = min(limit, __float_as_uint(fabsf(logf(min_p))));
        const uint64_t key = keys[2 * at] | uint64_t(keys[2 * at + 1]) << 32;
        const uint64_t bits = mix(key + uint32_t(length) * 0x9e3779b97f4a7c15ull) >> 16;
        token = find(row, limit, bits << 16, shared);
    }
    if (threadIdx.x == 0)
        lengths[at] = length + running[at], tokens[at] = max(token, 0), reported[at] = token;
}

#define DRAW(T, dtype)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                           \
        draw_##dtype(const T* scores, const float* settings, const int* top_k, const uint32_t* keys,                   \
                     const int* running, int* lengths, int* tokens, int* reported, int vocab, bool vector) {           \
        draw(scores, settings, top_k, keys, running, lengths, tokens, reported, vocab, vector);                        \
    }

DRAW(float, f32)
DRAW(f16, f16)
DRAW(bf16, bf16)
