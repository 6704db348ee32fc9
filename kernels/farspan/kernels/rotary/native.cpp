// Angles of rotary positions on a CPU, in bf16. Contract: contract.py.

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

uint16_t narrow(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  // To the nearest, ties to even: a cosine is a number.
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace

extern "C" {

// Field for field the Structure in native.py.
struct Angles {
  const int64_t* positions;
  const float* frequencies;
  uint16_t *cos, *sin;
  int64_t tokens, step, size;
  float scale;
};

void farspan_angles(const Angles* given) {
  const Angles& c = *given;
  for (int64_t t = 0; t < c.tokens; t++) {
    const float position = static_cast<float>(c.positions[t * c.step]);
    uint16_t *cos = c.cos + 2 * t * c.size, *sin = c.sin + 2 * t * c.size;
    for (int64_t i = 0; i < c.size; i++) {
      const float angle = position * c.frequencies[i];
      cos[i] = narrow(std::cos(angle) * c.scale), sin[i] = narrow(std::sin(angle) * c.scale);
    }
    std::memcpy(cos + c.size, cos, c.size * sizeof *cos);
    std::memcpy(sin + c.size, sin, c.size * sizeof *sin);
  }
}
}
