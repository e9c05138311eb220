// Python bindings: repirl_kernels._native. Tensors are passed as DLPack; nothing here depends on PyTorch.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string_view>
#include <type_traits>
#include <vector>

#include <nanobind/stl/optional.h>

#include "linear.h"
#include "statistics.h"
#include "threads.h"

namespace nb = nanobind;

namespace {

using repirl::Kept;
using repirl::Kernels;
using repirl::LinearGradients;
using repirl::LinearOperands;
using repirl::ProductKernels;
using repirl::RowGradient;
using repirl::RowState;
using repirl::Transform;
using repirl::Wanted;

template <class T>
using Matrix = nb::ndarray<T, nb::ndim<2>, nb::device::cpu>;
template <class T>
using Column = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bias = std::optional<Column<const float>>;
using Temperatures = std::optional<Column<const float>>;  // one per row, in place of `temperature`

// The kernels that this machine can run, the fastest last.
std::vector<const Kernels *> available_kernels() {
  std::vector<const Kernels *> result = {&repirl::baseline::kernels};
#if defined(REPIRL_X86)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return result;
  result.push_back(&repirl::avx2::kernels);
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
    return result;
  result.push_back(&repirl::avx512::kernels);
#if defined(REPIRL_AVX512BF16)
  if (__builtin_cpu_supports("avx512bf16")) result.push_back(&repirl::avx512bf16::kernels);
#endif
#endif
  return result;
}

const Kernels *g_kernels = available_kernels().back();

// Null if the instruction set in use has no matrix products: the caller then computes them.
template <class T>
const ProductKernels *choose_products() {
#if defined(REPIRL_AVX512BF16)
  if (g_kernels == &repirl::avx512bf16::kernels)
    return std::is_same_v<T, float> ? &repirl::avx512bf16::products_f32 : &repirl::avx512bf16::products_bf16;
#endif
  return nullptr;
}

nb::list list_instruction_sets() {
  nb::list names;
  for (const Kernels *kernels : available_kernels()) names.append(kernels->name);
  return names;
}

void use_instruction_set(std::string_view name) {
  for (const Kernels *kernels : available_kernels()) {
    if (name == kernels->name) {
      g_kernels = kernels;
      return;
    }
  }
  throw nb::value_error("this machine or build does not have that instruction set; see instruction_sets()");
}

template <class Function>
void parallel_rows(size_t num_rows, size_t num_columns, int num_threads, const Function &function) {
  constexpr size_t kMinElements = 1 << 15;  // a thread does not pay for less
  const size_t useful = std::max<size_t>(1, num_rows * num_columns / kMinElements);
  const size_t workers =
      std::min({static_cast<size_t>(std::max(1, num_threads)), useful, std::max<size_t>(1, num_rows)});
  repirl::run_workers(static_cast<int>(workers), [&](int worker, int num_workers) {
    const size_t index = static_cast<size_t>(worker), count = static_cast<size_t>(num_workers);
    const size_t end = num_rows * (index + 1) / count;
    for (size_t row = num_rows * index / count; row < end; ++row) function(row);
  });
}

void check_length(size_t length, size_t expected) {
  if (length != expected) throw nb::value_error("an argument's length does not match the slab");
}

template <class T>
void check_slab(const Matrix<T> &slab, const Bias &bias) {
  if (slab.shape(1) > 1 && slab.stride(1) != 1) throw nb::value_error("the slab's columns must be contiguous");
  if (bias) check_length(bias->shape(0), slab.shape(1));
}

Transform make_transform(const Bias &bias, float temperature, float softcap) {
  return {bias ? bias->data() : nullptr, temperature, softcap};
}

// The rows' running statistics, one array for each; null for those that are not wanted.
struct States {
  float *maximum, *target_logit;
  double *total, *weighted, *sum;
  int64_t *argmax;

  Wanted wanted() const { return {weighted != nullptr, sum != nullptr, argmax != nullptr}; }

  RowState get(size_t row) const {
    return {maximum[row], total[row], weighted ? weighted[row] : 0.0, sum ? sum[row] : 0.0, argmax ? argmax[row] : -1};
  }

