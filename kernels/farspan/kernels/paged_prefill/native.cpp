// Attention of the tokens of prompts over pages by matrix tiles, on a CPU. Contract: contract.py.
//
// A share is one key head and some queries with all heads that read it: keys and values of a block are laid out once
// for all of them. A pass of 32 rows over a block goes through three stages, scores, probabilities and output, and
// three turns are on their way at once: tiles multiply for one while vectors compute the probabilities of another.
//
// Blocks begin at multiples of their size and every row is computed by itself: its bits depend neither on the rows
// beside it nor on where a prompt was cut. No Python and no torch in here: numbers and addresses come in, nothing is
// allocated.

#include "softmax.h"

#ifdef HAS_TILES

#define BOTH __attribute__((target("amx-tile,amx-bf16,avx512bf16")))

namespace {

// 32 slots by 32 rows.
TILES INLINE void score_step(const uint16_t* keys, const uint16_t* queries, int64_t all, float* scores) {
  const uint16_t *more_keys = keys + all * kTile, *more_queries = queries + all * kTile;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t depth = 0; depth < all; depth++) {
    _tile_loadd(4, keys + depth * kTile, 64);
    _tile_loadd(6, queries + depth * kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, more_queries + depth * kTile, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, more_keys + depth * kTile, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  float* more = scores + kBlock * kSide;
  _tile_stored(0, scores, 64);
  _tile_stored(2, scores + kSide * kSide, 64);
  _tile_stored(1, more, 64);
  _tile_stored(3, more + kSide * kSide, 64);
}

INLINE void shrink_outs(const float* shrink, float* outs) {
  const __m512 by = _mm512_load_ps(shrink);
  for (int64_t i = 0; i < 2 * kSide; i++) _mm512_store_ps(outs + i * kSide, _mm512_load_ps(outs + i * kSide) * by);
}

// 32 dims of the values by 32 rows.
TILES INLINE void add_values(const Turn& turn, const uint16_t* values, int64_t tiles, const uint16_t* probs,
                             float* outs) {
  float* more = outs + tiles * kSide * kSide;
  if (turn.shrinks) shrink_outs(turn.shrink, outs), shrink_outs(turn.shrink + kSide, more);
  written();
  _tile_loadd(0, outs, 64);
  _tile_loadd(1, more, 64);
  _tile_loadd(2, outs + kSide * kSide, 64);
  _tile_loadd(3, more + kSide * kSide, 64);
  for (int64_t step = turn.begin; step < turn.end; step++) {
    const uint16_t *here = values + step * tiles * kTile, *mine = probs + step * kTile;
    _tile_loadd(4, here, 64);
    _tile_loadd(6, mine, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, mine + kBlock * kSide, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, here + kTile, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, outs, 64);
  _tile_stored(1, more, 64);
  _tile_stored(2, outs + kSide * kSide, 64);
  _tile_stored(3, more + kSide * kSide, 64);
}

// The passes of a share, and its turns in order.
class Share {
 public:
  Share(const Case& c, int64_t share, int64_t group, const Place& place) : c_(c), p_(place), group_(group) {
    first_piece_ = c.share_pieces[share], end_piece_ = c.share_pieces[share + 1];
    common_ = c.share_common[share] / kBlock;
    const int64_t queries = kPass * key_depths(c) * kDepth;
    for (int64_t piece = first_piece_; piece < end_piece_; piece++)
      for (int64_t i = 0; i < rows_of(c.piece_count[piece], c.heads); i++, passes_++) {
        begin_pass(piece, i * kPass, p_.passes + passes_);
        lay_queries(c, p_.passes[passes_], group, p_.queries + passes_ * queries);
      }
    std::memset(p_.outs, 0, passes_ * kPass * value_tiles(c) * kSide * sizeof(float));
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
        turn->values = p_.values[kept_];
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
      const int64_t last = c_.pasts[segment] + query, seen = c_.window ? last - c_.window + 1 : 0;
      pass->last[i] = static_cast<int32_t>(last), pass->first[i] = static_cast<int32_t>(most(seen, c_.lows[segment]));
      pass->top[i] = kNone, pass->sum[i] = 0;
    }
  }

  // What all pieces have in common, then each piece by itself.
  bool next_run() {
    if (next_piece_ == end_piece_) return false;
    const bool all = next_piece_ < first_piece_;
    first_pass_ = all || next_piece_ == first_piece_ ? 0 : end_pass_;
    end_pass_ = all ? passes_ : first_pass_ + rows_of(c_.piece_count[next_piece_], c_.heads);
    next_piece_++;
    begin_ = p_.passes[first_pass_].first[0], end_ = p_.passes[end_pass_ - 1].last[kPass - 1] + 1;
    table_ = c_.tables + c_.piece_segment[p_.passes[first_pass_].piece] * c_.table_row;
    block_ = all ? begin_ / kBlock : most(begin_ / kBlock, common_);
    end_block_ = all ? common_ : (end_ - 1) / kBlock + 1;
    pass_ = first_pass_, laid_ = false;
    return true;
  }

  // The steps of a block that rows of a pass see.
  bool cut(Turn* turn) const {
    const Pass& pass = p_.passes[turn->pass];
    const int64_t from = turn->block * kBlock, low = pass.first[0] - from, high = pass.last[kPass - 1] - from;
    if (high < 0 || low >= kBlock) return false;
    turn->begin = low > 0 ? low / kStep : 0, turn->end = least(high / kStep + 1, kSteps);
    turn->edge = pass.last[0] - from < turn->end * kStep - 1 || pass.first[kPass - 1] - from > turn->begin * kStep;
    return true;
  }

  void lay_block() {
    kept_ = (kept_ + 1) % kKept, laid_ = true;
    Slots slots;
    find_slots(c_, table_, group_, block_, begin_, end_, &slots);
    const int64_t from = block_ * kBlock, begin = most(begin_ - from, 0) / kStep;
    const int64_t end = least((end_ - from + kStep - 1) / kStep, kSteps);
    lay_keys(c_, slots, begin, end, p_.keys);
    lay_values(c_, slots, begin, end, p_.values[kept_]);
  }

  const Case& c_;
  const Place& p_;
  int64_t group_, first_piece_, end_piece_, next_piece_, common_, passes_ = 0, kept_ = 0;
  int64_t first_pass_ = 0, end_pass_ = 0, pass_ = 0, block_ = 0, end_block_ = 0, begin_ = 0, end_ = 0;
  const int32_t* table_ = nullptr;
  bool laid_ = false;
};

// One turn in each stage: `ahead` gets its scores, `here` its probabilities, `behind` goes into the outputs.
BOTH void compute(const Case& c, const Place& p, int64_t number, const Turn* ahead, Turn* here, const Turn* behind) {
  const int64_t all = key_depths(c), tiles = value_tiles(c), parts = tiles / 2;
  // Scores times `unit` are powers of 2.
  const bool bends = c.softcap > 0 || !(c.scale > 0);
  const float unit = bends ? 1.0f : c.scale * kLog2;
  float *scores = p.scores[number % 2], *next = p.scores[(number + 1) % 2];
  uint16_t *probs = p.probs[number % 2], *before = p.probs[(number + 1) % 2];
  const uint16_t* queries = ahead ? p.queries + ahead->pass * 2 * all * kTile : nullptr;
  float* outs = behind ? p.outs + behind->pass * 2 * tiles * kSide * kSide : nullptr;
  written();
  Pass* pass = here ? p.passes + here->pass : nullptr;
  int64_t done = 0;
  for (int64_t step = 0; step < kSteps; step++) {
    if (ahead && step >= ahead->begin && step < ahead->end)
      score_step(p.keys + step * 2 * all * kTile, queries, all, next + step * kStep * kSide);
    if (here && step == 0) {
      if (bends) bend_scores(c, *here, scores);
      if (here->edge) hide_scores(*pass, *here, scores);
      raise_tops(unit, scores, pass, here);
    }
    if (here && step >= here->begin && step < here->end) {
      const int64_t at = step * kStep * kSide;
      find_probs(unit, scores + at, pass->top, pass->sum, probs + at);
    }
    if (behind)
      for (; done < (step + 1) * parts / kSteps; done++)
        add_values(*behind, behind->values + done * 2 * kTile, tiles, before, outs + done * 2 * kSide * kSide);
    if (here && step >= here->begin && step < here->end) {
      const int64_t at = step * kStep * kSide, half = kBlock * kSide;
      find_probs(unit, scores + half + at, pass->top + kSide, pass->sum + kSide, probs + half + at);
    }
  }
  written();
}

void compute_share(const Case& c, int64_t share, int64_t group, char* scratch) {
  Place p;
  carve(c, scratch, &p);
  Share mine(c, share, group, p);
  // Numbers too small for bf16's exponents are nothing, and slow.
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | 0x8040);
  open_tiles();
  Turn turns[3];
  Turn *here = nullptr, *behind = nullptr;
  for (int64_t number = 0;; number++) {
    Turn* ahead = turns + number % 3;
    if (!mine.next(ahead)) ahead = nullptr;
    if (!ahead && !here && !behind) break;
    compute(c, p, number, ahead, here, behind);
    behind = here, here = ahead;
  }
  close_tiles();
  _mm_setcsr(before);
  const int64_t outs = kPass * value_tiles(c) * kSide;
  for (int64_t i = 0; i < mine.passes(); i++) put_outs(c, p.passes[i], group, p.outs + i * outs);
}

struct Shared {
  const Case& c;
  int64_t bytes;
};

void work(const void* context, int64_t, int64_t index, int64_t thread) {
  const Shared& s = *static_cast<const Shared*>(context);
  compute_share(s.c, index / s.c.groups, index % s.c.groups, s.c.scratch + thread * s.bytes);
}

bool has_bf16_vectors() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 5 & 1;
}

}  // namespace

extern "C" {

// Whether this process may use what is compiled here.
int64_t farspan_has_tiles() {
  static const bool given = has_bf16_vectors() && ask_for_tiles();
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
