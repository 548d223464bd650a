// Bound by bytes: a 16-bit element is 4 B forward and 6 B backward, and 4 B more where a residual is added; 8192 x 4096
// takes 31 and 47 us at 4.3 TB/s.
#include "memory.cuh"
#include "norm.cuh"
#include "overlap.cuh"
#include "reduce.cuh"

constexpr int MAX_THREADS = 512;
constexpr int HELD_BYTES = 64; // of a row by a thread, all their loads in flight at once; what is left is read again
constexpr int STRIP = 256;     // columns of a CTA that sums over rows, eight a lane
constexpr int WARPS = 8;       // of that CTA, each with its own rows

// This thread's share of a row of T, in groups of eight. Aligned rows are whole groups, each at a multiple of 16 bytes.
// A warp takes neighbouring groups at distances that the compiler knows, which spares a register pair for each address.
template <typename T, bool ALIGNED>
struct Row {
    static constexpr int PER_THREAD = HELD_BYTES / sizeof(T) / 8; // groups, before all threads go on
    static constexpr int HELD = ALIGNED ? PER_THREAD : 1;         // of these in registers

    int row;
    int columns;
    int end;   // columns, or 0 in a thread that has no row and must still meet the others
    int first; // this thread's first column
    int lanes; // threads that share a row: a power of two <= 32, or the whole CTA

    __device__ Row(int rows, int columns, int lanes) : columns(columns), lanes(lanes) {
        const int lane = threadIdx.x % lanes;
        row = blockIdx.x * (blockDim.x / lanes) + threadIdx.x / lanes;
        end = row < rows ? columns : 0;
        first = (lane / 32 * 32 * PER_THREAD + lane % 32) * 8;
    }

    // Where fewer than 32 lanes share a row, it is no longer than their first groups.
    __device__ int column(int group) const {
        return first + (group / PER_THREAD * lanes * PER_THREAD + group % PER_THREAD * 32) * 8;
    }

    __device__ Raw8<T> load(const T* x, int group) const {
        return load_before(x + int64_t(row) * columns, column(group), end);
    }

    template <typename W>
    __device__ Raw8<W> load_weight(const W* weight, int group) const {
        return load_before(weight, column(group), columns);
    }

    template <typename W>
    __device__ void prefetch_weight(const W* weight, int group) const {
        if (column(group) < columns)
            prefetch_l2(weight + column(group));
    }

    __device__ void store(T* y, int group, const Raw8<T>& raw) const {
        T* const to = y + int64_t(row) * columns;
        if (!ALIGNED)
            store_raw8(to, column(group), end, false, raw);
        else if (column(group) < end)
            raw.store(to + column(group));
    }

    template <typename V>
    __device__ static Raw8<V> load_before(const V* x, int first, int end) {
        Raw8<V> raw{};
        if (!ALIGNED)
            raw.load_some(x + first, end - first);
        else if (first < end)
            raw.load(x + first);
        return raw;
    }
};

// What is normed is x, or the rounded sum of x and the residual.
template <typename T>
__device__ Raw8<T> sum_of(const Raw8<T>& x, const Raw8<T>& residual) {
    float v[8], r[8];
    x.unpack(v), residual.unpack(r);
#pragma unroll
    for (int i = 0; i < 8; ++i)
        v[i] += r[i];
    Raw8<T> sum;
    sum.pack(v);
    return sum;
}

template <typename T>
__device__ float add_squares(float total, const Raw8<T>& raw) {
    float v[8];
    raw.unpack(v);
#pragma unroll
    for (int i = 0; i < 8; ++i)
        total = fmaf(v[i], v[i], total);
    return total;
}

template <bool ADDS, bool ALIGNED, typename T, typename W>
__device__ void norm_row(const T* x,        // [rows, columns]
                         const T* residual, // [rows, columns], null unless it ADDS
                         const W* weight,   // [columns]
                         T* sum,            // [rows, columns], null unless it ADDS
                         T* out,            // [rows, columns]
                         float eps, const Row<T, ALIGNED>& row) {
    constexpr int HELD = Row<T, ALIGNED>::HELD;
    Raw8<T> v[HELD], r[HELD];
    Raw8<W> w[HELD];
    const auto load_weights = [&] {
#pragma unroll
        for (int g = 0; g < HELD; ++g)
            w[g] = row.load_weight(weight, g);
    };
    if (!ADDS)
        load_weights();
#if __CUDA_ARCH__ >= 900
    else // there will be registers for them later; elsewhere nobody waits now
        for (int g = 0; g < HELD; ++g)
            row.prefetch_weight(weight, g);
#endif
    wait_for_previous_kernel();
#pragma unroll
    for (int g = 0; g < HELD; ++g) {
        v[g] = row.load(x, g);
        if (ADDS)
            r[g] = row.load(residual, g);
    }
    float total[1] = {};
#pragma unroll
    for (int g = 0; g < HELD; ++g) {
        if (ADDS) {
            v[g] = sum_of(v[g], r[g]);
            row.store(sum, g, v[g]);
        }
        total[0] = add_squares(total[0], v[g]);
        v[g].stay_packed();
    }
    if (ADDS)
        load_weights();
#pragma unroll 1
    for (int g = HELD; row.column(g) < row.end; ++g) {
        Raw8<T> rest = row.load(x, g);
        if (ADDS) {
            rest = sum_of(rest, row.load(residual, g));
            row.store(sum, g, rest);
        }
        total[0] = add_squares(total[0], rest);
    }
    threads_sum(total, row.lanes);
    const float root = reciprocal_root(total[0], row.columns, eps);
#pragma unroll
    for (int g = 0; g < HELD; ++g)
        row.store(out, g, multiplied(scaled(v[g], root), w[g]));
#pragma unroll 1
    for (int g = HELD; row.column(g) < row.end; ++g)
        row.store(out, g, multiplied(scaled(row.load(ADDS ? sum : x, g), root), row.load_weight(weight, g)));
}

