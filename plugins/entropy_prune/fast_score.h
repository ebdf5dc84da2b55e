// The score of one ordinary visual token: x [heads, dim] of fp16, bf16 or fp32 values, in one pass.
//
// Geometry: one warp a token. The token streams through 32 columns at a time: a lane centres one column of all heads in
// registers, the chunk goes through shared memory ([32, rows + 4] floats), and the Gram matrix accumulates in registers
// as a grid of 4 x 8 lane tiles. Shared memory: 640, 1152 or 4352 floats a warp for 16, 32 or 64 rows, and four
// vectors. Accumulation: fp32 FMA over centred values. (The Gram of uncentred values, centred afterwards, loses 3
// digits.)
//
// What fp32 cannot do in one pass: squaring a token into its Gram matrix turns eigenvalues below 1e-7 of the trace into
// noise, and 30 of them at 1e-8 weigh 5e-6 nats. Tokens that are nearly rank deficient, have rows of very different
// lengths, lie outside fp32's comfortable range or are not finite are therefore left to careful_score.h. Both paths are
// exact to about 1e-6 nats, so which one ran does not show in the order of the tokens.
#pragma once

#include "scorer.h"
#include "spectrum.h"

namespace ep_export {

struct FastScore {
  float value;
  bool needs_care;
};

// Per-warp shared memory of the fast path.
template <int kRows>
struct alignas(16) FastStage {
  static constexpr int kStride = kRows + 4;  // keeps rows 16-byte aligned and spreads them over the banks
  static constexpr int kLines = kRows > kWarpLanes ? kRows : kWarpLanes;
  float lines[kLines * kStride];  // first the chunk [column, row], then the Gram matrix [row, row]
  Vectors<kRows> vectors;
};

// Tokens are taken with care when their `Spectrum::small` (after the known zero) exceeds this: one eigenvalue below
// 3e-5 of the trace, or many below 1e-3. Noise of about 1e-8 an eigenvalue then stays below 1e-6 nats, measured over
// the tokens of tests/plugins/test_plugin_score.py.
constexpr float kSmallEigenvalues = 0.1f;
// Rows 100 times shorter than the longest inherit that row's centring error, 100 times magnified.
constexpr float kShortestRow2 = 1e-4f;
// Sums of squares outside this range may have lost terms to fp32's limits.
constexpr float kTinySquare = 1e-18f;
constexpr float kHugeSquare = 1e18f;

// Column `d` of the token, centred over the heads, in `column`; rows beyond `heads` become zero.
template <int kRows, class Load>
EP_HD void load_centred(Load const& load, int heads, int dim, int d, float* column) {
  float partial[4] = {0.f, 0.f, 0.f, 0.f};
  int const present = d < dim ? heads : 0;
  int offset = d;  // counts up: one addition a row instead of a multiplication
  EP_UNROLL
  for (int h = 0; h < kRows; ++h) {
    column[h] = h < present ? load(offset) : 0.f;
    offset += dim;
    partial[h % 4] += column[h];
  }
  float const count = static_cast<float>(heads);
  float const mean = ((partial[0] + partial[1]) + (partial[2] + partial[3])) / count;
  // The second pass removes the rounding of the first mean, which matters where heads share a large mean.
  EP_UNROLL
  for (int i = 0; i < 4; ++i) partial[i] = 0.f;
  EP_UNROLL
  for (int h = 0; h < kRows; ++h) {
    column[h] = h < heads ? column[h] - mean : 0.f;
    partial[h % 4] += column[h];
  }
  float const rest = ((partial[0] + partial[1]) + (partial[2] + partial[3])) / count;
  EP_UNROLL
  for (int h = 0; h < kRows; ++h) column[h] = h < heads ? column[h] - rest : 0.f;
}

// Gram matrix R R^T of the centred rows, left in stage.lines.
template <int kRows, class Team, class Load>
EP_HD void gram(Team& team, Load const& load, int heads, int dim, FastStage<kRows>& stage) {
  using L = Lane<kRows>;
  constexpr int kStride = FastStage<kRows>::kStride;
  team.each([&](int, L& own) {
    EP_UNROLL
    for (int i = 0; i < L::kTileRows; ++i) {
      EP_UNROLL
      for (int j = 0; j < L::kTileCols; ++j) own.tile[i][j] = 0.f;
    }
  });
  for (int chunk = 0; chunk < dim; chunk += kWarpLanes) {
    team.each([&](int lane, L&) {
      float column[kRows];
      load_centred<kRows>(load, heads, dim, chunk + lane, column);
      EP_UNROLL
      for (int h = 0; h < kRows; h += 4) {
        *reinterpret_cast<Quad*>(stage.lines + lane * kStride + h) =
            Quad{{column[h], column[h + 1], column[h + 2], column[h + 3]}};
      }
    });
    team.each([&](int lane, L& own) {
      float const* const left = stage.lines + lane / 8 * L::kTileRows;
      float const* const right = stage.lines + lane % 8 * L::kTileCols;
      for (int d = 0; d < kWarpLanes; ++d) {
        float a[L::kTileRows];
        float b[L::kTileCols];
        copy_floats<L::kTileRows>(a, left + d * kStride);
        copy_floats<L::kTileCols>(b, right + d * kStride);
        EP_UNROLL
        for (int i = 0; i < L::kTileRows; ++i) {
          EP_UNROLL
          for (int j = 0; j < L::kTileCols; ++j) own.tile[i][j] = fmaf(a[i], b[j], own.tile[i][j]);
        }
      }
    });
  }
  team.each([&](int lane, L& own) {
    EP_UNROLL
    for (int i = 0; i < L::kTileRows; ++i) {
      EP_UNROLL
      for (int j = 0; j < L::kTileCols; ++j) {
        stage.lines[(lane / 8 * L::kTileRows + i) * kStride + lane % 8 * L::kTileCols + j] = own.tile[i][j];
      }
    }
  });
}

template <int kRows, class Team, class Load>
EP_HD FastScore fast_norm(Team& team, Load const& load, int heads, int dim) {
  using L = Lane<kRows>;
  float const square = team.sum([&](int lane, L&) {
    float partial[4] = {0.f, 0.f, 0.f, 0.f};
    for (int d = lane; d < dim; d += kWarpLanes) {
      EP_UNROLL
      for (int h = 0; h < kRows; ++h) {
        float const x = h < heads ? load(h * dim + d) : 0.f;
        partial[h % 4] = fmaf(x, x, partial[h % 4]);
      }
    }
    return (partial[0] + partial[1]) + (partial[2] + partial[3]);
  });
  return {sqrtf(square), !(square > kTinySquare && square < kHugeSquare)};
}

// One pass over a token. `load(i)` gives element i of [heads, dim] as float. The value is meaningless where care is
// needed.
template <int kRows, class Team, class Load>
EP_HD FastScore fast_score(Team& team, Load const& load, int heads, int dim, Scorer scorer, FastStage<kRows>& stage) {
  using L = Lane<kRows>;
  constexpr int kStride = FastStage<kRows>::kStride;
  if (scorer == Scorer::kNorm) return fast_norm<kRows>(team, load, heads, dim);
  gram<kRows>(team, load, heads, dim, stage);

  auto const diagonal = [&](int row) { return stage.lines[row * kStride + row]; };
  float const longest = team.max([&](int lane, L&) {
    float best = 0.f;
    for (int row = lane; row < heads; row += kWarpLanes) best = fmaxf(best, diagonal(row));
    return best;
  });
  float const shortest = -team.max([&](int lane, L&) {
    float best = -FLT_MAX;
    for (int row = lane; row < heads; row += kWarpLanes) best = fmaxf(best, -diagonal(row));
    return best;
  });
  float const trace = team.sum([&](int lane, L&) {
    float total = 0.f;
    for (int row = lane; row < heads; row += kWarpLanes) total += diagonal(row);
    return total;
  });
  bool const normalised = scorer != Scorer::kReleased;
  // Written so that a NaN takes the careful way. The released floor cannot bite above 3e-5 x 1e-3.
  bool const comfortable = trace > (normalised ? kTinySquare : 1e-3f) && trace < kHugeSquare;
  if (!comfortable || (normalised && shortest < kShortestRow2 * longest)) return {0.f, true};

  // A = R R^T / H with trace 1 in the lanes' registers, and its null vector in `v`: sum_h |r_h| (r_h / |r_h|) = 0.
  float const heads_f = static_cast<float>(heads);
  team.each([&](int lane, L&) {
    for (int row = lane; row < kRows; row += kWarpLanes) {
      float const length = row < heads ? sqrtf(diagonal(row)) : 0.f;
      stage.vectors.v[row] = row < heads ? (normalised ? length : 1.f) : 0.f;
      stage.vectors.w[row] = row < heads && normalised ? 1.f / length : 0.f;
    }
  });
  team.each([&](int lane, L& own) {
    EP_UNROLL
    for (int r = 0; r < L::kOwned; ++r) {
      int const row = lane + kWarpLanes * r;
      bool const mine = row < kRows;
      float const scale = !mine ? 0.f : normalised ? stage.vectors.w[row] / heads_f : 1.f / trace;
      EP_UNROLL
      for (int j = 0; j < kRows; j += 4) {
        float line[4] = {0.f, 0.f, 0.f, 0.f};
        float column_scale[4];
        if (mine) copy_floats<4>(line, stage.lines + row * kStride + j);
        copy_floats<4>(column_scale, stage.vectors.w + j);
        EP_UNROLL
        for (int i = 0; i < 4; ++i) {
          own.a[r][j + i] = line[i] * scale * (normalised ? column_scale[i] : 1.f);
          // The diagonal of a normalised Gram matrix is known exactly.
          if (normalised && row == j + i) own.a[r][j + i] = row < heads ? 1.f / heads_f : 0.f;
        }
      }
    }
  });

  if (scorer == Scorer::kOrder2) {
    float const square = team.sum([&](int, L& own) {
      float total = 0.f;
      EP_UNROLL
      for (int r = 0; r < L::kOwned; ++r) {
        EP_UNROLL
        for (int j = 0; j < kRows; ++j) total = fmaf(own.a[r][j], own.a[r][j], total);
      }
      return total;
    });
    return {-logf(square), false};
  }

  project_out<kRows>(team, stage.vectors, normalised ? trace : heads_f, heads);
  tridiagonalise<kRows>(team, stage.vectors, 1, heads);
  Spectrum const spectrum = spectral_entropy<kRows>(team, stage.vectors, 1, heads);
  if (!(spectrum.small <= kSmallEigenvalues)) return {0.f, true};
  float const entropy = spectrum.entropy;
  if (scorer == Scorer::kPaper) return {entropy, false};
  // -sum (m x) ln (m x) = m (-sum x ln x - ln m) for the mean square m.
  float const mean_square = trace / heads_f;
  return {mean_square * (entropy - logf(mean_square)) / (heads > 1 ? logf(heads_f) : 1.f), false};
}

}  // namespace ep_export
