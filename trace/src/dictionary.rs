//! What is written once and named by number afterwards: ops, signatures, scopes, modules, patterns.
//!
//! Every definition stands in the stream before its first use, and belongs to that stream alone.

use bincode::{Decode, Encode};

use crate::ids::{ModuleId, OpId, PatternId, ScopeId, SignatureId, TextId, ThreadId, WatchId};
use crate::statistics::Pattern;

/// One dictionary entry of a stream. Ids of each kind are handed out from 0, without gaps.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
#[non_exhaustive]
pub enum Definition {
    /// An interned text.
    Text(TextId, String),
    /// An operator overload.
    Op(OpId, OpDef),
    /// A call's structure.
    Signature(SignatureId, SignatureDef),
    /// A stack of active modules.
    Scope(ScopeId, ScopeDef),
    /// A module object.
    Module(ModuleId, ModuleDef),
    /// A thread.
    Thread(ThreadId, ThreadDef),
    /// A set of statistics.
    Pattern(PatternId, Pattern),
    /// A watched tensor.
    Watch(WatchId, WatchDef),
}

/// An operator as its schema states it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct OpDef {
    /// `aten::add`.
    pub name: String,
    /// `Tensor`; empty where Python prints `default`.
    pub overload: String,
    /// In schema order.
    pub arguments: Vec<ArgumentDef>,
    /// In schema order.
    pub returns: Vec<ReturnDef>,
}

impl OpDef {
    /// `aten::add.Tensor`, `aten::mm`: the name that rules use.
    #[must_use]
    pub fn qualified_name(&self) -> String {
        if self.overload.is_empty() {
            self.name.clone()
        } else {
            format!("{}.{}", self.name, self.overload)
        }
    }

    /// `aten.add.Tensor`, `aten.mm.default`: as Python prints it.
    #[must_use]
    pub fn python_name(&self) -> String {
        let overload = if self.overload.is_empty() {
            "default"
        } else {
            &self.overload
        };
        format!("{}.{overload}", self.name.replacen("::", ".", 1))
    }

    /// The results that are views: (argument, return value). Both stand in one alias set of the schema, and the op
    /// writes neither.
    pub fn views(&self) -> impl Iterator<Item = (usize, usize)> {
        let arguments = || {
            let unwritten = self.arguments.iter().enumerate();
            unwritten.filter(|(_, a)| !a.written && !a.alias.is_empty())
        };
        self.returns
            .iter()
            .enumerate()
            .filter(|(_, r)| !r.written)
            .flat_map(move |(result, r)| {
                arguments()
                    .filter(move |(_, a)| a.alias == r.alias)
                    .map(move |(argument, _)| (argument, result))
            })
    }
}

/// One argument of a schema.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct ArgumentDef {
    /// `self`, `alpha`.
    pub name: String,
    /// As the schema prints it: `Tensor`, `int[]`, `Scalar`, `Tensor?`.
    pub type_name: String,
    /// Behind the `*` of the schema.
    pub keyword_only: bool,
    /// The default as the schema prints it; `None` where there is none.
    pub default: Option<String>,
    /// The schema says that the op writes it: `Tensor(a!)`.
    pub written: bool,
    /// Alias set letter(s) as the schema prints them, empty where there is none: `a`.
    pub alias: String,
}

/// One return value of a schema.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct ReturnDef {
    /// `Tensor`, `Tensor[]`.
    pub type_name: String,
    /// Alias set letter(s), empty where the value is fresh.
    pub alias: String,
    /// The returned value is one that the op wrote: `Tensor(a!)`.
    pub written: bool,
}

/// Where in a training step an op call stands. Inferred by capture from module calls, the autograd
/// graph task and the optimizer hooks, or said by the program.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub enum Stage {
    /// None of the others: data loading, metrics, initialisation.
    #[default]
    Other,
    /// Inside a call of a root module.
    Forward,
    /// Outside modules, between a root call and backward, grad mode on.
    Loss,
    /// Inside an autograd graph task.
    Backward,
    /// A forward that runs again inside backward (checkpointing).
    Recompute,
    /// Between the optimizer step hooks.
    Optimizer,
}

impl Stage {
    /// All stages, in the order in which reports print them.
    pub const ALL: [Self; 6] = [
        Self::Forward,
        Self::Loss,
        Self::Backward,
        Self::Recompute,
        Self::Optimizer,
        Self::Other,
    ];

    /// The name that flags and reports use.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Other => "other",
            Self::Forward => "forward",
            Self::Loss => "loss",
            Self::Backward => "backward",
            Self::Recompute => "recompute",
            Self::Optimizer => "optimizer",
        }
    }
}

