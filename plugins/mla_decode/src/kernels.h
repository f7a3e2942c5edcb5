// MlaDecode's three steps, each the work of one block, written once for the device and for a CPU
// (block_cuda.h, block_host.h; a Block type is the first argument).
//
//   append_row    new_row_BSE -> its slot of cache_B1ME, coded where the cache is
//   attend_split  one split of the cached tokens for 16 or 32 query rows:
//                 partial = softmax(scale * query rows^T) latent over the split, and log(sum exp)
//   join_splits   out = sum_k exp(log_sum_k) partial_k / sum_k exp(log_sum_k)
//
// A token at or beyond a row's length is never read, in any step. Products are of the query's type
// and every sum is fp32.

#pragma once

#include "numbers.h"
#include "step.h"

namespace mla_decode
{

constexpr int kAppendWarps = 4;
constexpr int kSlices = 4;                // warps that share out the columns of one score
constexpr int kScoreStride = kTokens + 4; // no two rows of a fragment in one bank
constexpr int kShareStride = kTokens + 8;
constexpr int kPad = 8;                   // columns behind a row in shared memory: the same reason

struct Length
{
    int cached; // P
    int fresh;  // new tokens of this row

    // New token s sees so many tokens; none where it is padding.
    MLA_FN int seen(int s) const { return s < fresh ? cached + s + 1 : 0; }
};

// Lengths that cannot be (negative, beyond capacity) are cut: memory stays safe.
MLA_FN Length length_of(Step const& step, int b)
{
    int64_t const capacity = step.sizes.capacity;
    int64_t cached = step.cacheLengths[b];
    cached = cached < 0 ? 0 : (cached > capacity ? capacity : cached);
    int64_t fresh = step.newLengths[b];
    int64_t const room = capacity - cached < step.sizes.newTokens ? capacity - cached : step.sizes.newTokens;
    fresh = fresh < 0 ? 0 : (fresh > room ? room : fresh);
    return Length{static_cast<int>(cached), static_cast<int>(fresh)};
}

// ---- append ----

template <typename T, typename Coding, typename Block>
MLA_FN void append_row(Block& block, Step const& step, int b, int s)
{
    using Stored = typename Coding::Stored;
    Sizes const& z = step.sizes;
    int const width = z.latent + z.rope;
    Length const length = length_of(step, b);
    if (s >= length.fresh)
    {
        return;
    }
    size_t const slot = static_cast<size_t>(b) * z.capacity + length.cached + s;
    T const* from = static_cast<T const*>(step.newRow) + (static_cast<size_t>(b) * z.newTokens + s) * width;
    Stored* to = static_cast<Stored*>(step.cache) + slot * width;
    if constexpr (!Coding::kCODED)
    {
        block.each_warp([&](int warp) {
            Lanes::every([&](int lane) {
                for (int e = warp * 32 + lane; e < width; e += kAppendWarps * 32)
                {
                    to[e] = from[e];
                }
            });
        });
    }
    else
    {
        int const latentScales = z.latent / z.tile;
        int const scales = scalesPerRow(z);
        block.each_warp([&](int warp) {
            for (int g = warp; g < scales; g += kAppendWarps)
            {
                int const columns = g < latentScales ? z.tile : z.ropeTile;
                int const first = g < latentScales ? g * z.tile : z.latent + (g - latentScales) * z.ropeTile;
                Lanes const peaks = Lanes::of([&](int lane) {
                    float peak = 0.0F;
                    for (int e = lane; e < columns; e += 32)
                    {
                        peak = fmaxf(peak, fabsf(Number<T>::wide(from[first + e])));
                    }
                    return peak;
                });
                float const wanted = peaks.largest() / Coding::kLARGEST;
                float const scale = wanted > 0.0F ? wanted : 1.0F;
                Lanes::every([&](int lane) {
                    for (int e = lane; e < columns; e += 32)
                    {
                        to[first + e] = Coding::encode(Number<T>::wide(from[first + e]) / scale);
                    }
                    if (lane == 0)
                    {
                        step.scales[slot * scales + g] = scale;
                    }
                });
            }
        });
    }
}

// ---- attend ----

// Shared memory of a block, in bytes from its start: two stages of cached rows as they are stored,
// where these are coded also a tile of the query's type, then scores, shares and row state.
template <typename T, typename Coding>
struct Shared
{
    int rowStride; // of a tile of T, in elements
    int rawStride; // of a row as stored, in bytes
    int scales;
    size_t tileBytes;
    size_t stageBytes;
    size_t scores;
    size_t shares;
    size_t most, sum, factor; // per query row: running maximum, sum, and what old sums shrink by
    size_t bytes;

