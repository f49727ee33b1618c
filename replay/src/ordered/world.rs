//! What is known at a record: which tensors there are and where they lie, what is known of their values, what modules are.

use std::collections::{BTreeMap, HashMap, HashSet};

use optape_trace::{
    CallId, Dictionary, ModuleDef, ModuleId, Operand, PatternEntry, TensorMeta, TextId, When,
    fields, tensor_flags,
};
use serde_json::Value;

/// Values of a tensor between two writes to its memory. Views of all its elements share them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Content {
    root: u64,
    storage: u64,
    generation: u64,
}

/// What statistics have told of some values.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Known {
    /// All are 0 or 1.
    pub binary: Option<bool>,
    /// How many are not 0.
    pub nonzeros: Option<u64>,
    /// Their sum.
    pub sum: Option<f64>,
}

impl Known {
    /// What the statistics of an operand say; `words` are those of its entry.
    #[must_use]
    pub fn of(entry: &PatternEntry, words: &[u64]) -> Self {
        let word = |field: u32| {
            let before = (entry.fields & (field - 1)).count_ones() as usize;
            (entry.fields & field != 0)
                .then(|| words.get(before).copied())
                .flatten()
        };
        Self {
            binary: entry.binary,
            nonzeros: word(fields::NONZEROS),
            sum: word(fields::SUM).map(f64::from_bits),
        }
        .completed()
    }

    /// With what follows: spikes add up to their number.
    fn completed(self) -> Self {
        #[expect(clippy::cast_precision_loss, reason = "no tensor has 2^53 elements")]
        let spikes = || self.nonzeros.map(|nonzeros| nonzeros as f64);
        Self {
            sum: self
                .sum
                .or_else(|| (self.binary == Some(true)).then(spikes).flatten()),
            ..self
        }
    }

    fn or(self, other: Self) -> Self {
        Self {
            binary: self.binary.or(other.binary),
            nonzeros: self.nonzeros.or(other.nonzeros),
            sum: self.sum.or(other.sum),
        }
        .completed()
    }
}

/// A tensor that went into a module call or came out of it.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorRef {
    /// Shape, type, flags as an op has seen it last.
    pub meta: TensorMeta,
    /// Its values at the end of the call.
    pub content: Content,
}

/// A module call that has ended.
#[derive(Clone, Debug, PartialEq)]
pub struct ModuleCall {
    /// Its place in the stream: where it ended.
    pub ordinal: u64,
    /// Which call.
    pub call: CallId,
    /// Of which module.
    pub module: ModuleId,
    /// Its tensor arguments; `None` where no op has had the tensor.
    pub arguments: Vec<Option<TensorRef>>,
    /// Its tensor results.
    pub results: Vec<Option<TensorRef>>,
    /// Bytes of the tensors that the module's states held when it ended.
    pub state_bytes: u64,
    /// Names on the stack of modules, its own among them, `Global` too.
    pub scopes: Vec<String>,
}

/// What a module is: the facts that hold.
#[derive(Clone, Debug, Default)]
pub struct ModuleState {
    /// Facts by key, as FORMAT.md lists them.
    pub facts: HashMap<String, Value>,
    /// The tensor that each state attribute holds; 0 where it holds none.
    pub states: BTreeMap<TextId, u64>,
}

impl ModuleState {
    /// An attribute of simple type.
    #[must_use]
    pub fn attribute(&self, name: &str) -> Option<&Value> {
        self.facts.get("attributes")?.get(name)
    }

    /// An attribute that is an integer.
    #[must_use]
    pub fn integer(&self, name: &str) -> Option<i128> {
        self.attribute(name)?.as_i64().map(i128::from)
    }

    /// An attribute that is a list of integers.
    #[must_use]
    pub fn integers(&self, name: &str) -> Option<Vec<i128>> {
        let list = self.attribute(name)?.as_array()?;
        list.iter().map(|v| v.as_i64().map(i128::from)).collect()
    }