  void set(size_t row, const RowState &state) const {
    maximum[row] = state.maximum;
    total[row] = state.total;
    if (weighted) weighted[row] = state.weighted;
    if (sum) sum[row] = state.sum;
    if (argmax) argmax[row] = state.argmax;
  }
};

using Doubles = std::optional<Column<double>>;
using Indices = std::optional<Column<int64_t>>;

States make_states(size_t num_rows, const Column<float> &maximum, const Column<double> &total, const Doubles &weighted,
                   const Column<float> &target_logit, const Doubles &sum, const Indices &argmax) {
  for (size_t length : {maximum.shape(0), total.shape(0), target_logit.shape(0)}) check_length(length, num_rows);
  for (const Doubles *column : {&weighted, &sum})
    if (*column) check_length((*column)->shape(0), num_rows);
  if (argmax) check_length(argmax->shape(0), num_rows);
  return {maximum.data(),
          target_logit.data(),
          total.data(),
          weighted ? weighted->data() : nullptr,
          sum ? sum->data() : nullptr,
          argmax ? argmax->data() : nullptr};
}

const float *make_temperatures(const Temperatures &temperatures, size_t num_rows) {
  if (temperatures) check_length(temperatures->shape(0), num_rows);
  return temperatures ? temperatures->data() : nullptr;
}

Transform of_row(Transform transform, const float *temperatures, size_t row) {
  if (temperatures != nullptr) transform.temperature = temperatures[row];
  return transform;
}

template <class T, class Update>
void update(const Matrix<const T> &slab, const Bias &bias, float temperature, const Temperatures &temperatures,
            float softcap, const Column<const int64_t> &targets, int64_t first_column, const Column<float> &maximum,
            const Column<double> &total, const Doubles &weighted, const Column<float> &target_logit, const Doubles &sum,
            const Indices &argmax, int num_threads, Update update_row) {
  check_slab(slab, bias);
  const size_t num_rows = slab.shape(0), num_columns = slab.shape(1);
  check_length(targets.shape(0), num_rows);
  const States states = make_states(num_rows, maximum, total, weighted, target_logit, sum, argmax);
  const float *row_temperatures = make_temperatures(temperatures, num_rows);
  const Transform transform = make_transform(bias, temperature, softcap);
  const T *x = slab.data();
  const int64_t stride = slab.stride(0);
  const int64_t *target = targets.data();
  nb::gil_scoped_release release;
  parallel_rows(num_rows, num_columns, num_threads, [&](size_t row) {
    RowState state = states.get(row);
    update_row(x + static_cast<int64_t>(row) * stride, static_cast<int64_t>(num_columns),
               of_row(transform, row_temperatures, row), states.wanted(), first_column, target[row] - first_column,
               state, states.target_logit[row]);
    states.set(row, state);
  });
}

template <class T, class Gradient>
void gradient(const Matrix<const T> &slab, const Matrix<T> &out, const Bias &bias, float temperature,
              const Temperatures &temperatures, float softcap, const Column<const int64_t> &targets,
              int64_t first_column, const Column<const float> &logsumexp, const Column<const float> &mean_logit,
              const Column<const float> &mass, const Column<const float> &onehot, const Column<const float> &slope,
              const Column<const float> &uniform, int num_threads, Gradient gradient_row) {
  check_slab(slab, bias);
  const size_t num_rows = slab.shape(0), num_columns = slab.shape(1);
  check_length(out.shape(0), num_rows);
  check_length(out.shape(1), num_columns);
  if (num_columns > 1 && out.stride(1) != 1) throw nb::value_error("the result's columns must be contiguous");
  for (size_t length : {targets.shape(0), logsumexp.shape(0), mean_logit.shape(0), mass.shape(0), onehot.shape(0),
                        slope.shape(0), uniform.shape(0)})
    check_length(length, num_rows);
  const float *row_temperatures = make_temperatures(temperatures, num_rows);
  const Transform transform = make_transform(bias, temperature, softcap);
  const T *x = slab.data();
  T *dx = out.data();
  const int64_t stride = slab.stride(0), out_stride = out.stride(0);
  const int64_t *target = targets.data();
  const float *L = logsumexp.data(), *b = mean_logit.data(), *g = mass.data(), *one = onehot.data(), *s = slope.data();
  const float *every = uniform.data();
  nb::gil_scoped_release release;
  parallel_rows(num_rows, num_columns, num_threads, [&](size_t row) {
    const int64_t r = static_cast<int64_t>(row);
    gradient_row(x + r * stride, dx + r * out_stride, static_cast<int64_t>(num_columns),
                 of_row(transform, row_temperatures, row), target[row] - first_column,
                 RowGradient{L[row], b[row], g[row], one[row], s[row], every[row]});
  });
}

template <class T>
const ProductKernels &require_products() {
  const ProductKernels *products = choose_products<T>();
  if (products == nullptr) throw nb::value_error("this instruction set has no matrix products; see has_products()");
  return *products;
}

// Memory for what a forward pass keeps; see Kept.
using Buffer = std::optional<Column<uint8_t>>;

template <class T>
Kept make_kept(const Buffer &buffer, const std::optional<Matrix<T>> &dweight, size_t num_rows, size_t num_features,
               size_t num_columns, float softcap) {
  if (!buffer) return {nullptr, nullptr, 0, nullptr, false};
  const Kept kept{reinterpret_cast<char *>(buffer->data()), dweight ? dweight->data() : nullptr,
                  static_cast<int64_t>(num_rows), nullptr, sizeof(T) == 2 && softcap == 0.0f};
  const int64_t bytes = repirl::kept_bytes(kept, static_cast<int64_t>(num_features), static_cast<int64_t>(num_columns),
                                           static_cast<int64_t>(sizeof(T)));
  if (static_cast<int64_t>(buffer->shape(0)) < bytes) throw nb::value_error("the buffer is too small for what is kept");
  return kept;
}

template <class T>
void check_gradient(const std::optional<Matrix<T>> &result, size_t num_rows, size_t num_features) {
  if (!result) return;
  check_length(result->shape(0), num_rows);
  check_length(result->shape(1), num_features);
  if ((num_features > 1 && result->stride(1) != 1) || result->stride(0) != static_cast<int64_t>(num_features))
    throw nb::value_error("gradients must be contiguous");
}

template <class T>
LinearOperands make_operands(const Matrix<const T> &hidden, const Matrix<const T> &weight, const Bias &bias,
                             float temperature, const Temperatures &temperatures, float softcap, const Wanted &wanted,
                             const Column<const int64_t> &targets, const Kept &kept) {
  if ((hidden.shape(1) > 1 && hidden.stride(1) != 1) || (weight.shape(1) > 1 && weight.stride(1) != 1))
    throw nb::value_error("the operands' columns must be contiguous");
  // An odd number of bfloat16 features is padded with one 0, to whole words.
  const size_t num_features = weight.shape(1);
  if (hidden.shape(1) != num_features && !(sizeof(T) == 2 && hidden.shape(1) == num_features + 1))
    throw nb::value_error("hidden and weight differ in their number of features");
  if (sizeof(T) == 2 && hidden.shape(1) % 2 != 0) throw nb::value_error("hidden must have an even number of columns");
  if (bias) check_length(bias->shape(0), weight.shape(0));
  check_length(targets.shape(0), hidden.shape(0));
  return {hidden.data(),
          hidden.stride(0),
          weight.data(),
          weight.stride(0),
          static_cast<int64_t>(hidden.shape(0)),
          static_cast<int64_t>(num_features),
          static_cast<int64_t>(weight.shape(0)),
          make_transform(bias, temperature, softcap),
          make_temperatures(temperatures, hidden.shape(0)),
          wanted,
          targets.data(),
          kept};
}

template <class T>
void linear_forward(const Matrix<const T> &hidden, const Matrix<const T> &weight, const Bias &bias, float temperature,
                    const Temperatures &temperatures, float softcap, const Column<const int64_t> &targets,
                    const Column<float> &maximum, const Column<double> &total, const Doubles &weighted,
                    const Column<float> &target_logit, const Doubles &sum, const Indices &argmax, const Buffer &buffer,
                    const std::optional<Matrix<T>> &dweight, int num_threads) {
  const ProductKernels &products = require_products<T>();
  check_gradient(dweight, weight.shape(0), weight.shape(1));
  const Kept kept = make_kept<T>(buffer, dweight, hidden.shape(0), weight.shape(1), weight.shape(0), softcap);
  const size_t num_rows = hidden.shape(0);
  const States states = make_states(num_rows, maximum, total, weighted, target_logit, sum, argmax);
  const LinearOperands operands =
      make_operands(hidden, weight, bias, temperature, temperatures, softcap, states.wanted(), targets, kept);
  nb::gil_scoped_release release;
  std::vector<RowState> row_states(num_rows);
  repirl::linear_forward(*g_kernels, products, operands, row_states.data(), states.target_logit, num_threads);
  for (size_t row = 0; row < num_rows; ++row) states.set(row, row_states[row]);
}

template <class T>
void linear_backward(const Matrix<const T> &hidden, const Matrix<const T> &weight, const Bias &bias, float temperature,
                     const Temperatures &temperatures, float softcap, const Column<const int64_t> &targets,
                     const Column<const float> &logsumexp, const Column<const float> &mean_logit,
                     const Column<const float> &mass, const Column<const float> &onehot,
                     const Column<const float> &slope, const Column<const float> &uniform,
                     const std::optional<Matrix<float>> &dhidden, const std::optional<Matrix<T>> &dweight,
                     const std::optional<Matrix<float>> &dweight_sum, const std::optional<Column<float>> &dbias,
                     const Buffer &buffer, int64_t num_buffer_rows,
                     const std::optional<Column<const int64_t>> &buffer_rows,
                     const std::optional<Column<const float>> &skip_below, int64_t workspace_bytes, int num_threads) {
  const ProductKernels &products = require_products<T>();
  const size_t num_rows = hidden.shape(0), num_features = weight.shape(1);
  check_gradient(dhidden, num_rows, num_features);
  check_gradient(dweight, weight.shape(0), num_features);
  check_gradient(dweight_sum, weight.shape(0), num_features);
  Kept kept =
      make_kept<T>(buffer, dweight, static_cast<size_t>(num_buffer_rows), num_features, weight.shape(0), softcap);
  if (buffer_rows) {
    check_length(buffer_rows->shape(0), num_rows);
    kept.rows = buffer_rows->data();
    for (size_t row = 0; row < num_rows; ++row)
      if (kept.rows[row] < 0 || kept.rows[row] >= num_buffer_rows) throw nb::value_error("no such row in the buffer");
  } else if (buffer) {
    check_length(num_rows, static_cast<size_t>(num_buffer_rows));
  }
  const LinearOperands operands =
      make_operands(hidden, weight, bias, temperature, temperatures, softcap, Wanted{}, targets, kept);
  for (size_t length :
       {logsumexp.shape(0), mean_logit.shape(0), mass.shape(0), onehot.shape(0), slope.shape(0), uniform.shape(0)})
    check_length(length, num_rows);
  if (dbias) check_length(dbias->shape(0), weight.shape(0));
  if (skip_below) check_length(skip_below->shape(0), num_rows);
  const LinearGradients gradients{dhidden ? dhidden->data() : nullptr, dweight ? dweight->data() : nullptr,
                                  dweight_sum ? dweight_sum->data() : nullptr, dbias ? dbias->data() : nullptr};
  std::vector<RowGradient> rows(num_rows);
  for (size_t row = 0; row < num_rows; ++row)
    rows[row] = {logsumexp.data()[row], mean_logit.data()[row], mass.data()[row],
                 onehot.data()[row],    slope.data()[row],      uniform.data()[row]};
  const repirl::SkipLimits limits = skip_below ? skip_below->data() : nullptr;
  nb::gil_scoped_release release;
  repirl::linear_backward(*g_kernels, products, operands, rows.data(), gradients, limits, workspace_bytes, num_threads);
}

// An array argument that is not converted. By default nanobind converts other dtypes, and results would be written to
// the copy.
auto array(const char *name) { return nb::arg(name).noconvert(); }

template <class T>
void bind_linear(nb::module_ &module, const char *forward_name, const char *backward_name) {
  module.def(
      forward_name, &linear_forward<T>,
      "Statistics of hidden @ weight.T. Keeps values in `buffer` and `dweight`, with which the backward pass does not "
      "compute the logits again.",
      array("hidden"), array("weight"), array("bias").none(), nb::arg("temperature"), array("temperatures").none(),
      nb::arg("softcap"), array("targets"), array("maximum"), array("total"), array("weighted").none(),
      array("target_logit"), array("sum").none(), array("argmax").none(), array("buffer").none(),
      array("dweight").none(), nb::arg("num_threads"));
  module.def(
      backward_name, &linear_backward<T>,
      "Gradients: overwrites `dhidden`, `dweight` and `dbias`, adds to `dweight_sum`. `buffer` and `dweight` are from "
      "a forward pass over `num_buffer_rows` rows; `buffer_rows` are these rows' indices there, None for all.",
      array("hidden"), array("weight"), array("bias").none(), nb::arg("temperature"), array("temperatures").none(),
      nb::arg("softcap"), array("targets"), array("logsumexp"), array("mean_logit"), array("mass"), array("onehot"),
      array("slope"), array("uniform"), array("dhidden").none(), array("dweight").none(), array("dweight_sum").none(),
      array("dbias").none(), array("buffer").none(), nb::arg("num_buffer_rows"), array("buffer_rows").none(),
      array("skip_below").none(), nb::arg("workspace_bytes"), nb::arg("num_threads"));
}

}  // namespace

