// Drives the built plugin library through its whole life, as TensorRT would, without TensorRT.
//
// usage: harness LIBRARY            run every case
//        harness LIBRARY CASE       run one
//        harness --list             names of the cases
// Exit status: 0 passed, 1 failed, 77 skipped (a case that needs a GPU where there is none).
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "driver.h"
#include "expr_builder.h"
#include "host_pipeline.h"

namespace {

using namespace harness;

// ---- cases ----------------------------------------------------------------------------------------------------------

void creator_names_the_node() {
  check(std::string(g_creator->getPluginName()) == "EntropyPrune", "name");
  check(std::string(g_creator->getPluginVersion()) == "1", "version");
  check(std::string(g_creator->getPluginNamespace()) == "ep_export", "namespace");
}

void creator_lists_its_fields() {
  PluginFieldCollection const* const fields = g_creator->getFieldNames();
  check(fields->nbFields == 3, "three fields");
  for (int32_t i = 0; i < 3; ++i) {
    check(fields->fields[i].name == kDefaults[i].first, "field " + kDefaults[i].first);
    check(fields->fields[i].type == PluginFieldType::kCHAR, "strings");
  }
}

void missing_fields_have_defaults() {
  auto const plugin = create();
  check(plugin != nullptr && serialized(*plugin) == kDefaults, "defaults are paper, highest, joint");
  std::unique_ptr<IPluginV3> const without(g_creator->createPlugin("node", nullptr, TensorRTPhase::kBUILD));
  check(without != nullptr && serialized(*without) == kDefaults, "no collection at all");
}

void every_value_survives_serialization() {
  for (char const* scorer : {"paper", "released", "order2", "norm"}) {
    for (char const* select : {"highest", "lowest"}) {
      for (char const* budget : {"joint", "per_picture"}) {
        Fields const fields{{"scorer", scorer}, {"select", select}, {"budget", budget}};
        auto const plugin = create(fields);
        check(plugin != nullptr && serialized(*plugin) == fields, "fields are kept");
        auto const restored = create(serialized(*plugin), TensorRTPhase::kRUNTIME);
        check(restored != nullptr && serialized(*restored) == fields, "round trip");
      }
    }
  }
}

void field_lengths_may_count_the_terminating_zero() {
  auto const plugin = create_raw({{"scorer", "norm", PluginFieldType::kCHAR, 5}});
  check(plugin != nullptr && serialized(*plugin)[0].second == "norm", "terminated string");
}

void node_identity_fields_are_ignored() {
  auto const plugin = create({{"plugin_namespace", "ep_export"}, {"plugin_version", "1"}, {"select", "lowest"}});
  check(plugin != nullptr && serialized(*plugin)[1].second == "lowest", "identity fields");
}

void bad_fields_are_refused_by_name() {
  check_refused(create({{"scorer", "entropy"}}) == nullptr, "scorer: unknown value 'entropy', expected one of paper");
  check_refused(create({{"select", "best"}}) == nullptr, "select: unknown value 'best'");
  check_refused(create({{"budget", ""}}) == nullptr, "budget: expected a string, got nothing");
  check_refused(create({{"keep", "3"}}) == nullptr, "unknown field 'keep'");
  int32_t const one = 1;
  check_refused(create_raw({{"scorer", &one, PluginFieldType::kINT32, 1}}) == nullptr, "scorer: expected a string");
  check_refused(create_raw({{"scorer", nullptr, PluginFieldType::kCHAR, 4}}) == nullptr, "got nothing");
}

void capabilities_are_all_there() {
  auto const plugin = create();
  auto* const core = capability<IPluginV3OneCore>(*plugin, PluginCapabilityType::kCORE);
  check(std::string(core->getPluginName()) == "EntropyPrune", "name");
  check(std::string(core->getPluginVersion()) == "1", "version");
  check(std::string(core->getPluginNamespace()) == "ep_export", "namespace");
  check(build_of(*plugin)->getNbOutputs() == 3, "three outputs");
  check(build_of(*plugin)->getNbTactics() == 0, "no tactics");
  runtime_of(*plugin);
  check(plugin->getCapabilityInterface(static_cast<PluginCapabilityType>(9)) == nullptr, "unknown capability");
}

void output_types_follow_the_hidden_states() {
  auto const plugin = create();
  for (DataType const states : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
    for (DataType const hidden : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
      DataType const in[]{states, hidden, DataType::kINT64, DataType::kINT64, DataType::kINT64};
      DataType out[3];
      check(build_of(*plugin)->getOutputDataTypes(out, 3, in, 5) == 0, "types are accepted");
      check(out[0] == hidden && out[1] == DataType::kINT64 && out[2] == DataType::kINT64, "types");
    }
  }
}

void unsupported_types_are_refused_by_name() {
  auto const plugin = create();
  DataType out[3];
  char const* const names[]{"states", "hidden", "position_ids", "visual_index", "keep_slots"};
  for (int32_t i = 0; i < 5; ++i) {
    DataType in[]{DataType::kHALF, DataType::kHALF, DataType::kINT64, DataType::kINT64, DataType::kINT64};
    in[i] = DataType::kINT32;
    check_refused(build_of(*plugin)->getOutputDataTypes(out, 3, in, 5) != 0, std::string(names[i]) + ": expected");
  }
  DataType const in[]{DataType::kHALF, DataType::kHALF, DataType::kINT64, DataType::kINT64};
  check_refused(build_of(*plugin)->getOutputDataTypes(out, 3, in, 4) != 0, "expected 5 inputs and 3 outputs");
}

void output_shapes_come_from_input_dimensions() {
  auto const plugin = create();
  harness::Builder builder;
  auto const shapes_of = [&](Call const& call, DimsExprs* outputs) {
    DimsExprs inputs[5];
    auto const sizes = call.inputs();
    for (int32_t i = 0; i < 5; ++i) {
      inputs[i].nbDims = sizes[i].nbDims;
      for (int32_t j = 0; j < sizes[i].nbDims; ++j) inputs[i].d[j] = builder.make(sizes[i].d[j]);
    }
    return build_of(*plugin)->getOutputShapes(inputs, 5, nullptr, 0, outputs, 3, builder);
  };
  struct {
    int64_t prompt, visual, kept, rows;
  } const cases[]{{700, 576, 144, 268}, {1, 1, 1, 1}, {9, 4, 4, 9}, {70000, 65536, 1, 4465}};
  for (auto const& item : cases) {
    Call call;
    call.prompt = item.prompt;
    call.visual = item.visual;
    call.kept = item.kept;
    DimsExprs outputs[3];
    check(shapes_of(call, outputs) == 0, "shapes are accepted");
    auto const expected = Call(call).outputs();
    for (int32_t i = 0; i < 3; ++i) {
      check(outputs[i].nbDims == expected[i].nbDims, "rank of output " + std::to_string(i));
      for (int32_t j = 0; j < expected[i].nbDims; ++j) {
        check(outputs[i].d[j]->getConstantValue() == expected[i].d[j], "dimension of output " + std::to_string(i));
      }
    }
    check(outputs[2].d[0]->getConstantValue() == item.rows, "M = S - N + k");
  }
  check(builder.size_tensors == 0, "no size tensors");

  DimsExprs inputs[5]{};
  DimsExprs outputs[3];
  check_refused(build_of(*plugin)->getOutputShapes(inputs, 5, nullptr, 0, outputs, 3, builder) != 0,
                "states: expected 4 dimensions, got 0");
}

void only_linear_formats_and_matching_types_are_supported() {
  auto const plugin = create();
  auto* const build = build_of(*plugin);
  for (DataType const states : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
    for (DataType const hidden : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
      Call call;
      call.states = states;
      call.hidden = hidden;
      auto tensors = call.describe_dynamic();
      for (int32_t i = 0; i < 8; ++i) {
        check(build->supportsFormatCombination(i, tensors.data(), 5, 3), "tensor " + std::to_string(i));
        auto changed = tensors;
        changed[i].desc.format = TensorFormat::kCHW32;
        check(!build->supportsFormatCombination(i, changed.data(), 5, 3), "vectorized format");
        changed = tensors;
        changed[i].desc.type = DataType::kINT32;
        check(!build->supportsFormatCombination(i, changed.data(), 5, 3), "int32");
      }
      tensors[5].desc.type = hidden == DataType::kFLOAT ? DataType::kHALF : DataType::kFLOAT;
      check(!build->supportsFormatCombination(5, tensors.data(), 5, 3), "output type differs from hidden");
    }
  }
}

void impossible_shapes_are_refused_by_name() {
  struct {
    std::function<void(Call&)> change;
    char const* message;
  } const cases[]{
      {[](Call& c) { c.batch = 2; }, "batch: expected 1"},
      {[](Call& c) { c.heads = 0; }, "number of heads is out of range, expected 1 to 64; got S=700 N=576 k=144 H=0"},
      {[](Call& c) { c.heads = 65; }, "number of heads is out of range"},
      {[](Call& c) { c.dim = 257; }, "head dimension is out of range, expected 1 to 256"},
      {[](Call& c) { c.kept = 577; }, "keep_slots: length is out of range"},
      {[](Call& c) { c.kept = 0; }, "keep_slots: length is out of range"},
      {[](Call& c) { c.visual = 701; }, "hidden: the prompt is shorter than visual_index"},
      {[](Call& c) { c.prompt = 70000, c.visual = 65537; }, "visual_index: length is out of range"},
      {[](Call& c) { c.axes = 17; }, "position_ids: axes are out of range"},
  };
  for (auto const& item : cases) {
    Call call;
    item.change(call);
    check_refused(!configures(call), item.message);
    check_refused(!accepts_shapes(call), item.message);
    check_refused(workspace(call) == 0, item.message);
  }
  auto const plugin = create();
  auto tensors = Call{}.describe();
  tensors[1].dims.d[1] = 701;
  check_refused(runtime_of(*plugin)->onShapeChange(tensors.data(), 5, tensors.data() + 5, 3) != 0,
                "prompt lengths of states and hidden differ: 700 and 701");
}

void the_whole_range_is_accepted() {
  for (int64_t const heads : {1, 2, 8, 16, 17, 28, 32, 33, 64}) {
    for (int64_t const dim : {1, 64, 80, 128, 256}) {
      for (int64_t const visual : {1, 576, 65536}) {
        Call call;
        call.heads = heads;
        call.dim = dim;
        call.visual = visual;
        call.kept = (visual + 1) / 2;
        call.prompt = visual + 100;
        check(configures(call) && accepts_shapes(call), "shape in range");
      }
    }
  }
  check(g_log.errors.empty(), "no errors are logged: " + g_log.errors);
}

void workspace_covers_the_largest_profile() {
  Call call;
  size_t const small = workspace(call);
  // Keys, scores and plan, 4 bytes a token each; nothing of the size of the states.
  check(small >= 12 * 576 && small < 12 * 576 + 2048, "workspace is " + std::to_string(small));
  call.prompt = 70000;
  call.visual = 65536;
  check(workspace(call) >= 12 * 65536, "workspace grows with visual_index");
  call.heads = 64;
  call.dim = 256;
  check(workspace(call) >= 12 * 65536 + 128 * 64 * 256 * 4, "large tokens get scratch memory");
}

void configure_reads_the_profile_and_not_the_unknown() {
  auto const plugin = create();
  Call call;
  auto tensors = call.describe_dynamic();
  for (auto& tensor : tensors) {
    for (int32_t i = 0; i < tensor.desc.dims.nbDims; ++i) tensor.desc.dims.d[i] = -1;
  }
  check(build_of(*plugin)->configurePlugin(tensors.data(), 5, tensors.data() + 5, 3) == 0, "dynamic dimensions");
}

void clones_are_independent() {
  Fields const fields{{"scorer", "released"}, {"select", "lowest"}, {"budget", "per_picture"}};
  auto original = create(fields);
  std::unique_ptr<IPluginV3> const copy(original->clone());
  std::unique_ptr<IPluginV3> const attached(runtime_of(*original)->attachToContext(nullptr));
  check(copy != nullptr && attached != nullptr && copy != original, "copies");
  original.reset();
  check(serialized(*copy) == fields && serialized(*attached) == fields, "copies outlive the original");
}

// One call on a GPU through the plugin, against the same text on the host.
void enqueue_keeps_what_the_host_keeps() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) throw Skip("no GPU");
  Call call;
  call.states = DataType::kFLOAT;
  call.hidden = DataType::kFLOAT;
  call.width = 96;
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  std::vector<float> states(call.prompt * call.heads * call.dim);
  std::vector<float> hidden(call.prompt * call.width);
  for (float& x : states) x = normal(random);
  for (float& x : hidden) x = normal(random);
  std::vector<int64_t> positions(call.axes * call.prompt);
  for (size_t i = 0; i < positions.size(); ++i) positions[i] = static_cast<int64_t>(7 * i);
  std::vector<int64_t> visual(call.visual);
  for (int64_t n = 0; n < call.visual; ++n) visual[n] = 35 + n + (n >= 200 ? 11 : 0);
  int64_t const rows = call.prompt - call.visual + call.kept;

  std::vector<void*> owned;
  auto const device = [&](size_t bytes, void const* from) {
    void* memory = nullptr;
    check(cudaMalloc(&memory, bytes) == cudaSuccess, "cudaMalloc");
    if (from != nullptr) check(cudaMemcpy(memory, from, bytes, cudaMemcpyHostToDevice) == cudaSuccess, "copy in");
    owned.push_back(memory);
    return memory;
  };
  for (char const* budget : {"joint", "per_picture"}) {
    auto const plugin = create({{"budget", budget}});
    auto const tensors = call.describe();
    void const* const inputs[]{device(states.size() * 4, states.data()), device(hidden.size() * 4, hidden.data()),
                               device(positions.size() * 8, positions.data()), device(visual.size() * 8, visual.data()),
                               device(call.kept * 8, nullptr)};
    void* const outputs[]{device(rows * call.width * 4, nullptr), device(call.axes * rows * 8, nullptr),
                          device(rows * 8, nullptr)};
    cudaStream_t stream;
    check(cudaStreamCreate(&stream) == cudaSuccess, "stream");
    auto* const runtime = runtime_of(*plugin);
    check(runtime->onShapeChange(tensors.data(), 5, tensors.data() + 5, 3) == 0, "shapes");
    check(runtime->enqueue(tensors.data(), tensors.data() + 5, inputs, outputs, device(workspace(call), nullptr),
                           stream) == 0,
          "enqueue: " + g_log.errors);
    check(cudaStreamSynchronize(stream) == cudaSuccess, "synchronize");
    std::vector<int64_t> index(rows);
    std::vector<float> kept(rows * call.width);
    check(cudaMemcpy(index.data(), outputs[2], rows * 8, cudaMemcpyDeviceToHost) == cudaSuccess, "copy out");
    check(cudaMemcpy(kept.data(), outputs[0], kept.size() * 4, cudaMemcpyDeviceToHost) == cudaSuccess, "copy out");

    std::vector<float> tokens(call.visual * call.heads * call.dim);
    size_t const size = call.heads * call.dim;
    for (int64_t n = 0; n < call.visual; ++n) {
      std::memcpy(tokens.data() + n * size, states.data() + visual[n] * size, size * 4);
    }
    std::vector<float> score(call.visual);
    std::vector<uint8_t> care(call.visual);
    ep_export::host::scores(tokens.data(), call.visual, static_cast<int>(call.heads), static_cast<int>(call.dim),
                            ep_export::Scorer::kPaper, score.data(), care.data());
    auto const expected = ep_export::host::kept_index(
        score.data(), visual.data(), static_cast<int>(call.visual), call.prompt, static_cast<int>(call.kept),
        ep_export::Select::kHighest,
        std::string(budget) == "joint" ? ep_export::Budget::kJoint : ep_export::Budget::kPerPicture, 1024);
    check(index == expected, "kept_index");
    for (int64_t row = 0; row < rows; ++row) {
      check(std::memcmp(kept.data() + row * call.width, hidden.data() + index[row] * call.width, call.width * 4) == 0,
            "kept_hidden");
    }
    check(cudaStreamDestroy(stream) == cudaSuccess, "stream");
  }
  for (void* const memory : owned) cudaFree(memory);
}

