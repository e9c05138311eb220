// Products of small tiles with AVX-512: float32 values, or pairs of bfloat16 values by vdpbf16ps. Uses nothing inline
// from the standard library, for the reason given in statistics.cpp.

#include <immintrin.h>

#include "linear.h"

namespace repirl {
namespace avx512bf16 {
namespace {

constexpr int kVectors = kPanelColumns / 16;

struct Float32 {
  using Value = float;
  static constexpr int64_t kValuesPerWord = 1;

  static __m512 multiply_add(__m512i a, __m512i b, __m512 sum) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
  }
  // Loads 16 words of a row; values from `count` on are 0.
  static __m512i load_words(const float *x, int64_t count) {
    return _mm512_maskz_loadu_epi32(count >= 16 ? 0xffff : (1u << count) - 1, x);
  }
};

struct BFloat16 {
  using Value = uint16_t;
  static constexpr int64_t kValuesPerWord = 2;

  static __m512 multiply_add(__m512i a, __m512i b, __m512 sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
  static __m512i load_words(const uint16_t *x, int64_t count) {
    return _mm512_maskz_loadu_epi16(count >= 32 ? 0xffffffffu : (1u << count) - 1, x);
  }
};

// Transposes 16 x 16 words, exchanging pieces of 1, 2, 4 and then 8 words.
inline void transpose(__m512i (&rows)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      rows[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
      rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
    }
  }
  // rows[4 i + j] now holds, in its four 128-bit lanes, columns j, 4 + j, 8 + j, 12 + j of rows 4 i to 4 i + 3.
  for (int j = 0; j < 4; ++j) {
    const __m512i even01 = _mm512_shuffle_i32x4(rows[j], rows[4 + j], 0x88);
    const __m512i odd01 = _mm512_shuffle_i32x4(rows[j], rows[4 + j], 0xdd);
    const __m512i even23 = _mm512_shuffle_i32x4(rows[8 + j], rows[12 + j], 0x88);
    const __m512i odd23 = _mm512_shuffle_i32x4(rows[8 + j], rows[12 + j], 0xdd);
    t[j] = _mm512_shuffle_i32x4(even01, even23, 0x88);
    t[8 + j] = _mm512_shuffle_i32x4(even01, even23, 0xdd);
    t[4 + j] = _mm512_shuffle_i32x4(odd01, odd23, 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(odd01, odd23, 0xdd);
  }
  for (int i = 0; i < 16; ++i) rows[i] = t[i];
}

template <class Type>
void pack_transposed(const void *matrix, int64_t stride, int64_t num_columns, int64_t depth, uint32_t *panel) {
  const auto *x = static_cast<const typename Type::Value *>(matrix);
  const int64_t num_words = (depth + Type::kValuesPerWord - 1) / Type::kValuesPerWord;
  for (int64_t word = 0; word < num_words; word += 16) {
    const int64_t first = word * Type::kValuesPerWord;
    const int64_t stored = num_words - word < 16 ? num_words - word : 16;
    for (int v = 0; v < kVectors; ++v) {
      __m512i rows[16];
      for (int i = 0; i < 16; ++i) {
        const int64_t column = 16 * v + i;
        rows[i] = column < num_columns ? Type::load_words(x + column * stride + first, depth - first)
                                       : _mm512_setzero_si512();
      }
      transpose(rows);
      for (int64_t i = 0; i < stored; ++i) _mm512_storeu_si512(panel + (word + i) * kPanelColumns + 16 * v, rows[i]);
    }
  }
}

inline __mmask16 lanes(int64_t count) { return count <= 0 ? 0 : count >= 16 ? 0xffff : (1u << count) - 1; }

void pack_f32(const void *matrix, int64_t stride, int64_t depth, int64_t num_columns, uint32_t *panel) {
  const float *x = static_cast<const float *>(matrix);
  for (int64_t row = 0; row < depth; ++row)
    for (int v = 0; v < kVectors; ++v)
      _mm512_storeu_si512(panel + row * kPanelColumns + 16 * v,
                          _mm512_maskz_loadu_epi32(lanes(num_columns - 16 * v), x + row * stride + 16 * v));
}

inline __m512i pair_words(__m256i low, __m256i high) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

void pack_bf16(const void *matrix, int64_t stride, int64_t depth, int64_t num_columns, uint32_t *panel) {
  const uint16_t *x = static_cast<const uint16_t *>(matrix);
  for (int64_t row = 0; row < depth; row += 2) {
    for (int v = 0; v < kVectors; ++v) {
      const __mmask16 inside = lanes(num_columns - 16 * v);
      const uint16_t *first = x + row * stride + 16 * v;
      const __m256i low = _mm256_maskz_loadu_epi16(inside, first);
      const __m256i high = row + 1 < depth ? _mm256_maskz_loadu_epi16(inside, first + stride) : _mm256_setzero_si256();
      _mm512_storeu_si512(panel + row / 2 * kPanelColumns + 16 * v, pair_words(low, high));
    }
  }
}

// Words that are summed in registers before the sum is added to the tile: shorter sums have smaller rounding errors.
constexpr int64_t kSumWords = 256;

// tile += left @ panel, where left(row, word) returns a word. The 8 x 3 vectors of sums, 3 of the panel and one
// broadcast word fit in the 32 registers; 24 independent sums hide the latency of a multiply-add.
template <class Type, class Left>
inline void multiply_add(const Left &left, const uint32_t *panel, int64_t num_words, float *tile, int64_t tile_stride) {
  for (int64_t start = 0; start < num_words; start += kSumWords) {
    const int64_t end = start + kSumWords < num_words ? start + kSumWords : num_words;
    __m512 sums[kTileRows][kVectors];
    for (auto &row : sums)
      for (auto &vector : row) vector = _mm512_setzero_ps();
    for (int64_t word = start; word < end; ++word) {
      __m512i b[kVectors];
      for (int v = 0; v < kVectors; ++v) b[v] = _mm512_loadu_si512(panel + word * kPanelColumns + 16 * v);
      for (int r = 0; r < kTileRows; ++r) {
        const __m512i a = _mm512_set1_epi32(left(r, word));
        for (int v = 0; v < kVectors; ++v) sums[r][v] = Type::multiply_add(a, b[v], sums[r][v]);
      }
    }
    for (int r = 0; r < kTileRows; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        float *out = tile + r * tile_stride + 16 * v;
        _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), sums[r][v]));
      }
    }
  }
}

