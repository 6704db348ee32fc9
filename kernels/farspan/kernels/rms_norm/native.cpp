// Root-mean-square normalization on a CPU: one pass for the sum, one for the result. Contract: contract.py.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../team_call.h"

#define INLINE static inline __attribute__((always_inline))

namespace {

constexpr int64_t kLanes = 8;
// Rows of a share: so many one thread is faster with alone.
constexpr int64_t kRows = 32;
typedef float lanes __attribute__((vector_size(kLanes * 4)));
typedef uint32_t words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t halves __attribute__((vector_size(kLanes * 2)));

struct bf16 {
  uint16_t bits;
};

INLINE lanes load(const float* from) {
  lanes x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

INLINE lanes load(const bf16* from) {
  halves narrow;
  std::memcpy(&narrow, from, sizeof narrow);
  words bits = __builtin_convertvector(narrow, words) << 16;
  lanes wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

INLINE lanes rounded(lanes x, const float*) { return x; }

INLINE words nearest(lanes x) {
  words bits;
  std::memcpy(&bits, &x, sizeof bits);
  // To the nearest, ties to even; the sum would turn some NaN into infinity.
  words up = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
  return (x == x) ? up : (words)(bits | 0x00400000u) & 0xffff0000u;
}

INLINE lanes rounded(lanes x, const bf16*) {
  words bits = nearest(x);
  lanes wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

INLINE void store(float* to, lanes x) { std::memcpy(to, &x, sizeof x); }

INLINE void store(bf16* to, lanes x) {
  halves narrow = __builtin_convertvector(nearest(x) >> 16, halves);
  std::memcpy(to, &narrow, sizeof narrow);
}

}  // namespace

extern "C" {

// Field for field the Structure in native.py.
struct Norm {
  const void *x, *w;
  void* y;
  // team/native.cpp
  farspan_team team;
  int64_t rows, size, x_row, half, one_more, threads;
  float eps;
};
}

namespace {

template <typename T>
void normalize(const Norm& c, int64_t begin, int64_t end) {
  const T *all_x = static_cast<const T*>(c.x), *w = static_cast<const T*>(c.w);
  T* all_y = static_cast<T*>(c.y);
  const int64_t size = c.size, x_row = c.x_row;
  const float eps = c.eps;
  const bool one_more = c.one_more;
  int64_t whole = size / kLanes * kLanes, rest = size - whole;
  // The last vector of a row that is not full is computed from copies filled up with zeros.
  T last_x[kLanes] = {}, last_w[kLanes] = {}, last_y[kLanes];
  std::memcpy(last_w, w + whole, rest * sizeof(T));
  for (int64_t row = begin; row < end; row++) {
    const T* x = all_x + row * x_row;
    T* y = all_y + row * size;
    std::memcpy(last_x, x + whole, rest * sizeof(T));
    lanes sums = load(last_x) * load(last_x), more = {};
    int64_t i = 0;
    for (; i + 2 * kLanes <= whole; i += 2 * kLanes) {
      lanes a = load(x + i), b = load(x + i + kLanes);
      sums += a * a;
      more += b * b;
    }
    if (i < whole) more += load(x + i) * load(x + i);
    sums += more;
    float sum = 0.0f;
    for (int64_t j = 0; j < kLanes; j++) sum += sums[j];
    float scale = 1.0f / std::sqrt(sum / static_cast<float>(size) + eps);
    for (i = 0; i < size; i += kLanes) {
      bool last = i == whole;
      lanes n = load(last ? last_x : x + i) * scale, weight = load(last ? last_w : w + i);
      lanes result = one_more ? n * (weight + 1.0f) : rounded(n, x) * weight;
      store(last ? last_y : y + i, result);
    }
    std::memcpy(y + whole, last_y, rest * sizeof(T));
  }
}

void work(const void* context, int64_t, int64_t index, int64_t) {
  const Norm& c = *static_cast<const Norm*>(context);
  const int64_t begin = index * kRows, end = begin + kRows < c.rows ? begin + kRows : c.rows;
  (c.half ? normalize<bf16> : normalize<float>)(c, begin, end);
}

}  // namespace

extern "C" {

void farspan_rms_norm(const Norm* given) {
  const int64_t counts[] = {(given->rows + kRows - 1) / kRows};
  given->team(work, nullptr, given, 1, counts, given->threads);
}
}