struct Case {
  char const* name;
  void (*run)();
};

constexpr Case kCases[]{
    {"creator_names_the_node", creator_names_the_node},
    {"creator_lists_its_fields", creator_lists_its_fields},
    {"missing_fields_have_defaults", missing_fields_have_defaults},
    {"every_value_survives_serialization", every_value_survives_serialization},
    {"field_lengths_may_count_the_terminating_zero", field_lengths_may_count_the_terminating_zero},
    {"node_identity_fields_are_ignored", node_identity_fields_are_ignored},
    {"bad_fields_are_refused_by_name", bad_fields_are_refused_by_name},
    {"capabilities_are_all_there", capabilities_are_all_there},
    {"output_types_follow_the_hidden_states", output_types_follow_the_hidden_states},
    {"unsupported_types_are_refused_by_name", unsupported_types_are_refused_by_name},
    {"output_shapes_come_from_input_dimensions", output_shapes_come_from_input_dimensions},
    {"only_linear_formats_and_matching_types_are_supported", only_linear_formats_and_matching_types_are_supported},
    {"impossible_shapes_are_refused_by_name", impossible_shapes_are_refused_by_name},
    {"the_whole_range_is_accepted", the_whole_range_is_accepted},
    {"workspace_covers_the_largest_profile", workspace_covers_the_largest_profile},
    {"configure_reads_the_profile_and_not_the_unknown", configure_reads_the_profile_and_not_the_unknown},
    {"clones_are_independent", clones_are_independent},
    {"enqueue_keeps_what_the_host_keeps", enqueue_keeps_what_the_host_keeps},
};

