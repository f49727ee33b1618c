//! Facts (T7), and which states the neurons hold: what is known of the program beyond its ops.
//!
//! A fact is told when it becomes known and when it changes, so a stream that begins later, in this process or in a forked one, is told all of them
//! first.

use std::collections::{BTreeMap, HashMap};

use optape_trace::{ModuleId, TextId};

/// A longer value is left out; in its place stands how long it would have been.
pub(super) const LONGEST_VALUE: usize = 256 << 10;
/// Facts of a process may take this much; what comes after them is left out, and counted.
const MOST_BYTES: usize = 8 << 20;

/// A state was assigned while nobody looked.
const UNSEEN: u64 = u64::MAX;

/// Who a fact is about, and its key.
pub(super) type Subject = (Option<ModuleId>, TextId);

/// Everything told so far, and the state attributes as they are now.
#[derive(Default)]
pub(super) struct Facts {
    /// By subject, in the order of the trace.
    pub(super) values: BTreeMap<Subject, String>,
    bytes: usize,
    /// How many were left out.
    pub(super) left_out: u64,
    /// Tensor id that a state attribute holds; 0: what it holds is no tensor; [`UNSEEN`].
    states: HashMap<(ModuleId, TextId), u64>,
    /// By module: its training flag, once it was called.
    training: Vec<Option<bool>>,
}

impl Facts {
    /// Takes a fact. False: it is known already, or there is no room for it.
    pub(super) fn learn(&mut self, subject: Subject, value: &str) -> bool {
        let before = self.values.get(&subject);
        if before.is_some_and(|known| known == value) {
            return false;
        }
        let bytes = self.bytes - before.map_or(0, String::len) + value.len();
        if bytes > MOST_BYTES {
            self.left_out += 1;
            return false;
        }
        self.bytes = bytes;
        self.values.insert(subject, value.to_owned());
        true
    }

    /// A state attribute holds a tensor, or (0) something else. Gives whether that is new.
    pub(super) fn assign(&mut self, module: ModuleId, attribute: TextId, tensor: u64) -> bool {
        let known = self.states.entry((module, attribute)).or_insert(0);
        std::mem::replace(known, tensor) != tensor
    }

    /// A state attribute was assigned something that nobody looked at: the next assignment is told, whatever it is.
    pub(super) fn forget_state(&mut self, module: ModuleId, attribute: TextId) {
        self.states.insert((module, attribute), UNSEEN);
    }

    /// The state attributes that hold tensors now, in order.
    pub(super) fn states(&self) -> Vec<(ModuleId, TextId, u64)> {
        let held = self
            .states
            .iter()
            .filter(|(_, tensor)| ![0, UNSEEN].contains(tensor));
        let mut states: Vec<_> = held.map(|((m, a), tensor)| (*m, *a, *tensor)).collect();
        states.sort_unstable();
        states
    }

    /// A module is called with this training flag. Gives whether that is new.
    pub(super) fn trains(&mut self, module: ModuleId, training: bool) -> bool {
        let index = module.index();
        if index >= self.training.len() {
            self.training.resize(index + 1, None);
        }
        self.training
            .get_mut(index)
            .is_some_and(|known| known.replace(training) != Some(training))
    }
}

/// The value that stands for one that is too long.
pub(super) fn left_out(bytes: usize) -> String {
    format!("{{\"left_out_bytes\":{bytes}}}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_news_is_told() {
        let mut facts = Facts::default();
        let subject = (Some(ModuleId(3)), TextId(1));
        assert!(facts.learn(subject, "1"));
        assert!(!facts.learn(subject, "1"));
        assert!(facts.learn(subject, "2"));
        assert!(facts.learn((None, TextId(1)), "2"));
        assert_eq!(facts.values[&subject], "2");
    }

    #[test]
    fn facts_are_bounded() {
        let mut facts = Facts::default();
        let large = "x".repeat(MOST_BYTES / 2);
        assert!(facts.learn((None, TextId(0)), &large));
        assert!(facts.learn((None, TextId(1)), &large));
        assert!(!facts.learn((None, TextId(2)), "1"));
        assert_eq!(facts.left_out, 1);
        assert!(
            facts.learn((None, TextId(1)), "1"),
            "what is replaced frees its room"
        );
    }

    #[test]
    fn a_state_is_told_when_it_becomes_another_tensor() {
        let mut facts = Facts::default();
        let (m, v) = (ModuleId(0), TextId(0));
        assert!(!facts.assign(m, v, 0), "no tensor to begin with");
        assert!(facts.assign(m, v, 5));
        assert!(!facts.assign(m, v, 5));
        assert!(facts.assign(m, v, 6));
        assert!(facts.assign(m, v, 0));
        facts.forget_state(m, v);
        assert_eq!(facts.states(), []);
        assert!(facts.assign(m, v, 0), "it may have been a tensor");
    }

    #[test]
    fn a_training_flag_is_told_when_it_changes() {
        let mut facts = Facts::default();
        let told: Vec<bool> = [true, true, false, true]
            .map(|training| facts.trains(ModuleId(2), training))
            .into();
        assert_eq!(told, [true, false, true, true]);
    }
}
