// Linear layers over many rows by the matrix tiles of processors that have them (AMX), in bf16.
//
// A tile of rows is 16 of them by 32 inputs, and all that are multiplied lie tile after tile. Weights are laid out for
// many rows at once, in memory of the thread: pairs of inputs of 16 outputs side by side. An output is summed in the order
// of tiles.h.
#pragma once

#include "tiles.h"

namespace {

// Rows of two tiles and outputs of two; outputs whose weights lie ready at once, in the second cache; rows of a share.
constexpr int64_t kPairs = 2 * kSide, kMostOuts = 128, kLaidBytes = 1 << 20, kMostRows = 1024, kLeastRows = 128;

// Outputs of a share.
INLINE int64_t outs_at_once(int64_t ins) {
  const int64_t fit = kLaidBytes / (padded(ins) * 2) / kPairs * kPairs;
  return fit < kPairs ? kPairs : fit > kMostOuts ? kMostOuts : fit;
}

// Bytes of a thread: weights that are laid out.
INLINE int64_t own_bytes(int64_t ins) { return outs_at_once(ins) * padded(ins) * 2; }

// Rows `begin` to `end` of outputs `first` to `last` of a layer, x tile after tile.
struct Product {
  const uint16_t *x, *weights, *bias;
  uint16_t* y;
  int64_t weight_row, y_row, ins, first, last, begin, end;
};

}  // namespace

#ifdef HAS_TILES

namespace {

// Weights of outputs `first` to `last`, tile after tile of 16 outputs by 32 inputs; those that are not there are zero.
void lay_outs(const Product& p, uint16_t* to) {
  const int64_t width = padded(p.ins);
  for (int64_t first = p.first; first < p.last; first += kSide, to += kSide * width) {
    const int64_t outs = p.last - first < kSide ? p.last - first : kSide;
    const bool more = first + kSide < p.last;
    lay_rows(p.weights + first * p.weight_row, p.weight_row, outs, p.ins, reinterpret_cast<char*>(to), more);
  }
}

// One row to its place in tiles, zeros behind its last input.
void place_row(const uint16_t* from, int64_t ins, int64_t row, char* at) {
  char* to = at + row / kSide * padded(ins) * kSide * 2 + row % kSide * kDepth * 2;
  const int64_t whole = ins / kDepth * kDepth;
  for (int64_t i = 0; i < whole; i += kDepth, to += kSide * kDepth * 2) std::memcpy(to, from + i, kDepth * 2);
  if (whole == ins) return;
  std::memset(to, 0, kDepth * 2);
  std::memcpy(to, from + whole, (ins - whole) * 2);
}

// Sums of 32 rows by 32 outputs, in four tiles. What is read is more than the first cache holds, and is asked not to pass
// through it: 1.2 times as fast. Rows and weights of the second 16 lie `lower` and `apart` behind.
TILES void sum_pairs(const uint16_t* x, int64_t lower, const uint16_t* laid, int64_t apart, int64_t blocks, float* sums) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t block = 0; block < blocks; block++, x += kSide * kDepth, laid += kSide * kDepth) {
    _tile_stream_loadd(4, x, 64);
    _tile_stream_loadd(6, laid, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_stream_loadd(7, laid + apart, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_stream_loadd(5, x + lower, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, 128);
  _tile_stored(1, sums + kSide, 128);
  _tile_stored(2, sums + kSide * kPairs, 128);
  _tile_stored(3, sums + kSide * kPairs + kSide, 128);
  written();
}

// Sums are no denormal numbers, which this rounding would take for zero.
__attribute__((target("avx512bf16"))) void put_pairs(const Product& p, const float* sums, int64_t row, int64_t rows,
                                                     int64_t first, int64_t outs) {
  alignas(64) float bias[kPairs] = {};
  for (int64_t j = 0; p.bias && j < outs; j++) bias[j] = widen_one(p.bias[first + j]);
  const __m512 low = _mm512_load_ps(bias), high = _mm512_load_ps(bias + kSide);
  uint16_t* y = p.y + row * p.y_row + first;
  for (int64_t i = 0; i < rows; i++, sums += kPairs, y += p.y_row) {
    const __m512 a = _mm512_add_ps(_mm512_load_ps(sums), low), b = _mm512_add_ps(_mm512_load_ps(sums + kSide), high);
    const __m512bh made = _mm512_cvtne2ps_pbh(b, a);
    if (outs == kPairs)
      std::memcpy(y, &made, sizeof made);
    else
      std::memcpy(y, &made, outs * 2);
  }
}

// `laid`: memory of this thread, own_bytes of it.
void product_share(const Product& p, uint16_t* laid) {
  const int64_t width = padded(p.ins), blocks = width / kDepth;
  alignas(64) float sums[kPairs * kPairs];
  lay_outs(p, laid);
  open_tiles();
  for (int64_t row = p.begin; row < p.end; row += kPairs) {
    const int64_t rows = p.end - row < kPairs ? p.end - row : kPairs;
    for (int64_t first = p.first; first < p.last; first += kPairs) {
      const int64_t outs = p.last - first < kPairs ? p.last - first : kPairs;
      // Where only one tile of rows or outputs is left, its sums stand for the second too, and nobody reads those.
      sum_pairs(p.x + row * width, rows > kSide ? kSide * width : 0, laid + (first - p.first) * width,
                outs > kSide ? kSide * width : 0, blocks, sums);
      put_pairs(p, sums, row, rows, first, outs);
    }
  }
  close_tiles();
}

}  // namespace

#else
namespace {

INLINE void place_row(const uint16_t*, int64_t, int64_t, char*) {}
INLINE void product_share(const Product&, uint16_t*) {}

}  // namespace
#endif
