// SPDX-License-Identifier: Apache-2.0
// Kernels with a fault each, which the emulator must notice (test_emulator.py).
#include <cuda_runtime.h>

#include "ptx.cuh"

namespace {

// Each thread adds up what all wrote. `barrier` off: some read before others wrote.
template <bool kBarrier>
__global__ void sums(int* out) {
  __shared__ int values[64];
  values[threadIdx.x] = 0;
  __syncthreads();
  values[threadIdx.x] = static_cast<int>(threadIdx.x + 1);
  if (kBarrier) __syncthreads();
  int sum = 0;
  for (int i = 0; i < 64; ++i) sum += values[i];
  out[blockIdx.x * 64 + threadIdx.x] = sum;
}

// Each warp leaves a word and reads the next one's, many exchanges later: far less than a barrier.
__global__ void far_ahead(int* out) {
  __shared__ int words[2];
  const int warp = static_cast<int>(threadIdx.x) / 32;
  words[warp] = -7;
  __syncthreads();
  int value = 1;
  for (int i = 0; i < 10; ++i) value = __shfl_xor_sync(0xffffffffu, value, 1);
  if (warp == 1) words[warp] = value;
  for (int i = 0; i < 40; ++i) value = __shfl_xor_sync(0xffffffffu, value, 1);
  out[blockIdx.x * 64 + threadIdx.x] = words[1];
}

__global__ void two_barriers() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void missing_lanes(int* out) {
  if (threadIdx.x % 32 < 5) return;
  out[threadIdx.x] = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x), 7);
}

__global__ void past_the_end() {
  __shared__ int words[63];
  int* all = words;
  all[threadIdx.x] = 0;
}

// The block that went before left a number there.
__global__ void unwritten(int* out) {
  __shared__ int word;
  out[blockIdx.x * 64 + threadIdx.x] = word;
  __syncthreads();
  word = 5;
}

__device__ int place;

// Which thread block is the how manieth.
__global__ void order(int* out) {
  if (threadIdx.x == 0) out[atomicAdd(&place, 1) % 192] = static_cast<int>(blockIdx.x);
}

__global__ void shuffles(int* out) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int up = __shfl_up_sync(0xffffffffu, lane, 3), down = __shfl_xor_sync(0xffffffffu, up, 1);
  out[threadIdx.x] = down + (__ballot_sync(0xffffffffu, lane % 2 == 1) == 0xaaaaaaaau ? 100 : 0);
}

alignas(16) __device__ int sevens[4] = {7, 7, 7, 7};

// Each thread copies a group, and another, waits for all but `kPending`, and begins a third that
// takes the place of the first.
template <int kPending>
__global__ void copies(int* out) {
  __shared__ int words[512];
  char* first = reinterpret_cast<char*>(words + 4 * threadIdx.x);
  char* second = reinterpret_cast<char*>(words + 256 + 4 * threadIdx.x);
  const char* from = reinterpret_cast<const char*>(sevens);
  kcache::copy_async(true, first, from);
  kcache::copy_async(false, second, from);
  kcache::commit_copies();
  kcache::copy_async(true, second, from);
  kcache::commit_copies();
  kcache::wait_for_copies<kPending>();
  out[threadIdx.x] = words[4 * threadIdx.x + 3];
  out[64 + threadIdx.x] = words[256 + 4 * threadIdx.x];
  kcache::copy_async(true, first, from);
  out[128 + threadIdx.x] = words[4 * threadIdx.x];
}

}  // namespace

extern "C" int run(int which, int* out) {
  if (which == 0) sums<true><<<3, 64, 0, nullptr>>>(out);
  if (which == 1) sums<false><<<3, 64, 0, nullptr>>>(out);
  if (which == 2) two_barriers<<<1, 64, 0, nullptr>>>();
  if (which == 3) missing_lanes<<<1, 64, 0, nullptr>>>(out);
  if (which == 4) past_the_end<<<1, 64, 0, nullptr>>>();
  if (which == 5) unwritten<<<3, 64, 0, nullptr>>>(out);
  if (which == 6) shuffles<<<1, 64, 0, nullptr>>>(out);
  if (which == 7) far_ahead<<<3, 64, 0, nullptr>>>(out);
  if (which == 8) order<<<192, 32, 0, nullptr>>>(out);
  if (which == 9) copies<0><<<1, 64, 0, nullptr>>>(out);
  if (which == 10) copies<1><<<1, 64, 0, nullptr>>>(out);
  if (which == 11) copies<2><<<1, 64, 0, nullptr>>>(out);
  return cudaGetLastError();
}
