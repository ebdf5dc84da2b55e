// A C interface to host_pipeline.h for the Python tests (ctypes).
#include "host_pipeline.h"

using namespace ep_export;

// Returns 0, or 1 for a shape or scorer that does not exist.
extern "C" int ep_host_scores(float const* x, int64_t tokens, int heads, int dim, int scorer, float* scores,
                              uint8_t* care) {
  if (heads < 1 || heads > kMaxHeads || dim < 1 || dim > kMaxDim || scorer < 0 || scorer > 3) return 1;
  host::scores(x, tokens, heads, dim, static_cast<Scorer>(scorer), scores, care);
  return 0;
}

// kept_index [sequence - visual + kept], kept_visual_index [kept]. Returns 0, or 1 for arguments outside their ranges.
extern "C" int ep_host_select(float const* scores, int64_t const* visual_index, int visual, int64_t sequence, int kept,
                              int select, int budget, int threads, int64_t* kept_index, int64_t* kept_visual_index) {
  if (visual < 1 || visual > kMaxVisual || kept < 1 || kept > visual || sequence < visual) return 1;
  if (threads < 256 || threads > kSelectThreads || threads % kWarpLanes != 0) return 1;
  host::select_tokens(scores, visual_index, visual, sequence, kept, static_cast<Select>(select),
                      static_cast<Budget>(budget), threads, kept_index, kept_visual_index);
  return 0;
}
