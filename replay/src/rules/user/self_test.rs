//! A rule's tests: made-up calls and what they count.

use std::collections::BTreeMap;

use optape_trace::{
    Argument, ArgumentDef, DType, OpDef, Operand, Pattern, PatternEntry, ReturnDef, SignatureDef,
    Stage, State, TensorMeta, When, call_flags, fields, tensor_flags,
};
use optape_trace::{OpId, ScopeId};
use toml::de::DeValue;

use super::{File, Table};
use crate::error::ReplayError;
use crate::expression::exact::{self, Calls, Definitions};
use crate::expression::{Fault, Formula, parse_argument};
use crate::rules::CallRow;

/// A call that a test describes.
#[derive(Default)]
struct Call {
    arguments: Vec<(String, Argument)>,
    written: Vec<String>,
    outputs: Vec<Argument>,
    /// Those of the arguments, then those of the results.
    tensors: Vec<TensorMeta>,
    inputs: u16,
    /// Fields and numbers, and whether binary, by operand and time.
    statistics: BTreeMap<(Operand, When), (Option<bool>, BTreeMap<u32, u64>)>,
    calls: u64,
}

/// Runs all tests of a rule.
pub(super) fn run(
    file: &File<'_>,
    op: &str,
    formula: &Formula,
    definitions: &Definitions,
    tests: &toml::Spanned<DeValue<'_>>,
) -> Result<(), ReplayError> {
    let DeValue::Array(list) = tests.get_ref() else {
        return Err(file.mistake(tests.span(), "'tests' is a list of tables"));
    };
    if list.is_empty() {
        return Err(file.mistake(tests.span(), format!("the rule of {op} has no test")));
    }
    let mut names = Vec::new();
    for test in list {
        let call = one(file, op, formula, definitions, test)?;
        names.extend(call.arguments);
    }
    // All variables of the formula, also those that no test comes by.
    let op = op_of(op, names.iter().map(|(name, _)| name.as_str()), &[], 1);
    exact::check(formula, definitions, &op).map_err(|mistake| {
        let message = format!("{} that its tests give", mistake.message);
        ReplayError::Rules(crate::Mistake { message, ..mistake })
    })
}

fn one(
    file: &File<'_>,
    op: &str,
    formula: &Formula,
    definitions: &Definitions,
    test: &toml::Spanned<DeValue<'_>>,
) -> Result<Call, ReplayError> {
    const KEYS: [&str; 4] = ["given", "statistics", "calls", "expect"];
    let table = file.table(test, "a test")?;
    if let Some((key, _)) = table.iter().find(|(k, _)| !KEYS.contains(&k.get_ref().as_ref())) {
        return Err(file.unknown(key.span(), key.get_ref(), &KEYS));
    }
    let find = |wanted: &str| table.iter().find(|(k, _)| k.get_ref() == wanted).map(|(_, v)| v);
    let mut call = Call {
        calls: 1,
        ..Call::default()
    };
    let whole = |value: &toml::Spanned<DeValue<'_>>, what: &str| match value.get_ref() {
        DeValue::Integer(number) => i128::from_str_radix(&number.as_str().replace('_', ""), number.radix())
            .map_err(|_| file.mistake(value.span(), format!("{what} is too large"))),
        _ => Err(file.mistake(value.span(), format!("{what} is a whole number"))),
    };
    if let Some(calls) = find("calls") {
        call.calls = u64::try_from(whole(calls, "'calls'")?)
            .ok()
            .filter(|calls| *calls > 0)
            .ok_or_else(|| file.mistake(calls.span(), "'calls' is at least 1"))?;
    }
    if let Some(given) = find("given") {
        arguments(file, file.table(given, "'given'")?, &mut call)?;
    }
    if let Some(statistics) = find("statistics") {
        for (key, value) in file.table(statistics, "'statistics'")? {
            statistic(file, key, value, &mut call)?;
        }
    }
    let expected = find("expect").ok_or_else(|| file.mistake(test.span(), "the test says not what it expects: 'expect'"))?;
    let expect = whole(expected, "'expect'")?;
    match count(op, formula, definitions, &call) {
        Ok(counted) if counted == expect => Ok(call),
        Ok(counted) => {
            let message = format!("the rule of {op} gives {counted} here, not {expect}");
            Err(file.mistake(expected.span(), message))
        }
        Err(Fault::Placed(mistake)) => Err(ReplayError::Rules(mistake)),
        Err(Fault::Mistake { message, .. }) => Err(ReplayError::Rules(formula.mistake(&message))),
        Err(Fault::Missing(missing)) => {
            let message = format!("the test does not give {}: put it into 'statistics'", missing.what);
            Err(file.mistake(test.span(), message))
        }
    }
}

