//! One pass over a stream's records in their order, for what depends on what ran before: which storage a neuron's state lies in,
//! what a memory still holds, what a module call was given.
//!
//! [`World`] is what is known at each record; a [`Simulation`] is told of op calls and module calls and adds up
//! [`Amounts`]. Counters that are linear in the statistics need none of this and are answered from summaries.

mod amounts;
#[cfg(test)]
pub(crate) mod tests;
mod walk;
mod world;

pub use amounts::{Amounts, Tree};
pub(crate) use amounts::{Place, RowKey};
pub(crate) use walk::{Explaining, Following, Told, Way, walk};
pub use world::{Content, Known, ModuleCall, ModuleState, TensorRef, World};

use std::collections::HashMap;

use optape_trace::{ModuleId, SignatureId};

use crate::rules::{CallRow, RuleError};

/// By numbers that count up and are looked up at every call: hashed fast, and alike in every run.
pub(crate) type Map<K, V> = HashMap<K, V, foldhash::fast::FixedState>;

/// An op call at its place in the stream. Tensors are those of the signature, by index.
pub struct OrderedCall<'a> {
    /// Its place in the stream.
    pub ordinal: u64,
    /// The number of its structure: what depends on nothing else can be kept by it.
    pub signature: SignatureId,
    /// Structure, statistics and arguments, of this call alone.
    pub row: CallRow<'a>,
    /// Storage of each tensor; the same number is the same memory, and no number is used twice.
    pub storages: &'a [u64],
    /// Identity of each tensor object.
    pub tensors: &'a [u64],
    /// The modules on the stack, innermost first.
    pub modules: &'a [ModuleId],
    /// As the rule set's reports name the op: `aten.add.Tensor`.
    pub shown: &'a str,
}

/// Follows a stream. One is made for each stream.
pub trait Simulation {
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

    /// Wants to be told of module calls.
    fn takes_module_calls(&self) -> bool {
        true
    }

    /// Adds what it has kept back so far. Is called before [`Self::finish`], and after every call that somebody wants to see alone.
    fn settle(&mut self, out: &mut Amounts) {
        let _ = out;
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
