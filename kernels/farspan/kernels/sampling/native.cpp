// A token for each row of logits on a CPU, in tiles of the vocabulary: highest logits, what is cut, sums, the token.
// Contract: contract.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "../team_call.h"

#define ALWAYS __attribute__((always_inline))
#define INLINE static inline ALWAYS

namespace {

constexpr int64_t kLanes = 8, kTile = 4096;
constexpr double kNone = -std::numeric_limits<double>::infinity();
constexpr double kEndless = std::numeric_limits<double>::infinity();
// Scores are sorted into bins before the few of one bin are looked at; the last bin has all that are lower.
constexpr int64_t kBins = 1024;
constexpr double kBinsOfOne = 32.0;

typedef double doubles __attribute__((vector_size(kLanes * 8)));
typedef int64_t longs __attribute__((vector_size(kLanes * 8)));
typedef float floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t ints __attribute__((vector_size(kLanes * 4)));
typedef uint32_t words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t halves __attribute__((vector_size(kLanes * 2)));

struct bf16 {
  uint16_t bits;
};

INLINE floats load(const float* from) {
  floats x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

INLINE floats load(const bf16* from) {
  halves narrow;
  std::memcpy(&narrow, from, sizeof narrow);
  words bits = __builtin_convertvector(narrow, words) << 16;
  floats wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

INLINE doubles load(const double* from) {
  doubles x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

template <typename T>
INLINE doubles load_wide(const T* from) {
  return __builtin_convertvector(load(from), doubles);
}

INLINE float lowest(const float*) { return -std::numeric_limits<float>::infinity(); }
INLINE double lowest(const double*) { return kNone; }
INLINE bf16 lowest(const bf16*) { return {0xff80}; }

// exp(x) of x <= 0, to a few units in the last place; 0 below -708 and for NaN.
INLINE doubles exp_of(doubles x) {
  constexpr double kLog2e = 1.4426950408889634, kHigh = 0x1.62e42fefa3800p-1, kLow = 0x1.ef35793c76730p-45;
  // Added and taken away again it rounds to a whole number, which is then in its lowest bits.
  constexpr double kRound = 0x1.8p52;
  doubles shifted = x * kLog2e + kRound, whole = shifted - kRound;
  doubles r = (x - whole * kHigh) - whole * kLow;
  doubles p = r * (1.0 / 39916800) + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  longs bits, power;
  std::memcpy(&bits, &p, sizeof bits);
  std::memcpy(&power, &shifted, sizeof power);
  bits += power << 52;
  doubles y;
  std::memcpy(&y, &bits, sizeof y);
  return x > -708.0 ? y : doubles{};
}

INLINE double sum_of(doubles x) {
  double sum = 0.0;
  for (int64_t i = 0; i < kLanes; i++) sum += x[i];
  return sum;
}

}  // namespace

extern "C" {

// Field for field the _Case of native.py.
struct Case {
  const void* logits;
  const double *temperature, *top_p, *asked, *points;
  const int64_t* top_k;
  const uint8_t* told;
  int64_t* tokens;
  double *best, *margin, *lse;
  // Of each row and tile; of each row the lowest score that is not cut.
  double *tops, *sums, *wholes, *least;
  // team/native.cpp
  farspan_team team;
  int64_t rows, size, row, tiles, bytes, threads;
};
}

namespace {

template <typename T>
struct Row {
  const Case& c;
  int64_t number;

  const T* logits() const { return static_cast<const T*>(c.logits) + number * c.row; }
  double* tops() const { return c.tops + number * c.tiles; }
  double* sums() const { return c.sums + number * c.tiles; }
  double* wholes() const { return c.wholes + number * c.tiles; }
  double temperature() const { return c.temperature[number]; }
  double highest() const { return c.best[number]; }
  bool sound() const { return std::isfinite(highest()); }
  bool drawn() const { return sound() && temperature() > 0.0; }
  bool told() const { return sound() && c.told && c.told[number]; }
  bool few() const { return c.top_k[number] > 0 && c.top_k[number] < c.size; }
  bool nucleus() const { return c.top_p[number] < 1.0; }

  // What `see` gets: eight logits as doubles, and the place of the first. Behind the last logit there are -inf.
  template <typename See>
  ALWAYS void each(int64_t begin, int64_t end, See see) const {
    const T* x = logits();
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) see(load_wide(x + i), i);
    if (i < end) {
      T last[kLanes];
      std::fill(last, last + kLanes, lowest(x));
      std::copy(x + i, x + end, last);
      see(load_wide(last), i);
    }
  }
};

// From a logit to its weight in the draw.
struct Weigh {
  double highest, temperature, inverse, least;

  // Where something is cut, scores are those of the reference in every bit.
  bool exact() const { return least > kNone || !std::isfinite(inverse); }
  ALWAYS doubles exact_score(doubles x) const { return (x - highest) / temperature; }

  template <bool kExact>
  ALWAYS doubles weight(doubles x) const {
    if (!kExact) return exp_of((x - highest) * inverse);
    doubles score = exact_score(x), weight = exp_of(score);
    return score < least ? doubles{} : weight;
  }
};

template <typename T>
Weigh weigh(const Row<T>& row, double least) {
  return {row.highest(), row.temperature(), 1.0 / row.temperature(), least};
}

int64_t end_of(const Case& c, int64_t tile) { return std::min(c.size, (tile + 1) * kTile); }

// The highest logit of a tile; NaN where any is.
template <typename T>
void find_top(const Row<T>& row, int64_t tile) {
  const T* x = row.logits();
  int64_t i = tile * kTile, end = end_of(row.c, tile);
  T first[kLanes];
  std::fill(first, first + kLanes, lowest(x));
  auto top = load(first), more = top;
  auto broken = top != top;
  for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
    auto a = load(x + i), b = load(x + i + kLanes);
    top = a > top ? a : top;
    more = b > more ? b : more;
    broken |= (a != a) | (b != b);
  }
  while (i < end) {
    T last[kLanes];
    std::fill(last, last + kLanes, lowest(x));
    int64_t count = std::min(kLanes, end - i);
    std::copy(x + i, x + i + count, last);
    auto a = load(last);
    top = a > top ? a : top;
    broken |= a != a;
    i += count;
  }
  top = more > top ? more : top;
  double found = kNone;
  bool bad = false;
  for (int64_t j = 0; j < kLanes; j++) {
    found = std::max(found, static_cast<double>(top[j]));
    bad = bad || broken[j];
  }
  row.tops()[tile] = bad ? std::numeric_limits<double>::quiet_NaN() : found;
}

struct Token {
  double score, weight;
};

// The scores of a row by bins: how many, and what they weigh.
template <typename T>
struct Bins {
  const Row<T>& row;
  Weigh by;
  int64_t counts[kBins] = {};
  double weights[kBins] = {};

  static ints places(doubles score) {
    doubles place = score * -kBinsOfOne, last = {};
    last += static_cast<double>(kBins - 1);
    return __builtin_convertvector(place < last ? place : last, ints);
  }

  void fill(bool weighed) {
    row.each(0, row.c.size, [&](doubles x, int64_t i) ALWAYS {
      doubles score = by.exact_score(x), weight = {};
      if (weighed) weight = exp_of(score);
      ints place = places(score);
      const int64_t count = std::min(kLanes, row.c.size - i);
      for (int64_t j = 0; j < count; j++) {
        counts[place[j]]++;
        weights[place[j]] += weight[j];
      }
    });
  }

  // The tokens of a bin that are not cut by `least`.
  std::vector<Token> of(int64_t bin, double least) const {
    std::vector<Token> found;
    row.each(0, row.c.size, [&](doubles x, int64_t i) ALWAYS {
      doubles score = by.exact_score(x);
      ints there = places(score) == static_cast<int32_t>(bin);
      const int64_t count = std::min(kLanes, row.c.size - i);
      for (int64_t j = 0; j < count; j++)
        if (there[j] && score[j] >= least) found.push_back({score[j], std::exp(score[j])});
    });
    return found;
  }
};

bool likelier(const Token& a, const Token& b) { return a.score > b.score; }

// The score of the k-th best token. Bins hold no others afterwards.
template <typename T>
double cut_to_few(Bins<T>& bins, int64_t k) {
  int64_t bin = 0;
  while (bins.counts[bin] < k) k -= bins.counts[bin++];
  std::vector<Token> tokens = bins.of(bin, kNone);
  std::nth_element(tokens.begin(), tokens.begin() + k - 1, tokens.end(), likelier);
  const double least = tokens[k - 1].score;
  bins.weights[bin] = 0.0;
  for (const Token& token : tokens)
    if (token.score >= least) bins.weights[bin] += token.weight;
  std::fill(bins.weights + bin + 1, bins.weights + kBins, 0.0);
  return least;
}

// The score of the least likely token of the nucleus: the one that crosses top_p still belongs to it.
template <typename T>
double cut_to_nucleus(const Bins<T>& bins, double top_p, double least, double* margin) {
  double total = 0.0, before = 0.0;
  for (double weight : bins.weights) total += weight;
  const double goal = top_p * total;
  int64_t bin = 0, last = kBins - 1;
  while (last > 0 && bins.weights[last] == 0.0) last--;
  while (bin < last && before + bins.weights[bin] < goal) before += bins.weights[bin++];
  std::vector<Token> tokens = bins.of(bin, least);
  // Halves that are inside, or outside, as a whole need no order.
  auto begin = tokens.begin(), end = tokens.end();
  while (end - begin > 32) {
    auto middle = begin + (end - begin) / 2;
    std::nth_element(begin, middle, end, likelier);
    double upper = 0.0;
    for (auto token = begin; token != middle; token++) upper += token->weight;
    if (before + upper < goal) {
      before += upper;
      begin = middle;
    } else {
      end = middle;
    }
  }
  std::sort(begin, end, likelier);
  auto token = begin;
  while (token + 1 != end && before + token->weight < goal) before += (token++)->weight;
  *margin = std::min(std::abs(goal - before), std::abs(before + token->weight - goal)) / total;
  return token->score;
}

// The lowest score that is not cut, from the highest logit of the row.
template <typename T>
void find_least(const Row<T>& row) {
  const Case& c = row.c;
  double highest = kNone, least = c.asked[row.number];
  for (int64_t tile = 0; tile < c.tiles; tile++) {
    double top = row.tops()[tile];
    highest = top > highest || top != top ? top : highest;
    if (top != top) break;
  }
  c.best[row.number] = highest;
  c.margin[row.number] = kEndless;
  if (row.drawn() && (row.few() || row.nucleus())) {
    Bins<T> bins{row, weigh(row, kNone)};
    bins.fill(row.nucleus());
    double kept = kNone;
    if (row.few()) kept = cut_to_few(bins, c.top_k[row.number]);
    if (row.nucleus()) kept = cut_to_nucleus(bins, c.top_p[row.number], kept, &c.margin[row.number]);
    least = std::max(least, kept);
  }
  c.least[row.number] = least;
}

template <bool kExact, typename T>
double sum_weights(const Row<T>& row, int64_t tile, const Weigh& by) {
  doubles sums = {};
  row.each(tile * kTile, end_of(row.c, tile),
           [&](doubles x, int64_t) ALWAYS { sums += by.template weight<kExact>(x); });
  return sum_of(sums);
}

// What the weights of a tile sum up to, for the draw and for the log of the sum of all.
template <typename T>
void sum_tile(const Row<T>& row, int64_t tile) {
  const Weigh by = weigh(row, row.c.least[row.number]), plain{row.highest(), 1.0, 1.0, kNone};
  if (row.drawn()) row.sums()[tile] = by.exact() ? sum_weights<true>(row, tile, by) : sum_weights<false>(row, tile, by);
  if (!row.told()) return;
  const bool same = row.drawn() && by.temperature == 1.0 && by.least == kNone;
  row.wholes()[tile] = same ? row.sums()[tile] : sum_weights<false>(row, tile, plain);
}

template <typename T>
int64_t first_highest(const Row<T>& row) {
  int64_t tile = 0, found = -1;
  while (row.tops()[tile] != row.highest()) tile++;
  for (int64_t i = tile * kTile, end = end_of(row.c, tile); found < 0 && i < end; i += kLanes)
    row.each(i, std::min(end, i + kLanes), [&](doubles x, int64_t place) ALWAYS {
      for (int64_t j = kLanes - 1; j >= 0; j--) found = x[j] == row.highest() ? place + j : found;
    });
  return found;
}

template <bool kExact, typename T>
void draw(const Row<T>& row, const Weigh& by) {
  const Case& c = row.c;
  double total = 0.0, before = 0.0;
  for (int64_t tile = 0; tile < c.tiles; tile++) total += row.sums()[tile];
  const double goal = std::min(c.points[row.number] * total, std::nextafter(total, 0.0));
  int64_t tile = 0, last = c.tiles - 1;
  while (last > 0 && row.sums()[last] == 0.0) last--;
  while (tile < last && before + row.sums()[tile] <= goal) before += row.sums()[tile++];
  // The last one there is, where sums in another order end before the goal.
  int64_t token = 0;
  double after = before;
  bool found = false;
  for (int64_t i = tile * kTile, end = end_of(c, tile); !found && i < end; i += kLanes)
    row.each(i, std::min(end, i + kLanes), [&](doubles x, int64_t place) ALWAYS {
      doubles weight = by.template weight<kExact>(x);
      for (int64_t j = 0; j < kLanes && !found; j++) {
        if (weight[j] == 0.0) continue;
        before = after;
        after += weight[j];
        token = place + j;
        found = after > goal;
      }
    });
  c.tokens[row.number] = token;
  const double margin = found ? std::min(goal - before, after - goal) / total : 0.0;
  c.margin[row.number] = std::min(c.margin[row.number], margin);
}

template <typename T>
void choose(const Row<T>& row) {
  row.c.tokens[row.number] = 0;
  if (row.told()) {
    double whole = 0.0;
    for (int64_t tile = 0; tile < row.c.tiles; tile++) whole += row.wholes()[tile];
    row.c.lse[row.number] = row.highest() + std::log(whole);
  }
  if (!row.drawn()) {
    if (row.sound()) row.c.tokens[row.number] = first_highest(row);
    return;
  }
  const Weigh by = weigh(row, row.c.least[row.number]);
  by.exact() ? draw<true>(row, by) : draw<false>(row, by);
}

template <typename T>
void do_share(const Case& c, int64_t level, int64_t index) {
  const bool tiled = level == 0 || level == 2;
  const Row<T> row{c, tiled ? index / c.tiles : index};
  if (level == 0) find_top(row, index % c.tiles);
  if (level == 1) find_least(row);
  if (level == 2) sum_tile(row, index % c.tiles);
  if (level == 3) choose(row);
}

void work(const void* context, int64_t level, int64_t index, int64_t) {
  const Case& c = *static_cast<const Case*>(context);
  (c.bytes == 2 ? do_share<bf16> : c.bytes == 4 ? do_share<float> : do_share<double>)(c, level, index);
}

}  // namespace

extern "C" {

int64_t farspan_sample_tiles(int64_t size) { return (size + kTile - 1) / kTile; }

void farspan_sample(const Case* given) {
  const int64_t tiled = given->rows * given->tiles;
  const int64_t counts[] = {tiled, given->rows, tiled, given->rows};
  given->team(work, nullptr, given, 4, counts, given->threads);
}
}
