//! The backward pass against finite differences, in f64.
use crate::naive::{MODEL_DIM, OUTPUT_DIM, Values, cases, cast, wide};
use tutel_moe::half::{bf16, f16};
use tutel_moe::{Gradients, MoeLayer, Scalar};

const TOKENS: usize = 13;
const AUX_WEIGHT: f64 = 0.7;

/// A loss that depends on every output, each with a factor of its own.
fn loss(layer: &MoeLayer<f64>, tokens: &[f64], factors: &[f64]) -> f64 {
    let output = layer.forward(tokens).unwrap();
    let weighted: f64 = output.tokens.iter().zip(factors).map(|(y, factor)| y * factor).sum();
    weighted + AUX_WEIGHT * output.aux_loss
}

fn gradients<T: Scalar>(layer: &MoeLayer<T>, tokens: &[T], factors: &[T]) -> Gradients<T> {
    let (_, saved) = layer.forward_train(tokens).unwrap();
    layer.backward(saved, factors, AUX_WEIGHT).unwrap()
}

/// The central difference of `loss` when something is moved by a step to either side.
fn difference(mut loss_at: impl FnMut(f64) -> f64) -> f64 {
    const STEP: f64 = 1e-6;
    (loss_at(STEP) - loss_at(-STEP)) / (2.0 * STEP)
}

#[test]
fn gradients_are_the_differences() {
    for (seed, case) in (0..).zip(cases()) {
        let mut layer = case.layer::<f64>(seed);
        let mut tokens = Values(seed + 50).vec(TOKENS * MODEL_DIM, 1.5);
        let factors = Values(seed + 60).vec(TOKENS * OUTPUT_DIM, 1.0);
        let found = gradients(&layer, &tokens, &factors);

        for index in 0..tokens.len() {
            let kept = tokens[index];
            let truth = difference(|step| {
                tokens[index] = kept + step;
                loss(&layer, &tokens, &factors)
            });
            tokens[index] = kept;
            let ours = found.tokens[index];
            assert!(
                (ours - truth).abs() < 1e-6 * truth.abs().max(1.0),
                "{case:?}: tokens[{index}]: {ours}, not {truth}"
            );
        }
        for gradient in found.parameters.iter() {
            let name = gradient.name;
            let mut values = layer.parameters().get(name).unwrap().values.to_vec();
            for index in 0..values.len() {
                let kept = values[index];
                let truth = difference(|step| {
                    values[index] = kept + step;
                    layer.parameters_mut().set(name, &values).unwrap();
                    loss(&layer, &tokens, &factors)
                });
                values[index] = kept;
                let ours = gradient.values[index];
                let close = (ours - truth).abs() < 1e-6 * truth.abs().max(1.0);
                assert!(close, "{case:?}: {name}[{index}]: {ours}, not {truth}");
            }
            layer.parameters_mut().set(name, &values).unwrap();
        }
    }
}

/// On the values rounded to the type, against the same layer in f64.
fn check_precision<T: Scalar>() {
    for (seed, case) in (0..).zip(cases().into_iter().filter(|case| case.capacity_factor == 0.0)) {
        let layer = case.layer::<T>(seed);
        let mut exact_layer = case.layer::<f64>(seed);
        for parameter in layer.parameters().iter() {
            exact_layer.parameters_mut().set(parameter.name, &wide(parameter.values)).unwrap();
        }
        let tokens: Vec<T> = cast(&Values(seed + 3).vec(3 * MODEL_DIM, 1.5));
        let factors: Vec<T> = cast(&Values(seed + 4).vec(3 * OUTPUT_DIM, 1.0));
        let same_choices = layer.forward(&tokens).unwrap().tokens_per_expert
            == exact_layer.forward(&wide(&tokens)).unwrap().tokens_per_expert;
        assert!(same_choices, "{case:?}: rounding the logits changes a choice: take another seed");
        let ours = gradients(&layer, &tokens, &factors);
        let exact = gradients(&exact_layer, &wide(&tokens), &wide(&factors));
        let mut pairs = vec![("tokens", wide(&ours.tokens), exact.tokens)];
        for (ours, exact) in ours.parameters.iter().zip(exact.parameters.iter()) {
            pairs.push((ours.name, wide(ours.values), exact.values.to_vec()));
        }
        for (name, ours, exact) in pairs {
            let largest = exact.iter().fold(1.0f64, |largest, value| largest.max(value.abs()));
            let error = ours.iter().zip(&exact).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            assert!(error <= 8.0 * T::EPSILON * largest, "{case:?}: {name}: error {error:e}");
        }
    }
}

#[test]
fn every_element_type_has_gradients_in_its_precision() {
    check_precision::<f32>();
    check_precision::<bf16>();
    check_precision::<f16>();
}
