//! What every operator asks of its arguments.
use torch_stable::{Element, Error, Tensor};
use tutel_core::ScoreFunction;
use tutel_cpu::Activation;

/// Sizes of a tensor of known rank.
pub(crate) fn sizes_of<const RANK: usize>(tensor: &Tensor, argument: &str) -> Result<[usize; RANK], Error> {
    let sizes = tensor.sizes();
    let wrong = || Error::kernel(format!("{argument} must have {RANK} dimensions, got shape {sizes:?}"));
    let sizes: [i64; RANK] = sizes.try_into().map_err(|_| wrong())?;
    let mut checked = [0; RANK];
    for (checked, size) in checked.iter_mut().zip(sizes) {
        *checked = usize::try_from(size).map_err(|_| wrong())?;
    }
    Ok(checked)
}

/// Two sizes that must agree.
pub(crate) fn same_size(what: &str, left: usize, right: usize) -> Result<(), Error> {
    if left == right { Ok(()) } else { Err(Error::kernel(format!("{what} must agree, got {left} and {right}"))) }
}

/// A size that Python passed as an integer.
pub(crate) fn size_argument(value: i64, argument: &str) -> Result<usize, Error> {
    usize::try_from(value).map_err(|_| Error::kernel(format!("{argument} must not be negative, got {value}")))
}

/// The elements of a tensor, or an error that names the argument.
pub(crate) fn slice_of<'a, T: Element>(tensor: &'a Tensor, argument: &str) -> Result<&'a [T], Error> {
    tensor.as_slice().map_err(|error| Error::kernel(format!("{argument}: {error}")))
}

/// The elements of a tensor of known sizes that may be missing.
pub(crate) fn optional_slice<'a, T: Element>(
    tensor: Option<&'a Tensor>,
    argument: &str,
    sizes: &[usize],
) -> Result<Option<&'a [T]>, Error> {
    let Some(tensor) = tensor else { return Ok(None) };
    let found = tensor.sizes();
    if found.len() != sizes.len() || found.iter().zip(sizes).any(|(&found, &size)| usize::try_from(found) != Ok(size)) {
        return Err(Error::kernel(format!("{argument} must have shape {sizes:?}, got {found:?}")));
    }
    slice_of(tensor, argument).map(Some)
}

/// Kernels' own errors.
pub(crate) fn refused(error: tutel_core::Error) -> Error {
    Error::kernel(error)
}

pub(crate) fn score_function(softmax: bool) -> ScoreFunction {
    if softmax { ScoreFunction::Softmax } else { ScoreFunction::Identity }
}

/// An activation by its place in the list that `tutel._core.activations()` returns.
pub(crate) fn activation_argument(code: i64) -> Result<Activation, Error> {
    let known = usize::try_from(code).ok().and_then(|code| Activation::ALL.get(code));
    known.map(|(activation, _)| *activation).ok_or_else(|| {
        Error::kernel(format!("activation must be between 0 and {}, got {code}", Activation::ALL.len() - 1))
    })
}
