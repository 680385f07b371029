//! Rows that are read where their tokens stand.
use torch_stable::{Error, Tensor};

use crate::arguments::{sizes_of, slice_of};

/// The token of each row from the choices of rows, `[R]`; without choices, rows are their own tokens. A row without a
/// choice is behind the last offset and never read: it gets token 0.
pub(crate) fn gather(row_choice: Option<&Tensor>, top_k: usize, tokens: usize) -> Result<Option<Vec<usize>>, Error> {
    let Some(row_choice) = row_choice else { return Ok(None) };
    let [_] = sizes_of(row_choice, "row_choice")?;
    let choices: &[i64] = slice_of(row_choice, "row_choice")?;
    let limit = tokens.saturating_mul(top_k);
    let token_of = |(position, &choice): (usize, &i64)| match usize::try_from(choice) {
        Ok(choice) if choice < limit => Ok(choice / top_k),
        Err(_) if choice == tutel_core::NOT_ROUTED && limit > 0 => Ok(0),
        _ => Err(Error::kernel(format!(
            "row_choice[{position}] is {choice}, allowed are -1 (none) and 0 up to, not including, {limit}"
        ))),
    };
    choices.iter().enumerate().map(token_of).collect::<Result<_, _>>().map(Some)
}
