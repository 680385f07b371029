//! A naive twin of the layer in f64, token by token, and what the tests share.
use tutel_core::{Element, Real};
use tutel_moe::{Activation, MoeLayer, MoeLayerBuilder, Scalar, ScoreAt};

/// D, H, E and `D_out` of the tests' layers: odd, and different from each other.
pub(crate) const MODEL_DIM: usize = 5;
pub(crate) const HIDDEN: usize = 7;
pub(crate) const EXPERTS: usize = 4;
pub(crate) const OUTPUT_DIM: usize = 3;

/// The options that the naive twin has to know.
#[expect(clippy::struct_excessive_bools, reason = "they are the layer's")]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Case {
    pub(crate) gated: bool,
    pub(crate) activation: Activation,
    pub(crate) top_k: usize,
    pub(crate) capacity_factor: f64,
    pub(crate) normalize_gate: bool,
    pub(crate) batch_prioritized: bool,
    pub(crate) score_at: ScoreAt,
    pub(crate) biased: bool,
}

pub(crate) const PLAIN: Case = Case {
    gated: false,
    activation: Activation::GeluTanh,
    top_k: 2,
    capacity_factor: 0.0,
    normalize_gate: true,
    batch_prioritized: false,
    score_at: ScoreAt::Combine,
    biased: true,
};

/// Every combination of what changes the computation.
pub(crate) fn cases() -> Vec<Case> {
    let mut cases = vec![];
    for gated in [false, true] {
        for score_at in [ScoreAt::Combine, ScoreAt::Dispatch] {
            for capacity_factor in [0.0, 0.5, -1.0] {
                for (top_k, normalize_gate) in [(1, true), (2, true), (3, false)] {
                    let (batch_prioritized, biased) = (top_k == 2, !gated);
                    cases.push(Case {
                        gated,
                        top_k,
                        capacity_factor,
                        normalize_gate,
                        batch_prioritized,
                        score_at,
                        biased,
                        ..PLAIN
                    });
                }
            }
        }
    }
    let activations = [Activation::Relu, Activation::Gelu, Activation::Silu, Activation::Identity];
    cases.extend(activations.map(|activation| Case { activation, ..PLAIN }));
    cases.extend(activations.map(|activation| Case { activation, gated: true, biased: false, ..PLAIN }));
    cases.push(Case { biased: false, ..PLAIN });
    cases
}

impl Case {
    pub(crate) fn builder<T: Scalar>(self) -> MoeLayerBuilder<T> {
        let builder = MoeLayer::builder()
            .model_dim(MODEL_DIM)
            .hidden_size(HIDDEN)
            .experts(EXPERTS)
            .output_dim(OUTPUT_DIM)
            .top_k(self.top_k)
            .capacity_factor(self.capacity_factor)
            .normalize_gate(self.normalize_gate)
            .batch_prioritized(self.batch_prioritized)
            .score_at(self.score_at)
            .activation(self.activation)
            .gated(self.gated)
            .threads(1);
        if self.gated { builder } else { builder.fc1_bias(self.biased).fc2_bias(self.biased) }
    }

    /// A layer whose values are large enough that every term counts.
    pub(crate) fn layer<T: Scalar>(self, seed: u64) -> MoeLayer<T> {
        let mut layer = self.builder().build().unwrap();
        let mut values = Values(seed);
        for parameter in layer.parameters_mut().iter_mut() {
            let drawn = cast(&values.vec(parameter.values.len(), 0.5));
            parameter.values.copy_from_slice(&drawn);
        }
        layer
    }
}

/// A seeded stream of values.
pub(crate) struct Values(pub(crate) u64);

impl Values {
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as f64 / f64::from(1 << 30) - 1.0
    }

    /// Values between -scale and scale.
    pub(crate) fn vec(&mut self, len: usize, scale: f64) -> Vec<f64> {
        (0..len).map(|_| self.next() * scale).collect()
    }
}

pub(crate) fn cast<T: Element>(values: &[f64]) -> Vec<T> {
    values.iter().map(|&x| T::narrow(T::Accumulator::from_f64(x))).collect()
}

pub(crate) fn wide<T: Element>(values: &[T]) -> Vec<f64> {
    values.iter().map(|x| x.widen().to_f64()).collect()
}

/// The naive twin's result.
pub(crate) struct Expected {
    pub(crate) tokens: Vec<f64>,
    pub(crate) aux_loss: f64,
    pub(crate) tokens_per_expert: Vec<usize>,
    /// Choices beyond the capacity.
    pub(crate) dropped: usize,
}

fn act(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::Relu => x.max(0.0),
        Activation::Gelu => 0.5 * x * libm::erfc(-x / 2f64.sqrt()),
        Activation::GeluTanh => {
            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3))).tanh())
        }
        Activation::Silu => x / (1.0 + (-x).exp()),
        _ => x,
    }
}

