// A chain of steps over the same rows in one call, on a CPU. Contract: contract.py.
//
// Steps of a level read what earlier levels made; the team shares the work of a level. No Python and no torch in here:
// numbers and addresses come in, and nothing is allocated.

#include "../team_call.h"
#include "gate.h"
#include "linear.h"
#include "rows.h"

extern "C" {

// Field for field the Structures in native.py. a, b, c, y and wide are numbers of buffers; `wide` gets what y gets as
// linear layers read it: in fp32, or laid out for tiles; -1: nothing does.
struct Step {
  int64_t kind, level, a, b, c, y, wide, width, size, turned, form, weight_row;
  const uint16_t *weights, *bias;
  double eps;
};

constexpr int64_t kBuffers = 40, kSteps = 32;

// Rows of a buffer are so many bytes apart. Buffers without an address lie in `scratch`, each row for row.
struct Run {
  char* at[kBuffers];
  int64_t apart[kBuffers];
  const Step* steps;
  char* scratch;
  farspan_team team;
  int64_t num_steps, num_buffers, rows, threads, tiled, own_bytes;
};
}

namespace {

enum Kind { kWiden, kMultiply, kNormalize, kGate, kAdd, kRotate };

// Rows of a share, where a row is little work; as many as are laid out together for tiles, where there are more.
constexpr int64_t kSome = 8;
INLINE int64_t some_of(const Run& run) { return run.tiled && run.rows > kSide ? kSide : kSome; }
// Buffers have room for so many rows at least: rows are laid out by 16, in half as many bytes.
constexpr int64_t kLeast = 8;

struct Shared {
  const Run& run;
  char* at[kBuffers];
  Cut cuts[kSteps];
  int64_t first[kSteps + 1];
  bool many;
  char* own;
};

INLINE int64_t count_shares(const Shared& s, int64_t step) {
  if (s.run.steps[step].kind == kMultiply) return s.cuts[step].count;
  const int64_t some = some_of(s.run);
  return (s.run.rows + some - 1) / some;
}

void one_step(const Shared& s, const Step& step, int64_t row) {
  auto at = [&](int64_t buffer) { return reinterpret_cast<uint16_t*>(s.at[buffer] + row * s.run.apart[buffer]); };
  switch (step.kind) {
    case kNormalize:
      norm_row(at(step.a), step.weights, at(step.y), step.width, step.size, static_cast<float>(step.eps), step.form);
      break;
    case kGate:
      (s.run.tiled ? gate_many : gate_row)(at(step.a), at(step.b), at(step.y), step.width, step.form);
      break;
    case kAdd:
      add_row(at(step.a), at(step.b), at(step.y), step.width);
      break;
    case kRotate:
      rotate_row(at(step.a), at(step.b), at(step.c), at(step.y), step.width, step.size, step.turned);
      break;
  }
}

// What a step made, as linear layers read it.
void leave_wide(const Shared& s, const Step& step, int64_t begin, int64_t end) {
  const int64_t made = step.kind == kWiden ? step.a : step.y, apart = s.run.apart[made];
  const char* from = s.at[made] + begin * apart;
  char* to = s.at[step.wide];
  if (s.run.tiled && !s.many && end - begin > kSome)
    return lay_rows(reinterpret_cast<const uint16_t*>(from), apart / 2, end - begin, step.width,
                    to + begin / kSide * words_of(step.width) * 4, false);
  for (int64_t row = begin; row < end; row++, from += apart) {
    const uint16_t* numbers = reinterpret_cast<const uint16_t*>(from);
    if (s.many)
      place_row(numbers, step.width, row, to);
    else if (s.run.tiled)
      lay_row(numbers, step.width, row, to);
    else
      widen_row(numbers, step.width, reinterpret_cast<float*>(to + row * s.run.apart[step.wide]));
  }
}

// Which step of a level a share is of; `index` is then one of the step's own.
INLINE int64_t find_step(const Shared& s, int64_t level, int64_t* index) {
  int64_t number = s.first[level];
  for (; *index >= count_shares(s, number); number++) *index -= count_shares(s, number);
  return number;
}

INLINE Linear linear_of(const Shared& s, const Step& step) {
  return {reinterpret_cast<const float*>(s.at[step.a]), step.weights, step.bias, reinterpret_cast<uint16_t*>(s.at[step.y]),
          s.run.rows, step.size, step.width, step.weight_row, s.run.apart[step.y] / 2,
          s.run.tiled != 0};
}

void work(const void* context, int64_t level, int64_t index, int64_t thread) {
  const Shared& s = *static_cast<const Shared*>(context);
  int64_t number = find_step(s, level, &index);
  const Step& step = s.run.steps[number];
  if (step.kind == kMultiply)
    return linear_share(linear_of(s, step), s.cuts[number], index, s.own + thread * s.run.own_bytes);
  const int64_t some = some_of(s.run), begin = index * some, end = begin + some < s.run.rows ? begin + some : s.run.rows;
  for (int64_t row = begin; row < end; row++) one_step(s, step, row);
  if (step.wide >= 0) leave_wide(s, step, begin, end);
}

void ahead(const void* context, int64_t level, int64_t index) {
  const Shared& s = *static_cast<const Shared*>(context);
  int64_t number = find_step(s, level, &index);
  const Step& step = s.run.steps[number];
  if (step.kind == kMultiply) ask_ahead(linear_of(s, step), s.cuts[number], index);
}

}  // namespace

extern "C" {

// Bytes of a widened row.
int64_t farspan_wide_bytes(int64_t width) { return padded(width) * 4; }

// Bytes of a thread for a linear layer of so many inputs over many rows, by tiles.
int64_t farspan_own_bytes(int64_t width) { return (own_bytes(width) + 63) / 64 * 64; }

// Whether linear layers may be computed by tiles in this process.
int64_t farspan_has_tiles() {
  static const bool given = ask_for_tiles();
  return given;
}

void farspan_chain(const Run* given) {
  const Run& run = *given;
  Shared s{run, {}, {}, {}, lays_weights(run.rows, run.tiled), nullptr};
  const int64_t rows = s.many ? (run.rows + kSide - 1) / kSide * kSide : run.rows < kLeast ? kLeast : run.rows;
  char* next = run.scratch;
  for (int64_t i = 0; i < run.num_buffers; i++) {
    s.at[i] = run.at[i] ? run.at[i] : next;
    if (!run.at[i]) next += (rows * run.apart[i] + 63) / 64 * 64;
  }
  s.own = next;
  int64_t counts[kSteps] = {}, levels = 0;
  for (int64_t i = 0; i < run.num_steps; i++) {
    const Step& step = run.steps[i];
    if (step.kind == kMultiply) s.cuts[i] = cut_linear(run.rows, step.size, step.width, run.threads, run.tiled);
    if (step.level == levels) s.first[levels++] = i;
    counts[step.level] += count_shares(s, i);
  }
  run.team(work, ahead, &s, levels, counts, run.threads);
}
}
