// Gates of many numbers on processors that round to bf16 themselves, as those with matrix tiles do.
#pragma once

#include "rows.h"
#include "tiles.h"

#ifdef HAS_TILES

#define ROUNDS __attribute__((target("avx512bf16")))

namespace {

INLINE ROUNDS __m512 widen_some(const uint16_t* from) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16));
}

INLINE ROUNDS __m512 rounded_some(__m512 x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)), 16));
}

// e^x as `exponential` has it; infinite and zero beyond its ends.
INLINE ROUNDS __m512 exponentials(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  __m512 rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(0.693359375f), x);
  rest = _mm512_fmadd_ps(whole, _mm512_set1_ps(2.12194440e-4f), rest);
  __m512 sum = _mm512_set1_ps(1.9875691500e-4f);
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.3981999507e-3f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(8.3334519073e-3f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(4.1665795894e-2f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.6666665459e-1f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(5.0000001201e-1f));
  sum = _mm512_fmadd_ps(_mm512_mul_ps(sum, rest), rest, _mm512_add_ps(rest, _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(sum, whole);
}

// x / (1 + e^-x), or with e^-2u of the tangent's u.
INLINE ROUNDS __m512 activated(__m512 x, bool silu) {
  __m512 power = x;
  if (!silu) {
    const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
    power = _mm512_mul_ps(_mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), x), _mm512_set1_ps(2.0f * 0.7978845608f));
  }
  // Beyond these ends the result is x or nothing, and neither 0 * infinity nor a rest of infinity comes up.
  power = _mm512_max_ps(_mm512_set1_ps(-87.0f), _mm512_min_ps(_mm512_set1_ps(87.0f), power));
  const __m512 low = _mm512_add_ps(_mm512_set1_ps(1.0f), exponentials(_mm512_sub_ps(_mm512_setzero_ps(), power)));
  const __m512 guess = _mm512_rcp14_ps(low);
  return _mm512_mul_ps(x, _mm512_mul_ps(guess, _mm512_fnmadd_ps(low, guess, _mm512_set1_ps(2.0f))));
}

ROUNDS void gate_many(const uint16_t* gate, const uint16_t* up, uint16_t* y, int64_t size, int64_t activation) {
  const int64_t whole = size / kSide * kSide;
  for (int64_t i = 0; i < whole; i += kSide) {
    const __m512 made = rounded_some(activated(widen_some(gate + i), activation == kSilu));
    _mm256_storeu_si256((__m256i*)(y + i), (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(made, widen_some(up + i))));
  }
  gate_row(gate + whole, up + whole, y + whole, size - whole, activation);
}

}  // namespace

#else
namespace {

INLINE void gate_many(const uint16_t*, const uint16_t*, uint16_t*, int64_t, int64_t) {}

}  // namespace
#endif
