// The registers of matrix tiles (AMX): whether there are any, and how a kernel opens them.
#pragma once

#include <cstdint>
#include <cstring>

#ifndef INLINE
#define INLINE static inline __attribute__((always_inline))
#endif

#if defined(__clang__)
#define COMPILES_TILES (__clang_major__ >= 12)
#else
#define COMPILES_TILES (__GNUC__ >= 11)
#endif

namespace {

// Rows of a tile, and what a row holds in bf16.
constexpr int64_t kSide = 16, kDepth = 32;

}  // namespace

#if defined(__AVX512F__) && defined(__linux__) && COMPILES_TILES
#define HAS_TILES
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define TILES __attribute__((target("amx-tile,amx-bf16")))

namespace {

// Compilers do not know that loads of tiles read memory.
INLINE void written() { __asm__ volatile("" ::: "memory"); }

// Each process has to ask once for the registers. What is made with them is rounded to bf16 by vectors, which a virtual
// machine may hide though the processor has both.
bool ask_for_tiles() {
  constexpr long kAsk = 0x1023, kTileData = 18;
  unsigned a, b, c, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tiles = d >> 24 & 1, bf16 = d >> 22 & 1;
  if (!tiles || !bf16 || !__get_cpuid_count(7, 1, &a, &b, &c, &d)) return false;
  return (a >> 5 & 1) && syscall(SYS_arch_prctl, kAsk, kTileData) == 0;
}

struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// All tiles are whole: what is missing is zero.
TILES void open_tiles() {
  TileShapes shapes;
  for (int64_t i = 0; i < 8; i++) shapes.bytes[i] = 64, shapes.rows[i] = kSide;
  written();
  _tile_loadconfig(&shapes);
}

TILES void close_tiles() { _tile_release(); }

// 16 by 16 numbers, rows for columns: four by four inside each quarter of the vectors, then the quarters.
template <typename Vector>
INLINE void turn_tile(Vector* x) {
  __m512i a[kSide], b[kSide];
  std::memcpy(a, x, sizeof a);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]), b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]), a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]), a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const __m512i even_low = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88), odd_low = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
    const __m512i even_high = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    b[i] = _mm512_shuffle_i32x4(even_low, even_high, 0x88), b[i + 8] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
    b[i + 4] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88), b[i + 12] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  }
  std::memcpy(x, b, sizeof b);
}

}  // namespace
#endif
