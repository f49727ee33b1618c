//! Identities (T6): which storage, which tensor object, and in which state its values are.
//!
//! Addresses are reused, so an address alone is no identity. A storage that torch's own allocator made has its deleter
//! swapped by the hook, so that its death is known exactly; its id lives as long as it does. Other storages
//! are known by address, base and size together, and their values are never cached.
//!
//! A tensor object is new when an op returns an object that it did not get, or when its address carries another storage than before.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use crate::abi::{Tensor, tensor_state};
use crate::statistics::Answer;

/// Hashes addresses: one multiplication spreads the bits that allocators leave equal.
#[derive(Default)]
pub(super) struct AddressHasher(u64);

impl Hasher for AddressHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0u8; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.write_u64(u64::from_le_bytes(word));
        }
    }

    fn write_u64(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(23) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 ^= self.0 >> 29;
    }

    fn write_usize(&mut self, word: usize) {
        self.write_u64(word as u64);
    }
}

/// A map keyed by addresses.
pub(super) type AddressMap<V> = HashMap<usize, V, BuildHasherDefault<AddressHasher>>;

/// Entries of the two generations of a bounded table; see [`Generations`].
const GENERATION: usize = 1 << 15;

/// A bounded map: when the young generation is full it becomes the old one, and what was old and unused is forgotten.
struct Generations<V> {
    young: AddressMap<V>,
    old: AddressMap<V>,
}

impl<V: Copy> Generations<V> {
    fn new() -> Self {
        Self {
            young: AddressMap::default(),
            old: AddressMap::default(),
        }
    }

    fn get(&mut self, key: usize) -> Option<V> {
        if let Some(value) = self.young.get(&key) {
            return Some(*value);
        }
        let value = self.old.remove(&key)?;
        self.insert(key, value);
        Some(value)
    }

    fn insert(&mut self, key: usize, value: V) {
        if self.young.len() >= GENERATION {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(key, value);
    }
}

/// How many answers are remembered per storage: views of one storage with different extents (select over time steps).
const REMEMBERED: usize = 4;

/// Which values an answer is about. Equal keys on one storage generation mean equal values.
#[derive(Clone, Copy, PartialEq, Eq)]
struct ValueKey {
    data: usize,
    version: u32,
    dtype: i8,
    /// Hash of sizes and strides with the order of dimensions left out where the values fill one run of memory.
    extent: u64,
}

struct OwnedStorage {
    id: u64,
    /// Raised by every op whose schema writes the storage.
    generation: u32,
    remembered: [Option<(ValueKey, u32, Answer)>; REMEMBERED],
    next: usize,
}

#[derive(Clone, Copy)]
struct ForeignStorage {
    base: usize,
    bytes: u64,
    id: u64,
}

#[derive(Clone, Copy)]
struct TensorObject {
    id: u64,
    storage: u64,
}

/// The tables.
pub(super) struct Identities {
    /// Regions that run now, on any thread, in which values change unseen.
    opaque_regions: u32,
    owned: AddressMap<OwnedStorage>,
    foreign: Generations<ForeignStorage>,
    tensors: Generations<TensorObject>,
    next_storage: u64,
    next_tensor: u64,
}

impl Identities {
    pub(super) fn new() -> Self {
        Self {
            opaque_regions: 0,
            owned: AddressMap::default(),
            foreign: Generations::new(),
            tensors: Generations::new(),
            next_storage: 1,
            next_tensor: 1,
        }
    }

    /// The newest ids of a storage and of a tensor object.
    pub(super) fn given(&self) -> [u64; 2] {
        [self.next_storage - 1, self.next_tensor - 1]
    }

    /// The id of a tensor's storage; 0 where it has none.
    pub(super) fn storage(&mut self, tensor: &Tensor) -> u64 {
        let base = tensor.storage_base as usize;
        if tensor.flags & tensor_state::OWNED != 0 {
            // Deaths are told exactly, so an entry is always about the storage that is there now.
            if let Some(known) = self.owned.get(&base) {
                return known.id;
            }
            let id = self.next_storage;
            self.next_storage += 1;
            self.owned.insert(
                base,
                OwnedStorage {
                    id,
                    generation: 0,
                    remembered: [None; REMEMBERED],
                    next: 0,
                },
            );
            return id;
        }
        if tensor.storage.is_null() || tensor.storage_bytes == 0 {
            return 0;
        }
        let key = tensor.storage as usize;
        if let Some(known) = self.foreign.get(key)
            && known.base == base
            && known.bytes == tensor.storage_bytes
        {
            return known.id;
        }
        let id = self.next_storage;
        self.next_storage += 1;
        self.foreign.insert(
            key,
            ForeignStorage {
                base,
                bytes: tensor.storage_bytes,
                id,
            },
        );
        id
    }

    /// The id of a tensor object on storage `storage`. `returned`: an op returned it without having got it.
    pub(super) fn tensor(&mut self, tensor: &Tensor, storage: u64, returned: bool) -> u64 {
        let key = tensor.implementation as usize;
        if !returned
            && let Some(known) = self.tensors.get(key)
            && known.storage == storage
        {
            return known.id;
        }
        let id = self.next_tensor;
        self.next_tensor += 1;
        self.tensors.insert(key, TensorObject { id, storage });
        id
    }

    /// Ops ran unseen: nobody knows what they wrote, and which objects came and went at the addresses of others. Storages whose
    /// deaths are told keep their ids.
    pub(super) fn missed_ops(&mut self) {
        self.forget_values();
        self.foreign = Generations::new();
        self.tensors = Generations::new();
    }

