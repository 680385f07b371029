//! The stack of 64-bit values through which libtorch calls a kernel, and the Rust types that cross it.
//!
//! A value is read in two steps. `take` makes a Rust owner of everything the stack owns, for all arguments, without
//! failing; only then does `convert` look at the values. So whatever goes wrong, no handle is forgotten.

use crate::api::Api;
use crate::ffi::StableIValue;
use crate::tensor::{Handle, Tensor};
use crate::{ArgumentType, Error};

/// Types that an operator can take: tuples of 1 to 10 of [`Tensor`], `Option<Tensor>` (`Tensor?` in the schema),
/// [`i64`] (`int` or `SymInt`), [`bool`] and [`f64`] (`float`).
///
/// It cannot be implemented elsewhere.
pub trait FromStack: sealed::FromStack {}
impl<T: sealed::FromStack> FromStack for T {}

/// Types that an operator can return: [`Tensor`], and tuples of 1 to 10 of it.
///
/// It cannot be implemented elsewhere.
pub trait IntoStack: sealed::IntoStack {}
impl<T: sealed::IntoStack> IntoStack for T {}

pub(crate) mod sealed {
    use super::{Api, ArgumentType, Error, StableIValue};

    /// One argument.
    pub trait Argument: Sized {
        const TYPE: ArgumentType;
        /// The owner of what the stack held.
        type Taken;

        /// # Safety
        ///
        /// `value` is an argument of this type that libtorch passed to a kernel, and is taken only once.
        unsafe fn take(value: StableIValue, api: &'static Api) -> Self::Taken;

        fn convert(taken: Self::Taken) -> Result<Self, Error>;
    }

    /// All arguments.
    pub trait FromStack: Sized {
        const TYPES: &'static [ArgumentType];
        type Taken;

        /// # Safety
        ///
        /// `stack` holds arguments of these types that libtorch passed to a kernel, and is taken only once.
        unsafe fn take(stack: &[StableIValue], api: &'static Api) -> Self::Taken;

        /// On failure also says which argument is to blame.
        fn convert(taken: Self::Taken) -> Result<Self, (usize, Error)>;
    }

    /// All results.
    pub trait IntoStack {
        const COUNT: usize;

        /// Gives the results away; `stack` has `COUNT` places.
        fn put(self, stack: &mut [StableIValue]);
    }
}
use sealed::Argument;

impl Argument for Tensor {
    const TYPE: ArgumentType = ArgumentType::Tensor;
    type Taken = Handle;

    unsafe fn take(value: StableIValue, api: &'static Api) -> Handle {
        let raw = std::ptr::with_exposed_provenance_mut(value as usize);
        // SAFETY: a tensor argument is an owned handle, and the caller takes it once.
        unsafe { Handle::from_raw(raw, api) }
    }

    fn convert(taken: Handle) -> Result<Self, Error> {
        Self::from_handle(taken)
    }
}

impl Argument for Option<Tensor> {
    const TYPE: ArgumentType = ArgumentType::OptionalTensor;
    type Taken = Option<Handle>;

    unsafe fn take(value: StableIValue, api: &'static Api) -> Option<Handle> {
        let cell: *mut StableIValue = std::ptr::with_exposed_provenance_mut(value as usize);
        if cell.is_null() {
            return None;
        }
        // SAFETY: an optional argument that is not null points to a value on C++'s heap which the kernel owns. It was
        // made by `new` in libtorch; libtorch's own function to free it (torch 2.13) is preferred.
        unsafe {
            let inner = *cell;
            if let Some(delete) = api.symbols.torch_delete_stable_ivalue {
                delete(cell);
            } else if let Some(delete) = api.symbols.operator_delete {
                delete(cell.cast());
            }
            Some(Tensor::take(inner, api))
        }
    }

    fn convert(taken: Option<Handle>) -> Result<Self, Error> {
        match taken.map(Tensor::from_handle) {
            None | Some(Err(Error::Undefined)) => Ok(None),
            Some(tensor) => tensor.map(Some),
        }
    }
}

macro_rules! scalar {
    ($scalar:ty, $type:ident, $value:ident => $conversion:expr) => {
        impl Argument for $scalar {
            const TYPE: ArgumentType = ArgumentType::$type;
            type Taken = Self;

            unsafe fn take($value: StableIValue, _: &'static Api) -> Self {
                $conversion
            }

            fn convert(taken: Self) -> Result<Self, Error> {
                Ok(taken)
            }
        }
    };
}

// libtorch copies a scalar's bytes into the low bytes of the value; the bytes above a bool's are not looked at.
scalar!(i64, Int, value => value.cast_signed());
scalar!(f64, Float, value => f64::from_bits(value));
scalar!(bool, Bool, value => value as u8 != 0);

fn put(tensor: Tensor, place: &mut StableIValue) {
    *place = tensor.into_raw().expose_provenance() as StableIValue;
}

impl sealed::IntoStack for Tensor {
    const COUNT: usize = 1;

    fn put(self, stack: &mut [StableIValue]) {
        put(self, &mut stack[0]);
    }
}

macro_rules! tuples {
    ($($count:literal: $($type:ident $index:tt),+;)+) => {$(
        impl<$($type: Argument),+> sealed::FromStack for ($($type,)+) {
            const TYPES: &'static [ArgumentType] = &[$($type::TYPE),+];
            type Taken = ($($type::Taken,)+);

            unsafe fn take(stack: &[StableIValue], api: &'static Api) -> Self::Taken {
                // SAFETY: as the caller vouches for all arguments, so for each.
                unsafe { ($($type::take(stack[$index], api),)+) }
            }

            fn convert(taken: Self::Taken) -> Result<Self, (usize, Error)> {
                Ok(($($type::convert(taken.$index).map_err(|error| ($index, error))?,)+))
            }
        }

        impl sealed::IntoStack for ($(tuples!(@tensor $type),)+) {
            const COUNT: usize = $count;

            fn put(self, stack: &mut [StableIValue]) {
                $(put(self.$index, &mut stack[$index]);)+
            }
        }
    )+};
    (@tensor $type:ident) => { Tensor };
}

tuples! {
    1: A 0;
    2: A 0, B 1;
    3: A 0, B 1, C 2;
    4: A 0, B 1, C 2, D 3;
    5: A 0, B 1, C 2, D 3, E 4;
    6: A 0, B 1, C 2, D 3, E 4, F 5;
    7: A 0, B 1, C 2, D 3, E 4, F 5, G 6;
    8: A 0, B 1, C 2, D 3, E 4, F 5, G 6, H 7;
    9: A 0, B 1, C 2, D 3, E 4, F 5, G 6, H 7, I 8;
    10: A 0, B 1, C 2, D 3, E 4, F 5, G 6, H 7, I 8, J 9;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_and_counts_follow_the_tuples() {
        use ArgumentType::{Bool, Float, Int, OptionalTensor, Tensor as T};
        type Arguments = (Tensor, Option<Tensor>, i64, bool, f64);
        assert_eq!(<Arguments as sealed::FromStack>::TYPES, [T, OptionalTensor, Int, Bool, Float]);
        assert_eq!(<Tensor as sealed::IntoStack>::COUNT, 1);
        assert_eq!(<(Tensor,) as sealed::IntoStack>::COUNT, 1);
        assert_eq!(<(Tensor, Tensor, Tensor) as sealed::IntoStack>::COUNT, 3);
    }
}
