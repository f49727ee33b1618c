//! Texts by number.

use std::collections::HashMap;

use optape_trace::TextId;

use super::measuring;

/// Distinct texts that a stream may hold; what comes after them is [`Texts::OVERFLOW`].
const MOST_TEXTS: usize = 1 << 16;

/// Interned texts.
pub(super) struct Texts {
    pub(super) ids: HashMap<String, TextId>,
    pub(super) all: Vec<String>,
}

impl Texts {
    pub(super) const OVERFLOW: &'static str = "(too many different texts)";

    pub(super) fn new() -> Self {
        let mut texts = Self {
            ids: HashMap::new(),
            all: Vec::new(),
        };
        for text in measuring::WELL_KNOWN_TEXTS {
            texts.intern(text);
        }
        texts
    }

    /// The text's id, and whether it is new.
    pub(super) fn intern(&mut self, text: &str) -> (TextId, bool) {
        if let Some(id) = self.ids.get(text) {
            return (*id, false);
        }
        if self.all.len() >= MOST_TEXTS && text != Self::OVERFLOW {
            return self.intern(Self::OVERFLOW);
        }
        let id = TextId(self.all.len() as u32);
        self.all.push(text.to_owned());
        self.ids.insert(text.to_owned(), id);
        (id, true)
    }
}
