//! Which statistics a call gets, and taking them.
//!
//! Inputs are looked at before the op runs, written arguments again after it, outputs after it. Nothing is looked at where
//! there is nothing to see: other devices, lazy bits, layouts without plain elements get a reason instead of numbers.

use optape_trace::needs::{self, Product, Within};
use optape_trace::{
    DType, Elements, NotTaken, OpDef, Operand, Pattern, PatternEntry, State, TextId, VALUE_LIMIT,
    When, fields, pack_bits, tensor_flags,
};

use super::device::{self, Asking};
use super::full;
use super::inference::Inference;
use super::settings::Settings;
use crate::abi::{Call, Tensor, word};
use crate::statistics::{
    self, Answer, Geometry, Question, View, product_sum_broadcast, product_sum_convolution,
    product_sum_linear, product_sum_matrix,
};

/// `--stats`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Preset {
    /// T0, scopes, stages.
    None,
    /// What mac, ac and synop need.
    #[default]
    Rules,
    /// Everything of every tensor.
    All,
    /// What the energy models need: `--level full`.
    Full,
}

impl Preset {
    /// `none`, `rules`, `all`, `full`.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "none" => Some(Self::None),
            "rules" => Some(Self::Rules),
            "all" => Some(Self::All),
            "full" => Some(Self::Full),
            _ => None,
        }
    }

    /// As flags, environment and traces spell it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Rules => "rules",
            Self::All => "all",
            Self::Full => "full",
        }
    }
}

/// What is looked at of one op's calls.
pub(super) struct OpPlan {
    /// Per argument: the question, if any.
    arguments: Vec<Option<Question>>,
    /// Per argument: the op writes it.
    pub(super) written: Vec<bool>,
    /// Every output, too.
    outputs: Option<Question>,
    pub(super) product: Option<(u32, u32, Product)>,
    /// Other questions in some places, and what is not empty of binary factors: `--level full`.
    more: Option<Box<More>>,
    /// Where a convolution's arguments stand.
    convolution: Option<ConvolutionArguments>,
    /// Minimum and maximum, too.
    pub(super) extremes: bool,
    /// Inputs are after the op what they were before it: a GPU may be asked about them together with the outputs, in one launch.
    inputs_last: bool,
    /// May write what its schema does not say.
    pub(super) opaque: bool,
    /// How the result's values follow from the operands', where they do.
    pub(super) inference: Option<Inference>,
    /// A call of a function, which ops run inside of.
    pub(super) function: bool,
    /// Anything is looked at before the op runs.
    pub(super) looks_before: bool,
    /// Anything is looked at after it.
    pub(super) looks_after: bool,
    /// How long its work takes on a GPU is wanted.
    pub(super) timed: bool,
    /// Which argument says the device that the result is to be on, where calls are timed.
    pub(super) device_argument: Option<usize>,
}

/// What [`Preset::Full`] looks at.
#[derive(Default)]
struct More {
    /// Where the questions below hold.
    within: Option<Within>,
    /// Per argument.
    arguments: Vec<Option<Question>>,
    /// Per return value.
    outputs: Vec<Option<Question>>,
}

impl More {
    /// The questions, if they hold for a call.
    fn here(&self, call: &Call) -> Option<&Self> {
        let here = match self.within? {
            _ if call.graph_task != 0 => false,
            Within::Forward => true,
            Within::Neuron => full::in_neuron(),
        };
        here.then_some(self)
    }
}

struct ConvolutionArguments {
    stride: Option<usize>,
    padding: Option<usize>,
    dilation: Option<usize>,
    transposed: Option<usize>,
    output_padding: Option<usize>,
    groups: Option<usize>,
    /// `conv_transpose*d` has no argument that says so.
    always_transposed: bool,
}

