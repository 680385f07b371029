//! Element types of tensors, each with the type that its sums are accumulated in.
use half::{bf16, f16};
use num_traits::Float;

/// A type that sums are accumulated in and routing weights are kept in: f32, or f64 for f64 tensors.
pub trait Real: Float + Element<Accumulator = Self> + std::ops::AddAssign + std::iter::Sum + Send + Sync {
    /// Rounds to this type.
    fn from_f64(value: f64) -> Self;
    /// Exact.
    fn to_f64(self) -> f64;
}

impl Real for f32 {
    fn from_f64(value: f64) -> Self {
        value as f32
    }
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
}

impl Real for f64 {
    fn from_f64(value: f64) -> Self {
        value
    }
    fn to_f64(self) -> f64 {
        self
    }
}

/// A floating-point element of a tensor: f64, f32, bf16 or f16.
pub trait Element: Copy + Default + PartialEq + std::fmt::Debug + Send + Sync + 'static {
    /// What sums of this type are accumulated in; half types use f32.
    type Accumulator: Real;
    /// Whether the type is its own accumulator.
    const IS_ACCUMULATOR: bool;
    /// The distance from 1 to the next larger value, as an accumulator.
    const EPSILON: f64;
    /// Exact conversion to the accumulator.
    fn widen(self) -> Self::Accumulator;
    /// Conversion back, rounded once (to nearest even).
    fn narrow(value: Self::Accumulator) -> Self;
    /// Widens a whole slice; both have one length.
    fn widen_slice(source: &[Self], target: &mut [Self::Accumulator]) {
        for (target, source) in target.iter_mut().zip(source) {
            *target = source.widen();
        }
    }
    /// Narrows a whole slice; both have one length.
    fn narrow_slice(source: &[Self::Accumulator], target: &mut [Self]) {
        for (target, source) in target.iter_mut().zip(source) {
            *target = Self::narrow(*source);
        }
    }
}

macro_rules! full_precision {
    ($($t:ty),*) => { $(
        impl Element for $t {
            type Accumulator = $t;
            const IS_ACCUMULATOR: bool = true;
            const EPSILON: f64 = <$t>::EPSILON as f64;
            fn widen(self) -> $t { self }
            fn narrow(value: $t) -> $t { value }
            fn widen_slice(source: &[$t], target: &mut [$t]) { target.copy_from_slice(source); }
            fn narrow_slice(source: &[$t], target: &mut [$t]) { target.copy_from_slice(source); }
        }
    )* };
}
full_precision!(f32, f64);

macro_rules! half_precision {
    ($($t:ty),*) => { $(
        impl Element for $t {
            type Accumulator = f32;
            const IS_ACCUMULATOR: bool = false;
            const EPSILON: f64 = <$t>::EPSILON.to_f64_const();
            fn widen(self) -> f32 { self.to_f32() }
            fn narrow(value: f32) -> $t { <$t>::from_f32(value) }
            // The `half` crate converts slices with F16C where the processor has it, found at run time.
            fn widen_slice(source: &[$t], target: &mut [f32]) {
                half::slice::HalfFloatSliceExt::convert_to_f32_slice(source, target);
            }
            fn narrow_slice(source: &[f32], target: &mut [$t]) {
                half::slice::HalfFloatSliceExt::convert_from_f32_slice(target, source);
            }
        }
    )* };
}
half_precision!(bf16, f16);
