//! Where operands lie in a hierarchy of registers, SRAM and DRAM that keeps what was used last.
//!
//! Each storage (by device and type) is a thing that is kept as a whole. SRAM and registers throw out what was used longest ago; what is in
//! registers may also be in SRAM. Every op of the table reads its operands and writes its results, in that order.
//! Only selected ops are seen, and the hierarchy is empty before the first.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use optape_trace::{TensorMeta, call_flags, tensor_flags};

use crate::ordered::{Amounts, Map, OrderedCall, Simulation, World};
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
    const BITS_PER_KIB: f64 = 8192.0;

    /// Of sizes in KiB.
    #[must_use]
    pub const fn of_kib(registers: f64, sram: f64) -> Self {
        Self {
            registers_bits: registers * Self::BITS_PER_KIB,
            sram_bits: sram * Self::BITS_PER_KIB,
        }
    }
}

/// The counter.
#[derive(Clone, Debug)]
pub struct MemoryResidency {
    name: Cow<'static, str>,
    capacities: Capacities,
}

impl MemoryResidency {
    /// A counter with capacities, under a name of its own.
    pub fn new(name: impl Into<Cow<'static, str>>, capacities: Capacities) -> Self {
        Self {
            name: name.into(),
            capacities,
        }
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
        &self.name
    }

    fn unit(&self) -> &str {
        "bit"
    }

    fn method(&self) -> Option<(&'static str, &'static str)> {
        Some((
            "bits of every operand and result; each access goes to the nearest level that holds the storage, a read brings it up, and what was \
             used longest ago makes room",
            "SpikingJelly db3b6df0, op_counter/memory_residency.py",
        ))
    }

