#include "plugin.h"

#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>

namespace ep_export {
namespace {

using nvinfer1::DataType;
using nvinfer1::DimensionOperation;
using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;
using Severity = nvinfer1::ILogger::Severity;

nvinfer1::ILoggerFinder* g_logger_finder = nullptr;

// TensorRT's callbacks are noexcept: an exception that left one would end the process. Everything runs behind this.
template <class Result, class Body>
Result guarded(char const* where, Result on_error, Body body) noexcept {
  try {
    return body();
  } catch (std::exception const& error) {
    char message[512];
    std::snprintf(message, sizeof message, "%s: %s", where, error.what());
    log_message(Severity::kERROR, message);
  } catch (...) {
    log_message(Severity::kERROR, where);
  }
  return on_error;
}

[[noreturn]] void fail(std::string const& message) { throw std::invalid_argument(message); }

constexpr std::array<char const*, 4> kScorers{"paper", "released", "order2", "norm"};
constexpr std::array<char const*, 2> kSelects{"highest", "lowest"};
constexpr std::array<char const*, 2> kBudgets{"joint", "per_picture"};
constexpr std::array<char const*, kInputs> kInputNames{"states", "hidden", "position_ids", "visual_index",
                                                       "keep_slots"};
constexpr std::array<int32_t, kInputs> kInputRanks{4, 3, 3, 1, 1};

// The index of the field's value among the known ones, which are listed in the order of their enum.
template <size_t kCount>
int32_t index_of(PluginField const& field, std::array<char const*, kCount> const& known) {
  if (field.type != PluginFieldType::kCHAR) fail(std::string(field.name) + ": expected a string");
  if (field.data == nullptr || field.length < 1) fail(std::string(field.name) + ": expected a string, got nothing");
  std::string value(static_cast<char const*>(field.data), static_cast<size_t>(field.length));
  value.resize(std::strlen(value.c_str()));  // some callers count the terminating zero
  std::string listed;
  for (size_t i = 0; i < kCount; ++i) {
    if (value == known[i]) return static_cast<int32_t>(i);
    listed += (i == 0 ? "" : ", ") + std::string(known[i]);
  }
  fail(std::string(field.name) + ": unknown value '" + value + "', expected one of " + listed);
}

Options parse(PluginFieldCollection const* collection) {
  Options options;
  if (collection == nullptr) return options;
  for (int32_t i = 0; i < collection->nbFields; ++i) {
    PluginField const& field = collection->fields[i];
    std::string const name = field.name == nullptr ? "" : field.name;
    if (name == "scorer") {
      options.scorer = static_cast<Scorer>(index_of(field, kScorers));
    } else if (name == "select") {
      options.select = static_cast<Select>(index_of(field, kSelects));
    } else if (name == "budget") {
      options.budget = static_cast<Budget>(index_of(field, kBudgets));
    } else if (name != "plugin_namespace" && name != "plugin_version") {
      fail("unknown field '" + name + "', expected scorer, select or budget");
    }
  }
  return options;
}

PluginField text_field(char const* name, char const* value) {
  return {name, value, PluginFieldType::kCHAR, value == nullptr ? 0 : static_cast<int32_t>(std::strlen(value))};
}

bool is_float(DataType type) { return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16; }

Type element_type(DataType type) {
  switch (type) {
    case DataType::kFLOAT: return Type::kFloat32;
    case DataType::kHALF: return Type::kFloat16;
    case DataType::kBF16: return Type::kBFloat16;
    default: fail("expected float32, float16 or bfloat16");
  }
}

void check_counts(int32_t inputs, int32_t outputs) {
  if (inputs != kInputs || outputs != kOutputs) {
    fail("expected " + std::to_string(kInputs) + " inputs and " + std::to_string(kOutputs) + " outputs, got " +
         std::to_string(inputs) + " and " + std::to_string(outputs));
  }
}

void check_rank(int32_t input, int32_t rank) {
  if (rank != kInputRanks[input]) {
    fail(std::string(kInputNames[input]) + ": expected " + std::to_string(kInputRanks[input]) + " dimensions, got " +
         std::to_string(rank));
  }
}

// -1 in `a` or `b` is a dimension that is not known yet.
void check_equal(char const* what, int64_t a, int64_t b) {
  if (a >= 0 && b >= 0 && a != b) {
    fail(std::string(what) + " differ: " + std::to_string(a) + " and " + std::to_string(b));
  }
}

// The shape of a call whose input dimensions `dims(i)` gives, checked against each other and the kernel's limits.
template <class DimsOf>
Shape shape_of(DimsOf dims) {
  for (int32_t i = 0; i < kInputs; ++i) check_rank(i, dims(i).nbDims);
  Dims const states = dims(kStates);
  Dims const hidden = dims(kHidden);
  Dims const positions = dims(kPositionIds);
  if (states.d[0] != 1 || hidden.d[0] != 1 || positions.d[1] != 1) {
    fail("batch: expected 1 (visual_index names positions of one sequence), got " + std::to_string(states.d[0]) + ", " +
         std::to_string(hidden.d[0]) + " and " + std::to_string(positions.d[1]) +
         " in states, hidden and position_ids");
  }
  check_equal("sequence lengths of states and hidden", states.d[1], hidden.d[1]);
  check_equal("sequence lengths of position_ids and hidden", positions.d[2], hidden.d[1]);
  Shape const shape{hidden.d[1], dims(kVisualIndex).d[0], dims(kKeepSlots).d[0], states.d[2], states.d[3],
                    hidden.d[2], positions.d[0]};
  if (char const* const error = shape_error(shape)) {
    fail(std::string(error) + "; got S=" + std::to_string(shape.sequence) + " N=" + std::to_string(shape.visual) +
         " k=" + std::to_string(shape.kept) + " H=" + std::to_string(shape.heads) + " D=" + std::to_string(shape.dim) +
         " d=" + std::to_string(shape.width) + " A=" + std::to_string(shape.axes));
  }
  return shape;
}

}  // namespace

void log_message(Severity severity, std::string const& message) noexcept {
  try {
    std::string const line = std::string(kPluginName) + ": " + message;
    nvinfer1::ILogger* const logger = g_logger_finder == nullptr ? nullptr : g_logger_finder->findLogger();
    if (logger != nullptr) {
      logger->log(severity, line.c_str());
    } else {
      std::fprintf(stderr, "%s\n", line.c_str());
    }
  } catch (...) {  // a message that cannot be delivered must not end the process
  }
}

EntropyPrunePlugin::EntropyPrunePlugin(Options const& options)
    : options_(options),
      fields_{text_field("scorer", kScorers[static_cast<size_t>(options.scorer)]),
              text_field("select", kSelects[static_cast<size_t>(options.select)]),
              text_field("budget", kBudgets[static_cast<size_t>(options.budget)])},
      collection_{static_cast<int32_t>(fields_.size()), fields_.data()} {}

nvinfer1::IPluginCapability* EntropyPrunePlugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

nvinfer1::IPluginV3* EntropyPrunePlugin::clone() noexcept {
  return guarded("clone", static_cast<nvinfer1::IPluginV3*>(nullptr),
                 [&] { return std::make_unique<EntropyPrunePlugin>(options_).release(); });
}

int32_t EntropyPrunePlugin::getOutputDataTypes(DataType* outputs, int32_t output_count, DataType const* inputs,
                                               int32_t input_count) const noexcept {
  return guarded("output types", 1, [&] {
    check_counts(input_count, output_count);
    for (int32_t const i : {kStates, kHidden}) {
      if (!is_float(inputs[i])) {
        fail(std::string(kInputNames[i]) + ": expected float32, float16 or bfloat16, got TensorRT type " +
             std::to_string(static_cast<int32_t>(inputs[i])));
      }
    }
    for (int32_t const i : {kPositionIds, kVisualIndex, kKeepSlots}) {
      if (inputs[i] != DataType::kINT64) {
        fail(std::string(kInputNames[i]) + ": expected int64, got TensorRT type " +
             std::to_string(static_cast<int32_t>(inputs[i])));
      }
    }
    outputs[kKeptHidden] = inputs[kHidden];
    outputs[kKeptPositionIds] = DataType::kINT64;
    outputs[kKeptIndex] = DataType::kINT64;
    outputs[kKeptVisualIndex] = DataType::kINT64;
    outputs[kScores] = DataType::kFLOAT;
    return 0;
  });
}

int32_t EntropyPrunePlugin::getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t input_count,
                                            nvinfer1::DimsExprs const*, int32_t, nvinfer1::DimsExprs* outputs,
                                            int32_t output_count, nvinfer1::IExprBuilder& builder) noexcept {
  return guarded("output shapes", 1, [&] {
    check_counts(input_count, output_count);
    for (int32_t i = 0; i < kInputs; ++i) check_rank(i, inputs[i].nbDims);
    // M = S - N + k comes from input dimensions alone: no size tensor, whose type changed in TensorRT 10.15.
    auto const* const text =
        builder.operation(DimensionOperation::kSUB, *inputs[kHidden].d[1], *inputs[kVisualIndex].d[0]);
    if (text == nullptr) fail("the expression builder returned nothing");
    auto const* const rows = builder.operation(DimensionOperation::kSUM, *text, *inputs[kKeepSlots].d[0]);
    if (rows == nullptr) fail("the expression builder returned nothing");
    outputs[kKeptHidden] = inputs[kHidden];
    outputs[kKeptHidden].d[1] = rows;
    outputs[kKeptPositionIds] = inputs[kPositionIds];
    outputs[kKeptPositionIds].d[2] = rows;
    outputs[kKeptIndex].nbDims = 1;
    outputs[kKeptIndex].d[0] = rows;
    outputs[kKeptVisualIndex] = inputs[kKeepSlots];
    outputs[kScores] = inputs[kVisualIndex];
    return 0;
  });
}

