// paged_attention for 16-bit tensors on tensor cores (sm_80 and later): a byte of the cache is read once for all query
// heads that share it. A warp takes a block of the cache at a time, straight into registers.
//
// scores = K q: keys are operand A of mma.m16n8k16 and the heads its eight columns. The contraction is permuted so that
// 16 bytes of a key, as they lie, are a lane's part of two mma; the query is laid out in the same order.
// sums = V^T p: pairs of tokens make operand A; its rows, the elements of a value, are permuted for the same reason.
#include "mma.cuh"
#include "paged_attention.cuh"

constexpr int HEADS = 8; // of a tile: columns of one mma

#if __CUDA_ARCH__ >= 800

// An 8 x 8 matrix of 16 bits, two columns a lane, transposed.
__device__ inline uint32_t transposed(uint32_t pair) {
    uint32_t out;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pair));
    return out;
}

__device__ inline float columns_max(float value) {
#pragma unroll
    for (int step = 4; step < 32; step *= 2)
        value = fmaxf(value, __shfl_xor_sync(FULL_WARP, value, step));
    return value;
}

__device__ inline float columns_sum(float value) {
#pragma unroll
    for (int step = 4; step < 32; step *= 2)
        value += __shfl_xor_sync(FULL_WARP, value, step);
    return value;
}

template <int WORDS>
__device__ void load16(uint32_t (&to)[WORDS], int i, const void* from) {
    const uint4 raw = *reinterpret_cast<const uint4*>(from);
    to[4 * i] = raw.x, to[4 * i + 1] = raw.y, to[4 * i + 2] = raw.z, to[4 * i + 3] = raw.w;
}

// Codes in bytes 0 and 2 as two numbers of 16 bits, less their 128; exact.
template <typename T>
__device__ uint32_t decoded(uint32_t codes);

template <>
__device__ inline uint32_t decoded<f16>(uint32_t codes) {
    return add2<f16>(codes & 0x00ff00ffu | 0x64006400u, 0xe480e480u); // 1024 + code, - 1152
}

template <>
__device__ inline uint32_t decoded<bf16>(uint32_t codes) {
    // Eight bits are one too many for 128 + code: the upper half of the codes takes off 128, the lower half 256.
    const uint32_t low = codes & 0x007f007fu | 0x43004300u, offset = ~codes & 0x00800080u | 0xc300c300u;
    return add2<bf16>(low, offset);
}

// A block of the cache, as the lanes of a warp hold it for one key head. Lane 4 g + t takes part of the keys of tokens
// g and g + 8 and of the values of tokens 2 t, 2 t + 1, 2 t + 8 and 2 t + 9.
template <typename T, typename C, int D>
struct Block {
    using Weight = T;                    // what weights are rounded to
    static constexpr int STEPS = D / 16; // mma for the scores
    uint32_t key[2][D / 8], value[4][D / 16];

    // Where a query's element d lies among the 16-bit halves of B, [steps][heads][4 lanes][2 registers][2].
    __device__ static int query_place(int head, int d) {
        const int i = d / 32 * 4 + d % 8 / 2;
        return ((i / 2 * HEADS + head) * 4 + d % 32 / 8) * 4 + i % 2 * 2 + d % 2;
    }
    // Where a lane's keys begin.
    __device__ static int key_element(int i) { return 32 * i + lane_id() % 4 * 8; }
    // Where element e of a lane's values lies.
    __device__ static int value_element(int e) { return e / 8 * 64 + lane_id() / 4 * 8 + e % 8; }

    __device__ void load_key(int r, const C* from) {
#pragma unroll
        for (int i = 0; i < D / 32; ++i)
            load16(key[r], i, from + key_element(i));
    }

    __device__ void load_value(int r, const C* from) {
#pragma unroll
        for (int i = 0; i < D / 64; ++i)
            load16(value[r], i, from + value_element(8 * i));
    }

    __device__ uint32_t key_pair(int r, int i) const { return key[r][i]; }

    // Element e of two tokens.
    __device__ uint32_t value_pair(int r, int e) const {
        return __byte_perm(value[2 * r][e / 2], value[2 * r + 1][e / 2], e % 2 ? 0x7632 : 0x5410);
    }
};

