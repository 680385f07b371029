//! Hidden units and their gradient against their definition in f64, on every level of processor features that this machine
//! has.
mod common;

use common::{Values, cast, every_type, on_levels, on_threads, wide, written};
use tutel_core::{Element, GroupedShape, Real, reference};
use tutel_cpu::{
    Activation, GroupedGemm, Hidden, HiddenGrad, HiddenGradOutput, HiddenOutput, Parallel, RowsOf, Scalar, Serial,
};

/// Sizes and options of one case: rows are gathered from fewer tokens.
struct Case {
    shape: GroupedShape,
    offsets: Vec<i64>,
    index: Vec<usize>,
    tokens: usize,
    gated: bool,
    transposed: bool,
    activation: Activation,
}

impl Case {
    fn all() -> Vec<Self> {
        let mut cases = Vec::new();
        let sizes = [
            (3, 41, 70, 65),
            (2, 9, 33, 300),
            (1, 530, 24, 40),
            (2, 6, 0, 5),
            (4, 0, 8, 8),
            (2, 5, 600, 31),
            (2, 4, 3, 0),
        ];
        for (number, (experts, rows, inner, outer)) in sizes.into_iter().enumerate() {
            for (gated, transposed) in [(false, true), (true, false), (false, false), (true, true)] {
                let shape = GroupedShape::new(experts, rows, inner, outer).unwrap();
                let kept = rows.saturating_sub(number % 3);
                // The first expert has no rows, where there are several.
                let offsets = (0..=experts).map(|e| if e < 2 && experts > 1 { 0 } else { (e * kept / experts) as i64 });
                let tokens = rows / 2 + 1;
                let index = (0..rows).map(|row| (row * 7 + 3) % tokens).collect();
                let activation = Activation::ALL[(number + 3 * usize::from(gated)) % Activation::ALL.len()].0;
                cases.push(Self { shape, offsets: offsets.collect(), index, tokens, gated, transposed, activation });
            }
        }
        cases
    }

    fn kept(&self) -> usize {
        self.offsets.last().map_or(0, |&last| last as usize)
    }
}

fn apply(activation: Activation, x: f64) -> f64 {
    let mut values = [x];
    activation.apply(&mut values);
    values[0]
}

fn derive(activation: Activation, x: f64) -> f64 {
    let mut values = [x];
    activation.derive(&mut values);
    values[0]
}

fn close<T: Element>(what: &str, ours: &[f64], truth: &[f64], terms: usize) {
    let largest = truth.iter().fold(1.0f64, |largest, x| largest.max(x.abs()));
    // Inputs below 2: a sum of products errs by less than this many roundings of the largest.
    let sum = <T::Accumulator as Element>::EPSILON.max(f64::EPSILON) * 8.0 * (terms as f64 + 8.0);
    for (at, (a, b)) in ours.iter().zip(truth).enumerate() {
        let allowed = largest * (4.0 * T::EPSILON + sum + 2e-6 * f64::from(u8::from(T::EPSILON > 1e-10)));
        assert!((a - b).abs() <= allowed, "{what}[{at}]: {a} instead of {b}, allowed {allowed:e}");
    }
    assert_eq!(ours.len(), truth.len(), "{what}");
}

/// Hidden units, what act was applied to, and the gate's other side.
type Forward<T> = (Vec<T>, Vec<T>, Vec<T>);

fn forward<T: Scalar>(case: &Case, input: Hidden<'_, T>, parallel: &dyn Parallel) -> Forward<T> {
    let size = case.shape.rows * case.shape.outer;
    let (mut pre, mut value) = (Vec::new(), Vec::new());
    let hidden = written(size, |hidden| {
        pre = written(size, |pre| {
            value = written(if case.gated { size } else { 0 }, |value| {
                let value = case.gated.then_some(value);
                let output = HiddenOutput { hidden, pre: Some(pre), value };
                tutel_cpu::hidden(input, case.shape, output, parallel).unwrap();
            });
        });
    });
    (hidden, pre, value)
}