impl OpPlan {
    pub(super) fn new(op: &OpDef, settings: &Settings) -> Self {
        let preset = settings.statistics;
        let name = op.qualified_name();
        let line = needs::rules_need(&name);
        let function = op.function().is_some();
        let index = |argument: &str| op.arguments.iter().position(|a| a.name == argument);
        let arguments: Vec<Option<Question>> = op
            .arguments
            .iter()
            .map(|a| match (preset, line.and_then(|l| l.argument(&a.name))) {
                (Preset::None, _) => None,
                (Preset::All, _) => Some(Question::Full),
                (Preset::Rules | Preset::Full, _) if function => {
                    Some(Question::from(needs::FUNCTION))
                }
                (Preset::Rules | Preset::Full, need) => need.map(Question::from),
            })
            .collect();
        let product = line
            .filter(|_| preset != Preset::None)
            .and_then(|l| l.product)
            .and_then(|(a, b, kind)| {
                Some((
                    u32::try_from(index(a)?).ok()?,
                    u32::try_from(index(b)?).ok()?,
                    kind,
                ))
            });
        let convolution =
            matches!(product, Some((_, _, Product::Convolution))).then(|| ConvolutionArguments {
                stride: index("stride"),
                padding: index("padding"),
                dilation: index("dilation"),
                transposed: index("transposed"),
                output_padding: index("output_padding"),
                groups: index("groups"),
                always_transposed: op.name.contains("conv_transpose"),
            });
        let namespace = op.name.split("::").next().unwrap_or_default();
        let written: Vec<bool> = op.arguments.iter().map(|a| a.written).collect();
        let outputs = (preset == Preset::All).then_some(Question::Full);
        let more = (preset == Preset::Full)
            .then(|| needs::full_needs(&name))
            .map(|line| {
                Box::new(line.map_or_else(More::default, |line| {
                    More {
                        within: Some(line.within),
                        arguments: op
                            .arguments
                            .iter()
                            .map(|a| line.needs.argument(&a.name).map(Question::from))
                            .collect(),
                        outputs: (0..op.returns.len())
                            .map(|index| line.needs.returned(index).map(Question::from))
                            .collect(),
                    }
                }))
            });
        let again = |arguments: &[Option<Question>]| {
            arguments
                .iter()
                .zip(&written)
                .any(|(a, w)| *w && a.is_some())
        };
        let asked = |questions: &[Option<Question>]| questions.iter().any(Option::is_some);
        let (more_before, more_after) = more.as_ref().map_or((false, false), |more| {
            (
                asked(&more.arguments),
                asked(&more.outputs) || again(&more.arguments),
            )
        });
        let inference = Inference::of(op).filter(|_| preset != Preset::None);
        let opaque =
            !function && !matches!(namespace, "aten" | "prim" | "prims" | "profiler" | "optape");
        // Running means are written without a word in the schema.
        let inputs_last = outputs.is_some()
            && !function
            && !opaque
            && !written.contains(&true)
            && index("running_mean").is_none();
        let timed = settings.times_gpus() && !function && may_compute(op, namespace);
        Self {
            timed,
            device_argument: index("device").filter(|_| timed),
            inputs_last,
            looks_before: asked(&arguments) || more_before,
            looks_after: outputs.is_some() || again(&arguments) || more_after,
            more,
            inference,
            arguments,
            written,
            outputs,
            product,
            convolution,
            extremes: preset == Preset::All,
            function,
            opaque,
        }
    }
}

/// Whether a call may have work for a GPU: it gives more than a view of what it is given, and more than memory without values.
fn may_compute(op: &OpDef, namespace: &str) -> bool {
    let name = op.name.split("::").nth(1).unwrap_or_default();
    let makes_memory = ["empty", "new_empty"]
        .iter()
        .any(|prefix| name.starts_with(prefix));
    let writes = op.arguments.iter().any(|a| a.written);
    let is_view = !writes && op.returns.iter().any(|r| !r.alias.is_empty());
    match namespace {
        "profiler" | "optape" => false,
        "aten" if makes_memory => false,
        _ => !is_view,
    }
}

/// Most numbers of one operand: nonzeros, fan-out nonzeros, nonempty outputs, active sites, sum, minimum, maximum, fan-out sum.
const MOST_NUMBERS: usize = 8;
/// Operands from here on are no tensors. Blocks of channels follow.
pub(super) const PRODUCT: u16 = 0xc000;
/// The call itself.
pub(super) const CALL: u16 = u16::MAX;

/// Texts that every stream knows under these numbers.
pub(super) const WELL_KNOWN_TEXTS: [&str; 3] = ["", "same", "valid"];
const TEXT_SAME: TextId = TextId(1);

/// The statistics of one operand of a call.
#[derive(Clone, Copy)]
pub(super) struct Slot {
    /// operand u16 | when u8 << 16 | state u8 << 20 | binary u8 << 28 | fields << 32: one word of the pattern's key.
    pub(super) meta: u64,
    pub(super) numbers: [u64; MOST_NUMBERS],
    /// To be remembered for later calls.
    pub(super) answer: Option<Answer>,
}

/// States in [`Slot::meta`], beside 0 for present; from the last on, reasons for not taking statistics.
const PENDING: u64 = 1;
const NOT_TAKEN: u64 = 3;

impl Slot {
    pub(super) fn missing(operand: u16, when: When, reason: NotTaken) -> Self {
        Self::without_numbers(operand, when, NOT_TAKEN + reason as u64)
    }

    /// The numbers will come.
    pub(super) fn pending(operand: u16, when: When) -> Self {
        Self::without_numbers(operand, when, PENDING)
    }