template <typename T, int D>
struct Block<T, uint8_t, D> {
    using Weight = bf16; // its product with a scale is small without bound
    static constexpr int STEPS = D / 16;
    uint32_t key[2][D / 16], value[4][D / 32];

    __device__ static int query_place(int head, int d) {
        const int i = d / 64 * 8 + d % 16 / 4 * 2 + d % 2;
        return ((i / 2 * HEADS + head) * 4 + d % 64 / 16) * 4 + i % 2 * 2 + d % 4 / 2;
    }
    __device__ static int key_element(int i) { return 64 * i + lane_id() % 4 * 16; }
    __device__ static int value_element(int e) { return lane_id() / 4 * (D / 8) + e; }

    __device__ void load_key(int r, const uint8_t* from) {
#pragma unroll
        for (int i = 0; i < D / 64; ++i)
            load16(key[r], i, from + key_element(i));
    }

    __device__ void load_value(int r, const uint8_t* from) {
        if constexpr (D == 128) {
            load16(value[r], 0, from + value_element(0));
        } else {
            const uint2 raw = *reinterpret_cast<const uint2*>(from + value_element(0));
            value[r][0] = raw.x, value[r][1] = raw.y;
        }
    }

    __device__ uint32_t key_pair(int r, int i) const { return decoded<T>(key[r][i / 2] >> i % 2 * 8); }

    __device__ uint32_t value_pair(int r, int e) const {
        const uint32_t bytes = 0x4400u + 0x1111u * (e % 4);
        return decoded<Weight>(__byte_perm(value[2 * r][e / 4], value[2 * r + 1][e / 4], bytes));
    }
};

template <typename T, typename C, int D>
__device__ void paged_attention_mma(const Tensors<T, C>& x, const Shape& shape) {
    using Weight = typename Block<T, C, D>::Weight;
    constexpr bool CODES = sizeof(C) == 1;
    constexpr int STEPS = D / 16; // mma for the scores of a block
    constexpr int TILES = D / 16; // and for its values: row r of tile i is a lane's element r / 8 * TILES + i
    constexpr int STRIDE = WARPS * BLOCK;
    __shared__ uint2 query[STEPS][32]; // columns that no head has hold anything
    __shared__ Meeting<HEADS, D> meeting;
    __shared__ Cut cut; // the loop takes all registers
    __shared__ __align__(16) C new_key[D], new_value[D];
    __shared__ float new_scales[2];

    const Tile<T, C, HEADS> tile(x, shape);
    const int warp = threadIdx.x / 32, g = lane_id() / 4, t = lane_id() % 4;
    Block<T, C, D> block;
    float key_scale[2], value_scale[2];
    // Tokens that are not attended to repeat one that is: what others left there may be NaN.
    const auto attended = [&](int token, int first, const Cut& cut) {
        return max(cut.first - first, min(token, cut.length - 1 - first));
    };
    const auto load_keys = [&](int slot, int first, const Cut& cut) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            block.load_key(r, x.keys + tile.element(slot + g + 8 * r));
            if constexpr (CODES) {
                const int64_t at = tile.scale(slot) + attended(g + 8 * r, first, cut);
                key_scale[r] = x.key_scales[at], value_scale[r] = x.value_scales[at];
            }
        }
    };
    const auto load_values = [&](int slot, int first, const Cut& cut) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const int token = attended(2 * t + r % 2 + r / 2 * 8, first, cut);
            block.load_value(r, x.values + tile.element(slot + token));
        }
    };

    // Where this warp's tokens of a part begin, and the slot of those after them.
    int first = 0, next = 0;
    const auto slot_or_zero = [&](int token, int end) { return token < end ? tile.slot(token) : 0; };
    const auto begin = [&](int part, const Cut& cut) {
        first = (cut.begin(part) / BLOCK + warp) * BLOCK;
        if (first < cut.end(part)) {
            const int slot = tile.slot(first);
            next = slot_or_zero(first + STRIDE, cut.end(part));
            load_keys(slot, first, cut), load_values(slot, first, cut);
        }
    };

    let_next_kernel_start();
    // Length and table are nearly always known before the kernel before this one has ended, and older tokens too.
    const int guess = tile.length();
    Cut own = tile.cut(guess);
    if (int(blockIdx.x) < own.parts)
        begin(blockIdx.x, own);
    tile.prefetch(own, blockIdx.x);
    wait_for_previous_kernel();
    const int length = tile.length(); // on its way while the rest is read
    tile.template make_new<D>(new_key, new_value, new_scales, new_scales + 1);
