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

// Any K, any alignment, blocks that straddle rows: one warp a row of W, one weight a lane.
template <typename T>
__device__ void gemv_any(const T* x,            // [rows_x, K]
                         const uint8_t* packed, // [ceil(N * K / 2)]
                         const Absmax& absmax,  // [ceil(N * K / blocksize)]
                         T* out,                // [rows_x, N]
                         int64_t rows_x, int64_t N, int64_t K,
                         int log2_blocksize, // 5..12
                         int quant_type) {   // row of the codebook tables
    constexpr int M = 8;
    const int64_t n = int64_t(blockIdx.x) * MAX_WARPS + threadIdx.x / 32, m0 = first_x<M>();
    if (n >= N || m0 >= rows_x)
        return;
    const int64_t tile = min(rows_x - m0, int64_t(M));
    x += m0 * K, out += m0 * N + n;
    float acc[M] = {};
    for (int64_t k = lane_id(); k < K; k += 32) {
        const int64_t i = n * K + k;
        const uint32_t code = packed[i / 2] >> nibble_shift(i % 2) & 15;
        const float scale = decode_scale(absmax, load_scale(absmax, i >> log2_blocksize));
        const float w = __fmul_rn(CODEBOOK_4BIT[quant_type][code], scale);
#pragma unroll
        for (int m = 0; m < M; ++m)
            if (m < tile)
                acc[m] = __fmaf_rn(w, widen(x[m * K + k]), acc[m]);
    }
#pragma unroll
    for (int m = 0; m < M; ++m) {
        const float sum = warp_sum(acc[m]);
        if (lane_id() == 0 && m < tile)
            out[m * N] = narrow<T>(sum);
    }
}

#define GEMV_4BIT(name, body, T)                                                                                       \
    extern "C" __global__ void __launch_bounds__(32 * MAX_WARPS)                                                       \
        gemv_4bit_##name(const T* x, const uint8_t* packed, Absmax absmax, T* out, int64_t rows_x, int64_t N,          \
                         int64_t K, int log2_blocksize, int quant_type) {                                              \
        body(x, packed, absmax, out, rows_x, N, K, log2_blocksize, quant_type);                                        \
    }

#define GEMV_4BIT_DTYPE(T, dtype)                                                                                      \
    GEMV_4BIT(m1_##dtype, gemv_units<1>, T)                                                                            \
    GEMV_4BIT(m2_##dtype, gemv_units<2>, T)                                                                            \
    GEMV_4BIT(m4_##dtype, gemv_units<4>, T)                                                                            \
    GEMV_4BIT(m8_##dtype, gemv_units<8>, T)                                                                            \
    GEMV_4BIT(any_##dtype, gemv_any, T)

GEMV_4BIT_DTYPE(float, f32)
GEMV_4BIT_DTYPE(f16, f16)
GEMV_4BIT_DTYPE(bf16, bf16)
