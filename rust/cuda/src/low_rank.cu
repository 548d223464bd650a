// The adapters' hidden values factors * (x Aᵀ), rounded as a linear layer and the scaling behind it round them.
//
// A cluster makes those of eight ranks and 16 rows of x by mma.m16n8k16: its CTAs share K, each sends its part of a row
// to the one that adds this row up. The order of a sum follows from K alone. A is read before x is there.
//
// One warp says when x is there: the product behind this launch needs it before the hidden values.
#include "cluster.cuh"
#include "low_rank.cuh"
#include "overlap.cuh"

constexpr int MAX_ADAPTERS = 4;

// Laid out as the launcher's `Adapter`.
struct Adapter {
    const void* a;        // [rank, K], fp32 or as x
    const float* factors; // [rows of x, rank], null where scaling is all
    float scaling;
    int rank, column; // of the first hidden value
};

// Laid out as the launcher's `Job`.
struct Job {
    const void* x;     // [rows_x, K]
    void* hidden;      // [rows_x, ranks], as x
    uint32_t* arrived; // zero
    int K, rows_x, ranks;
    bool adapters_fp32;
    Adapter adapters[MAX_ADAPTERS];
};

#if __CUDA_ARCH__ >= 900

constexpr int CTAS = 16; // of a cluster, each of one warp; and rows of x
constexpr int TILE = 8;  // ranks
constexpr int STEP = 32; // elements of K: eight of a lane
constexpr int AHEAD = 8; // steps on their way at once

// Of the cluster's ranks among those of its adapter.
__device__ inline int first_rank() { return blockIdx.x / CTAS * TILE; }

__device__ inline void wait_for_x(uint32_t* arrived) {
    wait_for_previous_kernel();
    if (blockIdx.x + blockIdx.y + blockIdx.z + threadIdx.x == 0)
        announce_end(arrived);
}

template <typename T, typename A>
struct Contract {
    const A* a; // where the warp begins in the lane's row, or in the last one
    const T* x; // and in rows g and, `eight` elements further, g + 8
    int64_t eight;
    int steps, rows; // of x from g on
    uint32_t* arrived;

    __device__ Contract(const Job& job, const Adapter& adapter) : eight(8 * int64_t(job.K)), arrived(job.arrived) {
        const int all = job.K / STEP, first = all * cluster_rank() / CTAS, k = first * STEP + lane_id() % 4 * 8;
        const int rank = min(first_rank() + lane_id() / 4, adapter.rank - 1), row = blockIdx.y * CTAS + lane_id() / 4;
        a = static_cast<const A*>(adapter.a) + int64_t(rank) * job.K + k;
        x = static_cast<const T*>(job.x) + int64_t(row) * job.K + k;
        steps = all * (cluster_rank() + 1) / CTAS - first, rows = job.rows_x - row;
    }

    // A's elements are rounded to x's dtype, as the layer uses them.
    __device__ void load_a(int step, Raw8<T> (&of_a)[AHEAD]) const {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            float v[8] = {};
            if (step + i < steps)
                load8(a + (step + i) * STEP, v);
            of_a[i].pack(v);
        }
    }

    __device__ void load_x(int step, Raw8<T> (&of_x)[AHEAD][2]) const {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                of_x[i][half] = {};
                if (step + i < steps && half * 8 < rows)
                    of_x[i][half].load(x + half * eight + (step + i) * STEP);
            }
    }

    // The warp's part of rows g and g + 8 of x at ranks 2 t and 2 t + 1.
    __device__ void run(float (&sum)[4]) const {
        Raw8<T> of_a[AHEAD], of_x[AHEAD][2];
        load_a(0, of_a);
        wait_for_x(arrived);
#pragma unroll 1
        for (int step = 0; step < steps; step += AHEAD) {
            load_x(step, of_x);
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) {
                const uint4 b = of_a[i].words, upper = of_x[i][0].words, lower = of_x[i][1].words;
                const uint32_t a0[4] = {upper.x, lower.x, upper.y, lower.y};
                const uint32_t a1[4] = {upper.z, lower.z, upper.w, lower.w};
                multiply_add(T{}, sum, a0, b.x, b.y);
                multiply_add(T{}, sum, a1, b.z, b.w);
            }
            load_a(step + AHEAD, of_a);
        }
    }
};

// All parts of the row of x that this CTA adds up.
__device__ inline float sum_of_parts(const float (&parts)[CTAS][TILE]) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < CTAS; i += 32 / TILE)
        sum += parts[i + lane_id() / TILE][lane_id() % TILE];
#pragma unroll
    for (int lanes = TILE; lanes < 32; lanes *= 2)
        sum += __shfl_xor_sync(FULL_WARP, sum, lanes);
    return sum;
}

template <typename T>
__device__ void finish(const Job& job, const Adapter& adapter, int row, float dot) {
    const int rank = first_rank() + lane_id();
    if (lane_id() >= TILE)
        return;
    float value = 0;
    if (rank < adapter.rank) {
        const float* factors = adapter.factors + int64_t(row) * adapter.rank;
        value = rounded<T>(dot) * (adapter.factors == nullptr ? adapter.scaling : factors[rank]);
    }
    static_cast<T*>(job.hidden)[int64_t(row) * job.ranks + adapter.column + rank] = narrow<T>(value);
}

template <typename T>
__device__ void make_hidden(const Job& job, const Adapter& adapter) {
    __shared__ alignas(8) float parts[CTAS][TILE];
    cluster_arrive();
    float sum[4] = {};
    if (job.adapters_fp32)
        Contract<T, float>(job, adapter).run(sum);
    else
        Contract<T, T>(job, adapter).run(sum);
    cluster_wait(); // all are there
    const float* own = &parts[cluster_rank()][lane_id() % 4 * 2];
#pragma unroll
    for (int half = 0; half < 2; ++half)
        store_in_cluster(address_in(own, lane_id() / 4 + half * 8), sum[2 * half], sum[2 * half + 1]);
    cluster_sync();
    const int row = blockIdx.y * CTAS + cluster_rank();
    if (row < job.rows_x)
        finish<T>(job, adapter, row, sum_of_parts(parts));
}

template <typename T>
__device__ void run(const Job& job) {
    let_next_kernel_start();
    if (const Adapter& adapter = job.adapters[blockIdx.z]; first_rank() < padded(adapter.rank))
        make_hidden<T>(job, adapter);
}

#else

template <typename T>
__device__ void run(const Job&) {}

#endif

// x and A 16-byte aligned, K % 32 == 0; grid (16 * eighths of the highest rank, tiles of 16 rows of x, adapters),
// clusters of 16.
#define LOW_RANK(T, dtype)                                                                                             \
    extern "C" __global__ void __launch_bounds__(32, 16) low_rank_##dtype(const __grid_constant__ Job job) {           \
        run<T>(job);                                                                                                   \
    }

LOW_RANK(f16, f16)
LOW_RANK(bf16, bf16)