    fn settings(&self) -> BTreeMap<&'static str, f64> {
        BTreeMap::from([
            (
                "registers_kib",
                self.capacities.registers_bits / Capacities::BITS_PER_KIB,
            ),
            (
                "sram_kib",
                self.capacities.sram_bits / Capacities::BITS_PER_KIB,
            ),
        ])
    }

    fn configured(
        &self,
        name: &str,
        settings: &BTreeMap<&'static str, f64>,
    ) -> Option<Box<dyn Counter>> {
        let capacities =
            Capacities::of_kib(*settings.get("registers_kib")?, *settings.get("sram_kib")?);
        Some(Box::new(Self::new(name.to_owned(), capacities)))
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
            renamed: Map::default(),
            renamings: 0,
            things: Map::default(),
            plans: Vec::new(),
            groups: Vec::new(),
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

/// What calls of a structure read and write.
struct Plan {
    /// Tensors: index, type, bits.
    reads: Vec<(usize, i8, i64)>,
    writes: Vec<(usize, i8, i64)>,
    /// Bits of all of them.
    bits: i128,
    /// The tensor whose storage has a new name afterwards: where autograd accumulates, upstream has a new tensor.
    renames: Option<usize>,
    /// Whose traffic it is: index of a [`Group`].
    group: usize,
}

/// Traffic of an op in a stage.
struct Group {
    op: Arc<str>,
    stage: &'static str,
    moved: Moved,
}

struct Following {
    hierarchy: Hierarchy,
    /// Storages that stand for another since autograd accumulated into them: upstream has a new tensor there.
    renamed: Map<u64, u64>,
    renamings: u64,
    /// Numbers of things that something holds: storage by its present name, and type.
    things: Map<(u64, i8), u32>,
    /// By number of the structure; of ops that are in no table there is none.
    plans: Vec<Option<Option<Plan>>>,
    groups: Vec<Group>,
}

/// Names of storages that upstream has and the trace has not.
const RENAMED: u64 = 1 << 63;

impl Following {
    fn plan(&mut self, call: &OrderedCall<'_>) -> Result<Option<Plan>, RuleError> {
        let row = &call.row;
        let Some(access) = access(&row.rule_name()) else {
            return Ok(None);
        };
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
        let sized = |tensors: Vec<usize>| -> Vec<(usize, i8, i64)> {
            tensors
                .into_iter()
                .filter_map(|index| {
                    let meta: &TensorMeta = row.signature.tensors.get(index)?;
                    let bits = i64::try_from(meta.bytes().saturating_mul(8)).unwrap_or(i64::MAX);
                    (!meta.is(tensor_flags::WRAPPED_NUMBER)).then_some((index, meta.dtype.0, bits))
                })
                .collect()
        };
        let (reads, writes) = (sized(reads), sized(writes));
        let stage = guessed_stage(row, call.shown);
        let known = self
            .groups
            .iter()
            .position(|group| *group.op == *call.shown && group.stage == stage);
        let group = known.unwrap_or_else(|| {
            self.groups.push(Group {
                op: call.shown.into(),
                stage,
                moved: Moved::default(),
            });
            self.groups.len() - 1
        });
        Ok(Some(Plan {
            bits: reads.iter().chain(&writes).map(|(_, _, bits)| i128::from(*bits)).sum(),
            reads,
            writes,
            renames: row.values_before.then(|| argument(0)).flatten(),
            group,
        }))
    }
}

/// The thing that a tensor is; one that nothing holds gets a number.
#[inline]
fn thing_of(
    things: &mut Map<(u64, i8), u32>,
    hierarchy: &mut Hierarchy,
    renamed: &Map<u64, u64>,
    storage: u64,
    dtype: i8,
) -> u32 {
    let storage = if renamed.is_empty() {
        storage
    } else {
        renamed.get(&storage).copied().unwrap_or(storage)
    };
    let key = (storage, dtype);
    *things.entry(key).or_insert_with(|| hierarchy.take_number(key))
}

impl Simulation for Following {
    fn call(
        &mut self,
        _world: &World<'_>,
        call: &OrderedCall<'_>,
        out: &mut Amounts,
    ) -> Result<(), RuleError> {
        let number = call.signature.index();
        if self.plans.len() <= number {
            self.plans.resize_with(number + 1, || None);
        }
        if let Some(None) = self.plans.get(number) {
            let plan = self.plan(call)?;
            if let Some(place) = self.plans.get_mut(number) {
                *place = Some(plan);
            }
        }
        let Some(Some(Some(plan))) = self.plans.get(number) else {
            return Ok(());
        };
        let Some(group) = self.groups.get_mut(plan.group) else {
            return Ok(());
        };
        let explaining = out.is_explaining();
        for &(index, dtype, bits) in &plan.reads {
            if let Some(&storage) = call.storages.get(index) {
                let thing = thing_of(&mut self.things, &mut self.hierarchy, &self.renamed, storage, dtype);
                let before = explaining.then(|| group.moved.clone());
                self.hierarchy.read(thing, bits, &mut group.moved);
                explain(out, "reads", (call, index), bits, before.as_ref(), &group.moved);
            }
        }
        if let Some(storage) = plan.renames.and_then(|at| call.storages.get(at)) {
            self.renamings += 1;
            self.renamed.insert(*storage, RENAMED | self.renamings);
        }
        for &(index, dtype, bits) in &plan.writes {
            if let Some(&storage) = call.storages.get(index) {
                let thing = thing_of(&mut self.things, &mut self.hierarchy, &self.renamed, storage, dtype);
                let before = explaining.then(|| group.moved.clone());
                self.hierarchy.write(thing, bits, &mut group.moved);
                explain(out, "writes", (call, index), bits, before.as_ref(), &group.moved);
            }
        }
        self.hierarchy.forget_unheld(&mut self.things);
        out.count(plan.bits);
        Ok(())
    }

    fn takes_module_calls(&self) -> bool {
        false
    }

    fn settle(&mut self, out: &mut Amounts) {
        for group in &mut self.groups {
            std::mem::take(&mut group.moved).tell(&group.op, group.stage, out);
        }
    }
}

/// Says where an access went.
fn explain(
    out: &mut Amounts,
    what: &str,
    (call, index): (&OrderedCall<'_>, usize),
    bits: i64,
    before: Option<&Moved>,
    after: &Moved,
) {
    let Some(before) = before else { return };
    out.explain(|| {
        let mut parts = Vec::new();
        for (at, level) in Level::ALL.into_iter().enumerate() {
            for (to, target) in Level::ALL.into_iter().enumerate() {
                let moved = after.edges[at][to] - before.edges[at][to];
                if moved > 0 {
                    parts.push(format!("{moved} bits from {} to {}", level.name(), target.name()));
                }
            }
        }
        let sums = |of: fn(&Moved) -> &[i128; 3]| {
            let differs = |at: &usize| of(after)[*at] != of(before)[*at];
            let names: Vec<&str> = (0..3).filter(differs).map(|at| Level::ALL[at].name()).collect();
            names.join(", ")
        };
        let moves = if parts.is_empty() {
            String::new()
        } else {
            format!("; moves {}", parts.join(", "))
        };
        format!(
            "{what} {} ({bits} bits): read at {}, written at {}{moves}",
            call.row.name_of(index),
            or_nowhere(&sums(|m| &m.read)),
            or_nowhere(&sums(|m| &m.written)),
        )
    });
}

fn or_nowhere(levels: &str) -> &str {
    if levels.is_empty() { "no level" } else { levels }
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
    fn note_read(&mut self, level: Level, bits: i64) {
        self.read[level as usize] += i128::from(bits);
    }

    fn note_write(&mut self, level: Level, bits: i64) {
        self.written[level as usize] += i128::from(bits);
    }

    /// What moves is written where it goes; that it was read where it came from is noted apart, since upstream does not always.
    fn note_move(&mut self, from: Level, to: Level, bits: i64) {
        self.edges[from as usize][to as usize] += i128::from(bits);
        self.note_write(to, bits);
    }

    fn tell(&self, op: &str, stage: &str, out: &mut Amounts) {
        for (at, level) in Level::ALL.into_iter().enumerate() {
            let (read, written) = (self.read[at], self.written[at]);
            let both = read + written;
            let level = level.name();
            out.add("level_bits", &[level], both);
            out.add("level_rw_bits", &[level, "read_bits"], read);
            out.add("level_rw_bits", &[level, "write_bits"], written);
            out.add("level_rw_bits", &[level, "total_bits"], both);
            out.add("op_level_bits", &[op, level], both);
            out.add("stage_level_bits", &[stage, level], both);
            for (to, target) in Level::ALL.into_iter().enumerate() {
                let moved = self.edges[at][to];
                if moved != 0 {
                    let edge = format!("{level}->{}", target.name());
                    out.add("move_bits_by_edge", &[&edge], moved);
                    out.add("move_bits_by_op", &[op, &edge], moved);
                }
            }
        }
    }
}

/// No thing.
const NONE: u32 = u32::MAX;
/// Bits of a thing that is not held.
const NOT_HELD: i64 = -1;

/// A thing's place in a cache's order.
#[derive(Clone, Copy, Debug)]
struct Link {
    older: u32,
    newer: u32,
    bits: i64,
}

impl Default for Link {
    fn default() -> Self {
        Self {
            older: NONE,
            newer: NONE,
            bits: NOT_HELD,
        }
    }
}

/// Things in the order of their last use.
#[derive(Debug)]
struct Cache {
    /// By thing.
    links: Vec<Link>,
    oldest: u32,
    newest: u32,
    bits: i64,
    capacity: i64,
}

impl Cache {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "what does not fit an integer takes everything"
    )]
    fn new(capacity_bits: f64) -> Self {
        Self {
            links: Vec::new(),
            oldest: NONE,
            newest: NONE,
            bits: 0,
            capacity: capacity_bits.floor() as i64,
        }
    }

    fn bits_of(&self, thing: u32) -> Option<i64> {
        let link = self.links.get(thing as usize)?;
        (link.bits != NOT_HELD).then_some(link.bits)
    }

    fn fits(&self, more: i64) -> bool {
        self.bits.saturating_add(more) <= self.capacity
    }

    fn unlink(&mut self, thing: u32) {
        let Some(&Link { older, newer, .. }) = self.links.get(thing as usize) else {
            return;
        };
        match self.links.get_mut(older as usize) {
            Some(link) => link.newer = newer,
            None => self.oldest = newer,
        }
        match self.links.get_mut(newer as usize) {
            Some(link) => link.older = older,
            None => self.newest = older,
        }
    }

    fn link_newest(&mut self, thing: u32, bits: i64) {
        let older = self.newest;
        if let Some(link) = self.links.get_mut(thing as usize) {
            *link = Link {
                older,
                newer: NONE,
                bits,
            };
        }
        match self.links.get_mut(older as usize) {
            Some(link) => link.newer = thing,
            None => self.oldest = thing,
        }
        self.newest = thing;
    }

    fn touch(&mut self, thing: u32) {
        if self.newest != thing
            && let Some(bits) = self.bits_of(thing)
        {
            self.unlink(thing);
            self.link_newest(thing, bits);
        }
    }

    fn insert(&mut self, thing: u32, bits: i64) {
        if self.links.len() <= thing as usize {
            self.links.resize(thing as usize + 1, Link::default());
        }
        self.link_newest(thing, bits);
        self.bits = self.bits.saturating_add(bits);
    }

    fn remove(&mut self, thing: u32) -> Option<i64> {
        let bits = self.bits_of(thing)?;
        self.unlink(thing);
        if let Some(link) = self.links.get_mut(thing as usize) {
            *link = Link::default();
        }
        self.bits = self.bits.saturating_sub(bits);
        Some(bits)
    }

    /// What was used longest ago.
    fn oldest(&mut self) -> Option<(u32, i64)> {
        let thing = self.oldest;
        Some((thing, self.remove(thing)?))
    }
}

