//! Identities. A newtype for every number that names something, so that a storage id cannot be
//! taken for a tensor id. All of them belong to one stream: two streams number independently.

use bincode::{Decode, Encode};

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($raw:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
        pub struct $name(pub $raw);

        impl $name {
            /// The id as an index into a table.
            #[must_use]
            #[allow(clippy::cast_possible_truncation, reason = "tables that would need more than 32 bits do not fit into a 32-bit memory")]
            pub const fn index(self) -> usize {
                self.0 as usize
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, "{}", self.0)
            }
        }
    };
}

id! {
    /// One recorded process (or rank, worker, fork) of a run.
    StreamId(u32)
}
id! {
    /// An interned text: range names, stage names, string arguments.
    TextId(u32)
}
id! {
    /// An operator overload, `aten::add.Tensor`.
    OpId(u32)
}
id! {
    /// The structure of an op call: everything about it that repeats.
    SignatureId(u32)
}
id! {
    /// Which statistics an op call carries, and what they said that is not a number.
    PatternId(u32)
}
id! {
    /// A stack of active modules. `ScopeId(0)` is `Global`, the empty stack.
    ScopeId(u32)
}
id! {
    /// A module object.
    ModuleId(u32)
}
id! {
    /// A thread of the recorded process.
    ThreadId(u32)
}
id! {
    /// A watched tensor: a module's output, a user's `optape::watch`.
    WatchId(u32)
}
id! {
    /// A storage, never reused within a stream. 0: none, or not recorded.
    StorageId(u64)
}
id! {
    /// A tensor object, never reused within a stream. 0: none, or not recorded.
    TensorId(u64)
}
id! {
    /// One call of a module.
    CallId(u64)
}
id! {
    /// The position of a record in its stream, from 0.
    Ordinal(u64)
}

impl ScopeId {
    /// The scope of everything: no module is active.
    pub const GLOBAL: Self = Self(0);
}
