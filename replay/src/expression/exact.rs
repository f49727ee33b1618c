//! Formulas over calls: what a rule of the user's counts, exactly.
//!
//! A row holds many calls of one structure, and of their statistics the sums. So a value is either the same for every call, or a sum over all of
//! them with a part that every call adds alike ([`Value::Sum`]). Sums are added and multiplied with what is the same for every call; anything else
//! would need each call's own number, and is a mistake.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};

use optape_trace::{Argument, OpDef, Operand, When, fields};

use super::parse::{Node, NodeKind, Operator};
use super::rational::Rational;
use super::{Fault, Formula, Mistake, fault, unknown};
use crate::rules::{CallRow, RuleError, TensorView};

/// A tensor of a call.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Tensor {
    /// As messages name it.
    name: String,
    /// Index into the signature's tensors.
    index: u16,
    of: Source,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Source {
    Argument,
    Listed,
    Result,
}

#[derive(Clone, Debug, PartialEq)]
enum Value {
    /// The same for every call.
    Number(Rational),
    /// Over all calls: what each adds alike, and what is summed up already.
    Sum {
        per_call: Rational,
        summed: Rational,
    },
    Bool(bool),
    Text(String),
    List(Vec<Value>),
    Tensor(Tensor),
    /// `None`, or an undefined tensor.
    Absent,
    /// A number that differs from call to call, and is neither 0 nor 1.
    Varying,
}

impl Value {
    const fn kind(&self) -> &'static str {
        match self {
            Self::Number(_) => "a number",
            Self::Sum { .. } => "a statistic",
            Self::Bool(_) => "true or false",
            Self::Text(_) => "a text",
            Self::List(_) => "a list",
            Self::Tensor(_) => "a tensor",
            Self::Absent => "nothing (None)",
            Self::Varying => "a number that differs from call to call",
        }
    }
}

