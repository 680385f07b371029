//! Rows that are read where their tokens stand.
use torch_stable::{Error, Tensor};
use tutel_core::RowShape;

use crate::arguments::{refused, sizes_of, slice_of};

/// The token of each row from the choices of rows, `[R]`; without choices, rows are their own tokens.
pub(crate) fn gather(row_choice: Option<&Tensor>, top_k: usize, tokens: usize) -> Result<Option<Vec<usize>>, Error> {
    let Some(row_choice) = row_choice else { return Ok(None) };
    let [rows] = sizes_of(row_choice, "row_choice")?;
    let shape = RowShape::new(tokens, rows, 0, top_k).map_err(refused)?;
    tutel_cpu::row_tokens(slice_of(row_choice, "row_choice")?, shape).map(Some).map_err(refused)
}
