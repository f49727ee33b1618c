//! A stream's dictionary: what its definitions have named so far.

use std::collections::HashMap;
use std::sync::Arc;

use crate::dictionary::{
    Argument, Definition, ModuleDef, OpDef, ScopeDef, SignatureDef, Stage, ThreadDef, WatchDef,
    call_flags,
};
use crate::error::Corrupt;
use crate::ids::{ModuleId, OpId, PatternId, ScopeId, SignatureId, TextId, ThreadId, WatchId};
use crate::record::{Event, LateStatistic, Moment};
use crate::statistics::{Pattern, PatternEntry, State, fields};

/// First id of the patterns that the writer makes itself, when statistics arrive late.
pub(crate) const FIRST_LATE_PATTERN: u32 = 0x8000_0000;

/// What a stream's ids mean. `PatternId(0)` (no statistics) and `ScopeId(0)` (`Global`) are there from the start.
#[derive(Clone, Debug)]
pub struct Dictionary {
    texts: Vec<String>,
    ops: Vec<OpDef>,
    signatures: Vec<SignatureDef>,
    scopes: Vec<ScopeDef>,
    modules: Vec<ModuleDef>,
    threads: Vec<ThreadDef>,
    patterns: Vec<Pattern>,
    late_patterns: Vec<Pattern>,
    watches: Vec<WatchDef>,
    /// By content; of equal ones the first that was defined.
    pattern_ids: HashMap<Pattern, PatternId>,
    /// Payload words and tensors of each signature; `None` where its definition was lost.
    signature_words: Vec<Option<(u32, u32)>>,
    /// The kinds of each pattern's words, and of each late pattern's; `None` where its definition was lost.
    kinds: [Vec<Option<Arc<[WordKind]>>>; 2],
}

impl Default for Dictionary {
    fn default() -> Self {
        Self {
            texts: Vec::new(),
            ops: Vec::new(),
            signatures: Vec::new(),
            scopes: vec![global()],
            modules: Vec::new(),
            threads: Vec::new(),
            patterns: vec![Pattern::default()],
            late_patterns: Vec::new(),
            watches: Vec::new(),
            pattern_ids: HashMap::from([(Pattern::default(), PatternId(0))]),
            signature_words: Vec::new(),
            kinds: [vec![Some(Arc::from([]))], Vec::new()],
        }
    }
}

/// The scope of everything.
pub(crate) fn global() -> ScopeDef {
    ScopeDef {
        parent: None,
        name: "Global".to_owned(),
        module: None,
    }
}

