//! What is known at a record: which tensors there are and where they lie, what is known of their values, what modules are.

use std::collections::{BTreeMap, HashMap, HashSet};

use smallvec::SmallVec;

use super::Map;
use optape_trace::{
    CallId, Dictionary, ModuleDef, ModuleId, TensorMeta, TextId, tensor_flags,
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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Known {
    /// All are 0 or 1.
    pub binary: Option<bool>,
    /// How many are not 0.
    pub nonzeros: Option<u64>,
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
    /// The stage that the program had named on its thread when it ended.
    pub stage_name: Option<TextId>,
    /// Of which module.
    pub module: ModuleId,
    /// The modules that run, itself first, then those that it was called in.
    pub stack: Vec<ModuleId>,
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

#[derive(Clone, Copy, Debug)]
struct Tensor<'a> {
    storage: u64,
    root: u64,
    /// The tensor at the beginning of a chain of views that gradients flow through.
    gradient_base: Option<u64>,
    meta: &'a TensorMeta,
}

#[derive(Clone, Debug, Default)]
struct Storage {
    generation: u64,
    tensors: SmallVec<[u64; 2]>,
    /// What is known of the present values of each root.
    known: SmallVec<[(u64, Known); 1]>,
}

/// What is known at a record.
#[derive(Debug)]
pub struct World<'a> {
    /// The stream's names.
    pub dictionary: &'a Dictionary,
    /// By number.
    modules: Vec<ModuleState>,
    tensors: Map<u64, Tensor<'a>>,
    storages: Map<u64, Storage>,
    /// Modules that were called while no other was running, in the order of their first call.
    roots: Vec<ModuleId>,
    /// Facts about the program.
    program: HashMap<String, Value>,
    /// Steps of optimizers before what is selected.
    earlier_optimizer_steps: u64,
    /// Of those in it, the stage that the program had named.
    optimizer_steps: Vec<Option<TextId>>,
}

