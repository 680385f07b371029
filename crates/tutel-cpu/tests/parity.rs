//! Every kernel against its naive twin: the error against the f64 reference is at most twice the error that the naive
//! twin makes in the same type (and never more than a rounding of the largest value), for every element type and
//! for shapes with odd sizes, empty experts and dropped choices, on every level of processor features that this machine
//! has; and results have equal bits for 1, 2 and 4 threads.
mod common;

use common::{
    A, Values, assert_close, cast, check_grouped, every_type, on_levels, on_levels_and_threads, on_threads, rounded,
    wide, written,
};
use proptest::prelude::*;
use tutel_core::{GroupedShape, RoutePlan, RoutingShape, RowShape, ScoreFunction, reference};
use tutel_cpu::{Along, AssignOutput, GroupedGemm, Parallel, Scalar, SelectBackward, SelectOutput, Serial};

type SelectionOf<T> = (Vec<i32>, Vec<T>, Vec<T>, Vec<T>);

fn select<T: Scalar>(
    logits: &[T],
    shape: RoutingShape,
    function: ScoreFunction,
    normalize: bool,
    parallel: &dyn Parallel,
) -> SelectionOf<T::Accumulator> {
    let (mut weights, mut top_scores, mut score_sums) = (vec![], vec![], vec![]);
    let ids = written(shape.choices(), |ids| {
        weights = written(shape.choices(), |weights| {
            top_scores = written(shape.tokens, |top_scores| {
                score_sums = written(shape.experts, |score_sums| {
                    let output = SelectOutput { ids, weights, top_scores, score_sums };
                    tutel_cpu::select_experts(logits, shape, function, normalize, output, parallel).unwrap();
                });
            });
        });
    });
    (ids, weights, top_scores, score_sums)
}

fn check_select<T: Scalar>(shape: RoutingShape, function: ScoreFunction, normalize: bool, seed: u64) {
    let logits = Values(seed).vec(shape.tokens * shape.experts);
    let (logits, exact): (Vec<T>, Vec<f64>) = (cast(&logits), wide(&cast::<T>(&logits)));
    let naive = reference::select_experts(&logits, shape, function, normalize);
    let truth = reference::select_experts(&exact, shape, function, normalize);
    on_levels_and_threads(
        |parallel| select(&logits, shape, function, normalize, parallel),
        |(ids, weights, top_scores, score_sums)| {
            assert_eq!(ids, truth.ids, "ids, ties to the lower one");
            assert_close::<A<T>>("weights", &wide(&weights), &wide(&naive.weights), &truth.weights);
            assert_close::<A<T>>("top_scores", &wide(&top_scores), &wide(&naive.top_scores), &truth.top_scores);
            assert_close::<A<T>>("score_sums", &wide(&score_sums), &wide(&naive.score_sums), &truth.score_sums);
        },
    );

    let mut values = Values(seed + 1);
    let (grad_weights, grad_sums) = (values.vec(shape.choices()), values.vec(shape.experts));
    let (narrow_weights, narrow_sums) = (cast::<A<T>>(&grad_weights), cast::<A<T>>(&grad_sums));
    let (ids, f) = (&truth.ids, function);
    let naive = reference::select_experts_backward(&logits, ids, &narrow_weights, &narrow_sums, shape, f, normalize);
    let naive = rounded::<T>(&naive);
    let truth = reference::select_experts_backward(&exact, ids, &grad_weights, &grad_sums, shape, f, normalize);
    let input = SelectBackward {
        logits: &logits,
        ids,
        grad_weights: Some(&narrow_weights),
        grad_score_sums: Some(&narrow_sums),
        function,
        normalize,
    };
    on_levels_and_threads(
        |parallel| {
            written(logits.len(), |output| {
                tutel_cpu::select_experts_backward(&input, shape, output, parallel).unwrap();
            })
        },
        |grad| assert_close::<T>("grad_logits", &wide(&grad), &naive, &truth),
    );
}

