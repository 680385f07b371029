//! Logits to a plan: who goes where, with which weight, and what is dropped.
use tutel_core::{NOT_ROUTED, RoutePlan, RoutingShape, RowShape};
use tutel_cpu::owned::Selection;
use tutel_cpu::{RowsOf, Scalar, by_choice, by_row, row_tokens};

use crate::Error;
use crate::aux_loss::{aux_loss, aux_loss_grad};
use crate::kernels::Kernels;

/// How experts are chosen and what is dropped.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Routing {
    pub(crate) experts: usize,
    pub(crate) top_k: usize,
    pub(crate) capacity_factor: f64,
    pub(crate) normalize_gate: bool,
    pub(crate) batch_prioritized: bool,
}

/// The routing of one forward pass.
#[derive(Debug, Clone)]
pub(crate) struct Routed<T: Scalar> {
    /// `[T, E]`.
    logits: Vec<T>,
    pub(crate) shape: RoutingShape,
    pub(crate) selection: Selection<T::Accumulator>,
    pub(crate) plan: RoutePlan,
    /// `[R]`: the token of each row; 0, which nobody reads, of rows that are unused.
    row_tokens: Vec<usize>,
}

pub(crate) fn check_capacity_factor(factor: f64) -> Result<f64, Error> {
    let refused = || Error::option("capacity_factor", factor, "finite (0 drops nothing)");
    factor.is_finite().then_some(factor).ok_or_else(refused)
}

impl Routing {
    /// The capacity C: slots of an expert beyond which choices are dropped; None keeps all.
    ///
    /// With a factor f < 0 it is at most what the fullest expert needs, which drops the same choices as `-f` does.
    pub(crate) fn capacity(self, tokens: usize) -> Option<usize> {
        let factor = self.capacity_factor.abs();
        let share = tokens.div_ceil(self.experts) as f64;
        // `as` saturates: a capacity beyond all numbers drops nothing.
        (factor > 0.0).then(|| self.top_k.saturating_mul((factor * share) as usize))
    }

    /// Routes tokens by their logits `[T, E]`.
    pub(crate) fn route<T: Scalar>(self, kernels: Kernels<'_>, logits: Vec<T>) -> Result<Routed<T>, Error> {
        let tokens = logits.len() / self.experts;
        let shape = RoutingShape::new(tokens, self.experts, self.top_k)?;
        let selection = kernels.select(&logits, shape, self.normalize_gate)?;
        let plan = kernels.assign::<T>(&selection, self.batch_prioritized, shape, self.capacity(tokens))?;
        let row_tokens = row_tokens(&plan.row_choice, RowShape::new(tokens, shape.choices(), 0, self.top_k)?)?;
        Ok(Routed { logits, shape, selection, plan, row_tokens })
    }

    /// Gradient of the logits, from those of the weights `[T, K]` and of the auxiliary loss.
    pub(crate) fn backward<T: Scalar>(
        self,
        kernels: Kernels<'_>,
        routed: &Routed<T>,
        grad_weights: &[T::Accumulator],
        grad_aux_loss: f64,
    ) -> Result<Vec<T>, Error> {
        let Routed { logits, shape, selection, plan, .. } = routed;
        let grad_score_sums = aux_loss_grad::<T>(grad_aux_loss, &plan.first_choices, shape.tokens);
        kernels.select_grad(logits, &selection.ids, (grad_weights, &grad_score_sums), *shape, self.normalize_gate)
    }
}

impl<T: Scalar> Routed<T> {
    /// Sizes of dispatch and combine, for tokens and rows of this width.
    pub(crate) fn row_shape(&self, width: usize) -> Result<RowShape, Error> {
        Ok(RowShape::new(self.shape.tokens, self.shape.choices(), width, self.shape.top_k)?)
    }

    /// The rows of all experts, gathered from tokens where they are read.
    pub(crate) fn gathered<'a>(&'a self, tokens: &'a [T]) -> RowsOf<'a, T> {
        RowsOf { matrix: tokens, index: Some(&self.row_tokens) }
    }

    /// Weights `[T, K]` by row, `[R]`; 0 for rows that are unused.
    pub(crate) fn by_row(&self, weights: &[T::Accumulator]) -> Vec<T::Accumulator> {
        by_row(weights, &self.plan.row_choice)
    }

    /// Values `[R]` by choice, `[T, K]`; 0 for choices that are dropped.
    pub(crate) fn by_choice(&self, values: &[T::Accumulator]) -> Vec<T::Accumulator> {
        let mut output = vec![T::Accumulator::default(); self.shape.choices()];
        by_choice(values, &self.plan.row_choice, &mut output);
        output
    }

    /// `[T, K]`: the expert of each choice, -1 where it is dropped.
    pub(crate) fn kept_ids(&self) -> Vec<i64> {
        let kept = |(&id, &row): (&i32, &i64)| if row == NOT_ROUTED { NOT_ROUTED } else { i64::from(id) };
        self.selection.ids.iter().zip(&self.plan.row_index).map(kept).collect()
    }

    pub(crate) fn aux_loss(&self) -> f64 {
        aux_loss::<T>(&self.selection.score_sums, &self.plan.first_choices, self.shape.tokens)
    }

    /// Choices that name each expert, dropped ones included.
    pub(crate) fn tokens_per_expert(&self) -> Vec<usize> {
        self.plan.tokens_per_expert.iter().map(|&count| count as usize).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capacity_follows_the_sign_of_the_factor() {
        let capacity = |capacity_factor, top_k, tokens| {
            Routing { experts: 4, top_k, capacity_factor, normalize_gate: true, batch_prioritized: false }
                .capacity(tokens)
        };
        assert_eq!(capacity(1.0, 2, 10), Some(6), "K * ceil(T / E)");
        assert_eq!(capacity(1.5, 2, 10), Some(8), "K * int(f * ceil(T / E)), not int(K * f * ...)");
        assert_eq!(capacity(-1.5, 2, 10), Some(8));
        assert_eq!(capacity(0.1, 1, 10), Some(0));
        assert_eq!(capacity(0.0, 2, 10), None);
        assert_eq!(capacity(1.0, 2, 0), Some(0));
        assert_eq!(capacity(1e300, 2, 10), Some(usize::MAX));
    }
}