    static MLA_BOTH size_t aligned(size_t at) { return (at + 15) / 16 * 16; }

    MLA_BOTH Shared(Sizes const& z, int rows)
        : rowStride{z.latent + z.rope + kPad}
        , rawStride{Coding::kCODED ? z.latent + z.rope + 16 : rowStride * static_cast<int>(sizeof(T))}
        , scales{Coding::kCODED ? scalesPerRow(z) : 0}
        , tileBytes{Coding::kCODED ? aligned(sizeof(T) * kTokens * rowStride) : 0}
        , stageBytes{rowBytes() + aligned(sizeof(float) * kTokens * scales)}
        , scores{tileBytes + 2 * stageBytes}
        , shares{scores + aligned(sizeof(float) * kSlices * rows * kScoreStride)}
        , most{shares + aligned(sizeof(T) * rows * kShareStride)}
        , sum{most + sizeof(float) * rows}
        , factor{sum + sizeof(float) * rows}
        , bytes{factor + sizeof(float) * rows}
    {
    }

    MLA_BOTH size_t rowBytes() const { return aligned(static_cast<size_t>(kTokens) * rawStride); }

    // Rows of a stage as stored, and their scales.
    MLA_BOTH size_t raw(int stage) const { return tileBytes + stage * stageBytes; }
    MLA_BOTH size_t rawScales(int stage) const { return raw(stage) + rowBytes(); }

    // Rows of a stage in the query's type.
    MLA_BOTH size_t tile(int stage) const { return Coding::kCODED ? 0 : raw(stage); }
};

template <typename T, int ROWS>
struct Attend
{
    static constexpr int kGroups = ROWS / 16; // of 16 query rows
    static constexpr int kWarps = kSlices * kGroups;
    static constexpr int kSteps = kMaxRow / 16 / kSlices;   // products of one score, per warp
    static constexpr int kColumns = kMaxLatent / 16 / kWarps; // of 16 latent columns, per warp

    struct Registers
    {
        QueryMatrix<T> query[kSteps];
        Sums sums[kGroups][kColumns];
    };
};

// Which tokens a block attends to for which query rows.
struct Part
{
    int firstRow; // of X
    int rows;     // of them that there are
    int begin, end;
    int heads;
    Length length;

