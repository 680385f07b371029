//! Bad arguments: every kernel names the argument, the value seen and what is allowed, and has written nothing; for every
//! element type, on every level of processor features that this machine has.
mod common;

use std::mem::MaybeUninit;

use common::{every_type, on_levels};
use tutel_core::{Element, Error, GroupedShape, RoutingShape, RowShape, ScoreFunction};
use tutel_cpu::{Along, AssignOutput, GroupedGemm, Scalar, SelectBackward, SelectOutput, Serial};

/// An output that knows whether it was written to.
struct Guarded<T>(Vec<MaybeUninit<T>>, T);

impl<T: Element> Guarded<T> {
    fn new(len: usize) -> Self {
        let mark = T::narrow(num_traits::one());
        Self(vec![MaybeUninit::new(mark); len], mark)
    }
}

impl<T: Copy + PartialEq> Guarded<T> {
    fn of(len: usize, mark: T) -> Self {
        Self(vec![MaybeUninit::new(mark); len], mark)
    }

    fn assert_untouched(&self) {
        // SAFETY: every element was initialised above.
        assert!(self.0.iter().all(|element| unsafe { element.assume_init() } == self.1), "written to");
    }
}

/// The message of a kernel that refuses its arguments.
fn refusal<T: Copy + PartialEq>(
    mut output: Guarded<T>,
    call: impl FnOnce(&mut [MaybeUninit<T>]) -> Result<(), Error>,
) -> String {
    let error = call(&mut output.0).expect_err("bad arguments are refused");
    output.assert_untouched();
    error.to_string()
}

fn zeros<T: Default + Copy>(len: usize) -> Vec<T> {
    vec![T::default(); len]
}

/// Offsets that are refused for 2 experts and 3 rows, each with its message.
const BAD_OFFSETS: [(&[i64], &str); 4] = [
    (&[0, 3], "offsets has 2 elements, expected 3"),
    (&[1, 2, 3], "offsets must start at 0, never decrease and end at most at the 3 rows; offsets[0] is 1"),
    (&[0, 3, 2], "offsets must start at 0, never decrease and end at most at the 3 rows; offsets[2] is 2"),
    (&[0, 1, 4], "offsets must start at 0, never decrease and end at most at the 3 rows; offsets[2] is 4"),
];

fn products<T: Scalar>() {
    let shape = GroupedShape::new(2, 3, 4, 5).unwrap();
    let (rows, right, weight, bias) = (zeros::<T>(12), zeros::<T>(15), zeros::<T>(40), zeros::<T>(10));
    let offsets = [0, 1, 3];
    let good = GroupedGemm {
        rows: (&rows).into(),
        weight: &weight,
        second: None,
        bias: Some(&bias),
        offsets: &offsets,
        transposed: false,
    };
    let gemm = |input: GroupedGemm<'_, T>, len| {
        refusal(Guarded::<T>::new(len), |output| tutel_cpu::grouped_gemm(input, shape, output, &Serial))
    };
    for transposed in [false, true] {
        let good = GroupedGemm { transposed, ..good };
        assert_eq!(gemm(GroupedGemm { rows: rows[1..].into(), ..good }, 15), "rows has 11 elements, expected 12");
        assert_eq!(gemm(GroupedGemm { weight: &weight[1..], ..good }, 15), "weight has 39 elements, expected 40");
        assert_eq!(gemm(GroupedGemm { bias: Some(&bias[1..]), ..good }, 15), "bias has 9 elements, expected 10");
        assert_eq!(gemm(good, 16), "output has 16 elements, expected 15");
        for (offsets, message) in BAD_OFFSETS {
            assert_eq!(gemm(GroupedGemm { offsets, ..good }, 15), message);
        }
    }

    let grad = |left: &[T], right: &[T], offsets: &[i64], len| {
        refusal(Guarded::<T>::new(len), |output| {
            tutel_cpu::grouped_gemm_weight_grad(left.into(), right.into(), offsets, shape, output, &Serial)
        })
    };
    assert_eq!(grad(&rows[1..], &right, &offsets, 40), "left has 11 elements, expected 12");
    assert_eq!(grad(&rows, &right[1..], &offsets, 40), "right has 14 elements, expected 15");
    assert_eq!(grad(&rows, &right, &offsets, 39), "output has 39 elements, expected 40");

    let sum = |rows: &[T], offsets: &[i64], len| {
        refusal(Guarded::<T>::new(len), |output| tutel_cpu::grouped_sum(rows, offsets, (3, 4), output, &Serial))
    };
    assert_eq!(sum(&rows[1..], &offsets, 8), "rows has 11 elements, expected 12");
    assert_eq!(sum(&rows, &offsets, 9), "output has 9 elements, expected 8");
    for (offsets, message) in BAD_OFFSETS {
        assert_eq!(grad(&rows, &right, offsets, 40), message);
        // Here the number of experts is that of the offsets.
        if offsets.len() == 3 {
            assert_eq!(sum(&rows, offsets, 8), message);
        }
    }
}

