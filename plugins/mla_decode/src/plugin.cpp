// The plugin's part of plugin.h: shapes, types, aliases, scratch, and the call of the kernels.
// Nothing here asks for a device before a context runs: plans are built where there is none.

#include "plugin.h"

#include <cstdint>

#include <cuda_runtime_api.h>

#include "launch.h"
#include "report.h"

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

namespace mla_decode
{
namespace
{

constexpr int32_t kQuery = 0;
constexpr int32_t kNewRow = 1;
constexpr int32_t kCache = 2;
constexpr int32_t kCacheLengths = 3;
constexpr int32_t kNewLengths = 4;
constexpr int32_t kScales = 5; // of a coded cache
constexpr int32_t kOut = 0;
constexpr int32_t kCacheOut = 1;
constexpr int32_t kScalesOut = 2;

bool is_half(DataType type)
{
    return type == DataType::kHALF || type == DataType::kBF16;
}

DataType stored_type(Storage storage, DataType query)
{
    switch (storage)
    {
    case Storage::kPLAIN: return query;
    case Storage::kINT8: return DataType::kINT8;
    case Storage::kFP8: return DataType::kFP8;
    }
    return query;
}

size_t bytes_of(nvinfer1::PluginTensorDesc const& desc)
{
    size_t bytes = desc.type == DataType::kFLOAT ? 4U : (is_half(desc.type) ? 2U : 1U);
    for (int32_t i = 0; i < desc.dims.nbDims; ++i)
    {
        bytes *= static_cast<size_t>(desc.dims.d[i]);
    }
    return bytes;
}

} // namespace

Plugin::Plugin(Settings const& settings)
    : mSettings{settings}
    , mStorageName{storage_name(settings.storage)}
{
}

nvinfer1::IPluginCapability* Plugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept
{
    switch (type)
    {
    case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuildV2*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

nvinfer1::IPluginV3* Plugin::clone() noexcept
{
    return new Plugin(mSettings);
}

nvinfer1::AsciiChar const* Plugin::getPluginName() const noexcept
{
    return kPluginName;
}

nvinfer1::AsciiChar const* Plugin::getPluginVersion() const noexcept
{
    return kPluginVersion;
}

nvinfer1::AsciiChar const* Plugin::getPluginNamespace() const noexcept
{
    return kPluginNamespace;
}

int32_t Plugin::inputCount() const
{
    return mSettings.storage == Storage::kPLAIN ? 5 : 6;
}

int32_t Plugin::getNbOutputs() const noexcept
{
    return mSettings.storage == Storage::kPLAIN ? 2 : 3;
}

int32_t Plugin::getOutputDataTypes(
    DataType* outputs, int32_t nbOutputs, DataType const* inputs, int32_t nbInputs) const noexcept
{
    if (nbInputs != inputCount() || nbOutputs != getNbOutputs())
    {
        report("MlaDecode takes 5 inputs and gives 2 outputs, or 6 and 3 where the cache is coded");
        return -1;
    }
    outputs[kOut] = inputs[kQuery];
    outputs[kCacheOut] = inputs[kCache];
    if (nbOutputs > kScalesOut)
    {
        outputs[kScalesOut] = inputs[kScales];
    }
    return 0;
}

int32_t Plugin::getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs, nvinfer1::DimsExprs const*,
    int32_t, nvinfer1::DimsExprs* outputs, int32_t nbOutputs, nvinfer1::IExprBuilder& builder) noexcept
{
    if (nbInputs != inputCount() || inputs[kQuery].nbDims != 4 || inputs[kNewRow].nbDims != 3
        || inputs[kCache].nbDims != 4)
    {
        report("MlaDecode wants query_BSHE, new_row_BSE, cache_B1ME, cache_lengths_B, new_lengths_B");
        return -1;
    }
    outputs[kOut] = inputs[kQuery];
    outputs[kOut].d[3] = builder.constant(mSettings.latent);
    outputs[kCacheOut] = inputs[kCache];
    if (nbOutputs > kScalesOut)
    {
        outputs[kScalesOut] = inputs[kScales];
    }
    return 0;
}

bool Plugin::supportsFormatCombination(
    int32_t pos, nvinfer1::DynamicPluginTensorDesc const* inOut, int32_t nbInputs, int32_t) noexcept
{
    nvinfer1::PluginTensorDesc const& asked = inOut[pos].desc;
    DataType const query = inOut[kQuery].desc.type;
    if (asked.format != nvinfer1::TensorFormat::kLINEAR || !is_half(query))
    {
        return false;
    }
    if (pos == kCacheLengths || pos == kNewLengths)
    {
        return asked.type == DataType::kINT64;
    }
    if (pos == kCache || pos == nbInputs + kCacheOut)
    {
        return asked.type == stored_type(mSettings.storage, query);
    }
    if ((pos == kScales && nbInputs > kScales) || pos == nbInputs + kScalesOut)
    {
        return asked.type == DataType::kFLOAT;
    }
    return asked.type == query;
}

Sizes Plugin::sizesOf(Dims const& query, Dims const& cache) const
{
    Sizes sizes{};
    sizes.batch = static_cast<int32_t>(query.d[0]);
    sizes.newTokens = static_cast<int32_t>(query.d[1]);
    sizes.heads = static_cast<int32_t>(query.d[2]);
    sizes.capacity = static_cast<int32_t>(cache.d[2]);
    sizes.latent = mSettings.latent;
    sizes.rope = static_cast<int32_t>(query.d[3]) - mSettings.latent;
    sizes.tile = mSettings.tile;
    sizes.ropeTile = mSettings.ropeTile;
    sizes.splits = splitsFor(sizes, mSettings.multiprocessors);
    return sizes;
}

bool Plugin::takes(Sizes const& sizes, Dims const& query, Dims const& cache) const
{
    char const* why = refusal(sizes, mSettings.storage);
    if (why == nullptr && (cache.d[1] != 1 || cache.d[3] != query.d[3] || cache.d[0] != query.d[0]))
    {
        why = "the cache is not [batch, 1, capacity, L + R] of the query's batch and width";
    }
    if (why != nullptr)
    {
        report(why);
    }
    return why == nullptr;
}

int32_t Plugin::configurePlugin(
    nvinfer1::DynamicPluginTensorDesc const* in, int32_t, nvinfer1::DynamicPluginTensorDesc const*, int32_t) noexcept
{
    Dims const& query = in[kQuery].max;
    Dims const& cache = in[kCache].max;
    return takes(sizesOf(query, cache), query, cache) ? 0 : -1;
}

size_t Plugin::getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t,
    nvinfer1::DynamicPluginTensorDesc const*, int32_t) const noexcept
{
    return workspaceBound(sizesOf(inputs[kQuery].max, inputs[kCache].max), mSettings.multiprocessors);
}

int32_t Plugin::getAliasedInput(int32_t output) noexcept
{
    switch (output)
    {
    case kCacheOut: return kCache;
    case kScalesOut: return mSettings.storage == Storage::kPLAIN ? -1 : kScales;
    default: return -1;
    }
}

int32_t Plugin::onShapeChange(
    nvinfer1::PluginTensorDesc const* in, int32_t, nvinfer1::PluginTensorDesc const*, int32_t) noexcept
{
    return takes(sizesOf(in[kQuery].dims, in[kCache].dims), in[kQuery].dims, in[kCache].dims) ? 0 : -1;
}

int32_t Plugin::enqueue(nvinfer1::PluginTensorDesc const* inputDesc, nvinfer1::PluginTensorDesc const*,
    void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept
{
    // Where input and output are one buffer, as they are aliased, there is nothing to copy.
    if (outputs[kCacheOut] != inputs[kCache])
    {
        cudaError_t const copied = cudaMemcpyAsync(
            outputs[kCacheOut], inputs[kCache], bytes_of(inputDesc[kCache]), cudaMemcpyDeviceToDevice, stream);
        if (copied != cudaSuccess)
        {
            report(cudaGetErrorString(copied));
            return -1;
        }
    }
    Step step{};
    step.query = inputs[kQuery];
    step.newRow = inputs[kNewRow];
    step.cache = outputs[kCacheOut];
    step.cacheLengths = static_cast<int64_t const*>(inputs[kCacheLengths]);
    step.newLengths = static_cast<int64_t const*>(inputs[kNewLengths]);
    step.out = outputs[kOut];
    step.scale = mSettings.scale;
    step.sizes = sizesOf(inputDesc[kQuery].dims, inputDesc[kCache].dims);
    step.partial = static_cast<float*>(workspace);
    step.logSum = step.partial + partialBytes(step.sizes) / sizeof(float);
    if (mSettings.storage != Storage::kPLAIN)
    {
        step.scales = static_cast<float*>(outputs[kScalesOut]);
        if (outputs[kScalesOut] != inputs[kScales])
        {
            cudaError_t const copied = cudaMemcpyAsync(
                outputs[kScalesOut], inputs[kScales], bytes_of(inputDesc[kScales]), cudaMemcpyDeviceToDevice, stream);
            if (copied != cudaSuccess)
            {
                report(cudaGetErrorString(copied));
                return -1;
            }
        }
    }
    Element const element = inputDesc[kQuery].type == DataType::kHALF ? Element::kHALF : Element::kBFLOAT16;
    cudaError_t const launched = launch(step, element, mSettings.storage, stream);
    if (launched != cudaSuccess)
    {
        report(cudaGetErrorString(launched));
    }
    return launched == cudaSuccess ? 0 : -1;
}

nvinfer1::IPluginV3* Plugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept
{
    return clone();
}

nvinfer1::PluginFieldCollection const* Plugin::getFieldsToSerialize() noexcept
{
    mFields = {
        {"scale", &mSettings.scale, PluginFieldType::kFLOAT32, 1},
        {"latent", &mSettings.latent, PluginFieldType::kINT32, 1},
        {"storage", mStorageName.data(), PluginFieldType::kCHAR, static_cast<int32_t>(mStorageName.size())},
        {"tile", &mSettings.tile, PluginFieldType::kINT32, 1},
        {"rope_tile", &mSettings.ropeTile, PluginFieldType::kINT32, 1},
        {"multiprocessors", &mSettings.multiprocessors, PluginFieldType::kINT32, 1},
    };
    mCollection = {static_cast<int32_t>(mFields.size()), mFields.data()};
    return &mCollection;
}

} // namespace mla_decode
