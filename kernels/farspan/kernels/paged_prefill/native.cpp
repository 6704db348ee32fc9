// Attention of the tokens of prompts over pages by matrix tiles, on a CPU. Contract: contract.py.
//
// A share is one key head and some queries with all heads that read it: keys and values of a block are laid out once
// for all of them. A pass of 16 rows goes over a block step by step, its outputs in tiles: while vectors turn the
// scores of a step into probabilities, tiles multiply for the next one and the one before, one product for every few
// instructions: products one after the other would stop the vectors, which use the same port.
//
// Steps begin at multiples of their size and every row is computed by itself: its bits depend neither on the rows
// beside it nor on where a prompt was cut. No Python and no torch in here: numbers and addresses come in, nothing is
// allocated.

#include "softmax.h"

#ifdef HAS_TILES

namespace {

// Outputs of 2 or 4 times 16 dims stay in tiles.
template <int64_t Tiles>
TILES INLINE void load_outs(const float* outs) {
  written();
  _tile_loadd(0, outs, 64);
  _tile_loadd(1, outs + kSums, 64);
  if constexpr (Tiles > 2) {
    _tile_loadd(2, outs + 2 * kSums, 64);
    _tile_loadd(3, outs + 3 * kSums, 64);
  }
}

template <int64_t Tiles>
TILES INLINE void store_outs(float* outs) {
  _tile_stored(0, outs, 64);
  _tile_stored(1, outs + kSums, 64);
  if constexpr (Tiles > 2) {
    _tile_stored(2, outs + 2 * kSums, 64);
    _tile_stored(3, outs + 3 * kSums, 64);
  }
}

template <int64_t Tiles>
TILES void shrink_outs(const float* shrink, float* outs) {
  store_outs<Tiles>(outs);
  const __m512 by = _mm512_load_ps(shrink);
  for (int64_t i = 0; i < Tiles * kSide; i++) _mm512_store_ps(outs + i * kPass, _mm512_load_ps(outs + i * kPass) * by);
  load_outs<Tiles>(outs);
}

template <int64_t Tiles>
TILES INLINE void add_values(const uint16_t* values, const uint16_t* probs) {
  _tile_loadd(6, probs, 64);
  _tile_loadd(7, values, 64);
  _tile_dpbf16ps(0, 7, 6);
  _tile_loadd(7, values + kTile, 64);
  _tile_dpbf16ps(1, 7, 6);
  if constexpr (Tiles > 2) {
    _tile_loadd(7, values + 2 * kTile, 64);
    _tile_dpbf16ps(2, 7, 6);
    _tile_loadd(7, values + 3 * kTile, 64);
    _tile_dpbf16ps(3, 7, 6);
  }
}

// What tiles multiply while vectors compute probabilities: the values of the step before go to the outputs, where
// there is one, and the keys of the next step to scores.
struct Products {
  const uint16_t *probs, *values, *queries, *keys;
  int64_t depths;
};

// One product of 32 slots by 16 rows: keys 16 by 16, or 16 dims of values.
template <int64_t Tiles, int64_t I>
TILES INLINE void multiply(const Products& m) {
  if constexpr (I < Tiles) {
    if (!m.values) return;
    if constexpr (I == 0) _tile_loadd(6, m.probs, 64);
    _tile_loadd(7, m.values + I * kTile, 64);
    if constexpr (I == 0) _tile_dpbf16ps(0, 7, 6);
    if constexpr (I == 1) _tile_dpbf16ps(1, 7, 6);
    if constexpr (I == 2) _tile_dpbf16ps(2, 7, 6);
    if constexpr (I == 3) _tile_dpbf16ps(3, 7, 6);
  } else {
    constexpr int64_t depth = (I - Tiles) / 2;
    if (depth >= m.depths) return;
    if constexpr ((I - Tiles) % 2 == 0) {
      _tile_loadd(6, m.queries + depth * kTile, 64);
      _tile_loadd(7, m.keys + depth * kTile, 64);
      _tile_dpbf16ps(4, 7, 6);
    } else {
      _tile_loadd(7, m.keys + (m.depths + depth) * kTile, 64);
      _tile_dpbf16ps(5, 7, 6);
    }
  }
}

TILES INLINE void begin_scores() {
  written();
  _tile_zero(4);
  _tile_zero(5);
}

// Depths from `first` on, and the scores out of their tiles.
TILES INLINE void finish_scores(const Products& m, int64_t first, float* scores) {
  for (int64_t depth = first; depth < m.depths; depth++) {
    _tile_loadd(6, m.queries + depth * kTile, 64);
    _tile_loadd(7, m.keys + depth * kTile, 64);
    _tile_dpbf16ps(4, 7, 6);
    _tile_loadd(7, m.keys + (m.depths + depth) * kTile, 64);
    _tile_dpbf16ps(5, 7, 6);
  }
  if (!m.depths) return;
  _tile_stored(4, scores, 64);
  _tile_stored(5, scores + kSums, 64);
}

constexpr int64_t kPairs = kStep / 2;

// The probabilities of a step, pair by pair, with a product beside each. Returns their sum.
template <int64_t Tiles, int64_t I = 0>
TILES INLINE __m512 find_probs(const float* scores, __m512 unit, __m512 pivot, __m512 sum, uint16_t* probs,
                               const Products& m) {
  if constexpr (I == kPairs) {
    return sum;
  } else {
    multiply<Tiles, I>(m);
    const __m512i pair = find_pair(scores + 2 * I * kPass, unit, pivot, &sum);
    _mm512_store_si512(probs + 2 * I * kPass, pair);
    return find_probs<Tiles, I + 1>(scores, unit, pivot, sum, probs, m);
  }
}

// The passes of a share, and its turns in order.
class Share {
 public:
  Share(const Case& c, int64_t share, int64_t group, const Place& place) : c_(c), p_(place), group_(group) {
    first_piece_ = c.share_pieces[share], end_piece_ = c.share_pieces[share + 1];
    common_ = c.share_common[share] / kBlock;
    const int64_t queries = key_depths(c) * kTile;
    for (int64_t piece = first_piece_; piece < end_piece_; piece++)
      for (int64_t i = 0; i < passes_of(c.piece_count[piece], c.heads); i++, passes_++) {
        begin_pass(piece, i * kPass, p_.passes + passes_);
        lay_queries(c, p_.passes[passes_], group, p_.queries + passes_ * queries);
      }
    std::memset(p_.outs, 0, passes_ * value_tiles(c) * kSums * sizeof(float));
    next_piece_ = first_piece_ - (common_ > 0);
    next_run();
  }