    fn without_numbers(operand: u16, when: When, state: u64) -> Self {
        Self {
            meta: u64::from(operand) | (when as u64) << 16 | state << 20,
            numbers: [0; MOST_NUMBERS],
            answer: None,
        }
    }

    pub(super) fn is_pending(&self) -> bool {
        self.meta >> 20 & 0xff == PENDING
    }

    /// The numbers will not come.
    pub(super) fn give_up(&mut self, reason: NotTaken) {
        self.meta = self.meta & !(0xff << 20) | (NOT_TAKEN + reason as u64) << 20;
    }

    pub(super) fn fields(&self) -> u32 {
        (self.meta >> 32) as u32
    }

    pub(super) fn present(
        operand: u16,
        when: When,
        binary: Option<bool>,
        numbers: &[(u32, u64)],
    ) -> Self {
        let binary = binary.map_or(0, |b| 1 + u64::from(b));
        let mut slot = Self {
            meta: 0,
            numbers: [0; MOST_NUMBERS],
            answer: None,
        };
        let mut mask = 0u32;
        // `numbers` is sorted by field, as the pattern wants them.
        for (place, (field, number)) in slot.numbers.iter_mut().zip(numbers) {
            mask |= field;
            *place = *number;
        }
        slot.meta = u64::from(operand) | (when as u64) << 16 | binary << 28 | u64::from(mask) << 32;
        slot
    }

    pub(super) fn is_binary(&self) -> bool {
        self.meta >> 28 & 3 == 2
    }

    pub(super) fn operand(&self) -> Option<usize> {
        let operand = self.meta as u16;
        (operand < PRODUCT).then_some(usize::from(operand))
    }

    /// The operand, or [`PRODUCT`], or what is behind it.
    pub(super) fn operand_code(&self) -> u16 {
        self.meta as u16
    }

    /// Adds a number that was not there, if there is room for it.
    pub(super) fn add(&mut self, field: u32, number: u64) {
        let fields = (self.meta >> 32) as u32;
        let place = (fields & (field - 1)).count_ones() as usize;
        let count = fields.count_ones() as usize;
        if fields & field == 0 && count < MOST_NUMBERS {
            self.numbers.copy_within(place..count, place + 1);
            self.numbers[place] = number;
            self.meta |= u64::from(field) << 32;
        }
    }

    pub(super) fn is_before(&self) -> bool {
        self.meta >> 16 & 0xf == When::Before as u64
    }

    pub(super) fn numbers(&self) -> &[u64] {
        &self.numbers[..((self.meta >> 32) as u32).count_ones() as usize]
    }
}

/// The reason with this number.
pub(super) fn reason(number: u64) -> NotTaken {
    const REASONS: [NotTaken; 8] = [
        NotTaken::Layout,
        NotTaken::LazyBit,
        NotTaken::Subclass,
        NotTaken::Device,
        NotTaken::DType,
        NotTaken::NoData,
        NotTaken::Capturing,
        NotTaken::DeviceFull,
    ];
    REASONS
        .get(number as usize)
        .copied()
        .unwrap_or(NotTaken::NoData)
}

/// The pattern that slots with these metas make.
pub(super) fn pattern(metas: &[u64]) -> Pattern {
    let entries = metas.iter().map(|meta| PatternEntry {
        operand: match *meta as u16 {
            PRODUCT => Operand::Product,
            CALL => Operand::Call,
            channels @ PRODUCT.. => Operand::Channels(channels - PRODUCT - 1),
            tensor => Operand::Tensor(tensor),
        },
        when: if meta >> 16 & 0xf == When::Before as u64 {
            When::Before
        } else {
            When::After
        },
        state: match meta >> 20 & 0xff {
            0 => State::Present,
            PENDING => State::Pending,
            n => State::NotTaken(reason(n.saturating_sub(NOT_TAKEN))),
        },
        binary: match meta >> 28 & 3 {
            1 => Some(false),
            2 => Some(true),
            _ => None,
        },
        fields: (meta >> 32) as u32,
    });
    Pattern {
        entries: entries.collect(),
    }
}

/// Orders slots as [`Pattern`] wants them: by operand, tensors first, then blocks of channels, the call itself last, then by time.
pub(super) fn sort(slots: &mut [Slot]) {
    slots.sort_unstable_by_key(|s| (s.meta as u16, s.meta >> 16 & 0xf));
}

/// The sizes of a tensor that the hook hands over.
pub(super) fn sizes(tensor: &Tensor) -> &[i64] {
    if tensor.dim == 0 {
        // May come with null.
        &[]
    } else {
        // SAFETY: the hook's promise: `sizes` leads to `dim` integers for as long as the call lasts.
        unsafe { std::slice::from_raw_parts(tensor.sizes, usize::from(tensor.dim)) }
    }
}

