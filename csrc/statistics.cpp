// The kernels. Compiled once per instruction set with REPIRL_ISA (a namespace) and REPIRL_LANES (floats a vector).
//
// Written with the compilers' vector extensions, so that each instruction set gets full-width code without intrinsics.
// Nothing inline from the standard library may be used here: the linker would be free to keep the copy compiled for a
// newer instruction set than the machine has. Built without -ffast-math, because infinities and NaN carry meaning.

#include "statistics.h"

namespace repirl {
namespace REPIRL_ISA {
namespace {

constexpr int kLanes = REPIRL_LANES;
constexpr int kBlock = kMaxKeptColumns;  // columns at a time: 4 KiB, for the first-level cache

typedef float Vector __attribute__((vector_size(kLanes * 4)));
typedef int32_t Integers __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Unsigned __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));

inline Vector splat(float x) { return x - Vector{}; }

inline Vector load(const float *x) {
  Vector v;
  __builtin_memcpy(&v, x, sizeof v);
  return v;
}

inline Vector load(const uint16_t *x) {  // bfloat16
  Halves h;
  __builtin_memcpy(&h, x, sizeof h);
  return (Vector)(__builtin_convertvector(h, Unsigned) << 16);
}

inline void store(float *x, Vector v) { __builtin_memcpy(x, &v, sizeof v); }

inline void store(uint16_t *x, Vector v) {  // to nearest, ties to even; NaN stays NaN
  const Unsigned bits = (Unsigned)v;
  const Unsigned rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Integers is_nan = v != v;
  const Halves h = __builtin_convertvector(is_nan ? (Unsigned{} + 0x7fc0u) : rounded, Halves);
  __builtin_memcpy(x, &h, sizeof h);
}

inline float to_float(float x) { return x; }

inline float to_float(uint16_t x) {
  const uint32_t bits = (uint32_t)x << 16;
  float f;
  __builtin_memcpy(&f, &bits, sizeof f);
  return f;
}

// exp(x) = scale * (1 + fraction) for x in [-87, 88]; NaN stays NaN in `fraction`.
struct Exponential {
  Vector scale, fraction;
};

inline Exponential exponential(Vector x) {
  // Adding 1.5 * 2^23 rounds to an integer, and leaves that integer in the low bits.
  const Vector shifted = x * 1.44269504088896341f + 12582912.0f;
  const Vector n = shifted - 12582912.0f;
  // ln 2 as the sum of two constants; the first has so few bits that its product with n is exact.
  const Vector r = (x - n * 0.693359375f) + n * 2.12194440054690583e-4f;
  Vector p = r * (1.0f / 5040.0f) + (1.0f / 720.0f);
  p = p * r + (1.0f / 120.0f);
  p = p * r + (1.0f / 24.0f);
  p = p * r + (1.0f / 6.0f);
  p = p * r + 0.5f;
  const Vector scale = (Vector)(((Integers)shifted - 0x4b400000 + 127) << 23);
  return {scale, r + r * r * p};
}

// exp(x) for x of about 0 or less, and x itself. Below -87, exp is 0 and x is replaced by -87, so that exp(x) x is 0
// for banned columns, where x = -inf. NaN stays NaN in both.
struct Power {
  Vector exp, x;
};

inline Power power(Vector x) {
  const Integers vanishes = x < -87.0f;
  const Vector bounded = vanishes ? splat(-87.0f) : x;
  const Exponential e = exponential(bounded);
  return {vanishes ? Vector{} : e.scale + e.scale * e.fraction, bounded};
}

// tanh|x| = t / (t + 2) with t = exp(2|x|) - 1: this form keeps its relative accuracy near 0.
inline Vector tanh(Vector x) {
  const Integers sign = (Integers)x & (int32_t)0x80000000;
  Vector twice = (Vector)((Integers)x & 0x7fffffff) * 2.0f;
  twice = twice > 40.0f ? splat(40.0f) : twice;
  const Exponential e = exponential(twice);
  const Vector t = e.scale * e.fraction + (e.scale - 1.0f);
  return (Vector)((Integers)(t / (t + 2.0f)) | sign);
}

struct Logits {
  Vector z, tanh;
};

inline bool is_identity(const Transform &transform) {
  return transform.bias == nullptr && transform.softcap == 0.0f && transform.temperature == 1.0f;
}

template <bool kIdentity>
inline Logits final_logits(Vector x, Vector bias, const Transform &transform) {
  if (kIdentity) return {x, Vector{}};
  Logits result{x + bias, Vector{}};
  if (transform.softcap != 0.0f) {
    result.tanh = tanh(result.z / transform.softcap);
    result.z = result.tanh * transform.softcap;
  }
  if (transform.temperature != 1.0f) result.z = result.z / transform.temperature;
  return result;
}

inline double sum(Vector v) {
  double lanes[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = v[lane];
  for (int half = kLanes / 2; half > 0; half /= 2)  // pairwise: short chains of additions
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

// Loads the last, incomplete vector of a row; the lanes beyond the row are `fill`.
template <class T>
inline Vector load_tail(const T *x, int64_t count, float fill) {
  float lanes[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane < count ? to_float(x[lane]) : fill;
  return load(lanes);
}

inline Vector load_bias(const float *bias, int64_t column, int64_t num_columns) {
  if (bias == nullptr) return Vector{};
  return column + kLanes <= num_columns ? load(bias + column) : load_tail(bias + column, num_columns - column, 0.0f);
}

// Stores the first `count` lanes.
template <class T>
inline void store_tail(T *x, Vector v, int64_t count) {
  T lanes[kLanes];
  store(lanes, v);
  for (int64_t lane = 0; lane < count; ++lane) x[lane] = lanes[lane];
}

// The sum of a block's logits, none of which is above `maximum`. Adds differences to the maximum, so that a common
// offset of the logits costs no accuracy.
inline double sum_of(const float *block, int64_t count, float maximum) {
  const int64_t full = count / kLanes * kLanes;
  Vector differences{};
  for (int64_t i = 0; i < full; i += kLanes) differences += load(block + i) - maximum;
  double result = sum(differences) + static_cast<double>(maximum) * static_cast<double>(full);
  for (int64_t i = full; i < count; ++i) result += static_cast<double>(block[i]);
  return result;
}

template <bool kIdentity, bool kKeep, bool kEntropy, class T>
void update_row_as(const T *x, int64_t num_columns, const Transform &transform, const Wanted &wanted,
                   int64_t first_column, int64_t target, RowState &state, float &target_logit, uint16_t *powers) {
  const float infinity = __builtin_inff();
  alignas(64) float block[kBlock];
  for (int64_t start = 0; start < num_columns; start += kBlock) {
    const int64_t count = num_columns - start < kBlock ? num_columns - start : kBlock;
    const int64_t full = count / kLanes * kLanes;
    Vector largest = splat(-infinity);
    for (int64_t i = 0; i < full; i += kLanes) {
      const Vector bias = load_bias(transform.bias, start + i, num_columns);
      const Vector z = final_logits<kIdentity>(load(x + start + i), bias, transform).z;
      store(block + i, z);
      largest = z > largest ? z : largest;
    }
    if (full < count) {
      const Vector bias = load_bias(transform.bias, start + full, num_columns);
      Vector z = final_logits<kIdentity>(load_tail(x + start + full, count - full, 0.0f), bias, transform).z;
      // Lanes past the end become -inf after the transform: a softcap would make them finite.
      for (int lane = (int)(count - full); lane < kLanes; ++lane) z[lane] = -infinity;
      store(block + full, z);
      largest = z > largest ? z : largest;
    }
    if (target >= start && target < start + count) target_logit = block[target - start];

    float maximum = -infinity;
    for (int lane = 0; lane < kLanes; ++lane) maximum = largest[lane] > maximum ? largest[lane] : maximum;
    if (wanted.sum) state.sum += maximum == -infinity ? (double)maximum : sum_of(block, count, maximum);
    if (maximum > state.maximum) {
      if (wanted.argmax) {
        int64_t i = 0;
        while (block[i] != maximum) ++i;
        state.argmax = first_column + start + i;
      }
      if (state.maximum != -infinity) {
        const double change = (double)state.maximum - (double)maximum;
        const double factor = __builtin_exp(change);
        state.weighted = factor * (state.weighted + change * state.total);
        state.total *= factor;
      }
      state.maximum = maximum;
    }
    if (state.maximum == -infinity) {
      // All columns so far are banned and add nothing to the total. A NaN among them must not be lost, though: it makes
      // the row's logsumexp NaN, and with it the row's whole gradient, whatever `powers` holds here.
      for (int64_t i = 0; i < count; ++i) {
        if (block[i] != block[i]) state.total = __builtin_nan("");
        if (kKeep) powers[start + i] = 0;
      }
      continue;
    }
    Vector total{}, weighted{};
    const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
    for (int64_t i = 0; i < padded; i += kLanes) {
      const Power p = power(load(block + i) - state.maximum);
      total += p.exp;
      if (kEntropy) weighted += p.exp * p.x;
      if (!kKeep) continue;
      if (i < full) {
        store(powers + start + i, p.exp);
      } else {
        store_tail(powers + start + i, p.exp, count - i);
      }
    }
    state.total += sum(total);
    if (kEntropy) state.weighted += sum(weighted);
  }
}

template <bool kKeep, class T>
void update_row_of(const T *x, int64_t num_columns, const Transform &transform, const Wanted &wanted,
                   int64_t first_column, int64_t target, RowState &state, float &target_logit, uint16_t *powers) {
  const bool identity = is_identity(transform);
  const auto function =
      identity ? (wanted.entropy ? update_row_as<true, kKeep, true, T> : update_row_as<true, kKeep, false, T>)
               : (wanted.entropy ? update_row_as<false, kKeep, true, T> : update_row_as<false, kKeep, false, T>);
  function(x, num_columns, transform, wanted, first_column, target, state, target_logit, powers);
}

template <class T>
void update_row(const T *x, int64_t num_columns, const Transform &transform, const Wanted &wanted, int64_t first_column,
                int64_t target, RowState &state, float &target_logit) {
  update_row_of<false>(x, num_columns, transform, wanted, first_column, target, state, target_logit, nullptr);
}

void update_keeping(const float *x, int64_t num_columns, const Transform &transform, const Wanted &wanted,
                    int64_t first_column, int64_t target, RowState &state, float &target_logit, uint16_t *powers) {
  update_row_of<true>(x, num_columns, transform, wanted, first_column, target, state, target_logit, powers);
}

// `added` is the part that does not depend on the logit: `uniform`, and for the target `onehot` too.
template <bool kIdentity, bool kSlope>
inline Vector gradient(const Logits &logits, const Transform &transform, const RowGradient &row, Vector added) {
  const Power p = power(logits.z - row.logsumexp);
  Vector dz = p.exp * row.mass + added;
  // z - mean_logit as (z - logsumexp) + (logsumexp - mean_logit): each difference is between close numbers.
  if (kSlope) dz = p.exp * (row.mass - row.slope * (p.x + (row.logsumexp - row.mean_logit))) + added;
  if (kIdentity) return dz;
  if (transform.temperature != 1.0f) dz = dz / transform.temperature;
  if (transform.softcap != 0.0f) dz = dz * (1.0f - logits.tanh * logits.tanh);
  return dz;
}

template <bool kIdentity, bool kSlope, class T>
void gradient_row_as(const T *x, T *out, int64_t num_columns, const Transform &transform, int64_t target,
                     const RowGradient &row) {
  const int64_t full = num_columns / kLanes * kLanes;
  for (int64_t i = 0; i < num_columns; i += kLanes) {
    Vector added = splat(row.uniform);
    if (target >= i && target < i + kLanes) added[target - i] += row.onehot;
    const Vector bias = load_bias(transform.bias, i, num_columns);
    if (i < full) {
      const Logits logits = final_logits<kIdentity>(load(x + i), bias, transform);
      store(out + i, gradient<kIdentity, kSlope>(logits, transform, row, added));
    } else {
      const int64_t count = num_columns - i;
      const Logits logits = final_logits<kIdentity>(load_tail(x + i, count, 0.0f), bias, transform);
      store_tail(out + i, gradient<kIdentity, kSlope>(logits, transform, row, added), count);
    }
  }
}

template <class T>
void gradient_row(const T *x, T *out, int64_t num_columns, const Transform &transform, int64_t target,
                  const RowGradient &row) {
  const bool identity = is_identity(transform), slope = row.slope != 0.0f;
  const auto function = identity ? (slope ? gradient_row_as<true, true, T> : gradient_row_as<true, false, T>)
                                 : (slope ? gradient_row_as<false, true, T> : gradient_row_as<false, false, T>);
  function(x, out, num_columns, transform, target, row);
}

// log(x) for normal x > 0, to 4e-7: a polynomial on [sqrt(1/2), sqrt(2)), fitted at Chebyshev points. The result for 0
// is finite, so that 0 log(0) counts as 0.
inline Vector logarithm(Vector x) {
  const Integers bits = (Integers)x;
  const Integers n = (bits - 0x3f3504f3) >> 23;  // x = 2^n (1 + t), 1 + t in [sqrt(1/2), sqrt(2))
  const Vector t = (Vector)(bits - (n << 23)) - 1.0f;
  Vector p = t * 0.11931054f - 0.18680751f;
  p = p * t + 0.2049176f;
  p = p * t - 0.24908289f;
  p = p * t + 0.33314674f;
  p = p * t - 0.50001145f;
  p = p * t + 1.00000096f;
  return t * p + __builtin_convertvector(n, Vector) * 0.693147181f;
}

template <bool kSlope>
void gradient_of_kept_as(const uint16_t *powers, float maximum, float *out, int64_t num_columns,
                         const Transform &transform, int64_t target, const RowGradient &row) {
  const float shift = maximum - row.logsumexp, scale = __builtin_expf(shift) / transform.temperature;
  const float above_mean = maximum == -__builtin_inff() ? 0.0f : maximum - row.mean_logit;
  const float onehot = row.onehot / transform.temperature, uniform = row.uniform / transform.temperature;
  const int64_t full = num_columns / kLanes * kLanes;
  for (int64_t i = 0; i < num_columns; i += kLanes) {
    const Vector power = i < full ? load(powers + i) : load_tail(powers + i, num_columns - i, 0.0f);
    Vector dz = power * (scale * row.mass) + uniform;
    if (kSlope) dz = power * scale * (row.mass - row.slope * (logarithm(power) + above_mean)) + uniform;
    if (target >= i && target < i + kLanes) dz[target - i] += onehot;
    if (i < full) {
      store(out + i, dz);
    } else {
      store_tail(out + i, dz, num_columns - i);
    }
  }
}

void gradient_of_kept(const uint16_t *powers, float maximum, float *out, int64_t num_columns,
                      const Transform &transform, int64_t target, const RowGradient &row) {
  const auto function = row.slope == 0.0f ? gradient_of_kept_as<false> : gradient_of_kept_as<true>;
  function(powers, maximum, out, num_columns, transform, target, row);
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {REPIRL_NAME,         update_row<float>,      update_row<uint16_t>,
                         gradient_row<float>, gradient_row<uint16_t>, update_keeping,
                         gradient_of_kept};

}  // namespace REPIRL_ISA
}  // namespace repirl