fn plan_of(ids: &[i32], priority: Option<&[f64]>, shape: RoutingShape, capacity: Option<usize>) -> RoutePlan {
    on_threads(|parallel| plan_on(ids, priority, shape, capacity, parallel))
}

fn plan_on(
    ids: &[i32],
    priority: Option<&[f64]>,
    shape: RoutingShape,
    capacity: Option<usize>,
    parallel: &dyn Parallel,
) -> RoutePlan {
    let mut plan = RoutePlan {
        slots: vec![],
        tokens_per_expert: vec![],
        first_choices: vec![],
        offsets: vec![],
        row_index: vec![],
        row_choice: vec![],
    };
    plan.slots = written(shape.choices(), |slots| {
        plan.tokens_per_expert = written(shape.experts, |tokens_per_expert| {
            plan.first_choices = written(shape.experts, |first_choices| {
                plan.offsets = written(shape.experts + 1, |offsets| {
                    plan.row_index = written(shape.choices(), |row_index| {
                        plan.row_choice = written(shape.choices(), |row_choice| {
                            let output = AssignOutput {
                                slots,
                                tokens_per_expert,
                                first_choices,
                                offsets,
                                row_index,
                                row_choice,
                            };
                            tutel_cpu::assign_rows(ids, priority, shape, capacity, output, parallel).unwrap();
                        });
                    });
                });
            });
        });
    });
    plan
}

fn check_rows<T: Scalar>(plan: &RoutePlan, routing: RoutingShape, width: usize, weighted: bool, seed: u64) {
    let shape = RowShape::new(routing.tokens, routing.choices(), width, routing.top_k).unwrap();
    let mut values = Values(seed);
    let tokens = cast::<T>(&values.vec(shape.tokens * width));
    let rows = cast::<T>(&values.vec(shape.rows * width));
    let weights = cast::<T::Accumulator>(&values.vec(shape.choices()));
    let (exact_tokens, exact_rows, exact_weights) = (wide(&tokens), wide(&rows), wide(&weights));
    let weights = weighted.then_some(&weights[..]);
    let exact_weights = weighted.then_some(&exact_weights[..]);

    let naive = rounded::<T>(&reference::dispatch(&tokens, &plan.row_choice, weights, shape));
    let truth = reference::dispatch(&exact_tokens, &plan.row_choice, exact_weights, shape);
    on_levels_and_threads(
        |parallel| {
            written(rows.len(), |output| {
                tutel_cpu::dispatch(&tokens, &plan.row_choice, weights, shape, output, parallel).unwrap();
            })
        },
        |dispatched| assert_close::<T>("dispatch", &wide(&dispatched), &naive, &truth),
    );

    let naive = rounded::<T>(&reference::combine(&rows, &plan.row_index, weights, shape));
    let truth = reference::combine(&exact_rows, &plan.row_index, exact_weights, shape);
    on_levels_and_threads(
        |parallel| {
            written(tokens.len(), |output| {
                tutel_cpu::combine(&rows, &plan.row_index, weights, shape, output, parallel).unwrap();
            })
        },
        |combined| assert_close::<T>("combine", &wide(&combined), &naive, &truth),
    );

    let naive = wide(&reference::row_dot(&rows, &plan.row_index, &tokens, shape));
    let truth = reference::row_dot(&exact_rows, &plan.row_index, &exact_tokens, shape);
    on_levels_and_threads(
        |parallel| {
            written(shape.choices(), |output| {
                tutel_cpu::row_dot(&rows, &plan.row_index, &tokens, shape, output, parallel).unwrap();
            })
        },
        |dots| assert_close::<T::Accumulator>("row_dot", &wide(&dots), &naive, &truth),
    );
}

