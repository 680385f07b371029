//! Kernels for every processor: plain arrays in place of registers; half types are widened while they are packed.
use std::marker::PhantomData;

use num_traits::Zero;
use tutel_core::Element;

use super::kernel::{Ahead, Kernel, Rows};
use crate::operand::Operand;

/// Any element type, in its accumulator.
pub(crate) struct Portable<T>(PhantomData<T>);

const LANES: usize = 8;

// SAFETY: needs no features.
unsafe impl<T: Operand> Kernel for Portable<T> {
    type Element = T;
    type Unit = T::Accumulator;
    type Sum = T::Accumulator;
    type Register = [T::Accumulator; LANES];
    type Factor = [T::Accumulator; LANES];
    const DEPTH: usize = 1;
    const LANES: usize = LANES;
    const ROWS: usize = 4;

    #[inline(always)]
    unsafe fn zero() -> Self::Register {
        [T::Accumulator::zero(); LANES]
    }
    #[inline(always)]
    unsafe fn load(sums: *const T::Accumulator) -> Self::Register {
        // SAFETY: our caller vouches for LANES sums; arrays ask for no more alignment than their elements.
        unsafe { sums.cast::<Self::Register>().read() }
    }
    #[inline(always)]
    unsafe fn store(sums: *mut T::Accumulator, register: Self::Register) {
        // SAFETY: as for `load`.
        unsafe { sums.cast::<Self::Register>().write(register) }
    }
    #[inline(always)]
    unsafe fn add(mut left: Self::Register, right: Self::Register) -> Self::Register {
        for (left, right) in left.iter_mut().zip(right) {
            *left += right;
        }
        left
    }
    #[inline(always)]
    unsafe fn prefetch<P>(_address: *const P) {}
    #[inline(always)]
    unsafe fn prefetch_near<P>(_address: *const P) {}
    #[inline(always)]
    unsafe fn factor(units: *const T::Accumulator) -> Self::Factor {
        // SAFETY: our caller vouches for LANES units.
        unsafe { units.cast::<Self::Factor>().read() }
    }
    #[inline(always)]
    unsafe fn step(mut sum: Self::Register, left: *const T::Accumulator, right: Self::Factor) -> Self::Register {
        // SAFETY: our caller vouches for one unit.
        let left = unsafe { *left };
        for (sum, right) in sum.iter_mut().zip(right) {
            *sum += left * right;
        }
        sum
    }
    #[inline(always)]
    unsafe fn pack_across(first: *const T, _second: Option<*const T>, count: usize, target: *mut T::Accumulator) {
        // SAFETY: our caller vouches for `count` elements and as many units.
        unsafe { widen(first, count, target) }
    }
    #[inline(always)]
    unsafe fn pack_along(
        source: Rows<T>,
        depth: usize,
        count: usize,
        target: *mut T::Accumulator,
        target_stride: usize,
        _ahead: &mut Ahead,
    ) {
        let Rows { first: source, stride } = source;
        if count == 1 && target_stride == 1 {
            // SAFETY: one row of `depth` elements, and as many units.
            return unsafe { widen(source, depth, target) };
        }
        for column in 0..count {
            for unit in 0..depth {
                // SAFETY: our caller vouches for `count` rows of `depth` elements and for as many units.
                unsafe {
                    target.add(unit * target_stride + column).write((*source.add(column * stride + unit)).widen());
                }
            }
        }
    }
}

/// Widens elements in a row; a `depth` of 0 makes none.
///
/// # Safety
/// There are `count` elements and as many places for the result.
#[inline(always)]
unsafe fn widen<T: Element>(source: *const T, count: usize, target: *mut T::Accumulator) {
    // SAFETY: our caller vouches for the lengths; targets are initialised buffers of the packing code.
    unsafe {
        let target = std::slice::from_raw_parts_mut(target, count);
        T::widen_slice(std::slice::from_raw_parts(source, count), target);
    }
}

/// The packing of [`Portable`], for kernels that have none of their own.
#[cfg(target_arch = "aarch64")]
macro_rules! packed_portably {
    ($element:ty, $unit:ty) => {
        #[inline(always)]
        unsafe fn pack_across(
            first: *const $element,
            second: Option<*const $element>,
            count: usize,
            target: *mut $unit,
        ) {
            // SAFETY: passed on from our caller.
            unsafe { Portable::<$element>::pack_across(first, second, count, target) }
        }
        #[inline(always)]
        unsafe fn pack_along(
            source: Rows<$element>,
            depth: usize,
            count: usize,
            target: *mut $unit,
            target_stride: usize,
            ahead: &mut Ahead,
        ) {
            // SAFETY: passed on from our caller.
            unsafe { Portable::<$element>::pack_along(source, depth, count, target, target_stride, ahead) }
        }
    };
}
#[cfg(target_arch = "aarch64")]
pub(super) use packed_portably;