macro_rules! tables {
    ($($(#[$doc:meta])* $get:ident, $all:ident: $id:ident => $def:ty;)*) => {
        $(
            $(#[$doc])*
            #[must_use]
            pub fn $get(&self, id: $id) -> Option<&$def> {
                self.$all.get(id.index())
            }

            /// All of them, in the order of their ids.
            pub fn $all(&self) -> impl ExactSizeIterator<Item = ($id, &$def)> {
                (0u32..).map($id).zip(&self.$all).map_into_exact(self.$all.len())
            }
        )*
    };
}

/// Makes a zip with a range an iterator of known length.
trait MapIntoExact: Iterator + Sized {
    fn map_into_exact(self, length: usize) -> Exact<Self> {
        Exact {
            inner: self,
            left: length,
        }
    }
}
impl<I: Iterator> MapIntoExact for I {}

struct Exact<I> {
    inner: I,
    left: usize,
}

impl<I: Iterator> Iterator for Exact<I> {
    type Item = I::Item;

    fn next(&mut self) -> Option<I::Item> {
        let item = self.inner.next()?;
        self.left = self.left.saturating_sub(1);
        Some(item)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}
impl<I: Iterator> ExactSizeIterator for Exact<I> {}

impl Dictionary {
    tables! {
        /// An interned text.
        text, texts: TextId => String;
        /// An operator overload.
        op, ops: OpId => OpDef;
        /// A call's structure.
        signature, signatures: SignatureId => SignatureDef;
        /// A stack of active modules.
        scope, scopes: ScopeId => ScopeDef;
        /// A module object.
        module, modules: ModuleId => ModuleDef;
        /// A thread.
        thread, threads: ThreadId => ThreadDef;
        /// A watched tensor.
        watch, watches: WatchId => WatchDef;
    }

    /// A set of statistics.
    #[must_use]
    pub fn pattern(&self, id: PatternId) -> Option<&Pattern> {
        match id.0.checked_sub(FIRST_LATE_PATTERN) {
            None => self.patterns.get(id.index()),
            Some(late) => self.late_patterns.get(late as usize),
        }
    }

    /// All patterns: those that capture defined, then those that the writer made when statistics arrived late.
    pub fn patterns(&self) -> impl Iterator<Item = (PatternId, &Pattern)> {
        let late = (FIRST_LATE_PATTERN..)
            .map(PatternId)
            .zip(&self.late_patterns);
        (0u32..).map(PatternId).zip(&self.patterns).chain(late)
    }

    /// The id of a pattern with this content, the first that was defined.
    #[must_use]
    pub fn find_pattern(&self, pattern: &Pattern) -> Option<PatternId> {
        self.pattern_ids.get(pattern).copied()
    }

    /// The kinds of a pattern's words, in order.
    pub(crate) fn pattern_kinds(&self, id: PatternId) -> Option<&Arc<[WordKind]>> {
        let [kinds, late_kinds] = &self.kinds;
        match id.0.checked_sub(FIRST_LATE_PATTERN) {
            None => kinds.get(id.index())?.as_ref(),
            Some(late) => late_kinds.get(late as usize)?.as_ref(),
        }
    }

    /// Payload words and tensors of a signature's calls.
    pub(crate) fn signature_words(&self, id: SignatureId) -> Option<(u32, u32)> {
        self.signature_words.get(id.index()).copied().flatten()
    }

    /// How many definitions of each kind there are.
    pub(crate) fn counts(&self) -> Counts {
        let of = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Counts {
            texts: of(self.texts.len()),
            ops: of(self.ops.len()),
            signatures: of(self.signatures.len()),
            scopes: of(self.scopes.len()),
            modules: of(self.modules.len()),
            threads: of(self.threads.len()),
            patterns: of(self.patterns.len()),
            late_patterns: of(self.late_patterns.len()),
            watches: of(self.watches.len()),
        }
    }

    /// Every definition but the two that are always there, in an order in which a writer takes them.
    pub fn definitions(&self) -> impl Iterator<Item = Definition> {
        let texts = self.texts().map(|(i, d)| Definition::Text(i, d.clone()));
        let ops = self.ops().map(|(i, d)| Definition::Op(i, d.clone()));
        let modules = self
            .modules()
            .map(|(i, d)| Definition::Module(i, d.clone()));
        let scopes = self
            .scopes()
            .skip(1)
            .map(|(i, d)| Definition::Scope(i, d.clone()));
        let threads = self
            .threads()
            .map(|(i, d)| Definition::Thread(i, d.clone()));
        let watches = self.watches().map(|(i, d)| Definition::Watch(i, d.clone()));
        let signatures = self
            .signatures()
            .map(|(i, d)| Definition::Signature(i, d.clone()));
        let patterns = self
            .patterns()
            .skip(1)
            .map(|(i, d)| Definition::Pattern(i, d.clone()));
        texts
            .chain(ops)
            .chain(modules)
            .chain(scopes)
            .chain(threads)
            .chain(watches)
            .chain(signatures)
            .chain(patterns)
    }

    /// Takes a definition in. Its id must be the next of its kind, and what it names must be there.
    pub(crate) fn add(&mut self, definition: Definition) -> Result<(), Corrupt> {
        let mut counts = self.counts();
        if !counts.admit(&definition)? {
            return Ok(());
        }
        match definition {
            Definition::Text(_, def) => self.texts.push(def),
            Definition::Op(_, def) => self.ops.push(def),
            Definition::Signature(_, def) => {
                let words = |n: usize| {
                    u32::try_from(n)
                        .map_err(|_| Corrupt::from("a signature has too many payload words"))
                };
                let words = (words(def.payload_words())?, words(def.tensors.len())?);
                self.signature_words.push(Some(words));
                self.signatures.push(def);
            }
            Definition::Scope(_, def) => self.scopes.push(def),
            Definition::Module(_, def) => self.modules.push(def),
            Definition::Thread(_, def) => self.threads.push(def),
            Definition::Pattern(id, def) => {
                self.pattern_ids.entry(def.clone()).or_insert(id);
                let [kinds, late_kinds] = &mut self.kinds;
                if id.0 < FIRST_LATE_PATTERN {
                    kinds.push(Some(word_kinds(&def).into()));
                    self.patterns.push(def);
                } else {
                    late_kinds.push(Some(word_kinds(&def).into()));
                    self.late_patterns.push(def);
                }
            }
            Definition::Watch(_, def) => self.watches.push(def),
        }
        Ok(())
    }
}

/// What stands in the place of a definition that was lost.
const LOST: &str = "(lost)";
/// No more definitions of one kind are taken for lost in a row.
const LOST_LIMIT: u32 = 1 << 16;

/// Tolerance, for recovery.
impl Dictionary {
    /// As [`Dictionary::add`], but the definitions before it may be missing: placeholders stand for them. Blocks that use the
    /// signatures and patterns among those cannot be decoded.
    pub(crate) fn add_after_loss(&mut self, definition: Definition) -> Result<(), Corrupt> {
        let next = self.counts();
        let (id, next) = match &definition {
            Definition::Text(id, _) => (id.0, next.texts),
            Definition::Op(id, _) => (id.0, next.ops),
            Definition::Signature(id, _) => (id.0, next.signatures),
            Definition::Scope(id, _) => (id.0, next.scopes),
            Definition::Module(id, _) => (id.0, next.modules),
            Definition::Thread(id, _) => (id.0, next.threads),
            Definition::Pattern(id, _) if id.0 < FIRST_LATE_PATTERN => (id.0, next.patterns),
            Definition::Pattern(id, _) => (id.0 - FIRST_LATE_PATTERN, next.late_patterns),
            Definition::Watch(id, _) => (id.0, next.watches),
        };
        let lost = id.saturating_sub(next);
        if lost > LOST_LIMIT {
            return Err(Corrupt::from(format!("{lost} definitions are missing")));
        }
        for _ in 0..lost {
            self.add_lost(&definition);
        }
        self.add(definition)
    }

    /// Adds a placeholder of a definition's kind.
    fn add_lost(&mut self, like: &Definition) {
        let name = || LOST.to_owned();
        match like {
            Definition::Text(..) => self.texts.push(name()),
            Definition::Op(..) => self.ops.push(OpDef {
                name: name(),
                ..OpDef::default()
            }),
            Definition::Scope(..) => {
                self.scopes.push(ScopeDef {
                    parent: Some(ScopeId::GLOBAL),
                    name: name(),
                    module: None,
                });
            }
            Definition::Module(..) => self.modules.push(ModuleDef {
                name: name(),
                ..ModuleDef::default()
            }),
            Definition::Thread(..) => self.threads.push(ThreadDef {
                name: name(),
                ..ThreadDef::default()
            }),
            Definition::Watch(..) => self.watches.push(WatchDef {
                what: name(),
                ..WatchDef::default()
            }),
            Definition::Signature(..) => {
                if self.ops.is_empty() {
                    self.ops.push(OpDef {
                        name: name(),
                        ..OpDef::default()
                    });
                }
                self.signatures.push(SignatureDef {
                    op: OpId(0),
                    arguments: Vec::new(),
                    outputs: Vec::new(),
                    tensors: Vec::new(),
                    inputs: 0,
                    flags: call_flags::STRUCTURE_LOST,
                    scope: ScopeId::GLOBAL,
                    stage: Stage::Other,
                    stage_name: None,
                });
                self.signature_words.push(None);
            }
            Definition::Pattern(id, _) => {
                let [kinds, late_kinds] = &mut self.kinds;
                if id.0 < FIRST_LATE_PATTERN {
                    self.patterns.push(Pattern::default());
                    kinds.push(None);
                } else {
                    self.late_patterns.push(Pattern::default());
                    late_kinds.push(None);
                }
            }
        }
    }
}

/// How many definitions of each kind a stream has: all that is needed to check a reference, so that a
/// writer need not keep what it wrote.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) texts: u32,
    pub(crate) ops: u32,
    pub(crate) signatures: u32,
    pub(crate) scopes: u32,
    pub(crate) modules: u32,
    pub(crate) threads: u32,
    pub(crate) patterns: u32,
    pub(crate) late_patterns: u32,
    pub(crate) watches: u32,
}

fn known(kind: &str, id: u32, count: u32) -> Result<(), Corrupt> {
    if id < count {
        Ok(())
    } else {
        Err(Corrupt::from(format!(
            "{kind} {id} is not defined (there are {count})"
        )))
    }
}

impl Counts {
    /// What a new dictionary holds.
    pub(crate) fn new() -> Self {
        Self {
            scopes: 1,
            patterns: 1,
            ..Self::default()
        }
    }

    /// Whether a definition of this kind and number was counted.
    pub(crate) fn has(&self, definition: &Definition) -> bool {
        match definition {
            Definition::Text(id, _) => id.0 < self.texts,
            Definition::Op(id, _) => id.0 < self.ops,
            Definition::Signature(id, _) => id.0 < self.signatures,
            Definition::Scope(id, _) => id.0 < self.scopes,
            Definition::Module(id, _) => id.0 < self.modules,
            Definition::Thread(id, _) => id.0 < self.threads,
            Definition::Pattern(id, _) => match id.0.checked_sub(FIRST_LATE_PATTERN) {
                None => id.0 < self.patterns,
                Some(late) => late < self.late_patterns,
            },
            Definition::Watch(id, _) => id.0 < self.watches,
        }
    }

    /// Checks a definition and counts it. False where it only repeats one of the two that are always there.
    pub(crate) fn admit(&mut self, definition: &Definition) -> Result<bool, Corrupt> {
        let (kind, id, count) = match definition {
            Definition::Text(id, _) => ("text", id.0, &self.texts),
            Definition::Op(id, _) => ("op", id.0, &self.ops),
            Definition::Signature(id, def) => {
                self.check_signature(def)?;
                ("signature", id.0, &self.signatures)
            }
            Definition::Scope(ScopeId::GLOBAL, def) if *def == global() => return Ok(false),
            Definition::Scope(id, def) => {
                let parent = def
                    .parent
                    .ok_or(Corrupt::from("a scope other than Global has no parent"))?;
                known("scope", parent.0, self.scopes)?;
                def.module.map_or(Ok(()), |m| self.check_module(m))?;
                ("scope", id.0, &self.scopes)
            }
            Definition::Module(id, _) => ("module", id.0, &self.modules),
            Definition::Thread(id, _) => ("thread", id.0, &self.threads),
            Definition::Pattern(PatternId(0), def) if def.entries.is_empty() => return Ok(false),
            Definition::Pattern(id, def) => {
                check_pattern(def)?;
                match id.0.checked_sub(FIRST_LATE_PATTERN) {
                    None => ("pattern", id.0, &self.patterns),
                    Some(late) => ("late pattern", late, &self.late_patterns),
                }
            }
            Definition::Watch(id, def) => {
                def.module.map_or(Ok(()), |m| self.check_module(m))?;
                ("watch", id.0, &self.watches)
            }
        };
        if id != *count {
            return Err(Corrupt::from(format!(
                "{kind} {id} is defined where {count} is the next"
            )));
        }
        let count = match definition {
            Definition::Text(..) => &mut self.texts,
            Definition::Op(..) => &mut self.ops,
            Definition::Signature(..) => &mut self.signatures,
            Definition::Scope(..) => &mut self.scopes,
            Definition::Module(..) => &mut self.modules,
            Definition::Thread(..) => &mut self.threads,
            Definition::Pattern(id, _) if id.0 < FIRST_LATE_PATTERN => &mut self.patterns,
            Definition::Pattern(..) => &mut self.late_patterns,
            Definition::Watch(..) => &mut self.watches,
        };
        *count += 1;
        Ok(true)
    }

    fn check_signature(&self, def: &SignatureDef) -> Result<(), Corrupt> {
        known("op", def.op.0, self.ops)?;
        known("scope", def.scope.0, self.scopes)?;
        def.stage_name.map_or(Ok(()), |t| self.check_text(t))?;
        if usize::from(def.inputs) > def.tensors.len() {
            return Err(Corrupt::from("a signature has more inputs than tensors"));
        }
        let tensor = |i: u16| {
            if usize::from(i) < def.tensors.len() {
                Ok(())
            } else {
                Err(Corrupt::from(format!(
                    "a signature names tensor {i} of {}",
                    def.tensors.len()
                )))
            }
        };
        for argument in def.arguments.iter().chain(&def.outputs) {
            match argument {
                Argument::Tensor(i) => tensor(*i)?,
                Argument::TensorList(list) => list.iter().flatten().try_for_each(|&i| tensor(i))?,
                Argument::Text(text) | Argument::Opaque(text) => self.check_text(*text)?,
                _ => {}
            }
        }
        Ok(())
    }

    pub(crate) fn check_text(&self, id: TextId) -> Result<(), Corrupt> {
        known("text", id.0, self.texts)
    }

    pub(crate) fn check_module(&self, id: ModuleId) -> Result<(), Corrupt> {
        known("module", id.0, self.modules)
    }

    pub(crate) fn check_thread(&self, id: ThreadId) -> Result<(), Corrupt> {
        known("thread", id.0, self.threads)
    }

    /// Whether everything that a record names is defined.
    pub(crate) fn check_moment(&self, moment: &Moment) -> Result<(), Corrupt> {
        self.check_thread(moment.thread)?;
        match &moment.event {
            Event::ModuleEnter { module, .. } | Event::ModuleExit { module, .. } => {
                self.check_module(*module)
            }
            Event::StateAssign {
                module, attribute, ..
            } => {
                self.check_module(*module)?;
                self.check_text(*attribute)
            }
            Event::RangeEnter { name } | Event::RangeExit { name } | Event::Opaque { name, .. } => {
                self.check_text(*name)
            }
            Event::StageChange { name } => name.map_or(Ok(()), |t| self.check_text(t)),
            Event::Fact { module, key, .. } => {
                module.map_or(Ok(()), |m| self.check_module(m))?;
                self.check_text(*key)
            }
            Event::Sample { series, .. } => self.check_text(*series),
            Event::Statistics { values, .. } => values.iter().try_for_each(check_late),
            _ => Ok(()),
        }
    }
}

fn check_late(late: &LateStatistic) -> Result<(), Corrupt> {
    if late.fields.count_ones() as usize == late.values.len() {
        Ok(())
    } else {
        Err(Corrupt::from(
            "late statistics have another number of values than fields",
        ))
    }
}

fn check_pattern(pattern: &Pattern) -> Result<(), Corrupt> {
    if !pattern
        .entries
        .is_sorted_by(|a, b| (a.operand, a.when) < (b.operand, b.when))
    {
        return Err(Corrupt::from(
            "a pattern is not sorted by operand and time, or names one twice",
        ));
    }
    if pattern
        .entries
        .iter()
        .any(|e| e.state != State::Present && e.fields != 0)
    {
        return Err(Corrupt::from("a pattern has numbers that are not present"));
    }
    Ok(())
}

/// What becomes of a number when calls are summed up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WordKind {
    Integer,
    Float,
    Minimum,
    Maximum,
}

/// The kinds of a pattern's words, in order.
pub(crate) fn word_kinds(pattern: &Pattern) -> Vec<WordKind> {
    let kind = |field: u32| match field {
        fields::MINIMUM => WordKind::Minimum,
        fields::MAXIMUM => WordKind::Maximum,
        _ if fields::is_integer(field) => WordKind::Integer,
        _ => WordKind::Float,
    };
    pattern
        .entries
        .iter()
        .flat_map(|e| fields::each(e.fields).map(kind))
        .collect()
}

/// A call's pattern and numbers after late statistics for it have arrived: what was pending and is named becomes present or
/// lost, all else stays.
pub(crate) fn resolve(
    pattern: &Pattern,
    words: &[u64],
    late: &[LateStatistic],
) -> (Pattern, Vec<u64>) {
    merge(pattern, words, |entry| {
        late.iter()
            .find(|l| l.operand == entry.operand && l.when == entry.when)
    })
}

/// A call's pattern after it is certain that nothing more arrives: what is pending is lost.
pub(crate) fn give_up(pattern: &Pattern) -> Pattern {
    let entries = pattern.entries.iter().map(|&e| match e.state {
        State::Pending => PatternEntry {
            state: State::Lost,
            ..e
        },
        _ => e,
    });
    Pattern {
        entries: entries.collect(),
    }
}

fn merge<'a>(
    pattern: &Pattern,
    words: &[u64],
    find: impl Fn(&PatternEntry) -> Option<&'a LateStatistic>,
) -> (Pattern, Vec<u64>) {
    let mut rest = words;
    let mut entries = Vec::with_capacity(pattern.entries.len());
    let mut numbers = Vec::with_capacity(words.len());
    for &entry in &pattern.entries {
        let (mine, others) = rest
            .split_at_checked(entry.fields.count_ones() as usize)
            .unwrap_or((rest, &[]));
        rest = others;
        match find(&entry).filter(|_| entry.state == State::Pending) {
            None => {
                entries.push(entry);
                numbers.extend(mine);
            }
            Some(late) if late.lost => entries.push(PatternEntry {
                state: State::Lost,
                ..entry
            }),
            Some(late) => {
                entries.push(PatternEntry {
                    state: State::Present,
                    binary: late.binary,
                    fields: late.fields,
                    ..entry
                });
                numbers.extend(&late.values);
            }
        }
    }
    (Pattern { entries }, numbers)
}