/// A function: its name, what it takes, and what it gives.
pub(crate) struct Function {
    pub(crate) name: &'static str,
    pub(crate) arguments: &'static str,
    pub(crate) about: &'static str,
    /// The statistic that it reads: field, level, when.
    statistic: Option<(u32, &'static str, When)>,
}

macro_rules! functions {
    ($($name:literal ($arguments:literal) $about:literal $(, $field:ident $level:literal $when:ident)?;)*) => {
        &[$(Function {
            name: $name,
            arguments: $arguments,
            about: $about,
            statistic: functions!(@ $($field $level $when)?),
        }),*]
    };
    (@) => { None };
    (@ $field:ident $level:literal $when:ident) => { Some((fields::$field, $level, When::$when)) };
}

/// All functions of rules.
pub(crate) const FUNCTIONS: &[Function] = functions! {
    "elements"("tensor") "elements; of a list of tensors, of all together";
    "bytes"("tensor") "bytes of its elements, 0 for a number; of a list of tensors, of all together";
    "element_bytes"("tensor") "bytes of one element";
    "dimensions"("tensor") "how many dimensions it has";
    "size"("tensor, d") "its size in dimension d; -1 is the last";
    "elements_from"("tensor, d") "the product of its sizes from dimension d on";
    "shape"("tensor") "its sizes, a list";
    "dtype"("tensor") "the name of its type: 'float32'";
    "is_number"("tensor") "whether it is a number that took part in tensor arithmetic";
    "given"("argument") "whether the argument was given, and not None";
    "binary"("tensor") "whether all elements are 0 or 1 before the op";
    "binary_after"("tensor") "whether they are after it";
    "nonzeros"("tensor") "statistic: elements that are not 0, before the op; of a result, after it", NONZEROS "T1" Before;
    "nonzeros_after"("tensor") "statistic: the same after the op, of a tensor that it writes", NONZEROS "T1" After;
    "fan_out_nonzeros"("input") "statistic: nonzeros of a convolution's input, each times the outputs that it feeds", FAN_OUT_NONZEROS "T2" Before;
    "nonempty_rows"("factor") "statistic: rows of a product's factor that have a nonzero", NONEMPTY_ROWS "T3" Before;
    "nonempty_columns"("factor") "statistic: its columns that have one", NONEMPTY_COLUMNS "T3" Before;
    "nonempty_outputs"("input") "statistic: outputs of a convolution with a nonzero in sight", NONEMPTY_OUTPUTS "T3" Before;
    "product_sum"("") "statistic: the sum over the product of two binary factors";
    "nonempty_products"("") "statistic: elements of that product that are not 0";
    "min"("a, b, ...") "the least";
    "max"("a, b, ...") "the greatest";
    "abs"("a") "without its sign";
    "floor"("a") "the next whole number below";
    "ceil"("a") "the next whole number above";
    "len"("list") "how many items a list has";
    "sum"("list") "the sum of a list";
    "product"("list") "the product of a list";
    "if"("condition, a, b") "a where the condition holds, else b; the other is not looked at";
};

/// The field that a function of a tensor reads.
pub(crate) fn field_of(function: &str) -> Option<u32> {
    let function = FUNCTIONS.iter().find(|f| f.name == function)?;
    function.statistic.map(|(field, _, _)| field)
}

/// Formulas that others may name.
pub(crate) type Definitions = BTreeMap<String, Formula>;

/// Looks at names and functions of a formula for calls of an op, also where an evaluation would not come by.
pub(crate) fn check(
    formula: &Formula,
    definitions: &Definitions,
    op: &OpDef,
) -> Result<(), Mistake> {
    let names = || {
        op.arguments
            .iter()
            .map(|argument| argument.name.as_str())
            .chain(["out", "outputs"])
            .chain(definitions.keys().map(String::as_str))
    };
    let mut waiting = vec![formula];
    let mut seen: Vec<&str> = Vec::new();
    while let Some(formula) = waiting.pop() {
        let mut found = None;
        formula.node.each(&mut |node| match &node.kind {
            NodeKind::Name(name) => match definitions.get_key_value(name) {
                Some((name, definition)) if op.arguments.iter().all(|a| a.name != *name) => {
                    if !seen.contains(&name.as_str()) {
                        seen.push(name);
                        waiting.push(definition);
                    }
                }
                _ if !names().any(|known| known == name) => {
                    let kind = "variable";
                    found.get_or_insert_with(|| unknown(node, kind, name, names()));
                }
                _ => {}
            },
            NodeKind::Call(name, _) if FUNCTIONS.iter().all(|f| f.name != name) => {
                let known = FUNCTIONS.iter().map(|f| f.name);
                found.get_or_insert_with(|| unknown(node, "function", name, known));
            }
            _ => {}
        });
        if let Some(Fault::Placed(mistake)) = found.map(|fault| formula.placed(fault)) {
            let message = format!("{}, in a rule for {}", mistake.message, op.qualified_name());
            return Err(Mistake { message, ..mistake });
        }
    }
    Ok(())
}

/// A definition that needs itself.
pub(crate) fn recursion(definitions: &Definitions) -> Option<Mistake> {
    /// What names a formula has that are definitions.
    fn uses<'d>(definitions: &'d Definitions, name: &str) -> Vec<&'d str> {
        let mut found = Vec::new();
        if let Some(formula) = definitions.get(name) {
            formula.node.each(&mut |node| {
                if let NodeKind::Name(name) = &node.kind
                    && let Some((name, _)) = definitions.get_key_value(name)
                {
                    found.push(name.as_str());
                }
            });
        }
        found
    }
    /// Goes on from the last name of the path.
    fn search<'d>(
        definitions: &'d Definitions,
        path: &mut Vec<&'d str>,
        done: &mut Vec<&'d str>,
    ) -> Option<Vec<String>> {
        let last = *path.last()?;
        for next in uses(definitions, last) {
            if let Some(at) = path.iter().position(|name| *name == next) {
                let cycle = path.iter().skip(at).chain([&next]);
                return Some(cycle.map(|name| (*name).to_owned()).collect());
            }
            if done.contains(&next) {
                continue;
            }
            path.push(next);
            if let Some(cycle) = search(definitions, path, done) {
                return Some(cycle);
            }
            path.pop();
        }
        done.push(last);
        None
    }
    let mut done = Vec::new();
    for name in definitions.keys() {
        if done.contains(&name.as_str()) {
            continue;
        }
        if let Some(cycle) = search(definitions, &mut vec![name], &mut done) {
            let formula = definitions.get(cycle.first()?)?;
            let text = format!("'{}' needs itself: {}", cycle.first()?, cycle.join(" -> "));
            return Some(formula.mistake(&text));
        }
    }
    None
}

