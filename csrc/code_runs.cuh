// SPDX-License-Identifier: Apache-2.0
// K codes of the tokens that a warp scores at once, a run, on their way from memory. A lane's group
// of four has eight tokens that follow each other, and the lane a quarter of the codes of each.
#pragma once

#include "ptx.cuh"

namespace kcache {

constexpr int kWarps = 4;                   // vllm_kcache/kernels/score_codes.py
constexpr int kOwnTokens = 8;               // of a thread
constexpr int kRunTokens = 8 * kOwnTokens;  // of a warp, at once

// Where the tokens of a lane's group are, if they are wanted.
struct Source {
  bool wanted;
  const char *codes, *scales;
};

// Words that a load takes at once.
template <int kSteps>
constexpr int kLoad = kSteps % 4 == 0   ? 4
                      : kSteps % 2 == 0 ? 2
                                        : 1;

// A run's codes and scales in registers: of each token of a group, a quarter of its codes. Those of
// the next run take their place as soon as they are read.
template <int kSteps>
class RunInRegisters {
 public:
  static constexpr int kAhead = 1;  // runs on their way
  struct Shared {};

  __device__ explicit RunInRegisters(Shared&) {}
  __device__ void load(const Source& from) {
#pragma unroll
    for (int token = 0; token < kOwnTokens; ++token) load_token(from, token);
    load_scales(from);
  }
  __device__ void wait() const {}
  __device__ void read_codes(unsigned (&words)[kSteps], int token) const {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) words[i] = codes_[token][i / kLoad<kSteps>][i % kLoad<kSteps>];
  }
  __device__ void read_scales(unsigned (&scales)[kOwnTokens]) const {
#pragma unroll
    for (int i = 0; i < kOwnTokens; ++i) scales[i] = scales_[i / 4][i % 4];
  }
  // What has been read may be replaced: a token's codes, and the rest.
  __device__ void replace_token(const Source& next, int token) { load_token(next, token); }
  __device__ void replace_rest(const Source& next) { load_scales(next); }

 private:
  __device__ void load_token(const Source& from, int token) {
    const char* codes = from.codes + (threadIdx.x & 3) * 4 * kSteps + token * 16 * kSteps;
#pragma unroll
    for (int i = 0; i < kSteps / kLoad<kSteps>; ++i) {
      load_if(from.wanted, codes_[token][i], codes + 4 * kLoad<kSteps> * i);
    }
  }
  __device__ void load_scales(const Source& from) {
#pragma unroll
    for (int i = 0; i < kOwnTokens / 4; ++i) load_if(from.wanted, scales_[i], from.scales + 16 * i);
  }

  unsigned codes_[kOwnTokens][kSteps / kLoad<kSteps>][kLoad<kSteps>] = {};
  unsigned scales_[kOwnTokens / 4][4] = {};
};

// The same in shared memory, two runs of a warp: products of many query heads leave too few
// registers for as many warps, and so for as many loads, as memory wants.
template <int kSteps>
class RunInShared {
 public:
  static constexpr int kAhead = 2;
  // Of eight tokens, codes and then scales; the distance spreads groups over the banks.
  static constexpr int kCodeBytes = kOwnTokens * 16 * kSteps, kGroupBytes = kCodeBytes + 64;
  struct alignas(16) Shared {
    char bytes[kWarps][kAhead][8][kGroupBytes];
  };

  __device__ explicit RunInShared(Shared& shared)
      : group_(shared.bytes[threadIdx.x / 32][0][threadIdx.x % 32 / 4]) {}
  __device__ void load(const Source& from) {
    const int at = (threadIdx.x & 3) * 16;
    const char* codes = from.codes + at;
    make_now(codes);
#pragma unroll
    for (int i = 0; i < 2 * kSteps; ++i) {
      copy_async(from.wanted, group_ + at + 64 * i, codes + 64 * i);
    }
    copy_async(from.wanted && at < 32, group_ + kCodeBytes + at, from.scales + at);
    commit_copies();
    turn();
  }
  __device__ void wait() const {
    wait_for_copies<kAhead - 1>();
    __syncwarp();
  }
  __device__ void read_codes(unsigned (&words)[kSteps], int token) const {
    const char* codes = group_ + (threadIdx.x & 3) * 4 * kSteps + token * 16 * kSteps;
#pragma unroll
    for (int i = 0; i < kSteps / kLoad<kSteps>; ++i) {
      load_vector<kLoad<kSteps>>(words + i * kLoad<kSteps>, codes + 4 * kLoad<kSteps> * i);
    }
  }
  __device__ void read_scales(unsigned (&scales)[kOwnTokens]) const {
#pragma unroll
    for (int i = 0; i < kOwnTokens / 4; ++i) {
      load_vector<4>(scales + 4 * i, group_ + kCodeBytes + 16 * i);
    }
  }
  __device__ void replace_token(const Source&, int) const {}
  __device__ void replace_rest(const Source& next) {
    __syncwarp();
    load(next);
  }

 private:
  // To the other run.
  __device__ void turn() {
    constexpr int kRunBytes = 8 * kGroupBytes;
    group_ += second_ ? -kRunBytes : kRunBytes;
    second_ = !second_;
  }
  template <int kWords>
  __device__ static void load_vector(unsigned* words, const char* from) {
    if constexpr (kWords == 4) {
      const uint4 four = *reinterpret_cast<const uint4*>(from);
      words[0] = four.x;
      words[1] = four.y;
      words[2] = four.z;
      words[3] = four.w;
    } else if constexpr (kWords == 2) {
      const uint2 two = *reinterpret_cast<const uint2*>(from);
      words[0] = two.x;
      words[1] = two.y;
    } else {
      words[0] = *reinterpret_cast<const unsigned*>(from);
    }
  }

  char* group_;  // of the run that is read, and replaced, next
  bool second_ = false;
};

}  // namespace kcache
