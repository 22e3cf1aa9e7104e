// One tensor moved along noise, a tile at a time: `displace_on_cpu` of displace.py, in one pass.
// The layout of the noise is that of kernels/noise.py, and so is every bit of the result, but for
// the logarithms and sines of Box-Muller's normals.

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int kTile = 4096;
constexpr uint32_t kNoise = 0, kMask = 1;
enum Kind { kRademacher = 0, kTable = 1, kNormal = 2 };
enum Hide { kNone = 0, kMagnitude = 1, kRandom = 2 };

float of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// Philox4x32-10 of `count` counters in a row, to word j of the tile at words[j].
template <int count>
void draw(uint64_t key, uint32_t parameter, uint32_t stream, uint64_t first, uint32_t* words) {
  constexpr int kLanes = 32;
  uint32_t a[kLanes], b[kLanes], c[kLanes], d[kLanes];
  for (int start = 0; start < count; start += kLanes) {
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t counter = first + start + i;
      a[i] = static_cast<uint32_t>(counter);
      b[i] = static_cast<uint32_t>(counter >> 32);
      c[i] = parameter;
      d[i] = stream;
    }
    for (int round = 0; round < 10; ++round) {
      for (int i = 0; i < kLanes; ++i) {
        const uint64_t p0 = 0xD2511F53ULL * a[i], p1 = 0xCD9E8D57ULL * c[i];
        const uint32_t high0 = static_cast<uint32_t>(p0 >> 32), low0 = static_cast<uint32_t>(p0);
        const uint32_t high1 = static_cast<uint32_t>(p1 >> 32), low1 = static_cast<uint32_t>(p1);
        a[i] = high1 ^ b[i] ^ k0;
        c[i] = high0 ^ d[i] ^ k1;
        b[i] = low1;
        d[i] = low0;
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    for (int i = 0; i < kLanes; ++i) {
      uint32_t* to = words + 4 * (start + i);
      to[0] = a[i];
      to[1] = b[i];
      to[2] = c[i];
      to[3] = d[i];
    }
  }
}

// moved += c z, or moved = c z at the first draw, which never reads what was there: an addition to
// denormal numbers takes a hundred times as long.
template <bool first>
void add_signs(const uint32_t* words, float c, float* moved) {
  const uint32_t minus = bits_of(-c);
  for (int field = 0; field < 32; ++field) {
    float* row = moved + 128 * field;
    for (int j = 0; j < 128; ++j) {
      const float term = of_bits((words[j] >> field << 31) ^ minus);
      row[j] = first ? term : row[j] + term;
    }
  }
}

template <bool first>
void add_normals(const uint32_t* words, const float* table, float c, float* moved) {
  for (int field = 0; field < 2; ++field) {
    float* row = moved + 2048 * field;
    for (int j = 0; j < 2048; ++j) {
      const float term = table[words[j] >> 16 * field & 0xFFFF] * c;
      row[j] = first ? term : row[j] + term;
    }
  }
}

// ln(value) of a positive normal number; the polynomial is that of the Cephes library.
inline __attribute__((always_inline)) float logarithm(float value) {
  const uint32_t bits = bits_of(value);
  const float low = of_bits((bits & 0x7FFFFF) | 0x3F000000);  // in [1/2, 1)
  const bool small = low < 0.70710678118654752440f;
  const float exponent = static_cast<float>(static_cast<int32_t>(bits >> 23) - 126 - small);
  const float x = (small ? low + low : low) - 1, square = x * x;
  float y = 7.0376836292e-2f;
  y = y * x - 1.1514610310e-1f;
  y = y * x + 1.1676998740e-1f;
  y = y * x - 1.2420140846e-1f;
  y = y * x + 1.4249322787e-1f;
  y = y * x - 1.6668057665e-1f;
  y = y * x + 2.0000714765e-1f;
  y = y * x - 2.4999993993e-1f;
  y = y * x + 3.3333331174e-1f;
  y = y * x * square - 2.12194440e-4f * exponent - 0.5f * square;
  return x + y + 0.693359375f * exponent;
}

// Cosine and sine of angle / 2^32 turns: the nearest quarter is exact, the rest within 1/8 turn.
inline __attribute__((always_inline)) void turn(uint32_t angle, float* cosine, float* sine) {
  const uint32_t quarter = (angle + 0x20000000u) >> 30;
  const float x = static_cast<float>(static_cast<int32_t>(angle - (quarter << 30))) *
                  1.4629180792671596e-09f;
  const float square = x * x;
  const float s =
      x + x * square *
              (-0.16666654611f + square * (0.0083321608736f + square * -0.00019515295891f));
  const float fourth = square * (-0.0013887316255f + square * 2.4433157118e-05f);
  const float c = 1.0f + square * (-0.5f + square * (0.041666645683f + fourth));
  const float along = quarter & 1 ? s : c, across = quarter & 1 ? c : s;
  *cosine = of_bits(bits_of(along) ^ ((quarter + 1) & 2) << 30);
  *sine = of_bits(bits_of(across) ^ (quarter & 2) << 30);
}

template <bool first>
void add_box_muller(const uint32_t* words, float scale, float* moved) {
  for (int j = 0; j < kTile; j += 2) {
    const float uniform =
        (static_cast<float>(static_cast<int32_t>(words[j] >> 8)) + 0.5f) * 5.9604644775390625e-08f;
    const float radius = std::sqrt(std::fabs(-2.0f * logarithm(uniform)));
    float cosine, sine;
    turn(words[j + 1], &cosine, &sine);
    const float even = radius * cosine * scale, odd = radius * sine * scale;
    moved[j] = first ? even : moved[j] + even;
    moved[j + 1] = first ? odd : moved[j + 1] + odd;
  }
}

template <bool first>
void add(uint64_t key, uint32_t parameter, int64_t tile, int kind, float c, const float* table,
         uint32_t* words, float* moved) {
  const uint64_t number = static_cast<uint64_t>(tile);
  if (kind == kRademacher) {
    draw<32>(key, parameter, kNoise, number * 32, words);
    add_signs<first>(words, c, moved);
  } else if (kind == kTable) {
    draw<512>(key, parameter, kNoise, number * 512, words);
    add_normals<first>(words, table, c, moved);
  } else {
    draw<1024>(key, parameter, kNoise, number * 1024, words);
    add_box_muller<first>(words, c, moved);
  }
}

float widened(float value) { return value; }
float widened(uint16_t value) { return of_bits(static_cast<uint32_t>(value) << 16); }

void narrow(float value, float* to) { *to = value; }
void narrow(float value, uint16_t* to) {
  const uint32_t bits = bits_of(value);
  const uint16_t even = static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  *to = value != value ? 0x7FC0 : even;
}

template <typename T>
void move_tile(const T* weight, T* out, int from, int to, float* moved, float decay, int hide,
               float edge, const uint32_t* chosen, uint32_t limit) {
  // weight and out begin with the tile; from and to are what of it there is
  if (decay != 0) {
    for (int i = from; i < to; ++i) {
      const float by = widened(weight[i]) * decay;
      moved[i] += by;
    }
  }
  if (hide == kMagnitude) {
    for (int i = from; i < to; ++i) {
      const T before = weight[i];
      T after;
      narrow(widened(before) - moved[i], &after);
      out[i] = std::fabs(widened(before)) <= edge ? after : before;
    }
  } else if (hide == kRandom) {
    for (int i = from; i < to; ++i) {
      const T before = weight[i];
      T after;
      narrow(widened(before) - moved[i], &after);
      out[i] = (chosen[i & 2047] >> (i >> 11) * 16 & 0xFFFF) < limit ? after : before;
    }
  } else {
    for (int i = from; i < to; ++i) narrow(widened(weight[i]) - moved[i], &out[i]);
  }
}

template <typename T>
void move_tiles(const T* weight, T* out, int64_t numel, int64_t start, uint32_t parameter,
                const uint64_t* keys, const float* coefficients, int draws, int kind,
                const float* table, float decay, int hide, uint64_t mask_key, float edge,
                uint32_t limit, int64_t first_tile, int64_t last_tile) {
  alignas(64) float moved[kTile];
  alignas(64) uint32_t words[kTile], chosen[kTile / 2];
  for (int64_t tile = first_tile; tile < last_tile; ++tile) {
    if (draws == 0) std::memset(moved, 0, sizeof moved);
    for (int turn = 0; turn < draws; ++turn) {
      if (turn == 0)
        add<true>(keys[turn], parameter, tile, kind, coefficients[turn], table, words, moved);
      else
        add<false>(keys[turn], parameter, tile, kind, coefficients[turn], table, words, moved);
    }
    if (hide == kRandom)
      draw<512>(mask_key, parameter, kMask, static_cast<uint64_t>(tile) * 512, chosen);
    const int64_t base = tile * kTile - start;  // of the tile's first weight, which may be before
    const int from = base < 0 ? static_cast<int>(-base) : 0;
    const int to = numel - base < kTile ? static_cast<int>(numel - base) : kTile;
    move_tile(weight + base, out + base, from, to, moved, decay, hide, edge, chosen, limit);
  }
}

}  // namespace

// Moves the tiles `first` to `last` of a parameter, of which a tensor holds `numel` weights from
// `start` on. `bytes` of a weight: 4 is float32, 2 bfloat16.
extern "C" void sft_displace(const void* weight, void* out, int bytes, int64_t numel, int64_t start,
                             uint32_t parameter, const uint64_t* keys, const float* coefficients,
                             int draws, int kind, const float* table, float decay, int hide,
                             uint64_t mask_key, float edge, uint32_t limit, int64_t first,
                             int64_t last) {
  if (bytes == 4)
    move_tiles(static_cast<const float*>(weight), static_cast<float*>(out), numel, start, parameter,
               keys, coefficients, draws, kind, table, decay, hide, mask_key, edge, limit, first,
               last);
  else
    move_tiles(static_cast<const uint16_t*>(weight), static_cast<uint16_t*>(out), numel, start,
               parameter, keys, coefficients, draws, kind, table, decay, hide, mask_key, edge,
               limit, first, last);
}
