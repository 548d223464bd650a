// Bound by bytes: a 16-bit element is 4 B forward and 6 B backward, and 4 B more where a residual is added; 8192 x 4096
// takes 31 and 47 us at 4.3 TB/s.
#include "memory.cuh"
#include "overlap.cuh"
#include "reduce.cuh"

constexpr int MAX_THREADS = 512;
constexpr int GROUPS = 2;  // of eight elements that a thread keeps in registers; what is longer is read again
constexpr int STRIP = 256; // columns of a CTA that sums over rows, eight a lane
constexpr int WARPS = 8;   // of that CTA, each with its own rows

// One row of a call and this thread's share of it.
struct Row {
    int64_t row;
    int columns; // none past the last row, whose threads must still meet the others
    int first;   // this thread's first column
    int lanes;   // threads that share the row: a power of two <= 32, or the whole CTA
    bool vector; // rows and weight are 16-byte aligned

    __device__ Row(int64_t rows, int columns, int lanes, bool vector) : lanes(lanes), vector(vector) {
        row = int64_t(blockIdx.x) * (blockDim.x / lanes) + threadIdx.x / lanes;
        this->columns = row < rows ? columns : 0;
        this->first = threadIdx.x % lanes * 8;
    }

    __device__ int column(int group) const { return first + group * lanes * 8; }

    template <typename T>
    __device__ Raw8<T> load(const T* x, int group) const {
        return load_raw8(x + row * columns, column(group), columns, vector);
    }

    template <typename T>
    __device__ void store(T* y, int group, const float (&v)[8]) const {
        store8_inside(y + row * columns, column(group), columns, vector, v);
    }
};

__device__ inline float reciprocal_root(float squares, int columns, float eps) {
    return __fdiv_rn(1.0f, __fsqrt_rn(squares / float(columns) + eps));
}

// What is normed: x, or the rounded sum of x and the residual, which is stored.
template <typename T>
__device__ Raw8<T> load_sum(const Row& row, const T* x, const T* residual, T* sum, int group) {
    Raw8<T> raw = row.load(x, group);
    if (residual == nullptr)
        return raw;
    float v[8], r[8];
    raw.unpack(v);
    row.load(residual, group).unpack(r);
#pragma unroll
    for (int i = 0; i < 8; ++i)
        v[i] += r[i];
    row.store(sum, group, v);
    raw.pack(v);
    return raw;
}

template <typename T>
__device__ float add_squares(float total, const Raw8<T>& raw) {
    float v[8];
    raw.unpack(v);
#pragma unroll
    for (int i = 0; i < 8; ++i)
        total += v[i] * v[i];
    return total;
}

template <typename T, typename W>
__device__ void store_normed(const Row& row, T* out, int group, float root, const Raw8<W>& weight, const Raw8<T>& raw) {
    float v[8], w[8];
    raw.unpack(v);
    weight.unpack(w);
#pragma unroll
    for (int i = 0; i < 8; ++i)
        v[i] = rounded<T>(v[i] * root) * w[i];
    row.store(out, group, v);
}

template <typename T, typename W>
__device__ void rms_norm(const T* x,        // [rows, columns]
                         const T* residual, // [rows, columns] or null
                         const W* weight,   // [columns]
                         T* sum,            // [rows, columns], null without a residual
                         T* out,            // [rows, columns]
                         float eps, const Row& row) {
    Raw8<T> v[GROUPS];
    Raw8<W> w[GROUPS];
    float total = 0.0f;
    let_next_kernel_start();
    wait_for_previous_kernel();
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
        v[g] = load_sum(row, x, residual, sum, g);
        w[g] = load_raw8(weight, row.column(g), row.columns, row.vector);
    }
#pragma unroll
    for (int g = 0; g < GROUPS; ++g)
        total = add_squares(total, v[g]);
    for (int g = GROUPS; row.column(g) < row.columns; ++g)
        total = add_squares(total, load_sum(row, x, residual, sum, g));
    const float root = reciprocal_root(threads_sum(total, row.lanes), row.columns, eps);
#pragma unroll
    for (int g = 0; g < GROUPS; ++g)
        store_normed(row, out, g, root, w[g], v[g]);
    for (int g = GROUPS; row.column(g) < row.columns; ++g)
        store_normed(row, out, g, root, load_raw8(weight, row.column(g), row.columns, row.vector),
                     row.load(residual == nullptr ? x : sum, g));
}

// The two sums that the gradient of a row needs.
struct Moments {
    float squares, slope; // of x * x and of grad * weight * x
};

template <typename T, typename W>
__device__ void add(Moments& m, const Raw8<T>& x, const Raw8<T>& grad, const Raw8<W>& weight) {
    float v[8], h[8], w[8];
    x.unpack(v), grad.unpack(h), weight.unpack(w);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        m.squares += v[i] * v[i];
        m.slope += h[i] * w[i] * v[i];
    }
}

