// The warp of gemv_4bit_bulk that decodes scales.
#pragma once
#include "bulk.cuh"

#if HAS_ROOM

// Four neighbouring scales of a weight, the first of them at `at`, the weight's last at `last`; ALIGNED: at multiples
// of four.
template <bool ALIGNED>
struct NestedScales {
    static constexpr bool IS_ALIGNED = ALIGNED;
    uint32_t codes, more, at;
    float nested, next;

    __device__ void read(const uint8_t* from, const float* scales, uint32_t at_, uint32_t last) {
        at = at_;
        codes = __ldg(reinterpret_cast<const uint32_t*>(from) + at / 4);
        nested = __ldg(scales + at / 256);
        if (ALIGNED)
            return;
        more = __ldg(reinterpret_cast<const uint32_t*>(from) + min(at / 4 + 1, last / 4));
        next = __ldg(scales + min(at + QUAD - 1, last) / 256);
    }

    __device__ void look_up(const Table& table, float (&v)[QUAD]) const {
        const uint32_t word = ALIGNED ? codes : __funnelshift_r(codes, more, at % 4 * 8);
#pragma unroll
        for (int j = 0; j < QUAD; ++j)
            v[j] = table.scale(word, j);
    }

    __device__ void scale(float offset, float (&v)[QUAD]) const {
#pragma unroll
        for (int j = 0; j < QUAD; ++j)
            v[j] = __fadd_rn(__fmul_rn(v[j], ALIGNED || at % 256 + j < 256 ? nested : next), offset);
    }
};

template <bool ALIGNED>
struct PlainScales {
    static constexpr bool IS_ALIGNED = ALIGNED;
    float values[QUAD];

    __device__ void read(const uint8_t* from, const float*, uint32_t at, uint32_t last) {
        const float* scales = reinterpret_cast<const float*>(from);
        if (ALIGNED) {
            const float4 v = __ldg(reinterpret_cast<const float4*>(scales + at));
            values[0] = v.x, values[1] = v.y, values[2] = v.z, values[3] = v.w;
            return;
        }
#pragma unroll
        for (int j = 0; j < QUAD; ++j)
            values[j] = __ldg(scales + min(at + j, last));
    }

    __device__ void look_up(const Table&, float (&v)[QUAD]) const {
#pragma unroll
        for (int j = 0; j < QUAD; ++j)
            v[j] = values[j];
    }

    __device__ void scale(float, float (&)[QUAD]) const {}
};

// The scales of an item are on their way while those of the one before are decoded.
template <typename Shared, typename Scales>
struct DecodeScales {
    Shared& shared;
    const Products& products;
    const Table& table;
    Place<Shared::SIDE> place;
    const uint8_t* codes[2];
    const float* nested[2];
    float offset[2];

    static constexpr int QUADS = Shared::WARPS, ROWS = 32 / QUADS, LOADS = PANEL / ROWS;
    // That are looked up before the first is used: all, if there are registers for them.
    static constexpr int TOGETHER = Scales::IS_ALIGNED ? LOADS : 2;

    struct Raw {
        int index = -1, blocks; // of the lane's quad that are there
        Scales scales[LOADS];
        float offset[2];
    } waiting;

    __device__ void begin(const Walk&) const {}
    __device__ void begin_slice(const Walk&, int, int) const {}
    __device__ void end() const { decode(waiting); }

    __device__ void run(const Item& item) {
        if (place.moves(products.weights, item.panel))
            for (int half = 0; half < 2; ++half) {
                codes[half] = of_part(products.weights.codes, place.part, half);
                nested[half] = of_part(products.weights.nested, place.part, half);
                offset[half] = of_part(products.offset, place.part, half);
            }
        if (Scales::IS_ALIGNED) {
            const Raw next = read(item);
            decode(waiting);
            waiting = next;
        } else { // registers for one item's alone
            decode(waiting);
            waiting = read(item);
        }
    }

    __device__ Raw read(const Item& item) const {
        const int side = lane_id() % QUADS / Shared::PANEL_WARPS, warp = lane_id() % Shared::PANEL_WARPS;
        const int quad = min(warp * QUAD, (item.blocks - 1) / QUAD * QUAD), block = item.block + quad;
        const uint32_t last = uint32_t(place.N) * place.row_blocks - 1;
        Raw raw;
        raw.index = item.index, raw.blocks = item.blocks - quad;
        raw.offset[0] = offset[0], raw.offset[1] = offset[1];
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            const int half = i * ROWS / HALF, row = place.row(item.panel, i * ROWS, side) + lane_id() / QUADS;
            const uint32_t at = uint32_t(min(row, place.N - 1)) * place.row_blocks + block;
            raw.scales[i].read(codes[half], nested[half], at, last);
        }
        return raw;
    }

    // The first are on their way before the table is there.
    __device__ void decode(const Raw& raw) const {
        if (raw.index < 0)
            return;
        if (raw.index == 0)
            Shared::all_ready();
        const typename Shared::Stage stage(raw.index);
#pragma unroll
        for (int first = 0; first < LOADS; first += TOGETHER) {
            float v[TOGETHER][QUAD];
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i)
                raw.scales[first + i].look_up(table, v[i]);
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i)
                finish(raw, first + i, v[i]);
            if (first == 0)
                shared.empty[stage.place].wait(stage.parity ^ 1);
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i)
                store16(&shared.scales[stage.place][(first + i) * ROWS + lane_id() / QUADS][lane_id() % QUADS * QUAD],
                        v[i]);
        }
        __syncwarp();
        if (lane_id() == 0)
            shared.full[stage.place].arrive();
    }

    // Zeros where there is no block.
    __device__ static void finish(const Raw& raw, int i, float (&v)[QUAD]) {
        raw.scales[i].scale(raw.offset[i * ROWS / HALF], v);
#pragma unroll
        for (int j = 0; j < QUAD; ++j)
            v[j] = Scales::IS_ALIGNED || j < raw.blocks ? v[j] : 0.0f;
    }
};

// Where panels are side by side there are registers for scales of any place alone.
template <typename Shared>
__device__ void decode_scales(Shared& shared, const Products& products, const Table& table, const Walk& walk) {
    if constexpr (!Shared::ANY)
        each_item(walk, DecodeScales<Shared, NestedScales<true>>{shared, products, table});
    else if (!products.weights.plain)
        each_item(walk, DecodeScales<Shared, NestedScales<false>>{shared, products, table});
    else if (Shared::SIDE == 1 && walk.blocks % QUAD == 0)
        each_item(walk, DecodeScales<Shared, PlainScales<true>>{shared, products, table});
    else
        each_item(walk, DecodeScales<Shared, PlainScales<false>>{shared, products, table});
}

#endif
