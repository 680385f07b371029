//! Equal bits for every number of threads, and threads of the caller's.
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::naive::{Values, cast};
use tutel_moe::half::bf16;
use tutel_moe::{Activation, MoeLayer, MoeLayerBuilder, Parallel, Scalar, ScopedThreads, Serial};

/// Large enough that every kernel has work for several threads.
fn builder<T: Scalar>(gated: bool) -> MoeLayerBuilder<T> {
    let builder = MoeLayer::builder().model_dim(96).hidden_size(160).experts(6).top_k(2).gated(gated);
    builder.activation(Activation::Gelu).capacity_factor(0.9).seed(3)
}

fn results<T: Scalar>(layer: &MoeLayer<T>) -> (Vec<T>, Vec<T>, Vec<Vec<T>>) {
    let tokens: Vec<T> = cast(&Values(1).vec(700 * 96, 1.0));
    let grad: Vec<T> = cast(&Values(2).vec(700 * 96, 1.0));
    let (output, saved) = layer.forward_train(&tokens).unwrap();
    let gradients = layer.backward(saved, &grad, 0.1).unwrap();
    let parameters = gradients.parameters.iter().map(|gradient| gradient.values.to_vec()).collect();
    (output.tokens, gradients.tokens, parameters)
}

fn check<T: Scalar>() {
    for gated in [false, true] {
        let serial = results(&builder::<T>(gated).parallel(Serial).build().unwrap());
        for threads in [2, 3, 4] {
            let found = results(&builder::<T>(gated).threads(threads).build().unwrap());
            assert!(found == serial, "{threads} threads give other bits");
        }
    }
}

#[test]
fn bits_do_not_depend_on_the_number_of_threads() {
    check::<f32>();
    check::<f64>();
    check::<bf16>();
}

#[test]
fn layers_can_be_shared_by_threads() {
    let layer = builder::<f32>(true).build().unwrap();
    let tokens: Vec<f32> = cast(&Values(1).vec(3 * 96, 1.0));
    let alone = layer.forward(&tokens).unwrap();
    std::thread::scope(|scope| {
        let calls = [(); 3].map(|()| scope.spawn(|| layer.forward(&tokens).unwrap()));
        for call in calls {
            assert_eq!(call.join().unwrap(), alone);
        }
    });
}

/// Counts how often it is asked to run something.
struct Counting<'a>(&'a AtomicUsize);

impl Parallel for Counting<'_> {
    fn threads(&self) -> usize {
        2
    }
    fn run(&self, workers: usize, worker: &(dyn Fn() + Sync)) {
        self.0.fetch_add(1, Ordering::Relaxed);
        ScopedThreads(2).run(workers, worker);
    }
}

#[test]
fn the_callers_threads_are_used() {
    static RUNS: AtomicUsize = AtomicUsize::new(0);
    let layer = builder::<f32>(false).parallel(Counting(&RUNS)).build().unwrap();
    assert_eq!(results(&layer), results(&builder(false).parallel(Serial).build().unwrap()));
    assert!(RUNS.load(Ordering::Relaxed) > 5);
}
