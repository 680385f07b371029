//! What the parity tests share.
#![allow(dead_code, unused_imports, unused_macros, reason = "each test program uses its own part")]
use std::mem::MaybeUninit;
use std::sync::{Mutex, PoisonError};

use tutel_core::{Element, GroupedShape, Real, reference};
use tutel_cpu::{GroupedGemm, Level, Parallel, Scalar, ScopedThreads, Serial};

pub(crate) fn written<T: Copy>(len: usize, write: impl FnOnce(&mut [MaybeUninit<T>])) -> Vec<T> {
    let mut buffer = vec![MaybeUninit::uninit(); len];
    write(&mut buffer);
    // SAFETY: kernels write every element of their outputs; Miri and the comparisons below would see one left out.
    buffer.into_iter().map(|element| unsafe { element.assume_init() }).collect()
}

/// A seeded stream of values with few significant bits, exact in every element type.
pub(crate) struct Values(pub(crate) u64);

impl Values {
    pub(crate) fn next(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % below
    }
    pub(crate) fn vec(&mut self, len: usize) -> Vec<f64> {
        (0..len).map(|_| self.next(257) as f64 / 64.0 - 2.0).collect()
    }
}

pub(crate) fn cast<T: Element>(values: &[f64]) -> Vec<T> {
    values.iter().map(|&x| T::narrow(T::Accumulator::from_f64(x))).collect()
}

pub(crate) fn wide<T: Element>(values: &[T]) -> Vec<f64> {
    values.iter().map(|x| x.widen().to_f64()).collect()
}

/// Rounds the naive twin's accumulators to the type, as the kernel does.
pub(crate) fn rounded<T: Element>(values: &[T::Accumulator]) -> Vec<f64> {
    values.iter().map(|&x| T::narrow(x).widen().to_f64()).collect()
}

pub(crate) type A<T> = <T as Element>::Accumulator;

pub(crate) fn assert_close<T: Element>(what: &str, ours: &[f64], naive: &[f64], truth: &[f64]) {
    assert_eq!(ours.len(), truth.len(), "{what}");
    let error = |values: &[f64]| values.iter().zip(truth).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    let largest = truth.iter().fold(0.0f64, |largest, x| largest.max(x.abs()));
    // The naive twin may be lucky, and in f64 it is the reference itself: some roundings of values of magnitude 1 are free.
    let roundings = T::EPSILON.max(4.0 * <A<T> as Element>::EPSILON).max(64.0 * f64::EPSILON);
    let allowed = (2.0 * error(naive)).max(largest.max(1.0) * roundings);
    assert!(error(ours) <= allowed, "{what}: error {:e}, allowed {allowed:e}", error(ours));
}

/// Calls a function on every level of processor features that this machine has. The cap on levels holds for the whole
/// process: tests that run at the same time wait for each other here.
pub(crate) fn on_levels(mut run: impl FnMut(Level)) {
    static CAP: Mutex<()> = Mutex::new(());
    let _alone = CAP.lock().unwrap_or_else(PoisonError::into_inner);
    for level in Level::available() {
        level.set_cap();
        assert_eq!(Level::current(), level);
        // The test's output, shown where it fails.
        println!("on level {}", level.name());
        run(level);
    }
}

/// Runs a kernel with 1, 2 and 4 threads and asks for equal bits.
pub(crate) fn on_threads<R: PartialEq>(run: impl Fn(&dyn Parallel) -> R) -> R {
    let one = run(&Serial);
    assert!(one == run(&ScopedThreads(2)), "2 threads give other bits");
    assert!(one == run(&ScopedThreads(4)), "4 threads give other bits");
    one
}

/// Runs a kernel on every level, see [`on_threads`], and gives each level's result to a check.
pub(crate) fn on_levels_and_threads<R: PartialEq>(run: impl Fn(&dyn Parallel) -> R, check: impl Fn(R)) {
    on_levels(|_| check(on_threads(&run)));
}

pub(crate) fn check_grouped<T: Scalar>(
    offsets: &[i64],
    shape: GroupedShape,
    transposed: bool,
    biased: bool,
    seed: u64,
) {
    let GroupedShape { experts, rows, inner, outer } = shape;
    let mut values = Values(seed);
    let left = cast::<T>(&values.vec(rows * inner));
    let right = cast::<T>(&values.vec(rows * outer));
    let weight = cast::<T>(&values.vec(experts * inner * outer));
    let bias = cast::<T>(&values.vec(experts * outer));
    let (exact_left, exact_right) = (wide(&left), wide(&right));
    let (exact_weight, exact_bias) = (wide(&weight), wide(&bias));
    let bias = biased.then_some(&bias[..]);
    let exact_bias = biased.then_some(&exact_bias[..]);

    let naive = rounded::<T>(&reference::grouped_gemm(&left, &weight, bias, offsets, shape, transposed));
    let truth = reference::grouped_gemm(&exact_left, &exact_weight, exact_bias, offsets, shape, transposed);
    let input = GroupedGemm { rows: (&left).into(), weight: &weight, second: None, bias, offsets, transposed };
    on_levels_and_threads(
        |parallel| written(rows * outer, |output| tutel_cpu::grouped_gemm(input, shape, output, parallel).unwrap()),
        |product| assert_close::<T>("grouped_gemm", &wide(&product), &naive, &truth),
    );

    let naive = rounded::<T>(&reference::grouped_gemm_weight_grad(&left, &right, offsets, shape));
    let truth = reference::grouped_gemm_weight_grad(&exact_left, &exact_right, offsets, shape);
    on_levels_and_threads(
        |parallel| {
            written(experts * inner * outer, |output| {
                tutel_cpu::grouped_gemm_weight_grad((&left).into(), (&right).into(), offsets, shape, output, parallel)
                    .unwrap();
            })
        },
        |grad| assert_close::<T>("weight_grad", &wide(&grad), &naive, &truth),
    );

    let naive = rounded::<T>(&reference::grouped_sum(&left, offsets, inner));
    let truth = reference::grouped_sum(&exact_left, offsets, inner);
    on_levels_and_threads(
        |parallel| {
            written(experts * inner, |output| {
                tutel_cpu::grouped_sum(&left, offsets, (rows, inner), output, parallel).unwrap();
            })
        },
        |sums| assert_close::<T>("grouped_sum", &wide(&sums), &naive, &truth),
    );
}

/// Calls a check for each element type.
macro_rules! every_type {
    ($check:ident($($argument:expr),* $(,)?)) => {
        $check::<f64>($($argument),*);
        $check::<f32>($($argument),*);
        $check::<half::bf16>($($argument),*);
        $check::<half::f16>($($argument),*);
    };
}
pub(crate) use every_type;
