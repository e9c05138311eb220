// Forward and backward pass of the linear op: the order of the computation, and its division among threads.

#include "linear.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "threads.h"

namespace repirl {
namespace {

// A group is the columns whose panels are used together. They and the rows that are multiplied with them should stay in
// the second-level cache.
constexpr int64_t kGroupBytes = 384 << 10;
constexpr int64_t kMaxGroupColumns = 10 * kPanelColumns;
// The forward pass sums over splits of about this many columns, then merges the sums in order. Splits depend on neither
// the number of rows nor the number of threads, so a row's statistics do not either, to the bit.
constexpr int64_t kSplitColumns = 21 * kPanelColumns;
constexpr int64_t kMinSlabColumns = 8 * kPanelColumns, kMaxSlabColumns = 42 * kPanelColumns;
static_assert(kMaxGroupColumns <= kMaxKeptColumns && kMaxGroupColumns <= kSplitColumns);
// Sizes of tasks. Larger tasks amortise packing a panel, which costs as much as the product of a few rows; smaller
// tasks occupy more cores.
constexpr int64_t kTaskRows = 1024, kTaskColumns = 10 * kPanelColumns;
constexpr int64_t kUnpackedTaskRows = 128;
constexpr int64_t kLineBytes = 64;     // of a cache line
constexpr int64_t kDepthWords = 1024;  // of rows that are summed at a time into the weight's gradient

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// Maps all pages of fresh memory in one call, where the system can. A page fault for each page on its first write takes
// longer, above all with several threads.
void populate(void *data, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 4096;
  constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, since Linux 5.14
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void *>(begin), end - begin, kPopulateWrite);
#else
  (void)data, (void)bytes;
#endif
}

struct Free {
  void operator()(void *pointer) const { std::free(pointer); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;

template <class T>
Buffer<T> allocate(int64_t count) {
  void *pointer = std::aligned_alloc(64, static_cast<size_t>(round_up(std::max<int64_t>(count, 1) * sizeof(T), 64)));
  if (pointer == nullptr) throw std::bad_alloc();
  return Buffer<T>(static_cast<T *>(pointer));
}

// A matrix of operands; a value has `value_bytes` bytes.
struct View {
  const void *data;
  int64_t stride, value_bytes;

  const void *at(int64_t row, int64_t column) const {
    return static_cast<const char *>(data) + (row * stride + column) * value_bytes;
  }
};

// The operands of one call, and the sizes that follow from them.
struct Problem {
  const Kernels &kernels;
  const ProductKernels &products;
  const LinearOperands &operands;
  const int64_t value_bytes = 4 / products.values_per_word;
  const View hidden{operands.hidden, operands.hidden_stride, value_bytes};
  const View weight{operands.weight, operands.weight_stride, value_bytes};
  const int64_t feature_words = words(operands.num_features);
  const int64_t group_columns = std::clamp<int64_t>(kGroupBytes / (feature_words * kPanelColumns * 4) * kPanelColumns,
                                                    kPanelColumns, kMaxGroupColumns);
  const int64_t rows_in_gradient = repirl::rows_in_gradient(operands.kept, operands.num_features, value_bytes);

  // `columns` rounded down to whole groups, at least one. With it, both passes divide the columns into the same groups.
  int64_t whole_groups(int64_t columns) const { return std::max(columns / group_columns, int64_t{1}) * group_columns; }

  bool recompute() const { return operands.kept.buffer == nullptr; }

  int64_t kept_row(int64_t row) const { return operands.kept.rows == nullptr ? row : operands.kept.rows[row]; }

  // The kept values of a row in the group of `count` columns that begins at `column`.
  void *kept(int64_t row, int64_t column, int64_t count) const {
    const Kept &kept = operands.kept;
    const int64_t bytes = kept.value_bytes();
    row = kept_row(row);
    if (row < rows_in_gradient)
      return static_cast<char *>(kept.weight_gradient) + (column * operands.num_features + row * count) * bytes;
    const int64_t before = column * (kept.num_rows - rows_in_gradient) + (row - rows_in_gradient) * count;
    return kept.buffer + maxima_bytes(kept, operands.num_columns) + before * bytes;
  }

  float &kept_maximum(int64_t row, int64_t column) const {
    const Kept &kept = operands.kept;
    return reinterpret_cast<float *>(kept.buffer)[column / group_columns * kept.num_rows + kept_row(row)];
  }

  int64_t words(int64_t values) const { return divide_up(values, products.values_per_word); }

  int num_workers(int num_threads) const {
    constexpr double kMinWork = 1 << 24;  // multiplications for which a thread pays
    const double work = static_cast<double>(operands.num_rows) * operands.num_columns * operands.num_features;
    return std::max(1, static_cast<int>(std::min<double>(num_threads, work / kMinWork)));
  }

  Transform transform(int64_t row, int64_t first_column) const {
    Transform result = operands.transform;
    if (result.bias != nullptr) result.bias += first_column;
    if (operands.temperatures != nullptr) result.temperature = operands.temperatures[row];
    return result;
  }
};

// Logits of kTileRows rows and a group of columns, in buffers of one worker.
class LogitTile {
 public:
  explicit LogitTile(const Problem &problem)
      : problem_(problem), panels_(allocate<uint32_t>(problem.feature_words * problem.group_columns)),
        tile_(allocate<float>(kTileRows * problem.group_columns)) {}

  // Packs the weights of these columns. The `num_tiles` calls of multiply() that follow also prefetch the weights of
  // the next columns, as many again but none from `end` on: the hardware does not prefetch from so many rows at once.
  void pack(int64_t first_column, int64_t num_columns, int64_t end, int64_t num_tiles) {
    num_columns_ = num_columns;
    const int64_t next = first_column + num_columns, num_next = std::min(num_columns, end - next);
    fetched_ = static_cast<const char *>(problem_.weight.at(next, 0));
    fetch_end_ = num_next > 0 ? static_cast<const char *>(problem_.weight.at(next + num_next - 1, 0)) : fetched_;
    fetch_bytes_ = round_up(divide_up(fetch_end_ - fetched_, num_tiles), kLineBytes);
    for (int64_t column = 0; column < num_columns; column += kPanelColumns)
      problem_.products.pack_transposed(problem_.weight.at(first_column + column, 0), problem_.weight.stride,
                                        std::min(kPanelColumns, num_columns - column), problem_.operands.num_features,
                                        panels_.get() + column * problem_.feature_words);
  }

  // Computes the logits of the rows from `first_row` on. Rows beyond the last one repeat it.
  void multiply(int64_t first_row) {
    const void *rows[kTileRows];
    for (int64_t r = 0; r < kTileRows; ++r)
      rows[r] = problem_.hidden.at(std::min(first_row + r, problem_.operands.num_rows - 1), 0);
    for (int64_t column = 0; column < num_columns_; column += kPanelColumns)
      problem_.products.multiply_rows(rows, panels_.get() + column * problem_.feature_words, problem_.feature_words,
                                      tile_.get() + column, stride());
    for (const char *stop = std::min(fetched_ + fetch_bytes_, fetch_end_); fetched_ < stop; fetched_ += kLineBytes)
      __builtin_prefetch(fetched_, 0, 2);
  }

  float *row(int64_t r) { return tile_.get() + r * stride(); }
  int64_t stride() const { return problem_.group_columns; }

 private:
  const Problem &problem_;
  Buffer<uint32_t> panels_;
  Buffer<float> tile_;
  int64_t num_columns_ = 0;
  const char *fetched_ = nullptr, *fetch_end_ = nullptr;
  int64_t fetch_bytes_ = 0;
};

void merge(const RowState &part, RowState &state) {
  constexpr float kNothing = kNoColumns.maximum;
  state.sum += part.sum;
  if (part.maximum > state.maximum) {
    state.argmax = part.argmax;
    if (state.maximum != kNothing) {
      const double change = static_cast<double>(state.maximum) - part.maximum, factor = std::exp(change);
      state.weighted = factor * (state.weighted + change * state.total);
      state.total *= factor;
    }
    state.maximum = part.maximum;
  }
  if (part.maximum == kNothing) {
    state.total += part.total;  // 0, or NaN
  } else {
    const double change = static_cast<double>(part.maximum) - state.maximum, factor = std::exp(change);
    state.weighted += factor * (part.weighted + change * part.total);
    state.total += factor * part.total;
  }
}

// The gradient of one slab's logits in two layouts: as the left operand of the product that sums over columns, and of
// the product that sums over rows.
class SlabGradient {
 public:
  SlabGradient(const Problem &problem, const LinearGradients &gradients, int64_t workspace_bytes)
      : padded_rows_(round_up(problem.operands.num_rows, kTileRows)),
        row_words_(padded_rows_ / problem.products.values_per_word),
        num_columns_(choose_width(problem, workspace_bytes)),
        rows_(allocate<char>(gradients.hidden ? padded_rows_ * num_columns_ * problem.value_bytes : 0)),
        blocks_(allocate<uint32_t>(gradients.weight || gradients.weight_sum ? row_words_ * num_columns_ : 0)),
        rows_view_{gradients.hidden ? rows_.get() : nullptr, num_columns_, problem.value_bytes},
        has_blocks_(gradients.weight || gradients.weight_sum) {}

  int64_t max_columns() const { return num_columns_; }
  const View &rows() const { return rows_view_; }

  // The block [word][kTileRows] of the kTileRows columns that begin at `column`, from `row_word` on; null if there is
  // none.
  uint32_t *block(int64_t column, int64_t row_word) {
    return has_blocks_ ? blocks_.get() + column * row_words_ + row_word * kTileRows : nullptr;
  }

  void store(const Problem &problem, LogitTile &tile, int64_t first_row, int64_t column, int64_t num_columns) {
    problem.products.store_gradient(tile.row(0), tile.stride(), round_up(num_columns, 16),
                                    rows_view_.data ? const_cast<void *>(rows_view_.at(first_row, column)) : nullptr,
                                    num_columns_, block(column, first_row / problem.products.values_per_word),
                                    row_words_ * kTileRows);
  }

 private:
  static int64_t choose_width(const Problem &problem, int64_t workspace_bytes) {
    const int64_t bytes_per_column = 2 * problem.value_bytes * problem.operands.num_rows;
    const int64_t columns = std::clamp(workspace_bytes / bytes_per_column, kMinSlabColumns, kMaxSlabColumns);
    return std::min(problem.whole_groups(columns), round_up(problem.operands.num_columns, kPanelColumns));
  }

  const int64_t padded_rows_, row_words_, num_columns_;
  Buffer<char> rows_;
  Buffer<uint32_t> blocks_;
  const View rows_view_;
  const bool has_blocks_;
};

// One worker's buffers for the products of the backward pass.
struct Scratch {
  explicit Scratch(const Problem &problem)
      : logits(problem),
        panel(allocate<uint32_t>(std::max(kDepthWords, problem.words(kMaxSlabColumns)) * kPanelColumns)),
        sums(allocate<float>(kTaskColumns * kPanelColumns)) {}

  LogitTile logits;
  Buffer<uint32_t> panel;
  Buffer<float> sums;
};

// The backward pass of one slab of columns, split into tasks.
class SlabBackward {
 public:
  SlabBackward(const Problem &problem, const RowGradient *rows, const LinearGradients &gradients, SkipLimits limits,
               int64_t workspace_bytes)
      : problem_(problem), operands_(problem.operands), rows_(rows), gradients_(gradients), limits_(limits),
        slab_(problem, gradients, workspace_bytes), num_row_chunks_(divide_up(operands_.num_rows, kTaskRows)),
        gradient_rows_(problem.recompute() ? kTaskRows : kUnpackedTaskRows),
        num_gradient_chunks_(divide_up(operands_.num_rows, gradient_rows_)),
        num_feature_panels_(divide_up(operands_.num_features, kPanelColumns)),
        bias_sums_(gradients.bias ? static_cast<size_t>(num_gradient_chunks_ * slab_.max_columns()) : 0),
        counts_(limits ? static_cast<size_t>(divide_up(slab_.max_columns(), problem.group_columns) * operands_.num_rows)
                       : 0) {}

  void run(Phases &phases, int num_workers, Scratch &scratch) {
    for (int64_t first = 0; first < operands_.num_columns; first += slab_.max_columns()) {
      const int64_t num_columns = std::min(slab_.max_columns(), operands_.num_columns - first);
      const int64_t num_groups = divide_up(num_columns, problem_.group_columns);
      phases.run(num_workers, num_groups * num_gradient_chunks_, [&](int64_t task) {
        compute_gradient(scratch, first, num_columns, task / num_gradient_chunks_, task % num_gradient_chunks_);
      });
      const int64_t row_chunks = gradients_.hidden ? num_row_chunks_ : 0;
      const int64_t column_chunks =
          gradients_.weight || gradients_.weight_sum ? divide_up(num_columns, kTaskColumns) : 0;
      const int64_t num_row_tasks = row_chunks * num_feature_panels_,
                    num_column_tasks = column_chunks * num_feature_panels_;
      phases.run(num_workers, num_row_tasks + num_column_tasks + (gradients_.bias ? 1 : 0), [&](int64_t task) {
        if (task < num_row_tasks) {  // longer tasks first: at the end, workers wait for short ones
          sum_over_columns(scratch, first, num_columns, task % row_chunks, task / row_chunks);
        } else if (task < num_row_tasks + num_column_tasks) {
          // Consecutive tasks write different columns, so that two workers rarely fault on the same fresh page.
          task -= num_row_tasks;
          sum_over_rows(scratch, first, num_columns, task % column_chunks, task / column_chunks);
        } else {
          sum_bias(first, num_columns);
        }
      });
    }
  }

 private:
  void compute_gradient(Scratch &scratch, int64_t first, int64_t num_columns, int64_t group, int64_t row_chunk) {
    LogitTile &tile = scratch.logits;
    const int64_t column = group * problem_.group_columns;
    const int64_t count = std::min(problem_.group_columns, num_columns - column);
    double *bias_sums = gradients_.bias ? bias_sums_.data() + row_chunk * slab_.max_columns() + column : nullptr;
    if (bias_sums) std::fill_n(bias_sums, count, 0.0);
    if (row_chunk == 0 && gradients_.weight != nullptr && problem_.rows_in_gradient == 0)
      populate(
          static_cast<char *>(gradients_.weight) + (first + column) * operands_.num_features * problem_.value_bytes,
          count * operands_.num_features * problem_.value_bytes);
    const int64_t first_row = row_chunk * gradient_rows_,
                  end = std::min(first_row + gradient_rows_, operands_.num_rows);
    if (problem_.recompute())
      tile.pack(first + column, count, operands_.num_columns, divide_up(end - first_row, kTileRows));
    for (int64_t row = first_row; row < end; row += kTileRows) {
      if (problem_.recompute()) tile.multiply(row);
      for (int64_t r = 0; r < kTileRows; ++r) {
        float *out = tile.row(r);
        if (row + r >= operands_.num_rows) {
          std::fill_n(out, round_up(count, kPanelColumns), 0.0f);
          continue;
        }
        compute_row(row + r, first + column, count, out);
        std::fill(out + count, out + round_up(count, kPanelColumns), 0.0f);
        if (bias_sums)
          for (int64_t i = 0; i < count; ++i) bias_sums[i] += out[i];
        if (limits_) {
          const float limit = limits_[row + r];
          int large = 0;
          for (int64_t i = 0; i < count; ++i) large |= !(std::fabs(out[i]) < limit);  // true for NaN
          counts_[static_cast<size_t>(group * operands_.num_rows + row + r)] = large != 0;
        }
      }
      slab_.store(problem_, tile, row, column, count);
    }
  }

  // Writes the gradient of one row's logits in a group to `out`. Reads the kept values; if nothing was kept, the logits
  // in `out`.
  void compute_row(int64_t row, int64_t column, int64_t count, float *out) {
    const int64_t target = operands_.targets[row] - column;
    const Transform transform = problem_.transform(row, column);
    if (problem_.recompute()) {
      problem_.kernels.gradient_f32(out, out, count, transform, target, rows_[row]);
      return;
    }
    const void *kept = problem_.kept(row, column, count);
    const int64_t ahead = std::min(row + kTileRows, operands_.num_rows - 1);
    const char *next = static_cast<const char *>(problem_.kept(ahead, column, count));
    for (int64_t i = 0; i < count * operands_.kept.value_bytes(); i += kLineBytes) __builtin_prefetch(next + i, 0, 3);
    if (operands_.kept.powers) {
      problem_.kernels.gradient_of_kept(static_cast<const uint16_t *>(kept), problem_.kept_maximum(row, column), out,
                                        count, transform, target, rows_[row]);
    } else {
      problem_.kernels.gradient_f32(static_cast<const float *>(kept), out, count, transform, target, rows_[row]);
    }
  }

  // Whether a row's gradient in columns [begin, end) of the slab is not skipped.
  bool counts(int64_t row, int64_t begin, int64_t end) const {
    if (limits_ == nullptr) return true;
    for (int64_t group = begin / problem_.group_columns; group * problem_.group_columns < end; ++group)
      if (counts_[static_cast<size_t>(group * operands_.num_rows + row)]) return true;
    return false;
  }

  bool block_counts(int64_t first_row, int64_t begin, int64_t end) const {
    for (int64_t row = first_row; row < std::min(first_row + kTileRows, operands_.num_rows); ++row)
      if (counts(row, begin, end)) return true;
    return false;
  }

  // The weight's gradient for one chunk of the slab's columns and one panel of features.
  void sum_over_rows(Scratch &scratch, int64_t first, int64_t num_columns, int64_t chunk, int64_t feature_panel) {
    const int64_t begin = chunk * kTaskColumns, end = std::min(begin + kTaskColumns, num_columns);
    const int64_t feature = feature_panel * kPanelColumns;
    const int64_t width = std::min(kPanelColumns, operands_.num_features - feature);
    std::fill_n(scratch.sums.get(), kTaskColumns * kPanelColumns, 0.0f);
    const int64_t depth = kDepthWords * problem_.products.values_per_word;
    for (int64_t row = 0, next; row < operands_.num_rows; row = next) {
      next = row;
      while (next < operands_.num_rows && next - row < depth && block_counts(next, begin, end)) next += kTileRows;
      if (next == row) {
        next += kTileRows;
        continue;
      }
      const int64_t num_rows = std::min(next, operands_.num_rows) - row;
      problem_.products.pack(problem_.hidden.at(row, feature), problem_.hidden.stride, num_rows, width,
                             scratch.panel.get());
      for (int64_t column = begin; column < end; column += kTileRows)
        problem_.products.multiply_block(slab_.block(column, problem_.words(row)), scratch.panel.get(),
                                         problem_.words(num_rows),
                                         scratch.sums.get() + (column - begin) * kPanelColumns);
    }
    for (int64_t column = begin; column < end; ++column) {
      const float *sums = scratch.sums.get() + (column - begin) * kPanelColumns;
      const int64_t offset = (first + column) * operands_.num_features + feature;
      if (gradients_.weight != nullptr) {
        problem_.products.round(sums, width, static_cast<char *>(gradients_.weight) + offset * problem_.value_bytes);
      } else {
        problem_.products.add(sums, width, gradients_.weight_sum + offset);
      }
    }
  }

  // Adds the slab's share of the hidden states' gradient, for one chunk of rows and one panel of features.
  void sum_over_columns(Scratch &scratch, int64_t first, int64_t num_columns, int64_t chunk, int64_t feature_panel) {
    const int64_t feature = feature_panel * kPanelColumns;
    const int64_t width = std::min(kPanelColumns, operands_.num_features - feature);
    problem_.products.pack(problem_.weight.at(first, feature), problem_.weight.stride, num_columns, width,
                           scratch.panel.get());
    float *tile = scratch.sums.get();
    int64_t row = chunk * kTaskRows;
    const int64_t end = std::min(row + kTaskRows, operands_.num_rows);
    if (first == 0)
      for (int64_t r = row; r < end; ++r)
        std::fill_n(gradients_.hidden + r * operands_.num_features + feature, width, 0.0f);
    for (;;) {
      int64_t indices[kTileRows];
      int64_t count = 0;
      for (; row < end && count < kTileRows; ++row)
        if (counts(row, 0, num_columns)) indices[count++] = row;
      if (count == 0) break;
      const void *rows[kTileRows];
      for (int64_t r = 0; r < kTileRows; ++r) rows[r] = slab_.rows().at(indices[std::min(r, count - 1)], 0);
      problem_.products.multiply_rows(rows, scratch.panel.get(), problem_.words(num_columns), tile, kPanelColumns);
      for (int64_t r = 0; r < count; ++r) {
        float *out = gradients_.hidden + indices[r] * operands_.num_features + feature;
        problem_.products.add(tile + r * kPanelColumns, width, out);
      }
    }
  }

  void sum_bias(int64_t first, int64_t num_columns) {
    for (int64_t column = 0; column < num_columns; ++column) {
      double total = 0.0;
      for (int64_t chunk = 0; chunk < num_gradient_chunks_; ++chunk)
        total += bias_sums_[static_cast<size_t>(chunk * slab_.max_columns() + column)];
      gradients_.bias[first + column] = static_cast<float>(total);
    }
  }

  const Problem &problem_;
  const LinearOperands &operands_;
  const RowGradient *rows_;
  const LinearGradients &gradients_;
  const SkipLimits limits_;
  SlabGradient slab_;
  const int64_t num_row_chunks_, gradient_rows_, num_gradient_chunks_, num_feature_panels_;
  std::vector<double> bias_sums_;
  std::vector<uint8_t> counts_;  // [group of columns][row]; empty without limits
};

}  // namespace

void linear_forward(const Kernels &kernels, const ProductKernels &products, const LinearOperands &operands,
                    RowState *states, float *target_logits, int num_threads) {
  const Problem problem{kernels, products, operands};
  const int64_t split_columns = problem.whole_groups(kSplitColumns);
  const int64_t num_rows = operands.num_rows, num_splits = divide_up(operands.num_columns, split_columns);
  const int64_t num_row_chunks = divide_up(num_rows, kTaskRows);
  std::vector<RowState> parts(static_cast<size_t>(num_splits * num_rows), kNoColumns);
  const int num_workers = problem.num_workers(num_threads);
  std::vector<LogitTile> tiles;
  for (int worker = 0; worker < num_workers; ++worker) tiles.emplace_back(problem);
  Phases phases;

  auto compute_part = [&](LogitTile &tile, int64_t split, int64_t row_chunk) {
    const int64_t begin = split * split_columns, end = std::min(begin + split_columns, operands.num_columns);
    const int64_t last_row = std::min((row_chunk + 1) * kTaskRows, num_rows);
    if (row_chunk == 0 && problem.rows_in_gradient > 0)
      populate(problem.kept(0, begin, 0), (end - begin) * operands.num_features * problem.value_bytes);
    if (row_chunk == 0 && !problem.recompute() && problem.rows_in_gradient < num_rows)
      populate(problem.kept(problem.rows_in_gradient, begin, 0),
               (end - begin) * (num_rows - problem.rows_in_gradient) * operands.kept.value_bytes());
    for (int64_t column = begin; column < end; column += problem.group_columns) {
      const int64_t count = std::min(problem.group_columns, end - column);
      tile.pack(column, count, end, divide_up(last_row - row_chunk * kTaskRows, kTileRows));
      for (int64_t first = row_chunk * kTaskRows; first < last_row; first += kTileRows) {
        tile.multiply(first);
        for (int64_t row = first; row < std::min(first + kTileRows, last_row); ++row) {
          const float *x = tile.row(row - first);
          const int64_t target = operands.targets[row] - column;
          const Transform transform = problem.transform(row, column);
          RowState &state = parts[static_cast<size_t>(split * num_rows + row)];
          void *kept = problem.recompute() ? nullptr : problem.kept(row, column, count);
          if (kept != nullptr && operands.kept.powers) {
            kernels.update_keeping(x, count, transform, operands.wanted, column, target, state, target_logits[row],
                                   static_cast<uint16_t *>(kept));
            problem.kept_maximum(row, column) = state.maximum;
            continue;
          }
          if (kept != nullptr) std::copy_n(x, count, static_cast<float *>(kept));
          kernels.update_f32(x, count, transform, operands.wanted, column, target, state, target_logits[row]);
        }
      }
    }
  };
  constexpr int64_t kMergedRows = 64;
  run_workers(num_workers, [&](int worker, int num_running) {
    phases.run(num_running, num_splits * num_row_chunks, [&](int64_t task) {
      compute_part(tiles[static_cast<size_t>(worker)], task / num_row_chunks, task % num_row_chunks);
    });
    phases.run(num_running, divide_up(num_rows, kMergedRows), [&](int64_t task) {
      for (int64_t row = task * kMergedRows; row < std::min((task + 1) * kMergedRows, num_rows); ++row) {
        states[row] = kNoColumns;
        for (int64_t split = 0; split < num_splits; ++split)
          merge(parts[static_cast<size_t>(split * num_rows + row)], states[row]);
      }
    });
  });
}

void linear_backward(const Kernels &kernels, const ProductKernels &products, const LinearOperands &operands,
                     const RowGradient *rows, const LinearGradients &gradients, SkipLimits limits,
                     int64_t workspace_bytes, int num_threads) {
  const Problem problem{kernels, products, operands};
  SlabBackward backward(problem, rows, gradients, limits, workspace_bytes);
  const int num_workers = problem.num_workers(num_threads);
  std::vector<Scratch> scratch;
  for (int worker = 0; worker < num_workers; ++worker) scratch.emplace_back(problem);
  Phases phases;
  run_workers(num_workers, [&](int worker, int num_running) {
    backward.run(phases, num_running, scratch[static_cast<size_t>(worker)]);
  });
}

}  // namespace repirl
