//! Reading an operator's schema, and comparing it with the operator's Rust types.
//!
//! The reader accepts less than torch does, so that it never understands a schema differently: no lists, strings,
//! devices or aliases, which this crate could not pass anyway.

use std::fmt;

use crate::Error;

/// The kinds of argument that this crate can pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ArgumentType {
    /// `Tensor`.
    Tensor,
    /// `Tensor?`.
    OptionalTensor,
    /// `int` or `SymInt`.
    Int,
    /// `bool`.
    Bool,
    /// `float`.
    Float,
}

impl ArgumentType {
    fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "Tensor" => Self::Tensor,
            "Tensor?" => Self::OptionalTensor,
            "int" | "SymInt" => Self::Int,
            "bool" => Self::Bool,
            "float" => Self::Float,
            _ => return None,
        })
    }

    fn rust_name(self) -> &'static str {
        match self {
            Self::Tensor => "Tensor",
            Self::OptionalTensor => "Option<Tensor>",
            Self::Int => "i64",
            Self::Bool => "bool",
            Self::Float => "f64",
        }
    }
}

impl fmt::Display for ArgumentType {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.rust_name())
    }
}

/// A schema: `name(Tensor a, Tensor? b, SymInt n, bool flag=False, float x) -> (Tensor, Tensor)`.
#[derive(Debug, PartialEq)]
pub(crate) struct Schema<'text> {
    /// With the overload, as `name.overload`.
    pub(crate) name: &'text str,
    pub(crate) arguments: Vec<(ArgumentType, &'text str)>,
    pub(crate) returns: usize,
}

impl<'text> Schema<'text> {
    /// Reads `text`, and checks it against what the Rust side takes and returns.
    pub(crate) fn checked(text: &'text str, types: &[ArgumentType], returns: usize) -> Result<Self, Error> {
        Self::parse(text)
            .and_then(|schema| schema.agrees(types, returns).map(|()| schema))
            .map_err(|reason| Error::schema(text, reason))
    }

    /// The name of the operator, or the whole text if it has none.
    pub(crate) fn name_of(text: &str) -> &str {
        text.split('(').next().unwrap_or(text).trim()
    }

    /// The name of an argument, as well as it can be told.
    pub(crate) fn argument_name(text: &'text str, index: usize) -> String {
        let name = Self::parse(text).ok().and_then(|schema| schema.arguments.get(index).map(|argument| argument.1));
        name.unwrap_or("?").to_owned()
    }

    pub(crate) fn parse(text: &'text str) -> Result<Self, String> {
        let allowed = |letter: char| letter.is_ascii_alphanumeric() || "_.,()*=?->+ ".contains(letter);
        if let Some(letter) = text.chars().find(|&letter| !allowed(letter)) {
            return Err(format!("character {letter:?} is not supported"));
        }
        let (name, rest) = text.split_once('(').ok_or("no `(` after the name")?;
        let (arguments, returns) = rest.split_once(')').ok_or("no `)` after the arguments")?;
        let returns = returns.trim_start().strip_prefix("->").ok_or("no `->` after the arguments")?;
        let mut parts = name.split('.');
        if parts.clone().count() > 2 || !parts.all(is_identifier) {
            return Err(format!("`{name}` is not a name"));
        }
        Ok(Self { name, arguments: parse_arguments(arguments)?, returns: count_returns(returns.trim())? })
    }

    fn agrees(&self, types: &[ArgumentType], returns: usize) -> Result<(), String> {
        if self.arguments.len() != types.len() {
            return Err(format!("{} arguments, but Op::Args has {}", self.arguments.len(), types.len()));
        }
        for (index, ((declared, name), expected)) in self.arguments.iter().zip(types).enumerate() {
            if declared != expected {
                return Err(format!(
                    "argument {index} (`{name}`) arrives as {declared}, but Op::Args has {expected} there"
                ));
            }
        }
        if self.returns != returns {
            return Err(format!("{} results, but Op::Output has {returns}", self.returns));
        }
        Ok(())
    }
}

fn parse_arguments(text: &str) -> Result<Vec<(ArgumentType, &str)>, String> {
    if text.trim().is_empty() {
        return Ok(Vec::new());
    }
    let mut arguments: Vec<(ArgumentType, &str)> = Vec::new();
    let mut keywords_only = false;
    for argument in text.split(',').map(str::trim) {
        // Python's mark for keyword-only arguments; kernels get them in order like all others.
        if argument == "*" && !keywords_only {
            keywords_only = true;
            continue;
        }
        let (declaration, default) = match argument.split_once('=') {
            Some((declaration, default)) => (declaration.trim(), Some(default.trim())),
            None => (argument, None),
        };
        let (kind, name) =
            declaration.split_once(' ').ok_or_else(|| format!("`{argument}` is not a type and a name"))?;
        let name = name.trim();
        let kind = ArgumentType::parse(kind).ok_or_else(|| format!("type `{kind}` of `{name}` is not supported"))?;
        if !is_identifier(name) {
            return Err(format!("`{name}` is not a name"));
        }
        if arguments.iter().any(|known| known.1 == name) {
            return Err(format!("two arguments are called `{name}`"));
        }
        if default.is_some_and(|value| value.is_empty() || value.contains(['(', '*', '=', '?', '>', ' '])) {
            return Err(format!("the default in `{argument}` is not a plain value"));
        }
        arguments.push((kind, name));
    }
    Ok(arguments)
}

