// Drives the built plugin library through its whole life, as TensorRT would, without TensorRT.
//
// usage: harness LIBRARY                         run every case
//        harness LIBRARY CASE                    run one
//        harness LIBRARY --output-shapes SHAPE*5 shapes of the outputs, one a line, as getOutputShapes gives them for
//                                                the shapes of the five inputs: 1,700,32,128 1,700,4096 3,1,700 576 144
//        harness --list                          names of the cases
// Exit status: 0 passed, 1 failed or refused, 2 usage, 77 skipped (a case that needs a GPU where there is none).
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "device_run.h"
#include "driver.h"
#include "expr_builder.h"

namespace {

using namespace harness;

// getOutputShapes for inputs of these shapes; `outputs` [kOutputs] point into `builder`.
int32_t output_shapes(std::vector<Dims> const& shapes, Builder& builder, DimsExprs* outputs) {
  DimsExprs inputs[kInputs]{};
  for (int32_t i = 0; i < kInputs; ++i) {
    inputs[i].nbDims = shapes[i].nbDims;
    for (int32_t j = 0; j < shapes[i].nbDims; ++j) inputs[i].d[j] = builder.make(shapes[i].d[j]);
  }
  auto const plugin = create();
  return build_of(*plugin)->getOutputShapes(inputs, kInputs, nullptr, 0, outputs, kOutputs, builder);
}

// ---- cases ----------------------------------------------------------------------------------------------------------

void creator_names_the_node() {
  check(std::string(g_creator->getPluginName()) == "EntropyPrune", "name");
  check(std::string(g_creator->getPluginVersion()) == "2", "version");
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
  auto const plugin = create({{"plugin_namespace", "ep_export"}, {"plugin_version", "2"}, {"select", "lowest"}});
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
  check(std::string(core->getPluginVersion()) == "2", "version");
  check(std::string(core->getPluginNamespace()) == "ep_export", "namespace");
  check(build_of(*plugin)->getNbOutputs() == kOutputs, "five outputs");
  check(build_of(*plugin)->getNbTactics() == 0, "no tactics");
  runtime_of(*plugin);
  check(plugin->getCapabilityInterface(static_cast<PluginCapabilityType>(9)) == nullptr, "unknown capability");
}

void output_types_follow_the_hidden_states() {
  auto const plugin = create();
  for (DataType const states : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
    for (DataType const hidden : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
      DataType const in[]{states, hidden, DataType::kINT64, DataType::kINT64, DataType::kINT64};
      DataType out[kOutputs];
      check(build_of(*plugin)->getOutputDataTypes(out, kOutputs, in, kInputs) == 0, "types are accepted");
      check(out[0] == hidden && out[4] == DataType::kFLOAT, "floating types");
      for (int32_t i = 1; i < 4; ++i) check(out[i] == DataType::kINT64, "indices are int64");
    }
  }
}

void unsupported_types_are_refused_by_name() {
  auto const plugin = create();
  DataType out[kOutputs];
  char const* const names[]{"states", "hidden", "position_ids", "visual_index", "keep_slots"};
  for (int32_t i = 0; i < kInputs; ++i) {
    DataType in[]{DataType::kHALF, DataType::kHALF, DataType::kINT64, DataType::kINT64, DataType::kINT64};
    in[i] = DataType::kINT32;
    check_refused(build_of(*plugin)->getOutputDataTypes(out, kOutputs, in, kInputs) != 0,
                  std::string(names[i]) + ": expected");
  }
  DataType const in[]{DataType::kHALF, DataType::kHALF, DataType::kINT64, DataType::kINT64};
  check_refused(build_of(*plugin)->getOutputDataTypes(out, 3, in, 4) != 0,
                "expected 5 inputs and 5 outputs, got 4 and 3");
}

void output_shapes_come_from_input_dimensions() {
  struct {
    int64_t sequence, visual, kept, rows;
  } const cases[]{{700, 576, 144, 268}, {268, 144, 36, 160}, {1, 1, 1, 1}, {9, 4, 4, 9}, {70000, 65536, 1, 4465}};
  Builder builder;
  for (auto const& item : cases) {
    Call call;
    call.sequence = item.sequence;
    call.visual = item.visual;
    call.kept = item.kept;
    DimsExprs outputs[kOutputs];
    check(output_shapes(call.inputs(), builder, outputs) == 0, "shapes are accepted");
    std::vector<int64_t> const expected[kOutputs]{
        {1, item.rows, 4096}, {3, 1, item.rows}, {item.rows}, {item.kept}, {item.visual}};
    for (int32_t i = 0; i < kOutputs; ++i) {
      check(outputs[i].nbDims == static_cast<int32_t>(expected[i].size()), "rank of output " + std::to_string(i));
      for (int32_t j = 0; j < outputs[i].nbDims; ++j) {
        check(outputs[i].d[j]->getConstantValue() == expected[i][j], "dimension of output " + std::to_string(i));
      }
    }
  }
  check(builder.size_tensors == 0, "no size tensors");

  DimsExprs outputs[kOutputs];
  std::vector<Dims> const no_dimensions(kInputs);
  check_refused(output_shapes(no_dimensions, builder, outputs) != 0, "states: expected 4 dimensions, got 0");
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
      for (int32_t i = 0; i < kInputs + kOutputs; ++i) {
        check(build->supportsFormatCombination(i, tensors.data(), kInputs, kOutputs), "tensor " + std::to_string(i));
        auto changed = tensors;
        changed[i].desc.format = TensorFormat::kCHW32;
        check(!build->supportsFormatCombination(i, changed.data(), kInputs, kOutputs), "vectorized format");
        changed = tensors;
        changed[i].desc.type = DataType::kINT32;
        check(!build->supportsFormatCombination(i, changed.data(), kInputs, kOutputs), "int32");
      }
      auto changed = tensors;
      changed[kInputs].desc.type = hidden == DataType::kFLOAT ? DataType::kHALF : DataType::kFLOAT;
      check(!build->supportsFormatCombination(kInputs, changed.data(), kInputs, kOutputs),
            "output type differs from hidden");
      int32_t const scores = kInputs + kOutputs - 1;
      changed = tensors;
      changed[scores].desc.type = DataType::kHALF;
      check(!build->supportsFormatCombination(scores, changed.data(), kInputs, kOutputs), "scores are float32");
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
      {[](Call& c) { c.visual = 701; }, "hidden: the sequence is shorter than visual_index"},
      {[](Call& c) { c.sequence = 70000, c.visual = 65537; }, "visual_index: length is out of range"},
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
  check_refused(runtime_of(*plugin)->onShapeChange(tensors.data(), kInputs, tensors.data() + kInputs, kOutputs) != 0,
                "sequence lengths of states and hidden differ: 700 and 701");
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
        call.sequence = visual + 100;
        check(configures(call) && accepts_shapes(call), "shape in range");
      }
    }
  }
  check(g_log.errors.empty(), "no errors are logged: " + g_log.errors);
}