  int64_t passes() const { return passes_; }

  // False: that was all.
  bool next(Turn* turn) {
    for (; block_ < end_block_; block_++, pass_ = first_pass_, laid_ = false)
      while (pass_ < end_pass_) {
        turn->pass = pass_++, turn->block = block_;
        if (!cut(turn)) continue;
        if (!laid_) lay_block();
        fetch_some();
        return true;
      }
    return next_run() && next(turn);
  }

 private:
  void begin_pass(int64_t piece, int64_t row, Pass* pass) {
    const int64_t segment = c_.piece_segment[piece], rows = c_.piece_count[piece] * c_.heads;
    pass->piece = piece, pass->row = row;
    for (int64_t i = 0; i < kPass; i++) {
      const int64_t query = c_.piece_begin[piece] + least(row + i, rows - 1) / c_.heads;
      const int64_t last = c_.pasts[segment] + (c_.causal ? query : -1), seen = c_.window ? last - c_.window + 1 : 0;
      pass->last[i] = static_cast<int32_t>(last), pass->first[i] = static_cast<int32_t>(most(seen, c_.lows[segment]));
      pass->top[i] = kNone, pass->sum[i] = 0;
    }
  }

  // What all pieces have in common, then each piece by itself.
  bool next_run() {
    if (next_piece_ == end_piece_) return false;
    const bool all = next_piece_ < first_piece_;
    first_pass_ = all || next_piece_ == first_piece_ ? 0 : end_pass_;
    end_pass_ = all ? passes_ : first_pass_ + passes_of(c_.piece_count[next_piece_], c_.heads);
    next_piece_++;
    begin_ = p_.passes[first_pass_].first[0], end_ = p_.passes[end_pass_ - 1].last[kPass - 1] + 1;
    table_ = c_.tables + c_.piece_segment[p_.passes[first_pass_].piece] * c_.table_row;
    block_ = all ? begin_ / kBlock : most(begin_ / kBlock, common_);
    end_block_ = all ? common_ : (end_ - 1) / kBlock + 1;
    pass_ = first_pass_, laid_ = false, found_ = -1;
    return true;
  }