/// Flags of a call, as bits of [`SignatureDef::flags`].
pub mod call_flags {
    /// Grad mode was on.
    pub const GRAD_MODE: u32 = 1 << 0;
    /// Inference mode was on.
    pub const INFERENCE_MODE: u32 = 1 << 1;
    /// No kernel computed values: fake, meta, functional or functorch-wrapped tensors. Counted by no rule.
    pub const NOT_EXECUTED: u32 = 1 << 2;
    /// Autograd summed two gradients with `add_` where a Python dispatch mode would have made it use `add`.
    pub const ACCUMULATION: u32 = 1 << 3;
    /// The running root module is in training mode.
    pub const TRAINING: u32 = 1 << 4;
    /// The module that the call belongs to could not be found; its scope is `Global`.
    pub const UNATTRIBUTED: u32 = 1 << 5;
    /// The table of signatures was full: `arguments`, `outputs` and `tensors` are empty, and the call's structure is lost. Replay
    /// treats it as a missing level.
    pub const STRUCTURE_LOST: u32 = 1 << 6;
}

/// The structure of an op call.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct SignatureDef {
    /// The overload.
    pub op: OpId,
    /// One per schema argument, given or default.
    pub arguments: Vec<Argument>,
    /// One per schema return.
    pub outputs: Vec<Argument>,
    /// Every tensor of the call: those of the arguments in order, then those of the outputs. `inputs` of
    /// them belong to arguments.
    pub tensors: Vec<TensorMeta>,
    /// How many of `tensors` belong to arguments.
    pub inputs: u16,
    /// Bits of [`call_flags`].
    pub flags: u32,
    /// The active modules.
    pub scope: ScopeId,
    /// The stage.
    pub stage: Stage,
    /// The stage's name where the program gave one (`stage("...")`).
    pub stage_name: Option<TextId>,
}

impl SignatureDef {
    /// How many payload words a call of this signature carries (see [`Argument`]).
    #[must_use]
    pub fn payload_words(&self) -> usize {
        self.arguments
            .iter()
            .chain(&self.outputs)
            .map(|a| a.payload_words(&self.tensors))
            .sum()
    }

    /// How many tensors belong to outputs.
    #[must_use]
    pub fn output_tensors(&self) -> usize {
        self.tensors.len().saturating_sub(usize::from(self.inputs))
    }
}

/// An argument's or output's structure. What varies from call to call stands in the call's payload
/// words (`u64`), in the order of the arguments, then the outputs; each variant says how many it takes.
///
/// The floats 0 and 1 (exactly +0.0 and 1.0) are always structure, never payload: a rule may rely on
/// `alpha == 1` being visible here.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub enum Argument {
    /// `None`, or an undefined tensor.
    None,
    /// Index into [`SignatureDef::tensors`]. A wrapped number takes one payload word per scalar component
    /// (f64 bits, i64, or 0/1 for bool; two for complex): its value.
    Tensor(u16),
    /// Tensors of a list; `None` for undefined ones.
    TensorList(Vec<Option<u16>>),
    /// An integer that is structure.
    Int(i64),
    /// An integer that varies: one payload word.
    IntPayload,
    /// A list of integers.
    IntList(Vec<i64>),
    /// A float that is structure (0.0 or 1.0).
    Float(f64),
    /// A float that varies: one payload word, its bits.
    FloatPayload,
    /// A list of floats: one payload word each.
    FloatListPayload(u32),
    /// A complex number: two payload words (real, imaginary).
    ComplexPayload,
    /// A bool.
    Bool(bool),
    /// A list of bools.
    BoolList(Vec<bool>),
    /// A text that is structure.
    Text(TextId),
    /// A text that varies (range names): one payload word, a [`TextId`].
    TextPayload,
    /// A data type argument.
    DType(DType),
    /// A device argument.
    Device(Device),
    /// A layout or memory format, as torch's enumeration numbers it.
    Enumerator(i64),
    /// Anything else, by the name of its type: generators, streams, custom classes.
    Opaque(TextId),
}

impl Argument {
    /// How many payload words the argument takes.
    #[must_use]
    pub fn payload_words(&self, tensors: &[TensorMeta]) -> usize {
        match self {
            Self::IntPayload | Self::FloatPayload | Self::TextPayload => 1,
            Self::ComplexPayload => 2,
            Self::FloatListPayload(n) => *n as usize,
            Self::Tensor(i) => tensors
                .get(usize::from(*i))
                .map_or(0, TensorMeta::payload_words),
            _ => 0,
        }
    }
}

/// A tensor's metadata.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct TensorMeta {
    /// Sizes, in elements. Empty for 0-dimensional tensors.
    pub shape: Vec<i64>,
    /// Strides, in elements; empty where the tensor has none (sparse, nested, mkldnn).
    pub strides: Vec<i64>,
    /// Element type.
    pub dtype: DType,
    /// Where the data is.
    pub device: Device,
    /// Bits of [`tensor_flags`].
    pub flags: u32,
}

