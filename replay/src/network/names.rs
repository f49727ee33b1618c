//! Names of the nodes of a traced graph, made as torch.fx makes them: tools name layers so.

use std::collections::{HashMap, HashSet};

/// Keywords and built-in functions of Python, and what torch.fx reserves: no node is called so. Lower case alone, as nodes are.
const RESERVED: &[&str] = &[
    "abs",
    "aiter",
    "all",
    "and",
    "anext",
    "any",
    "as",
    "ascii",
    "assert",
    "async",
    "await",
    "bin",
    "bool",
    "break",
    "breakpoint",
    "bytearray",
    "bytes",
    "callable",
    "chr",
    "class",
    "classmethod",
    "compile",
    "complex",
    "continue",
    "def",
    "del",
    "delattr",
    "device",
    "dict",
    "dir",
    "divmod",
    "elif",
    "else",
    "enumerate",
    "eval",
    "except",
    "exec",
    "filter",
    "finally",
    "float",
    "for",
    "format",
    "from",
    "frozenset",
    "fx_pytree",
    "getattr",
    "global",
    "globals",
    "hasattr",
    "hash",
    "hex",
    "id",
    "if",
    "import",
    "in",
    "inf",
    "input",
    "int",
    "is",
    "isinstance",
    "issubclass",
    "iter",
    "lambda",
    "len",
    "list",
    "locals",
    "map",
    "max",
    "memoryview",
    "min",
    "nan",
    "next",
    "nonlocal",
    "not",
    "object",
    "oct",
    "open",
    "or",
    "ord",
    "pass",
    "pow",
    "print",
    "property",
    "pytree",
    "raise",
    "range",
    "repr",
    "return",
    "reversed",
    "round",
    "set",
    "setattr",
    "slice",
    "sorted",
    "staticmethod",
    "str",
    "sum",
    "super",
    "torch",
    "try",
    "tuple",
    "type",
    "vars",
    "while",
    "with",
    "yield",
    "zip",
];

/// Gives every candidate a name of its own.
#[derive(Debug, Default)]
pub(crate) struct Namespace {
    used: HashSet<String>,
    counts: HashMap<String, u64>,
}

impl Namespace {
    /// A name from a path or the name of a function: an identifier in snake case that nobody has.
    pub(crate) fn create(&mut self, candidate: &str) -> String {
        let mut name = identifier(&snake_case(candidate));
        let (base, suffix) = split(&name);
        let base = base.to_owned();
        let mut number = match suffix {
            Some(number) if !self.used.contains(&name) => number,
            _ => {
                let mut number = self.counts.get(&base).copied().unwrap_or(0);
                if RESERVED.binary_search(&name.as_str()).is_ok() {
                    number += 1;
                    name = format!("{base}_{number}");
                }
                number
            }
        };
        while self.used.contains(&name) {
            number += 1;
            name = format!("{base}_{number}");
        }
        self.used.insert(name.clone());
        self.counts.insert(base, number);
        name
    }
}

/// `myConv` becomes `my_conv`.
fn snake_case(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 4);
    let mut after_small = false;
    for c in text.chars() {
        if after_small && c.is_ascii_uppercase() {
            out.push('_');
        }
        after_small = c.is_ascii_lowercase();
        out.extend(c.to_lowercase());
    }
    out
}

/// Runs of what no identifier has become underscores; none is empty or begins with a digit.
fn identifier(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 1);
    let mut odd = false;
    for c in text.chars() {
        let plain = c.is_ascii_alphanumeric() || c == '_';
        if plain {
            out.push(c);
        } else if !odd {
            out.push('_');
        }
        odd = !plain;
    }
    match out.as_bytes().first() {
        None => "_unnamed".to_owned(),
        Some(first) if first.is_ascii_digit() => format!("_{out}"),
        Some(_) => out,
    }
}

/// `conv_1` is `conv` and 1.
fn split(name: &str) -> (&str, Option<u64>) {
    match name.rsplit_once('_') {
        Some((base, digits))
            if !base.is_empty()
                && !digits.is_empty()
                && digits.bytes().all(|b| b.is_ascii_digit()) =>
        {
            match digits.parse() {
                Ok(number) => (base, Some(number)),
                Err(_) => (name, None),
            }
        }
        _ => (name, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserved_names_are_sorted_for_the_search() {
        assert!(RESERVED.is_sorted());
    }

    /// Each line is what `torch.fx.graph._Namespace().create_name(_snake_case(name))` of torch 2.13 gives, in this order.
    #[test]
    fn names_are_those_of_torch_fx() {
        let mut names = Namespace::default();
        for (given, wanted) in [
            ("", "_unnamed"),
            ("conv1", "conv1"),
            ("conv1", "conv1_1"),
            ("layer1.0", "layer1_0"),
            ("layer1.1", "layer1_1"),
            ("layer1.0", "layer1_2"),
            ("layer1_0", "layer1_3"),
            ("myConv", "my_conv"),
            ("0.weight", "_0_weight"),
            ("0", "_0"),
            ("input", "input_1"),
            ("input", "input_2"),
            ("a b--c", "a_b_c"),
            ("blockA.LIF", "block_a_lif"),
            ("conv_7", "conv_7"),
            ("conv", "conv"),
            ("conv", "conv_8"),
        ] {
            assert_eq!(names.create(given), wanted, "{given}");
        }
    }
}