fn count(
    op: &str,
    formula: &Formula,
    definitions: &Definitions,
    call: &Call,
) -> Result<i128, Fault> {
    let names = call.arguments.iter().map(|(name, _)| name.as_str());
    let op = op_of(op, names, &call.written, call.outputs.len());
    let signature = SignatureDef {
        op: OpId(0),
        arguments: call.arguments.iter().map(|(_, argument)| argument.clone()).collect(),
        outputs: call.outputs.clone(),
        tensors: call.tensors.clone(),
        inputs: call.inputs,
        flags: call_flags::GRAD_MODE,
        scope: ScopeId::GLOBAL,
        stage: Stage::Forward,
        stage_name: None,
    };
    let entry = |((operand, when), (binary, numbers)): (&(Operand, When), &(Option<bool>, BTreeMap<u32, u64>))| PatternEntry {
        operand: *operand,
        when: *when,
        state: State::Present,
        binary: *binary,
        fields: numbers.keys().fold(0, |mask, field| mask | field),
    };
    let pattern = Pattern {
        entries: call.statistics.iter().map(entry).collect(),
    };
    let integer_sums: Vec<u128> = call
        .statistics
        .values()
        .flat_map(|(_, numbers)| numbers.values())
        .map(|number| u128::from(*number))
        .collect();
    let row = CallRow {
        op: &op,
        signature: &signature,
        pattern: &pattern,
        calls: call.calls,
        integer_sums: &integer_sums,
        float_sums: &[],
        values_before: false,
        dictionary: None,
        notes: None,
    };
    if let Err(error) = row.check() {
        return Err(Fault::Mistake {
            span: 0..0,
            message: error.to_string(),
        });
    }
    Calls::new(&row, definitions).count(formula)
}

fn op_of<'n>(
    op: &str,
    names: impl Iterator<Item = &'n str>,
    written: &[String],
    outputs: usize,
) -> OpDef {
    let (name, overload) = op.split_once('.').unwrap_or((op, ""));
    let argument = |name: &str| ArgumentDef {
        name: name.to_owned(),
        written: written.iter().any(|w| w == name),
        ..ArgumentDef::default()
    };
    OpDef {
        name: name.to_owned(),
        overload: overload.to_owned(),
        arguments: names.map(argument).collect(),
        returns: vec![ReturnDef::default(); outputs],
    }
}

fn arguments(file: &File<'_>, table: &Table<'_>, call: &mut Call) -> Result<(), ReplayError> {
    // Results stand behind the arguments.
    for (name, value) in table.iter().filter(|(name, _)| name.get_ref() != "out") {
        let argument = argument(file, value, &mut call.tensors)?;
        call.arguments.push((name.get_ref().to_string(), argument));
    }
    call.inputs = u16::try_from(call.tensors.len()).unwrap_or(u16::MAX);
    if let Some((_, value)) = table.iter().find(|(name, _)| name.get_ref() == "out") {
        match value.get_ref() {
            DeValue::Array(list) => {
                for item in list {
                    let output = argument(file, item, &mut call.tensors)?;
                    call.outputs.push(output);
                }
            }
            _ => call.outputs.push(argument(file, value, &mut call.tensors)?),
        }
    }
    Ok(())
}

fn argument(
    file: &File<'_>,
    value: &toml::Spanned<DeValue<'_>>,
    tensors: &mut Vec<TensorMeta>,
) -> Result<Argument, ReplayError> {
    let wrong = |message: &str| file.mistake(value.span(), message);
    Ok(match value.get_ref() {
        DeValue::Boolean(value) => Argument::Bool(*value),
        DeValue::Integer(number) => {
            let number = i64::from_str_radix(&number.as_str().replace('_', ""), number.radix())
                .map_err(|_| wrong("the number is too large"))?;
            Argument::Int(number)
        }
        DeValue::Float(number) => match number.as_str().parse::<f64>() {
            Ok(number) if number == 0.0 || number == 1.0 => Argument::Float(number),
            _ => Argument::FloatPayload,
        },
        DeValue::String(text) if text == "None" => Argument::None,
        DeValue::String(text) => match tensor(text) {
            Some(meta) => {
                tensors.push(meta);
                Argument::Tensor(index(tensors))
            }
            None => match dtype(text) {
                Some(dtype) => Argument::DType(dtype),
                None => {
                    return Err(wrong(
                        "a text is a tensor ('float32[2, 3]'; 'float32 number'), a type ('float32') or 'None'",
                    ));
                }
            },
        },
        DeValue::Array(list) => {
            let items: Vec<Argument> = list
                .iter()
                .map(|item| argument(file, item, tensors))
                .collect::<Result<_, _>>()?;
            let integers = items.iter().map(|item| match item {
                Argument::Int(value) => Some(*value),
                _ => None,
            });
            let flags = items.iter().map(|item| match item {
                Argument::Bool(value) => Some(*value),
                _ => None,
            });
            let listed = items.iter().map(|item| match item {
                Argument::Tensor(at) => Some(Some(*at)),
                Argument::None => Some(None),
                _ => None,
            });
            if let Some(integers) = integers.collect() {
                Argument::IntList(integers)
            } else if let Some(flags) = flags.collect() {
                Argument::BoolList(flags)
            } else if let Some(listed) = listed.collect() {
                Argument::TensorList(listed)
            } else {
                return Err(wrong("a list is one of whole numbers, of flags or of tensors"));
            }
        }
        _ => return Err(wrong("an argument is a number, a flag, a text or a list")),
    })
}

