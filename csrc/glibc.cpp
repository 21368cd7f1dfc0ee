// SPDX-License-Identifier: Apache-2.0
// libstdc++'s shared_ptr reads glibc 2.32's mark of a process with one thread. PyTorch and vLLM run
// on glibc 2.28, and so must this: "no", the answer that is always right, is given here.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}