template <typename T, typename W>
__device__ void rms_norm(const T* x, const T* residual, const W* weight, T* sum, T* out, float eps, int rows,
                         int columns, int lanes, bool vector) {
    let_next_kernel_start();
    if (!vector && residual != nullptr)
        norm_row<true>(x, residual, weight, sum, out, eps, Row<T, false>(rows, columns, lanes));
    else if (!vector)
        norm_row<false>(x, residual, weight, sum, out, eps, Row<T, false>(rows, columns, lanes));
    else if (residual != nullptr)
        norm_row<true>(x, residual, weight, sum, out, eps, Row<T, true>(rows, columns, lanes));
    else
        norm_row<false>(x, residual, weight, sum, out, eps, Row<T, true>(rows, columns, lanes));
}

// x * x and h * x, of h = rounded(grad * weight).
template <typename T>
__device__ void add_products(float (&sums)[2], const Raw8<T>& x, const Raw8<T>& h) {
    float v[8], u[8];
    x.unpack(v), h.unpack(u);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        sums[0] = fmaf(v[i], v[i], sums[0]);
        sums[1] = fmaf(u[i], v[i], sums[1]);
    }
}

// h * root - x * shrink, and the gradient that reaches the sum by the residual stream, rounded as torch rounds them.
template <typename T>
__device__ Raw8<T> grad_of_x(const Raw8<T>& x, const Raw8<T>& h, float root, float shrink, const Raw8<T>& stream) {
    float v[8], u[8], s[8];
    x.unpack(v), h.unpack(u), stream.unpack(s);
#pragma unroll
    for (int i = 0; i < 8; ++i)
        u[i] = rounded<T>(fmaf(u[i], root, -v[i] * shrink)) + s[i];
    Raw8<T> out;
    out.pack(u);
    return out;
}

template <bool ALIGNED, typename T, typename W>
__device__ void row_backward(const T* grad,     // [rows, columns], of out
                             const T* x,        // [rows, columns], what was normed
                             const W* weight,   // [columns]
                             const T* grad_sum, // [rows, columns] or null
                             T* grad_x,         // [rows, columns]
                             float* roots,      // [rows] or null
                             float eps, const Row<T, ALIGNED>& row) {
    constexpr int HELD = Row<T, ALIGNED>::HELD;
    Raw8<T> v[HELD], h[HELD], s[HELD] = {};
    wait_for_previous_kernel();
#pragma unroll
    for (int g = 0; g < HELD; ++g)
        v[g] = row.load(x, g), h[g] = row.load(grad, g);
    float sums[2] = {};
#pragma unroll
    for (int g = 0; g < HELD; ++g) {
        h[g] = multiplied(h[g], row.load_weight(weight, g));
        add_products(sums, v[g], h[g]);
        v[g].stay_packed(), h[g].stay_packed();
    }
    if (grad_sum != nullptr)
#pragma unroll
        for (int g = 0; g < HELD; ++g)
            s[g] = row.load(grad_sum, g);
#pragma unroll 1
    for (int g = HELD; row.column(g) < row.end; ++g)
        add_products(sums, row.load(x, g), multiplied(row.load(grad, g), row.load_weight(weight, g)));
    threads_sum(sums, row.lanes);
    const float root = reciprocal_root(sums[0], row.columns, eps);
    const float shrink = sums[1] / float(row.columns) * root * root * root;
    if (roots != nullptr && row.first == 0 && row.end > 0)
        roots[row.row] = root;
#pragma unroll
    for (int g = 0; g < HELD; ++g)
        row.store(grad_x, g, grad_of_x(v[g], h[g], root, shrink, s[g]));
#pragma unroll 1
    for (int g = HELD; row.column(g) < row.end; ++g) {
        const Raw8<T> of_h = multiplied(row.load(grad, g), row.load_weight(weight, g));
        const Raw8<T> of_sum = grad_sum == nullptr ? Raw8<T>{} : row.load(grad_sum, g);
        row.store(grad_x, g, grad_of_x(row.load(x, g), of_h, root, shrink, of_sum));
    }
}

