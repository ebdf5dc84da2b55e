// A small IExprBuilder: TensorRT offers no public one, and getOutputShapes needs one to be tested without an engine.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

namespace harness {

class Expression final : public nvinfer1::IDimensionExpr, private nvinfer1::apiv::VDimensionExpr {
 public:
  explicit Expression(int64_t value) : value_(value) { mImpl = this; }
  ~Expression() noexcept override = default;

 private:
  bool isConstant() const override { return true; }
  int64_t getConstantValue() const override { return value_; }
  bool isSizeTensor() const override { return false; }

  int64_t value_;
};

class Builder final : public nvinfer1::IExprBuilder, private nvinfer1::apiv::VExprBuilder {
 public:
  Builder() { mImpl = this; }
  ~Builder() noexcept override = default;

  nvinfer1::IDimensionExpr const* make(int64_t value) {
    expressions_.push_back(std::make_unique<Expression>(value));
    return expressions_.back().get();
  }

  // An operation the plugin has no reason to use returns nullptr, and the test then fails.
  int size_tensors = 0;

 private:
  nvinfer1::IDimensionExpr const* constant(int64_t value) override { return make(value); }

  nvinfer1::IDimensionExpr const* operation(nvinfer1::DimensionOperation op, nvinfer1::IDimensionExpr const& first,
                                            nvinfer1::IDimensionExpr const& second) override {
    int64_t const a = first.getConstantValue();
    int64_t const b = second.getConstantValue();
    switch (op) {
      case nvinfer1::DimensionOperation::kSUM: return make(a + b);
      case nvinfer1::DimensionOperation::kSUB: return make(a - b);
      default: return nullptr;
    }
  }

  nvinfer1::IDimensionExpr const* declareSizeTensor(int32_t, nvinfer1::IDimensionExpr const&,
                                                    nvinfer1::IDimensionExpr const&) override {
    ++size_tensors;
    return nullptr;
  }

  std::vector<std::unique_ptr<Expression>> expressions_;
};

}  // namespace harness
