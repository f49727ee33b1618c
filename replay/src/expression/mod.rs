//! Formulas in files of the user's: costs that follow from parameters, and rules.
//!
//! The language is small: numbers, names, `+ - * / // % ^`, comparisons, `and`, `or`, `not`, lists, functions and `if(condition, a, b)`. Rules are
//! computed exactly, in fractions of 128 bits ([`exact`]); costs in floats ([`float`]). No crate fits: those for expressions compute in 64 bits
//! or in floats, and none can tell a sum over calls from the value of one.

pub(crate) mod exact;
pub(crate) mod float;
mod parse;
mod rational;

use std::ops::Range;
use std::sync::Arc;

use crate::error::nearest;
use crate::rules::MissingLevel;
pub(crate) use parse::Node;
use parse::NodeKind;

/// Why a formula gave nothing.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Fault {
    /// It is wrong here.
    Mistake { span: Range<usize>, message: String },
    /// It is wrong in a file, at a place that is known already.
    Placed(Mistake),
    /// The trace does not hold what it reads.
    Missing(Box<MissingLevel>),
}

/// A mistake in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    /// The file.
    pub path: String,
    /// Line, from 1.
    pub line: usize,
    /// Column, from 1.
    pub column: usize,
    /// What is wrong, and the way out.
    pub message: String,
}

impl std::fmt::Display for Mistake {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            path,
            line,
            column,
            message,
        } = self;
        write!(f, "{path}:{line}:{column}: {message}")
    }
}

fn fault<T>(node: &Node, message: impl Into<String>) -> Result<T, Fault> {
    Err(Fault::Mistake {
        span: node.span.clone(),
        message: message.into(),
    })
}

/// A name that is none, with the nearest that is one.
fn unknown<'k>(
    node: &Node,
    kind: &str,
    name: &str,
    known: impl IntoIterator<Item = &'k str>,
) -> Fault {
    let known: Vec<&str> = known.into_iter().collect();
    let message = match nearest(name, known.iter().copied()) {
        Some(nearest) => format!("there is no {kind} '{name}'; did you mean '{nearest}'?"),
        None if known.is_empty() => format!("there is no {kind} '{name}'"),
        None => format!("there is no {kind} '{name}'; there are: {}", known.join(", ")),
    };
    Fault::Mistake {
        span: node.span.clone(),
        message,
    }
}

/// A function of an argument, or of an item of one that is a list: `nonzeros(input)`, `binary(tensors[1])`, `product_sum()`.
pub(crate) fn parse_argument(text: &str) -> Option<(String, Option<(String, Option<usize>)>)> {
    let NodeKind::Call(function, arguments) = parse::parse(text).ok()?.kind else {
        return None;
    };
    let argument = match arguments.as_slice() {
        [] => None,
        [argument] => Some(match &argument.kind {
            NodeKind::Name(name) => (name.clone(), None),
            NodeKind::Index(list, index) => match (&list.kind, &index.kind) {
                (NodeKind::Name(name), NodeKind::Number(number)) => {
                    (name.clone(), Some(usize::try_from(number.exact?.whole()?).ok()?))
                }
                _ => return None,
            },
            _ => return None,
        }),
        _ => return None,
    };
    Some((function, argument))
}

/// Where a formula stands in a file.
#[derive(Clone, Debug, PartialEq)]
struct Place {
    path: Arc<str>,
    line: usize,
    column: usize,
    /// The file's text is the formula's, character by character: there are no escapes in it.
    literal: bool,
}

/// A formula of a file.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Formula {
    pub(crate) text: String,
    pub(crate) node: Node,
    place: Place,
}

impl Formula {
    /// Parses the value of a key; `span` is where it stands in the file's text, with its quotes.
    pub(crate) fn parse(
        text: &str,
        path: &str,
        file: &str,
        span: Range<usize>,
    ) -> Result<Self, Mistake> {
        let raw = file.get(span.clone()).unwrap_or("");
        let quotes = ["\"\"\"", "'''", "\"", "'"]
            .into_iter()
            .find(|quote| raw.starts_with(quote))
            .map_or(0, str::len);
        let inside = raw.get(quotes..).unwrap_or("");
        // Of a text of several lines the first line break does not belong to it.
        let skipped = match quotes {
            3 if inside.starts_with("\r\n") => 2,
            3 if inside.starts_with('\n') => 1,
            _ => 0,
        };
        let literal = inside.get(skipped..).is_some_and(|rest| rest.starts_with(text));
        let start = if literal {
            span.start + quotes + skipped
        } else {
            span.start
        };
        let (line, column) = crate::error::position(file, start);
        let place = Place {
            path: path.into(),
            line,
            column,
            literal,
        };
        match parse::parse(text) {
            Ok(node) => Ok(Self {
                text: text.to_owned(),
                node,
                place,
            }),
            Err(error) => Err(place.mistake(text, error.span.start, &error.message)),
        }
    }

    /// A fault of this formula with its place in the file.
    pub(crate) fn placed(&self, fault: Fault) -> Fault {
        match fault {
            Fault::Mistake { span, message } => {
                Fault::Placed(self.place.mistake(&self.text, span.start, &message))
            }
            other => other,
        }
    }

    /// A mistake at its beginning.
    pub(crate) fn mistake(&self, message: &str) -> Mistake {
        self.place.mistake(&self.text, 0, message)
    }

    /// A mistake at one of its parts.
    pub(crate) fn mistake_at(&self, node: &Node, message: &str) -> Mistake {
        self.place.mistake(&self.text, node.span.start, message)
    }
}

impl Place {
    fn mistake(&self, text: &str, at: usize, message: &str) -> Mistake {
        let (line, column) = crate::error::position(text, at);
        let (line, column) = match (self.literal, line) {
            (true, 1) => (self.line, self.column + column - 1),
            (true, line) => (self.line + line - 1, column),
            (false, _) => (self.line, self.column),
        };
        let message = if self.literal {
            message.to_owned()
        } else {
            format!("{message} (character {} of the formula)", at + 1)
        };
        Mistake {
            path: self.path.to_string(),
            line,
            column,
            message,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mistake(file: &str, formula: &str) -> String {
        let start = file.find(['"', '\'']).unwrap();
        Formula::parse(formula, "my.toml", file, start..file.len())
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn places_are_those_of_the_file() {
        assert_eq!(
            mistake("x = 1\ny = \"a + )\"", "a + )"),
            "my.toml:2:10: a value is wanted here, not ')'"
        );
        assert_eq!(
            mistake("y = '''\na +\n  )'''", "a +\n  )"),
            "my.toml:3:3: a value is wanted here, not ')'"
        );
        assert_eq!(
            mistake("y = \"a \\u002b )\"", "a + )"),
            "my.toml:1:5: a value is wanted here, not ')' (character 5 of the formula)"
        );
    }
}