fn rows<T: Scalar>() {
    let shape = RowShape::new(2, 4, 3, 2).unwrap();
    let (tokens, rows, weights) = (zeros::<T>(6), zeros::<T>(12), zeros::<T::Accumulator>(4));
    let (index, choice) = ([0, 1, 2, -1], [0, 1, 2, -1]);
    let dispatch = |tokens: &[T], choice: &[i64], weights: &[T::Accumulator], len| {
        refusal(Guarded::<T>::new(len), |output| {
            tutel_cpu::dispatch(tokens, choice, Some(weights), shape, output, &Serial)
        })
    };
    assert_eq!(dispatch(&tokens[1..], &choice, &weights, 12), "tokens has 5 elements, expected 6");
    assert_eq!(dispatch(&tokens, &choice[1..], &weights, 12), "row_choice has 3 elements, expected 4");
    assert_eq!(dispatch(&tokens, &choice, &weights[1..], 12), "weights has 3 elements, expected 4");
    assert_eq!(dispatch(&tokens, &choice, &weights, 13), "rows has 13 elements, expected 12");
    let combine = |rows: &[T], index: &[i64], weights: &[T::Accumulator], len| {
        refusal(Guarded::<T>::new(len), |output| tutel_cpu::combine(rows, index, Some(weights), shape, output, &Serial))
    };
    assert_eq!(combine(&rows[1..], &index, &weights, 6), "rows has 11 elements, expected 12");
    assert_eq!(combine(&rows, &index[1..], &weights, 6), "row_index has 3 elements, expected 4");
    assert_eq!(combine(&rows, &index, &weights[1..], 6), "weights has 3 elements, expected 4");
    assert_eq!(combine(&rows, &index, &weights, 5), "output has 5 elements, expected 6");
    let dot = |rows: &[T], index: &[i64], tokens: &[T], len| {
        refusal(Guarded::<T::Accumulator>::new(len), |output| {
            tutel_cpu::row_dot(rows, index, tokens, shape, output, &Serial)
        })
    };
    assert_eq!(dot(&rows[1..], &index, &tokens, 4), "rows has 11 elements, expected 12");
    assert_eq!(dot(&rows, &index[1..], &tokens, 4), "row_index has 3 elements, expected 4");
    assert_eq!(dot(&rows, &index, &tokens[1..], 4), "tokens has 5 elements, expected 6");
    assert_eq!(dot(&rows, &index, &tokens, 5), "output has 5 elements, expected 4");
    for bad in [4, -2, i64::MAX, i64::MIN] {
        let message = |name: &str| format!("{name}[1] is {bad}, allowed are -1 (none) and 0 up to, not including, 4");
        assert_eq!(dispatch(&tokens, &[0, bad, 0, 0], &weights, 12), message("row_choice"));
        assert_eq!(combine(&rows, &[0, bad, 0, 0], &weights, 6), message("row_index"));
        assert_eq!(dot(&rows, &[0, bad, 0, 0], &tokens, 4), message("row_index"));
    }
}

