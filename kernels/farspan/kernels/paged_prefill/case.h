// What a call is given, and what of it lies where.
#pragma once

#include <cstdint>
#include <cstring>

#include "../team_call.h"
#include "../tile_registers.h"

extern "C" {

// Field for field the Structure in native.py. Strides count elements.
struct Case {
  const uint16_t *q, *keys, *values;
  // Of each segment; `lows` are the first slots that its queries may see.
  const int32_t *starts, *pasts, *lows, *tables;
  // Queries begin..begin+count of a segment are a piece; shares are pieces in order, and what they have in common.
  const int32_t *piece_segment, *piece_begin, *piece_count, *share_pieces, *share_common;
  uint16_t* out;
  float* lse;
  char* scratch;
  // team/native.cpp
  farspan_team team;
  int64_t shares, groups, heads, qk_dim, v_dim, slots, passes, threads, window, causal;
  int64_t q_row, q_head, key_page, key_slot, key_group, value_page, value_slot, value_group, table_row;
  float scale, softcap;
};
}

namespace {

// Query rows of a pass, the columns of a tile; slots of a step, the depth of a product; slots of a block, which are
// laid out at once. Steps and blocks begin at multiples of their size.
constexpr int64_t kPass = kSide, kStep = kDepth, kBlock = 256, kSteps = kBlock / kStep;
constexpr int64_t kTile = kSide * kDepth, kSums = kSide * kSide;

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t depths(int64_t dim) { return (dim + kDepth - 1) / kDepth; }
INLINE int64_t passes_of(int64_t count, int64_t heads) { return (count * heads + kPass - 1) / kPass; }

// 16 query rows of one piece.
struct Pass {
  // Visible slots of each row: from first to last.
  alignas(64) int32_t first[kPass], last[kPass];
  // The exponent that stands for 1, as a power of 2, and the sum of what is beside it.
  alignas(64) float top[kPass], sum[kPass];
  int64_t piece, row;
};

// One pass over the steps begin..end of a block.
struct Turn {
  int64_t pass, block, begin, end;
};

// The memory of a thread. All of it lies in tiles: keys slots by dims, values dims by slots, queries and probabilities
// in pairs of dims or slots by rows, scores slots by rows, outputs dims by rows.
struct Place {
  Pass* passes;
  uint16_t *queries, *keys, *values, *probs;
  // Of two steps: one is computed while the other is used.
  float *scores[2], *outs;
  // By what the outputs of each row are multiplied before a step of a block, where they are.
  float* shrinks;
};

INLINE int64_t key_depths(const Case& c) { return depths(c.qk_dim); }
// Tiles of 16 dims of a value: an even number.
INLINE int64_t value_tiles(const Case& c) { return 2 * depths(c.v_dim); }

struct Carver {
  char* at;
  char* take(int64_t bytes) {
    char* mine = at;
    at += (bytes + 63) / 64 * 64;
    return mine;
  }
};

// Where everything lies from `at` on; returns the end.
INLINE char* carve(const Case& c, char* at, Place* p) {
  Carver carver{at};
  auto words = [&](int64_t count) { return reinterpret_cast<uint16_t*>(carver.take(count * 2)); };
  auto floats = [&](int64_t count) { return reinterpret_cast<float*>(carver.take(count * 4)); };
  for (float*& scores : p->scores) scores = floats(kStep * kPass);
  p->probs = words(kBlock * kPass), p->shrinks = floats(kSteps * kPass);
  p->keys = words(kBlock * key_depths(c) * kDepth), p->values = words(kBlock * value_tiles(c) * kSide);
  p->queries = words(c.passes * kPass * key_depths(c) * kDepth);
  p->outs = floats(c.passes * kPass * value_tiles(c) * kSide);
  p->passes = reinterpret_cast<Pass*>(carver.take(c.passes * sizeof(Pass)));
  return carver.at;
}

}  // namespace
