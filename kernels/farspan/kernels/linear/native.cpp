// y = x w^T + b with bf16 inputs and output on a CPU that has no bf16 arithmetic. Contract: contract.py.
//
// Weights are read once as they lie, 16 bits each, and widened in registers; sums are fp32. Few rows are bound by the
// memory that holds the weights; many rows by multiplications: four outputs by two rows share what is loaded. An output
// is summed in one order however many rows there are: it does not depend on the rows beside it. No Python and no torch
// in here: numbers and addresses come in, and nothing is allocated.

#include <cstdint>
#include <cstring>
#ifdef _OPENMP
#include <omp.h>
#endif

#define INLINE static inline __attribute__((always_inline))

namespace {

#ifdef __AVX512F__
constexpr int64_t kLanes = 16;
#else
constexpr int64_t kLanes = 8;
#endif
// Outputs that a thread computes together, and rows whose widened values stay in its cache with them.
constexpr int64_t kOuts = 8;
constexpr int64_t kCacheFloats = 49152;

typedef float lanes __attribute__((vector_size(kLanes * 4)));
typedef uint32_t words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t halves __attribute__((vector_size(kLanes * 2)));

INLINE lanes load(const float* from) {
  lanes x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

INLINE lanes widen(const uint16_t* from) {
  halves narrow;
  std::memcpy(&narrow, from, sizeof narrow);
  words bits = __builtin_convertvector(narrow, words) << 16;
  lanes wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
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

INLINE float total(lanes x) {
  float half[kLanes];
  std::memcpy(half, &x, sizeof x);
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; i++) half[i] += half[i + width];
  return half[0];
}

INLINE int64_t padded(int64_t ins) { return (ins + kLanes - 1) / kLanes * kLanes; }

}  // namespace

extern "C" {

// Field for field the Structure in native.py. Strides count elements; a row's inputs lie side by side.
struct Linear {
  const uint16_t *x, *weights, *bias;
  uint16_t* y;
  float* scratch;
  int64_t rows, outs, ins, x_row, weight_row, y_row, threads;
};
}

namespace {

INLINE void put(const Linear& c, int64_t row, int64_t out, float sum) {
  if (c.bias) sum += widen_one(c.bias[out]);
  c.y[row * c.y_row + out] = narrow(sum);
}

void widen_row(const uint16_t* from, int64_t ins, float* to) {
  int64_t whole = ins / kLanes * kLanes, i = 0;
  for (; i < whole; i += kLanes) {
    lanes x = widen(from + i);
    std::memcpy(to + i, &x, sizeof x);
  }
  for (; i < ins; i++) to[i] = widen_one(from[i]);
  for (; i < padded(ins); i++) to[i] = 0.0f;
}

// One row: every weight is used once, so it is widened on its way to the multiplication.
void one_row(const Linear& c, int64_t first, const float* x, int64_t row) {
  const uint16_t* w[kOuts];
  for (int64_t j = 0; j < kOuts; j++) {
    int64_t out = first + j < c.outs ? first + j : c.outs - 1;
    w[j] = c.weights + out * c.weight_row;
  }
  lanes sums[kOuts] = {};
  int64_t whole = c.ins / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    lanes xs = load(x + i);
#pragma GCC unroll 8
    for (int64_t j = 0; j < kOuts; j++) sums[j] += xs * widen(w[j] + i);
  }
  if (whole < c.ins) {
    lanes xs = load(x + whole);
    for (int64_t j = 0; j < kOuts; j++) {
      float rest[kLanes];
      widen_row(w[j] + whole, c.ins - whole, rest);
      sums[j] += xs * load(rest);
    }
  }
  for (int64_t j = 0; j < kOuts && first + j < c.outs; j++) put(c, row, first + j, total(sums[j]));
}

// Four outputs by two rows: six loads for eight multiplications of a whole vector.
INLINE void four_by_two(const float* const* w, const float* x0, const float* x1, int64_t width, float* sums) {
  lanes a[4] = {}, b[4] = {};
  for (int64_t i = 0; i < width; i += kLanes) {
    lanes xs = load(x0 + i), ys = load(x1 + i);
#pragma GCC unroll 4
    for (int64_t j = 0; j < 4; j++) {
      lanes ws = load(w[j] + i);
      a[j] += xs * ws;
      b[j] += ys * ws;
    }
  }
  for (int64_t j = 0; j < 4; j++) {
    sums[j] = total(a[j]);
    sums[4 + j] = total(b[j]);
  }
}

void many_rows(const Linear& c, int64_t first, const float* x, int64_t begin, int64_t end, float* wide) {
  int64_t width = padded(c.ins);
  for (int64_t j = 0; j < kOuts; j++) {
    int64_t out = first + j < c.outs ? first + j : c.outs - 1;
    widen_row(c.weights + out * c.weight_row, c.ins, wide + j * width);
  }
  for (int64_t row = begin; row < end; row += 2) {
    const float* x0 = x + row * width;
    const float* x1 = row + 1 < end ? x0 + width : x0;
    for (int64_t j = 0; j < kOuts && first + j < c.outs; j += 4) {
      const float* w[4] = {wide + j * width, wide + (j + 1) * width, wide + (j + 2) * width, wide + (j + 3) * width};
      float sums[8];
      four_by_two(w, x0, x1, width, sums);
      for (int64_t i = 0; i < 4 && first + j + i < c.outs; i++) {
        put(c, row, first + j + i, sums[i]);
        if (row + 1 < end) put(c, row + 1, first + j + i, sums[4 + i]);
      }
    }
  }
}

}  // namespace

extern "C" {

// Floats that `scratch` must have room for.
int64_t farspan_linear_floats(int64_t rows, int64_t ins, int64_t threads) {
  return (rows + threads * kOuts) * padded(ins);
}

void farspan_linear(const Linear* given) {
  const Linear c = *given;
  int64_t width = padded(c.ins), groups = (c.outs + kOuts - 1) / kOuts;
  int64_t step = kCacheFloats / width / 2 * 2;
  if (step < 2) step = 2;
  float* wide = c.scratch + c.rows * width;
  // A share that is held up by another process leaves the later ones to the other threads.
  int64_t share = groups / (c.threads * 8) + 1;
#pragma omp parallel num_threads(c.threads)
  {
#ifdef _OPENMP
    float* mine = wide + omp_get_thread_num() * kOuts * width;
#else
    float* mine = wide;
#endif
#pragma omp for schedule(static)
    for (int64_t row = 0; row < c.rows; row++) widen_row(c.x + row * c.x_row, c.ins, c.scratch + row * width);
    if (c.rows == 1) {
#pragma omp for schedule(dynamic, share) nowait
      for (int64_t group = 0; group < groups; group++) one_row(c, group * kOuts, c.scratch, 0);
    } else {
      for (int64_t begin = 0; begin < c.rows; begin += step) {
        int64_t end = begin + step < c.rows ? begin + step : c.rows;
#pragma omp for schedule(dynamic, share) nowait
        for (int64_t group = 0; group < groups; group++) many_rows(c, group * kOuts, c.scratch, begin, end, mine);
      }
    }
  }
}
}
