//! Element by element over large buffers, on the caller's threads.
use std::sync::atomic::{AtomicUsize, Ordering};

use tutel_core::Element;
use tutel_cpu::{Parallel, Scalar, disjoint::Chunks};

use crate::Activation;

/// Elements that one call of `act` gets at most: a few of them in f64 still fit in the nearest cache.
const CHUNK: usize = 2048;

/// Calls `act` with each chunk of a buffer and where it begins. Chunks depend on the length alone, so that results do
/// not depend on the number of threads.
fn each_chunk<T: Send>(buffer: &mut [T], parallel: &dyn Parallel, act: &(dyn Fn(usize, &mut [T]) + Sync)) {
    // Waking a thread costs about as much as this many elements.
    const LEAST: usize = 1 << 15;
    let few = buffer.len() < LEAST;
    let count = buffer.len().div_ceil(CHUNK);
    let chunks = Chunks::new(buffer, CHUNK, count);
    let next = AtomicUsize::new(0);
    let work = || {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= count {
                return;
            }
            act(index * CHUNK, chunks.take(index));
        }
    };
    let threads = if few { 1 } else { parallel.threads().min(count) };
    if threads > 1 {
        parallel.run(threads, &work);
    }
    // Alone, or for what the others have left.
    work();
}

/// A chunk of a slice in the accumulator type.
struct Wide<A>([A; CHUNK]);

impl<A: tutel_core::Real> Wide<A> {
    fn of<T: Element<Accumulator = A>>(values: &[T], from: usize, len: usize) -> Self {
        let mut wide = Self([A::zero(); CHUNK]);
        T::widen_slice(&values[from..from + len], &mut wide.0[..len]);
        wide
    }

    fn multiply(&mut self, other: &Self) {
        for (value, &factor) in self.0.iter_mut().zip(&other.0) {
            *value = *value * factor;
        }
    }
}

/// `act(pre)`, or `act(pre) * up` for gated experts, rounded once; in place of `pre`.
pub(crate) fn activate<T: Scalar>(pre: &mut [T], up: Option<&[T]>, activation: Activation, parallel: &dyn Parallel) {
    each_chunk(pre, parallel, &|start, pre| {
        let mut values = Wide::of(pre, 0, pre.len());
        activation.apply(&mut values.0[..pre.len()]);
        if let Some(up) = up {
            values.multiply(&Wide::of(up, start, pre.len()));
        }
        T::narrow_slice(&values.0[..pre.len()], pre);
    });
}

/// Gradient of `up` in [`activate`]: `grad * act(pre)`, in place of `pre`.
pub(crate) fn up_gradient<T: Scalar>(pre: &mut [T], grad: &[T], activation: Activation, parallel: &dyn Parallel) {
    activate(pre, Some(grad), activation, parallel);
}

/// Gradient of `pre` in [`activate`]: `grad * act'(pre)`, times `up` for gated experts; in place of `pre`.
pub(crate) fn pre_gradient<T: Scalar>(
    pre: &mut [T],
    up: Option<&[T]>,
    grad: &[T],
    activation: Activation,
    parallel: &dyn Parallel,
) {
    each_chunk(pre, parallel, &|start, pre| {
        let mut values = Wide::of(pre, 0, pre.len());
        activation.derive(&mut values.0[..pre.len()]);
        values.multiply(&Wide::of(grad, start, pre.len()));
        if let Some(up) = up {
            values.multiply(&Wide::of(up, start, pre.len()));
        }
        T::narrow_slice(&values.0[..pre.len()], pre);
    });
}

/// `target += addend`.
pub(crate) fn add<T: Scalar>(target: &mut [T], addend: &[T], parallel: &dyn Parallel) {
    each_chunk(target, parallel, &|start, target| {
        let mut values = Wide::of(target, 0, target.len());
        let addend = Wide::of(addend, start, target.len());
        for (value, &addend) in values.0.iter_mut().zip(&addend.0) {
            *value += addend;
        }
        T::narrow_slice(&values.0[..target.len()], target);
    });
}
