//! Loops on torch's own threads.

use std::any::Any;
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::{Error, api};

/// How many threads torch uses in one operator (`torch.get_num_threads()`); 1 before
/// [`initialise`](crate::initialise).
#[must_use]
pub fn num_threads() -> usize {
    let Some(api) = api::get() else { return 1 };
    let mut threads = 0;
    // SAFETY: the function only writes its result.
    let status = unsafe { (api.symbols.torch_get_num_threads)(&raw mut threads) };
    if status == 0 { (threads as usize).max(1) } else { 1 }
}

struct Loop<'body> {
    body: &'body (dyn Fn(usize) + Sync),
    tasks: usize,
    next: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

impl Loop<'_> {
    /// Takes tasks until none is left. Never unwinds.
    fn work(&self) {
        loop {
            // Relaxed: the counter only hands out numbers; the loop's end is what orders the bodies' memory.
            let task = self.next.fetch_add(1, Ordering::Relaxed);
            if task >= self.tasks {
                return;
            }
            if let Err(payload) = catch_unwind(AssertUnwindSafe(|| (self.body)(task))) {
                self.next.store(self.tasks, Ordering::Relaxed);
                let mut first = self.panic.lock().unwrap_or_else(PoisonError::into_inner);
                if first.is_none() {
                    *first = Some(payload);
                } else {
                    // Only one can be raised again. Dropping this one could panic where nobody may unwind.
                    std::mem::forget(payload);
                }
            }
        }
    }
}

unsafe extern "C" fn worker(begin: i64, end: i64, context: *mut c_void) {
    // SAFETY: the context is the `Loop` of `parallel_for`, which waits for all workers before it goes away, and is
    // shared between them by reference only.
    let shared = unsafe { &*context.cast::<Loop<'_>>() };
    for _ in begin..end {
        shared.work();
    }
}

/// Calls `body` once for each number below `tasks`, on torch's threads and in any order, and returns when all are
/// done.
///
/// The tasks are handed out one by one, so they may differ in cost; make each worth some microseconds. Within another
/// parallel loop, with one thread or one task, and before [`initialise`](crate::initialise), they run one after the
/// other on the calling thread.
///
/// # Errors
///
/// [`Error::Call`] when torch cannot run the loop; some tasks may then not have run.
///
/// # Panics
///
/// When `body` panics: tasks not yet begun are left out, and the (first) panic goes on in the caller.
pub fn parallel_for(tasks: usize, body: &(dyn Fn(usize) + Sync)) -> Result<(), Error> {
    let workers = num_threads().min(tasks);
    let (Some(api), 2..) = (api::get(), workers) else {
        (0..tasks).for_each(body);
        return Ok(());
    };
    let shared = Loop { body, tasks, next: AtomicUsize::new(0), panic: Mutex::new(None) };
    let context = (&raw const shared).cast_mut().cast::<c_void>();
    // SAFETY: `worker` reads the context as the `Loop` it is, never unwinds, and is not called any more once the
    // function has returned.
    let status = unsafe { (api.symbols.torch_parallel_for)(0, workers as i64, 1, worker, context) };
    if let Some(payload) = shared.panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
        resume_unwind(payload);
    }
    api.check(status, "torch_parallel_for")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new_loop(tasks: usize, body: &(dyn Fn(usize) + Sync)) -> Loop<'_> {
        Loop { body, tasks, next: AtomicUsize::new(0), panic: Mutex::new(None) }
    }

    #[test]
    fn every_task_runs_once_however_many_workers_there_are() {
        let counts: Vec<AtomicUsize> = (0..1000).map(|_| AtomicUsize::new(0)).collect();
        let count = |task: usize| {
            counts[task].fetch_add(1, Ordering::Relaxed);
        };
        let shared = new_loop(counts.len(), &count);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| shared.work());
            }
        });
        assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
    }

    #[test]
    fn a_panic_stops_the_rest_and_is_kept() {
        let ran = AtomicUsize::new(0);
        let body = |task: usize| {
            ran.fetch_add(1, Ordering::Relaxed);
            assert!(task != 3, "task three");
        };
        let shared = new_loop(10, &body);
        shared.work();
        assert_eq!(ran.load(Ordering::Relaxed), 4);
        let payload = shared.panic.into_inner().unwrap().unwrap();
        assert_eq!(Error::panic(payload).to_string(), "Rust panic: task three");
    }

    #[test]
    fn without_torch_the_loop_is_serial() {
        let order = Mutex::new(Vec::new());
        parallel_for(3, &|task| order.lock().unwrap().push(task)).unwrap();
        assert_eq!(order.into_inner().unwrap(), [0, 1, 2]);
        assert_eq!(num_threads(), 1);
    }
}