/// A row of calls, as formulas see it.
pub(crate) struct Calls<'r> {
    row: &'r CallRow<'r>,
    definitions: &'r Definitions,
    /// Definitions that were computed already.
    known: RefCell<HashMap<String, Value>>,
}

impl<'r> Calls<'r> {
    pub(crate) fn new(row: &'r CallRow<'r>, definitions: &'r Definitions) -> Self {
        Self {
            row,
            definitions,
            known: RefCell::new(HashMap::new()),
        }
    }

    /// The sum of a formula over all calls of the row.
    pub(crate) fn count(&self, formula: &Formula) -> Result<i128, Fault> {
        let node = &formula.node;
        let result = self.value(formula, node).and_then(|value| {
            let (per_call, summed) = match value {
                Value::Number(number) => (number, Rational::ZERO),
                Value::Sum { per_call, summed } => (per_call, summed),
                other => return fault(node, format!("a count is a number, not {}", other.kind())),
            };
            let total = per_call
                .multiply(Rational::integer(i128::from(self.row.calls)))
                .and_then(|all| all.add(summed))
                .ok_or_else(|| overflow(node))?;
            match total.whole() {
                Some(_) if total.is_negative() => {
                    fault(node, format!("the count is {total}; a count is at least 0"))
                }
                Some(whole) => Ok(whole),
                None => fault(
                    node,
                    format!("the count is {total}, no whole number; round with // or floor()"),
                ),
            }
        });
        result.map_err(|fault| formula.placed(fault))
    }

    fn value(&self, formula: &Formula, node: &Node) -> Result<Value, Fault> {
        Ok(match &node.kind {
            NodeKind::Number(number) => match number.exact {
                Some(exact) => Value::Number(exact),
                None => return Err(overflow(node)),
            },
            NodeKind::Text(text) => Value::Text(text.clone()),
            NodeKind::Bool(value) => Value::Bool(*value),
            NodeKind::Name(name) => return self.name(node, name),
            NodeKind::List(items) => Value::List(
                items
                    .iter()
                    .map(|item| self.value(formula, item))
                    .collect::<Result<_, _>>()?,
            ),
            NodeKind::Call(name, arguments) => {
                let result = self.call(formula, node, name, arguments)?;
                if let (Value::Number(number), Some(text)) =
                    (&result, formula.text.get(node.span.clone()))
                    && let Some(whole) = number.whole()
                    && name != "if"
                {
                    self.row.note(text, whole);
                }
                result
            }
            NodeKind::Index(list, index) => self.index(formula, node, list, index)?,
            NodeKind::Negate(inner) => match self.value(formula, inner)? {
                Value::Number(number) => {
                    Value::Number(number.negate().ok_or_else(|| overflow(node))?)
                }
                Value::Sum { per_call, summed } => Value::Sum {
                    per_call: per_call.negate().ok_or_else(|| overflow(node))?,
                    summed: summed.negate().ok_or_else(|| overflow(node))?,
                },
                other => return wants(inner, "a number", &other),
            },
            NodeKind::Not(inner) => Value::Bool(!self.boolean(formula, inner)?),
            NodeKind::Binary(operator, left, right) => {
                self.binary(formula, node, *operator, left, right)?
            }
        })
    }

