// One-pass statistics and gradients of a slab of logits: the interface between the bindings and the kernels.
//
// A slab is a set of rows (tokens) times a contiguous range of vocabulary columns. The kernels are compiled once per
// instruction set, each into its own namespace, and chosen at run time.

#pragma once

#include <cstdint>

namespace repirl {

// How stored values become final logits: z = softcap * tanh((x + bias) / softcap) / temperature.
struct Transform {
  const float *bias;  // one value a column of the slab, or null
  float temperature;  // 1 for none
  float softcap;      // 0 for none
};

// What is wanted of a row beside its maximum and total.
struct Wanted {
  bool entropy, sum, argmax;
};

// Running statistics of one row, over the columns seen so far.
struct RowState {
  float maximum;    // m
  double total;     // a = sum exp(z - m)
  double weighted;  // b = sum exp(z - m) (z - m), if the entropy is wanted
  double sum;       // sum z, if that is wanted
  int64_t argmax;   // the first column with z = m, if that is wanted; -1 for none
};

inline constexpr RowState kNoColumns{-__builtin_inff(), 0.0, 0.0, 0.0, -1};

// What the gradient of one row needs: dz_v = onehot 1[v = target] + uniform + p_v (mass - slope (z_v - mean_logit)).
struct RowGradient {
  float logsumexp;
  float mean_logit;
  float mass;
  float onehot;
  float slope;
  float uniform;
};

// `target` is the target's column in the slab; outside [0, num_columns) it lies in another slab. Its final logit is
// written to `target_logit` if it lies in this one. `first_column` is the slab's place, of which an argmax is counted.
using UpdateRowF32 = void (*)(const float *x, int64_t num_columns, const Transform &, const Wanted &,
                              int64_t first_column, int64_t target, RowState &, float &target_logit);
using UpdateRowBF16 = void (*)(const uint16_t *x, int64_t num_columns, const Transform &, const Wanted &,
                               int64_t first_column, int64_t target, RowState &, float &target_logit);
// `out` may be `x`.
using GradientRowF32 = void (*)(const float *x, float *out, int64_t num_columns, const Transform &, int64_t target,
                                const RowGradient &);
using GradientRowBF16 = void (*)(const uint16_t *x, uint16_t *out, int64_t num_columns, const Transform &,
                                 int64_t target, const RowGradient &);

// Both for a forward pass that keeps its exponentials, so that the gradient needs neither logits nor their exponentials
// again. `update` writes exp(z - maximum), with the maximum that it leaves in the state, as bfloat16 to `powers`, and
// `gradient` turns those into dz. That is about as exact as rounding dz to bfloat16. No softcap, whose derivative would
// need more, and at most kMaxKeptColumns.
constexpr int64_t kMaxKeptColumns = 1024;
using UpdateKeeping = void (*)(const float *x, int64_t num_columns, const Transform &, const Wanted &,
                               int64_t first_column, int64_t target, RowState &, float &target_logit, uint16_t *powers);
using GradientOfKept = void (*)(const uint16_t *powers, float maximum, float *out, int64_t num_columns,
                                const Transform &, int64_t target, const RowGradient &);

struct Kernels {
  const char *name;
  UpdateRowF32 update_f32;
  UpdateRowBF16 update_bf16;
  GradientRowF32 gradient_f32;
  GradientRowBF16 gradient_bf16;
  UpdateKeeping update_keeping;
  GradientOfKept gradient_of_kept;
};

namespace baseline { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }

}  // namespace repirl
