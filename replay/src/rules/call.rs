//! What a rule sees: all calls of one signature and one pattern together.
//!
//! Rules are linear in the statistics once the pattern is given (the pattern holds everything that a rule
//! branches on: shapes, arguments, which operands are binary), so a rule is evaluated once for a whole row and
//! not once per call. That is what makes replay from summaries possible.

use std::cell::RefCell;
use std::fmt;

use optape_trace::{
    Argument, Dictionary, NotTaken, OpDef, Operand, Pattern, SignatureDef, State, TensorMeta, When,
    call_flags, fields, needs, tensor_flags,
};

/// Why a rule gave no number.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum RuleError {
    /// The trace does not hold what the rule needs.
    Missing(Box<MissingLevel>),
    /// The rules that are mirrored raise an error here; the estimator is refused as a whole.
    Failed(String),
    /// The call is not of the form that the rule is for; it counts as unknown.
    Unsuited(String),
}

impl fmt::Display for RuleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing(missing) => missing.fmt(f),
            Self::Failed(text) | Self::Unsuited(text) => f.write_str(text),
        }
    }
}

/// A level that a trace does not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MissingLevel {
    /// `T1`, `T2`, `T4`.
    pub level: &'static str,
    /// What of which call.
    pub what: String,
    /// How to get it.
    pub way_out: WayOut,
}

/// How to get what a trace does not hold.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum WayOut {
    /// Recording again with this flag of `optape record`.
    Record(&'static str),
    /// No flag takes it of such a tensor.
    NotTaken(NotTaken),
    /// None: the process or the device died before it arrived.
    Lost,
    /// Waiting: the recording goes on.
    Pending,
    /// Something else.
    Other(String),
}

impl WayOut {
    /// The flag of `optape record`, where there is one.
    #[must_use]
    pub const fn flag(&self) -> Option<&'static str> {
        match self {
            Self::Record(flag) => Some(flag),
            Self::NotTaken(_) | Self::Lost | Self::Pending | Self::Other(_) => None,
        }
    }
}

impl fmt::Display for WayOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Record(flag) => write!(f, "record with `optape record {flag}`"),
            Self::NotTaken(why) => write!(f, "it was not taken: {}", not_taken(*why)),
            Self::Lost => f.write_str("it was lost when the process or the device died"),
            Self::Pending => f.write_str("it has not arrived yet"),
            Self::Other(text) => f.write_str(text),
        }
    }
}

impl fmt::Display for MissingLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the trace does not hold {} (level {}); {}",
            self.what, self.level, self.way_out
        )
    }
}

/// Names and values that a formula was filled in with, for `--explain`.
pub type Notes = RefCell<Vec<(String, String)>>;

/// All calls with one signature and one pattern.
#[derive(Clone, Copy)]
pub struct CallRow<'a> {
    /// The overload.
    pub op: &'a OpDef,
    /// Structure.
    pub signature: &'a SignatureDef,
    /// Which statistics there are.
    pub pattern: &'a Pattern,
    /// How many calls.
    pub calls: u64,
    /// Sums of the integer statistics, in the order of the pattern.
    pub integer_sums: &'a [u128],
    /// Sums of the float statistics, in the order of the pattern.
    pub float_sums: &'a [f64],
    /// Take the values of written operands before the op, because the rule set counts this call as one that
    /// writes a fresh tensor (autograd's accumulations).
    pub values_before: bool,
    /// Where texts are looked up.
    pub dictionary: Option<&'a Dictionary>,
    /// Where to note what a formula was filled in with.
    pub notes: Option<&'a Notes>,
}

/// A tensor of a call.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    /// Its metadata.
    pub meta: &'a TensorMeta,
    /// Index into [`SignatureDef::tensors`].
    pub index: u16,
}

