// Scores of slots and sums of their values by vectors of sixteen (AVX-512): what is computed for a few slots and query
// heads stays in registers, and nothing is widened into memory.
//
// Numbers in bf16 are widened 32 at a time, those of even places and then those of odd ones: queries and sums lie in that
// order.
#pragma once

#ifdef __AVX512F__
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

// Slots and query heads at once, for scores; query heads at once, and numbers of a value, for sums.
constexpr int64_t kSlots = 4, kHeads = 4, kNumbers = 64;
constexpr int64_t kWide = 32;

struct Two {
  __m512 first, second;
};

// `left`: how many of 32 numbers there are; those behind are zero and not read.
INLINE Two widen_two(const bf16* from, int64_t left) {
  const __mmask32 there = left >= kWide ? 0xffffffffu : (1u << left) - 1;
  const __m512i bits = _mm512_maskz_loadu_epi16(there, from);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
}

INLINE Two widen_two(const float* from, int64_t left) {
  const __mmask16 first = left >= 16 ? 0xffffu : (1u << left) - 1;
  const __mmask16 second = left >= kWide ? 0xffffu : left > 16 ? (1u << (left - 16)) - 1 : 0;
  return {_mm512_maskz_loadu_ps(first, from), _mm512_maskz_loadu_ps(second, from + 16)};
}

// A row of `dim` numbers in fp32, times `scale`.
template <typename T>
INLINE void widen_row(const T* from, int64_t dim, float scale, float* to) {
  for (int64_t d = 0; d < dim; d += kWide) {
    const Two wide = widen_two(from + d, dim - d);
    _mm512_storeu_ps(to + d, _mm512_mul_ps(wide.first, _mm512_set1_ps(scale)));
    _mm512_storeu_ps(to + d + 16, _mm512_mul_ps(wide.second, _mm512_set1_ps(scale)));
  }
}

