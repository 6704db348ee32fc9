// Attention over pages on a CPU. Contract: contract.py; equal shares of the line of tiles: partition.py.
//
// A segment is one row with all its query heads: a page lies in one piece of memory, so its slots are read in order,
// each once, for every head. No Python and no torch in here: numbers and addresses come in, and nothing is allocated.
//
// Compiled with -fno-math-errno and without -ffast-math: -inf is a value here.

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../team_call.h"

#define INLINE static inline __attribute__((always_inline))

namespace {

constexpr int64_t kTile = 64;
constexpr int64_t kLongestHead = 512;
// Slots computed at once, and lanes of a vector; a row of scores has room for a last step that is not full.
constexpr int64_t kStep = 8;
// Numbers that rows are padded to, and slots whose values are added at once.
#ifdef __AVX512F__
constexpr int64_t kPadded = 32, kAdded = kTile;
#else
constexpr int64_t kPadded = kStep, kAdded = kStep;
#endif
constexpr int64_t kScores = kTile + kStep;
const float kNone = -__builtin_inff();

struct bf16 {
  uint16_t bits;
};

INLINE int64_t padded(int64_t dim) { return (dim + kPadded - 1) / kPadded * kPadded; }

INLINE float widen(float x) { return x; }

INLINE float widen(bf16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

INLINE void narrow(float x, float* to) { *to = x; }

INLINE void narrow(float x, bf16* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  // To the nearest, ties to even; the sum would turn some NaN into infinity.
  to->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

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

INLINE float bend(float x, float cap) { return cap * (1.0f - 2.0f / (exponential(x * (2.0f / cap)) + 1.0f)); }

}  // namespace

extern "C" {

// Field for field the Structure in native.py. Strides count elements.
struct Case {
  const void *q, *keys, *values;
  const float* log_weights;
  const int32_t *tables, *lengths;
  void* out;
  float *lse, *parts, *scratch;
  // team/native.cpp
  farspan_team team;
  // Keys and values of each row's own token and where they go, or nothing: they are there already.
  const void *new_keys, *new_values;
  const int64_t *pages, *places;
  int64_t rows, queries, heads, groups, qk_dim, v_dim, slots;
  int64_t q_row, q_query, q_head, key_page, key_slot, key_group, value_page, value_slot, value_group;
  int64_t weight_page, weight_slot, weight_group, table_row;
  int64_t programs, window, causal, half, threads;
  int64_t k_row, v_row, page_step;
  float scale, softcap;
};
}

#include "eight.h"
#include "sixteen.h"

namespace {

INLINE int64_t first_token(const Case& c, int64_t length) {
  if (c.window == 0) return 0;
  int64_t first = length - c.queries - c.window + 1;
  return first < 0 ? 0 : first < length ? first : length;
}

INLINE int64_t first_tile(const Case& c, int64_t length) { return first_token(c, length) / kTile; }

INLINE int64_t count_tiles(const Case& c, int64_t length) {
  return (length + kTile - 1) / kTile - first_tile(c, length);
}

// Floats of one piece in `parts`: an unnormalised output and (largest score, sum) for each query head of each query.
INLINE int64_t piece_floats(const Case& c) { return c.queries * c.heads * (padded(c.v_dim) + 2); }

// Soft cap, log weights and masks of a tile's scores; then online softmax. Returns nothing but what it changes.
INLINE void soften(const Case& c, float* scores, int64_t begin, int64_t count, int64_t length, const float* weights,
                   float* out, float* top, float* sum) {
  const int64_t group = c.heads / c.groups;
  for (int64_t row = 0; row < c.queries * c.heads; row++) {
    float* mine = scores + row * kScores;
    if (c.softcap > 0) {
#pragma omp simd
      for (int64_t j = 0; j < count; j++) mine[j] = bend(mine[j], c.softcap);
    }
    if (weights) {
      const float* of_group = weights + row % c.heads / group * kTile;
      for (int64_t j = 0; j < count; j++) mine[j] += of_group[j];
    }
    if (c.causal) {
      const int64_t last = length - c.queries + row / c.heads;
      for (int64_t j = 0; j < count; j++) {
        const int64_t behind = last - begin - j;
        if (behind < 0 || (c.window && behind >= c.window)) mine[j] = kNone;
      }
    }
    float higher = top[row];
#pragma omp simd reduction(max : higher)
    for (int64_t j = 0; j < count; j++) higher = mine[j] > higher ? mine[j] : higher;
    // A query that has seen nothing yet keeps probabilities of zero, not NaN.
    const float pivot = higher == kNone ? 0.0f : higher;
    float added = 0;
#pragma omp simd reduction(+ : added)
    for (int64_t j = 0; j < count; j++) {
      mine[j] = exponential(mine[j] - pivot);
      added += mine[j];
    }
    if (higher > top[row]) {
      const float shrink = exponential(top[row] - pivot);
      sum[row] *= shrink;
      const int64_t width = padded(c.v_dim);
      float* to = out + row * width;
#pragma omp simd
      for (int64_t d = 0; d < width; d++) to[d] *= shrink;
      top[row] = higher;
    }
    sum[row] += added;
    for (int64_t j = count; j < count + kStep; j++) mine[j] = 0;
  }
}

// The slots of a tile that a row sees. What no query sees is not read: it may be NaN, and its page any number.
template <typename T>
struct Tile {
  int64_t begin, count;
  const T *keys[kTile], *values[kTile];
};

template <typename T>
INLINE void find_slots(const Case& c, int64_t row, int64_t tile, Tile<T>* to) {
  const int64_t length = c.lengths[row], seen = first_token(c, length);
  const int32_t* table = c.tables + row * c.table_row;
  to->begin = tile * kTile < seen ? seen : tile * kTile;
  to->count = ((tile + 1) * kTile < length ? (tile + 1) * kTile : length) - to->begin;
  for (int64_t j = 0; j < to->count; j++) {
    const int64_t page = table[(to->begin + j) / c.slots], slot = (to->begin + j) % c.slots;
    to->keys[j] = static_cast<const T*>(c.keys) + page * c.key_page + slot * c.key_slot;
    to->values[j] = static_cast<const T*>(c.values) + page * c.value_page + slot * c.value_slot;
  }
}

// Asks for the memory of slots that are read next: pages lie anywhere, which the processor does not foresee.
template <typename T>
INLINE void fetch(const Case& c, const Tile<T>& tile, int64_t first, int64_t stop) {
  const int64_t key_bytes = ((c.groups - 1) * c.key_group + c.qk_dim) * sizeof(T);
  const int64_t value_bytes = ((c.groups - 1) * c.value_group + c.v_dim) * sizeof(T);
  for (int64_t j = first; j < stop && j < tile.count; j++) {
    for (int64_t b = 0; b < key_bytes; b += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(tile.keys[j]) + b, 0, 2);
    for (int64_t b = 0; b < value_bytes; b += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(tile.values[j]) + b, 0, 2);
  }
}

// Log weights of the slots of a tile, group by group.
template <typename T>
void find_weights(const Case& c, int64_t row, const Tile<T>& tile, float* weights) {
  const int32_t* table = c.tables + row * c.table_row;
  for (int64_t j = 0; j < tile.count; j++) {
    const int64_t page = table[(tile.begin + j) / c.slots], slot = (tile.begin + j) % c.slots;
    const float* of_slot = c.log_weights + page * c.weight_page + slot * c.weight_slot;
    for (int64_t g = 0; g < c.groups; g++) weights[g * kTile + j] = of_slot[g * c.weight_group];
  }
}

// Tiles first..stop of a row into one piece; `scratch` holds the queries in fp32, scores and log weights.
template <typename T>
void attend_piece(const Case& c, int64_t row, int64_t first, int64_t stop, float* piece, float* scratch) {
  const int64_t query_rows = c.queries * c.heads;
  const int64_t qk_width = padded(c.qk_dim), v_width = padded(c.v_dim);
  float *q = scratch, *scores = q + query_rows * qk_width, *weights = scores + query_rows * kScores;
  float *out = piece, *top = piece + query_rows * v_width, *sum = top + query_rows;
  std::memset(q, 0, sizeof(float) * query_rows * qk_width);
  for (int64_t r = 0; r < query_rows; r++) {
    const T* from = static_cast<const T*>(c.q) + row * c.q_row + r / c.heads * c.q_query + r % c.heads * c.q_head;
    widen_row(from, c.qk_dim, c.scale, q + r * qk_width);
    top[r] = kNone, sum[r] = 0;
  }
  std::memset(out, 0, sizeof(float) * query_rows * v_width);
  // This tile and the next, whose memory is asked for meanwhile.
  Tile<T> both[2];
  find_slots(c, row, first, &both[first % 2]);
  fetch(c, both[first % 2], 0, kTile);
  for (int64_t number = first; number < stop; number++) {
    const Tile<T>& tile = both[number % 2];
    Tile<T>& next = both[(number + 1) % 2];
    next.count = 0;
    if (number + 1 < stop) find_slots(c, row, number + 1, &next);
    if (c.log_weights) find_weights(c, row, tile, weights);
    for (int64_t j = 0; j < kTile; j += kStep) {
      fetch(c, next, j, j + kStep);
      const int64_t left = tile.count - j;
      if (left > 0) score_slots(c, q, tile.keys + j, left < kStep ? left : kStep, scores + j);
    }
    soften(c, scores, tile.begin, tile.count, c.lengths[row], c.log_weights ? weights : nullptr, out, top, sum);
    for (int64_t j = 0; j < tile.count; j += kAdded)
      add_slots(c, tile.values + j, tile.count - j < kAdded ? tile.count - j : kAdded, scores + j, out);
  }
}

// The pieces of a row into its (out, lse). A row without a token has none.
template <typename T>
void merge_row(const Case& c, int64_t row, int64_t first, int64_t stop) {
  const int64_t query_rows = c.queries * c.heads, size = piece_floats(c);
  const int64_t width = padded(c.v_dim), tops = query_rows * width;
  for (int64_t r = 0; r < query_rows; r++) {
    float sum = 0, high = kNone, merged[kLongestHead];
    for (int64_t p = first; p < stop; p++) {
      const float top = c.parts[p * size + tops + r];
      high = top > high ? top : high;
    }
    for (int64_t d = 0; d < width; d++) merged[d] = 0;
    for (int64_t p = first; p < stop; p++) {
      const float* piece = c.parts + p * size;
      const float weight = piece[tops + r] == kNone ? 0.0f : exponential(piece[tops + r] - high);
      sum += weight * piece[tops + query_rows + r];
#pragma omp simd
      for (int64_t d = 0; d < width; d++) merged[d] += weight * piece[r * width + d];
    }
    const bool blind = high == kNone;
    c.lse[row * query_rows + r] = blind ? kNone : high + __builtin_logf(sum);
    // Sums over nothing are zero.
    put_row(merged, blind ? 1.0f : sum, c.v_dim, static_cast<T*>(c.out) + (row * query_rows + r) * c.v_dim);
  }
}

void attend_share(const Case& c, int64_t begin, int64_t stop, int64_t program, float* scratch) {
  int64_t start = 0;
  for (int64_t row = 0; row < c.rows && start < stop; row++) {
    const int64_t tiles = count_tiles(c, c.lengths[row]);
    const int64_t from = begin > start ? begin : start, to = stop < start + tiles ? stop : start + tiles;
    if (from < to) {
      const int64_t shift = first_tile(c, c.lengths[row]) - start;
      float* piece = c.parts + (program + row) * piece_floats(c);
      (c.half ? attend_piece<bf16> : attend_piece<float>)(c, row, from + shift, to + shift, piece, scratch);
    }
    start += tiles;
  }
}

}  // namespace

extern "C" {

int64_t farspan_piece_floats(const Case* c) { return piece_floats(*c); }

// Floats that each thread works in.
int64_t farspan_scratch_floats(const Case* c) {
  // A multiple of a cache line: threads that share one wait for each other.
  return (c->queries * c->heads * (padded(c->qk_dim) + kScores) + c->groups * kTile + 15) / 16 * 16;
}

}

namespace {

struct Shared {
  const Case& c;
  // Tiles of all rows, programs that get any, floats of a thread.
  int64_t total, working, scratch;
};

// All heads of a slot lie side by side, in the pages as in the rows.
void write_slots(const Case& c) {
  const int64_t size = c.half ? 2 : 4;
  for (int64_t row = 0; row < c.rows; row++) {
    const int64_t page = c.pages[row * c.page_step], place = c.places[row];
    char* key = static_cast<char*>(const_cast<void*>(c.keys)) + (page * c.key_page + place * c.key_slot) * size;
    char* value = static_cast<char*>(const_cast<void*>(c.values)) + (page * c.value_page + place * c.value_slot) * size;
    std::memcpy(key, static_cast<const char*>(c.new_keys) + row * c.k_row * size, c.groups * c.qk_dim * size);
    std::memcpy(value, static_cast<const char*>(c.new_values) + row * c.v_row * size, c.groups * c.v_dim * size);
  }
}

// Level 0 computes the share of a program, level 1 merges the pieces of a row.
void work(const void* context, int64_t level, int64_t index, int64_t thread) {
  const Shared& s = *static_cast<const Shared*>(context);
  const Case& c = s.c;
  if (level == 0) {
    const int64_t begin = index * s.total / s.working, stop = (index + 1) * s.total / s.working;
    return attend_share(c, begin, stop, index, c.scratch + thread * s.scratch);
  }
  int64_t start = 0;
  for (int64_t before = 0; before < index; before++) start += count_tiles(c, c.lengths[before]);
  const int64_t tiles = count_tiles(c, c.lengths[index]);
  // Where partition.places finds the pieces of this segment.
  const int64_t first = tiles ? index + ((start + 1) * s.working - 1) / s.total : 0;
  const int64_t stop = tiles ? index + ((start + tiles) * s.working - 1) / s.total + 1 : 0;
  (c.half ? merge_row<bf16> : merge_row<float>)(c, index, first, stop);
}

}  // namespace

extern "C" {

// Keys and values of new tokens to their places, and nothing else.
void farspan_write_pages(const Case* given) { write_slots(*given); }

// Thread t works in its own part of the scratch; the number of parts is `threads`.
void farspan_attend_pages(const Case* given) {
  const Case& c = *given;
  if (c.new_keys) write_slots(c);
  int64_t total = 0;
  for (int64_t row = 0; row < c.rows; row++) total += count_tiles(c, c.lengths[row]);
  const int64_t working = total < c.programs ? total : c.programs;
  const Shared shared{c, total, working, farspan_scratch_floats(given)};
  const int64_t counts[] = {working, c.rows};
  c.team(work, nullptr, &shared, 2, counts, c.threads);
}
}
