// The EntropyPrune node of TensorRT: IPluginV3 over the launch function of entropy_prune.h.
#pragma once

#include <NvInferRuntime.h>

#include <array>
#include <string>

#include "entropy_prune.h"

namespace ep_export {

constexpr char const* kPluginName = "EntropyPrune";
constexpr char const* kPluginVersion = "2";
constexpr char const* kPluginNamespace = "ep_export";

// Inputs and outputs in the order of the node.
enum Input : int32_t { kStates, kHidden, kPositionIds, kVisualIndex, kKeepSlots, kInputs };
enum Output : int32_t { kKeptHidden, kKeptPositionIds, kKeptIndex, kKeptVisualIndex, kScores, kOutputs };

// Writes to TensorRT's logger, or to stderr as long as no logger finder was given: an error is never silent.
void log_message(nvinfer1::ILogger::Severity severity, std::string const& message) noexcept;

class EntropyPrunePlugin final : public nvinfer1::IPluginV3,
                                 public nvinfer1::IPluginV3OneCore,
                                 public nvinfer1::IPluginV3OneBuild,
                                 public nvinfer1::IPluginV3OneRuntime {
 public:
  explicit EntropyPrunePlugin(Options const& options);
  EntropyPrunePlugin(EntropyPrunePlugin const&) = delete;
  EntropyPrunePlugin& operator=(EntropyPrunePlugin const&) = delete;
  ~EntropyPrunePlugin() noexcept override = default;

  // IPluginV3
  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  // IPluginV3OneCore
  nvinfer1::AsciiChar const* getPluginName() const noexcept override { return kPluginName; }
  nvinfer1::AsciiChar const* getPluginVersion() const noexcept override { return kPluginVersion; }
  nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override { return kPluginNamespace; }

  // IPluginV3OneBuild
  int32_t getNbOutputs() const noexcept override { return kOutputs; }
  int32_t getOutputDataTypes(nvinfer1::DataType* outputs, int32_t output_count, nvinfer1::DataType const* inputs,
                             int32_t input_count) const noexcept override;
  int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t input_count, nvinfer1::DimsExprs const* shapes,
                          int32_t shape_count, nvinfer1::DimsExprs* outputs, int32_t output_count,
                          nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t position, nvinfer1::DynamicPluginTensorDesc const* tensors,
                                 int32_t input_count, int32_t output_count) noexcept override;
  int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t input_count,
                          nvinfer1::DynamicPluginTensorDesc const* outputs, int32_t output_count) noexcept override;
  size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t input_count,
                          nvinfer1::DynamicPluginTensorDesc const* outputs,
                          int32_t output_count) const noexcept override;

  // IPluginV3OneRuntime
  int32_t onShapeChange(nvinfer1::PluginTensorDesc const* inputs, int32_t input_count,
                        nvinfer1::PluginTensorDesc const* outputs, int32_t output_count) noexcept override;
  int32_t enqueue(nvinfer1::PluginTensorDesc const* input_descs, nvinfer1::PluginTensorDesc const* output_descs,
                  void const* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
  nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override;

 private:
  Options options_;
  std::array<nvinfer1::PluginField, 3> fields_;
  nvinfer1::PluginFieldCollection collection_;
};

class EntropyPruneCreator final : public nvinfer1::IPluginCreatorV3One {
 public:
  EntropyPruneCreator();

  nvinfer1::IPluginV3* createPlugin(nvinfer1::AsciiChar const* name, nvinfer1::PluginFieldCollection const* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override;
  nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override { return &collection_; }
  nvinfer1::AsciiChar const* getPluginName() const noexcept override { return kPluginName; }
  nvinfer1::AsciiChar const* getPluginVersion() const noexcept override { return kPluginVersion; }
  nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override { return kPluginNamespace; }

 private:
  std::array<nvinfer1::PluginField, 3> fields_;
  nvinfer1::PluginFieldCollection collection_;
};

}  // namespace ep_export
