//! Where operands lie in a hierarchy of registers, SRAM and DRAM that keeps what was used last.
//!
//! Each storage (by device and type) is a thing that is kept as a whole. SRAM and registers throw out what was used longest ago; what is in
//! registers may also be in SRAM. Every op of the table reads its operands and writes its results, in that order.
//! Only selected ops are seen, and the hierarchy is empty before the first.

use std::collections::{BTreeMap, HashMap};

use optape_trace::{TensorMeta, call_flags, tensor_flags};

use crate::ordered::{Amounts, OrderedCall, Simulation, World};
use crate::rules::{CallRow, Counted, Counter, Rule, RuleError};

/// Bits that fit; DRAM takes everything.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Capacities {
    /// Registers.
    pub registers_bits: f64,
    /// SRAM.
    pub sram_bits: f64,
}

impl Capacities {
    /// 256 KiB of registers and 38 MiB of SRAM: upstream's own.
    pub const DEFAULT: Self = Self {
        registers_bits: 256.0 * 1024.0 * 8.0,
        sram_bits: 38.0 * 1024.0 * 1024.0 * 8.0,
    };
    /// So small that things are thrown out of small networks: 2 KiB and 16 KiB.
    pub const SMALL: Self = Self {
        registers_bits: 16_384.0,
        sram_bits: 131_072.0,
    };
}

/// The counter.
#[derive(Clone, Copy, Debug)]
pub struct MemoryResidency {
    name: &'static str,
    capacities: Capacities,
}

impl MemoryResidency {
    /// A counter with capacities, under a name of its own.
    #[must_use]
    pub const fn new(name: &'static str, capacities: Capacities) -> Self {
        Self { name, capacities }
    }
}

/// What an op reads and writes.
#[derive(Clone, Copy)]
enum Access {
    /// The arguments at these places, where they are tensors.
    Reads(&'static [usize]),
    /// Argument 0 only where `beta` is not 0.
    Added,
    ConvolutionBackward,
    BatchNorm,
    BatchNormBackward,
}

fn access(op: &str) -> Option<Access> {
    let (name, overload) = op
        .strip_prefix("aten::")
        .map(|op| op.split_once('.').unwrap_or((op, "")))?;
    Some(match (name, overload) {
        ("mm" | "bmm", "") => Access::Reads(&[0, 1]),
        ("addmm" | "baddbmm", "") => Access::Added,
        ("convolution", "") => Access::Reads(&[0, 1, 2]),
        ("convolution_backward", "") => Access::ConvolutionBackward,
        ("native_batch_norm", "") => Access::BatchNorm,
        ("native_batch_norm_backward", "") => Access::BatchNormBackward,
        (
            "add" | "add_" | "sub" | "sub_" | "rsub" | "mul" | "mul_" | "div" | "div_",
            "Tensor" | "Scalar",
        ) => Access::Reads(&[0, 1]),
        ("sqrt" | "sqrt_" | "rsqrt" | "sum", "") | ("sum", "dim_IntList") | ("mean", "dim") => {
            Access::Reads(&[0])
        }
        ("where", "self" | "ScalarOther" | "ScalarSelf") => Access::Reads(&[0, 1, 2]),
        _ => return None,
    })
}

impl Counter for MemoryResidency {
    fn name(&self) -> &str {
        self.name
    }

    fn unit(&self) -> &str {
        "bit"
    }

    fn rule(&self, _op: &str) -> Option<&Rule> {
        None
    }

    fn count(&self, row: &CallRow<'_>) -> Counted {
        if access(&row.rule_name()).is_some() {
            Counted::Value(0)
        } else {
            Counted::Unknown(None)
        }
    }