/// One expert on one token.
fn expert<T: Scalar>(layer: &MoeLayer<T>, case: Case, expert: usize, x: &[f64]) -> Vec<f64> {
    let parameter = |name: &str| wide(layer.parameters().get(name).unwrap().values);
    let dot = |weight: &dyn Fn(usize) -> f64, x: &[f64]| x.iter().enumerate().map(|(i, x)| weight(i) * x).sum::<f64>();
    let (d, h, o) = (MODEL_DIM, HIDDEN, OUTPUT_DIM);
    let (hidden, outward): (Vec<f64>, _) = if case.gated {
        let (gate, up) = (parameter("experts.W_fc1"), parameter("experts.W_fc2"));
        let product = |weight: &[f64], unit| dot(&|i| weight[(expert * d + i) * h + unit], x);
        let units = (0..h).map(|unit| act(case.activation, product(&gate, unit)) * product(&up, unit));
        (units.collect(), parameter("experts.W_fc3"))
    } else {
        let fc1 = parameter("experts.batched_fc1_w");
        let bias = if case.biased { parameter("experts.batched_fc1_bias") } else { vec![0.0; EXPERTS * h] };
        let unit = |unit| dot(&|i| fc1[(expert * h + unit) * d + i], x) + bias[expert * h + unit];
        ((0..h).map(|u| act(case.activation, unit(u))).collect(), parameter("experts.batched_fc2_w"))
    };
    let bias = if case.biased { parameter("experts.batched_fc2_bias") } else { vec![0.0; EXPERTS * o] };
    (0..o).map(|column| dot(&|u| outward[(expert * h + u) * o + column], &hidden) + bias[expert * o + column]).collect()
}

/// The layer, written as its documentation has it.
pub(crate) fn naive<T: Scalar>(layer: &MoeLayer<T>, case: Case, tokens: &[f64]) -> Expected {
    let gate = wide(layer.parameters().get("gates.0.wg.weight").unwrap().values);
    let tokens: Vec<&[f64]> = tokens.chunks_exact(MODEL_DIM).collect();
    let scores: Vec<Vec<f64>> = tokens
        .iter()
        .map(|x| {
            let logit = |e: usize| x.iter().zip(&gate[e * MODEL_DIM..]).map(|(x, w)| x * w).sum::<f64>();
            let powers: Vec<f64> = (0..EXPERTS).map(|e| logit(e).exp()).collect();
            powers.iter().map(|power| power / powers.iter().sum::<f64>()).collect()
        })
        .collect();
    let chosen: Vec<Vec<usize>> = scores
        .iter()
        .map(|scores| {
            let mut ids: Vec<usize> = (0..EXPERTS).collect();
            ids.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
            ids.truncate(case.top_k);
            ids
        })
        .collect();
    let share = tokens.len().div_ceil(EXPERTS) as f64;
    let capacity = case.top_k * (case.capacity_factor.abs() * share) as usize;
    let mut order: Vec<usize> = (0..tokens.len()).collect();
    if case.batch_prioritized {
        order.sort_by(|&a, &b| scores[b][chosen[b][0]].total_cmp(&scores[a][chosen[a][0]]));
    }
    let mut expected = Expected {
        tokens: vec![0.0; tokens.len() * OUTPUT_DIM],
        aux_loss: 0.0,
        tokens_per_expert: vec![0; EXPERTS],
        dropped: 0,
    };
    for choice in 0..case.top_k {
        for &token in &order {
            let id = chosen[token][choice];
            expected.tokens_per_expert[id] += 1;
            if case.capacity_factor != 0.0 && expected.tokens_per_expert[id] > capacity {
                expected.dropped += 1;
                continue;
            }
            let sum: f64 = chosen[token].iter().map(|&id| scores[token][id]).sum();
            let divisor = if case.normalize_gate && case.top_k > 1 { sum } else { 1.0 };
            let weight = scores[token][id] / divisor;
            let (inner, outer) = if case.score_at == ScoreAt::Dispatch { (weight, 1.0) } else { (1.0, weight) };
            let input: Vec<f64> = tokens[token].iter().map(|x| inner * x).collect();
            let output = &mut expected.tokens[token * OUTPUT_DIM..(token + 1) * OUTPUT_DIM];
            for (sum, y) in output.iter_mut().zip(expert(layer, case, id, &input)) {
                *sum += outer * y;
            }
        }
    }
    let count = tokens.len() as f64;
    for e in 0..EXPERTS {
        let first = chosen.iter().filter(|ids| ids[0] == e).count() as f64;
        let score_sum: f64 = scores.iter().map(|scores| scores[e]).sum();
        expected.aux_loss += EXPERTS as f64 * first * score_sum / (count * count);
    }
    expected
}
