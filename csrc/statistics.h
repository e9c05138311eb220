// One-pass statistics and gradients of a slab of logits: the interface between the bindings and the kernels.
//
// A slab is a set of rows (tokens) times a contiguous range of vocabulary columns. The kernels are compiled once per
// instruction set, each into its own namespace; one of them is chosen at run time.

#pragma once

#include <cstdint>

namespace repirl {

// How stored values become final logits: z = softcap * tanh((x + bias) / softcap) / temperature.
struct Transform {
  const float *bias;  // one value per column of the slab, or null
  float temperature;  // 1 for none
  float softcap;      // 0 for none
};

// Optional statistics of a row; its maximum and total are always computed.
struct Wanted {
  bool entropy, sum, argmax;
};

// Running statistics of one row, over the columns seen so far.
struct RowState {
  float maximum;    // m
  double total;     // a = sum exp(z - m)
  double weighted;  // b = sum exp(z - m) (z - m), if the entropy is wanted
  double sum;       // sum z, if wanted
  int64_t argmax;   // the first column with z = m, if wanted; -1 for none
};

inline constexpr RowState kNoColumns{-__builtin_inff(), 0.0, 0.0, 0.0, -1};

// Coefficients of the gradient of one row's logits: dz_v = onehot 1[v = target] + uniform + p_v (mass - slope (z_v -
// mean_logit)).
struct RowGradient {
  float logsumexp;
  float mean_logit;
  float mass;
  float onehot;
  float slope;
  float uniform;
};

// `target` is the target's column relative to the slab; outside [0, num_columns) the target is in another slab. If it
// is in this one, its final logit is written to `target_logit`. `first_column` is the slab's first column in the
// vocabulary; RowState::argmax is a column of the vocabulary.
using UpdateRowF32 = void (*)(const float *x, int64_t num_columns, const Transform &, const Wanted &,
                              int64_t first_column, int64_t target, RowState &, float &target_logit);
using UpdateRowBF16 = void (*)(const uint16_t *x, int64_t num_columns, const Transform &, const Wanted &,
                               int64_t first_column, int64_t target, RowState &, float &target_logit);
// `out` may be `x`.
using GradientRowF32 = void (*)(const float *x, float *out, int64_t num_columns, const Transform &, int64_t target,
                                const RowGradient &);
using GradientRowBF16 = void (*)(const uint16_t *x, uint16_t *out, int64_t num_columns, const Transform &,
                                 int64_t target, const RowGradient &);

// For a forward pass that keeps its exponentials, so that the backward pass computes neither the logits nor their
// exponentials again. UpdateKeeping writes exp(z - maximum) as bfloat16 to `powers`; `maximum` is the one that it
// leaves in the state. GradientOfKept computes dz from `powers`, about as exactly as rounding dz to bfloat16 would. Not
// for a softcap, whose derivative needs the logits, nor for more than kMaxKeptColumns columns.
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
