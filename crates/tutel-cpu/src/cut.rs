//! How a grouped product is cut into tiles: no sum depends on it.
use std::ops::Range;

use crate::Parallel;
use crate::disjoint::Tiles;

/// Rows and columns of a tile at most. Packing a block of the right factor pays over a tile's rows, packing one of the left
/// factor over its columns.
const ROWS: usize = 512;
const COLUMNS: usize = 2048;
/// Rows up to which a kernel reads the right factor's rows as they lie: see [`column_block`].
const FEW_ROWS: usize = 8;

/// Blocks of rows, each of one owner or of nobody, times blocks of columns.
pub(crate) struct Cut {
    row_blocks: Vec<(Option<usize>, Range<usize>)>,
    columns: usize,
    column_block: usize,
}

impl Cut {
    /// Rows by owner, ascending; rows behind the last, up to `rows`, are nobody's.
    pub(crate) fn new(
        owned: impl IntoIterator<Item = Range<usize>>,
        rows: usize,
        columns: usize,
        parallel: &dyn Parallel,
    ) -> Self {
        let mut row_blocks: Vec<(Option<usize>, Range<usize>)> = Vec::new();
        let mut last = 0;
        for (owner, range) in owned.into_iter().enumerate() {
            last = range.end;
            row_blocks.extend(blocks_of(range).map(|block| (Some(owner), block)));
        }
        row_blocks.extend(blocks_of(last..rows).map(|block| (None, block)));
        let owned = row_blocks.iter().filter(|(owner, _)| owner.is_some());
        let most = owned.map(|(_, rows)| rows.len()).max().unwrap_or(0);
        let column_block = column_block(row_blocks.len(), most <= FEW_ROWS, columns, parallel.threads());
        Self { row_blocks, columns, column_block }
    }

    /// The tiles of a matrix.
    pub(crate) fn tiles<'a, T>(&self, matrix: &'a mut [T]) -> Tiles<'a, T> {
        Tiles::new(matrix, self.columns, self.rows(), self.column_block)
    }

    /// The tiles of a matrix that has one column for every `unit` of these, where blocks are whole numbers of units.
    pub(crate) fn coarse_tiles<'a, T>(&self, matrix: &'a mut [T], unit: usize) -> Tiles<'a, T> {
        assert!(self.column_block.is_multiple_of(unit), "whole units");
        Tiles::new(matrix, self.columns.div_ceil(unit), self.rows(), self.column_block / unit)
    }

    /// Number of tiles.
    pub(crate) fn len(&self) -> usize {
        self.row_blocks.len() * self.columns.div_ceil(self.column_block)
    }

    /// Owner, rows and columns of a tile.
    pub(crate) fn tile(&self, index: usize) -> (Option<usize>, Range<usize>, Range<usize>) {
        let in_a_row = self.columns.div_ceil(self.column_block);
        let (owner, rows) = self.row_blocks[index / in_a_row].clone();
        let first = index % in_a_row * self.column_block;
        (owner, rows, first..(first + self.column_block).min(self.columns))
    }

    fn rows(&self) -> Vec<Range<usize>> {
        self.row_blocks.iter().map(|(_, rows)| rows.clone()).collect()
    }
}

fn blocks_of(range: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.step_by(ROWS).map(move |start| start..start.saturating_add(ROWS).min(end))
}

/// Columns of a tile: halved while there are fewer tiles than balance many threads. Where rows are few, time goes into reading
/// the right factor, and the more of a row is read in one go the better: then the tiles are as wide as these threads allow.
fn column_block(row_blocks: usize, few: bool, columns: usize, threads: usize) -> usize {
    const ENOUGH_TILES: usize = 32;
    const ENOUGH_FOR_A_THREAD: usize = 4;
    // Narrower ones would read a weight's rows in pieces too short for the processor's prefetching.
    const LEAST: usize = 256;
    let enough = if few { threads.saturating_mul(ENOUGH_FOR_A_THREAD) } else { ENOUGH_TILES };
    let mut block = COLUMNS;
    while block > LEAST && row_blocks * columns.div_ceil(block) < enough {
        block /= 2;
    }
    block
}
