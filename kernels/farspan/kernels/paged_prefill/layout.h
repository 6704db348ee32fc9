// Queries, keys and values on their way into tiles, and outputs out of them.
//
// What is not there, and slots that no row of a share sees, are zeros: they may be NaN where they lie.
#pragma once

#include "case.h"

#ifdef HAS_TILES

namespace {

INLINE __mmask32 first_of(int64_t count) { return count >= 32 ? ~0u : (1u << count) - 1; }

INLINE __m512i load_some(const uint16_t* from, int64_t count) {
  return count >= 32 ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16(first_of(count), from);
}

// Pass `pass` of a share: rows go through the heads of one query, then through the next.
void lay_queries(const Case& c, const Pass& pass, int64_t group, uint16_t* to) {
  const int64_t segment = c.piece_segment[pass.piece], begin = c.starts[segment] + c.piece_begin[pass.piece];
  const int64_t rows = c.piece_count[pass.piece] * c.heads, all = key_depths(c);
  const uint16_t* from[kPass];
  for (int64_t i = 0; i < kPass; i++) {
    const int64_t row = pass.row + i;
    const int64_t query = begin + row / c.heads, head = group * c.heads + row % c.heads;
    from[i] = row < rows ? c.q + query * c.q_row + head * c.q_head : nullptr;
  }
  for (int64_t depth = 0; depth < all; depth++, to += kTile) {
    __m512i x[kPass];
    for (int64_t i = 0; i < kPass; i++)
      x[i] = from[i] ? load_some(from[i] + depth * kDepth, c.qk_dim - depth * kDepth) : _mm512_setzero_si512();
    turn_tile(x);
    std::memcpy(to, x, sizeof x);
  }
}

// Where the slots of a block lie, for a group; those outside begin..end nowhere.
struct Slots {
  const uint16_t *keys[kBlock], *values[kBlock];
};

INLINE void find_slots(const Case& c, const int32_t* table, int64_t group, int64_t block, int64_t begin, int64_t end,
                       Slots* found) {
  int64_t slot = most(begin, block * kBlock), j = 0;
  const int64_t stop = least(end, (block + 1) * kBlock);
  for (; j < slot - block * kBlock; j++) found->keys[j] = found->values[j] = nullptr;
  while (slot < stop) {
    const int64_t page = table[slot / c.slots], first = slot % c.slots, count = least(c.slots - first, stop - slot);
    const uint16_t* key = c.keys + page * c.key_page + first * c.key_slot + group * c.key_group;
    const uint16_t* value = c.values + page * c.value_page + first * c.value_slot + group * c.value_group;
    for (int64_t i = 0; i < count; i++, j++, key += c.key_slot, value += c.value_slot)
      found->keys[j] = key, found->values[j] = value;
    slot += count;
  }
  for (; j < kBlock; j++) found->keys[j] = found->values[j] = nullptr;
}

// Asks for the memory of slots begin..end of a block that is laid out later: pages lie anywhere, which the processor
// does not foresee.
INLINE void fetch_slots(const Case& c, const Slots& slots, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; j++) {
    if (!slots.keys[j]) continue;
    for (int64_t i = 0; i < c.qk_dim; i += kDepth) __builtin_prefetch(slots.keys[j] + i, 0, 2);
    for (int64_t i = 0; i < c.v_dim; i += kDepth) __builtin_prefetch(slots.values[j] + i, 0, 2);
  }
}

// Steps begin..end of a block.
void lay_keys(const Case& c, const Slots& slots, int64_t begin, int64_t end, uint16_t* to) {
  const int64_t all = key_depths(c);
  for (int64_t j = begin * kStep; j < end * kStep; j++) {
    uint16_t* row = to + j / kSide * all * kTile + j % kSide * kDepth;
    const uint16_t* from = slots.keys[j];
    for (int64_t depth = 0; depth < all; depth++) {
      const __m512i x = from ? load_some(from + depth * kDepth, c.qk_dim - depth * kDepth) : _mm512_setzero_si512();
      _mm512_store_si512(row + depth * kTile, x);
    }
  }
}

// 32 slots by 32 dims: two tiles of 16 dims by 16 pairs of slots.
INLINE void lay_value_tiles(const uint16_t* const* slots, int64_t dim, int64_t count, uint16_t* to) {
  __m512i low[kSide], high[kSide];
  for (int64_t i = 0; i < kSide; i++) {
    const uint16_t *even = slots[2 * i], *odd = slots[2 * i + 1];
    const __m512i a = even ? load_some(even + dim, count) : _mm512_setzero_si512();
    const __m512i b = odd ? load_some(odd + dim, count) : _mm512_setzero_si512();
    // Of every eight dims the first four, and the others.
    low[i] = _mm512_unpacklo_epi16(a, b), high[i] = _mm512_unpackhi_epi16(a, b);
  }
  turn_tile(low), turn_tile(high);
  for (int64_t i = 0; i < kSide; i++) {
    const int64_t at = i / 4 * 8 + i % 4;
    _mm512_store_si512(to + at * kDepth, low[i]), _mm512_store_si512(to + (at + 4) * kDepth, high[i]);
  }
}

void lay_values(const Case& c, const Slots& slots, int64_t begin, int64_t end, uint16_t* to) {
  const int64_t all = value_tiles(c);
  for (int64_t step = begin; step < end; step++)
    for (int64_t tile = 0; tile < all; tile += 2) {
      const int64_t dim = tile * kSide;
      lay_value_tiles(slots.values + step * kStep, dim, c.v_dim - dim, to + (step * all + tile) * kTile);
    }
}

#define HALF __attribute__((target("avx512bf16")))

// The outputs of a pass, dims by rows, to where they belong.
HALF void put_outs(const Case& c, const Pass& pass, int64_t group, const float* outs) {
  const int64_t segment = c.piece_segment[pass.piece], begin = c.starts[segment] + c.piece_begin[pass.piece];
  const int64_t rows = least(c.piece_count[pass.piece] * c.heads - pass.row, kPass);
  const int64_t tiles = value_tiles(c), all = c.groups * c.heads;
  float shares[kPass];
  uint16_t* to[kPass];
  for (int64_t i = 0; i < rows; i++) {
    const int64_t row = pass.row + i, place = (begin + row / c.heads) * all + group * c.heads + row % c.heads;
    const bool blind = pass.sum[i] == 0;
    shares[i] = blind ? 0 : 1 / pass.sum[i], to[i] = c.out + place * c.v_dim;
    c.lse[place] = blind ? -__builtin_inff() : pass.top[i] * 0.693147181f + __builtin_logf(pass.sum[i]);
  }
  for (int64_t tile = 0; tile < tiles; tile++, outs += kSums) {
    __m512 x[kPass];
    std::memcpy(x, outs, sizeof x);
    turn_tile(x);
    const __mmask16 some = static_cast<__mmask16>(first_of(most(least(c.v_dim - tile * kSide, kSide), 0)));
    for (int64_t i = 0; i < rows; i++) {
      const __m256bh made = _mm512_cvtneps_pbh(x[i] * shares[i]);
      _mm256_mask_storeu_epi16(to[i] + tile * kSide, some, reinterpret_cast<const __m256i&>(made));
    }
  }
}

}  // namespace
#endif