    fn number(&self, formula: &Formula, node: &Node) -> Result<Rational, Fault> {
        match self.value(formula, node)? {
            Value::Number(number) => Ok(number),
            Value::Sum { .. } => fault(
                node,
                "a number of every call is wanted here, and of a statistic the trace keeps the sum over calls",
            ),
            other => wants(node, "a number", &other),
        }
    }

    fn boolean(&self, formula: &Formula, node: &Node) -> Result<bool, Fault> {
        match self.value(formula, node)? {
            Value::Bool(value) => Ok(value),
            other => wants(node, "true or false", &other),
        }
    }

    fn integer(&self, formula: &Formula, node: &Node) -> Result<i128, Fault> {
        let number = self.number(formula, node)?;
        match number.whole() {
            Some(whole) => Ok(whole),
            None => fault(node, format!("a whole number is wanted here, not {number}")),
        }
    }

    fn name(&self, node: &Node, name: &str) -> Result<Value, Fault> {
        let row = self.row;
        if let Some(argument) = row.argument(name) {
            let value = self.argument(node, name, argument)?;
            if let Value::Number(number) = &value
                && let Some(whole) = number.whole()
            {
                row.note(name, whole);
            }
            return Ok(value);
        }
        if let Some(known) = self.known.borrow().get(name) {
            return Ok(known.clone());
        }
        if let Some(definition) = self.definitions.get(name) {
            let value = self
                .value(definition, &definition.node)
                .map_err(|fault| definition.placed(fault))?;
            if let Value::Number(number) = &value
                && let Some(whole) = number.whole()
            {
                row.note(name, whole);
            }
            self.known.borrow_mut().insert(name.to_owned(), value.clone());
            return Ok(value);
        }
        let result = |at: usize, name: &str| match row.optional_output(at) {
            Some(view) => Value::Tensor(Tensor {
                name: name.to_owned(),
                index: view.index,
                of: Source::Result,
            }),
            None => Value::Absent,
        };
        match name {
            "out" => Ok(result(0, "out")),
            "outputs" => Ok(Value::List(
                (0..row.signature.outputs.len())
                    .map(|at| result(at, &format!("outputs[{at}]")))
                    .collect(),
            )),
            _ => {
                let known = row.op.arguments.iter().map(|a| a.name.as_str());
                let known = known.chain(["out", "outputs"]);
                let known = known.chain(self.definitions.keys().map(String::as_str));
                Err(unknown(node, "variable", name, known))
            }
        }
    }

    fn argument(&self, node: &Node, name: &str, argument: &Argument) -> Result<Value, Fault> {
        let tensor = |name: String, index: u16, of| Value::Tensor(Tensor { name, index, of });
        let integer = |value: i64| Value::Number(Rational::integer(i128::from(value)));
        Ok(match argument {
            Argument::None => Value::Absent,
            Argument::Tensor(index) => tensor(name.to_owned(), *index, Source::Argument),
            Argument::TensorList(list) => Value::List(
                list.iter()
                    .enumerate()
                    .map(|(at, item)| match item {
                        Some(index) => tensor(format!("{name}[{at}]"), *index, Source::Listed),
                        None => Value::Absent,
                    })
                    .collect(),
            ),
            Argument::Int(value) | Argument::Enumerator(value) => integer(*value),
            Argument::IntList(list) => Value::List(list.iter().map(|v| integer(*v)).collect()),
            Argument::Float(value) => match Rational::from_float(*value) {
                Some(exact) => Value::Number(exact),
                None => return fault(node, format!("'{name}' is {value}")),
            },
            Argument::Bool(value) => Value::Bool(*value),
            Argument::BoolList(list) => {
                Value::List(list.iter().map(|value| Value::Bool(*value)).collect())
            }
            Argument::DType(dtype) => Value::Text(dtype.name().to_owned()),
            Argument::Device(device) => Value::Text(device.name()),
            Argument::Text(_) => match self.row.text(name) {
                Ok(text) => Value::Text(text.to_owned()),
                Err(_) => return fault(node, format!("the text '{name}' is not known")),
            },
            Argument::IntPayload
            | Argument::FloatPayload
            | Argument::FloatListPayload(_)
            | Argument::ComplexPayload
            | Argument::TextPayload => Value::Varying,
            Argument::Opaque(_) => {
                return fault(node, format!("'{name}' is of a type that rules cannot read"));
            }
        })
    }

