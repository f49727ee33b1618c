//! When storages and tensor objects come and go (T6, `--level full`).
//!
//! Storages of torch's own CPU allocator report their death exactly. Others (NumPy's memory, other devices) are known to
//! be gone when another storage object has taken their place. A tensor object is gone with its storage at the latest; that it
//! went before is known once its address carries another one. No weak references: `swap_tensors` and some
//! `module.to()` refuse tensors that have any.

use std::collections::VecDeque;

use optape_trace::{Event, StorageId, TensorId};

use super::identities::AddressMap;
use crate::abi::{Tensor, tensor_state};
use crate::clock::monotonic_ns;

/// Deaths that are remembered for the ops that they happen in.
const RECENT: usize = 256;
/// Objects that are remembered; beyond it the table begins anew, and their ends are told by their storages alone.
const MOST_OBJECTS: usize = 1 << 16;

/// A storage that died a moment ago.
struct Gone {
    base: usize,
    storage: u64,
    at_ns: u64,
}

#[derive(Clone, Copy)]
struct Object {
    tensor: u64,
    storage: u64,
}

/// What is alive.
pub(super) struct Lifetimes {
    newest_storage: u64,
    newest_tensor: u64,
    /// Ids up to these may have been given before the stream began: of these alone the tables say whether they were told.
    before: [u64; 2],
    /// Storages whose death will not be reported, by their StorageImpl.
    foreign: AddressMap<u64>,
    /// Ids of the storages that are alive.
    alive: AddressMap<()>,
    /// By TensorImpl.
    objects: AddressMap<Object>,
    recent: VecDeque<Gone>,
}

impl Lifetimes {
    /// `before`: the newest ids of a storage and of a tensor object, which the stream knows nothing of.
    pub(super) fn new(before: [u64; 2]) -> Self {
        Self {
            newest_storage: 0,
            newest_tensor: 0,
            before,
            foreign: AddressMap::default(),
            alive: AddressMap::default(),
            objects: AddressMap::default(),
            recent: VecDeque::new(),
        }
    }

    /// Before the stream begins, ids up to these were given.
    pub(super) fn known_before(&mut self, newest: [u64; 2]) {
        self.before = newest;
    }

    /// The storage that an argument had, where it died while the op ran, which began at `start_ns` (`resize_`, `set_`).
    pub(super) fn gone_since(&self, tensor: &Tensor, start_ns: u64) -> Option<u64> {
        let owned = tensor.flags & tensor_state::OWNED != 0;
        if !owned || tensor.flags & tensor_state::ADOPTED != 0 {
            return None;
        }
        let base = tensor.storage_base as usize;
        let newest_first = self.recent.iter().rev();
        newest_first
            .take_while(|gone| gone.at_ns >= start_ns)
            .find(|gone| gone.base == base)
            .map(|gone| gone.storage)
    }

    /// A tensor, with its ids: what its being there says.
    pub(super) fn seen(
        &mut self,
        tensor: &Tensor,
        storage: u64,
        id: u64,
        mut tell: impl FnMut(Event),
    ) {
        let [storages_before, tensors_before] = self.before;
        let untold = storage <= storages_before
            && storage != 0
            && !self.alive.contains_key(&(storage as usize));
        if storage > self.newest_storage || untold {
            self.newest_storage = self.newest_storage.max(storage);
            self.storage_born(tensor, storage, &mut tell);
        }
        let address = tensor.implementation as usize;
        let untold = id <= tensors_before
            && self
                .objects
                .get(&address)
                .is_none_or(|known| known.tensor != id);
        if id > self.newest_tensor || untold {
            self.newest_tensor = self.newest_tensor.max(id);
            if self.objects.len() >= MOST_OBJECTS {
                self.objects.clear();
            }
            let object = Object {
                tensor: id,
                storage,
            };
            // With its storage an object has gone already.
            if let Some(before) = self.objects.insert(address, object)
                && (before.storage == 0 || self.alive.contains_key(&(before.storage as usize)))
            {
                tell(Event::TensorDied {
                    tensor: TensorId(before.tensor),
                });
            }
        }
    }

    fn storage_born(&mut self, tensor: &Tensor, storage: u64, tell: &mut impl FnMut(Event)) {
        let object = tensor.storage as usize;
        if let Some(before) = self.foreign.remove(&object) {
            self.alive.remove(&(before as usize));
            tell(died(before));
        }
        self.alive.insert(storage as usize, ());
        if tensor.flags & tensor_state::OWNED == 0 {
            self.foreign.insert(object, storage);
        }
        tell(Event::StorageBorn {
            storage: StorageId(storage),
            bytes: tensor.storage_bytes,
        });
    }