// To the nearest bf16, ties to even, in the upper half of each lane; what is no number stays none.
INLINE __m512i narrowed(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i near = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  return _mm512_mask_mov_epi32(near, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
}

INLINE void put_two(__m512 first, __m512 second, int64_t left, bf16* to) {
  const __mmask32 there = left >= kWide ? 0xffffffffu : (1u << left) - 1;
  const __m512i high = _mm512_and_si512(narrowed(second), _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
  _mm512_mask_storeu_epi16(to, there, _mm512_or_si512(_mm512_srli_epi32(narrowed(first), 16), high));
}

INLINE void put_two(__m512 first, __m512 second, int64_t left, float* to) {
  _mm512_mask_storeu_ps(to, left >= 16 ? 0xffffu : (1u << left) - 1, first);
  if (left > 16) _mm512_mask_storeu_ps(to + 16, left >= kWide ? 0xffffu : (1u << (left - 16)) - 1, second);
}

// A row of sums divided by `sum`.
template <typename T>
INLINE void put_row(const float* from, float sum, int64_t dim, T* to) {
  const __m512 all = _mm512_set1_ps(sum);
  for (int64_t d = 0; d < dim; d += kWide)
    put_two(_mm512_div_ps(_mm512_loadu_ps(from + d), all), _mm512_div_ps(_mm512_loadu_ps(from + d + 16), all), dim - d,
            to + d);
}

INLINE __m512 add_pairs(__m512 a, __m512 b) { return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); }

INLINE __m512 add_fours(__m512 a, __m512 b) {
  const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
}

INLINE __m512 add_quarters(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

// Four sums of sixteen lanes, four times over: neighbours are added in two rounds, then the quarters.
INLINE __m512 fours_of(const __m512* x) { return add_fours(add_pairs(x[0], x[1]), add_pairs(x[2], x[3])); }

// Scores of four slots for `Heads` query heads that share a key. Rows of queries are `width` apart.
template <int64_t Heads, typename T>
INLINE void score_some(const float* q, int64_t width, const T* const* slots, int64_t offset, int64_t dim, float* scores,
                       int64_t apart) {
  __m512 sums[Heads][kSlots];
#pragma GCC unroll 4
  for (int64_t h = 0; h < Heads; h++)
#pragma GCC unroll 4
    for (int64_t i = 0; i < kSlots; i++) sums[h][i] = _mm512_setzero_ps();
  for (int64_t d = 0; d < dim; d += kWide) {
    Two keys[kSlots];
#pragma GCC unroll 4
    for (int64_t i = 0; i < kSlots; i++) keys[i] = widen_two(slots[i] + offset + d, dim - d);
#pragma GCC unroll 4
    for (int64_t h = 0; h < Heads; h++) {
      const __m512 first = _mm512_loadu_ps(q + h * width + d), second = _mm512_loadu_ps(q + h * width + d + 16);
#pragma GCC unroll 4
      for (int64_t i = 0; i < kSlots; i++) {
        sums[h][i] = _mm512_fmadd_ps(first, keys[i].first, sums[h][i]);
        sums[h][i] = _mm512_fmadd_ps(second, keys[i].second, sums[h][i]);
      }
    }
  }
  __m512 fours[4];
#pragma GCC unroll 4
  for (int64_t h = 0; h < 4; h++) fours[h] = fours_of(sums[h < Heads ? h : Heads - 1]);
  const __m512 all = add_quarters(add_quarters(fours[0], fours[1]), add_quarters(fours[2], fours[3]));
  _mm_storeu_ps(scores, _mm512_castps512_ps128(all));
  if constexpr (Heads > 1) _mm_storeu_ps(scores + apart, _mm512_extractf32x4_ps(all, 1));
  if constexpr (Heads > 2) _mm_storeu_ps(scores + 2 * apart, _mm512_extractf32x4_ps(all, 2));
  if constexpr (Heads > 3) _mm_storeu_ps(scores + 3 * apart, _mm512_extractf32x4_ps(all, 3));
}

// sums[head] += probabilities * values, `Wides` times 32 numbers of a value for `Heads` query heads.
template <int64_t Heads, int64_t Wides, typename T>
INLINE void add_some(const float* probs, int64_t apart, const T* const* slots, int64_t count, int64_t offset, int64_t left,
                     float* to, int64_t width) {
  Two sums[Heads][Wides];
#pragma GCC unroll 4
  for (int64_t h = 0; h < Heads; h++)
#pragma GCC unroll 2
    for (int64_t v = 0; v < Wides; v++)
      sums[h][v] = {_mm512_loadu_ps(to + h * width + v * kWide), _mm512_loadu_ps(to + h * width + v * kWide + 16)};
  for (int64_t j = 0; j < count; j++) {
    Two values[Wides];
#pragma GCC unroll 2
    for (int64_t v = 0; v < Wides; v++) values[v] = widen_two(slots[j] + offset + v * kWide, left - v * kWide);
#pragma GCC unroll 4
    for (int64_t h = 0; h < Heads; h++) {
      const __m512 p = _mm512_set1_ps(probs[h * apart + j]);
#pragma GCC unroll 2
      for (int64_t v = 0; v < Wides; v++) {
        sums[h][v].first = _mm512_fmadd_ps(p, values[v].first, sums[h][v].first);
        sums[h][v].second = _mm512_fmadd_ps(p, values[v].second, sums[h][v].second);
      }
    }
  }
#pragma GCC unroll 4
  for (int64_t h = 0; h < Heads; h++)
#pragma GCC unroll 2
    for (int64_t v = 0; v < Wides; v++) {
      _mm512_storeu_ps(to + h * width + v * kWide, sums[h][v].first);
      _mm512_storeu_ps(to + h * width + v * kWide + 16, sums[h][v].second);
    }
}

// Calls `f` with as many of up to four query heads as there are, a constant each time.
template <typename F>
INLINE void by_heads(int64_t count, F f) {
  switch (count) {
    case 1: return f(std::integral_constant<int64_t, 1>());
    case 2: return f(std::integral_constant<int64_t, 2>());
    case 3: return f(std::integral_constant<int64_t, 3>());
    default: return f(std::integral_constant<int64_t, 4>());
  }
}

// Scores of up to kStep slots for all query rows, into columns of scores[row][kScores].
template <typename T>
INLINE void score_slots(const Case& c, const float* q, const T* const* slots, int64_t count, float* scores) {
  const int64_t group = c.heads / c.groups, width = padded(c.qk_dim);
  for (int64_t first = 0; first < count; first += kSlots) {
    // Slots that are not there are the last one again: their scores are never read.
    const T* some[kSlots];
    for (int64_t i = 0; i < kSlots; i++) some[i] = slots[first + i < count ? first + i : count - 1];
    for (int64_t row = 0; row < c.queries * c.heads; row += group)
      for (int64_t h = 0; h < group; h += kHeads)
        by_heads(group - h, [&](auto heads) __attribute__((always_inline)) {
          score_some<heads.value>(q + (row + h) * width, width, some, row % c.heads / group * c.key_group, c.qk_dim,
                                  scores + (row + h) * kScores + first, kScores);
        });
  }
}

// out[row] += probabilities * values of some slots.
template <typename T>
INLINE void add_slots(const Case& c, const T* const* slots, int64_t count, const float* probs, float* out) {
  const int64_t group = c.heads / c.groups, width = padded(c.v_dim);
  for (int64_t row = 0; row < c.queries * c.heads; row += group)
    for (int64_t h = 0; h < group; h += kHeads)
      for (int64_t d = 0; d < c.v_dim; d += kNumbers)
        by_heads(group - h, [&](auto heads) __attribute__((always_inline)) {
          const int64_t offset = row % c.heads / group * c.value_group + d, left = c.v_dim - d;
          const float* p = probs + (row + h) * kScores;
          float* to = out + (row + h) * width + d;
          if (left > kWide)
            add_some<heads.value, 2>(p, kScores, slots, count, offset, left, to, width);
          else
            add_some<heads.value, 1>(p, kScores, slots, count, offset, left, to, width);
        });
}

}  // namespace
#endif