#[derive(Debug)]
struct Hierarchy {
    registers: Cache,
    sram: Cache,
    /// What each number stands for.
    keys: Vec<(u64, i8)>,
    /// Numbers that nothing holds.
    free: Vec<u32>,
    /// Numbers that something held, or was to hold, in this call.
    touched: Vec<u32>,
}

impl Hierarchy {
    fn new(capacities: Capacities) -> Self {
        Self {
            registers: Cache::new(capacities.registers_bits),
            sram: Cache::new(capacities.sram_bits),
            keys: Vec::new(),
            free: Vec::new(),
            touched: Vec::new(),
        }
    }

    /// A number for a thing that nothing holds yet.
    fn take_number(&mut self, key: (u64, i8)) -> u32 {
        let number = match self.free.pop() {
            Some(number) => number,
            None => {
                self.keys.push(key);
                u32::try_from(self.keys.len() - 1).unwrap_or(NONE - 1)
            }
        };
        if let Some(place) = self.keys.get_mut(number as usize) {
            *place = key;
        }
        self.touched.push(number);
        number
    }

    /// Gives numbers back of what nothing holds any more: storages have their names for ever, memory has not.
    fn forget_unheld(&mut self, things: &mut Map<(u64, i8), u32>) {
        while let Some(number) = self.touched.pop() {
            let held = self.registers.bits_of(number).is_some() || self.sram.bits_of(number).is_some();
            if held {
                continue;
            }
            if let Some(key) = self.keys.get(number as usize)
                && things.get(key) == Some(&number)
            {
                things.remove(key);
                self.free.push(number);
            }
        }
    }