/// The strides of a tensor that has them (`strides` is not null).
pub(super) fn strides(tensor: &Tensor) -> &[i64] {
    if tensor.dim == 0 {
        &[]
    } else {
        // SAFETY: as `sizes`; the caller has looked at `strides`.
        unsafe { std::slice::from_raw_parts(tensor.strides, usize::from(tensor.dim)) }
    }
}

/// The tensors of a call.
pub(super) fn tensors(call: &Call) -> &[Tensor] {
    if call.tensor_count == 0 {
        return &[];
    }
    // SAFETY: the hook's promise: `tensors` leads to `tensor_count` of them for as long as the call lasts.
    unsafe { std::slice::from_raw_parts(call.tensors, call.tensor_count as usize) }
}

/// The structure words of a call.
pub(super) fn words(call: &Call) -> &[u64] {
    if call.word_count == 0 {
        return &[];
    }
    // SAFETY: as `tensors`.
    unsafe { std::slice::from_raw_parts(call.words, call.word_count as usize) }
}

/// The payload words of a call.
pub(super) fn payload(call: &Call) -> &[u64] {
    if call.payload_count == 0 {
        return &[];
    }
    // SAFETY: as `tensors`.
    unsafe { std::slice::from_raw_parts(call.payload, call.payload_count as usize) }
}

/// Whether the tensor has plain elements, wherever they are.
pub(super) fn is_plain(tensor: &Tensor) -> Result<(), NotTaken> {
    const LAYOUTS: u32 = tensor_flags::SPARSE
        | tensor_flags::NESTED
        | tensor_flags::QUANTIZED
        | tensor_flags::MKLDNN;
    if tensor.flags & LAYOUTS != 0 {
        return Err(NotTaken::Layout);
    }
    if tensor.flags & (tensor_flags::CONJUGATE | tensor_flags::NEGATIVE | tensor_flags::ZERO) != 0 {
        return Err(NotTaken::LazyBit);
    }
    if tensor.flags & tensor_flags::SUBCLASS != 0 {
        return Err(NotTaken::Subclass);
    }
    if tensor.flags & tensor_flags::NO_VALUES != 0 {
        return Err(NotTaken::NoData);
    }
    Ok(())
}

/// The elements of a tensor in host memory.
pub(super) fn view(tensor: &Tensor) -> Result<View<'_>, NotTaken> {
    is_plain(tensor)?;
    if tensor.device_kind != 0 {
        return Err(NotTaken::Device);
    }
    let empty = sizes(tensor).contains(&0);
    if (tensor.data.is_null() && !empty) || (tensor.strides.is_null() && tensor.dim > 0) {
        return Err(NotTaken::NoData);
    }
    let strides: &[i64] = if tensor.dim == 0 {
        &[]
    } else {
        strides(tensor)
    };
    // SAFETY: a plain strided CPU tensor (checked above) whose elements the hook found readable; the op has not begun or has
    // ended, so nothing of this call writes it meanwhile. Another thread of the program might: then the program races
    // with itself, and torch would read the same torn values.
    Ok(unsafe { View::new(tensor.data, DType(tensor.dtype), sizes(tensor), strides) })
}

/// The elements of a tensor to be kept: bits where all are 0 or 1, else, unless only spikes are wanted, as they are.
/// `Err`: how many bytes there are, which are too many.
pub(super) fn elements(tensor: &Tensor, only_spikes: bool) -> Result<Option<Elements>, u64> {
    let Ok(view) = view(tensor) else {
        return Ok(None);
    };
    let dtype = DType(tensor.dtype);
    let bytes = view.elements().unwrap_or(0).saturating_mul(dtype.bytes());
    if only_spikes && first_is_other(tensor) {
        return Ok(None);
    }
    let Some(raw) = view.gather(VALUE_LIMIT) else {
        return if bytes > VALUE_LIMIT as u64 {
            Err(bytes)
        } else {
            Ok(None)
        };
    };
    Ok(match pack_bits(dtype, &raw) {
        Some(bits) => Some(Elements::Bits(bits)),
        None => (!only_spikes).then_some(Elements::Raw(raw)),
    })
}

