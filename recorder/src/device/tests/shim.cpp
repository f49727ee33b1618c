// The kernel as ordinary C++: what runs between two meetings of a block's threads is a loop over them.
#define OPTAPE_HOST
#include "kernels.cu"

static Shared shared;

static void fold_all() {
  for (u32 distance = THREADS / 2; distance > 0; distance >>= 1) {
    for (u32 thread = 0; thread < THREADS; ++thread) {
      fold(shared, thread, distance);
    }
  }
}

static void run_block(const Job& job, u32 block) {
  for (u32 thread = 0; thread < THREADS; ++thread) {
    gather(job, shared, block, thread);
  }
  fold_all();
  if (publish(job, shared, block) == 0) {
    return;
  }
  for (u32 at = 0; at < job.count; ++at) {
    for (u32 thread = 0; thread < THREADS; ++thread) {
      collect(job, shared, job.items[at], thread);
    }
    fold_all();
    deliver(job, shared, at);
  }
  if (job.joint != 0) {
    for (u32 thread = 0; thread < THREADS; ++thread) {
      multiply(job, shared, thread);
    }
    fold_all();
  }
  finish(job, shared);
}

extern "C" void optape_run(const Job* job) {
  // Blocks come in any order.
  for (u32 block = 0; block < job->blocks; ++block) {
    run_block(*job, job->blocks - 1 - block);
  }
}

extern "C" u64 optape_size(i32 which) {
  const u64 sizes[] = {sizeof(Item), sizeof(Tally), sizeof(Answer), sizeof(Area), sizeof(Job)};
  return sizes[which];
}
