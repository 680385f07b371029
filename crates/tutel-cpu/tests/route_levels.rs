//! Routing and the moves of rows compute the same bits on every level of processor features that this machine has, and
//! for 1, 2, 3 and 5 threads. One test, since the cap on levels holds for the whole process.
mod common;

use std::fmt::Debug;

use common::{Values, cast, every_type, wide, written};
use tutel_core::{Element, RoutingShape, RowShape, ScoreFunction, reference};
use tutel_cpu::{Level, Parallel, Scalar, ScopedThreads, SelectBackward, SelectOutput, Serial};

/// Bits, by which a NaN equals itself.
fn bits<T: Element>(values: &[T]) -> Vec<u64> {
    wide(values).into_iter().map(|value| if value.is_nan() { u64::MAX } else { value.to_bits() }).collect()
}

/// Runs on every level and with several threads and asks for one result.
fn everywhere<R: PartialEq + Debug>(what: &str, highest: Level, run: impl Fn(&dyn Parallel) -> R) -> R {
    Level::Portable.set_cap();
    let expected = run(&Serial);
    for level in [Level::Portable, Level::Avx2, Level::Avx512, Level::Avx512Bf16] {
        if level > highest {
            continue;
        }
        level.set_cap();
        for threads in [1, 2, 3, 5] {
            let found = run(&ScopedThreads(threads));
            assert!(found == expected, "{what}: {} with {threads} threads gives other bits", level.name());
        }
    }
    expected
}

/// Logits with what is hard about them.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Plain,
    /// Few different values.
    Ties,
    /// All equal.
    Flat,
    /// NaN and infinities of both signs here and there, one row of negative infinities.
    Special,
    /// Most experts at negative infinity.
    Masked,
}

fn logits_of(kind: Kind, shape: RoutingShape) -> Vec<f64> {
    let mut values = Values(shape.experts as u64);
    let mut logits = values.vec(shape.tokens * shape.experts);
    for (place, logit) in logits.iter_mut().enumerate() {
        *logit = match kind {
            Kind::Plain => *logit * 4.0,
            Kind::Ties => logit.round(),
            Kind::Flat => 0.5,
            Kind::Masked if place % 5 > 0 => f64::NEG_INFINITY,
            Kind::Special if place < shape.experts => f64::NEG_INFINITY,
            Kind::Special => match values.next(97) {
                0 => f64::NAN,
                1 => f64::INFINITY,
                2 => f64::NEG_INFINITY,
                _ => *logit,
            },
            Kind::Masked => *logit,
        };
    }
    logits
}

fn check_route<T: Scalar>(highest: Level, shape: RoutingShape, kind: Kind, function: ScoreFunction) {
    let logits = cast::<T>(&logits_of(kind, shape));
    let what = format!("{kind:?} {function:?} {shape:?}");
    let normalize = function == ScoreFunction::Softmax;
    let (ids, ..) = everywhere(&what, highest, |parallel| {
        let (mut weights, mut top_scores, mut score_sums) = (vec![], vec![], vec![]);
        let ids = written(shape.choices(), |ids| {
            weights = written(shape.choices(), |weights| {
                top_scores = written(shape.tokens, |top_scores| {
                    score_sums = written(shape.experts, |score_sums| {
                        let output = SelectOutput { ids, weights, top_scores, score_sums };
                        tutel_cpu::select_experts(&logits, shape, function, normalize, output, parallel).unwrap();
                    });
                });
            });
        });
        (ids, bits(&weights), bits(&top_scores), bits(&score_sums))
    });
    let naive = reference::select_experts(&logits, shape, function, normalize);
    assert_eq!(ids, naive.ids, "{what}");

    let mut values = Values(7);
    let grad_weights = cast::<T::Accumulator>(&values.vec(shape.choices()));
    let grad_sums = cast::<T::Accumulator>(&values.vec(shape.experts));
    for (grad_weights, grad_score_sums) in [(Some(&grad_weights), None), (Some(&grad_weights), Some(&grad_sums))] {
        everywhere(&what, highest, |parallel| {
            let input = SelectBackward {
                logits: &logits,
                ids: &ids,
                grad_weights: grad_weights.map(|grad| &grad[..]),
                grad_score_sums: grad_score_sums.map(|grad| &grad[..]),
                function,
                normalize,
            };
            bits(&written(logits.len(), |output| {
                tutel_cpu::select_experts_backward(&input, shape, output, parallel).unwrap();
            }))
        });
    }
}