    fn simulation(&self) -> Option<Box<dyn Simulation>> {
        Some(Box::new(Following {
            hierarchy: Hierarchy::new(self.capacities),
            renamed: HashMap::new(),
            renamings: 0,
            things: HashMap::new(),
            accesses: HashMap::new(),
        }))
    }
}

/// The stage that upstream guesses: from the op's name, grad mode, and whether a tensor requires a gradient.
pub(crate) fn guessed_stage(row: &CallRow<'_>, shown: &str) -> &'static str {
    const OPTIMIZER: [&str; 8] = [
        "add_.", "sub_.", "mul_.", "div_.", "addcmul", "addcdiv", "lerp_", "copy_",
    ];
    if shown.contains("backward") {
        return "backward";
    }
    if row.signature.flags & call_flags::GRAD_MODE != 0 {
        return "forward";
    }
    let learns = row
        .signature
        .tensors
        .iter()
        .any(|t| t.is(tensor_flags::REQUIRES_GRAD));
    if learns && OPTIMIZER.iter().any(|hint| shown.contains(hint)) {
        "optimizer"
    } else {
        "forward"
    }
}

struct Following {
    hierarchy: Hierarchy,
    /// Storages that stand for another since autograd accumulated into them: upstream has a new tensor there.
    renamed: HashMap<u64, u64>,
    renamings: u64,
    /// Numbers of things: storage by its present name, and type.
    things: HashMap<(u64, i8), u32>,
    /// By op.
    accesses: HashMap<String, Option<Access>>,
}

/// Names of storages that upstream has and the trace has not.
const RENAMED: u64 = 1 << 63;

impl Following {
    fn thing(&mut self, call: &OrderedCall<'_>, index: usize) -> Option<(u32, i128)> {
        let meta: &TensorMeta = call.row.signature.tensors.get(index)?;
        if meta.is(tensor_flags::WRAPPED_NUMBER) {
            return None;
        }
        let storage = *call.storages.get(index)?;
        let storage = self.renamed.get(&storage).copied().unwrap_or(storage);
        let next = u32::try_from(self.things.len()).unwrap_or(u32::MAX);
        let thing = *self.things.entry((storage, meta.dtype.0)).or_insert(next);
        Some((thing, i128::from(meta.bytes()) * 8))
    }
}

impl Simulation for Following {
    fn call(
        &mut self,
        _world: &World<'_>,
        call: &OrderedCall<'_>,
        out: &mut Amounts,
    ) -> Result<(), RuleError> {
        let op = call.row.rule_name();
        let access = match self.accesses.get(&op) {
            Some(known) => *known,
            None => {
                let found = access(&op);
                self.accesses.insert(op, found);
                found
            }
        };
        let Some(access) = access else {
            return Ok(());
        };
        let row = &call.row;
        let argument = |at: usize| row.optional_tensor_at(at).map(|t| usize::from(t.index));
        let result = |at: usize| row.optional_output(at).map(|t| usize::from(t.index));
        let mut reads = Vec::new();
        let mut writes = Vec::new();
        match access {
            Access::Reads(places) => {
                reads.extend(places.iter().filter_map(|at| argument(*at)));
                writes.extend(result(0));
            }
            Access::Added => {
                reads.extend([1, 2].into_iter().filter_map(argument));
                if !row.keyword_number("beta", 1.0).is_zero() {
                    reads.extend(argument(0));
                }
                writes.extend(result(0));
            }
            Access::ConvolutionBackward => {
                let mask = row.booleans("output_mask")?;
                let asked = |at: usize| mask.get(at).copied().unwrap_or(false);
                reads.extend(argument(0));
                for (at, read) in [(0, Some(2)), (1, Some(1)), (2, None)] {
                    if asked(at) {
                        reads.extend(read.and_then(argument));
                        writes.extend(result(at));
                    }
                }
            }
            Access::BatchNorm => {
                reads.extend((0..5).filter_map(argument));
                let results = if row.boolean("training")? { 3 } else { 1 };
                writes.extend((0..results).filter_map(result));
            }
            Access::BatchNormBackward => {
                reads.extend((0..7).filter_map(argument));
                writes.extend((0..3).filter_map(result));
            }
        }
        let stage = guessed_stage(row, call.shown);
        let before = self.hierarchy.moved.clone();
        let mut total = 0;
        for index in reads {
            if let Some((thing, bits)) = self.thing(call, index) {
                total += bits;
                self.hierarchy.read(thing, bits);
            }
        }
        if row.values_before
            && let Some(storage) = argument(0).and_then(|at| call.storages.get(at))
        {
            self.renamings += 1;
            self.renamed.insert(*storage, RENAMED | self.renamings);
        }
        for index in writes {
            if let Some((thing, bits)) = self.thing(call, index) {
                total += bits;
                self.hierarchy.write(thing, bits);
            }
        }
        self.hierarchy.moved.tell(&before, call.shown, stage, out);
        out.count(total);
        Ok(())
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Level {
    Registers,
    Sram,
    Dram,
}

impl Level {
    const ALL: [Self; 3] = [Self::Registers, Self::Sram, Self::Dram];

    const fn name(self) -> &'static str {
        match self {
            Self::Registers => "reg",
            Self::Sram => "sram",
            Self::Dram => "dram",
        }
    }
}

/// Bits that were read and written at each level and moved between them.
#[derive(Clone, Debug, Default, PartialEq)]
struct Moved {
    read: [i128; 3],
    written: [i128; 3],
    edges: [[i128; 3]; 3],
}

impl Moved {
    fn tell(&self, before: &Self, op: &str, stage: &str, out: &mut Amounts) {
        for (at, level) in Level::ALL.into_iter().enumerate() {
            let read = self.read[at] - before.read[at];
            let written = self.written[at] - before.written[at];
            let both = read + written;
            let level = level.name();
            out.add("level_bits", &[level], both);
            out.add("level_rw_bits", &[level, "read_bits"], read);
            out.add("level_rw_bits", &[level, "write_bits"], written);
            out.add("level_rw_bits", &[level, "total_bits"], both);
            out.add("op_level_bits", &[op, level], both);
            out.add("stage_level_bits", &[stage, level], both);
            for (to, target) in Level::ALL.into_iter().enumerate() {
                let moved = self.edges[at][to] - before.edges[at][to];
                if moved != 0 {
                    let edge = format!("{level}->{}", target.name());
                    out.add("move_bits_by_edge", &[&edge], moved);
                    out.add("move_bits_by_op", &[op, &edge], moved);
                }
            }
        }
    }
}

/// Things in the order of their last use.
#[derive(Debug, Default)]
struct Cache {
    /// When each was used last, and its bits.
    held: HashMap<u32, (u64, i128)>,
    order: BTreeMap<u64, u32>,
    bits: i128,
    now: u64,
}

impl Cache {
    fn touch(&mut self, thing: u32) {
        if let Some((used, _)) = self.held.get_mut(&thing) {
            self.order.remove(used);
            self.now += 1;
            *used = self.now;
            self.order.insert(self.now, thing);
        }
    }

    fn insert(&mut self, thing: u32, bits: i128) {
        self.now += 1;
        self.held.insert(thing, (self.now, bits));
        self.order.insert(self.now, thing);
        self.bits += bits;
    }

    fn remove(&mut self, thing: u32) -> Option<i128> {
        let (used, bits) = self.held.remove(&thing)?;
        self.order.remove(&used);
        self.bits -= bits;
        Some(bits)
    }

    /// What was used longest ago.
    fn oldest(&mut self) -> Option<(u32, i128)> {
        let thing = *self.order.values().next()?;
        Some((thing, self.remove(thing)?))
    }

    fn bits_of(&self, thing: u32) -> Option<i128> {
        self.held.get(&thing).map(|(_, bits)| *bits)
    }
}

#[derive(Debug)]
struct Hierarchy {
    capacities: Capacities,
    registers: Cache,
    sram: Cache,
    moved: Moved,
}

impl Hierarchy {
    fn new(capacities: Capacities) -> Self {
        Self {
            capacities,
            registers: Cache::default(),
            sram: Cache::default(),
            moved: Moved::default(),
        }
    }

    fn note_read(&mut self, level: Level, bits: i128) {
        self.moved.read[level as usize] += bits;
    }

    fn note_write(&mut self, level: Level, bits: i128) {
        self.moved.written[level as usize] += bits;
    }

    /// What moves is written where it goes; that it was read where it came from is noted apart, since upstream does not always.
    fn note_move(&mut self, from: Level, to: Level, bits: i128) {
        self.moved.edges[from as usize][to as usize] += bits;
        self.note_write(to, bits);
    }

    #[expect(
        clippy::cast_precision_loss,
        reason = "capacities are floats, of which one is infinite"
    )]
    fn fits(bits: i128, capacity: f64) -> bool {
        bits as f64 <= capacity
    }

    fn drop_from_registers(&mut self, thing: u32) {
        if let Some(bits) = self.registers.remove(thing) {
            self.note_read(Level::Registers, bits);
            self.note_move(Level::Registers, Level::Dram, bits);
        }
    }

    /// Makes room in SRAM and puts a thing there. `false`: it does not fit.
    fn put_into_sram(&mut self, thing: u32, bits: i128) -> bool {
        let capacity = self.capacities.sram_bits;
        if !Self::fits(bits, capacity) {
            return false;
        }
        match self.sram.bits_of(thing) {
            Some(held) if bits <= held => {
                self.sram.touch(thing);
                return true;
            }
            Some(_) => {
                self.sram.remove(thing);
                self.drop_from_registers(thing);
            }
            None => {}
        }
        while !Self::fits(self.sram.bits + bits, capacity) {
            let Some((oldest, held)) = self.sram.oldest() else {
                return false;
            };
            self.note_read(Level::Sram, held);
            self.note_move(Level::Sram, Level::Dram, held);
            self.drop_from_registers(oldest);
        }
        self.sram.insert(thing, bits);
        true
    }

    fn put_into_registers(&mut self, thing: u32, bits: i128) -> bool {
        let capacity = self.capacities.registers_bits;
        if !Self::fits(bits, capacity) {
            return false;
        }
        match self.registers.bits_of(thing) {
            Some(held) if bits <= held => {
                self.registers.touch(thing);
                return true;
            }
            Some(_) => {
                self.registers.remove(thing);
            }
            None => {}
        }
        while !Self::fits(self.registers.bits + bits, capacity) {
            let Some((oldest, held)) = self.registers.oldest() else {
                return false;
            };
            self.note_read(Level::Registers, held);
            let to = if self.put_into_sram(oldest, held) {
                Level::Sram
            } else {
                Level::Dram
            };
            self.note_move(Level::Registers, to, held);
        }
        self.registers.insert(thing, bits);
        true
    }

    fn touch_both(&mut self, thing: u32) {
        self.registers.touch(thing);
        self.sram.touch(thing);
    }

    /// From SRAM to the registers, if they have room.
    fn raise(&mut self, thing: u32, bits: i128) -> bool {
        let raised = self.put_into_registers(thing, bits);
        if raised {
            self.note_read(Level::Sram, bits);
            self.note_move(Level::Sram, Level::Registers, bits);
        }
        raised
    }

    fn read(&mut self, thing: u32, bits: i128) {
        if bits <= 0 {
            return;
        }
        if self.registers.bits_of(thing).is_some() {
            self.touch_both(thing);
            self.note_read(Level::Registers, bits);
            return;
        }
        let in_sram = self.sram.bits_of(thing).is_some();
        if in_sram {
            self.sram.touch(thing);
        } else if self.put_into_sram(thing, bits) {
            self.note_read(Level::Dram, bits);
            self.note_move(Level::Dram, Level::Sram, bits);
        } else if self.put_into_registers(thing, bits) {
            self.note_read(Level::Dram, bits);
            self.note_move(Level::Dram, Level::Registers, bits);
            self.note_read(Level::Registers, bits);
            return;
        } else {
            self.note_read(Level::Dram, bits);
            return;
        }
        if self.raise(thing, bits) {
            self.note_read(Level::Registers, bits);
        } else {
            self.note_read(Level::Sram, bits);
        }
    }

    fn write(&mut self, thing: u32, bits: i128) {
        if bits <= 0 {
            return;
        }
        if self.registers.bits_of(thing).is_some() {
            self.touch_both(thing);
            self.note_write(Level::Registers, bits);
        } else if self.sram.bits_of(thing).is_some() {
            self.sram.touch(thing);
            let level = if self.raise(thing, bits) {
                Level::Registers
            } else {
                Level::Sram
            };
            self.note_write(level, bits);
        } else if self.put_into_registers(thing, bits) {
            self.note_write(Level::Registers, bits);
        } else if self.put_into_sram(thing, bits) {
            self.note_write(Level::Sram, bits);
        } else {
            self.note_write(Level::Dram, bits);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hierarchy(registers: f64, sram: f64) -> Hierarchy {
        Hierarchy::new(Capacities {
            registers_bits: registers,
            sram_bits: sram,
        })
    }

    #[test]
    fn a_first_read_comes_from_dram_and_a_second_from_registers() {
        let mut memory = hierarchy(100.0, 1000.0);
        memory.read(0, 60);
        assert_eq!(memory.moved.read, [60, 60, 60]);
        assert_eq!(memory.moved.written, [60, 60, 0]);
        assert_eq!(memory.moved.edges[2][1], 60);
        assert_eq!(memory.moved.edges[1][0], 60);
        memory.read(0, 60);
        assert_eq!(memory.moved.read, [120, 60, 60]);
    }

    #[test]
    fn what_was_used_longest_ago_goes_first() {
        let mut memory = hierarchy(100.0, 1000.0);
        memory.write(0, 50);
        memory.write(1, 50);
        memory.read(0, 50);
        memory.write(2, 50);
        assert_eq!(memory.registers.bits_of(1), None);
        assert_eq!(memory.registers.bits_of(0), Some(50));
        // It went to SRAM, and comes from there.
        assert_eq!(memory.moved.edges[0][1], 50);
        memory.read(1, 50);
        assert_eq!(memory.moved.edges[1][0], 50);
        assert_eq!(memory.moved.read[2], 0);
    }

    #[test]
    fn what_fits_nowhere_stays_in_dram() {
        let mut memory = hierarchy(10.0, 20.0);
        memory.read(0, 30);
        memory.write(1, 30);
        assert_eq!(memory.moved.read, [0, 0, 30]);
        assert_eq!(memory.moved.written, [0, 0, 30]);
        memory.read(2, 20);
        assert_eq!(memory.moved.read, [0, 20, 50]);
        memory.read(3, 0);
        assert_eq!(memory.sram.bits, 20);
    }

    #[test]
    fn a_thing_that_has_grown_is_taken_anew() {
        let mut memory = hierarchy(100.0, 100.0);
        memory.read(0, 40);
        assert!(memory.put_into_sram(0, 80));
        assert_eq!((memory.sram.bits, memory.registers.bits), (80, 0));
        assert_eq!(memory.moved.edges[0][2], 40);
        assert!(!memory.put_into_sram(0, 101));
    }

    #[test]
    fn ops_of_the_table() {
        assert!(access("aten::mm").is_some());
        assert!(access("aten::mul_.Scalar").is_some());
        assert!(access("aten::relu").is_none());
        assert!(access("aten::sum.IntList_out").is_none());
        assert!(access("my::mm").is_none());
    }
}
