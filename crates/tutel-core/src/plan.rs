//! The routing decision.

/// Stands in ids, slots, row indices and row choices where there is nothing.
pub const NOT_ROUTED: i64 = -1;

/// How logits become scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScoreFunction {
    /// The input already holds scores.
    Identity,
    /// Softmax over the experts.
    Softmax,
}

/// Where every choice of every token goes. Immutable once made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RoutePlan {
    /// `[T, K]`: place of the choice among all choices of its expert, counted before anything is dropped; -1 where
    /// the choice names no expert.
    pub slots: Vec<i32>,
    /// `[E]`: choices that name the expert, dropped ones included.
    pub tokens_per_expert: Vec<i64>,
    /// `[E]`: first choices that name the expert.
    pub first_choices: Vec<i64>,
    /// `[E + 1]`: expert e owns rows `offsets[e]..offsets[e + 1]`.
    pub offsets: Vec<i64>,
    /// `[T, K]`: row of the choice, -1 where it is dropped.
    pub row_index: Vec<i64>,
    /// `[T * K]`: the choice `t * K + j` that fills the row, -1 behind the last kept row.
    pub row_choice: Vec<i64>,
}