    /// Whether a call takes all time steps at once.
    #[must_use]
    pub fn is_multi_step(&self) -> bool {
        self.attribute("step_mode").and_then(Value::as_str) == Some("m")
    }

    /// Elements of one of its own parameters.
    #[must_use]
    pub fn parameter_elements(&self, name: &str) -> Option<i128> {
        self.parameters()
            .find(|(n, _, _)| *n == name)
            .map(|(_, elements, _)| elements)
    }

    /// Its own parameters: name, elements, bytes of an element.
    pub fn parameters(&self) -> impl Iterator<Item = (&str, i128, i128)> {
        let list = self.facts.get("parameters").and_then(Value::as_array);
        list.into_iter().flatten().filter_map(|p| {
            let shape = p.get("shape")?.as_array()?;
            let elements = shape
                .iter()
                .map(|s| s.as_i64().map(i128::from))
                .try_fold(1i128, |n, size| n.checked_mul(size?))?;
            let bytes = bytes_of(p.get("dtype")?.as_str()?)?;
            Some((p.get("name")?.as_str()?, elements, bytes))
        })
    }

    /// Name and number of its children that have one.
    pub fn children(&self) -> impl Iterator<Item = (&str, ModuleId)> {
        let list = self.facts.get("children").and_then(Value::as_array);
        list.into_iter().flatten().filter_map(|child| {
            let number = u32::try_from(child.get(1)?.as_i64()?).ok()?;
            Some((child.get(0)?.as_str()?, ModuleId(number)))
        })
    }
}

/// Bytes of an element by the type's name in torch.
fn bytes_of(dtype: &str) -> Option<i128> {
    Some(match dtype {
        "bool" | "uint8" | "int8" => 1,
        name if name.starts_with("float8") => 1,
        "float16" | "bfloat16" | "int16" | "uint16" => 2,
        "float32" | "int32" | "uint32" | "complex32" => 4,
        "float64" | "int64" | "uint64" | "complex64" => 8,
        "complex128" => 16,
        _ => return None,
    })
}

#[derive(Clone, Debug)]
struct Tensor {
    storage: u64,
    root: u64,
    /// The tensor at the beginning of a chain of views that gradients flow through.
    gradient_base: Option<u64>,
    meta: TensorMeta,
}

#[derive(Clone, Debug, Default)]
struct Storage {
    generation: u64,
    tensors: HashSet<u64>,
    known: HashMap<Content, Known>,
}

/// In the place of the memory of a tensor that has none: no recorder gives out numbers as large.
const NOWHERE: u64 = 1 << 63;

/// What is known at a record.
#[derive(Debug)]
pub struct World<'a> {
    /// The stream's names.
    pub dictionary: &'a Dictionary,
    modules: HashMap<ModuleId, ModuleState>,
    tensors: HashMap<u64, Tensor>,
    storages: HashMap<u64, Storage>,
    /// Modules that were called while no other was running, in the order of their first call.
    roots: Vec<ModuleId>,
    /// Facts about the program.
    program: HashMap<String, Value>,
    /// Steps of optimizers: before what is selected, and in it.
    optimizer_steps: (u64, u64),
}

impl<'a> World<'a> {
    pub(crate) fn new(dictionary: &'a Dictionary) -> Self {
        Self {
            dictionary,
            modules: HashMap::new(),
            tensors: HashMap::new(),
            storages: HashMap::new(),
            roots: Vec::new(),
            program: HashMap::new(),
            optimizer_steps: (0, 0),
        }
    }

    /// A fact about the program, of optimizers for instance.
    #[must_use]
    pub fn program(&self, key: &str) -> Option<&Value> {
        self.program.get(key)
    }

    /// Steps of optimizers in what is selected.
    #[must_use]
    pub const fn optimizer_steps(&self) -> u64 {
        self.optimizer_steps.1
    }

