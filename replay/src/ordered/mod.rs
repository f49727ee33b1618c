//! One pass over a stream's records in their order, for what depends on what ran before: which storage a neuron's state lies in,
//! what a memory still holds, what a module call was given.
//!
//! [`World`] is what is known at each record; a [`Simulation`] is told of op calls and module calls and adds up
//! [`Amounts`]. Counters that are linear in the statistics need none of this and are answered from summaries.

mod amounts;
mod kept;
#[cfg(test)]
mod tests;
mod walk;
mod world;

pub use amounts::{Amounts, Tree};
pub(crate) use amounts::{Place, RowKey};
pub use kept::KeptValues;
pub(crate) use walk::{Following, walk};
pub use world::{Content, Known, ModuleCall, ModuleState, TensorRef, World};

use optape_trace::{CallId, ModuleId, State, TensorMeta, ThreadId, WatchDef, WatchId};

use crate::rules::{CallRow, RuleError};

/// An op call at its place in the stream. Tensors are those of the signature, by index.
pub struct OrderedCall<'a> {
    /// Its place in the stream.
    pub ordinal: u64,
    /// Structure, statistics and arguments, of this call alone.
    pub row: CallRow<'a>,
    /// Storage of each tensor; the same number is the same memory, and no number is used twice.
    pub storages: &'a [u64],
    /// Identity of each tensor object.
    pub tensors: &'a [u64],
    /// The modules on the stack, innermost first.
    pub modules: &'a [ModuleId],
    /// Where it ran.
    pub thread: ThreadId,
    /// The innermost module call that is open on its thread.
    pub within: Option<(CallId, ModuleId)>,
    /// As the rule set's reports name the op: `aten.add.Tensor`.
    pub shown: &'a str,
}

/// A selected module call begins or ends.
#[derive(Clone, Copy, Debug)]
pub struct ModuleEdge<'a> {
    /// Its place in the stream.
    pub ordinal: u64,
    /// Where it runs.
    pub thread: ThreadId,
    /// Which call.
    pub call: CallId,
    /// Of which module.
    pub module: ModuleId,
    /// Identities of its tensor arguments, or of its tensor results; 0 where it has none.
    pub tensors: &'a [u64],
}

/// A selected value that was watched.
pub struct WatchedCall<'a> {
    /// Its place in the stream.
    pub ordinal: u64,
    /// Which watch.
    pub watch: WatchId,
    /// What is watched of what.
    pub definition: &'a WatchDef,
    /// Shape and type.
    pub meta: &'a TensorMeta,
    /// The innermost module call that is open on its thread.
    pub within: Option<(CallId, ModuleId)>,
    /// What statistics say.
    pub known: Known,
    /// Whether they were taken, and else why not; `None` where nobody asked for them.
    pub state: Option<State>,
    /// Where the value itself is, if it was kept.
    pub kept: &'a KeptValues<'a>,
}

/// Follows a stream. One is made for each stream.
pub trait Simulation {
    /// Whether [`Self::call`] and [`Self::module_call`] are to be told. What is known of tensors is known only where somebody wants them.
    fn wants_calls(&self) -> bool {
        true
    }

    /// Whether [`Self::module_enter`] and [`Self::module_exit`] are to be told.
    fn wants_edges(&self) -> bool {
        false
    }

    /// A selected op ran. Where it stands is already set in `out`.
    ///
    /// # Errors
    /// Where the trace lacks what is needed here, or the rules refuse the call.
    fn call(
        &mut self,
        world: &World<'_>,
        call: &OrderedCall<'_>,
        out: &mut Amounts,
    ) -> Result<(), RuleError> {
        let _ = (world, call, out);
        Ok(())
    }

    /// A selected module call has ended, and what is known of the values that went in and came out is known. Calls come in any order.
    ///
    /// # Errors
    /// As [`Self::call`].
    fn module_call(
        &mut self,
        world: &World<'_>,
        call: &ModuleCall,
        out: &mut Amounts,
    ) -> Result<(), RuleError> {
        let _ = (world, call, out);
        Ok(())
    }

    /// A selected module call begins. What goes in is not known yet: see [`Self::module_call`].
    ///
    /// # Errors
    /// As [`Self::call`].
    fn module_enter(
        &mut self,
        world: &World<'_>,
        edge: &ModuleEdge<'_>,
        out: &mut Amounts,
    ) -> Result<(), RuleError> {
        let _ = (world, edge, out);
        Ok(())
    }

    /// A selected module call ends.
    ///
    /// # Errors
    /// As [`Self::call`].
    fn module_exit(
        &mut self,
        world: &World<'_>,
        edge: &ModuleEdge<'_>,
        out: &mut Amounts,
    ) -> Result<(), RuleError> {
        let _ = (world, edge, out);
        Ok(())
    }

    /// A selected value was watched. Which ops are selected plays no part.
    ///
    /// # Errors
    /// As [`Self::call`].
    fn watched(
        &mut self,
        world: &World<'_>,
        call: &WatchedCall<'_>,
        out: &mut Amounts,
    ) -> Result<(), RuleError> {
        let _ = (world, call, out);
        Ok(())
    }

    /// The stream has ended.
    ///
    /// # Errors
    /// As [`Self::call`].
    fn finish(&mut self, world: &World<'_>, out: &mut Amounts) -> Result<(), RuleError> {
        let _ = (world, out);
        Ok(())
    }
}