    fn index(
        &self,
        formula: &Formula,
        node: &Node,
        list: &Node,
        index: &Node,
    ) -> Result<Value, Fault> {
        let items = match self.value(formula, list)? {
            Value::List(items) => items,
            other => return wants(list, "a list", &other),
        };
        let at = self.integer(formula, index)?;
        let length = items.len();
        let from_end = i128::try_from(length).unwrap_or(i128::MAX);
        let place = if at < 0 { at.checked_add(from_end) } else { Some(at) };
        let item = place
            .and_then(|at| usize::try_from(at).ok())
            .and_then(|at| items.into_iter().nth(at));
        match item {
            Some(item) => Ok(item),
            None => fault(node, format!("a list of {length} has no item {at}")),
        }
    }

    fn binary(
        &self,
        formula: &Formula,
        node: &Node,
        operator: Operator,
        left: &Node,
        right: &Node,
    ) -> Result<Value, Fault> {
        match operator {
            Operator::And => {
                let both = self.boolean(formula, left)? && self.boolean(formula, right)?;
                return Ok(Value::Bool(both));
            }
            Operator::Or => {
                let either = self.boolean(formula, left)? || self.boolean(formula, right)?;
                return Ok(Value::Bool(either));
            }
            Operator::Equal | Operator::Unequal => {
                let (a, b) = (self.value(formula, left)?, self.value(formula, right)?);
                let equal = equal(node, &a, &b)?;
                return Ok(Value::Bool(equal == (operator == Operator::Equal)));
            }
            Operator::Add | Operator::Subtract | Operator::Multiply | Operator::Divide => {
                let (a, b) = (self.value(formula, left)?, self.value(formula, right)?);
                return linear(node, operator, (left, a), (right, b));
            }
            _ => {}
        }
        let (a, b) = (self.number(formula, left)?, self.number(formula, right)?);
        let zero = matches!(operator, Operator::FloorDivide | Operator::Remainder) && b.is_zero();
        if zero || (operator == Operator::Power && a.is_zero() && b.is_negative()) {
            return fault(node, "division by zero");
        }
        let floor = || a.divide(b).map(|quotient| Rational::integer(quotient.floor()));
        let number = match operator {
            Operator::FloorDivide => floor(),
            Operator::Remainder => floor()
                .and_then(|floor| floor.multiply(b))
                .and_then(|whole| a.subtract(whole)),
            Operator::Power => match b.whole() {
                Some(exponent) => a.power(exponent),
                None => return fault(right, format!("a power is a whole number, not {b}")),
            },
            Operator::Less => return Ok(Value::Bool(a < b)),
            Operator::LessOrEqual => return Ok(Value::Bool(a <= b)),
            Operator::Greater => return Ok(Value::Bool(a > b)),
            _ => return Ok(Value::Bool(a >= b)),
        };
        number.map(Value::Number).ok_or_else(|| overflow(node))
    }