    /// The memory of a storage is about to be freed.
    pub(super) fn freed(&mut self, base: usize, storage: u64, mut tell: impl FnMut(Event)) {
        if self.recent.len() >= RECENT {
            self.recent.pop_front();
        }
        self.recent.push_back(Gone {
            base,
            storage,
            at_ns: monotonic_ns(),
        });
        if self.alive.remove(&(storage as usize)).is_some() {
            tell(died(storage));
        }
    }
}

fn died(storage: u64) -> Event {
    Event::StorageDied {
        storage: StorageId(storage),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tensor object at one address, its storage at another, its memory at a third.
    fn tensor(implementation: usize, storage: usize, base: usize, flags: u32) -> Tensor {
        let pointer = |address: usize| std::ptr::without_provenance(address);
        Tensor {
            implementation: pointer(implementation),
            storage: pointer(storage),
            storage_base: pointer(base),
            data: std::ptr::null(),
            device_data: 0,
            sizes: std::ptr::null(),
            strides: std::ptr::null(),
            storage_bytes: 64,
            version: 0,
            flags,
            dtype: 6,
            device_kind: 0,
            device_index: -1,
            dim: 0,
            argument: 0,
        }
    }

    fn born(storage: u64) -> Event {
        Event::StorageBorn {
            storage: StorageId(storage),
            bytes: 64,
        }
    }

    #[test]
    fn storages_and_objects_come_and_go() {
        let mut lifetimes = Lifetimes::new([0; 2]);
        let mut told = Vec::new();
        let owned = tensor_state::OWNED | tensor_state::ADOPTED;
        lifetimes.seen(&tensor(1, 10, 100, owned), 1, 1, |e| told.push(e));
        // A view of it, and both again.
        lifetimes.seen(&tensor(2, 10, 100, owned), 1, 2, |e| told.push(e));
        lifetimes.seen(&tensor(1, 10, 100, tensor_state::OWNED), 1, 1, |e| {
            told.push(e)
        });
        // Another object where the view was, and one where the first was, which went with its memory.
        lifetimes.seen(&tensor(2, 11, 200, owned), 2, 3, |e| told.push(e));
        lifetimes.freed(100, 1, |e| told.push(e));
        lifetimes.seen(&tensor(1, 11, 200, owned), 2, 4, |e| told.push(e));
        // Memory that nobody reports: its end is known when its object's address has other memory.
        lifetimes.seen(&tensor(3, 12, 300, 0), 3, 5, |e| told.push(e));
        lifetimes.seen(&tensor(4, 12, 400, 0), 4, 6, |e| told.push(e));
        let object = Event::TensorDied {
            tensor: TensorId(2),
        };
        assert_eq!(
            told,
            [born(1), born(2), object, died(1), born(3), died(3), born(4)]
        );
    }

    #[test]
    fn what_was_there_before_the_stream_is_told_when_it_is_seen() {
        // Storages 1 to 3 and tensors 1 to 3 have their ids already.
        let mut lifetimes = Lifetimes::new([3, 3]);
        let mut told = Vec::new();
        let owned = tensor_state::OWNED | tensor_state::ADOPTED;
        lifetimes.seen(&tensor(9, 90, 900, owned), 4, 4, |e| told.push(e));
        lifetimes.seen(&tensor(2, 20, 200, 0), 2, 2, |e| told.push(e));
        lifetimes.seen(&tensor(2, 20, 200, 0), 2, 2, |e| told.push(e));
        lifetimes.freed(300, 3, |e| told.push(e));
        lifetimes.freed(200, 2, |e| told.push(e));
        assert_eq!(told, [born(4), born(2), died(2)], "nobody saw the third");
    }

    #[test]
    fn what_an_op_frees_was_its_argument() {
        let mut lifetimes = Lifetimes::new([0; 2]);
        let before = monotonic_ns();
        let argument = tensor(1, 10, 100, tensor_state::OWNED);
        lifetimes.seen(&argument, 1, 1, |_| ());
        assert_eq!(lifetimes.gone_since(&argument, before), None);
        lifetimes.freed(100, 1, |_| ());
        assert_eq!(lifetimes.gone_since(&argument, before), Some(1));
        // An op that began later got other memory at that address.
        assert_eq!(lifetimes.gone_since(&argument, monotonic_ns() + 1), None);
        let new = tensor(1, 10, 100, tensor_state::OWNED | tensor_state::ADOPTED);
        assert_eq!(lifetimes.gone_since(&new, before), None);
    }
}
