// Bound by bytes at M = 1: 0.516 B per weight with nested absmax, 28 us for 28672 x 8192 at 4.3 TB/s.
// Near M = 8 the fp32 multiply-adds, M per weight, take over.
#include "absmax.cuh"
#include "codes.cuh"
#include "memory.cuh"

constexpr int MAX_WARPS = 4; // warps of a CTA; they share its rows of W and split K
constexpr int UNIT = 32;     // weights of one 16-byte load; a unit never straddles two blocks

// One lane's units of ROWS neighbouring rows of W, as they lie in memory.
template <int ROWS>
struct Units {
    uint4 codes[ROWS];
    RawScale scale[ROWS];
};

template <int ROWS>
__device__ Units<ROWS> load_units(const uint4* packed, const Absmax& absmax, const uint32_t (&row)[ROWS], uint32_t u,
                                  int log2_units_a_block) {
    Units<ROWS> units;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const uint32_t i = row[r] + u;
        units.codes[r] = load_stream(packed + i);
        units.scale[r] = load_scale(absmax, i >> log2_units_a_block);
    }
    return units;
}

// acc[r][m] += scale[r] * sum of 32 products, inside the row. Each (r, m) adds in one order, whatever ROWS and M.
template <typename T, int ROWS, int M>
__device__ void multiply_units(const Units<ROWS>& units, const Absmax& absmax, float entry, const T* const (&x)[M],
                               uint32_t u, bool inside, float (&acc)[ROWS][M]) {
    float sum[ROWS][M] = {};
#pragma unroll
    for (int word = 0; word < 4; ++word) {
        float w[ROWS][8];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const uint4 c = units.codes[r];
            const uint32_t codes = word == 0 ? c.x : word == 1 ? c.y : word == 2 ? c.z : c.w;
#pragma unroll
            for (int i = 0; i < 8; ++i)
                w[r][i] = lookup16(entry, codes >> nibble_shift(i));
        }
#pragma unroll
        for (int m = 0; m < M; ++m) {
            float v[8];
            load8(x[m] + uint64_t(u) * UNIT + 8 * word, v);
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
#pragma unroll
                for (int i = 0; i < 8; ++i)
                    sum[r][m] = __fmaf_rn(w[r][i], v[i], sum[r][m]);
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const float scale = decode_scale(absmax, units.scale[r]);
#pragma unroll
        for (int m = 0; m < M; ++m)
            acc[r][m] = inside ? __fmaf_rn(scale, sum[r][m], acc[r][m]) : acc[r][m];
    }
}

// Lanes in butterfly order, then warps in ascending order.
template <typename T, int ROWS, int M>
__device__ void reduce_and_store(const float (&acc)[ROWS][M], T* out, int64_t rows_x, int64_t N, int64_t m0,
                                 int64_t n0) {
    __shared__ float of_warp[MAX_WARPS][ROWS * M];
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int m = 0; m < M; ++m) {
            const float sum = warp_sum(acc[r][m]);
            if (lane_id() == 0)
                of_warp[threadIdx.x / 32][r * M + m] = sum;
        }
    __syncthreads();
    const int r = threadIdx.x / M, m = threadIdx.x % M;
    if (r >= ROWS || n0 + r >= N || m0 + m >= rows_x)
        return;
    float sum = of_warp[0][threadIdx.x];
    for (int warp = 1; warp < blockDim.x / 32; ++warp)
        sum += of_warp[warp][threadIdx.x];
    out[(m0 + m) * N + n0 + r] = narrow<T>(sum);
}

// Rows of W that one CTA multiplies with M rows of x: each x is loaded once for all of them.
__device__ constexpr int rows_of(int M) { return M == 1 ? 4 : 2; }

// First of the M rows of x of this CTA.
template <int M>
__device__ int64_t first_x() {
    return (int64_t(blockIdx.z) * gridDim.y + blockIdx.y) * M;
}

