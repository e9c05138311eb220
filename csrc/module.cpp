// Python bindings: repirl_kernels._native. Tensors come as DLPack; nothing here knows of PyTorch.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string_view>
#include <thread>
#include <vector>

#include <nanobind/stl/optional.h>

#include "statistics.h"

namespace nb = nanobind;

namespace {

using repirl::Kernels;
using repirl::RowGradient;
using repirl::RowState;
using repirl::Transform;

template <class T>
using Matrix = nb::ndarray<T, nb::ndim<2>, nb::device::cpu>;
template <class T>
using Column = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bias = std::optional<Column<const float>>;

const Kernels &choose_kernels() {
#if defined(REPIRL_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return repirl::avx512::kernels;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return repirl::avx2::kernels;
#endif
  return repirl::baseline::kernels;
}

const Kernels *g_kernels = &choose_kernels();

std::vector<const Kernels *> available_kernels() {
  std::vector<const Kernels *> result = {&repirl::baseline::kernels};
#if defined(REPIRL_X86)
  const Kernels *best = &choose_kernels();
  if (best != &repirl::baseline::kernels) result.push_back(&repirl::avx2::kernels);
  if (best == &repirl::avx512::kernels) result.push_back(best);
#endif
  return result;
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

// Threads are started for each call and joined: tens of microseconds against milliseconds of work, and no pool that
// would have to get along with PyTorch's OpenMP or survive a fork.
template <class Function>
void parallel_rows(size_t num_rows, size_t num_columns, int num_threads, const Function &function) {
  constexpr size_t kMinElements = 1 << 15;  // a thread is not worth starting for less
  const size_t useful = std::max<size_t>(1, num_rows * num_columns / kMinElements);
  const size_t workers = std::min({static_cast<size_t>(std::max(1, num_threads)), useful, std::max<size_t>(1, num_rows)});
  auto run = [&](size_t worker) {
    const size_t end = num_rows * (worker + 1) / workers;
    for (size_t row = num_rows * worker / workers; row < end; ++row) function(row);
  };
  std::vector<std::thread> threads;
  threads.reserve(workers - 1);
  for (size_t worker = 1; worker < workers; ++worker) threads.emplace_back(run, worker);
  run(0);
  for (std::thread &thread : threads) thread.join();
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

template <class T, class Update>
void update(const Matrix<const T> &slab, const Bias &bias, float temperature, float softcap,
            const Column<const int64_t> &targets, int64_t first_column, const Column<float> &maximum,
            const Column<double> &total, const Column<double> &weighted, const Column<float> &target_logit,
            int num_threads, Update update_row) {
  check_slab(slab, bias);
  const size_t num_rows = slab.shape(0), num_columns = slab.shape(1);
  for (size_t length : {targets.shape(0), maximum.shape(0), total.shape(0), weighted.shape(0), target_logit.shape(0)})
    check_length(length, num_rows);
  const Transform transform = make_transform(bias, temperature, softcap);
  const T *x = slab.data();
  const int64_t stride = slab.stride(0);
  const int64_t *target = targets.data();
  float *m = maximum.data(), *z = target_logit.data();
  double *a = total.data(), *b = weighted.data();
  nb::gil_scoped_release release;
  parallel_rows(num_rows, num_columns, num_threads, [&](size_t row) {
    RowState state{m[row], a[row], b[row]};
    update_row(x + static_cast<int64_t>(row) * stride, static_cast<int64_t>(num_columns), transform,
               target[row] - first_column, state, z[row]);
    m[row] = state.maximum;
    a[row] = state.total;
    b[row] = state.weighted;
  });
}

template <class T, class Gradient>
void gradient(const Matrix<const T> &slab, const Matrix<T> &out, const Bias &bias, float temperature, float softcap,
              const Column<const int64_t> &targets, int64_t first_column, const Column<const float> &logsumexp,
              const Column<const float> &mean_logit, const Column<const float> &mass,
              const Column<const float> &onehot, const Column<const float> &slope, int num_threads,
              Gradient gradient_row) {
  check_slab(slab, bias);
  const size_t num_rows = slab.shape(0), num_columns = slab.shape(1);
  check_length(out.shape(0), num_rows);
  check_length(out.shape(1), num_columns);
  if (num_columns > 1 && out.stride(1) != 1) throw nb::value_error("the result's columns must be contiguous");
  for (size_t length : {targets.shape(0), logsumexp.shape(0), mean_logit.shape(0), mass.shape(0), onehot.shape(0),
                        slope.shape(0)})
    check_length(length, num_rows);
  const Transform transform = make_transform(bias, temperature, softcap);
  const T *x = slab.data();
  T *dx = out.data();
  const int64_t stride = slab.stride(0), out_stride = out.stride(0);
  const int64_t *target = targets.data();
  const float *L = logsumexp.data(), *b = mean_logit.data(), *g = mass.data(), *one = onehot.data(), *s = slope.data();
  nb::gil_scoped_release release;
  parallel_rows(num_rows, num_columns, num_threads, [&](size_t row) {
    const int64_t r = static_cast<int64_t>(row);
    gradient_row(x + r * stride, dx + r * out_stride, static_cast<int64_t>(num_columns), transform,
                 target[row] - first_column, RowGradient{L[row], b[row], g[row], one[row], s[row]});
  });
}

}  // namespace

NB_MODULE(_native, module) {
  module.doc() = "One-pass statistics and gradients of slabs of logits on the CPU.";
  module.def("instruction_sets", &list_instruction_sets, "Names of the instruction sets that run here, best last.");
  module.def("instruction_set", [] { return g_kernels->name; }, "Name of the instruction set in use.");
  module.def("use_instruction_set", [](const char *name) { use_instruction_set(name); }, nb::arg("name"),
             "Run with another instruction set of instruction_sets() from now on (for tests).");
  module.def(
      "update_f32",
      [](Matrix<const float> slab, Bias bias, float temperature, float softcap, Column<const int64_t> targets,
         int64_t first_column, Column<float> maximum, Column<double> total, Column<double> weighted,
         Column<float> target_logit, int num_threads) {
        update<float>(slab, bias, temperature, softcap, targets, first_column, maximum, total, weighted, target_logit,
                      num_threads, g_kernels->update_f32);
      },
      "Take a slab of float32 logits into the rows' running statistics.", nb::arg("slab"), nb::arg("bias").none(),
      nb::arg("temperature"), nb::arg("softcap"), nb::arg("targets"), nb::arg("first_column"), nb::arg("maximum"),
      nb::arg("total"), nb::arg("weighted"), nb::arg("target_logit"), nb::arg("num_threads"));
  module.def(
      "update_bf16",
      [](Matrix<const uint16_t> slab, Bias bias, float temperature, float softcap, Column<const int64_t> targets,
         int64_t first_column, Column<float> maximum, Column<double> total, Column<double> weighted,
         Column<float> target_logit, int num_threads) {
        update<uint16_t>(slab, bias, temperature, softcap, targets, first_column, maximum, total, weighted,
                         target_logit, num_threads, g_kernels->update_bf16);
      },
      "The same for bfloat16 logits, passed as their bits.", nb::arg("slab"), nb::arg("bias").none(),
      nb::arg("temperature"), nb::arg("softcap"), nb::arg("targets"), nb::arg("first_column"), nb::arg("maximum"),
      nb::arg("total"), nb::arg("weighted"), nb::arg("target_logit"), nb::arg("num_threads"));
  module.def(
      "gradient_f32",
      [](Matrix<const float> slab, Matrix<float> out, Bias bias, float temperature, float softcap,
         Column<const int64_t> targets, int64_t first_column, Column<const float> logsumexp,
         Column<const float> mean_logit, Column<const float> mass, Column<const float> onehot,
         Column<const float> slope, int num_threads) {
        gradient<float>(slab, out, bias, temperature, softcap, targets, first_column, logsumexp, mean_logit, mass,
                        onehot, slope, num_threads, g_kernels->gradient_f32);
      },
      "Write the gradient of a slab of float32 logits to `out`, which may be the slab.", nb::arg("slab"),
      nb::arg("out"), nb::arg("bias").none(), nb::arg("temperature"), nb::arg("softcap"), nb::arg("targets"),
      nb::arg("first_column"), nb::arg("logsumexp"), nb::arg("mean_logit"), nb::arg("mass"), nb::arg("onehot"),
      nb::arg("slope"), nb::arg("num_threads"));
  module.def(
      "gradient_bf16",
      [](Matrix<const uint16_t> slab, Matrix<uint16_t> out, Bias bias, float temperature, float softcap,
         Column<const int64_t> targets, int64_t first_column, Column<const float> logsumexp,
         Column<const float> mean_logit, Column<const float> mass, Column<const float> onehot,
         Column<const float> slope, int num_threads) {
        gradient<uint16_t>(slab, out, bias, temperature, softcap, targets, first_column, logsumexp, mean_logit, mass,
                           onehot, slope, num_threads, g_kernels->gradient_bf16);
      },
      "The same for bfloat16 logits and gradients, passed as their bits.", nb::arg("slab"), nb::arg("out"),
      nb::arg("bias").none(), nb::arg("temperature"), nb::arg("softcap"), nb::arg("targets"), nb::arg("first_column"),
      nb::arg("logsumexp"), nb::arg("mean_logit"), nb::arg("mass"), nb::arg("onehot"), nb::arg("slope"),
      nb::arg("num_threads"));
}
