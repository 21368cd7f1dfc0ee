// SPDX-License-Identifier: Apache-2.0
// The part of CUDA C++ that csrc/ uses, for a C++ compiler without CUDA (tests/csrc/build.py).
//
// A thread block runs in one host thread, its threads as coroutines that change at barriers only.
// So a test sees what a missing barrier, a barrier that not all threads reach, or shared memory
// that nobody wrote does to a result; it sees nothing of the GPU's memory model. Thread blocks of a
// launch run in an order and in a number of host threads that are drawn anew for each launch.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __device__
#define __host__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline int2 make_int2(int x, int y) {
  return {x, y};
}

inline uint2 make_uint2(unsigned x, unsigned y) {
  return {x, y};
}

using std::max;
using std::min;

namespace emulator {

struct Index {
  unsigned x, y, z;
};
extern thread_local Index thread_index, block_index;
extern thread_local Index grid_size, block_size;

// Barriers of the thread that runs. `site` tells one statement from another.
void sync_threads(int site);
void sync_warp();
// A word of each lane, exchanged: what `lane` passed.
void publish(uint64_t value);
uint64_t published(unsigned lane);
unsigned lane();

// A copy of the thread that runs, with others in groups: `to` is poisoned at once, and written when
// the thread waits for the copy's group, so that nothing may read or write it between.
void copy_async(void* to, const void* from, size_t bytes);
void commit_copies();
void wait_for_copies(unsigned pending);

// Memory of a `__shared__` variable, told from others by its line; poisoned when a block begins.
void* shared_memory(int line, size_t bytes);
cudaError_t run(dim3 grid, unsigned threads, const std::function<void()>& thread);
cudaError_t last_error();
// Nanoseconds since some time, by a clock that goes on by a step each time it is read.
long long now_ns();

template <typename T>
T& shared_variable(int line) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 48 * 1024);
  return *static_cast<T*>(shared_memory(line, sizeof(T)));
}

template <typename T>
uint64_t to_word(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  return word;
}
template <typename T>
T from_word(uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof(T));
  return value;
}
template <typename T>
T exchange(T value, unsigned source) {
  publish(to_word(value));
  return from_word<T>(published(source));
}

// kernel<<<grid, threads, 0, stream>>>, to be called with the arguments.
template <typename... Parameters>
auto launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, int, cudaStream_t) {
  return [=](auto... arguments) { run(grid, threads, [&] { kernel(arguments...); }); };
}

}  // namespace emulator

#define threadIdx (emulator::thread_index)
#define blockIdx (emulator::block_index)
#define gridDim (emulator::grid_size)
#define blockDim (emulator::block_size)
#define __syncthreads() emulator::sync_threads(__LINE__)

inline void __syncwarp(unsigned = 0xffffffffu) {
  emulator::sync_warp();
}
inline void __threadfence() {
  std::atomic_thread_fence(std::memory_order_seq_cst);
}
inline void __nanosleep(unsigned) {
  for (std::atomic<int> spin{0}; spin < 1000; ++spin) {
  }
}

template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  return emulator::exchange(value, static_cast<unsigned>(source) & 31);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int bits) {
  return emulator::exchange(value, emulator::lane() ^ static_cast<unsigned>(bits));
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int delta) {
  const int source = static_cast<int>(emulator::lane()) - delta;
  return emulator::exchange(value, source < 0 ? emulator::lane() : static_cast<unsigned>(source));
}
template <typename T, typename Reduce>
T reduce_lanes(T value, const Reduce& reduce) {
  emulator::publish(emulator::to_word(value));
  T all = emulator::from_word<T>(emulator::published(0));
  for (unsigned i = 1; i < 32; ++i)
    all = reduce(all, emulator::from_word<T>(emulator::published(i)));
  return all;
}
inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  return reduce_lanes(value, [](unsigned x, unsigned y) { return max(x, y); });
}
inline int __reduce_add_sync(unsigned, int value) {
  return reduce_lanes(value, [](int x, int y) { return x + y; });
}
inline unsigned __ballot_sync(unsigned, bool predicate) {
  emulator::publish(predicate);
  unsigned lanes = 0;
  for (unsigned i = 0; i < 32; ++i) lanes |= static_cast<unsigned>(emulator::published(i)) << i;
  return lanes;
}

inline int __popc(unsigned value) {
  return __builtin_popcount(value);
}
inline int __ffs(unsigned value) {
  return __builtin_ffs(static_cast<int>(value));
}
inline unsigned __float_as_uint(float value) {
  return emulator::from_word<unsigned>(emulator::to_word(value));
}

inline float __uint_as_float(unsigned bits) {
  return emulator::from_word<float>(bits);
}
inline int __float2int_rn(float value) {
  return static_cast<int>(rintf(value));
}
inline float __fmul_rn(float x, float y) {
  return x * y;
}

// Loads past a cache: there is none.
template <typename T>
T __ldcg(const T* pointer) {
  return *static_cast<const volatile T*>(pointer);
}
inline float2 __ldcg(const float2* pointer) {
  return {__ldcg(&pointer->x), __ldcg(&pointer->y)};
}
inline uint4 __ldcg(const uint4* pointer) {
  return {__ldcg(&pointer->x), __ldcg(&pointer->y), __ldcg(&pointer->z), __ldcg(&pointer->w)};
}
inline float4 __ldcg(const float4* pointer) {
  // A GPU would stop here. No result is right with these.
  if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) return {NAN, NAN, NAN, NAN};
  const float* from = &pointer->x;
  return {__ldcg(from), __ldcg(from + 1), __ldcg(from + 2), __ldcg(from + 3)};
}
template <typename T>
T __ldg(const T* pointer) {
  return *pointer;
}
template <typename T>
T __ldcs(const T* pointer) {
  return *pointer;
}

template <typename T>
T atomicAdd(T* pointer, std::type_identity_t<T> value) {
  return __atomic_fetch_add(pointer, value, __ATOMIC_SEQ_CST);
}
template <typename T>
T atomicOr(T* pointer, std::type_identity_t<T> value) {
  return __atomic_fetch_or(pointer, value, __ATOMIC_SEQ_CST);
}
template <typename T>
T atomicExch(T* pointer, std::type_identity_t<T> value) {
  return __atomic_exchange_n(pointer, value, __ATOMIC_SEQ_CST);
}
template <typename T>
T atomicCAS(T* pointer, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  __atomic_compare_exchange_n(pointer, &expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
  return expected;
}

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
// So few that tests have batches of one wave and of more.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 2;
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() {
  return emulator::last_error();
}