  // The steps of a block that rows of a pass see.
  bool cut(Turn* turn) const {
    const Pass& pass = p_.passes[turn->pass];
    const int64_t from = turn->block * kBlock, low = pass.first[0] - from, high = pass.last[kPass - 1] - from;
    if (high < 0 || low >= kBlock) return false;
    turn->begin = low > 0 ? low / kStep : 0, turn->end = least(high / kStep + 1, kSteps);
    return true;
  }

  void lay_block() {
    if (found_ != block_) find_slots(c_, table_, group_, block_, begin_, end_, &slots_);
    const int64_t from = block_ * kBlock, begin = most(begin_ - from, 0) / kStep;
    const int64_t end = least((end_ - from + kStep - 1) / kStep, kSteps);
    lay_keys(c_, slots_, begin, end, p_.keys);
    lay_values(c_, slots_, begin, end, p_.values);
    laid_ = true, found_ = block_ + 1 < end_block_ ? block_ + 1 : -1, fetched_ = 0;
    if (found_ >= 0) find_slots(c_, table_, group_, found_, begin_, end_, &slots_);
  }

  // Of the next block, as much with every pass that all of it is asked for.
  void fetch_some() {
    if (found_ < 0 || fetched_ == kBlock) return;
    const int64_t count = kBlock / (end_pass_ - first_pass_) + 1, end = least(fetched_ + count, kBlock);
    fetch_slots(c_, slots_, fetched_, end);
    fetched_ = end;
  }

  const Case& c_;
  const Place& p_;
  int64_t group_, first_piece_, end_piece_, next_piece_, common_, passes_ = 0;
  int64_t first_pass_ = 0, end_pass_ = 0, pass_ = 0, block_ = 0, end_block_ = 0, begin_ = 0, end_ = 0;
  // The block that `slots_` is of, and how much of it is asked for.
  int64_t found_ = -1, fetched_ = 0;
  const int32_t* table_ = nullptr;
  bool laid_ = false;
  Slots slots_;
};

// What stands for 1; rows that have seen nothing yet have no scores but -inf.
INLINE __m512 pivot_of(__m512 top) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(top, _mm512_set1_ps(kNone), _CMP_NEQ_UQ), top);
}

// Rows that have seen nothing before, or whose sum is too large, or no number.
INLINE __mmask16 is_far(__m512 top, __m512 sum) {
  return _mm512_cmp_ps_mask(top, _mm512_set1_ps(kNone), _CMP_EQ_OQ) |
         _mm512_cmp_ps_mask(sum, _mm512_set1_ps(kMost), _CMP_NLT_UQ);
}

