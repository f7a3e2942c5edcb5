// Makes plugins from a node's attributes or a plan's fields, and the library's two exports.
//
// TensorRT's registry finds both by name when it loads the library, so no symbol of TensorRT is
// needed to link it.

#include <cstdio>
#include <string>

#include "plugin.h"
#include "report.h"

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

namespace mla_decode
{
namespace
{

nvinfer1::ILoggerFinder* gFinder = nullptr;

bool read(PluginField const& field, float& to)
{
    if (field.type == PluginFieldType::kFLOAT32)
    {
        to = *static_cast<float const*>(field.data);
        return true;
    }
    return false;
}

bool read(PluginField const& field, int32_t& to)
{
    if (field.type == PluginFieldType::kINT32)
    {
        to = *static_cast<int32_t const*>(field.data);
        return true;
    }
    if (field.type == PluginFieldType::kINT64)
    {
        to = static_cast<int32_t>(*static_cast<int64_t const*>(field.data));
        return true;
    }
    return false;
}

bool read(PluginField const& field, Storage& to)
{
    std::string const name(static_cast<char const*>(field.data), static_cast<size_t>(field.length));
    for (Storage storage : {Storage::kPLAIN, Storage::kINT8, Storage::kFP8})
    {
        // A string attribute may come with the zero that ends it.
        if (name == storage_name(storage) || name == std::string(storage_name(storage)) + '\0')
        {
            to = storage;
            return field.type == PluginFieldType::kCHAR;
        }
    }
    return false;
}

// One field; a name that is not of this plugin (plugin_version, say) is passed over.
bool take(PluginField const& field, Settings& settings)
{
    std::string const name = field.name;
    if (name == "scale")
    {
        return read(field, settings.scale);
    }
    if (name == "latent")
    {
        return read(field, settings.latent);
    }
    if (name == "storage")
    {
        return read(field, settings.storage);
    }
    if (name == "tile")
    {
        return read(field, settings.tile);
    }
    if (name == "rope_tile")
    {
        return read(field, settings.ropeTile);
    }
    if (name == "multiprocessors")
    {
        return read(field, settings.multiprocessors);
    }
    return true;
}

} // namespace

void report(std::string const& message)
{
    nvinfer1::ILogger* const logger = gFinder == nullptr ? nullptr : gFinder->findLogger();
    std::string const told = "MlaDecode: " + message;
    if (logger != nullptr)
    {
        logger->log(nvinfer1::ILogger::Severity::kERROR, told.c_str());
    }
    else
    {
        std::fprintf(stderr, "%s\n", told.c_str());
    }
}

Creator::Creator()
    : mFields{
        {"scale", nullptr, PluginFieldType::kFLOAT32, 1},
        {"latent", nullptr, PluginFieldType::kINT32, 1},
        {"storage", nullptr, PluginFieldType::kCHAR, 1},
        {"tile", nullptr, PluginFieldType::kINT32, 1},
        {"rope_tile", nullptr, PluginFieldType::kINT32, 1},
        {"multiprocessors", nullptr, PluginFieldType::kINT32, 1},
    }
{
    mCollection = {static_cast<int32_t>(mFields.size()), mFields.data()};
}

nvinfer1::IPluginV3* Creator::createPlugin(
    nvinfer1::AsciiChar const*, nvinfer1::PluginFieldCollection const* fields, nvinfer1::TensorRTPhase) noexcept
{
    Settings settings{};
    for (int32_t i = 0; i < fields->nbFields; ++i)
    {
        if (!take(fields->fields[i], settings))
        {
            report(std::string("attribute ") + fields->fields[i].name + " has a type or value that is not known");
            return nullptr;
        }
    }
    if (settings.latent <= 0 || !(settings.scale > 0.0F) || settings.multiprocessors <= 0)
    {
        report("attributes scale, latent and multiprocessors have to be above 0");
        return nullptr;
    }
    settings.tile = settings.tile <= 0 ? settings.latent : settings.tile;
    settings.ropeTile = settings.ropeTile <= 0 ? 1 : settings.ropeTile;
    return new Plugin(settings);
}

nvinfer1::PluginFieldCollection const* Creator::getFieldNames() noexcept
{
    return &mCollection;
}

nvinfer1::AsciiChar const* Creator::getPluginName() const noexcept
{
    return kPluginName;
}

nvinfer1::AsciiChar const* Creator::getPluginVersion() const noexcept
{
    return kPluginVersion;
}

nvinfer1::AsciiChar const* Creator::getPluginNamespace() const noexcept
{
    return kPluginNamespace;
}

} // namespace mla_decode

#define MLA_EXPORT extern "C" __attribute__((visibility("default")))

MLA_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder)
{
    mla_decode::gFinder = finder;
}

MLA_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count)
{
    static mla_decode::Creator creator;
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&creator};
    count = 1;
    return creators;
}