impl TensorView<'_> {
    /// Number of elements.
    #[must_use]
    pub fn elements(&self) -> i128 {
        i128::from(self.meta.elements())
    }

    /// Elements times element size, 0 for a number.
    #[must_use]
    pub fn bytes(&self) -> i128 {
        i128::from(self.meta.bytes())
    }

    /// Number of dimensions.
    #[must_use]
    pub fn dimensions(&self) -> usize {
        self.meta.shape.len()
    }

    /// Size of a dimension; negative indices count from the end.
    ///
    /// # Errors
    /// Where there is no such dimension.
    pub fn size(&self, dimension: isize) -> Result<i128, RuleError> {
        let at = if dimension < 0 {
            dimension + self.meta.shape.len() as isize
        } else {
            dimension
        };
        usize::try_from(at)
            .ok()
            .and_then(|at| self.meta.shape.get(at))
            .map(|&size| i128::from(size.max(0)))
            .ok_or_else(|| {
                RuleError::Unsuited(format!(
                    "a tensor of {} dimensions has no dimension {dimension}",
                    self.meta.shape.len()
                ))
            })
    }

    /// Product of the sizes from a dimension on.
    #[must_use]
    pub fn elements_from(&self, dimension: usize) -> i128 {
        self.meta
            .shape
            .iter()
            .skip(dimension)
            .fold(1, |n, &size| n.saturating_mul(i128::from(size.max(0))))
    }

    /// A Python or C++ number in tensor arithmetic.
    #[must_use]
    pub fn is_number(&self) -> bool {
        self.meta.is(tensor_flags::WRAPPED_NUMBER)
    }
}

/// What is known of a number argument without reading events.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Number {
    /// Its value is structure.
    Known(f64),
    /// It varies from call to call and is neither 0 nor 1.
    Varying,
}

impl Number {
    /// Exactly 0.
    #[must_use]
    pub fn is_zero(self) -> bool {
        self == Self::Known(0.0)
    }

    /// Exactly 1.
    #[must_use]
    pub fn is_one(self) -> bool {
        self == Self::Known(1.0)
    }
}

/// Sizes beyond these cannot be those of a tensor that existed; arithmetic on them could overflow.
const MOST_ELEMENTS: u64 = 1 << 46;

impl<'a> CallRow<'a> {
    /// The name that rules are looked up by. An accumulation that the rule set counts as `add` has the arguments and the
    /// formula of `add_`; only the values differ, and [`Self::values_before`] says which to take.
    #[must_use]
    pub fn rule_name(&self) -> String {
        if self.values_before && self.is_accumulation() {
            super::fresh(self.op).qualified_name()
        } else {
            self.op.qualified_name()
        }
    }

    /// Refuses rows whose sizes cannot be true, so that formulas need not fear overflow.
    ///
    /// # Errors
    /// Where a tensor or an integer argument is larger than anything that fits a machine, or a tensor's sizes are not known.
    pub fn check(&self) -> Result<(), RuleError> {
        if self.signature.arguments.is_empty() && !self.op.arguments.is_empty() {
            return Err(RuleError::Unsuited(
                "its arguments were not kept: the recorder's table of signatures was full"
                    .to_owned(),
            ));
        }
        for tensor in &self.signature.tensors {
            if tensor.is(tensor_flags::NESTED) {
                return Err(RuleError::Unsuited(
                    "a nested tensor, whose sizes the trace does not hold".to_owned(),
                ));
            }
            let large = tensor
                .shape
                .iter()
                .any(|&size| !(0..=1 << 34).contains(&size));
            if large || tensor.elements() > MOST_ELEMENTS {
                return Err(RuleError::Unsuited(format!(
                    "a tensor of shape {:?} cannot have existed",
                    tensor.shape
                )));
            }
        }
        for argument in &self.signature.arguments {
            if let Argument::IntList(list) = argument
                && list.iter().any(|v| v.unsigned_abs() > 1 << 34)
            {
                return Err(RuleError::Unsuited(format!(
                    "the integers {list:?} are out of range"
                )));
            }
        }
        Ok(())
    }

    /// Notes a quantity of the formula under its name, and gives it back.
    pub fn note(&self, name: &str, value: i128) -> i128 {
        if let Some(notes) = self.notes {
            let mut notes = notes.borrow_mut();
            if !notes.iter().any(|(n, _)| n == name) {
                notes.push((name.to_owned(), value.to_string()));
            }
        }
        value
    }

    /// The place of an argument in the schema.
    #[must_use]
    pub fn position(&self, name: &str) -> Option<usize> {
        self.op.arguments.iter().position(|a| a.name == name)
    }