fn select<T: Scalar>(logits: usize, [ids, weights, top_scores, score_sums]: [usize; 4]) -> String {
    let shape = RoutingShape::new(3, 4, 2).unwrap();
    let mut ids = Guarded::of(ids, 7i32);
    let mut weights = Guarded::<T::Accumulator>::new(weights);
    let mut top_scores = Guarded::<T::Accumulator>::new(top_scores);
    let mut score_sums = Guarded::<T::Accumulator>::new(score_sums);
    let output = SelectOutput {
        ids: &mut ids.0,
        weights: &mut weights.0,
        top_scores: &mut top_scores.0,
        score_sums: &mut score_sums.0,
    };
    let logits = zeros::<T>(logits);
    let error = tutel_cpu::select_experts(&logits, shape, ScoreFunction::Softmax, true, output, &Serial).unwrap_err();
    ids.assert_untouched();
    for output in [weights, top_scores, score_sums] {
        output.assert_untouched();
    }
    error.to_string()
}

fn selection<T: Scalar>() {
    assert_eq!(select::<T>(11, [6, 6, 3, 4]), "logits has 11 elements, expected 12");
    assert_eq!(select::<T>(12, [5, 6, 3, 4]), "topk_ids has 5 elements, expected 6");
    assert_eq!(select::<T>(12, [6, 7, 3, 4]), "topk_weights has 7 elements, expected 6");
    assert_eq!(select::<T>(12, [6, 6, 2, 4]), "top_scores has 2 elements, expected 3");
    assert_eq!(select::<T>(12, [6, 6, 3, 5]), "score_sums has 5 elements, expected 4");

    let shape = RoutingShape::new(3, 4, 2).unwrap();
    let (logits, ids) = (zeros::<T>(12), [0, 1, 2, 3, 0, 1]);
    let (grad_weights, grad_sums) = (zeros::<T::Accumulator>(6), zeros::<T::Accumulator>(4));
    let good = SelectBackward {
        logits: &logits,
        ids: &ids,
        grad_weights: Some(&grad_weights),
        grad_score_sums: Some(&grad_sums),
        function: ScoreFunction::Softmax,
        normalize: true,
    };
    let backward = |input: SelectBackward<'_, T>, len| {
        refusal(Guarded::<T>::new(len), |output| tutel_cpu::select_experts_backward(&input, shape, output, &Serial))
    };
    assert_eq!(backward(SelectBackward { logits: &logits[1..], ..good }, 12), "logits has 11 elements, expected 12");
    assert_eq!(backward(SelectBackward { ids: &ids[1..], ..good }, 12), "topk_ids has 5 elements, expected 6");
    let bad = SelectBackward { grad_weights: Some(&grad_weights[1..]), ..good };
    assert_eq!(backward(bad, 12), "grad_weights has 5 elements, expected 6");
    let bad = SelectBackward { grad_score_sums: Some(&grad_sums[1..]), ..good };
    assert_eq!(backward(bad, 12), "grad_score_sums has 3 elements, expected 4");
    assert_eq!(backward(good, 13), "grad_logits has 13 elements, expected 12");
    for id in [4, -1, i32::MAX] {
        let message = backward(SelectBackward { ids: &[0, 1, id, 3, 0, 1], ..good }, 12);
        assert!(message.starts_with(&format!("topk_ids[2] is {id}, allowed are ")), "{message}");
    }
}

