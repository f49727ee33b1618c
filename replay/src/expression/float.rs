//! Formulas over floats: what a cost is computed from.

use std::collections::BTreeMap;

use super::parse::{Node, NodeKind, Operator};
use super::{Fault, fault};

/// What formulas of costs may call.
const FUNCTIONS: [&str; 9] = [
    "abs", "ceil", "exp2", "floor", "if", "log2", "max", "min", "sqrt",
];

#[derive(Clone, Copy, Debug, PartialEq)]
enum Value {
    Number(f64),
    Bool(bool),
}

/// The number that a formula gives, by the values of its names.
pub(crate) fn evaluate(node: &Node, names: &BTreeMap<String, f64>) -> Result<f64, Fault> {
    number(node, names)
}

/// Looks at names and functions, also where an evaluation would not come by.
pub(crate) fn check(node: &Node, names: &BTreeMap<String, f64>) -> Result<(), Fault> {
    let mut found = Ok(());
    node.each(&mut |part| {
        if found.is_err() {
            return;
        }
        match &part.kind {
            NodeKind::Name(name) if !names.contains_key(name) => {
                let known = names.keys().map(String::as_str);
                found = Err(super::unknown(part, "parameter", name, known));
            }
            NodeKind::Call(name, _) if !FUNCTIONS.contains(&name.as_str()) => {
                found = Err(super::unknown(part, "function", name, FUNCTIONS));
            }
            _ => {}
        }
    });
    found
}

fn number(node: &Node, names: &BTreeMap<String, f64>) -> Result<f64, Fault> {
    match value(node, names)? {
        Value::Number(number) if number.is_finite() => Ok(number),
        Value::Number(number) => fault(node, format!("the result is {number}")),
        Value::Bool(_) => fault(node, "a number is wanted here, not true or false"),
    }
}

fn boolean(node: &Node, names: &BTreeMap<String, f64>) -> Result<bool, Fault> {
    match value(node, names)? {
        Value::Bool(value) => Ok(value),
        Value::Number(_) => fault(node, "true or false is wanted here, not a number"),
    }
}

fn value(node: &Node, names: &BTreeMap<String, f64>) -> Result<Value, Fault> {
    Ok(match &node.kind {
        NodeKind::Number(number) => Value::Number(number.float),
        NodeKind::Bool(value) => Value::Bool(*value),
        NodeKind::Name(name) => match names.get(name) {
            Some(value) => Value::Number(*value),
            None => {
                let known = names.keys().map(String::as_str);
                return Err(super::unknown(node, "parameter", name, known));
            }
        },
        NodeKind::Negate(inner) => Value::Number(-number(inner, names)?),
        NodeKind::Not(inner) => Value::Bool(!boolean(inner, names)?),
        NodeKind::Binary(operator, left, right) => binary(node, *operator, left, right, names)?,
        NodeKind::Call(name, arguments) => call(node, name, arguments, names)?,
        NodeKind::Text(_) | NodeKind::List(_) | NodeKind::Index(..) => {
            return fault(node, "a cost is computed from numbers alone");
        }
    })
}

fn binary(
    node: &Node,
    operator: Operator,
    left: &Node,
    right: &Node,
    names: &BTreeMap<String, f64>,
) -> Result<Value, Fault> {
    match operator {
        Operator::And => {
            return Ok(Value::Bool(boolean(left, names)? && boolean(right, names)?));
        }
        Operator::Or => {
            return Ok(Value::Bool(boolean(left, names)? || boolean(right, names)?));
        }
        _ => {}
    }
    let (a, b) = (number(left, names)?, number(right, names)?);
    let divides = matches!(
        operator,
        Operator::Divide | Operator::FloorDivide | Operator::Remainder
    );
    if divides && b == 0.0 {
        return fault(node, "division by zero");
    }
    Ok(match operator {
        Operator::Add => Value::Number(a + b),
        Operator::Subtract => Value::Number(a - b),
        Operator::Multiply => Value::Number(a * b),
        Operator::Divide => Value::Number(a / b),
        Operator::FloorDivide => Value::Number((a / b).floor()),
        Operator::Remainder => Value::Number(a - b * (a / b).floor()),
        Operator::Power => Value::Number(a.powf(b)),
        #[expect(clippy::float_cmp, reason = "it is what the formula says")]
        Operator::Equal => Value::Bool(a == b),
        #[expect(clippy::float_cmp, reason = "it is what the formula says")]
        Operator::Unequal => Value::Bool(a != b),
        Operator::Less => Value::Bool(a < b),
        Operator::LessOrEqual => Value::Bool(a <= b),
        Operator::Greater => Value::Bool(a > b),
        Operator::GreaterOrEqual => Value::Bool(a >= b),
        Operator::And | Operator::Or => Value::Bool(false),
    })
}