/// Looks at the inputs, and asks about those on a device. `recall` gives what is known already.
pub(super) fn before(
    plan: &OpPlan,
    call: &Call,
    mut recall: impl FnMut(&Tensor) -> Option<Answer>,
    asking: &mut Asking,
    slots: &mut Vec<Slot>,
) {
    let first = slots.len();
    let inputs = tensors(call).iter().take(call.input_count as usize);
    let more = plan.more.as_deref().and_then(|more| more.here(call));
    let arguments = more.map_or(&plan.arguments, |more| &more.arguments);
    for (index, tensor) in inputs.enumerate() {
        let Some(Some(question)) = arguments.get(tensor.argument as usize) else {
            continue;
        };
        if tensor.flags & tensor_flags::WRAPPED_NUMBER != 0 {
            continue;
        }
        let Some(operand) = operand(index) else {
            break;
        };
        if device::has(tensor) {
            if !plan.inputs_last {
                slots.push(asking.ask(plan, call, operand, When::Before, tensor, *question));
            }
            continue;
        }
        let factor = plan
            .product
            .is_some_and(|(a, _, kind)| a == tensor.argument && kind == Product::Convolution);
        let slot = if factor {
            convolution(plan, call, operand, tensor, *question, &mut recall)
        } else {
            look(plan, operand, When::Before, tensor, *question, &mut recall)
        };
        slots.push(slot);
    }
    slots.extend(asking.product(plan, call));
    if let Some((a, b, kind)) = plan.product {
        let find = |argument: u32, slots: &[Slot]| {
            slots.iter().find_map(|s| {
                let tensor = tensors(call).get(s.operand()?)?;
                (tensor.argument == argument && s.is_binary()).then_some(*tensor)
            })
        };
        let slots_so_far = &slots[first..];
        if let (Some(a), Some(b)) = (find(a, slots_so_far), find(b, slots_so_far))
            && let Some(sum) = product(plan, call, &a, &b, kind)
        {
            slots.push(Slot::present(
                PRODUCT,
                When::Before,
                None,
                &[(fields::PRODUCT_SUM, sum)],
            ));
        }
        if plan.more.is_some() {
            full::occupancy(plan, call, (a, b, kind), slots, first);
        }
    }
}

/// The number of a tensor among the operands, if it has one.
fn operand(index: usize) -> Option<u16> {
    u16::try_from(index).ok().filter(|index| *index < PRODUCT)
}

/// Looks at what the op wrote and returned, and asks about what of it is on a device.
pub(super) fn after(plan: &OpPlan, call: &Call, asking: &mut Asking, slots: &mut Vec<Slot>) {
    let more = plan.more.as_deref().and_then(|more| more.here(call));
    let arguments = more.map_or(&plan.arguments, |more| &more.arguments);
    for (index, tensor) in tensors(call).iter().enumerate() {
        let output = index >= call.input_count as usize;
        let argument = tensor.argument as usize;
        if !output
            && plan.inputs_last
            && device::has(tensor)
            && tensor.flags & tensor_flags::WRAPPED_NUMBER == 0
            && let (Some(Some(question)), Some(operand)) = (arguments.get(argument), operand(index))
        {
            slots.push(asking.ask(plan, call, operand, When::Before, tensor, *question));
            continue;
        }
        let question = if output {
            more.map_or(plan.outputs, |more| {
                more.outputs.get(argument).copied().flatten()
            })
        } else if plan.written.get(argument).copied().unwrap_or(false) {
            arguments.get(argument).copied().flatten()
        } else {
            None
        };
        let (Some(question), Some(operand)) = (question, operand(index)) else {
            continue;
        };
        if tensor.flags & tensor_flags::WRAPPED_NUMBER != 0 {
            continue;
        }
        if device::has(tensor) {
            slots.push(asking.ask(plan, call, operand, When::After, tensor, question));
        } else {
            slots.push(look(
                plan,
                operand,
                When::After,
                tensor,
                question,
                &mut |_| None,
            ));
        }
    }
    if plan.inputs_last {
        slots.extend(asking.product(plan, call));
    }
}

/// Whether the operand is zeros and ones, and how many: for an inference, not for the call's record. Nothing where it is known
/// already.
pub(super) fn premise(
    tensor: &Tensor,
    recall: impl FnOnce(&Tensor) -> Option<Answer>,
) -> Option<Answer> {
    let view = view(tensor).ok()?;
    if first_is_other(tensor) || recall(tensor).is_some() {
        return None;
    }
    statistics::measure(&view, Question::Binary).ok()
}

