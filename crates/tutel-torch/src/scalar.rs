//! From a tensor's dtype to the Rust type that a kernel is compiled for.

/// An element type that both torch and the kernels know, whose accumulator torch knows as well.
pub(crate) trait TorchScalar:
    tutel_cpu::Scalar<Accumulator: torch_stable::Element> + torch_stable::Element
{
}

impl<T> TorchScalar for T
where
    T: tutel_cpu::Scalar + torch_stable::Element,
    T::Accumulator: torch_stable::Element,
{
}

/// Calls a generic function with the Rust type of a tensor's dtype, or refuses the tensor with the argument's name.
macro_rules! with_scalar {
    ($tensor:expr, $argument:literal, $function:ident($($value:expr),* $(,)?)) => {
        match $tensor.dtype() {
            torch_stable::DType::Float64 => $function::<f64>($($value),*),
            torch_stable::DType::Float32 => $function::<f32>($($value),*),
            torch_stable::DType::BFloat16 => $function::<half::bf16>($($value),*),
            torch_stable::DType::Float16 => $function::<half::f16>($($value),*),
            other => Err(torch_stable::Error::kernel(format!(
                "{} must be float64, float32, bfloat16 or float16, got {other}",
                $argument
            ))),
        }
    };
}
pub(crate) use with_scalar;
