// The kernels' arithmetic on a CPU: the same templates as on the device, blocks one by one. For
// tests, which call `mla_decode_on_host` through ctypes; no part of the plugin.

#include <cstdint>
#include <cstring>
#include <vector>

#include "block_host.h"
#include "kernels.h"

namespace mla_decode
{
namespace
{

template <typename T, typename Coding, int ROWS>
void attend(Step const& step, Order order)
{
    using A = Attend<T, ROWS>;
    Sizes const& z = step.sizes;
    int const tiles = ceilDiv(z.newTokens * z.heads, ROWS);
    std::vector<char> memory(Shared<T, Coding>(z, ROWS).bytes);
    for (int b = 0; b < z.batch; ++b)
    {
        for (int split = 0; split < z.splits; ++split)
        {
            for (int tile = 0; tile < tiles; ++tile)
            {
                // Shared memory as it may be found: every half and float in it is a NaN.
                std::memset(memory.data(), 0xFF, memory.size());
                Block<A::kWarps> block(order);
                attend_split<T, Coding, ROWS>(block, step, memory.data(), tile, split, b);
            }
        }
    }
}

template <typename T, typename Coding>
void run(Step const& step, Order order)
{
    Sizes const& z = step.sizes;
    for (int b = 0; b < z.batch; ++b)
    {
        for (int s = 0; s < z.newTokens; ++s)
        {
            Block<kAppendWarps> block(order);
            append_row<T, Coding>(block, step, b, s);
        }
    }
    if (rowsPerBlock(z) == 16)
    {
        attend<T, Coding, 16>(step, order);
    }
    else
    {
        attend<T, Coding, 32>(step, order);
    }
    std::vector<float> memory(joinBytes(z) / sizeof(float));
    for (int row = 0; row < z.batch * z.newTokens * z.heads; ++row)
    {
        for (int chunk = 0; chunk < ceilDiv(z.latent, kJoinColumns); ++chunk)
        {
            std::memset(memory.data(), 0xFF, joinBytes(z));
            Block<kJoinWarps> block(order);
            join_splits<T>(block, step, memory.data(), row, chunk);
        }
    }
}

template <typename T>
void run_stored(Step const& step, Storage storage, Order order)
{
    switch (storage)
    {
    case Storage::kPLAIN: return run<T, Plain<T>>(step, order);
    case Storage::kINT8: return run<T, Int8>(step, order);
    case Storage::kFP8: return run<T, Fp8>(step, order);
    }
}

} // namespace
} // namespace mla_decode

// 0, or 1 when the kernels do not take these sizes. `multiprocessors` as on the device.
extern "C" int mla_decode_on_host(
    mla_decode::Step* step, int element, int storage, int multiprocessors, int reversed, int late)
{
    using namespace mla_decode;
    auto const stored = static_cast<Storage>(storage);
    if (refusal(step->sizes, stored) != nullptr)
    {
        return 1;
    }
    step->sizes.splits = splitsFor(step->sizes, multiprocessors);
    // Scratch as it may be found: NaN everywhere.
    std::vector<float> scratch(workspaceBytes(step->sizes) / sizeof(float));
    std::memset(scratch.data(), 0xFF, scratch.size() * sizeof(float));
    step->partial = scratch.data();
    step->logSum = scratch.data() + partialBytes(step->sizes) / sizeof(float);
    Order const order{reversed != 0, late != 0};
    if (element == static_cast<int>(Element::kHALF))
    {
        run_stored<__half>(*step, stored, order);
    }
    else
    {
        run_stored<__nv_bfloat16>(*step, stored, order);
    }
    return 0;
}

// Scratch bytes of a call, and what is reserved for every call within the same sizes.
extern "C" void mla_decode_scratch(
    mla_decode::Sizes const* sizes, int multiprocessors, std::uint64_t* needed, std::uint64_t* reserved)
{
    mla_decode::Sizes call = *sizes;
    call.splits = mla_decode::splitsFor(call, multiprocessors);
    *needed = mla_decode::workspaceBytes(call);
    *reserved = mla_decode::workspaceBound(call, multiprocessors);
}

// Shared memory that a block asks for at launch.
extern "C" std::uint64_t mla_decode_shared(mla_decode::Sizes const* sizes, int storage, int rows)
{
    using namespace mla_decode;
    switch (static_cast<Storage>(storage))
    {
    case Storage::kPLAIN: return Shared<__half, Plain<__half>>(*sizes, rows).bytes;
    case Storage::kINT8: return Shared<__half, Int8>(*sizes, rows).bytes;
    case Storage::kFP8: return Shared<__half, Fp8>(*sizes, rows).bytes;
    }
    return 0;
}
