// paged_attention for 16-bit tensors where every query head has a key head of its own (compute capability 9.0).
//
// CTAs are small enough to stand beside one of a product's: they copy older tokens to shared memory while the product
// before still runs, and the one after begins while they run. A chunk of 64 tokens is worked on at a time, whose keys,
// and then values, make way for the next chunk's as soon as they are used. A warp copies a block of 16 tokens and
// scores them: scores = K q, with keys for operand A of mma.m16n8k16. Then each warp takes all 64 tokens for a quarter
// of the elements: sums = V^T p. Operand B has eight equal columns, so that lanes 4 g + t have the same results for
// every t. The CTAs of a cluster take a row's parts in turns, and each adds up all parts for its slice of the elements.
#include "cluster.cuh"
#include "mma.cuh"
#include "paged_attention.cuh"
#include "pipeline.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int CHUNK = 64;
constexpr int PARTS = 16; // most of a row, and CTAs of a cluster
constexpr int CTA_WARPS = CHUNK / BLOCK, CTA = 32 * CTA_WARPS;

// Four 8 x 8 matrices of 16 bits.
__device__ inline void load_matrices(uint32_t (&m)[4], const void* from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(shared_address(from))
                 : "memory");
}

__device__ inline void load_transposed(uint32_t (&m)[4], const void* from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(shared_address(from))
                 : "memory");
}

