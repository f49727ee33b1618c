//! Signatures: op calls of one structure get one number.
//!
//! The structure arrives as words. Two calls are of one structure when the words, the flags, the scope and the stage are equal;
//! equality is decided by a 128-bit hash of all of them (2^-96 for a collision among the 65 536 that the table holds),
//! since looking the words themselves up again would cost a cache miss per line in the middle of somebody's training.
//!
//! The table is bounded. When it is full, further structures are recorded as lost, per op, scope and stage, and counted.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::atomic::{AtomicU8, Ordering};

use optape_trace::{
    Argument, DType, Device, OpId, ScopeId, SignatureDef, SignatureId, Stage, TensorMeta, TextId,
    call_flags,
};
use xxhash_rust::xxh3::xxh3_128_with_seed;

use crate::abi::word;

/// Structures that the table holds.
pub(super) const MOST_SIGNATURES: usize = 1 << 16;
/// Distinct values after which an integer argument is payload. Kernel sizes and dimensions stay below, indices do not.
const TAME_VALUES: usize = 64;

/// What stands around the words.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Surroundings {
    pub(super) op: u32,
    pub(super) flags: u32,
    pub(super) scope: ScopeId,
    pub(super) stage: Stage,
    pub(super) stage_name: Option<TextId>,
}

impl Surroundings {
    fn seed(self) -> u64 {
        let name = self.stage_name.map_or(0, |n| u64::from(n.0) + 1);
        (u64::from(self.op) << 40
            ^ u64::from(self.scope.0) << 16
            ^ u64::from(self.flags) << 3
            ^ self.stage as u64)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .wrapping_add(name.wrapping_mul(0xd6e8_feb8_6659_fd93))
    }
}

/// The key is a hash already.
#[derive(Default)]
struct Ready(u64);

impl Hasher for Ready {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, _: &[u8]) {}
    fn write_u128(&mut self, hash: u128) {
        self.0 = hash as u64;
    }
}

/// The structure of calls, by number.
pub(super) struct Signatures {
    table: HashMap<u128, SignatureId, BuildHasherDefault<Ready>>,
    lost: HashMap<Surroundings, SignatureId>,
    next: u32,
    /// Calls whose structure did not find room.
    pub(super) overflowed: u64,
}

/// What a look-up found.
pub(super) enum Found {
    Known(SignatureId),
    /// To be defined under this number.
    New(SignatureId),
    /// The table is full: to be defined without structure, if `define`.
    Lost {
        id: SignatureId,
        define: bool,
    },
}

impl Signatures {
    pub(super) fn new() -> Self {
        Self {
            table: HashMap::default(),
            lost: HashMap::new(),
            next: 0,
            overflowed: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.next as usize
    }

    #[inline]
    pub(super) fn find(&mut self, words: &[u64], around: Surroundings) -> Found {
        let hash = xxh3_128_with_seed(as_bytes(words), around.seed());
        match self.table.get(&hash) {
            Some(id) => Found::Known(*id),
            None => self.insert(hash, around),
        }
    }

    #[cold]
    fn insert(&mut self, hash: u128, around: Surroundings) -> Found {
        if self.table.len() < MOST_SIGNATURES {
            let id = SignatureId(self.next);
            self.next += 1;
            self.table.insert(hash, id);
            return Found::New(id);
        }
        self.overflowed += 1;
        let next = self.next;
        let id = *self.lost.entry(around).or_insert(SignatureId(next));
        let define = id.0 == next;
        self.next += u32::from(define);
        Found::Lost { id, define }
    }
}

/// The words as they lie in memory.
fn as_bytes(words: &[u64]) -> &[u8] {
    // SAFETY: any u64 is eight readable bytes, and u8 has no alignment.
    unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), std::mem::size_of_val(words)) }
}

/// Which integer arguments of an op vary too much to be structure.
pub(super) struct Wildness {
    /// Read by the hook at any time.
    flags: Box<[AtomicU8]>,
    seen: Vec<HashSet<i64>>,
}

impl Wildness {
    pub(super) fn new(arguments: usize) -> Self {
        Self {
            flags: (0..arguments).map(|_| AtomicU8::new(0)).collect(),
            seen: vec![HashSet::new(); arguments],
        }
    }

    pub(super) fn as_ptr(&self) -> *const u8 {
        self.flags.as_ptr().cast()
    }