bool EntropyPrunePlugin::supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const* tensors,
                                                   int32_t input_count, int32_t output_count) noexcept {
  return guarded("formats", false, [&] {
    check_counts(input_count, output_count);
    if (position < 0 || position >= kInputs + kOutputs) fail("tensor " + std::to_string(position) + " does not exist");
    PluginTensorDesc const& tensor = tensors[position].desc;
    if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
    switch (position) {
      case kStates:
      case kHidden: return is_float(tensor.type);
      case kInputs + kKeptHidden: return tensor.type == tensors[kHidden].desc.type;
      case kInputs + kScores: return tensor.type == DataType::kFLOAT;
      default: return tensor.type == DataType::kINT64;
    }
  });
}

int32_t EntropyPrunePlugin::configurePlugin(DynamicPluginTensorDesc const* inputs, int32_t input_count,
                                            DynamicPluginTensorDesc const*, int32_t output_count) noexcept {
  return guarded("configure", 1, [&] {
    check_counts(input_count, output_count);
    // The largest and the preferred shape must be possible. The smallest need not: each dimension has its own minimum.
    shape_of([&](int32_t i) { return inputs[i].max; });
    shape_of([&](int32_t i) { return inputs[i].opt; });
    return 0;
  });
}

size_t EntropyPrunePlugin::getWorkspaceSize(DynamicPluginTensorDesc const* inputs, int32_t input_count,
                                            DynamicPluginTensorDesc const*, int32_t output_count) const noexcept {
  return guarded("workspace", size_t{0}, [&] {
    check_counts(input_count, output_count);
    return workspace_bytes(shape_of([&](int32_t i) { return inputs[i].max; }));
  });
}