fn look(
    plan: &OpPlan,
    operand: u16,
    when: When,
    tensor: &Tensor,
    question: Question,
    recall: &mut impl FnMut(&Tensor) -> Option<Answer>,
) -> Slot {
    let view = match view(tensor) {
        Ok(view) => view,
        Err(reason) => return Slot::missing(operand, when, reason),
    };
    // Most operands say that they are not binary in their first element, and cheaper than any memory can.
    if question == Question::Binary && first_is_other(tensor) {
        let answer = Answer {
            binary: Some(false),
            ..Answer::default()
        };
        return slot(plan, operand, when, &answer, question);
    }
    if let Some(answer) = recall(tensor).filter(|a| answers(a, question)) {
        return slot(plan, operand, when, &answer, question);
    }
    match statistics::measure(&view, question) {
        Ok(answer) => Slot {
            answer: Some(answer),
            ..slot(plan, operand, when, &answer, question)
        },
        Err(reason) => Slot::missing(operand, when, reason),
    }
}

/// Whether the first element is there, and neither 0 nor 1.
fn first_is_other(tensor: &Tensor) -> bool {
    if tensor.data.is_null() || sizes(tensor).contains(&0) {
        return false;
    }
    // SAFETY: one element of a tensor that `view` found to be plain, and that has elements.
    let first = unsafe { View::new(tensor.data, DType(tensor.dtype), &[], &[]) };
    statistics::measure(&first, Question::Binary).is_ok_and(|a| a.binary == Some(false))
}

/// Whether a remembered answer holds what is asked now.
fn answers(answer: &Answer, question: Question) -> bool {
    match question {
        Question::Binary => {
            answer.binary == Some(false) || (answer.binary.is_some() && answer.nonzeros.is_some())
        }
        Question::Nonzeros => answer.nonzeros.is_some(),
        Question::Full => {
            answer.binary.is_some() && answer.nonzeros.is_some() && answer.sum.is_some()
        }
    }
}

fn slot(plan: &OpPlan, operand: u16, when: When, answer: &Answer, question: Question) -> Slot {
    with_fan_out(plan.extremes, operand, when, answer, question, None, None)
}

/// The numbers of an answer. `extremes`: minimum and maximum, too.
pub(super) fn with_fan_out(
    extremes: bool,
    operand: u16,
    when: When,
    answer: &Answer,
    question: Question,
    fan_out_nonzeros: Option<u64>,
    fan_out_sum: Option<f64>,
) -> Slot {
    let full = question == Question::Full;
    let nonzeros = answer
        .nonzeros
        .filter(|_| question != Question::Binary || answer.binary == Some(true));
    let candidates = [
        (fields::NONZEROS, nonzeros),
        (fields::FAN_OUT_NONZEROS, fan_out_nonzeros),
        (fields::SUM, answer.sum.filter(|_| full).map(f64::to_bits)),
        (
            fields::MINIMUM,
            answer
                .minimum
                .filter(|_| full && extremes)
                .map(f64::to_bits),
        ),
        (
            fields::MAXIMUM,
            answer
                .maximum
                .filter(|_| full && extremes)
                .map(f64::to_bits),
        ),
        (
            fields::FAN_OUT_SUM,
            fan_out_sum.filter(|_| full).map(f64::to_bits),
        ),
    ];
    let mut numbers = [(0, 0); MOST_NUMBERS];
    let mut count = 0;
    for (field, number) in candidates {
        if let Some(number) = number {
            numbers[count] = (field, number);
            count += 1;
        }
    }
    Slot::present(operand, when, answer.binary, &numbers[..count])
}

fn convolution(
    plan: &OpPlan,
    call: &Call,
    operand: u16,
    tensor: &Tensor,
    question: Question,
    recall: &mut impl FnMut(&Tensor) -> Option<Answer>,
) -> Slot {
    let view = match view(tensor) {
        Ok(view) => view,
        Err(reason) => return Slot::missing(operand, When::Before, reason),
    };
    if question == Question::Binary
        && (first_is_other(tensor) || recall(tensor).is_some_and(|a| a.binary == Some(false)))
    {
        let answer = Answer {
            binary: Some(false),
            ..Answer::default()
        };
        return slot(plan, operand, When::Before, &answer, question);
    }
    let mut room = GeometryRoom::default();
    let measured = geometry(plan, call, &mut room)
        .ok_or(NotTaken::Layout)
        .and_then(|geometry| statistics::measure_convolution(&view, &geometry, question));
    match measured {
        Ok(found) => Slot {
            answer: Some(found.answer),
            ..with_fan_out(
                plan.extremes,
                operand,
                When::Before,
                &found.answer,
                question,
                found.fan_out_nonzeros,
                found.fan_out_sum,
            )
        },
        Err(reason) => Slot::missing(operand, When::Before, reason),
    }
}