template <class Type>
void multiply_rows(const void *const rows[kTileRows], const uint32_t *panel, int64_t num_words, float *tile,
                   int64_t tile_stride) {
  const int32_t *words[kTileRows];
  for (int r = 0; r < kTileRows; ++r) words[r] = static_cast<const int32_t *>(rows[r]);
  for (int r = 0; r < kTileRows; ++r)
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(tile + r * tile_stride + 16 * v, _mm512_setzero_ps());
  const auto left = [&](int r, int64_t word) {
    int32_t bits;  // rows of bfloat16 may not be aligned to 4 bytes
    __builtin_memcpy(&bits, words[r] + word, sizeof bits);
    return bits;
  };
  multiply_add<Type>(left, panel, num_words, tile, tile_stride);
}

template <class Type>
void multiply_block(const uint32_t *block, const uint32_t *panel, int64_t num_words, float *tile) {
  const auto left = [&](int r, int64_t word) { return static_cast<int32_t>(block[word * kTileRows + r]); };
  multiply_add<Type>(left, panel, num_words, tile, kPanelColumns);
}

// Stores the words of columns `column` to `column + 15`, one half in each of two adjacent blocks.
inline void store_words(__m512i words, int64_t column, int64_t word, uint32_t *blocks, int64_t block_stride) {
  if (blocks == nullptr) return;
  uint32_t *block = blocks + column / kTileRows * block_stride + word * kTileRows;
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(block), _mm512_castsi512_si256(words));
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(block + block_stride), _mm512_extracti64x4_epi64(words, 1));
}

void store_gradient_f32(const float *tile, int64_t tile_stride, int64_t num_columns, void *rows, int64_t row_stride,
                        uint32_t *blocks, int64_t block_stride) {
  float *out = static_cast<float *>(rows);
  for (int64_t column = 0; column < num_columns; column += 16) {
    for (int r = 0; r < kTileRows; ++r) {
      const __m512 x = _mm512_loadu_ps(tile + r * tile_stride + column);
      if (out != nullptr) _mm512_storeu_ps(out + r * row_stride + column, x);
      store_words(_mm512_castps_si512(x), column, r, blocks, block_stride);
    }
  }
}

inline __m256i round_to_bf16(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

void store_gradient_bf16(const float *tile, int64_t tile_stride, int64_t num_columns, void *rows, int64_t row_stride,
                         uint32_t *blocks, int64_t block_stride) {
  uint16_t *out = static_cast<uint16_t *>(rows);
  for (int64_t column = 0; column < num_columns; column += 16) {
    for (int r = 0; r < kTileRows; r += 2) {
      const __m256i low = round_to_bf16(_mm512_loadu_ps(tile + r * tile_stride + column));
      const __m256i high = round_to_bf16(_mm512_loadu_ps(tile + (r + 1) * tile_stride + column));
      if (out != nullptr) {
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(out + r * row_stride + column), low);
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(out + (r + 1) * row_stride + column), high);
      }
      store_words(pair_words(low, high), column, r / 2, blocks, block_stride);
    }
  }
}

void add(const float *values, int64_t count, float *sums) {
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 inside = lanes(count - i);
    const __m512 sum =
        _mm512_add_ps(_mm512_maskz_loadu_ps(inside, sums + i), _mm512_maskz_loadu_ps(inside, values + i));
    _mm512_mask_storeu_ps(sums + i, inside, sum);
  }
}

void round_f32(const float *values, int64_t count, void *result) {
  __builtin_memcpy(result, values, static_cast<size_t>(count) * sizeof(float));
}

void round_bf16(const float *values, int64_t count, void *result) {
  uint16_t *out = static_cast<uint16_t *>(result);
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 inside = lanes(count - i);
    _mm256_mask_storeu_epi16(out + i, inside, round_to_bf16(_mm512_maskz_loadu_ps(inside, values + i)));
  }
}

}  // namespace

extern const ProductKernels products_f32, products_bf16;
const ProductKernels products_f32 = {
    Float32::kValuesPerWord, pack_transposed<Float32>, pack_f32, multiply_rows<Float32>,
    multiply_block<Float32>, store_gradient_f32,       add,      round_f32};
const ProductKernels products_bf16 = {
    BFloat16::kValuesPerWord, pack_transposed<BFloat16>, pack_bf16, multiply_rows<BFloat16>,
    multiply_block<BFloat16>, store_gradient_bf16,       add,       round_bf16};

}  // namespace avx512bf16
}  // namespace repirl