fn call(
    node: &Node,
    name: &str,
    arguments: &[Node],
    names: &BTreeMap<String, f64>,
) -> Result<Value, Fault> {
    if !FUNCTIONS.contains(&name) {
        return Err(super::unknown(node, "function", name, FUNCTIONS));
    }
    if name == "if" {
        let [condition, then, otherwise] = arguments else {
            return fault(node, "if takes a condition and two values: if(a > b, a, b)");
        };
        return value(
            if boolean(condition, names)? {
                then
            } else {
                otherwise
            },
            names,
        );
    }
    let numbers: Vec<f64> = arguments
        .iter()
        .map(|argument| number(argument, names))
        .collect::<Result<_, _>>()?;
    let result = match (name, numbers.as_slice()) {
        ("min", [first, rest @ ..]) => rest.iter().copied().fold(*first, f64::min),
        ("max", [first, rest @ ..]) => rest.iter().copied().fold(*first, f64::max),
        ("abs", [x]) => x.abs(),
        ("ceil", [x]) => x.ceil(),
        ("floor", [x]) => x.floor(),
        ("sqrt", [x]) => x.sqrt(),
        ("log2", [x]) => x.log2(),
        ("exp2", [x]) => x.exp2(),
        _ => {
            let wanted = if matches!(name, "min" | "max") {
                "one value or more"
            } else {
                "one value"
            };
            return fault(node, format!("{name} takes {wanted}, not {}", numbers.len()));
        }
    };
    Ok(Value::Number(result))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::parse::parse;
    use super::*;

    fn names() -> BTreeMap<String, f64> {
        BTreeMap::from([("bits".to_owned(), 8.0), ("size".to_owned(), 64.0)])
    }

    fn result(text: &str) -> f64 {
        evaluate(&parse(text).unwrap(), &names()).unwrap()
    }

    fn message(text: &str) -> String {
        match evaluate(&parse(text).unwrap(), &names()).unwrap_err() {
            Fault::Mistake { span, message } => format!("{}: {message}", span.start),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn arithmetic_functions_and_choices() {
        assert!((result("3.1 * (bits / 32)^2 + 0.1 * bits / 32") - 0.21875).abs() < 1e-12);
        assert!((result("if(bits > 16 or size == 64, sqrt(size), 1 / 0)") - 8.0).abs() < 1e-12);
        assert!((result("max(1, bits % 3, -2) + min(7) + log2(exp2(2))") - 11.0).abs() < 1e-12);
        assert!((result("ceil(bits / 3) + bits // 3 + abs(-1)") - 6.0).abs() < 1e-12);
    }

    #[test]
    fn mistakes_are_told() {
        assert_eq!(message("1 + bit"), "4: there is no parameter 'bit'; did you mean 'bits'?");
        assert_eq!(message("1 / (bits - 8)"), "0: division by zero");
        assert_eq!(message("log2(0)"), "0: the result is -inf");
        assert_eq!(message("1 + (bits > 2)"), "4: a number is wanted here, not true or false");
        assert_eq!(message("sqrt(1, 2)"), "0: sqrt takes one value, not 2");
        assert!(message("sqr(1)").contains("did you mean 'sqrt'?"));
        assert!(message("[1]").contains("numbers alone"));
    }

    #[test]
    fn names_are_checked_where_an_evaluation_does_not_come_by() {
        assert!(check(&parse("if(true, 1, bots)").unwrap(), &names()).is_err());
        assert!(check(&parse("if(true, 1, bits)").unwrap(), &names()).is_ok());
    }

    proptest! {
        #[test]
        fn any_formula_gives_a_finite_number_or_a_mistake(
            text in "(bits|size|[0-9]{1,3}|min\\(bits, 2\\))( ?(\\+|-|\\*|/|//|%|\\^) ?(bits|size|[0-9]{1,2})){0,6}",
        ) {
            if let Ok(number) = evaluate(&parse(&text).unwrap(), &names()) {
                prop_assert!(number.is_finite());
            }
        }
    }
}
