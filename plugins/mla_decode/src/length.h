// What a row holds and what its new tokens see, and the sizes that kernels share.

#pragma once

#include "numbers.h"
#include "step.h"

namespace mla_decode
{

constexpr int kAppendWarps = 4;
constexpr int kSlices = 4;                // warps that share out the columns of one score
constexpr int kScoreStride = kTokens + 4; // no two rows of a fragment in one bank
constexpr int kShareStride = kTokens + 8;
constexpr float kLog2E = 1.44269504F;     // a power of e is one of 2, which devices compute
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

} // namespace mla_decode
