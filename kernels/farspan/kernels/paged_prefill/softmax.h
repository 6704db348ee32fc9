// Scores to probabilities, in fp32 and in powers of 2: 16 rows in a vector, slot after slot.
#pragma once

#include "layout.h"

#ifdef HAS_TILES

namespace {

constexpr float kLog2 = 1.44269504f;
// A row's greatest score may be so much above the exponent that stands for 1: that seldom has to be raised.
constexpr float kSlack = 8.0f;
const float kNone = -__builtin_inff();

// 2^x within a millionth; 0 for -inf.
INLINE __m512 power(__m512 x) {
  const __m512 rest = _mm512_reduce_ps(x, 9);  // From the whole number below.
  __m512 sum = _mm512_fmadd_ps(_mm512_set1_ps(1.8776766948e-3f), rest, _mm512_set1_ps(8.9893406257e-3f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(5.5826317519e-2f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(2.4015361071e-1f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(6.9315308332e-1f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(sum, x);
}

// 2^x within 1e-4, and half of what bf16 cannot hold: its upper half is the nearest number.
INLINE __m512 rough_power(__m512 x) {
  const __m512 rest = _mm512_reduce_ps(x, 9);
  __m512 sum = _mm512_fmadd_ps(_mm512_set1_ps(7.802452147e-2f), rest, _mm512_set1_ps(2.260671556e-1f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(6.958335638e-1f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.99992520f + 0.00390625f));
  return _mm512_scalef_ps(sum, x);
}

// Scores of all rows of a pass over steps begin..end as powers of 2, where more than a multiplication makes them so.
void bend_scores(const Case& c, const Turn& turn, float* scores) {
  const __m512 scale = _mm512_set1_ps(c.scale), cap = _mm512_set1_ps(c.softcap), one = _mm512_set1_ps(1.0f);
  for (int64_t half = 0; half < 2; half++)
    for (int64_t j = turn.begin * kStep; j < turn.end * kStep; j++) {
      float* at = scores + (half * kBlock + j) * kSide;
      __m512 x = _mm512_load_ps(at) * scale;
      if (c.softcap > 0) x = cap * (one - 2.0f / (power(x * (2 * kLog2) / cap) + one));
      _mm512_store_ps(at, x * kLog2);
    }
}

void hide_scores(const Pass& pass, const Turn& turn, float* scores) {
  for (int64_t half = 0; half < 2; half++) {
    const __m512i first = _mm512_load_si512(pass.first + half * kSide);
    const __m512i last = _mm512_load_si512(pass.last + half * kSide);
    for (int64_t j = turn.begin * kStep; j < turn.end * kStep; j++) {
      float* at = scores + (half * kBlock + j) * kSide;
      const __m512i slot = _mm512_set1_epi32(static_cast<int32_t>(turn.block * kBlock + j));
      const __mmask16 hidden = _mm512_cmplt_epi32_mask(slot, first) | _mm512_cmpgt_epi32_mask(slot, last);
      _mm512_mask_store_ps(at, hidden, _mm512_set1_ps(kNone));
    }
  }
}

// The exponent that stands for 1 is raised where a score is far above it.
void raise_tops(float unit, const float* scores, Pass* pass, Turn* turn) {
  turn->shrinks = false;
  for (int64_t half = 0; half < 2; half++) {
    const float *at = scores + half * kBlock * kSide, *begin = at + turn->begin * kStep * kSide;
    __m512 most[4];
    for (__m512& x : most) x = _mm512_set1_ps(kNone);
    for (const float* from = begin; from < at + turn->end * kStep * kSide; from += 4 * kSide) {
      most[0] = _mm512_max_ps(_mm512_load_ps(from), most[0]);
      most[1] = _mm512_max_ps(_mm512_load_ps(from + kSide), most[1]);
      most[2] = _mm512_max_ps(_mm512_load_ps(from + 2 * kSide), most[2]);
      most[3] = _mm512_max_ps(_mm512_load_ps(from + 3 * kSide), most[3]);
    }
    const __m512 high = _mm512_max_ps(_mm512_max_ps(most[0], most[1]), _mm512_max_ps(most[2], most[3])) * unit;
    const __m512 top = _mm512_load_ps(pass->top + half * kSide);
    const __mmask16 raised = _mm512_cmp_ps_mask(high, top + kSlack, _CMP_GT_OQ);
    __m512 shrink = _mm512_set1_ps(1.0f);
    if (raised) {
      turn->shrinks = true;
      shrink = _mm512_mask_blend_ps(raised, shrink, power(top - high));
      _mm512_store_ps(pass->top + half * kSide, _mm512_mask_blend_ps(raised, top, high));
      _mm512_store_ps(pass->sum + half * kSide, _mm512_load_ps(pass->sum + half * kSide) * shrink);
    }
    _mm512_store_ps(turn->shrink + half * kSide, shrink);
  }
}

// Pairs of slots of one step: probabilities in bf16, and their sum as the products will see them.
HALF INLINE void find_probs(float unit, const float* scores, const float* top, float* sum, uint16_t* probs) {
  const __m512 scale = _mm512_set1_ps(unit), highest = _mm512_load_ps(top);
  // Rows that have seen nothing yet: all their scores are -inf.
  const __m512 pivot = _mm512_mask_blend_ps(_mm512_cmp_ps_mask(highest, _mm512_set1_ps(kNone), _CMP_EQ_OQ), highest,
                                            _mm512_setzero_ps());
  const __m512i ones = _mm512_set1_epi32(0x3f803f80);
  __m512 total = _mm512_load_ps(sum);
  for (int64_t pair = 0; pair < kStep / 2; pair++, scores += 2 * kSide, probs += 2 * kSide) {
    const __m512 even = rough_power(_mm512_fmsub_ps(_mm512_load_ps(scores), scale, pivot));
    const __m512 odd = rough_power(_mm512_fmsub_ps(_mm512_load_ps(scores + kSide), scale, pivot));
    const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(even), 16);
    const __m512i both = _mm512_mask_blend_epi16(0xaaaaaaaau, low, _mm512_castps_si512(odd));
    _mm512_store_si512(probs, both);
    total = _mm512_dpbf16_ps(total, reinterpret_cast<const __m512bh&>(both), reinterpret_cast<const __m512bh&>(ones));
  }
  _mm512_store_ps(sum, total);
}

}  // namespace
#endif
