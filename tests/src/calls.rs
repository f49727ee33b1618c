//! What a trace holds, in the shape that tests ask for.

use std::collections::BTreeMap;

use optape_trace::{
    Argument, OpCall, Operand, Ordinal, PatternEntry, Record, SignatureDef, StreamId, Trace, When,
    call_flags, fields,
};

/// An op call with its definitions looked up.
#[derive(Clone, Debug)]
pub struct Call {
    /// Its place in the stream.
    pub ordinal: Ordinal,
    /// `aten::mm`, `aten::add.Tensor`.
    pub op: String,
    /// The innermost module.
    pub scope: String,
    /// `forward`, `backward`, ...
    pub stage: String,
    /// The module could not be found.
    pub unattributed: bool,
    /// The structure.
    pub signature: SignatureDef,
    /// The record.
    pub record: OpCall,
    /// Statistics that it has: whose, when, and the numbers by field.
    pub statistics: Vec<(PatternEntry, BTreeMap<u32, u64>)>,
}

impl Call {
    /// The tensor that an argument is, by its place in the schema.
    #[must_use]
    pub fn tensor(&self, argument: usize) -> Option<u16> {
        match self.signature.arguments.get(argument) {
            Some(Argument::Tensor(index)) => Some(*index),
            _ => None,
        }
    }

    /// Nonzeros of an argument before the op ran, if they are there.
    #[must_use]
    pub fn nonzeros(&self, argument: usize) -> Option<u64> {
        let tensor = Operand::Tensor(self.tensor(argument)?);
        let (_, numbers) = self
            .statistics
            .iter()
            .find(|(e, _)| e.operand == tensor && e.when == When::Before)?;
        numbers.get(&fields::NONZEROS).copied()
    }

    /// Whether an argument was binary before the op ran, if that is there.
    #[must_use]
    pub fn binary(&self, argument: usize) -> Option<bool> {
        let tensor = Operand::Tensor(self.tensor(argument)?);
        let (entry, _) = self
            .statistics
            .iter()
            .find(|(e, _)| e.operand == tensor && e.when == When::Before)?;
        entry.binary
    }
}

/// The op calls of a stream, in order.
///
/// # Panics
/// Where the trace cannot be read.
#[must_use]
pub fn calls_of(trace: &Trace, stream: StreamId) -> Vec<Call> {
    let dictionary = trace.stream(stream).expect("the stream").dictionary();
    let call = |(ordinal, record): (Ordinal, Record)| {
        let Record::OpCall(record) = record else {
            return None;
        };
        let signature = dictionary
            .signature(record.signature)
            .expect("a signature for every call")
            .clone();
        let pattern = dictionary
            .pattern(record.pattern)
            .expect("a pattern for every call");
        let mut words = record.statistics.iter();
        let statistics = pattern.entries.iter().map(|entry| {
            let numbers = fields::each(entry.fields)
                .map(|field| (field, *words.next().expect("a number for every field")));
            (*entry, numbers.collect())
        });
        Some(Call {
            ordinal,
            op: dictionary
                .op(signature.op)
                .expect("an op for every signature")
                .qualified_name(),
            scope: dictionary
                .scope(signature.scope)
                .expect("a scope for every signature")
                .name
                .clone(),
            stage: signature.stage.name().to_owned(),
            unattributed: signature.flags & call_flags::UNATTRIBUTED != 0,
            statistics: statistics.collect(),
            signature,
            record,
        })
    };
    trace
        .records(stream)
        .filter_map(|record| call(record.expect("a readable record")))
        .collect()
}

/// How often each op was called.
#[must_use]
pub fn ops_of(calls: &[Call]) -> BTreeMap<String, u64> {
    counted(calls.iter().map(|call| call.op.clone()))
}

/// How many calls each stage has.
#[must_use]
pub fn stages_of(calls: &[Call]) -> BTreeMap<String, u64> {
    counted(calls.iter().map(|call| call.stage.clone()))
}

fn counted(names: impl Iterator<Item = String>) -> BTreeMap<String, u64> {
    names.fold(BTreeMap::new(), |mut counts, name| {
        *counts.entry(name).or_default() += 1;
        counts
    })
}