template <int M, typename T>
__device__ void gemv_units(const T* x,            // [rows_x, K], K % 32 == 0, 16-byte aligned
                           const uint8_t* packed, // [N * K / 2], N * K < 2^36, 16-byte aligned
                           const Absmax& absmax,  // [ceil(N * K / blocksize)]
                           T* out,                // [rows_x, N]
                           int64_t rows_x, int64_t N, int64_t K,
                           int log2_blocksize, // 5..12
                           int quant_type) {   // row of the codebook tables
    constexpr int ROWS = rows_of(M);
    const float entry = CODEBOOK_4BIT[quant_type][lane_id() % 16];
    const uint4* codes = reinterpret_cast<const uint4*>(packed);
    const int64_t n0 = int64_t(blockIdx.x) * ROWS, m0 = first_x<M>();
    if (m0 >= rows_x)
        return;
    const uint32_t count = K / UNIT, step = blockDim.x;
    uint32_t row[ROWS];
    const T* xs[M];
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
        row[r] = min(n0 + r, N - 1) * count;
#pragma unroll
    for (int m = 0; m < M; ++m)
        xs[m] = x + min(m0 + m, rows_x - 1) * K;

    // Lanes past the end of a row repeat its last unit and add nothing.
    const uint32_t last = count - 1;
    uint32_t u = threadIdx.x, warp_u = u - lane_id();
    float acc[ROWS][M] = {};
    Units<ROWS> units, next;
    if (warp_u < count)
        next = load_units(codes, absmax, row, min(u, last), log2_blocksize - 5);
    for (; warp_u < count; warp_u += step, u += step) {
        units = next;
        if (warp_u + step < count)
            next = load_units(codes, absmax, row, min(u + step, last), log2_blocksize - 5);
        multiply_units(units, absmax, entry, xs, min(u, last), u < count, acc);
    }
    reduce_and_store(acc, out, rows_x, N, m0, n0);
}

// What follows takes any K, any alignment, and blocks that straddle rows. A lane has a word of eight codes, of which the
// first and the last of a row may hold codes of its neighbours: x is zero there.
constexpr int CODES = 8;           // of a word
constexpr int ANY_WARPS = CODES;   // of a CTA
constexpr int ANY_ROWS_A_WARP = 4; // so many rows apart that their words begin alike
constexpr int ANY_ROWS = ANY_WARPS * ANY_ROWS_A_WARP;

// Where element p of x lies in shared memory: words of neighbouring lanes then lie in different banks.
__device__ constexpr int spread(int p) { return p + p / CODES; }

// Words of a row that M rows of x are kept for at a time.
__device__ constexpr int words_at_once(int M) { return M == 1 ? 512 : 128; }

// The i-th word of all codes; zeros past the last byte.
__device__ inline uint32_t load_word(const uint8_t* packed, int64_t i, int64_t bytes, bool is_aligned) {
    const uint8_t* const from = packed + i * 4;
    const int64_t left = bytes - i * 4;
    if (is_aligned && left >= 4)
        return *reinterpret_cast<const uint32_t*>(from);
    uint32_t word = 0;
    for (int byte = 0; byte < min(left, int64_t(4)); ++byte)
        word |= uint32_t(from[byte]) << 8 * byte;
    return word;
}

// M rows of x from element `first` - CODES on, as fp32, zeros outside of the row.
template <int M, typename T, int COUNT>
__device__ void keep_x(const T* x, int64_t first, int64_t rows, int64_t K, float (&kept)[M][COUNT]) {
    constexpr int ELEMENTS = CODES * (words_at_once(M) + 1);
    __syncthreads(); // all have read what was here
    for (int i = threadIdx.x; i < M * ELEMENTS; i += 32 * ANY_WARPS) {
        const int m = i / ELEMENTS, p = i % ELEMENTS;
        const int64_t k = first + p - CODES;
        kept[m][spread(p)] = m < rows && k >= 0 && k < K ? widen(x[m * K + k]) : 0.0f;
    }
    __syncthreads();
}

