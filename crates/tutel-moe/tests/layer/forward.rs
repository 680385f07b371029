//! The forward pass against a naive twin, token by token.
use crate::naive::{Case, Expected, MODEL_DIM, OUTPUT_DIM, PLAIN, Values, cases, cast, naive, wide};
use tutel_moe::half::{bf16, f16};
use tutel_moe::{Output, Scalar};

fn assert_close<T: Scalar>(case: Case, output: &Output<T>, expected: &Expected, roundings: f64) {
    let allowed = roundings * T::EPSILON;
    for (ours, truth) in wide(&output.tokens).into_iter().zip(&expected.tokens) {
        assert!((ours - truth).abs() <= allowed, "{case:?}: {ours}, not {truth}");
    }
    assert_eq!(output.tokens.len(), expected.tokens.len(), "{case:?}");
    let difference = (output.aux_loss - expected.aux_loss).abs();
    assert!(difference <= allowed, "{case:?}: aux_loss {}, not {}", output.aux_loss, expected.aux_loss);
    assert_eq!(output.tokens_per_expert, expected.tokens_per_expert, "{case:?}");
}

#[test]
fn every_option_gives_what_it_says() {
    for (seed, case) in (0..).zip(cases()) {
        let layer = case.layer::<f64>(seed);
        let tokens = Values(seed + 100).vec(29 * MODEL_DIM, 1.5);
        let expected = naive(&layer, case, &tokens);
        let half = (0.4..0.6).contains(&case.capacity_factor);
        assert!(expected.dropped > 0 || !half, "{case:?} drops something");
        assert_close(case, &layer.forward(&tokens).unwrap(), &expected, 64.0);
        let (output, _) = layer.forward_train(&tokens).unwrap();
        assert_close(case, &output, &expected, 64.0);
    }
}

/// In lower precision on the values rounded to it. Logits are rounded to the type, so that tokens whose choice they
/// decide differently would be compared with another expert: such seeds show at once in `tokens_per_expert`.
fn check_precision<T: Scalar>(seed: u64) {
    for gated in [false, true] {
        let case = Case { gated, biased: !gated, ..PLAIN };
        let layer = case.layer::<T>(seed);
        let tokens: Vec<T> = cast(&Values(seed).vec(11 * MODEL_DIM, 1.5));
        let expected = naive(&layer, case, &wide(&tokens));
        assert_close(case, &layer.forward(&tokens).unwrap(), &expected, 8.0);
    }
}

#[test]
fn every_element_type_computes_in_its_precision() {
    check_precision::<f32>(1);
    check_precision::<bf16>(1);
    check_precision::<f16>(1);
}

#[test]
fn inference_and_training_give_equal_bits() {
    for case in cases() {
        let layer = case.layer::<f32>(5);
        let tokens: Vec<f32> = cast(&Values(6).vec(33 * MODEL_DIM, 1.5));
        assert_eq!(layer.forward(&tokens).unwrap(), layer.forward_train(&tokens).unwrap().0, "{case:?}");
    }
}

#[test]
fn the_capacity_factor_can_be_changed() {
    let mut layer = PLAIN.layer::<f32>(4);
    let tokens: Vec<f32> = cast(&Values(4).vec(9 * MODEL_DIM, 1.0));
    let before = layer.forward(&tokens).unwrap();
    layer.set_capacity_factor(0.1).unwrap();
    let dropped = layer.forward(&tokens).unwrap();
    assert!(dropped.tokens.iter().all(|&value| value == 0.0), "no expert takes any");
    layer.set_capacity_factor(0.0).unwrap();
    assert_eq!(layer.forward(&tokens).unwrap(), before);
}

#[test]
fn no_tokens_and_one_token() {
    for case in cases() {
        let layer = case.layer::<f32>(7);
        let (output, saved) = layer.forward_train(&[]).unwrap();
        assert_eq!((output.tokens.len(), output.aux_loss), (0, 0.0));
        let gradients = layer.backward(saved, &[], 1.0).unwrap();
        assert!(gradients.tokens.is_empty());
        assert!(gradients.parameters.iter().all(|gradient| gradient.values.iter().all(|&value| value == 0.0)));

        let output = layer.forward(&[0.5; MODEL_DIM]).unwrap();
        assert_eq!(output.tokens.len(), OUTPUT_DIM);
        assert_eq!(output.tokens_per_expert.iter().sum::<usize>(), case.top_k);
    }
}

#[test]
fn a_token_with_nan_spoils_no_other() {
    let layer = PLAIN.layer::<f32>(8);
    let clean: Vec<f32> = cast(&Values(9).vec(10 * MODEL_DIM, 1.0));
    let mut spoilt = clean.clone();
    spoilt[3 * MODEL_DIM] = f32::NAN;
    let (clean, spoilt) = (layer.forward(&clean).unwrap().tokens, layer.forward(&spoilt).unwrap().tokens);
    for token in 0..10 {
        let row = token * OUTPUT_DIM..(token + 1) * OUTPUT_DIM;
        if token == 3 {
            assert!(spoilt[row].iter().all(|value| value.is_nan()));
        } else {
            assert_eq!(clean[row.clone()], spoilt[row]);
        }
    }
}