fn ids_of(shape: RoutingShape, skew: bool, holes: bool, seed: u64) -> Vec<i32> {
    let mut values = Values(seed);
    (0..shape.choices())
        .map(|_| {
            let id = if skew && values.next(10) > 0 { 0 } else { values.next(shape.experts as u64) as i32 };
            if holes && values.next(7) == 0 { -1 } else { id }
        })
        .collect()
}

proptest! {
    // PROPTEST_CASES asks for fewer, where a run is slow.
    #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases.min(48), ..ProptestConfig::default() })]

    #[test]
    fn selection(tokens in 0usize..70, experts in 1usize..40, k in 1usize..40, seed: u32, softmax: bool, normalize: bool) {
        let shape = RoutingShape::new(tokens, experts, k.min(experts)).unwrap();
        let function = if softmax { ScoreFunction::Softmax } else { ScoreFunction::Identity };
        // Identity scores may sum to anything; they are normalised where they are positive only.
        every_type!(check_select(shape, function, normalize && softmax, seed.into()));
    }

    #[test]
    fn rows(
        (tokens, experts, k) in (0usize..50, 1usize..9, 1usize..9),
        width in 0usize..90, seed: u32, skew: bool, holes: bool, weighted: bool,
        capacity in proptest::option::of(0usize..20), prioritized: bool,
    ) {
        let routing = RoutingShape::new(tokens, experts, k.min(experts)).unwrap();
        let ids = ids_of(routing, skew, holes, seed.into());
        let mut priority = Values(seed.into()).vec(tokens);
        priority.iter_mut().step_by(11).for_each(|value| *value = f64::NAN);
        let priority = prioritized.then_some(&priority[..]);
        let plan = reference::assign_rows(&ids, priority, routing, capacity).unwrap();
        on_levels(|_| assert_eq!(plan_of(&ids, priority, routing, capacity), plan));
        every_type!(check_rows(&plan, routing, width, weighted, seed.into()));

        let padded = capacity.unwrap_or(3);
        let mut row_index = vec![];
        let twin = reference::padded_rows(&ids, &plan.slots, routing, padded);
        on_levels(|_| {
            let row_choice = written(experts * padded, |row_choice| {
                row_index = written(routing.choices(), |row_index| {
                    tutel_cpu::padded_rows(&ids, &plan.slots, routing, padded, row_index, row_choice).unwrap();
                });
            });
            assert_eq!((&row_index, &row_choice), (&twin.0, &twin.1));
        });
    }

    #[test]
    fn counts(rows in 0usize..300, columns in 0usize..150, seed: u32) {
        let mut values = Values(seed.into());
        let mask: Vec<i32> = (0..rows * columns).map(|_| values.next(3) as i32 - 1).collect();
        let exact: Vec<i64> = mask.iter().map(|&value| value.into()).collect();
        for along in [Along::Columns, Along::Rows] {
            let twin = reference::prefix_count(&exact, rows, columns, along == Along::Rows);
            on_levels_and_threads(
                |parallel| {
                    written(mask.len(), |output| {
                        tutel_cpu::prefix_count(&mask, (rows, columns), along, output, parallel).unwrap();
                    })
                },
                |ours| assert_eq!(ours, twin),
            );
        }
    }

    #[test]
    fn grouped(
        counts in proptest::collection::vec(0i64..40, 1..6), tail in 0usize..9,
        inner in 0usize..80, outer in 1usize..80, seed: u32, transposed: bool, biased: bool,
    ) {
        let offsets: Vec<i64> = std::iter::once(0)
            .chain(counts.iter().scan(0, |sum, count| { *sum += count; Some(*sum) }))
            .collect();
        let rows = offsets[counts.len()] as usize + tail;
        let shape = GroupedShape::new(counts.len(), rows, inner, outer).unwrap();
        every_type!(check_grouped(&offsets, shape, transposed, biased, seed.into()));
    }
}

