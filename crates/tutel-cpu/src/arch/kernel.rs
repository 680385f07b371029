//! The matrix product of one task, written once over a small [`Kernel`] that a processor's registers implement.
//!
//! ```text
//! for a block of the inner dimension:
//!     pack that block of the left factor
//!     for some columns of the right factor:
//!         pack the block of these into panels of two registers' columns
//!         for as many rows as the registers hold:
//!             for each panel: sums[rows, panel] += left[rows, block] right[block, panel]
//! ```
//! A sum is made of chains of steps in the order of the inner dimension, one chain a block, so its bits do not depend on
//! the other rows and columns.
use std::mem::size_of;
use std::ops::Range;

use tutel_core::{Element, Real};

use crate::operand::Factor;

/// Units of the inner dimension that are packed at once: enough for a row's sums to stay in registers for long.
const BLOCK: usize = 512;
/// Bytes of the columns of the right factor that are packed at once, so that a block stays in the second-level cache.
const COLUMN_BYTES: usize = 1024;
/// Units between packed rows. Rows that lie a power of two apart would fall into the same few sets of the cache.
const SKEW: usize = 16;
/// Registers side by side in a panel.
pub(crate) const VECTORS: usize = 2;

/// How one processor multiplies elements of one type.
///
/// # Safety
/// All functions need the processor features that the implementation names; pointers must be valid for what the
/// function's text says. No alignment is asked for.
pub(crate) unsafe trait Kernel {
    /// What the factors are stored as.
    type Element: Element<Accumulator = Self::Sum>;
    /// What a step takes of one row or column: `DEPTH` elements of the inner dimension.
    type Unit: Copy + Default;
    /// The type of the sums.
    type Sum: Real;
    /// `LANES` sums.
    type Register: Copy;
    /// `LANES` units.
    type Factor: Copy;
    const DEPTH: usize;
    const LANES: usize;
    /// Rows that the registers hold at once, at most 14.
    const ROWS: usize;

    /// `LANES` sums of nothing.
    unsafe fn zero() -> Self::Register;
    /// Adds to `LANES` sums.
    unsafe fn add_to(sums: *mut Self::Sum, register: Self::Register);
    /// Announces [`Kernel::add_to`].
    unsafe fn prefetch(sums: *const Self::Sum);
    /// Reads `LANES` units.
    unsafe fn factor(units: *const Self::Unit) -> Self::Factor;
    /// `sum + left * right`, the one unit at `left` for all lanes.
    unsafe fn step(sum: Self::Register, left: *const Self::Unit, right: Self::Factor) -> Self::Register;

    /// Writes to `target[c]`, `c < count`, the unit whose elements are `source[c + d * stride]`, `d < depth`; elements
    /// beyond `depth` are zero.
    unsafe fn pack_across(
        source: *const Self::Element,
        stride: usize,
        depth: usize,
        count: usize,
        target: *mut Self::Unit,
    );
    /// Writes to `target[u * target_stride + c]`, `c < count`, `u < depth.div_ceil(DEPTH)`, the unit whose elements are
    /// `source[c * stride + u * DEPTH + d]`; elements beyond `depth` are zero.
    unsafe fn pack_along(
        source: *const Self::Element,
        stride: usize,
        depth: usize,
        count: usize,
        target: *mut Self::Unit,
        target_stride: usize,
    );
}

/// One worker's packed blocks.
pub(crate) struct Packed<U> {
    left: Vec<U>,
    right: Vec<U>,
}

impl<U> Packed<U> {
    pub(crate) fn new() -> Self {
        Self { left: Vec::new(), right: Vec::new() }
    }
}

/// Columns of a row of sums: those of the product, rounded up to whole panels.
pub(crate) fn padded_columns<K: Kernel>(columns: usize) -> usize {
    columns.next_multiple_of(VECTORS * K::LANES)
}

