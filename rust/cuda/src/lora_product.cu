// x wᵀ + hidden bᵀ on Hopper's warpgroup instructions: one sum whose contraction goes on from x and w to hidden and b,
// so that an adapter costs its layer no second pass over the outputs. hidden = scaling x aᵀ may be made on the way.
//
// A CTA stays and takes tile after tile of out. One warp copies both operands through a ring of stages; two warpgroups
// multiply 64 rows each, and while one stores its half of a tile the other one still multiplies, or the next tile's
// stages come in. Tiles at the end are cut in two where that keeps more multiprocessors busy. Tiles of hidden are half
// as wide and come in front of those that read them, which have all of x to multiply before they do. Tiles are then
// taken from a queue: whoever waits does so for a tile that a running CTA has taken before.
#include "overlap.cuh"
#include "pipeline.cuh"
#include "scalars.cuh"
#include "wgmma.cuh"

// Of a tile.
constexpr int ROWS = 128;
constexpr int COLUMNS = 256;
constexpr int THREADS = 384;
constexpr int STEP = 64; // of the contraction

// Laid out as the launcher's. Maps of x and hidden have boxes of ROWS rows, those of w, b and a of 128, or of 64 where
// the contraction goes down their rows, those of out and made of 64; all of 64 columns.
struct alignas(128) Product {
    Map x, w, hidden, b, out;
    Map a, made; // made: what is written of hidden
    int tile_rows, tile_columns;
    int hidden_columns; // of tiles
    int whole, units;   // tiles that are not cut, and these with the halves of the others
    int steps_x, steps; // of x, and of x and hidden
    float scaling;
    // Tiles that are taken, then of each row of tiles the warpgroups that have stored their share of hidden; zeros
    // before. Null where hidden is there.
    uint32_t* progress;
};
static_assert(sizeof(Product) == 1024, "as the launcher's");

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int STAGES = 4;
constexpr int BAND = 16; // rows of tiles that go through all of w before the next ones, so that L2 holds theirs of x
constexpr int MULTIPLIERS = 256;

struct alignas(1024) Shared {
    uint16_t x[STAGES][ROWS][STEP];
    uint16_t w[STAGES][COLUMNS][STEP]; // transposed: squares of 64 columns of out by STEP
    uint16_t out[MULTIPLIERS / 128][2][64][64];
    int unit[STAGES]; // of which the stage is a part
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

// A tile of out, half of one, or a tile of hidden.
struct Tile {
    int row, column;
    bool of_hidden, half;

    __device__ Tile(const Product& p, int unit) {
        const bool cut = unit >= p.whole;
        const int tile = cut ? p.whole + (unit - p.whole) / 2 : unit;
        const int columns = p.hidden_columns + p.tile_columns;
        const int first = tile / (BAND * columns) * BAND, rows = min(p.tile_rows - first, BAND);
        const int in = tile - first * columns, place = in / rows;
        row = (first + in % rows) * ROWS;
        of_hidden = place < p.hidden_columns;
        half = cut || of_hidden;
        column = of_hidden ? place * (COLUMNS / 2) : (place - p.hidden_columns) * COLUMNS;
        if (cut)
            column += (unit - p.whole) % 2 * (COLUMNS / 2);
    }

    __device__ int steps(const Product& p) const { return of_hidden ? p.steps_x : p.steps; }

    // How many warpgroups have stored hidden values of these rows.
    __device__ uint32_t* stored(const Product& p) const { return p.progress + 1 + row / ROWS; }
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

// By one thread: the first unit of a CTA, or the one after `unit`.
__device__ int next_unit(const Product& p, int unit) {
    return p.progress ? atomicAdd(p.progress, 1) : unit + gridDim.x;
}

// By one thread, until all hidden values of a tile's rows are stored; bulk copies that are started after this see them.
__device__ void wait_for_hidden(const Product& p, const Tile& tile) {
    uint32_t seen;
    do
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(tile.stored(p)) : "memory");
    while (seen < p.hidden_columns * (MULTIPLIERS / 128));
    asm volatile("fence.proxy.async;" ::: "memory");
}

// By the thread that has stored a warpgroup's share of hidden.
__device__ void announce_hidden(const Product& p, const Tile& tile) {
    asm volatile("cp.async.bulk.wait_group 0;\n"
                 "fence.proxy.async;\n"
                 "red.release.gpu.global.add.u32 [%0], 1;" ::"l"(tile.stored(p))
                 : "memory");
}

// By one thread.
template <bool TRANSPOSED>
__device__ void copy(Shared& shared, const Product& p) {
    Place at;
    int unit = next_unit(p, blockIdx.x - gridDim.x);
    for (; unit < p.units; unit = next_unit(p, unit)) {
        const Tile tile(p, unit);
        const int columns = tile.half ? COLUMNS / 2 : COLUMNS;
        for (int step = 0; step < tile.steps(p); ++step, at.advance()) {
            const bool of_x = step < p.steps_x;
            const int k = (of_x ? step : step - p.steps_x) * STEP;
            const Map* const w = tile.of_hidden ? &p.a : of_x ? &p.w : &p.b;
            Barrier& full = shared.full[at.stage];
            if (p.progress && step == p.steps_x)
                wait_for_hidden(p, tile);
            shared.empty[at.stage].wait(at.parity ^ 1);
            shared.unit[at.stage] = unit;
            full.arrive_expecting((ROWS + columns) * STEP * 2);
            copy_box(shared.x[at.stage], of_x ? &p.x : &p.hidden, k, tile.row, full);
            for (int i = 0; i < columns; i += TRANSPOSED ? 64 : 128)
                copy_box(shared.w[at.stage][i], w, TRANSPOSED ? tile.column + i : k, TRANSPOSED ? k : tile.column + i,
                         full);
        }
    }
    shared.empty[at.stage].wait(at.parity ^ 1);
    shared.unit[at.stage] = unit;
    shared.full[at.stage].arrive();
}

// By a warpgroup: its rows of a tile, of which it stores 64 columns at a time.
template <typename T, int N>
__device__ void store(Shared& shared, const Map* to, const Tile& tile, int group, const float (&sum)[N / 2]) {
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
            store_box(to, tile.column + block * 64, tile.row + group * 64, out);
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
    for (int step = 0; step < tile.steps(p); ++step, at.advance()) {
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
    if (tile.of_hidden) {
#pragma unroll
        for (int i = 0; i < N / 2; ++i)
            sum[i] *= p.scaling;
    }
    store<T, N>(shared, tile.of_hidden ? &p.made : &p.out, tile, group, sum);
    if (tile.of_hidden && threadIdx.x % 128 == 0)
        announce_hidden(p, tile);
}

template <typename T, bool TRANSPOSED>
__device__ void multiply_all(Shared& shared, const Product& p) {
    const int group = threadIdx.x / 128;
    Place at;
    while (true) {
        shared.full[at.stage].wait(at.parity);
        const int unit = shared.unit[at.stage];
        if (unit >= p.units)
            break;
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
        take_registers<232>();
        multiply_all<T, TRANSPOSED>(shared, p);
    } else {
        give_up_registers<40>();
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