    MLA_FN int seen(int row) const { return length.seen((firstRow + row) / heads); }
};

template <int ROWS>
MLA_FN Part part_of(Step const& step, int tile, int split, int b)
{
    Sizes const& z = step.sizes;
    Length const length = length_of(step, b);
    int const every = z.newTokens * z.heads;
    int const first = tile * ROWS;
    int const rows = every - first < ROWS ? every - first : ROWS;
    int const each = ceilDiv(ceilDiv(length.cached + length.fresh, z.splits), kTokens) * kTokens;
    int const lastToken = (first + rows - 1) / z.heads;
    int const newest = lastToken < length.fresh ? lastToken : length.fresh - 1;
    // What the last of these rows sees; nothing where the first is padding already.
    int const seen = first / z.heads < length.fresh ? length.seen(newest) : 0;
    int const begin = split * each;
    int const end = begin + each < seen ? begin + each : seen;
    return Part{first, rows, begin, end, z.heads, length};
}

template <typename T, typename Coding, int WARPS, typename Block>
MLA_FN void load_tile(Block& block, Step const& step, Shared<T, Coding> const& shared, char* memory, int b, int stage,
    int begin, int end)
{
    using Stored = typename Coding::Stored;
    Sizes const& z = step.sizes;
    int const rowBytes = (z.latent + z.rope) * static_cast<int>(sizeof(Stored));
    char* raw = memory + shared.raw(stage);
    char* scales = memory + shared.rawScales(stage);
    size_t const row0 = static_cast<size_t>(b) * z.capacity;
    char const* cache = static_cast<char const*>(step.cache);
    block.each_warp_open([&](int warp) {
        for (int t = warp; t < kTokens; t += WARPS)
        {
            bool const there = begin + t < end;
            size_t const slot = row0 + (there ? begin + t : 0);
            Lanes::every([&](int lane) {
                for (int byte = 16 * lane; byte < rowBytes; byte += 16 * 32)
                {
                    block.copy16(raw + t * shared.rawStride + byte, cache + slot * rowBytes + byte, there);
                }
                if constexpr (Coding::kCODED)
                {
                    for (int g = lane; g < shared.scales; g += 32)
                    {
                        block.copy4(scales + sizeof(float) * (t * shared.scales + g),
                            step.scales + slot * shared.scales + g, there);
                    }
                }
            });
        }
    });
    block.commit();
}

// A coded tile in the query's type. A row that is not there has scales of 0 and codes of 0.
template <typename T, typename Coding, int WARPS, typename Block>
MLA_FN void decode_tile(Block& block, Step const& step, Shared<T, Coding> const& shared, char* memory, int stage)
{
    if constexpr (Coding::kCODED)
    {
        using Stored = typename Coding::Stored;
        Sizes const& z = step.sizes;
        int const latentScales = z.latent / z.tile;
        T* tile = reinterpret_cast<T*>(memory + shared.tile(stage));
        float const* scales = reinterpret_cast<float const*>(memory + shared.rawScales(stage));
        char const* raw = memory + shared.raw(stage);
        block.each_warp([&](int warp) {
            for (int t = warp; t < kTokens; t += WARPS)
            {
                Stored const* codes = reinterpret_cast<Stored const*>(raw + t * shared.rawStride);
                Lanes::every([&](int lane) {
                    for (int e = lane; e < z.latent + z.rope; e += 32)
                    {
                        int const g = e < z.latent ? e / z.tile : latentScales + (e - z.latent) / z.ropeTile;
                        float const x = Coding::decode(codes[e]) * scales[t * shared.scales + g];
                        tile[t * shared.rowStride + e] = Number<T>::narrow(x);
                    }
                });
            }
        });
    }
}

// scores[slice] [ROWS, tokens]: products over every fourth run of 16 columns of the row.
template <typename T, int ROWS, typename Block, typename State>
MLA_FN void score_tile(Block& block, State& state, Sizes const& z, T const* tile, int stride, float* scores)
{
    using A = Attend<T, ROWS>;
    int const steps = (z.latent + z.rope) / 16;
    block.each_warp([&](int warp) {
        int const group = warp / kSlices;
        int const slice = warp % kSlices;
        Sums sums[kTokens / 16];
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
                for (int t = 0; t < kTokens / 16; ++t)
                {
                    TokenMatrix<T> keys;
                    keys.load_keys(tile + 16 * t * stride + column, stride);
                    sums[t].add_product(state.of(warp).query[i], keys);
                }
            }
        }
        for (int t = 0; t < kTokens / 16; ++t)
        {
            sums[t].store(scores + (slice * ROWS + 16 * group) * kScoreStride + 16 * t, kScoreStride, 16);
        }
    });
}

