// One call of MlaDecode in plain numbers: what the launcher, the kernels, the plugin and the
// check on a CPU agree on. Axis letters are those of mla_deploy/shapes.py; E = L + R is a cache
// row, X = S * H a folded query row, K a split of the cached tokens, G a scale of a quantised row.

#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define MLA_BOTH __host__ __device__ constexpr
#else
#define MLA_BOTH constexpr
#endif

namespace mla_decode
{

// How a cache row is stored: as the query is, or in 8 bits with scales.
enum class Storage : int32_t
{
    kPLAIN = 0,
    kINT8 = 1,
    kFP8 = 2,
};

enum class Element : int32_t
{
    kHALF = 0,
    kBFLOAT16 = 1,
};

struct Sizes
{
    int32_t batch;
    int32_t newTokens; // S, 1 to kMaxNewTokens
    int32_t heads;     // H
    int32_t capacity;  // M
    int32_t latent;    // L, a multiple of 16
    int32_t rope;      // R, a multiple of 16; 0 where there is no rope key
    int32_t tile;      // latent columns that share a scale
    int32_t ropeTile;  // rope key columns that share a scale
    int32_t splits;    // K
};

struct Step
{
    void const* query;            // query_BSHE
    void const* newRow;           // new_row_BSE
    void* cache;                  // cache_B1ME, read and written
    float* scales;                // scales_B1MG, read and written; null for Storage::kPLAIN
    int64_t const* cacheLengths;  // cache_lengths_B
    int64_t const* newLengths;    // new_lengths_B
    float* partial;               // partial_BXKL
    float* logSum;                // log_sum_BXK: log of the split's softmax denominator
    void* out;                    // out_BSHL
    Sizes sizes;
    float scale;
};

constexpr int32_t kMaxNewTokens = 8;
constexpr int32_t kMaxLatent = 512;
constexpr int32_t kMaxRow = 576;
constexpr int32_t kTokens = 32; // cached tokens that a block holds at a time
constexpr int32_t kMostSplits = 4096; // a row's weights fit a block's shared memory when joined

MLA_BOTH int32_t ceilDiv(int32_t a, int32_t b)
{
    return (a + b - 1) / b;
}

// Query rows of one block: 16 where that is all there are, else 32.
MLA_BOTH int32_t rowsPerBlock(Sizes const& s)
{
    return s.newTokens * s.heads <= 16 ? 16 : 32;
}

MLA_BOTH int32_t scalesPerRow(Sizes const& s)
{
    return s.latent / s.tile + (s.rope == 0 ? 0 : s.rope / s.ropeTile);
}

// The least tokens of a split of a full cache: fewer rows have less to join.
MLA_BOTH int32_t leastSplit(Sizes const& s)
{
    return kTokens * (rowsPerBlock(s) == 16 ? 2 : 4);
}

// One wave of blocks, and no split shorter than the least. Of shapes only, so that a sum is taken
// in the same order whatever the lengths and the device are.
MLA_BOTH int32_t splitsFor(Sizes const& s, int32_t multiprocessors)
{
    int32_t const tiles = s.batch * ceilDiv(s.newTokens * s.heads, rowsPerBlock(s));
    int32_t const most = ceilDiv(s.capacity, leastSplit(s));
    int32_t const wanted = multiprocessors / (tiles > 0 ? tiles : 1);
    int32_t const splits = wanted < most ? wanted : most;
    return splits < 1 ? 1 : (splits < kMostSplits ? splits : kMostSplits);
}

MLA_BOTH size_t partialBytes(Sizes const& s)
{
    return sizeof(float) * s.batch * s.newTokens * s.heads * s.splits * s.latent;
}

MLA_BOTH size_t workspaceBytes(Sizes const& s)
{
    return partialBytes(s) + sizeof(float) * s.batch * s.newTokens * s.heads * s.splits;
}

// Enough for every call within `most`: fewer rows may have more splits, but no more than one wave.
MLA_BOTH size_t workspaceBound(Sizes const& most, int32_t multiprocessors)
{
    size_t const rows = static_cast<size_t>(most.batch) * most.newTokens * most.heads;
    size_t const wave = static_cast<size_t>(rowsPerBlock(most)) * multiprocessors;
    size_t const splits = ceilDiv(most.capacity, 2 * kTokens);
    size_t const wanted = rows > wave ? rows : wave;
    size_t const bound = rows * splits < wanted ? rows * splits : wanted;
    return sizeof(float) * (bound > rows ? bound : rows) * (most.latent + 1);
}

// Why the kernels cannot take these sizes; null when they can.
inline char const* refusal(Sizes const& s, Storage storage)
{
    if (s.newTokens > kMaxNewTokens)
    {
        return "more than 8 new tokens: prefill is another engine's work";
    }
    if (s.latent < 16 || s.latent > kMaxLatent || s.latent % 16 != 0)
    {
        return "the latent width is not a multiple of 16 up to 512";
    }
    if (s.rope < 0 || s.rope % 16 != 0 || s.latent + s.rope > kMaxRow)
    {
        return "the rope width is not a multiple of 16, or the row is wider than 576";
    }
    if (storage == Storage::kPLAIN)
    {
        return nullptr;
    }
    if (s.tile < 1 || s.latent % s.tile != 0)
    {
        return "tile does not divide the latent width";
    }
    if (s.rope > 0 && (s.ropeTile < 1 || s.rope % s.ropeTile != 0))
    {
        return "rope_tile does not divide the rope width";
    }
    return nullptr;
}

} // namespace mla_decode
