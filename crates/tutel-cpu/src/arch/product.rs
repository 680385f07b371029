//! The matrix product of one task.
//!
//! ```text
//! for a block of the inner dimension:
//!     pack that block of the left factor
//!     for some columns of the right factor:
//!         pack the block of these into panels of two registers' columns
//!         for as many rows as the registers hold:
//!             for each panel: sums[rows, panel] = left[rows, block] right[block, panel]
//!                             add the sums of the blocks before; give them to the epilogue after the last
//! ```
//! A sum is made of chains of steps in the order of the inner dimension, one chain a block, so its bits do not depend on
//! the other rows and columns. With few rows, the right factor comes from memory and every element is used a few times
//! only: then a block is multiplied in chunks, and the chains go on from chunk to chunk. A chunk whose columns lie side by
//! side goes to the registers as it is; others are packed into the first-level cache.
use std::ops::Range;

use num_traits::Zero;

use super::few::{MOST_ROWS, memory_rows, panels_at_once};
use super::kernel::{Ahead, Destination, Kernel, PackedRows, RUN, Rows, VECTORS, step_rows};
use super::pack::{pack_left, pack_right};
use crate::epilogue::Epilogue;
use crate::operand::{Factor, Term};

/// Units of the inner dimension in a block: enough for a row's sums to stay in registers for long.
const BLOCK: usize = 512;
/// Units and columns that are packed at once where rows are few. Transposed, each column is read from one place on; else a
/// row is, and wants to be read in long pieces.
const CHUNK: usize = 16;
const CHUNK_COLUMNS: usize = 256;
const TRANSPOSED_CHUNK: usize = 128;
/// Chunks that are announced before they are packed.
const CHUNKS_AHEAD: usize = 2;
/// Units times panels at once of a chunk that goes to the registers as it is, and bytes of the sums that are under way at
/// once: they stay in the first-level cache, and rows are to be read in pieces as long as that allows.
const PLAIN_CHUNK: usize = 32;
const PLAIN_SUMS: usize = 16 * 1024;
/// Bytes of the columns of the right factor that are packed at once, so that two blocks, this and the one announced, stay
/// in the second-level cache.
const COLUMN_BYTES: usize = 512;

/// One worker's memory for products whose sums are `A` and whose units are `U`.
pub(crate) struct Packed<U> {
    left: Vec<U>,
    right: Vec<U>,
}

impl<U> Packed<U> {
    pub(crate) fn new() -> Self {
        Self { left: Vec::new(), right: Vec::new() }
    }
}

/// One worker's memory for sums.
pub(crate) struct Sums<A> {
    /// Of the rows and columns that are computed at once.
    tile: Vec<A>,
    /// Of the blocks before, where there are several.
    partial: Vec<A>,
}

impl<A> Sums<A> {
    pub(crate) fn new() -> Self {
        Self { tile: Vec::new(), partial: Vec::new() }
    }
}

/// What is packed at once of the right factor, and multiplied: columns of a chunk of a block.
#[derive(Clone)]
struct Step {
    term: usize,
    block: Range<usize>,
    chunk: Range<usize>,
    columns: Range<usize>,
    /// Whether the chunk is multiplied as it lies in memory.
    plain: bool,
}

