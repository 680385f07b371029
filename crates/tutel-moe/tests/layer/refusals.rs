//! Bad options and arguments: each message names what it refuses, the value and what is allowed.
use crate::naive::{EXPERTS, MODEL_DIM, OUTPUT_DIM, PLAIN};
use tutel_moe::{Activation, Error, MoeLayer, MoeLayerBuilder, ScoreAt};

fn builder() -> MoeLayerBuilder<f32> {
    MoeLayer::builder().model_dim(4).hidden_size(6).experts(3)
}

#[test]
fn options() {
    let incomplete = MoeLayer::<f32>::builder;
    for (builder, message) in [
        (incomplete().hidden_size(6).experts(3), "model_dim must be given, at least 1, got nothing"),
        (incomplete().model_dim(4).experts(3), "hidden_size must be given, at least 1, got nothing"),
        (incomplete().model_dim(4).hidden_size(6), "experts must be given, at least 1, got nothing"),
        (builder().model_dim(0), "model_dim must be at least 1, got 0"),
        (builder().hidden_size(0), "hidden_size must be at least 1, got 0"),
        (builder().experts(0), "experts must be at least 1, got 0"),
        (builder().output_dim(0), "output_dim must be at least 1, got 0"),
        (builder().threads(0), "threads must be at least 1, got 0"),
        (builder().top_k(0), "top_k must be between 1 and the number of experts (3), got 0"),
        (builder().top_k(4), "top_k must be between 1 and the number of experts (3), got 4"),
        (builder().capacity_factor(f64::NAN), "capacity_factor must be finite (0 drops nothing), got NaN"),
        (builder().capacity_factor(f64::INFINITY), "capacity_factor must be finite (0 drops nothing), got inf"),
        (builder().gated(true).fc1_bias(true), "fc1_bias must be false for gated experts, got true"),
        (builder().gated(true).fc2_bias(true), "fc2_bias must be false for gated experts, got true"),
    ] {
        assert_eq!(builder.build().unwrap_err().to_string(), message);
    }
    let too_large = builder().model_dim(usize::MAX / 2).build().unwrap_err();
    assert!(too_large.to_string().contains("is too large"), "{too_large}");
    let too_large = builder().model_dim(1 << 60).build().unwrap_err();
    assert!(too_large.to_string().contains("is too large"), "{too_large}");
    let too_many = builder().experts(1 << 40).build().unwrap_err();
    assert!(too_many.to_string().contains("at most 2147483647 experts"), "{too_many}");
}

#[test]
fn arguments() {
    let mut layer = PLAIN.layer::<f32>(1);
    let found = MODEL_DIM + 1;
    assert_eq!(layer.forward(&vec![0.0; found]).unwrap_err(), Error::Tokens { model_dim: MODEL_DIM, found });
    assert_eq!(
        layer.forward_train(&vec![0.0; found]).unwrap_err().to_string(),
        "tokens must have a multiple of model_dim (5) elements, got 6"
    );

    let (_, saved) = layer.forward_train(&[0.0; 2 * MODEL_DIM]).unwrap();
    let short = layer.backward(saved.clone(), &[0.0; OUTPUT_DIM], 0.0).unwrap_err();
    assert_eq!(short.to_string(), "grad_output must have 6 elements (shape [2, 3]), got 3");

    let refused = layer.set_capacity_factor(f64::NAN).unwrap_err();
    assert_eq!(refused.to_string(), "capacity_factor must be finite (0 drops nothing), got NaN");

    let parameters = layer.parameters_mut();
    let unknown = parameters.set("experts.W_fc1", &[]).unwrap_err().to_string();
    assert!(unknown.starts_with("there is no parameter \"experts.W_fc1\"; this layer has experts.batched_fc1_w, "));
    assert!(parameters.get("gates").unwrap_err().to_string().ends_with(", gates.0.wg.weight"));
    let before = parameters.clone();
    assert_eq!(
        parameters.set("gates.0.wg.weight", &[0.0; 3]).unwrap_err().to_string(),
        format!("gates.0.wg.weight must have 20 elements (shape [{EXPERTS}, {MODEL_DIM}]), got 3")
    );
    assert_eq!(*parameters, before, "nothing has changed");
}

#[test]
fn what_another_layer_has_saved() {
    let layer = PLAIN.layer::<f32>(1);
    let wider = builder().output_dim(OUTPUT_DIM).build().unwrap();
    let other_place = PLAIN.builder::<f32>().score_at(ScoreAt::Dispatch).build().unwrap();
    let other_activation = PLAIN.builder::<f32>().activation(Activation::Silu).build().unwrap();
    for other in [wider, other_place, other_activation] {
        let (_, saved) = other.forward_train(&vec![0.0; 2 * other.model_dim()]).unwrap();
        let refused = layer.backward(saved, &[0.0; 2 * OUTPUT_DIM], 0.0).unwrap_err();
        assert!(matches!(refused, Error::Saved { .. }), "{refused}");
    }
}
