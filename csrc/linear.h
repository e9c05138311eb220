// hidden @ weight.T with statistics, and its gradients: interfaces of the kernels and of what drives them.
//
// Matrices are row-major with contiguous columns, in float32 or bfloat16. Products are formed from 4-byte words: one
// float32 value, or a pair of bfloat16 values that are neighbours along the summed axis; sums are float32. A product's
// left operand is read kTileRows rows at a time, its right operand is packed into panels of kPanelColumns columns:
// panel[word][column].

#pragma once

#include <cstdint>

#include "statistics.h"

namespace repirl {

constexpr int64_t kTileRows = 8;
constexpr int64_t kPanelColumns = 48;

// For one operand type. `num_words` counts words along the summed axis.
struct ProductKernels {
  int64_t values_per_word;

  // Packs a matrix [num_columns <= kPanelColumns, depth] whose rows become the panel's columns. What the panel has
  // beyond the matrix is 0, here and below.
  void (*pack_transposed)(const void *matrix, int64_t stride, int64_t num_columns, int64_t depth, uint32_t *panel);

  // Packs a matrix [depth, num_columns <= kPanelColumns].
  void (*pack)(const void *matrix, int64_t stride, int64_t depth, int64_t num_columns, uint32_t *panel);

  // tile [kTileRows, kPanelColumns] = rows @ panel.
  void (*multiply_rows)(const void *const rows[kTileRows], const uint32_t *panel, int64_t num_words, float *tile,
                        int64_t tile_stride);

  // tile += block @ panel, with block[word][kTileRows] and a contiguous tile.
  void (*multiply_block)(const uint32_t *block, const uint32_t *panel, int64_t num_words, float *tile);

  // Stores tile [kTileRows, num_columns], num_columns a multiple of 16, in the operand type: as it is to `rows`, and to
  // `blocks` as the left operand of a product that sums over rows: block[word][kTileRows columns], one block every
  // `block_stride` words. Either may be null.
  void (*store_gradient)(const float *tile, int64_t tile_stride, int64_t num_columns, void *rows, int64_t row_stride,
                         uint32_t *blocks, int64_t block_stride);

  void (*add)(const float *values, int64_t count, float *sums);

  // Rounds to the operand type.
  void (*round)(const float *values, int64_t count, void *result);
};

namespace avx512bf16 {
extern const Kernels kernels;
extern const ProductKernels products_f32, products_bf16;
}  // namespace avx512bf16

struct LinearOperands {
  const void *hidden;  // [num_rows, num_features]; the last word of a row must be readable, and 0 beyond the features
  int64_t hidden_stride;
  const void *weight;  // [num_columns, num_features]
  int64_t weight_stride;
  int64_t num_rows, num_features, num_columns;
  Transform transform;
  const int64_t *targets;
  // What forward keeps for backward, which else computes the logits again. One of these at most, the others null:
  float *logits;     // [num_rows, num_columns], before bias, softcap and temperature
  uint16_t *powers;  // [num_rows, kept_columns(num_columns)]; see UpdateKeeping
  int64_t kept_stride;
};

// A row of powers, and, where panels begin, the maximum that they refer to, as two words behind them.
inline int64_t kept_columns(int64_t num_columns) {
  return num_columns + (num_columns + kPanelColumns - 1) / kPanelColumns * 2;
}

struct LinearGradients {
  float *hidden;  // [num_rows, num_features], contiguous; overwritten
  void *weight;   // [num_columns, num_features], contiguous, in the operand type; overwritten
  float *weight_sum;  // the same in float32; added to
  float *bias;        // [num_columns]; overwritten
};  // null where not wanted

// Of rows whose gradient of some neighbouring columns' logits is below `limits[row]` throughout, these columns' share
// in the gradients of hidden states and weights may be left out. Null for none.
using SkipLimits = const float *;

// Statistics of all rows over all columns.
void linear_forward(const Kernels &, const ProductKernels &, const LinearOperands &, RowState *states,
                    float *target_logits, int num_threads);

// `workspace_bytes` bounds the buffers that grow with the number of rows, as far as the narrowest slab allows.
void linear_backward(const Kernels &, const ProductKernels &, const LinearOperands &, const RowGradient *rows,
                     const LinearGradients &, SkipLimits limits, int64_t workspace_bytes, int num_threads);

}  // namespace repirl