template <typename T, typename W>
__device__ void rms_norm_backward(const T* grad, const T* x, const W* weight, const T* grad_sum, T* grad_x,
                                  float* roots, float eps, int rows, int columns, int lanes, bool vector) {
    let_next_kernel_start();
    if (vector)
        row_backward(grad, x, weight, grad_sum, grad_x, roots, eps, Row<T, true>(rows, columns, lanes));
    else
        row_backward(grad, x, weight, grad_sum, grad_x, roots, eps, Row<T, false>(rows, columns, lanes));
}

// The weight's gradient over one slice of rows and one strip of columns.
template <typename T>
__device__ void rms_norm_partials(const T* grad,      // [rows, columns]
                                  const T* x,         // [rows, columns]
                                  const float* roots, // [rows]
                                  float* partials,    // [slices, columns]
                                  int64_t rows, int64_t columns, int64_t rows_a_slice, bool vector) {
    __shared__ float of_warp[WARPS][STRIP];
    const int64_t first = int64_t(blockIdx.x) * STRIP + lane_id() * 8;
    const int64_t end = min(rows, (blockIdx.y + 1) * rows_a_slice);
    const int warp = threadIdx.x / 32;
    float total[8] = {};
    let_next_kernel_start();
    wait_for_previous_kernel();
#pragma unroll 4
    for (int64_t row = blockIdx.y * rows_a_slice + warp; row < end; row += WARPS) {
        float g[8], v[8];
        load8_or_zero(grad + row * columns, first, columns, vector, g);
        load8_or_zero(x + row * columns, first, columns, vector, v);
        const float root = roots[row];
#pragma unroll
        for (int i = 0; i < 8; ++i)
            total[i] = fmaf(g[i], rounded<T>(v[i] * root), total[i]);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
        of_warp[warp][i * 32 + lane_id()] = total[i];
    __syncthreads();
    const int64_t column = int64_t(blockIdx.x) * STRIP + threadIdx.x;
    if (column >= columns)
        return;
    float sum = 0.0f;
    for (int i = 0; i < WARPS; ++i)
        sum += of_warp[i][threadIdx.x % 8 * 32 + threadIdx.x / 8];
    partials[blockIdx.y * columns + column] = sum;
}

template <typename W>
__device__ void rms_norm_grad_weight(const float* partials, // [slices, columns]
                                     W* grad_weight,        // [columns]
                                     int64_t columns, int slices) {
    const int64_t column = int64_t(blockIdx.x) * STRIP + threadIdx.x;
    let_next_kernel_start();
    if (column >= columns)
        return;
    wait_for_previous_kernel();
    float sum = 0.0f;
#pragma unroll 8
    for (int slice = 0; slice < slices; ++slice)
        sum += partials[slice * columns + column];
    grad_weight[column] = narrow<W>(sum);
}

// A name ends in the dtype of x and that of the weight.
#define ROWS(T, W, dtypes)                                                                                             \
    extern "C" __global__ void __launch_bounds__(MAX_THREADS)                                                          \
        rms_norm_##dtypes(const T* x, const T* residual, const W* weight, T* sum, T* out, float eps, int rows,         \
                          int columns, int lanes, bool vector) {                                                       \
        rms_norm(x, residual, weight, sum, out, eps, rows, columns, lanes, vector);                                    \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(MAX_THREADS)                                                          \
        rms_norm_backward_##dtypes(const T* grad, const T* x, const W* weight, const T* grad_sum, T* grad_x,           \
                                   float* roots, float eps, int rows, int columns, int lanes, bool vector) {           \
        rms_norm_backward(grad, x, weight, grad_sum, grad_x, roots, eps, rows, columns, lanes, vector);                \
    }

ROWS(float, float, f32_f32)
ROWS(f16, float, f16_f32)
ROWS(f16, f16, f16_f16)
ROWS(bf16, float, bf16_f32)
ROWS(bf16, bf16, bf16_bf16)

// Of a CTA that sums over rows, on one multiprocessor; with four, what is in flight of 16 bits would spill there.
#if __CUDA_ARCH__ < 1000
constexpr int RESIDENT = 4;
#else
constexpr int RESIDENT = 3;
#endif

#define COLUMNS(T, dtype)                                                                                              \
    extern "C" __global__ void __launch_bounds__(STRIP, RESIDENT)                                                      \
        rms_norm_partials_##dtype(const T* grad, const T* x, const float* roots, float* partials, int64_t rows,        \
                                  int64_t columns, int64_t rows_a_slice, bool vector) {                                \
        rms_norm_partials(grad, x, roots, partials, rows, columns, rows_a_slice, vector);                              \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(STRIP)                                                                \
        rms_norm_grad_weight_##dtype(const float* partials, T* grad_weight, int64_t columns, int slices) {             \
        rms_norm_grad_weight(partials, grad_weight, columns, slices);                                                  \
    }

COLUMNS(float, f32)
COLUMNS(f16, f16)
COLUMNS(bf16, bf16)