    fn call(
        &self,
        formula: &Formula,
        node: &Node,
        name: &str,
        arguments: &[Node],
    ) -> Result<Value, Fault> {
        let Some(function) = FUNCTIONS.iter().find(|f| f.name == name) else {
            let known = FUNCTIONS.iter().map(|f| f.name);
            return Err(unknown(node, "function", name, known));
        };
        let usage = || {
            let Function {
                name, arguments, ..
            } = function;
            fault(node, format!("it is written {name}({arguments})"))
        };
        let numbers = || -> Result<Vec<Rational>, Fault> {
            arguments.iter().map(|a| self.number(formula, a)).collect()
        };
        let whole = |number: i128| Value::Number(Rational::integer(number));
        if let Some((field, level, when)) = function.statistic {
            let [argument] = arguments else {
                return usage();
            };
            let tensor = self.tensor(formula, argument)?;
            let summed = self.statistic(argument, &tensor, name, (field, level, when))?;
            return Ok(Value::Sum {
                per_call: Rational::ZERO,
                summed: Rational::integer(summed),
            });
        }
        Ok(match (name, arguments) {
            ("if", [condition, then, otherwise]) => {
                let holds = self.boolean(formula, condition)?;
                return self.value(formula, if holds { then } else { otherwise });
            }
            ("given", [argument]) => {
                Value::Bool(self.value(formula, argument)? != Value::Absent)
            }
            ("elements" | "bytes", [argument]) => {
                let size = |view: TensorView<'_>| match name {
                    "elements" => view.elements(),
                    _ => view.bytes(),
                };
                let sum = match self.value(formula, argument)? {
                    Value::List(items) => items
                        .iter()
                        .filter_map(|item| match item {
                            Value::Tensor(tensor) => self.view(tensor).map(size),
                            _ => None,
                        })
                        .sum(),
                    Value::Absent => 0,
                    Value::Tensor(tensor) => self.view(&tensor).map_or(0, size),
                    other => return wants(argument, "a tensor", &other),
                };
                whole(sum)
            }
            ("element_bytes" | "dimensions" | "shape" | "dtype" | "is_number", [argument]) => {
                let view = self.viewed(formula, argument)?;
                match name {
                    "element_bytes" => whole(i128::from(view.meta.dtype.bytes())),
                    "dimensions" => whole(i128::try_from(view.dimensions()).unwrap_or(0)),
                    "dtype" => Value::Text(view.meta.dtype.name().to_owned()),
                    "is_number" => Value::Bool(view.is_number()),
                    _ => Value::List(
                        view.meta
                            .shape
                            .iter()
                            .map(|size| whole(i128::from(*size)))
                            .collect(),
                    ),
                }
            }
            ("size", [argument, dimension]) => {
                let view = self.viewed(formula, argument)?;
                let at = self.integer(formula, dimension)?;
                let size = isize::try_from(at).ok().and_then(|at| view.size(at).ok());
                match size {
                    Some(size) => whole(size),
                    None => {
                        let dimensions = view.dimensions();
                        let message =
                            format!("a tensor of {dimensions} dimensions has no dimension {at}");
                        return fault(node, message);
                    }
                }
            }
            ("elements_from", [argument, dimension]) => {
                let view = self.viewed(formula, argument)?;
                let at = self.integer(formula, dimension)?;
                match usize::try_from(at) {
                    Ok(at) => whole(view.elements_from(at)),
                    Err(_) => return fault(dimension, format!("there is no dimension {at}")),
                }
            }
            ("binary" | "binary_after", [argument]) => {
                let tensor = self.tensor(formula, argument)?;
                Value::Bool(self.is_binary(argument, &tensor, name == "binary_after")?)
            }
            ("product_sum" | "nonempty_products", []) => {
                let sum = if name == "product_sum" {
                    self.row.product_sum()
                } else {
                    self.row.nonempty_products()
                };
                Value::Sum {
                    per_call: Rational::ZERO,
                    summed: Rational::integer(sum.map_err(|e| of_rule(node, e))?),
                }
            }
            ("min" | "max", [_, ..]) => {
                let numbers = numbers()?.into_iter();
                let found = if name == "min" { numbers.min() } else { numbers.max() };
                Value::Number(found.unwrap_or(Rational::ZERO))
            }
            ("abs" | "floor" | "ceil", [argument]) => {
                let number = self.number(formula, argument)?;
                let result = match name {
                    "floor" => Some(Rational::integer(number.floor())),
                    "ceil" => number.ceil().map(Rational::integer),
                    _ if number.is_negative() => number.negate(),
                    _ => Some(number),
                };
                Value::Number(result.ok_or_else(|| overflow(node))?)
            }
            ("len" | "sum" | "product", [argument]) => {
                let items = match self.value(formula, argument)? {
                    Value::List(items) => items,
                    other => return wants(argument, "a list", &other),
                };
                if name == "len" {
                    return Ok(whole(i128::try_from(items.len()).unwrap_or(i128::MAX)));
                }
                let (operator, start) = if name == "sum" {
                    (Operator::Add, 0)
                } else {
                    (Operator::Multiply, 1)
                };
                let mut result = whole(start);
                for item in items {
                    result = linear(node, operator, (node, result), (argument, item))?;
                }
                result
            }
            _ => return usage(),
        })
    }

    fn tensor(&self, formula: &Formula, node: &Node) -> Result<Tensor, Fault> {
        match self.value(formula, node)? {
            Value::Tensor(tensor) => Ok(tensor),
            other => wants(node, "a tensor", &other),
        }
    }

    fn view(&self, tensor: &Tensor) -> Option<TensorView<'r>> {
        let meta = self.row.signature.tensors.get(usize::from(tensor.index))?;
        Some(TensorView {
            meta,
            index: tensor.index,
        })
    }

    fn viewed(&self, formula: &Formula, node: &Node) -> Result<TensorView<'r>, Fault> {
        let tensor = self.tensor(formula, node)?;
        match self.view(&tensor) {
            Some(view) => Ok(view),
            None => fault(node, "the trace does not say what the tensor is"),
        }
    }

    /// The operand that has a tensor's statistics, and when they were taken.
    fn operand(&self, node: &Node, tensor: &Tensor, when: When) -> Result<(Option<Operand>, When), Fault> {
        Ok(match (tensor.of, when) {
            (Source::Argument, When::Before) => (self.row.operand(&tensor.name, when), when),
            (Source::Argument, When::After) if !self.row.writes(&tensor.name) => {
                let name = &tensor.name;
                let message = format!("the op does not write '{name}': ask for its values before the op");
                return fault(node, message);
            }
            (Source::Argument, When::After) => (self.row.operand(&tensor.name, when), when),
            (Source::Listed, When::Before) => (Some(Operand::Tensor(tensor.index)), when),
            (Source::Listed, When::After) => {
                return fault(node, "of tensors in lists there are statistics before the op alone");
            }
            (Source::Result, _) => (Some(Operand::Tensor(tensor.index)), When::After),
        })
    }

    fn statistic(
        &self,
        node: &Node,
        tensor: &Tensor,
        function: &str,
        (field, level, when): (u32, &'static str, When),
    ) -> Result<i128, Fault> {
        let (operand, when) = self.operand(node, tensor, when)?;
        let what = || format!("{function}({})", tensor.name);
        let sum = self
            .row
            .statistic(operand, when, field, level, what)
            .map_err(|error| of_rule(node, error))?;
        Ok(self.row.note(&what(), sum))
    }

    fn is_binary(&self, node: &Node, tensor: &Tensor, after: bool) -> Result<bool, Fault> {
        let when = if after { When::After } else { When::Before };
        let (operand, when) = self.operand(node, tensor, when)?;
        self.row
            .operand_is_binary(&tensor.name, operand, when)
            .map_err(|error| of_rule(node, error))
    }
}