/// Bits of [`TensorMeta::flags`].
pub mod tensor_flags {
    /// Gradients flow into it (inputs only: outputs get theirs after the op).
    pub const REQUIRES_GRAD: u32 = 1 << 0;
    /// A Python or C++ number that took part in tensor arithmetic: no bytes.
    pub const WRAPPED_NUMBER: u32 = 1 << 1;
    /// Sparse layout (COO or compressed).
    pub const SPARSE: u32 = 1 << 2;
    /// Nested tensor.
    pub const NESTED: u32 = 1 << 3;
    /// Quantized.
    pub const QUANTIZED: u32 = 1 << 4;
    /// Opaque mkldnn layout.
    pub const MKLDNN: u32 = 1 << 5;
    /// Lazily conjugated.
    pub const CONJUGATE: u32 = 1 << 6;
    /// Lazily negated.
    pub const NEGATIVE: u32 = 1 << 7;
    /// Zero tensor without data.
    pub const ZERO: u32 = 1 << 8;
    /// Python subclass with a dispatch of its own.
    pub const SUBCLASS: u32 = 1 << 9;
    /// Fake, meta, functional or functorch-wrapped: there are no values.
    pub const NO_VALUES: u32 = 1 << 10;
    /// `nn.Parameter`, or another leaf that gradients accumulate in.
    pub const LEAF_PARAMETER: u32 = 1 << 11;
}

impl TensorMeta {
    /// Number of elements. 0-dimensional tensors have one.
    #[must_use]
    pub fn elements(&self) -> u64 {
        self.shape.iter().fold(1u64, |n, &s| {
            n.saturating_mul(u64::try_from(s).unwrap_or(0))
        })
    }

    /// Elements times element size; 0 for a wrapped number.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        if self.is(tensor_flags::WRAPPED_NUMBER) {
            0
        } else {
            self.elements().saturating_mul(self.dtype.bytes())
        }
    }

    /// Whether all bits of `flag` are set.
    #[must_use]
    pub const fn is(&self, flag: u32) -> bool {
        self.flags & flag == flag
    }

    /// Payload words of a wrapped number: its value.
    #[must_use]
    pub const fn payload_words(&self) -> usize {
        if !self.is(tensor_flags::WRAPPED_NUMBER) {
            0
        } else if self.dtype.is_complex() {
            2
        } else {
            1
        }
    }
}

/// Element types, numbered as `c10::ScalarType` numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Encode, Decode)]
pub struct DType(pub i8);

impl Default for DType {
    fn default() -> Self {
        Self::F32
    }
}

/// Names and sizes of `c10::ScalarType`, by number. (torch/headeronly/core/ScalarType.h, 2.13)
const DTYPES: [(&str, u64); 45] = [
    ("uint8", 1),
    ("int8", 1),
    ("int16", 2),
    ("int32", 4),
    ("int64", 8),
    ("float16", 2),
    ("float32", 4),
    ("float64", 8),
    ("complex32", 4),
    ("complex64", 8),
    ("complex128", 16),
    ("bool", 1),
    ("qint8", 1),
    ("quint8", 1),
    ("qint32", 4),
    ("bfloat16", 2),
    ("quint4x2", 1),
    ("quint2x4", 1),
    ("bits1x8", 1),
    ("bits2x4", 1),
    ("bits4x2", 1),
    ("bits8", 1),
    ("bits16", 2),
    ("float8_e5m2", 1),
    ("float8_e4m3fn", 1),
    ("float8_e5m2fnuz", 1),
    ("float8_e4m3fnuz", 1),
    ("uint16", 2),
    ("uint32", 4),
    ("uint64", 8),
    ("uint1", 1),
    ("uint2", 1),
    ("uint3", 1),
    ("uint4", 1),
    ("uint5", 1),
    ("uint6", 1),
    ("uint7", 1),
    ("int1", 1),
    ("int2", 1),
    ("int3", 1),
    ("int4", 1),
    ("int5", 1),
    ("int6", 1),
    ("int7", 1),
    ("float8_e8m0fnu", 1),
];

