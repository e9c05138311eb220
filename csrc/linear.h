// Statistics of hidden @ weight.T, and their gradients: interfaces of the matrix products (products.cpp) and of the
// passes that use them (linear.cpp).
//
// Matrices are row-major with contiguous columns, in float32 or bfloat16. Products are formed from 4-byte words: one
// float32 value, or two bfloat16 values that are adjacent along the summed axis. Sums are float32. The left operand of
// a product is read kTileRows rows at a time; the right operand is packed into panels of kPanelColumns columns:
// panel[word][column].

#pragma once

#include <cstdint>

#include "statistics.h"

namespace repirl {

constexpr int64_t kTileRows = 8;
constexpr int64_t kPanelColumns = 48;

// Matrix products of one operand type. `num_words` counts words along the summed axis.
struct ProductKernels {
  int64_t values_per_word;

  // Packs a matrix [num_columns <= kPanelColumns, depth] whose rows become the panel's columns. Both pack functions
  // write 0 where the panel extends beyond the matrix.
  void (*pack_transposed)(const void *matrix, int64_t stride, int64_t num_columns, int64_t depth, uint32_t *panel);

  // Packs a matrix [depth, num_columns <= kPanelColumns].
  void (*pack)(const void *matrix, int64_t stride, int64_t depth, int64_t num_columns, uint32_t *panel);

  // tile [kTileRows, kPanelColumns] = rows @ panel.
  void (*multiply_rows)(const void *const rows[kTileRows], const uint32_t *panel, int64_t num_words, float *tile,
                        int64_t tile_stride);

  // tile += block @ panel, with block[word][kTileRows] and a contiguous tile.
  void (*multiply_block)(const uint32_t *block, const uint32_t *panel, int64_t num_words, float *tile);

  // Stores tile [kTileRows, num_columns] in the operand type; num_columns is a multiple of 16. `rows` receives it
  // row-major. `blocks` receives it as the left operand of a product that sums over rows: block[word][kTileRows
  // columns], one block every `block_stride` words. Either pointer may be null.
  void (*store_gradient)(const float *tile, int64_t tile_stride, int64_t num_columns, void *rows, int64_t row_stride,
                         uint32_t *blocks, int64_t block_stride);

  void (*add)(const float *values, int64_t count, float *sums);

  // Rounds float32 values to the operand type.
  void (*round)(const float *values, int64_t count, void *result);
};

namespace avx512bf16 {
extern const Kernels kernels;
extern const ProductKernels products_f32, products_bf16;
}  // namespace avx512bf16

// What the forward pass keeps so that the backward pass does not compute the logits again: powers (see UpdateKeeping),
// or logits before bias, softcap and temperature. As many rows as fit are kept in the memory of the weight's gradient,
// the others in `buffer`. Sharing that memory is safe: the backward pass reads a group of columns before it writes the
// rows of the gradient for that group.
struct Kept {
  char *buffer;           // kept_bytes() bytes, aligned to 4; null if nothing is kept
  void *weight_gradient;  // [num_columns, num_features] in the operand type, contiguous, or null
  int64_t num_rows;       // of the forward pass
  const int64_t *rows;    // of the backward pass, as indices into those; null for all
  bool powers;

  int64_t value_bytes() const { return powers ? 2 : 4; }
};

// The number of rows whose kept values fit in the memory of the weight's gradient.
inline int64_t rows_in_gradient(const Kept &kept, int64_t num_features, int64_t value_bytes) {
  if (kept.weight_gradient == nullptr || value_bytes != kept.value_bytes()) return 0;
  return num_features < kept.num_rows ? num_features : kept.num_rows;
}

// The bytes of the maxima that powers are relative to: a float32 for each row and group of columns. There are at most
// as many groups as panels.
inline int64_t maxima_bytes(const Kept &kept, int64_t num_columns) {
  return kept.powers ? (num_columns + kPanelColumns - 1) / kPanelColumns * kept.num_rows * 4 : 0;
}

// The size of Kept::buffer: the maxima, then the rows that do not fit in the weight's gradient. buffer_bytes() of
// native.py computes the same size.
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
  const float *temperatures;  // one per row, in place of the transform's; or null
  Wanted wanted;
  const int64_t *targets;
  Kept kept;
};

// Results; null where not wanted.
struct LinearGradients {
  float *hidden;      // [num_rows, num_features], contiguous; overwritten
  void *weight;       // [num_columns, num_features], contiguous, in the operand type; overwritten
  float *weight_sum;  // as `weight`, but float32; added to
  float *bias;        // [num_columns]; overwritten
};

// Limits [num_rows], or null. Where all gradients of a row's logits in a group of columns are below the row's limit in
// absolute value, that row and group may be left out of the gradients of hidden states and weight.
using SkipLimits = const float *;

// Statistics of all rows over all columns.
void linear_forward(const Kernels &, const ProductKernels &, const LinearOperands &, RowState *states,
                    float *target_logits, int num_threads);

// The buffers that grow with the number of rows take at most `workspace_bytes`, or what the narrowest slab needs.
void linear_backward(const Kernels &, const ProductKernels &, const LinearOperands &, const RowGradient *rows,
                     const LinearGradients &, SkipLimits limits, int64_t workspace_bytes, int num_threads);

}  // namespace repirl
