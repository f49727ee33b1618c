//! Which modules an op belongs to, and which stage.
//!
//! Forward is easy: every thread has its stack of active modules. Backward has no stack; there the running autograd node says
//! where it came from: nodes are numbered per forward thread, and `peek` is the number that the next node gets, so a node s
//! was made by the first op of that thread whose peek exceeds s. Every thread keeps a bounded table of (peek, scope)
//! for that; nodes older than the table are unattributed.

use std::collections::{HashMap, VecDeque};

use optape_trace::{ModuleId, ScopeId, Stage, TextId};

use super::identities::AddressMap;
use crate::abi::{Call, NO_NODE};

/// Nodes remembered per forward thread.
const REMEMBERED_NODES: usize = 1 << 16;
/// Distinct module stacks. Recursion without end would make ever more of them.
const MOST_SCOPES: usize = 1 << 16;

/// A module that runs on a thread.
#[derive(Clone, Copy)]
struct Active {
    module: u32,
    scope: ScopeId,
    call: u64,
    /// Entered while autograd ran: a forward that runs again.
    again: bool,
    grad_mode: bool,
    training: bool,
    /// Its beginning is in the trace.
    told: bool,
}

/// A module call as it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ended {
    pub(super) call: u64,
    /// No other module was running, and autograd did not run it again.
    pub(super) root: bool,
    /// In training mode and with gradients.
    pub(super) trained: bool,
    /// Its beginning is in the trace.
    pub(super) told: bool,
}

/// An open range.
#[derive(Clone, Copy)]
pub(super) struct OpenRange {
    pub(super) name: TextId,
    /// Its beginning is in the trace.
    pub(super) told: bool,
}

/// A module call as it begins.
#[derive(Clone, Copy)]
pub(super) struct Entry {
    pub(super) module: u32,
    pub(super) graph_task: bool,
    pub(super) training: bool,
    pub(super) grad_mode: bool,
}

/// What capture knows of a thread of the recorded process.
#[derive(Default)]
pub(super) struct ThreadState {
    active: Vec<Active>,
    /// (peek, scope) of ops, peek rising. No scope: of ops that ran unseen.
    nodes: VecDeque<(u64, Option<ScopeId>)>,
    /// Ops ran unseen since the newest of `nodes`.
    missed_ops: bool,
    optimizer_depth: u32,
    /// The last root module was in training mode.
    pub(super) training: bool,
    pub(super) stage_name: Option<TextId>,
    /// Open `record_function` ranges: handle storage is not seen, so exits close the innermost.
    pub(super) ranges: Vec<OpenRange>,
    /// The last node looked up, and its scope.
    last_node: Option<(u64, u64, Option<ScopeId>)>,
}

impl ThreadState {
    /// Nodes below `peek` that are not in the table yet were made by ops of `scope`.
    fn made_nodes(&mut self, peek: u64, scope: Option<ScopeId>) {
        if self.nodes.len() >= REMEMBERED_NODES {
            self.nodes.pop_front();
        }
        self.nodes.push_back((peek, scope));
    }

    /// The first op after others that were not seen: but for the newest one, which is its own, nobody knows who made the nodes.
    #[cold]
    fn saw_again(&mut self, peek: u64) {
        self.missed_ops = false;
        let newest = self.nodes.back().map_or(0, |n| n.0);
        let others = peek.saturating_sub(1);
        if others > newest {
            self.made_nodes(others, None);
        }
    }
}

/// Where an op stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) scope: ScopeId,
    pub(super) stage: Stage,
    pub(super) unattributed: bool,
}

/// The tree of module stacks, and the threads.
pub(super) struct Scopes {
    /// (parent, module) -> scope.
    children: HashMap<(u32, u32), ScopeId>,
    /// Per scope, `Global` first: parent and module.
    pub(super) nodes: Vec<Option<(ScopeId, ModuleId)>>,
    pub(super) threads: Vec<ThreadState>,
    /// torch's thread id -> index in `threads`.
    by_torch_id: HashMap<u64, u32>,
    /// TensorImpl of a parameter -> the module that owns it.
    parameters: AddressMap<u32>,
    /// Module -> the first scope in which it ran: where its AccumulateGrad belongs.
    home: HashMap<u32, ScopeId>,
    /// A root module was called with grad mode on, and no backward or optimizer step since.
    loss_pending: bool,
    next_call: u64,
    pub(super) unattributed: u64,
}

