// SPDX-License-Identifier: Apache-2.0
// Takes the place of csrc/ptx.cuh.
#pragma once

#include <cmath>
#include <cstring>

#include "cuda_runtime.h"

namespace kcache {

inline float fast_exp2(float value) {
  // As a GPU leaves what is no number; a host may set its sign, which a rank begins with.
  if (std::isnan(value)) return __uint_as_float(0x7fffffffu);
  return value < -126.0f ? 0.0f : exp2f(value);
}

inline float fast_log2(float value) {
  return log2f(value);
}

inline float fast_reciprocal(float value) {
  return 1.0f / value;
}

inline float min_or_nan(float x, float y) {
  return x < y || std::isnan(x) ? x : y;
}

inline void fence_gpu() {
  std::atomic_thread_fence(std::memory_order_acq_rel);
}

inline int load_acquire(const int* pointer) {
  return __atomic_load_n(pointer, __ATOMIC_ACQUIRE);
}

inline long long now_ns() {
  return emulator::now_ns();
}

template <int kWords>
void load_now(bool wanted, unsigned (&words)[kWords], const char* from) {
  if (wanted) std::memcpy(words, from, sizeof(words));
}
inline void make_now(const char*&) {}
inline void prefetch(const void*) {}

inline float2 halves_to_floats(unsigned bits) {
  return {static_cast<float>(emulator::from_word<_Float16>(bits & 0xffff)),
          static_cast<float>(emulator::from_word<_Float16>(bits >> 16))};
}

inline unsigned float_to_half(float value) {
  return static_cast<unsigned>(emulator::to_word(static_cast<_Float16>(value)));
}

inline unsigned float_to_bfloat16(float value) {
  const unsigned bits = __float_as_uint(value);
  return value != value ? 0x7fff : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

inline unsigned floats_to_halves(float low, float high) {
  return float_to_half(low) | float_to_half(high) << 16;
}

inline unsigned permute_bytes(unsigned low, unsigned high, unsigned selectors) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  unsigned found = 0;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned selector = selectors >> (4 * i) & 7;
    found |= static_cast<unsigned>(bytes >> (8 * selector) & 0xff) << (8 * i);
  }
  return found;
}

inline unsigned subtract_halves(unsigned x, unsigned y) {
  const float2 from = halves_to_floats(x), what = halves_to_floats(y);
  return floats_to_halves(from.x - what.x, from.y - what.y);
}

// What each lane has of the operands and gets of the sums: PTX ISA, "Matrix Fragments for
// mma.m16n8k32", and the same for mma.m16n8k16. Both have rows and columns of 32 bytes: a lane has
// a word of each half of two rows and of one column, and `multiply` those of a whole row and
// column.
template <typename T, typename Multiply>
void multiply_add_fragments(T (&sums)[4], const unsigned (&rows)[4], const unsigned (&columns)[2],
                            const Multiply& multiply) {
  struct Pair {
    unsigned words[2];
  };
  const unsigned lane = emulator::lane(), group = lane / 4, quarter = lane % 4;
  Pair left[2][4], right[2][4];  // of the lane's two rows and columns, by quarters
  for (unsigned half = 0; half < 2; ++half) {
    emulator::publish(emulator::to_word(Pair{{rows[half], rows[2 + half]}}));
    for (unsigned i = 0; i < 4; ++i) {
      left[half][i] = emulator::from_word<Pair>(emulator::published(group * 4 + i));
    }
  }
  emulator::publish(emulator::to_word(Pair{{columns[0], columns[1]}}));
  for (unsigned column = 0; column < 2; ++column) {
    for (unsigned i = 0; i < 4; ++i) {
      right[column][i] =
          emulator::from_word<Pair>(emulator::published((2 * quarter + column) * 4 + i));
    }
  }
  for (unsigned half = 0; half < 2; ++half) {
    for (unsigned column = 0; column < 2; ++column) {
      for (unsigned part = 0; part < 2; ++part) {
        for (unsigned i = 0; i < 4; ++i) {
          sums[2 * half + column] +=
              multiply(left[half][i].words[part], right[column][i].words[part]);
        }
      }
    }
  }
}

inline void multiply_add(int (&sums)[4], const unsigned (&rows)[4], const unsigned (&columns)[2]) {
  const auto byte = [](unsigned word, unsigned i) {
    return static_cast<int>(static_cast<int8_t>(word >> (8 * i)));
  };
  multiply_add_fragments(sums, rows, columns, [&](unsigned left, unsigned right) {
    int sum = 0;
    for (unsigned i = 0; i < 4; ++i) sum += byte(left, i) * byte(right, i);
    return sum;
  });
}

inline void multiply_add(float (&sums)[4], const unsigned (&rows)[4],
                         const unsigned (&columns)[2]) {
  multiply_add_fragments(sums, rows, columns, [](unsigned left, unsigned right) {
    const float2 one = halves_to_floats(left), other = halves_to_floats(right);
    return one.x * other.x + one.y * other.y;
  });
}

template <int kWords>
void load_if(bool wanted, unsigned (&words)[kWords], const char* from) {
  if (wanted) std::memcpy(words, from, sizeof(words));
}

inline void store_if(bool wanted, float* to, float value) {
  if (wanted) *to = value;
}

inline void copy_async(bool wanted, char* to, const char* from) {
  if (wanted) emulator::copy_async(to, from, 16);
}
inline void commit_copies() {
  emulator::commit_copies();
}
template <int kPending>
void wait_for_copies() {
  emulator::wait_for_copies(kPending);
}

inline void load_shared(unsigned (&words)[2], const unsigned* from) {
  std::memcpy(words, from, sizeof(words));
}

inline unsigned transpose(unsigned two) {
  const unsigned lane = emulator::lane(), column = lane / 4, quarter = lane % 4;
  unsigned found = 0;
  emulator::publish(two);
  for (unsigned i = 0; i < 2; ++i) {
    const auto row = static_cast<unsigned>(emulator::published((2 * quarter + i) * 4 + column / 2));
    found |= (row >> (16 * (column % 2)) & 0xffff) << (16 * i);
  }
  return found;
}

}  // namespace kcache