    /// Memory is freed. Gives the storage that it was.
    pub(super) fn freed(&mut self, base: usize) -> Option<u64> {
        self.owned.remove(&base).map(|storage| storage.id)
    }

    /// An op wrote the tensor: what is known of its storage's values is void.
    pub(super) fn written(&mut self, tensor: &Tensor) {
        if let Some(storage) = self.owned.get_mut(&(tensor.storage_base as usize)) {
            storage.generation = storage.generation.wrapping_add(1);
        }
    }

    /// Forgets what is known of all values: ops may have run unseen.
    pub(super) fn forget_values(&mut self) {
        for storage in self.owned.values_mut() {
            storage.generation = storage.generation.wrapping_add(1);
        }
    }

    /// Until [`Self::exit_opaque`] values may change at any time, unseen: nothing is known of them.
    pub(super) fn enter_opaque(&mut self) {
        self.opaque_regions += 1;
    }

    /// A region that was entered ends. What is known of values is still that from before it.
    pub(super) fn exit_opaque(&mut self) {
        self.opaque_regions = self.opaque_regions.saturating_sub(1);
    }

    /// In a forked child, which has none of the threads that regions ran on.
    pub(super) fn forked(&mut self) {
        self.opaque_regions = 0;
    }

    /// What is known of the values.
    pub(super) fn recall(&self, tensor: &Tensor) -> Option<Answer> {
        if tensor.flags & tensor_state::CACHEABLE == 0 || self.opaque_regions != 0 {
            return None;
        }
        let storage = self.owned.get(&(tensor.storage_base as usize))?;
        let key = value_key(tensor)?;
        storage
            .remembered
            .iter()
            .flatten()
            .find(|(known, generation, _)| *known == key && *generation == storage.generation)
            .map(|(_, _, answer)| *answer)
    }

    /// Remembers what was found of the values as they are now.
    pub(super) fn remember(&mut self, tensor: &Tensor, answer: &Answer) {
        if tensor.flags & tensor_state::CACHEABLE == 0 {
            return;
        }
        let Some(key) = value_key(tensor) else { return };
        if let Some(storage) = self.owned.get_mut(&(tensor.storage_base as usize)) {
            let place = storage
                .remembered
                .iter()
                .position(|r| {
                    r.is_none_or(|(known, generation, _)| {
                        known == key || generation != storage.generation
                    })
                })
                .unwrap_or(storage.next);
            storage.next = (place + 1) % REMEMBERED;
            storage.remembered[place] = Some((key, storage.generation, *answer));
        }
    }
}

fn value_key(tensor: &Tensor) -> Option<ValueKey> {
    if tensor.data.is_null() || tensor.strides.is_null() || tensor.version == u32::MAX {
        return None;
    }
    let sizes = super::measuring::sizes(tensor);
    let strides = super::measuring::strides(tensor);
    let mut dense = true;
    let mut elements = 1i64;
    // Row-major is by far the commonest; the transposed matrix comes next.
    for (size, stride) in sizes.iter().zip(strides).rev() {
        dense &= *size == 1 || *stride == elements;
        elements = elements.wrapping_mul(*size);
    }
    if !dense && let ([rows, columns], [1, step]) = (sizes, strides) {
        dense = rows == step && *columns > 0;
    }
    let mut hasher = AddressHasher::default();
    if dense {
        hasher.write_u64(elements as u64);
    } else {
        hasher.write_u64(u64::MAX);
        for word in sizes.iter().chain(strides) {
            hasher.write_u64(*word as u64);
        }
    }
    Some(ValueKey {
        data: tensor.data as usize,
        version: tensor.version,
        dtype: tensor.dtype,
        extent: hasher.finish(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_known_of_values_while_an_opaque_region_runs() {
        static SIZES: [i64; 1] = [4];
        static STRIDES: [i64; 1] = [1];
        let data = [0.0f32; 4];
        let tensor = Tensor {
            implementation: data.as_ptr().cast(),
            storage: data.as_ptr().cast(),
            storage_base: data.as_ptr().cast(),
            data: data.as_ptr().cast(),
            sizes: SIZES.as_ptr(),
            strides: STRIDES.as_ptr(),
            storage_bytes: 16,
            device_data: 0,
            version: 0,
            flags: tensor_state::OWNED | tensor_state::ADOPTED | tensor_state::CACHEABLE,
            dtype: optape_trace::DType::F32.0,
            device_kind: 0,
            device_index: -1,
            dim: 1,
            argument: 0,
        };
        let answer = Answer {
            nonzeros: Some(0),
            ..Answer::default()
        };
        let mut identities = Identities::new();
        identities.storage(&tensor);
        identities.remember(&tensor, &answer);
        assert_eq!(identities.recall(&tensor), Some(answer));
        // One within the other, as a CUDA graph runs within compiled code.
        identities.enter_opaque();
        identities.enter_opaque();
        assert_eq!(identities.recall(&tensor), None);
        identities.exit_opaque();
        identities.remember(&tensor, &answer);
        assert_eq!(identities.recall(&tensor), None);
        identities.exit_opaque();
        identities.forget_values();
        assert_eq!(identities.recall(&tensor), None);
        identities.remember(&tensor, &answer);
        assert_eq!(identities.recall(&tensor), Some(answer));
    }
}
