//! Parts of one output that tasks on several threads write at the same time.
//!
//! Both types hand out each part at most once, so that no two exclusive references overlap; asking twice is a defect
//! of a kernel and panics.
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

/// Writes one value everywhere.
pub(crate) fn fill<T: Copy>(buffer: &mut [MaybeUninit<T>], value: T) -> &mut [T] {
    buffer.fill(MaybeUninit::new(value));
    // SAFETY: every element has just been written.
    unsafe { buffer.assume_init_mut() }
}

/// Integers that several threads write at places which only the data tells apart.
pub(crate) fn shared(buffer: &mut [i64]) -> &[AtomicI64] {
    const { assert!(align_of::<AtomicI64>() == align_of::<i64>()) };
    // SAFETY: an atomic has the size of its integer, and here its alignment; the buffer is ours alone for as long.
    unsafe { &*(std::ptr::from_mut(buffer) as *const [AtomicI64]) }
}

struct Claims(Vec<AtomicBool>);

impl Claims {
    fn new(parts: usize) -> Self {
        Self(std::iter::repeat_with(|| AtomicBool::new(false)).take(parts).collect())
    }

    fn claim(&self, index: usize) {
        // Relaxed: the flag orders nothing, it only tells the first from the second.
        let taken = self.0[index].swap(true, Ordering::Relaxed);
        assert!(!taken, "part {index} of an output was taken twice");
    }
}

/// A buffer cut into chunks of equal length (the last may be shorter).
pub struct Chunks<'a, T> {
    start: *mut T,
    len: usize,
    chunk: usize,
    claims: Claims,
    buffer: PhantomData<&'a mut [T]>,
}

// SAFETY: threads that share a `Chunks` only obtain disjoint `&mut [T]` from it, which T: Send lets cross threads.
unsafe impl<T: Send> Sync for Chunks<'_, T> {}

impl<'a, T> Chunks<'a, T> {
    /// Cuts the buffer. A chunk length of 0 (rows without columns) makes chunks that are all empty.
    ///
    /// # Panics
    /// When the chunks do not cover the buffer.
    pub fn new(buffer: &'a mut [T], chunk: usize, chunks: usize) -> Self {
        assert!(chunk.saturating_mul(chunks) >= buffer.len(), "the chunks do not cover the buffer");
        Self { start: buffer.as_mut_ptr(), len: buffer.len(), chunk, claims: Claims::new(chunks), buffer: PhantomData }
    }

    /// The chunk of that index.
    ///
    /// # Panics
    /// When it was taken before or does not exist.
    pub fn take(&self, index: usize) -> &'a mut [T] {
        self.claims.claim(index);
        let begin = (index * self.chunk).min(self.len);
        let end = (begin + self.chunk).min(self.len);
        // SAFETY: begin <= end <= len lies in the buffer, borrowed exclusively for 'a; different indices give
        // disjoint ranges and `claim` lets each index pass once, so nothing else refers to these elements.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(begin), end - begin) }
    }
}

/// A row-major matrix cut into tiles: blocks of rows times blocks of equally many columns.
pub struct Tiles<'a, T> {
    start: *mut T,
    columns: usize,
    row_blocks: Vec<Range<usize>>,
    column_block: usize,
    claims: Claims,
    buffer: PhantomData<&'a mut [T]>,
}

// SAFETY: as for `Chunks`: threads only obtain disjoint tiles.
unsafe impl<T: Send> Sync for Tiles<'_, T> {}

impl<'a, T> Tiles<'a, T> {
    /// Cuts a matrix of `columns` columns. Row blocks must ascend and not overlap.
    ///
    /// # Panics
    /// When the row blocks overlap or leave the matrix, or the column block is 0.
    pub fn new(buffer: &'a mut [T], columns: usize, row_blocks: Vec<Range<usize>>, column_block: usize) -> Self {
        let mut free = 0;
        for block in &row_blocks {
            assert!(free <= block.start && block.start <= block.end, "row blocks overlap");
            free = block.end;
        }
        assert!(free.checked_mul(columns).is_some_and(|end| end <= buffer.len()), "row blocks leave the matrix");
        let tiles = row_blocks.len() * columns.div_ceil(column_block);
        let start = buffer.as_mut_ptr();
        Self { start, columns, row_blocks, column_block, claims: Claims::new(tiles), buffer: PhantomData }
    }

    /// Number of tiles.
    pub fn len(&self) -> usize {
        self.claims.0.len()
    }

    /// Whether there are no tiles.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The tile of that index; tiles of one row block are neighbours.
    ///
    /// # Panics
    /// When it was taken before or does not exist.
    pub fn take(&self, index: usize) -> Tile<'a, T> {
        self.claims.claim(index);
        let in_a_row = self.columns.div_ceil(self.column_block);
        let (row_block, column_block) = (index / in_a_row, index % in_a_row);
        let first_column = column_block * self.column_block;
        let columns = first_column..(first_column + self.column_block).min(self.columns);
        let rows = self.row_blocks[row_block].clone();
        Tile { start: self.start, stride: self.columns, row_block, rows, columns, buffer: PhantomData }
    }
}

/// One tile, owned by one task.
pub struct Tile<'a, T> {
    start: *mut T,
    stride: usize,
    /// Which row block this is.
    pub row_block: usize,
    rows: Range<usize>,
    columns: Range<usize>,
    buffer: PhantomData<&'a mut [T]>,
}

impl<T> Tile<'_, T> {
    /// Rows of the whole matrix.
    pub fn rows(&self) -> Range<usize> {
        self.rows.clone()
    }

    /// Columns of the whole matrix.
    pub fn columns(&self) -> Range<usize> {
        self.columns.clone()
    }

    /// The tile's part of a row, counted from the tile's first row.
    ///
    /// # Panics
    /// When the tile has no such row.
    pub fn row(&mut self, row: usize) -> &mut [T] {
        assert!(row < self.rows.len(), "row {row} of a tile with {} rows", self.rows.len());
        let begin = (self.rows.start + row) * self.stride + self.columns.start;
        // SAFETY: `Tiles::new` has checked that all rows lie in the buffer and the columns are within a row; tiles
        // are disjoint and each was handed out once, and `&mut self` keeps its rows from being borrowed twice.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(begin), self.columns.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_cover_the_buffer_once() {
        let mut buffer: Vec<usize> = vec![0; 10];
        let chunks = Chunks::new(&mut buffer, 4, 3);
        for index in 0..3 {
            chunks.take(index).fill(index + 1);
        }
        assert_eq!(buffer, [1, 1, 1, 1, 2, 2, 2, 2, 3, 3]);
    }

    #[test]
    #[should_panic(expected = "taken twice")]
    fn a_chunk_is_not_taken_twice() {
        let mut buffer = [0; 4];
        let chunks = Chunks::new(&mut buffer, 2, 2);
        chunks.take(1);
        chunks.take(1);
    }

    #[test]
    fn tiles_cover_their_rows() {
        let mut buffer = vec![0; 5 * 3];
        let tiles = Tiles::new(&mut buffer, 3, vec![0..2, 2..2, 3..5], 2);
        for index in 0..tiles.len() {
            let mut tile = tiles.take(index);
            for row in 0..tile.rows().len() {
                tile.row(row).fill(index + 1);
            }
        }
        assert_eq!(buffer, [1, 1, 2, 1, 1, 2, 0, 0, 0, 5, 5, 6, 5, 5, 6]);
    }

    #[test]
    #[should_panic(expected = "row blocks overlap")]
    fn overlapping_tiles_are_refused() {
        let _ = Tiles::new(&mut [0; 12], 3, vec![0..2, 1..4], 3);
    }
}