    /// Looks at the integer arguments of a structure that was not known before.
    pub(super) fn observe(&mut self, arguments: &[Argument]) {
        for ((argument, seen), flag) in arguments.iter().zip(&mut self.seen).zip(&self.flags) {
            if let Argument::Int(value) = argument {
                seen.insert(*value);
                if seen.len() > TAME_VALUES {
                    flag.store(1, Ordering::Relaxed);
                    seen.clear();
                    seen.shrink_to_fit();
                }
            }
        }
    }
}

/// The words are not what the ABI says.
#[derive(Debug, thiserror::Error)]
#[error("structure word {at}: {what}")]
pub(super) struct BadWords {
    at: usize,
    what: &'static str,
}

/// Reads the definition of a signature from its words.
pub(super) fn decode(
    words: &[u64],
    argument_words: usize,
    around: Surroundings,
) -> Result<SignatureDef, BadWords> {
    let mut reader = Reader {
        words,
        at: 0,
        tensors: Vec::new(),
    };
    let mut arguments = Vec::new();
    while reader.at < argument_words {
        arguments.push(reader.value()?);
    }
    let inputs = reader.tensors.len();
    let mut outputs = Vec::new();
    while reader.at < words.len() {
        outputs.push(reader.value()?);
    }
    Ok(SignatureDef {
        op: OpId(around.op),
        arguments,
        outputs,
        inputs: u16::try_from(inputs).map_err(|_| BadWords {
            at: 0,
            what: "more than 65535 tensors",
        })?,
        tensors: reader.tensors,
        flags: around.flags,
        scope: around.scope,
        stage: around.stage,
        stage_name: around.stage_name,
    })
}

/// The definition of a call whose structure found no room.
pub(super) fn lost(around: Surroundings) -> SignatureDef {
    SignatureDef {
        op: OpId(around.op),
        arguments: Vec::new(),
        outputs: Vec::new(),
        tensors: Vec::new(),
        inputs: 0,
        flags: around.flags | call_flags::STRUCTURE_LOST,
        scope: around.scope,
        stage: around.stage,
        stage_name: around.stage_name,
    }
}

struct Reader<'a> {
    words: &'a [u64],
    at: usize,
    tensors: Vec<TensorMeta>,
}

