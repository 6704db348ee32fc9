// Scores of slots and sums of their values by vectors of eight: a few slots are widened into memory for all query heads
// that share them.
#pragma once

#ifndef __AVX512F__

namespace {

typedef float lanes __attribute__((vector_size(32)));

// Eight results for eight sums of eight lanes: pairs of neighbours are added in three rounds.
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t places __attribute__((vector_size(32)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (places){__VA_ARGS__})
#endif
#define ADD_PAIRS(a, b) (SHUFFLE(a, b, 0, 8, 2, 10, 4, 12, 6, 14) + SHUFFLE(a, b, 1, 9, 3, 11, 5, 13, 7, 15))
#define ADD_FOURS(a, b) (SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13) + SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15))
#define ADD_HALVES(a, b) (SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15))

INLINE lanes load(const float* from) {
  lanes x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

INLINE void store(float* to, lanes x) { std::memcpy(to, &x, sizeof x); }

template <typename T>
INLINE void widen_row(const T* from, int64_t dim, float scale, float* to) {
  for (int64_t d = 0; d < dim; d++) to[d] = widen(from[d]) * scale;
}

template <typename T>
INLINE void put_row(const float* from, float sum, int64_t dim, T* to) {
  for (int64_t d = 0; d < dim; d++) narrow(from[d] / sum, to + d);
}

// Up to kStep rows in fp32, each padded with zeros to whole vectors; rows that are not there are zeros.
template <typename T>
INLINE void widen_rows(const T* const* rows, int64_t count, int64_t offset, int64_t dim, float* to) {
  const int64_t width = padded(dim);
  for (int64_t j = 0; j < kStep; j++, to += width) {
    if (j >= count) {
      std::memset(to, 0, sizeof(float) * width);
      continue;
    }
    const T* from = rows[j] + offset;
#pragma omp simd
    for (int64_t d = 0; d < dim; d++) to[d] = widen(from[d]);
    for (int64_t d = dim; d < width; d++) to[d] = 0;
  }
}

// Scores of up to kStep slots for all query rows, into columns of scores[row][kScores].
template <typename T>
INLINE void score_slots(const Case& c, const float* q, const T* const* slots, int64_t count, float* scores) {
  const int64_t group = c.heads / c.groups, width = padded(c.qk_dim);
  float keys[kStep * kLongestHead];
  for (int64_t g = 0; g < c.groups; g++) {
    widen_rows(slots, count, g * c.key_group, c.qk_dim, keys);
    for (int64_t i = 0; i < c.queries; i++)
      for (int64_t row = i * c.heads + g * group; row < i * c.heads + (g + 1) * group; row++) {
        const float* query = q + row * width;
        lanes s0{}, s1{}, s2{}, s3{}, s4{}, s5{}, s6{}, s7{};
        for (int64_t d = 0; d < width; d += kStep) {
          const lanes x = load(query + d);
          const float* key = keys + d;
          s0 += x * load(key);
          s1 += x * load(key + width);
          s2 += x * load(key + 2 * width);
          s3 += x * load(key + 3 * width);
          s4 += x * load(key + 4 * width);
          s5 += x * load(key + 5 * width);
          s6 += x * load(key + 6 * width);
          s7 += x * load(key + 7 * width);
        }
        const lanes t0 = ADD_PAIRS(s0, s1), t1 = ADD_PAIRS(s2, s3), t2 = ADD_PAIRS(s4, s5), t3 = ADD_PAIRS(s6, s7);
        const lanes u0 = ADD_FOURS(t0, t1), u1 = ADD_FOURS(t2, t3);
        store(scores + row * kScores, ADD_HALVES(u0, u1));
      }
  }
}

// out[row] += probabilities * values of up to kStep slots; probabilities of slots that are not there are zero.
template <typename T>
INLINE void add_slots(const Case& c, const T* const* slots, int64_t count, const float* probs, float* out) {
  const int64_t group = c.heads / c.groups, width = padded(c.v_dim);
  float values[kStep * kLongestHead];
  for (int64_t g = 0; g < c.groups; g++) {
    widen_rows(slots, count, g * c.value_group, c.v_dim, values);
    for (int64_t i = 0; i < c.queries; i++)
      for (int64_t row = i * c.heads + g * group; row < i * c.heads + (g + 1) * group; row++) {
        const float* p = probs + row * kScores;
        const float p0 = p[0], p1 = p[1], p2 = p[2], p3 = p[3], p4 = p[4], p5 = p[5], p6 = p[6], p7 = p[7];
        float* to = out + row * width;
        for (int64_t d = 0; d < width; d += kStep) {
          const float* value = values + d;
          // Two sums, so that an addition need not wait for the one before.
          lanes even = load(to + d) + p0 * load(value), odd = p1 * load(value + width);
          even += p2 * load(value + 2 * width);
          odd += p3 * load(value + 3 * width);
          even += p4 * load(value + 4 * width);
          odd += p5 * load(value + 5 * width);
          even += p6 * load(value + 6 * width);
          odd += p7 * load(value + 7 * width);
          store(to + d, even + odd);
        }
      }
  }
}

}  // namespace
#endif