    fn drop_from_registers(&mut self, thing: u32, moved: &mut Moved) {
        if let Some(bits) = self.registers.remove(thing) {
            self.touched.push(thing);
            moved.note_read(Level::Registers, bits);
            moved.note_move(Level::Registers, Level::Dram, bits);
        }
    }

    /// Makes room in SRAM and puts a thing there. `false`: it does not fit.
    fn put_into_sram(&mut self, thing: u32, bits: i64, moved: &mut Moved) -> bool {
        if bits > self.sram.capacity {
            return false;
        }
        match self.sram.bits_of(thing) {
            Some(held) if bits <= held => {
                self.sram.touch(thing);
                return true;
            }
            Some(_) => {
                self.sram.remove(thing);
                self.drop_from_registers(thing, moved);
            }
            None => {}
        }
        while !self.sram.fits(bits) {
            let Some((oldest, held)) = self.sram.oldest() else {
                return false;
            };
            self.touched.push(oldest);
            moved.note_read(Level::Sram, held);
            moved.note_move(Level::Sram, Level::Dram, held);
            self.drop_from_registers(oldest, moved);
        }
        self.sram.insert(thing, bits);
        true
    }

    fn put_into_registers(&mut self, thing: u32, bits: i64, moved: &mut Moved) -> bool {
        if bits > self.registers.capacity {
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
        while !self.registers.fits(bits) {
            let Some((oldest, held)) = self.registers.oldest() else {
                return false;
            };
            self.touched.push(oldest);
            moved.note_read(Level::Registers, held);
            let to = if self.put_into_sram(oldest, held, moved) {
                Level::Sram
            } else {
                Level::Dram
            };
            moved.note_move(Level::Registers, to, held);
        }
        self.registers.insert(thing, bits);
        true
    }

    fn touch_both(&mut self, thing: u32) {
        self.registers.touch(thing);
        self.sram.touch(thing);
    }

    /// From SRAM to the registers, if they have room.
    fn raise(&mut self, thing: u32, bits: i64, moved: &mut Moved) -> bool {
        let raised = self.put_into_registers(thing, bits, moved);
        if raised {
            moved.note_read(Level::Sram, bits);
            moved.note_move(Level::Sram, Level::Registers, bits);
        }
        raised
    }

    fn read(&mut self, thing: u32, bits: i64, moved: &mut Moved) {
        if bits <= 0 {
            return;
        }
        if self.registers.bits_of(thing).is_some() {
            self.touch_both(thing);
            moved.note_read(Level::Registers, bits);
            return;
        }
        let in_sram = self.sram.bits_of(thing).is_some();
        if in_sram {
            self.sram.touch(thing);
        } else if self.put_into_sram(thing, bits, moved) {
            moved.note_read(Level::Dram, bits);
            moved.note_move(Level::Dram, Level::Sram, bits);
        } else if self.put_into_registers(thing, bits, moved) {
            moved.note_read(Level::Dram, bits);
            moved.note_move(Level::Dram, Level::Registers, bits);
            moved.note_read(Level::Registers, bits);
            return;
        } else {
            moved.note_read(Level::Dram, bits);
            return;
        }
        if self.raise(thing, bits, moved) {
            moved.note_read(Level::Registers, bits);
        } else {
            moved.note_read(Level::Sram, bits);
        }
    }

    fn write(&mut self, thing: u32, bits: i64, moved: &mut Moved) {
        if bits <= 0 {
            return;
        }
        if self.registers.bits_of(thing).is_some() {
            self.touch_both(thing);
            moved.note_write(Level::Registers, bits);
        } else if self.sram.bits_of(thing).is_some() {
            self.sram.touch(thing);
            let level = if self.raise(thing, bits, moved) {
                Level::Registers
            } else {
                Level::Sram
            };
            moved.note_write(level, bits);
        } else if self.put_into_registers(thing, bits, moved) {
            moved.note_write(Level::Registers, bits);
        } else if self.put_into_sram(thing, bits, moved) {
            moved.note_write(Level::Sram, bits);
        } else {
            moved.note_write(Level::Dram, bits);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hierarchy(registers: f64, sram: f64) -> (Hierarchy, Moved) {
        let hierarchy = Hierarchy::new(Capacities {
            registers_bits: registers,
            sram_bits: sram,
        });
        (hierarchy, Moved::default())
    }

    #[test]
    fn a_first_read_comes_from_dram_and_a_second_from_registers() {
        let (mut memory, mut moved) = hierarchy(100.0, 1000.0);
        memory.read(0, 60, &mut moved);
        assert_eq!(moved.read, [60, 60, 60]);
        assert_eq!(moved.written, [60, 60, 0]);
        assert_eq!(moved.edges[2][1], 60);
        assert_eq!(moved.edges[1][0], 60);
        memory.read(0, 60, &mut moved);
        assert_eq!(moved.read, [120, 60, 60]);
    }

    #[test]
    fn what_was_used_longest_ago_goes_first() {
        let (mut memory, mut moved) = hierarchy(100.0, 1000.0);
        memory.write(0, 50, &mut moved);
        memory.write(1, 50, &mut moved);
        memory.read(0, 50, &mut moved);
        memory.write(2, 50, &mut moved);
        assert_eq!(memory.registers.bits_of(1), None);
        assert_eq!(memory.registers.bits_of(0), Some(50));
        // It went to SRAM, and comes from there.
        assert_eq!(moved.edges[0][1], 50);
        memory.read(1, 50, &mut moved);
        assert_eq!(moved.edges[1][0], 50);
        assert_eq!(moved.read[2], 0);
    }

    #[test]
    fn what_fits_nowhere_stays_in_dram() {
        let (mut memory, mut moved) = hierarchy(10.0, 20.0);
        memory.read(0, 30, &mut moved);
        memory.write(1, 30, &mut moved);
        assert_eq!(moved.read, [0, 0, 30]);
        assert_eq!(moved.written, [0, 0, 30]);
        memory.read(2, 20, &mut moved);
        assert_eq!(moved.read, [0, 20, 50]);
        memory.read(3, 0, &mut moved);
        assert_eq!(memory.sram.bits, 20);
    }

    #[test]
    fn a_thing_that_has_grown_is_taken_anew() {
        let (mut memory, mut moved) = hierarchy(100.0, 100.0);
        memory.read(0, 40, &mut moved);
        assert!(memory.put_into_sram(0, 80, &mut moved));
        assert_eq!((memory.sram.bits, memory.registers.bits), (80, 0));
        assert_eq!(moved.edges[0][2], 40);
        assert!(!memory.put_into_sram(0, 101, &mut moved));
    }

    #[test]
    fn numbers_are_given_back() {
        let (mut memory, mut moved) = hierarchy(100.0, 200.0);
        let mut things = Map::default();
        for storage in 0..1000 {
            let thing = thing_of(&mut things, &mut memory, &Map::default(), storage, 6);
            memory.write(thing, 60, &mut moved);
            memory.forget_unheld(&mut things);
            assert!(things.len() <= 5, "{}", things.len());
        }
        assert!(memory.keys.len() <= 6, "{}", memory.keys.len());
        let held = things.values().filter(|thing| memory.sram.bits_of(**thing).is_some()).count();
        assert_eq!(held, 3);
    }

    #[test]
    fn ops_of_the_table() {
        assert!(access("aten::mm").is_some());
        assert!(access("aten::mul_.Scalar").is_some());
        assert!(access("aten::relu").is_none());
        assert!(access("aten::sum.IntList_out").is_none());
        assert!(access("my::mm").is_none());
    }

    proptest! {
        /// The linked order is that of a list in which what is used goes to the end.
        #[test]
        fn a_cache_keeps_the_order_of_use(steps in prop::collection::vec((0u32..8, 0u8..4, 1i64..9), 0..200)) {
            let mut cache = Cache::new(1e9);
            let mut list: Vec<(u32, i64)> = Vec::new();
            for (thing, what, bits) in steps {
                let known = list.iter().position(|(t, _)| *t == thing);
                match (what, known) {
                    (0, None) => {
                        cache.insert(thing, bits);
                        list.push((thing, bits));
                    }
                    (1, _) => {
                        cache.touch(thing);
                        if let Some(at) = known {
                            let one = list.remove(at);
                            list.push(one);
                        }
                    }
                    (2, _) => {
                        prop_assert_eq!(cache.remove(thing), known.map(|at| list.remove(at).1));
                    }
                    (3, _) => {
                        let oldest = (!list.is_empty()).then(|| list.remove(0));
                        prop_assert_eq!(cache.oldest(), oldest);
                    }
                    _ => {}
                }
                prop_assert_eq!(cache.bits, list.iter().map(|(_, bits)| bits).sum::<i64>());
                for thing in 0..8 {
                    let held = list.iter().find(|(t, _)| *t == thing).map(|(_, bits)| *bits);
                    prop_assert_eq!(cache.bits_of(thing), held);
                }
            }
        }
    }
}