fn check_moves<T: Scalar>(highest: Level, tokens: usize, top_k: usize, width: usize) {
    let routing = RoutingShape::new(tokens, top_k, top_k).unwrap();
    let ids: Vec<i32> =
        (0..routing.choices()).map(|place| ((place * 7 + place / 5) % (top_k + 1)) as i32 - 1).collect();
    let plan = reference::assign_rows(&ids, None, routing, Some(tokens / 2 + 1)).unwrap();
    let shape = RowShape::new(tokens, routing.choices(), width, top_k).unwrap();
    let mut values = Values(3);
    let inputs = cast::<T>(&values.vec(tokens * width));
    let rows = cast::<T>(&values.vec(shape.rows * width));
    let weights = cast::<T::Accumulator>(&values.vec(shape.choices()));
    let what = format!("{shape:?}");
    for weights in [None, Some(&weights[..])] {
        let dispatched = everywhere(&what, highest, |parallel| {
            bits(&written(rows.len(), |output| {
                tutel_cpu::dispatch(&inputs, &plan.row_choice, weights, shape, output, parallel).unwrap();
            }))
        });
        let naive = reference::dispatch(&inputs, &plan.row_choice, weights, shape);
        assert!(dispatched == bits(&naive.into_iter().map(T::narrow).collect::<Vec<T>>()), "{what}: dispatch");
        everywhere(&what, highest, |parallel| {
            bits(&written(inputs.len(), |output| {
                tutel_cpu::combine(&rows, &plan.row_index, weights, shape, output, parallel).unwrap();
            }))
        });
    }
    everywhere(&what, highest, |parallel| {
        bits(&written(shape.choices(), |output| {
            tutel_cpu::row_dot(&rows, &plan.row_index, &inputs, shape, output, parallel).unwrap();
        }))
    });
    everywhere(&what, highest, |parallel| {
        bits(&written(top_k * width, |output| {
            tutel_cpu::grouped_sum(&rows, &plan.offsets, (shape.rows, width), output, parallel).unwrap();
        }))
    });
}

#[test]
fn every_level_computes_the_same_bits() {
    let highest = Level::current();
    println!("this processor ends at {}", highest.name());
    let sizes = [
        (1, 1, 1),
        (3, 2, 1),
        (5, 16, 16),
        (70, 17, 2),
        (300, 64, 8),
        (33, 100, 33),
        (9, 4096, 32),
        (40, 257, 16),
        (3, 60, 60),
        (0, 8, 2),
    ];
    for (tokens, experts, top_k) in sizes {
        let shape = RoutingShape::new(tokens, experts, top_k).unwrap();
        for kind in [Kind::Plain, Kind::Ties, Kind::Flat, Kind::Special, Kind::Masked] {
            every_type!(check_route(highest, shape, kind, ScoreFunction::Softmax));
            every_type!(check_route(highest, shape, kind, ScoreFunction::Identity));
        }
    }
    for (tokens, top_k, width) in
        [(0, 2, 8), (1, 1, 1), (7, 3, 65), (130, 2, 333), (40, 32, 64), (5, 2, 0), (300, 4, 1040)]
    {
        every_type!(check_moves(highest, tokens, top_k, width));
    }
    // Tokens so many that they are read one after the other, and rows so many that they are written around the caches;
    // every fourth row is aligned for that.
    check_moves::<f32>(highest, 2100, 2, 2049);
}
