// Attention over pages on a CPU. Contract: contract.py; equal shares of the line of tiles: partition.py.
//
// A segment is one row with all its query heads: a page lies in one piece of memory, so its slots are read in order,
// each once, for every head. No Python and no torch in here: numbers and addresses come in, and nothing is allocated.
//
// Compiled with -fno-math-errno and without -ffast-math: -inf is a value here.

#include <cstdint>
#include <cstring>

#define INLINE static inline __attribute__((always_inline))

namespace {

constexpr int64_t kTile = 64;
constexpr int64_t kLongestHead = 512;
// Slots computed at once, and lanes of a vector; a row of scores has room for a last step that is not full.
constexpr int64_t kStep = 8;
constexpr int64_t kScores = kTile + kStep;
const float kNone = -__builtin_inff();

struct bf16 {
  uint16_t bits;
};

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

INLINE int64_t padded(int64_t dim) { return (dim + kStep - 1) / kStep * kStep; }

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

typedef void (*farspan_work)(const void* context, int64_t level, int64_t index, int64_t thread);
typedef void (*farspan_ahead)(const void* context, int64_t level, int64_t index);
typedef void (*farspan_team)(farspan_work, farspan_ahead, const void* context, int64_t levels, const int64_t* counts,
                             int64_t threads);

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

// Asks for the memory of slots that are read next: pages lie anywhere, which the processor does not foresee.
template <typename T>
INLINE void fetch(const T* const* slots, int64_t first, int64_t stop, int64_t elements) {
  const int64_t bytes = elements * sizeof(T);
  for (int64_t j = first; j < stop; j++)
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(reinterpret_cast<const char*>(slots[j]) + b, 0, 2);
}

// Tiles first..stop of a row into one piece; `scratch` holds the queries in fp32, scores and log weights.
template <typename T>
void attend_piece(const Case& c, int64_t row, int64_t first, int64_t stop, float* piece, float* scratch) {
  const int64_t query_rows = c.queries * c.heads, length = c.lengths[row];
  const int64_t qk_width = padded(c.qk_dim), v_width = padded(c.v_dim);
  float *q = scratch, *scores = q + query_rows * qk_width, *weights = scores + query_rows * kScores;
  float *out = piece, *top = piece + query_rows * v_width, *sum = top + query_rows;
  std::memset(q, 0, sizeof(float) * query_rows * qk_width);
  for (int64_t r = 0; r < query_rows; r++) {
    const T* from = static_cast<const T*>(c.q) + row * c.q_row + r / c.heads * c.q_query + r % c.heads * c.q_head;
    for (int64_t d = 0; d < c.qk_dim; d++) q[r * qk_width + d] = widen(from[d]) * c.scale;
    top[r] = kNone, sum[r] = 0;
  }
  std::memset(out, 0, sizeof(float) * query_rows * v_width);
  const int32_t* table = c.tables + row * c.table_row;
  const T *keys[kTile], *values[kTile];
  for (int64_t tile = first; tile < stop; tile++) {
    // What no query sees is not read: it may be NaN, and its page any number.
    int64_t begin = tile * kTile, end = begin + kTile;
    if (begin < first_token(c, length)) begin = first_token(c, length);
    if (end > length) end = length;
    const int64_t count = end - begin;
    for (int64_t j = 0; j < count; j++) {
      const int64_t page = table[(begin + j) / c.slots], slot = (begin + j) % c.slots;
      keys[j] = static_cast<const T*>(c.keys) + page * c.key_page + slot * c.key_slot;
      values[j] = static_cast<const T*>(c.values) + page * c.value_page + slot * c.value_slot;
      if (!c.log_weights) continue;
      const float* of_slot = c.log_weights + page * c.weight_page + slot * c.weight_slot;
      for (int64_t g = 0; g < c.groups; g++) weights[g * kTile + j] = of_slot[g * c.weight_group];
    }
    const int64_t key_elements = (c.groups - 1) * c.key_group + c.qk_dim;
    const int64_t value_elements = (c.groups - 1) * c.value_group + c.v_dim;
    for (int64_t j = 0; j < count; j += kStep) {
      fetch(keys, j + kStep, j + 2 * kStep < count ? j + 2 * kStep : count, key_elements);
      fetch(values, j, j + kStep < count ? j + kStep : count, value_elements);
      score_slots(c, q, keys + j, count - j < kStep ? count - j : kStep, scores + j);
    }
    soften(c, scores, begin, count, length, c.log_weights ? weights : nullptr, out, top, sum);
    for (int64_t j = 0; j < count; j += kStep)
      add_slots(c, values + j, count - j < kStep ? count - j : kStep, scores + j, out);
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
    for (int64_t d = 0; d < c.v_dim; d++) merged[d] = 0;
    for (int64_t p = first; p < stop; p++) {
      const float* piece = c.parts + p * size;
      const float weight = piece[tops + r] == kNone ? 0.0f : exponential(piece[tops + r] - high);
      sum += weight * piece[tops + query_rows + r];
#pragma omp simd
      for (int64_t d = 0; d < c.v_dim; d++) merged[d] += weight * piece[r * width + d];
    }
    const bool blind = high == kNone;
    c.lse[row * query_rows + r] = blind ? kNone : high + __builtin_logf(sum);
    T* to = static_cast<T*>(c.out) + (row * query_rows + r) * c.v_dim;
    for (int64_t d = 0; d < c.v_dim; d++) narrow(blind ? 0.0f : merged[d] / sum, to + d);
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
