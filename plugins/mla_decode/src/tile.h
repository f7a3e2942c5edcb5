// What a block of `attend_split` works on: its shared memory, its registers, its part of the rows,
// and cached rows brought in and decoded, 32 at a time.

#pragma once

#include "length.h"

namespace mla_decode
{

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
    static constexpr int kWarps = 8;
    static constexpr int kGroups = ROWS / 16; // of 16 query rows
    static constexpr int kRuns = kWarps / kSlices / kGroups; // of tokens that a score's warps share out
    static constexpr int kSteps = kMaxRow / 16 / kSlices;   // products of one score, per warp
    static constexpr int kColumns = kMaxLatent / 16 / kWarps; // of 16 latent columns, per warp

    // The 16 query rows whose scores are a warp's, and where its tokens begin.
    static MLA_BOTH int group(int warp) { return warp / kSlices % kGroups; }
    static MLA_BOTH int token(int warp) { return kTokens / kRuns * (warp / kSlices / kGroups); }

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

// Brings rows `begin` up to `end` into a stage, zeros behind them. A warp has every WARPS-th row.
template <typename T, typename Coding, int WARPS, typename Block>
MLA_FN void load_tile(Block& block, Step const& step, Shared<T, Coding> const& shared, char* memory, int b, int stage,
    int begin, int end)
{
    using Stored = typename Coding::Stored;
    constexpr int kParts = (kMaxRow * static_cast<int>(sizeof(Stored)) + 511) / 512; // of 16 bytes a lane
    Sizes const& z = step.sizes;
    int const rowBytes = (z.latent + z.rope) * static_cast<int>(sizeof(Stored));
    size_t const first = static_cast<size_t>(b) * z.capacity + begin;
    char* const raw = memory + shared.raw(stage);
    char const* const cache = static_cast<char const*>(step.cache) + first * rowBytes;
    block.each_warp_open([&](int warp) {
        Lanes::every([&](int lane) {
#pragma unroll
            for (int i = 0; i < kTokens / WARPS; ++i)
            {
                int const t = warp + WARPS * i;
#pragma unroll
                for (int part = 0; part < kParts; ++part)
                {
                    int const byte = 16 * lane + 512 * part;
                    if (byte < rowBytes)
                    {
                        block.copy16(raw + t * shared.rawStride + byte, cache + t * rowBytes + byte, begin + t < end);
                    }
                }
            }
            if constexpr (Coding::kCODED)
            {
                // Scales of rows beside one another are beside one another, here and there.
                char* const to = memory + shared.rawScales(stage);
                float const* const from = step.scales + first * shared.scales;
                for (int i = 32 * warp + lane; i < kTokens * shared.scales; i += 32 * WARPS)
                {
                    block.copy4(to + sizeof(float) * i, from + i, i < (end - begin) * shared.scales);
                }
            }
        });
    });
    block.commit();
}

MLA_FN int scale_of(Sizes const& z, int column)
{
    return column < z.latent ? column / z.tile : z.latent / z.tile + (column - z.latent) / z.ropeTile;
}

// Decodes a tile of which every run of columns has one scale. A lane has the same columns of each
// row, so that it looks for their scale once.
template <typename T, typename Coding, int WARPS, typename Block>
MLA_FN void decode_runs(Block& block, Sizes const& z, Shared<T, Coding> const& shared, char const* raw,
    float const* scales, T* tile)
{
    constexpr int kParts = (kMaxRow + 32 * kDecoded - 1) / (32 * kDecoded);
    block.each_warp([&](int warp) {
        Lanes::every([&](int lane) {
#pragma unroll
            for (int part = 0; part < kParts; ++part)
            {
                int const column = kDecoded * (lane + 32 * part);
                if (column < z.latent + z.rope)
                {
                    int const g = scale_of(z, column);
#pragma unroll
                    for (int t = warp; t < kTokens; t += WARPS)
                    {
                        float const scale = scales[t * shared.scales + g];
                        float wide[kDecoded];
                        Coding::widen(raw + t * shared.rawStride + column, wide);
                        Few<T, kDecoded> row;
#pragma unroll
                        for (int j = 0; j < kDecoded; ++j)
                        {
                            row.of[j] = Number<T>::narrow(wide[j] * scale);
                        }
                        row.put(tile + t * shared.rowStride + column);
                    }
                }
            }
        });
    });
}

// The same of scales as narrow as they may be.
template <typename T, typename Coding, int WARPS, typename Block>
MLA_FN void decode_columns(Block& block, Sizes const& z, Shared<T, Coding> const& shared, char const* raw,
    float const* scales, T* tile)
{
    block.each_warp([&](int warp) {
        Lanes::every([&](int lane) {
            for (int column = lane; column < z.latent + z.rope; column += 32)
            {
                int const g = scale_of(z, column);
                for (int t = warp; t < kTokens; t += WARPS)
                {
                    auto const* codes = reinterpret_cast<typename Coding::Stored const*>(raw + t * shared.rawStride);
                    float const x = Coding::decode(codes[column]) * scales[t * shared.scales + g];
                    tile[t * shared.rowStride + column] = Number<T>::narrow(x);
                }
            }
        });
    });
}

// A coded tile in the query's type. A row that is not there has scales of 0 and codes of 0.
template <typename T, typename Coding, int WARPS, typename Block>
MLA_FN void decode_tile(Block& block, Step const& step, Shared<T, Coding> const& shared, char* memory, int stage)
{
    if constexpr (Coding::kCODED)
    {
        Sizes const& z = step.sizes;
        T* tile = reinterpret_cast<T*>(memory + shared.tile(stage));
        float const* scales = reinterpret_cast<float const*>(memory + shared.rawScales(stage));
        char const* raw = memory + shared.raw(stage);
        if (z.tile % kDecoded == 0 && (z.rope == 0 || z.ropeTile % kDecoded == 0))
        {
            decode_runs<T, Coding, WARPS>(block, z, shared, raw, scales, tile);
        }
        else
        {
            decode_columns<T, Coding, WARPS>(block, z, shared, raw, scales, tile);
        }
    }
}

} // namespace mla_decode
