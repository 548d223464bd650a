// x wᵀ + hidden bᵀ on Hopper's warpgroup instructions: one sum whose contraction goes on from x and w to hidden and b,
// so that an adapter costs its layer no second pass over the outputs.
//
// A CTA stays and takes tile after tile of out. One warp copies both operands through a ring of stages; two warpgroups
// multiply 64 rows each, and while one stores its half of a tile the other one still multiplies, or the next tile's
// stages come in. Tiles that would be a last wave of less than half of the multiprocessors are cut in two.
#include "overlap.cuh"
#include "pipeline.cuh"
#include "scalars.cuh"
#include "wgmma.cuh"

// Of a tile.
constexpr int ROWS = 128;
constexpr int COLUMNS = 256;
constexpr int THREADS = 384;
constexpr int STEP = 64; // of the contraction

// Laid out as the launcher's. Maps of x and hidden have boxes of ROWS rows, those of w and b of 128, or of 64 where the
// contraction goes down their rows, out's of 64; all of 64 columns.
struct alignas(128) Product {
    Map x, w, hidden, b, out;
    int tile_rows, tile_columns;
    int whole, units;   // tiles that are not cut, and these with the halves of the others
    int steps_x, steps; // of x, and of x and hidden
};
static_assert(sizeof(Product) == 768, "as the launcher's");

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int STAGES = 4;
constexpr int BAND = 16; // rows of tiles that go through all of w before the next ones, so that L2 holds theirs of x
constexpr int MULTIPLIERS = 256;

struct alignas(1024) Shared {
    uint16_t x[STAGES][ROWS][STEP];
    uint16_t w[STAGES][COLUMNS][STEP]; // transposed: squares of 64 columns of out by STEP
    uint16_t out[MULTIPLIERS / 128][2][64][64];
    Barrier full[STAGES], empty[STAGES];
};

// `d` (+)= a b of 64 rows, N columns and 16 elements of the contraction; a, b: descriptors of shared memory.
template <typename T, int N, bool TRANSPOSED>
struct Wgmma;

#define WGMMA(T, dtype, N, SUMS, A, B, ADDS, TRANSPOSED, ...)                                                          \
    template <>                                                                                                        \
    struct Wgmma<T, N, TRANSPOSED> {                                                                                   \
        static __device__ void run(float (&d)[N / 2], uint64_t a, uint64_t b, bool adds) {                             \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADDS ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N         \
                         "k16.f32." #dtype "." #dtype " {" SUMS "}, " A ", " B ", p, 1, 1, 0, " #TRANSPOSED ";\n}"     \
                         : __VA_ARGS__                                                                                 \
                         : "l"(a), "l"(b), "r"(int(adds)));                                                            \
        }                                                                                                              \
    };

#define WGMMAS(T, dtype, TRANSPOSED)                                                                                   \
    WGMMA(T, dtype, 128, S3, "%64", "%65", "%66", TRANSPOSED, D64)                                                     \
    WGMMA(T, dtype, 256, S4, "%128", "%129", "%130", TRANSPOSED, D128)

WGMMAS(bf16, bf16, 0)
WGMMAS(bf16, bf16, 1)
WGMMAS(f16, f16, 0)
WGMMAS(f16, f16, 1)

__device__ inline void store_matrices(void* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(to)), "r"(a),
                 "r"(b), "r"(c), "r"(d)
                 : "memory");
}

// A tile, or half of one.
struct Tile {
    int row, column;
    bool half;

    __device__ Tile(const Product& p, int unit) : half(unit >= p.whole) {
        const int tile = half ? p.whole + (unit - p.whole) / 2 : unit;
        const int first = tile / (BAND * p.tile_columns) * BAND, rows = min(p.tile_rows - first, BAND);
        const int in = tile - first * p.tile_columns;
        row = (first + in % rows) * ROWS;
        column = in / rows * COLUMNS + (half ? (unit - p.whole) % 2 * (COLUMNS / 2) : 0);
    }
};

// The place in the ring of stages, and the parity of its phase.
struct Place {
    int stage = 0;
    uint32_t parity = 0;

    __device__ void advance() {
        if (++stage == STAGES)
            stage = 0, parity ^= 1;
    }
};

