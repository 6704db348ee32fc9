// Linear layers over many rows by the matrix tiles of processors that have them (AMX), in bf16.
//
// Rows are read as they lie: a tile is 16 rows by 32 inputs. Weights are what is laid out for it, once for many rows: pairs
// of inputs of 16 outputs side by side, in memory of the thread. An output is summed in the order of tiles.h.
#pragma once

#include "tiles.h"

namespace {

// Rows of two tiles and outputs of two; outputs whose weights lie ready at once, in the second cache; rows of a share.
constexpr int64_t kPairs = 2 * kSide, kMostOuts = 128, kLaidBytes = 1 << 19, kMostRows = 1024, kLeastRows = 128;

// Outputs of a share.
INLINE int64_t outs_at_once(int64_t ins) {
  const int64_t fit = kLaidBytes / (padded(ins) * 2) / kPairs * kPairs;
  return fit < kPairs ? kPairs : fit > kMostOuts ? kMostOuts : fit;
}

// Bytes of a thread: weights that are laid out, and rows that are not whole tiles.
INLINE int64_t own_bytes(int64_t ins) { return (outs_at_once(ins) + kPairs) * padded(ins) * 2; }

// Rows `begin` to `end` of outputs `first` to `last` of a layer, x as it lies.
struct Product {
  const uint16_t *x, *weights, *bias;
  uint16_t* y;
  int64_t x_row, weight_row, y_row, ins, first, last, begin, end;
};

}  // namespace

#ifdef HAS_TILES

namespace {

// Weights of `outs` outputs, tile after tile of 16 outputs by 32 inputs; those that are not there are zero.
void lay_outs(const Product& p, uint16_t* to) {
  const int64_t blocks = padded(p.ins) / kDepth, outs = p.last - p.first;
  for (int64_t first = 0; first < outs; first += kSide)
    for (int64_t block = 0; block < blocks; block++, to += kSide * kDepth) {
      const int64_t left = p.ins - block * kDepth, size = left < kDepth ? left : kDepth;
      lanes x[kSide];
      for (int64_t j = 0; j < kSide; j++) {
        x[j] = lanes{};
        if (first + j < outs)
          std::memcpy(x + j, p.weights + (p.first + first + j) * p.weight_row + block * kDepth, size * 2);
      }
      turn_tile(x);
      std::memcpy(to, x, sizeof x);
    }
}

// Sums of 32 rows by 32 outputs, in four tiles. `laid`: the outputs' weights, those of the second 16 `apart` behind.
TILES void sum_pairs(const uint16_t* x, int64_t row, const uint16_t* laid, int64_t apart, int64_t blocks, float* sums) {
  const uint16_t* lower = x + kSide * row;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t block = 0; block < blocks; block++, x += kDepth, lower += kDepth, laid += kSide * kDepth) {
    _tile_loadd(4, x, row * 2);
    _tile_loadd(6, laid, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, laid + apart, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, lower, row * 2);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, 128);
  _tile_stored(1, sums + kSide, 128);
  _tile_stored(2, sums + kSide * kPairs, 128);
  _tile_stored(3, sums + kSide * kPairs + kSide, 128);
  written();
}

void put_pairs(const Product& p, const float* sums, int64_t row, int64_t rows, int64_t first, int64_t outs) {
  alignas(64) float bias[kPairs] = {};
  for (int64_t j = 0; p.bias && j < outs; j++) bias[j] = widen_one(p.bias[first + j]);
  for (int64_t i = 0; i < rows; i++, sums += kPairs) {
    uint16_t made[kPairs];
#pragma omp simd
    for (int64_t j = 0; j < kPairs; j++) made[j] = narrow(sums[j] + bias[j]);
    std::memcpy(p.y + (row + i) * p.y_row + first, made, outs * 2);
  }
}

// `own`: memory of this thread, own_bytes of it.
void product_share(const Product& p, uint16_t* own) {
  const int64_t width = padded(p.ins), blocks = width / kDepth;
  uint16_t *laid = own, *edge = own + outs_at_once(p.ins) * width;
  alignas(64) float sums[kPairs * kPairs];
  lay_outs(p, laid);
  open_tiles();
  for (int64_t row = p.begin; row < p.end; row += kPairs) {
    const int64_t rows = p.end - row < kPairs ? p.end - row : kPairs;
    const uint16_t* x = p.x + row * p.x_row;
    int64_t x_row = p.x_row;
    if (rows < kPairs || width != p.ins) {
      std::memset(edge, 0, kPairs * width * 2);
      for (int64_t i = 0; i < rows; i++) std::memcpy(edge + i * width, x + i * x_row, p.ins * 2);
      x = edge, x_row = width;
    }
    written();
    for (int64_t first = p.first; first < p.last; first += kPairs) {
      const int64_t outs = p.last - first < kPairs ? p.last - first : kPairs;
      // Where only one tile of outputs is left, its sums stand for the second too, and nobody reads those.
      sum_pairs(x, x_row, laid + (first - p.first) * width, outs > kSide ? kSide * width : 0, blocks, sums);
      put_pairs(p, sums, row, rows, first, outs);
    }
  }
  close_tiles();
}

}  // namespace

#else
namespace {

INLINE void product_share(const Product&, uint16_t*) {}

}  // namespace
#endif
