//! Who runs the tasks of a kernel.
use std::sync::atomic::{AtomicUsize, Ordering};

/// Runs workers of a kernel, each perhaps on a thread of its own.
pub trait Parallel: Sync {
    /// How many workers may run at once, at least 1.
    fn threads(&self) -> usize;
    /// Calls `worker` `workers` times and returns when all calls have returned. They may run at once or one by one.
    fn run(&self, workers: usize, worker: &(dyn Fn() + Sync));
}

/// The tasks that one worker takes: an iterator that shares its counter with the other workers.
pub(crate) struct Tasks<'a> {
    next: &'a AtomicUsize,
    end: usize,
}

impl Iterator for Tasks<'_> {
    type Item = usize;
    fn next(&mut self) -> Option<usize> {
        // A worker asks once more after the last task: the counter ends at `end + workers`, far from overflow.
        let task = self.next.fetch_add(1, Ordering::Relaxed);
        (task < self.end).then_some(task)
    }
}

/// Runs tasks `0..tasks`, each once. A worker is called with the tasks it takes, so that scratch memory can be
/// allocated once a worker. Which worker runs a task is chance: a task must not depend on it.
pub(crate) fn each_task(parallel: &dyn Parallel, tasks: usize, worker: &(dyn Fn(Tasks<'_>) + Sync)) {
    let next = AtomicUsize::new(0);
    let work = || worker(Tasks { next: &next, end: tasks });
    match parallel.threads().min(tasks) {
        0 => {}
        1 => work(),
        workers => parallel.run(workers, &work),
    }
}

/// The caller's threads, or the calling thread alone for work so small (in multiply-adds) that waking others costs more.
pub(crate) fn worthwhile(parallel: &dyn Parallel, work: usize) -> &dyn Parallel {
    const LEAST: usize = 1 << 19;
    if work < LEAST { &Serial } else { parallel }
}

/// How many items of `cost` elements each make a task worth a thread's while.
pub(crate) fn items_per_task(cost: usize) -> usize {
    const ELEMENTS: usize = 32 * 1024;
    (ELEMENTS / cost.max(1)).max(1)
}

/// Everything on the calling thread.
#[derive(Debug, Clone, Copy, Default)]
pub struct Serial;

impl Parallel for Serial {
    fn threads(&self) -> usize {
        1
    }
    fn run(&self, workers: usize, worker: &(dyn Fn() + Sync)) {
        (0..workers).for_each(|_| worker());
    }
}

/// Threads of the standard library, started anew for each kernel.
#[derive(Debug, Clone, Copy)]
pub struct ScopedThreads(pub usize);

impl Parallel for ScopedThreads {
    fn threads(&self) -> usize {
        self.0.max(1)
    }
    fn run(&self, workers: usize, worker: &(dyn Fn() + Sync)) {
        std::thread::scope(|scope| {
            for _ in 1..workers {
                scope.spawn(worker);
            }
            worker();
        });
    }
}
