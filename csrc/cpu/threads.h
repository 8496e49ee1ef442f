// Work on torch's own threads. A second pool would spin against the first: after each of its regions an OpenMP runtime keeps its threads busy
// waiting for the next, on the very cores that a pool of ours would want.
#pragma once

namespace t2cpu {

// f(data) on `threads` threads, and back when all have left it; on this one alone where 1 is asked for, where there is no runtime, and in a forked
// child, whose parent's threads are not there any more.
void parallel(int threads, void (*f)(void*), void* data);

template <class F>
void parallel(int threads, F f) {
  parallel(threads, [](void* f) { (*static_cast<F*>(f))(); }, &f);
}

}  // namespace t2cpu
