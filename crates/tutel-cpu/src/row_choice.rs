//! What rows have of their choices, and choices of their rows: a few numbers each, on one thread.
use tutel_core::{Error, Real, RowShape};

/// The token of each row, `[R]`; 0, which nobody reads, for rows that are unused.
///
/// # Errors
/// A length that does not agree with the shape, choices out of range.
pub fn row_tokens(row_choice: &[i64], shape: RowShape) -> Result<Vec<usize>, Error> {
    shape.check_row_choice(row_choice)?;
    let token = |&choice: &i64| usize::try_from(choice).map_or(0, |choice| choice / shape.top_k);
    Ok(row_choice.iter().map(token).collect())
}

/// Values of choices, `[T, K]`, by row, `[R]`; 0 for rows that are unused.
///
/// # Panics
/// When a choice has no value.
pub fn by_row<A: Real>(values: &[A], row_choice: &[i64]) -> Vec<A> {
    let value = |&choice: &i64| usize::try_from(choice).map_or(A::zero(), |choice| values[choice]);
    row_choice.iter().map(value).collect()
}

/// Writes values of rows, `[R]`, to their choices, `[T, K]`; dropped choices keep what stands there.
///
/// # Panics
/// When a choice has no place.
pub fn by_choice<A: Copy>(values: &[A], row_choice: &[i64], output: &mut [A]) {
    for (&choice, &value) in row_choice.iter().zip(values) {
        if let Ok(choice) = usize::try_from(choice) {
            output[choice] = value;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_and_choices_find_each_other() {
        let shape = RowShape::new(3, 4, 0, 2).unwrap();
        let row_choice = [5, 0, 3, -1];
        assert_eq!(row_tokens(&row_choice, shape).unwrap(), [2, 0, 1, 0]);
        assert_eq!(by_row(&[10.0, 11.0, 12.0, 13.0, 14.0, 15.0], &row_choice), [15.0, 10.0, 13.0, 0.0]);
        let mut output = [9; 6];
        by_choice(&[1, 2, 3, 4], &row_choice, &mut output);
        assert_eq!(output, [2, 9, 9, 3, 9, 1]);
        let error = row_tokens(&[6, 0, 0, 0], shape).unwrap_err().to_string();
        assert_eq!(error, "row_choice[0] is 6, allowed are -1 (none) and 0 up to, not including, 6");
    }
}
