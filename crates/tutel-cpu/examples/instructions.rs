//! A fixed piece of work for every kernel on the portable level, on one thread, for `benches/instructions.py`, which counts
//! its instructions: one line of output for each call of [`measured`], in their order.
use std::mem::MaybeUninit;

use half::{bf16, f16};
use tutel_core::{Element, GroupedShape, Real, RoutingShape, RowShape, ScoreFunction, reference};
use tutel_cpu::{
    Activation, Along, AssignOutput, GroupedGemm, Hidden, HiddenGrad, HiddenGradOutput, HiddenOutput, Level, Scalar,
    SelectBackward, SelectOutput, Serial,
};

/// What is counted. A function of its own, which the counting tool finds by its name.
#[inline(never)]
fn measured(work: &mut dyn FnMut()) {
    work();
}

fn measure(kernel: &str, element: &str, mut work: impl FnMut()) {
    println!("{kernel} {element}");
    measured(&mut work);
}

/// Values between -2 and 2 with few significant bits, the same in every run.
fn values<T: Element>(len: usize) -> Vec<T> {
    let value = |index: usize| (index.wrapping_mul(2_654_435_761) >> 7) % 257;
    (0..len).map(|index| T::narrow(T::Accumulator::from_f64(value(index) as f64 / 64.0 - 2.0))).collect()
}

fn room<T: Copy>(len: usize) -> Vec<MaybeUninit<T>> {
    vec![MaybeUninit::uninit(); len]
}

fn products<T: Scalar>(element: &str) {
    let shape = GroupedShape::new(3, 100, 130, 150).unwrap();
    let GroupedShape { experts, rows, inner, outer } = shape;
    let offsets = [0, 60, 61, 99];
    let (left, right) = (values::<T>(rows * inner), values::<T>(rows * outer));
    let (weight, bias) = (values::<T>(experts * inner * outer), values::<T>(experts * outer));
    let mut output = room(rows * outer);
    for (kernel, transposed) in [("grouped_gemm", false), ("grouped_gemm_transposed", true)] {
        let input = GroupedGemm {
            rows: (&left).into(),
            weight: &weight,
            second: None,
            bias: Some(&bias),
            offsets: &offsets,
            transposed,
        };
        measure(kernel, element, || tutel_cpu::grouped_gemm(input, shape, &mut output, &Serial).unwrap());
    }
    let mut grad = room(weight.len());
    measure("grouped_gemm_weight_grad", element, || {
        let (left, right) = ((&left).into(), (&right).into());
        tutel_cpu::grouped_gemm_weight_grad(left, right, &offsets, shape, &mut grad, &Serial).unwrap();
    });
    let mut sums = room(experts * inner);
    measure("grouped_sum", element, || {
        tutel_cpu::grouped_sum(&left, &offsets, (rows, inner), &mut sums, &Serial).unwrap();
    });
}

fn experts<T: Scalar>(element: &str) {
    let shape = GroupedShape::new(3, 100, 130, 150).unwrap();
    let GroupedShape { experts, rows, inner, outer } = shape;
    let (offsets, size) = ([0, 60, 61, 99], rows * outer);
    let (tokens, grads) = (values::<T>(rows * inner), values::<T>(rows * inner));
    let (weight, value_weight) = (values::<T>(experts * inner * outer), values::<T>(experts * inner * outer));
    let input = Hidden {
        rows: (&tokens).into(),
        weight: &weight,
        bias: None,
        value_weight: Some(&value_weight),
        offsets: &offsets,
        transposed: true,
        activation: Activation::Silu,
    };
    let (mut hidden, mut pre, mut value) = (room(size), room(size), room(size));
    measure("hidden", element, || {
        let output = HiddenOutput { hidden: &mut hidden, pre: Some(&mut pre), value: Some(&mut value) };
        tutel_cpu::hidden(input, shape, output, &Serial).unwrap();
    });
    let (pre, value) = (values::<T>(size), values::<T>(size));
    let weights = values::<T::Accumulator>(rows);
    let input = HiddenGrad {
        grad: (&grads).into(),
        weight: &weight,
        offsets: &offsets,
        transposed: false,
        activation: Activation::Silu,
        pre: &pre,
        value: Some(&value),
        weights: Some(&weights),
    };
    let (mut grad_pre, mut grad_value, mut dots) = (room(size), room(size), room(rows));
    measure("hidden_grad", element, || {
        let output = HiddenGradOutput {
            grad_pre: &mut grad_pre,
            grad_value: Some(&mut grad_value),
            hidden: Some(&mut hidden),
            dots: Some(&mut dots),
        };
        tutel_cpu::hidden_grad(&input, shape, output, &Serial).unwrap();
    });
}

const ROUTING: (usize, usize, usize) = (300, 64, 2);

