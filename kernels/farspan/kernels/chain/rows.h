// What a chain does to one row beside linear layers. Every result is rounded to bf16 where torch rounds it.
#pragma once

#include "vectors.h"

namespace {

INLINE float rounded(float x) { return widen_one(narrow(x)); }

// e^x within 2 units in the last place, 0 below the smallest normal number; free of branches, so that it is vectorised.
INLINE float exponential(float x) {
  float low = x < -87.0f ? -87.0f : x;
  low = low > 88.0f ? 88.0f : low;
  // Adding and taking away 1.5 * 2^23 rounds to a whole number.
  float whole = (low * 1.44269504f + 12582912.0f) - 12582912.0f;
  float rest = low - whole * 0.693359375f + whole * 2.12194440e-4f;
  float sum = 1.9875691500e-4f;
  sum = sum * rest + 1.3981999507e-3f;
  sum = sum * rest + 8.3334519073e-3f;
  sum = sum * rest + 4.1665795894e-2f;
  sum = sum * rest + 1.6666665459e-1f;
  sum = sum * rest + 5.0000001201e-1f;
  sum = sum * rest * rest + rest + 1.0f;
  int32_t power = (static_cast<int32_t>(whole) + 127) << 23;
  float scale;
  std::memcpy(&scale, &power, 4);
  return x < -87.0f ? 0.0f : sum * scale;
}

INLINE float silu(float x) { return x / (1.0f + exponential(-x)); }

// x/2 (1 + tanh u) = x / (1 + e^-2u)
INLINE float gelu_tanh(float x) {
  return x / (1.0f + exponential(-2.0f * 0.7978845608f * (x + 0.044715f * x * x * x)));
}

enum Activation { kSilu, kGeluTanh };

void gate_row(const uint16_t* gate, const uint16_t* up, uint16_t* y, int64_t size, int64_t activation) {
  if (activation == kSilu) {
#pragma omp simd
    for (int64_t i = 0; i < size; i++) y[i] = narrow(rounded(silu(widen_one(gate[i]))) * widen_one(up[i]));
  } else {
#pragma omp simd
    for (int64_t i = 0; i < size; i++) y[i] = narrow(rounded(gelu_tanh(widen_one(gate[i]))) * widen_one(up[i]));
  }
}

void add_row(const uint16_t* a, const uint16_t* b, uint16_t* y, int64_t size) {
#pragma omp simd
  for (int64_t i = 0; i < size; i++) y[i] = narrow(widen_one(a[i]) + widen_one(b[i]));
}

// Heads of `size` numbers. `one_more`: (1 + weight) * n, rounded at the end; else n is rounded first.
void norm_row(const uint16_t* x, const uint16_t* w, uint16_t* y, int64_t width, int64_t size, float eps, bool one_more) {
  for (int64_t head = 0; head < width; head += size, x += size, y += size) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; i++) sum += widen_one(x[i]) * widen_one(x[i]);
    const float scale = 1.0f / __builtin_sqrtf(sum / static_cast<float>(size) + eps);
    if (one_more) {
#pragma omp simd
      for (int64_t i = 0; i < size; i++) y[i] = narrow(widen_one(x[i]) * scale * (widen_one(w[i]) + 1.0f));
    } else {
#pragma omp simd
      for (int64_t i = 0; i < size; i++) y[i] = narrow(rounded(widen_one(x[i]) * scale) * widen_one(w[i]));
    }
  }
}

// Heads of `size` numbers, of which the first `turned` turn.
void rotate_row(const uint16_t* x, const uint16_t* cos, const uint16_t* sin, uint16_t* y, int64_t width, int64_t size,
                int64_t turned) {
  const int64_t half = turned / 2;
  for (int64_t head = 0; head < width; head += size, x += size, y += size) {
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
      const float a = widen_one(x[i]), b = widen_one(x[i + half]);
      y[i] = narrow(rounded(a * widen_one(cos[i])) + rounded(-b * widen_one(sin[i])));
      y[i + half] = narrow(rounded(b * widen_one(cos[i + half])) + rounded(a * widen_one(sin[i + half])));
    }
    std::memcpy(y + turned, x + turned, (size - turned) * sizeof *y);
  }
}

}  // namespace
