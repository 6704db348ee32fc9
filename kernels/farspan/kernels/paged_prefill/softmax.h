// Scores to probabilities, in fp32 and in powers of 2: 16 rows in a vector, slot after slot.
#pragma once

#include "layout.h"

#ifdef HAS_TILES

namespace {

constexpr float kLog2 = 1.44269504f;
// The exponent that stands for 1 is that of the first scores of a row, and raised where its sum gets beyond this.
constexpr float kMost = 1.8446744e19f;
const float kNone = -__builtin_inff();

// 2^x within 1e-7; 0 for -inf.
INLINE __m512 power(__m512 x) {
  const __m512 rest = _mm512_reduce_ps(x, 9);  // From the whole number below.
  __m512 sum = _mm512_fmadd_ps(_mm512_set1_ps(1.8776766948e-3f), rest, _mm512_set1_ps(8.9893406257e-3f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(5.5826317519e-2f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(2.4015361071e-1f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(6.9315308332e-1f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(sum, x);
}

// 2^x within 1e-4, which is less than what bf16 rounds away.
INLINE __m512 rough_power(__m512 x) {
  const __m512 rest = _mm512_reduce_ps(x, 9);
  __m512 sum = _mm512_fmadd_ps(_mm512_set1_ps(7.802452147e-2f), rest, _mm512_set1_ps(2.260671556e-1f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(6.958335638e-1f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(9.999251962e-1f));
  return _mm512_scalef_ps(sum, x);
}

// Scores of a step as powers of 2, where more than a multiplication makes them so.
void bend_scores(const Case& c, float* scores) {
  const __m512 scale = _mm512_set1_ps(c.scale), cap = _mm512_set1_ps(c.softcap), one = _mm512_set1_ps(1.0f);
  for (int64_t j = 0; j < kStep; j++, scores += kPass) {
    __m512 x = _mm512_load_ps(scores) * scale;
    if (c.softcap > 0) x = cap * (one - 2.0f / (power(x * (2 * kLog2) / cap) + one));
    _mm512_store_ps(scores, x * kLog2);
  }
}

// Of the step that begins at slot `begin`.
void hide_scores(const Pass& pass, int64_t begin, float* scores) {
  const __m512i first = _mm512_load_si512(pass.first), last = _mm512_load_si512(pass.last);
  for (int64_t j = 0; j < kStep; j++, scores += kPass) {
    const __m512i slot = _mm512_set1_epi32(static_cast<int32_t>(begin + j));
    const __mmask16 hidden = _mm512_cmplt_epi32_mask(slot, first) | _mm512_cmpgt_epi32_mask(slot, last);
    _mm512_mask_store_ps(scores, hidden, _mm512_set1_ps(kNone));
  }
}

// A row's greatest score of a step.
INLINE __m512 greatest(const float* scores) {
  __m512 a = _mm512_load_ps(scores), b = _mm512_load_ps(scores + kPass);
  __m512 c = _mm512_load_ps(scores + 2 * kPass), d = _mm512_load_ps(scores + 3 * kPass);
#pragma GCC unroll 8
  for (int64_t j = 4; j < kStep; j += 4) {
    a = _mm512_max_ps(_mm512_load_ps(scores + j * kPass), a);
    b = _mm512_max_ps(_mm512_load_ps(scores + (j + 1) * kPass), b);
    c = _mm512_max_ps(_mm512_load_ps(scores + (j + 2) * kPass), c);
    d = _mm512_max_ps(_mm512_load_ps(scores + (j + 3) * kPass), d);
  }
  return _mm512_max_ps(_mm512_max_ps(a, b), _mm512_max_ps(c, d));
}

// A pair of slots: probabilities in bf16, side by side for each row.
INLINE __m512i find_pair(const float* scores, __m512 unit, __m512 pivot, __m512* sum) {
  const __m512 even = rough_power(_mm512_fmsub_ps(_mm512_load_ps(scores), unit, pivot));
  const __m512 odd = rough_power(_mm512_fmsub_ps(_mm512_load_ps(scores + kPass), unit, pivot));
  *sum += even + odd;
  // To the nearest.
  const __m512i half = _mm512_set1_epi32(0x8000), high = _mm512_castps_si512(odd) + half;
  return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(_mm512_castps_si512(even) + half, 16), high);
}

}  // namespace
#endif