/// `sums += left right`: sums have [`padded_columns`] a row, of which the last are garbage.
///
/// # Safety
/// The processor has the kernel's features.
#[inline(always)]
pub(crate) unsafe fn product<K: Kernel>(
    sums: &mut [K::Sum],
    left: Factor<'_, K::Element>,
    right: Factor<'_, K::Element>,
    packed: &mut Packed<K::Unit>,
) {
    let (rows, inner, columns) = (left.rows(), left.columns(), right.columns());
    let stride = padded_columns::<K>(columns);
    assert_eq!(inner, right.rows(), "inner sizes of a product");
    assert_eq!(sums.len(), rows * stride, "size of a product");
    let panel = VECTORS * K::LANES;
    let block = BLOCK * K::DEPTH;
    let some_columns = COLUMN_BYTES / size_of::<K::Unit>();
    const { assert!((COLUMN_BYTES / size_of::<K::Unit>()).is_multiple_of(VECTORS * K::LANES), "whole panels") };
    for start in (0..inner).step_by(block) {
        let depth = (inner - start).min(block);
        let units = depth.div_ceil(K::DEPTH);
        // SAFETY: the block lies in the factor; features: our caller.
        let (row_stride, step) = unsafe { pack_left::<K>(left, start, depth, &mut packed.left) };
        for some in (0..columns).step_by(some_columns) {
            let some = some..(some + some_columns).min(columns);
            packed.right.resize(units * padded_columns::<K>(some.len()), K::Unit::default());
            // SAFETY: the block lies in the factor, and there is room for its panels; features: our caller.
            unsafe { pack_right::<K>(right, start, depth, some.clone(), &mut packed.right) };
            for row in (0..rows).step_by(K::ROWS) {
                let count = K::ROWS.min(rows - row);
                let left = Rows { first: packed.left[row * row_stride..].as_ptr(), stride: row_stride, step };
                for first in some.clone().step_by(panel) {
                    let right = packed.right[(first - some.start) * units..].as_ptr();
                    let sums = sums[row * stride + first..].as_mut_ptr();
                    // SAFETY: `count` rows of sums with a panel's columns begin there, `units` rows of the panel at
                    // `right`, and `count` packed rows of `units` at `left`; features: our caller.
                    unsafe { step_rows::<K>(count, units, left, right, sums, stride) };
                }
            }
        }
    }
}

/// Packed rows: where the first begins, how far apart they are, and how far apart the units of one are.
#[derive(Clone, Copy)]
struct Rows<U> {
    first: *const U,
    stride: usize,
    step: usize,
}

/// Packs a block of the right factor, panel by panel; columns beyond its last are zero.
#[inline(always)]
unsafe fn pack_right<K: Kernel>(
    right: Factor<'_, K::Element>,
    start: usize,
    depth: usize,
    columns: Range<usize>,
    packed: &mut [K::Unit],
) {
    let panel = VECTORS * K::LANES;
    let units = depth.div_ceil(K::DEPTH);
    let (offset, columns) = (columns.start, columns.len());
    if !columns.is_multiple_of(panel) {
        packed[columns / panel * panel * units..].fill(K::Unit::default());
    }
    let stride = right.view.stride();
    if right.transposed {
        for first in (0..columns).step_by(panel) {
            let count = panel.min(columns - first);
            let source = right.view.pointer(offset + first, start, count, depth);
            let target = packed[first * units..].as_mut_ptr();
            // SAFETY: `count` rows of the view with `depth` elements each begin at `source`; a panel of `units` rows
            // begins at the target; features: our caller.
            unsafe { K::pack_along(source, stride, depth, count, target, panel) };
        }
        return;
    }
    // Row by row through all panels: rows of the factor are read in one go.
    for unit in 0..units {
        let taken = (depth - unit * K::DEPTH).min(K::DEPTH);
        for first in (0..columns).step_by(panel) {
            let count = panel.min(columns - first);
            let source = right.view.pointer(start + unit * K::DEPTH, offset + first, taken, count);
            let target = packed[first * units + unit * panel..].as_mut_ptr();
            // SAFETY: `taken` rows of the view with `count` elements each begin at `source`, and the target has at
            // least `count`; features: our caller.
            unsafe { K::pack_across(source, stride, taken, count, target) };
        }
    }
}