    /// An argument by its name in the schema.
    #[must_use]
    pub fn argument(&self, name: &str) -> Option<&'a Argument> {
        self.signature.arguments.get(self.position(name)?)
    }

    /// An argument by its place in the schema.
    #[must_use]
    pub fn argument_at(&self, position: usize) -> Option<&'a Argument> {
        self.signature.arguments.get(position)
    }

    fn view(&self, index: u16) -> Option<TensorView<'a>> {
        self.signature
            .tensors
            .get(usize::from(index))
            .map(|meta| TensorView { meta, index })
    }

    fn tensor_of(&self, argument: Option<&'a Argument>) -> Option<TensorView<'a>> {
        match argument? {
            Argument::Tensor(index) => self.view(*index),
            _ => None,
        }
    }

    fn views_of(&self, argument: &'a Argument) -> Vec<TensorView<'a>> {
        match argument {
            Argument::Tensor(index) => self.view(*index).into_iter().collect(),
            Argument::TensorList(list) => list
                .iter()
                .flatten()
                .filter_map(|&index| self.view(index))
                .collect(),
            _ => Vec::new(),
        }
    }

    /// A tensor argument, numbers included; `None` where it is undefined or no tensor.
    #[must_use]
    pub fn optional_tensor(&self, name: &str) -> Option<TensorView<'a>> {
        self.tensor_of(self.argument(name))
    }

    /// A tensor argument by its place, numbers included.
    #[must_use]
    pub fn optional_tensor_at(&self, position: usize) -> Option<TensorView<'a>> {
        self.tensor_of(self.argument_at(position))
    }

    /// A tensor argument that has to be there.
    ///
    /// # Errors
    /// Where it is not.
    pub fn tensor(&self, name: &str) -> Result<TensorView<'a>, RuleError> {
        self.optional_tensor(name)
            .ok_or_else(|| RuleError::Unsuited(format!("the call has no tensor '{name}'")))
    }

    /// A tensor argument by its place that has to be there.
    ///
    /// # Errors
    /// Where it is not.
    pub fn tensor_at(&self, position: usize) -> Result<TensorView<'a>, RuleError> {
        self.optional_tensor_at(position).ok_or_else(|| {
            RuleError::Unsuited(format!("argument {position} of the call is no tensor"))
        })
    }

    /// The tensors of a list argument (or the one tensor of a plain one).
    #[must_use]
    pub fn tensors(&self, name: &str) -> Vec<TensorView<'a>> {
        self.argument(name)
            .map(|a| self.views_of(a))
            .unwrap_or_default()
    }

    /// The tensors of a list argument by its place.
    #[must_use]
    pub fn tensors_at(&self, position: usize) -> Vec<TensorView<'a>> {
        self.argument_at(position)
            .map(|a| self.views_of(a))
            .unwrap_or_default()
    }

    /// An output by its place; `None` where it is undefined or no tensor.
    #[must_use]
    pub fn optional_output(&self, position: usize) -> Option<TensorView<'a>> {
        self.tensor_of(self.signature.outputs.get(position))
    }

    /// An output that has to be there.
    ///
    /// # Errors
    /// Where it is not.
    pub fn output(&self, position: usize) -> Result<TensorView<'a>, RuleError> {
        self.optional_output(position).ok_or_else(|| {
            RuleError::Unsuited(format!("the call has no tensor as output {position}"))
        })
    }

    /// All tensors of all outputs.
    #[must_use]
    pub fn outputs(&self) -> Vec<TensorView<'a>> {
        self.signature
            .outputs
            .iter()
            .flat_map(|a| self.views_of(a))
            .collect()
    }

    /// Whether an argument was given at all (neither `None` nor an undefined tensor).
    #[must_use]
    pub fn is_given(&self, name: &str) -> bool {
        !matches!(self.argument(name), None | Some(Argument::None))
    }

    /// A list of integers; a single integer is a list of one.
    ///
    /// # Errors
    /// Where the argument is something else.
    pub fn integers(&self, name: &str) -> Result<Vec<i128>, RuleError> {
        match self.argument(name) {
            Some(Argument::IntList(list)) => Ok(list.iter().map(|&v| i128::from(v)).collect()),
            Some(Argument::Int(value)) => Ok(vec![i128::from(*value)]),
            _ => Err(RuleError::Unsuited(format!(
                "the call has no integers '{name}'"
            ))),
        }
    }

    /// An integer.
    ///
    /// # Errors
    /// Where the argument is something else, or varies from call to call.
    pub fn integer(&self, name: &str) -> Result<i128, RuleError> {
        match self.argument(name) {
            Some(Argument::Int(value) | Argument::Enumerator(value)) => Ok(i128::from(*value)),
            _ => Err(RuleError::Unsuited(format!(
                "the call has no integer '{name}'"
            ))),
        }
    }

    /// A text.
    ///
    /// # Errors
    /// Where the argument is something else, or varies from call to call.
    pub fn text(&self, name: &str) -> Result<&'a str, RuleError> {
        match (self.argument(name), self.dictionary) {
            (Some(Argument::Text(id)), Some(dictionary)) => dictionary.text(*id),
            _ => None,
        }
        .map(String::as_str)
        .ok_or_else(|| RuleError::Unsuited(format!("the call has no text '{name}'")))
    }

    /// A bool.
    ///
    /// # Errors
    /// Where the argument is something else.
    pub fn boolean(&self, name: &str) -> Result<bool, RuleError> {
        match self.argument(name) {
            Some(Argument::Bool(value)) => Ok(*value),
            Some(Argument::Int(value)) => Ok(*value != 0),
            _ => Err(RuleError::Unsuited(format!(
                "the call has no bool '{name}'"
            ))),
        }
    }

    /// A list of bools.
    ///
    /// # Errors
    /// Where the argument is something else.
    pub fn booleans(&self, name: &str) -> Result<&'a [bool], RuleError> {
        match self.argument(name) {
            Some(Argument::BoolList(list)) => Ok(list),
            _ => Err(RuleError::Unsuited(format!(
                "the call has no bools '{name}'"
            ))),
        }
    }

    /// A number argument (`alpha`, `beta`), wherever the schema has it; `absent` where it has none.
    #[must_use]
    pub fn number(&self, name: &str, absent: f64) -> Number {
        self.argument(name).map_or(Number::Known(absent), number_of)
    }

    /// A number argument as tools see it that look among the keyword arguments alone.
    #[must_use]
    pub fn keyword_number(&self, name: &str, absent: f64) -> Number {
        match self.position(name) {
            Some(at) if self.op.arguments.get(at).is_some_and(|a| a.keyword_only) => {
                self.number(name, absent)
            }
            _ => Number::Known(absent),
        }
    }

    /// Whether the schema says that the op writes the argument.
    #[must_use]
    pub fn writes(&self, name: &str) -> bool {
        self.op
            .arguments
            .iter()
            .any(|a| a.name == name && a.written)
    }

    /// Whether autograd summed two gradients here (see [`call_flags::ACCUMULATION`]).
    #[must_use]
    pub fn is_accumulation(&self) -> bool {
        self.signature.flags & call_flags::ACCUMULATION != 0
    }

    /// When tools that look after the op see the value of an argument: a written one has its new value.
    #[must_use]
    pub fn seen_after(&self, name: &str) -> When {
        if self.writes(name) && !self.values_before {
            When::After
        } else {
            When::Before
        }
    }

    /// The operand that holds an argument's statistics: the tensor itself, or, for values after the op, the
    /// output that is the same tensor.
    fn operand(&self, name: &str, when: When) -> Option<Operand> {
        let at = self.position(name)?;
        let Argument::Tensor(index) = self.signature.arguments.get(at)? else {
            return None;
        };
        let own = Operand::Tensor(*index);
        if when == When::Before || self.pattern.entry(own, when).is_some() {
            return Some(own);
        }
        let alias = &self.op.arguments.get(at)?.alias;
        let output = self
            .op
            .returns
            .iter()
            .position(|r| !alias.is_empty() && r.alias == *alias)?;
        match self.signature.outputs.get(output)? {
            Argument::Tensor(index) => Some(Operand::Tensor(*index)),
            _ => None,
        }
    }

    /// Whether all elements of an argument are 0 or 1.
    ///
    /// # Errors
    /// [`RuleError::Missing`] where that was not asked.
    pub fn binary(&self, name: &str, when: When) -> Result<bool, RuleError> {
        let operand = self.operand(name, when);
        self.operand_is_binary(name, operand, when)
    }

    /// Whether all elements of a tensor of a list are 0 or 1, before the op; `name` is for messages.
    ///
    /// # Errors
    /// As [`Self::binary`].
    pub fn tensor_is_binary(&self, name: &str, tensor: TensorView<'_>) -> Result<bool, RuleError> {
        self.operand_is_binary(name, Some(Operand::Tensor(tensor.index)), When::Before)
    }

    fn operand_is_binary(
        &self,
        name: &str,
        operand: Option<Operand>,
        when: When,
    ) -> Result<bool, RuleError> {
        let what = || format!("whether '{name}' is binary");
        let operand = operand.ok_or_else(|| self.missing("T1", &what(), None))?;
        let entry = self.pattern.entry(operand, when);
        match entry.and_then(|e| e.binary) {
            Some(binary) => {
                self.note(&format!("binary({name})"), i128::from(binary));
                Ok(binary)
            }
            None => Err(self.missing("T1", &what(), entry.map(|e| e.state))),
        }
    }

    /// The nonzero elements of an argument, summed over all calls of the row.
    ///
    /// # Errors
    /// [`RuleError::Missing`] where they were not counted.
    pub fn nonzeros(&self, name: &str, when: When) -> Result<i128, RuleError> {
        let what = || format!("the nonzeros of '{name}'");
        let operand = self
            .operand(name, when)
            .ok_or_else(|| self.missing("T1", &what(), None))?;
        let sum = self.integer_sum(operand, when, fields::NONZEROS, "T1", what)?;
        Ok(self.note(&format!("nonzeros({name})"), sum))
    }

    /// The nonzero elements of a tensor of a list, before the op, summed over all calls; `name` is for messages.
    ///
    /// # Errors
    /// As [`Self::nonzeros`].
    pub fn nonzeros_of_tensor(
        &self,
        name: &str,
        tensor: TensorView<'_>,
    ) -> Result<i128, RuleError> {
        let what = || format!("the nonzeros of '{name}'");
        let operand = Operand::Tensor(tensor.index);
        let sum = self.integer_sum(operand, When::Before, fields::NONZEROS, "T1", what)?;
        Ok(self.note(&format!("nonzeros({name})"), sum))
    }

    /// The nonzeros of a convolution's input, each weighted by how many outputs it feeds, over all calls.
    ///
    /// # Errors
    /// [`RuleError::Missing`] where they were not counted.
    pub fn fan_out_nonzeros(&self, name: &str) -> Result<i128, RuleError> {
        let what = || format!("the fan-out of the nonzeros of '{name}'");
        let operand = self
            .operand(name, When::Before)
            .ok_or_else(|| self.missing("T2", &what(), None))?;
        let sum = self.integer_sum(operand, When::Before, fields::FAN_OUT_NONZEROS, "T2", what)?;
        Ok(self.note(&format!("fan_out_nonzeros({name})"), sum))
    }

    /// The sum over the product of two binary factors, over all calls.
    ///
    /// # Errors
    /// [`RuleError::Missing`] where it was not computed.
    pub fn product_sum(&self) -> Result<i128, RuleError> {
        let when = if self.pattern.entry(Operand::Product, When::After).is_some() {
            When::After
        } else {
            When::Before
        };
        let what = || "the sum over the product of the two binary factors".to_owned();
        let sum = self.integer_sum(Operand::Product, when, fields::PRODUCT_SUM, "T4", what)?;
        Ok(self.note("product_sum", sum))
    }

    /// Elements of the product of two binary factors that are not zero, over all calls.
    ///
    /// # Errors
    /// [`RuleError::Missing`] where they were not counted.
    pub fn nonempty_products(&self) -> Result<i128, RuleError> {
        let when = if self.pattern.entry(Operand::Product, When::After).is_some() {
            When::After
        } else {
            When::Before
        };
        let what = || "the nonzeros of the product of the two binary factors".to_owned();
        let field = fields::NONEMPTY_OUTPUTS;
        let sum = self.integer_sum(Operand::Product, when, field, "T3", what)?;
        Ok(self.note("nonzeros(product)", sum))
    }

    /// Rows or columns of a binary factor that have a spike, or the outputs with one in their receptive field
    /// ([`fields::NONEMPTY_ROWS`], [`fields::NONEMPTY_COLUMNS`], [`fields::NONEMPTY_OUTPUTS`]), over all calls.
    ///
    /// # Errors
    /// [`RuleError::Missing`] where they were not counted.
    pub fn nonempty(&self, name: &str, field: u32) -> Result<i128, RuleError> {
        let kind = match field {
            fields::NONEMPTY_ROWS => "rows",
            fields::NONEMPTY_COLUMNS => "columns",
            _ => "outputs",
        };
        let what = || format!("the {kind} with a spike of '{name}'");
        let operand = self
            .operand(name, When::Before)
            .ok_or_else(|| self.missing("T3", &what(), None))?;
        let sum = self.integer_sum(operand, When::Before, field, "T3", what)?;
        Ok(self.note(&format!("{kind} with a spike({name})"), sum))
    }

    fn integer_sum(
        &self,
        operand: Operand,
        when: When,
        field: u32,
        level: &'static str,
        what: impl Fn() -> String,
    ) -> Result<i128, RuleError> {
        let state = self.pattern.entry(operand, when).map(|e| e.state);
        let at = integer_position(self.pattern, operand, when, field);
        let sum = at
            .and_then(|at| self.integer_sums.get(at))
            .ok_or_else(|| self.missing(level, &what(), state))?;
        i128::try_from(*sum).map_err(|_| RuleError::Unsuited(format!("{} overflow", what())))
    }

    fn missing(&self, level: &'static str, what: &str, state: Option<State>) -> RuleError {
        let way_out = match state {
            Some(State::NotTaken(why)) => WayOut::NotTaken(why),
            Some(State::Lost) => WayOut::Lost,
            Some(State::Pending) => WayOut::Pending,
            Some(State::Present) | None if level == "T3" => WayOut::Record(needs::FULL_FLAG),
            Some(State::Present) | None
                if needs::rules_need(&self.op.qualified_name()).is_some() =>
            {
                WayOut::Record(needs::RULES_FLAG)
            }
            Some(State::Present) | None => WayOut::Record(needs::ALL_FLAG),
        };
        let what = format!("{what} of {}", self.op.qualified_name());
        RuleError::Missing(Box::new(MissingLevel {
            level,
            what,
            way_out,
        }))
    }
}