/// Lengths of the outputs: slots, tokens of an expert, first choices, offsets, row index, row choice.
fn assign(ids: &[i32], priority: Option<&[f32]>, lengths: [usize; 6]) -> String {
    let shape = RoutingShape::new(3, 4, 2).unwrap();
    let mut slots = Guarded::of(lengths[0], 7i32);
    let [mut tokens_per_expert, mut first_choices, mut offsets, mut row_index, mut row_choice] =
        [1, 2, 3, 4, 5].map(|output| Guarded::of(lengths[output], 7i64));
    let output = AssignOutput {
        slots: &mut slots.0,
        tokens_per_expert: &mut tokens_per_expert.0,
        first_choices: &mut first_choices.0,
        offsets: &mut offsets.0,
        row_index: &mut row_index.0,
        row_choice: &mut row_choice.0,
    };
    let error = tutel_cpu::assign_rows(ids, priority, shape, None, output, &Serial).unwrap_err();
    slots.assert_untouched();
    for output in [tokens_per_expert, first_choices, offsets, row_index, row_choice] {
        output.assert_untouched();
    }
    error.to_string()
}

#[test]
fn products_refuse() {
    on_levels(|_| {
        every_type!(products());
    });
}

#[test]
fn rows_refuse() {
    on_levels(|_| {
        every_type!(rows());
    });
}

#[test]
fn selection_refuses() {
    on_levels(|_| {
        every_type!(selection());
    });
}

#[test]
fn assignment_refuses() {
    const GOOD: [usize; 6] = [6, 4, 4, 5, 6, 6];
    let ids = [0, 1, 2, 3, -1, 1];
    on_levels(|_| {
        assert_eq!(assign(&ids[1..], None, GOOD), "topk_ids has 5 elements, expected 6");
        assert_eq!(assign(&ids, Some(&[0.0; 2]), GOOD), "priority has 2 elements, expected 3");
        for id in [4, -2, i32::MAX, i32::MIN] {
            let message = format!("topk_ids[2] is {id}, allowed are -1 (none) and 0 up to, not including, 4");
            assert_eq!(assign(&[0, 1, id, 3, 0, 1], None, GOOD), message);
        }
        let names = ["slots", "tokens_per_expert", "first_choices", "offsets", "row_index", "row_choice"];
        for (output, name) in names.into_iter().enumerate() {
            let mut lengths = GOOD;
            lengths[output] += 1;
            let message = format!("{name} has {} elements, expected {}", lengths[output], GOOD[output]);
            assert_eq!(assign(&ids, None, lengths), message);
        }
    });
}

#[test]
fn padding_and_counting_refuse() {
    let shape = RoutingShape::new(3, 4, 2).unwrap();
    let (ids, slots) = ([0, 1, 2, 3, -1, 1], [0, 0, 0, 0, -1, 1]);
    on_levels(|_| {
        let padded = |ids: &[i32], slots: &[i32], index: usize, choice: usize| {
            let mut index = Guarded::of(index, 7i64);
            let message = refusal(Guarded::of(choice, 7i64), |choice| {
                tutel_cpu::padded_rows(ids, slots, shape, 2, &mut index.0, choice)
            });
            index.assert_untouched();
            message
        };
        assert_eq!(padded(&ids[1..], &slots, 6, 8), "topk_ids has 5 elements, expected 6");
        assert_eq!(padded(&ids, &slots[1..], 6, 8), "slots has 5 elements, expected 6");
        let message = padded(&[0, 1, 4, 3, -1, 1], &slots, 6, 8);
        assert_eq!(message, "topk_ids[2] is 4, allowed are -1 (none) and 0 up to, not including, 4");
        assert_eq!(padded(&ids, &slots, 5, 8), "row_index has 5 elements, expected 6");
        assert_eq!(padded(&ids, &slots, 6, 9), "row_choice has 9 elements, expected 8");
        for along in [Along::Columns, Along::Rows] {
            let count = |mask: &[i32], len| {
                refusal(Guarded::of(len, 7i64), |output| tutel_cpu::prefix_count(mask, (2, 3), along, output, &Serial))
            };
            assert_eq!(count(&[1; 5], 6), "mask has 5 elements, expected 6");
            assert_eq!(count(&[1; 6], 5), "output has 5 elements, expected 6");
        }
    });
}