/// Packs a block of the left factor; returns how far apart its rows are, and how far apart the units of one are.
#[inline(always)]
unsafe fn pack_left<K: Kernel>(
    left: Factor<'_, K::Element>,
    start: usize,
    depth: usize,
    packed: &mut Vec<K::Unit>,
) -> (usize, usize) {
    let count = left.rows();
    let units = depth.div_ceil(K::DEPTH);
    let stride = left.view.stride();
    if left.transposed {
        packed.resize(units * count, K::Unit::default());
        for (unit, target) in packed.chunks_exact_mut(count).enumerate().take(units) {
            let taken = (depth - unit * K::DEPTH).min(K::DEPTH);
            let source = left.view.pointer(start + unit * K::DEPTH, 0, taken, count);
            // SAFETY: `taken` rows of the view with `count` elements each begin at `source`, and the target has
            // `count`; features: our caller.
            unsafe { K::pack_across(source, stride, taken, count, target.as_mut_ptr()) };
        }
        return (1, count);
    }
    let row_stride = units + SKEW;
    packed.resize(row_stride * count, K::Unit::default());
    for (row, target) in packed.chunks_exact_mut(row_stride).enumerate().take(count) {
        let source = left.view.pointer(row, start, 1, depth);
        // SAFETY: one row of the view with `depth` elements begins at `source`; the target has `units`.
        unsafe { K::pack_along(source, stride, depth, 1, target.as_mut_ptr(), 1) };
    }
    (row_stride, 1)
}

macro_rules! for_count {
    ($count:expr, $kernel:ident, $arguments:tt, $($rows:literal)*) => {
        match $count {
            // A kernel with fewer rows never asks for more: the compiler drops these arms.
            $( $rows if $rows <= $kernel::ROWS => rows_times_panel::<$kernel, $rows> $arguments, )*
            _ => unreachable!("a block has between 1 and {} rows", $kernel::ROWS),
        }
    };
}

#[inline(always)]
unsafe fn step_rows<K: Kernel>(
    count: usize,
    units: usize,
    left: Rows<K::Unit>,
    right: *const K::Unit,
    sums: *mut K::Sum,
    stride: usize,
) {
    // SAFETY: passed on from our caller.
    unsafe {
        for_count!(count, K, (units, left, right, sums, stride), 1 2 3 4 5 6 7 8 9 10 11 12 13 14);
    }
}

/// `sums[i, panel] += sum over u of left[i, u] right[u, panel]`, all sums in registers.
#[inline(always)]
unsafe fn rows_times_panel<K: Kernel, const ROWS: usize>(
    units: usize,
    left: Rows<K::Unit>,
    right: *const K::Unit,
    sums: *mut K::Sum,
    stride: usize,
) {
    // SAFETY: our caller vouches for ROWS rows of sums with a panel's columns, for `units` rows of the panel, for as many
    // units in each packed row, and for the features.
    unsafe {
        // Plain loops: a closure would be a function without the processor's features.
        let mut registers = [[K::zero(); VECTORS]; ROWS];
        for row in 0..ROWS {
            for v in 0..VECTORS {
                K::prefetch(sums.add(row * stride + v * K::LANES));
            }
        }
        for unit in 0..units {
            let panel = right.add(unit * VECTORS * K::LANES);
            let right = [K::factor(panel), K::factor(panel.add(K::LANES))];
            for (row, registers) in registers.iter_mut().enumerate() {
                let left = left.first.add(row * left.stride + unit * left.step);
                for (register, right) in registers.iter_mut().zip(right) {
                    *register = K::step(*register, left, right);
                }
            }
        }
        for (row, registers) in registers.into_iter().enumerate() {
            for (v, register) in registers.into_iter().enumerate() {
                K::add_to(sums.add(row * stride + v * K::LANES), register);
            }
        }
    }
}