fn count_returns(text: &str) -> Result<usize, String> {
    let list = match text.strip_prefix('(') {
        Some(rest) => rest.strip_suffix(')').ok_or("no `)` after the results")?,
        None if text.contains(',') => return Err("several results need parentheses".to_owned()),
        None => text,
    };
    let mut count = 0;
    for result in list.split(',').map(str::trim) {
        let (kind, name) = result.split_once(' ').unwrap_or((result, "unnamed"));
        if kind != "Tensor" || !is_identifier(name.trim()) {
            return Err(format!("result `{result}` is not a Tensor"));
        }
        count += 1;
    }
    Ok(count)
}

pub(crate) fn is_identifier(text: &str) -> bool {
    text.starts_with(|letter: char| letter.is_ascii_alphabetic() || letter == '_')
        && text.chars().all(|letter| letter.is_ascii_alphanumeric() || letter == '_')
}

#[cfg(test)]
mod tests {
    use super::ArgumentType::{Bool, Float, Int, OptionalTensor, Tensor};
    use super::*;

    #[test]
    fn every_kind_of_argument_is_read() {
        let text = "mix.out(Tensor a, Tensor? b, SymInt n, *, int m=-1, bool flag=False, float x = 1e-5) -> (Tensor, Tensor y)";
        let schema = Schema::parse(text).unwrap();
        let arguments = [(Tensor, "a"), (OptionalTensor, "b"), (Int, "n"), (Int, "m"), (Bool, "flag"), (Float, "x")];
        assert_eq!(schema, Schema { name: "mix.out", arguments: arguments.to_vec(), returns: 2 });
        assert_eq!(Schema::parse("f() -> Tensor").unwrap().arguments, []);
        assert_eq!(Schema::parse("f(Tensor a) -> (Tensor)").unwrap().returns, 1);
        assert_eq!(Schema::name_of(text), "mix.out");
        assert_eq!(Schema::argument_name(text, 2), "n");
    }

    #[test]
    fn what_cannot_be_passed_is_refused_by_name() {
        for (text, reason) in [
            ("f", "no `(`"),
            ("f(Tensor a", "no `)`"),
            ("f(Tensor a)", "no `->`"),
            ("1f(Tensor a) -> Tensor", "`1f` is not a name"),
            ("n::f(Tensor a) -> Tensor", "':' is not supported"),
            ("f.a.b(Tensor a) -> Tensor", "is not a name"),
            ("f(Tensor) -> Tensor", "`Tensor` is not a type and a name"),
            ("f(str a) -> Tensor", "type `str` of `a`"),
            ("f(Tensor[] a) -> Tensor", "'['"),
            ("f(Tensor(a!) a) -> Tensor", "'!'"),
            ("f(Tensor a, Tensor a) -> Tensor", "two arguments"),
            ("f(Tensor a,) -> Tensor", "`` is not a type"),
            ("f(int a=) -> Tensor", "not a plain value"),
            ("f(int a=1=2) -> Tensor", "not a plain value"),
            ("f(Tensor a b) -> Tensor", "`a b` is not a name"),
            ("f(Tensor a) -> ()", "result ``"),
            ("f(Tensor a) -> int", "result `int`"),
            ("f(Tensor a) -> (Tensor, int)", "result `int`"),
            ("f(Tensor a) -> Tensor, Tensor", "parentheses"),
            ("f(Tensor a) -> (Tensor", "no `)`"),
            ("f(Tensor a\0) -> Tensor", "'\\0'"),
        ] {
            let error = Schema::parse(text).unwrap_err();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }

    #[test]
    fn disagreement_with_the_rust_types_is_refused() {
        let check = |text, types: &[_], returns| Schema::checked(text, types, returns).map(|_| ());
        assert!(check("f(Tensor a, int n) -> Tensor", &[Tensor, Int], 1).is_ok());
        assert!(check("f(Tensor a, SymInt n) -> Tensor", &[Tensor, Int], 1).is_ok());
        for (text, types, returns, reason) in [
            ("f(Tensor a) -> Tensor", &[Tensor, Int][..], 1, "1 arguments, but Op::Args has 2"),
            ("f(Tensor? a) -> Tensor", &[Tensor], 1, "argument 0 (`a`) arrives as Option<Tensor>"),
            ("f(float a) -> Tensor", &[Int], 1, "arrives as f64, but Op::Args has i64 there"),
            ("f(bool a) -> (Tensor, Tensor)", &[Bool], 1, "2 results, but Op::Output has 1"),
            ("f(bool a) -> Tensor", &[Float], 1, "arrives as bool"),
        ] {
            let error = check(text, types, returns).unwrap_err();
            assert!(matches!(&error, Error::Schema { schema, .. } if schema == text));
            assert!(error.to_string().contains(reason), "{error}");
        }
        assert!(matches!(check("f(", &[OptionalTensor], 1), Err(Error::Schema { .. })));
    }
}
