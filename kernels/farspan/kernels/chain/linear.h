// Linear layers of bf16 weights on a CPU: by matrix tiles (tiles.h), or where there is no bf16 arithmetic.
//
// There weights are read as they lie, 16 bits each, and widened on the way; sums are fp32. Few rows are bound by the memory
// that holds the weights, many rows by multiplications: four outputs by three rows share what is loaded. An output
// is summed in one order however many rows there are: it does not depend on the rows beside it.
#pragma once

#include "products.h"

namespace {

// Few rows, whose sums fit into registers: outputs that a thread computes one after the other, weights of a cache line,
// and how far ahead of the one that is used they are asked for.
constexpr int64_t kFewRows = 8, kOuts = 8, kLine = 32, kAhead = 8192;
// Quarters of a layer that are cut into one large share for each thread, and small shares of a thread of what is left.
constexpr int64_t kLargePart = 3, kSmall = 8;
// Many rows: a tile of outputs by rows, whose sums stay in registers; inputs at once, so that the widened weights of a
// tile stay in the first cache; rows at once, so that their inputs stay in the second.
constexpr int64_t kTileOuts = 4, kTileRows = 3, kBlock = 2048, kRows = 60;
constexpr int64_t kTile = kTileOuts * kTileRows;
// By tiles: rows up to which weights are read as they lie.
constexpr int64_t kLaidRows = 128;
// Floats of a thread for many rows: widened weights, and the sums of all tiles of its rows.
constexpr int64_t kOwn = kTileOuts * kBlock + (kRows / kTileRows) * kTile * kLanes;

// Strides count elements; inputs are widened already, or laid out for tiles.
struct Linear {
  const float* x;
  const uint16_t *weights, *bias;
  uint16_t* y;
  int64_t rows, outs, ins, weight_row, y_row;
  bool tiled;
};

typedef float eight __attribute__((vector_size(32)));

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t places __attribute__((vector_size(32)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (places){__VA_ARGS__})
#endif

INLINE eight folded(lanes x) {
  eight parts[kLanes / 8];
  std::memcpy(parts, &x, sizeof x);
  for (int64_t i = 1; i < kLanes / 8; i++) parts[0] += parts[i];
  return parts[0];
}

// Four sums of all lanes: neighbours are added in two rounds, then the halves.
INLINE void totals(const lanes* x, float* to) {
  eight a = folded(x[0]), b = folded(x[1]), c = folded(x[2]), d = folded(x[3]);
  eight p = SHUFFLE(a, b, 0, 8, 2, 10, 4, 12, 6, 14) + SHUFFLE(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
  eight q = SHUFFLE(c, d, 0, 8, 2, 10, 4, 12, 6, 14) + SHUFFLE(c, d, 1, 9, 3, 11, 5, 13, 7, 15);
  eight r = SHUFFLE(p, q, 0, 1, 8, 9, 4, 5, 12, 13) + SHUFFLE(p, q, 2, 3, 10, 11, 6, 7, 14, 15);
  float half[8];
  std::memcpy(half, &r, sizeof r);
  for (int64_t i = 0; i < 4; i++) to[i] = half[i] + half[i + 4];
}

INLINE void put(const Linear& c, int64_t row, int64_t out, float sum) {
  if (c.bias) sum += widen_one(c.bias[out]);
  c.y[row * c.y_row + out] = narrow(sum);
}

// Few rows: weights are widened on their way to the multiplication and read in the order in which they lie, the memory
// asked for ahead of it up to `end`: what lies behind belongs to another share.
template <int64_t Rows>
void few_rows(const Linear& c, int64_t first, const uint16_t* end) {
  const int64_t width = padded(c.ins), whole = c.ins / kPair * kPair;
  lanes sums[Rows * kOuts] = {};
  for (int64_t j = 0; j < kOuts && first + j < c.outs; j++) {
    const uint16_t* w = c.weights + (first + j) * c.weight_row;
    lanes sum[Rows] = {};
    auto add = [&](const uint16_t* from, int64_t i) __attribute__((always_inline)) {
      lanes even, odd;
      widen(from, &even, &odd);
#pragma GCC unroll 8
      for (int64_t row = 0; row < Rows; row++) {
        sum[row] += load(c.x + row * width + i) * even;
        sum[row] += load(c.x + row * width + i + kLanes) * odd;
      }
    };
    for (int64_t i = 0; i < whole; i += kPair) {
      if (i % kLine == 0 && w + i + kAhead < end) __builtin_prefetch(w + i + kAhead);
      add(w + i, i);
    }
    if (whole < c.ins) {
      uint16_t rest[kPair] = {};
      std::memcpy(rest, w + whole, (c.ins - whole) * 2);
      add(rest, whole);
    }
    for (int64_t row = 0; row < Rows; row++) sums[row * kOuts + j] = sum[row];
  }
  for (int64_t row = 0; row < Rows; row++) {
    float found[kOuts];
    totals(sums + row * kOuts, found);
    totals(sums + row * kOuts + 4, found + 4);
    for (int64_t j = 0; j < kOuts && first + j < c.outs; j++) put(c, row, first + j, found[j]);
  }
}

typedef void (*few)(const Linear&, int64_t, const uint16_t*);
constexpr few kFew[] = {nullptr,     few_rows<1>, few_rows<2>, few_rows<3>, few_rows<4>,
                        few_rows<5>, few_rows<6>, few_rows<7>, few_rows<8>};

// Seven loads for twelve multiplications of a whole vector.
INLINE void add_tile(const float* w, const float* const* x, int64_t size, lanes* sums) {
  lanes a[kTile];
  std::memcpy(a, sums, sizeof a);
  for (int64_t i = 0; i < size; i += kLanes) {
    lanes x0 = load(x[0] + i), x1 = load(x[1] + i), x2 = load(x[2] + i);
#pragma GCC unroll 4
    for (int64_t j = 0; j < kTileOuts; j++) {
      lanes ws = load(w + j * kBlock + i);
      a[j] += x0 * ws;
      a[kTileOuts + j] += x1 * ws;
      a[2 * kTileOuts + j] += x2 * ws;
    }
  }
  std::memcpy(sums, a, sizeof a);
}

// Rows begin..end of four outputs. Each sum goes through the inputs in order, as that of one row does.
void many_rows(const Linear& c, int64_t first, int64_t begin, int64_t end, float* mine) {
  const float* x = c.x;
  int64_t width = padded(c.ins);
  float* wide = mine;
  lanes* sums = reinterpret_cast<lanes*>(mine + kTileOuts * kBlock);
  int64_t tiles = (end - begin + kTileRows - 1) / kTileRows;
  std::memset(sums, 0, tiles * kTile * sizeof(lanes));
  for (int64_t from = 0; from < width; from += kBlock) {
    int64_t size = from + kBlock < width ? kBlock : width - from;
    int64_t given = from + size < c.ins ? size : c.ins - from;
    for (int64_t j = 0; j < kTileOuts; j++) {
      int64_t out = first + j < c.outs ? first + j : c.outs - 1;
      widen_row(c.weights + out * c.weight_row + from, given, wide + j * kBlock);
    }
    for (int64_t tile = 0; tile < tiles; tile++) {
      const float* rows[kTileRows];
      for (int64_t i = 0; i < kTileRows; i++) {
        int64_t row = begin + tile * kTileRows + i;
        rows[i] = x + (row < end ? row : end - 1) * width + from;
      }
      add_tile(wide, rows, size, sums + tile * kTile);
    }
  }
  for (int64_t tile = 0; tile < tiles; tile++) {
    for (int64_t i = 0; i < kTileRows; i++) {
      float found[kTileOuts];
      totals(sums + tile * kTile + i * kTileOuts, found);
      int64_t row = begin + tile * kTileRows + i;
      for (int64_t j = 0; j < kTileOuts && row < end && first + j < c.outs; j++) put(c, row, first + j, found[j]);
    }
  }
}

// Which outputs of which rows are one share of a layer.
struct Cut {
  // Groups of outputs, groups in a share, shares of a block of rows. The first `large` shares have `large_size` groups.
  int64_t groups, size, shares, large, large_size;
  // All of them, and rows of a block.
  int64_t count, block;
};

INLINE bool is_few(int64_t rows) { return rows <= kFewRows; }

// Whether rows are so many that weights are laid out for them, and not the other way round.
INLINE bool lays_weights(int64_t rows, bool tiled) { return tiled && rows > kLaidRows; }

// Rows of a share: as many as leave some shares to every thread.
INLINE int64_t rows_of_share(int64_t rows, int64_t groups, int64_t threads) {
  int64_t most = kMostRows;
  while (most > kLeastRows && (rows + most - 1) / most * groups < 3 * threads) most /= 2;
  return most;
}

INLINE Cut cut_products(int64_t rows, int64_t outs, int64_t ins, int64_t threads) {
  const int64_t each = outs_at_once(ins), groups = (outs + each - 1) / each, block = rows_of_share(rows, groups, threads);
  return {groups, 1, groups, 0, 0, (rows + block - 1) / block * groups, block};
}

INLINE Cut cut_linear(int64_t rows, int64_t outs, int64_t ins, int64_t threads, bool tiled) {
  if (lays_weights(rows, tiled)) return cut_products(rows, outs, ins, threads);
  int64_t each = tiled ? kSide : is_few(rows) ? kOuts : kTileOuts, groups = (outs + each - 1) / each;
  // Memory is read fastest in long stretches; a thread that is held up by another process leaves the last shares, which
  // are small, to the others.
  bool reads = rows <= (tiled ? kSums * kSide : kFewRows);
  int64_t large_size = reads ? groups * kLargePart / (4 * threads) : 0, large = large_size > 1 ? threads : 0;
  int64_t left = groups - large * large_size;
  int64_t size = left / (threads * kSmall) + 1, shares = large + (left + size - 1) / size;
  int64_t block = tiled ? kTiledRows : kRows;
  return {groups, size, shares, large, large_size, (rows + block - 1) / block * shares, block};
}

struct Groups {
  int64_t begin, end;
};

INLINE Groups groups_of(const Cut& cut, int64_t share) {
  if (share < cut.large) return {share * cut.large_size, (share + 1) * cut.large_size};
  int64_t begin = cut.large * cut.large_size + (share - cut.large) * cut.size;
  return {begin, begin + cut.size < cut.groups ? begin + cut.size : cut.groups};
}

// Where the weights of a share end.
INLINE const uint16_t* end_of(const Linear& c, const Groups& part, int64_t each) {
  return c.weights + (part.end * each < c.outs ? part.end * each : c.outs) * c.weight_row;
}

// The weights that a share of few rows begins with.
void ask_ahead(const Linear& c, const Cut& cut, int64_t index) {
  if (c.tiled ? lays_weights(c.rows, true) : !is_few(c.rows)) return;
  Groups part = groups_of(cut, index % cut.shares);
  const int64_t each = c.tiled ? kSide : kOuts;
  const uint16_t *w = c.weights + part.begin * each * c.weight_row, *end = end_of(c, part, each);
  for (int64_t i = 0; i < kAhead && w + i < end; i += kLine) __builtin_prefetch(w + i);
}

// Rows begin..end of 16 outputs. `more`: the weights of the next 16 follow.
void tile_outs(const Linear& c, int64_t first, int64_t begin, int64_t end, bool more) {
  const int64_t outs = c.outs - first < kSide ? c.outs - first : kSide, apart = words_of(c.ins);
  const Outs w{c.weights + first * c.weight_row, c.weight_row, outs, c.ins};
  const uint32_t* laid = reinterpret_cast<const uint32_t*>(c.x);
  alignas(64) float sums[kSums * kSide * kSide];
  for (int64_t from = begin; from < end; from += kSums * kSide) {
    const int64_t count = end - from < kSums * kSide ? end - from : kSums * kSide;
    // Rows after the first read weights that are in the cache.
    const uint16_t* ahead = more && from == begin ? w.weights + kSide * w.weight_row : nullptr;
    kTiled[(count + kSide - 1) / kSide](w, laid + from / kSide * apart, ahead, sums);
    for (int64_t row = 0; row < count; row += kSide)
      put_tile(sums + row * kSide, c.bias ? c.bias + first : nullptr, count - row < kSide ? count - row : kSide, outs,
               c.y + (from + row) * c.y_row + first, c.y_row);
  }
}

void tile_share(const Linear& c, const Cut& cut, int64_t index) {
  const int64_t begin = index / cut.shares * cut.block, end = begin + cut.block < c.rows ? begin + cut.block : c.rows;
  const Groups part = groups_of(cut, index % cut.shares);
  open_tiles();
  for (int64_t group = part.begin; group < part.end; group++)
    tile_outs(c, group * kSide, begin, end, (group + 2) * kSide <= c.outs && group + 1 < part.end);
  close_tiles();
}

// `own`: memory of this thread for layers that lay out weights.
void linear_share(const Linear& c, const Cut& cut, int64_t index, char* own) {
  int64_t begin = index / cut.shares * cut.block, end = begin + cut.block < c.rows ? begin + cut.block : c.rows;
  if (lays_weights(c.rows, c.tiled)) {
    const int64_t each = outs_at_once(c.ins), first = index % cut.shares * each;
    const int64_t last = first + each < c.outs ? first + each : c.outs;
    const uint16_t* x = reinterpret_cast<const uint16_t*>(c.x);
    return product_share({x, c.weights, c.bias, c.y, c.weight_row, c.y_row, c.ins, first, last, begin, end},
                         reinterpret_cast<uint16_t*>(own));
  }
  if (c.tiled) return tile_share(c, cut, index);
  Groups part = groups_of(cut, index % cut.shares);
  if (is_few(c.rows)) {
    for (int64_t group = part.begin; group < part.end; group++) kFew[c.rows](c, group * kOuts, end_of(c, part, kOuts));
    return;
  }
  alignas(64) float mine[kOwn];
  for (int64_t group = part.begin; group < part.end; group++) many_rows(c, group * kTileOuts, begin, end, mine);
}

}  // namespace
