//! What becomes of the sums of a product while they are still in the cache.
use std::mem::MaybeUninit;

use crate::disjoint::Tile;
use crate::operand::Operand;

/// Columns that come at once, at most.
const MOST: usize = 32;

/// Where the rows of a product go.
pub(crate) struct Epilogue<'a, T: Operand> {
    pub(crate) output: Tile<'a, MaybeUninit<T>>,
    /// Of the tile's columns.
    pub(crate) bias: Option<&'a [T]>,
}

impl<T: Operand> Epilogue<'_, T> {
    /// Takes some columns of a row of sums, both counted from the tile's first; each is given once.
    #[inline(always)]
    pub(crate) fn finish(&mut self, row: usize, column: usize, sums: &mut [T::Accumulator]) {
        if let Some(bias) = self.bias {
            sums.iter_mut().zip(&bias[column..]).for_each(|(sum, bias)| *sum += bias.widen());
        }
        // By way of registers: the compiler cannot know that sums and output do not overlap.
        let mut narrow = [T::default(); MOST];
        narrow.iter_mut().zip(&*sums).for_each(|(narrow, &sum)| *narrow = T::narrow(sum));
        self.output.row(row)[column..column + sums.len()].write_copy_of_slice(&narrow[..sums.len()]);
    }
}
