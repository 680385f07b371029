//! The innermost loop of a product of few rows by columns that lie side by side in memory: these go to the registers as
//! they are, since packing would take longer than multiplying.
use super::kernel::{Ahead, Destination, Kernel, PackedRows, Rows, VECTORS};

/// Panels that the registers hold at once at most.
const MOST: usize = 4;
/// Rows up to which that takes less time than packing.
pub(super) const MOST_ROWS: usize = 8;

/// Panels that are computed at once, for chains of sums enough that none waits for itself.
pub(super) const fn panels_at_once<K: Kernel>(rows: usize) -> usize {
    let mut panels = MOST;
    while panels > 1 && panels * rows > K::ROWS {
        panels /= 2;
    }
    panels
}

/// Calls `rows_times_memory` with the number of rows as a constant.
macro_rules! for_count {
    ($count:expr, $kernel:ident, $arguments:tt, $($rows:literal)*) => {
        match $count {
            // A kernel with fewer rows never asks for more: the compiler drops these arms.
            $( $rows if $rows <= $kernel::ROWS => rows_times_memory::<$kernel, $rows> $arguments, )*
            _ => unreachable!("between 1 and {MOST_ROWS} rows, and no more than {}", $kernel::ROWS),
        }
    };
}

/// As [`super::kernel::step_rows`], for [`panels_at_once`] panels that lie in `depth` rows of memory: the tile's panels
/// follow one another, `count` rows each. Announces a portion for each unit.
///
/// # Safety
/// `count` rows, between 1 and `ROWS` and [`MOST_ROWS`], with the panels' columns each, at the destination; `depth` rows of the panels'
/// columns at `right`; `count` packed rows of as many elements; features.
#[inline(always)]
pub(super) unsafe fn memory_rows<K: Kernel>(
    count: usize,
    depth: usize,
    left: PackedRows<K::Unit>,
    right: Rows<K::Element>,
    sums: Destination<K::Sum>,
    ahead: &mut Ahead,
    portion: usize,
) {
    // SAFETY: passed on from our caller.
    unsafe {
        for_count!(count, K, (depth, left, right, sums, ahead, portion), 1 2 3 4 5 6 7 8);
    }
}

#[inline(always)]
unsafe fn rows_times_memory<K: Kernel, const ROWS: usize>(
    depth: usize,
    left: PackedRows<K::Unit>,
    right: Rows<K::Element>,
    sums: Destination<K::Sum>,
    ahead: &mut Ahead,
    portion: usize,
) {
    let panels = const { panels_at_once::<K>(ROWS) };
    // SAFETY: our caller vouches for ROWS rows of sums with the panels' columns, for `depth` rows of these, for as many
    // elements in each packed row, and for the features.
    unsafe {
        // Plain loops: a closure would be a function without the processor's features.
        let mut registers = [[[K::zero(); VECTORS]; MOST]; ROWS];
        if sums.continued {
            for (row, registers) in registers.iter_mut().enumerate() {
                for (panel, registers) in registers.iter_mut().enumerate().take(panels) {
                    for (v, register) in registers.iter_mut().enumerate() {
                        *register = K::load(sums.tile.add((panel * ROWS + row) * K::PANEL + v * K::LANES));
                    }
                }
            }
        }
        for unit in 0..depth.div_ceil(K::DEPTH) {
            ahead.announce::<K>(portion);
            let first = right.first.add(unit * K::DEPTH * right.stride);
            let has_second = K::DEPTH == 2 && 2 * unit + 1 < depth;
            for panel in 0..panels {
                let first = first.add(panel * K::PANEL);
                let factors = K::factors_across(first, has_second.then_some(first.wrapping_add(right.stride)));
                for (row, registers) in registers.iter_mut().enumerate() {
                    let left = left.rows.first.add(row * left.rows.stride + unit * left.step);
                    for (register, factor) in registers[panel].iter_mut().zip(factors) {
                        *register = K::step(*register, left, factor);
                    }
                }
            }
        }
        for (row, registers) in registers.iter().enumerate() {
            for (panel, registers) in registers.iter().enumerate().take(panels) {
                for (v, &register) in registers.iter().enumerate() {
                    let mut sum = register;
                    let partial = sums.partial.wrapping_add(row * sums.stride + panel * K::PANEL + v * K::LANES);
                    if sums.add_partial {
                        sum = K::add(K::load(partial), sum);
                    }
                    let tile = sums.tile.add((panel * ROWS + row) * K::PANEL + v * K::LANES);
                    K::store(if sums.to_partial { partial } else { tile }, sum);
                }
            }
        }
    }
}