fn selection<T: Scalar>(element: &str) {
    let (tokens, experts, top_k) = ROUTING;
    let shape = RoutingShape::new(tokens, experts, top_k).unwrap();
    let function = ScoreFunction::Softmax;
    let logits = values::<T>(tokens * experts);
    let (mut ids, mut weights) = (room(shape.choices()), room(shape.choices()));
    let (mut top_scores, mut score_sums) = (room(tokens), room(experts));
    measure("select_experts", element, || {
        let output = SelectOutput {
            ids: &mut ids,
            weights: &mut weights,
            top_scores: &mut top_scores,
            score_sums: &mut score_sums,
        };
        tutel_cpu::select_experts(&logits, shape, function, true, output, &Serial).unwrap();
    });
    let ids = reference::select_experts(&logits, shape, function, true).ids;
    let (grad_weights, grad_sums) = (values::<T::Accumulator>(shape.choices()), values::<T::Accumulator>(experts));
    let input = SelectBackward {
        logits: &logits,
        ids: &ids,
        grad_weights: Some(&grad_weights),
        grad_score_sums: Some(&grad_sums),
        function,
        normalize: true,
    };
    let mut grad = room(logits.len());
    measure("select_experts_backward", element, || {
        tutel_cpu::select_experts_backward(&input, shape, &mut grad, &Serial).unwrap();
    });
}

fn ids() -> (RoutingShape, Vec<i32>) {
    let (tokens, experts, top_k) = ROUTING;
    let shape = RoutingShape::new(tokens, experts, top_k).unwrap();
    let ids = reference::select_experts(&values::<f32>(tokens * experts), shape, ScoreFunction::Softmax, true).ids;
    (shape, ids)
}

fn rows<T: Scalar>(element: &str) {
    let (routing, ids) = ids();
    let plan = reference::assign_rows(&ids, None, routing, Some(12)).unwrap();
    let shape = RowShape::new(routing.tokens, routing.choices(), 300, routing.top_k).unwrap();
    let tokens = values::<T>(shape.tokens * shape.width);
    let rows = values::<T>(shape.rows * shape.width);
    let weights = values::<T::Accumulator>(shape.choices());
    let weights = Some(&weights[..]);
    let mut output = room(rows.len());
    measure("dispatch", element, || {
        tutel_cpu::dispatch(&tokens, &plan.row_choice, weights, shape, &mut output, &Serial).unwrap();
    });
    let mut output = room(tokens.len());
    measure("combine", element, || {
        tutel_cpu::combine(&rows, &plan.row_index, weights, shape, &mut output, &Serial).unwrap();
    });
    let mut dots = room(shape.choices());
    measure("row_dot", element, || {
        tutel_cpu::row_dot(&rows, &plan.row_index, &tokens, shape, &mut dots, &Serial).unwrap();
    });
}

fn plans() {
    let (shape, ids) = ids();
    let priority = values::<f32>(shape.tokens);
    for (kernel, priority) in [("assign_rows", None), ("assign_rows_by_priority", Some(&priority[..]))] {
        let (mut slots, mut tokens_per_expert) = (room(ids.len()), room(shape.experts));
        let (mut first_choices, mut offsets) = (room(shape.experts), room(shape.experts + 1));
        let (mut row_index, mut row_choice) = (room(ids.len()), room(ids.len()));
        measure(kernel, "i32", || {
            let output = AssignOutput {
                slots: &mut slots,
                tokens_per_expert: &mut tokens_per_expert,
                first_choices: &mut first_choices,
                offsets: &mut offsets,
                row_index: &mut row_index,
                row_choice: &mut row_choice,
            };
            tutel_cpu::assign_rows(&ids, priority, shape, Some(12), output, &Serial).unwrap();
        });
    }
    let slots = reference::assign_rows(&ids, None, shape, None).unwrap().slots;
    let (mut row_index, mut row_choice) = (room(ids.len()), room(12 * shape.experts));
    measure("padded_rows", "i32", || {
        tutel_cpu::padded_rows(&ids, &slots, shape, 12, &mut row_index, &mut row_choice).unwrap();
    });
    let mut counts = room(ids.len());
    for (kernel, along) in [("prefix_count_of_columns", Along::Columns), ("prefix_count_of_rows", Along::Rows)] {
        measure(kernel, "i32", || {
            tutel_cpu::prefix_count(&ids, (shape.tokens, shape.top_k), along, &mut counts, &Serial).unwrap();
        });
    }
}

fn main() {
    Level::Portable.set_cap();
    macro_rules! every_type {
        ($($kernels:ident)*) => { $(
            $kernels::<f64>("f64");
            $kernels::<f32>("f32");
            $kernels::<bf16>("bf16");
            $kernels::<f16>("f16");
        )* };
    }
    every_type!(products experts selection rows);
    plans();
}