impl DType {
    /// `torch.uint8`.
    pub const U8: Self = Self(0);
    /// `torch.int8`.
    pub const I8: Self = Self(1);
    /// `torch.int16`.
    pub const I16: Self = Self(2);
    /// `torch.int32`.
    pub const I32: Self = Self(3);
    /// `torch.int64`.
    pub const I64: Self = Self(4);
    /// `torch.float16`.
    pub const F16: Self = Self(5);
    /// `torch.float32`.
    pub const F32: Self = Self(6);
    /// `torch.float64`.
    pub const F64: Self = Self(7);
    /// `torch.complex32`.
    pub const C32: Self = Self(8);
    /// `torch.complex64`.
    pub const C64: Self = Self(9);
    /// `torch.complex128`.
    pub const C128: Self = Self(10);
    /// `torch.bool`.
    pub const BOOL: Self = Self(11);
    /// `torch.bfloat16`.
    pub const BF16: Self = Self(15);
    /// `torch.uint16`.
    pub const U16: Self = Self(27);
    /// `torch.uint32`.
    pub const U32: Self = Self(28);
    /// `torch.uint64`.
    pub const U64: Self = Self(29);

    /// `float32`, as torch prints it without `torch.`.
    #[must_use]
    pub fn name(self) -> &'static str {
        usize::try_from(self.0)
            .ok()
            .and_then(|i| DTYPES.get(i))
            .map_or("unknown", |d| d.0)
    }

    /// Size of one element, as `Tensor.element_size()` gives it; 0 for an unknown type.
    #[must_use]
    pub fn bytes(self) -> u64 {
        usize::try_from(self.0)
            .ok()
            .and_then(|i| DTYPES.get(i))
            .map_or(0, |d| d.1)
    }

    /// complex32, complex64, complex128.
    #[must_use]
    pub const fn is_complex(self) -> bool {
        matches!(self, Self::C32 | Self::C64 | Self::C128)
    }

    /// Floating-point of any width, complex left out.
    #[must_use]
    pub const fn is_float(self) -> bool {
        matches!(self.0, 5 | 6 | 7 | 15 | 23..=26 | 44)
    }
}

/// A device: `c10::DeviceType` by number, and the index (-1: the current one).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Encode, Decode)]
pub struct Device {
    /// `c10::DeviceType` (0 is CPU, 1 CUDA).
    pub kind: u8,
    /// Index, or -1.
    pub index: i8,
}

impl Device {
    /// `cpu`, `cuda:0`. (c10/core/DeviceType.h)
    #[must_use]
    pub fn name(self) -> String {
        const KINDS: [&str; 21] = [
            "cpu",
            "cuda",
            "mkldnn",
            "opengl",
            "opencl",
            "ideep",
            "hip",
            "fpga",
            "maia",
            "xla",
            "vulkan",
            "metal",
            "xpu",
            "mps",
            "meta",
            "hpu",
            "ve",
            "lazy",
            "ipu",
            "mtia",
            "privateuseone",
        ];
        let kind = KINDS
            .get(usize::from(self.kind))
            .copied()
            .unwrap_or("unknown");
        if self.index < 0 || self.kind == 0 {
            kind.to_owned()
        } else {
            format!("{kind}:{}", self.index)
        }
    }
}

/// One node of the tree of module stacks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct ScopeDef {
    /// The stack below; `None` for `Global` alone.
    pub parent: Option<ScopeId>,
    /// The name of the innermost module, as `torch.utils.module_tracker` names it: `Net.features.0`. It need not
    /// start with the parent's name: a shared module has one name wherever it is called.
    pub name: String,
    /// The innermost module.
    pub module: Option<ModuleId>,
}

/// A module object. Facts that later levels add (T7) stand in `Fact` records.
#[derive(Clone, Debug, Default, PartialEq, Encode, Decode)]
pub struct ModuleDef {
    /// Scope name: `Net.features.0`.
    pub name: String,
    /// Qualified class names, the class first, then its bases in the order of resolution, `torch.nn` and `object` left out.
    pub classes: Vec<String>,
    /// A spiking neuron of a known library: its output is watched.
    pub spiking: bool,
}

/// A thread of the recorded process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct ThreadDef {
    /// The kernel's thread id.
    pub native_id: u64,
    /// Its name, where it has one.
    pub name: String,
}

/// What a watch looks at. Its values arrive as calls of `optape::watch(Tensor, int id) -> ()`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct WatchDef {
    /// The module, where the watch belongs to one.
    pub module: Option<ModuleId>,
    /// `output`, `input`, `attribute:v`, or what the user called it.
    pub what: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn views_share_an_alias_set_that_nothing_writes() {
        let op = |alias: &str, written: bool| OpDef {
            name: "aten::f".to_owned(),
            arguments: vec![
                ArgumentDef::default(),
                ArgumentDef {
                    alias: alias.to_owned(),
                    written,
                    ..ArgumentDef::default()
                },
            ],
            returns: vec![ReturnDef {
                alias: alias.to_owned(),
                written,
                ..ReturnDef::default()
            }],
            ..OpDef::default()
        };
        assert_eq!(op("a", false).views().collect::<Vec<_>>(), [(1, 0)]);
        assert_eq!(op("a", true).views().count(), 0);
        assert_eq!(op("", false).views().count(), 0);
    }
}