impl Scopes {
    pub(super) fn new() -> Self {
        Self {
            children: HashMap::new(),
            nodes: vec![None],
            threads: Vec::new(),
            by_torch_id: HashMap::new(),
            parameters: AddressMap::default(),
            home: HashMap::new(),
            loss_pending: false,
            next_call: 0,
            unattributed: 0,
        }
    }

    pub(super) fn know_thread(&mut self, torch_id: u64, thread: u32) {
        self.by_torch_id.insert(torch_id, thread);
    }

    /// A module begins to run. `told`: that will be in the trace. Gives the call's id, and the scope if it is new.
    pub(super) fn enter(
        &mut self,
        thread: usize,
        entry: Entry,
        told: bool,
    ) -> (u64, Option<ScopeId>) {
        let Entry {
            module,
            graph_task,
            training,
            grad_mode,
        } = entry;
        let call = self.next_call;
        self.next_call += 1;
        let state = &mut self.threads[thread];
        let parent = state.active.last().map_or(ScopeId::GLOBAL, |a| a.scope);
        if state.active.is_empty() && !graph_task {
            state.training = training;
        }
        let mut fresh = None;
        let scope = match self.children.get(&(parent.0, module)) {
            Some(scope) => *scope,
            None if self.nodes.len() >= MOST_SCOPES => parent,
            None => {
                let scope = ScopeId(self.nodes.len() as u32);
                self.nodes.push(Some((parent, ModuleId(module))));
                self.children.insert((parent.0, module), scope);
                self.home.entry(module).or_insert(scope);
                fresh = Some(scope);
                scope
            }
        };
        state.active.push(Active {
            module,
            scope,
            call,
            again: graph_task,
            grad_mode,
            training,
            told,
        });
        (call, fresh)
    }

    /// Whether no module runs on the thread.
    pub(super) fn is_outside(&self, thread: usize) -> bool {
        self.threads[thread].active.is_empty()
    }

    /// Module calls that run and are not in the trace, outermost first: thread, call, module. From now on they are.
    pub(super) fn tell_open_calls(&mut self) -> Vec<(usize, u64, u32)> {
        let mut untold = Vec::new();
        for (thread, state) in self.threads.iter_mut().enumerate() {
            for active in state.active.iter_mut().filter(|active| !active.told) {
                active.told = true;
                untold.push((thread, active.call, active.module));
            }
        }
        untold
    }

    /// The same of ranges.
    pub(super) fn tell_open_ranges(&mut self) -> Vec<(usize, TextId)> {
        let mut untold = Vec::new();
        for (thread, state) in self.threads.iter_mut().enumerate() {
            for range in state.ranges.iter_mut().filter(|range| !range.told) {
                range.told = true;
                untold.push((thread, range.name));
            }
        }
        untold
    }

    /// Ops ran unseen: who made the nodes of that time is not known.
    pub(super) fn missed_ops(&mut self) {
        for state in &mut self.threads {
            state.missed_ops = true;
            state.last_node = None;
        }
    }

    /// Nothing that runs now is in the trace: it is a new one.
    pub(super) fn nothing_told(&mut self) {
        for state in &mut self.threads {
            state
                .active
                .iter_mut()
                .for_each(|active| active.told = false);
            state.ranges.iter_mut().for_each(|range| range.told = false);
        }
    }

    /// A module ends; `None` where it was not entered.
    pub(super) fn exit(&mut self, thread: usize, module: u32) -> Option<Ended> {
        let state = &mut self.threads[thread];
        // An exception may have left inner modules behind: they end with the outer one.
        let depth = state.active.iter().rposition(|a| a.module == module)?;
        let ended = state.active[depth];
        state.active.truncate(depth);
        let root = depth == 0 && !ended.again;
        if root {
            self.loss_pending |= ended.grad_mode;
        }
        Some(Ended {
            call: ended.call,
            root,
            trained: ended.training && ended.grad_mode,
            told: ended.told,
        })
    }

    /// The modules that run on a thread, outermost first.
    pub(super) fn active(&self, thread: usize) -> impl Iterator<Item = u32> {
        self.threads[thread]
            .active
            .iter()
            .map(|active| active.module)
    }

    pub(super) fn optimizer(&mut self, thread: usize, enter: bool) {
        let state = &mut self.threads[thread];
        state.optimizer_depth = if enter {
            state.optimizer_depth + 1
        } else {
            state.optimizer_depth.saturating_sub(1)
        };
        self.loss_pending = false;
    }

