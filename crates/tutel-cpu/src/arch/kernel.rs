//! What one processor does with elements of one type, and the innermost loop of a product written over it.
use crate::convert::Convert;
use crate::normal::Normal;
use crate::operand::Operand;

/// Registers side by side in a panel.
pub(crate) const VECTORS: usize = 2;
/// Columns of the widest panel.
const WIDEST: usize = 32;
/// Units of the inner dimension between two announcements of memory.
pub(crate) const RUN: usize = 64;

/// How one processor multiplies elements of one type.
///
/// # Safety
/// All functions need the processor features that the implementation names; pointers must be valid for what the
/// function's text says. No alignment is asked for.
pub(crate) unsafe trait Kernel {
    /// What the factors are stored as.
    type Element: Operand<Accumulator = Self::Sum>;
    /// What a step takes of one row or column: `DEPTH` elements of the inner dimension.
    type Unit: Copy + Default;
    /// The type of the sums.
    type Sum: Normal + Convert;
    /// `LANES` sums.
    type Register: Copy;
    /// `LANES` units.
    type Factor: Copy;
    /// 1 or 2.
    const DEPTH: usize;
    const LANES: usize;
    /// Rows that the registers hold at once, at most 14.
    const ROWS: usize;
    /// Columns of a panel.
    const PANEL: usize = VECTORS * Self::LANES;

    /// `LANES` sums of nothing.
    unsafe fn zero() -> Self::Register;
    /// Reads `LANES` sums.
    unsafe fn load(sums: *const Self::Sum) -> Self::Register;
    /// Writes `LANES` sums.
    unsafe fn store(sums: *mut Self::Sum, register: Self::Register);
    /// Lane by lane.
    unsafe fn add(left: Self::Register, right: Self::Register) -> Self::Register;
    /// Reads `LANES` units.
    unsafe fn factor(units: *const Self::Unit) -> Self::Factor;
    /// The units of a panel's columns whose elements are at `first` and, where `DEPTH` is 2, at `second`; zero where there is
    /// no second row.
    #[inline(always)]
    unsafe fn factors_across(
        first: *const Self::Element,
        second: Option<*const Self::Element>,
    ) -> [Self::Factor; VECTORS] {
        let mut units = [Self::Unit::default(); WIDEST];
        // SAFETY: our caller vouches for a panel's elements, of which no kernel has more than there is room for, and for the
        // features.
        unsafe {
            Self::pack_across(
                first,
                second,
                const {
                    assert!(Self::PANEL <= WIDEST);
                    Self::PANEL
                },
                units.as_mut_ptr(),
            );
            [Self::factor(units.as_ptr()), Self::factor(units.as_ptr().add(Self::LANES))]
        }
    }
    /// `sum + left * right`, the one unit at `left` for all lanes.
    unsafe fn step(sum: Self::Register, left: *const Self::Unit, right: Self::Factor) -> Self::Register;
    /// Announces that the memory at an address, which need not be valid, will be read soon (but not next).
    unsafe fn prefetch<P>(address: *const P);
    /// The same for memory that is wanted in the first-level cache.
    unsafe fn prefetch_near<P>(address: *const P);

    /// Writes to `target[c]`, `c < count`, the unit whose elements are `first[c]` and, where `DEPTH` is 2, `second[c]`; zero
    /// where there is no second row.
    unsafe fn pack_across(
        first: *const Self::Element,
        second: Option<*const Self::Element>,
        count: usize,
        target: *mut Self::Unit,
    );
    /// Writes to `target[u * target_stride + c]`, `c < count`, `u < depth.div_ceil(DEPTH)`, the unit whose elements are
    /// `source[c * stride + u * DEPTH + d]`; elements beyond `depth` are zero. May announce as much memory as it reads.
    unsafe fn pack_along(
        source: Rows<Self::Element>,
        depth: usize,
        count: usize,
        target: *mut Self::Unit,
        target_stride: usize,
        ahead: &mut Ahead,
    );
}

/// Rows in memory: where the first begins and how far apart they are.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rows<T> {
    pub(crate) first: *const T,
    pub(crate) stride: usize,
}

/// Packed rows of the left factor, and how far apart the units of one are.
#[derive(Clone, Copy)]
pub(crate) struct PackedRows<U> {
    pub(crate) rows: Rows<U>,
    pub(crate) step: usize,
}

/// Memory that a product will read soon, row by row: announced a few cache lines at a time while other work keeps the
/// processor busy, so that neither waits for the other. Memory is fastest when neighbouring lines are asked for one after
/// the other, in whatever order they are read.
pub(crate) struct Ahead {
    row: *const u8,
    row_bytes: usize,
    lines: usize,
    line: usize,
    left: usize,
}

impl Ahead {
    /// Bytes of a cache line.
    pub(crate) const LINE: usize = 64;

    pub(crate) fn nothing() -> Self {
        Self { row: std::ptr::null(), row_bytes: 0, lines: 0, line: 0, left: 0 }
    }

    /// `count` rows of `length` elements.
    pub(crate) fn new<T>(rows: Rows<T>, count: usize, length: usize) -> Self {
        let lines = (length * size_of::<T>()).div_ceil(Self::LINE);
        let row_bytes = rows.stride * size_of::<T>();
        Self { row: rows.first.cast(), row_bytes, lines, line: 0, left: lines * count }
    }

