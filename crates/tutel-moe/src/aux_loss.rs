//! The load-balancing loss of GShard (Lepikhin et al., 2020, algorithm 1):
//! `E / T^2 * sum_e (sum_t scores[t, e] * number of first choices of e)`.
//!
//! That is E times the inner product of each expert's mean score and its share of first choices. As in the Python
//! layer the means, their products and the result are rounded to the element type.
use tutel_core::{Element, Real};

fn rounded<T: Element>(value: T::Accumulator) -> T::Accumulator {
    T::narrow(value).widen()
}

fn count<A: Real>(value: usize) -> A {
    A::from_f64(value as f64)
}

/// Each expert's share of the first choices.
fn shares<T: Element>(first_choices: &[i64], tokens: usize) -> impl Iterator<Item = T::Accumulator> {
    first_choices.iter().map(move |&first| {
        rounded::<T>(T::Accumulator::from_f64(first as f64) / count::<T::Accumulator>(tokens.max(1)))
    })
}

/// The loss; 0 without tokens.
pub(crate) fn aux_loss<T: Element>(score_sums: &[T::Accumulator], first_choices: &[i64], tokens: usize) -> f64 {
    let mean = |&sum: &T::Accumulator| rounded::<T>(sum / count(tokens.max(1)));
    let terms = score_sums.iter().map(mean).zip(shares::<T>(first_choices, tokens));
    let sum: T::Accumulator = terms.map(|(mean, share)| rounded::<T>(mean * share)).sum();
    rounded::<T>(count::<T::Accumulator>(score_sums.len()) * rounded::<T>(sum)).to_f64()
}

/// The loss's gradient in the score sums, times `grad`.
pub(crate) fn aux_loss_grad<T: Element>(grad: f64, first_choices: &[i64], tokens: usize) -> Vec<T::Accumulator> {
    let scale = rounded::<T>(T::Accumulator::from_f64(grad * first_choices.len() as f64));
    shares::<T>(first_choices, tokens)
        .map(|share| rounded::<T>(scale * share) / count::<T::Accumulator>(tokens.max(1)))
        .collect()
}