fn product(plan: &OpPlan, call: &Call, a: &Tensor, b: &Tensor, kind: Product) -> Option<u64> {
    let (a, b) = (view(a).ok()?, view(b).ok()?);
    match kind {
        Product::Matrix => product_sum_matrix(&a, &b).ok(),
        Product::Linear => product_sum_linear(&a, &b).ok(),
        Product::Broadcast => product_sum_broadcast(&a, &b).ok(),
        Product::Convolution => {
            let mut room = GeometryRoom::default();
            let geometry = geometry(plan, call, &mut room)?;
            product_sum_convolution(&a, &b, &geometry).ok()
        }
    }
}

/// Where a geometry's lists live.
#[derive(Default)]
pub(super) struct GeometryRoom {
    stride: [i64; 3],
    padding: [i64; 3],
    dilation: [i64; 3],
    output: [i64; 3],
}

/// One argument of a call, read from its words.
pub(super) enum Value<'a> {
    Integers(&'a [u64]),
    Integer(i64),
    /// The float +0.0.
    Zero,
    /// The float 1.0.
    One,
    Bool(bool),
    Text(u64),
    /// `c10::DeviceType`, and -1 for the current one of these.
    Device {
        kind: u8,
        index: i8,
    },
    Other,
}

/// The words of argument `index`.
pub(super) fn argument<'a>(call: &'a Call, index: usize) -> Option<Value<'a>> {
    let words = words(call);
    let mut at = 0;
    for _ in 0..index {
        at = skip(words, at)?;
    }
    let head = *words.get(at)?;
    let aux = usize::try_from(head >> 8).ok()?;
    Some(match head as u8 {
        word::INT_LIST => Value::Integers(words.get(at + 1..at + 1 + aux)?),
        word::INT => Value::Integer(*words.get(at + 1)? as i64),
        word::FLOAT if aux == 0 => Value::Zero,
        word::FLOAT => Value::One,
        word::BOOL => Value::Bool(aux != 0),
        word::TEXT => Value::Text(head >> 8),
        word::DEVICE => Value::Device {
            kind: aux as u8,
            index: (aux >> 8) as i8,
        },
        _ => Value::Other,
    })
}

/// Where the value behind the one at `at` begins.
fn skip(words: &[u64], at: usize) -> Option<usize> {
    let head = *words.get(at)?;
    let aux = head >> 8;
    let tensor = |head: u64| {
        let dim = (head >> 32 & 0xff) as usize;
        1 + if head >> 56 & 1 == 1 { dim } else { 2 * dim }
    };
    Some(match head as u8 {
        word::TENSOR => at + tensor(head),
        word::TENSOR_LIST => {
            let mut next = at + 1;
            for _ in 0..aux {
                let item = *words.get(next)?;
                next += if item as u8 == word::TENSOR {
                    tensor(item)
                } else {
                    1
                };
            }
            next
        }
        word::INT => at + 2,
        word::INT_LIST | word::BOOL_LIST => at + 1 + usize::try_from(aux).ok()?,
        _ => at + 1,
    })
}

