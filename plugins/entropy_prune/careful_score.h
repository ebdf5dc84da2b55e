// The score of any visual token, slowly: what fast_score.h leaves, a few tokens or, when dim < heads, all of them.
//
// Geometry: one warp a token, a lane to a row (two beyond 32 heads). The token is kept as fp32 rows [heads, dim | 1] in
// shared memory where it fits in 48 KiB together with CarefulStage, else in a slice of the workspace. Accumulation:
// fp32.
//
// Method: scale by a power of two; centre with a mean of double precision made of two floats; pivoted Gram-Schmidt on
// the rows themselves, x = L Q, which never squares them; once more for L^T; then the entropy of the graded matrix L^T
// L, whose small eigenvalues come out as good as its large ones.
#pragma once

#include "scorer.h"
#include "spectrum.h"

namespace ep_export {

// Per-warp memory of the careful path; `rows` is [heads, dim | 1] and lies outside because its size varies: an odd
// stride lets lanes that walk down their own rows hit different banks.
template <int kRows>
struct alignas(16) CarefulStage {
  static constexpr int kStride = kRows + 4;
  float lower[kRows * kStride];  // L
  float norm2[kRows];            // squared length of what is left of each row; -1 once it was a pivot
  float q[kMaxDim];
  Vectors<kRows> vectors;
};

EP_HD constexpr int careful_row_stride(int dim) { return dim | 1; }

// Floats in `rows`: the token, and later the transpose of L.
EP_HD constexpr int careful_row_floats(int heads, int dim) {
  return heads * careful_row_stride(heads > dim ? heads : dim);
}

// a + b as an unevaluated sum: the error of the addition goes to `low`.
EP_HD void add_exactly(float* high, float* low, float x) {
  float const sum = *high + x;
  float const part = sum - *high;
  *low += (*high - (sum - part)) + (x - part);
  *high = sum;
}

// Rows of the token times 2^-exponent, centred with a mean of twice the working precision: equal heads become exactly
// zero.
template <int kRows, class Team, class Load>
EP_HD void careful_centre(Team& team, Load const& load, int heads, int dim, int exponent, float* rows) {
  int const stride = careful_row_stride(dim);
  float const count = static_cast<float>(heads);
  team.each([&](int lane, Lane<kRows>&) {
    for (int d = lane; d < dim; d += kWarpLanes) {
      float high = 0.f;
      float low = 0.f;
      for (int h = 0; h < heads; ++h) add_exactly(&high, &low, ldexpf(load(h * dim + d), -exponent));
      float const mean = high / count;
      float const rest = (fmaf(-mean, count, high) + low) / count;
      for (int h = 0; h < heads; ++h) rows[h * stride + d] = (ldexpf(load(h * dim + d), -exponent) - mean) - rest;
    }
  });
}

// Row lengths squared into stage.norm2, after dividing every row by its own length if `normalised`; zero rows stay
// zero.
template <int kRows, class Team>
EP_HD void careful_lengths(Team& team, int heads, int dim, bool normalised, float* rows, CarefulStage<kRows>& stage) {
  int const stride = careful_row_stride(dim);
  team.each([&](int lane, Lane<kRows>&) {
    for (int h = lane; h < heads; h += kWarpLanes) {
      float* const row = rows + h * stride;
      float largest = 0.f;
      for (int d = 0; d < dim; ++d) largest = fmaxf(largest, fabsf(row[d]));
      int exponent = 0;
      if (normalised && largest > 0.f) frexpf(largest, &exponent);
      float square = sum_terms(dim, [&](int d, float sum) {
        float const x = ldexpf(row[d], -exponent);
        return fmaf(x, x, sum);
      });
      if (normalised && square > 0.f) {
        float const length = sqrtf(square);
        for (int d = 0; d < dim; ++d) row[d] = ldexpf(row[d], -exponent) / length;
        square = 1.f;
      }
      stage.norm2[h] = square;
    }
  });
}

// rows = L Q by Gram-Schmidt with the longest remaining row as pivot. Returns the rank, L in stage.lower [count, rank].
// Modified Gram-Schmidt gives an L that belongs to rows perturbed by a rounding, whatever the loss of orthogonality in
// Q.
template <int kRows, class Team>
EP_HD int factor(Team& team, int count, int dim, float* rows, CarefulStage<kRows>& stage) {
  using L = Lane<kRows>;
  constexpr int kStride = CarefulStage<kRows>::kStride;
  int const stride = careful_row_stride(dim);
  team.each([&](int lane, L&) {
    for (int i = lane; i < kRows * kStride; i += kWarpLanes) stage.lower[i] = 0.f;
  });
  float first = 0.f;
  int rank = 0;
  for (; rank < count && rank < dim; ++rank) {
    int pivot = 0;
    for (int h = 1; h < count; ++h) pivot = stage.norm2[h] > stage.norm2[pivot] ? h : pivot;
    float const norm2 = stage.norm2[pivot];
    team.each([](int, L&) {});  // every lane has read the lengths before any of them changes
    if (rank == 0) first = norm2;
    // What remains weighs less than 1e-9 nats; below 1e-14 it would be rounding noise.
    if (!(norm2 > 1e-13f * first)) break;
    float const length = sqrtf(norm2);
    team.each([&](int lane, L&) {
      for (int d = lane; d < dim; d += kWarpLanes) stage.q[d] = rows[pivot * stride + d] / length;
    });
    team.each([&](int lane, L&) {
      for (int h = lane; h < count; h += kWarpLanes) {
        if (h == pivot) {
          stage.lower[h * kStride + rank] = length;
          stage.norm2[h] = -1.f;
        }
        if (stage.norm2[h] < 0.f) continue;
        float* const row = rows + h * stride;
        float const along = sum_terms(dim, [&](int d, float sum) { return fmaf(row[d], stage.q[d], sum); });
        stage.lower[h * kStride + rank] = along;
        stage.norm2[h] = sum_terms(dim, [&](int d, float sum) {
          float const rest = fmaf(-along, stage.q[d], row[d]);
          row[d] = rest;
          return fmaf(rest, rest, sum);
        });
      }
    });
  }
  return rank;
}

// rows <- L^T, with its row lengths. The rows come in the order of the pivots, longest first.
template <int kRows, class Team>
EP_HD void transpose(Team& team, int heads, int rank, float* rows, CarefulStage<kRows>& stage) {
  constexpr int kStride = CarefulStage<kRows>::kStride;
  int const stride = careful_row_stride(heads);
  team.each([&](int lane, Lane<kRows>&) {
    for (int r = lane; r < rank; r += kWarpLanes) {
      stage.norm2[r] = sum_terms(heads, [&](int h, float sum) {
        float const x = stage.lower[h * kStride + r];
        rows[r * stride + h] = x;
        return fmaf(x, x, sum);
      });
    }
  });
}

// L^T L / divisor into the lanes' registers.
template <int kRows, class Team>
EP_HD void graded(Team& team, int heads, int rank, float divisor, CarefulStage<kRows>& stage) {
  using L = Lane<kRows>;
  constexpr int kStride = CarefulStage<kRows>::kStride;
  team.each([&](int lane, L& own) {
    EP_UNROLL
    for (int r = 0; r < L::kOwned; ++r) {
      int const row = lane + kWarpLanes * r;
      EP_UNROLL
      for (int j = 0; j < kRows; ++j) own.a[r][j] = 0.f;
      if (row >= rank) continue;
      for (int h = 0; h < heads; ++h) {
        float const left = stage.lower[h * kStride + row] / divisor;
        EP_UNROLL
        for (int j = 0; j < kRows; j += 4) {
          float line[4];
          copy_floats<4>(line, stage.lower + h * kStride + j);
          EP_UNROLL
          for (int i = 0; i < 4; ++i) own.a[r][j + i] = fmaf(left, line[i], own.a[r][j + i]);
        }
      }
    }
  });
}

// tr (R R^T / H)^2, from the rows.
template <int kRows, class Team>
EP_HD float careful_purity(Team& team, int heads, int dim, float const* rows) {
  int const stride = careful_row_stride(dim);
  float const count = static_cast<float>(heads);
  return team.sum([&](int lane, Lane<kRows>&) {
    float total = 0.f;
    for (int h = lane; h < heads; h += kWarpLanes) {
      for (int other = 0; other < heads; ++other) {
        float const dot =
            sum_terms(dim,
                      [&](int d, float sum) { return fmaf(rows[h * stride + d], rows[other * stride + d], sum); }) /
            count;
        total = fmaf(dot, dot, total);
      }
    }
    return total;
  });
}

// The score of any token. Not finite exactly where the token is not. Scores beyond fp32 (norm, released) become
// +-FLT_MAX.
template <int kRows, class Team, class Load>
EP_HD float careful_score(Team& team, Load const& load, int heads, int dim, Scorer scorer, float* rows,
                          CarefulStage<kRows>& stage) {
  using L = Lane<kRows>;
  float const largest = team.max([&](int lane, L&) {
    float best = 0.f;
    for (int d = lane; d < dim; d += kWarpLanes) {
      for (int h = 0; h < heads; ++h) {
        float const x = fabsf(load(h * dim + d));
        best = x <= FLT_MAX ? fmaxf(best, x) : INFINITY;  // NaN too
        if (best > FLT_MAX) return best;
      }
    }
    return best;
  });
  if (largest > FLT_MAX) return not_a_number();
  float const heads_f = static_cast<float>(heads);
  float const per_log = heads > 1 ? logf(heads_f) : 1.f;
  float const all_at_floor = heads_f * kReleasedFloorTerm / per_log;
  if (largest == 0.f) return scorer == Scorer::kReleased ? all_at_floor : 0.f;
  int exponent;
  frexpf(largest, &exponent);  // every scorer but norm and released ignores the scale

  if (scorer == Scorer::kNorm) {
    float const square = team.sum([&](int lane, L&) {
      float total = 0.f;
      for (int d = lane; d < dim; d += kWarpLanes) {
        total += sum_terms(heads, [&](int h, float sum) {
          float const x = ldexpf(load(h * dim + d), -exponent);
          return fmaf(x, x, sum);
        });
      }
      return total;
    });
    return clamp_finite(ldexpf(sqrtf(square), exponent));
  }

  bool const normalised = scorer != Scorer::kReleased;
  careful_centre<kRows>(team, load, heads, dim, exponent, rows);
  careful_lengths<kRows>(team, heads, dim, normalised, rows, stage);
  float const mean_square = team.sum([&](int lane, L&) {
    float total = 0.f;
    for (int h = lane; h < heads; h += kWarpLanes) total += stage.norm2[h];
    return total;
  }) / heads_f;
  if (mean_square == 0.f) return normalised ? 0.f : all_at_floor;
  if (scorer == Scorer::kOrder2) return -logf(careful_purity<kRows>(team, heads, dim, rows));

  // Twice: the second factor (of L^T) has off-diagonals so small that tridiagonalisation cannot mix large with small.
  int rank = factor<kRows>(team, heads, dim, rows, stage);
  transpose<kRows>(team, heads, rank, rows, stage);
  int const columns = rank;
  rank = factor<kRows>(team, columns, heads, rows, stage);
  graded<kRows>(team, columns, rank, normalised ? heads_f : heads_f * mean_square, stage);
  tridiagonalise<kRows>(team, stage.vectors, 0, rank);
  float const unit = spectral_entropy<kRows>(team, stage.vectors, 0, rank).entropy;
  // Rows of length zero leave the trace at (rows that are not zero) / heads.
  if (normalised) return mean_square * (unit - logf(mean_square));

  float const floor_share = ldexpf(kReleasedFloor / mean_square, -2 * exponent);
  if (floor_share >= 1.f) return all_at_floor;
  int const at_floor = heads - rank + count_below(stage.vectors.d, stage.vectors.e2, 0, rank, floor_share);
  float const log_mean = logf(mean_square) + 2.f * 0.69314718f * static_cast<float>(exponent);
  float const total = ldexpf(mean_square * (unit - log_mean), 2 * exponent);
  return clamp_finite((total + static_cast<float>(at_floor) * kReleasedFloorTerm) / per_log);
}

}  // namespace ep_export