NB_MODULE(_native, module) {
  module.doc() = "One-pass statistics and gradients of slabs of logits on the CPU.";
  module.def("instruction_sets", &list_instruction_sets,
             "Names of the instruction sets that this machine can run, the fastest last.");
  module.def("instruction_set", [] { return g_kernels->name; }, "Name of the instruction set in use.");
  module.def(
      "use_instruction_set", [](const char *name) { use_instruction_set(name); }, nb::arg("name"),
      "Use this instruction set of instruction_sets() from now on (for tests).");
  module.def(
      "update_f32",
      [](Matrix<const float> slab, Bias bias, float temperature, Temperatures temperatures, float softcap,
         Column<const int64_t> targets, int64_t first_column, Column<float> maximum, Column<double> total,
         Doubles weighted, Column<float> target_logit, Doubles sum, Indices argmax, int num_threads) {
        update<float>(slab, bias, temperature, temperatures, softcap, targets, first_column, maximum, total, weighted,
                      target_logit, sum, argmax, num_threads, g_kernels->update_f32);
      },
      "Update the rows' running statistics with a slab of float32 logits.", array("slab"), array("bias").none(),
      nb::arg("temperature"), array("temperatures").none(), nb::arg("softcap"), array("targets"),
      nb::arg("first_column"), array("maximum"), array("total"), array("weighted").none(), array("target_logit"),
      array("sum").none(), array("argmax").none(), nb::arg("num_threads"));
  module.def(
      "update_bf16",
      [](Matrix<const uint16_t> slab, Bias bias, float temperature, Temperatures temperatures, float softcap,
         Column<const int64_t> targets, int64_t first_column, Column<float> maximum, Column<double> total,
         Doubles weighted, Column<float> target_logit, Doubles sum, Indices argmax, int num_threads) {
        update<uint16_t>(slab, bias, temperature, temperatures, softcap, targets, first_column, maximum, total,
                         weighted, target_logit, sum, argmax, num_threads, g_kernels->update_bf16);
      },
      "The same for bfloat16 logits, passed as their bits.", array("slab"), array("bias").none(),
      nb::arg("temperature"), array("temperatures").none(), nb::arg("softcap"), array("targets"),
      nb::arg("first_column"), array("maximum"), array("total"), array("weighted").none(), array("target_logit"),
      array("sum").none(), array("argmax").none(), nb::arg("num_threads"));
  module.def(
      "gradient_f32",
      [](Matrix<const float> slab, Matrix<float> out, Bias bias, float temperature, Temperatures temperatures,
         float softcap, Column<const int64_t> targets, int64_t first_column, Column<const float> logsumexp,
         Column<const float> mean_logit, Column<const float> mass, Column<const float> onehot,
         Column<const float> slope, Column<const float> uniform, int num_threads) {
        gradient<float>(slab, out, bias, temperature, temperatures, softcap, targets, first_column, logsumexp,
                        mean_logit, mass, onehot, slope, uniform, num_threads, g_kernels->gradient_f32);
      },
      "Write the gradient of a slab of float32 logits to `out`, which may be the slab.", array("slab"), array("out"),
      array("bias").none(), nb::arg("temperature"), array("temperatures").none(), nb::arg("softcap"), array("targets"),
      nb::arg("first_column"), array("logsumexp"), array("mean_logit"), array("mass"), array("onehot"), array("slope"),
      array("uniform"), nb::arg("num_threads"));
  module.def(
      "gradient_bf16",
      [](Matrix<const uint16_t> slab, Matrix<uint16_t> out, Bias bias, float temperature, Temperatures temperatures,
         float softcap, Column<const int64_t> targets, int64_t first_column, Column<const float> logsumexp,
         Column<const float> mean_logit, Column<const float> mass, Column<const float> onehot,
         Column<const float> slope, Column<const float> uniform, int num_threads) {
        gradient<uint16_t>(slab, out, bias, temperature, temperatures, softcap, targets, first_column, logsumexp,
                           mean_logit, mass, onehot, slope, uniform, num_threads, g_kernels->gradient_bf16);
      },
      "The same for bfloat16 logits and gradients, passed as their bits.", array("slab"), array("out"),
      array("bias").none(), nb::arg("temperature"), array("temperatures").none(), nb::arg("softcap"), array("targets"),
      nb::arg("first_column"), array("logsumexp"), array("mean_logit"), array("mass"), array("onehot"), array("slope"),
      array("uniform"), nb::arg("num_threads"));
  module.def(
      "has_products", [] { return choose_products<float>() != nullptr; },
      "Whether linear_forward and linear_backward run with the instruction set in use.");
  bind_linear<float>(module, "linear_forward_f32", "linear_backward_f32");
  bind_linear<uint16_t>(module, "linear_forward_bf16", "linear_backward_bf16");
}