void workspace_covers_the_largest_profile() {
  Call call;
  size_t const small = workspace(call);
  // Keys and plan, 4 bytes a token each: scores are an output. Nothing of the size of the states.
  check(small >= 8 * 576 && small < 8 * 576 + 2048, "workspace is " + std::to_string(small));
  call.sequence = 70000;
  call.visual = 65536;
  check(workspace(call) >= 8 * 65536, "workspace grows with visual_index");
  call.heads = 64;
  call.dim = 256;
  check(workspace(call) >= 8 * 65536 + 128 * 64 * 256 * 4, "large tokens get scratch memory");
}

void configure_reads_the_profile_and_not_the_unknown() {
  auto const plugin = create();
  Call call;
  auto tensors = call.describe_dynamic();
  for (auto& tensor : tensors) {
    for (int32_t i = 0; i < tensor.desc.dims.nbDims; ++i) tensor.desc.dims.d[i] = -1;
  }
  check(build_of(*plugin)->configurePlugin(tensors.data(), kInputs, tensors.data() + kInputs, kOutputs) == 0,
        "dynamic dimensions");
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

// The second call works on the outputs of the first, as the second cut of a model does.
void two_cuts_keep_what_the_host_keeps() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) throw Skip("no GPU");
  Call first;
  first.states = DataType::kFLOAT;
  first.hidden = DataType::kFLOAT;
  first.width = 96;
  InputValues in{random_values(first.sequence * first.heads * first.dim, 7),
                 random_values(first.sequence * first.width, 8), std::vector<int64_t>(first.axes * first.sequence),
                 std::vector<int64_t>(first.visual)};
  for (size_t i = 0; i < in.position_ids.size(); ++i) in.position_ids[i] = static_cast<int64_t>(7 * i);
  for (int64_t n = 0; n < first.visual; ++n) in.visual_index[n] = 35 + n + (n >= 200 ? 11 : 0);
  Call second = first;
  second.sequence = first.rows();
  second.visual = first.kept;
  second.kept = first.kept / 4;
  for (char const* budget : {"joint", "per_picture"}) {
    OutputValues const once = run_on_device(first, budget, in);
    check_outputs(first, budget, in, once);
    InputValues const rest{random_values(second.sequence * second.heads * second.dim, 9), once.hidden,
                           once.position_ids, once.visual_index};
    check_outputs(second, budget, rest, run_on_device(second, budget, rest));
  }
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
    {"two_cuts_keep_what_the_host_keeps", two_cuts_keep_what_the_host_keeps},
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

// "1,700,4096" -> dimensions.
Dims parse_shape(char const* text) {
  std::vector<int64_t> sizes;
  for (;;) {
    char* end = nullptr;
    sizes.push_back(std::strtoll(text, &end, 10));
    if (end == text || sizes.size() > Dims::MAX_DIMS) fail(std::string("not a shape: ") + text);
    if (*end == '\0') return dims(sizes);
    if (*end != ',') fail(std::string("not a shape: ") + text);
    text = end + 1;
  }
}

int print_output_shapes(char const* const* arguments) {
  std::vector<Dims> inputs;
  for (int32_t i = 0; i < kInputs; ++i) inputs.push_back(parse_shape(arguments[i]));
  Builder builder;
  DimsExprs outputs[kOutputs];
  if (output_shapes(inputs, builder, outputs) != 0) fail(g_log.errors);
  for (DimsExprs const& output : outputs) {
    for (int32_t i = 0; i < output.nbDims; ++i) {
      std::printf("%s%lld", i == 0 ? "" : ",", static_cast<long long>(output.d[i]->getConstantValue()));
    }
    std::printf("\n");
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::strcmp(argv[1], "--list") == 0) {
    for (Case const& item : kCases) std::printf("%s\n", item.name);
    return 0;
  }
  bool const shapes = argc == 3 + kInputs && std::strcmp(argv[2], "--output-shapes") == 0;
  if (!shapes && (argc < 2 || argc > 3)) {
    std::fprintf(stderr, "usage: %s LIBRARY [CASE | --output-shapes SHAPE*5] | --list\n", argv[0]);
    return 2;
  }
  try {
    load(argv[1]);
    if (shapes) return print_output_shapes(argv + 3);
  } catch (std::exception const& error) {
    std::fprintf(stderr, "FAIL %s: %s\n", shapes ? "shapes" : "load", error.what());
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