#pragma unroll 4
    for (int i = threadIdx.x; i < tile.heads * D; i += THREADS) {
        const int head = i / D, d = i % D;
        reinterpret_cast<T*>(query)[Block<T, C, D>::query_place(head, d)] = tile.query(head, d);
    }
    if (length != guess) {
        own = tile.cut(length);
        if (int(blockIdx.x) < own.parts)
            begin(blockIdx.x, own);
    }
    if (own.parts == 0 && blockIdx.x == 0)
        tile.store_zeros();
    if (int(blockIdx.x) >= own.parts)
        return;

    if (threadIdx.x == 0)
        cut = own;
    __syncthreads();
    // Who reads the new token appends it.
    if ((own.parts - 1) % gridDim.x == blockIdx.x) {
        const int slot = tile.slot(own.length - 1);
        const int64_t to = tile.element(slot);
        for (int i = threadIdx.x; i < D; i += THREADS)
            x.keys[to + i] = new_key[i], x.values[to + i] = new_value[i];
        if (CODES && threadIdx.x == 0)
            x.key_scales[tile.scale(slot)] = new_scales[0], x.value_scales[tile.scale(slot)] = new_scales[1];
    }

    constexpr float SCALE = LOG2_E / (D == 64 ? 8 : 11.313708498984761f); // scores in powers of two
    static_assert(D == 64 || D == 128);
    for (int part = blockIdx.x;;) {
        const int end = cut.end(part);
        // Of a lane: heads 2 t and 2 t + 1.
        float sum[TILES][4] = {}, weight[2] = {}, most[2] = {LOWEST, LOWEST};
        for (; first < end; first += STRIDE) {
            const bool more = first + STRIDE < end;
            const int slot = next;
            next = slot_or_zero(first + 2 * STRIDE, end);
            if (const int newest = cut.length - 1 - first; newest < BLOCK) {
                // The new token was not there when its block was loaded; what follows it repeats it.
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    if (2 * t + r % 2 + r / 2 * 8 >= newest)
                        block.load_value(r, new_value);
                    if (r < 2 && g + 8 * r >= newest) {
                        block.load_key(r, new_key);
                        key_scale[r] = new_scales[0], value_scale[r] = new_scales[1];
                    }
                }
            }
            float score[4] = {}; // tokens g and g + 8, of each two heads
#pragma unroll
            for (int i = 0; i < STEPS; ++i) {
                const uint2 b = query[i][lane_id()];
                const uint32_t a[4] = {block.key_pair(0, 2 * i), block.key_pair(1, 2 * i), block.key_pair(0, 2 * i + 1),
                                       block.key_pair(1, 2 * i + 1)};
                multiply_add(T{}, score, a, b.x, b.y);
            }
            float value_factor[2];
            if constexpr (CODES) {
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    score[2 * r] *= key_scale[r], score[2 * r + 1] *= key_scale[r];
                    value_factor[r] = value_scale[r];
                }
            }
            if (more)
                load_keys(slot, first + STRIDE, cut);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int token = first + g + e / 2 * 8;
                score[e] = token >= cut.first && token < cut.length ? score[e] * SCALE : -INFINITY;
            }
            float keep[2];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const float top = columns_max(fmaxf(most[h], fmaxf(score[h], score[h + 2])));
                keep[h] = power_of_2(most[h] - top), most[h] = top;
                score[h] = power_of_2(score[h] - top), score[h + 2] = power_of_2(score[h + 2] - top);
            }
            uint32_t p[2];
            if constexpr (CODES) {
#pragma unroll
                for (int r = 0; r < 2; ++r)
                    p[r] = narrow2<Weight>(score[2 * r] * value_factor[r], score[2 * r + 1] * value_factor[r]);
                weight[0] = fmaf(weight[0], keep[0], score[0] + score[2]);
                weight[1] = fmaf(weight[1], keep[1], score[1] + score[3]);
            } else {
#pragma unroll
                for (int r = 0; r < 2; ++r)
                    p[r] = narrow2<Weight>(score[2 * r], score[2 * r + 1]);
                // What enters the weight is what multiplies the values.
                const auto low = [](uint32_t pair) { return widen(Weight{uint16_t(pair)}); };
                const auto high = [](uint32_t pair) { return widen(Weight{uint16_t(pair >> 16)}); };
                weight[0] = fmaf(weight[0], keep[0], low(p[0]) + low(p[1]));
                weight[1] = fmaf(weight[1], keep[1], high(p[0]) + high(p[1]));
            }
            const uint32_t b0 = transposed(p[0]), b1 = transposed(p[1]);
