// Bound by bytes: a 16-bit element is 4 B forward and 6 B backward, and 4 B more where a residual is added; 8192 x 4096
// takes 31 and 47 us at 4.3 TB/s.
#include "memory.cuh"
#include "overlap.cuh"
#include "reduce.cuh"

constexpr int MAX_THREADS = 1024; // of a 16-bit row, eight elements each; what is longer is read again
constexpr int MAX_THREADS_F32 = 512;
constexpr int STRIP = 256; // columns of a CTA that sums over rows, eight a lane
constexpr int WARPS = 8;   // of that CTA, each with its own rows

// This thread's share of a row, and of the rows that its CTA takes one after the other.
struct Row {
    int row, rows;
    int columns; // of every row
    int first;   // this thread's first column
    int lanes;   // threads that share a row: a power of two <= 32, or the whole CTA
    bool vector; // rows and weight are 16-byte aligned

    __device__ Row(int rows, int columns, int lanes, bool vector)
        : rows(rows), columns(columns), lanes(lanes), vector(vector) {
        row = blockIdx.x * (blockDim.x / lanes) + threadIdx.x / lanes;
        first = threadIdx.x % lanes * 8;
    }

    // Whether the CTA has a row here; a thread may have none and must still meet the others.
    __device__ bool any() const { return row - int(threadIdx.x) / lanes < rows; }
    __device__ Row next() const {
        Row next = *this;
        next.row += gridDim.x * (blockDim.x / lanes);
        return next;
    }

    __device__ int column(int group) const { return first + group * lanes * 8; }
    __device__ int end() const { return row < rows ? columns : 0; }

    template <typename T>
    __device__ Raw8<T> load(const T* x, int group) const {
        return load_raw8(x + int64_t(row) * columns, column(group), end(), vector);
    }

    template <typename W>
    __device__ Raw8<W> load_weight(const W* weight, int group) const {
        return load_raw8(weight, column(group), columns, vector);
    }

    template <typename T>
    __device__ void store(T* y, int group, const Raw8<T>& raw) const {
        store_raw8(y + int64_t(row) * columns, column(group), end(), vector, raw);
    }
};

__device__ inline float reciprocal_root(float squares, int columns, float eps) {
    return __fdiv_rn(1.0f, __fsqrt_rn(squares / float(columns) + eps));
}

// What is normed is x, or the rounded sum of x and the residual, which is stored.
template <typename T>
struct Terms {
    Raw8<T> x, residual;

    __device__ void load(const Row& row, const T* from, const T* residual_from, int group) {
        x = row.load(from, group);
        if (residual_from != nullptr)
            residual = row.load(residual_from, group);
    }

    __device__ Raw8<T> sum(const Row& row, T* to, int group) const {
        if (to == nullptr)
            return x;
        float v[8], r[8];
        x.unpack(v), residual.unpack(r);
#pragma unroll
        for (int i = 0; i < 8; ++i)
            v[i] += r[i];
        Raw8<T> sum;
        sum.pack(v);
        row.store(to, group, sum);
        return sum;
    }
};

template <typename T>
__device__ float add_squares(float total, const Raw8<T>& raw) {
    float v[8];
    raw.unpack(v);
#pragma unroll
    for (int i = 0; i < 8; ++i)
        total = fmaf(v[i], v[i], total);
    return total;
}

template <typename T, typename W>
__device__ Raw8<T> normed(const Raw8<T>& raw, float root, const Raw8<W>& weight) {
    float v[8], w[8];
    raw.unpack(v), weight.unpack(w);
#pragma unroll
    for (int i = 0; i < 8; ++i)
        v[i] = rounded<T>(v[i] * root) * w[i];
    Raw8<T> out;
    out.pack(v);
    return out;
}

template <typename T, typename W>
__device__ void rms_norm(const T* x,        // [rows, columns]
                         const T* residual, // [rows, columns] or null
                         const W* weight,   // [columns]
                         T* sum,            // [rows, columns], null without a residual
                         T* out,            // [rows, columns]
                         float eps, Row row) {
    constexpr bool FITS = sizeof(W) == sizeof(T); // the weight beside three rows of terms
    // One row, whose terms make room for those of the row after the next: loads stay in flight while sums are made.
    const auto norm_row = [&](Terms<T>& terms) {
        Raw8<T> v = terms.sum(row, sum, 0);
        if (const Row later = row.next().next(); later.any())
            terms.load(later, x, residual, 0);
        Raw8<W> w;
        if (FITS)
            w = row.load_weight(weight, 0);
        float total[1] = {add_squares(0.0f, v)};
        for (int g = 1; row.column(g) < row.end(); ++g) {
            Terms<T> rest;
            rest.load(row, x, residual, g);
            total[0] = add_squares(total[0], rest.sum(row, sum, g));
        }
        threads_sum(total, row.lanes);
        const float root = reciprocal_root(total[0], row.columns, eps);
        v.stay_packed();
        if (!FITS)
            w = row.load_weight(weight, 0);
        row.store(out, 0, normed(v, root, w));
        for (int g = 1; row.column(g) < row.end(); ++g)
            row.store(out, g, normed(row.load(sum == nullptr ? x : sum, g), root, row.load_weight(weight, g)));
        row = row.next();
    };
    let_next_kernel_start();
    wait_for_previous_kernel();
    Terms<T> even, odd;
    even.load(row, x, residual, 0);
    if (row.next().any())
        odd.load(row.next(), x, residual, 0);
    while (row.any()) {
        norm_row(even);
        if (row.any())
            norm_row(odd);
    }
}