// One step of the running softmax: shares [ROWS, tokens] of this tile, and what older sums shrink by.
template <typename T, int ROWS, typename Block>
MLA_FN void share_tile(Block& block, Step const& step, Part const& part, int begin, float const* scores, T* shares,
    float* most, float* sum, float* factor)
{
    block.each_warp([&](int warp) {
        for (int row = warp; row < ROWS; row += Attend<T, ROWS>::kWarps)
        {
            int const seen = row < part.rows ? part.seen(row) : 0;
            Lanes const score = Lanes::of([&](int lane) {
                float x = 0.0F;
                for (int slice = 0; slice < kSlices; ++slice)
                {
                    x += scores[(slice * ROWS + row) * kScoreStride + lane];
                }
                return begin + lane < seen ? x * step.scale : -INFINITY;
            });
            float const before = most[row];
            float const after = fmaxf(before, score.largest());
            float const least = after == -INFINITY ? 0.0F : after;
            score.each([&](int lane, float x) {
                shares[row * kShareStride + lane] = Number<T>::narrow(expf(x - least));
            });
            // The sum is that of the shares as they are multiplied.
            Lanes const share
                = Lanes::of([&](int lane) { return Number<T>::wide(shares[row * kShareStride + lane]); });
            float const total = share.total();
            float const shrink = expf(before - least);
            block.warp_barrier();
            Lanes::every([&](int lane) {
                if (lane == 0)
                {
                    sum[row] = sum[row] * shrink + total;
                    most[row] = after;
                    factor[row] = shrink;
                }
            });
        }
    });
}

template <typename T, int ROWS, typename Block, typename State>
MLA_FN void gather_tile(Block& block, State& state, Sizes const& z, T const* tile, int stride, T const* shares,
    float const* factor)
{
    using A = Attend<T, ROWS>;
    block.each_warp([&](int warp) {
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
        int const first = 16 * (warp / kSlices);
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
                    step.logSum[(row0 + row) * z.splits + split] = any ? most[row] + logf(sum[row]) : -INFINITY;
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
        bool const more = begin + kTokens < part.end;
        if (more)
        {
            load_tile<T, Coding, kWarps>(block, step, shared, memory, b, 1 - stage, begin + kTokens, part.end);
        }
        block.wait(more ? 1 : 0);
        decode_tile<T, Coding, kWarps>(block, step, shared, memory, stage);
        T const* rows = reinterpret_cast<T const*>(memory + shared.tile(stage));
        score_tile<T, ROWS>(block, state, z, rows, shared.rowStride, scores);
        share_tile<T, ROWS>(block, step, part, begin, scores, shares, most, sum, factor);
        gather_tile<T, ROWS>(block, state, z, rows, shared.rowStride, shares, factor);
        stage = 1 - stage;
    }
    end_part<T, ROWS>(block, state, step, part, b, split, most, sum, factor);
}

// ---- join ----

template <typename T, int WARPS, typename Block>
MLA_FN void join_splits(Block& block, Step const& step, int row)
{
    Sizes const& z = step.sizes;
    float const* logSum = step.logSum + static_cast<size_t>(row) * z.splits;
    float const* partial = step.partial + static_cast<size_t>(row) * z.splits * z.latent;
    T* out = static_cast<T*>(step.out) + static_cast<size_t>(row) * z.latent;
    float most = -INFINITY;
    for (int k = 0; k < z.splits; ++k)
    {
        most = fmaxf(most, logSum[k]);
    }
    block.each_warp([&](int warp) {
        Lanes::every([&](int lane) {
            for (int l = warp * 32 + lane; l < z.latent; l += WARPS * 32)
            {
                float sum = 0.0F;
                float weights = 0.0F;
                for (int k = 0; k < z.splits; ++k)
                {
                    // A split that nothing was seen of has written no partial: it is not read.
                    if (logSum[k] > -INFINITY)
                    {
                        float const weight = expf(logSum[k] - most);
                        weights += weight;
                        sum += weight * partial[static_cast<size_t>(k) * z.latent + l];
                    }
                }
                out[l] = Number<T>::narrow(weights > 0.0F ? sum / weights : 0.0F);
            }
        });
    });
}

} // namespace mla_decode