template <int M, typename T>
__device__ void gemv_any(const T* x,            // [rows_x, K]
                         const uint8_t* packed, // [ceil(N * K / 2)]
                         const Absmax& absmax,  // [ceil(N * K / blocksize)]
                         T* out,                // [rows_x, N]
                         int64_t rows_x, int64_t N, int64_t K,
                         int log2_blocksize, // 5..12
                         int quant_type) {   // row of the codebook tables
    constexpr int WORDS = words_at_once(M), ROWS = ANY_ROWS_A_WARP;
    __shared__ float kept[M][spread(CODES * (WORDS + 1))];
    const int64_t m0 = first_x<M>(), rows = min(rows_x - m0, int64_t(M));
    if (m0 >= rows_x)
        return;
    const float entry = CODEBOOK_4BIT[quant_type][lane_id() % 16];
    const bool is_aligned = reinterpret_cast<uintptr_t>(packed) % 4 == 0;
    const int64_t n0 = int64_t(blockIdx.x) * ANY_ROWS + threadIdx.x / 32, n = min(n0, N - 1), bytes = (N * K + 1) / 2;
    const int shift = n * K % CODES; // codes of its first word that are not the row's
    const int64_t words = (shift + K + CODES - 1) / CODES, most = (K + 2 * (CODES - 1)) / CODES;
    int64_t first[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
        first[r] = (n + r * CODES < N ? n + r * CODES : n) * K / CODES;
    float acc[ROWS][M] = {};
    for (int64_t begin = 0; begin < most; begin += WORDS) {
        keep_x<M>(x + m0 * K, begin * CODES, rows, K, kept);
        for (int word = 0; word < WORDS && begin + word < words; word += 32) {
            const int mine = word + lane_id();
            const bool inside = begin + mine < words;
            const int64_t at = inside ? begin + mine : words - 1;
            uint32_t codes[ROWS];
            RawScale scale[ROWS];
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                codes[r] = load_word(packed, first[r] + at, bytes, is_aligned);
                scale[r] = load_scale(absmax, (first[r] + at) * CODES >> log2_blocksize);
            }
            float sum[ROWS][M] = {};
            const int from = mine * CODES + CODES - shift;
#pragma unroll
            for (int i = 0; i < CODES; ++i) {
                float v[M];
#pragma unroll
                for (int m = 0; m < M; ++m)
                    v[m] = kept[m][spread(from + i)];
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    const float w = lookup16(entry, codes[r] >> nibble_shift(i));
#pragma unroll
                    for (int m = 0; m < M; ++m)
                        sum[r][m] = __fmaf_rn(w, v[m], sum[r][m]);
                }
            }
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                const float factor = decode_scale(absmax, scale[r]);
#pragma unroll
                for (int m = 0; m < M; ++m)
                    acc[r][m] = inside ? __fmaf_rn(factor, sum[r][m], acc[r][m]) : acc[r][m];
            }
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int m = 0; m < M; ++m) {
            const float all = warp_sum(acc[r][m]);
            if (lane_id() == 0 && m < rows && n0 + r * CODES < N)
                out[(m0 + m) * N + n0 + r * CODES] = narrow<T>(all);
        }
}

#define GEMV_4BIT(name, body, warps, T)                                                                                \
    extern "C" __global__ void __launch_bounds__(32 * warps)                                                           \
        gemv_4bit_##name(const T* x, const uint8_t* packed, Absmax absmax, T* out, int64_t rows_x, int64_t N,          \
                         int64_t K, int log2_blocksize, int quant_type) {                                              \
        body(x, packed, absmax, out, rows_x, N, K, log2_blocksize, quant_type);                                        \
    }

#define GEMV_4BIT_DTYPE(T, dtype)                                                                                      \
    GEMV_4BIT(m1_##dtype, gemv_units<1>, MAX_WARPS, T)                                                                           \
    GEMV_4BIT(m2_##dtype, gemv_units<2>, MAX_WARPS, T)                                                                           \
    GEMV_4BIT(m4_##dtype, gemv_units<4>, MAX_WARPS, T)                                                                           \
    GEMV_4BIT(m8_##dtype, gemv_units<8>, MAX_WARPS, T)                                                                           \
    GEMV_4BIT(any_m1_##dtype, gemv_any<1>, ANY_WARPS, T)                                                               \
    GEMV_4BIT(any_m8_##dtype, gemv_any<8>, ANY_WARPS, T)

GEMV_4BIT_DTYPE(float, f32)
GEMV_4BIT_DTYPE(f16, f16)
GEMV_4BIT_DTYPE(bf16, bf16)