// grad * weight * root - x * shrink, and the gradient that reaches the sum by the residual stream.
template <typename T, typename W>
__device__ void store_grad(const Row& row, const T* grad_sum, T* grad_x, int group, float root, float shrink,
                           const Raw8<T>& x, const Raw8<T>& grad, const Raw8<W>& weight) {
    float v[8], h[8], w[8], stream[8] = {};
    x.unpack(v), grad.unpack(h), weight.unpack(w);
    if (grad_sum != nullptr)
        row.load(grad_sum, group).unpack(stream);
#pragma unroll
    for (int i = 0; i < 8; ++i)
        h[i] = h[i] * w[i] * root - v[i] * shrink + stream[i];
    row.store(grad_x, group, h);
}

template <typename T, typename W>
__device__ void rms_norm_backward(const T* grad,     // [rows, columns], of out
                                  const T* x,        // [rows, columns], what was normed
                                  const W* weight,   // [columns]
                                  const T* grad_sum, // [rows, columns] or null
                                  T* grad_x,         // [rows, columns]
                                  float* roots,      // [rows] or null
                                  float eps, const Row& row) {
    Raw8<T> v[GROUPS], h[GROUPS];
    Raw8<W> w[GROUPS];
    Moments m = {0.0f, 0.0f};
    let_next_kernel_start();
    wait_for_previous_kernel();
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
        v[g] = row.load(x, g), h[g] = row.load(grad, g);
        w[g] = load_raw8(weight, row.column(g), row.columns, row.vector);
    }
#pragma unroll
    for (int g = 0; g < GROUPS; ++g)
        add(m, v[g], h[g], w[g]);
    for (int g = GROUPS; row.column(g) < row.columns; ++g)
        add(m, row.load(x, g), row.load(grad, g), load_raw8(weight, row.column(g), row.columns, row.vector));
    const float root = reciprocal_root(threads_sum(m.squares, row.lanes), row.columns, eps);
    const float shrink = threads_sum(m.slope, row.lanes) / float(row.columns) * root * root * root;
    if (roots != nullptr && row.first == 0 && row.columns > 0)
        roots[row.row] = root;
#pragma unroll
    for (int g = 0; g < GROUPS; ++g)
        store_grad(row, grad_sum, grad_x, g, root, shrink, v[g], h[g], w[g]);
    for (int g = GROUPS; row.column(g) < row.columns; ++g)
        store_grad(row, grad_sum, grad_x, g, root, shrink, row.load(x, g), row.load(grad, g),
                   load_raw8(weight, row.column(g), row.columns, row.vector));
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
#pragma unroll 2
    for (int64_t row = blockIdx.y * rows_a_slice + warp; row < end; row += WARPS) {
        float g[8], v[8];
        load8_or_zero(grad + row * columns, first, columns, vector, g);
        load8_or_zero(x + row * columns, first, columns, vector, v);
        const float root = roots[row];
#pragma unroll
        for (int i = 0; i < 8; ++i)
            total[i] += g[i] * rounded<T>(v[i] * root);
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
    if (column >= columns)
        return;
    float sum = 0.0f;
#pragma unroll 8
    for (int slice = 0; slice < slices; ++slice)
        sum += partials[slice * columns + column];
    grad_weight[column] = narrow<W>(sum);
}

// A name ends in the dtype of x and that of the weight.
#define ROWS(T, W, dtypes)                                                                                             \
    extern "C" __global__ void __launch_bounds__(MAX_THREADS) rms_norm_##dtypes(                                       \
        const T* x, const T* residual, const W* weight, T* sum, T* out, float eps, int64_t rows, int columns,          \
        int lanes, bool vector) {                                                                                      \
        rms_norm(x, residual, weight, sum, out, eps, Row(rows, columns, lanes, vector));                               \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(MAX_THREADS, 1) rms_norm_backward_##dtypes(                              \
        const T* grad, const T* x, const W* weight, const T* grad_sum, T* grad_x, float* roots, float eps,             \
        int64_t rows, int columns, int lanes, bool vector) {                                                           \
        rms_norm_backward(grad, x, weight, grad_sum, grad_x, roots, eps, Row(rows, columns, lanes, vector));           \
    }

ROWS(float, float, f32_f32)
ROWS(f16, float, f16_f32)
ROWS(f16, f16, f16_f16)
ROWS(bf16, float, bf16_f32)
ROWS(bf16, bf16, bf16_bf16)

#define COLUMNS(T, dtype)                                                                                              \
    extern "C" __global__ void __launch_bounds__(STRIP)                                                                \
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
