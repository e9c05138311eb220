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

// What the forward pass keeps for the backward pass, which else computes the logits again: powers (see UpdateKeeping), or
// logits before bias, softcap and temperature. As far as they fit they lie in the memory that the weight's gradient will
// take: a group of columns is read before that group's rows of the gradient are written.
struct Kept {
  char *buffer;           // kept_bytes() of them, aligned to 4 bytes; null: nothing is kept
  void *weight_gradient;  // [num_columns, num_features] in the operand type, contiguous, or null
  int64_t num_rows;       // of the forward pass
  const int64_t *rows;    // backward's rows among these; null: all of them
  bool powers;

  int64_t value_bytes() const { return powers ? 2 : 4; }
};

// Rows of kept values that the weight's gradient has room for.
inline int64_t rows_in_gradient(const Kept &kept, int64_t num_features, int64_t value_bytes) {
  if (kept.weight_gradient == nullptr || value_bytes != kept.value_bytes()) return 0;
  return num_features < kept.num_rows ? num_features : kept.num_rows;
}

// Of powers, a float32 maximum for each row and group; room for as many groups as panels.
inline int64_t maxima_bytes(const Kept &kept, int64_t num_columns) {
  return kept.powers ? (num_columns + kPanelColumns - 1) / kPanelColumns * kept.num_rows * 4 : 0;
}

// The maxima, then the values that lie here. buffer_bytes() of native.py says the same in Python.
inline int64_t kept_bytes(const Kept &kept, int64_t num_features, int64_t num_columns, int64_t value_bytes) {
  const int64_t num_rows = kept.num_rows - rows_in_gradient(kept, num_features, value_bytes);
  return maxima_bytes(kept, num_columns) + num_rows * num_columns * kept.value_bytes();
}

struct LinearOperands {
  const void *hidden;  // [num_rows, num_features]; the last word of a row must be readable, and 0 beyond the features
  int64_t hidden_stride;
  const void *weight;  // [num_columns, num_features]
  int64_t weight_stride;
  int64_t num_rows, num_features, num_columns;
  Transform transform;
  const float *temperatures;  // one a row, in place of the transform's, or null
  Wanted wanted;
  const int64_t *targets;
  Kept kept;
};

struct LinearGradients {
  float *hidden;      // [num_rows, num_features], contiguous; overwritten
  void *weight;       // [num_columns, num_features], contiguous, in the operand type; overwritten
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
