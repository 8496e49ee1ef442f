// Work on torch's own threads. After each parallel region an OpenMP runtime keeps its threads spinning for the next
// one. A second pool of threads would have to share the cores with them.
#pragma once

namespace t2cpu {

// Calls f(data) on `threads` threads, and returns when all have left it. It runs on this thread alone for threads = 1,
// without a runtime, and in a forked child, which does not have the threads of its parent.
void parallel(int threads, void (*f)(void*), void* data);

template <class F>
void parallel(int threads, F f) {
  parallel(threads, [](void* f) { (*static_cast<F*>(f))(); }, &f);
}

}  // namespace t2cpu