    /// How many lines are to be announced at a time so that all are after `times`.
    pub(crate) fn portion(&self, times: usize) -> usize {
        self.left.div_ceil(times.max(1))
    }

    /// Announces some lines.
    ///
    /// # Safety
    /// The processor has the kernel's features.
    #[inline(always)]
    pub(crate) unsafe fn announce<K: Kernel>(&mut self, lines: usize) {
        let lines = lines.min(self.left);
        for _ in 0..lines {
            // SAFETY: an announcement may be of any address; features: our caller.
            unsafe { K::prefetch(self.row.wrapping_add(self.line * Self::LINE)) };
            self.line += 1;
            if self.line == self.lines {
                self.line = 0;
                self.row = self.row.wrapping_add(self.row_bytes);
            }
        }
        self.left -= lines;
    }
}

/// Calls `rows_times_panel` with the number of rows as a constant.
macro_rules! for_count {
    ($count:expr, $kernel:ident, $arguments:tt, $($rows:literal)*) => {
        match $count {
            // A kernel with fewer rows never asks for more: the compiler drops these arms.
            $( $rows if $rows <= $kernel::ROWS => rows_times_panel::<$kernel, $rows> $arguments, )*
            _ => unreachable!("a block has between 1 and {} rows", $kernel::ROWS),
        }
    };
}

/// Sums of `ROWS` rows and a panel's columns.
#[derive(Clone, Copy)]
pub(crate) struct Destination<S> {
    /// Where chains go on, and where finished sums are left; rows are `PANEL` apart.
    pub(crate) tile: *mut S,
    /// Where the sums of several blocks are kept, and how far apart rows are.
    pub(crate) partial: *mut S,
    pub(crate) stride: usize,
    /// Whether chains go on that stand in the tile.
    pub(crate) continued: bool,
    /// Whether to add the sums of the blocks before.
    pub(crate) add_partial: bool,
    /// Whether to leave the sums for the blocks that follow.
    pub(crate) to_partial: bool,
}

/// `sums[i, panel] = sum over u < units of left[i, u] right[u, panel]` for `count` rows, on top of what the destination
/// tells.
///
/// # Safety
/// `count` rows, between 1 and `ROWS`, with a panel's columns each, at the destination; `units` rows of the panel; `count`
/// packed rows of as many units; features.
#[inline(always)]
pub(crate) unsafe fn step_rows<K: Kernel>(
    count: usize,
    units: usize,
    left: PackedRows<K::Unit>,
    right: *const K::Unit,
    sums: Destination<K::Sum>,
    ahead: &mut Ahead,
    portion: usize,
) {
    // SAFETY: passed on from our caller.
    unsafe {
        for_count!(count, K, (units, left, right, sums, ahead, portion), 1 2 3 4 5 6 7 8 9 10 11 12 13 14);
    }
}

#[inline(always)]
unsafe fn rows_times_panel<K: Kernel, const ROWS: usize>(
    units: usize,
    left: PackedRows<K::Unit>,
    right: *const K::Unit,
    sums: Destination<K::Sum>,
    ahead: &mut Ahead,
    portion: usize,
) {
    // SAFETY: our caller vouches for ROWS rows of sums with a panel's columns, for `units` rows of the panel, for as many
    // units in each packed row, and for the features.
    unsafe {
        // Plain loops: a closure would be a function without the processor's features.
        let mut registers = [[K::zero(); VECTORS]; ROWS];
        if sums.add_partial || sums.to_partial {
            for row in 0..ROWS {
                for v in 0..VECTORS {
                    K::prefetch_near(sums.partial.add(row * sums.stride + v * K::LANES));
                }
            }
        }
        if sums.continued {
            for (row, registers) in registers.iter_mut().enumerate() {
                for (v, register) in registers.iter_mut().enumerate() {
                    *register = K::load(sums.tile.add(row * K::PANEL + v * K::LANES));
                }
            }
        }
        for start in (0..units).step_by(RUN) {
            ahead.announce::<K>(portion);
            for unit in start..units.min(start + RUN) {
                let panel = right.add(unit * K::PANEL);
                let right = [K::factor(panel), K::factor(panel.add(K::LANES))];
                for (row, registers) in registers.iter_mut().enumerate() {
                    let left = left.rows.first.add(row * left.rows.stride + unit * left.step);
                    for (register, right) in registers.iter_mut().zip(right) {
                        *register = K::step(*register, left, right);
                    }
                }
            }
        }
        if sums.add_partial {
            for (row, registers) in registers.iter_mut().enumerate() {
                for (v, register) in registers.iter_mut().enumerate() {
                    *register = K::add(K::load(sums.partial.add(row * sums.stride + v * K::LANES)), *register);
                }
            }
        }
        let (target, stride) = if sums.to_partial { (sums.partial, sums.stride) } else { (sums.tile, K::PANEL) };
        for (row, registers) in registers.iter().enumerate() {
            for (v, &register) in registers.iter().enumerate() {
                K::store(target.add(row * stride + v * K::LANES), register);
            }
        }
    }
}