// By one thread.
template <bool TRANSPOSED>
__device__ void copy(Shared& shared, const Product& p) {
    Place at;
    for (int unit = blockIdx.x; unit < p.units; unit += gridDim.x) {
        const Tile tile(p, unit);
        const int columns = tile.half ? COLUMNS / 2 : COLUMNS;
        for (int step = 0; step < p.steps; ++step, at.advance()) {
            const bool of_x = step < p.steps_x;
            const int k = (of_x ? step : step - p.steps_x) * STEP;
            const Map* const w = of_x ? &p.w : &p.b;
            Barrier& full = shared.full[at.stage];
            shared.empty[at.stage].wait(at.parity ^ 1);
            full.arrive_expecting((ROWS + columns) * STEP * 2);
            copy_box(shared.x[at.stage], of_x ? &p.x : &p.hidden, k, tile.row, full);
            for (int i = 0; i < columns; i += TRANSPOSED ? 64 : 128)
                copy_box(shared.w[at.stage][i], w, TRANSPOSED ? tile.column + i : k, TRANSPOSED ? k : tile.column + i,
                         full);
        }
    }
}

// By a warpgroup: its rows of a tile, of which it stores 64 columns at a time.
template <typename T, int N>
__device__ void store(Shared& shared, const Product& p, const Tile& tile, int group, const float (&sum)[N / 2]) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane % 16;
    const bool leads = threadIdx.x % 128 == 0;
#pragma unroll
    for (int block = 0; block < N / 64; ++block) {
        uint16_t (&out)[64][64] = shared.out[group][block % 2];
        if (leads)
            wait_for_stores<1>();
        asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float* const v = &sum[block * 32 + i * 8];
            const int chunk = (i * 2 + lane / 16) ^ row % 8;
            store_matrices(&out[row][chunk * 8], narrow2<T>(v[0], v[1]), narrow2<T>(v[2], v[3]), narrow2<T>(v[4], v[5]),
                           narrow2<T>(v[6], v[7]));
        }
        order_before_bulk_copies();
        asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
        if (leads)
            store_box(&p.out, tile.column + block * 64, tile.row + group * 64, out);
    }
}

// By a warpgroup: its rows of a tile of N columns.
template <typename T, int N, bool TRANSPOSED>
__device__ void multiply(Shared& shared, const Product& p, const Tile& tile, int group, Place& at) {
    float sum[N / 2];
    int previous = 0;
    const auto release = [&] {
        if (threadIdx.x % 128 == 0)
            shared.empty[previous].arrive();
    };
    for (int step = 0; step < p.steps; ++step, at.advance()) {
        shared.full[at.stage].wait(at.parity);
        const uint64_t a = swizzled_rows(shared.x[at.stage][group * 64]);
        const void* const w = shared.w[at.stage];
        const uint64_t b = TRANSPOSED ? swizzled_columns(w, 64 * STEP * 2) : swizzled_rows(w);
        hold(sum);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int k = 0; k < STEP / 16; ++k)
            Wgmma<T, N, TRANSPOSED>::run(sum, a + k * 2, b + k * (TRANSPOSED ? 128 : 2), step + k > 0);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        if (step > 0)
            release();
        previous = at.stage;
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    hold(sum);
    release();
    store<T, N>(shared, p, tile, group, sum);
}

template <typename T, bool TRANSPOSED>
__device__ void multiply_all(Shared& shared, const Product& p) {
    const int group = threadIdx.x / 128;
    Place at;
    for (int unit = blockIdx.x; unit < p.units; unit += gridDim.x) {
        const Tile tile(p, unit);
        if (tile.half)
            multiply<T, COLUMNS / 2, TRANSPOSED>(shared, p, tile, group, at);
        else
            multiply<T, COLUMNS, TRANSPOSED>(shared, p, tile, group, at);
    }
    if (threadIdx.x % 128 == 0)
        wait_for_stores<0>();
}

template <typename T, bool TRANSPOSED>
__device__ void lora_product(const Product& p) {
    extern __shared__ char dynamic[];
    // Swizzling goes by addresses.
    Shared& shared = *reinterpret_cast<Shared*>(dynamic + (-shared_address(dynamic) & 1023));
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i)
            shared.full[i].init(1), shared.empty[i].init(MULTIPLIERS / 128);
        Barrier::publish();
    }
    __syncthreads();
    if (threadIdx.x < MULTIPLIERS) {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        multiply_all<T, TRANSPOSED>(shared, p);
    } else {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x < MULTIPLIERS + 32 && elected()) {
            wait_for_previous_kernel();
            copy<TRANSPOSED>(shared, p);
        }
    }
}
static_assert(sizeof(Shared) == 230400, "the launcher asks for so much");

#else

template <typename T, bool TRANSPOSED>
__device__ void lora_product(const Product&) {}

#endif

// Grid: at most a CTA for each multiprocessor.
#define LORA_PRODUCT(name, ...)                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) lora_product_##name(const __grid_constant__ Product p) {  \
        lora_product<__VA_ARGS__>(p);                                                                                  \
    }

LORA_PRODUCT(bf16, bf16, false)
LORA_PRODUCT(transposed_bf16, bf16, true)
LORA_PRODUCT(f16, f16, false)
LORA_PRODUCT(transposed_f16, f16, true)