/// The blocks of all terms, in the order in which they are added.
fn blocks<K: Kernel>(terms: &[Term<'_, K::Element>]) -> Vec<(usize, Range<usize>)> {
    let length = BLOCK * K::DEPTH;
    let of_term = |(index, term): (usize, &Term<'_, K::Element>)| {
        let inner = term.right.rows();
        (0..inner).step_by(length).map(move |start| (index, start..inner.min(start + length)))
    };
    terms.iter().enumerate().flat_map(of_term).collect()
}

fn steps<K: Kernel>(terms: &[Term<'_, K::Element>], block: &(usize, Range<usize>), rows: usize) -> Vec<Step> {
    let right = terms[block.0].right;
    let few = rows <= K::ROWS;
    let (width, chunk) = match (few, right.transposed) {
        (false, _) => (COLUMN_BYTES / size_of::<K::Unit>(), BLOCK),
        (true, false) => (CHUNK_COLUMNS, CHUNK),
        (true, true) => (K::PANEL, TRANSPOSED_CHUNK),
    };
    let mut steps = Vec::new();
    let mut cut = |columns: Range<usize>, width: usize, depth: Range<usize>, chunk: usize, plain: bool| {
        for column in columns.clone().step_by(width) {
            for start in depth.clone().step_by(chunk * K::DEPTH) {
                let chunk = start..depth.end.min(start + chunk * K::DEPTH);
                let columns = column..columns.end.min(column + width);
                steps.push(Step { term: block.0, block: block.1.clone(), chunk, columns, plain });
            }
        }
    };
    let columns = right.columns();
    let whole = if few && rows <= MOST_ROWS && !right.transposed && right.view.stride().is_some() {
        columns - columns % (panels_at_once::<K>(rows) * K::PANEL)
    } else {
        0
    };
    cut(0..whole, plain_width::<K>(rows), block.1.clone(), PLAIN_CHUNK / panels_at_once::<K>(rows), true);
    cut(whole..columns, width, block.1.clone(), chunk, false);
    steps
}

/// Columns of a step that is not packed.
fn plain_width<K: Kernel>(rows: usize) -> usize {
    let least = panels_at_once::<K>(rows) * K::PANEL;
    (PLAIN_SUMS / size_of::<K::Sum>() / rows / least).max(1) * least
}

/// The memory of a block of a right factor.
fn memory<E>(right: Factor<'_, E>, depth: Range<usize>, columns: Range<usize>) -> Ahead {
    let (row, column) = if right.transposed { (columns, depth) } else { (depth, columns) };
    match right.view.stride() {
        Some(stride) if !row.is_empty() && !column.is_empty() => {
            let first = right.view.pointer(row.start, column.start, row.len(), column.len());
            Ahead::new(Rows { first, stride }, row.len(), column.len())
        }
        _ => Ahead::nothing(),
    }
}

fn check_sizes<E>(terms: &[Term<'_, E>]) {
    let sizes = (terms[0].left.rows(), terms[0].right.columns());
    for term in terms {
        assert_eq!(term.left.columns(), term.right.rows(), "inner sizes of a product");
        assert_eq!((term.left.rows(), term.right.columns()), sizes, "sizes of terms");
    }
}

/// Gives the epilogue the sum of the terms' products.
///
/// # Safety
/// The processor has the kernel's features.
#[inline(always)]
pub(crate) unsafe fn product<K: Kernel>(
    sums: &mut Sums<K::Sum>,
    packed: &mut Packed<K::Unit>,
    terms: &[Term<'_, K::Element>],
    next: Option<Factor<'_, K::Element>>,
    epilogue: &mut Epilogue<'_, K::Element>,
) {
    let (rows, columns) = (terms[0].left.rows(), terms[0].right.columns());
    check_sizes(terms);
    const {
        assert!((COLUMN_BYTES / size_of::<K::Unit>()).is_multiple_of(K::PANEL), "whole panels");
        assert!(CHUNK_COLUMNS.is_multiple_of(K::PANEL), "whole panels");
    }
    let blocks = blocks::<K>(terms);
    if rows == 0 || columns == 0 {
        return;
    }
    if blocks.is_empty() {
        finish_empty::<K>(sums, (rows, columns), epilogue);
        return;
    }
    let few = rows <= K::ROWS;
    let stride = columns.next_multiple_of(K::PANEL);
    let tile = if few { rows * columns.next_multiple_of(K::PANEL).max(CHUNK_COLUMNS) } else { K::ROWS * K::PANEL };
    sums.tile.resize(tile, K::Sum::zero());
    if blocks.len() > 1 {
        sums.partial.resize(rows * stride, K::Sum::zero());
    }
    for (position, block) in blocks.iter().enumerate() {
        let steps = steps::<K>(terms, block, rows);
        let after = match blocks.get(position + 1) {
            Some(block) => Some((terms[block.0].right, block.1.clone())),
            None => next.map(|next| (next, 0..next.rows().min(BLOCK * K::DEPTH))),
        };
        // SAFETY: the block lies in the factor; features: our caller.
        let left = unsafe { pack_left::<K>(terms[block.0].left, block.1.clone(), &mut packed.left) };
        let stage = Stage { rows, columns, stride, few, first: position == 0, last: position + 1 == blocks.len() };
        for (index, step) in steps.iter().enumerate() {
            let right = terms[step.term].right;
            let mut ahead = following(&steps[index..], terms, after.clone(), few);
            if step.plain {
                let source = Source::Memory(plain::<K>(right, step));
                // SAFETY: the step's chunk lies in the factor; features: our caller.
                unsafe { multiply_step::<K>(stage, step, left, source, sums, &mut ahead, epilogue) };
                continue;
            }
            let units = step.chunk.len().div_ceil(K::DEPTH);
            packed.right.resize(units * step.columns.len().next_multiple_of(K::PANEL), K::Unit::default());
            // With many rows, the memory has been announced while the step before was computed.
            let mut none = Ahead::nothing();
            let meanwhile = if few { &mut ahead } else { &mut none };
            // SAFETY: features: our caller.
            unsafe {
                pack_right::<K>(right, step.chunk.clone(), step.columns.clone(), meanwhile, &mut packed.right);
                let source = Source::Packed(&packed.right);
                multiply_step::<K>(stage, step, left, source, sums, &mut ahead, epilogue);
            }
        }
    }
}

/// A block on its way through a product.
#[derive(Clone, Copy)]
struct Stage {
    rows: usize,
    columns: usize,
    /// Columns between rows of partial sums.
    stride: usize,
    /// Whether chains go on from chunk to chunk.
    few: bool,
    /// Whether there are no sums of blocks before.
    first: bool,
    /// Whether the sums are finished with this block.
    last: bool,
}

/// What a step multiplies by.
enum Source<'a, K: Kernel> {
    /// Panels.
    Packed(&'a [K::Unit]),
    /// The step's chunk as it lies in memory, whose columns are a whole number of [`panels_at_once`].
    Memory(Rows<K::Element>),
}

/// A step's chunk as it lies in memory.
fn plain<K: Kernel>(right: Factor<'_, K::Element>, step: &Step) -> Rows<K::Element> {
    let stride = right.view.stride().expect("a right factor that is not gathered");
    let (rows, columns) = (&step.chunk, &step.columns);
    Rows { first: right.view.pointer(rows.start, columns.start, rows.len(), columns.len()), stride }
}

/// Lines to announce at a time in a step of so many calls. Where rows are few, packing has announced as much as it read; what
/// is not packed announces as much as it reads, since what follows may be more than a step.
fn portion<K: Kernel>(ahead: &Ahead, step: &Step, few: bool, panels: usize, calls: usize) -> usize {
    let units = step.chunk.len().div_ceil(K::DEPTH);
    if step.plain {
        let read = K::DEPTH * panels * K::PANEL * size_of::<K::Element>();
        ahead.portion(calls * units).min(read.div_ceil(Ahead::LINE))
    } else if few {
        0
    } else {
        ahead.portion(calls * units.div_ceil(RUN))
    }
}

/// The memory to announce during the first of these steps: that of a later one or, behind the last, of the block `after`.
fn following<E: Copy>(
    steps: &[Step],
    terms: &[Term<'_, E>],
    after: Option<(Factor<'_, E>, Range<usize>)>,
    few: bool,
) -> Ahead {
    let current = &steps[0];
    match (steps.get(if few && !current.plain { CHUNKS_AHEAD } else { 1 }), after) {
        (Some(step), _) => memory(terms[step.term].right, step.chunk.clone(), step.columns.clone()),
        (None, Some((right, depth))) => memory(right, depth, 0..right.columns().min(current.columns.len())),
        (None, None) => Ahead::nothing(),
    }
}

/// Multiplies all rows of a packed block by the columns of one step.
///
/// # Safety
/// `left` are the stage's packed rows with the units of the step's block; the source has the chunk of the step; the
/// processor has the kernel's features.
#[inline(always)]
unsafe fn multiply_step<K: Kernel>(
    stage: Stage,
    step: &Step,
    left: PackedRows<K::Unit>,
    source: Source<'_, K>,
    sums: &mut Sums<K::Sum>,
    ahead: &mut Ahead,
    epilogue: &mut Epilogue<'_, K::Element>,
) {
    let Stage { rows, columns, stride, few, first, last } = stage;
    let (units, done) = (step.chunk.len().div_ceil(K::DEPTH), (step.chunk.start - step.block.start) / K::DEPTH);
    let whole = step.chunk.end == step.block.end;
    let (to_partial, add_partial) = (whole && !last, whole && !first);
    let panels = if step.plain { panels_at_once::<K>(rows) } else { 1 };
    let calls = rows.div_ceil(K::ROWS) * step.columns.len().div_ceil(panels * K::PANEL);
    let portion = portion::<K>(ahead, step, few, panels, calls);
    for row in (0..rows).step_by(K::ROWS) {
        let count = K::ROWS.min(rows - row);
        let offset = row * left.rows.stride + done * left.step;
        // SAFETY: the packed block has these rows and units.
        let from = unsafe { left.rows.first.add(offset) };
        let left = PackedRows { rows: Rows { first: from, stride: left.rows.stride }, step: left.step };
        for column in step.columns.clone().step_by(K::PANEL) {
            let offset = column - step.columns.start;
            let tile = &mut sums.tile[if few { offset * rows } else { 0 }..];
            let partial = if to_partial || add_partial {
                sums.partial[row * stride + column..(row + count) * stride].as_mut_ptr()
            } else {
                std::ptr::null_mut()
            };
            if whole && last {
                // SAFETY: features: our caller.
                unsafe { announce_places::<K>(epilogue, row..row + count, column) };
            }
            // The first of the panels that are computed at once stands for all: one place from which sums are finished.
            if offset & (panels * K::PANEL - 1) == 0 {
                let tile = tile[..count * panels * K::PANEL].as_mut_ptr();
                let sums = Destination { tile, partial, stride, continued: done > 0, add_partial, to_partial };
                // SAFETY: the tile has `count` rows of the panels' columns and so have, from that column on, the partial
                // sums; `units` rows of them are at the source, and `count` packed rows of `units` at `left`; features: our
                // caller.
                unsafe {
                    match &source {
                        Source::Packed(right) => {
                            let right = right[offset * units..][..units * K::PANEL].as_ptr();
                            step_rows::<K>(count, units, left, right, sums, ahead, portion);
                        }
                        Source::Memory(right) => {
                            let right = Rows { first: right.first.add(offset), stride: right.stride };
                            memory_rows::<K>(count, step.chunk.len(), left, right, sums, ahead, portion);
                        }
                    }
                }
            }
            if whole && last {
                finish::<K>(epilogue, row, column, columns, &mut tile[..count * K::PANEL]);
            }
        }
    }
}

/// Gives the epilogue the sums of nothing.
#[inline(always)]
fn finish_empty<K: Kernel>(
    sums: &mut Sums<K::Sum>,
    (rows, columns): (usize, usize),
    epilogue: &mut Epilogue<'_, K::Element>,
) {
    for (row, column) in (0..rows).flat_map(|row| (0..columns).step_by(K::PANEL).map(move |column| (row, column))) {
        sums.tile.clear();
        sums.tile.resize(K::PANEL, K::Sum::zero());
        finish::<K>(epilogue, row, column, columns, &mut sums.tile);
    }
}

/// Announces where the epilogue will write rows of a panel's columns.
///
/// # Safety
/// The processor has the kernel's features.
#[inline(always)]
unsafe fn announce_places<K: Kernel>(epilogue: &mut Epilogue<'_, K::Element>, rows: Range<usize>, column: usize) {
    for row in rows {
        let place = epilogue.place(row, column);
        for vector in 0..VECTORS {
            // SAFETY: an announcement; features: our caller.
            unsafe { K::prefetch_near(place.wrapping_add(vector * K::LANES)) };
        }
    }
}

/// Gives the epilogue rows of finished sums.
#[inline(always)]
fn finish<K: Kernel>(
    epilogue: &mut Epilogue<'_, K::Element>,
    row: usize,
    column: usize,
    columns: usize,
    tile: &mut [K::Sum],
) {
    for (i, sums) in tile.chunks_exact_mut(K::PANEL).enumerate() {
        // Twice, once with a length that the compiler knows.
        if columns - column >= K::PANEL {
            epilogue.finish(row + i, column, &mut sums[..K::PANEL]);
        } else {
            epilogue.finish(row + i, column, &mut sums[..columns - column]);
        }
    }
}
