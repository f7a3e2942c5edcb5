// The plugin as TensorRT drives it, without TensorRT: the built library is loaded, its creator makes
// a plugin of a node's attributes, and that is asked for scratch and enqueued. For checks and
// timings on a device that has no TensorRT, through ctypes; no part of the plugin.

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include <dlfcn.h>

#include <NvInfer.h>

#include "step.h"

namespace mla_decode
{
namespace
{

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

using GetCreators = nvinfer1::IPluginCreatorInterface* const* (*)(int32_t&);

Dims dims(std::vector<int64_t> const& sizes)
{
    Dims made{};
    made.nbDims = static_cast<int32_t>(sizes.size());
    for (size_t i = 0; i < sizes.size(); ++i)
    {
        made.d[i] = sizes[i];
    }
    return made;
}

// Inputs and outputs of one call, in the operator's order.
struct Tensors
{
    std::vector<nvinfer1::PluginTensorDesc> in;
    std::vector<nvinfer1::PluginTensorDesc> out;
    std::vector<nvinfer1::DynamicPluginTensorDesc> dynamicIn;
    std::vector<nvinfer1::DynamicPluginTensorDesc> dynamicOut;

    Tensors(Sizes const& z, Element element, Storage storage)
    {
        DataType const query = element == Element::kHALF ? DataType::kHALF : DataType::kBF16;
        DataType const coded = storage == Storage::kINT8 ? DataType::kINT8 : DataType::kFP8;
        DataType const stored = storage == Storage::kPLAIN ? query : coded;
        int64_t const row = z.latent + z.rope;
        Dims const cache = dims({z.batch, 1, z.capacity, row});
        add(in, dims({z.batch, z.newTokens, z.heads, row}), query);
        add(in, dims({z.batch, z.newTokens, row}), query);
        add(in, cache, stored);
        add(in, dims({z.batch}), DataType::kINT64);
        add(in, dims({z.batch}), DataType::kINT64);
        add(out, dims({z.batch, z.newTokens, z.heads, z.latent}), query);
        add(out, cache, stored);
        if (storage != Storage::kPLAIN)
        {
            Dims const scales = dims({z.batch, 1, z.capacity, scalesPerRow(z)});
            add(in, scales, DataType::kFLOAT);
            add(out, scales, DataType::kFLOAT);
        }
        for (auto const& one : in)
        {
            dynamicIn.push_back({one, one.dims, one.dims, one.dims});
        }
        for (auto const& one : out)
        {
            dynamicOut.push_back({one, one.dims, one.dims, one.dims});
        }
    }

    static void add(std::vector<nvinfer1::PluginTensorDesc>& to, Dims const& shape, DataType type)
    {
        to.push_back({shape, type, nvinfer1::TensorFormat::kLINEAR, 1.0F});
    }
};

template <typename T>
T* capability(nvinfer1::IPluginV3* plugin, nvinfer1::PluginCapabilityType type)
{
    return static_cast<T*>(plugin->getCapabilityInterface(type));
}

} // namespace

// A plugin, what it was told of its tensors, and their shapes.
struct Held
{
    nvinfer1::IPluginV3* plugin;
    Tensors tensors;
};

} // namespace mla_decode

// A plugin of `library` for these sizes; null, and why on stderr, where one of its doors refuses.
extern "C" mla_decode::Held* mla_decode_open(char const* library, mla_decode::Sizes const* sizes, int element,
    int storage, float scale, int multiprocessors)
{
    using namespace mla_decode;
    void* const opened = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    auto const creators = opened == nullptr ? nullptr : reinterpret_cast<GetCreators>(dlsym(opened, "getCreators"));
    if (creators == nullptr)
    {
        std::fprintf(stderr, "%s\n", dlerror());
        return nullptr;
    }
    int32_t count = 0;
    auto* const creator = static_cast<nvinfer1::IPluginCreatorV3One*>(creators(count)[0]);
    char const* const stored = storage == 0 ? "plain" : (storage == 1 ? "int8" : "fp8");
    PluginField const fields[] = {
        {"scale", &scale, PluginFieldType::kFLOAT32, 1},
        {"latent", &sizes->latent, PluginFieldType::kINT32, 1},
        {"storage", stored, PluginFieldType::kCHAR, static_cast<int32_t>(std::strlen(stored))},
        {"tile", &sizes->tile, PluginFieldType::kINT32, 1},
        {"rope_tile", &sizes->ropeTile, PluginFieldType::kINT32, 1},
        {"multiprocessors", &multiprocessors, PluginFieldType::kINT32, 1},
    };
    nvinfer1::PluginFieldCollection const collection{6, fields};
    auto* const plugin = creator->createPlugin("check", &collection, nvinfer1::TensorRTPhase::kRUNTIME);
    if (plugin == nullptr)
    {
        return nullptr;
    }
    Tensors const t(*sizes, static_cast<Element>(element), static_cast<Storage>(storage));
    auto const ins = static_cast<int32_t>(t.in.size());
    auto const outs = static_cast<int32_t>(t.out.size());
    auto* const build = capability<nvinfer1::IPluginV3OneBuild>(plugin, nvinfer1::PluginCapabilityType::kBUILD);
    auto* const run = capability<nvinfer1::IPluginV3OneRuntime>(plugin, nvinfer1::PluginCapabilityType::kRUNTIME);
    if (build->configurePlugin(t.dynamicIn.data(), ins, t.dynamicOut.data(), outs) != 0
        || run->onShapeChange(t.in.data(), ins, t.out.data(), outs) != 0)
    {
        delete plugin;
        return nullptr;
    }
    return new Held{plugin, t};
}

// Bytes of scratch that a plan would reserve.
extern "C" std::uint64_t mla_decode_workspace(mla_decode::Held const* held)
{
    using namespace mla_decode;
    auto* const build = capability<nvinfer1::IPluginV3OneBuild>(held->plugin, nvinfer1::PluginCapabilityType::kBUILD);
    Tensors const& t = held->tensors;
    return build->getWorkspaceSize(t.dynamicIn.data(), static_cast<int32_t>(t.in.size()), t.dynamicOut.data(),
        static_cast<int32_t>(t.out.size()));
}

// 0, or what enqueue answers. Addresses on the device, in the operator's order.
extern "C" int mla_decode_enqueue(
    mla_decode::Held const* held, void const* const* inputs, void* const* outputs, void* workspace, void* stream)
{
    using namespace mla_decode;
    auto* const run
        = capability<nvinfer1::IPluginV3OneRuntime>(held->plugin, nvinfer1::PluginCapabilityType::kRUNTIME);
    Tensors const& t = held->tensors;
    return run->enqueue(
        t.in.data(), t.out.data(), inputs, outputs, workspace, static_cast<cudaStream_t>(stream));
}

extern "C" void mla_decode_close(mla_decode::Held* held)
{
    delete held->plugin;
    delete held;
}