// Scores, probabilities, and the first outputs. Returns at which steps outputs shrink, as bits.
template <int64_t Tiles>
TILES uint32_t compute_turn(const Case& c, const Place& p, const Turn& turn) {
  const int64_t all = key_depths(c), tiles = value_tiles(c);
  // Scores times `unit` are powers of 2.
  const bool bends = c.softcap > 0 || !(c.scale > 0);
  const __m512 unit = _mm512_set1_ps(bends ? 1.0f : c.scale * kLog2);
  Pass& pass = p.passes[turn.pass];
  float* outs = p.outs + turn.pass * tiles * kSums;
  __m512 top = _mm512_load_ps(pass.top), sum = _mm512_load_ps(pass.sum);
  uint32_t shrunk = 0;
  Products m{nullptr, nullptr, p.queries + turn.pass * all * kTile, p.keys + turn.begin * 2 * all * kTile, all};
  load_outs<Tiles>(outs);
  begin_scores();
  finish_scores(m, 0, p.scores[turn.begin % 2]);
  for (int64_t step = turn.begin; step < turn.end; step++) {
    const int64_t slot = turn.block * kBlock + step * kStep;
    float* scores = p.scores[step % 2];
    uint16_t* probs = p.probs + step * kTile;
    m.keys += 2 * all * kTile, m.depths = step + 1 < turn.end ? all : 0;
    if (bends) bend_scores(c, scores);
    if (pass.last[0] < slot + kStep - 1 || pass.first[kPass - 1] > slot) hide_scores(pass, slot, scores);
    begin_scores();
    __m512 total = find_probs<Tiles>(scores, unit, pivot_of(top), sum, probs, m);
    finish_scores(m, (kPairs - Tiles) / 2, p.scores[(step + 1) % 2]);
    if (__mmask16 far = is_far(top, total); __builtin_expect(far, 0)) {
      const __m512 high = greatest(scores) * unit;
      far &= _mm512_cmp_ps_mask(high, top, _CMP_GT_OQ);
      const __m512 shrink = _mm512_mask_blend_ps(far, _mm512_set1_ps(1.0f), power(top - high));
      _mm512_store_ps(p.shrinks + step * kPass, shrink);
      top = _mm512_mask_blend_ps(far, top, high), sum *= shrink, shrunk |= 1u << step;
      shrink_outs<Tiles>(p.shrinks + step * kPass, outs);
      total = find_probs<Tiles>(scores, unit, pivot_of(top), sum, probs, Products{});
    }
    sum = total, m.probs = probs, m.values = p.values + step * tiles * kTile;
  }
  written();
  add_values<Tiles>(m.values, m.probs);
  store_outs<Tiles>(outs);
  _mm512_store_ps(pass.top, top);
  _mm512_store_ps(pass.sum, sum);
  return shrunk;
}

// The outputs from dim 16 * `first` on.
template <int64_t Tiles>
TILES void more_outs(const Case& c, const Place& p, const Turn& turn, uint32_t shrunk, int64_t first) {
  const int64_t tiles = value_tiles(c);
  float* outs = p.outs + (turn.pass * tiles + first) * kSums;
  load_outs<Tiles>(outs);
  for (int64_t step = turn.begin; step < turn.end; step++) {
    if (shrunk >> step & 1) shrink_outs<Tiles>(p.shrinks + step * kPass, outs);
    add_values<Tiles>(p.values + (step * tiles + first) * kTile, p.probs + step * kTile);
  }
  store_outs<Tiles>(outs);
}

void compute_share(const Case& c, int64_t share, int64_t group, char* scratch) {
  Place p;
  carve(c, scratch, &p);
  Share mine(c, share, group, p);
  // Numbers too small for bf16's exponents are nothing, and slow.
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | 0x8040);
  open_tiles();
  const int64_t tiles = value_tiles(c);
  for (Turn turn; mine.next(&turn);) {
    const uint32_t shrunk = (tiles > 2 ? compute_turn<4> : compute_turn<2>)(c, p, turn);
    for (int64_t first = 4; first < tiles; first += 4)
      (tiles - first > 2 ? more_outs<4> : more_outs<2>)(c, p, turn, shrunk, first);
  }
  close_tiles();
  _mm_setcsr(before);
  for (int64_t i = 0; i < mine.passes(); i++) put_outs(c, p.passes[i], group, p.outs + i * tiles * kSums);
}

struct Shared {
  const Case& c;
  int64_t bytes;
};

void work(const void* context, int64_t, int64_t index, int64_t thread) {
  const Shared& s = *static_cast<const Shared*>(context);
  compute_share(s.c, index / s.c.groups, index % s.c.groups, s.c.scratch + thread * s.bytes);
}

}  // namespace

extern "C" {

// Whether this process may use what is compiled here.
int64_t farspan_has_tiles() {
  static const bool given = ask_for_tiles();
  return given;
}

// Bytes that each thread works in; `scratch` begins at a multiple of 64.
int64_t farspan_scratch_bytes(const Case* c) {
  Place place;
  return carve(*c, nullptr, &place) - static_cast<char*>(nullptr);
}

void farspan_attend_prompts(const Case* c) {
  const Shared shared{*c, farspan_scratch_bytes(c)};
  const int64_t counts[] = {c->shares * c->groups};
  c->team(work, nullptr, &shared, 1, counts, c->threads);
}
}

#else

extern "C" {

int64_t farspan_has_tiles() { return 0; }
int64_t farspan_scratch_bytes(const Case*) { return 0; }
void farspan_attend_prompts(const Case*) {}
}
#endif
