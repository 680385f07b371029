//! Numbers of the Python layer, made with PyTorch 2.15 in float64:
//!
//! ```python
//! def values(shape, start):
//!     n = math.prod(shape)
//!     return ((torch.arange(n) * 37 + start) % 101 - 50).double().div(64).reshape(shape)
//!
//! layer = tutel.moe.moe_layer({"type": "top", "k": 2, "capacity_factor": factor}, 3, experts, **options)
//! for index, (_, parameter) in enumerate(layer.named_parameters()):
//!     parameter.copy_(values(parameter.shape, 10 * index))  # without gradient
//! tokens = values((6, 3), 5).requires_grad_()
//! output = layer(tokens)
//! ((output * values(output.shape, 3)).sum() + 0.5 * output.l_aux).backward()
//! # A gradient's number is (gradient * values(gradient.shape, 1)).sum().
//! ```
use tutel_moe::{Activation, MoeLayer, MoeLayerBuilder, ScoreAt};

struct Expected {
    output: &'static [f64],
    aux_loss: f64,
    tokens_per_expert: [usize; 3],
    gradients: &'static [(&'static str, f64)],
}

fn values(len: usize, start: usize) -> Vec<f64> {
    (0..len).map(|i| ((i * 37 + start) % 101) as f64 / 64.0 - 50.0 / 64.0).collect()
}

fn assert_close(what: &str, ours: f64, expected: f64) {
    assert!((ours - expected).abs() < 1e-11, "{what}: {ours}, not {expected}");
}

fn check(builder: MoeLayerBuilder<f64>, expected: &Expected) {
    let mut layer = builder.model_dim(3).hidden_size(4).experts(3).top_k(2).build().unwrap();
    for (index, parameter) in layer.parameters_mut().iter_mut().enumerate() {
        parameter.values.copy_from_slice(&values(parameter.values.len(), 10 * index));
    }
    let (output, saved) = layer.forward_train(&values(18, 5)).unwrap();
    assert_eq!(output.tokens.len(), expected.output.len());
    for (&ours, &expected) in output.tokens.iter().zip(expected.output) {
        assert_close("output", ours, expected);
    }
    assert_close("aux_loss", output.aux_loss, expected.aux_loss);
    assert_eq!(output.tokens_per_expert, expected.tokens_per_expert);

    let gradients = layer.backward(saved, &values(output.tokens.len(), 3), 0.5).unwrap();
    let mut found = vec![("tokens", &gradients.tokens[..])];
    found.extend(gradients.parameters.iter().map(|gradient| (gradient.name, gradient.values)));
    assert_eq!(found.len(), expected.gradients.len());
    for ((name, gradient), &(expected_name, number)) in found.into_iter().zip(expected.gradients) {
        assert_eq!(name, expected_name);
        let sum = gradient.iter().zip(values(gradient.len(), 1)).map(|(slope, factor)| slope * factor).sum();
        assert_close(name, sum, number);
    }
}

/// `experts={"type": "ffn", "count_per_node": 3, "hidden_size_per_expert": 4, "output_dim": 2, "activation_fn":
/// F.gelu}`, `factor=0.6`.
#[test]
fn plain_experts() {
    let builder = MoeLayer::builder().output_dim(2).activation(Activation::Gelu).capacity_factor(0.6);
    check(
        builder,
        &Expected {
            output: &[
                -0.382_185_888_338,
                0.317_425_778_160,
                -0.335_584_058_475,
                -0.240_816_629_028,
                0.089_836_354_126,
                -0.164_313_569_272,
                -0.143_148_989_147,
                0.273_170_816_025,
                0.0,
                0.0,
                0.0,
                0.0,
            ],
            aux_loss: 1.000_625_383_681,
            tokens_per_expert: [3, 6, 3],
            gradients: &[
                ("tokens", -0.051_380_451_861),
                ("experts.batched_fc1_w", -0.080_095_400_029),
                ("experts.batched_fc2_w", -0.100_405_380_269),
                ("experts.batched_fc1_bias", -0.117_667_769_508),
                ("experts.batched_fc2_bias", 0.620_337_391_452),
                ("gates.0.wg.weight", -0.009_611_456_468),
            ],
        },
    );
}

/// `experts={"type": "llama_ffn", "count_per_node": 3, "hidden_size_per_expert": 4}`, `factor=-0.6`,
/// `is_postscore=False`, `batch_prioritized_routing=True`.
#[test]
fn gated_experts() {
    let builder = MoeLayer::builder().gated(true).score_at(ScoreAt::Dispatch).batch_prioritized(true);
    check(
        builder.capacity_factor(-0.6),
        &Expected {
            output: &[
                -0.006_676_496_054,
                0.002_617_490_665,
                0.007_086_287_387,
                0.0,
                0.0,
                0.0,
                -0.001_346_329_407,
                -0.002_337_784_336,
                -0.000_474_928_451,
                0.024_563_818_220,
                0.025_141_203_787,
                -0.081_726_913_720,
                0.0,
                0.0,
                0.0,
                0.012_756_546_740,
                -0.005_003_199_011,
                -0.016_591_106_801,
            ],
            aux_loss: 1.000_625_383_681,
            tokens_per_expert: [3, 6, 3],
            gradients: &[
                ("tokens", 0.159_594_361_804),
                ("experts.W_fc1", 0.059_758_712_290),
                ("experts.W_fc2", 0.121_197_952_469),
                ("experts.W_fc3", 0.082_611_063_400),
                ("gates.0.wg.weight", 0.007_934_841_896),
            ],
        },
    );
}