#pragma unroll
            for (int i = 0; i < TILES; ++i) {
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    sum[i][e] *= keep[e % 2];
                const uint32_t a[4] = {block.value_pair(0, i), block.value_pair(0, TILES + i), block.value_pair(1, i),
                                       block.value_pair(1, TILES + i)};
                multiply_add(Weight{}, sum[i], a, b0, b1);
            }
            if (more)
                load_values(slot, first + STRIDE, cut);
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int head = 2 * t + h;
            weight[h] = columns_sum(weight[h]);
            if (head >= tile.heads)
                continue;
            const auto element = [&](int e) { return sum[e % TILES][e / TILES * 2 + h]; };
#pragma unroll
            for (int e = 0; e < 2 * TILES; e += 4)
                *reinterpret_cast<float4*>(&meeting.sums[warp][head][block.value_element(e)]) =
                    make_float4(element(e), element(e + 1), element(e + 2), element(e + 3));
            if (g == 0)
                meeting.largest[warp][head] = most[h], meeting.weights[warp][head] = weight[h];
        }
        const int blocks = (cut.end(part) - 1) / BLOCK - cut.begin(part) / BLOCK + 1;
        meeting.add_warps(tile, min(WARPS, blocks), part, cut.parts);
        part += gridDim.x;
        if (part >= cut.parts)
            break;
        begin(part, cut);
    }
    if (cut.parts > 1)
        meeting.add_parts(tile, cut.parts);
}

// Most of its registers hold what is on its way: where the compiler needs a few more than a half, one CTA has to do.
constexpr int CTAS_OF_LONG_HEADS = __CUDA_ARCH__ == 900 ? 2 : 1;

#define PAGED_ATTENTION_MMA(name, CTAS, D, T, C)                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS, CTAS)                                                        \
        paged_attention_mma_##name(Tensors<T, C> x, Shape shape) {                                                     \
        paged_attention_mma<T, C, D>(x, shape);                                                                        \
    }

#else

#define PAGED_ATTENTION_MMA(name, CTAS, D, T, C)                                                                       \
    extern "C" __global__ void paged_attention_mma_##name(Tensors<T, C>, Shape) {}

#endif

PAGED_ATTENTION_MMA(64_f16, 2, 64, f16, f16)
PAGED_ATTENTION_MMA(64_bf16, 2, 64, bf16, bf16)
PAGED_ATTENTION_MMA(128_f16, CTAS_OF_LONG_HEADS, 128, f16, f16)
PAGED_ATTENTION_MMA(128_bf16, CTAS_OF_LONG_HEADS, 128, bf16, bf16)
PAGED_ATTENTION_MMA(codes_64_f16, 2, 64, f16, uint8_t)
PAGED_ATTENTION_MMA(codes_64_bf16, 2, 64, bf16, uint8_t)
PAGED_ATTENTION_MMA(codes_128_f16, 2, 128, f16, uint8_t)
PAGED_ATTENTION_MMA(codes_128_bf16, 2, 128, bf16, uint8_t)