fn overflow(node: &Node) -> Fault {
    Fault::Mistake {
        span: node.span.clone(),
        message: "overflow: the number does not fit 128 bits".to_owned(),
    }
}

fn wants<T>(node: &Node, wanted: &str, found: &Value) -> Result<T, Fault> {
    fault(node, format!("{wanted} is wanted here, not {}", found.kind()))
}

fn of_rule(node: &Node, error: RuleError) -> Fault {
    match error {
        RuleError::Missing(missing) => Fault::Missing(missing),
        other => Fault::Mistake {
            span: node.span.clone(),
            message: other.to_string(),
        },
    }
}

fn equal(node: &Node, a: &Value, b: &Value) -> Result<bool, Fault> {
    Ok(match (a, b) {
        (Value::Sum { .. }, _) | (_, Value::Sum { .. }) => {
            return fault(
                node,
                "statistics are not compared: the trace keeps their sums over calls, not each call's",
            );
        }
        (Value::Varying, Value::Number(known)) | (Value::Number(known), Value::Varying) => {
            // What varies is neither 0 nor 1.
            if *known == Rational::ZERO || *known == Rational::integer(1) {
                false
            } else {
                return fault(node, "what differs from call to call is compared with 0 and 1 alone");
            }
        }
        (Value::Number(a), Value::Number(b)) => a == b,
        (Value::Bool(a), Value::Bool(b)) => a == b,
        (Value::Text(a), Value::Text(b)) => a == b,
        (Value::List(a), Value::List(b)) => {
            if a.len() != b.len() {
                return Ok(false);
            }
            for (a, b) in a.iter().zip(b) {
                if !equal(node, a, b)? {
                    return Ok(false);
                }
            }
            true
        }
        _ => {
            let (a, b) = (a.kind(), b.kind());
            return fault(node, format!("{a} and {b} are not compared"));
        }
    })
}