impl<'a> World<'a> {
    pub(crate) fn new(dictionary: &'a Dictionary) -> Self {
        Self {
            dictionary,
            modules: Vec::new(),
            tensors: Map::default(),
            storages: Map::default(),
            roots: Vec::new(),
            program: HashMap::new(),
            earlier_optimizer_steps: 0,
            optimizer_steps: Vec::new(),
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
        self.optimizer_steps.len() as u64
    }

    /// The stage that the program had named at one of them, counted from 0.
    #[must_use]
    pub fn optimizer_stage(&self, step: u64) -> Option<TextId> {
        let at = usize::try_from(step).ok()?;
        *self.optimizer_steps.get(at)?
    }

    /// Steps of optimizers before what is selected.
    #[must_use]
    pub const fn earlier_optimizer_steps(&self) -> u64 {
        self.earlier_optimizer_steps
    }

    pub(crate) fn optimizer_step(&mut self, selected: bool, stage: Option<TextId>) {
        if selected {
            self.optimizer_steps.push(stage);
        } else if self.optimizer_steps.is_empty() {
            self.earlier_optimizer_steps += 1;
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
        self.modules.get(module.index())
    }

    /// The state of a module that the dictionary has.
    fn module_mut(&mut self, module: ModuleId) -> Option<&mut ModuleState> {
        self.dictionary.module(module)?;
        if self.modules.len() <= module.index() {
            let length = module.index() + 1;
            self.modules.resize_with(length, ModuleState::default);
        }
        self.modules.get_mut(module.index())
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
            if let Some(state) = self.module(module) {
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
        self.tensors.get(&tensor).map(|t| t.meta)
    }

    /// The memory that a tensor lies in, and the tensor as an op has had it last.
    #[must_use]
    pub fn tensor(&self, tensor: u64) -> Option<(u64, &TensorMeta)> {
        self.tensors.get(&tensor).map(|t| (t.storage, t.meta))
    }

    /// The tensors that lie in a memory.
    pub fn tensors_in(&self, storage: u64) -> impl Iterator<Item = u64> + '_ {
        let storage = self.storages.get(&storage);
        storage.into_iter().flat_map(|s| s.tensors.iter().copied())
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
        let Some(storage) = self.storages.get(&content.storage) else {
            return Known::default();
        };
        if storage.generation != content.generation {
            return Known::default();
        }
        let of_root = |(root, _): &&(u64, Known)| *root == content.root;
        let known = storage.known.iter().find(of_root);
        known.map(|(_, known)| *known).unwrap_or_default()
    }

    pub(crate) fn reference(&self, tensor: u64) -> Option<TensorRef> {
        Some(TensorRef {
            meta: self.meta_of(tensor)?.clone(),
            content: self.content_of(tensor)?,
        })
    }

    pub(crate) fn fact(&mut self, module: ModuleId, key: &str, value: &str) {
        if let Ok(value) = serde_json::from_str(value) {
            if let Some(state) = self.module_mut(module) {
                state.facts.insert(key.to_owned(), value);
            }
        }
    }

    pub(crate) fn state(&mut self, module: ModuleId, attribute: TextId, tensor: u64) {
        if let Some(state) = self.module_mut(module) {
            state.states.insert(attribute, tensor);
        }
    }

    pub(crate) fn root(&mut self, module: ModuleId) {
        if !self.roots.contains(&module) {
            self.roots.push(module);
        }
    }

    /// A tensor is at hand.
    #[inline]
    pub(crate) fn place(&mut self, tensor: u64, storage: u64, meta: &'a TensorMeta) {
        if tensor == 0 || storage == 0 {
            return;
        }
        match self.tensors.get_mut(&tensor) {
            Some(known) if known.storage == storage => known.meta = meta,
            _ => self.put(tensor, storage, meta, None, false),
        }
    }

    /// A tensor is at hand that an op gave; `base`: one that may share all its elements. `flows`: gradients flow from the one to the other.
    #[inline]
    pub(crate) fn place_result(
        &mut self,
        tensor: u64,
        storage: u64,
        meta: &'a TensorMeta,
        base: Option<u64>,
        flows: bool,
    ) {
        if tensor == 0 || storage == 0 {
            return;
        }
        match self.tensors.get_mut(&tensor) {
            Some(known) if known.storage == storage => known.meta = meta,
            _ => self.put(tensor, storage, meta, base, flows),
        }
    }

    /// Takes a new tensor in, or one that lies elsewhere now.
    fn put(
        &mut self,
        tensor: u64,
        storage: u64,
        meta: &'a TensorMeta,
        base: Option<u64>,
        flows: bool,
    ) {
        let known = base.and_then(|base| self.tensors.get(&base));
        let root = known
            .filter(|base| base.storage == storage)
            .map_or(tensor, |base| base.root);
        let gradient_base = base
            .filter(|_| flows)
            .map(|base| known.and_then(|known| known.gradient_base).unwrap_or(base));
        let put = Tensor {
            storage,
            root,
            gradient_base,
            meta,
        };
        if let Some(moved) = self.tensors.insert(tensor, put)
            && let Some(old) = self.storages.get_mut(&moved.storage)
        {
            old.tensors.retain(|known| *known != tensor);
        }
        self.storages.entry(storage).or_default().tensors.push(tensor);
    }

    /// The memory was written: nothing is known of its values any more.
    #[inline]
    pub(crate) fn written(&mut self, storage: u64) {
        let storage = self.storages.entry(storage).or_default();
        storage.generation += 1;
        storage.known.clear();
    }

    #[inline]
    pub(crate) fn learn(&mut self, tensor: u64, binary: Option<bool>, nonzeros: Option<u64>) {
        let Some(Tensor { storage, root, .. }) = self.tensors.get(&tensor) else {
            return;
        };
        let Some(storage) = self.storages.get_mut(storage) else {
            return;
        };
        let known = match storage.known.iter_mut().find(|(known, _)| known == root) {
            Some((_, known)) => known,
            None => {
                storage.known.push((*root, Known::default()));
                match storage.known.last_mut() {
                    Some((_, known)) => known,
                    None => return,
                }
            }
        };
        known.binary = binary.or(known.binary);
        known.nonzeros = nonzeros.or(known.nonzeros);
    }

    pub(crate) fn forget_tensor(&mut self, tensor: u64) {
        if let Some(known) = self.tensors.remove(&tensor)
            && let Some(storage) = self.storages.get_mut(&known.storage)
        {
            storage.tensors.retain(|other| *other != tensor);
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
        self.module(module).map_or(0, |state| {
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
