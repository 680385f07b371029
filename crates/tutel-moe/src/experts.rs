//! All experts on their rows: `y = act(x W1 + b1) W2 + b2`, or gated, `y = (act(x W1) * (x W2)) W3`.
use tutel_cpu::Scalar;

use crate::elementwise::{activate, add, pre_gradient, up_gradient};
use crate::kernels::{Kernels, Matrices};
use crate::parameters::{Parameters, Role, Sizes};
use crate::{Activation, Error};

/// The experts' parameters as factors of products.
#[derive(Clone, Copy)]
pub(crate) struct Experts<'a, T> {
    fc1: Matrices<'a, T>,
    up: Option<Matrices<'a, T>>,
    fc2: Matrices<'a, T>,
    fc1_bias: Option<&'a [T]>,
    fc2_bias: Option<&'a [T]>,
    activation: Activation,
}

/// What the backward pass needs.
#[derive(Debug, Clone)]
pub(crate) struct SavedExperts<T> {
    /// `[R, D]`.
    rows: Vec<T>,
    /// `[R, H]`, before the activation.
    pre: Vec<T>,
    /// `[R, H]`, of gated experts.
    up: Option<Vec<T>>,
    /// `[R, H]`, what enters the second product.
    hidden: Vec<T>,
}

/// Gradients of the experts' input and parameters.
pub(crate) struct ExpertGradients<T> {
    /// `[R, D]`.
    pub(crate) rows: Vec<T>,
    pub(crate) fc1: Vec<T>,
    pub(crate) up: Option<Vec<T>>,
    pub(crate) fc2: Vec<T>,
    pub(crate) fc1_bias: Option<Vec<T>>,
    pub(crate) fc2_bias: Option<Vec<T>>,
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

    /// The two products before the activation; the second one for gated experts only.
    fn first_products(
        self,
        kernels: Kernels<'_>,
        rows: &[T],
        offsets: &[i64],
    ) -> Result<(Vec<T>, Option<Vec<T>>), Error> {
        let pre = kernels.linear(rows, self.fc1, self.fc1_bias, offsets)?;
        let up = self.up.map(|up| kernels.linear(rows, up, None, offsets)).transpose()?;
        Ok((pre, up))
    }

    /// Rows `[R, D]` to rows `[R, D_out]`, keeping nothing.
    pub(crate) fn infer(self, kernels: Kernels<'_>, rows: Vec<T>, offsets: &[i64]) -> Result<Vec<T>, Error> {
        let (mut hidden, up) = self.first_products(kernels, &rows, offsets)?;
        drop(rows);
        activate(&mut hidden, up.as_deref(), self.activation, kernels.0);
        kernels.linear(&hidden, self.fc2, self.fc2_bias, offsets)
    }

    /// Rows `[R, D]` to rows `[R, D_out]`, and what [`Self::backward`] needs.
    pub(crate) fn forward(
        self,
        kernels: Kernels<'_>,
        rows: Vec<T>,
        offsets: &[i64],
    ) -> Result<(Vec<T>, SavedExperts<T>), Error> {
        let (pre, up) = self.first_products(kernels, &rows, offsets)?;
        let mut hidden = pre.clone();
        activate(&mut hidden, up.as_deref(), self.activation, kernels.0);
        let output = kernels.linear(&hidden, self.fc2, self.fc2_bias, offsets)?;
        Ok((output, SavedExperts { rows, pre, up, hidden }))
    }

    /// Gradients from that of the output, `[R, D_out]`.
    pub(crate) fn backward(
        self,
        kernels: Kernels<'_>,
        saved: SavedExperts<T>,
        grad: &[T],
        offsets: &[i64],
    ) -> Result<ExpertGradients<T>, Error> {
        let SavedExperts { rows, mut pre, up, hidden } = saved;
        let bias_grad = |bias: Option<&[T]>, grad: &[T], width: usize| {
            bias.map(|_| kernels.linear_bias_grad(grad, width, offsets)).transpose()
        };
        let fc2 = kernels.linear_weight_grad(&hidden, grad, self.fc2, offsets)?;
        let fc2_bias = bias_grad(self.fc2_bias, grad, self.fc2.outer)?;
        drop(hidden);
        let grad_hidden = kernels.linear_rows_grad(grad, self.fc2, offsets)?;

        let grad_up = up.is_some().then(|| {
            let mut grad_up = pre.clone();
            up_gradient(&mut grad_up, &grad_hidden, self.activation, kernels.0);
            grad_up
        });
        pre_gradient(&mut pre, up.as_deref(), &grad_hidden, self.activation, kernels.0);
        let grad_pre = pre;

        let fc1 = kernels.linear_weight_grad(&rows, &grad_pre, self.fc1, offsets)?;
        let fc1_bias = bias_grad(self.fc1_bias, &grad_pre, self.fc1.outer)?;
        let mut grad_rows = kernels.linear_rows_grad(&grad_pre, self.fc1, offsets)?;
        let mut grad_up_weight = None;
        if let (Some(weight), Some(grad_up)) = (self.up, grad_up) {
            grad_up_weight = Some(kernels.linear_weight_grad(&rows, &grad_up, weight, offsets)?);
            let through_up = kernels.linear_rows_grad(&grad_up, weight, offsets)?;
            add(&mut grad_rows, &through_up, kernels.0);
        }
        Ok(ExpertGradients { rows: grad_rows, fc1, up: grad_up_weight, fc2, fc1_bias, fc2_bias })
    }
}
