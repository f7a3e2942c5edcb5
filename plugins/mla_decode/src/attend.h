// attend_split: one split of the cached tokens for 16 or 32 query rows:
// partial = softmax(scale * query rows^T) latent over the split, and log(sum exp).

#pragma once

#include "tile.h"

namespace mla_decode
{

// scores[slice] [ROWS, tokens]: products over every fourth run of 16 columns of the row.
template <typename T, int ROWS, typename Block, typename State>
MLA_FN void score_tile(Block& block, State& state, Sizes const& z, T const* tile, int stride, float* scores)
{
    using A = Attend<T, ROWS>;
    int const steps = (z.latent + z.rope) / 16;
    constexpr int kTiles = kTokens / 16 / A::kRuns;
    block.each_warp([&](int warp) {
        int const group = A::group(warp);
        int const slice = warp % kSlices;
        int const token = A::token(warp);
        Sums sums[kTiles];
        for (Sums& one : sums)
        {
            one.clear();
        }
#pragma unroll
        for (int i = 0; i < A::kSteps; ++i)
        {
            int const column = 16 * (slice + kSlices * i);
            if (slice + kSlices * i < steps)
            {
#pragma unroll
                for (int t = 0; t < kTiles; ++t)
                {
                    TokenMatrix<T> keys;
                    keys.load_keys(tile + (token + 16 * t) * stride + column, stride);
                    sums[t].add_product(state.of(warp).query[i], keys);
                }
            }
        }
#pragma unroll
        for (int t = 0; t < kTiles; ++t)
        {
            float* to = scores + (slice * ROWS + 16 * group) * kScoreStride + token + 16 * t;
            sums[t].store(to, kScoreStride, 16);
        }
    });
}

// One step of the running softmax: shares [ROWS, tokens] of this tile, and what older sums shrink by.
// Lanes beside one another have a row, each some tokens of it. Scores and their maxima are powers of 2.
template <typename T, int ROWS, typename Block>
MLA_FN void share_tile(Block& block, Step const& step, Part const& part, int begin, float const* scores, T* shares,
    float* most, float* sum, float* factor)
{
    constexpr int kRows = ROWS / Attend<T, ROWS>::kWarps; // of a warp
    constexpr int kLanes = 32 / kRows;
    constexpr int kOfLane = kTokens / kLanes;
    float const scale = step.scale * kLog2E;
    block.each_warp([&](int warp) {
        auto const row_of = [&](int lane) { return kRows * warp + lane / kLanes; };
        auto const token_of = [&](int lane) { return kOfLane * (lane % kLanes); };
        auto const scored = PerLane<Few<float, kOfLane>>::of([&](int lane) {
            int const row = row_of(lane);
            int const seen = (row < part.rows ? part.seen(row) : 0) - begin - token_of(lane);
            Few<float, kOfLane> x{};
            for (int slice = 0; slice < kSlices; ++slice)
            {
                float const* from = scores + (slice * ROWS + row) * kScoreStride + token_of(lane);
                auto const some = Few<float, kOfLane>::at(from);
                for (int i = 0; i < kOfLane; ++i)
                {
                    x.of[i] += some.of[i];
                }
            }
            for (int i = 0; i < kOfLane; ++i)
            {
                x.of[i] = i < seen ? x.of[i] * scale : -INFINITY;
            }
            return x;
        });
        Lanes const peak = Lanes::of([&](int lane) {
            float x = scored.at(lane).of[0];
            for (int i = 1; i < kOfLane; ++i)
            {
                x = fmaxf(x, scored.at(lane).of[i]);
            }
            return x;
        }).largest_of(kLanes);
        Lanes const after = Lanes::of([&](int lane) { return fmaxf(most[row_of(lane)], peak.at(lane)); });
        // The sum is that of the shares as they are multiplied.
        Lanes const total = Lanes::of([&](int lane) {
            float const least = after.at(lane) == -INFINITY ? 0.0F : after.at(lane);
            Few<T, kOfLane> share;
            float x = 0.0F;
            for (int i = 0; i < kOfLane; ++i)
            {
                share.of[i] = Number<T>::narrow(power_of_2(scored.at(lane).of[i] - least));
                x += Number<T>::wide(share.of[i]);
            }
            share.put(shares + row_of(lane) * kShareStride + token_of(lane));
            return x;
        }).total_of(kLanes);
        Lanes const shrink = Lanes::of([&](int lane) {
            float const least = after.at(lane) == -INFINITY ? 0.0F : after.at(lane);
            return power_of_2(most[row_of(lane)] - least);
        });
        block.warp_barrier();
        Lanes::every([&](int lane) {
            if (lane % kLanes == 0)
            {
                int const row = row_of(lane);
                sum[row] = sum[row] * shrink.at(lane) + total.at(lane);
                most[row] = after.at(lane);
                factor[row] = shrink.at(lane);
            }
        });
    });
}

template <typename T, int ROWS, typename Block, typename State>
MLA_FN void gather_tile(Block& block, State& state, Sizes const& z, T const* tile, int stride, T const* shares,
    float const* factor)
{
    using A = Attend<T, ROWS>;
    block.each_warp_open([&](int warp) {
        auto& mine = state.of(warp);
#pragma unroll
        for (int group = 0; group < A::kGroups; ++group)
        {
#pragma unroll
            for (int i = 0; i < A::kColumns; ++i)
            {
                mine.sums[group][i].scale_rows(factor + 16 * group);
            }
        }
#pragma unroll
        for (int t = 0; t < kTokens / 16; ++t)
        {
            QueryMatrix<T> share[A::kGroups];
#pragma unroll
            for (int group = 0; group < A::kGroups; ++group)
            {
                share[group].load_shared(shares + 16 * group * kShareStride + 16 * t, kShareStride);
            }
#pragma unroll
            for (int i = 0; i < A::kColumns; ++i)
            {
                int const column = 16 * (warp + A::kWarps * i);
                if (column < z.latent)
                {
                    TokenMatrix<T> values;
                    values.load_values(tile + 16 * t * stride + column, stride);
#pragma unroll
                    for (int group = 0; group < A::kGroups; ++group)
                    {
                        mine.sums[group][i].add_product(share[group], values);
                    }
                }
            }
        }
    });
}

template <typename T, int ROWS, typename Block, typename State>
MLA_FN void begin_part(Block& block, State& state, Step const& step, Part const& part, int b, float* most, float* sum)
{
    using A = Attend<T, ROWS>;
    Sizes const& z = step.sizes;
    int const width = z.latent + z.rope;
    T const* query = static_cast<T const*>(step.query)
        + (static_cast<size_t>(b) * z.newTokens * z.heads + part.firstRow) * width;
    block.each_warp([&](int warp) {
        auto& mine = state.of(warp);
        int const first = 16 * A::group(warp);
#pragma unroll
        for (int i = 0; i < A::kSteps; ++i)
        {
            int const column = 16 * (warp % kSlices + kSlices * i);
            if (column < width)
            {
                T const* at = query + static_cast<size_t>(first) * width + column;
                mine.query[i].load_global(at, width, part.rows - first);
            }
        }
#pragma unroll
        for (int i = 0; i < A::kGroups * A::kColumns; ++i)
        {
            mine.sums[i / A::kColumns][i % A::kColumns].clear();
        }
        Lanes::every([&](int lane) {
            if (warp == 0 && lane < ROWS)
            {
                most[lane] = -INFINITY;
                sum[lane] = 0.0F;
            }
        });
    });
}

// What the split gives: a row that sees nothing of it has a log sum of -inf and no partial.
template <typename T, int ROWS, typename Block, typename State>
MLA_FN void end_part(Block& block, State& state, Step const& step, Part const& part, int b, int split,
    float const* most, float* sum, float* factor)
{
    using A = Attend<T, ROWS>;
    Sizes const& z = step.sizes;
    size_t const row0 = static_cast<size_t>(b) * z.newTokens * z.heads + part.firstRow;
    block.each_warp([&](int warp) {
        Lanes::every([&](int row) {
            if (warp == 0 && row < ROWS)
            {
                bool const any = sum[row] > 0.0F;
                factor[row] = any ? 1.0F / sum[row] : 0.0F;
                if (row < part.rows)
                {
                    step.logSum[(row0 + row) * z.splits + split] = any ? most[row] / kLog2E + logf(sum[row]) : -INFINITY;
                }
            }
        });
    });
    if (part.begin >= part.end)
    {
        return;
    }
    size_t const stride = static_cast<size_t>(z.splits) * z.latent;
    block.each_warp([&](int warp) {
        auto& mine = state.of(warp);
#pragma unroll
        for (int group = 0; group < A::kGroups; ++group)
        {
#pragma unroll
            for (int i = 0; i < A::kColumns; ++i)
            {
                int const column = 16 * (warp + A::kWarps * i);
                if (column < z.latent)
                {
                    mine.sums[group][i].scale_rows(factor + 16 * group);
                    float* to = step.partial + (row0 + 16 * group) * stride + static_cast<size_t>(split) * z.latent
                        + column;
                    mine.sums[group][i].store(to, stride, part.rows - 16 * group);
                }
            }
        }
    });
}

template <typename T, typename Coding, int ROWS, typename Block>
MLA_FN void attend_split(Block& block, Step const& step, char* memory, int tile, int split, int b)
{
    constexpr int kWarps = Attend<T, ROWS>::kWarps;
    Sizes const& z = step.sizes;
    Shared<T, Coding> const shared(z, ROWS);
    float* scores = reinterpret_cast<float*>(memory + shared.scores);
    T* shares = reinterpret_cast<T*>(memory + shared.shares);
    float* most = reinterpret_cast<float*>(memory + shared.most);
    float* sum = reinterpret_cast<float*>(memory + shared.sum);
    float* factor = reinterpret_cast<float*>(memory + shared.factor);
    Part const part = part_of<ROWS>(step, tile, split, b);
    PerWarp<typename Attend<T, ROWS>::Registers> state;
    if (part.begin < part.end)
    {
        load_tile<T, Coding, kWarps>(block, step, shared, memory, b, 0, part.begin, part.end);
    }
    begin_part<T, ROWS>(block, state, step, part, b, most, sum);
    int stage = 0;
    for (int begin = part.begin; begin < part.end; begin += kTokens)
    {
        // The tile is there, and every warp is done with the one before, whose stage is free.
        block.wait();
        if (begin + kTokens < part.end)
        {
            load_tile<T, Coding, kWarps>(block, step, shared, memory, b, 1 - stage, begin + kTokens, part.end);
        }
        decode_tile<T, Coding, kWarps>(block, step, shared, memory, stage);
        T const* rows = reinterpret_cast<T const*>(memory + shared.tile(stage));
        score_tile<T, ROWS>(block, state, z, rows, shared.rowStride, scores);
        share_tile<T, ROWS>(block, step, part, begin, scores, shares, most, sum, factor);
        gather_tile<T, ROWS>(block, state, z, rows, shared.rowStride, shares, factor);
        stage = 1 - stage;
    }
    block.wait();
    end_part<T, ROWS>(block, state, step, part, b, split, most, sum, factor);
}

} // namespace mla_decode