    pub(super) fn in_optimizer(&self, thread: usize) -> bool {
        self.threads[thread].optimizer_depth > 0
    }

    /// Says which parameters a module owns.
    pub(super) fn own(&mut self, module: u32, parameters: &[usize]) {
        for parameter in parameters {
            self.parameters.insert(*parameter, module);
        }
    }

    /// The scope and stage of an op.
    pub(super) fn place(&mut self, thread: usize, call: &Call, grad_mode: bool) -> Place {
        let state = &self.threads[thread];
        let top = state.active.last().copied();
        let (scope, unattributed, backward) = match top {
            // A module that autograd runs again, or no backward at all.
            Some(active) if active.again || call.graph_task == 0 => (active.scope, false, false),
            _ if call.graph_task == 0 => (ScopeId::GLOBAL, false, false),
            _ => {
                self.loss_pending = false;
                match self.backward_scope(thread, call) {
                    Some(scope) => (scope, false, true),
                    None => (ScopeId::GLOBAL, true, true),
                }
            }
        };
        self.unattributed += u64::from(unattributed);
        let state = &mut self.threads[thread];
        let stage = if state.optimizer_depth > 0 {
            Stage::Optimizer
        } else if backward {
            Stage::Backward
        } else if let Some(active) = top {
            if active.again {
                Stage::Recompute
            } else {
                Stage::Forward
            }
        } else if self.loss_pending && grad_mode {
            Stage::Loss
        } else {
            Stage::Other
        };
        if state.missed_ops {
            state.saw_again(call.peek);
        }
        let newest = state.nodes.back().map_or(0, |n| n.0);
        if call.peek > newest {
            state.made_nodes(call.peek, Some(scope));
        }
        Place {
            scope,
            stage,
            unattributed,
        }
    }

    /// Where the node was made that autograd runs: a scope, if that is known.
    pub(super) fn backward_scope(&mut self, thread: usize, call: &Call) -> Option<ScopeId> {
        if !call.accumulate.is_null() {
            let module = self.parameters.get(&(call.accumulate as usize))?;
            return self.home.get(module).copied();
        }
        if call.node == NO_NODE {
            return None;
        }
        if let Some((node, made_on, scope)) = self.threads[thread].last_node
            && node == call.node
            && made_on == call.node_thread
        {
            return scope;
        }
        let made_on = *self.by_torch_id.get(&call.node_thread)? as usize;
        let nodes = &self.threads[made_on].nodes;
        // The oldest entry may stand for ops that were forgotten before it.
        let full = nodes.len() >= REMEMBERED_NODES;
        let at = nodes.partition_point(|n| n.0 <= call.node);
        let scope = if at == 0 && full {
            None
        } else {
            nodes.get(at).and_then(|n| n.1)
        };
        self.threads[thread].last_node = Some((call.node, call.node_thread, scope));
        scope
    }

    /// Forgets ranges that were opened and not closed: another stream begins.
    pub(super) fn close_ranges(&mut self) {
        for thread in &mut self.threads {
            thread.ranges.clear();
        }
    }