/// `+ - * /`, of which sums take part as far as they stay sums.
fn linear(
    node: &Node,
    operator: Operator,
    (left, a): (&Node, Value),
    (right, b): (&Node, Value),
) -> Result<Value, Fault> {
    let split = |node: &Node, value: Value| match value {
        Value::Number(number) => Ok((number, None)),
        Value::Sum { per_call, summed } => Ok((per_call, Some(summed))),
        other => wants(node, "a number", &other),
    };
    let (a, a_sum) = split(left, a)?;
    let (b, b_sum) = split(right, b)?;
    let put_together = |per_call: Option<Rational>, summed: Option<Option<Rational>>| {
        let per_call = per_call.ok_or_else(|| overflow(node))?;
        match summed {
            None => Ok(Value::Number(per_call)),
            Some(summed) => Ok(Value::Sum {
                per_call,
                summed: summed.ok_or_else(|| overflow(node))?,
            }),
        }
    };
    match operator {
        Operator::Add | Operator::Subtract => {
            let join = |a: Rational, b: Rational| match operator {
                Operator::Add => a.add(b),
                _ => a.subtract(b),
            };
            let summed = match (a_sum, b_sum) {
                (None, None) => None,
                (a, b) => Some(join(a.unwrap_or(Rational::ZERO), b.unwrap_or(Rational::ZERO))),
            };
            put_together(join(a, b), summed)
        }
        Operator::Multiply => match (a_sum, b_sum) {
            (Some(_), Some(_)) => fault(
                node,
                "two statistics are not multiplied: the trace keeps their sums over calls, not each call's",
            ),
            (None, None) => put_together(a.multiply(b), None),
            (Some(sum), None) => put_together(a.multiply(b), Some(sum.multiply(b))),
            (None, Some(sum)) => put_together(a.multiply(b), Some(sum.multiply(a))),
        },
        _ if b_sum.is_some() => fault(
            right,
            "nothing is divided by a statistic: the trace keeps its sum over calls, not each call's",
        ),
        _ if b.is_zero() => fault(node, "division by zero"),
        _ => put_together(a.divide(b), a_sum.map(|sum| sum.divide(b))),
    }
}
