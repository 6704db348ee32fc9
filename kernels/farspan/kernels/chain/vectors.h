// Vectors of fp32 numbers, and bf16 numbers widened to them.
#pragma once

#include <cstdint>
#include <cstring>

#define INLINE static inline __attribute__((always_inline))

namespace {

#ifdef __AVX512F__
constexpr int64_t kLanes = 16;
#else
constexpr int64_t kLanes = 8;
#endif

typedef float lanes __attribute__((vector_size(kLanes * 4)));
typedef uint32_t words __attribute__((vector_size(kLanes * 4)));

INLINE lanes load(const float* from) {
  lanes x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

// Two vectors at once, those of even places and those of odd ones: nothing has to cross the vector.
INLINE void widen(const uint16_t* from, lanes* even, lanes* odd) {
  words bits;
  std::memcpy(&bits, from, sizeof bits);
  words low = bits << 16, high = bits & 0xffff0000u;
  std::memcpy(even, &low, sizeof low);
  std::memcpy(odd, &high, sizeof high);
}

INLINE float widen_one(uint16_t bits) {
  uint32_t wide_bits = static_cast<uint32_t>(bits) << 16;
  float wide;
  std::memcpy(&wide, &wide_bits, 4);
  return wide;
}

INLINE uint16_t narrow(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  // To the nearest, ties to even; the sum would turn some NaN into infinity.
  return x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Inputs of a step.
constexpr int64_t kPair = 2 * kLanes;

INLINE int64_t padded(int64_t ins) { return (ins + kPair - 1) / kPair * kPair; }

INLINE void widen_pair(const uint16_t* from, float* to) {
  lanes both[2];
  widen(from, both, both + 1);
  std::memcpy(to, both, sizeof both);
}

// Step by step the even places, then the odd ones, of inputs and weights alike; zeros behind the last.
void widen_row(const uint16_t* from, int64_t ins, float* to) {
  int64_t whole = ins / kPair * kPair;
  for (int64_t i = 0; i < whole; i += kPair) widen_pair(from + i, to + i);
  if (whole == ins) return;
  uint16_t rest[kPair] = {};
  std::memcpy(rest, from + whole, (ins - whole) * 2);
  widen_pair(rest, to + whole);
}

}  // namespace