    /// After a fork only the forking thread goes on.
    pub(super) fn forked(&mut self) {
        self.by_torch_id.clear();
        self.unattributed = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(peek: u64, node: u64) -> Call {
        Call {
            op: 0,
            flags: 0,
            words: std::ptr::null(),
            word_count: 0,
            argument_words: 0,
            payload: std::ptr::null(),
            payload_count: 0,
            tensor_count: 0,
            tensors: std::ptr::null(),
            input_count: 0,
            graph_task: u32::from(node != NO_NODE),
            peek,
            node,
            node_thread: 7,
            accumulate: std::ptr::null(),
            thread: 7,
            start_ns: 0,
            end_ns: 0,
            capture: [0; 48],
        }
    }

    fn scopes() -> Scopes {
        let mut scopes = Scopes::new();
        scopes.threads.push(ThreadState::default());
        scopes.know_thread(7, 0);
        scopes
    }

    #[test]
    fn backward_belongs_to_the_module_that_made_the_node() {
        let mut s = scopes();
        s.enter(
            0,
            Entry {
                module: 0,
                graph_task: false,
                training: true,
                grad_mode: true,
            },
            true,
        );
        let (_, fc1) = s.enter(
            0,
            Entry {
                module: 1,
                graph_task: false,
                training: true,
                grad_mode: true,
            },
            true,
        );
        assert_eq!(s.place(0, &call(1, NO_NODE), true).scope, fc1.unwrap());
        s.exit(0, 1);
        let (_, fc2) = s.enter(
            0,
            Entry {
                module: 2,
                graph_task: false,
                training: true,
                grad_mode: true,
            },
            true,
        );
        s.place(0, &call(3, NO_NODE), true);
        s.exit(0, 2);
        s.exit(0, 0);
        assert_eq!(s.place(0, &call(4, NO_NODE), true).stage, Stage::Loss);
        // Nodes 1 and 2 were made by the op with peek 3, node 0 by the one with peek 1.
        for (node, scope) in [(2, fc2), (1, fc2), (0, fc1)] {
            let place = s.place(0, &call(4, node), false);
            assert_eq!(
                (place.scope, place.stage, place.unattributed),
                (scope.unwrap(), Stage::Backward, false),
                "node {node}"
            );
        }
        assert_eq!(s.place(0, &call(4, NO_NODE), true).stage, Stage::Other);
    }

    #[test]
    fn a_module_run_again_by_autograd_is_recomputation() {
        let mut s = scopes();
        s.enter(
            0,
            Entry {
                module: 0,
                graph_task: false,
                training: true,
                grad_mode: true,
            },
            true,
        );
        s.place(0, &call(1, NO_NODE), true);
        s.exit(0, 0);
        let (_, scope) = s.enter(
            0,
            Entry {
                module: 0,
                graph_task: true,
                training: true,
                grad_mode: true,
            },
            true,
        );
        assert_eq!(scope, None);
        let place = s.place(0, &call(2, 0), true);
        assert_eq!((place.stage, place.scope), (Stage::Recompute, ScopeId(1)));
        s.exit(0, 0);
        assert_eq!(s.place(0, &call(2, 0), false).stage, Stage::Backward);
    }

    #[test]
    fn unknown_nodes_are_unattributed_and_counted() {
        let mut s = scopes();
        let place = s.place(0, &call(0, 12), false);
        assert!(place.unattributed && place.scope == ScopeId::GLOBAL);
        assert_eq!(s.unattributed, 1);
    }

    #[test]
    fn an_exception_does_not_leave_modules_behind() {
        let mut s = scopes();
        s.enter(
            0,
            Entry {
                module: 0,
                graph_task: false,
                training: true,
                grad_mode: true,
            },
            true,
        );
        s.enter(
            0,
            Entry {
                module: 1,
                graph_task: false,
                training: true,
                grad_mode: true,
            },
            true,
        );
        assert_eq!(s.exit(0, 0).map(|e| e.root), Some(true));
        assert_eq!(s.place(0, &call(0, NO_NODE), false).scope, ScopeId::GLOBAL);
        assert_eq!(s.exit(0, 1), None);
    }

    #[test]
    fn nodes_of_ops_that_ran_unseen_belong_to_nobody() {
        let mut s = scopes();
        let entry = Entry {
            module: 0,
            graph_task: false,
            training: true,
            grad_mode: true,
        };
        let (_, scope) = s.enter(0, entry, true);
        s.place(0, &call(2, NO_NODE), true);
        // Unseen ops make nodes 2 to 4, then one that is seen makes node 5.
        s.missed_ops();
        s.place(0, &call(6, NO_NODE), true);
        s.exit(0, 0);
        for (node, known) in [(0, true), (1, true), (2, false), (4, false), (5, true)] {
            let place = s.place(0, &call(6, node), false);
            assert_eq!(place.unattributed, !known, "node {node}");
            assert!(!known || Some(place.scope) == scope, "node {node}");
        }
    }

    #[test]
    fn what_began_in_a_pause_is_told_once() {
        let mut s = scopes();
        let entry = |module| Entry {
            module,
            graph_task: false,
            training: false,
            grad_mode: false,
        };
        s.enter(0, entry(0), true);
        s.enter(0, entry(1), false);
        s.threads[0].ranges.push(OpenRange {
            name: TextId(9),
            told: false,
        });
        assert_eq!(s.tell_open_calls(), [(0, 1, 1)]);
        assert_eq!(s.tell_open_calls(), []);
        assert_eq!(s.tell_open_ranges(), [(0, TextId(9))]);
        assert_eq!(s.tell_open_ranges(), []);
        let inner = s.exit(0, 1).unwrap();
        assert!(inner.told && !inner.root && !inner.trained);
    }
}