__device__ inline void copy_word(void* to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ inline void wait_for_words() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Where a thread stands, made anew wherever it is used: that takes fewer registers than to keep what follows from it.
__device__ inline uint32_t anew(uint32_t value) {
    asm volatile("" : "+r"(value));
    return value;
}
__device__ inline uint32_t thread() { return anew(threadIdx.x); }
__device__ inline uint32_t warp() { return thread() / 32; }
__device__ inline uint32_t lane() { return thread() % 32; }

// Keys or values of a chunk, as copied: boxes of 128 bytes of a token, in swizzled order, so that eight rows of a
// matrix lie in different banks.
template <int D>
struct alignas(16) Chunk {
    static constexpr int PIECES = D / 8, BOX = 8; // of 16 bytes, of a token and of a box
    uint4 pieces[PIECES / BOX][CHUNK][BOX];

    __device__ uint4* piece(uint32_t token, uint32_t i) { return &pieces[i / BOX][token][i % BOX ^ token % 8]; }

    // Block `to` of the chunk becomes a block of the cache; by one lane.
    __device__ void copy(int to, const Map& map, int block, int kv_head, Barrier& done) {
        done.arrive_expecting(BLOCK * D * 2);
#pragma unroll
        for (int i = 0; i < PIECES / BOX; ++i)
            copy_box(pieces[i][to * BLOCK], &map, kv_head * D + i * BOX * 8, block * BLOCK, done);
    }
};

// A chunk: its part, and its first token.
struct Place {
    int part, first;
};

template <typename T, int D>
struct Shared {
    Chunk<D> keys, values;
    float scores[CHUNK];
    alignas(16) T query[D], new_key[D], new_value[D];
    Cut cut;
    Place now[CTA_WARPS], next[CTA_WARPS]; // of each warp: what it works on, and what it copies
    int blocks[CTA_WARPS];                 // of the cache, that each copies
    uint32_t parity[CTA_WARPS];            // of the copies that it waits for
    Barrier keys_in[CTA_WARPS], values_in[CTA_WARPS];
};

// Of a part so far; a lane has elements g and g + 8 of each tile of 16 of its warp.
template <int TILES>
struct Sums {
    float values[TILES][2] = {}, weight = 0, most = LOWEST;
};

template <typename T, int D>
struct Attention {
    const Tensors<T, T>& x;
    const Shape& shape;
    const Map &key_map, &value_map;
    Shared<T, D>& shared;

    static constexpr int PIECES = Chunk<D>::PIECES;
    static constexpr int TILES = D / 64;                                         // of 16 elements of values, of a warp
    static constexpr float SCALE = LOG2_E / (D == 64 ? 8 : 11.313708498984761f); // scores in powers of two
    static_assert(D == 64 || D == 128);

    __device__ void run() {
        let_next_kernel_start();
        cluster_arrive();
        if (lane() == 0) {
            shared.keys_in[warp()].init(1), shared.values_in[warp()].init(1), shared.parity[warp()] = 1;
            Barrier::publish();
        }
        __syncwarp();
        begin();
        __syncthreads();
        cluster_wait(); // all are there
        Sums<TILES> sums;
        while (now().part < cut().parts) {
            score();
            complete_values();
            __syncthreads();
            add(sums);
            __syncthreads();
            if (lane() == 0)
                copy_values(cut().length);
            if (next().part != now().part)
                hand_over(sums), sums = {};
            __syncwarp();
            if (lane() == 0)
                now() = next(), find_block(after(now(), cut()), cut().length);
            __syncwarp();
        }
        cluster_sync();
        add_parts();
    }

    __device__ int row() const { return anew(blockIdx.z); }
    __device__ int head() const { return anew(blockIdx.y); }
    // Where the head begins in [B, heads, D].
    __device__ int64_t first_element() const { return (int64_t(row()) * shape.heads + head()) * D; }
    __device__ const Cut& cut() const { return shared.cut; }
    __device__ static int first_of(const Cut& cut, int part) { return cut.start() + part * cut.part_size; }
    __device__ Place& now() const { return shared.now[warp()]; }
    __device__ Place& next() const { return shared.next[warp()]; }
    // Of a chunk, the first of the warp's own tokens.
    __device__ static int own(const Place& place) { return place.first + int(warp()) * BLOCK; }
    __device__ int block() const { return max(0, min(shared.blocks[warp()], shape.blocks - 1)); }

    // Weight and largest score of all parts; then sums [parts] of this CTA's slice of the elements.
    __device__ float2* scales_of_parts() const { return reinterpret_cast<float2*>(&shared + 1); }
    __device__ float* sums_of_parts() const { return reinterpret_cast<float*>(scales_of_parts() + cut().parts); }

    __device__ Place after(Place place, const Cut& cut) const {
        place.first += CHUNK;
        if (place.first >= min(first_of(cut, place.part + 1), cut.length))
            place.part += cluster_size(), place.first = first_of(cut, place.part);
        return place;
    }

    // By each warp's first lane: its block of a chunk, which is copied next.
    __device__ void find_block(const Place& place, int length) const {
        next() = place;
        if (const int token = own(place); token < length)
            copy_word(&shared.blocks[warp()], x.tables + int64_t(row()) * shape.table + token / BLOCK);
    }

    __device__ void copy_keys(int length) const {
        if (own(next()) >= length)
            return;
        wait_for_words();
        shared.keys.copy(warp(), key_map, block(), head(), shared.keys_in[warp()]);
    }

    __device__ void copy_values(int length) const {
        if (own(next()) >= length)
            return;
        shared.values.copy(warp(), value_map, block(), head(), shared.values_in[warp()]);
        shared.parity[warp()] ^= 1;
    }

    // Not through L1, which may be out of date once this kernel has waited for the one before it.
    __device__ int length() const { return __ldcg(x.lengths + row()); }

    // Length and table are nearly always known before the kernel before this one has ended, and older tokens too.
    __device__ void begin() const {
        for (int length = this->length();;) {
            const Cut guess(length, shape.table * BLOCK, shape.window, CHUNK, PARTS);
            if (thread() == 0)
                shared.cut = guess;
            if (lane() == 0) {
                const int rank = cluster_rank();
                find_block({rank, first_of(guess, rank)}, guess.length);
                now() = next();
                copy_keys(guess.length), copy_values(guess.length);
                find_block(after(now(), guess), guess.length);
            }
            wait_for_previous_kernel();
            const int known = this->length(); // on its way while the rest is read
            read_new();
            if (known == length)
                return;
            wait_for_words();
            __syncthreads();
            if (own(now()) < cut().length)
                shared.keys_in[warp()].wait(shared.parity[warp()]),
                    shared.values_in[warp()].wait(shared.parity[warp()]);
            __syncthreads();
            length = known;
        }
    }

    // The query and the new token: a warp a vector, of which a lane has elements 2 l and 2 l + 1 of each half.
    __device__ void read_new() const {
        if (warp() > 2 || lane() >= D / 4)
            return;
        const auto word = [](const T* v, int half) {
            return reinterpret_cast<const uint32_t*>(v)[lane() + half * (D / 4)];
        };
        const T* from = (warp() == 0 ? x.q : warp() == 1 ? x.k : x.v) + first_element();
        T* to = warp() == 0 ? shared.query : warp() == 1 ? shared.new_key : shared.new_value;
        uint32_t pairs[2] = {word(from, 0), word(from, 1)};
        if (warp() < 2) {
            const T *cos = x.cos + int64_t(row()) * D, *sin = x.sin + int64_t(row()) * D;
            const uint32_t first = turn(pairs[0], pairs[1], word(cos, 0), word(sin, 0));
            pairs[1] = turn(pairs[1], pairs[0], word(cos, 1), word(sin, 1)), pairs[0] = first;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half)
            reinterpret_cast<uint32_t*>(to)[lane() + half * (D / 4)] = pairs[half];
    }

    __device__ static uint32_t turn(uint32_t pair, uint32_t partner, uint32_t cos, uint32_t sin) {
        const uint32_t a = multiply2<T>(pair, cos), b = multiply2<T>(partner, sin);
        return narrow2<T>(__fadd_rn(low<T>(a), low<T>(b)), __fadd_rn(high<T>(a), high<T>(b)));
    }

    // Of the warp's own tokens; then their keys make way for the next chunk's.
    __device__ void score() const {
        float score[2][4] = {}; // tokens g and g + 8; of every other step
        const uint32_t warp = ::warp(), lane = ::lane(), g = lane / 4, t = lane % 4;
        if (const int newest = cut().length - 1 - own(now()); newest >= 0) {
            shared.keys_in[warp].wait(shared.parity[warp]);
            if (newest < BLOCK)
                append(newest);
            const uint32_t* q = reinterpret_cast<const uint32_t*>(shared.query) + t;
#pragma unroll
            for (int i = 0; i < PIECES; i += 2) {
                uint32_t m[4];
                load_matrices(m, shared.keys.piece(warp * BLOCK + lane % 16, i + lane / 16));
                multiply_add(T{}, score[i / 2 % 2], m, q[i * 4], q[i * 4 + 4]);
            }
        }
        if (t < 2) {
            const int at = g + t * 8, token = own(now()) + at;
            const float own_score = t == 0 ? score[0][0] + score[1][0] : score[0][2] + score[1][2];
            shared.scores[warp * BLOCK + at] =
                token >= cut().first && token < cut().length ? own_score * SCALE : -INFINITY;
        }
        __syncwarp();
        if (lane == 0)
            copy_keys(cut().length);
    }

    // Who reads the new token, `newest` of its block, appends it.
    __device__ void append(int newest) const {
        const int64_t to = (int64_t(block() * BLOCK + newest) * shape.kv_heads + head()) * D;
        for (uint32_t i = lane(); i < D / 2; i += 32) {
            const uint32_t key = reinterpret_cast<const uint32_t*>(shared.new_key)[i];
            reinterpret_cast<uint32_t*>(shared.keys.piece(warp() * BLOCK + newest, i / 4))[i % 4] = key;
            reinterpret_cast<uint32_t*>(x.keys + to)[i] = key;
            reinterpret_cast<uint32_t*>(x.values + to)[i] = reinterpret_cast<const uint32_t*>(shared.new_value)[i];
        }
        __syncwarp();
    }

    // Of the warp's own tokens: the new one was not there when they were copied, and what others left in place of
    // those that are not attended to may be NaN.
    __device__ void complete_values() const {
        const int newest = cut().length - 1 - own(now()), oldest = cut().first - own(now());
        if (newest < 0)
            return;
        shared.values_in[warp()].wait(shared.parity[warp()]);
        if (newest >= BLOCK && oldest <= 0)
            return;
        __syncwarp();
        for (uint32_t i = lane(); i < BLOCK * PIECES; i += 32) {
            const int token = i / PIECES;
            uint4* to = shared.values.piece(warp() * BLOCK + token, i % PIECES);
            if (token == newest)
                *to = reinterpret_cast<const uint4*>(shared.new_value)[i % PIECES];
            else if (token > newest || token < oldest)
                *to = uint4{};
        }
        order_before_bulk_copies();
    }

    // All tokens of the chunk, for a quarter of the elements.
    __device__ void add(Sums<TILES>& sums) const {
        // A lane has two tokens' weights.
        const float2 scores = reinterpret_cast<const float2*>(shared.scores)[lane()];
        float top = fmaxf(scores.x, scores.y);
#pragma unroll
        for (int step = 16; step > 0; step /= 2)
            top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, step));
        top = fmaxf(top, sums.most);
        const float keep = power_of_2(sums.most - top);
        const uint32_t pair = narrow2<T>(power_of_2(scores.x - top), power_of_2(scores.y - top));
        // What enters the weight is what multiplies the values.
        sums.weight = fmaf(sums.weight, keep, warp_sum(low<T>(pair) + high<T>(pair)));
        sums.most = top;
        float total[TILES][4];
#pragma unroll
        for (int i = 0; i < 4 * TILES; ++i)
            total[i / 4][i % 4] = sums.values[i / 4][i % 4 / 2] * keep;
        const int end = cut().length - now().first;
        const uint32_t warp = ::warp(), lane = ::lane();
#pragma unroll
        for (int i = 0; i < CHUNK && i < end; i += BLOCK) {
            const uint32_t p0 = __shfl_sync(FULL_WARP, pair, i / 2 + lane % 4);
            const uint32_t p1 = __shfl_sync(FULL_WARP, pair, i / 2 + 4 + lane % 4);
#pragma unroll
            for (int h = 0; h < TILES; ++h) {
                uint32_t m[4];
                load_transposed(
                    m, shared.values.piece(i + lane / 16 * 8 + lane % 8, 2 * (warp * TILES + h) + lane / 8 % 2));
                multiply_add(T{}, total[h], m, p0, p1);
            }
        }
#pragma unroll
        for (int i = 0; i < 2 * TILES; ++i)
            sums.values[i / 2][i % 2] = total[i / 2][i % 2 * 2];
    }

    // A part's sums go to the CTAs whose slices of the elements they are, its scales to all.
    __device__ void hand_over(const Sums<TILES>& sums) const {
        const uint32_t size = cluster_size(), slice = D / size; // a power of two
        // Of four lanes with the same elements each takes one.
        const uint32_t t = lane() % 4, element = warp() * 16 * TILES + t * 8 + lane() / 4;
        float value = sums.values[0][0];
#pragma unroll
        for (int i = 1; i < 2 * TILES; ++i)
            value = t == i ? sums.values[i / 2][i % 2] : value;
        if (t < 2 * TILES)
            store_in_cluster(address_in(sums_of_parts() + now().part * slice + element % slice, element / slice),
                             value);
        if (warp() == 0 && lane() < size)
            store_in_cluster(address_in(scales_of_parts() + now().part, lane()), sums.weight, sums.most);
    }

    // In their order, for this CTA's slice; without any the result is zero.
    __device__ void add_parts() const {
        const int slice = D / cluster_size(), element = thread(), parts = cut().parts;
        if (element >= slice)
            return;
        float top = LOWEST, total = 0, weight = 0;
#pragma unroll 4
        for (int p = 0; p < parts; ++p)
            top = fmaxf(top, scales_of_parts()[p].y);
#pragma unroll 4
        for (int p = 0; p < parts; ++p) {
            const float2 scales = scales_of_parts()[p];
            const float keep = power_of_2(scales.y - top);
            total = fmaf(sums_of_parts()[p * slice + element], keep, total);
            weight = fmaf(scales.x, keep, weight);
        }
        x.out[first_element() + cluster_rank() * slice + element] = narrow<T>(parts > 0 ? total / weight : 0.0f);
    }
};