fn index(tensors: &[TensorMeta]) -> u16 {
    u16::try_from(tensors.len().saturating_sub(1)).unwrap_or(u16::MAX)
}

fn dtype(name: &str) -> Option<DType> {
    (0..64).map(DType).find(|dtype| dtype.name() == name)
}

/// `float32[2, 3]`, `float32 number`.
fn tensor(text: &str) -> Option<TensorMeta> {
    if let Some(name) = text.strip_suffix(" number") {
        return Some(TensorMeta {
            dtype: dtype(name.trim())?,
            flags: tensor_flags::WRAPPED_NUMBER,
            ..TensorMeta::default()
        });
    }
    let (name, sizes) = text.strip_suffix(']')?.split_once('[')?;
    let shape: Vec<i64> = if sizes.trim().is_empty() {
        Vec::new()
    } else {
        sizes
            .split(',')
            .map(|size| size.trim().parse::<i64>().ok().filter(|size| *size >= 0))
            .collect::<Option<_>>()?
    };
    let mut strides = vec![1i64; shape.len()];
    for at in (1..shape.len()).rev() {
        strides[at - 1] = strides[at].saturating_mul(shape[at]);
    }
    Some(TensorMeta {
        dtype: dtype(name.trim())?,
        shape,
        strides,
        ..TensorMeta::default()
    })
}

/// `"nonzeros(input)" = 5`, `"binary(tensors[1])" = true`, `"product_sum()" = 7`.
fn statistic(
    file: &File<'_>,
    key: &toml::Spanned<std::borrow::Cow<'_, str>>,
    value: &toml::Spanned<DeValue<'_>>,
    call: &mut Call,
) -> Result<(), ReplayError> {
    let wrong = |message: String| file.mistake(key.span(), message);
    let text = key.get_ref().as_ref();
    let usage = || wrong(format!("'{text}' is no statistic: write \"nonzeros(input)\" = 5 or \"binary(input)\" = true"));
    let (function, argument) = parse_argument(text).ok_or_else(usage)?;
    if let "product_sum" | "nonempty_products" = function.as_str() {
        let field = if function == "product_sum" {
            fields::PRODUCT_SUM
        } else {
            fields::NONEMPTY_OUTPUTS
        };
        let entry = call.statistics.entry((Operand::Product, When::Before)).or_default();
        entry.1.insert(field, number(file, value)?);
        return Ok(());
    }
    let (name, item) = argument.ok_or_else(usage)?;
    let after = function.ends_with("_after");
    let found = call
        .arguments
        .iter()
        .find(|(known, _)| *known == name)
        .map(|(_, argument)| argument);
    let (tensor, when) = match (found, item) {
        (Some(Argument::Tensor(at)), None) => {
            (Some(*at), if after { When::After } else { When::Before })
        }
        (Some(Argument::TensorList(list)), Some(item)) => {
            (list.get(item).copied().flatten(), When::Before)
        }
        (None, item) if matches!(name.as_str(), "out" | "outputs") => {
            match call.outputs.get(item.unwrap_or(0)) {
                Some(Argument::Tensor(at)) => (Some(*at), When::After),
                _ => (None, When::After),
            }
        }
        _ => (None, When::Before),
    };
    let Some(tensor) = tensor else {
        return Err(wrong(format!("the test gives no tensor '{name}'")));
    };
    let entry = call.statistics.entry((Operand::Tensor(tensor), when)).or_default();
    match (exact::field_of(&function), value.get_ref()) {
        (Some(field), _) => {
            entry.1.insert(field, number(file, value)?);
        }
        (None, DeValue::Boolean(binary)) if function.starts_with("binary") => {
            entry.0 = Some(*binary);
        }
        (None, _) if matches!(function.as_str(), "binary" | "binary_after") => {
            return Err(file.mistake(value.span(), "it is true or false"));
        }
        (None, _) => return Err(usage()),
    }
    if after && found.is_some() {
        call.written.push(name);
    }
    Ok(())
}

fn number(file: &File<'_>, value: &toml::Spanned<DeValue<'_>>) -> Result<u64, ReplayError> {
    let number = match value.get_ref() {
        DeValue::Integer(number) => {
            u64::from_str_radix(&number.as_str().replace('_', ""), number.radix()).ok()
        }
        _ => None,
    };
    number.ok_or_else(|| file.mistake(value.span(), "a statistic is a whole number of at least 0"))
}
