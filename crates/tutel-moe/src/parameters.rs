//! The layer's parameters, by the names of the Python layer's state dict.
use crate::Error;
use crate::error::check_shape;

/// One parameter: row-major values of a shape.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Parameter<'a, T> {
    /// Its name in the state dict of the Python layer.
    pub name: &'static str,
    /// Its sizes.
    pub shape: &'a [usize],
    /// Its values, row-major.
    pub values: &'a [T],
}

/// One parameter whose values can be changed.
#[derive(Debug, PartialEq)]
#[non_exhaustive]
pub struct ParameterMut<'a, T> {
    /// As in [`Parameter`].
    pub name: &'static str,
    /// As in [`Parameter`].
    pub shape: &'a [usize],
    /// As in [`Parameter`].
    pub values: &'a mut [T],
}

/// What a parameter is to its layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// `[E, D]`.
    Gate,
    /// `[E, H, D]`, or `[E, D, H]` in gated experts.
    Fc1,
    /// `[E, D, H]`, in gated experts: what the activated units are multiplied by.
    Up,
    /// `[E, H, D_out]`.
    Fc2,
    /// `[E, H]`.
    Fc1Bias,
    /// `[E, D_out]`.
    Fc2Bias,
}

#[derive(Debug, Clone, PartialEq)]
struct Entry<T> {
    role: Role,
    name: &'static str,
    shape: Vec<usize>,
    values: Vec<T>,
}

/// Parameters of a layer, or their gradients, which have the same names and shapes in the same order.
///
/// | name | shape | |
/// |---|---|---|
/// | `experts.batched_fc1_w` | `[E, H, D]` | W1, transposed |
/// | `experts.batched_fc2_w` | `[E, H, D_out]` | W2 |
/// | `experts.batched_fc1_bias` | `[E, H]` | b1, where there is one |
/// | `experts.batched_fc2_bias` | `[E, D_out]` | b2, where there is one |
/// | `experts.W_fc1` | `[E, D, H]` | of gated experts, instead of the four above: W1 |
/// | `experts.W_fc2` | `[E, D, H]` | W2 |
/// | `experts.W_fc3` | `[E, H, D_out]` | W3 |
/// | `gates.0.wg.weight` | `[E, D]` | the gate |
#[derive(Debug, Clone, PartialEq)]
pub struct Parameters<T>(Vec<Entry<T>>);

/// What decides which parameters there are, and their shapes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sizes {
    pub(crate) model_dim: usize,
    pub(crate) hidden_size: usize,
    pub(crate) experts: usize,
    pub(crate) output_dim: usize,
    pub(crate) gated: bool,
    pub(crate) fc1_bias: bool,
    pub(crate) fc2_bias: bool,
}

impl Sizes {
    fn layout(self) -> Vec<(Role, &'static str, Vec<usize>)> {
        let Self { model_dim, hidden_size, experts, output_dim, .. } = self;
        let inward = vec![experts, model_dim, hidden_size];
        let outward = vec![experts, hidden_size, output_dim];
        let mut layout = if self.gated {
            vec![
                (Role::Fc1, "experts.W_fc1", inward.clone()),
                (Role::Up, "experts.W_fc2", inward),
                (Role::Fc2, "experts.W_fc3", outward),
            ]
        } else {
            vec![
                (Role::Fc1, "experts.batched_fc1_w", vec![experts, hidden_size, model_dim]),
                (Role::Fc2, "experts.batched_fc2_w", outward),
            ]
        };
        if self.fc1_bias {
            layout.push((Role::Fc1Bias, "experts.batched_fc1_bias", vec![experts, hidden_size]));
        }
        if self.fc2_bias {
            layout.push((Role::Fc2Bias, "experts.batched_fc2_bias", vec![experts, output_dim]));
        }
        layout.push((Role::Gate, "gates.0.wg.weight", vec![experts, model_dim]));
        layout
    }
}

impl<T: Clone> Parameters<T> {
    /// Makes each parameter of a layer; `values` gets its role and number of elements.
    pub(crate) fn new(
        sizes: Sizes,
        mut values: impl FnMut(Role, usize) -> Result<Vec<T>, Error>,
    ) -> Result<Self, Error> {
        let entry = |(role, name, shape): (Role, &'static str, Vec<usize>)| {
            let values = values(role, tutel_core::checked_product(name, &shape)?)?;
            check_shape(name, values.len(), &shape)?;
            Ok(Entry { role, name, shape, values })
        };
        Ok(Self(sizes.layout().into_iter().map(entry).collect::<Result<_, Error>>()?))
    }

    pub(crate) fn role(&self, role: Role) -> Option<&[T]> {
        self.0.iter().find(|entry| entry.role == role).map(|entry| &entry.values[..])
    }

    /// All parameters, in an order that depends on the layer's options alone.
    pub fn iter(&self) -> impl Iterator<Item = Parameter<'_, T>> {
        self.0.iter().map(|Entry { name, shape, values, .. }| Parameter { name, shape, values })
    }

    /// All parameters in the same order, for changing their values.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = ParameterMut<'_, T>> {
        self.0.iter_mut().map(|Entry { name, shape, values, .. }| ParameterMut { name, shape, values })
    }

    /// The parameter of that name.
    ///
    /// # Errors
    /// [`Error::UnknownParameter`], which lists the names there are.
    pub fn get(&self, name: &str) -> Result<Parameter<'_, T>, Error> {
        self.iter().find(|parameter| parameter.name == name).ok_or_else(|| self.unknown(name))
    }

    /// Gives a parameter new values, for example those of a checkpoint: row-major, in its shape.
    ///
    /// # Errors
    /// [`Error::UnknownParameter`], [`Error::Length`]; then nothing has changed.
    pub fn set(&mut self, name: &str, values: &[T]) -> Result<(), Error> {
        let Some(entry) = self.0.iter_mut().find(|entry| entry.name == name) else { return Err(self.unknown(name)) };
        check_shape(entry.name, values.len(), &entry.shape)?;
        entry.values.clone_from_slice(values);
        Ok(())
    }

    fn unknown(&self, name: &str) -> Error {
        let known: Vec<_> = self.iter().map(|parameter| parameter.name).collect();
        Error::UnknownParameter { name: name.to_owned(), known: known.join(", ") }
    }
}
