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

} // namespace mla_decode
