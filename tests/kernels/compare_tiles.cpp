// The tile instructions on one machine's random tiles, as the processor and as the emulator has them:
// compiled once with each. Prints a line of bits for every product, or says that there are no tiles.
#include <cstdio>
#include <cstring>
#include <random>

#include "cpu/tiles.h"

namespace {

std::mt19937 generator(1);

// Bfloat16 of ordinary size, of sizes whose products and sums are subnormal, any bits at all.
uint16_t half(int kind) {
  const uint16_t bits = static_cast<uint16_t>(generator());
  if (kind == 3) return bits;
  constexpr int kExponents[] = {127, 64, 3};
  const int spread = kind == 0 ? 8 : 3;
  const int exponent = kExponents[kind] + static_cast<int>(generator() % (2 * spread)) - spread;
  return static_cast<uint16_t>((bits & 0x807f) | (exponent < 0 ? 0 : exponent) << 7);
}

float start(int kind) {
  if (kind == 3) {
    const uint32_t bits = generator();
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }
  const float size = kind == 0 ? 10.0f : 0x1p-124f;
  return size * (static_cast<float>(generator() % 2000) / 1000.0f - 1.0f);
}

}  // namespace

int main() {
  if (!tiles_allowed()) {
    std::puts("no tiles");
    return 0;
  }
  const Tiles tiles;
  for (int i = 0; i < 400; ++i) {
    alignas(64) uint16_t a[512], b[512];
    alignas(64) float sums[256];
    const int kind = i % 4;
    for (auto& x : a) x = half(kind);
    for (auto& x : b) x = half(kind == 2 ? i / 4 % 2 * 2 : kind);
    for (auto& x : sums) x = start(kind);
    tile_load<0>(sums, 64);
    tile_load<1>(a, 64);
    tile_load<2>(b, 64);
    tile_dot<0, 1, 2>();
    tile_store<0>(sums, 64);
    for (const float x : sums) {
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      std::printf("%08x ", x == x ? bits : 0x7fc00000);  // whose NaN it is does not matter
    }
    std::puts("");
  }
  return 0;
}