    /// Steps of optimizers before what is selected.
    #[must_use]
    pub const fn earlier_optimizer_steps(&self) -> u64 {
        self.optimizer_steps.0
    }

    pub(crate) fn optimizer_step(&mut self, selected: bool) {
        if selected {
            self.optimizer_steps.1 += 1;
        } else if self.optimizer_steps.1 == 0 {
            self.optimizer_steps.0 += 1;
        }
    }

    pub(crate) fn program_fact(&mut self, key: &str, value: &str) {
        if let Ok(value) = serde_json::from_str(value) {
            self.program.insert(key.to_owned(), value);
        }
    }

    /// A module's facts and states.
    #[must_use]
    pub fn module(&self, module: ModuleId) -> Option<&ModuleState> {
        self.modules.get(&module)
    }

    /// Name and classes of a module.
    #[must_use]
    pub fn definition(&self, module: ModuleId) -> Option<&'a ModuleDef> {
        self.dictionary.module(module)
    }

    /// Whether a module is of a class, by qualified name.
    #[must_use]
    pub fn is(&self, module: ModuleId, class: &str) -> bool {
        self.definition(module)
            .is_some_and(|def| def.classes.iter().any(|c| c == class))
    }

    /// Modules that were called while no other was running, so far.
    #[must_use]
    pub fn roots(&self) -> &[ModuleId] {
        &self.roots
    }

    /// The module and all below it by the paths of `named_modules()`: each once, under its first name. The root's path is empty.
    #[must_use]
    pub fn named_modules(&self, root: ModuleId) -> Vec<(String, ModuleId)> {
        let mut all = Vec::new();
        let mut seen = HashSet::new();
        let mut stack = vec![(String::new(), root)];
        while let Some((path, module)) = stack.pop() {
            if !seen.insert(module) {
                continue;
            }
            if let Some(state) = self.modules.get(&module) {
                let children: Vec<(String, ModuleId)> = state
                    .children()
                    .map(|(name, child)| {
                        let path = if path.is_empty() {
                            name.to_owned()
                        } else {
                            format!("{path}.{name}")
                        };
                        (path, child)
                    })
                    .collect();
                stack.extend(children.into_iter().rev());
            }
            all.push((path, module));
        }
        all
    }

    /// The memory that a tensor lies in.
    #[must_use]
    pub fn storage_of(&self, tensor: u64) -> Option<u64> {
        self.tensors.get(&tensor).map(|t| t.storage)
    }

    /// A tensor as an op has had it last.
    #[must_use]
    pub fn meta_of(&self, tensor: u64) -> Option<&TensorMeta> {
        self.tensors.get(&tensor).map(|t| &t.meta)
    }

    /// Whether gradients flow into a tensor, or into one that it is a view of: torch says so of views that were made without grad mode,
    /// which a call's flags do not.
    #[must_use]
    pub fn requires_grad(&self, tensor: u64) -> bool {
        let flag = |tensor: u64| {
            self.meta_of(tensor)
                .is_some_and(|meta| meta.is(tensor_flags::REQUIRES_GRAD))
        };
        let base = self.tensors.get(&tensor).and_then(|t| t.gradient_base);
        flag(tensor) || base.is_some_and(flag)
    }

    /// The present values of a tensor.
    #[must_use]
    pub fn content_of(&self, tensor: u64) -> Option<Content> {
        let tensor = self.tensors.get(&tensor)?;
        let generation = self.storages.get(&tensor.storage)?.generation;
        Some(Content {
            root: tensor.root,
            storage: tensor.storage,
            generation,
        })
    }

    /// What is known of values.
    #[must_use]
    pub fn known(&self, content: Content) -> Known {
        self.storages
            .get(&content.storage)
            .and_then(|storage| storage.known.get(&content))
            .copied()
            .unwrap_or_default()
    }

    pub(crate) fn reference(&self, tensor: u64) -> Option<TensorRef> {
        Some(TensorRef {
            meta: self.meta_of(tensor)?.clone(),
            content: self.content_of(tensor)?,
        })
    }

    pub(crate) fn fact(&mut self, module: ModuleId, key: &str, value: &str) {
        if let Ok(value) = serde_json::from_str(value) {
            let facts = &mut self.modules.entry(module).or_default().facts;
            facts.insert(key.to_owned(), value);
        }
    }

    pub(crate) fn state(&mut self, module: ModuleId, attribute: TextId, tensor: u64) {
        let states = &mut self.modules.entry(module).or_default().states;
        states.insert(attribute, tensor);
    }

    pub(crate) fn root(&mut self, module: ModuleId) {
        if !self.roots.contains(&module) {
            self.roots.push(module);
        }
    }

    /// A tensor is at hand; `base`: one that shares all its elements. `flows`: gradients flow from the one to the other.
    pub(crate) fn place(
        &mut self,
        tensor: u64,
        storage: u64,
        meta: &TensorMeta,
        base: Option<u64>,
        flows: bool,
    ) {
        // An empty tensor may lie nowhere; it is known all the same.
        let storage = match storage {
            0 if meta.elements() == 0 => NOWHERE | tensor,
            storage => storage,
        };
        if tensor == 0 || storage == 0 {
            return;
        }
        let root = base
            .and_then(|base| self.tensors.get(&base))
            .filter(|base| base.storage == storage)
            .map_or(tensor, |base| base.root);
        let gradient_base = base.filter(|_| flows).map(|base| {
            self.tensors
                .get(&base)
                .and_then(|known| known.gradient_base)
                .unwrap_or(base)
        });
        match self.tensors.get_mut(&tensor) {
            Some(known) if known.storage == storage => {
                known.meta.clone_from(meta);
                return;
            }
            _ => {}
        }
        self.forget_tensor(tensor);
        let memory = self.storages.entry(storage).or_default();
        memory.tensors.insert(tensor);
        self.tensors.insert(
            tensor,
            Tensor {
                storage,
                root,
                gradient_base,
                meta: meta.clone(),
            },
        );
    }

    /// The memory was written: nothing is known of its values any more.
    pub(crate) fn written(&mut self, storage: u64) {
        let storage = self.storages.entry(storage).or_default();
        storage.generation += 1;
        storage.known.clear();
    }

    pub(crate) fn learn(&mut self, tensor: u64, entry: &PatternEntry, words: &[u64]) {
        let Some(content) = self.content_of(tensor) else {
            return;
        };
        let Some(storage) = self.storages.get_mut(&content.storage) else {
            return;
        };
        let known = storage.known.entry(content).or_default();
        *known = Known::of(entry, words).or(*known);
    }

    pub(crate) fn forget_tensor(&mut self, tensor: u64) {
        if let Some(known) = self.tensors.remove(&tensor)
            && let Some(storage) = self.storages.get_mut(&known.storage)
        {
            storage.tensors.remove(&tensor);
        }
    }

    pub(crate) fn forget_storage(&mut self, storage: u64) {
        if let Some(known) = self.storages.remove(&storage) {
            for tensor in known.tensors {
                self.tensors.remove(&tensor);
            }
        }
    }

    /// Bytes of the tensors that a module's states hold.
    pub(crate) fn state_bytes(&self, module: ModuleId) -> u64 {
        self.modules.get(&module).map_or(0, |state| {
            state
                .states
                .values()
                .filter_map(|tensor| self.meta_of(*tensor))
                .map(TensorMeta::bytes)
                .sum()
        })
    }
}

impl Content {
    /// The memory that the values lie in.
    #[must_use]
    pub fn storage(&self) -> u64 {
        self.storage
    }
}

/// Whether an entry is about a tensor at that time.
pub(crate) fn is_about(entry: &PatternEntry, tensor: usize, when: When) -> bool {
    entry.when == when && matches!(entry.operand, Operand::Tensor(at) if usize::from(at) == tensor)
}