impl Reader<'_> {
    fn bad(&self, what: &'static str) -> BadWords {
        BadWords { at: self.at, what }
    }

    fn next(&mut self) -> Result<u64, BadWords> {
        let word = *self
            .words
            .get(self.at)
            .ok_or_else(|| self.bad("ends early"))?;
        self.at += 1;
        Ok(word)
    }

    fn integers(&mut self, count: u64) -> Result<Vec<i64>, BadWords> {
        (0..count).map(|_| Ok(self.next()? as i64)).collect()
    }

    fn value(&mut self) -> Result<Argument, BadWords> {
        let head = self.next()?;
        let aux = head >> 8;
        Ok(match head as u8 {
            word::NONE => Argument::None,
            word::TENSOR => Argument::Tensor(self.tensor(aux)?),
            word::TENSOR_LIST => {
                let items = (0..aux).map(|_| {
                    let head = self.next()?;
                    match head as u8 {
                        word::NONE => Ok(None),
                        word::TENSOR => Ok(Some(self.tensor(head >> 8)?)),
                        _ => Err(self.bad("no tensor in a list of tensors")),
                    }
                });
                Argument::TensorList(items.collect::<Result<_, _>>()?)
            }
            word::INT => Argument::Int(self.next()? as i64),
            word::INT_PAYLOAD => Argument::IntPayload,
            word::INT_LIST => Argument::IntList(self.integers(aux)?),
            word::FLOAT => Argument::Float(if aux == 0 { 0.0 } else { 1.0 }),
            word::FLOAT_PAYLOAD => Argument::FloatPayload,
            word::FLOAT_LIST => Argument::FloatListPayload(aux as u32),
            word::COMPLEX_PAYLOAD => Argument::ComplexPayload,
            word::BOOL => Argument::Bool(aux != 0),
            word::BOOL_LIST => {
                Argument::BoolList(self.integers(aux)?.into_iter().map(|v| v != 0).collect())
            }
            word::TEXT => Argument::Text(TextId(aux as u32)),
            word::TEXT_PAYLOAD => Argument::TextPayload,
            word::DTYPE => Argument::DType(DType(aux as i8)),
            word::DEVICE => Argument::Device(Device {
                kind: aux as u8,
                index: (aux >> 8) as i8,
            }),
            word::ENUMERATOR => Argument::Enumerator(aux as i64),
            word::OPAQUE => Argument::Opaque(TextId(aux as u32)),
            _ => return Err(self.bad("unknown tag")),
        })
    }

    fn tensor(&mut self, aux: u64) -> Result<u16, BadWords> {
        let dim = aux >> 24 & 0xff;
        let shape = self.integers(dim)?;
        let strides = if aux >> 48 & 1 == 1 {
            Vec::new()
        } else {
            self.integers(dim)?
        };
        let index =
            u16::try_from(self.tensors.len()).map_err(|_| self.bad("more than 65535 tensors"))?;
        self.tensors.push(TensorMeta {
            shape,
            strides,
            dtype: DType(aux as i8),
            device: Device {
                kind: (aux >> 8) as u8,
                index: (aux >> 16) as i8,
            },
            flags: (aux >> 32 & 0xffff) as u32,
        });
        Ok(index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AROUND: Surroundings = Surroundings {
        op: 3,
        flags: 1,
        scope: ScopeId(2),
        stage: Stage::Forward,
        stage_name: None,
    };

    fn tensor_head(dim: u64, flags: u64) -> u64 {
        u64::from(word::TENSOR) | (6 | dim << 24 | flags << 32) << 8
    }

    #[test]
    fn words_become_a_definition() {
        let words = [
            tensor_head(2, 1),
            2,
            3,
            3,
            1,
            u64::from(word::TENSOR_LIST) | 2 << 8,
            u64::from(word::NONE),
            tensor_head(0, 0),
            u64::from(word::INT),
            -5i64 as u64,
            u64::from(word::FLOAT) | 1 << 8,
            u64::from(word::BOOL_LIST) | 2 << 8,
            1,
            0,
            tensor_head(1, 0),
            9,
            1,
        ];
        let def = decode(&words, 14, AROUND).unwrap();
        assert_eq!(def.inputs, 2);
        assert_eq!(def.tensors[0].shape, [2, 3]);
        assert_eq!(def.tensors[0].strides, [3, 1]);
        assert_eq!(def.tensors[0].flags, 1);
        assert_eq!(
            def.arguments,
            [
                Argument::Tensor(0),
                Argument::TensorList(vec![None, Some(1)]),
                Argument::Int(-5),
                Argument::Float(1.0),
                Argument::BoolList(vec![true, false]),
            ]
        );
        assert_eq!(def.outputs, [Argument::Tensor(2)]);
    }

    #[test]
    fn words_that_end_early_are_an_error() {
        for cut in 1..5 {
            let words = [tensor_head(2, 0), 2, 3, 3, 1];
            assert!(decode(&words[..cut], cut, AROUND).is_err());
        }
        assert!(decode(&[99], 1, AROUND).is_err());
    }

    #[test]
    fn equal_structures_share_a_number_and_others_do_not() {
        let mut s = Signatures::new();
        let id = |found| match found {
            Found::Known(id) => (id, false),
            Found::New(id) => (id, true),
            Found::Lost { .. } => panic!("lost"),
        };
        assert_eq!(id(s.find(&[1, 2], AROUND)), (SignatureId(0), true));
        assert_eq!(id(s.find(&[1, 2], AROUND)), (SignatureId(0), false));
        assert_eq!(id(s.find(&[1, 3], AROUND)), (SignatureId(1), true));
        let elsewhere = Surroundings {
            scope: ScopeId(5),
            ..AROUND
        };
        assert_eq!(id(s.find(&[1, 2], elsewhere)), (SignatureId(2), true));
        let backward = Surroundings {
            stage: Stage::Backward,
            ..AROUND
        };
        assert_eq!(id(s.find(&[1, 2], backward)), (SignatureId(3), true));
    }

    #[test]
    fn a_full_table_loses_structures_and_counts() {
        let mut s = Signatures::new();
        for n in 0..MOST_SIGNATURES as u64 {
            assert!(matches!(s.find(&[n], AROUND), Found::New(_)));
        }
        assert!(matches!(
            s.find(&[u64::MAX], AROUND),
            Found::Lost { define: true, .. }
        ));
        assert!(matches!(
            s.find(&[u64::MAX - 1], AROUND),
            Found::Lost { define: false, .. }
        ));
        assert!(matches!(s.find(&[0], AROUND), Found::Known(SignatureId(0))));
        assert_eq!(s.overflowed, 2);
    }

    #[test]
    fn an_argument_with_many_values_becomes_payload() {
        let mut w = Wildness::new(2);
        for n in 0..=TAME_VALUES as i64 {
            w.observe(&[Argument::Int(3), Argument::Int(n)]);
        }
        assert_eq!(w.flags[0].load(Ordering::Relaxed), 0);
        assert_eq!(w.flags[1].load(Ordering::Relaxed), 1);
    }
}
