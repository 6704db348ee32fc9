// Linear layers by the matrix tiles of processors that have them (AMX), in bf16.
//
// Weights are read as they lie: a tile is 16 outputs by 32 inputs. Rows are what has to be laid out for it, once for all
// outputs of a layer: pairs of inputs of 16 rows side by side. An output is summed in one order however many rows there
// are: it does not depend on the rows beside it.
#pragma once

#include "vectors.h"

#include "../tile_registers.h"

namespace {

// Tiles of rows whose sums stay in registers, and rows over which the weights of a group stay in the second cache.
constexpr int64_t kSums = 4, kTiledRows = 128;

// Weights of 16 outputs; those that are not there, and what lies behind the last input, are zero.
struct Outs {
  const uint16_t* weights;
  int64_t weight_row, outs, ins;
};

typedef void (*tiled)(const Outs&, const uint32_t*, const uint16_t*, float*);

}  // namespace

#ifdef HAS_TILES

namespace {

constexpr int64_t kWords = kSide * kDepth / 2;

// Words of 16 rows that are laid out.
INLINE int64_t words_of(int64_t ins) { return padded(ins) / kDepth * kWords; }

// One row of a layer's inputs to its place.
void lay_row(const uint16_t* from, int64_t ins, int64_t row, char* at) {
  uint32_t* to = reinterpret_cast<uint32_t*>(at) + row / kSide * words_of(ins) + row % kSide;
  const int64_t pairs = ins / 2, all = padded(ins) / 2;
  for (int64_t i = 0; i < pairs; i++) std::memcpy(to + i * kSide, from + 2 * i, 4);
  for (int64_t i = pairs; i < all; i++) to[i * kSide] = 0;
  if (ins % 2) to[pairs * kSide] = from[ins - 1];
}

// 32 inputs of up to 16 rows as a tile: pairs of inputs of the rows side by side; what is not there is zero.
INLINE void lay_some(const uint16_t* from, int64_t apart, int64_t rows, int64_t size, char* at) {
  lanes x[kSide] = {};
  for (int64_t j = 0; j < rows; j++) std::memcpy(x + j, from + j * apart, size * 2);
  turn_tile(x);
  std::memcpy(at, x, sizeof x);
}

// The inputs of up to 16 rows to their place, as lay_row does it row by row; rows that are not there are zero. `more`: 16
// follow that will be read next; rows lie too far apart for the processor to foresee them.
void lay_rows(const uint16_t* from, int64_t apart, int64_t rows, int64_t ins, char* at, bool more) {
  const int64_t whole = rows == kSide ? ins / kDepth * kDepth : 0;
  for (int64_t first = 0; first < whole; first += kDepth, at += kWords * 4) {
    if (more)
      for (int64_t j = 0; j < kSide; j++) __builtin_prefetch(from + (kSide + j) * apart + first);
    lay_some(from + first, apart, kSide, kDepth, at);
  }
  for (int64_t first = whole; first < ins; first += kDepth, at += kWords * 4)
    lay_some(from + first, apart, rows, ins - first < kDepth ? ins - first : kDepth, at);
}

INLINE void copy_edge(const Outs& w, int64_t block, uint16_t* to) {
  const int64_t first = block * kDepth, size = w.ins - first < kDepth ? w.ins - first : kDepth;
  std::memset(to, 0, kSide * kDepth * sizeof *to);
  for (int64_t j = 0; j < w.outs; j++) std::memcpy(to + j * kDepth, w.weights + j * w.weight_row + first, size * 2);
}

// Sums of 16 outputs for `Tiles` times 16 rows, each tile output by output. `ahead`: weights that are asked for meanwhile.
template <int64_t Tiles>
TILES void sum_tiles(const Outs& w, const uint32_t* rows, const uint16_t* ahead, float* sums) {
  const int64_t blocks = padded(w.ins) / kDepth, whole = w.outs == kSide ? w.ins / kDepth : 0, apart = words_of(w.ins);
  alignas(64) uint16_t edge[kSide * kDepth];
  _tile_zero(0);
  if constexpr (Tiles > 1) _tile_zero(1);
  if constexpr (Tiles > 2) _tile_zero(2);
  if constexpr (Tiles > 3) _tile_zero(3);
  for (int64_t block = 0; block < blocks; block++, rows += kWords) {
    if (block < whole) {
      if (ahead)
        for (int64_t j = 0; j < kSide; j++) __builtin_prefetch(ahead + j * w.weight_row + block * kDepth);
      _tile_loadd(4, w.weights + block * kDepth, w.weight_row * 2);
    } else {
      copy_edge(w, block, edge);
      written();
      _tile_loadd(4, edge, 64);
    }
    _tile_loadd(5, rows, 64);
    _tile_dpbf16ps(0, 4, 5);
    if constexpr (Tiles > 1) {
      _tile_loadd(6, rows + apart, 64);
      _tile_dpbf16ps(1, 4, 6);
    }
    if constexpr (Tiles > 2) {
      _tile_loadd(7, rows + 2 * apart, 64);
      _tile_dpbf16ps(2, 4, 7);
    }
    if constexpr (Tiles > 3) {
      _tile_loadd(5, rows + 3 * apart, 64);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  _tile_stored(0, sums, 64);
  if constexpr (Tiles > 1) _tile_stored(1, sums + 256, 64);
  if constexpr (Tiles > 2) _tile_stored(2, sums + 512, 64);
  if constexpr (Tiles > 3) _tile_stored(3, sums + 768, 64);
  written();
}

// Sums of 16 outputs, output by output, to rows of bf16. `bias` may be null.
void put_tile(const float* sums, const uint16_t* bias, int64_t rows, int64_t outs, uint16_t* y, int64_t y_row) {
  lanes x[kSide];
  for (int64_t j = 0; j < kSide; j++) x[j] = load(sums + j * kSide) + (bias && j < outs ? widen_one(bias[j]) : 0.0f);
  turn_tile(x);
  for (int64_t row = 0; row < rows; row++) {
    alignas(64) float wide[kSide];
    uint16_t made[kSide];
    std::memcpy(wide, x + row, sizeof wide);
#pragma omp simd
    for (int64_t j = 0; j < kSide; j++) made[j] = narrow(wide[j]);
    std::memcpy(y + row * y_row, made, outs * 2);
  }
}

constexpr tiled kTiled[] = {nullptr, sum_tiles<1>, sum_tiles<2>, sum_tiles<3>, sum_tiles<4>};

}  // namespace

#else
// Nothing asks for them then.
namespace {

INLINE bool ask_for_tiles() { return false; }
INLINE void open_tiles() {}
INLINE void close_tiles() {}
INLINE int64_t words_of(int64_t) { return 0; }
INLINE void lay_row(const uint16_t*, int64_t, int64_t, char*) {}
INLINE void lay_rows(const uint16_t*, int64_t, int64_t, int64_t, char*, bool) {}
INLINE void put_tile(const float*, const uint16_t*, int64_t, int64_t, uint16_t*, int64_t) {}
constexpr tiled kTiled[kSums + 1] = {};

}  // namespace
#endif