/// The geometry of a convolution call, output sizes worked out from the schema's formula since the op has not run.
pub(super) fn geometry<'a>(
    plan: &OpPlan,
    call: &'a Call,
    room: &'a mut GeometryRoom,
) -> Option<Geometry<'a>> {
    let places = plan.convolution.as_ref()?;
    let (input_argument, weight_argument, _) = plan.product?;
    let find = |argument: u32| {
        tensors(call)
            .iter()
            .take(call.input_count as usize)
            .find(|t| t.argument == argument)
    };
    let input = sizes(find(input_argument)?);
    let weight = sizes(find(weight_argument)?);
    let kernel = weight.get(2..)?;
    let spatial = kernel.len();
    if spatial == 0 || spatial > 3 {
        return None;
    }
    let input = input.get(input.len().checked_sub(spatial)?..)?;
    let transposed = places.always_transposed
        || matches!(
            places.transposed.and_then(|i| argument(call, i)),
            Some(Value::Bool(true))
        );
    let groups = match places.groups.map(|i| argument(call, i)) {
        None => 1,
        Some(Some(Value::Integer(groups))) => groups,
        // More than 64 different numbers of groups were seen: it is payload now, and follows from the channels.
        _ => {
            let channels = *sizes(find(input_argument)?).iter().rev().nth(spatial)?;
            if transposed {
                return None;
            } else {
                channels.checked_div(*weight.get(1)?)?
            }
        }
    };
    let list = |place: Option<usize>, fallback: i64| -> Option<[i64; 3]> {
        let mut list = [fallback; 3];
        match place.and_then(|i| argument(call, i)) {
            None => {}
            Some(Value::Integers(&[one])) => list = [one as i64; 3],
            Some(Value::Integers(values)) if values.len() == spatial => {
                list.iter_mut()
                    .zip(values)
                    .for_each(|(l, v)| *l = *v as i64);
            }
            Some(_) => return None,
        }
        Some(list)
    };
    room.stride = list(places.stride, 1)?;
    room.dilation = list(places.dilation, 1)?;
    let output_padding = list(places.output_padding, 0)?;
    let same = matches!(places.padding.and_then(|i| argument(call, i)), Some(Value::Text(text)) if text == u64::from(TEXT_SAME.0));
    let named = matches!(
        places.padding.and_then(|i| argument(call, i)),
        Some(Value::Text(_))
    );
    room.padding = if named {
        [0; 3]
    } else {
        list(places.padding, 0)?
    };
    for at in 0..spatial {
        let reach = room.dilation[at].checked_mul(kernel[at].checked_sub(1)?)?;
        let step = room.stride[at];
        if step <= 0 {
            return None;
        }
        if same {
            // Keeps the size (torch allows stride 1 alone); the smaller half of the padding stands in front.
            room.padding[at] = reach / 2;
            room.output[at] = input[at];
        } else if transposed {
            room.output[at] = (input[at] - 1).checked_mul(step)? - 2 * room.padding[at]
                + reach
                + output_padding[at]
                + 1;
        } else {
            room.output[at] = (input[at] + 2 * room.padding[at] - reach - 1).div_euclid(step) + 1;
        }
    }
    let outputs_per_group = if transposed {
        *weight.get(1)?
    } else {
        weight.first()?.checked_div(groups)?
    };
    Some(Geometry {
        input,
        kernel,
        stride: &room.stride[..spatial],
        padding: &room.padding[..spatial],
        dilation: &room.dilation[..spatial],
        output: &room.output[..spatial],
        transposed,
        groups,
        outputs_per_group,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_become_a_sorted_pattern() {
        let mut slots = [
            Slot::present(PRODUCT, When::Before, None, &[(fields::PRODUCT_SUM, 5)]),
            Slot::missing(1, When::Before, NotTaken::Device),
            Slot::present(0, When::After, Some(false), &[]),
            Slot::present(
                0,
                When::Before,
                Some(true),
                &[(fields::NONZEROS, 3), (fields::SUM, 3.0f64.to_bits())],
            ),
        ];
        sort(&mut slots);
        let metas: Vec<u64> = slots.iter().map(|s| s.meta).collect();
        let pattern = pattern(&metas);
        let seen: Vec<_> = pattern
            .entries
            .iter()
            .map(|e| (e.operand, e.when, e.state, e.binary))
            .collect();
        assert_eq!(
            seen,
            [
                (Operand::Tensor(0), When::Before, State::Present, Some(true)),
                (Operand::Tensor(0), When::After, State::Present, Some(false)),
                (
                    Operand::Tensor(1),
                    When::Before,
                    State::NotTaken(NotTaken::Device),
                    None
                ),
                (Operand::Product, When::Before, State::Present, None),
            ]
        );
        assert_eq!(pattern.words(), 3);
        assert_eq!(slots.iter().map(|s| s.numbers().len()).sum::<usize>(), 3);
    }

    #[test]
    fn numbers_are_added_in_their_order() {
        let mut slot = Slot::present(
            3,
            When::Before,
            Some(true),
            &[(fields::NONZEROS, 7), (fields::SUM, 9)],
        );
        slot.add(fields::NONEMPTY_OUTPUTS, 8);
        slot.add(fields::FAN_OUT_SUM, 10);
        slot.add(fields::NONEMPTY_OUTPUTS, 99);
        assert_eq!(slot.numbers(), [7, 8, 9, 10]);
        assert!(slot.is_binary());
        let channels = Slot::present(PRODUCT + 3, When::Before, None, &[(fields::ACTIVE_ROWS, 1)]);
        assert_eq!(channels.operand(), None);
        assert_eq!(
            pattern(&[channels.meta]).entries[0].operand,
            Operand::Channels(2)
        );
    }

    #[test]
    fn words_of_arguments_are_found_behind_tensors_and_lists() {
        let tensor = u64::from(word::TENSOR) | (6 | 2 << 24) << 8;
        let words = [
            tensor,
            2,
            3,
            3,
            1,
            u64::from(word::TENSOR_LIST) | 2 << 8,
            u64::from(word::NONE),
            tensor | 1 << 56,
            4,
            4,
            u64::from(word::INT_LIST) | 2 << 8,
            7,
            8,
            u64::from(word::BOOL) | 1 << 8,
            u64::from(word::TEXT) | 1 << 8,
            u64::from(word::INT),
            9,
        ];
        let mut at = 0;
        for end in [5, 10, 13, 14, 15, 17] {
            at = skip(&words, at).unwrap();
            assert_eq!(at, end);
        }
    }
}
