// Work on torch's own threads. A second pool would spin against the first: after each of its regions an OpenMP runtime keeps its threads busy
// waiting for the next, on the very cores that a pool of ours would want.
#pragma once

namespace t2cpu {

struct Team {
  int size, rank;
  void barrier() const;  // all of the team, and what they wrote
};

// f(team, data) on `threads` threads, or on this one alone where 1 is asked for, where there is no runtime, and in a forked child, whose parent's
// threads are not there any more.
void parallel(int threads, void (*f)(const Team&, void*), void* data);

}  // namespace t2cpu
