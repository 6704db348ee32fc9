// A team of threads for one call at a time: work in shares, levels of shares one after the other.
//
// A share is claimed by whoever is there. The caller waits for shares that somebody else has claimed, never for a
// thread that has not come: on a machine that others use too, a thread without a processor holds nobody up.
// Threads that wait look for work for a moment, then sleep until they are called. No Python and no torch in here.

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#include <sched.h>

extern "C" {

// Share `index` of a level, by thread `thread` of the call.
typedef void (*farspan_work)(const void* context, int64_t level, int64_t index, int64_t thread);
// What a share will read that no level before it makes can be asked for now: its thread has to wait. May be null.
typedef void (*farspan_ahead)(const void* context, int64_t level, int64_t index);

// Field for field the _Call of calls.py.
struct Made {
  void (*function)(const void* argument);
  const void* argument;
};
}

namespace {

using std::memory_order_acquire;
using std::memory_order_relaxed;
using std::memory_order_release;
using std::memory_order_seq_cst;

// What is open, in one word: number of the call, its threads, its shares, and the next share to claim.
constexpr int kShareBits = 20, kThreadBits = 8;
constexpr uint64_t kMostShares = (1u << kShareBits) - 1, kMostThreads = (1u << kThreadBits) - 1;
// So long a thread looks for the next call, of which a decode step makes one every 0.1 to 0.2 ms, before it sleeps; and
// so long it looks for what others do before it offers them its processor.
constexpr auto kIdle = std::chrono::microseconds(500), kTurn = std::chrono::microseconds(50);

inline uint64_t next_of(uint64_t word) { return word & kMostShares; }
inline uint64_t shares_of(uint64_t word) { return word >> kShareBits & kMostShares; }
inline uint64_t threads_of(uint64_t word) { return word >> 2 * kShareBits & kMostThreads; }
inline bool has_work(uint64_t word, uint64_t thread) {
  return next_of(word) < shares_of(word) && thread < threads_of(word);
}

inline void breathe() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

// True as soon as `ready()` is; false when it is not in time.
template <typename Ready>
bool look_for(Ready ready, std::chrono::microseconds patience) {
  const auto end = std::chrono::steady_clock::now() + patience;
  do {
    for (int i = 0; i < 32; i++) {
      if (ready()) return true;
      breathe();
    }
  } while (std::chrono::steady_clock::now() < end);
  return ready();
}

// Whoever is waited for may need this very processor.
template <typename Ready>
void wait_for(Ready ready) {
  while (!look_for(ready, kTurn)) sched_yield();
}

struct Call {
  farspan_work work;
  farspan_ahead ahead;
  const void* context;
  int64_t levels;
  const int64_t* counts;
};

class Team {
 public:
  // False, and nothing done, while another thread's call is open.
  bool run(const Call& call, uint64_t shares, uint64_t threads) {
    std::unique_lock<std::mutex> mine(busy_, std::try_to_lock);
    if (!mine.owns_lock()) return false;
    hire(threads);
    call_ = call;
    done_.store(0, memory_order_relaxed);
    number_++;
    open_.store(((number_ << kThreadBits | threads) << kShareBits | shares) << kShareBits, memory_order_seq_cst);
    if (sleeping_.load(memory_order_seq_cst) > 0) {
      // Who is about to sleep has looked before, or hears this.
      { std::lock_guard<std::mutex> quiet(sleep_); }
      wake_.notify_all();
    }
    help(0);
    wait_for([&] { return done_.load(memory_order_acquire) == static_cast<int64_t>(shares); });
    return true;
  }

 private:
  void hire(uint64_t threads) {
    for (; hired_ + 1 < threads; hired_++) {
      try {
        std::thread([this, thread = hired_ + 1] { stay(thread); }).detach();
      } catch (const std::system_error&) {
        return;  // Then fewer do it.
      }
    }
  }

  [[noreturn]] void stay(uint64_t thread) {
    auto called = [&] { return has_work(open_.load(memory_order_seq_cst), thread); };
    for (;;) {
      if (!look_for(called, kIdle)) {
        std::unique_lock<std::mutex> quiet(sleep_);
        sleeping_.fetch_add(1, memory_order_seq_cst);
        wake_.wait(quiet, called);
        sleeping_.fetch_sub(1, memory_order_seq_cst);
      }
      help(thread);
    }
  }

  // Until every share of the open call is claimed. A call stays until its last claimed share is done.
  void help(uint64_t thread) {
    uint64_t word = open_.load(memory_order_acquire);
    while (has_work(word, thread)) {
      if (!open_.compare_exchange_weak(word, word + 1, memory_order_acquire)) continue;
      int64_t index = static_cast<int64_t>(next_of(word)), begin = 0, level = 0;
      while (index - begin >= call_.counts[level]) begin += call_.counts[level++];
      // Shares are claimed in order: what this one waits for never waits for it.
      auto ready = [&] { return done_.load(memory_order_acquire) >= begin; };
      if (!ready()) {
        if (call_.ahead) call_.ahead(call_.context, level, index - begin);
        wait_for(ready);
      }
      call_.work(call_.context, level, index - begin, static_cast<int64_t>(thread));
      done_.fetch_add(1, memory_order_release);
      word = open_.load(memory_order_acquire);
    }
  }

  alignas(64) std::atomic<uint64_t> open_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) Call call_{};
  uint64_t number_ = 0, hired_ = 0;
  std::mutex busy_, sleep_;
  std::condition_variable wake_;
  std::atomic<int> sleeping_{0};
};

}  // namespace

extern "C" {

// Every share of every level, on at most `threads` threads: counts[level] shares each, a level after the one before.
void farspan_team(farspan_work work, farspan_ahead ahead, const void* context, int64_t levels, const int64_t* counts,
                  int64_t threads) {
  // Never taken down: its threads sleep in it until the process ends.
  static Team* team = new Team;
  uint64_t shares = 0, widest = 0;
  for (int64_t level = 0; level < levels; level++) {
    shares += counts[level];
    if (static_cast<uint64_t>(counts[level]) > widest) widest = counts[level];
  }
  uint64_t useful = static_cast<uint64_t>(threads) < widest ? threads : widest;
  if (useful > kMostThreads) useful = kMostThreads;
  if (useful > 1 && shares < kMostShares && team->run({work, ahead, context, levels, counts}, shares, useful)) return;
  for (int64_t level = 0; level < levels; level++)
    for (int64_t index = 0; index < counts[level]; index++) work(context, level, index, 0);
}

// Calls as they were made before, one after the other.
void farspan_calls(const Made* calls, int64_t count) {
  for (int64_t i = 0; i < count; i++) calls[i].function(calls[i].argument);
}
}