#[test]
fn grouped_products_around_a_block() {
    for transposed in [false, true] {
        // Of rows, columns and depth more than a block; an inner size of 1; few rows; whole blocks. No larger than that:
        // these tests also run on emulators.
        let shapes: [(&[i64], [usize; 3]); 6] = [
            (&[0, 1, 518], [520, 5, 260]),
            (&[0, 1, 2], [3, 1030, 260]),
            (&[0, 19, 39], [40, 1, 33]),
            (&[0, 2], [3, 600, 7]),
            (&[0, 17], [17, 530, 35]),
            (&[0, 14, 28], [28, 512, 64]),
        ];
        for (offsets, [rows, inner, outer]) in shapes {
            let shape = GroupedShape::new(offsets.len() - 1, rows, inner, outer).unwrap();
            every_type!(check_grouped(offsets, shape, transposed, true, 3));
        }
    }
}

#[test]
fn many_rows_wider_than_a_task() {
    let routing = RoutingShape::new(100, 5, 3).unwrap();
    let plan = reference::assign_rows(&ids_of(routing, true, false, 9), None, routing, Some(40)).unwrap();
    every_type!(check_rows(&plan, routing, 2049, true, 4));
    every_type!(check_select(RoutingShape::new(513, 300, 7).unwrap(), ScoreFunction::Softmax, true, 5));
}

#[test]
fn blocks_of_tokens_are_served_in_their_order() {
    // Enough tokens for several threads to walk blocks of their own, and a number that does not divide.
    for (experts, top_k) in [(3, 1), (64, 8)] {
        let routing = RoutingShape::new(50_001, experts, top_k).unwrap();
        let ids = ids_of(routing, true, true, 5);
        let mut priority = Values(6).vec(routing.tokens);
        priority.iter_mut().step_by(7).for_each(|value| *value = 0.5);
        for priority in [None, Some(&priority[..])] {
            let plan = plan_of(&ids, priority, routing, Some(9000));
            let naive = reference::assign_rows(&ids, priority, routing, Some(9000)).unwrap();
            assert!(plan == naive, "another plan for {experts} experts, priority {}", priority.is_some());
        }
    }
}

#[test]
fn a_token_alone_has_the_bits_it_has_in_a_batch() {
    let (inner, outer) = (777, 130);
    let mut values = Values(11);
    let rows = cast::<f32>(&values.vec(40 * inner));
    let weight = cast::<f32>(&values.vec(inner * outer));
    let product = |rows: &[f32]| {
        let count = rows.len() / inner;
        let shape = GroupedShape::new(1, count, inner, outer).unwrap();
        let offsets = [0, count as i64];
        let input = GroupedGemm {
            rows: rows.into(),
            weight: &weight,
            second: None,
            bias: None,
            offsets: &offsets,
            transposed: true,
        };
        written(count * outer, |output| tutel_cpu::grouped_gemm(input, shape, output, &Serial).unwrap())
    };
    on_levels(|_| {
        let (batch, pair, alone) = (product(&rows), product(&rows[..2 * inner]), product(&rows[..inner]));
        assert_eq!(alone, pair[..outer]);
        assert_eq!(alone, batch[..outer]);
    });
}

#[test]
fn nan_and_infinity_stay_with_their_token() {
    let shape = RoutingShape::new(4, 5, 2).unwrap();
    let logits = Values(2).vec(20);
    let mut marked = logits.clone();
    marked[3] = f64::NAN;
    marked[7] = f64::INFINITY;
    on_levels(|_| {
        let clean = select::<f64>(&logits, shape, ScoreFunction::Softmax, true, &Serial);
        let marked = select::<f64>(&marked, shape, ScoreFunction::Softmax, true, &Serial);
        assert_eq!(marked.0[0], 3, "NaN counts as the largest logit");
        assert!(marked.0.iter().all(|&id| (0..5).contains(&id)));
        assert!(marked.1[..4].iter().all(|weight| weight.is_nan()));
        assert_eq!((&marked.0[4..], &marked.1[4..]), (&clean.0[4..], &clean.1[4..]));
    });
}
