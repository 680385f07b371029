//! All experts on their rows: `y = act(x W1 + b1) W2 + b2`, or gated, `y = (act(x W1) * (x W2)) W3`.
use tutel_cpu::owned::{HiddenGradients, KeptUnits};
use tutel_cpu::{Hidden, HiddenGrad, RowsOf, Scalar};

use crate::kernels::{Kernels, Matrices};
use crate::parameters::{Parameters, Role, Sizes};
use crate::{Activation, Error};

/// The experts' parameters as factors of products.
#[derive(Clone, Copy)]
pub(crate) struct Experts<'a, T> {
    fc1: Matrices<'a, T>,
    /// In the layout of `fc1`.
    up: Option<Matrices<'a, T>>,
    fc2: Matrices<'a, T>,
    fc1_bias: Option<&'a [T]>,
    fc2_bias: Option<&'a [T]>,
    activation: Activation,
}

/// Gradients of the experts' input and parameters, but for the second bias.
pub(crate) struct ExpertGradients<T: Scalar> {
    /// `[R, D]`.
    pub(crate) rows: Vec<T>,
    /// `[R]`, where routing weights multiply the outputs: their gradient, but for what the second bias adds.
    pub(crate) dots: Option<Vec<T::Accumulator>>,
    pub(crate) fc1: Vec<T>,
    pub(crate) up: Option<Vec<T>>,
    pub(crate) fc2: Vec<T>,
    pub(crate) fc1_bias: Option<Vec<T>>,
}

impl<'a, T: Scalar> Experts<'a, T> {
    pub(crate) fn new(parameters: &'a Parameters<T>, sizes: Sizes, activation: Activation) -> Self {
        let Sizes { model_dim, hidden_size, output_dim, gated, .. } = sizes;
        let matrices = |role, inner, outer, transposed| {
            parameters.role(role).map(|values| Matrices { values, inner, outer, transposed })
        };
        let fc1 = matrices(Role::Fc1, model_dim, hidden_size, !gated);
        let fc2 = matrices(Role::Fc2, hidden_size, output_dim, false);
        Self {
            fc1: fc1.expect("every layer has fc1"),
            up: matrices(Role::Up, model_dim, hidden_size, false),
            fc2: fc2.expect("every layer has fc2"),
            fc1_bias: parameters.role(Role::Fc1Bias),
            fc2_bias: parameters.role(Role::Fc2Bias),
            activation,
        }
    }

    fn hidden_input<'b>(&'b self, rows: RowsOf<'b, T>, offsets: &'b [i64]) -> Hidden<'b, T> {
        Hidden {
            rows,
            weight: self.fc1.values,
            bias: self.fc1_bias,
            value_weight: self.up.map(|up| up.values),
            offsets,
            transposed: self.fc1.transposed,
            activation: self.activation,
        }
    }

    /// Hidden units `[R, H]` of rows `[R, D]`.
    pub(crate) fn hidden(self, kernels: Kernels<'_>, rows: RowsOf<'_, T>, offsets: &[i64]) -> Result<Vec<T>, Error> {
        kernels.hidden(self.hidden_input(rows, offsets), (self.fc1.inner, self.fc1.outer))
    }

    /// The same, and what [`Self::backward`] needs.
    pub(crate) fn hidden_kept(
        self,
        kernels: Kernels<'_>,
        rows: RowsOf<'_, T>,
        offsets: &[i64],
    ) -> Result<(Vec<T>, KeptUnits<T>), Error> {
        kernels.hidden_kept(self.hidden_input(rows, offsets), (self.fc1.inner, self.fc1.outer))
    }

    /// Hidden units to rows `[R, D_out]`.
    pub(crate) fn outputs(self, kernels: Kernels<'_>, hidden: Vec<T>, offsets: &[i64]) -> Result<Vec<T>, Error> {
        kernels.linear(&hidden, self.fc2, self.fc2_bias, offsets)
    }

    /// Gradients from that of the outputs, `[R, D_out]` before the routing weights that multiply them, if any do.
    pub(crate) fn backward(
        self,
        kernels: Kernels<'_>,
        kept: KeptUnits<T>,
        (rows, grad): (RowsOf<'_, T>, RowsOf<'_, T>),
        weights: Option<&[T::Accumulator]>,
        offsets: &[i64],
    ) -> Result<ExpertGradients<T>, Error> {
        let Matrices { values, inner, outer, transposed } = self.fc2;
        let input = HiddenGrad {
            grad,
            weight: values,
            offsets,
            transposed: !transposed,
            activation: self.activation,
            pre: &kept.pre,
            value: kept.value.as_deref(),
            weights,
        };
        let HiddenGradients { grad_pre, grad_value, hidden, dots } = kernels.hidden_grad(&input, (outer, inner))?;
        drop(kept);
        let fc2 = kernels.linear_weight_grad((&hidden).into(), grad, self.fc2, offsets)?;
        drop(hidden);

        let fc1 = kernels.linear_weight_grad(rows, (&grad_pre).into(), self.fc1, offsets)?;
        let bias_grad = |_| kernels.linear_bias_grad(&grad_pre, self.fc1.outer, offsets);
        let fc1_bias = self.fc1_bias.map(bias_grad).transpose()?;
        let value = self.up.zip(grad_value.as_deref());
        let up_grad = |(up, grad): (_, &[T])| kernels.linear_weight_grad(rows, grad.into(), up, offsets);
        let up = value.map(up_grad).transpose()?;
        let rows = kernels.linear_rows_grad(&grad_pre, self.fc1, value.map(|(up, grad)| (grad, up.values)), offsets)?;
        Ok(ExpertGradients { rows, dots, fc1, up, fc2, fc1_bias })
    }
}