fn number_of(argument: &Argument) -> Number {
    match argument {
        #[expect(
            clippy::cast_precision_loss,
            reason = "only 0 and 1 are told apart from the rest"
        )]
        Argument::Int(value) => Number::Known(*value as f64),
        Argument::Float(value) => Number::Known(*value),
        Argument::Bool(value) => Number::Known(f64::from(u8::from(*value))),
        _ => Number::Varying,
    }
}

/// The place of an integer statistic among the integer sums of a pattern's row.
pub(crate) fn integer_position(
    pattern: &Pattern,
    operand: Operand,
    when: When,
    field: u32,
) -> Option<usize> {
    let integers = |mask: u32| (mask & 0xffff).count_ones() as usize;
    let mut at = 0;
    for entry in &pattern.entries {
        if entry.operand == operand && entry.when == when {
            return (entry.fields & field != 0).then(|| at + integers(entry.fields & (field - 1)));
        }
        at += integers(entry.fields);
    }
    None
}

const fn not_taken(why: NotTaken) -> &'static str {
    match why {
        NotTaken::Layout => "the layout has no plain elements (sparse, nested, quantized, mkldnn)",
        NotTaken::LazyBit => {
            "the tensor is conjugated or negated lazily, its bytes are not its values"
        }
        NotTaken::Subclass => "the tensor is a Python subclass",
        NotTaken::Device => "statistics are not taken on that device",
        NotTaken::DType => "statistics are not taken of that element type",
        NotTaken::NoData => "the tensor has no data",
        NotTaken::Capturing => "a CUDA graph was being captured",
        NotTaken::DeviceFull => {
            "the device's ring was full, or the call has more operands than one launch takes"
        }
    }
}