void load(char const* path) {
  void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) fail(dlerror());
  auto const set_finder = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
  auto const creators = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
  check(set_finder != nullptr && creators != nullptr, "the library exports setLoggerFinder and getCreators");
  set_finder(&g_finder);
  int32_t count = 0;
  IPluginCreatorInterface* const* const found = creators(count);
  check(count == 1, "one creator");
  g_creator = dynamic_cast<IPluginCreatorV3One*>(found[0]);
  check(g_creator != nullptr, "an IPluginCreatorV3One");
}

enum class Outcome { kPassed, kFailed, kSkipped };

Outcome run(Case const& item) {
  g_log.errors.clear();
  try {
    item.run();
    std::printf("ok   %s\n", item.name);
    return Outcome::kPassed;
  } catch (Skip const& skip) {
    std::printf("skip %s: %s\n", item.name, skip.what());
    return Outcome::kSkipped;
  } catch (std::exception const& error) {
    std::printf("FAIL %s: %s\n", item.name, error.what());
    return Outcome::kFailed;
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::strcmp(argv[1], "--list") == 0) {
    for (Case const& item : kCases) std::printf("%s\n", item.name);
    return 0;
  }
  if (argc < 2 || argc > 3) {
    std::fprintf(stderr, "usage: %s LIBRARY [CASE] | --list\n", argv[0]);
    return 2;
  }
  try {
    load(argv[1]);
  } catch (std::exception const& error) {
    std::printf("FAIL load: %s\n", error.what());
    return 1;
  }
  int counts[3]{};
  for (Case const& item : kCases) {
    if (argc == 2 || std::strcmp(argv[2], item.name) == 0) ++counts[static_cast<int>(run(item))];
  }
  std::printf("%d passed, %d failed, %d skipped\n", counts[0], counts[1], counts[2]);
  if (counts[0] + counts[1] + counts[2] == 0) return 2;
  return counts[1] != 0 ? 1 : counts[0] == 0 ? 77 : 0;
}