int32_t EntropyPrunePlugin::onShapeChange(PluginTensorDesc const* inputs, int32_t input_count, PluginTensorDesc const*,
                                          int32_t output_count) noexcept {
  return guarded("shapes", 1, [&] {
    check_counts(input_count, output_count);
    shape_of([&](int32_t i) { return inputs[i].dims; });
    return 0;
  });
}

int32_t EntropyPrunePlugin::enqueue(PluginTensorDesc const* input_descs, PluginTensorDesc const*,
                                    void const* const* inputs, void* const* outputs, void* workspace,
                                    cudaStream_t stream) noexcept {
  return guarded("enqueue", 1, [&] {
    Tensors const tensors{inputs[kStates],
                          inputs[kHidden],
                          static_cast<int64_t const*>(inputs[kPositionIds]),
                          static_cast<int64_t const*>(inputs[kVisualIndex]),
                          outputs[kKeptHidden],
                          static_cast<int64_t*>(outputs[kKeptPositionIds]),
                          static_cast<int64_t*>(outputs[kKeptIndex]),
                          static_cast<int64_t*>(outputs[kKeptVisualIndex]),
                          static_cast<float*>(outputs[kScores])};
    Shape const shape = shape_of([&](int32_t i) { return input_descs[i].dims; });
    cudaError_t const error = launch(shape, options_, element_type(input_descs[kStates].type),
                                     element_type(input_descs[kHidden].type), tensors, workspace, stream);
    if (error != cudaSuccess) fail(std::string("CUDA: ") + cudaGetErrorString(error));
    return 0;
  });
}

nvinfer1::IPluginV3* EntropyPrunePlugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept {
  return clone();  // the plugin holds no resources: a context's copy is as good as any
}

PluginFieldCollection const* EntropyPrunePlugin::getFieldsToSerialize() noexcept { return &collection_; }

EntropyPruneCreator::EntropyPruneCreator()
    : fields_{PluginField{"scorer", nullptr, PluginFieldType::kCHAR, 1},
              PluginField{"select", nullptr, PluginFieldType::kCHAR, 1},
              PluginField{"budget", nullptr, PluginFieldType::kCHAR, 1}},
      collection_{static_cast<int32_t>(fields_.size()), fields_.data()} {}

nvinfer1::IPluginV3* EntropyPruneCreator::createPlugin(nvinfer1::AsciiChar const*, PluginFieldCollection const* fields,
                                                       nvinfer1::TensorRTPhase) noexcept {
  return guarded("create", static_cast<nvinfer1::IPluginV3*>(nullptr),
                 [&] { return std::make_unique<EntropyPrunePlugin>(parse(fields)).release(); });
}

}  // namespace ep_export

// The two symbols TensorRT looks for. There is no registration macro: built on 10.3 headers it would call the registry
// of TensorRT 11 through the wrong virtual table, while this library has no undefined TensorRT symbol at all.
extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  ep_export::g_logger_finder = finder;
}

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(
    int32_t& count) {
  static ep_export::EntropyPruneCreator creator;
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&creator};
  count = 1;
  return creators;
}
