// What the harness's cases share: the logger, the creator, descriptions of a call, and refusals.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace harness {

using namespace nvinfer1;

constexpr int32_t kInputs = 5;
constexpr int32_t kOutputs = 5;

struct Skip : std::runtime_error {
  using std::runtime_error::runtime_error;
};

[[noreturn]] inline void fail(std::string const& what) { throw std::runtime_error(what); }

inline void check(bool condition, std::string const& what) {
  if (!condition) fail(what);
}

class Log final : public ILogger {
 public:
  void log(Severity severity, AsciiChar const* message) noexcept override {
    if (severity == Severity::kERROR) errors += std::string(message) + "\n";
  }
  std::string errors;
};

class Finder final : public ILoggerFinder {
 public:
  explicit Finder(Log& log) : log_(log) {}
  ILogger* findLogger() override { return &log_; }

 private:
  Log& log_;
};

inline Log g_log;
inline Finder g_finder(g_log);
inline IPluginCreatorV3One* g_creator = nullptr;

// The last refusal must name what is wrong, through TensorRT's logger.
inline void check_refused(bool refused, std::string const& expected_text) {
  check(refused, "was not refused: " + expected_text);
  check(g_log.errors.find(expected_text) != std::string::npos,
        "message lacks '" + expected_text + "', it says: " + g_log.errors);
  g_log.errors.clear();
}

using Fields = std::vector<std::pair<std::string, std::string>>;

inline std::unique_ptr<IPluginV3> create_raw(std::vector<PluginField> const& fields,
                                             TensorRTPhase phase = TensorRTPhase::kBUILD) {
  PluginFieldCollection const collection{static_cast<int32_t>(fields.size()), fields.data()};
  return std::unique_ptr<IPluginV3>(g_creator->createPlugin("node", &collection, phase));
}

inline std::unique_ptr<IPluginV3> create(Fields const& values = {}, TensorRTPhase phase = TensorRTPhase::kBUILD) {
  std::vector<PluginField> fields;
  for (auto const& [name, value] : values) {
    fields.emplace_back(name.c_str(), value.data(), PluginFieldType::kCHAR, static_cast<int32_t>(value.size()));
  }
  return create_raw(fields, phase);
}

template <class Capability>
Capability* capability(IPluginV3& plugin, PluginCapabilityType type) {
  auto* const found = dynamic_cast<Capability*>(plugin.getCapabilityInterface(type));
  check(found != nullptr, "capability " + std::to_string(static_cast<int32_t>(type)) + " is missing");
  return found;
}

inline IPluginV3OneBuild* build_of(IPluginV3& plugin) {
  return capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
}

inline IPluginV3OneRuntime* runtime_of(IPluginV3& plugin) {
  return capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
}

inline Fields serialized(IPluginV3& plugin) {
  Fields out;
  PluginFieldCollection const* const fields = runtime_of(plugin)->getFieldsToSerialize();
  for (int32_t i = 0; i < fields->nbFields; ++i) {
    PluginField const& field = fields->fields[i];
    check(field.type == PluginFieldType::kCHAR, "serialized fields are strings");
    out.emplace_back(field.name, std::string(static_cast<char const*>(field.data), field.length));
  }
  return out;
}

inline Fields const kDefaults{{"scorer", "paper"}, {"select", "highest"}, {"budget", "joint"}};

inline Dims dims(std::vector<int64_t> const& sizes) {
  Dims out{};
  out.nbDims = static_cast<int32_t>(sizes.size());
  for (size_t i = 0; i < sizes.size(); ++i) out.d[i] = sizes[i];
  return out;
}

// Sizes of one call, in the order of the node's contract.
struct Call {
  int64_t batch = 1, sequence = 700, visual = 576, kept = 144, heads = 32, dim = 128, width = 4096, axes = 3;
  DataType states = DataType::kHALF, hidden = DataType::kHALF;

  std::vector<Dims> inputs() const {
    return {dims({batch, sequence, heads, dim}), dims({batch, sequence, width}), dims({axes, batch, sequence}),
            dims({visual}), dims({kept})};
  }
  std::vector<Dims> outputs() const {
    return {dims({batch, rows(), width}), dims({axes, batch, rows()}), dims({rows()}), dims({kept}), dims({visual})};
  }
  int64_t rows() const { return sequence - visual + kept; }
  std::vector<PluginTensorDesc> describe() const {
    std::vector<DataType> const types{
        states, hidden,           DataType::kINT64, DataType::kINT64, DataType::kINT64,  // inputs
        hidden, DataType::kINT64, DataType::kINT64, DataType::kINT64, DataType::kFLOAT,  // outputs
    };
    std::vector<Dims> shapes = inputs();
    for (Dims const& shape : outputs()) shapes.push_back(shape);
    std::vector<PluginTensorDesc> out;
    for (size_t i = 0; i < shapes.size(); ++i) out.push_back({shapes[i], types[i], TensorFormat::kLINEAR, 1.f});
    return out;
  }
  std::vector<DynamicPluginTensorDesc> describe_dynamic() const {
    std::vector<DynamicPluginTensorDesc> out;
    for (PluginTensorDesc const& desc : describe()) out.push_back({desc, desc.dims, desc.dims, desc.dims});
    return out;
  }
};

inline bool configures(Call const& call) {
  auto const plugin = create();
  auto const tensors = call.describe_dynamic();
  return build_of(*plugin)->configurePlugin(tensors.data(), kInputs, tensors.data() + kInputs, kOutputs) == 0;
}

inline bool accepts_shapes(Call const& call) {
  auto const plugin = create();
  auto const tensors = call.describe();
  return runtime_of(*plugin)->onShapeChange(tensors.data(), kInputs, tensors.data() + kInputs, kOutputs) == 0;
}

inline size_t workspace(Call const& call) {
  auto const plugin = create();
  auto const tensors = call.describe_dynamic();
  return build_of(*plugin)->getWorkspaceSize(tensors.data(), kInputs, tensors.data() + kInputs, kOutputs);
}

}  // namespace harness