// As many CTAs leave each thread 32 registers: what a product's CTA leaves free.
#define PAGED_ATTENTION_BULK(D, T, SHARED_BYTES)                                                                       \
    extern "C" __global__ void __launch_bounds__(CTA, 16) paged_attention_bulk_##D##_##T(                              \
        Tensors<T, T> x, Shape shape, const __grid_constant__ Map key_map, const __grid_constant__ Map value_map) {    \
        extern __shared__ __align__(1024) uint8_t dynamic[];                                                           \
        auto& shared = *reinterpret_cast<Shared<T, D>*>(dynamic);                                                      \
        static_assert(sizeof(shared) == SHARED_BYTES, "the launcher asks for so much");                                \
        Attention<T, D>{x, shape, key_map, value_map, shared}.run();                                                   \
    }

#else

#define PAGED_ATTENTION_BULK(D, T, SHARED_BYTES)                                                                       \
    extern "C" __global__ void paged_attention_bulk_##D##_##T(Tensors<T, T>, Shape, Map, Map) {}

#endif

PAGED_ATTENTION_BULK(64, f16, 17200)
PAGED_ATTENTION_BULK(64, bf16, 17200)
PAGED_ATTENTION_BULK(128, f16, 33968)
PAGED_ATTENTION_BULK(128, bf16, 33968)