template <typename T>
struct Gradient {
    Raw8<T> x, grad;

    __device__ void load(const Row& row, const T* x_from, const T* grad_from, int group) {
        x = row.load(x_from, group), grad = row.load(grad_from, group);
    }

    // x * x and grad * weight * x.
    template <typename W>
    __device__ void add_to(float (&sums)[2], const Raw8<W>& weight) const {
        float v[8], h[8], w[8];
        x.unpack(v), grad.unpack(h), weight.unpack(w);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            sums[0] = fmaf(v[i], v[i], sums[0]);
            sums[1] = fmaf(rounded<T>(h[i] * w[i]), v[i], sums[1]);
        }
    }

    // grad * weight * root - x * shrink, and the gradient that reaches the sum by the residual stream, rounded as torch
    // rounds them.
    template <typename W>
    __device__ Raw8<T> of_x(float root, float shrink, const Raw8<W>& weight, const Raw8<T>& stream) const {
        float v[8], h[8], w[8], s[8];
        x.unpack(v), grad.unpack(h), weight.unpack(w), stream.unpack(s);
#pragma unroll
        for (int i = 0; i < 8; ++i)
            h[i] = rounded<T>(fmaf(rounded<T>(h[i] * w[i]), root, -v[i] * shrink)) + s[i];
        Raw8<T> out;
        out.pack(h);
        return out;
    }
};

template <typename T>
__device__ Raw8<T> load_or_zeros(const Row& row, const T* from, int group) {
    return from == nullptr ? Raw8<T>{} : row.load(from, group);
}

template <typename T, typename W>
__device__ void rms_norm_backward(const T* grad,     // [rows, columns], of out
                                  const T* x,        // [rows, columns], what was normed
                                  const W* weight,   // [columns]
                                  const T* grad_sum, // [rows, columns] or null
                                  T* grad_x,         // [rows, columns]
                                  float* roots,      // [rows] or null
                                  float eps, Row row) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    Gradient<T> coming;
    coming.load(row, x, grad, 0);
    for (; row.any(); row = row.next()) {
        Gradient<T> now = coming;
        const Raw8<T> stream = load_or_zeros(row, grad_sum, 0);
        if (const Row next = row.next(); next.any())
            coming.load(next, x, grad, 0);
        float sums[2] = {};
        now.add_to(sums, row.load_weight(weight, 0));
        for (int g = 1; row.column(g) < row.end(); ++g) {
            Gradient<T> rest;
            rest.load(row, x, grad, g);
            rest.add_to(sums, row.load_weight(weight, g));
        }
        now.x.stay_packed(), now.grad.stay_packed();
        threads_sum(sums, row.lanes);
        const float root = reciprocal_root(sums[0], row.columns, eps);
        const float shrink = sums[1] / float(row.columns) * root * root * root;
        if (roots != nullptr && row.first == 0 && row.row < row.rows)
            roots[row.row] = root;
        row.store(grad_x, 0, now.of_x(root, shrink, row.load_weight(weight, 0), stream));
#pragma unroll 1
        for (int g = 1; row.column(g) < row.end(); ++g) {
            Gradient<T> rest;
            rest.load(row, x, grad, g);
            const Raw8<T> of_sum = load_or_zeros(row, grad_sum, g);
            row.store(grad_x, g, rest.of_x(root, shrink, row.load_weight(weight, g), of_sum));
        }
    }
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
    extern "C" __global__ void __launch_bounds__(sizeof(T) == 4 ? MAX_THREADS_F32 : MAX_THREADS)                       \
        rms_norm_##dtypes(const T* x, const T* residual, const W* weight, T* sum, T* out, float eps, int rows,         \
                          int columns, int lanes, bool vector) {                                                       \
        rms_norm(x, residual, weight, sum, out, eps, Row(rows, columns, lanes, vector));                               \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(sizeof(T) == 4 ? MAX_THREADS_F32 : MAX_THREADS)                       \
        rms_norm_backward_##dtypes(const T* grad, const T* x, const W* weight, const T* grad_sum, T* grad_x,           \
                                   float* roots, float eps, int rows, int columns, int lanes, bool vector) {           \
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