fn check_forward<T: Scalar>(case: &Case) -> Forward<T> {
    let GroupedShape { experts, rows, inner, outer } = case.shape;
    let mut values = Values(5);
    let tokens = cast::<T>(&values.vec(case.tokens * inner));
    let mut small = |len: usize| cast::<T>(&values.vec(len).iter().map(|x| x / 8.0).collect::<Vec<_>>());
    let (weight, value_weight) = (small(experts * inner * outer), small(experts * inner * outer));
    let bias = small(experts * outer);
    let bias = (!case.gated).then_some(&bias[..]);
    let input = Hidden {
        rows: RowsOf { matrix: &tokens, index: Some(&case.index) },
        weight: &weight,
        bias,
        value_weight: case.gated.then_some(&value_weight[..]),
        offsets: &case.offsets,
        transposed: case.transposed,
        activation: case.activation,
    };
    let found = on_threads(|parallel| forward(case, input, parallel));
    let gathered: Vec<f64> =
        case.index.iter().flat_map(|&token| wide(&tokens[token * inner..(token + 1) * inner])).collect();
    let product = |weight: &[T], bias: Option<&[T]>| {
        let (weight, bias) = (wide(weight), bias.map(wide));
        reference::grouped_gemm(&gathered, &weight, bias.as_deref(), &case.offsets, case.shape, case.transposed)
    };
    let pre = product(&weight, bias);
    let value = product(&value_weight, None);
    let hidden: Vec<f64> = (0..rows * outer)
        .map(|i| {
            if i >= case.kept() * outer {
                0.0
            } else {
                apply(case.activation, pre[i]) * if case.gated { value[i] } else { 1.0 }
            }
        })
        .collect();
    close::<T>("pre", &wide(&found.1), &pre, inner);
    close::<T>("hidden", &wide(&found.0), &hidden, inner);
    if case.gated {
        close::<T>("value", &wide(&found.2), &value, inner);
    }
    // A product of two terms is the sum of two products, and a row that is not gathered has the same bits.
    let rows_of: Vec<T> =
        case.index.iter().flat_map(|&token| tokens[token * inner..(token + 1) * inner].to_vec()).collect();
    let alone = forward(case, Hidden { rows: (&rows_of).into(), ..input }, &Serial);
    assert!(alone == found, "gathered rows have other bits");
    let both = written(rows * outer, |output| {
        let input = GroupedGemm {
            rows: input.rows,
            weight: &weight,
            second: Some(((&rows_of).into(), &value_weight)),
            bias: None,
            offsets: &case.offsets,
            transposed: case.transposed,
        };
        tutel_cpu::grouped_gemm(input, case.shape, output, &Serial).unwrap();
    });
    let truth: Vec<f64> = product(&weight, None).iter().zip(&value).map(|(a, b)| a + b).collect();
    close::<T>("two terms", &wide(&both), &truth, 2 * inner);
    found
}

fn check_backward<T: Scalar>(case: &Case, (_, pre, value): &Forward<T>) {
    let GroupedShape { experts, rows, inner, outer } = case.shape;
    let (size, mut values) = (rows * outer, Values(6));
    let grads = cast::<T>(&values.vec(case.tokens * inner));
    let weight = cast::<T>(&values.vec(experts * inner * outer).iter().map(|x| x / 8.0).collect::<Vec<_>>());
    let row_weights: Vec<T::Accumulator> = values.vec(rows).iter().map(|&x| T::Accumulator::from_f64(x)).collect();
    let input = HiddenGrad {
        grad: RowsOf { matrix: &grads, index: Some(&case.index) },
        weight: &weight,
        offsets: &case.offsets,
        transposed: case.transposed,
        activation: case.activation,
        pre,
        value: case.gated.then_some(&value[..]),
        weights: Some(&row_weights),
    };
    let (grad_pre, grad_value, weighted, dots) = on_threads(|parallel| {
        let (mut grad_value, mut weighted, mut dots) = (Vec::new(), Vec::new(), Vec::<T::Accumulator>::new());
        let grad_pre = written(size, |grad_pre| {
            grad_value = written(if case.gated { size } else { 0 }, |grad_value| {
                weighted = written(size, |hidden| {
                    dots = written(rows, |dots| {
                        let grad_value = case.gated.then_some(grad_value);
                        let output = HiddenGradOutput { grad_pre, grad_value, hidden: Some(hidden), dots: Some(dots) };
                        tutel_cpu::hidden_grad(&input, case.shape, output, parallel).unwrap();
                    });
                });
            });
        });
        (grad_pre, grad_value, weighted, dots)
    });
    let gathered: Vec<f64> =
        case.index.iter().flat_map(|&token| wide(&grads[token * inner..(token + 1) * inner])).collect();
    let u = reference::grouped_gemm(&gathered, &wide(&weight), None, &case.offsets, case.shape, case.transposed);
    let (pre, value) = (wide(pre), wide(value));
    let at = |i: usize| (row_weights[i / outer].to_f64(), if case.gated { value[i] } else { 1.0 });
    let of = |f: &dyn Fn(usize) -> f64| -> Vec<f64> {
        (0..size).map(|i| if i >= case.kept() * outer { 0.0 } else { f(i) }).collect()
    };
    let hidden = of(&|i| apply(case.activation, pre[i]) * at(i).1);
    close::<T>(
        "grad_pre",
        &wide(&grad_pre),
        &of(&|i| at(i).0 * u[i] * at(i).1 * derive(case.activation, pre[i])),
        inner,
    );
    close::<T>("weighted hidden", &wide(&weighted), &of(&|i| at(i).0 * hidden[i]), inner);
    if case.gated {
        close::<T>("grad_value", &wide(&grad_value), &of(&|i| at(i).0 * u[i] * apply(case.activation, pre[i])), inner);
    }
    let truth: Vec<f64> =
        (0..rows).map(|row| (row * outer..(row + 1) * outer).map(|i| u[i] * hidden[i]).sum::<f64>()).collect();
    let dots: Vec<f64> = dots.iter().map(|dot| dot.to_f64()).collect();
    close::<T::Accumulator>("dots", &dots, &truth, inner + outer);
}

fn check<T: Scalar>(case: &Case) {
    let saved = check_forward::<T>(case);
    check_backward::<T>(case, &saved);
}

#[test]
fn hidden_units_are_their_definition_on_every_level() {
    on_levels(|_| {
        for case in Case::all() {
            every_type!(check(&case));
        }
    });
}
