//! Blocks of both factors, packed in the order in which the innermost loop takes them.
use std::ops::Range;

use super::kernel::{Ahead, Kernel, PackedRows, Rows};
use crate::operand::Factor;

/// Units between packed rows. Rows that lie a power of two apart would fall into the same few sets of the cache.
const SKEW: usize = 16;

/// Packs a block of the right factor, panel by panel; columns beyond its last are zero. Announces as much memory as it reads.
///
/// # Safety
/// The processor has the kernel's features.
#[inline(always)]
pub(super) unsafe fn pack_right<K: Kernel>(
    right: Factor<'_, K::Element>,
    depth: Range<usize>,
    columns: Range<usize>,
    ahead: &mut Ahead,
    packed: &mut [K::Unit],
) {
    let units = depth.len().div_ceil(K::DEPTH);
    let (offset, columns) = (columns.start, columns.len());
    assert_eq!(packed.len(), units * columns.next_multiple_of(K::PANEL), "room for the panels");
    if !columns.is_multiple_of(K::PANEL) {
        packed[columns / K::PANEL * K::PANEL * units..].fill(K::Unit::default());
    }
    if right.transposed {
        let stride = right.view.stride().expect("a transposed right factor is not gathered");
        for first in (0..columns).step_by(K::PANEL) {
            let count = K::PANEL.min(columns - first);
            let source = right.view.pointer(offset + first, depth.start, count, depth.len());
            let target = packed[first * units..].as_mut_ptr();
            // SAFETY: `count` rows of the view with `depth` elements each begin at `source`; a panel of `units` rows
            // begins at the target; features: our caller.
            unsafe { K::pack_along(Rows { first: source, stride }, depth.len(), count, target, K::PANEL, ahead) };
        }
        return;
    }
    let lines = K::DEPTH * (columns * size_of::<K::Element>()).div_ceil(Ahead::LINE);
    // Row by row through all panels: rows of the factor are read in one go.
    for unit in 0..units {
        let row = depth.start + unit * K::DEPTH;
        let range = offset..offset + columns;
        let first = right.view.row(row, range.clone());
        let second = (row + 1 < depth.end && K::DEPTH == 2).then(|| right.view.row(row + 1, range));
        // SAFETY: features: our caller.
        unsafe { ahead.announce::<K>(lines) };
        for column in (0..columns).step_by(K::PANEL) {
            let count = K::PANEL.min(columns - column);
            let target = packed[column * units + unit * K::PANEL..].as_mut_ptr();
            // SAFETY: `count` elements are left of each row from that column on, and the target has a panel's columns;
            // features: our caller.
            unsafe {
                let second = second.map(|row| row.as_ptr().add(column));
                K::pack_across(first.as_ptr().add(column), second, count, target);
            }
        }
    }
}

/// Packs a block of the left factor.
///
/// # Safety
/// The processor has the kernel's features.
#[inline(always)]
pub(super) unsafe fn pack_left<K: Kernel>(
    left: Factor<'_, K::Element>,
    depth: Range<usize>,
    packed: &mut Vec<K::Unit>,
) -> PackedRows<K::Unit> {
    let count = left.rows();
    let units = depth.len().div_ceil(K::DEPTH);
    if left.transposed {
        packed.resize(units * count, K::Unit::default());
        for (unit, target) in packed.chunks_exact_mut(count).enumerate().take(units) {
            let row = depth.start + unit * K::DEPTH;
            let first = left.view.row(row, 0..count);
            let second = (row + 1 < depth.end && K::DEPTH == 2).then(|| left.view.row(row + 1, 0..count).as_ptr());
            // SAFETY: rows and target have `count` elements; features: our caller.
            unsafe { K::pack_across(first.as_ptr(), second, count, target.as_mut_ptr()) };
        }
        return PackedRows { rows: Rows { first: packed.as_ptr(), stride: 1 }, step: count };
    }
    let stride = units + SKEW;
    packed.resize(stride * count, K::Unit::default());
    for (row, target) in packed.chunks_exact_mut(stride).enumerate().take(count) {
        let source = left.view.row(row, depth.clone());
        let rows = Rows { first: source.as_ptr(), stride: 0 };
        // SAFETY: the source has `depth` elements, the target `units` units; features: our caller.
        unsafe { K::pack_along(rows, depth.len(), 1, target.as_mut_ptr(), 1, &mut Ahead::nothing()) };
    }
    PackedRows { rows: Rows { first: packed.as_ptr(), stride }, step: 1 }
}
