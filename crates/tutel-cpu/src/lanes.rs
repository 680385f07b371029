//! Rows in blocks of lanes, which loops turn into registers, and sums in a fixed order: one partial sum a lane, lanes
//! added pairwise at the end.
//!
//! What compiles well: sums over blocks; all else over flat slices. A loop over blocks without a sum is vectorised
//! across the blocks, by gathering.
use std::mem::MaybeUninit;

use tutel_core::Real;

use crate::convert::Convert;

pub(crate) const LANES: usize = 16;

/// One value a lane.
pub(crate) type Block<A> = [A; LANES];

/// The lanes' sum.
#[inline(always)]
pub(crate) fn fold<A: Real>(mut lanes: Block<A>) -> A {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// Blocks that hold so many values.
pub(crate) fn blocks_of<A: Real>(values: usize) -> Vec<Block<A>> {
    vec![[A::zero(); LANES]; values.div_ceil(LANES)]
}

/// Widens a row into blocks; lanes behind its end get the padding.
#[inline(always)]
pub(crate) fn widen_into<T: Convert>(row: &[T], padding: T::Accumulator, blocks: &mut [Block<T::Accumulator>]) {
    let (values, rest) = blocks.as_flattened_mut().split_at_mut(row.len());
    for (wide, value) in values.iter_mut().zip(row) {
        *wide = value.to_wide();
    }
    rest.fill(padding);
}

/// Narrows as many values as the row has.
#[inline(always)]
pub(crate) fn narrow_into<T: Convert>(blocks: &[Block<T::Accumulator>], row: &mut [MaybeUninit<T>]) {
    for (value, &wide) in row.iter_mut().zip(blocks.as_flattened()) {
        value.write(T::from_wide(wide));
    }
}

/// The inner product of two rows of blocks.
#[inline(always)]
pub(crate) fn dot<A: Real>(left: &[Block<A>], right: &[Block<A>]) -> A {
    let mut lanes = [A::zero(); LANES];
    for (left, right) in left.iter().zip(right) {
        for lane in 0..LANES {
            lanes[lane] += left[lane] * right[lane];
        }
    }
    fold(lanes)
}
